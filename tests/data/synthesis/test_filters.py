"""Each filter by itself, and the search for repetitions on real complaints with planted ones."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.contracts.errors import SpecError
from tasks.contracts.spec import TaskSpec
from tasks.data.synthesis.filters import (
    Candidate,
    Example,
    Reader,
    Refusal,
    agreeing,
    consistency,
    find_golden,
    find_repeats,
    near_duplicates_of,
    repeats_among,
    word_f1,
)
from tasks.data.synthesis.prompts import example_schema
from tests.data.toy_data import CHAT, CLASSIFY, EXTRACT, sentence

COMPLAINTS = Path(__file__).parents[3] / "examples/complaints/complaints.jsonl"
GOLDEN = Path(__file__).parents[3] / "examples/complaints/golden/items.jsonl"

# Measured on the 1,848 complaints outside the golden set, three seeds: of 600 copies with one word of 40 or more
# exchanged all are refused, of 600 copies with other case and blanks all, of 600 invented texts none. With one word of
# twenty exchanged it is 29 of 100: most of those are below the threshold of 0.8, as they should be.
EDITED_FOUND = 0.99


def read(task: TaskSpec, content: Any, *, from_document: bool = False, finish: str = "stop") -> Any:
    text = content if isinstance(content, str) else json.dumps(content)
    return Reader(task, from_document=from_document, longest=100).example(text, finish, "billing")


# -- schema -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "content", "example", "lenient"),
    [
        (CLASSIFY, {"text": " My bill "}, Example(" My bill ", "billing"), False),
        (CLASSIFY, '```json\n{"text": "My bill"}\n```', Example("My bill", "billing"), True),
        (CLASSIFY, '<think>{"no": 1}</think>\n{"text": "My bill"}', Example("My bill", "billing"), True),
        (CLASSIFY, 'Sure! {"text": "My {bill}"} Hope it helps.', Example("My {bill}", "billing"), True),
        (EXTRACT, {"text": "12.0 only", "answer": {"amount": 12.0}}, Example("12.0 only", '{"amount": 12}'), False),
        (CHAT, {"text": "Why?", "answer": "So."}, Example("Why?", "So."), False),
    ],
)
def test_what_is_read(task: TaskSpec, content: Any, example: Example, lenient: bool) -> None:
    assert read(task, content) == (example, lenient)


def test_an_example_from_a_document_has_a_quote() -> None:
    written = {"text": "Why?", "answer": "So.", "quote": "so"}
    assert read(CHAT, written, from_document=True).example == Example("Why?", "So.", "so")
    del written["quote"]
    assert "'quote' is a required property" in read(CHAT, written, from_document=True).example.detail


@pytest.mark.parametrize(
    ("task", "content", "detail"),
    [
        (CLASSIFY, "My bill is wrong", "it holds no JSON object"),
        (CLASSIFY, '{"text": "My bi', "it holds no JSON object"),
        (CLASSIFY, '["text"]', "it holds no JSON object"),
        (CLASSIFY, "", "it holds no JSON object"),
        (CLASSIFY, "{" * 100_000, "it holds no JSON object"),
        (CLASSIFY, {"texts": "My bill"}, "'text' is a required property"),
        (CLASSIFY, {"text": 7}, "7 is not of type 'string' (at $.text)"),
        (CLASSIFY, {"text": ""}, "'' should be non-empty (at $.text)"),
        (CLASSIFY, {"text": " \n"}, "its text is white space"),
        (CLASSIFY, {"text": "x" * 101}, "its text has 101 characters, more than 100"),
        (CLASSIFY, '{"text": "half \\ud83d"}', "half a surrogate pair, which UTF-8 cannot write"),
        (CLASSIFY, {"text": "x", "label": "support"}, "Additional properties are not allowed"),
        (EXTRACT, {"text": "x", "answer": {"amount": "12"}}, "'12' is not of type 'number' (at $.answer.amount)"),
        (EXTRACT, '{"text": "x", "answer": {"amount": NaN}}', "its answer holds NaN or Infinity"),
        (CHAT, {"text": "x", "answer": " "}, "its answer is white space"),
    ],
    ids=str,
)
def test_what_has_the_wrong_form(task: TaskSpec, content: Any, detail: str) -> None:
    refusal = read(task, content).example
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "schema"
    assert detail in refusal.detail


def test_an_answer_that_was_cut_off_says_so() -> None:
    assert read(CLASSIFY, '{"text": "My', finish="length").example.detail == "it was cut off at `teacher.max_tokens`"


def test_definitions_of_a_task_are_found_in_the_teachers_schema() -> None:
    schema = {
        "type": "object",
        "properties": {"amount": {"$ref": "#/$defs/money"}},
        "$defs": {"money": {"type": "number", "minimum": 0}},
    }
    task = EXTRACT.model_copy(update={"json_schema": schema})
    assert example_schema(task, from_document=False)["$defs"] == schema["$defs"]
    assert read(task, {"text": "12", "answer": {"amount": 12}}).example == Example("12", '{"amount": 12}')
    assert "-1 is less than the minimum" in read(task, {"text": "12", "answer": {"amount": -1}}).example.detail
    elsewhere = EXTRACT.model_copy(update={"json_schema": schema | {"items": {"$ref": "#/properties/amount"}}})
    with pytest.raises(SpecError, match="#/properties/amount"):
        example_schema(elsewhere, from_document=False)


@pytest.mark.parametrize(
    ("task", "content", "answer"),
    [
        (CLASSIFY, '{"answer": "billing"}', "billing"),
        (CLASSIFY, "billing", "billing"),
        (CLASSIFY, " <think>hm</think> billing\n", "billing"),
        (CLASSIFY, "It is billing.", None),
        (CLASSIFY, '{"answer": "sales"}', None),
        (EXTRACT, '{"amount": 12.0}', '{"amount": 12}'),
        (EXTRACT, '{"amount": "12"}', None),
        (EXTRACT, "twelve", None),
        (CHAT, '{"answer": "So."}', "So."),
        (CHAT, "So.", "So."),
        (CHAT, "", None),
    ],
)
def test_what_is_read_of_an_answer(task: TaskSpec, content: str, answer: str | None) -> None:
    assert Reader(task, from_document=False, longest=100).answer(content) == answer


# -- self-consistency ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "votes", "target", "agree"),
    [
        (CLASSIFY, ["a", "a", "b"], "a", 2),
        (CLASSIFY, ["a", "b", "a"], "a", 2),
        (CLASSIFY, ["b", "b", "a"], "a", 1),  # two agree with each other, and not with the target
        (CLASSIFY, ["b", "b", "b"], "a", 0),
        (CLASSIFY, [None, None, "a"], "a", 1),
        (CLASSIFY, [None, "a", "a"], "a", 2),
        (EXTRACT, ['{"amount": 12}'] * 2 + ['{"amount": 13}'], '{"amount": 12}', 2),
        (CHAT, ["It opened in 1887.", "In 1887 it opened", "No idea."], "It opened in 1887", 2),
        # Each is near the target, but not near the other.
        (CHAT, ["one two three four x y", "three four five six z w", "-"], "one two three four five six", 1),
    ],
)
def test_two_votes_agree_with_each_other_and_with_the_target(
    task: TaskSpec, votes: list[str | None], target: str, agree: int
) -> None:
    assert agreeing(votes, target, task) == agree
    refusal = consistency(votes, target, task)
    assert (refusal is None) == (agree >= 2)


def test_a_refusal_says_what_was_answered() -> None:
    refusal = consistency([None, "support", "support"], "billing", CLASSIFY)
    assert refusal is not None
    assert refusal.reason == "inconsistent"
    assert refusal.detail == (
        "asked again, the teacher answers no valid answer, 'support', 'support'; the answer should be 'billing'"
    )


@pytest.mark.parametrize(
    ("one", "other", "f1"),
    [("a b c", "A, b c!", 1.0), ("a b", "b c", 0.5), ("a a b", "a b b", 2 / 3), ("", "", 1.0), ("", "a", 0.0)],
)
def test_word_f1(one: str, other: str, f1: float) -> None:
    assert word_f1(one, other) == pytest.approx(f1)


# -- duplicates ---------------------------------------------------------------------------------------------------

DRAW = random.Random(1)
A, B, C, D, E = (sentence(DRAW) for _ in range(5))


def edited(text: str) -> str:
    """Nearly the same."""
    return f"{text} really"


def of(texts: list[str]) -> list[Candidate]:
    return [Candidate(f"example {number + 1}", text, text) for number, text in enumerate(texts)]


def test_every_kind_of_repetition_is_refused_with_what_it_repeats() -> None:
    golden = [("g1", A), ("g2", B)]
    rows = [("r1", A), ("r2", C), ("r3", D)]  # the source holds the golden rows too
    texts = [A.upper(), edited(B), f"{sentence(DRAW)} {' '.join(B.split()[:13])}", f" {C}", edited(D), E, E, edited(E)]
    found = find_repeats(of(texts), [], lambda: golden, lambda: rows, 0.8)
    assert [(one.reason, one.detail) if one else None for one in found] == [
        ("golden_same_text", "same text as golden item g1"),
        ("golden_near_duplicate", "nearly the same text as golden item g2"),
        ("golden_ngram", "a run of 13 words in common with golden item g2"),
        ("exact_duplicate", "same text as row r2"),
        ("near_duplicate", "nearly the same text as row r3"),
        None,
        ("exact_duplicate", "same text as example 6"),
        ("near_duplicate", "nearly the same text as example 6"),
    ]
    # What a teacher is told of it holds nothing of any row.
    assert {one.hint for one in found if one} == {"there is one like it already, so say something else"}


def test_what_was_kept_earlier_is_not_repeated() -> None:
    found = find_repeats(of([edited(A), B, C]), of([A, B]), list, list, 0.8)
    assert [one.reason if one else None for one in found] == ["near_duplicate", "exact_duplicate", None]


def test_questions_on_different_documents_may_be_the_same_and_on_one_document_not() -> None:
    question = "what is the total amount that has to be paid by the customer"
    one = Candidate("1", f"{A}\n\n{question}", question, "a 1")
    again = Candidate("2", f"{A}\n\n{question} now", f"{question} now", "a 1")
    other = Candidate("3", f"{B}\n\n{question}", question, "b 1")
    found = find_repeats([one, again, other], [], list, list, 0.8)
    assert [refusal.reason if refusal else None for refusal in found] == [None, "near_duplicate", None]


def test_short_texts_are_compared_by_equality_alone() -> None:
    found = find_repeats(of(["$1.00", "$1.01", "$1.00 "]), [], lambda: [("g", "$1.01")], list, 0.8)
    assert [one.reason if one else None for one in found] == [None, "golden_same_text", "exact_duplicate"]


def test_nothing_new_reads_nothing() -> None:
    def unread() -> Iterator[tuple[str, str]]:
        raise AssertionError("read for nothing")
        yield "", ""

    assert find_repeats([], of([A]), list, unread, 0.8) == []


def complaints(path: Path) -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(row["id"], row["text"] if "text" in row else row["messages"][0]["content"]) for row in rows]


def exchange_word(text: str, draw: random.Random) -> str:
    words = text.split()
    words[draw.randrange(len(words))] = f"w{draw.randrange(10_000)}"
    return " ".join(words)


def test_planted_repetitions_among_real_complaints() -> None:
    draw = random.Random(5)
    golden = complaints(GOLDEN)
    ids = {row_id for row_id, _ in golden}
    rows = [row for row in complaints(COMPLAINTS) if row[0] not in ids]
    # Long enough for one exchanged word to leave more than four fifths of the 3-shingles.
    long_rows = [row for row in rows if len(row[1].split()) >= 40]
    sources = draw.sample(long_rows, 200)
    same = [f" {text.upper()}  " for _, text in draw.sample(rows, 200)]
    edits = [exchange_word(text, draw) for _, text in sources]
    new = [sentence(draw, 40) for _ in range(200)]
    found = find_repeats(of([*same, *edits, *new]), [], lambda: golden, lambda: rows, 0.8)
    reasons = [one.reason if one else None for one in found]
    assert reasons.count(None) == len(new)
    assert reasons[400:] == [None] * 200  # precision 1
    assert sum(reason is not None for reason in reasons[:200]) == 200
    assert sum(reason is not None for reason in reasons[200:400]) / 200 >= EDITED_FOUND


def test_texts_that_overlap_the_golden_set_are_found() -> None:
    golden = complaints(GOLDEN)
    texts = [text for _, text in golden[:50]]
    assert all(find_golden(texts, lambda: golden, 0.8))
    assert find_golden([sentence(DRAW, 30)], lambda: golden, 0.8) == [None]


def test_near_duplicates_are_found_across_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks.data.synthesis import filters

    monkeypatch.setattr(filters, "_BATCH", 2)
    old = [B, C, D, A, edited(A)]
    assert near_duplicates_of([A, E, edited(D)], iter(old), 0.8) == [3, None, 2]
    assert repeats_among([A, B, edited(A), B], ["", "", "", "x"], 0.8) == [None, None, 0, None]
