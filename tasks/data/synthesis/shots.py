"""Which classes and slices lack rows, and the real rows of them that a teacher is shown."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import NamedTuple

from tasks.contracts.errors import DataError
from tasks.contracts.rows import Row
from tasks.contracts.spec import TaskKind
from tasks.contracts.synthesis import Fill, SynthesizeSpec
from tasks.data.draw import content_hash
from tasks.data.synthesis.filters import find_golden
from tasks.data.synthesis.prompts import Wish

SHOTS = 4  # real rows that one request shows
_POOL = 64  # real rows of a class or slice that shots are taken from

Cell = tuple[str | None, str | None]  # class and slice; None is any


class Pool(NamedTuple):
    """How many real rows there are of each class, slice, and class in a slice, and a few rows of each.

    Attributes:
        counts: real rows outside the golden set.
        rows: of each at most `_POOL`, those whose content has the smallest hashes, so the same whatever the order.
    """

    counts: Counter[Cell]
    rows: dict[Cell, list[Row]]


def class_of(row: Row, kind: TaskKind) -> str | None:
    """The class of a row: its answer, or its label where answers are no classes."""
    return row.target if kind is TaskKind.CLASSIFY else row.label


def build_pool(
    rows: Iterable[Row],
    golden: Callable[[], Iterable[Row]],
    spec: SynthesizeSpec,
    withheld: Container[str] = frozenset(),
) -> Pool:
    """Go through the real rows once.

    No row that overlaps the golden set is in the pool, since the teacher must not see what its pupil is measured by;
    none that a model wrote, since it should write like people; and none of `withheld` (ids), which count all the same.
    """
    ids = {item.id for item in golden()}
    groups = {item.group for item in golden() if item.group is not None}
    counts: Counter[Cell] = Counter()
    heaps: dict[Cell, list[tuple[int, str, Row]]] = {}
    for row in rows:
        if row.id in ids or row.group in groups or row.synthetic:
            continue
        label = class_of(row, spec.task.kind)
        key = -int(content_hash(row), 16)  # a heap gives up its smallest, which is to be the largest hash
        for cell in {(label, None), (None, row.slice), (label, row.slice)} - {(None, None)}:
            counts[cell] += 1
            if row.id in withheld:
                continue
            heap = heaps.setdefault(cell, [])
            entry = (key, row.id, row)
            if len(heap) < _POOL:
                heapq.heappush(heap, entry)
            elif entry[:2] > heap[0][:2]:
                heapq.heapreplace(heap, entry)
    pools = {cell: [row for _, _, row in sorted(heap, key=lambda entry: -entry[0])] for cell, heap in heaps.items()}
    chosen = {row.id: row for members in pools.values() for row in members}
    overlaps = find_golden(
        [row.text for row in chosen.values()],
        lambda: ((item.id, item.text) for item in golden()),
        spec.near_duplicate,
    )
    leaking = {row_id for row_id, overlap in zip(chosen, overlaps, strict=True) if overlap is not None}
    return Pool(counts, {cell: [row for row in members if row.id not in leaking] for cell, members in pools.items()})


def plan_fills(pool: Pool, spec: SynthesizeSpec) -> list[Fill]:
    """What is asked for: the fills of the spec, then what classes, then slices still lack beside those, by name.

    Raises:
        DataError: a class or slice has no real row to write like.
    """
    fills = list(spec.fill)
    kind = spec.task.kind
    if spec.fill_classes_to is not None:
        names = spec.task.labels or sorted(label for label, slice_ in pool.counts if label and slice_ is None)
        for name in names:
            planned = sum(fill.rows for fill in fills if fill.label == name)
            missing = spec.fill_classes_to - pool.counts[name, None] - planned
            if missing > 0:
                fills.append(Fill(label=name, rows=missing))
    if spec.fill_slices_to is not None:
        for name in sorted(slice_ for label, slice_ in pool.counts if slice_ and label is None):
            planned = sum(fill.rows for fill in fills if fill.slice == name)
            missing = spec.fill_slices_to - pool.counts[None, name] - planned
            if missing > 0:
                fills.append(Fill(slice=name, rows=missing))
    for fill in fills:
        for cell in ((fill.label, fill.slice), (fill.looks_like, None)):
            if cell != (None, None) and not _rows_like(pool, cell, kind):
                what = " of ".join(filter(None, (cell[0] and f"class {cell[0]!r}", cell[1] and f"slice {cell[1]!r}")))
                raise DataError(
                    f"There is no real row of {what} to write like.",
                    where="fill",
                    fix="add a few real rows of it, outside the golden set and without secrets or personal data; a "
                    "teacher that has seen none makes them up",
                )
    return fills


def wishes(fill: Fill, pool: Pool, kind: TaskKind, *, already: int, count: int) -> Iterator[Wish]:
    """The next `count` examples to ask for, each with other shots as long as there are any.

    In a slice without a class the classes come as often as its real rows have them.
    """
    like = _rows_like(pool, (fill.label, fill.slice), kind)
    unlike = [] if fill.looks_like is None else _rows_like(pool, (fill.looks_like, None), kind)
    for number in range(already, already + count):
        label, shots = fill.label, _turn(like, number)
        if label is None and kind is TaskKind.CLASSIFY:
            label = like[number % len(like)].target
            shots = _turn([row for row in like if row.target == label], number)
        yield Wish(label, fill.slice, fill.looks_like, shots, _turn(unlike, number), number=number + 1)


def _rows_like(pool: Pool, cell: Cell, kind: TaskKind) -> list[Row]:
    """Rows of a class in a slice; where the slice has none, of the class."""
    label, _ = cell
    found = pool.rows.get(cell, [])
    return found or (pool.rows.get((label, None), []) if label is not None else [])


def _turn(rows: Sequence[Row], number: int) -> tuple[Row, ...]:
    """A few rows, other ones for each number."""
    many = min(SHOTS, len(rows))
    return tuple(rows[(number * many + step) % len(rows)] for step in range(many))
