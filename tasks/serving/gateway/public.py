"""Requests of clients: whose they are, which engine answers, and its answer passed on as it comes.

A request goes to one engine from its begin to its end, whatever happens to traffic meanwhile. It is parsed once, and
changed in three places: the model is the version that was chosen, what it leaves open is said (`as_evaluated`), and
where the answer is one of the version's choices, the engine is asked how sure it is (`closed`).
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, NamedTuple, Protocol

import aiohttp
import orjson
from yarl import URL

from tasks.contracts.serving import EngineState, LimitSpec, Traffic, VersionRef
from tasks.serving.books import Books
from tasks.serving.gateway.admission import Rate, Turnstile
from tasks.serving.gateway.as_calls import CallsAsked, calls_request
from tasks.serving.gateway.as_evaluated import left_open
from tasks.serving.gateway.closed import Closed, Read, closed_request, whole_events
from tasks.serving.gateway.engines import Engines, Reached
from tasks.serving.gateway.receive import ClientGoneError, read_body, read_json
from tasks.serving.gateway.refusal import CLIENT_GONE, Receive, Refusal, Scope, Send, send_bytes, send_refusal
from tasks.serving.gateway.tracing import Tracing
from tasks.serving.keys import ADMIN, Keys, same_key
from tasks.serving.metrics import UNKNOWN, Metrics
from tasks.serving.request_log import Asked, RequestLog

PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})
VERSION_HEADER = b"x-goldgate-version"
CONFIDENCE_HEADER = b"x-goldgate-confidence"  # calibrated where that could be learnt; only of whole answers
REVIEW_HEADER = b"x-goldgate-review"  # yes or no

_CONNECT_SECONDS = 5.0
_KEEP_SECONDS = 2.0  # for an idle connection to an engine; vLLM closes it after five, and must not be first
_LAST_WORD_SECONDS = 1.0  # for the last event to a client that does not read
_ENGINE_AGAIN_SECONDS = 2.0
_CLOSING_SECONDS = 5.0
_LONGEST_EVENT = 1_000_000
_LOGGED_BYTES = 1_000_000  # of one answer
_EXCERPT = 500
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_PASSED_ON = (b"traceparent", b"tracestate", b"user-agent")  # of the client's headers; all others stay here
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Exchange:
    """One request, from its first byte to its end.

    Attributes:
        id: the client's `x-request-id`, or one of ours.
        at: when it came, seconds since the epoch.
        path: its path.
        headers: the client's.
        asked: the model as the client wrote it.
        name: the name of the traffic that it belongs to; "unknown" where there is none.
        version: the version that was chosen; empty before.
        key: name of the client's key; empty for none, `ADMIN` for what a rollout asks.
        body: the request, parsed.
        log: whether the log wants it.
        keep: whether anybody wants its answer's bytes.
        canary: whether its key belongs to a canary; None where there is none. It stays so if another version answers.
        canary_key: by what it was drawn.
        confidence: probability of a closed answer, as the model gives it; None where there is none.
        certainty: the same, calibrated; None where nothing could be learnt.
        flagged: whether a person is to look at the answer; None where nobody says.
        began: clock reading when its body was whole; the following are readings of the same clock.
        waited: seconds that it waited for others.
        sent: when it went to the engine.
        first: when the first byte of the answer came.
        last: when the last one came.
        status: of the answer; 0 before there is one.
        error: what went wrong here.
        reason: the same in one word, for the counts.
        answer: the answer's bytes, if the log wants them.
        cut: why it was ended from outside.
        task: what answers it.
        span: its trace, if there are traces.
    """

    id: str
    at: float
    path: str
    headers: list[tuple[bytes, bytes]]
    asked: str = ""
    name: str = UNKNOWN
    version: str = ""
    key: str = ""
    body: Mapping[str, Any] = field(default_factory=dict)
    log: bool = False
    keep: bool = False
    canary: bool | None = None
    canary_key: str = ""
    confidence: float | None = None
    certainty: float | None = None
    flagged: bool | None = None
    began: float | None = None
    waited: float = 0.0
    sent: float | None = None
    first: float | None = None
    last: float | None = None
    status: int = 0
    error: str = ""
    reason: str = ""
    answer: list[bytes] = field(default_factory=list)
    logged: int = 0
    cut: Exception | None = None
    task: asyncio.Task[Any] | None = None
    span: Any = None


class _Named(NamedTuple):
    """What a client's model name means: the traffic's name, and the one version that it insists on, if it does."""

    name: str
    version: VersionRef | None


class Follower(Protocol):
    """Whoever does something with requests that have been answered. Both methods must not wait."""

    def wants(self, exchange: Exchange) -> bool:
        """Whether it wants the answer's bytes; asked when the request is known, before it is answered."""

    def ended(self, exchange: Exchange) -> None:
        """The client has its answer, or there is none."""


