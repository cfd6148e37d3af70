"""Calls of tools: what is read out of a text, the one way they are written, and whether they fit."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tasks.contracts.calls import (
    NO_CALL,
    calls_check,
    calls_of,
    digest_tools,
    name_tools,
    read_answer,
    read_tool_calls,
    read_tools,
    wrap_tools,
    write_calls,
)
from tasks.contracts.rows import Call
from tests.tool_toys import BOTH, REFUND, RESTART, TOOLS, openai_call

# What models write, and the answer that it is: calls in canonical form, or None for words.
WRITTEN: list[tuple[str, str | None]] = [
    ('<tool_call>\n{"name": "refund", "arguments": {"order": 7}}\n</tool_call>', REFUND),
    ('<tool_call>{"arguments": {"order": 7.0}, "name": "refund"}', REFUND),
    ('<think>Money.</think>\n\n<tool_call>{"name": "refund", "arguments": {"order": 7}}</tool_call>', REFUND),
    (
        '<tool_call>\n{"name": "restart", "arguments": {"device": "screen"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "refund", "arguments": {"order": 7}}\n</tool_call>',
        BOTH,
    ),
    ('[TOOL_CALLS] [{"name": "refund", "arguments": {"order": 7}, "id": "call00001"}]', REFUND),
    ('[TOOL_CALLS]refund[ARGS]{"order": 7}[TOOL_CALLS]restart[ARGS]{"device": "screen"}', BOTH),
    ('[TOOL_CALLS]refund[CALL_ID]abc123XYZ[ARGS]{"order": 7}', REFUND),
    ('<|python_tag|>{"name": "refund", "parameters": {"order": 7}}', REFUND),
    ('{"name": "refund", "parameters": {"order": 7}}', REFUND),
    ('{"type": "function", "name": "refund", "parameters": {"order": 7}}', REFUND),
    ('{"name": "refund", "parameters": {"order": 7}}; {"name": "restart", "parameters": {"device": "screen"}}', BOTH),
    ('[{"name": "restart", "arguments": {"device": "screen"}}, {"name": "refund", "arguments": {"order": 7}}]', BOTH),
    (json.dumps([openai_call("refund", '{"order": 7}')]), REFUND),
    ('```json\n{"name": "refund", "arguments": {"order": 7}}\n```', REFUND),
    ('I pay back:\n```\n[{"name": "refund", "arguments": {"order": 7}}]\n```\nDone.', REFUND),
    ('{"name": "list_all"}', '[{"arguments": {}, "name": "list_all"}]'),
    ('{"name": "list_all", "arguments": null}', '[{"arguments": {}, "name": "list_all"}]'),
    (f"  {BOTH}\n", BOTH),
    ("I cannot help with that.", None),
    ("[Support] We will call you.", None),
    ("Write `refund(7)`, or:\n```json\n{}\n```", None),
    ("", None),
]
# What is neither calls nor words, and what is said of it.
BROKEN: list[tuple[str, str]] = [
    ('<tool_call>\n{"name": "refund", "arguments": {"order": 7}', "Expecting ',' delimiter"),
    ("<tool_call>refund(order=7)</tool_call>", "Expecting value"),
    ("<tool_call></tool_call>", "it has the mark of a call, and no call"),
    ("[TOOL_CALLS] []", "it has the mark of a call, and no call"),
    ('{"order": 7}', "a call has no name of a function"),
    ('{"name": 7, "arguments": {}}', "a call has no name of a function"),
    ('[{"name": "refund"}, "restart"]', "a call has no name of a function"),
    ('{"name": "refund", "arguments": [7]}', "the arguments of refund are no object"),
    ('{"name": "refund", "arguments": "{order"}', "the arguments of refund are not valid JSON"),
    ('{"name": "refund", "arguments": {"order": NaN}}', "NaN is no JSON"),
    ('{"name": "refund", "arguments": {"order": 1e999}}', "Out of range float values"),
    ('{"name": "refund", "arguments": {"order": "\\ud83d"}}', "surrogates not allowed"),
    ('{"name": "refund", "arguments": {"order": 7}} and so on', "Expecting value"),
    ('{"name": "refund", "arguments": ' + '{"a": ' * 100_000, "nested too deep"),
]


@pytest.mark.parametrize(("text", "answer"), WRITTEN)
def test_calls_are_found_in_whatever_form_a_model_writes_them(text: str, answer: str | None) -> None:
    reading = read_answer(text)
    assert reading.problem is None
    assert reading.answer == (text.strip() if answer is None else answer)
    assert bool(reading.calls) == (answer is not None)


@pytest.mark.parametrize(("text", "why"), BROKEN)
def test_a_broken_call_is_neither_a_call_nor_words(text: str, why: str) -> None:
    reading = read_answer(text)
    assert reading.calls == ()
    assert why in (reading.problem or "")
    assert reading.answer == text.strip()


def test_calls_have_one_text_whatever_their_order() -> None:
    calls = read_tool_calls(
        [openai_call("restart", {"device": "screen"}), openai_call("refund", '{"order":7.0}', "x2")]
    )
    assert calls == [Call("restart", '{"device": "screen"}'), Call("refund", '{"order": 7}')]
    assert write_calls(calls) == write_calls(calls[::-1]) == BOTH
    assert calls_of(BOTH) == (calls[1], calls[0])


@pytest.mark.parametrize(
    "words", ["Hello", '[{"name": "refund"}]', '[{"arguments": {"order":7}, "name": "refund"}]', ""]
)
def test_what_is_not_in_canonical_form_is_words_of_a_target(words: str) -> None:
    assert calls_of(words) == ()
    assert name_tools(words) == NO_CALL


def test_a_class_is_named_by_its_tools() -> None:
    assert [name_tools(target) for target in (REFUND, RESTART, BOTH)] == ["refund", "restart", "refund + restart"]
    assert name_tools(write_calls([*calls_of(REFUND), Call("refund", '{"order": 8}')])) == "refund"


def test_tools_may_be_wrapped_and_come_back_in_one_order() -> None:
    shuffled = [
        {"type": "function", "function": {"parameters": TOOLS[0]["parameters"], "strict": True, "name": "refund"}},
        {name: TOOLS[1][name] for name in sorted(TOOLS[1], reverse=True)},
    ]
    tools = read_tools(shuffled)
    assert json.dumps(tools[1]) == json.dumps(TOOLS[1] | {"parameters": tools[1]["parameters"]})
    assert list(tools[0]) == ["name", "description", "parameters", "strict"]
    assert tools[0]["description"] == ""
    assert list(tools[0]["parameters"]) == ["type", "properties", "required", "additionalProperties"]
    assert read_tools(wrap_tools(tools)) == tools
    assert digest_tools(tools) == digest_tools(read_tools(wrap_tools(tools))) != digest_tools(TOOLS)
    assert digest_tools(()) is None


@pytest.mark.parametrize(
    ("tools", "why"),
    [
        ([{}], "tool 1 has the name None; a name has 1 to 64 letters, digits, underscores or hyphens"),
        ([{"name": "look up"}], "tool 1 has the name 'look up'"),
        ([{"name": "x" * 65}], "tool 1 has the name"),
        ([{"name": "a"}, {"type": "function", "function": {"name": "a"}}], "two tools have the name a"),
        ([{"name": "a", "description": 5}], "the description of the tool a is no text"),
        ([{"name": "a", "parameters": None}], "the parameters of the tool a are no JSON Schema of an object"),
        ([{"name": "a", "parameters": []}], "the parameters of the tool a are no JSON Schema of an object"),
        (
            [{"name": "a", "parameters": {"type": "string"}}],
            "the parameters of the tool a are no JSON Schema of an obj",
        ),
        (
            [{"name": "a", "parameters": {"properties": {"b": {"type": "text"}}}}],
            "the parameters of the tool a are no JSON Schema: 'text' is not valid under any of the given schemas "
            "(at $.properties.b.type)",
        ),
    ],
)
def test_tools_that_cannot_be_used(tools: list[dict[str, Any]], why: str) -> None:
    with pytest.raises(ValueError, match="tool") as refusal:
        read_tools(tools)
    assert why in str(refusal.value)


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (Call("refund", '{"order": 7}'), None),
        (
            Call("refund", '{"order": "7"}'),
            "the arguments of refund do not fit: '7' is not of type 'integer' (at $.order)",
        ),
        (Call("refund", "{}"), "the arguments of refund do not fit: 'order' is a required property (at $)"),
        (Call("restart", '{"device": "car"}'), "do not fit: 'car' is not one of ['screen', 'router'] (at $.device)"),
        (Call("delete", "{}"), "there is no tool 'delete'"),
        (Call("list_all", "{}"), None),
        (Call("list_all", '{"order": 7}'), "the arguments of list_all do not fit"),
    ],
)
def test_whether_a_call_fits_the_tools(call: Call, why: str | None) -> None:
    problem = calls_check(read_tools((*TOOLS, {"name": "list_all"})))
    found = problem([Call("restart", '{"device": "router"}'), call])
    assert found is None if why is None else why in (found or "")
