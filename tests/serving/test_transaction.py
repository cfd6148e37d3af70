"""What is next about a change, wherever it stands; and that killed anywhere it ends with traffic and alias in step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks.contracts.errors import ServiceError
from tasks.contracts.observe import CanaryState, ShadowSpec
from tasks.contracts.serving import (
    Aliases,
    Canary,
    EngineSpec,
    EngineState,
    EngineStatus,
    Intent,
    Phase,
    Shadow,
    Traffic,
    VersionRef,
)
from tasks.contracts.spec import CanarySpec
from tasks.serving.client import ConflictError, Lease, LeaseLostError
from tasks.serving.transaction import (
    Means,
    Situation,
    Step,
    attempt,
    bring_to_end,
    finish_left,
    next_step,
    superfluous,
    under_way,
)
from tests.serving.desk import Aliaser, Desk, Fuse, Killed, means
from tests.serving.records import rollout, version

ONE, TWO, THREE = version(1), version(2), version(3)
READY, STARTING, FAILED, STOPPED = EngineState.READY, EngineState.STARTING, EngineState.FAILED, EngineState.STOPPED
BEFORE = Aliases(champion="1", promoted="2")
HALF = Aliases(champion="1", previous="1", promoted="2")
NEARLY = Aliases(champion="2", previous="1", promoted="2")
AFTER = Aliases(champion="2", previous="1")


TRIAL = CanarySpec(share=0.5, min_requests=1, min_hours=0.0, slow_ms=100.0)


def traffic(
    live: VersionRef,
    previous: VersionRef | None = None,
    trial: VersionRef | None = None,
    beside: VersionRef | None = None,
) -> Traffic:
    at = rollout(ONE).at
    canary = trial and Canary(version=trial, spec=TRIAL, salt="x", since=at, state=CanaryState(slow_above_ms=100.0))
    shadow = beside and Shadow(id="x", version=beside, spec=ShadowSpec(), since=at)
    return Traffic(
        name="complaints",
        live=live,
        previous=previous,
        canary=canary,
        shadow=shadow,
        revision=1,
        by="a",
        why="b",
        at=at,
    )


def engines(**states: EngineState) -> tuple[EngineStatus, ...]:
    named = {"one": ONE, "two": TWO, "three": THREE}
    return tuple(EngineStatus(name=named[n].engine, version=named[n], state=state) for n, state in states.items())


def to_two(phase: Phase, **changes: Any) -> Intent:
    """The rollout of version 2 over version 1."""
    return rollout(TWO, phase, **({"was": ONE, "aliases": BEFORE} | changes))


def back_to_one(phase: Phase = Phase.SWITCHING) -> Intent:
    """The rollback from version 2 to version 1."""
    return rollout(ONE, phase, kind="rollback", was=TWO, was_previous=ONE)


LIVE_1, LIVE_2 = traffic(ONE), traffic(TWO, ONE)
BOTH = engines(one=READY, two=READY)
PROBLEM = ("It is slow.",)

TABLE = [
    # found half-done before anything moved: undone
    ("checking", to_two(Phase.CHECKING), engines(one=READY), LIVE_1, BEFORE, Step.CLOSE_UNDONE),
    ("checking, it starts", to_two(Phase.CHECKING), engines(one=READY, two=STARTING), LIVE_1, BEFORE, Step.END_ENGINE),
    ("checking, it answers", to_two(Phase.CHECKING), BOTH, LIVE_1, BEFORE, Step.END_ENGINE),
    ("checking, it failed", to_two(Phase.CHECKING), engines(two=FAILED), LIVE_1, BEFORE, Step.CLOSE_UNDONE),
    ("checked", to_two(Phase.CHECKED), BOTH, LIVE_1, BEFORE, Step.END_ENGINE),
    ("checked, it is previous", to_two(Phase.CHECKED), BOTH, traffic(ONE, TWO), BEFORE, Step.CLOSE_UNDONE),
    ("checked, it is live", to_two(Phase.CHECKED, was=TWO), BOTH, LIVE_2, AFTER, Step.CLOSE_UNDONE),
    ("checking the first", to_two(Phase.CHECKING, was=None), engines(two=READY), None, BEFORE, Step.END_ENGINE),
    # ... while it was tried out: it gets no requests before it is ended
    ("on trial", to_two(Phase.CHECKED), BOTH, traffic(ONE, trial=TWO), BEFORE, Step.END_CANARY),
    ("on trial, worse", to_two(Phase.CHECKED, problems=PROBLEM), BOTH, traffic(ONE, trial=TWO), BEFORE,
     Step.END_CANARY),
    ("on trial, it died", to_two(Phase.CHECKED), engines(one=READY, two=FAILED), traffic(ONE, trial=TWO), BEFORE,
     Step.END_CANARY),
    ("trial is over", to_two(Phase.CHECKED), BOTH, LIVE_1, BEFORE, Step.END_ENGINE),
    ("checked, it is a shadow", to_two(Phase.CHECKED), BOTH, traffic(ONE, beside=TWO), BEFORE, Step.CLOSE_UNDONE),
    # the check has said no
    ("refused", to_two(Phase.CHECKING, problems=PROBLEM), BOTH, LIVE_1, BEFORE, Step.END_ENGINE),
    ("ended", to_two(Phase.CHECKING, problems=PROBLEM), engines(two=STOPPED), LIVE_1, BEFORE, Step.REFUSE),
    ("untagged", to_two(Phase.CHECKING, problems=PROBLEM), (), LIVE_1, Aliases(champion="1"), Step.CLOSE_REFUSED),
    ("newer waits", to_two(Phase.CHECKING, problems=PROBLEM), (), LIVE_1, Aliases(promoted="3"), Step.CLOSE_REFUSED),
    # within the switch
    ("to move", to_two(Phase.SWITCHING), BOTH, LIVE_1, BEFORE, Step.MOVE_TRAFFIC),
    ("to move, on trial", to_two(Phase.SWITCHING), BOTH, traffic(ONE, trial=TWO), BEFORE, Step.MOVE_TRAFFIC),
    ("it is gone, on trial", to_two(Phase.SWITCHING), engines(one=READY), traffic(ONE, trial=TWO), BEFORE,
     Step.END_CANARY),
    ("first to move", to_two(Phase.SWITCHING, was=None), engines(two=READY), None, BEFORE, Step.MOVE_TRAFFIC),
    ("it starts", to_two(Phase.SWITCHING), engines(two=STARTING), LIVE_1, BEFORE, Step.WAIT),
    ("it is gone", to_two(Phase.SWITCHING), engines(one=READY), LIVE_1, BEFORE, Step.CLOSE_UNDONE),
    ("moved", to_two(Phase.SWITCHING), BOTH, LIVE_2, BEFORE, Step.MOVE_ALIASES),
    ("one alias moved", to_two(Phase.SWITCHING), BOTH, LIVE_2, HALF, Step.MOVE_ALIASES),
    ("still promoted", to_two(Phase.SWITCHING), BOTH, LIVE_2, NEARLY, Step.MOVE_ALIASES),
    ("all moved", to_two(Phase.SWITCHING), BOTH, LIVE_2, AFTER, Step.RECORD_SWITCHED),
    ("all moved, newer waits", to_two(Phase.SWITCHING), BOTH, LIVE_2, Aliases(champion="2", previous="1", promoted="3"),
     Step.RECORD_SWITCHED),
    ("moved, it starts again", to_two(Phase.SWITCHING), engines(one=READY, two=STARTING), LIVE_2, BEFORE, Step.WAIT),
    ("moved, it died", to_two(Phase.SWITCHING), engines(one=READY, two=FAILED), LIVE_2, BEFORE, Step.MOVE_TRAFFIC_BACK),
    ("all moved, it died", to_two(Phase.SWITCHING), engines(one=READY, two=FAILED), LIVE_2, AFTER,
     Step.MOVE_TRAFFIC_BACK),
    ("moved, both died", to_two(Phase.SWITCHING), engines(one=FAILED, two=FAILED), LIVE_2, BEFORE, Step.STUCK),
    ("first moved, it died", to_two(Phase.SWITCHING, was=None), engines(two=FAILED), traffic(TWO), BEFORE,
     Step.MOVE_ALIASES),
    # on the way back
    ("back, aliases moved", to_two(Phase.SWITCHING), engines(two=FAILED), LIVE_1, AFTER, Step.RESTORE_ALIASES),
    ("back, nearly moved", to_two(Phase.SWITCHING), engines(two=FAILED), LIVE_1, NEARLY, Step.RESTORE_ALIASES),
    ("back, half moved", to_two(Phase.SWITCHING), engines(two=FAILED), LIVE_1, HALF, Step.RESTORE_ALIASES),
    ("back, promoted to restore", to_two(Phase.SWITCHING), (), LIVE_1, Aliases(champion="1"), Step.RESTORE_ALIASES),
    ("back, as before", to_two(Phase.SWITCHING), engines(two=FAILED), LIVE_1, BEFORE, Step.CLOSE_UNDONE),
    ("back, newer waits", to_two(Phase.SWITCHING), (), LIVE_1, Aliases(champion="1", promoted="3"), Step.CLOSE_UNDONE),
    ("back, a person's champion", to_two(Phase.SWITCHING), (), LIVE_1, Aliases(champion="5", previous="1"),
     Step.CLOSE_UNDONE),
    # both have moved
    ("switched", to_two(Phase.SWITCHED), BOTH, LIVE_2, AFTER, Step.CLOSE_DONE),
    ("switched, one too many", to_two(Phase.SWITCHED), engines(one=READY, two=READY, three=READY), LIVE_2, AFTER,
     Step.RETIRE),
    ("switched, one is a shadow", to_two(Phase.SWITCHED), engines(one=READY, two=READY, three=READY),
     traffic(TWO, ONE, beside=THREE), AFTER, Step.CLOSE_DONE),
    ("switched, one draining", to_two(Phase.SWITCHED), engines(two=READY, three=EngineState.DRAINING), LIVE_2, AFTER,
     Step.CLOSE_DONE),
    ("switched, alias lost", to_two(Phase.SWITCHED), BOTH, LIVE_2, BEFORE, Step.MOVE_ALIASES),
    # rollbacks
    ("back to move", back_to_one(), BOTH, LIVE_2, AFTER, Step.MOVE_TRAFFIC),
    ("back has moved", back_to_one(), BOTH, traffic(ONE, TWO), AFTER, Step.MOVE_ALIASES),
    ("back has moved, it died", back_to_one(), engines(one=FAILED, two=READY), traffic(ONE, TWO), AFTER,
     Step.MOVE_ALIASES),
    ("back, all moved", back_to_one(), BOTH, traffic(ONE, TWO), Aliases(champion="1", previous="2"),
     Step.RECORD_SWITCHED),
    ("back, and it is gone", back_to_one(), engines(two=READY), LIVE_2, AFTER, Step.CLOSE_UNDONE),
    ("back, switched", back_to_one(Phase.SWITCHED), BOTH, traffic(ONE, TWO), Aliases(champion="1", previous="2"),
     Step.CLOSE_DONE),
    # ended
    *((phase.value, to_two(phase), BOTH, LIVE_1, BEFORE, Step.NOTHING)
      for phase in (Phase.DONE, Phase.REFUSED, Phase.UNDONE)),
]  # fmt: skip


@pytest.mark.parametrize(("what", "intent", "running", "goes", "aliases", "expected"), TABLE, ids=lambda v: str(v)[:30])
def test_what_is_next(
    what: str,
    intent: Intent,
    running: tuple[EngineStatus, ...],
    goes: Traffic | None,
    aliases: Aliases,
    expected: Step,
) -> None:
    assert next_step(Situation(intent, running, goes, aliases)) is expected


def test_the_table_has_every_step() -> None:
    assert {row[-1] for row in TABLE} == set(Step)


@pytest.mark.parametrize(
    ("intent", "expected"),
    [
        (to_two(Phase.CHECKING), "1"),
        (rollout(TWO), None),  # the first of all
        (rollout(TWO, aliases=Aliases(champion="1")), "1"),  # a champion that nothing served
        (rollout(TWO, aliases=Aliases(champion="2", previous="1")), "1"),  # the champion, served for the first time
        (rollout(TWO, was=TWO, was_previous=ONE, aliases=AFTER), "1"),  # asked again
        (rollout(THREE, was=TWO, was_previous=ONE, aliases=AFTER), "2"),
        (rollout(ONE, was=TWO, was_previous=ONE, aliases=AFTER), "2"),
        (rollout(THREE, was=TWO, aliases=Aliases(champion="1")), "2"),  # a person moved the alias: traffic counts
    ],
)
def test_the_alias_previous_names_what_traffic_keeps_warm(intent: Intent, expected: str | None) -> None:
    assert intent.previous_after == expected


def test_engines_of_traffic_are_not_superfluous() -> None:
    running = engines(one=READY, two=STARTING, three=READY)
    assert superfluous(Situation(to_two(Phase.SWITCHED), running, LIVE_2, AFTER)) == (THREE.engine,)
    assert superfluous(Situation(to_two(Phase.SWITCHED), running, None, AFTER)) == (
        ONE.engine, TWO.engine, THREE.engine,
    )  # fmt: skip


# -- the deed ---------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_power_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes are killed here, not machines: what is written need not reach the disk, which takes seconds in all."""
    monkeypatch.setattr("os.fsync", lambda handle: None)


