"""A share of the requests, asked of another version or of a vendor as well, when their callers have their answers.

Nothing here is awaited by a caller's request: what does not fit into a short queue is dropped and counted, and a shadow
that hangs, fails or talks rubbish holds up none but the few workers that ask it.
"""

from __future__ import annotations

import asyncio
import logging
import re
import shutil
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

import aiohttp
import orjson
from prometheus_client import Counter

from tasks.contracts.errors import SpecError, StoreError
from tasks.contracts.review import ReviewItem, ReviewReason
from tasks.contracts.serving import Shadow, VersionRef
from tasks.serving.books import Books
from tasks.serving.canary import in_canary
from tasks.serving.durable import write_durably
from tasks.serving.gateway.as_calls import calls_request
from tasks.serving.gateway.as_evaluated import left_open
from tasks.serving.gateway.engines import Engines
from tasks.serving.gateway.public import Exchange
from tasks.serving.gateway.reviews import item_of
from tasks.serving.gateway.splits import key_of, latency_ms
from tasks.serving.metrics import Metrics
from tasks.serving.request_log import FLUSH_SECONDS, Answer, Mask, ParquetSink, RowWriter, read_answer
from tasks.serving.shadow_pairs import (
    RECORD_FILE,
    Pair,
    ShadowRecord,
    agree,
    pair_row,
    pair_schema,
    vendor_body,
    vendor_cost,
)

VENDOR_KEY = "GOLDGATE_VENDOR_KEY"  # environment

_QUEUE = 200  # requests that wait to be asked again
_AT_A_TIME = 4
_SECONDS = 60.0  # for an answer of the shadow
_PRUNE_SECONDS = 3600.0
_CONNECT_SECONDS = 5.0
_MOST_BYTES = 1_000_000  # of an answer, on both sides
_CHAT = "/v1/chat/completions"
_OWN_FIELDS = ("stream", "stream_options", "n", "logprobs", "top_logprobs")  # of the caller; the shadow answers whole
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_log = logging.getLogger(__name__)


class Spooling(Protocol):
    """Who puts answers aside for people."""

    def put(self, item: ReviewItem | Callable[[], ReviewItem | None]) -> None:
        """Put one aside, or what makes it; never waits and never raises."""


class _Job(NamedTuple):
    """A request whose caller has its answer."""

    shadow: Shadow
    live: VersionRef
    exchange: Exchange


class _Reply(NamedTuple):
    """What came of asking the shadow."""

    data: bytes
    milliseconds: float | None
    error: str = ""


