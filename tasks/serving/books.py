"""The gateway's two books: which engine a name means (traffic), and which change of that is under way (intents).

Each record is a file of its own, written whole before anybody is told. So whatever kills the gateway, the books read
as they did before the last step or after it, and never between.
"""

from __future__ import annotations

import re
import threading
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from tasks.contracts.errors import GoldgateError, SpecError, StoreError
from tasks.contracts.observe import CanaryFinding, CanaryState
from tasks.contracts.serving import Canary, Intent, Phase, Shadow, Traffic, VersionRef
from tasks.contracts.spec import CanarySpec
from tasks.serving.durable import sync_folder, write_durably

FINAL = frozenset({Phase.DONE, Phase.REFUSED, Phase.UNDONE})
RESTART_LEASE_SECONDS = 30.0  # what the holder of an open change gets when the gateway has just started
TAKEN_BACK = "taken back by a rollback"

_NAME = re.compile(r"[a-z][a-z0-9_-]{0,62}")
_FORWARD = (Phase.CHECKING, Phase.CHECKED, Phase.SWITCHING, Phase.SWITCHED, Phase.DONE)
_MOVING = (Phase.SWITCHING, Phase.SWITCHED)
_HISTORY_SHOWN = 100

Record = TypeVar("Record", bound=BaseModel)
Result = TypeVar("Result")


class ConflictError(GoldgateError):
    """What is asked does not fit what the books say now; ask again after reading them.

    Args:
        more: what the caller needs to go on, such as the open intent.
    """

    def __init__(self, what: str, *, where: str | None = None, fix: str, more: dict[str, Any] | None = None) -> None:
        super().__init__(what, where=where, fix=fix)
        self.more = more or {}


class AbsentError(GoldgateError):
    """There is no such record."""


class Held(NamedTuple):
    """An open change and how long its holder's lease still runs, in seconds; 0.0 when it has run out."""

    intent: Intent
    lease_left: float


class Change(NamedTuple):
    """Which change does something, and who works on it."""

    id: str
    holder: str


class RolledBack(NamedTuple):
    """What a rollback has done: its open record, and where requests go now."""

    intent: Intent
    traffic: Traffic


def _utc_now() -> datetime:
    return datetime.now(UTC)


