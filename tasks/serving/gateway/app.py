"""The gateway as one ASGI application. Chats and completions go past the routes, everything else through them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tasks.contracts.serving import GatewaySpec
from tasks.serving.books import Books
from tasks.serving.gateway.admin import Admin
from tasks.serving.gateway.engines import Engines
from tasks.serving.gateway.public import PATHS, Public
from tasks.serving.gateway.receive import ClientGoneError
from tasks.serving.gateway.refusal import Receive, Refusal, Scope, Send
from tasks.serving.gateway.reviews import Reviews
from tasks.serving.gateway.shadowing import Shadowing
from tasks.serving.gateway.splits import Splits
from tasks.serving.gateway.tracing import Tracing
from tasks.serving.keys import Keys
from tasks.serving.metrics import CONTENT_TYPE, Metrics
from tasks.serving.request_log import RequestLog

_CUT_SECONDS = 2.0  # for clients to be told that their requests are cut
_LOOK_SECONDS = 0.05
_log = logging.getLogger(__name__)


class Gateway:
    """Everything that listens: clients' requests, `/admin`, and what watches the gateway."""

    def __init__(
        self,
        spec: GatewaySpec,
        engines: Engines,
        books: Books,
        *,
        admin_key: str,
        keys: Keys | None = None,
        log: RequestLog | None = None,
        metrics: Metrics | None = None,
        tracing: Tracing | None = None,
        splits: Splits | None = None,
        shadowing: Shadowing | None = None,
        reviews: Reviews | None = None,
    ) -> None:
        self._spec, self._engines, self._books = spec, engines, books
        self.metrics = metrics or Metrics()
        self.splits = splits or Splits(engines, books, self.metrics)
        self.shadowing = shadowing or Shadowing(engines, books, self.metrics, mask=None, fill_in=spec.fill_in)
        self.public = Public(
            engines, books, spec.limits, self.metrics, keys=keys, admin_key=admin_key, log=log, tracing=tracing,
            fill_in=spec.fill_in, choose=self.splits.choose,
            followers=(self.splits, self.shadowing, *((reviews,) if reviews is not None else ())),
        )  # fmt: skip
        self._admin = Admin(engines, books, self.public, admin_key, spec.limits, self.splits, self.shadowing)
        self.metrics.watch(
            engines=engines.statuses,
            traffic=books.all_traffic,
            under_way=lambda: dict(self.public.under_way),
            waiting=self.public.waiting,
        )
        self._routes = Starlette(
            routes=[
                Route("/health", self._health),
                Route("/ready", self._ready),
                Route("/metrics", self._metrics),
                Route("/v1/models", self._models),
                Route("/v1/models/{model:path}", self._model),
                *self._admin.routes(),
                *(reviews.routes(self._admin.check_key, spec.limits) if reviews is not None else ()),
            ],
            exception_handlers={Refusal: _refused, HTTPException: _no_route, ClientGoneError: _nobody, 500: _defect},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in PATHS:
            await self.public.complete(scope, receive, send)
        elif scope["type"] == "http":
            await self._routes(scope, receive, send)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Hold what it needs to answer."""
        async with self.public.connected(), self.splits.keeping(), self.shadowing.running():
            yield

    async def drain(self) -> None:
        """Take no more requests, and wait for those under way, for `shutdown_seconds`; what is left then is cut."""
        self.public.closing = True
        try:
            async with asyncio.timeout(self._spec.shutdown_seconds):
                await self._emptied()
        except TimeoutError:
            _log.warning("%d requests are cut: they took too long", self.public.active)
            self.public.cut_all()
            try:
                async with asyncio.timeout(_CUT_SECONDS):
                    await self._emptied()
            except TimeoutError:
                _log.warning("%d clients could not be told", self.public.active)

    async def _emptied(self) -> None:
        while self.public.active:
            await asyncio.sleep(_LOOK_SECONDS)

    # -- what watches it ----------------------------------------------------------------------------------------

    async def _health(self, request: Request) -> Response:
        return _json({"status": "ok"})

    async def _ready(self, request: Request) -> Response:
        """Ready: there is traffic, and every name's live engine answers."""
        traffic = self._books.all_traffic()
        names = {one.name: self._engines.endpoint(one.live.engine) is not None for one in traffic}
        ready = bool(names) and all(names.values()) and not self.public.closing
        why = "shutting down" if self.public.closing else "nothing was rolled out yet" if not names else None
        return _json({"ready": ready, "names": names, "why": why}, 200 if ready else 503)

    async def _metrics(self, request: Request) -> Response:
        self.public.check_key(request.scope["headers"])
        return Response(await asyncio.to_thread(self.metrics.text), headers={"content-type": CONTENT_TYPE})

    async def _models(self, request: Request) -> Response:
        self.public.check_key(request.scope["headers"])
        return _json({"object": "list", "data": [self._model_record(name) for name in self.public.names()]})

    async def _model(self, request: Request) -> Response:
        self.public.check_key(request.scope["headers"])
        name = request.path_params["model"]
        if name not in self.public.names():
            raise self.public.no_such_model(name)
        return _json(self._model_record(name))

    def _model_record(self, name: str) -> dict[str, object]:
        traffic = self._books.traffic(name)
        record: dict[str, object] = {"id": name, "object": "model", "created": 0, "owned_by": "goldgate"}
        if traffic is not None:
            record |= {"created": int(traffic.at.timestamp()), "root": traffic.live.label}
        return record


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)  # noqa: S101  # it is registered for these
    headers = {name.decode(): value.decode() for name, value in error.headers()}
    return Response(error.body(), error.status, headers, "application/json")


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101  # likewise
    phrase = HTTPStatus(error.status_code).phrase
    refusal = Refusal(error.status_code, f"{phrase}: {request.method} {request.url.path}", reason="not_found")
    return Response(refusal.body(), error.status_code, dict(error.headers or {}), "application/json")


async def _nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=400)  # it goes to nobody


async def _defect(request: Request, error: Exception) -> Response:
    refusal = Refusal(500, "The gateway failed; its log has more.", reason="defect", kind="server_error")
    return Response(refusal.body(), 500, media_type="application/json")


def _json(value: object, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")
