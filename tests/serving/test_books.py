"""The books: compare-and-set of traffic, phases and leases of changes, rollbacks, and what a crash leaves behind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.contracts.errors import SpecError, StoreError
from tasks.contracts.observe import CanaryFinding, CanaryState, ShadowSpec
from tasks.contracts.serving import Intent, Phase, Shadow, Traffic, Vendor, VersionRef
from tasks.contracts.spec import CanarySpec
from tasks.serving.books import RESTART_LEASE_SECONDS, AbsentError, Books, Change, ConflictError
from tests.serving.records import rollout, version


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def books(tmp_path: Path, clock: Clock) -> Books:
    return Books(tmp_path, clock=clock)


def always(_: VersionRef) -> bool:
    return True


def only(*ready: VersionRef) -> Callable[[VersionRef], bool]:
    return lambda one: one in ready


def move(books: Books, live: int, previous: int | None, revision: int, change: Intent | None = None) -> Traffic:
    before = version(previous) if previous is not None else None
    return books.move_traffic(
        "complaints", version(live), before, from_revision=revision, by="a", why="b", ready=always,
        change=change and Change(change.id, change.holder),
    )  # fmt: skip


# -- traffic --------------------------------------------------------------------------------------------------------


def test_traffic_moves_from_the_revision_that_was_read(books: Books, tmp_path: Path) -> None:
    assert books.traffic("complaints") is None
    assert move(books, 7, None, 0).revision == 1
    moved = move(books, 8, 7, 1)
    assert (moved.live, moved.previous, moved.revision) == (version(8), version(7), 2)
    assert Books(tmp_path).all_traffic() == [moved]
    assert books.names_of(version(7).engine) == ["complaints"]
    assert books.names_of(version(9).engine) == []


def test_asking_for_what_is_so_already_changes_nothing(books: Books) -> None:
    first = move(books, 7, None, 0)
    assert move(books, 7, None, 0) == first  # the same call again, from a revision that is no longer


@pytest.mark.parametrize("revision", [0, 1, 3])
def test_another_revision_is_refused_and_says_what_is(books: Books, revision: int) -> None:
    move(books, 7, None, 0)
    move(books, 8, 7, 1)
    with pytest.raises(ConflictError, match=f"at revision 2, not {revision}") as refused:
        move(books, 9, 8, revision)
    assert refused.value.more["traffic"]["live"]["version"] == "8"
    assert books.traffic("complaints").live == version(8)  # type: ignore[union-attr]


def test_traffic_never_moves_to_an_engine_that_is_not_ready(books: Books) -> None:
    with pytest.raises(ConflictError, match="engine of complaints@7 is not ready"):
        books.move_traffic("complaints", version(7), None, from_revision=0, by="a", why="b", ready=only(version(8)))
    assert books.traffic("complaints") is None


@pytest.mark.parametrize("name", ["", "../x", "Complaints", "a/b", "x" * 64, "x@7"])
def test_a_name_that_is_none_never_becomes_a_file(books: Books, tmp_path: Path, name: str) -> None:
    with pytest.raises(SpecError, match="is no name of a model"):
        books.move_traffic(name, version(7), None, from_revision=0, by="a", why="b", ready=always)
    with pytest.raises(SpecError, match="is no name of a model"):
        books.history(name)
    assert list(tmp_path.rglob("*.json")) == []


def test_a_version_of_another_model_is_refused(books: Books) -> None:
    with pytest.raises(SpecError, match="prices@7 is a version of another model"):
        books.move_traffic("complaints", version(7, "prices"), None, from_revision=0, by="a", why="b", ready=always)


# -- intents --------------------------------------------------------------------------------------------------------


def test_a_change_is_open_until_its_final_phase_and_then_history(books: Books, tmp_path: Path) -> None:
    for number, phase in ((7, Phase.DONE), (8, Phase.REFUSED), (9, Phase.UNDONE)):
        begun = books.begin(rollout(version(number)), 10.0)
        assert books.open_intent("complaints").intent == begun  # type: ignore[union-attr]
        books.advance(rollout(version(number), phase), 10.0)
        assert books.open_intent("complaints") is None
    assert [(one.to.version, one.phase.value) for one in books.history("complaints")] == [
        ("9", "undone"), ("8", "refused"), ("7", "done"),
    ]  # fmt: skip
    assert Books(tmp_path).history("complaints") == books.history("complaints")


def test_a_second_change_is_refused_with_the_open_one(books: Books, clock: Clock) -> None:
    books.begin(rollout(version(7)), 10.0)
    clock.seconds += 4.0
    with pytest.raises(ConflictError, match="rollout to complaints@7 by retrain is under way") as refused:
        books.begin(rollout(version(8), holder="flow-b"), 10.0)
    assert refused.value.more["intent"]["id"] == "rollout-of-7"
    assert refused.value.more["lease_left"] == 6.0
    books.begin(rollout(version(3, "prices")), 10.0)  # other names do not wait


def test_a_change_stays_open_when_its_lease_has_run_out(books: Books, clock: Clock) -> None:
    books.begin(rollout(version(7)), 10.0)
    clock.seconds += 11.0
    with pytest.raises(ConflictError):
        books.begin(rollout(version(8)), 10.0)


def test_beginning_twice_begins_once(books: Books) -> None:
    books.begin(rollout(version(7)), 10.0)
    books.advance(rollout(version(7), Phase.CHECKED), 10.0)
    assert books.begin(rollout(version(7)), 10.0).phase is Phase.CHECKED  # the call again, not the change


def test_an_ended_change_cannot_begin_or_go_on(books: Books) -> None:
    books.begin(rollout(version(7)), 10.0)
    books.advance(rollout(version(7), Phase.REFUSED, problems=("too slow",)), 10.0)
    with pytest.raises(ConflictError, match="ended already"):
        books.begin(rollout(version(7)), 10.0)
    with pytest.raises(ConflictError, match=r"It has ended: refused \(too slow\)"):
        books.advance(rollout(version(7), Phase.CHECKED), 10.0)
    with pytest.raises(SpecError, match="cannot begin as done"):
        books.begin(rollout(version(8), Phase.DONE), 10.0)


@pytest.mark.parametrize("after", ["", "rollout-of-6"])
def test_a_change_prepared_before_another_ended_cannot_begin(books: Books, after: str) -> None:
    for number in (6, 7):
        books.begin(rollout(version(number)), 10.0)
        books.advance(rollout(version(number), Phase.DONE), 10.0)
    with pytest.raises(ConflictError, match=r"ended since .* a rollout to complaints@7, by retrain \(done\)"):
        books.begin(rollout(version(8), after=after), 10.0)
    assert books.open_intent("complaints") is None
    assert books.begin(rollout(version(8), after="rollout-of-7"), 10.0).phase is Phase.CHECKING
    assert books.begin(rollout(version(3, "prices"), after=""), 10.0).phase is Phase.CHECKING  # a first one


def test_closing_twice_closes_once(books: Books) -> None:
    books.begin(rollout(version(7)), 10.0)
    done = rollout(version(7), Phase.DONE)
    assert books.advance(done, 10.0) == done
    assert books.advance(done, 10.0) == done
    assert len(books.history("complaints")) == 1


@pytest.mark.parametrize(
    ("before", "after", "fits"),
    [
        ("checking", "checking", True),
        ("checking", "checked", True),
        ("checking", "refused", True),
        ("checking", "undone", True),
        ("checked", "checking", False),
        ("checked", "refused", True),
        ("switching", "checked", False),
        ("switching", "refused", False),  # something may have moved
        ("switching", "undone", True),
        ("switching", "done", True),
        ("switched", "switching", False),
        ("switched", "refused", False),
        ("switched", "done", True),
    ],
)
def test_phases_only_go_forward(books: Books, before: str, after: str, fits: bool) -> None:
    books.begin(rollout(version(7), Phase(before)), 10.0)
    if fits:
        assert books.advance(rollout(version(7), Phase(after)), 10.0).phase is Phase(after)
        return
    with pytest.raises(ConflictError, match=f"that is {before} cannot become {after}"):
        books.advance(rollout(version(7), Phase(after)), 10.0)
    assert books.open_intent("complaints").intent.phase is Phase(before)  # type: ignore[union-attr]


def test_only_the_holder_of_the_same_change_advances_it(books: Books) -> None:
    books.begin(rollout(version(7)), 10.0)
    with pytest.raises(ConflictError, match="held by flow-a"):
        books.advance(rollout(version(7), Phase.CHECKED, holder="flow-b"), 10.0)
    with pytest.raises(ConflictError, match="No change rollout-of-8 of complaints is open"):
        books.advance(rollout(version(8), Phase.CHECKED), 10.0)
    with pytest.raises(ConflictError, match="another change under the same id"):
        books.advance(rollout(version(8), Phase.CHECKED, id="rollout-of-7"), 10.0)


def test_a_lease_is_renewed_by_its_holder_alone(books: Books, clock: Clock) -> None:
    books.begin(rollout(version(7)), 10.0)
    clock.seconds += 9.0
    books.renew("complaints", "rollout-of-7", "flow-a", 10.0)
    clock.seconds += 9.0
    assert books.open_intent("complaints").lease_left == 1.0  # type: ignore[union-attr]
    with pytest.raises(ConflictError, match="held by flow-a"):
        books.renew("complaints", "rollout-of-7", "flow-b", 10.0)
    with pytest.raises(ConflictError, match="No change rollout-of-8"):
        books.renew("complaints", "rollout-of-8", "flow-a", 10.0)


def test_a_change_is_taken_over_only_when_its_lease_has_run_out(books: Books, clock: Clock) -> None:
    with pytest.raises(AbsentError, match="No change of complaints is open"):
        books.take("complaints", "flow-b", 10.0)
    books.begin(rollout(version(7)), 10.0)
    with pytest.raises(ConflictError) as refused:
        books.take("complaints", "flow-b", 10.0)
    assert refused.value.more["lease_left"] == 10.0
    clock.seconds += 10.0
    assert books.take("complaints", "flow-b", 10.0).holder == "flow-b"
    assert books.take("complaints", "flow-b", 20.0).holder == "flow-b"  # once more, after an answer that was lost
    with pytest.raises(ConflictError, match="held by flow-b"):
        books.advance(rollout(version(7), Phase.CHECKED), 10.0)  # who had it before comes too late


def test_a_lease_does_not_go_by_the_clock_on_the_wall(tmp_path: Path, clock: Clock) -> None:
    wall = [2030]
    from datetime import UTC, datetime

    books = Books(tmp_path, clock=clock, now=lambda: datetime(wall[0], 1, 1, tzinfo=UTC))
    books.begin(rollout(version(7)), 10.0)
    wall[0] = 1999
    assert books.open_intent("complaints").lease_left == 10.0  # type: ignore[union-attr]


def test_a_restarted_gateway_gives_each_open_change_one_lease(books: Books, tmp_path: Path, clock: Clock) -> None:
    books.begin(rollout(version(7)), 600.0)
    again = Books(tmp_path, clock=clock)
    assert again.open_intent("complaints").lease_left == RESTART_LEASE_SECONDS  # type: ignore[union-attr]
    with pytest.raises(ConflictError):
        again.take("complaints", "flow-b", 10.0)
    clock.seconds += RESTART_LEASE_SECONDS
    assert again.take("complaints", "flow-b", 10.0).id == "rollout-of-7"


# -- rollback -------------------------------------------------------------------------------------------------------


def roll_back(
    books: Books, holder: str = "ann", ready: Callable[[VersionRef], bool] = always
) -> tuple[Intent, Traffic]:
    return books.rollback(
        "complaints", by="ann", why="it answers nonsense", holder=holder, lease_seconds=10.0, ready=ready
    )


def test_a_rollback_swaps_live_and_previous_under_an_open_intent(books: Books) -> None:
    move(books, 7, None, 0)
    move(books, 8, 7, 1)
    intent, traffic = roll_back(books)
    assert (traffic.live, traffic.previous, traffic.revision) == (version(7), version(8), 3)
    assert (intent.kind, intent.phase, intent.to, intent.was) == ("rollback", Phase.SWITCHING, version(7), version(8))
    assert traffic.why == "rollback: it answers nonsense"
    books.advance(intent.model_copy(update={"phase": Phase.DONE}), 10.0)
    assert books.open_intent("complaints") is None


def test_asking_twice_does_not_swap_twice(books: Books, clock: Clock) -> None:
    move(books, 7, None, 0)
    move(books, 8, 7, 1)
    first, _ = roll_back(books)
    assert roll_back(books) == (first, books.traffic("complaints"))
    with pytest.raises(ConflictError, match="A rollback to complaints@7 by ann is under way"):
        roll_back(books, holder="bob")
    clock.seconds += 11.0  # the registry was down, and ann has gone home
    intent, traffic = roll_back(books, holder="bob")
    assert (intent.id, intent.holder, traffic.live, traffic.revision) == (first.id, "bob", version(7), 3)


@pytest.mark.parametrize("phase", [Phase.CHECKING, Phase.CHECKED])
def test_a_rollback_takes_back_a_rollout_that_has_moved_nothing(books: Books, phase: Phase) -> None:
    move(books, 7, None, 0)
    move(books, 8, 7, 1)
    books.begin(rollout(version(9), phase), 600.0)
    intent, traffic = roll_back(books)
    assert traffic.live == version(7)
    (undone,) = books.history("complaints")
    assert (undone.id, undone.phase) == ("rollout-of-9", Phase.UNDONE)
    assert undone.problems == ("taken back by a rollback of ann: it answers nonsense",)
    assert books.open_intent("complaints").intent == intent  # type: ignore[union-attr]
    with pytest.raises(ConflictError, match="It has ended: undone"):  # what the rollout hears at its next step
        books.advance(rollout(version(9), Phase.SWITCHING), 10.0)


@pytest.mark.parametrize("phase", [Phase.SWITCHING, Phase.SWITCHED])
def test_a_rollback_waits_for_a_rollout_that_is_moving(books: Books, clock: Clock, phase: Phase) -> None:
    move(books, 7, None, 0)
    move(books, 8, 7, 1)
    books.begin(rollout(version(8), phase, holder="ann"), 10.0)
    with pytest.raises(ConflictError, match=f"under way \\({phase.value}\\)"):
        roll_back(books)
    assert books.traffic("complaints").live == version(8)  # type: ignore[union-attr]
    clock.seconds += 11.0
    _, traffic = roll_back(books)
    assert traffic.live == version(7)
    assert [one.phase for one in books.history("complaints")] == [Phase.UNDONE]


def test_a_rollback_that_cannot_be_changes_nothing(books: Books) -> None:
    with pytest.raises(AbsentError, match="Nothing was rolled out as complaints"):
        roll_back(books)
    move(books, 7, None, 0)
    books.begin(rollout(version(8)), 10.0)
    with pytest.raises(ConflictError, match="complaints@7 has no previous version"):
        roll_back(books)
    move(books, 8, 7, 1, rollout(version(8)))
    with pytest.raises(ConflictError, match="engine of complaints@7 is not ready"):
        roll_back(books, ready=only(version(8)))
    assert books.traffic("complaints").live == version(8)  # type: ignore[union-attr]
    assert books.open_intent("complaints").intent.id == "rollout-of-8"  # type: ignore[union-attr]


# -- a canary and a shadow --------------------------------------------------------------------------------------------

SPEC = CanarySpec(share=0.2, slow_ms=500.0)
EIGHT = Change("rollout-of-8", "flow-a")


def checked(books: Books) -> Intent:
    """Version 7 answers, 8 has been checked."""
    move(books, 7, None, 0)
    return books.begin(rollout(version(8), Phase.CHECKED, was=version(7)), 10.0)


def begin(
    books: Books, change: Change = EIGHT, revision: int = 1, ready: Callable[[VersionRef], bool] = always
) -> Traffic:
    return books.begin_canary("complaints", SPEC, 500.0, change=change, from_revision=revision, ready=ready)


def test_a_canary_begins_and_ends_with_its_rollout(books: Books, tmp_path: Path) -> None:
    checked(books)
    begun = begin(books)
    assert begun.canary is not None
    assert (begun.live, begun.canary.version, begun.canary.salt, begun.revision) == (
        version(7), version(8), "rollout-of-8", 2,
    )  # fmt: skip
    assert begin(books) == begun  # the same call again
    assert books.names_of(version(8).engine) == ["complaints"]
    with pytest.raises(ConflictError, match="This engine serves complaints"):
        books.release(version(8).engine, lambda: None)
    ended = books.end_canary("complaints", EIGHT)
    assert (ended.canary, ended.revision) == (None, 3)
    assert books.end_canary("complaints", EIGHT) == ended
    assert books.names_of(version(8).engine) == []
    assert Books(tmp_path).traffic("complaints") == ended


@pytest.mark.parametrize(
    ("change", "revision", "phase", "ready", "says"),
    [
        (Change("rollout-of-9", "flow-a"), 1, Phase.CHECKED, always, "No change rollout-of-9 of complaints is open"),
        (Change("rollout-of-8", "flow-b"), 1, Phase.CHECKED, always, "held by flow-a"),
        (EIGHT, 0, Phase.CHECKED, always, "at revision 1, not 0"),
        (EIGHT, 1, Phase.CHECKING, always, "A rollout that is checking has no version to try out"),
        (EIGHT, 1, Phase.SWITCHING, always, "A rollout that is switching has no version to try out"),
        (EIGHT, 1, Phase.CHECKED, only(version(7)), "engine of complaints@8 is not ready"),
    ],
)
def test_only_a_checked_version_of_the_open_rollout_is_tried_out(
    books: Books, change: Change, revision: int, phase: Phase, ready: Callable[[VersionRef], bool], says: str
) -> None:
    move(books, 7, None, 0)
    books.begin(rollout(version(8), phase, was=version(7)), 10.0)
    with pytest.raises(ConflictError, match=says):
        begin(books, change, revision, ready)
    assert books.traffic("complaints").canary is None  # type: ignore[union-attr]


def test_what_answers_already_is_not_tried_out_and_nor_is_anything_beside_nothing(books: Books) -> None:
    books.begin(rollout(version(8), Phase.CHECKED), 10.0)
    with pytest.raises(AbsentError, match="Nothing was rolled out as complaints"):
        begin(books, revision=0)
    move(books, 8, None, 0, rollout(version(8)))
    with pytest.raises(ConflictError, match="complaints@8 answers already"):
        begin(books)


def test_what_has_happened_is_kept_without_a_change_of_traffic(books: Books, tmp_path: Path) -> None:
    checked(books)
    begin(books)
    state = CanaryState(slow_above_ms=500.0, canary_requests=12, canary_failed=9)
    finding = CanaryFinding(abort=True, reasons=("It fails.",), qualities=())
    assert books.note_canary("complaints", "rollout-of-8", state, finding)
    kept = Books(tmp_path).traffic("complaints")
    assert kept is not None
    assert kept.canary is not None
    assert (kept.canary.state, kept.canary.finding, kept.revision) == (state, finding, 2)
    assert not books.note_canary("complaints", "rollout-of-9", state, None)  # another's
    books.end_canary("complaints", EIGHT)
    assert not books.note_canary("complaints", "rollout-of-8", state, None)
    assert books.traffic("complaints").canary is None  # type: ignore[union-attr]


def test_traffic_that_moves_takes_the_canary_out(books: Books) -> None:
    intent = checked(books)
    begin(books)
    moved = move(books, 8, 7, 2, intent)
    assert (moved.live, moved.canary, moved.revision) == (version(8), None, 3)


def test_a_rollback_takes_the_canary_out_and_its_rollout_back(books: Books) -> None:
    move(books, 6, None, 0)
    move(books, 7, 6, 1)
    books.begin(rollout(version(8), Phase.CHECKED, was=version(7)), 10.0)
    begin(books, revision=2)
    _, traffic = roll_back(books)
    assert (traffic.live, traffic.previous, traffic.canary) == (version(6), version(7), None)
    assert books.history("complaints")[0].problems == ("taken back by a rollback of ann: it answers nonsense",)
    with pytest.raises(ConflictError, match="No change rollout-of-8 of complaints is open"):
        begin(books, revision=3)


def test_traffic_moves_for_whoever_holds_the_open_change(books: Books) -> None:
    intent = checked(books)
    with pytest.raises(ConflictError, match="rollout to complaints@8 by retrain is under way") as refused:
        move(books, 8, 7, 1)
    assert refused.value.more["intent"]["id"] == "rollout-of-8"
    with pytest.raises(ConflictError, match="held by flow-a"):
        move(books, 8, 7, 1, rollout(version(8), holder="flow-b"))
    with pytest.raises(ConflictError, match="No change rollout-of-9"):
        move(books, 8, 7, 1, rollout(version(9)))
    assert move(books, 8, 7, 1, intent).live == version(8)


def shadow(of: VersionRef | None = None, vendor: Vendor | None = None, name: str = "first") -> Shadow:
    return Shadow(id=name, version=of, vendor=vendor, spec=ShadowSpec(share=0.5), since=rollout(version(1)).at)


def test_a_shadow_keeps_its_engine_and_goes_on_until_it_answers_itself(books: Books) -> None:
    move(books, 7, None, 0)
    begun = books.begin_shadow("complaints", shadow(version(8)), from_revision=1, by="Ada")
    assert (begun.shadow, begun.revision) == (shadow(version(8)), 2)
    assert books.begin_shadow("complaints", shadow(version(8)), from_revision=1, by="Ada") == begun
    assert books.names_of(version(8).engine) == ["complaints"]
    assert move(books, 9, 7, 2).shadow == shadow(version(8))  # another goes live, the comparison goes on
    assert move(books, 8, 9, 3).shadow is None
    assert books.end_shadow("complaints", by="Ada").revision == 4  # there is none: nothing changes


@pytest.mark.parametrize(
    ("given", "revision", "kind", "says"),
    [
        (shadow(version(7)), 1, ConflictError, "complaints@7 is what answers; it cannot be compared with itself"),
        (shadow(version(8, "prices")), 1, SpecError, "prices@8 is a version of another model"),
        (shadow(version(8)), 0, ConflictError, "at revision 1, not 0"),
        (shadow(), 1, SpecError, "A shadow is a version or a vendor"),
        (shadow(version(8), Vendor(url="https://x/v1", model="m")), 1, SpecError, "A shadow is a version or a vendor"),
    ],
)
def test_a_shadow_that_compares_nothing_is_refused(
    books: Books, given: Shadow, revision: int, kind: type[Exception], says: str
) -> None:
    move(books, 7, None, 0)
    with pytest.raises(kind, match=says):
        books.begin_shadow("complaints", given, from_revision=revision, by="Ada")


def test_a_second_shadow_waits_for_the_end_of_the_first(books: Books) -> None:
    move(books, 7, None, 0)
    vendor = shadow(vendor=Vendor(url="https://x/v1", model="m"), name="vendor")
    books.begin_shadow("complaints", vendor, from_revision=1, by="Ada")
    with pytest.raises(ConflictError, match="complaints has a shadow already"):
        books.begin_shadow("complaints", shadow(version(8)), from_revision=2, by="Ada")
    assert books.end_shadow("complaints", by="Ada").shadow is None
    books.begin_shadow("complaints", shadow(version(8)), from_revision=3, by="Ada")


# -- crashes --------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the process runs any more, so nothing is tidied up."""


