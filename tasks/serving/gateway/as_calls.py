"""Calls of tools, read out of what a model wrote and handed to clients as the protocol has them.

A version of a task with tools was evaluated with calls as its chat template writes them, read by
`tasks.contracts.calls`. vLLM reads calls with a parser for each family of templates, chosen by hand at its start, and
refuses requests without one; what such a parser finds may differ from what was counted as a call in the evaluation. So
the engine is asked for the bare text, as in the evaluation, and the calls are read here, by the same function.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from typing import Any, NamedTuple

import orjson

from tasks.contracts.calls import read_answer
from tasks.contracts.rows import Call
from tasks.contracts.serving import VersionRef

_CHUNK = "chat.completion.chunk"
_JSON, _STREAM = "application/json", "text/event-stream; charset=utf-8"
_WHOLE_ALONE = ("choices", "usage", "object")  # fields of a whole answer that events do not share


class CallsAsked(NamedTuple):
    """A request whose answer may call tools.

    Attributes:
        fields: what the engine is asked in place of what the client asks: always for a whole answer, since only the
            end of one says whether it calls.
        streams: whether the client gets events.
        with_usage: whether the last of them says what was used.
    """

    fields: Mapping[str, Any]
    streams: bool
    with_usage: bool

    def answer(self, body: bytes) -> tuple[str, bytes]:
        """An engine's whole answer as the client gets it, and of which type that is.

        What cannot be read passes as it is.
        """
        try:
            record = orjson.loads(body)
            found = {**record, "choices": [_with_calls(record["id"], choice) for choice in record["choices"]]}
        except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
            return _JSON, body
        if self.streams:
            return _STREAM, b"".join(_events(found, with_usage=self.with_usage))
        return _JSON, orjson.dumps(found)


def calls_request(
    body: Mapping[str, Any], filled_in: Mapping[str, Any], version: VersionRef, *, chat: bool
) -> CallsAsked | None:
    """The request as one whose calls are read here; None for any other, which goes to the engine as it is.

    Read are the calls of a version with tools, where the request has tools and leaves it to the model whether to call
    one. `tool_choice` "none" is the client's wish for bare text; "required" and named functions hold vLLM to a form of
    its own.

    Args:
        body: the client's request.
        filled_in: what replaces it or comes to it (`left_open`).
        version: that answers.
        chat: whether it is a chat.
    """
    asked = {**body, **filled_in}
    if not chat or not version.prompt.tools or not asked.get("tools"):
        return None
    if asked.get("tool_choice") not in (None, "auto"):
        return None
    # With "none" vLLM still shows the tools to the model; special tokens mark calls in some templates.
    fields: dict[str, Any] = {"tool_choice": "none", "skip_special_tokens": False}
    streams = asked.get("stream") is True
    options = asked.get("stream_options")
    if streams:
        fields |= {"stream": False, "stream_options": None}
    return CallsAsked(fields, streams, isinstance(options, Mapping) and options.get("include_usage") is True)


def _with_calls(answer: str, choice: Mapping[str, Any]) -> dict[str, Any]:
    """A choice whose message holds its calls, if its text is calls; else as it is."""
    message = choice["message"]
    text = message.get("content")
    calls = read_answer(text).calls if isinstance(text, str) else ()
    if not calls:
        return dict(choice)
    made = list(_as_protocol(f"{answer} {choice.get('index', 0)}", calls))
    # What was cut off at the longest length stays so: a further call may be missing.
    reason = "tool_calls" if choice.get("finish_reason") == "stop" else choice.get("finish_reason")
    return {**choice, "message": {**message, "content": None, "tool_calls": made}, "finish_reason": reason}


def _as_protocol(answer: str, calls: Iterable[Call]) -> Iterator[dict[str, Any]]:
    for number, call in enumerate(calls):
        name = sha256(f"{answer} {number}".encode()).hexdigest()[:24]
        yield {
            "id": f"call_{name}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }


def _events(record: Mapping[str, Any], *, with_usage: bool) -> Iterator[bytes]:
    """A whole answer as a stream: for each choice its role, all that it says, and its end."""
    head = {name: value for name, value in record.items() if name not in _WHOLE_ALONE} | {"object": _CHUNK}
    if with_usage:
        head["usage"] = None
    for choice in record["choices"]:
        index, message = choice.get("index", 0), choice["message"]
        said: dict[str, Any] = {"content": message.get("content") or ""}
        if message.get("tool_calls"):
            said = {"tool_calls": [{"index": place, **call} for place, call in enumerate(message["tool_calls"])]}
        yield _event({**head, "choices": [_part(index, {"role": "assistant", "content": ""})]})
        yield _event({**head, "choices": [_part(index, said) | {"logprobs": choice.get("logprobs")}]})
        yield _event({**head, "choices": [_part(index, {}) | {"finish_reason": choice.get("finish_reason")}]})
    if with_usage:
        yield _event({**head, "choices": [], "usage": record.get("usage")})
    yield b"data: [DONE]\n\n"


def _part(index: int, delta: Mapping[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _event(record: Mapping[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(record) + b"\n\n"
