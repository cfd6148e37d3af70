"""Draw rows by stratum, whole units at a time, so that the same content gives the same draw whatever its order."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tasks.contracts.calls import name_tools
from tasks.contracts.rows import Row
from tasks.contracts.spec import TaskKind, TaskSpec


@dataclass(frozen=True, slots=True)
class Unit:
    """Rows that must stay together.

    Attributes:
        order: sha256 in hex that decides when the unit's turn is.
        members: indices of its rows.
        strata: how many of them each stratum has.
    """

    order: str
    members: tuple[int, ...]
    strata: Counter[str]


def content_hash(row: Row) -> str:
    """sha256 over what the row shows and asks for, without id and line: the same for the same content anywhere."""
    content = [[message.as_chat() for message in row.messages], row.target, row.group, row.slice]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()


def stratum(row: Row, task: TaskSpec) -> str:
    """What the row is drawn by: its answer where that is a class, else its label, its tools or its slice."""
    if task.kind is TaskKind.CLASSIFY:
        return row.target
    return row.label or (name_tools(row.target) if task.kind is TaskKind.CALL else row.slice or "")


def make_units(members: Sequence[Sequence[int]], hashes: Sequence[str], strata: Sequence[str]) -> list[Unit]:
    """Units in the order of their hashes; a unit's hash is over the sorted hashes of its rows."""
    alone: dict[str, Counter[str]] = {}  # most units are one row, and share what they count
    units = []
    for indices in members:
        if len(indices) == 1:
            stratum_of = strata[indices[0]]
            counted = alone.setdefault(stratum_of, Counter({stratum_of: 1}))
        else:
            counted = Counter(strata[index] for index in indices)
        units.append(
            Unit(
                hashlib.sha256("".join(sorted(hashes[index] for index in indices)).encode()).hexdigest(),
                tuple(sorted(indices, key=lambda index: hashes[index])),
                counted,
            )
        )
    return sorted(units, key=lambda unit: unit.order)


def quotas(counts: Mapping[str, int], total: int, minimum: int) -> dict[str, int]:
    """Share `total` among strata in proportion to `counts`, by largest remainders.

    A stratum gets at least `minimum`, but not more than half of itself by that rule; the others give it up in turn,
    the largest first. The sum is `total` as long as that can be (it never exceeds the sum of counts).
    """
    population = sum(counts.values())
    total = min(total, population)
    if total == 0:
        return dict.fromkeys(counts, 0)
    exact = {name: total * count / population for name, count in counts.items()}
    share = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(counts, key=lambda name: (share[name] - exact[name], name))
    for name in by_remainder[: total - sum(share.values())]:
        share[name] += 1
    floor = {name: min(minimum, count // 2) for name, count in counts.items()}
    for name in sorted(counts):
        while share[name] < floor[name]:
            giver = max(sorted(counts), key=lambda other: share[other] - floor[other])
            if share[giver] <= floor[giver]:
                return share
            share[giver] -= 1
            share[name] += 1
    return share


def draw(units: Sequence[Unit], wanted: Mapping[str, int]) -> tuple[list[Unit], list[Unit]]:
    """Take units in their order, each unless it would exceed the quota of a stratum; return (taken, left)."""
    room = Counter(wanted)
    taken, left = [], []
    for unit in units:
        if all(room[name] >= count for name, count in unit.strata.items()):
            room.subtract(unit.strata)
            taken.append(unit)
        else:
            left.append(unit)
    return taken, left
