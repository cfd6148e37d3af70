"""One request to a teacher (`POST /v1/chat/completions`), and every way in which its answer can be none."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from types import TracebackType
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit

import httpx

from tasks.contracts.errors import ServiceError, SpecError
from tasks.contracts.rows import Message
from tasks.contracts.synthesis import TeacherSpec
from tasks.data.synthesis.journal import Reply
from tasks.data.synthesis.purse import Cost
from tasks.store import canonical, digest_bytes

API_KEY = "GOLDGATE_TEACHER_KEY"
KEPT = "what was paid for is kept, and the same command goes on from it"

_MOST_BYTES = 4 * 2**20  # of one answer: 65,536 tokens of a dozen bytes, and as much again around them
_EXCERPT = 200  # characters of a server's answer that an error shows
_SHORTEST_SECRET = 8  # a shorter key is a placeholder ("EMPTY", "none"), and may well be a word of an answer
# A token of a byte-level vocabulary is a byte at least, so a prompt has no more tokens than bytes; what a chat template
# adds to them is far below this.
_TEMPLATE_TOKENS = 256
_TEMPLATE_TOKENS_OF_TURN = 16
_LOCAL = ("127.0.0.1", "localhost", "::1")


class Clock(NamedTuple):
    """How waiting is done; tests bring their own."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep


class Ask(NamedTuple):
    """Something to ask a teacher.

    Attributes:
        messages: the conversation.
        schema: the JSON Schema that the answer should fit.
        temperature: how freely it answers.
        draw: numbers repetitions of the same question; each is a request of its own.
    """

    messages: tuple[Message, ...]
    schema: Mapping[str, Any]
    temperature: float
    draw: int = 0


class Request(NamedTuple):
    """A question as it is sent.

    Attributes:
        digest: sha256 over server, model and body: the same question is the same request.
        body: what is posted.
        most: the most that it can cost.
    """

    digest: str
    body: dict[str, Any]
    most: Cost


class NoReply(NamedTuple):
    """An attempt that brought nothing.

    Attributes:
        reason: what happened.
        fix: what a person can do if it goes on.
        again: whether another attempt may help.
        busy: the server said that it is busy: attempts at it do not count, waiting does.
        wait: seconds that the server asks to wait.
        maybe_paid: the server may have written an answer, and charged for it.
    """

    reason: str
    fix: str
    again: bool = True
    busy: bool = False
    wait: float = 0.0
    maybe_paid: bool = False


