"""Who may start a retrain: of looks that find drift at once, one; and afterwards none for a set time.

A claim is written before the event is emitted. A look that dies between the two has started nothing, and the next try
is after the set time: one retrain too few is made up for, a storm of them is not.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import NamedTuple, Protocol

from tasks.contracts.observe import DriftSpec, RetrainPermit
from tasks.serving.drift import may_retrain


class Claim(NamedTuple):
    """A retrain that drift has started.

    Attributes:
        number: which one of its name; there are no two of one number.
        at: when.
        by: the look that did.
        reason: what had drifted.
    """

    number: int
    at: datetime
    by: str
    reason: str


class Claims(Protocol):
    """The claims of one name, kept where all looks see them."""

    def last(self) -> Claim | None:
        """The one with the highest number; None for none."""

    def add(self, claim: Claim) -> bool:
        """Keep it, whole and for good; False where its number is taken, and then nothing has changed."""


def claim_retrain(claims: Claims, now: datetime, spec: DriftSpec, *, by: str, reason: str) -> RetrainPermit:
    """Ask whether drift may start a retrain, and take that for oneself: what is allowed is claimed.

    Compare and set: a claim has the number after the last one that was seen, and a number can be had once.

    Raises:
        SpecError: the clocks of those who look differ by far (see `may_retrain`).
    """
    last = claims.last()
    permit = may_retrain(last.at if last is not None else None, now, spec)
    if not permit.allowed:
        return permit
    if claims.add(Claim(last.number + 1 if last is not None else 1, now, by, reason)):
        return permit
    next_at = now + timedelta(hours=spec.retrain_at_most_every_hours)
    return RetrainPermit(
        allowed=False,
        next_at=next_at,
        why="Another look has just started one; drift may start the next about "
        f"{next_at.isoformat(timespec='minutes')}.",
    )