class Shadowing:
    """Asks shadows and keeps what comes of it. Lives in the gateway's event loop, but for `check` and `note`."""

    def __init__(
        self,
        engines: Engines,
        books: Books,
        metrics: Metrics,
        *,
        mask: Mask | None,
        unmasked: bool = False,
        keep_days: float = 30.0,
        fill_in: bool = True,
        vendor_key: str | None = None,
        spool: Spooling | None = None,
        at_a_time: int = _AT_A_TIME,
        seconds: float = _SECONDS,
        queue_size: int = _QUEUE,
        flush_seconds: float = FLUSH_SECONDS,
    ) -> None:
        """Prepare to ask.

        Args:
            engines: where versions answer.
            books: which shadow a name has.
            metrics: where it counts.
            mask: takes what is private out of answers before they are written; called in a thread.
            unmasked: whether a person wants nothing masked.
            keep_days: how long pairs are kept.
            fill_in: whether the gateway fills in what chats leave open.
            vendor_key: for a vendor's service.
            spool: where disagreements wait for a person; None for nowhere.
            at_a_time: requests that the shadow is asked at a time.
            seconds: longest time for an answer of it.
            queue_size: requests that wait to be asked.
            flush_seconds: how long a pair may wait to be written.
        """
        self._engines, self._books, self._spool = engines, books, spool
        self._mask, self._unmasked, self._keep_days, self._fill_in = mask, unmasked, keep_days, fill_in
        self._vendor_key, self._at_a_time, self._seconds = vendor_key, at_a_time, seconds
        self._flush_seconds = flush_seconds
        self._folder = books.folder / "shadow"
        self._queue: asyncio.Queue[_Job] = asyncio.Queue(queue_size)
        self._writers: dict[str, RowWriter[Pair]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._asked = Counter(
            "goldgate_shadow_requests", "Requests that a shadow was asked too, by what came of it.",
            ["name", "outcome"], registry=metrics.registry,
        )  # fmt: skip
        self._dropped = Counter(
            "goldgate_shadow_dropped", "Requests that were drawn for a shadow and are in no comparison.", ["reason"],
            registry=metrics.registry,
        )  # fmt: skip

    # -- for each request ---------------------------------------------------------------------------------------

    def wants(self, exchange: Exchange) -> bool:
        """Whether the request is drawn, by a hash of its id."""
        traffic = self._books.traffic(exchange.name)
        shadow = traffic.shadow if traffic is not None else None
        if shadow is None or traffic is None or exchange.asked != traffic.name:
            return False
        if shadow.vendor is not None and exchange.path != _CHAT:
            return False
        return in_canary(exchange.id, shadow.id, shadow.spec.share)

    def ended(self, exchange: Exchange) -> None:
        """Have the shadow asked what the live version has answered."""
        if exchange.status != 200 or exchange.reason or not exchange.answer or not self.wants(exchange):
            return
        traffic = self._books.traffic(exchange.name)
        if traffic is None or traffic.shadow is None or exchange.version != traffic.live.label:
            return  # a canary's answer, or one of before a switch
        if exchange.body.get("n") not in (None, 1):
            self._dropped.labels("several_answers").inc()
            return
        if exchange.logged >= _MOST_BYTES:
            self._dropped.labels("too_long").inc()
            return
        job = _Job(traffic.shadow, traffic.live, exchange)
        try:
            self._queue.put_nowait(job)
        except asyncio.QueueFull:
            self._dropped.labels("queue_full").inc()

    # -- for `/admin` -------------------------------------------------------------------------------------------

    def check(self, shadow: Shadow) -> None:
        """Refuse a shadow that this gateway could not ask, or should not.

        Raises:
            SpecError: says why.
        """
        if _ID.fullmatch(shadow.id) is None:
            raise SpecError("The id of a shadow is letters, digits, - and _.", where=shadow.id[:80], fix="change it")
        if self._mask is None and not self._unmasked:
            raise SpecError(
                "What a shadow answers is to be masked, and this gateway was given nothing that masks.",
                where="log.mask",
                fix="set the gateway's log.mask to false if nothing private is asked, or log.to to parquet",
            )
        if shadow.vendor is None:
            return
        parts = urlsplit(shadow.vendor.url)
        if "@" in parts.netloc:
            raise SpecError(
                "The vendor's address holds a user or password; addresses are shown in the clear.",
                where="vendor.url",
                fix=f"take it out and set the gateway's {VENDOR_KEY}",
            )
        if parts.hostname in _LOOPBACK:
            return
        if parts.scheme != "https":
            raise SpecError(
                "Requests and a key would go to the vendor in the clear.", where=shadow.vendor.url, fix="use https"
            )
        if not self._vendor_key:
            raise SpecError(
                "The gateway has no key for the vendor.",
                where=VENDOR_KEY,
                fix="set it in the environment of `goldgate serve`, and start that again",
            )

    def note(self, live: VersionRef, shadow: Shadow) -> None:
        """Write down what is compared, beside where the pairs will lie.

        Args:
            live: the version that answers.
            shadow: what is compared with it.

        Raises:
            SpecError: there was a comparison with this id.
            StoreError: it cannot be written.
        """
        home = self._folder / shadow.id
        try:
            home.mkdir(parents=True)
            closed, tools = bool(live.decoding.choices), bool(live.prompt.tools)
            record = ShadowRecord(name=live.name, shadow=shadow, closed=closed, tools=tools)
            write_durably(home / RECORD_FILE, record.model_dump_json(indent=2))
        except FileExistsError as error:
            raise SpecError(
                "There was a comparison with this id, whose pairs stay as they are.",
                where=shadow.id,
                fix="give another",
            ) from error
        except OSError as error:
            raise StoreError(
                f"A comparison cannot be written down: {error.strerror}", where=str(home), fix="allow writing there"
            ) from error

    def forget(self, shadow: Shadow) -> None:
        """Take `note` back, for a shadow that did not begin."""
        shutil.rmtree(self._folder / shadow.id, ignore_errors=True)

    # -- asking -------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Ask, until the block ends; what waits then is let go."""
        timeout = aiohttp.ClientTimeout(total=self._seconds, sock_connect=_CONNECT_SECONDS)
        # Sessions of its own: a shadow that hangs must not hold connections that callers need.
        async with (
            aiohttp.ClientSession(timeout=timeout, cookie_jar=aiohttp.DummyCookieJar(), trust_env=False) as here,
            aiohttp.ClientSession(timeout=timeout, cookie_jar=aiohttp.DummyCookieJar(), trust_env=True) as outside,
        ):
            workers = [asyncio.create_task(self._work(here, outside)) for _ in range(self._at_a_time)]
            workers.append(asyncio.create_task(self._forget_old_pairs()))
            try:
                yield
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
                self._close_writers()
                await asyncio.gather(*self._closing, return_exceptions=True)

    async def _work(self, here: aiohttp.ClientSession, outside: aiohttp.ClientSession) -> None:
        while True:
            job = await self._queue.get()
            try:
                await self._compare(job, here, outside)
            except Exception:  # one request must not end the others
                _log.exception("a request could not be compared with its shadow")
                self._dropped.labels("defect").inc()

    async def _compare(self, job: _Job, here: aiohttp.ClientSession, outside: aiohttp.ClientSession) -> None:
        name, path = job.live.name, job.exchange.path
        traffic = self._books.traffic(name)
        if traffic is None or traffic.shadow is None or traffic.shadow.id != job.shadow.id:
            return  # it has ended
        version, vendor = job.shadow.version, job.shadow.vendor
        if version is not None:
            endpoint = self._engines.endpoint(version.engine)
            if endpoint is None:
                self._dropped.labels("not_ready").inc()
                return
            url, session = endpoint.url + path.removeprefix("/v1"), here
            key: str | None = endpoint.key
            body = self._as_evaluated(job, version) | {"model": endpoint.model or endpoint.label}
        elif vendor is not None:
            url, key, session = vendor.url.rstrip("/") + "/chat/completions", self._vendor_key, outside
            body = vendor_body(self._filled_in(job, job.live), vendor)
        else:
            return
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        reply = await _ask(session, url, orjson.dumps(body), headers)
        # Answers may be long, so they are read and compared in a thread.
        pair = await asyncio.to_thread(_paired, job, reply)
        outcome = "failed" if pair.agrees is None else "agreed" if pair.agrees else "disagreed"
        self._asked.labels(name, outcome).inc()
        self._writer(job.shadow.id).offer(pair)
        if pair.agrees is False and self._spool is not None:
            self._spool.put(lambda: _for_review(job, pair))

    def _filled_in(self, job: _Job, version: VersionRef) -> dict[str, Any]:
        body = {name: value for name, value in job.exchange.body.items() if name not in _OWN_FIELDS}
        return body | left_open(body, version, chat=self._fill_in and job.exchange.path == _CHAT)

    def _as_evaluated(self, job: _Job, version: VersionRef) -> dict[str, Any]:
        """The request as the gateway itself would put it to a version; calls come back as the model writes them."""
        body = self._filled_in(job, version)
        calls = calls_request(body, {}, version, chat=job.exchange.path == _CHAT)
        return body | dict(calls.fields) if calls is not None else body

    # -- writing ------------------------------------------------------------------------------------------------

    def _writer(self, shadow: str) -> RowWriter[Pair]:
        known = self._writers.get(shadow)
        if known is None:
            self._close_writers(but={one.shadow.id for one in self._books.all_traffic() if one.shadow is not None})
            known = self._writers[shadow] = RowWriter(
                "shadow's pairs", ParquetSink(self._folder / shadow, pair_schema), pair_row,
                keep_days=self._keep_days, mask=None if self._unmasked else self._mask,
                dropped=lambda reason, count: self._dropped.labels(reason).inc(count),
                flush_seconds=self._flush_seconds,
            )  # fmt: skip
        return known

    async def _forget_old_pairs(self) -> None:
        """Delete what is older than `keep_days`, of comparisons that have ended too: nobody else would."""
        while True:
            await asyncio.to_thread(self._prune)
            await asyncio.sleep(_PRUNE_SECONDS)

    def _prune(self) -> None:
        before = datetime.now(UTC) - timedelta(days=self._keep_days)
        for record in self._folder.glob(f"*/{RECORD_FILE}"):
            try:
                # The writer of a shadow has a thread of its own: its half-written file is not left over.
                ParquetSink(record.parent, pair_schema).prune(before, parts=False)
            except OSError as error:
                _log.error("old pairs of a shadow cannot be deleted: %s", error)

    def _close_writers(self, *, but: Collection[str] = ()) -> None:
        """Let go of the comparisons that have ended, without waiting for what they still write."""
        for shadow in [one for one in self._writers if one not in but]:
            closing = asyncio.create_task(asyncio.to_thread(self._writers.pop(shadow).close))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)


