"""Adapters in place of merged models: one engine for each base model carries the adapters that were trained on it.

An adapter gets a name of its own there, which no other bytes ever get, and is never loaded over another. An engine that
carries adapters serves no version itself: no name leads to it, and it is ended with its last adapter. It is started,
watched and started anew as every engine is, and so is each adapter in it: one whose engine was lost is loaded again.

For vLLM on CUDA only; `EngineCommand.check_adapters` refuses others.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import httpx

from tasks.contracts.errors import ServiceError
from tasks.contracts.prompt import Decoding, Prompt
from tasks.contracts.serving import EngineSpec, EngineState, VersionRef
from tasks.serving.engine import Endpoint, Engine, EngineCommand, EngineRecord, Loaded
from tasks.serving.files import AdapterFiles
from tasks.serving.vllm import adapter_name, load_adapter, unload_adapter

log = logging.getLogger("goldgate.serving")

_LOOK_SECONDS = 0.1  # between two looks at an engine that starts


class LoadedAdapter:
    """An adapter that was loaded, as what an engine runs as. See `tasks.serving.engine.Runs`."""

    def __init__(
        self, client: httpx.Client, carrier: Engine, at: Endpoint, name: str, released: Callable[[], None]
    ) -> None:
        """Know an adapter.

        Args:
            client: for loopback.
            carrier: the engine that carries it.
            at: where that answered when it was loaded; a start anew has another key, and no adapters.
            name: its name there.
            released: called once when it has ended.
        """
        self._client, self._carrier, self._at, self._name, self._released = client, carrier, at, name, released
        self._over = False

    def ended(self) -> str | None:
        """How it ended, in words; None while it is there."""
        if self._over:
            return "it was unloaded"
        if self._carrier.is_lost or self._carrier.endpoint() != self._at:
            return f"the engine that carries it was lost, {self._carrier.name}"
        return None

    def terminate(self) -> None:
        """Unload it; requests under way are answered to their end."""
        if self.ended() is None and not unload_adapter(self._client, self._at.url, self._at.key, self._name):
            log.warning("the adapter %s could not be unloaded; it goes with its engine", self._name)
        if not self._over:
            self._over = True
            self._released()

    def wait(self, seconds: float) -> bool:
        """Whether it ends within this time; it has ended when it was unloaded."""
        return self._over

    def kill(self) -> None:
        """As `terminate`: nothing of it runs by itself."""
        self.terminate()

    def memory_bytes(self) -> int:
        """0: its memory is that of the engine that carries it."""
        return 0


class Carriers:
    """The engines of one machine that carry adapters. Its methods may be called from any thread."""

    def __init__(
        self,
        command: EngineCommand,
        prepare: Callable[[VersionRef], AdapterFiles],
        make: Callable[[EngineRecord], Engine],
    ) -> None:
        """Know of none.

        Args:
            command: how engines are started.
            prepare: gives the files of a version's adapter, checked against its base model.
            make: an engine that runs a base model, from its record.
        """
        self._command, self._prepare, self._make = command, prepare, make
        self._lock = threading.RLock()
        self._engines: dict[str, Engine] = {}  # by digest of their base model
        self._users: dict[str, set[str]] = {}
        self._closed = False
        self._client = httpx.Client(trust_env=False)

    def adopt(self, records: Iterable[EngineRecord], needed: frozenset[str]) -> None:
        """Go on with what another host has started; end those whose base model nobody needs.

        Args:
            records: of engines that carry adapters.
            needed: digests of files that engines need.
        """
        for record in records:
            engine = self._engines[record.version.digest] = self._make(record)
            engine.resume()
            if record.version.digest not in needed:
                engine.stop(0.0, lambda: 0)

    def load(self, version: VersionRef, spec: EngineSpec, pause: Callable[[float], None]) -> Loaded:
        """See `tasks.serving.engine.Carries.load`.

        Raises:
            ServiceError: engines of this kind take no adapters, the one that is to carry it fails or runs with other
                settings, or vLLM refuses.
            GoldgateError: its files are not there, or there is something wrong with them.
        """
        self._command.check_adapters()
        files = self._prepare(version)
        with self._lock:
            carrier = self._start(files.base_digest, version, spec)
        try:
            at, name = self._into(carrier, version, files.folder, pause)
        except BaseException:
            self._release(files.base_digest, version.engine)
            raise
        return self._loaded(version, carrier, at, name, (files.digest, files.base_digest))

    def find(self, version: VersionRef, digests: tuple[str, ...], port: int | None) -> Loaded | None:
        """See `tasks.serving.engine.Carries.find`."""
        if len(digests) != 2:
            return None
        adapter, base = digests
        with self._lock:
            carrier = self._engines.get(base)
            at = carrier.endpoint() if carrier is not None else None
            if carrier is None or at is None or _port(at) != port:
                return None
            self._users.setdefault(base, set()).add(version.engine)
        return self._loaded(version, carrier, at, adapter_name(version), (adapter, base))

    def digests(self) -> frozenset[str]:
        """Of the base models that are needed."""
        with self._lock:
            return frozenset(base for base, engine in self._engines.items() if not engine.is_over)

    def is_copying(self) -> bool:
        """Whether files of a base model may be being copied."""
        with self._lock:
            return any(engine.state is EngineState.STARTING for engine in self._engines.values())

    def ask_to_close(self) -> None:
        """Stop watching; engines and adapters go on."""
        with self._lock:
            self._closed = True
            engines = list(self._engines.values())
        for engine in engines:
            engine.ask_to_close()

    def close(self, seconds: float) -> None:
        """Wait for the end of the watching, after `ask_to_close`."""
        for engine in self._engines.values():
            engine.close(seconds)
        self._client.close()

    # -- inside -------------------------------------------------------------------------------------------------

    def _start(self, base: str, version: VersionRef, spec: EngineSpec) -> Engine:
        of_base = base_version(base)
        carrier = self._engines.get(base)
        if carrier is None:
            record = EngineRecord(version=of_base, spec=spec, state=EngineState.STARTING, carries=True)
            carrier = self._engines[base] = self._make(record)
        carrier.start(of_base, spec)
        self._users.setdefault(base, set()).add(version.engine)
        return carrier

    def _into(
        self, carrier: Engine, version: VersionRef, folder: Path, pause: Callable[[float], None]
    ) -> tuple[Endpoint, str]:
        """Wait until the engine answers, and load the adapter; again where the engine was lost meanwhile."""
        while True:
            at = carrier.endpoint()
            # One that drains still answers, and is started anew once it has ended.
            if at is not None and carrier.state is EngineState.READY and not carrier.is_lost:
                try:
                    return at, load_adapter(self._client, at.url, at.key, version, folder)
                except ServiceError:
                    if not carrier.is_lost:
                        raise
                    carrier.suspect()
            status = carrier.status()
            if status.state is EngineState.FAILED:
                raise ServiceError(
                    f"The engine that is to carry the adapter of {version.label} failed: {status.why}",
                    where=carrier.name,
                    fix="see its log; `engine.adapters: false` serves the merged model",
                )
            pause(_LOOK_SECONDS)

    def _loaded(
        self, version: VersionRef, carrier: Engine, at: Endpoint, name: str, digests: tuple[str, str]
    ) -> Loaded:
        runs = LoadedAdapter(self._client, carrier, at, name, lambda: self._release(digests[1], version.engine))
        return Loaded(runs, _port(at), at.key, name, digests)

    def _release(self, base: str, user: str) -> None:
        with self._lock:
            users = self._users.get(base, set())
            users.discard(user)
            if not users and not self._closed and base in self._engines:
                self._engines[base].stop(0.0, lambda: 0)


def base_version(digest: str) -> VersionRef:
    """What an engine that carries adapters is asked by; no task's version has the number 0."""
    return VersionRef(
        name="base", version="0", digest=digest, uri=f"store:{digest}", prompt=Prompt(system="Answer."),
        decoding=Decoding(max_new_tokens=4), certified=False,
    )  # fmt: skip


def _port(at: Endpoint) -> int:
    return int(at.url.rpartition(":")[2].partition("/")[0])
