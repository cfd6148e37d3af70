"""Which tokens the loss is taken on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.contracts.errors import TrainingError
from tasks.contracts.prompt import tuned_prompt
from tasks.contracts.rows import Call, Message, Row, write_rows
from tasks.contracts.spec import TaskKind, TaskSpec
from tasks.training.examples import Example, WeightFacts, as_columns, read_weights, sum_up_weights, tokenize_row
from tests.tool_toys import BOTH, CALL, HERMES, ONE_CALL, REFUND, WORDS

TASK = TaskSpec(kind=TaskKind.CLASSIFY, instruction="Which fruit?", labels=("red apple", "pear"))


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


def row(text: str, target: str, *earlier: Message) -> Row:
    return Row("r7", 12, (*earlier, Message("user", text)), target)


@pytest.mark.parametrize("target", ["red apple", "pear", '{"amount": 29.95, "currency": "€"}', "two\nlines"])
def test_loss_covers_exactly_the_answer_and_its_end(tokenizer: Any, target: str) -> None:
    item = row("crimson and round", target)
    example = tokenize_row(item, tuned_prompt(TASK), tokenizer, 512)
    asked = [message.as_chat() for message in tuned_prompt(TASK).messages(item)]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    cut = len(example.input_ids) - example.answer_tokens
    assert tokenizer.decode(example.input_ids[:cut]) == prompt
    assert tokenizer.decode(example.input_ids[cut:]) == f"{target}<|im_end|>"
    columns = as_columns([example])
    assert columns["answer_tokens"] == [example.answer_tokens]


def test_earlier_answers_are_shown_but_not_learned(tokenizer: Any) -> None:
    item = row("and this?", "pear", Message("user", "green?"), Message("assistant", "pear"))
    example = tokenize_row(item, tuned_prompt(TASK), tokenizer, 512)
    cut = len(example.input_ids) - example.answer_tokens
    assert tokenizer.decode(example.input_ids[:cut]).count("pear<|im_end|>") == 1
    assert tokenizer.decode(example.input_ids[cut:]) == "pear<|im_end|>"


def test_too_long_a_row_is_refused_by_name(tokenizer: Any) -> None:
    item = row("long " * 40, "pear")
    length = len(tokenize_row(item, tuned_prompt(TASK), tokenizer, 512).input_ids)
    assert len(tokenize_row(item, tuned_prompt(TASK), tokenizer, length).input_ids) == length
    with pytest.raises(TrainingError, match=f"has {length} tokens, more than the {length - 1}") as refusal:
        tokenize_row(item, tuned_prompt(TASK), tokenizer, length - 1)
    assert refusal.value.where == "row r7 (line 12 of the source)"
    assert f"train.max_tokens` to {length}" in refusal.value.fix


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "does not end an answer"),
        ("{{ messages | length }}{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}", "differently"),
    ],
)
def test_template_that_hides_the_answer_is_refused(tiny_model: Path, template: str, what: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = template
    with pytest.raises(TrainingError, match=what):
        tokenize_row(row("green", "pear"), tuned_prompt(TASK), tokenizer, 512)


@pytest.fixture(scope="module")
def calling(tiny_model: Path) -> Any:
    """A tokenizer whose chat template has tools."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = HERMES
    return tokenizer


CALLED = '<tool_call>\n{"name": "refund", "arguments": {"order": 7}}\n</tool_call>'
STARTED = '<tool_call>\n{"name": "restart", "arguments": {"device": "screen"}}\n</tool_call>'


@pytest.mark.parametrize(("target", "written"), [(REFUND, CALLED), (BOTH, CALLED + STARTED), (WORDS, WORDS)])
def test_loss_covers_exactly_the_calls_and_their_end(calling: Any, target: str, written: str) -> None:
    earlier = (
        Message("user", "dark"),
        Message("assistant", "", (Call("restart", '{"device": "screen"}'),)),
        Message("tool", "restarted", name="restart"),
    )
    example = tokenize_row(Row("r7", 12, earlier, target), tuned_prompt(CALL), calling, 5000)
    cut = len(example.input_ids) - example.answer_tokens
    shown = calling.decode(example.input_ids[:cut])
    assert calling.decode(example.input_ids[cut:]) == f"{written}<|im_end|>"
    assert shown.endswith("<tool_response>restarted</tool_response><|im_end|>\n<|im_start|>assistant\n")
    assert shown.count(f"{STARTED}<|im_end|>") == 1
    assert all(shown.count(json.dumps({"type": "function", "function": tool})) == 1 for tool in CALL.tools)


def test_a_row_that_the_template_refuses_is_named(tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = ONE_CALL
    with pytest.raises(TrainingError, match="cannot render a row: one call at a time") as refusal:
        tokenize_row(row("both", BOTH), tuned_prompt(CALL), tokenizer, 5000)
    assert refusal.value.where == "row r7 (line 12)"


def write_weighted(folder: Path, *weights: float) -> Path:
    path = folder / "train.jsonl"
    messages = (Message("user", "green"),)
    write_rows(path, [Row(f"r{at}", 10 + at, messages, "pear", weight=weight) for at, weight in enumerate(weights)])
    return path


@pytest.mark.parametrize(
    ("weights", "read", "facts"),
    [
        ((1.0, 0.5, 1.5, 1.0), [1.0, 0.5, 1.5, 1.0], WeightFacts(2, 0.5, 1.5)),
        ((1.000001,), [1.000001], WeightFacts(1, 1.000001, 1.000001)),
        ((1e-6, 20.0), [1e-6, 20.0], WeightFacts(2, 1e-6, 20.0)),
        ((1.0, 1.0), None, WeightFacts(0, 1.0, 1.0)),
        ((), None, WeightFacts(0, 1.0, 1.0)),
    ],
)
def test_weights_are_read_in_the_order_of_the_rows(
    tmp_path: Path, weights: tuple[float, ...], read: list[float] | None, facts: WeightFacts
) -> None:
    assert read_weights(write_weighted(tmp_path, *weights)) == read
    assert sum_up_weights(read) == facts


def test_weights_of_one_that_are_written_out_are_none_at_all(tmp_path: Path) -> None:
    path = write_weighted(tmp_path, 1.0, 1.0)
    path.write_text(path.read_text().replace('"target"', '"weight": 1, "target"'))
    assert path.read_text().count('"weight": 1') == 2
    assert read_weights(path) is None


@pytest.mark.parametrize(
    ("weight", "said"), [(0.0, "0.0"), (-1.0, "-1.0"), (float("nan"), "None"), (float("inf"), "None")]
)
def test_weight_that_is_no_positive_number_is_refused_by_row(tmp_path: Path, weight: float, said: str) -> None:
    path = write_weighted(tmp_path, 2.0, weight, 1.0)
    with pytest.raises(TrainingError, match=f"weight of a row is {said};") as refusal:
        read_weights(path)
    assert refusal.value.where == "train.jsonl, row r1 (line 11 of the source)"
    assert "`data.weight_field`" in refusal.value.fix


def test_only_weighted_examples_have_a_column_of_weights() -> None:
    examples = [Example([4, 5, 6], 1), Example([7, 8], 1)]
    plain = {"input_ids": [[4, 5, 6], [7, 8]], "answer_tokens": [1, 1]}
    assert as_columns(examples) == plain
    assert as_columns(examples, [0.5, 1.5]) == plain | {"weight": [0.5, 1.5]}
