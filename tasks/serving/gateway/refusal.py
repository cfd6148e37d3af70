"""What the gateway says in an engine's place, in the shape in which OpenAI's clients expect it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

import orjson

from tasks.contracts.serving import openai_error

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = Iterable[tuple[bytes, bytes]]

CLIENT_GONE = 499  # nobody reads it; it is for the log and the counts


class Refusal(Exception):  # noqa: N818  # an answer, not a defect
    """A request that is answered without an engine, or after one has failed.

    Args:
        status: HTTP status.
        message: what is wrong and what to do, for the client.
        reason: one word for the counts.
        kind: OpenAI's `type`.
        code: OpenAI's `code`.
        param: the field that it is about.
        retry_after: seconds after which it is worth trying again.
        close: whether the connection is of no more use.
        more: further fields of the body beside `error`.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        reason: str,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
        close: bool = False,
        more: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.reason = status, message, reason
        self.kind, self.code, self.param = kind, code or reason, param
        self.retry_after, self.close, self.more = retry_after, close, more or {}

    def body(self) -> bytes:
        """The answer's body, JSON."""
        error = openai_error(self.message, kind=self.kind, code=self.code, param=self.param)
        return orjson.dumps({**error, **self.more})

    def headers(self) -> list[tuple[bytes, bytes]]:
        """The headers that only it has."""
        found = []
        if self.retry_after is not None:
            found.append((b"retry-after", b"%d" % max(1, round(self.retry_after + 0.499))))
        if self.close:
            found.append((b"connection", b"close"))
        return found

    def event(self) -> bytes:
        """The last event of a stream that has begun already."""
        return b"data: " + self.body() + b"\n\n"


async def send_json(send: Send, status: int, body: bytes, headers: Headers = ()) -> None:
    """A whole answer that is JSON."""
    await send_bytes(send, status, body, b"application/json", headers)


async def send_bytes(send: Send, status: int, body: bytes, content_type: bytes, headers: Headers = ()) -> None:
    """A whole answer."""
    head = [(b"content-type", content_type), (b"content-length", b"%d" % len(body)), *headers]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})


async def send_refusal(send: Send, refusal: Refusal, headers: Headers = ()) -> None:
    """A refusal as a whole answer."""
    await send_json(send, refusal.status, refusal.body(), [*refusal.headers(), *headers])