def work_on(means: Means, intent: Intent, beside: Callable[[Intent, Lease], Intent]) -> Intent:
    """Make a change as the flow does; return it as it ended."""
    with attempt(means, intent) as change:
        change.intent = beside(change.intent, change.lease)
        change.bring_to_end()
    return change.ended.intent


class World:
    """Version 1 in service, and version 2 waiting; everything in this process."""

    def __init__(self, folder: Path, *, first: bool = False) -> None:
        self.fuse = Fuse()
        self.desk = Desk(folder, self.fuse)
        self.registry = Aliaser(self.fuse, promoted="2")
        self.said: list[str] = []
        self.means = means(self.desk, self.registry, self.said)
        self.attempts = 0
        if not first:
            self.registry.aliases |= {"champion": "1"}
            self.desk.start_engine(ONE, EngineSpec())
            self.desk.move_traffic("complaints", ONE, None, from_revision=0, by="a", why="b")

    def roll_out(
        self, to: VersionRef, *, problems: tuple[str, ...] = (), holder: str = "", tried: bool = False
    ) -> Intent:
        """What the flow does: finish what was left, begin, start, check, try out, decide, bring to the end."""
        self.attempts += 1
        holder = holder or f"attempt {self.attempts}"
        finish_left(self.means, "complaints", holder, wait_seconds=0.0)
        now = self.desk.traffic("complaints")
        intent = rollout(
            to, id=f"{holder} of {to.version}", holder=holder, was=now and now.live, was_previous=now and now.previous,
            aliases=self.registry.read("complaints"),
        )  # fmt: skip
        self.desk.begin(intent)

        def beside(change: Intent, lease: Lease) -> Intent:
            self.desk.start_engine(change.to, EngineSpec())
            found = change.model_copy(update={"problems": problems})
            if problems and not tried:
                return self.desk.write(found)
            found = self.desk.write(change.model_copy(update={"phase": Phase.CHECKED}))
            if tried:
                now = self.desk.traffic("complaints")
                assert now is not None
                self.desk.begin_canary(found, TRIAL, from_revision=now.revision)
                found = self.desk.write(found.model_copy(update={"problems": problems}))
                if problems:
                    return found
            return self.desk.write(found.model_copy(update={"phase": Phase.SWITCHING}))

        return work_on(self.means, intent, beside)

    def roll_back(self, why: str = "wrong on refunds", holder: str = "a person") -> Intent:
        done = self.desk.roll_back("complaints", by="Ada", why=why, holder=holder)
        with self.desk.holding(done.intent) as lease:
            return bring_to_end(self.means, done.intent, lease).intent

    def revive(self, folder: Path) -> None:
        """As after a kill: the fuse is whole, the books are read anew from disk, and the dead one's lease runs out."""
        self.fuse.burn(-1)
        states, ended = self.desk.states, self.desk.ended
        self.desk = Desk(folder, self.fuse)
        self.desk.states, self.desk.ended = states, ended
        self.means = means(self.desk, self.registry, self.said)
        self.desk.now += 3600.0

    def check_in_step(self) -> None:
        """Traffic and alias agree; every engine that traffic names answers; none runs that it does not name."""
        goes = self.desk.traffic("complaints")
        assert goes is not None
        aliases = self.registry.aliases
        assert aliases.get("champion") == goes.live.version
        assert aliases.get("previous") == (goes.previous.version if goes.previous else None)
        running = {name for name, (_, state) in self.desk.states.items() if state is READY}
        assert running == {goes.live.engine} | ({goes.previous.engine} if goes.previous else set())
        assert self.desk.open_intent("complaints") is None


