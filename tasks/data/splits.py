"""Part rows into train and dev: by class, groups whole, the same for the same content; and even out the classes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.contracts.errors import DataError
from tasks.contracts.spec import Balance, CurateSpec, SplitBy
from tasks.data.draw import Unit, draw, make_units, quotas
from tasks.data.duplicates import Removed
from tasks.data.golden import MIN_CLASS_ITEMS
from tasks.data.similar import Clusters
from tasks.data.table import NO_TIME, NOTHING, RowTable


class Split(NamedTuple):
    """Positions of rows: for training, for dev, and left out, each of these with its reason."""

    train: list[int]
    dev: list[int]
    left: list[Removed]


class Balanced(NamedTuple):
    """How often each training row stands in the file, and how much it counts (mean 1), both in the order of the rows;
    and for each class its rows before, its rows after, and the weight of one.
    """

    repeats: NDArray[np.int32]
    weights: NDArray[np.float64]
    effect: dict[str, dict[str, float]]


def split(table: RowTable, kept: Sequence[int], links: Sequence[tuple[int, int]], spec: CurateSpec) -> Split:
    """Dev first, then train up to its limits.

    Rows of one group, and rows that are linked since they are nearly the same, stay on one side. `spec.split` says
    whether dev is drawn by stratum in the order of the content's hashes, or has the newest rows. Rows that a model
    wrote go to train alone, and no more of them than `spec.max_synthetic_share`.

    Raises:
        DataError: no dev split can be made, or rows have no time and the split goes by time.
    """
    units = _units(table, kept, links)
    real = [unit for unit in units if not table.synthetic[list(unit.members)].any()]
    written = [unit for unit in units if table.synthetic[list(unit.members)].any()]
    real_rows = sum(len(unit.members) for unit in real)
    limit = spec.max_train_rows
    used = real_rows if limit is None else min(real_rows, round(limit / (1 - spec.dev_share)))
    wanted = max(1, round(used * spec.dev_share))
    if spec.split is SplitBy.TIME:
        dev, rest = _newest(table, real, wanted)
    else:
        dev, rest = draw(real, quotas(_count(real), wanted, minimum=1))
    if not dev:
        raise DataError(
            f"No dev split can be made: the rows are in {len(real):,} groups that stay whole, each too large."
            if real
            else f"No dev split can be made: all {len(kept):,} rows were written by a model.",
            where="data.group_field, curate.dev_share",
            fix="group by a finer column, raise `curate.dev_share`, or add rows",
        )
    left: list[Removed] = []
    rest, over = _cap_synthetic(rest, written, spec.max_synthetic_share)
    left += _leave(over, "over_synthetic_share", f"curate.max_synthetic_share is {spec.max_synthetic_share:g}")
    if limit is not None:
        rest, over = draw(rest, quotas(_count(rest), limit, MIN_CLASS_ITEMS))
        left += _leave(over, "over_max_train_rows", f"curate.max_train_rows is {limit}")
    return Split(_members(rest), _members(dev), left)


def balance(
    strata: NDArray[np.int32], names: Sequence[str], weights: NDArray[np.float64], spec: CurateSpec
) -> Balanced:
    """Repeat or weigh the rows of small classes.

    `oversample` repeats each row of a class until it has as many rows as the largest, but no row stands there more than
    `spec.max_repeats` times. `weight` lets each row of a class of n rows count n_max / n, but no more than
    `spec.max_repeats`. Weights are scaled so that their mean over the rows of the file is 1: the learning rate keeps
    its meaning.

    Args:
        strata: the class of each training row, shape [n].
        names: of the classes.
        weights: how much each row counts beforehand, above 0.
        spec: the choice and its limit.
    """
    counts = np.bincount(strata, minlength=len(names))
    present = counts > 0
    lack = np.ones(len(names))
    lack[present] = np.minimum(counts.max() / counts[present], spec.max_repeats) if len(strata) else 1.0
    repeats = np.ones(len(strata), dtype=np.int32)
    scaled = weights.astype(np.float64)
    if spec.balance is Balance.OVERSAMPLE:
        for code in np.flatnonzero(present).tolist():
            rows = np.flatnonzero(strata == code)
            whole, more = divmod(round(lack[code] * len(rows)), len(rows))
            repeats[rows] = whole
            repeats[rows[:more]] += 1  # the first in the order of the hashes
    elif spec.balance is Balance.WEIGHT:
        scaled *= lack[strata]
    if len(scaled):
        scaled /= float((scaled * repeats).sum() / repeats.sum())
    effect = {
        names[code]: {
            "rows": int(counts[code]),
            "rows_after": int(repeats[strata == code].sum()),
            "weight": round(float(scaled[strata == code].mean()), 4),
        }
        for code in sorted(np.flatnonzero(present).tolist(), key=lambda code: names[code])
    }
    return Balanced(repeats, scaled, effect)


def label_drift(counts: Mapping[str, int], golden: Mapping[str, int]) -> float:
    """Total variation distance of two label mixes: half the sum of the differences of shares, from 0 to 1."""
    rows, items = sum(counts.values()), sum(golden.values())
    if not rows or not items:
        return 0.0
    labels = counts.keys() | golden.keys()
    return 0.5 * math.fsum(abs(counts.get(name, 0) / rows - golden.get(name, 0) / items) for name in labels)


def _units(table: RowTable, kept: Sequence[int], links: Sequence[tuple[int, int]]) -> list[Unit]:
    together = Clusters(len(table))
    for left, right in links:
        together.join(left, right)
    first_of_group: dict[int, int] = {}
    for position in kept:
        group = int(table.groups[position])
        if group != NOTHING:
            together.join(position, first_of_group.setdefault(group, position))
    by_root: dict[int, list[int]] = {}
    roots = together.roots()
    for position in kept:
        by_root.setdefault(int(roots[position]), []).append(position)
    hashes = _Hashes(table)
    strata = [table.stratum_names[code] for code in table.strata.tolist()]
    return make_units(list(by_root.values()), hashes, strata)


class _Hashes(Sequence[str]):
    """The content hashes of a table's rows, worked out when they are asked for."""

    def __init__(self, table: RowTable) -> None:
        self._table = table

    def __getitem__(self, position: int) -> str:  # type: ignore[override]  # slices are not asked for
        return self._table.content_hash(position)

    def __len__(self) -> int:
        return len(self._table)


