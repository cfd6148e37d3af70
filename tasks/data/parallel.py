"""Work on batches in as many processes as there are cores, in order, with a bounded number under way."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tasks.contracts.errors import DataError

Batch = TypeVar("Batch")
Result = TypeVar("Result")

BATCH_ROWS = 2_000
_WORTH_PROCESSES = 16 * 2**20  # bytes; below, starting processes costs more than they save
_MOST_PROCESSES = 8  # each holds its own dictionaries and libraries
_AHEAD = 2  # batches under way for each process

_work: Callable[[Any], Any] | None = None  # set once in each worker process


class Lines(NamedTuple):
    """Lines of a file, with the index of the first and its place in bytes."""

    first: int
    offset: int
    lines: list[bytes]


def read_lines(path: Path, rows: int = BATCH_ROWS) -> Iterator[Lines]:
    """The lines of a file in batches."""
    first = offset = 0
    with path.open("rb") as file:
        while batch := list(islice(file, rows)):
            yield Lines(first, offset, batch)
            first += len(batch)
            offset += sum(map(len, batch))


def processes_for(size: int) -> int:
    """How many processes are worth starting for so many bytes of rows; 1 is this one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 if size < _WORTH_PROCESSES else min(cores, _MOST_PROCESSES)


def map_batches(
    make_work: Callable[[], Callable[[Batch], Result]], batches: Iterable[Batch], processes: int
) -> Iterator[Result]:
    """The result of each batch, in order.

    Args:
        make_work: makes the function that works on a batch; called once in each process, so it must be picklable and
            may build what the work needs (dictionaries, indices).
        batches: picklable.
        processes: 1 works in this process.

    Raises:
        DataError: a worker process was killed.
    """
    if processes == 1:
        work = make_work()
        for batch in batches:
            yield work(batch)
        return
    under_way: deque[Future[Result]] = deque()
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_begin, initargs=(make_work,))
    try:
        for batch in batches:
            under_way.append(pool.submit(_on_batch, batch))
            if len(under_way) >= _AHEAD * processes:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "A process that worked on the rows was killed.",
            where=f"one of {processes}",
            fix="free memory (the kernel's log says whether that was the reason), then run again",
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin(make_work: Callable[[], Callable[[Any], Any]]) -> None:
    global _work  # the one thing that a worker process holds
    _work = make_work()


def _on_batch(batch: Any) -> Any:
    assert _work is not None  # noqa: S101  set by the initializer
    return _work(batch)
