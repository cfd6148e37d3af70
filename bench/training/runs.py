"""One training, by Goldgate or by the stock trainer, in a process of its own, under the clock."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.training import THREADS
from bench.training.cases import ROOT, Case
from bench.training.clock import Training, read_clock
from tasks.contracts.references import BaseModelRef, SplitsRef, TrainRequest
from tasks.contracts.spec import ExecutionSpec, Guard, SpeedSpec, TrainSpec
from tasks.training.job import ERROR, SUMMARY, TrainJob

_WHY = "What is measured is speed, on rows that are chosen for it."
_POLL_SECONDS = 0.2
_LAST_LINES = 20


class StoppedError(RuntimeError):
    """A training that came to no end, and why."""


class Run(NamedTuple):
    """A training that ended.

    Attributes:
        training: what the clock saw.
        adapter: folder of the adapter; None where the process was ended after the last step.
        process_seconds: from start to end of the process, with imports, loading, looks and, for Goldgate, the merge.
        speed: Goldgate's plan of how it computed; empty for the stock trainer.
    """

    training: Training
    adapter: Path | None
    process_seconds: float
    speed: dict[str, Any]


def train_goldgate(
    case: Case, folder: Path, *, seed: int, speed: SpeedSpec | None = None, end_after_steps: bool = False
) -> Run:
    """Train by the worker, as a run does, with the defaults of `train.speed` unless others are given.

    Raises:
        StoppedError: it was refused or failed.
    """
    recipe = case.recipe.model_copy(update={"seed": seed, "speed": speed or SpeedSpec()})
    job = make_job(case, recipe, folder)
    (folder / "spec.json").write_text(job.model_dump_json(), encoding="utf-8")
    try:
        training, seconds = _watched(folder, "tasks.training.worker", steps_of(case) if end_after_steps else None)
    except StoppedError:
        if (job.scratch / ERROR).exists():
            refusal = json.loads((job.scratch / ERROR).read_text(encoding="utf-8"))
            raise StoppedError(f"{refusal['what']} ({refusal['where']})") from None
        raise
    summary = job.out / SUMMARY
    plan = json.loads(summary.read_text(encoding="utf-8"))["plan"]["speed"] if summary.exists() else {}
    adapter = job.out / "adapter"
    shutil.rmtree(job.out / "merged", ignore_errors=True)
    shutil.rmtree(job.scratch, ignore_errors=True)
    return Run(training, adapter if adapter.exists() else None, seconds, plan)


def train_stock(case: Case, folder: Path, *, seed: int, options: dict[str, Any]) -> Run:
    """Train by trl's SFTTrainer (see `bench.training.stock`, which says what `options` may hold).

    Raises:
        StoppedError: it failed.
    """
    _make_empty(folder)
    spec = {
        "task": case.task.model_dump(mode="json"),
        "recipe": case.recipe.model_copy(update={"seed": seed}).model_dump(mode="json"),
        "model": str(case.model), "train": str(case.train), "dev": str(case.dev), "out": str(folder / "out"),
        "options": options,
    }  # fmt: skip
    (folder / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
    training, seconds = _watched(folder, "bench.training.stock", None)
    return Run(training, folder / "out" / "adapter", seconds, {})


def make_job(case: Case, recipe: TrainSpec, folder: Path) -> TrainJob:
    """The job of a training process; its store (for MLflow) lies in `folder` too."""
    _make_empty(folder)
    (folder / "out").mkdir()
    (folder / "scratch").mkdir()
    nowhere = {"uri": str(folder), "fingerprint": "0" * 64, "digest": "0" * 64}
    rows, dev_rows = count_lines(case.train), count_lines(case.dev)
    request = TrainRequest(
        name=case.name,
        task=case.task,
        splits=SplitsRef(**nowhere, step="splits", train_rows=rows, dev_rows=dev_rows, removed={}),
        base=BaseModelRef(**nowhere, step="base_model", source=case.model_uri),
        recipe=recipe,
        accept_risks=dict.fromkeys(Guard, _WHY),
        execution=ExecutionSpec(store=str(folder / "store")),
    )
    return TrainJob(
        request=request, fingerprint="0" * 64, model_folder=case.model, train_file=case.train, dev_file=case.dev,
        scratch=folder / "scratch", out=folder / "out",
    )  # fmt: skip


def dev_losses(case: Case, adapters: Sequence[Path], work: Path) -> list[float]:
    """The dev loss of each adapter by the one judge, in nats per answer token."""
    spec = {
        "task": case.task.model_dump(mode="json"), "model": str(case.model), "dev": str(case.dev),
        "max_tokens": case.recipe.max_tokens, "adapters": [str(adapter) for adapter in adapters],
    }  # fmt: skip
    (work / "judge.json").write_text(json.dumps(spec), encoding="utf-8")
    command = [sys.executable, "-m", "bench.training.judge", str(work / "judge.json")]
    done = subprocess.run(command, cwd=ROOT, env=environment(), check=True, stdout=subprocess.PIPE, text=True)
    return [float(one) for one in json.loads(done.stdout.splitlines()[-1])]


def count_tokens(case: Case) -> int:
    """Tokens of the training rows, prompts and answers, no padding: what every trainer is given to do."""
    from transformers import AutoTokenizer

    from tasks.contracts.prompt import tuned_prompt
    from tasks.training.examples import tokenize_file

    tokenizer = AutoTokenizer.from_pretrained(case.model)
    rows = tokenize_file(case.train, tuned_prompt(case.task), tokenizer, case.recipe.max_tokens)
    return sum(len(row.input_ids) for row in rows)


def steps_of(case: Case) -> int:
    """Optimiser steps of a case."""
    rows_a_step = case.recipe.batch_size * case.recipe.gradient_accumulation
    return -(-round(case.recipe.epochs * count_lines(case.train)) // rows_a_step)


def count_lines(path: Path) -> int:
    """Lines of a file."""
    with path.open("rb") as lines:
        return sum(1 for _ in lines)


def environment() -> dict[str, str]:
    """What trainings and the judge run in: the same for all, offline, on all cores."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": THREADS,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "GIT_PYTHON_REFRESH": "quiet",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }


def _watched(folder: Path, module: str, end_after: int | None) -> tuple[Training, float]:
    """Run a training module on `folder/spec.json` to its end, or until it has taken `end_after` steps."""
    clock, log = folder / "clock.json", folder / "log.txt"
    command = [sys.executable, "-m", "bench.training.clock", str(clock), module, str(folder / "spec.json")]
    start = time.perf_counter()
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=out, stderr=subprocess.STDOUT)
        try:
            ended = _wait(process, clock, end_after)
        except BaseException:
            process.kill()
            process.wait()
            raise
    seconds = time.perf_counter() - start
    training = read_clock(clock)
    if training is None or not (ended or process.returncode == 0):
        said = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:]
        raise StoppedError("\n".join([f"{module} ended with {process.returncode}:", *said]))
    return training, seconds


def _wait(process: subprocess.Popen[bytes], clock: Path, end_after: int | None) -> bool:
    """Whether it was ended here, after its last step."""
    while process.poll() is None:
        time.sleep(_POLL_SECONDS)
        if end_after is None:
            continue
        training = read_clock(clock)
        if training is not None and training.steps >= end_after:
            process.send_signal(signal.SIGKILL)  # nothing that it would still make is wanted
            process.wait()
            return True
    return False


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
