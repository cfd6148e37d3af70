"""Reading requests from clients that send too much or too slowly."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import orjson
from uvicorn.protocols.http.h11_impl import H11Protocol

from tasks.contracts.serving import LimitSpec
from tasks.serving.gateway.refusal import Receive, Refusal, Scope

_READ_AWAY = 64_000_000  # bytes of a request that is refused for its length
_LINGER_SECONDS = 2.0


class ClientGoneError(Exception):
    """The client has closed the connection; there is nobody to answer."""


async def read_body(scope: Scope, receive: Receive, limits: LimitSpec) -> bytes:
    """The whole body of a request.

    A body that is too long is read away without being kept, so that the client, who is still sending, gets to see the
    answer; one that waits to be told to go on is told no at once.

    Raises:
        Refusal: it is too long (413) or comes too slowly (408).
        ClientGoneError: the client has left.
    """
    length, waits = _announced(scope)
    if length > limits.max_body_bytes and (waits or length > _READ_AWAY):
        raise _too_long(limits)
    pieces: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(limits.receive_seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                piece = message.get("body", b"")
                size += len(piece)
                if size <= limits.max_body_bytes:
                    pieces.append(piece)
                elif size > _READ_AWAY:
                    raise _too_long(limits)
                if not message.get("more_body", False):
                    break
    except TimeoutError:
        if size > limits.max_body_bytes:
            raise _too_long(limits) from None
        raise Refusal(
            408,
            f"The request was not sent within {limits.receive_seconds:g} seconds. Send it again, faster.",
            reason="request_timeout",
            close=True,
        ) from None
    if size > limits.max_body_bytes:
        raise _too_long(limits)
    return b"".join(pieces) if len(pieces) > 1 else pieces[0]


def read_json(body: bytes) -> dict[str, Any]:
    """The body as a JSON object.

    Raises:
        Refusal: it is none (400).
    """
    try:
        record = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Refusal(400, f"The request is not JSON: {error}", reason="invalid_json") from None
    if not isinstance(record, dict):
        raise Refusal(400, "The request must be a JSON object.", reason="invalid_json")
    return record


def _announced(scope: Scope) -> tuple[int, bool]:
    """The length that the client says its body has, 0 where it does not; and whether it waits for `100 Continue`."""
    length, waits = 0, False
    for name, value in scope["headers"]:
        if name == b"content-length":
            length = int(value) if value.isdigit() else 0
        elif name == b"expect":
            waits = value.lower() == b"100-continue"
    return length, waits


def _too_long(limits: LimitSpec) -> Refusal:
    return Refusal(
        413,
        f"The request is longer than {limits.max_body_bytes:,} bytes, which is the most that is taken.",
        reason="request_too_large",
        close=True,
    )


class PatientProtocol(asyncio.Protocol):
    """uvicorn's HTTP protocol, with two things that it lacks.

    The head of a request has to come within a limit. And a client that is still sending when its connection is closed
    gets to read the answer: closing at once would reset the connection, and the answer with it.

    Args:
        seconds: the limit.
        make: makes uvicorn's protocol.
    """

    def __init__(self, seconds: float, make: Callable[[], H11Protocol]) -> None:
        self._seconds, self._http = seconds, make()
        self._timer: asyncio.TimerHandle | None = None
        self._seen: object = None  # the request that was begun last
        self._transport: LingeringTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has come; its first request has to follow."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101  # TCP
        self._transport = LingeringTransport(transport, self._is_sending)
        self._http.connection_made(cast(asyncio.Transport, self._transport))
        self._timer = self._http.loop.call_later(self._seconds, self._too_slow)

    def data_received(self, data: bytes) -> None:
        """Bytes have come: of a head, or of a body."""
        if self._transport is None or self._transport.is_closing():
            return
        cycle = self._http.cycle
        if self._timer is None and (cycle is None or cycle.response_complete):
            self._timer = self._http.loop.call_later(self._seconds, self._too_slow)  # the next request on it begins
        self._http.data_received(data)
        if self._http.cycle is not self._seen:
            self._seen = self._http.cycle
            self._stop()

    def eof_received(self) -> None:
        """The client sends no more."""
        self._http.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        self._stop()
        if self._transport is not None:
            self._transport.lost()
        self._http.connection_lost(exc)

    def pause_writing(self) -> None:
        """The client reads too slowly."""
        self._http.pause_writing()

    def resume_writing(self) -> None:
        """It has caught up."""
        self._http.resume_writing()

    def _is_sending(self) -> bool:
        """Whether a request has not come to its end."""
        cycle = self._http.cycle
        return self._seen is None or bool(self._http.conn.trailing_data[0]) or (cycle is not None and cycle.more_body)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        if self._transport is None or self._http.cycle is not self._seen or self._transport.is_closing():
            return
        if self._seen is None or self._http.conn.trailing_data[0]:  # else these were the rest of a refused body
            body = Refusal(
                408, f"The head of the request was not sent within {self._seconds:g} seconds.", reason="request_timeout"
            ).body()
            head = b"HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\ncontent-length: %d\r\n" % len(
                body
            )
            self._transport.write(head + b"connection: close\r\n\r\n" + body)
        self._transport.close()


class LingeringTransport:
    """A connection that, closed while the client is sending, first only says that it is closed, and reads on.

    Args:
        transport: the connection.
        is_sending: whether the client has begun something that has not come to its end.
    """

    def __init__(self, transport: asyncio.Transport, is_sending: Callable[[], bool]) -> None:
        self._transport, self._is_sending = transport, is_sending
        self._timer: asyncio.TimerHandle | None = None

    def __getattr__(self, name: str) -> Any:
        """All else is the connection's own."""
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        """Whether nothing more is answered on it."""
        return self._timer is not None or self._transport.is_closing()

    def close(self) -> None:
        """Close it, at once or soon."""
        if self.is_closing():
            return
        if not (self._transport.can_write_eof() and self._is_sending()):
            self._transport.close()
            return
        self._timer = asyncio.get_running_loop().call_later(_LINGER_SECONDS, self._transport.close)
        self._transport.write_eof()
        self._transport.resume_reading()

    def lost(self) -> None:
        """It is closed."""
        if self._timer is not None:
            self._timer.cancel()
