"""The engines of this machine: who runs, where it answers, and who takes over when the gateway is started anew."""

from __future__ import annotations

import fcntl
import logging
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from pydantic import ValidationError

from tasks.contracts.errors import ServiceError, SpecError
from tasks.contracts.serving import EngineSpec, EngineState, EngineStatus, VersionRef
from tasks.contracts.spec import ExecutionSpec
from tasks.serving.adapters import Carriers
from tasks.serving.engine import Endpoint, Engine, EngineCommand, EngineRecord, Pace, forget_engine, mark_of
from tasks.serving.files import AdapterFiles, forget_models, local_adapter, local_base, local_model, remove_folder
from tasks.serving.process import EngineProcess
from tasks.serving.vllm import MAX_LORA_RANK
from tasks.serving.weights import check_adapter, check_model

__all__ = ["Endpoint", "EngineCommand", "EngineHost", "Pace"]

log = logging.getLogger("goldgate.serving")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
_CLOSE_SECONDS = 5.0


class EngineHost:
    """Starts engines as processes of their own, which outlive it, and finds them again.

    Its methods are quick and may be called from any thread; what takes time is done by a thread for each engine.
    """

    def __init__(
        self,
        folder: Path,
        execution: ExecutionSpec,
        command: EngineCommand,
        *,
        prepare: Callable[[VersionRef, EngineSpec], Path] | None = None,
        prepare_adapter: Callable[[VersionRef], AdapterFiles] | None = None,
        pace: Pace | None = None,
    ) -> None:
        """Take over the folder and the engines that run from it.

        Args:
            folder: for `engines/` and `models/`; local.
            execution: where store and registry are.
            command: how an engine is started.
            prepare: gives the folder of a version's model; the default copies it from the registry and checks its
                digest and its weights.
            prepare_adapter: gives the files of a version's adapter; the default likewise, against its base model.
            pace: how closely engines are watched.

        Raises:
            ServiceError: another process owns the folder, or a record in it cannot be read.
        """
        self._models, self._engines_folder = folder / "models", folder / "engines"
        self._engines_folder.mkdir(parents=True, exist_ok=True)
        self._engines_folder.chmod(0o700)
        self._execution, self._command = execution, command
        self._prepare = prepare or self._copied_and_checked
        self._pace = pace or Pace()
        self._lock = threading.RLock()
        self._engines: dict[str, Engine] = {}
        self._carriers = Carriers(command, prepare_adapter or self._copied_and_checked_adapter, self._carrier)
        self._closed = False
        self._owned = _own(folder)
        try:
            self._take_over()
        except BaseException:
            self.close()
            raise

    def start(self, version: VersionRef, spec: EngineSpec) -> EngineStatus:
        """Start an engine; one that starts or is ready is left alone, one that failed or was stopped begins anew.

        Raises:
            SpecError: its name is no name for a file.
            ServiceError: it runs with other settings.
        """
        if _NAME.fullmatch(version.engine) is None:
            raise SpecError(
                f"{version.engine!r} cannot be the name of an engine.",
                where=version.uri,
                fix="use letters, digits, - and _ in the name of the registered model",
            )
        with self._lock:
            engine = self._engines.get(version.engine)
            if engine is None:
                record = EngineRecord(version=version, spec=spec, state=EngineState.STARTING)
                engine = self._engines[version.engine] = self._engine(record)
            engine.start(version, spec)
            return engine.status()

    def status(self, engine: str) -> EngineStatus | None:
        """What is known of an engine; None if there is none of this name."""
        found = self._engines.get(engine)
        return None if found is None else found.status()

    def statuses(self) -> list[EngineStatus]:
        """All engines, by name."""
        with self._lock:
            engines = sorted(self._engines.values(), key=lambda engine: engine.name)
        return [engine.status() for engine in engines]

    def endpoint(self, engine: str) -> Endpoint | None:
        """Where an engine answers; None unless it is ready, or draining and still there."""
        found = self._engines.get(engine)
        return None if found is None else found.endpoint()

    def stop(self, engine: str, drain_seconds: float, under_way: Callable[[], int]) -> EngineStatus:
        """End an engine once `under_way` is 0 or the time is over; it is draining until then.

        Raises:
            ServiceError: there is no such engine.
        """
        found = self._engines.get(engine)
        if found is None:
            raise ServiceError(
                "There is no such engine.",
                where=engine,
                fix=f"name one of: {', '.join(sorted(self._engines)) or 'none runs'}",
            )
        found.stop(drain_seconds, under_way)
        if found.state is EngineState.STOPPED:
            self._clean_up()
        return found.status()

    def suspect(self, engine: str) -> None:
        """Look at an engine now, since it could not be reached; a dead one has no endpoint when this returns."""
        found = self._engines.get(engine)
        if found is not None:
            found.suspect()

    def close(self) -> None:
        """Stop watching. The engines go on; the next host adopts them."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            engines = list(self._engines.values())
        self._carriers.ask_to_close()  # first: an adapter that is left must not end what carries it
        for engine in engines:
            engine.ask_to_close()
        deadline = time.monotonic() + _CLOSE_SECONDS
        for engine in engines:
            engine.close(max(0.0, deadline - time.monotonic()))
        self._carriers.close(max(0.0, deadline - time.monotonic()))
        self._owned.close()

    # -- inside -------------------------------------------------------------------------------------------------

    def _engine(self, record: EngineRecord) -> Engine:
        return Engine(
            self._engines_folder, record, self._command, self._prepare, self._pace, self._clean_up, self._carriers
        )

    def _carrier(self, record: EngineRecord) -> Engine:
        def prepare(version: VersionRef, spec: EngineSpec) -> Path:
            return local_base(self._models, version.digest, self._execution)

        return Engine(self._engines_folder, record, self._command, prepare, self._pace, self._clean_up)

    def _take_over(self) -> None:
        carriers = []
        for path in sorted(self._engines_folder.glob("*.json")):
            record = _record(path)
            if record.state is EngineState.STOPPED:
                forget_engine(self._engines_folder, record.version.engine)
            elif record.carries:
                carriers.append(record)
            else:
                self._engines[record.version.engine] = self._engine(record)
        self._clean_up(nobody_copies=True)
        self._carriers.adopt(carriers, self._needed())  # before the adapters in them
        for engine in self._engines.values():
            engine.resume()

    def _copied_and_checked(self, version: VersionRef, spec: EngineSpec) -> Path:
        folder = local_model(self._models, version, self._execution)
        check_model(folder)
        return folder

    def _copied_and_checked_adapter(self, version: VersionRef) -> AdapterFiles:
        files = local_adapter(self._models, version, self._execution)
        check_adapter(files.folder, files.base, files.base_digest, files.training, max_rank=MAX_LORA_RANK)
        return files

    def _needed(self) -> frozenset[str]:
        """Digests of the models that engines need, those that carry adapters left aside."""
        return frozenset().union(*(engine.digests for engine in self._engines.values() if not engine.is_over))

    def _clean_up(self, *, nobody_copies: bool = False) -> None:
        """Delete the copies of models that no engine needs; while one may be copied, that waits for the next time."""
        with self._lock:
            if self._closed:
                return
            kept = self._needed() | self._carriers.digests()
            copying = self._carriers.is_copying() or any(
                engine.state is EngineState.STARTING for engine in self._engines.values()
            )
            away = forget_models(self._models, kept) if nobody_copies or not copying else []
        for folder in away:
            remove_folder(folder)


def end_engines(folder: Path, seconds: float = Pace().end) -> list[str]:
    """End the engines that a gateway has left running; their records stay, and the next gateway starts them again.

    Args:
        folder: of the gateway.
        seconds: from SIGTERM to SIGKILL, for each.

    Returns:
        What they served, such as "complaints@7".

    Raises:
        ServiceError: a gateway runs from this folder, or a record in it cannot be read.
    """
    if not (folder / "engines").is_dir():
        return []
    ended = []
    with _own(folder):
        for path in sorted((folder / "engines").glob("*.json")):
            record = _record(path)
            process = EngineProcess.find(mark_of(path.parent, path.stem, record.run)) if record.run else None
            if process is not None:
                process.terminate()
                process.wait(seconds)
                process.kill()
                ended.append(record.version.label)
    return ended


def _own(folder: Path) -> TextIO:
    """Be the only one to whom a gateway's folder belongs, until the file is closed; engines do not inherit it.

    Raises:
        ServiceError: it belongs to another process.
    """
    owned = (folder / "host.lock").open("a")
    try:
        fcntl.flock(owned, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owned.close()
        raise ServiceError(
            "Another `goldgate serve` runs from this folder.",
            where=str(folder),
            fix="end it first, or give this one another store",
        ) from error
    return owned


def _record(path: Path) -> EngineRecord:
    try:
        return EngineRecord.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise ServiceError(
            f"The record of an engine cannot be read: {error}",
            where=str(path),
            fix="if no engine of this name runs (`pgrep -f` with its label), delete the record",
        ) from error