async def _ask(session: aiohttp.ClientSession, url: str, body: bytes, headers: Mapping[str, str]) -> _Reply:
    started = time.perf_counter()
    try:
        async with session.post(url, data=body, headers=headers, allow_redirects=False) as answer:
            data = bytearray()
            async for piece in answer.content.iter_any():
                data += piece
                if len(data) > _MOST_BYTES:
                    return _Reply(b"", None, "its answer is too long")
            if answer.status != 200:
                return _Reply(b"", None, f"HTTP {answer.status}")
    except TimeoutError:
        return _Reply(b"", None, "no answer in time")
    except (aiohttp.ClientError, OSError, ValueError) as error:
        return _Reply(b"", None, f"it cannot be reached ({type(error).__name__})")
    return _Reply(bytes(data), 1000 * (time.perf_counter() - started))


def _paired(job: _Job, reply: _Reply) -> Pair:
    exchange, vendor = job.exchange, job.shadow.vendor
    live = read_answer(exchange.answer, stream=exchange.body.get("stream") is True)
    closed, tools = _kind_of(job)
    error = reply.error or ("" if _is_answer(reply.data) else "what it said is no answer")
    answer = Answer("", None, None, None) if error else read_answer((reply.data,), stream=False)
    cost = vendor_cost(vendor, answer.prompt_tokens, answer.completion_tokens) if vendor is not None else None
    return Pair(
        at=exchange.at, id=exchange.id, key=_hashed(exchange.canary_key or key_of(exchange)), name=job.live.name,
        live=job.live.label, shadow=_label(job.shadow),
        agrees=None if error else agree(live.text, answer.text, closed=closed, tools=tools), live_answer=live.text,
        shadow_answer=answer.text, live_ms=latency_ms(exchange), shadow_ms=None if error else reply.milliseconds,
        shadow_cost=cost, prompt_tokens=answer.prompt_tokens, completion_tokens=answer.completion_tokens, error=error,
    )  # fmt: skip


