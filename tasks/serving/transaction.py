"""A change of what is in service, as a transaction: traffic and alias both move, or neither does.

What is to be done next follows from what is there, and from nothing that a process remembers: so a change that was
killed anywhere is gone on with by the same code that makes it. `next_step` decides, and is pure; `bring_to_end` looks,
decides and acts until the change has ended.

    CHECKING, CHECKED    nothing has moved: the canary and the new engine are ended, and the change is undone
    ... with problems    the check has said no: the version is refused
    SWITCHING            forward if the new engine can answer; else all is moved back
    SWITCHED             both have moved: engines that are not needed any more are ended
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from typing import NamedTuple

from tasks.contracts.errors import GoldgateError, ServiceError
from tasks.contracts.serving import Aliases, EngineState, EngineStatus, Intent, Phase, Traffic
from tasks.serving.books import engines_of
from tasks.serving.client import ConflictError, GatewayClient, Lease, LeaseLostError

FINAL = frozenset({Phase.DONE, Phase.REFUSED, Phase.UNDONE})
_RUNNING = frozenset({EngineState.STARTING, EngineState.READY})
_POLL_SECONDS = 0.25
_MOST_STEPS = 40  # a change has about ten; more means that somebody else moves the same things
_WARM_UP_SECONDS = 900.0  # for an engine that is started again while traffic is moving


class Step(StrEnum):
    """What brings a change nearer to its end. Each leaves a state in which another step, or none, is next."""

    END_CANARY = "end the canary"
    END_ENGINE = "end the new engine"
    REFUSE = "take `promoted` from the version"
    WAIT = "wait for the new engine"
    MOVE_TRAFFIC = "move traffic"
    MOVE_TRAFFIC_BACK = "move traffic back"
    MOVE_ALIASES = "move the aliases"
    RESTORE_ALIASES = "put the aliases back"
    RECORD_SWITCHED = "record that both have moved"
    RETIRE = "end engines that are not needed any more"
    CLOSE_DONE = "record that it is done"
    CLOSE_REFUSED = "record that it was refused"
    CLOSE_UNDONE = "record that it was undone"
    NOTHING = "nothing"
    STUCK = "neither version can answer"


class Situation(NamedTuple):
    """What there is: the change, the engines of its name, where traffic goes, and the registry's aliases."""

    intent: Intent
    engines: tuple[EngineStatus, ...]
    traffic: Traffic | None
    aliases: Aliases


class Registry(NamedTuple):
    """The registry's part, handed in by the flow: the rooms do not import each other.

    Attributes:
        aliases: where the aliases of a name are.
        move: names the change's new version `champion`, and the old one `previous`.
        restore: puts the aliases back as they were when the change began.
        refuse: tags the change's new version with why, and takes `promoted` from it.
    """

    aliases: Callable[[str], Aliases]
    move: Callable[[Intent], None]
    restore: Callable[[Intent], None]
    refuse: Callable[[Intent], None]


class Means(NamedTuple):
    """What a change is made with.

    Attributes:
        gateway: has engines, traffic and the record of changes.
        registry: has the aliases.
        drain_seconds: how long an engine that is not needed any more may finish its requests.
        say: is told each step.
    """

    gateway: GatewayClient
    registry: Registry
    drain_seconds: float
    say: Callable[[str], None]


class Ended(NamedTuple):
    """A change in its last phase, and in how many seconds traffic moved, if it did here."""

    intent: Intent
    switch_seconds: float | None


# -- the decision -----------------------------------------------------------------------------------------------------


def next_step(found: Situation) -> Step:
    """What to do next about a change, wherever it stands."""
    intent = found.intent
    match intent.phase:
        case Phase.CHECKING | Phase.CHECKED:
            return _before_the_switch(found)
        case Phase.SWITCHING:
            return _within_the_switch(found)
        case Phase.SWITCHED:
            if not _aliases_moved(found):
                return Step.MOVE_ALIASES
            return Step.RETIRE if superfluous(found) else Step.CLOSE_DONE
        case _:
            return Step.NOTHING


