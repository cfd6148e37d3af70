"""A trial as its rollout sees it: begun, waited for by the clock, and what follows from what was seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from tasks.contracts.observe import CanaryFinding, CanaryState
from tasks.contracts.serving import EngineSpec, Intent, Phase, TrialResult
from tasks.contracts.spec import CanarySpec
from tasks.serving.client import ConflictError, GatewayClient, Lease, LeaseLostError
from tasks.serving.trial import Tried, run_trial, trial_problems
from tasks.serving.words import trial_line
from tests.serving.desk import Desk, Fuse
from tests.serving.records import rollout, version

SEVEN, EIGHT = version(7), version(8)
SPEC = CanarySpec(share=0.5, slow_ms=100.0, min_requests=10, min_hours=1.0, max_hours=4.0)
GOOD = CanaryFinding(abort=False, qualities=())
BAD = CanaryFinding(abort=True, reasons=("It fails.", "It is slow."), qualities=())
STEP = 900.0  # seconds between looks


class Room:
    """A gateway with version 7 live and 8 checked, on a clock of its own; `happens` is called before each look."""

    def __init__(self, folder: Path) -> None:
        self.desk = Desk(folder, Fuse())
        for one in (SEVEN, EIGHT):
            self.desk.start_engine(one, EngineSpec())
        self.desk.move_traffic("complaints", SEVEN, None, from_revision=0, by="a", why="b")
        self.change = self.desk.begin(rollout(EIGHT, Phase.CHECKED, was=SEVEN))
        self.looks = 0
        self.requests_a_look = 0

    def try_out(self, spec: CanarySpec = SPEC) -> Tried:
        lease = Lease(self.change, 10.0**9, clock=lambda: self.desk.now)
        return run_trial(
            cast(GatewayClient, cast(Any, self.desk)), self.change, spec, lease, poll_seconds=STEP,
            clock=lambda: self.desk.now, sleep=self._sleep,
        )  # fmt: skip

    def happens(self) -> None:
        self.note(CanaryState(slow_above_ms=100.0, canary_requests=self.requests_a_look * self.looks), None)

    def note(self, state: CanaryState, finding: CanaryFinding | None) -> None:
        self.desk.books.note_canary("complaints", self.change.id, state, finding)

    def _sleep(self, seconds: float) -> None:
        self.desk.now += seconds
        self.looks += 1
        assert self.looks < 100, "it waits for ever"
        self.happens()


@pytest.fixture
def room(tmp_path: Path) -> Room:
    return Room(tmp_path)


def test_it_goes_on_until_there_are_enough_requests_and_enough_time(room: Room) -> None:
    room.requests_a_look = 20  # enough at the first look, a quarter of an hour after its begin
    tried = room.try_out()
    assert tried.problems == ()
    assert tried.result is not None
    assert (tried.result.hours, tried.result.state.canary_requests, room.looks) == (1.0, 80, 4)
    traffic = room.desk.traffic("complaints")
    assert traffic is not None
    assert traffic.canary is not None  # it stays where it is: moving traffic takes it out in the same step
    room.requests_a_look = 1


def test_it_waits_for_its_requests_when_time_is_over(room: Room) -> None:
    room.requests_a_look = 1
    tried = room.try_out()
    assert tried.problems == ()
    assert tried.result is not None
    assert (tried.result.hours, tried.result.state.canary_requests) == (2.5, 10)


def test_what_the_gateway_has_taken_back_is_over_at_once(room: Room) -> None:
    def happens() -> None:
        room.note(CanaryState(slow_above_ms=100.0, canary_requests=3, canary_failed=3), BAD)

    room.happens = happens  # type: ignore[method-assign]
    tried = room.try_out(SPEC.model_copy(update={"min_requests": 1}))
    assert (room.looks, tried.problems) == (1, ("It fails.", "It is slow."))
    assert tried.result is not None


def test_without_requests_it_is_refused_when_there_is_no_more_patience(room: Room) -> None:
    tried = room.try_out()
    assert tried.problems == (
        "complaints@8 has answered 0 requests on trial in 4.0 h, 10 are needed to judge it.",
    )  # fmt: skip
    assert room.desk.now == 4 * 3600.0


def test_without_a_limit_it_begins_once_the_live_version_has_answered_enough(room: Room) -> None:
    room.desk.live_answers = 97
    room.requests_a_look = 100

    def happens() -> None:
        room.desk.live_answers += 1
        Room.happens(room)

    room.happens = happens  # type: ignore[method-assign]
    tried = room.try_out(SPEC.model_copy(update={"slow_ms": None}))
    assert tried.problems == ()
    assert tried.result is not None
    assert (tried.result.hours, room.looks) == (1.0, 7)  # three looks until it begins, four while it runs


def test_a_name_that_is_hardly_asked_is_never_tried_out(room: Room) -> None:
    room.desk.live_answers = 60
    tried = room.try_out(SPEC.model_copy(update={"slow_ms": None}))
    assert tried.result is None
    assert tried.problems == (
        "complaints@8 could not be tried out: complaints@7 has answered 60 requests in 4.0 h, and 100 are needed to "
        "say what is slow (or set `canary.slow_ms`).",
    )  # fmt: skip
    assert "begin canary" not in room.desk.fuse.made


def test_one_that_is_on_trial_no_more_ends_the_attempt(room: Room) -> None:
    room.happens = lambda: room.desk.end_canary(room.change)  # type: ignore[assignment,method-assign,return-value]
    with pytest.raises(ConflictError, match="complaints@8 is on trial no more"):
        room.try_out()


def test_no_look_without_the_lease(room: Room) -> None:
    lease = Lease(room.change, 1_000.0, clock=lambda: room.desk.now)
    desk = cast(GatewayClient, cast(Any, room.desk))
    with pytest.raises(LeaseLostError, match="not renewed in time"):
        run_trial(
            desk, room.change, SPEC, lease, poll_seconds=STEP, clock=lambda: room.desk.now, sleep=room._sleep
        )  # fmt: skip
    assert room.looks == 2


def test_it_begins_although_a_shadow_begins_beside_it(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, refused = room.desk.begin_canary, []

    def crossed(change: Intent, spec: CanarySpec, *, from_revision: int) -> Any:
        if not refused:
            refused.append(from_revision)
            now = room.desk.books.traffic("complaints")
            assert now is not None
            room.desk.books._change_traffic(now, by="Ada", why="a shadow")
        return begin(change, spec, from_revision=from_revision)

    monkeypatch.setattr(room.desk, "begin_canary", crossed)
    room.requests_a_look = 20
    assert room.try_out().problems == ()
    assert refused == [1]


@pytest.mark.parametrize(
    ("finding", "requests", "hours", "problems"),
    [
        (GOOD, 10, 1.0, ()),
        (BAD, 10, 1.0, ("It fails.", "It is slow.")),
        (BAD, 1, 0.1, ("It fails.", "It is slow.")),
        (GOOD, 9, 4.0, ("complaints@8 has answered 9 requests on trial in 4.0 h, 10 are needed to judge it.",)),
        (GOOD, 90, 0.5, ("complaints@8 was on trial for 0.5 h, 1 are needed.",)),
    ],
)
def test_what_follows_from_a_trial(
    finding: CanaryFinding, requests: int, hours: float, problems: tuple[str, ...]
) -> None:
    state = CanaryState(slow_above_ms=100.0, canary_requests=requests, live_requests=2 * requests)
    trial = TrialResult(spec=SPEC, state=state, finding=finding, hours=hours)
    assert trial_problems("complaints@8", trial) == problems
    line = trial_line("complaints@8", trial)
    assert (f"{requests} requests on trial, beside {2 * requests} of the live version" in line) is True
    assert ("was taken back" in line) is finding.abort
