"""What an exception that ended a training means for a person: memory, disk, or what a part of it refused."""

from __future__ import annotations

import errno
import shutil
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
)
_NO_MEMORY_WORDS = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


class Failure(NamedTuple):
    """A refusal to tell, and whether memory was the reason."""

    refusal: GoldgateError
    out_of_memory: bool = False


def explain(error: Exception, scratch: Path) -> Failure | None:
    """The error as a person should meet it; None for one that nobody foresaw."""
    import torch

    if isinstance(error, GoldgateError):
        return Failure(error)
    words = str(error)
    first = words.splitlines()[0] if words.strip() else type(error).__name__
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(known in words for known in _NO_MEMORY_WORDS)
    ):
        refusal = TrainingError(f"Training ran out of memory: {first}", where="train.batch_size", fix=OUT_OF_MEMORY_FIX)
        return Failure(refusal, out_of_memory=True)
    if isinstance(error, OSError) and error.errno in _NO_WRITING and error.errno not in _NO_ROOM:
        return Failure(
            StoreError(
                f"Training cannot write: {error.strerror}",
                where=str(error.filename or scratch),
                fix="allow writing there; the next run goes on from the last checkpoint",
            )
        )
    if (isinstance(error, OSError) and error.errno in _NO_ROOM) or any(known in words for known in _NO_ROOM_WORDS):
        return Failure(no_room(scratch, first))
    return None


def no_room(scratch: Path, said: str) -> StoreError:
    """The refusal for want of disk space, with what is free and what a checkpoint needs."""
    free = shutil.disk_usage(scratch).free / 1e6
    needed = newest_bytes(scratch)
    needs = f"a checkpoint needs about {needed / 1e6:,.1f} MB" if needed else "not even a first checkpoint fits"
    return StoreError(
        f"There is no room left to write: {free:,.1f} MB are free, and {needs} ({said}).",
        where=str(scratch),
        fix="free space there, or move the store to a larger disk; the next run goes on from the last checkpoint",
    )