def superfluous(found: Situation) -> tuple[str, ...]:
    """The engines of the name that run and that traffic does not need, in any part."""
    kept = _kept(found)
    return tuple(engine.name for engine in found.engines if engine.state in _RUNNING and engine.name not in kept)


def _before_the_switch(found: Situation) -> Step:
    intent = found.intent
    if _on_trial(found):  # before its engine, or requests would be sent to one that is ending
        return Step.END_CANARY
    if intent.to.engine in superfluous(found):
        return Step.END_ENGINE
    if not intent.problems:
        return Step.CLOSE_UNDONE
    return Step.REFUSE if found.aliases.promoted == intent.to.version else Step.CLOSE_REFUSED


def _within_the_switch(found: Situation) -> Step:
    intent = found.intent
    state = _state_of(found, intent.to.engine)
    if found.traffic is not None and found.traffic.live.engine == intent.to.engine:
        # A person's word stands, and a first version has nothing to go back to: the host starts a live engine again.
        if state is EngineState.READY or intent.kind == "rollback" or not _can_go_back(intent):
            return Step.RECORD_SWITCHED if _aliases_moved(found) else Step.MOVE_ALIASES
        if state is EngineState.STARTING:
            return Step.WAIT
        was_ready = intent.was is not None and _state_of(found, intent.was.engine) is EngineState.READY
        return Step.MOVE_TRAFFIC_BACK if was_ready else Step.STUCK
    if state is EngineState.READY:
        return Step.MOVE_TRAFFIC
    if state is EngineState.STARTING:
        return Step.WAIT
    if _on_trial(found):
        return Step.END_CANARY
    return Step.RESTORE_ALIASES if _aliases_to_restore(found) else Step.CLOSE_UNDONE


def _on_trial(found: Situation) -> bool:
    """Whether traffic has a canary; only one change of a name is open, so it is this one's."""
    return found.traffic is not None and found.traffic.canary is not None


def _can_go_back(intent: Intent) -> bool:
    return intent.was is not None and intent.was.engine != intent.to.engine


def _aliases_moved(found: Situation) -> bool:
    intent, now = found.intent, found.aliases
    wanted = (intent.to.version, intent.previous_after)
    return (now.champion, now.previous) == wanted and now.promoted != intent.to.version


def _aliases_to_restore(found: Situation) -> bool:
    """Whether the aliases are as a rollout leaves them, wholly or in part; what a person has set meanwhile stays."""
    intent, now, before = found.intent, found.aliases, found.intent.aliases
    if intent.kind != "rollout":
        return False  # a rollback moves them only once traffic has moved, and is then never undone
    if (now.champion, now.previous) == (before.champion, before.previous):
        return before.promoted == intent.to.version and now.promoted is None
    half_done = now.champion == before.champion and now.previous == intent.previous_after
    return now.champion == intent.to.version or half_done


def _state_of(found: Situation, engine: str) -> EngineState | None:
    return next((one.state for one in found.engines if one.name == engine), None)


def _kept(found: Situation) -> set[str]:
    return engines_of(found.traffic) if found.traffic is not None else set()


# -- the deed ---------------------------------------------------------------------------------------------------------