Chooser = Callable[[Traffic, Exchange], VersionRef]


def live_version(traffic: Traffic, exchange: Exchange) -> VersionRef:
    """The version that answers a request for a name, where nothing is on trial."""
    return traffic.live


class Public:
    """The gateway's side for clients. Lives in one event loop, but for `count`, which any thread may read."""

    def __init__(
        self,
        engines: Engines,
        books: Books,
        limits: LimitSpec,
        metrics: Metrics,
        *,
        keys: Keys | None,
        admin_key: str,
        log: RequestLog | None = None,
        tracing: Tracing | None = None,
        fill_in: bool = True,
        choose: Chooser = live_version,
        followers: Sequence[Follower] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engines, self._books, self._limits, self._metrics = engines, books, limits, metrics
        self._keys, self._admin_key, self._log, self._tracing = keys, admin_key, log, tracing
        self._fill_in, self._choose, self._followers, self._clock = fill_in, choose, tuple(followers), clock
        self._turnstiles: dict[str, Turnstile] = {}
        self._rates: dict[str, Rate] = {}
        self._labels: dict[str, VersionRef] = {}
        self._urls: dict[str, URL] = {}
        self._session: aiohttp.ClientSession | None = None
        self._active: dict[int, Exchange] = {}
        self._looking: set[asyncio.Task[None]] = set()
        self.under_way: Counter[str] = Counter()
        self.draining: set[str] = set()
        self.closing = False

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """Hold the connections to engines."""
        # Admission bounds the connections. Answers are passed on as they are, so nothing is unpacked.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_SECONDS, ttl_dns_cache=None)
        async with aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS),
            auto_decompress=False,
            skip_auto_headers=("Accept-Encoding", "User-Agent"),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
        ) as session:
            self._session = session
            yield
            self._session = None

    def count(self, engine: str) -> int:
        """Requests that an engine is answering."""
        return self.under_way[engine]

    def waiting(self) -> dict[str, int]:
        """Requests that wait, by name."""
        return {name: turnstile.waiting for name, turnstile in list(self._turnstiles.items())}

    @property
    def active(self) -> int:
        """Requests that have not ended."""
        return len(self._active)

    def cut_all(self) -> None:
        """End every request now; clients are told."""
        for exchange in list(self._active.values()):
            exchange.cut = self._shutting_down()
            if exchange.task is not None:
                exchange.task.cancel()

    def check_key(self, headers: list[tuple[bytes, bytes]]) -> str:
        """The name of the client's key; empty where no keys are asked for, unless it has the gateway's own.

        Raises:
            Refusal: it has none that is valid (401), or has used it up (429).
        """
        given = bearer(headers)
        if given is not None and same_key(given, self._admin_key):
            return ADMIN
        if self._keys is None:
            return ""
        if given is None:
            raise _no_key("This gateway needs a key: send it as `Authorization: Bearer <key>`.")
        known = self._keys.find(given)
        if known is None:
            raise _no_key("This key is not valid.")
        per_minute = known.per_minute or self._limits.per_minute
        rate = self._rates.get(known.id)
        if rate is None or rate.per_minute != per_minute:
            rate = self._rates[known.id] = Rate(per_minute, self._clock)
        rate.take()
        return known.name

    async def complete(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a chat or a completion."""
        exchange = Exchange(_request_id(scope), time.time(), scope["path"], scope["headers"])
        number = id(exchange)
        self._active[number] = exchange
        if self._tracing is not None:
            exchange.span = self._tracing.begin(exchange.path, exchange.headers)
        out = _Out(send, exchange)
        try:
            await self._answered(exchange, scope, receive, out)
        except Refusal as refusal:
            exchange.error, exchange.reason = refusal.message, refusal.reason
            self._metrics.rejected.labels(refusal.reason).inc()
            await out.refuse(refusal)
        except ClientGoneError:
            exchange.status, exchange.error, exchange.reason = CLIENT_GONE, "the client has left", "client_gone"
        except Exception:
            _log.exception("a request failed in the gateway itself")
            exchange.error, exchange.reason = "a defect of the gateway", "defect"
            self._metrics.rejected.labels("defect").inc()
            await out.refuse(_defect(exchange.id))
        finally:
            del self._active[number]
            self._ended(exchange)

    # -- one request --------------------------------------------------------------------------------------------

    async def _answered(self, exchange: Exchange, scope: Scope, receive: Receive, out: _Out) -> None:
        if self.closing:
            raise self._shutting_down()
        exchange.key = self.check_key(exchange.headers)
        raw = await read_body(scope, receive, self._limits)
        exchange.began = time.perf_counter()
        body = read_json(raw)
        exchange.body = body
        asked = body.get("model")
        if not isinstance(asked, str):
            raise Refusal(400, "`model` must name a model.", reason="invalid_request", param="model")
        exchange.asked = asked
        named = self._named(asked)
        exchange.name = named.name
        exchange.log = self._log is not None and self._log.wants(exchange.id)
        exchange.keep = any([exchange.log, *(follower.wants(exchange) for follower in self._followers)])
        exchange.task = asyncio.current_task()
        watching = asyncio.create_task(_watch(receive, exchange))
        try:
            await self._admitted(exchange, named, raw, out)
        except asyncio.CancelledError:
            if exchange.cut is None or exchange.task is None:
                raise
            exchange.task.uncancel()
            raise exchange.cut from None
        finally:
            exchange.task = None  # from here on nobody ends it from outside
            watching.cancel()

    async def _admitted(self, exchange: Exchange, named: _Named, raw: bytes, out: _Out) -> None:
        turnstile = self._turnstiles.get(named.name)
        if turnstile is None:
            turnstile = self._turnstiles[named.name] = Turnstile(self._limits)
        before = time.perf_counter()
        await turnstile.enter()
        exchange.waited = time.perf_counter() - before
        self._metrics.wait.labels(named.name).observe(exchange.waited)
        try:
            async with asyncio.timeout(self._limits.answer_seconds):
                await self._from_an_engine(exchange, named, raw, out)
        except TimeoutError:
            raise Refusal(
                504,
                f"{exchange.version or named.name} has not answered within {self._limits.answer_seconds:g} seconds. "
                "Ask for a shorter answer, or try again later.",
                reason="answer_timeout",
                kind="server_error",
            ) from None
        finally:
            turnstile.leave()

    async def _from_an_engine(self, exchange: Exchange, named: _Named, raw: bytes, out: _Out) -> None:
        """Ask the engine that answers now; one that cannot be reached at all, once more."""
        refused: str | None = None
        for _ in range(2):
            version = named.version or self._choose(self._live(named.name), exchange)
            engine = version.engine
            endpoint = self._engines.endpoint(engine)
            if endpoint is None:
                raise self._not_ready(version)
            self.under_way[engine] += 1  # before anything is waited for: draining must see it
            try:
                await self._ask(exchange, version, endpoint, raw, out)
                return
            except aiohttp.ClientConnectorError as error:
                refused = str(error.os_error.strerror or error.os_error)
                await asyncio.to_thread(self._engines.suspect, engine)
            finally:
                self.under_way[engine] -= 1
        raise _engine_failed(exchange.version, f"it cannot be reached ({refused})")

    async def _ask(self, exchange: Exchange, version: VersionRef, endpoint: Reached, raw: bytes, out: _Out) -> None:
        if self._session is None:
            raise RuntimeError("the gateway is not connected")
        exchange.version = endpoint.label
        chat = exchange.path.endswith("/chat/completions")
        fields = left_open(exchange.body, version, chat=self._fill_in and chat)
        closed = closed_request(exchange.body, fields, version, chat=chat)
        if closed is not None:
            fields |= closed.fields
        calls = calls_request(exchange.body, fields, version, chat=chat)
        if calls is not None:
            fields |= calls.fields
        model = endpoint.model or endpoint.label
        if exchange.asked != model:
            fields["model"] = model
        body = orjson.dumps({**exchange.body, **fields}) if fields else raw
        exchange.sent = time.perf_counter()
        try:
            async with self._session.post(
                self._url(endpoint.url, exchange.path), data=body, headers=self._headers(exchange, endpoint.key),
                allow_redirects=False,
            ) as answer:  # fmt: skip
                await self._pass_on(exchange, endpoint, closed, calls, answer, out)
        except aiohttp.ClientConnectorError:
            raise  # it has not seen a byte of the request
        except (aiohttp.ClientError, OSError) as error:
            self._look_at(endpoint.engine)
            raise _engine_failed(endpoint.label, f"its answer was cut off ({type(error).__name__})") from error

    async def _pass_on(
        self,
        exchange: Exchange,
        endpoint: Reached,
        closed: Closed | None,
        calls: CallsAsked | None,
        answer: aiohttp.ClientResponse,
        out: _Out,
    ) -> None:
        if answer.status >= 500 or answer.status in (401, 403):  # of these two it is our key that it does not like
            said = _message(await answer.read())
            exchange.last = time.perf_counter()
            self._look_at(endpoint.engine)
            raise _engine_failed(endpoint.label, f"it answered with HTTP {answer.status}: {said}")
        if answer.status != HTTPStatus.OK:
            closed = calls = None  # it is the engine's refusal, not an answer
        content_type = answer.headers.get("content-type", "application/json")
        if not content_type.startswith("text/event-stream"):
            whole = await answer.read()
            exchange.first = exchange.last = time.perf_counter()
            if closed is not None:
                read, whole = closed.whole(whole)
                self._note_read(exchange, read)
            if calls is not None:
                content_type, whole = calls.answer(whole)
            await out.whole(answer.status, content_type, whole)
            return
        rest = b""
        reading = closed.stream() if closed is not None else None
        async for piece in answer.content.iter_any():
            exchange.last = time.perf_counter()
            if exchange.first is None:
                exchange.first = exchange.last
                await out.start(answer.status, content_type)
            # Whole events only: an engine that dies must not leave half of one before our last word.
            events, rest = whole_events(rest + piece if rest else piece, _LONGEST_EVENT)
            if events:
                await out.piece(events if reading is None else reading.events(events))
        if exchange.first is None:
            await out.start(answer.status, content_type)
        if reading is not None:
            rest = reading.events(rest)
            self._note_read(exchange, reading.read())
        await out.end(rest)

    def _note_read(self, exchange: Exchange, read: Read) -> None:
        """Keep how sure a closed answer is, for its headers and for whoever follows."""
        exchange.confidence, exchange.certainty, exchange.flagged = read.confidence, read.certainty, read.flagged
        self._metrics.observe_closed(
            exchange.name, exchange.version, confidence=read.shown, flagged=read.flagged, why=read.why
        )

    # -- which engine -------------------------------------------------------------------------------------------

    def _named(self, asked: str) -> _Named:
        """What a client's model name means.

        Raises:
            Refusal: nothing that there is (404); says what there is.
        """
        if self._books.traffic(asked) is not None:
            return _Named(asked, None)
        known = self._labels.get(asked)
        if known is None or not self._takes(known):
            known = self._find_label(asked)
        if known is None:
            raise self.no_such_model(asked)
        self._labels[asked] = known
        return _Named(known.name, known)

    def _find_label(self, label: str) -> VersionRef | None:
        if "@" not in label:
            return None
        for traffic in self._books.all_traffic():
            for version in (traffic.live, traffic.previous):
                if version is not None and version.label == label:
                    return version
        running = (one for one in self._engines.statuses() if one.version.label == label)
        return next((one.version for one in running if one.state is EngineState.READY), None)

    def _takes(self, version: VersionRef) -> bool:
        """Whether a version that a client insists on may still be asked; an engine that drains gets nothing new."""
        if self._books.names_of(version.engine):
            return True
        return version.engine not in self.draining and self._engines.endpoint(version.engine) is not None

    def names(self) -> list[str]:
        """What clients may name: each name, and each version that runs."""
        versions = {one.version.label for one in self._engines.statuses() if one.state is EngineState.READY}
        return sorted({traffic.name for traffic in self._books.all_traffic()} | versions)

    def no_such_model(self, asked: str) -> Refusal:
        """What to say to a client who names none that there is."""
        there = ", ".join(self.names()) or "none yet; roll one out"
        return Refusal(
            404, f"The model `{asked[:200]}` does not exist. There is: {there}.",
            reason="model_not_found", param="model",
        )  # fmt: skip

    def _live(self, name: str) -> Traffic:
        traffic = self._books.traffic(name)
        if traffic is None:
            raise RuntimeError(f"traffic of {name} has gone")
        return traffic

    def _not_ready(self, version: VersionRef) -> Refusal:
        status = self._engines.status(version.engine)
        state = "does not run" if status is None else f"is {status.state.value}"
        if status is not None and status.state is EngineState.READY:
            state = "has just been lost and is started anew"
        return Refusal(
            503, f"The engine of {version.label} {state}. Try again later.",
            reason="engine_not_ready", kind="server_error", retry_after=_ENGINE_AGAIN_SECONDS,
        )  # fmt: skip

    def _shutting_down(self) -> Refusal:
        return Refusal(
            503, "This gateway is being shut down. Try again later.",
            reason="shutting_down", kind="server_error", retry_after=_CLOSING_SECONDS, close=True,
        )  # fmt: skip

    # -- around it ----------------------------------------------------------------------------------------------

    def _url(self, base: str, path: str) -> URL:
        text = base + path.removeprefix("/v1")
        url = self._urls.get(text)
        if url is None:
            if len(self._urls) > 256:  # of engines that have gone
                self._urls.clear()
            url = self._urls[text] = URL(text)
        return url

    def _headers(self, exchange: Exchange, key: str) -> dict[str, str]:
        headers = {
            "Authorization": f"Bearer {key}", "Content-Type": "application/json", "X-Request-Id": exchange.id,
        }  # fmt: skip
        for name, value in exchange.headers:
            if name in _PASSED_ON:
                headers[name.decode("latin-1")] = value.decode("latin-1")
        if self._tracing is not None:
            headers |= self._tracing.headers(exchange.span)
        return headers

    def _look_at(self, engine: str) -> None:
        """Have the host look, without waiting for it."""
        looking = asyncio.create_task(asyncio.to_thread(self._engines.suspect, engine))
        self._looking.add(looking)
        looking.add_done_callback(self._looking.discard)

    def _ended(self, exchange: Exchange) -> None:
        now = time.perf_counter()
        if exchange.began is not None:
            self._metrics.observe(
                exchange.name, exchange.version or "none", exchange.status,
                seconds=now - exchange.began,
                first_byte=exchange.first - exchange.began if exchange.first is not None else None,
                added=_added(exchange, now),
            )  # fmt: skip
        else:
            self._metrics.requests.labels(exchange.name, "none", str(exchange.status)).inc()
        if self._tracing is not None:
            self._tracing.end(
                exchange.span, name=exchange.name, version=exchange.version, status=exchange.status,
                waited=exchange.waited, error=exchange.error,
            )  # fmt: skip
        if self._log is not None and exchange.log:
            self._log.offer(_asked(exchange, now))
        for follower in self._followers:
            follower.ended(exchange)


class _Out:
    """The answer to one client, and whether anything of it has been sent."""

    def __init__(self, send: Send, exchange: Exchange) -> None:
        self._send, self._exchange = send, exchange
        self._started = False

    async def whole(self, status: int, content_type: str, body: bytes) -> None:
        """All of it at once."""
        self._note(status)
        self._keep(body)
        headers = [*self._headers(), *self._sureness()]
        await send_bytes(self._send, status, body, content_type.encode("latin-1"), headers)

    async def start(self, status: int, content_type: str) -> None:
        """The head of a stream."""
        self._note(status)
        head = [(b"content-type", content_type.encode("latin-1")), (b"cache-control", b"no-cache"), *self._headers()]
        await self._send({"type": "http.response.start", "status": status, "headers": head})

    async def piece(self, data: bytes) -> None:
        """More of a stream."""
        self._keep(data)
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self, data: bytes) -> None:
        """The end of a stream."""
        self._keep(data)
        await self._send({"type": "http.response.body", "body": data, "more_body": False})

    async def refuse(self, refusal: Refusal) -> None:
        """Say that there is no answer, or no more of it: a stream that has begun ends with an event that says so."""
        if not self._started:
            self._note(refusal.status)
            await send_refusal(self._send, refusal, self._headers())
            return
        try:
            async with asyncio.timeout(_LAST_WORD_SECONDS):
                await self.end(refusal.event())
        except TimeoutError:
            _log.info("a client that does not read was left without its last event")

    def _headers(self) -> list[tuple[bytes, bytes]]:
        headers = [(b"x-request-id", self._exchange.id.encode())]
        if self._exchange.version:
            headers.append((VERSION_HEADER, self._exchange.version.encode()))
        return headers

    def _sureness(self) -> list[tuple[bytes, bytes]]:
        """How sure a closed answer is; none for others."""
        exchange = self._exchange
        if exchange.flagged is None:
            return []
        headers = [(REVIEW_HEADER, b"yes" if exchange.flagged else b"no")]
        shown = exchange.confidence if exchange.certainty is None else exchange.certainty
        if shown is not None:
            headers.append((CONFIDENCE_HEADER, b"%.4f" % shown))
        return headers

    def _note(self, status: int) -> None:
        self._started = True
        self._exchange.status = status

    def _keep(self, data: bytes) -> None:
        exchange = self._exchange
        if exchange.keep and exchange.logged < _LOGGED_BYTES:
            exchange.answer.append(data)
            exchange.logged += len(data)


async def _watch(receive: Receive, exchange: Exchange) -> None:
    """End a request whose client has left: its engine has others to answer."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            if exchange.task is not None:
                exchange.cut = ClientGoneError()
                exchange.task.cancel()
            return


def bearer(headers: list[tuple[bytes, bytes]]) -> str | None:
    """The key of an `Authorization: Bearer` header; None for none."""
    for name, value in headers:
        if name == b"authorization":
            scheme, _, key = value.decode("latin-1").partition(" ")
            return key.strip() if scheme.lower() == "bearer" else None
    return None


def _no_key(message: str) -> Refusal:
    return Refusal(401, message, reason="invalid_api_key")


def _engine_failed(label: str, why: str) -> Refusal:
    return Refusal(
        502, f"The engine of {label} failed: {why}. Try again.",
        reason="engine_failed", kind="server_error", retry_after=_ENGINE_AGAIN_SECONDS,
    )  # fmt: skip


def _defect(request: str) -> Refusal:
    return Refusal(
        500, f"The gateway failed. Its log has more on request {request}.", reason="defect", kind="server_error"
    )


def _message(body: bytes) -> str:
    """What an engine says of its failure."""
    try:
        record = orjson.loads(body)
        text = str(record["error"]["message"] if isinstance(record["error"], dict) else record["error"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        text = body.decode("utf-8", "replace")
    return " ".join(text.split())[:_EXCERPT]


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            given = value.decode("latin-1")
            if _REQUEST_ID.fullmatch(given):
                return str(given)
            break
    return uuid.uuid4().hex


def _added(exchange: Exchange, now: float) -> float | None:
    """Seconds that the gateway took itself: before the request went out, and after the last byte had come."""
    if exchange.began is None or exchange.sent is None or exchange.last is None:
        return None
    return (exchange.sent - exchange.began - exchange.waited) + (now - exchange.last)


def _asked(exchange: Exchange, now: float) -> Asked:
    began = exchange.began if exchange.began is not None else now
    return Asked(
        at=exchange.at, id=exchange.id, name=exchange.asked, version=exchange.version, key=exchange.key,
        path=exchange.path, status=exchange.status, stream=exchange.body.get("stream") is True, seconds=now - began,
        first_byte=exchange.first - began if exchange.first is not None else None, body=exchange.body,
        answer=exchange.answer, error=exchange.error, canary=exchange.canary, confidence=exchange.confidence,
        certainty=exchange.certainty, flagged=exchange.flagged,
    )  # fmt: skip