class Teacher:
    """A model behind a server. The key goes into the header of requests and nowhere else."""

    def __init__(self, spec: TeacherSpec, key: str | None = None) -> None:
        """Prepare to ask; nothing is sent yet.

        Raises:
            SpecError: the key can be in no header. Said here, since the HTTP library would show it.
        """
        key = key.strip() if key is not None else None
        if key is not None and not (key.isascii() and key.isprintable()):
            raise SpecError(
                "The teacher's key holds characters that no key has.",
                where=f"the environment's {API_KEY}, or the block of `teacher.key_block`",
                fix="set it again; it is one line of printable ASCII",
            )
        self._spec = spec
        self._key = key
        self.root = api_root(spec.url)
        self._client = httpx.AsyncClient(
            # The whole of an answer has a limit of its own (`attempt`); an idle connection must not outlast it.
            timeout=httpx.Timeout(spec.timeout_seconds, connect=min(10.0, spec.timeout_seconds)),
            limits=httpx.Limits(max_connections=spec.concurrency),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            # A proxy of the environment must not come between this machine and itself.
            trust_env=urlsplit(self.root).hostname not in _LOCAL,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    def prepare(self, ask: Ask) -> Request:
        """The request for a question; the same in every run of the same specification."""
        body: dict[str, Any] = {
            "model": self._spec.model,
            "messages": [message.as_chat() for message in ask.messages],
            "temperature": ask.temperature,
            "max_tokens": self._spec.max_tokens,
        }
        if self._spec.structured:
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": dict(ask.schema)},
            }
        digest = digest_bytes(canonical({"server": self.root, "body": body, "draw": ask.draw}).encode())
        body["seed"] = int(digest[:7], 16)
        prompt_bytes = sum(len(message.content.encode()) + _TEMPLATE_TOKENS_OF_TURN for message in ask.messages)
        schema_bytes = len(json.dumps(dict(ask.schema)).encode())  # some servers write it into the prompt
        most = Cost(1, prompt_bytes + schema_bytes + _TEMPLATE_TOKENS, self._spec.max_tokens)
        return Request(digest, body, most)

    async def attempt(self, request: Request) -> Reply | NoReply:
        """Send a request once.

        Raises:
            ServiceError: the server refuses whatever is asked (access, address, model).
            SpecError: the address cannot be used.
        """
        limit = self._spec.timeout_seconds
        late = NoReply(
            f"no whole answer within {limit:g} s",
            "raise `teacher.timeout_seconds`, or lower `teacher.concurrency` or `teacher.max_tokens`",
            maybe_paid=True,
        )
        try:
            async with (
                asyncio.timeout(limit),
                self._client.stream("POST", f"{self.root}/chat/completions", json=request.body) as response,
            ):
                body = bytearray()
                async for piece in response.aiter_bytes():
                    body += piece
                    if len(body) > _MOST_BYTES:
                        return NoReply(
                            f"an answer of more than {_MOST_BYTES // 2**20} MB, cut off",
                            "check what runs at this address",
                            maybe_paid=True,
                        )
        except httpx.ConnectTimeout:
            return NoReply("no connection in time", "check that the server runs and can be reached")
        except (TimeoutError, httpx.TimeoutException):
            return late
        except httpx.ConnectError as error:
            return NoReply(f"no connection: {error}", "check that the server runs and can be reached")
        except httpx.HTTPError as error:
            what = self._excerpt(str(error) or type(error).__name__)
            return NoReply(f"the connection broke: {what}", "check the server's log", maybe_paid=True)
        except (httpx.InvalidURL, UnicodeError, ValueError) as error:
            raise SpecError(
                f"This is no address of a server: {error}", where=f"teacher.url {self.root}", fix="correct it"
            ) from error
        text = body.decode("utf-8", errors="replace")
        return self._read(response, self._without_key(text), request)

    def _read(self, response: httpx.Response, text: str, request: Request) -> Reply | NoReply:
        status = response.status_code
        shown = self._excerpt(text)
        if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
            return NoReply(
                f"it is busy (HTTP {status}): {shown}",
                "wait, lower `teacher.concurrency`, or raise `teacher.patience_seconds`",
                busy=True,
                wait=_seconds(response.headers.get("Retry-After")),
            )
        if response.is_server_error or status == HTTPStatus.REQUEST_TIMEOUT:
            return NoReply(f"HTTP {status}: {shown}", "check the server's log")
        if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.PAYMENT_REQUIRED, HTTPStatus.FORBIDDEN):
            missing = "" if self._key else " (it is not set)"
            raise self._refused(
                f"The teacher refuses access (HTTP {status}).",
                f"set the environment's {API_KEY}{missing} or `teacher.key_block` to a key that it takes; {KEPT}",
            )
        if status == HTTPStatus.NOT_FOUND:
            raise self._refused(
                f"The teacher does not know the path or the model {self._spec.model!r} (HTTP 404): {shown}",
                "correct `teacher.url` (often it ends in /v1) or `teacher.model`",
            )
        if response.is_redirect:
            raise self._refused(
                f"The teacher's address sends elsewhere (HTTP {status}).", "set `teacher.url` to the final address"
            )
        if not response.is_success:
            return NoReply(
                f"it refuses the request (HTTP {status}): {shown}",
                "check `teacher.model` and its context length; set `teacher.structured: false` for a server that does "
                "not know `response_format`",
                again=False,
            )
        if "html" in response.headers.get("Content-Type", "") or text.lstrip()[:1] == "<":
            return NoReply(
                f"a web page in place of JSON (HTTP {status})",
                "give the base URL of an OpenAI-compatible API (often it ends in /v1)",
            )
        return self._reply(text, request)

    def _reply(self, text: str, request: Request) -> Reply | NoReply:
        def strange(what: str) -> NoReply:
            return NoReply(
                f"an answer that {what}: {self._excerpt(text)}",
                "check that an OpenAI-compatible server runs at this address",
                maybe_paid=True,
            )

        try:
            record = json.loads(text)
        except (ValueError, RecursionError):
            return strange("is no JSON")
        try:
            choice = record["choices"][0]
            content = choice["message"].get("content")
            finish = choice.get("finish_reason")
        except (KeyError, IndexError, TypeError, AttributeError):
            return strange("holds no choice")
        if content is not None and not isinstance(content, str):
            return strange("holds no text")
        usage = record["usage"] if isinstance(record.get("usage"), dict) else {}
        prompt, completion = _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))
        measured = prompt is not None and completion is not None
        most = request.most
        # Half a surrogate pair has no UTF-8, and no journal could keep it.
        whole = (content or "").encode("utf-8", errors="replace").decode()
        return Reply(
            whole,
            finish if isinstance(finish, str) else "",
            most.prompt_tokens if prompt is None or not measured else prompt,
            most.completion_tokens if completion is None or not measured else completion,
            measured,
        )

    def _refused(self, what: str, fix: str) -> ServiceError:
        return ServiceError(what, where=self.root, fix=fix)

    def _without_key(self, text: str) -> str:
        """What a server answers is kept, and a careless one repeats the key."""
        if self._key is None or len(self._key) < _SHORTEST_SECRET:
            return text
        return text.replace(self._key, "***")

    def _excerpt(self, text: str) -> str:
        shown = " ".join(self._without_key(text).split())
        return shown if len(shown) <= _EXCERPT else f"{shown[:_EXCERPT]}…"


def api_root(url: str) -> str:
    """The address below which `/chat/completions` is: `/v1` is added if no version is named."""
    parts = urlsplit(url)
    root = f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/")
    return root if re.search(r"/v\d+[a-z]*(/|$)", parts.path) else f"{root}/v1"


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _seconds(retry_after: str | None) -> float:
    """Seconds that a Retry-After header asks for, as a number or as a date; 0 where it says nothing."""
    if not retry_after:
        return 0.0
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return 0.0
