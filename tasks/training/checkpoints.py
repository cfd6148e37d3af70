"""Checkpoints of a training: which are whole, which may go, and what the curves were up to there."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from tasks.store import digest_file
from tasks.training.job import write_whole
from tasks.training.recipe import looks_without_gain

log = logging.getLogger("goldgate.training")

CURVES = "curves.jsonl"
PLAN = "plan.json"
MARK = "goldgate_complete.json"  # written last; without it a checkpoint was cut off half-way
KEPT = 2  # newest checkpoints that stay: should one be damaged, there is the one before
_STATE = "trainer_state.json"


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
    """Say that everything of this checkpoint is written, with the size and sha256 of each file.

    All of it is on the disk before the mark is: a power cut leaves no mark without its files. With several processes,
    the first one calls this when all have written theirs.
    """
    files = {file.relative_to(folder).as_posix(): _facts(file) for file in _files(folder)}
    for inner in {file.parent for file in _files(folder)} | {folder}:
        _flush(inner)
    write_whole(folder / MARK, json.dumps({"step": step, "seconds": seconds, "files": files}), flush=True)
    _flush(folder)
    _flush(folder.parent)


def fault_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None when it is whole.

    The digests find damage, not malice: whoever can write here can write a mark too. What such a file could do is
    bounded elsewhere: tensors are read as safetensors, and the Trainer reads its pickles with `weights_only`.
    """
    try:
        record = json.loads((folder / MARK).read_bytes())
        files: dict[str, dict[str, Any]] = dict(record["files"])
        whole = record["step"] == _step_in(folder.name) and isinstance(record["seconds"], int | float)
    except FileNotFoundError:
        return "it was cut off half-way (no mark)"
    except (ValueError, KeyError, TypeError):
        return "its mark cannot be read"
    if not whole:
        return "its mark is that of another checkpoint"
    if _STATE not in files:
        return f"{_STATE} is missing"
    for name, facts in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        size = file.stat().st_size
        if size != facts["bytes"]:
            return f"{name} has {size:,} bytes of {facts['bytes']:,}"
        if digest_file(file) != facts["sha256"]:
            return f"{name} is not what was written"
    return None


def find_checkpoint(scratch: Path, plan: str) -> Checkpoint | None:
    """The newest whole checkpoint of this plan; clears away damaged ones and all that a different plan left.

    A checkpoint is of use only with the best one up to it, which is what training ends with. The order is that of
    steps: nothing here looks at clocks.

    Args:
        scratch: folder of the training.
        plan: the plan as text; checkpoints of another plan (another number of devices) do not fit.
    """
    kept = scratch / PLAN
    if not kept.exists() or kept.read_text(encoding="utf-8") != plan:
        for _, folder in _folders(scratch):
            _remove(folder)
        (scratch / CURVES).unlink(missing_ok=True)
        write_whole(kept, plan, flush=True)
        return None
    whole: dict[int, Path] = {}
    for step, folder in _folders(scratch):
        fault = fault_of(folder)
        if fault is None:
            best = _best_step(folder)
            if best is not None and best != step and best not in whole:
                fault = f"the best checkpoint up to it, of step {best}, is missing or damaged"
        if fault is None:
            whole[step] = folder
        else:
            log.warning("passing over the checkpoint of step %d: %s (%s)", step, fault, folder)
            _remove(folder)
    if not whole:
        return None
    step, folder = max(whole.items())
    return Checkpoint(folder, step, json.loads((folder / MARK).read_bytes())["seconds"])


def prune(scratch: Path) -> None:
    """Remove old checkpoints: the newest two stay, and of each the best one up to it.

    Called after a new one is marked, so that a kill at any moment leaves the newest whole one in place. The Trainer's
    own limit would remove the last whole one before the new one is marked, and goes by the files' times, which two
    machines may not agree about.
    """
    marked = {step: folder for step, folder in _folders(scratch) if (folder / MARK).exists()}
    kept = set(sorted(marked)[-KEPT:])
    kept |= {best for step in kept if (best := _best_step(marked[step])) is not None}
    for step, folder in _folders(scratch):
        if step not in kept and step < max(marked, default=0):
            _remove(folder)


def drop_half_written(scratch: Path) -> None:
    """Remove checkpoints without a mark, such as one for which there was no room."""
    for _, folder in _folders(scratch):
        if not (folder / MARK).exists():
            _remove(folder)


def newest_bytes(scratch: Path) -> int | None:
    """Bytes of the newest marked checkpoint, about what the next one needs; None when there is none."""
    marked = [folder for _, folder in _folders(scratch) if (folder / MARK).exists()]
    return sum(file.stat().st_size for file in _files(marked[-1])) if marked else None


def has_stopped(checkpoint: Checkpoint, patience: int) -> bool:
    """Whether training had stopped at this checkpoint, since the dev loss had not got better for `patience` looks.

    A run that died after that, while merging, has nothing more to train; the Trainer would take further steps.
    """
    looks = [entry["eval_loss"] for entry in _state(checkpoint.folder)["log_history"] if "eval_loss" in entry]
    return looks_without_gain(looks) >= patience


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
    """Steps and folders of all checkpoints, whole or not, in the order of steps."""
    steps = [(_step_in(folder.name), folder) for folder in scratch.glob("checkpoint-*") if folder.is_dir()]
    return sorted((step, folder) for step, folder in steps if step is not None)


def _step_in(name: str) -> int | None:
    match = re.fullmatch(r"checkpoint-(\d+)", name)
    return int(match.group(1)) if match else None


def _files(folder: Path) -> list[Path]:
    """What a checkpoint holds, in a fixed order, its mark left out."""
    return sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith(MARK))


def _facts(file: Path) -> dict[str, Any]:
    """Size and sha256 of a file, which is on the disk afterwards."""
    _flush(file)
    return {"bytes": file.stat().st_size, "sha256": digest_file(file)}


def _flush(path: Path) -> None:
    """Have a file, or the names of a folder's files, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _state(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((folder / _STATE).read_bytes())
    return state


def _best_step(folder: Path) -> int | None:
    """The step of the best checkpoint up to this one; None before the first look at the dev loss, or if damaged."""
    try:
        best = _state(folder).get("best_model_checkpoint")
    except (OSError, ValueError):
        return None
    return None if best is None else _step_in(Path(best).name)


def _remove(folder: Path) -> None:
    """Remove a checkpoint, its mark first: a kill on the way leaves none that looks whole."""
    (folder / MARK).unlink(missing_ok=True)
    shutil.rmtree(folder)
