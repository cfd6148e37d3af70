"""Rows of a task with tools, from the source to the golden set: read, checked, masked, counted, drawn."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks.contracts.distill import DistillSpec
from tasks.contracts.errors import GoldenSetError, ModelError, SpecError
from tasks.contracts.prompt import tuned_prompt
from tasks.contracts.references import BaseModelRef, GoldenSetRef, RawDatasetRef, SplitsRef, ValidDatasetRef
from tasks.contracts.rows import Call, Message, Row, read_rows
from tasks.contracts.spec import DataSpec, RetrainSpec, TaskKind, TaskSpec
from tasks.contracts.synthesis import SynthesizeSpec
from tasks.data.distill.steps import rewrite_training_answers
from tasks.data.draw import stratum
from tasks.data.golden import freeze, open_golden
from tasks.data.golden_slices import _changer, last_user_turn
from tasks.data.ingest import ingest
from tasks.data.sources.fields import RowMaker
from tasks.data.sources.record import Record
from tasks.data.synthesis.prompts import example_schema
from tasks.data.synthesis.steps import check_real_rows
from tasks.data.tokens import TokenCounter, TokenLimit, check_renders_tools
from tasks.data.validate import validate
from tasks.training.examples import tokenize_row
from tests.data.toy_data import read_lines, write_lines
from tests.tool_toys import BOTH, CALL, ONE_CALL, REFUND, RESTART, TOOLS, WORDS, openai_call, tool_rows, with_template

CHAT = DataSpec(source="x", messages_field="messages")
ASKED = {"role": "user", "content": "Help?"}


def make(values: dict[str, Any], data: DataSpec = CHAT) -> Row | list[str]:
    """The row, or the reasons why there is none."""
    row, reasons = RowMaker(data, TaskKind.CALL).make(Record(3, values), None)
    return row if row is not None else reasons


def calling(*calls: Any, **turn: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(calls)} | turn


def result(call_id: str | None, content: str, **turn: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content} | ({"tool_call_id": call_id} if call_id else {}) | turn


# -- conversations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "target"),
    [
        (calling(openai_call("refund", '{"order": 7}')), REFUND),
        (calling(openai_call("refund", {"order": 7.0})), REFUND),
        (calling(*reversed(json.loads(BOTH))), BOTH),
        (calling({"name": "list_all"}), '[{"arguments": {}, "name": "list_all"}]'),
        ({"role": "assistant", "content": WORDS, "tool_calls": []}, WORDS),
        ({"role": "assistant", "content": '<tool_call>{"name": "refund", "arguments": {"order": 7}}'}, REFUND),
    ],
)
def test_the_last_turn_is_calls_or_words(answer: dict[str, Any], target: str) -> None:
    made = make({"messages": [ASKED, answer]})
    assert isinstance(made, Row)
    assert (made.messages, made.target) == ((Message("user", "Help?"),), target)


def test_results_stand_in_the_order_of_their_calls_under_their_names() -> None:
    calls = [openai_call("find", {"n": n}, f"id{n}") for n in (1, 2)] + [openai_call("list", {}, "id3")]
    turns = [
        ASKED,
        calling(*calls, content="Wait."),
        result("id3", "all"),
        result("id2", "second"),
        result("id1", "first"),
        {"role": "assistant", "content": "So."},
        ASKED,
        calling({"name": "list"}),
        result(None, "none", name="list_all"),
        result(None, "more"),
        {"role": "assistant", "content": WORDS},
    ]
    made = make({"messages": turns})
    assert isinstance(made, Row)
    assert made.messages[1] == Message(
        "assistant", "Wait.", (Call("find", '{"n": 1}'), Call("find", '{"n": 2}'), Call("list", "{}"))
    )
    assert [(turn.name, turn.content) for turn in made.messages if turn.role == "tool"] == [
        ("find", "first"), ("find", "second"), ("list", "all"), ("list_all", "none"), (None, "more"),
    ]  # fmt: skip
    assert made.messages[5:7] == (Message("assistant", "So."), Message("user", "Help?"))


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([calling({"name": "look"}, content="Hm.")], "turn 2 has both text and tool calls, an answer is one of them"),
        ([calling({"arguments": {}})], "turn 2 is no call of a tool: a call has no name of a function"),
        ([calling("look")], "turn 2 is no call of a tool: a call has no name of a function"),
        ([calling() | {"tool_calls": "look"}], "turn 2 has tool calls that are no list"),
        ([{"role": "assistant", "function_call": {"name": "look"}}], "turn 2 has tool calls that are no list"),
        ([calling({"name": "look"}, role="tool")], "turn 2 has tool calls, but is no assistant turn"),
        (
            [calling({"name": "look", "arguments": "{to"})],
            "turn 2 is no call of a tool: the arguments of look are not valid JSON: Expecting property name",
        ),
        (
            [calling({"name": "look", "arguments": [1]})],
            "turn 2 is no call of a tool: the arguments of look are no obj",
        ),
        (
            [calling({"name": "look", "arguments": {"a": "\ud83d"}})],
            "turn 2 holds half a surrogate pair, which UTF-8 cannot write",
        ),
        (
            [calling(openai_call("look", {}, "a")), result("b", "x"), {"role": "assistant", "content": "y"}],
            "turn 3 is the result of the call 'b', which no turn before it makes",
        ),
    ],
)
def test_conversations_that_cannot_be_used(turns: list[Any], reason: str) -> None:
    (found,) = make({"messages": [ASKED, *turns]})  # type: ignore[misc]  # a list of reasons
    assert str(found).startswith(f"messages: {reason}")


# -- columns ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "target"),
    [
        (json.loads(REFUND), REFUND),
        ([openai_call("refund", '{"order": 7}')], REFUND),
        ({"name": "refund", "arguments": {"order": 7}}, REFUND),
        (BOTH, BOTH),
        ('{"name": "refund", "parameters": {"order": 7}}', REFUND),
        ([calling(openai_call("refund", {"order": 7}))], REFUND),
        (WORDS, WORDS),
        (f" {WORDS}\n", f" {WORDS}\n"),
        ([], ["label is an empty list: where no tool is called, it has to say what is answered"]),
        (7, ["label is a number, neither text nor calls of tools"]),
        (["refund"], ["label is no call of a tool: a call has no name of a function"]),
        ('{"order": 7}', ["label is no call of a tool: a call has no name of a function"]),
        (
            '[{"name": "refund",',
            [
                "label is no call of a tool: Expecting property name enclosed in double quotes: "
                "line 1 column 20 (char 19)"
            ],
        ),
    ],
)
def test_a_column_holds_calls_or_words(label: Any, target: Any) -> None:
    made = make({"text": "Help?", "label": label}, DataSpec(source="x"))
    assert (made.target if isinstance(made, Row) else made) == target


# -- checks -------------------------------------------------------------------------------------------------------


def validated(folder: Path, records: list[Any], limit: TokenLimit | None = None, **data: Any) -> Any:
    """What `validate` counts; the results lie in `folder / "valid"`."""
    spec = DataSpec(source=str(write_lines(folder / "rows.jsonl", records)), max_invalid_share=0.9, **data)
    for name in ("raw", "valid", "kept"):
        (folder / name).mkdir()
    ingest(spec, TaskKind.CALL, folder / "raw")
    return validate(folder / "raw", CALL, spec, folder / "valid", lambda: folder / "kept", tokens=limit)


def test_calls_that_do_not_fit_the_tools_are_quarantined_with_the_reason(tmp_path: Path) -> None:
    calls = {
        "good": {"name": "refund", "arguments": {"order": 7}},
        "unknown": {"name": "delete", "arguments": {}},
        "lacks": {"name": "refund", "arguments": {}},
        "type": {"name": "restart", "arguments": {"device": "car"}},
    }
    records = [{"id": name, "text": f"text {name}", "label": [call]} for name, call in calls.items()]
    records.append({"id": "words", "text": "a poem", "label": WORDS})
    records.append({"id": "none", "text": "nothing", "label": []})
    reason = "label is an empty list"
    assert validated(tmp_path, records)[:3] == (2, 4, {"calls": 3, reason: 1})
    found = {entry["id"]: entry["reasons"][0] for entry in read_lines(tmp_path / "valid/quarantine.jsonl")}
    assert found == {
        "unknown": "the answer cannot be used: there is no tool 'delete'",
        "lacks": "the answer cannot be used: the arguments of refund do not fit: 'order' is a required property (at $)",
        "type": "the answer cannot be used: the arguments of restart do not fit: 'car' is not one of ['screen', "
        "'router'] (at $.device)",
        "none": f"{reason}: where no tool is called, it has to say what is answered",
    }


def test_a_row_that_the_template_refuses_is_quarantined_with_its_words(tiny_model: Path, tmp_path: Path) -> None:
    model = with_template(tiny_model, tmp_path / "model", ONE_CALL)
    limit = TokenLimit(model, tuned_prompt(CALL), 5000)
    records = [{"id": "one", "text": "one", "label": REFUND}, {"id": "two", "text": "two", "label": BOTH}]
    assert validated(tmp_path, records, limit)[:3] == (1, 1, {"calls": 1})
    (entry,) = read_lines(tmp_path / "valid/quarantine.jsonl")
    assert entry["reasons"] == ["the answer cannot be used: the chat template refuses it: one call at a time"]


def test_tokens_are_those_that_training_counts(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model = with_template(tiny_model, tmp_path / "model")
    prompt, tokenizer = tuned_prompt(CALL), AutoTokenizer.from_pretrained(model)
    counter = TokenCounter(TokenLimit(model, prompt, 10))
    earlier = (ASKED, calling(openai_call("refund", '{"order": 7}', "a")), result("a", "paid"))
    for number, target in enumerate((REFUND, BOTH, WORDS)):
        made = make({"id": "r", "messages": [*earlier, {"role": "assistant", "content": target}]})
        assert isinstance(made, Row)
        tokens = len(tokenize_row(made, prompt, tokenizer, 10_000).input_ids)
        assert counter.count(made) == counter.too_many(made) == tokens, number
        assert TokenCounter(TokenLimit(model, prompt, tokens)).too_many(made) is None


def test_a_base_model_without_tools_is_refused(tiny_model: Path) -> None:
    check_renders_tools(TokenLimit(tiny_model, tuned_prompt(TaskSpec(kind="chat", instruction="Talk.")), 9), "base")
    with pytest.raises(ModelError, match="leaves out the definition of a tool") as refusal:
        check_renders_tools(TokenLimit(tiny_model, tuned_prompt(CALL), 9), "base")
    assert refusal.value.where == "base"


def test_private_data_are_masked_inside_of_calls(tmp_path: Path) -> None:
    mail, phone = "ada.lovelace@example.org", "(212) 555-0123"
    note = {"name": "note", "arguments": {"to": mail}}
    said = [{"role": "assistant", "content": text} for text in (WORDS, f"call {phone}")]
    records = [
        {"id": "turn", "messages": [ASKED, calling(note), result(None, f"sent to {mail}"), said[0]]},
        {"id": "words", "messages": [ASKED, said[1]]},
    ]
    counts = validated(tmp_path, records, messages_field="messages", personal_data="mask")
    assert (counts.rows, counts.masked) == (2, 2)
    turn, words = read_rows(tmp_path / "valid/rows.jsonl")
    assert turn.messages[1].calls == (Call("note", '{"to": "[EMAIL]"}'),)
    assert turn.messages[2] == Message("tool", "sent to [EMAIL]", name="note")
    assert words.target == "call [PHONE]"


def test_masked_answers_stay_in_canonical_form(tmp_path: Path) -> None:
    from tasks.contracts.calls import calls_of
    from tasks.data.facts import masked_row
    from tasks.data.private import build_scanner

    calls = [{"name": "note", "arguments": {"to": to}} for to in ("ada@example.org", "[A]")]
    made = make({"messages": [ASKED, calling(*calls)]})
    assert isinstance(made, Row)
    masked, left = masked_row(made, CALL, build_scanner(secrets=True, personal=True))
    assert left == []
    assert [call.arguments for call in calls_of(masked.target)] == ['{"to": "[A]"}', '{"to": "[EMAIL]"}']


# -- golden set ---------------------------------------------------------------------------------------------------


def test_a_golden_set_of_calls_is_drawn_by_tools_and_held_to_them(make_spec: Callable[..., RetrainSpec]) -> None:
    spec = make_spec(tool_rows(120), CALL, items=30, data={"messages_field": "messages"})
    freeze(spec)
    opened = open_golden(spec.evaluation())
    items = list(read_rows(Path(opened.path) / "items.jsonl"))
    assert Counter(stratum(item, CALL) for item in items) == {"refund": 10, "restart": 10, "(words)": 10}
    assert {item.target for item in items} == {REFUND, RESTART, WORDS}
    other = TaskSpec(kind="call", instruction="Help.", tools=TOOLS[:1])
    with pytest.raises(GoldenSetError, match="does not fit the task's tools: there is no tool 'restart'") as refusal:
        open_golden(spec.evaluation().model_copy(update={"task": other}))
    assert "task.tools" in (refusal.value.where or "")


def test_mistyped_items_keep_the_words_that_are_arguments(make_spec: Callable[..., RetrainSpec]) -> None:
    from tasks.contracts.spec import GoldenSlice

    spec = make_spec(tool_rows(3), CALL, data={"messages_field": "messages"})
    mistype = _changer(GoldenSlice.TYPED_NOISE, spec, None, None, {})  # type: ignore[arg-type]  # donors are not used
    text = " ".join(["screen"] * 60 + ["something"] * 20)
    changed = mistype(Row("r", 1, (Message("user", text),), RESTART), dry=False)
    assert changed is not None
    assert changed.text.startswith(" ".join(["screen"] * 60))
    assert changed.text != text == last_user_turn(Row("r", 1, (Message("user", text),), RESTART))


# -- teachers -----------------------------------------------------------------------------------------------------


def test_no_teacher_is_asked_for_calls(make_spec: Callable[..., RetrainSpec]) -> None:
    spec = make_spec(tool_rows(9), CALL, data={"messages_field": "messages", "slice_field": "slice"})
    teacher: dict[str, Any] = {"url": "http://127.0.0.1:9/v1", "model": "m"}
    fill = ({"slice": "web", "rows": 5},)
    shared = spec.model_dump(include={"name", "task", "data", "golden", "execution"})
    wanted = SynthesizeSpec.model_validate(shared | {"teacher": teacher, "fill": fill})
    made = {"uri": "x", "step": "s", "fingerprint": "f" * 64, "digest": "d" * 64}
    with pytest.raises(SpecError, match="no calls of tools") as refusal:
        check_real_rows.fn(RawDatasetRef(**made, rows=9), wanted)
    assert (refusal.value.where, "data.source" in refusal.value.fix) == ("task.kind", True)
    with pytest.raises(SpecError, match="no calls of tools"):
        rewrite_training_answers.fn(
            SplitsRef(**made, train_rows=1, dev_rows=1, removed={}),
            ValidDatasetRef(**made, rows=1, quarantined=0, told={}, masked=0, data_docs=""),
            GoldenSetRef(path="x", digest="d" * 64, items=1),
            BaseModelRef(**made, source="x"),
            DistillSpec.model_validate({"teacher": teacher, "training": spec}),
        )
    with pytest.raises(SpecError, match="no calls of tools"):
        example_schema(CALL, from_document=False)
