"""A gateway and fake engines on real sockets, in the test's own event loop."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import uvicorn

from tasks.contracts.serving import EngineSpec, EngineState, EngineStatus, GatewaySpec, LimitSpec, LogSpec, VersionRef
from tasks.contracts.spec import ExecutionSpec
from tasks.serving.books import Books
from tasks.serving.engine import Endpoint
from tasks.serving.gateway.app import Gateway
from tasks.serving.gateway.reviews import Reviews
from tasks.serving.gateway.server import make_server
from tasks.serving.gateway.shadowing import Shadowing
from tasks.serving.gateway.tracing import Tracing
from tasks.serving.keys import Keys
from tasks.serving.metrics import Metrics
from tasks.serving.request_log import RequestLog
from tasks.serving.review.spool import Spool
from tests.serving.fake_engine import Behaviour, FakeCommand, _FakeEngine

ENGINE_KEY = "key-of-an-engine"
ADMIN_KEY = "key-of-admin"


class Host:
    """In the engine host's place: knows the engines that a test names."""

    def __init__(self) -> None:
        self.states: dict[str, EngineStatus] = {}
        self.endpoints: dict[str, Endpoint] = {}
        self.suspected: list[str] = []
        self.stopped: list[tuple[str, float, int]] = []
        self.on_suspect: Callable[[str], None] = lambda _: None

    def add(self, version: VersionRef, url: str, state: EngineState = EngineState.READY) -> None:
        """An engine that answers at this address."""
        self.states[version.engine] = EngineStatus(name=version.engine, version=version, state=state)
        if state in (EngineState.READY, EngineState.DRAINING):
            self.endpoints[version.engine] = Endpoint(version.engine, version.label, url, ENGINE_KEY)
        else:
            self.endpoints.pop(version.engine, None)

    def start(self, version: VersionRef, spec: EngineSpec) -> EngineStatus:
        if version.engine not in self.states:
            self.add(version, "", EngineState.STARTING)
        return self.states[version.engine]

    def status(self, engine: str) -> EngineStatus | None:
        return self.states.get(engine)

    def statuses(self) -> list[EngineStatus]:
        return list(self.states.values())

    def endpoint(self, engine: str) -> Endpoint | None:
        return self.endpoints.get(engine)

    def stop(self, engine: str, drain_seconds: float, under_way: Callable[[], int]) -> EngineStatus:
        self.stopped.append((engine, drain_seconds, under_way()))
        self.states[engine] = self.states[engine].model_copy(update={"state": EngineState.DRAINING})
        return self.states[engine]

    def suspect(self, engine: str) -> None:
        self.suspected.append(engine)
        self.on_suspect(engine)


@dataclass
class Running:
    """A gateway that runs, and a client of it."""

    url: str
    gateway: Gateway
    books: Books
    host: Host
    client: aiohttp.ClientSession
    port: int

    def live(self, version: VersionRef, previous: VersionRef | None = None) -> None:
        """Let the version's name mean it."""
        now = self.books.traffic(version.name)
        self.books.move_traffic(
            version.name, version, previous, from_revision=now.revision if now else 0, by="test", why="test",
            ready=lambda _: True,
        )  # fmt: skip

    async def ask(self, text: str = "hello", model: str = "complaints", **fields: Any) -> Answered:
        """Ask a chat."""
        headers = fields.pop("headers", {})
        body = {"model": model, "messages": [{"role": "user", "content": text}], **fields}
        async with self.client.post(f"{self.url}/v1/chat/completions", json=body, headers=headers) as answer:
            return await _read(answer)

    async def send(self, method: str, path: str, body: Any = None, key: str | None = None) -> Answered:
        """Send anything."""
        headers = {"Authorization": f"Bearer {key}"} if key is not None else {}
        data = {"data": body} if isinstance(body, bytes) else {"json": body} if body is not None else {}
        async with self.client.request(method, f"{self.url}{path}", headers=headers, **data) as answer:
            return await _read(answer)

    async def admin(self, method: str, path: str, body: Any = None) -> Answered:
        """Ask `/admin` with its key."""
        return await self.send(method, f"/admin{path}", body, ADMIN_KEY)


@dataclass
class Answered:
    """An answer: status, headers, bytes."""

    status: int
    headers: Any
    data: bytes

    @property
    def json(self) -> Any:
        """It, read as JSON."""
        import json

        return json.loads(self.data)

    @property
    def text(self) -> str:
        """What a chat's answer says."""
        return str(self.json["choices"][0]["message"]["content"])

    @property
    def error(self) -> Any:
        """The error in it."""
        return self.json["error"]

    @property
    def events(self) -> list[Any]:
        """The events of a stream; `[DONE]` as a text."""
        import json

        lines = [line[6:] for line in self.data.decode().split("\n\n") if line]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]

    @property
    def streamed(self) -> str:
        """What a chat's stream says."""
        choices = [choice for event in self.events if event != "[DONE]" for choice in event.get("choices", [])]
        return "".join(choice["delta"].get("content") or "" for choice in choices)


async def _read(answer: aiohttp.ClientResponse) -> Answered:
    return Answered(answer.status, answer.headers, await answer.read())


@asynccontextmanager
async def listening(app: Any, server: uvicorn.Server | None = None) -> AsyncIterator[int]:
    """An ASGI application on a free port of loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        server = server or uvicorn.Server(
            uvicorn.Config(app, lifespan="off", log_config=None, access_log=False, timeout_graceful_shutdown=1)
        )
        running = asyncio.create_task(server._serve([listener]))  # not `serve`, which would take the test's signals
        while not server.started:
            await asyncio.sleep(0.005)
        try:
            yield port
        finally:
            server.should_exit = True
            await running


@asynccontextmanager
async def engine(
    host: Host, version: VersionRef, folder: Path, behaviour: Behaviour | None = None
) -> AsyncIterator[FakeCommand]:
    """A fake engine that is ready."""
    fakes = FakeCommand(folder)
    if behaviour is not None:
        fakes.behave(version.label, behaviour)
    async with listening(_FakeEngine(version.label, folder, ENGINE_KEY)) as port:
        host.add(version, f"http://127.0.0.1:{port}/v1")
        yield fakes


@asynccontextmanager
async def gateway(
    folder: Path,
    host: Host,
    *,
    limits: LimitSpec | None = None,
    keys: Path | None = None,
    log: RequestLog | None = None,
    tracing: Tracing | None = None,
    shutdown_seconds: float = 5.0,
    fill_in: bool = False,
    shadow: dict[str, Any] | None = None,
    spool: Spool | None = None,
) -> AsyncIterator[Running]:
    """A gateway over these engines; `shadow` is how it asks shadows, see `Shadowing`; `spool` is for reviews."""
    spec = GatewaySpec(
        port=0, limits=limits or LimitSpec(), log=LogSpec(to="none"), shutdown_seconds=shutdown_seconds,
        fill_in=fill_in,
        execution=ExecutionSpec(store=str(folder)),
    )  # fmt: skip
    books, metrics = Books(folder / "serving"), Metrics()
    app = Gateway(
        spec, host, books, admin_key=ADMIN_KEY, keys=Keys(keys) if keys is not None else None, log=log,
        tracing=tracing, metrics=metrics,
        shadowing=Shadowing(host, books, metrics, **shadow) if shadow is not None else None,
        reviews=Reviews(spool, books) if spool is not None else None,
    )  # fmt: skip
    async with (
        app.running(),
        listening(app, make_server(app, spec)) as port,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client,
    ):
        yield Running(f"http://127.0.0.1:{port}", app, books, host, client, port)