class Books:
    """Both books of one gateway. Every method may be called from any thread; `traffic` never waits.

    Args:
        folder: the gateway's folder; `traffic/` and `intents/` in it.
        clock: seconds that only ever grow. Leases are measured with it, so a clock that is set does not end one.
        now: what records are dated with; nothing is decided by it.

    Raises:
        StoreError: a record cannot be read, or the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = _utc_now,
    ) -> None:
        self.folder = folder
        self._traffic_folder, self._intents_folder = folder / "traffic", folder / "intents"
        self._clock, self._now = clock, now
        self._lock = threading.RLock()
        try:
            for path in (self._traffic_folder, self._intents_folder, self._intents_folder / "history"):
                path.mkdir(parents=True, exist_ok=True)
                for leftover in path.glob(".*.part"):  # of a write that was killed; nobody was told of it
                    leftover.unlink()
        except OSError as error:
            raise _unwritable(error, folder) from error
        self._traffic = {path.stem: _read(Traffic, path) for path in sorted(self._traffic_folder.glob("*.json"))}
        self._open: dict[str, Intent] = {}
        self._leases: dict[str, float] = {}
        for path in sorted(self._intents_folder.glob("*.json")):
            intent = _read(Intent, path)
            if intent.phase in FINAL:  # killed before it was put away
                self._put_away(intent)
                continue
            self._open[intent.name] = intent
            self._leases[intent.name] = clock() + RESTART_LEASE_SECONDS

    # -- traffic --------------------------------------------------------------------------------------------------

    def traffic(self, name: str) -> Traffic | None:
        """Which engines a name means; None for a name that nothing was rolled out for."""
        return self._traffic.get(name)

    def all_traffic(self) -> list[Traffic]:
        """That of every name, sorted."""
        return [self._traffic[name] for name in sorted(self._traffic)]

    def names_of(self, engine: str) -> list[str]:
        """The names that need this engine: live, previous, on trial or as a shadow; it must not be ended."""
        return [traffic.name for traffic in self.all_traffic() if engine in engines_of(traffic)]

    def release(self, engine: str, end: Callable[[], Result]) -> Result:
        """Have an engine ended that no name means; none can come to mean it meanwhile.

        Args:
            engine: its name.
            end: ends it, or begins to, so that it is not ready from then on.

        Raises:
            ConflictError: requests of a name go to it, or would after a rollback.
        """
        with self._lock:
            names = self.names_of(engine)
            if names:
                raise ConflictError(
                    f"This engine serves {', '.join(names)}, or is kept warm for a rollback.",
                    where=engine,
                    fix="move traffic away from it first; a shadow is ended by `goldgate shadow NAME --end`",
                )
            return end()

    def move_traffic(
        self,
        name: str,
        live: VersionRef,
        previous: VersionRef | None,
        *,
        from_revision: int,
        by: str,
        why: str,
        ready: Callable[[VersionRef], bool],
        change: Change | None = None,
    ) -> Traffic:
        """Let a name mean another engine, if it still means what the caller thinks it does; a canary ends with that.

        Asked for what is so already, it changes nothing, so a call whose answer was lost can be made again. A shadow
        goes on, unless it is the version that answers from now on.

        Args:
            name: what requests call the model.
            live: the version that is to answer.
            previous: the version that is kept warm.
            from_revision: the revision that the caller has read; 0 for a name that has none yet.
            by: who changes it.
            why: why.
            ready: whether a version's engine answers now.
            change: that this is a step of; None is allowed only while no change is open.

        Raises:
            SpecError: the name is none, or a version is of another model.
            ConflictError: the revision is another, the live version's engine is not ready, or another change is open.
            StoreError: it cannot be written; nothing has changed then.
        """
        _check_name(name)
        for version in (live, previous):
            if version is not None and version.name != name:
                raise SpecError(
                    f"{version.label} is a version of another model.",
                    where=f"traffic of {name}",
                    fix=f"name a version of {name}",
                )
        with self._lock:
            now = self._traffic.get(name)
            if now is not None and (now.live, now.previous, now.canary) == (live, previous, None):
                return now
            self._check_nobody_else(name, change)
            _check_revision(name, now, from_revision)
            _check_ready(live, ready)
            return self._write_traffic(name, live, previous, shadow=_shadow_of(now, live), by=by, why=why)

    # -- a canary and a shadow --------------------------------------------------------------------------------------

    def begin_canary(
        self,
        name: str,
        spec: CanarySpec,
        slow_above_ms: float,
        *,
        change: Change,
        from_revision: int,
        ready: Callable[[VersionRef], bool],
    ) -> Traffic:
        """Let the version that an open rollout has checked answer a share of the requests; begun twice, once.

        Args:
            name: what requests call the model.
            spec: the share, and when it is taken back.
            slow_above_ms: from here on an answer is slow.
            change: the rollout. Its id is the salt by which keys are drawn.
            from_revision: the revision of traffic that the caller has read.
            ready: whether a version's engine answers now.

        Raises:
            AbsentError: nothing answers under this name, so there is nothing to try it beside.
            ConflictError: the rollout is not open, another holds it, it has not been checked or is moving already; its
                version answers anyway or is not ready; or the revision is another.
            StoreError: it cannot be written; it has not begun then.
        """
        with self._lock:
            intent = self._check_held(name, change)
            now = self._there(name)
            if now.canary is not None and now.canary.salt == change.id:
                return now
            if intent.phase is not Phase.CHECKED or intent.kind != "rollout":
                raise ConflictError(
                    f"A {intent.kind} that is {intent.phase.value} has no version to try out.",
                    where=name,
                    fix="begin a canary once the version was checked, and before traffic moves",
                    more=self._shown(intent),
                )
            if intent.to.engine == now.live.engine:
                raise ConflictError(f"{intent.to.label} answers already.", where=name, fix="leave the canary out")
            _check_revision(name, now, from_revision)
            _check_ready(intent.to, ready)
            canary = Canary(
                version=intent.to, spec=spec, salt=change.id, since=self._now(),
                state=CanaryState(slow_above_ms=slow_above_ms),
            )  # fmt: skip
            return self._change_traffic(
                now, canary=canary, by=intent.by, why=f"{spec.share:.2%} of the keys try {intent.to.label} out"
            )

    def end_canary(self, name: str, change: Change) -> Traffic:
        """Let the version on trial answer no more; where none is, nothing changes.

        Raises:
            AbsentError: nothing answers under this name.
            ConflictError: the change is not open, or another holds it.
            StoreError: it cannot be written; it goes on then.
        """
        with self._lock:
            intent = self._check_held(name, change)
            now = self._there(name)
            if now.canary is None:
                return now
            return self._change_traffic(
                now, canary=None, by=intent.by, why=f"the trial of {now.canary.version.label} has ended"
            )

    def note_canary(self, name: str, salt: str, state: CanaryState, finding: CanaryFinding | None) -> bool:
        """Keep what has happened to a canary; that is no change of traffic, so its revision stays.

        Returns:
            Whether there is still such a canary.

        Raises:
            StoreError: it cannot be written.
        """
        with self._lock:
            now = self._traffic.get(name)
            if now is None or now.canary is None or now.canary.salt != salt:
                return False
            canary = now.canary.model_copy(update={"state": state, "finding": finding})
            self._keep_traffic(now.model_copy(update={"canary": canary}))
            return True

    def begin_shadow(self, name: str, shadow: Shadow, *, from_revision: int, by: str) -> Traffic:
        """Have another version, or a vendor, answer a share of the requests unseen.

        Raises:
            AbsentError: nothing answers under this name.
            SpecError: it is no version of this model, or none and no vendor.
            ConflictError: it is what answers already, there is another shadow, or the revision is another.
            StoreError: it cannot be written.
        """
        with self._lock:
            now = self._there(name)
            if now.shadow is not None:
                if now.shadow.id == shadow.id:
                    return now
                raise ConflictError(
                    f"{name} has a shadow already, since {now.shadow.since:%Y-%m-%d %H:%M} UTC.",
                    where=name,
                    fix=f"end it first: `goldgate shadow {name} --end`",
                )
            if (shadow.version is None) == (shadow.vendor is None):
                raise SpecError("A shadow is a version or a vendor.", where=name, fix="give one of the two")
            if shadow.version is not None and shadow.version.name != name:
                raise SpecError(
                    f"{shadow.version.label} is a version of another model.", where=name, fix=f"name one of {name}"
                )
            if shadow.version is not None and shadow.version.engine == now.live.engine:
                raise ConflictError(
                    f"{shadow.version.label} is what answers; it cannot be compared with itself.",
                    where=name,
                    fix="name another version",
                )
            _check_revision(name, now, from_revision)
            what = shadow.version.label if shadow.version is not None else f"{shadow.vendor and shadow.vendor.model}"
            return self._change_traffic(now, shadow=shadow, by=by, why=f"{what} answers unseen")

    def end_shadow(self, name: str, *, by: str) -> Traffic:
        """Let nothing answer unseen any more; where nothing does, nothing changes.

        Raises:
            AbsentError: nothing answers under this name.
            StoreError: it cannot be written.
        """
        with self._lock:
            now = self._there(name)
            if now.shadow is None:
                return now
            return self._change_traffic(now, shadow=None, by=by, why="the shadow has ended")

    # -- intents --------------------------------------------------------------------------------------------------

    def open_intent(self, name: str) -> Held | None:
        """The change under way for a name; None where there is none."""
        with self._lock:
            intent = self._current(name)
            return Held(intent, self._lease_left(name)) if intent is not None else None

    def history(self, name: str) -> list[Intent]:
        """The last hundred changes that have ended, newest first.

        Raises:
            SpecError: the name is none.
            StoreError: one of them cannot be read.
        """
        _check_name(name)
        paths = sorted((self._intents_folder / "history" / name).glob("*.json"), reverse=True)
        return [_read(Intent, path) for path in paths[:_HISTORY_SHOWN]]

    def begin(self, intent: Intent, lease_seconds: float) -> Intent:
        """Write down a change before its first step. The same one begun twice is begun once.

        Raises:
            SpecError: its name is none, or it has ended already.
            ConflictError: another change of this name is open, or has ended since this one was prepared (`after`), or
                this one has ended.
            StoreError: it cannot be written; it has not begun then.
        """
        _check_name(intent.name)
        if intent.phase in FINAL:
            raise SpecError(
                f"A change cannot begin as {intent.phase.value}.", where=intent.name, fix="begin with checking"
            )
        with self._lock:
            now = self._current(intent.name)
            if now is not None and (now.id, now.holder) != (intent.id, intent.holder):
                raise self._other_is_open(now)
            if now is None:
                history = self.history(intent.name)
                if any(ended.id == intent.id for ended in history):
                    raise ConflictError(
                        "This change has ended already.",
                        where=intent.name,
                        fix="begin one with another id",
                    )
                if intent.after is not None and history and history[0].id != intent.after:
                    last = history[0]
                    raise ConflictError(
                        f"Another change has ended since this one was prepared: a {last.kind} to {last.to.label}, by "
                        f"{last.by} ({last.phase.value}).",
                        where=intent.name,
                        fix="look at what answers now, and begin anew if it is still wanted",
                    )
                self._write_open(intent)
                now = intent
            self._lease(intent.name, lease_seconds)
            return now

    def advance(self, intent: Intent, lease_seconds: float) -> Intent:
        """Write down the next phase before its step; a final one closes the change.

        Raises:
            ConflictError: it is not open, another holds it, it is another change, or the phase goes backwards.
            StoreError: it cannot be written; the phase is the one before then.
        """
        _check_name(intent.name)
        with self._lock:
            now = self._current(intent.name)
            if now is None or now.id != intent.id:
                ended = next((one for one in self.history(intent.name) if one.id == intent.id), None)
                if ended is not None and (ended.phase, ended.holder) == (intent.phase, intent.holder):
                    return ended  # closed before, and the answer was lost
                raise self._not_open(intent.name, intent.id, ended)
            self._check_holder(now, intent.holder)
            if (intent.kind, intent.to, intent.was, intent.was_previous) != (
                now.kind, now.to, now.was, now.was_previous,
            ):  # fmt: skip
                raise ConflictError(
                    "This is another change under the same id.", where=intent.name, fix="begin a change of its own"
                )
            if not _may_follow(now.phase, intent.phase):
                raise ConflictError(
                    f"A change that is {now.phase.value} cannot become {intent.phase.value}.",
                    where=intent.name,
                    fix="read the open intent and go on from there",
                    more=self._shown(now),
                )
            self._write_open(intent)
            if intent.phase in FINAL:
                self._put_away(intent)
            else:
                self._lease(intent.name, lease_seconds)
            return intent

    def renew(self, name: str, change: str, holder: str, lease_seconds: float) -> Intent:
        """Let the holder of an open change keep it for so many seconds from now.

        Raises:
            ConflictError: it is not open, or another holds it.
        """
        with self._lock:
            now = self._current(name)
            if now is None or now.id != change:
                raise self._not_open(name, change, None)
            self._check_holder(now, holder)
            self._lease(name, lease_seconds)
            return now

    def take(self, name: str, holder: str, lease_seconds: float) -> Intent:
        """Take over an open change whose holder has not renewed its lease.

        Raises:
            AbsentError: no change of this name is open.
            ConflictError: the holder's lease still runs; says for how long.
            StoreError: it cannot be written; the holder is the one before then.
        """
        with self._lock:
            now = self._current(name)
            if now is None:
                raise AbsentError(f"No change of {name} is open.", where=name, fix="begin one")
            if now.holder != holder:
                if self._lease_left(name) > 0.0:
                    raise self._other_is_open(now)
                now = now.model_copy(update={"holder": holder})
                self._write_open(now)
            self._lease(name, lease_seconds)
            return now

    def rollback(
        self,
        name: str,
        *,
        by: str,
        why: str,
        holder: str,
        lease_seconds: float,
        ready: Callable[[VersionRef], bool],
    ) -> RolledBack:
        """Let the previous version answer again, now; what else has to move is left to the caller, in an open intent.

        A rollout that has moved nothing yet is taken back, and its canary with it. A rollback that was left half-done
        is gone on with, so asking twice does not swap twice.

        Raises:
            AbsentError: nothing was rolled out under this name.
            ConflictError: there is no previous version, its engine is not ready, or another change is moving traffic.
            StoreError: it cannot be written; what was written is in the open intent.
        """
        with self._lock:
            traffic = self._traffic.get(name)
            if traffic is None:
                raise AbsentError(f"Nothing was rolled out as {name}.", where=name, fix="check the name")
            now = self._current(name)
            theirs = now is not None and (now.holder != holder if now.kind == "rollback" else now.phase in _MOVING)
            if now is not None and theirs and self._lease_left(name) > 0.0:
                raise self._other_is_open(now)
            if now is not None and now.kind == "rollback":
                to = now.to
            elif traffic.previous is not None:
                to = traffic.previous
            else:
                raise ConflictError(
                    f"{traffic.live.label} has no previous version that could answer in its place.",
                    where=name,
                    fix="roll out the version that is wanted",
                )
            if traffic.live != to:
                _check_ready(to, ready)
            if now is not None and now.kind == "rollback":
                intent = now.model_copy(update={"holder": holder})
            else:
                if now is not None:
                    undone = now.model_copy(
                        update={"phase": Phase.UNDONE, "problems": (*now.problems, f"{TAKEN_BACK} of {by}: {why}")}
                    )
                    self._write_open(undone)
                    self._put_away(undone)
                intent = Intent(
                    id=uuid.uuid4().hex, name=name, kind="rollback", to=to, was=traffic.live,
                    was_previous=traffic.previous, phase=Phase.SWITCHING, by=by, why=why, at=self._now(), holder=holder,
                )  # fmt: skip
            self._write_open(intent)
            self._lease(name, lease_seconds)
            if traffic.live != to:
                traffic = self._write_traffic(
                    name, to, traffic.live, shadow=_shadow_of(traffic, to), by=by, why=f"rollback: {why}"
                )
            return RolledBack(intent, traffic)

    # -- inside ---------------------------------------------------------------------------------------------------

    def _write_traffic(
        self, name: str, live: VersionRef, previous: VersionRef | None, *, shadow: Shadow | None, by: str, why: str
    ) -> Traffic:
        now = self._traffic.get(name)
        revision = now.revision + 1 if now is not None else 1
        return self._keep_traffic(
            Traffic(
                name=name, live=live, previous=previous, shadow=shadow, revision=revision, by=by, why=why,
                at=self._now(),
            )
        )  # fmt: skip

    def _change_traffic(self, now: Traffic, **changes: Any) -> Traffic:
        return self._keep_traffic(now.model_copy(update={"revision": now.revision + 1, "at": self._now(), **changes}))

    def _keep_traffic(self, traffic: Traffic) -> Traffic:
        _write(self._traffic_folder / f"{traffic.name}.json", traffic)
        self._traffic = {**self._traffic, traffic.name: traffic}  # readers hold no lock: they see the one or the other
        return traffic

    def _there(self, name: str) -> Traffic:
        now = self._traffic.get(name)
        if now is None:
            raise AbsentError(f"Nothing was rolled out as {name[:80]}.", where=name[:80], fix="check the name")
        return now

    def _check_nobody_else(self, name: str, change: Change | None) -> None:
        """Only whoever holds the open change moves what it moves."""
        now = self._current(name)
        if change is not None:
            self._check_held(name, change)
        elif now is not None:
            raise self._other_is_open(now)

    def _check_held(self, name: str, change: Change) -> Intent:
        now = self._current(name)
        if now is None or now.id != change.id:
            raise self._not_open(name, change.id, None)
        self._check_holder(now, change.holder)
        return now

    def _current(self, name: str) -> Intent | None:
        """The open change; one that was closed but could not be put away is put away first."""
        now = self._open.get(name)
        if now is None or now.phase not in FINAL:
            return now
        self._put_away(now)
        return None

    def _write_open(self, intent: Intent) -> None:
        _write(self._intents_folder / f"{intent.name}.json", intent)
        self._open[intent.name] = intent

    def _put_away(self, intent: Intent) -> None:
        """Move a closed change's file, which says already that it is closed, into the history."""
        folder = self._intents_folder / "history" / intent.name
        try:
            folder.mkdir(exist_ok=True)
            number = max((int(path.stem) for path in folder.glob("*.json")), default=0) + 1
            (self._intents_folder / f"{intent.name}.json").rename(folder / f"{number:06d}.json")
            sync_folder(folder)
            sync_folder(self._intents_folder)
        except OSError as error:
            raise _unwritable(error, folder) from error
        self._open.pop(intent.name, None)
        self._leases.pop(intent.name, None)

    def _lease(self, name: str, seconds: float) -> None:
        self._leases[name] = self._clock() + seconds

    def _lease_left(self, name: str) -> float:
        return max(0.0, self._leases.get(name, 0.0) - self._clock())

    def _check_holder(self, now: Intent, holder: str) -> None:
        if now.holder != holder:
            raise ConflictError(
                f"This change is held by {now.holder}.",
                where=now.name,
                fix="leave it to them; when their lease has run out it can be taken over",
                more=self._shown(now),
            )

    def _other_is_open(self, now: Intent) -> ConflictError:
        left = self._lease_left(now.name)
        return ConflictError(
            f"A {now.kind} to {now.to.label} by {now.by} is under way ({now.phase.value}), held by {now.holder}.",
            where=now.name,
            fix=f"wait until it has ended, or take it over once its lease has run out ({left:.0f} s left)",
            more=self._shown(now),
        )

    def _not_open(self, name: str, change: str, ended: Intent | None) -> ConflictError:
        now = self._open.get(name)
        said = f"It has ended: {ended.phase.value}" if ended is not None else f"No change {change} of {name} is open"
        if ended is not None and ended.problems:
            said += f" ({'; '.join(ended.problems)})"
        return ConflictError(
            f"{said}.",
            where=name,
            fix="stop working on it",
            more={"ended": ended.model_dump(mode="json") if ended else None} | (self._shown(now) if now else {}),
        )

    def _shown(self, now: Intent) -> dict[str, Any]:
        return {"intent": now.model_dump(mode="json"), "lease_left": self._lease_left(now.name)}


