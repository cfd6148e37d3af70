"""Answers to dev rows: what may be looked at as often as one likes, unlike the golden set."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from hashlib import sha256
from typing import Literal

from tasks.contracts.references import ArtefactRef, SystemUnderTest
from tasks.contracts.rows import Row
from tasks.contracts.spec import PreferenceSpec

_HASHES = 2**64


class DevPart(StrEnum):
    """Which rows of dev: all, those that preference pairs are mined from, or the others."""

    ALL = "all"
    MINED = "mined"
    HELD_OUT = "held_out"


class DevResult(ArtefactRef):
    """What one model said to dev rows (`items.jsonl`, one `ItemOutcome` a line) and `summary.json`.

    Attributes:
        system: the model, and how it was asked.
        part: which rows of dev.
        items: how many rows these are.
        metrics: as the task has them (`TaskSpec.metrics`), each in [0, 1].
    """

    kind: Literal["dev"] = "dev"
    system: SystemUnderTest
    part: DevPart
    items: int
    metrics: dict[str, float]


def is_mined(row: Row, parting: PreferenceSpec) -> bool:
    """Whether pairs may be mined from this dev row; else it is held out.

    Goes by a hash of the row's group, or of its id where it has none, against the share `mine_share`: rows that belong
    together stay together, and a row stays where it is whatever else is in dev.
    """
    key = f"{parting.seed} id {row.id}" if row.group is None else f"{parting.seed} group {row.group}"
    return int.from_bytes(sha256(key.encode()).digest()[:8], "big") < parting.mine_share * _HASHES


def rows_of_part(rows: Iterable[Row], part: DevPart, parting: PreferenceSpec) -> list[Row]:
    """The rows of a part of dev, in their order."""
    if part is DevPart.ALL:
        return list(rows)
    return [row for row in rows if is_mined(row, parting) is (part is DevPart.MINED)]
