"""Calls that a served model has written, as clients get them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tasks.contracts.calls import read_tools
from tasks.contracts.openai_chat import said
from tasks.contracts.prompt import Decoding, Prompt
from tasks.contracts.serving import VersionRef
from tasks.serving.gateway.as_calls import CallsAsked, calls_request
from tests.serving.records import version

_TOOL = {"name": "refund", "parameters": {"type": "object", "properties": {"order": {"type": "integer"}}}}
TOOLS = [{"type": "function", "function": _TOOL}]
PLAIN = version(7)
CALLING: VersionRef = PLAIN.model_copy(
    update={
        "prompt": Prompt(system="Help.", tools=read_tools([_TOOL])),
        "decoding": Decoding(max_new_tokens=64, tools_digest="ab" * 32),
    }
)
WORDS = "I cannot help with that."
ONE = '<tool_call>\n{"name": "refund", "arguments": {"order": 7}}\n</tool_call>'
TWO = f'{ONE}\n<tool_call>\n{{"name": "find", "arguments": {{}}}}\n</tool_call>'


def asked(**body: Any) -> CallsAsked:
    found = calls_request({"tools": TOOLS, **body}, {}, CALLING, chat=True)
    assert found is not None
    return found


def record(text: str | None, **choice: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": text, "refusal": None}
    plain = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    return {
        "id": "chatcmpl-1", "object": "chat.completion", "created": 5, "model": "complaints@7",
        "choices": [plain | choice], "usage": {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13},
    }  # fmt: skip


def answered(text: str | None, body: dict[str, Any] | None = None, **choice: Any) -> Any:
    content_type, data = asked(**(body or {})).answer(json.dumps(record(text, **choice)).encode())
    assert content_type == "application/json"
    return json.loads(data)


@pytest.mark.parametrize(
    ("body", "filled_in", "of", "chat"),
    [
        ({}, {}, CALLING, True),  # no tools: the client wants no calls
        ({"tools": []}, {}, CALLING, True),
        ({"tools": TOOLS}, {}, PLAIN, True),  # this version was never shown any
        ({"tools": TOOLS}, {}, CALLING, False),
        ({"tools": TOOLS, "tool_choice": "none"}, {}, CALLING, True),
        ({"tools": TOOLS, "tool_choice": "required"}, {}, CALLING, True),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "refund"}}}, {}, CALLING, True),
    ],
)
def test_other_requests_are_left_alone(
    body: dict[str, Any], filled_in: dict[str, Any], of: VersionRef, chat: bool
) -> None:
    assert calls_request(body, filled_in, of, chat=chat) is None


@pytest.mark.parametrize(
    ("body", "filled_in", "expected"),
    [
        ({"tools": TOOLS}, {}, CallsAsked({"tool_choice": "none", "skip_special_tokens": False}, False, False)),
        (
            {"tool_choice": "auto"},
            {"tools": TOOLS},
            CallsAsked({"tool_choice": "none", "skip_special_tokens": False}, False, False),
        ),
        (
            {"tools": TOOLS, "stream": True, "stream_options": {"include_usage": True}},
            {},
            CallsAsked(
                {"tool_choice": "none", "skip_special_tokens": False, "stream": False, "stream_options": None},
                True,
                True,
            ),
        ),
        (
            {"tools": TOOLS, "stream": True},
            {},
            CallsAsked(
                {"tool_choice": "none", "skip_special_tokens": False, "stream": False, "stream_options": None},
                True,
                False,
            ),
        ),
    ],
)
def test_the_engine_is_asked_for_bare_whole_text(
    body: dict[str, Any], filled_in: dict[str, Any], expected: CallsAsked
) -> None:
    assert calls_request(body, filled_in, CALLING, chat=True) == expected


@pytest.mark.parametrize(
    ("text", "names", "arguments"),
    [
        (ONE, ["refund"], ['{"order": 7}']),
        (TWO, ["find", "refund"], ["{}", '{"order": 7}']),
        ('[TOOL_CALLS][{"name": "refund", "arguments": {"order": 7}}]', ["refund"], ['{"order": 7}']),
        ('<|python_tag|>{"name": "refund", "parameters": {"order": 7}}', ["refund"], ['{"order": 7}']),
        (f"Let me see. {ONE}", ["refund"], ['{"order": 7}']),
    ],
)
def test_calls_are_handed_on_as_the_protocol_has_them(text: str, names: list[str], arguments: list[str]) -> None:
    answer = answered(text)
    (choice,) = answer["choices"]
    message = choice["message"]
    assert (message["content"], choice["finish_reason"]) == (None, "tool_calls")
    calls = message["tool_calls"]
    assert [call["function"]["name"] for call in calls] == names
    assert [call["function"]["arguments"] for call in calls] == arguments
    assert {call["type"] for call in calls} == {"function"}
    assert len({call["id"] for call in calls}) == len(calls)
    assert answer["usage"]["completion_tokens"] == 4
    assert answer["model"] == "complaints@7"
    # What clients read is what the evaluation would have counted.
    assert said(message, tools=True) == said({"content": text}, tools=True)


@pytest.mark.parametrize(
    "text",
    [WORDS, "", None, '<tool_call>{"name": "refund", "argu', '{"name": 7}'],
    ids=["words", "empty", "null", "cut off", "no call"],
)
def test_what_is_no_call_stays_as_it_is(text: str | None) -> None:
    assert answered(text) == record(text)


def test_what_was_cut_off_says_so() -> None:
    (choice,) = answered(ONE, finish_reason="length")["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "refund"


def test_each_choice_is_read_and_no_two_calls_share_an_id() -> None:
    whole = record(ONE)
    whole["choices"].append({**whole["choices"][0], "index": 1})
    answer = json.loads(asked(n=2).answer(json.dumps(whole).encode())[1])
    ids = [choice["message"]["tool_calls"][0]["id"] for choice in answer["choices"]]
    assert len(set(ids)) == 2


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"error": {"message": "no"}}', b'{"id": "x", "choices": [1]}'])
def test_what_cannot_be_read_passes(body: bytes) -> None:
    assert asked().answer(body) == asked(stream=True).answer(body) == ("application/json", body)


def events(text: str, **body: Any) -> list[Any]:
    content_type, data = asked(stream=True, **body).answer(json.dumps(record(text)).encode())
    assert content_type.startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in data.decode().split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_a_stream_of_words() -> None:
    first, second, last = events(WORDS)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert second["choices"][0]["delta"] == {"content": WORDS}
    assert last["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert {(one["object"], one["model"], one["id"]) for one in (first, second, last)} == {
        ("chat.completion.chunk", "complaints@7", "chatcmpl-1")
    }
    assert "usage" not in first


def test_a_stream_of_calls_with_its_usage() -> None:
    _, said_, end, usage = events(TWO, stream_options={"include_usage": True})
    calls = said_["choices"][0]["delta"]["tool_calls"]
    assert [(call["index"], call["function"]["name"]) for call in calls] == [(0, "find"), (1, "refund")]
    assert end["choices"][0]["finish_reason"] == "tool_calls"
    assert (usage["choices"], usage["usage"]["total_tokens"], end["usage"]) == ([], 13, None)