def _check_name(name: str) -> None:
    if _NAME.fullmatch(name) is None:
        raise SpecError(
            f"{name[:80]!r} is no name of a model.",
            where="name",
            fix="use small letters, digits, - and _, a letter first, 63 characters at most",
        )


def engines_of(traffic: Traffic) -> set[str]:
    """The engines that a name needs: the one that answers, the one that is kept warm, and those beside them."""
    beside = (traffic.canary, traffic.shadow)
    versions = (traffic.live, traffic.previous, *(one.version for one in beside if one is not None))
    return {version.engine for version in versions if version is not None}


def _shadow_of(traffic: Traffic | None, live: VersionRef) -> Shadow | None:
    """The shadow that goes on when `live` answers: a version is not compared with itself."""
    shadow = traffic.shadow if traffic is not None else None
    itself = shadow is not None and shadow.version is not None and shadow.version.engine == live.engine
    return None if itself else shadow


def _check_revision(name: str, now: Traffic | None, from_revision: int) -> None:
    revision = now.revision if now is not None else 0
    if from_revision != revision:
        raise ConflictError(
            f"Traffic of {name} is at revision {revision}, not {from_revision}: somebody else has changed it.",
            where=name,
            fix="read it again and decide anew",
            more={"traffic": now.model_dump(mode="json") if now is not None else None},
        )