def test_a_rollout_moves_traffic_and_aliases(tmp_path: Path) -> None:
    world = World(tmp_path)
    assert world.roll_out(TWO).phase is Phase.DONE
    world.check_in_step()
    assert world.registry.aliases == {"champion": "2", "previous": "1"}
    assert [text.partition(": ")[2] for text in world.said] == [
        "move traffic", "move the aliases", "record that both have moved", "record that it is done",
    ]  # fmt: skip
    world.registry.aliases["promoted"] = "3"
    assert world.roll_out(THREE).phase is Phase.DONE
    world.check_in_step()
    assert world.desk.ended == [ONE.engine]


def test_a_refused_version_changes_nothing(tmp_path: Path) -> None:
    world = World(tmp_path)
    refused = world.roll_out(TWO, problems=PROBLEM)
    assert (refused.phase, refused.problems) == (Phase.REFUSED, PROBLEM)
    world.check_in_step()
    assert world.registry.aliases == {"champion": "1"}
    assert world.registry.refused == {"2": PROBLEM}


def kill_points(tmp_path: Path, problems: tuple[str, ...], first: bool, tried: bool) -> list[str]:
    world = World(tmp_path, first=first)
    world.fuse.burn(-1)
    world.roll_out(TWO, problems=problems, tried=tried)
    return world.fuse.made


