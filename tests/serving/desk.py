"""A gateway and a registry in this process, over the gateway's real books: what a change does, in milliseconds.

Both count what changes them, and can be killed between any two changes; the answer to a change can be lost as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from tasks.contracts.serving import (
    Aliases,
    CanaryStatus,
    EngineSpec,
    EngineState,
    EngineStatus,
    Intent,
    Traffic,
    VersionRef,
)
from tasks.contracts.spec import CanarySpec
from tasks.serving import books
from tasks.serving.canary import judge_canary
from tasks.serving.client import LEASE_SECONDS, ConflictError, GatewayClient, Lease, RolledBack
from tasks.serving.transaction import Means, Registry


class Killed(BaseException):
    """Stands for SIGKILL: after it, nothing more is written."""


class Fuse:
    """Lets a number of changes through, then none; with `lost`, whoever made the last one dies before they know."""

    def __init__(self) -> None:
        self.left = -1
        self.lost = False
        self.made: list[str] = []

    def burn(self, left: int, *, lost: bool = False) -> None:
        """Let so many more through."""
        self.left, self.lost, self.made = left, lost, []

    def __call__(self, name: str) -> None:
        """Before a change."""
        if self.left == 0:
            raise Killed(name)
        self.made.append(name)

    def after(self) -> None:
        """After a change."""
        self.left -= 1
        if self.left == 0 and self.lost:
            raise Killed(self.made[-1])


class Desk:
    """What `GatewayClient` does, without HTTP; engines are states in a table."""

    def __init__(self, folder: Path, fuse: Fuse) -> None:
        self.now = 0.0
        self.books = books.Books(folder, clock=lambda: self.now)
        self.states: dict[str, tuple[VersionRef, EngineState]] = {}
        self.ended: list[str] = []
        self.fuse = fuse
        self.starts_as = EngineState.READY
        self.live_answers = 100

    def engines(self, name: str) -> tuple[EngineStatus, ...]:
        found = [
            EngineStatus(name=engine, version=version, state=state)
            for engine, (version, state) in self.states.items()
            if version.name == name
        ]
        return tuple(found)

    def engine(self, engine: str) -> EngineStatus | None:
        found = self.states.get(engine)
        return EngineStatus(name=engine, version=found[0], state=found[1]) if found else None

    def start_engine(self, version: VersionRef, spec: EngineSpec) -> EngineStatus:
        with self._change("start engine"):
            if self._state(version) not in (EngineState.READY, EngineState.STARTING):
                self.states[version.engine] = (version, self.starts_as)
        return EngineStatus(name=version.engine, version=version, state=self._state(version) or EngineState.FAILED)

    def end_engine(self, engine: str, drain_seconds: float) -> None:
        with self._change("end engine"):
            if self.books.names_of(engine):
                raise ConflictError("traffic goes to it", fix="move it")
            if engine in self.states:
                self.states[engine] = (self.states[engine][0], EngineState.STOPPED)
                self.ended.append(engine)

    def traffic(self, name: str) -> Traffic | None:
        return self.books.traffic(name)

    def move_traffic(
        self, name: str, live: VersionRef, previous: VersionRef | None, *, from_revision: int, by: str, why: str,
        change: Intent | None = None,
    ) -> Traffic:  # fmt: skip
        with self._change("move traffic"):
            return self.books.move_traffic(
                name, live, previous, from_revision=from_revision, by=by, why=why, ready=self._ready,
                change=change and books.Change(change.id, change.holder),
            )  # fmt: skip

    def canary(self, name: str) -> CanaryStatus:
        traffic = self.books.traffic(name)
        assert traffic is not None
        canary = traffic.canary
        finding = (canary.finding or judge_canary(canary.state, canary.spec)) if canary is not None else None
        return CanaryStatus(canary=canary, finding=finding, live_answers=self.live_answers)

    def begin_canary(self, change: Intent, spec: CanarySpec, *, from_revision: int) -> Traffic:
        with self._change("begin canary"):
            return self.books.begin_canary(
                change.name, spec, 100.0, change=books.Change(change.id, change.holder), from_revision=from_revision,
                ready=self._ready,
            )  # fmt: skip

    def end_canary(self, change: Intent) -> Traffic:
        with self._change("end canary"):
            return self.books.end_canary(change.name, books.Change(change.id, change.holder))

    def open_intent(self, name: str) -> Intent | None:
        held = self.books.open_intent(name)
        return held.intent if held is not None else None

    def history(self, name: str) -> tuple[Intent, ...]:
        return tuple(self.books.history(name))

    def begin(self, intent: Intent) -> Intent:
        with self._change("begin"):
            return self.books.begin(intent, LEASE_SECONDS)

    def write(self, intent: Intent) -> Intent:
        with self._change(f"write {intent.phase.value}"):
            return self.books.advance(intent, LEASE_SECONDS)

    def take(self, name: str, holder: str) -> Intent | None:
        with self._change("take"):
            try:
                return self.books.take(name, holder, LEASE_SECONDS)
            except books.AbsentError:
                return None

    def roll_back(self, name: str, *, by: str, why: str, holder: str) -> RolledBack:
        with self._change("roll back"):
            done = self.books.rollback(
                name, by=by, why=why, holder=holder, lease_seconds=LEASE_SECONDS, ready=self._ready
            )
            return RolledBack(done.intent, done.traffic)

    @contextmanager
    def holding(self, intent: Intent) -> Iterator[Lease]:
        yield Lease(intent, LEASE_SECONDS, clock=lambda: self.now)

    def _ready(self, version: VersionRef) -> bool:
        return self._state(version) is EngineState.READY

    def _state(self, version: VersionRef) -> EngineState | None:
        found = self.states.get(version.engine)
        return found[1] if found else None

    @contextmanager
    def _change(self, name: str) -> Iterator[None]:
        self.fuse(name)
        try:
            yield
        except books.ConflictError as error:
            conflict = ConflictError(error.what, where=error.where, fix=error.fix)
            if error.more.get("intent"):
                conflict.open = Intent.model_validate(error.more["intent"])
                conflict.lease_left = error.more.get("lease_left")
            raise conflict from error
        self.fuse.after()


class Aliaser:
    """The registry: its aliases, each of which is written by itself."""

    def __init__(self, fuse: Fuse, **aliases: str) -> None:
        self.aliases: dict[str, str] = aliases
        self.refused: dict[str, tuple[str, ...]] = {}
        self.fuse = fuse

    def read(self, name: str) -> Aliases:
        return Aliases(**self.aliases)

    def move(self, intent: Intent) -> None:
        self._set("previous", intent.previous_after)
        self._set("champion", intent.to.version)
        if self.aliases.get("promoted") == intent.to.version:
            self._set("promoted", None)

    def restore(self, intent: Intent) -> None:
        self._set("champion", intent.aliases.champion)
        self._set("previous", intent.aliases.previous)
        if "promoted" not in self.aliases:
            self._set("promoted", intent.aliases.promoted)

    def refuse(self, intent: Intent) -> None:
        self.fuse("tag")
        self.refused[intent.to.version] = intent.problems
        self.fuse.after()
        if self.aliases.get("promoted") == intent.to.version:
            self._set("promoted", None)

    def _set(self, alias: str, version: str | None) -> None:
        if self.aliases.get(alias) == version:
            return
        self.fuse(f"alias {alias}")
        if version is None:
            del self.aliases[alias]
        else:
            self.aliases[alias] = version
        self.fuse.after()


def means(desk: Desk, registry: Aliaser, said: list[str] | None = None) -> Means:
    """What a change is made with, in this process."""
    handed = Registry(registry.read, registry.move, registry.restore, registry.refuse)
    return Means(cast(GatewayClient, cast(Any, desk)), handed, 0.0, (said if said is not None else []).append)
