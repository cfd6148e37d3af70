"""The gateway as a process: its folder, its socket, its signals."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from tasks.contracts.errors import ServiceError, StoreError
from tasks.contracts.serving import GatewaySpec
from tasks.contracts.spec import ExecutionSpec
from tasks.serving.books import Books
from tasks.serving.durable import write_durably
from tasks.serving.gateway.app import Gateway
from tasks.serving.gateway.receive import PatientProtocol
from tasks.serving.gateway.reviews import Reviews, open_spool
from tasks.serving.gateway.shadowing import VENDOR_KEY, Shadowing
from tasks.serving.gateway.tracing import open_tracing
from tasks.serving.host import EngineCommand, EngineHost, Pace
from tasks.serving.keys import Keys, admin_key
from tasks.serving.metrics import Metrics
from tasks.serving.request_log import Mask, open_log
from tasks.store import Store

ADDRESS_FILE = "gateway.json"

_BACKLOG = 2048
_IDLE_SECONDS = 30  # a client's connection may idle
_SWITCH_SECONDS = 0.001  # masking the log must not hold up answers for the interpreter's usual five milliseconds
_LAST_SECONDS = 3  # for connections to close once everything is answered
_log = logging.getLogger(__name__)


def serving_folder(execution: ExecutionSpec) -> Path:
    """The gateway's own folder: `serving` in the store, which has to be on this machine.

    Raises:
        StoreError: the store is remote.
    """
    store = Store(execution.store)
    if not store.local:
        raise StoreError(
            "A gateway keeps models, records and its key in the store, so that has to be a folder of this machine.",
            where=store.root,
            fix="set `execution.store` (or GOLDGATE_STORE) to a local folder; the registry may be elsewhere",
        )
    return Path(store.root) / "serving"


def run_gateway(
    spec: GatewaySpec,
    command: EngineCommand,
    *,
    mask: Mask | None,
    announce: Callable[[str], None] = lambda _: None,
    pace: Pace | None = None,
    host: EngineHost | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT; engines go on, and the next gateway takes them over.

    Args:
        spec: how it listens and what it owns.
        command: how an engine is started.
        mask: takes what is private out of a text, for the request log and for answers that people review.
        announce: is told the address once it listens.
        pace: how closely engines are watched.
        host: the engines, where they are not those of the folder; it is closed at the end.

    Raises:
        StoreError: its folder is remote, or cannot be read or written.
        ServiceError: another gateway has the folder or the port, or something that the spec or the environment names
            is not there.
    """
    folder = serving_folder(spec.execution)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"The gateway's folder cannot be made: {error.strerror}", where=str(folder), fix="allow writing there"
        ) from error
    tracing = open_tracing()
    keys = Keys(Path(spec.keys_file)) if spec.keys_file is not None else None
    listener = listen(spec)
    engines = None
    log = None
    spool = None
    try:
        engines = host or EngineHost(folder, spec.execution, command, pace=pace)  # only one gateway gets past this
        key, books, metrics = admin_key(folder), Books(folder), Metrics()
        log = open_log(
            spec.log,
            folder / "request_log",
            mask=mask,
            dropped=lambda reason, count: metrics.log_dropped.labels(reason).inc(count),
            written=metrics.log_written.inc,
        )
        spool = open_spool(spec.review, folder, mask=mask, registry=metrics.registry)
        shadowing = Shadowing(
            engines, books, metrics, mask=mask, unmasked=not spec.log.mask, keep_days=spec.log.keep_days,
            fill_in=spec.fill_in, vendor_key=os.environ.get(VENDOR_KEY), spool=spool,
        )  # fmt: skip
        gateway = Gateway(
            spec, engines, books, admin_key=key, keys=keys, log=log, metrics=metrics, tracing=tracing,
            shadowing=shadowing, reviews=Reviews(spool, books) if spool is not None else None,
        )  # fmt: skip
        url = _url(spec, listener)

        def started() -> None:
            write_durably(folder / ADDRESS_FILE, json.dumps({"url": url, "pid": os.getpid()}))
            announce(url)

        sys.setswitchinterval(_SWITCH_SECONDS)
        asyncio.run(_serve(gateway, listener, spec, started))
    finally:
        listener.close()
        if log is not None:
            log.close()
        if spool is not None:
            spool.close()
        if engines is not None:
            engines.close()
        if tracing is not None:
            tracing.close()


async def _serve(gateway: Gateway, listener: socket.socket, spec: GatewaySpec, started: Callable[[], None]) -> None:
    server = make_server(gateway, spec)
    loop = asyncio.get_running_loop()
    ending: list[asyncio.Task[None]] = []

    async def end() -> None:
        _log.info("ending: no more requests are taken, %d are under way", gateway.public.active)
        await gateway.drain()
        server.should_exit = True

    def asked_to_end(sig: int, frame: FrameType | None) -> None:
        if ending:  # asked twice: now
            server.should_exit = server.force_exit = True
            return
        ending.append(loop.create_task(end()))
        loop.call_soon_threadsafe(lambda: None)  # a signal does not wake the loop by itself

    server.handle_exit = asked_to_end  # type: ignore[method-assign]  # uvicorn would close the door at once
    async with gateway.running():
        telling = loop.create_task(_when_started(server, started))
        await server.serve(sockets=[listener])
        telling.cancel()  # of no effect once it is done; what went wrong in it is raised here
        for task in (telling, *ending):
            with suppress(asyncio.CancelledError):
                await task


async def _when_started(server: uvicorn.Server, started: Callable[[], None]) -> None:
    """Tell where it listens. Not before: until uvicorn has its signal handlers, SIGTERM would end it on the spot."""
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        started()
    except BaseException:
        server.should_exit = True  # nobody could find it
        raise


def make_server(gateway: Gateway, spec: GatewaySpec) -> uvicorn.Server:
    """A uvicorn with the gateway's limits; it logs nothing about requests."""

    def protocol(**options: Any) -> PatientProtocol:
        return PatientProtocol(spec.limits.receive_seconds, partial(H11Protocol, **options))

    config = uvicorn.Config(
        cast(Any, gateway),
        http=cast(Any, protocol),  # it is only called
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=_BACKLOG,
        timeout_keep_alive=_IDLE_SECONDS,
        timeout_graceful_shutdown=_LAST_SECONDS,
    )
    return uvicorn.Server(config)


def listen(spec: GatewaySpec) -> socket.socket:
    """The gateway's socket, already listening.

    Raises:
        ServiceError: the port is taken, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in spec.host else socket.AF_INET
    # With its protocol named, asyncio sets TCP_NODELAY; without, each answer waits 40 ms for the client's late ACK.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((spec.host, spec.port))
        listener.listen(_BACKLOG)  # from here on nobody else gets the port, and early clients wait in line
        listener.set_inheritable(False)
    except OSError as error:
        listener.close()
        raise ServiceError(
            f"The gateway cannot listen there: {error.strerror or error}",
            where=f"{spec.host}:{spec.port}",
            fix="end what listens there, or set `port` to another one (0 takes a free one)",
        ) from error
    return listener


def _url(spec: GatewaySpec, listener: socket.socket) -> str:
    """The address for this machine; a gateway that listens everywhere is reached over loopback."""
    port = listener.getsockname()[1]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(spec.host, spec.host)  # noqa: S104  # compared, not bound
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
