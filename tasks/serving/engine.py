"""One engine's life: started, asked until it answers, watched, started anew when it dies, drained and ended.

A thread of its own does all that takes time. What it is about to do stands in the engine's record before it does it,
so another host can go on from there at any moment.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, Protocol

import httpx

from tasks.contracts.errors import GoldgateError, ServiceError
from tasks.contracts.serving import EngineSpec, EngineState, EngineStatus, VersionRef
from tasks.contracts.spec import Frozen
from tasks.serving.durable import write_durably
from tasks.serving.probe import Look, Looked, look
from tasks.serving.process import EngineProcess, end_of_log

log = logging.getLogger("goldgate.serving")


class EngineCommand(Protocol):
    """How an engine is started."""

    def command(self, model: Path, label: str, port: int, spec: EngineSpec) -> list[str]:
        """Program and arguments of a server on loopback that calls the model in this folder by this label.

        Raises:
            GoldgateError: an engine cannot be run so.
        """
        ...

    def environment(self, key: str) -> dict[str, str]:
        """All variables of its environment; `key` is what it asks of clients, and stands nowhere else."""
        ...

    def check_adapters(self) -> None:
        """Refuse to load adapters, where its engines cannot.

        Raises:
            ServiceError: says why.
        """
        ...


class Endpoint(NamedTuple):
    """Where an engine answers; `url` ends in `/v1`, and `model` is what it is asked for where that is not its label."""

    engine: str
    label: str
    url: str
    key: str
    model: str | None = None


class Runs(Protocol):
    """What an engine runs as: a process of its own, or an adapter in the process of another engine."""

    def ended(self) -> str | None:
        """How it ended, in words; None while it runs."""
        ...

    def terminate(self) -> None:
        """Ask it to end."""
        ...

    def wait(self, seconds: float) -> bool:
        """Whether it ends within this time."""
        ...

    def kill(self) -> None:
        """End it at once; it may have ended before."""
        ...

    def memory_bytes(self) -> int:
        """Resident memory of what is its own."""
        ...


class Loaded(NamedTuple):
    """An adapter in an engine that carries it.

    Attributes:
        runs: it, as what runs.
        port: of the engine that carries it, on loopback.
        key: of that engine.
        model: its name there.
        digests: of the files that it needs: its own, and the base model's.
    """

    runs: Runs
    port: int
    key: str
    model: str
    digests: tuple[str, str]


class Carries(Protocol):
    """Loads adapters into engines that run their base model. See `tasks.serving.adapters.Carriers`."""

    def load(self, version: VersionRef, spec: EngineSpec, pause: Callable[[float], None]) -> Loaded:
        """Have a version's adapter loaded, in an engine that is started for it if none runs; may take minutes.

        Args:
            version: whose adapter it is.
            spec: how that engine is run.
            pause: waits; raises what ends this.

        Raises:
            GoldgateError: it cannot be loaded.
        """
        ...

    def find(self, version: VersionRef, digests: tuple[str, ...], port: int | None) -> Loaded | None:
        """An adapter that an earlier host has loaded; None where the engine that carried it has gone."""
        ...


@dataclass(frozen=True)
class Pace:
    """How closely an engine is watched; all in seconds.

    Attributes:
        look: between two looks at its process.
        probe: between two known questions to one that is ready.
        probe_timeout: longest time to its reply.
        retry: before one that replied wrongly is asked again; the third wrong reply in a row ends it.
        back_off: before each new start of one that had been ready and died; so many starts it gets.
        stable: ready for this long, it gets all these starts again.
        end: from SIGTERM to SIGKILL; above the 20 s that it gives requests under way.
    """

    look: float = 1.0
    probe: float = 15.0
    probe_timeout: float = 60.0
    retry: float = 1.0
    back_off: tuple[float, ...] = (1.0, 5.0, 20.0)
    stable: float = 600.0
    end: float = 25.0


class EngineRecord(Frozen):
    """What is known of an engine, as it stands on disk.

    Attributes:
        version: what it serves.
        spec: how it is run.
        state: see `EngineState`.
        why: what happened to one that failed or was started anew.
        run: its latest start.
        port: on loopback, of this start.
        started: when that was.
        ready_seconds: from there to its first answer; None until it has answered once.
        restarts: how often it was started anew since it was last stable.
        carries: it runs a base model for the adapters of others, and no version.
        loaded: digests of adapter and base model, of one that is an adapter in another engine.
    """

    version: VersionRef
    spec: EngineSpec
    state: EngineState
    why: str | None = None
    run: str | None = None
    port: int | None = None
    started: datetime | None = None
    ready_seconds: float | None = None
    restarts: int = 0
    carries: bool = False
    loaded: tuple[str, ...] = ()


_OVER = (EngineState.FAILED, EngineState.STOPPED)
_WRONG_LOOKS = 3  # so many in a row, since one can have its cause in a single request


class _FaultError(Exception):
    """What is wrong with the engine."""


class _StopAskedError(Exception):
    """It is to be ended."""


class _CloseAskedError(Exception):
    """The host goes; the engine stays."""


class _Stop(NamedTuple):
    deadline: float
    under_way: Callable[[], int]


class Engine:
    """An engine of this machine. Its methods are quick and may be called from any thread."""

    def __init__(
        self,
        folder: Path,
        record: EngineRecord,
        command: EngineCommand,
        prepare: Callable[[VersionRef, EngineSpec], Path],
        pace: Pace,
        stopped: Callable[[], None],
        carriers: Carries | None = None,
    ) -> None:
        """Know an engine; nothing happens before `start` or `resume`.

        Args:
            folder: for its record, key and log.
            record: what is known of it.
            command: how it is started.
            prepare: gives the folder of its model, checked.
            pace: how closely it is watched.
            stopped: called when it was ended on request.
            carriers: loads adapters; None for an engine that has a process of its own whatever its settings say.
        """
        self.name = record.version.engine
        self._folder = folder
        self._record = record
        self._command, self._prepare, self._pace, self._stopped = command, prepare, pace, stopped
        self._carriers = carriers
        self._lock = threading.Condition()
        self._thread: threading.Thread | None = None
        self._process: Runs | None = None
        self._name_there: str | None = None  # of an adapter, in the engine that carries it
        self._key = ""
        self._memory_bytes = 0
        self._reserved: socket.socket | None = None
        self._model: Path | None = None
        self._answered = False  # this start of it
        self._down = False
        self._suspected = False
        self._closing = False
        self._stop: _Stop | None = None
        self._again: tuple[VersionRef, EngineSpec] | None = None
        self._client = httpx.Client(trust_env=False)

    # -- asked from outside -------------------------------------------------------------------------------------

    @property
    def state(self) -> EngineState:
        """Where it is in its life."""
        return self._record.state

    @property
    def digests(self) -> frozenset[str]:
        """Of the models whose files it needs."""
        record = self._record
        return frozenset(record.loaded) if self._is_adapter else frozenset({record.version.digest})

    @property
    def is_lost(self) -> bool:
        """Whether it does not answer, or its process has just been seen to have ended."""
        process = self._process
        return self.endpoint() is None or (process is not None and process.ended() is not None)

    @property
    def is_over(self) -> bool:
        """Whether nobody will start it again but on request: it was stopped, or has never answered."""
        record = self._record
        return record.state is EngineState.STOPPED or (
            record.state is EngineState.FAILED and record.ready_seconds is None
        )

    def status(self) -> EngineStatus:
        """What is known of it now."""
        record, stop = self._record, self._stop
        return EngineStatus(
            name=self.name,
            version=record.version,
            state=record.state,
            why=record.why,
            started=record.started,
            ready_seconds=record.ready_seconds,
            under_way=stop.under_way() if stop is not None and record.state is EngineState.DRAINING else 0,
            memory_bytes=self._memory_bytes,  # measured by the thread, since it means looking at all processes
        )

    def endpoint(self) -> Endpoint | None:
        """Where it answers; None unless it is ready, or draining and still there."""
        record = self._record
        if self._down or not self._answered or record.state not in (EngineState.READY, EngineState.DRAINING):
            return None
        url = f"http://127.0.0.1:{record.port}/v1"
        return Endpoint(self.name, record.version.label, url, self._key, self._name_there)

    def start(self, version: VersionRef, spec: EngineSpec) -> None:
        """Begin its life, or another one after it has failed or was stopped; one that runs is left alone.

        Raises:
            ServiceError: it runs with other settings.
        """
        with self._lock:
            if self._thread is None:
                self._begin(version, spec)
            elif self._stop is not None:
                self._again = (version, spec)  # as soon as it has ended
            elif self._record.spec != spec:
                raise ServiceError(
                    f"The engine of {version.label} runs with other settings than these.",
                    where=self.name,
                    fix="ask for the settings that it runs with, or end it first",
                )

    def resume(self) -> None:
        """Go on where another host left: adopt its process, start it anew if that is gone, or end it.

        One that had answered once and then failed too often gets all its starts again: a person who starts the gateway
        anew has most likely mended what was wrong.
        """
        record = self._record
        process = self._find() if record.run else None
        if record.state in _OVER:
            if process is not None:
                process.kill()
            if self.is_over:
                return
            process = None
            self._write(state=EngineState.STARTING, restarts=0)
        key = self._key or self._read_key()
        if process is not None and key is not None and process.ended() is None:
            self._process, self._key = process, key
            self._memory_bytes = process.memory_bytes()
            self._answered = record.state is not EngineState.STARTING
        elif process is not None:
            process.kill()
        if record.state is EngineState.DRAINING:
            self._stop = _Stop(time.monotonic(), lambda: 0)  # its requests went with the gateway
        self._run_thread()

    def stop(self, drain_seconds: float, under_way: Callable[[], int]) -> None:
        """End it when its requests are done, or at the latest after this time; a second call changes the time."""
        with self._lock:
            self._again = None
            if self._thread is None:
                if self._record.state is not EngineState.STOPPED:
                    self._write(state=EngineState.STOPPED)
                return
            self._stop = _Stop(time.monotonic() + drain_seconds, under_way)
            self._write(state=EngineState.DRAINING)
            if self._process is not None and not self._answered:
                self._process.kill()  # nobody waits for an answer of it
            self._lock.notify_all()

    def suspect(self) -> None:
        """Look at it now: somebody could not reach it."""
        process = self._process
        if process is not None and process.ended() is not None:
            self._down = True
        with self._lock:
            self._suspected = True
            self._lock.notify_all()

    def ask_to_close(self) -> None:
        """Stop watching it; it goes on."""
        with self._lock:
            self._closing = True
            self._lock.notify_all()

    def close(self, seconds: float) -> None:
        """Wait for the end of the watching; from `ask_to_close` on nothing is changed any more."""
        thread = self._thread
        if thread is not None:
            thread.join(seconds)
        self._release_port()
        self._client.close()

    # -- its thread ---------------------------------------------------------------------------------------------

    def _begin(self, version: VersionRef, spec: EngineSpec) -> None:
        self._model, self._answered, self._name_there = None, False, None
        fresh = EngineRecord(
            version=version,
            spec=spec,
            state=EngineState.STARTING,
            run=self._record.run,
            carries=self._record.carries,
            loaded=self._record.loaded,
        )
        self._write(**dict(fresh))
        self._run_thread()

    def _run_thread(self) -> None:
        self._thread = threading.Thread(target=self._run, name=f"engine {self.name}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._live()
        except _CloseAskedError:
            pass
        except _StopAskedError:
            try:
                self._drain()
                self._finish(EngineState.STOPPED, self._record.why)
            except _CloseAskedError:
                return
            self._stopped()
        except (_FaultError, GoldgateError) as error:
            self._fail(str(error))
        except Exception as error:
            log.exception("the thread of engine %s failed", self.name)
            self._fail(f"It could not be run: {type(error).__name__}: {error}")

    def _fail(self, why: str) -> None:
        log.warning("engine %s failed: %s", self.name, why)
        try:
            self._end_process()
            self._finish(EngineState.FAILED, why)
        except _CloseAskedError:
            return

    def _finish(self, state: EngineState, why: str | None) -> None:
        with self._lock:
            again, stop = self._again, self._stop
            self._again = self._stop = self._thread = None
            if again is None:
                self._write(state=EngineState.STOPPED if stop is not None else state, why=why)
            else:
                self._begin(*again)

    def _live(self) -> None:
        """Start it as often as is allowed. Left only by an exception."""
        self._check()
        lost = self._process is None and self._record.state is EngineState.READY
        while True:
            try:
                if lost:
                    raise _FaultError("It ended while nobody watched it.")
                if self._process is None:
                    self._launch()
                if not self._answered:
                    self._wait_until_it_answers()
                self._watch()
            except _FaultError as fault:
                lost = False
                self._end_process()
                record, delays = self._record, self._pace.back_off
                if record.ready_seconds is None:
                    raise  # what never answered would not do so the next time
                if record.restarts >= len(delays):
                    raise _FaultError(f"{fault}\nIt was started anew {record.restarts} times and died again.") from None
                why = f"{fault}\nStart {record.restarts + 1} of {len(delays)} after a failure."
                log.warning("engine %s: %s", self.name, why)
                self._write(state=EngineState.STARTING, why=why, restarts=record.restarts + 1)
                self._wait(delays[record.restarts])

    def _load(self) -> None:
        """In place of a start: have its adapter loaded into the engine that carries it."""
        record, began = self._record, datetime.now(UTC)
        if self._carriers is None:
            raise RuntimeError("nothing carries adapters here")
        loaded = self._carriers.load(record.version, record.spec, self._wait)
        with self._lock:
            self._process, self._key, self._name_there = loaded.runs, loaded.key, loaded.model
            self._answered, self._down, self._suspected = False, False, False
            self._write(
                state=EngineState.STARTING, run=uuid.uuid4().hex, port=loaded.port, started=began,
                loaded=loaded.digests,
            )  # fmt: skip
        self._check()

    def _find(self) -> Runs | None:
        """What another host has left running of it."""
        record = self._record
        if not self._is_adapter or self._carriers is None:
            return EngineProcess.find(self._mark(record.run))
        loaded = self._carriers.find(record.version, record.loaded, record.port)
        if loaded is None:
            return None
        self._key, self._name_there = loaded.key, loaded.model
        return loaded.runs

    @property
    def _is_adapter(self) -> bool:
        return self._record.spec.adapters and not self._record.carries

    def _launch(self) -> None:
        if self._is_adapter:
            self._load()
            return
        record = self._record
        if self._model is None:
            self._model = self._prepare(record.version, record.spec)
        port = self._reserve_port()
        command = self._command.command(self._model, record.version.label, port, record.spec)
        run, key = uuid.uuid4().hex, secrets.token_urlsafe(32)
        write_durably(self._path("key"), key, mode=0o600)
        self._check()
        with self._lock:
            self._write(needed=True, state=EngineState.STARTING, run=run, port=port, started=datetime.now(UTC))
        for mark in self._folder.glob(f"{self.name}.*.process"):  # of starts that a killed host did not live to see
            other = EngineProcess.find(mark)
            if other is not None:
                other.kill()
            mark.unlink()
        output = self._path("log")
        if output.exists():
            output.replace(self._path("log.1"))
        process = EngineProcess.start(
            command,
            self._command.environment(key),
            run=run,
            record=self._path("json"),
            mark=self._mark(run),
            log=output,
        )
        with self._lock:
            self._process, self._key, self._answered, self._down, self._suspected = process, key, False, False, False
        self._check()

    def _wait_until_it_answers(self) -> None:
        longest = self._record.spec.start_seconds
        deadline = time.monotonic() + longest
        wrong, last = 0, "nothing listens there"
        while True:
            self._wait(min(0.25, self._pace.look))
            self._fault_if_ended("while it started")
            left = deadline - time.monotonic()
            if left <= 0:
                raise self._fault(f"It did not answer within {longest:.0f} s; at last: {last}.")
            seen = self._look(max(left, 1.0))
            last = seen.why
            if seen.looked is Looked.ANSWERED:
                break
            if seen.looked is Looked.WRONG:
                wrong += 1
                if wrong == _WRONG_LOOKS:
                    raise self._fault(f"It started, but {last}.")
                self._wait(self._pace.retry)
        self._release_port()
        self._measure()
        record = self._record
        now = datetime.now(UTC)
        seconds = max(0.0, (now - (record.started or now)).total_seconds())
        with self._lock:
            self._check()
            self._answered = True
            self._write(state=EngineState.READY, ready_seconds=round(seconds, 3))
        log.info("engine %s answers after %.1f s", self.name, seconds)

    def _watch(self) -> None:
        ready_since = time.monotonic()
        next_look = 0.0  # at once: of an adopted one nobody knows yet whether it answers
        wrong = 0
        while True:
            now = time.monotonic()
            if self._suspected or now >= next_look:
                self._suspected = False
                self._fault_if_ended("while it served")
                seen = self._look(self._pace.probe_timeout)
                wrong = 0 if seen.looked is Looked.ANSWERED else wrong + 1
                self._fault_if_ended("while it served")
                self._measure()
                if wrong == _WRONG_LOOKS:
                    raise self._fault(f"It runs, but {seen.why}.")
                next_look = time.monotonic() + (self._pace.retry if wrong else self._pace.probe)
            self._wait(min(self._pace.look, max(0.0, next_look - time.monotonic())), or_suspected=True)
            self._fault_if_ended("while it served")
            if self._record.restarts and time.monotonic() - ready_since > self._pace.stable:
                with self._lock:
                    self._check()
                    self._write(restarts=0, why=None)

    def _drain(self) -> None:
        """Until nothing is under way or the time is over, then end it."""
        while (stop := self._stop) is not None and time.monotonic() < stop.deadline:
            process = self._process
            if process is None or process.ended() is not None or not self._answered or stop.under_way() == 0:
                break
            with self._lock:
                if self._closing:
                    raise _CloseAskedError
                self._lock.wait(0.05)
        if self._process is not None and self._answered:
            self._process.terminate()
            self._process.wait(self._pace.end)
        self._end_process()

    def _end_process(self) -> None:
        """End what is left of it, for instance what a dead server had started."""
        with self._lock:
            if self._closing:
                raise _CloseAskedError
            process, self._process, self._answered = self._process, None, False
            self._memory_bytes = 0
        self._release_port()
        if process is not None:
            process.kill()
        if self._record.run is not None:
            self._mark(self._record.run).unlink(missing_ok=True)

    def _reserve_port(self) -> int:
        """A free port on loopback, kept from other programs until the engine has it.

        A socket that does not listen hinders nobody who binds with SO_REUSEADDR, as servers do, but the kernel gives
        its port to none who asks for any.
        """
        self._release_port()
        self._reserved = socket.socket()
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reserved.bind(("127.0.0.1", 0))
        return int(self._reserved.getsockname()[1])

    def _release_port(self) -> None:
        if self._reserved is not None:
            self._reserved.close()
            self._reserved = None

    def _measure(self) -> None:
        if self._process is not None:
            self._memory_bytes = self._process.memory_bytes()

    # -- small things -------------------------------------------------------------------------------------------

    def _look(self, seconds: float) -> Look:
        record = self._record
        url = f"http://127.0.0.1:{record.port}/v1"
        return look(self._client, url, self._key, record.version, seconds, self._name_there)

    def _fault(self, what: str) -> _FaultError:
        if self._is_adapter:
            return _FaultError(what)  # the log is that of the engine that carries it
        return _FaultError(f"{what}\nThe end of its log ({self._path('log')}):\n{end_of_log(self._path('log'))}")

    def _fault_if_ended(self, when: str) -> None:
        if self._process is not None and (how := self._process.ended()) is not None:
            self._down = True
            self._check()  # it may have been killed on request
            raise self._fault(f"It ended {when} ({how}).")

    def _check(self) -> None:
        if self._closing:
            raise _CloseAskedError
        if self._stop is not None:
            raise _StopAskedError

    def _wait(self, seconds: float, *, or_suspected: bool = False) -> None:
        """Wait, but not longer than until something is asked of this thread."""
        with self._lock:
            self._lock.wait_for(
                lambda: self._closing or self._stop is not None or (or_suspected and self._suspected), timeout=seconds
            )
        self._check()

    def _write(self, *, needed: bool = False, **changes: object) -> None:
        """Change the record, on disk first.

        On a full disk an engine that runs goes on; another host would only look at it anew. But none is started
        that another host could not find: then, with `needed`, OSError is raised.
        """
        with self._lock:
            if self._closing:
                raise _CloseAskedError
            record = self._record.model_copy(update=changes)
            try:
                write_durably(self._path("json"), record.model_dump_json(indent=2) + "\n")
            except OSError as error:
                if needed:
                    raise
                log.error("the record of engine %s could not be written: %s", self.name, error)
            self._record = record

    def _path(self, kind: str) -> Path:
        return self._folder / f"{self.name}.{kind}"

    def _mark(self, run: str | None) -> Path:
        return mark_of(self._folder, self.name, run)

    def _read_key(self) -> str | None:
        try:
            return self._path("key").read_text(encoding="utf-8")
        except FileNotFoundError:
            return None


def forget_engine(folder: Path, name: str) -> None:
    """Delete what an engine that was stopped has left."""
    for kind in ("json", "key", "log", "log.1"):
        path = folder / f"{name}.{kind}"
        if path.exists():
            os.unlink(path)


def mark_of(folder: Path, engine: str, run: str | None) -> Path:
    """The file in which a start of an engine writes which process it is."""
    return folder / f"{engine}.{run}.process"
