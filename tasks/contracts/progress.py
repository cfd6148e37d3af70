"""How long work says how far it is. Pure code calls `advance`; who listens is the caller's business."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Progress(NamedTuple):
    """How far a step is.

    Attributes:
        done: units finished so far.
        total: units in all.
        unit: what is counted, plural ("rows", "steps", "items").
        note: something worth saying now ("dev loss 0.412"), or "".
    """

    done: float
    total: float
    unit: str
    note: str = ""


ProgressListener = Callable[[Progress], None]


def ignore_progress(_: Progress) -> None:
    """A listener for callers that do not care."""
