"""`/admin`: engines, traffic and changes of it, for those who have its key."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, Field, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tasks.contracts.errors import GoldgateError, ServiceError, SpecError, StoreError
from tasks.contracts.parse import problems
from tasks.contracts.serving import (
    EngineSpec,
    EngineState,
    EngineStatus,
    Intent,
    LimitSpec,
    Shadow,
    Traffic,
    VersionRef,
)
from tasks.contracts.spec import CanarySpec, Frozen
from tasks.serving.books import AbsentError, Books, Change, ConflictError
from tasks.serving.gateway.engines import Engines
from tasks.serving.gateway.public import Public, bearer
from tasks.serving.gateway.receive import read_body
from tasks.serving.gateway.refusal import Refusal
from tasks.serving.gateway.shadowing import Shadowing
from tasks.serving.gateway.splits import Splits
from tasks.serving.keys import same_key

_KIND = "goldgate"
_DRAIN_SECONDS = 30.0
_MOST_SECONDS = 3600.0
Body = TypeVar("Body", bound=BaseModel)
Result = TypeVar("Result")
_Lease = Field(gt=0.0, le=_MOST_SECONDS)


class StartEngine(Frozen):
    """Have an engine run."""

    version: VersionRef
    spec: EngineSpec


class OfChange(Frozen):
    """Which change asks, and who works on it."""

    id: str
    holder: str


class MoveTraffic(Frozen):
    """Let a name mean another engine."""

    live: VersionRef
    previous: VersionRef | None = None
    from_revision: int = Field(ge=0)
    by: str
    why: str
    change: OfChange | None = None


class BeginCanary(Frozen):
    """Let a version that was checked answer a share of the requests."""

    change: OfChange
    spec: CanarySpec
    from_revision: int = Field(ge=0)


class EndCanary(Frozen):
    """Let it answer no more."""

    change: OfChange


class BeginShadow(Frozen):
    """Let a version or a vendor answer a share of the requests unseen."""

    shadow: Shadow
    from_revision: int = Field(ge=0)
    by: str


class WriteIntent(Frozen):
    """Begin a change, or say how far it is."""

    intent: Intent
    lease_seconds: float = _Lease


class RenewLease(Frozen):
    """Go on holding a change."""

    id: str
    holder: str
    lease_seconds: float = _Lease


class TakeOver(Frozen):
    """Hold a change that its holder has let go."""

    holder: str
    lease_seconds: float = _Lease


class RollBack(Frozen):
    """Let the previous version answer again."""

    by: str
    why: str
    holder: str
    lease_seconds: float = _Lease


class Admin:
    """The handlers; what they call may wait for the disk, so it runs in threads."""

    def __init__(
        self,
        engines: Engines,
        books: Books,
        public: Public,
        key: str,
        limits: LimitSpec,
        splits: Splits,
        shadowing: Shadowing,
    ) -> None:
        self._engines, self._books, self._public, self._key, self._limits = engines, books, public, key, limits
        self._splits, self._shadowing = splits, shadowing

    def routes(self) -> list[Route]:
        """Its routes."""
        paths: list[tuple[str, str, Callable[[Request], Awaitable[Response]]]] = [
            ("GET", "/admin/engines", self._list_engines),
            ("GET", "/admin/engines/{engine}", self._show_engine),
            ("PUT", "/admin/engines/{engine}", self._start_engine),
            ("DELETE", "/admin/engines/{engine}", self._stop_engine),
            ("GET", "/admin/traffic", self._list_traffic),
            ("GET", "/admin/traffic/{name}", self._show_traffic),
            ("PUT", "/admin/traffic/{name}", self._move_traffic),
            ("GET", "/admin/canary/{name}", self._show_canary),
            ("PUT", "/admin/canary/{name}", self._begin_canary),
            ("DELETE", "/admin/canary/{name}", self._end_canary),
            ("PUT", "/admin/shadow/{name}", self._begin_shadow),
            ("DELETE", "/admin/shadow/{name}", self._end_shadow),
            ("GET", "/admin/intents/{name}", self._show_intent),
            ("POST", "/admin/intents/{name}", self._begin),
            ("PUT", "/admin/intents/{name}", self._advance),
            ("GET", "/admin/intents/{name}/history", self._history),
            ("POST", "/admin/intents/{name}/lease", self._renew),
            ("POST", "/admin/intents/{name}/take", self._take),
            ("POST", "/admin/rollback/{name}", self._roll_back),
        ]
        return [Route(path, self._guarded(handler), methods=[method]) for method, path, handler in paths]

    def check_key(self, request: Request) -> None:
        """Let in who has the key.

        Raises:
            Refusal: 401.
        """
        given = bearer(request.scope["headers"])
        if given is None or not same_key(given, self._key):
            raise Refusal(
                401,
                "This needs the gateway's admin key, as `Authorization: Bearer <key>`; it lies in admin.key in the "
                "gateway's folder.",
                reason="invalid_admin_key",
                kind=_KIND,
            )

    def ready(self, version: VersionRef) -> bool:
        """Whether the engine of a version answers now."""
        status = self._engines.status(version.engine)
        return (
            status is not None
            and status.state is EngineState.READY
            and self._engines.endpoint(version.engine) is not None
        )

    # -- engines ------------------------------------------------------------------------------------------------

    async def _list_engines(self, request: Request) -> Response:
        return _records([self._shown(one) for one in await asyncio.to_thread(self._engines.statuses)])

    async def _show_engine(self, request: Request) -> Response:
        name = request.path_params["engine"]
        status = await asyncio.to_thread(self._engines.status, name)
        if status is None:
            raise AbsentError("There is no such engine.", where=name, fix="see /admin/engines for those that there are")
        return _record(self._shown(status))

    async def _start_engine(self, request: Request) -> Response:
        asked = await self._body(request, StartEngine)
        name = request.path_params["engine"]
        if name != asked.version.engine:
            raise SpecError(
                f"The engine of {asked.version.label} with these files is called {asked.version.engine}.",
                where=name,
                fix="name it so",
            )

        def start() -> EngineStatus:
            try:
                status = self._engines.start(asked.version, asked.spec)
            except ServiceError as error:  # it runs with other settings
                raise ConflictError(error.what, where=error.where, fix=error.fix) from error
            self._public.draining.discard(name)
            return status

        return _record(self._shown(await asyncio.to_thread(start)))

    async def _stop_engine(self, request: Request) -> Response:
        name = request.path_params["engine"]
        text = request.query_params.get("drain_seconds", str(_DRAIN_SECONDS))
        try:
            seconds = float(text)
        except ValueError:
            seconds = -1.0
        if not 0.0 <= seconds <= _MOST_SECONDS:
            raise SpecError("drain_seconds is a number of seconds up to an hour.", where=text[:80], fix="give one")

        def end() -> EngineStatus:
            if self._engines.status(name) is None:
                raise AbsentError("There is no such engine.", where=name, fix="nothing: it does not run")
            self._public.draining.add(name)
            return self._engines.stop(name, seconds, lambda: self._public.count(name))

        return _record(self._shown(await asyncio.to_thread(self._books.release, name, end)))

    def _shown(self, status: EngineStatus) -> EngineStatus:
        return status.model_copy(update={"under_way": self._public.count(status.name)})

    # -- traffic ------------------------------------------------------------------------------------------------

    async def _list_traffic(self, request: Request) -> Response:
        return _records(self._books.all_traffic())

    async def _show_traffic(self, request: Request) -> Response:
        name = request.path_params["name"]
        traffic = self._books.traffic(name)
        if traffic is None:
            raise AbsentError("Nothing was rolled out under this name.", where=name, fix="see /admin/traffic")
        return _record(traffic)

    async def _move_traffic(self, request: Request) -> Response:
        asked = await self._body(request, MoveTraffic)
        return _record(
            await asyncio.to_thread(
                self._books.move_traffic, request.path_params["name"], asked.live, asked.previous,
                from_revision=asked.from_revision, by=asked.by, why=asked.why, ready=self.ready,
                change=_change(asked.change) if asked.change is not None else None,
            )
        )  # fmt: skip

    # -- a canary and a shadow ----------------------------------------------------------------------------------

    async def _show_canary(self, request: Request) -> Response:
        name = request.path_params["name"]
        traffic = self._books.traffic(name)
        if traffic is None:
            raise AbsentError("Nothing was rolled out under this name.", where=name, fix="see /admin/traffic")
        return _record(await self._splits.status(traffic))

    async def _begin_canary(self, request: Request) -> Response:
        asked = await self._body(request, BeginCanary)
        name = request.path_params["name"]
        now = self._books.traffic(name)
        begun = now.canary if now is not None else None
        if begun is not None and begun.salt == asked.change.id:  # asked again, perhaps of a gateway that has restarted
            slow_above_ms = begun.state.slow_above_ms
        else:
            slow_above_ms = self._splits.slow_above_ms(name, asked.spec)
        return _record(
            await asyncio.to_thread(
                self._books.begin_canary, name, asked.spec, slow_above_ms, change=_change(asked.change),
                from_revision=asked.from_revision, ready=self.ready,
            )
        )  # fmt: skip

    async def _end_canary(self, request: Request) -> Response:
        asked = await self._body(request, EndCanary)
        return _record(
            await asyncio.to_thread(self._books.end_canary, request.path_params["name"], _change(asked.change))
        )  # fmt: skip

    async def _begin_shadow(self, request: Request) -> Response:
        asked = await self._body(request, BeginShadow)
        name = request.path_params["name"]

        def begin() -> Traffic:
            self._shadowing.check(asked.shadow)
            now = self._books.traffic(name)
            noted = now is not None and now.shadow is None
            if now is not None and noted:
                self._shadowing.note(now.live, asked.shadow)  # before the first pair
            try:
                return self._books.begin_shadow(name, asked.shadow, from_revision=asked.from_revision, by=asked.by)
            except GoldgateError:
                if noted:
                    self._shadowing.forget(asked.shadow)
                raise

        return _record(await asyncio.to_thread(begin))

    async def _end_shadow(self, request: Request) -> Response:
        by = request.query_params.get("by") or "unknown"
        return _record(await asyncio.to_thread(self._books.end_shadow, request.path_params["name"], by=by))

    # -- changes ------------------------------------------------------------------------------------------------

    async def _show_intent(self, request: Request) -> Response:
        name = request.path_params["name"]
        held = await asyncio.to_thread(self._books.open_intent, name)
        if held is None:
            raise AbsentError("No change is under way.", where=name, fix="nothing")
        return _record(held.intent)

    async def _history(self, request: Request) -> Response:
        return _records(await asyncio.to_thread(self._books.history, request.path_params["name"]))

    async def _begin(self, request: Request) -> Response:
        asked = await self._intent(request)
        return _record(await asyncio.to_thread(self._books.begin, asked.intent, asked.lease_seconds), 201)

    async def _advance(self, request: Request) -> Response:
        asked = await self._intent(request)
        return _record(await asyncio.to_thread(self._books.advance, asked.intent, asked.lease_seconds))

    async def _renew(self, request: Request) -> Response:
        asked = await self._body(request, RenewLease)
        name = request.path_params["name"]
        return _record(
            await asyncio.to_thread(self._books.renew, name, asked.id, asked.holder, asked.lease_seconds)
        )  # fmt: skip

    async def _take(self, request: Request) -> Response:
        asked = await self._body(request, TakeOver)
        name = request.path_params["name"]
        return _record(await asyncio.to_thread(self._books.take, name, asked.holder, asked.lease_seconds))

    async def _roll_back(self, request: Request) -> Response:
        asked = await self._body(request, RollBack)
        done = await asyncio.to_thread(
            self._books.rollback, request.path_params["name"], by=asked.by, why=asked.why, holder=asked.holder,
            lease_seconds=asked.lease_seconds, ready=self.ready,
        )  # fmt: skip
        return _json({"intent": done.intent.model_dump(mode="json"), "traffic": done.traffic.model_dump(mode="json")})

    # -- inside -------------------------------------------------------------------------------------------------

    def _guarded(self, handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def guarded(request: Request) -> Response:
            self.check_key(request)
            try:
                return await handler(request)
            except GoldgateError as error:
                raise _refusal(error) from error

        return guarded

    async def _intent(self, request: Request) -> WriteIntent:
        asked = await self._body(request, WriteIntent)
        if asked.intent.name != request.path_params["name"]:
            raise SpecError(
                f"This change is of {asked.intent.name}.", where=request.path_params["name"], fix="name the same twice"
            )
        return asked

    async def _body(self, request: Request, kind: type[Body]) -> Body:
        raw = await read_body(request.scope, request.receive, self._limits)
        try:
            return kind.model_validate_json(raw)
        except ValidationError as error:
            said = "; ".join(problems(kind, error)[:20])
            raise SpecError(f"The request does not fit: {said}", where=request.url.path, fix="change it") from error


def _change(asked: OfChange) -> Change:
    return Change(asked.id, asked.holder)


def _refusal(error: GoldgateError) -> Refusal:
    status, more = 500, {}
    match error:
        case ConflictError():
            status, more = 409, error.more
        case AbsentError():
            status = 404
        case SpecError():
            status = 400
        case StoreError():
            status = 507
    said = error.what.rstrip(".")
    return Refusal(
        status, f"{said}. To fix: {error.fix}.", reason=type(error).__name__.removesuffix("Error").lower(), kind=_KIND,
        param=error.where, more=more,
    )  # fmt: skip


def _record(record: BaseModel, status: int = 200) -> Response:
    return Response(record.model_dump_json(), status, media_type="application/json")


def _records(records: Iterable[BaseModel]) -> Response:
    return _json([record.model_dump(mode="json") for record in records])


def _json(value: Any) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")