@pytest.mark.parametrize("lost", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("first", "tried"), [(False, False), (True, False), (False, True)], ids=["second", "first", "tried"]
)
@pytest.mark.parametrize("problems", [(), PROBLEM], ids=["good", "bad"])
def test_killed_anywhere_it_ends_in_step(
    tmp_path: Path, problems: tuple[str, ...], first: bool, tried: bool, lost: bool
) -> None:
    made = kill_points(tmp_path / "whole", problems, first, tried)
    assert len(made) >= (6 if problems else 8) + tried
    assert ("begin canary" in made, "end canary" in made) == (tried, tried and bool(problems))
    for done in range(1, len(made) + 1) if lost else range(len(made)):
        folder = tmp_path / str(done)
        world = World(folder, first=first)
        world.fuse.burn(done, lost=lost)
        with pytest.raises(Killed):
            world.roll_out(TWO, problems=problems, tried=tried)
        world.revive(folder)
        where = f"killed {'after' if lost else 'before'} {made[done - 1] if lost else made[done]}"
        waits = world.registry.aliases.get("promoted") == "2"
        finish_left(world.means, "complaints", "the next", wait_seconds=0.0)
        assert world.desk.open_intent("complaints") is None, where
        if world.registry.aliases.get("promoted") == "2":  # undone, or never begun: it is asked again
            assert waits, where
            world.roll_out(TWO, problems=problems, tried=tried)
        if problems:
            assert world.registry.refused == {"2": PROBLEM}, where
            assert world.registry.aliases == ({} if first else {"champion": "1"}), where
            running = [name for name, (_, state) in world.desk.states.items() if state is READY]
            assert running == ([] if first else [ONE.engine]), where
        else:
            world.check_in_step()
            assert world.registry.aliases.get("champion") == "2", where
        last = world.desk.history("complaints")[0]
        assert last.phase is (Phase.REFUSED if problems else Phase.DONE), where
        goes = world.desk.traffic("complaints")
        assert goes is None or goes.canary is None, where