def kill_at(monkeypatch: pytest.MonkeyPatch, owner: type | object, name: str, call: int = 1) -> None:
    """Be killed instead of making the n-th call of a function."""
    real, made = getattr(owner, name), [0]

    def or_killed(*arguments: object, **options: object) -> object:
        made[0] += 1
        if made[0] == call:
            monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
            raise Killed
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, or_killed)


@pytest.mark.parametrize(("owner", "name", "moved"), [(os, "fsync", False), (Path, "replace", False)])
def test_killed_between_write_and_rename_the_old_record_stands(
    books: Books, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, moved: bool
) -> None:
    before = move(books, 7, None, 0)
    with monkeypatch.context() as patch:
        kill_at(patch, owner, name)
        with pytest.raises(Killed):
            move(books, 8, 7, 1)
    assert list((tmp_path / "traffic").glob(".*.part"))  # what was half written is there
    again = Books(tmp_path)
    assert again.all_traffic() == [before]
    assert list((tmp_path / "traffic").glob(".*.part")) == []
    assert move(again, 8, 7, 1).revision == 2


def test_killed_after_the_rename_the_new_record_stands(
    books: Books, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    move(books, 7, None, 0)
    with monkeypatch.context() as patch:
        kill_at(patch, os, "fsync", call=2)  # of the folder
        with pytest.raises(Killed):
            move(books, 8, 7, 1)
    assert Books(tmp_path).traffic("complaints").revision == 2  # type: ignore[union-attr]


def test_killed_before_a_closed_change_is_put_away_it_is_put_away_at_the_next_start(
    books: Books, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    books.begin(rollout(version(7)), 10.0)
    with monkeypatch.context() as patch:
        kill_at(patch, Path, "rename")
        with pytest.raises(Killed):
            books.advance(rollout(version(7), Phase.DONE), 10.0)
    again = Books(tmp_path)
    assert again.open_intent("complaints") is None
    assert [one.phase for one in again.history("complaints")] == [Phase.DONE]
    again.begin(rollout(version(8)), 10.0)


@pytest.mark.parametrize("call", range(1, 9))
def test_killed_anywhere_in_a_rollback_asking_again_finishes_it(
    books: Books, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock, call: int
) -> None:
    move(books, 7, None, 0)
    move(books, 8, 7, 1)
    books.begin(rollout(version(9)), 10.0)
    with monkeypatch.context() as patch:
        kill_at(patch, os, "fsync", call)
        with pytest.raises(Killed):
            roll_back(books)
    again = Books(tmp_path, clock=clock)
    intent, traffic = roll_back(again)
    assert (traffic.live, traffic.previous) == (version(7), version(8))
    assert again.open_intent("complaints").intent == intent  # type: ignore[union-attr]
    assert [one.phase for one in again.history("complaints")] == [Phase.UNDONE]


def test_a_full_disk_changes_nothing_and_says_so(books: Books, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = move(books, 7, None, 0)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match="No space left on device"):
            move(books, 8, 7, 1)
        with pytest.raises(StoreError, match="No space left on device"):
            books.begin(rollout(version(8)), 10.0)
    assert (books.all_traffic(), books.open_intent("complaints")) == ([before], None)
    assert list(tmp_path.rglob("*.part")) == []
    assert move(books, 8, 7, 1).revision == 2


def test_a_record_that_was_spoilt_stops_the_start(tmp_path: Path, books: Books) -> None:
    move(books, 7, None, 0)
    path = tmp_path / "traffic" / "complaints.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "revision": "many"}))
    with pytest.raises(StoreError, match="does not read as one: revision") as refused:
        Books(tmp_path)
    assert refused.value.where == str(path)
