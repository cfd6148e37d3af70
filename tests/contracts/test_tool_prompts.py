"""Rows, prompts and specs of tasks with tools; those without stay, byte for byte, what they were."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from tasks.contracts.prompt import Prompt, Shot, base_prompt, decoding_for, tuned_prompt
from tasks.contracts.rows import Call, Message, Row, as_conversation
from tasks.contracts.spec import Policy, TaskKind, TaskSpec
from tests.tool_toys import BOTH, CALL, REFUND, TOOLS, WORDS

CHAT = TaskSpec(kind=TaskKind.CHAT, instruction="Talk.")
FIND = Call("find", '{"id": 123456789012345678901234567890, "of": "Ada"}')
EARLIER = (
    Message("user", "Both?"),
    Message("assistant", "Looking.", (FIND, Call("find", "{}"), Call("list", "{}"))),
    Message("tool", "none", name="list"),
    Message("tool", "one", name="find"),
    Message("tool", "two"),
    Message("user", "Well?"),
)


def test_a_row_with_calls_comes_back_from_its_line() -> None:
    row = Row("r1", 3, EARLIER, REFUND)
    assert Row.from_json(row.to_json()) == row
    assert '"arguments":"{\\"id\\": 123456789012345678901234567890, \\"of\\": \\"Ada\\"}"' in row.to_json()
    assert 'assistant: Looking.\n{"arguments": {"id": 1234' in row.text
    assert EARLIER[1]._replace(content="").text.startswith('{"arguments"')


def test_a_row_without_calls_keeps_its_bytes() -> None:
    row = Row("r1", 3, (Message("user", "Hi"), Message("tool", "x")), "y")
    assert row.to_json() == (
        '{"id":"r1","line":3,"messages":[{"role":"user","content":"Hi"},{"role":"tool","content":"x"}],'
        '"target":"y","group":null,"slice":null}'
    )
    assert as_conversation(row.messages) == [{"role": "user", "content": "Hi"}, {"role": "tool", "content": "x"}]


def test_results_are_tied_to_their_calls_by_ids() -> None:
    turns = as_conversation(EARLIER)
    assert [(call["id"], call["function"]["name"]) for call in turns[1]["tool_calls"]] == [
        ("call00001", "find"), ("call00002", "find"), ("call00003", "list"),
    ]  # fmt: skip
    assert turns[1]["tool_calls"][0]["function"]["arguments"]["of"] == "Ada"
    assert [turn.get("tool_call_id") for turn in turns] == [None, None, "call00003", "call00001", "call00002", None]
    again = as_conversation([*EARLIER, EARLIER[1]])
    assert again[-1]["tool_calls"][0]["id"] == "call00004"


def test_tools_go_with_prompt_and_decoding() -> None:
    assert tuned_prompt(CALL).template_options == {"tools": [{"type": "function", "function": tool} for tool in TOOLS]}
    assert base_prompt(CALL).tools == tuned_prompt(CALL).tools == CALL.tools
    assert "answer in words only where none fits" in base_prompt(CALL).system
    renamed = TaskSpec(kind="call", instruction="Help.", tools=(TOOLS[0], TOOLS[1] | {"description": "Else."}))
    assert decoding_for(CALL, 8) == decoding_for(CALL.model_copy(update={"instruction": "?"}), 8)
    assert decoding_for(CALL, 8) != decoding_for(renamed, 8)


def test_an_answer_with_calls_is_a_turn_with_calls() -> None:
    row = Row("r1", 3, (Message("user", "Both?"),), BOTH)
    *_, answer = tuned_prompt(CALL).answered(row)
    assert answer["content"] == ""
    assert [call["function"] for call in answer["tool_calls"]] == [
        {"name": "refund", "arguments": {"order": 7}},
        {"name": "restart", "arguments": {"device": "screen"}},
    ]
    plain = {"role": "assistant", "content": BOTH}
    assert tuned_prompt(CHAT).answered(row)[-1] == plain
    assert tuned_prompt(CALL).answered(Row("r1", 3, row.messages, WORDS))[-1] == plain | {"content": WORDS}


def test_a_worked_example_with_calls_is_a_whole_exchange() -> None:
    prompt = Prompt(
        system="Help.", tools=CALL.tools, shots=(Shot(user="1", assistant=BOTH), Shot(user="2", assistant=WORDS))
    )
    turns = prompt.conversation(Row("r1", 3, (Message("user", "3"),), BOTH))
    assert [turn["role"] for turn in turns] == [
        "system", "user", "assistant", "tool", "tool", "assistant", "user", "assistant", "user",
    ]  # fmt: skip
    assert [turn.get("tool_call_id") for turn in turns[3:5]] == ["call00001", "call00002"]
    assert [turn["content"] for turn in turns[5:]] == ["Done.", "2", WORDS, "3"]


@pytest.mark.parametrize(
    ("record", "kept"),
    [
        (CHAT, '{"kind":"chat","instruction":"Talk.","labels":[],"json_schema":null}'),
        (tuned_prompt(CHAT), '{"system":"Talk.","shots":[]}'),
        (decoding_for(CHAT, 3), '{"max_new_tokens":3,"choices":[]}'),
    ],
)
def test_records_without_tools_do_not_speak_of_them(record: Any, kept: str) -> None:
    assert record.model_dump_json() == kept
    assert json.dumps(record.model_dump(mode="json"), separators=(",", ":")) == kept
    assert type(record).model_validate_json(kept) == record


@pytest.mark.parametrize("record", [CALL, tuned_prompt(CALL), decoding_for(CALL, 3)])
def test_records_with_tools_come_back(record: Any) -> None:
    assert type(record).model_validate_json(record.model_dump_json()) == record


@pytest.mark.parametrize(
    ("task", "why"),
    [
        ({"kind": "call"}, "a call task needs tools"),
        ({"kind": "chat", "tools": TOOLS}, "tools are for call tasks, this one is chat"),
        ({"kind": "call", "tools": (TOOLS[0], TOOLS[0])}, "two tools have the name refund"),
        ({"kind": "call", "tools": TOOLS, "labels": ("a", "b")}, "labels are for classify tasks, this one is call"),
    ],
)
def test_task_and_tools_go_together(task: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        TaskSpec.model_validate({"instruction": "Help."} | task)


def test_metrics_of_calls_can_be_asked_for() -> None:
    assert CALL.metrics == ("exact_match", "valid_output", "call:name", "call:arguments")
    assert Policy(metric="call:arguments").metric == "call:arguments"
