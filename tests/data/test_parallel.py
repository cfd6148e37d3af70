"""Batches through several processes: in order, errors whole, and no silence where one is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tasks.contracts.errors import DataError, SpecError
from tasks.data.parallel import Lines, map_batches, processes_for, read_lines


def squares() -> Callable[[int], tuple[int, int]]:
    return lambda number: (number * number, os.getpid())


def refusing() -> Callable[[int], int]:
    def work(number: int) -> int:
        if number == 3:
            raise SpecError("The schema is wrong.", where="task.json_schema", fix="correct it")
        return number

    return work


def dying() -> Callable[[int], int]:
    def work(number: int) -> int:
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    return work


def not_starting() -> Callable[[int], int]:
    raise SpecError("The model is no model.", where="folder", fix="name another")


@pytest.mark.parametrize("processes", [1, 3])
def test_results_come_in_order(processes: int) -> None:
    found = list(map_batches(squares, range(40), processes))
    assert [square for square, _ in found] == [n * n for n in range(40)]
    assert (len({pid for _, pid in found} - {os.getpid()}) > 0) is (processes > 1)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_refusal_comes_through_whole(processes: int) -> None:
    with pytest.raises(SpecError) as caught:
        list(map_batches(refusing, range(10), processes))
    assert (caught.value.what, caught.value.where, caught.value.fix) == (
        "The schema is wrong.",
        "task.json_schema",
        "correct it",
    )


def test_a_killed_process_is_said() -> None:
    with pytest.raises(DataError, match="was killed"):
        list(map_batches(dying, range(10), 2))


def test_no_more_is_read_than_is_worked_on() -> None:
    read = 0

    def source() -> Iterator[int]:
        nonlocal read
        for number in range(1000):
            read += 1
            yield number

    results = map_batches(squares, source(), 2)
    for _ in range(3):
        next(results)
    assert read <= 3 + 4
    results.close()  # type: ignore[attr-defined]


def test_lines_come_with_their_place(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"a\nbb\nccc\n")
    assert list(read_lines(tmp_path / "f", rows=2)) == [Lines(0, 0, [b"a\n", b"bb\n"]), Lines(2, 5, [b"ccc\n"])]


def test_few_bytes_are_not_worth_a_process() -> None:
    assert processes_for(1000) == 1
    assert processes_for(10**9) == min(8, len(os.sched_getaffinity(0)))
