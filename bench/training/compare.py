"""Goldgate beside the stock trainer, and beside itself with other options, on one case."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench.training.cases import Case
from bench.training.clock import account
from bench.training.options import DEFAULT, OPTIONS, Option, is_default
from bench.training.runs import Run, StoppedError, count_tokens, dev_losses, train_goldgate, train_stock
from tasks.contracts.spec import SpeedSpec

Row = dict[str, Any]
Trainer = Callable[[Case, Path, int], Run]

OURS, STOCK = "Goldgate", "stock, defaults"
# What somebody who knows trl would set on a CPU; see README.md for what was tried besides.
_BY_HAND: Row = {"gradient_checkpointing": False, "bf16": False}


def _goldgate(case: Case, folder: Path, seed: int, speed: SpeedSpec | None = None) -> Run:
    return train_goldgate(case, folder, seed=seed, speed=speed)


def _stock(case: Case, folder: Path, seed: int, config: Row | None = None) -> Run:
    return train_stock(case, folder, seed=seed, options={"config": config or {}})


TRAINERS: dict[str, Trainer] = {
    OURS: _goldgate,
    STOCK: _stock,
    "stock, by hand: like lengths": partial(_stock, config=_BY_HAND | {"train_sampling_strategy": "group_by_length"}),
    "stock, by hand: no padding": partial(_stock, config=_BY_HAND | {"padding_free": True}),
}


def compare(case: Case, seeds: Sequence[int], work: Path, trainers: Mapping[str, Trainer] = TRAINERS) -> list[Row]:
    """Every trainer with every seed, in turn (A B C, A B C, ...): what drifts on the machine meets all of them.

    Raises:
        StoppedError: one of them failed.
    """
    tokens = count_tokens(case)
    rows: list[Row] = []
    adapters: list[Path] = []
    for seed in seeds:
        for name, train in trainers.items():
            folder = work / "runs" / f"{case.name}-{seed}-{len(adapters) % len(trainers)}"
            run = train(case, folder, seed)
            rows.append({"task": case.name, "trainer": name, "seed": seed} | what_it_took(run, tokens))
            assert run.adapter is not None
            adapters.append(run.adapter)
            _tell(case, name, rows[-1])
    for row, loss in zip(rows, dev_losses(case, adapters, work), strict=True):
        row["dev_loss"] = loss
    return rows


def try_options(
    case: Case, seeds: Sequence[int], work: Path, options: Sequence[Option] = OPTIONS, on_cuda: bool = False
) -> list[Row]:
    """Goldgate's default, then each option alone; one that is the default by the plan is not run again.

    An option that is refused or fails is a row too, with the reason.
    """
    tokens = count_tokens(case)
    rows: list[Row] = []
    adapters: list[Path] = []
    judged: list[Row] = []

    def run(name: str, speed: SpeedSpec | None, seed: int) -> Row:
        row: Row = {"task": case.name, "option": name, "seed": seed}
        try:
            ended = train_goldgate(case, work / "runs" / f"{case.name}-{seed}-o{len(rows)}", seed=seed, speed=speed)
        except StoppedError as stopped:
            row["stopped"] = str(stopped)[-500:]
        else:
            row |= {"plan": ended.speed} | what_it_took(ended, tokens)
            assert ended.adapter is not None
            adapters.append(ended.adapter)
            judged.append(row)
            _tell(case, name, row)
        rows.append(row)
        return row

    for seed in seeds:
        default = run(DEFAULT, None, seed)
        if "stopped" in default:
            raise StoppedError(default["stopped"])
        for option in options:
            row: Row = {"task": case.name, "option": option.name, "seed": seed}
            if option.needs_cuda and not on_cuda:
                rows.append(row | {"skipped": "needs a CUDA device"})
            elif is_default(option, default["plan"]):
                rows.append(row | {"skipped": "is the default here"})
            else:
                run(option.name, option.spec(), seed)
    for row, loss in zip(judged, dev_losses(case, adapters, work), strict=True):
        row["dev_loss"] = loss
    return rows


def what_it_took(run: Run, tokens: int) -> Row:
    """A run as a row of results.json; `tokens` are those of its rows, without padding."""
    took = account(run.training.events)
    return {
        "steps": took.steps,
        "tokens": tokens,
        "seconds": took.seconds,
        "tokens_per_second": tokens / took.seconds,
        "cpu_seconds": took.cpu_seconds,
        "pause_seconds": took.pause_seconds,
        "first_step_seconds": took.first_seconds,
        "process_seconds": run.process_seconds,
        "peak_mb": took.peak_bytes / 2**20,
        "losses": [loss for _, loss in run.training.losses],
    }


def _tell(case: Case, name: str, row: Row) -> None:
    rate = f"{row['tokens_per_second']:,.0f} tokens/s, {row['peak_mb']:,.0f} MB"
    print(f"{case.name}, seed {row['seed']}, {name}: {rate}", file=sys.stderr)