def bring_to_end(means: Means, intent: Intent, lease: Lease) -> Ended:
    """Look, decide and act until a change has ended. Whoever calls this holds its lease.

    Raises:
        ConflictError: somebody else has ended the change or taken it over.
        LeaseLostError: somebody else may have.
        ServiceError: gateway or registry do not answer, or neither version can; the change stays open.
        RegistryError: the registry refuses; the change stays open.
    """
    gateway, registry = means.gateway, means.registry
    decided, switched = time.monotonic(), None
    patience = time.monotonic() + _WARM_UP_SECONDS
    steps = 0
    while True:
        found = look(gateway, registry, intent)
        step = next_step(found)
        if step is Step.NOTHING:
            return Ended(intent, switched)
        lease.check()
        if step is Step.WAIT and time.monotonic() < patience:
            time.sleep(_POLL_SECONDS)
            continue
        steps += 1
        if step in (Step.WAIT, Step.STUCK) or steps > _MOST_STEPS:
            raise _stuck(intent)
        means.say(f"{intent.to.label}: {step.value}")
        try:
            intent = _act(step, means, found)
        except ConflictError:
            if step.name.startswith(("CLOSE", "RECORD")):
                raise
            time.sleep(_POLL_SECONDS)  # an engine or traffic is otherwise by now: look again
        else:
            if step is Step.MOVE_TRAFFIC:
                switched = time.monotonic() - decided


def look(gateway: GatewayClient, registry: Registry, intent: Intent) -> Situation:
    """What there is."""
    name = intent.name
    return Situation(intent, gateway.engines(name), gateway.traffic(name), registry.aliases(name))


def _act(step: Step, means: Means, found: Situation) -> Intent:
    intent, traffic = found.intent, found.traffic
    gateway, registry = means.gateway, means.registry
    revision = traffic.revision if traffic is not None else 0
    match step:
        case Step.END_CANARY:
            gateway.end_canary(intent)
        case Step.END_ENGINE:
            gateway.end_engine(intent.to.engine, 0.0)
        case Step.RETIRE:
            for engine in superfluous(found):
                gateway.end_engine(engine, means.drain_seconds)
        case Step.MOVE_TRAFFIC:
            replaced = traffic.live if traffic is not None else None
            gateway.move_traffic(
                intent.name,
                intent.to,
                replaced,
                from_revision=revision,
                by=intent.by,
                why=intent.why,
                change=intent,
            )
        case Step.MOVE_TRAFFIC_BACK if intent.was is not None:
            gateway.move_traffic(
                intent.name,
                intent.was,
                intent.was_previous,
                from_revision=revision,
                by=intent.by,
                why=f"{intent.to.label} ended while traffic was moving to it",
                change=intent,
            )
        case Step.MOVE_ALIASES:
            registry.move(intent)
        case Step.RESTORE_ALIASES:
            registry.restore(intent)
        case Step.REFUSE:
            registry.refuse(intent)
        case Step.RECORD_SWITCHED:
            return gateway.write(_at(intent, Phase.SWITCHED))
        case Step.CLOSE_DONE:
            return gateway.write(_at(intent, Phase.DONE))
        case Step.CLOSE_REFUSED:
            return gateway.write(_at(intent, Phase.REFUSED))
        case Step.CLOSE_UNDONE:
            why = (
                f"{intent.to.label} ended while traffic was moving to it."
                if intent.phase is Phase.SWITCHING
                else "Whoever made it ended before it was decided; nothing had moved."
            )
            return gateway.write(_at(intent, Phase.UNDONE, (why,)))
    return intent


class Attempt:
    """A change that somebody works on: its record as it was last written, and the lease on it."""

    def __init__(self, means: Means, intent: Intent, lease: Lease) -> None:
        """Work on a change whose lease is held."""
        self.means, self.intent, self.lease = means, intent, lease
        self._ended: Ended | None = None

    @property
    def ended(self) -> Ended:
        """What the change has come to, once it has ended."""
        if self._ended is None:
            raise RuntimeError("the change is still open")
        return self._ended

    def write(self, intent: Intent) -> None:
        """Record how far it is.

        Raises:
            ConflictError: somebody else has ended the change or taken it over.
        """
        self.intent = self.means.gateway.write(intent)

    def bring_to_end(self) -> None:
        """See `bring_to_end`."""
        self._ended = bring_to_end(self.means, self.intent, self.lease)

    def end_as(self, closed: Intent) -> None:
        """Somebody else has ended it."""
        self._ended = Ended(closed, None)