def _check_ready(version: VersionRef, ready: Callable[[VersionRef], bool]) -> None:
    if not ready(version):
        raise ConflictError(
            f"The engine of {version.label} is not ready, so no request may go to it.",
            where=version.engine,
            fix="start it and wait until it is ready",
        )


def _may_follow(before: Phase, after: Phase) -> bool:
    if after is Phase.UNDONE:
        return True
    if after is Phase.REFUSED:  # it says that nothing has moved
        return before not in _MOVING
    return _FORWARD.index(after) >= _FORWARD.index(before)


def _read(kind: type[Record], path: Path) -> Record:
    try:
        return kind.model_validate_json(path.read_bytes())
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise StoreError(
            f"A record of the gateway does not read as one: {'.'.join(map(str, problem['loc']))}: {problem['msg']}",
            where=str(path),
            fix="restore the file from a backup; deleting it forgets where requests of this name go",
        ) from error
    except OSError as error:
        raise StoreError(
            f"A record of the gateway cannot be read: {error.strerror}", where=str(path), fix="check its permissions"
        ) from error


def _write(path: Path, record: BaseModel) -> None:
    try:
        write_durably(path, record.model_dump_json(indent=2))
    except OSError as error:
        raise _unwritable(error, path) from error


def _unwritable(error: OSError, path: Path) -> StoreError:
    return StoreError(
        f"The gateway's folder cannot be written: {error.strerror or error}",
        where=str(error.filename or path),
        fix="free space or allow writing there; requests are answered meanwhile, but traffic cannot be moved",
    )
