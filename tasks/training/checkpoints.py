"""Checkpoints of a training: which are whole, and what the curves were up to there."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from tasks.training.job import write_whole

_COMPLETE = "goldgate_complete.json"  # written last; without it a checkpoint was cut off half-way
CURVES = "curves.jsonl"
PLAN = "plan.json"


class Checkpoint(NamedTuple):
    """A whole checkpoint.

    Attributes:
        folder: where it is.
        step: optimiser steps it holds.
        seconds: wall time of training up to it, over all processes that took part.
    """

    folder: Path
    step: int
    seconds: float


def mark_complete(folder: Path, step: int, seconds: float) -> None:
    """Say that everything of this checkpoint is written."""
    write_whole(folder / _COMPLETE, json.dumps({"step": step, "seconds": seconds}))


def find_checkpoint(scratch: Path, plan: str) -> Checkpoint | None:
    """The newest whole checkpoint of this plan; clears away half-written ones and all that a different plan left.

    Args:
        scratch: folder of the training.
        plan: the plan as text; checkpoints of another plan (another number of devices) do not fit.
    """
    kept = scratch / PLAN
    if not kept.exists() or kept.read_text(encoding="utf-8") != plan:
        for _, folder in _folders(scratch):
            shutil.rmtree(folder)
        (scratch / CURVES).unlink(missing_ok=True)
        write_whole(kept, plan)
        return None
    found = None
    for step, folder in _folders(scratch):
        try:
            record = json.loads((folder / _COMPLETE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            shutil.rmtree(folder)
            continue
        found = Checkpoint(folder, step, record["seconds"])
    return found


def cut_curves(scratch: Path, step: int) -> None:
    """Drop what the curves say of steps after the checkpoint; these steps are taken again."""
    path = scratch / CURVES
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in lines if _step_of(line) <= step]
    write_whole(path, "".join(f"{line}\n" for line in kept))


def _step_of(line: str) -> float:
    try:
        step: int = json.loads(line)["step"]
    except ValueError:  # the process died while writing this line
        return float("inf")
    return step


def _folders(scratch: Path) -> list[tuple[int, Path]]:
    found = []
    for folder in scratch.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        if match and folder.is_dir():
            found.append((int(match.group(1)), folder))
    return sorted(found)