def test_a_killed_trial_ends_before_its_engine(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.fuse.burn(4, lost=True)
    with pytest.raises(Killed):
        world.roll_out(TWO, tried=True)
    assert world.fuse.made[-1] == "begin canary"
    world.revive(tmp_path)
    goes = world.desk.traffic("complaints")
    assert goes is not None
    assert goes.canary is not None  # its share of the requests goes on being answered, and judged, meanwhile
    assert goes.canary.version == TWO
    ended = finish_left(world.means, "complaints", "the next", wait_seconds=0.0)
    assert ended is not None
    assert ended.intent.phase is Phase.UNDONE
    assert [text.partition(": ")[2] for text in world.said[-3:]] == [
        "end the canary", "end the new engine", "record that it was undone",
    ]  # fmt: skip
    assert world.fuse.made == ["take", "end canary", "end engine", "write undone"]


@pytest.mark.parametrize("lost", [False, True], ids=["before", "after"])
def test_a_rollback_killed_anywhere_ends_in_step(tmp_path: Path, lost: bool) -> None:
    whole = World(tmp_path / "whole")
    whole.roll_out(TWO)
    whole.fuse.burn(-1)
    whole.roll_back()
    whole.check_in_step()
    assert whole.registry.aliases == {"champion": "1", "previous": "2"}
    made = whole.fuse.made
    assert made == ["roll back", "alias previous", "alias champion", "write switched", "write done"]
    for done in range(1, len(made) + 1) if lost else range(len(made)):
        world = World(tmp_path / str(done))
        world.roll_out(TWO)
        world.fuse.burn(done, lost=lost)
        with pytest.raises(Killed):
            world.roll_back()
        world.revive(tmp_path / str(done))
        ended = finish_left(world.means, "complaints", "the next", wait_seconds=0.0)
        if done == 0:
            assert ended is None
            world.roll_back()
        world.check_in_step()
        assert world.registry.aliases == {"champion": "1", "previous": "2"}, f"{done} changes"


def test_a_new_engine_that_dies_while_traffic_moves_brings_all_back(tmp_path: Path) -> None:
    for done in range(3):  # alias changes that were made before it died
        world = World(tmp_path / str(done))
        kinds = ["begin", "start engine", "write checked", "write switching", "move traffic"]
        world.fuse.burn(len(kinds) + done)
        with pytest.raises(Killed):
            world.roll_out(TWO)
        assert world.fuse.made[: len(kinds)] == kinds
        world.revive(tmp_path / str(done))
        world.desk.states[TWO.engine] = (TWO, FAILED)
        ended = finish_left(world.means, "complaints", "the next", wait_seconds=0.0)
        assert ended is not None
        assert ended.intent.phase is Phase.UNDONE
        assert ended.intent.problems == ("complaints@2 ended while traffic was moving to it.",)
        world.check_in_step()
        assert world.registry.aliases == {"champion": "1", "promoted": "2"}


def test_where_neither_can_answer_the_change_stays_open(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.fuse.burn(5, lost=True)
    with pytest.raises(Killed):
        world.roll_out(TWO)
    world.revive(tmp_path)
    for one in (ONE, TWO):
        world.desk.states[one.engine] = (one, FAILED)
    with pytest.raises(ServiceError, match=r"engines of complaints@2 and complaints@1 do not answer"):
        finish_left(world.means, "complaints", "the next", wait_seconds=0.0)
    world.desk.states[TWO.engine] = (TWO, READY)
    world.desk.states[ONE.engine] = (ONE, READY)
    world.desk.now += 3600.0
    finish_left(world.means, "complaints", "another", wait_seconds=0.0)
    world.check_in_step()


def test_a_second_rollout_is_refused_while_the_first_one_lives(tmp_path: Path) -> None:
    world = World(tmp_path)
    begun = rollout(TWO, was=ONE, holder="flow run blue", aliases=BEFORE)
    world.desk.begin(begun)
    with pytest.raises(ServiceError, match=r"A rollout to complaints@2 is under way \(checking\), by flow run blue"):
        world.roll_out(THREE)
    assert world.desk.open_intent("complaints") == begun
    with pytest.raises(ConflictError) as conflict:
        world.desk.begin(rollout(THREE, id="other", holder="b"))
    assert conflict.value.open == begun
    assert "for 30 s more" in str(under_way(begun, 30.0))


def test_a_rollback_takes_a_rollout_back_that_is_checking(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.roll_out(TWO)
    now = world.desk.traffic("complaints")
    assert now is not None
    change = rollout(
        THREE, id="third", was=now.live, was_previous=now.previous, aliases=world.registry.read("complaints")
    )
    world.desk.begin(change)

    def beside(intent: Intent, lease: Lease) -> Intent:
        world.desk.start_engine(THREE, EngineSpec())
        world.roll_back()  # a person, meanwhile
        return world.desk.write(intent.model_copy(update={"phase": Phase.CHECKED}))

    ended = work_on(world.means, change, beside)
    assert ended.phase is Phase.UNDONE
    assert ended.problems == ("taken back by a rollback of Ada: wrong on refunds",)
    world.check_in_step()
    assert world.registry.aliases == {"champion": "1", "previous": "2"}


def test_a_rollout_that_was_taken_back_ends_its_engine_itself(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.roll_out(TWO)
    change = rollout(THREE, id="third", was=TWO, was_previous=ONE, aliases=world.registry.read("complaints"))
    world.desk.begin(change)

    def beside(intent: Intent, lease: Lease) -> Intent:
        world.desk.start_engine(THREE, EngineSpec())
        world.desk.roll_back("complaints", by="Ada", why="stop", holder="a person")  # whose registry is down
        return world.desk.write(intent.model_copy(update={"phase": Phase.CHECKED}))

    assert work_on(world.means, change, beside).phase is Phase.UNDONE
    assert world.desk.ended == [THREE.engine]
    world.desk.now += 3600.0
    finish_left(world.means, "complaints", "the next", wait_seconds=0.0)
    world.check_in_step()
    assert world.registry.aliases == {"champion": "1", "previous": "2"}


@pytest.mark.parametrize("kind", [ServiceError, ConflictError, KeyboardInterrupt])
def test_what_fails_before_the_switch_is_undone_at_once(tmp_path: Path, kind: type[BaseException]) -> None:
    world = World(tmp_path)
    failure = KeyboardInterrupt("ended") if kind is KeyboardInterrupt else kind("it ended", fix="-")
    change = rollout(TWO, was=ONE, aliases=BEFORE)
    world.desk.begin(change)

    def beside(intent: Intent, lease: Lease) -> Intent:
        world.desk.start_engine(TWO, EngineSpec())
        raise failure

    with pytest.raises(kind, match="ended"):
        work_on(world.means, change, beside)
    world.check_in_step()
    assert world.registry.aliases == {"champion": "1", "promoted": "2"}
    assert world.desk.history("complaints")[0].phase is Phase.UNDONE


def test_no_step_is_taken_without_the_lease(tmp_path: Path) -> None:
    world = World(tmp_path)
    change = rollout(TWO, Phase.SWITCHING, was=ONE, aliases=BEFORE)
    world.desk.begin(change)
    world.desk.start_engine(TWO, EngineSpec())
    with world.desk.holding(change) as lease:
        world.desk.now += 31.0  # a process that was stopped for that long, and goes on
        with pytest.raises(LeaseLostError, match="not renewed in time"):
            bring_to_end(world.means, change, lease)
    now = world.desk.traffic("complaints")
    assert now is not None
    assert now.live == ONE
