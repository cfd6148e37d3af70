"""What an exception that ended a training means for a person: memory, disk, or what a part of it refused."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tasks.contracts.errors import GoldgateError, StoreError, TrainingError
from tasks.training.checkpoints import newest_bytes
from tasks.training.job import OUT_OF_MEMORY_FIX

_NO_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Libraries in other languages say it in words alone: safetensors (Rust), torch.save (C++), allocators.
_NO_ROOM_WORDS = (
    *(f"os error {number}" for number in _NO_ROOM),
    "No space left on device",
    "PytorchStreamWriter failed writing",
    "unexpected pos",  # torch.save's zip, closed after a write that was cut short
    "database or disk is full",  # SQLite, where MLflow keeps its runs in a file
)
_NO_MEMORY_WORDS = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


class Stage(NamedTuple):
    """What is said of a stage of training.

    Attributes:
        name: at the beginning of a sentence.
        memory_where: the setting that decides how much memory it takes.
        memory_fix: what to do when that is too much.
        next_run: what the next run does.
        keeps_checkpoints: whether it needs room for them.
    """

    name: str
    memory_where: str
    memory_fix: str
    next_run: str
    keeps_checkpoints: bool


TRAINING = Stage(
    "Training", "train.batch_size", OUT_OF_MEMORY_FIX, "the next run goes on from the last checkpoint", True
)
PREFERENCE_TUNING = Stage(
    "Preference tuning",
    "preference.batch_size",
    "lower `preference.batch_size` or `data.max_characters`, or free memory; the stage starts anew",
    "the stage starts anew",
    False,
)


class Failure(NamedTuple):
    """A refusal to tell, and whether memory was the reason."""

    refusal: GoldgateError
    out_of_memory: bool = False


def explain(error: Exception, scratch: Path, stage: Stage = TRAINING) -> Failure | None:
    """The error as a person should meet it; None for one that nobody foresaw."""
    import torch

    if isinstance(error, GoldgateError):
        return Failure(error)
    words = str(error)
    first = words.splitlines()[0] if words.strip() else type(error).__name__
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(known in words for known in _NO_MEMORY_WORDS)
    ):
        refusal = TrainingError(
            f"{stage.name} ran out of memory: {first}", where=stage.memory_where, fix=stage.memory_fix
        )
        return Failure(refusal, out_of_memory=True)
    for cause in _causes(error):  # a library may put one of its own around what the disk said
        if isinstance(cause, OSError) and cause.errno in _NO_WRITING and cause.errno not in _NO_ROOM:
            return Failure(
                StoreError(
                    f"{stage.name} cannot write: {cause.strerror}",
                    where=str(cause.filename or scratch),
                    fix=f"allow writing there; {stage.next_run}",
                )
            )
        said = str(cause)
        if (isinstance(cause, OSError) and cause.errno in _NO_ROOM) or any(known in said for known in _NO_ROOM_WORDS):
            return Failure(no_room(scratch, said.splitlines()[0], stage))
    return None


def no_room(scratch: Path, said: str, stage: Stage = TRAINING) -> StoreError:
    """The refusal for want of disk space, with what is free and, where there are checkpoints, what one needs."""
    found = f"{shutil.disk_usage(scratch).free / 1e6:,.1f} MB are free"
    if stage.keeps_checkpoints:
        needed = newest_bytes(scratch)
        needs = f"a checkpoint needs about {needed / 1e6:,.1f} MB" if needed else "not even a first checkpoint fits"
        found = f"{found}, and {needs}"
    return StoreError(
        f"There is no room left to write: {found} ({said}).",
        where=str(scratch),
        fix=f"free space there, or move the store to a larger disk; {stage.next_run}",
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