def _label(shadow: Shadow) -> str:
    if shadow.version is not None:
        return shadow.version.label
    return shadow.vendor.model if shadow.vendor is not None else ""


def _kind_of(job: _Job) -> tuple[bool, bool]:
    """Whether the live version's answer is one of a few choices, and whether it may be calls."""
    asked = job.exchange.body.get("structured_outputs")
    closed = bool(job.live.decoding.choices) or (isinstance(asked, Mapping) and "choice" in asked)
    return closed, bool(job.live.prompt.tools) or "tools" in job.exchange.body


def _is_answer(data: bytes) -> bool:
    """Whether it has the shape of one; what an engine that is out of its mind says has not."""
    with suppress(orjson.JSONDecodeError, KeyError, IndexError, TypeError, AttributeError):
        choice = orjson.loads(data)["choices"][0]
        message = choice.get("message")
        return isinstance(choice.get("text"), str) or (isinstance(message, dict) and (
            isinstance(message.get("content"), str) or bool(message.get("tool_calls"))
        ))  # fmt: skip
    return False


def _for_review(job: _Job, pair: Pair) -> ReviewItem | None:
    """The item as a person sees it; None for what is no chat. Called in the spool's thread."""
    item = item_of(job.exchange, job.live, ReviewReason.DISAGREED)
    return item.model_copy(update={"other": pair.shadow_answer}) if item is not None else None


def _hashed(key: str) -> str:
    """A key that names nobody."""
    return sha256(key.encode()).hexdigest()[:16]