@contextmanager
def attempt(means: Means, intent: Intent) -> Iterator[Attempt]:
    """Work on a change that was begun. What fails in the block is undone if nothing has moved, and raised.

    A change that somebody else has ended meanwhile, as a rollback does, ends the block without an error.
    """
    gateway = means.gateway
    with gateway.holding(intent) as lease:
        work = Attempt(means, intent, lease)
        try:
            yield work
        except BaseException as error:
            if isinstance(error, ConflictError | LeaseLostError):
                closed = _closed_by_another(gateway, work.intent)
                if closed is not None:
                    means.say(f"{closed.to.label}: {' '.join(closed.problems) or closed.phase.value}")
                    work.end_as(closed)
                    return
            # A killed process leaves this to whoever comes next; one that fails need not.
            with suppress(GoldgateError):
                begun = gateway.open_intent(intent.name)
                if begun is not None and (begun.id, begun.holder) == (intent.id, intent.holder):
                    bring_to_end(means, begun, lease)
            raise


def finish_left(means: Means, name: str, holder: str, *, wait_seconds: float) -> Ended | None:
    """Bring the change to its end that somebody left open, once its lease has run out; None where there is none.

    Raises:
        ServiceError: its holder is still at work after `wait_seconds`.
        GoldgateError: as `bring_to_end`.
    """
    gateway = means.gateway
    until = time.monotonic() + wait_seconds
    while True:
        begun = gateway.open_intent(name)
        if begun is None:
            return None
        try:
            taken = gateway.take(name, holder)
        except ConflictError as conflict:
            if time.monotonic() >= until:
                raise under_way(begun, conflict.lease_left) from conflict
            time.sleep(max(_POLL_SECONDS, min(conflict.lease_left or 0.0, 1.0)))
            continue
        if taken is None:
            continue
        means.say(f"{taken.kind} to {taken.to.label} was left {taken.phase.value}: it is brought to its end")
        with gateway.holding(taken) as lease:
            return bring_to_end(means, taken, lease)


def under_way(begun: Intent, lease_left: float | None) -> GoldgateError:
    """Why a second change is refused."""
    left = f"; its lease runs for {lease_left:.0f} s more" if lease_left is not None else ""
    return ServiceError(
        f"A {begun.kind} to {begun.to.label} is under way ({begun.phase.value}), by {begun.holder}{left}.",
        where=f"change {begun.id}",
        fix=f"wait for its end (`goldgate rollout --show {begun.name}`), or ask again with a longer wait; once its "
        "lease has run out, the next rollout finishes or undoes it",
    )


def _closed_by_another(gateway: GatewayClient, intent: Intent) -> Intent | None:
    """The change as somebody else ended it, and the engine that nobody needs any more ended with it."""
    closed = next((one for one in gateway.history(intent.name) if one.id == intent.id), None)
    if closed is not None:
        with suppress(ConflictError):  # traffic goes to it: it is needed
            found = Situation(closed, gateway.engines(intent.name), gateway.traffic(intent.name), Aliases())
            if intent.to.engine in superfluous(found):
                gateway.end_engine(intent.to.engine, 0.0)
    return closed


def _at(intent: Intent, phase: Phase, problems: tuple[str, ...] = ()) -> Intent:
    return intent.model_copy(update={"phase": phase, "problems": intent.problems or problems})


def _stuck(intent: Intent) -> ServiceError:
    was = f" and {intent.was.label}" if intent.was is not None else ""
    return ServiceError(
        f"Traffic cannot be moved: the engines of {intent.to.label}{was} do not answer.",
        where=f"change {intent.id} of {intent.name}, {intent.phase.value}",
        fix="see the engines' logs in the gateway's folder and start the gateway again; then "
        f"`goldgate rollout --recover {intent.name}`",
    )