def _newest(table: RowTable, units: Sequence[Unit], wanted: int) -> tuple[list[Unit], list[Unit]]:
    """The units with the newest rows, at least `wanted` rows of them; and the others."""
    newest = {unit.order: max(int(table.times[member]) for member in unit.members) for unit in units}
    timeless = sum(int(table.times[member]) == NO_TIME for unit in units for member in unit.members)
    if timeless:
        raise DataError(
            f"The split goes by time, and {timeless:,} rows have none.",
            where="curate.split, data.time_field",
            fix="name the column with the time in `data.time_field`, give every row one, or split by content",
        )
    by_age = sorted(units, key=lambda unit: (newest[unit.order], unit.order))
    rows = taken = 0
    while rows < wanted and taken < len(by_age) - 1:  # one unit at least is trained on
        taken += 1
        rows += len(by_age[-taken].members)
    chosen = {unit.order for unit in by_age[len(by_age) - taken :]}
    return [unit for unit in units if unit.order in chosen], [unit for unit in units if unit.order not in chosen]


def _cap_synthetic(real: list[Unit], written: list[Unit], share: float) -> tuple[list[Unit], list[Unit]]:
    """All training units in the order of their hashes, and those of synthetic rows that are over the share."""
    rows = sum(len(unit.members) for unit in real)
    room = math.inf if share >= 1.0 else rows * share / (1.0 - share)
    taken: list[Unit] = []
    over: list[Unit] = []
    for unit in written:
        room -= len(unit.members)
        (taken if room >= 0 else over).append(unit)
    return sorted([*real, *taken], key=lambda unit: unit.order), over


def _count(units: Sequence[Unit]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for unit in units:
        counts.update(unit.strata)
    return counts


def _members(units: Sequence[Unit]) -> list[int]:
    """In the order of the units, which is as good as drawn by lot."""
    return [position for unit in units for position in unit.members]


def _leave(units: Sequence[Unit], reason: str, detail: str) -> list[Removed]:
    return [Removed(position, reason, detail) for unit in units for position in unit.members]
