"""Answers that are put aside for people, and `/admin/reviews`, where they are fetched."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
from prometheus_client import Counter
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry
from pydantic import Field, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tasks.contracts.errors import StoreError
from tasks.contracts.openai_chat import as_protocol
from tasks.contracts.review import ReviewItem, ReviewReason, SpoolSpec
from tasks.contracts.rows import as_conversation
from tasks.contracts.serving import LimitSpec, VersionRef
from tasks.contracts.spec import Frozen
from tasks.serving.books import Books
from tasks.serving.gateway.public import Exchange
from tasks.serving.gateway.receive import read_body
from tasks.serving.gateway.refusal import Refusal
from tasks.serving.keys import ADMIN
from tasks.serving.request_log import Mask, read_answer
from tasks.serving.review.spool import SPOOL_FILE, Spool

_CHAT = "/v1/chat/completions"
_MOST = 100_000  # items that are fetched at once
_ITEMS = 500
_OK = 200


class Taken(Frozen):
    """Items that have reached a queue."""

    ids: tuple[str, ...] = Field(max_length=_MOST)


class Reviews:
    """Follows the requests of one gateway.

    Put aside are chats that were answered in full: a share by a hash of the request's id, and of the others
    those that are flagged. Bare completions have no conversation that a row could be made of, and are left out. So are
    a rollout's questions: they are golden items, of which nobody may make rows.
    """

    def __init__(self, spool: Spool, books: Books) -> None:
        self._spool, self._books = spool, books

    # -- requests ---------------------------------------------------------------------------------------------------

    def wants(self, exchange: Exchange) -> bool:
        """Whether it may be put aside; which ones are flagged is known only once they are answered."""
        return self._is_a_request(exchange)

    def ended(self, exchange: Exchange) -> None:
        """Put it aside, if a person is to see it. What takes time is left to the spool's thread."""
        if not self._is_a_request(exchange) or exchange.status != _OK or exchange.error:
            return
        if drawn(exchange.id, self._spool.spec.sample):  # first: the sample is to stand for all answers
            reason = ReviewReason.SAMPLED
        elif exchange.flagged:
            reason = ReviewReason.FLAGGED
        else:
            return
        version = self._version(exchange.name, exchange.version)
        self._spool.put(lambda: item_of(exchange, version, reason))

    @staticmethod
    def _is_a_request(exchange: Exchange) -> bool:
        return exchange.path == _CHAT and exchange.key != ADMIN

    def _version(self, name: str, label: str) -> VersionRef | None:
        traffic = self._books.traffic(name)
        if traffic is None:
            return None
        trial = traffic.canary.version if traffic.canary is not None else None
        known = (traffic.live, traffic.previous, trial)
        return next((one for one in known if one is not None and one.label == label), None)

    # -- /admin/reviews ---------------------------------------------------------------------------------------------

    def routes(self, check_key: Callable[[Request], None], limits: LimitSpec) -> list[Route]:
        """Its routes; `check_key` lets in who may."""

        def guarded(handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
            async def checked(request: Request) -> Response:
                check_key(request)
                try:
                    return await handler(request)
                except StoreError as error:
                    raise _refused(507, f"{error.what.rstrip('.')}. To fix: {error.fix}.") from error

            return checked

        async def taken(request: Request) -> Response:
            raw = await read_body(request.scope, request.receive, limits)
            try:
                asked = Taken.model_validate_json(raw)
            except ValidationError as error:
                raise _refused(400, f"`ids` must name items, {_MOST:,} at most.") from error
            gone = await asyncio.to_thread(self._spool.take, request.path_params["name"], asked.ids)
            return _json({"taken": gone})

        return [
            Route("/admin/reviews/{name}", guarded(self._waiting), methods=["GET"]),
            Route("/admin/reviews/{name}/taken", guarded(taken), methods=["POST"]),
        ]

    async def _waiting(self, request: Request) -> Response:
        text = request.query_params.get("limit", str(_ITEMS))
        limit = int(text) if text.isascii() and text.isdigit() else 0
        if not 1 <= limit <= _MOST:
            raise _refused(400, f"`limit` is a number of items, {_MOST:,} at most.")
        items = await asyncio.to_thread(self._spool.items, request.path_params["name"], limit)
        return _json([item.model_dump(mode="json") for item in items])


def drawn(request: str, share: float) -> bool:
    """Whether a request is in the share that is reviewed whatever its confidence; the same one always is or never is.

    Not the draw of the request log: the two shares must not be the same requests.
    """
    return zlib.crc32(b"review:" + request.encode()) < share * 2**32


def item_of(exchange: Exchange, version: VersionRef | None, reason: ReviewReason) -> ReviewItem | None:
    """The item of a request that has been answered; None where the answer's bytes say nothing.

    Args:
        exchange: the request.
        version: that answered; None where the gateway has forgotten it, and then nothing is known of its choices.
        reason: why it is put aside.
    """
    answer = read_answer(exchange.answer, stream=exchange.body.get("stream") is True)
    messages = exchange.body.get("messages")
    if answer.error or not answer.text or not isinstance(messages, list):
        return None
    return ReviewItem(
        id=exchange.id, name=exchange.name, version=exchange.version, at=datetime.fromtimestamp(exchange.at, UTC),
        reason=reason, messages=tuple(without_prefix(messages, version)), answer=answer.text,
        confidence=exchange.certainty if exchange.certainty is not None else exchange.confidence,
        choices=version.decoding.choices if version is not None else (),
    )  # fmt: skip


def without_prefix(messages: Sequence[Mapping[str, Any]], version: VersionRef | None) -> list[dict[str, Any]]:
    """A client's messages without the version's own instruction and worked examples, which every row has anyway."""
    turns = [dict(one) for one in messages]
    if version is None:
        return turns
    prefix = [as_protocol(turn) for turn in as_conversation(version.prompt.prefix())]
    for length in (len(prefix), 1):
        if len(turns) > length and turns[:length] == prefix[:length]:
            return turns[length:]
    return turns


def open_spool(spec: SpoolSpec | None, folder: Path, *, mask: Mask | None, registry: CollectorRegistry) -> Spool | None:
    """The gateway's spool, counted in its metrics; None where nothing is put aside.

    Args:
        spec: what is put aside.
        folder: the gateway's own.
        mask: see `Spool`.
        registry: of the gateway's metrics.

    Raises:
        SpecError: it is to be masked, and `mask` is None.
    """
    if spec is None:
        return None
    dropped = Counter(
        "goldgate_review_dropped", "Answers that were to be put aside for people and are not.", ["reason"],
        registry=registry,
    )  # fmt: skip
    spool = Spool(
        folder / SPOOL_FILE, spec, mask=mask, dropped=lambda reason, count: dropped.labels(reason).inc(count)
    )  # fmt: skip
    registry.register(_Waiting(spool))
    return spool


class _Waiting(Collector):
    """Prometheus' client asks for a class of its own."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool

    def collect(self) -> Iterator[Metric]:
        """The numbers as they are now."""
        waiting = GaugeMetricFamily(
            "goldgate_review_waiting", "Answers that wait to be sent to people.", labels=["name"]
        )  # fmt: skip
        for name, count in self._spool.waiting().items():
            waiting.add_metric([name], float(count))
        yield waiting


def _refused(status: int, message: str) -> Refusal:
    return Refusal(status, message, reason="store" if status == 507 else "spec", kind="goldgate")


def _json(value: Any) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")
