"""Of looks that find drift at once, one may start a retrain, and then none for a set time."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta

import pytest

from tasks.contracts.errors import SpecError
from tasks.contracts.observe import DriftSpec, RetrainPermit
from tasks.serving.monitor.claims import Claim, Claims, claim_retrain

NOW = datetime(2026, 3, 20, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
SPEC = DriftSpec(retrain_at_most_every_hours=24.0)


class Shared:
    """Claims in memory, that keep a number once."""

    def __init__(self) -> None:
        self.kept: dict[int, Claim] = {}
        self._alone = threading.Lock()

    def last(self) -> Claim | None:
        with self._alone:
            return self.kept[max(self.kept)] if self.kept else None

    def add(self, claim: Claim) -> bool:
        with self._alone:
            return self.kept.setdefault(claim.number, claim) is claim


class SeenTogether:
    """Claims whose last one everybody has read before anybody adds: the race at its worst."""

    def __init__(self, shared: Claims, looks: int) -> None:
        self._shared, self._all_have_read = shared, threading.Barrier(looks)

    def last(self) -> Claim | None:
        seen = self._shared.last()
        self._all_have_read.wait(timeout=60.0)
        return seen

    def add(self, claim: Claim) -> bool:
        return self._shared.add(claim)


def at_once(claims: Claims, looks: int, now: datetime) -> list[RetrainPermit]:
    """The permits of so many looks, all of which saw the same last claim."""
    together, permits = SeenTogether(claims, looks), []
    threads = [
        threading.Thread(
            target=lambda by: permits.append(claim_retrain(together, now, SPEC, by=by, reason="drift: lengths")),
            args=(f"look {number}",),
        )
        for number in range(looks)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(permits) == looks
    return permits


def claim(claims: Claims, now: datetime, by: str = "a look") -> RetrainPermit:
    return claim_retrain(claims, now, SPEC, by=by, reason="drift: lengths")


def test_one_in_a_set_time() -> None:
    claims = Shared()
    assert claim(claims, NOW).allowed
    assert claims.kept == {1: Claim(1, NOW, "a look", "drift: lengths")}
    refused = claim(claims, NOW + 23 * HOUR)
    assert (refused.allowed, refused.next_at) == (False, NOW + 24 * HOUR)
    assert "Drift started a retrain at 2026-03-20T12:00:00+00:00, and may again from" in refused.why
    assert claims.kept.keys() == {1}
    assert claim(claims, NOW + 24 * HOUR).allowed
    assert claims.kept[2].at == NOW + 24 * HOUR
    assert not claim(claims, NOW + 25 * HOUR).allowed


@pytest.mark.parametrize("before", [0, 2])
def test_of_many_at_once_one(before: int) -> None:
    claims = Shared()
    for number in range(before):
        assert claim(claims, NOW - (48 - 24 * number) * HOUR).allowed
    permits = at_once(claims, 8, NOW)
    refused = [one for one in permits if not one.allowed]
    assert len(refused) == 7
    assert all(one.next_at == NOW + 24 * HOUR for one in refused)
    assert all("Another look has just started one" in one.why for one in refused)
    assert claims.kept.keys() == set(range(1, before + 2))


def test_a_claim_in_the_future_is_for_a_person_to_look_at() -> None:
    claims = Shared()
    assert claim(claims, NOW + HOUR).allowed
    with pytest.raises(SpecError, match="lies in the future"):
        claim(claims, NOW)
    assert claims.kept.keys() == {1}
