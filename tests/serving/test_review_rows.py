"""From what people said to rows: who is right, what is no row, and files that do not depend on how they came about."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tasks.contracts.errors import StoreError
from tasks.contracts.review import Review, Reviewed, ReviewItem, ReviewOutcome, ReviewReason, ReviewSpec
from tasks.contracts.spec import DataSpec, ExecutionSpec, TaskSpec
from tasks.serving.review.answers import read_said
from tasks.serving.review.rows import judge_review, judge_reviews, read_records, write_reviews
from tests.serving.test_review_spool import NOON, item

CLASSIFY = TaskSpec(kind="classify", instruction="Which product?", labels=("card", "loan"))
EXTRACT = TaskSpec(kind="extract", instruction="Which price?", json_schema={"type": "object"})
CHAT = TaskSpec(kind="chat", instruction="Answer.")
CALL = TaskSpec(
    kind="call", instruction="Help.",
    tools=({"name": "find", "description": "Finds.", "parameters": {"type": "object", "properties": {}}},),
)  # fmt: skip


def spec(tmp_path: Path, **changes: Any) -> ReviewSpec:
    fields: dict[str, Any] = {
        "name": "complaints", "rows": str(tmp_path / "reviews" / "rows.jsonl"),
        "golden_candidates": str(tmp_path / "reviews" / "golden.jsonl"), "data": DataSpec(source="rows.jsonl"),
        "task": CLASSIFY, "execution": ExecutionSpec(store=str(tmp_path / "store")),
    }  # fmt: skip
    return ReviewSpec(**(fields | changes))


def review(one: ReviewItem, *said: str | None, golden: Sequence[int] = ()) -> Review:
    """An item of which the first person says the first answer, and so on."""
    return Review(
        item=one,
        said=tuple(
            Reviewed(
                item=one.id, annotator="abcdef"[number], answer=answer, golden=number in golden,
                at=NOON + timedelta(hours=1, minutes=number),
            )
            for number, answer in enumerate(said)
        ),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("said", "changes", "outcome", "right", "agreement", "why"),
    [
        (("card",), {}, "row", "card", 1.0, ""),
        (("loan",), {}, "row", "loan", 1.0, ""),
        (("loan", "loan", "card"), {}, "row", "loan", 2 / 3, ""),
        (("loan", "loan", "card"), {"min_agreement": 0.7}, "disputed", None, 2 / 3, "1 × card, 2 × loan"),
        (("loan", "card"), {}, "disputed", None, 0.5, "1 × card, 1 × loan"),
        (("loan", None), {}, "row", "loan", 1.0, ""),
        ((None,), {}, "declined", None, None, "nobody gave an answer"),
        ((), {}, "declined", None, None, "nobody gave an answer"),
        ((" loan\n",), {}, "row", "loan", 1.0, ""),
        (("lone",), {}, "unusable", None, 1.0, "'lone' is no label of the task"),
    ],
)  # fmt: skip
def test_who_is_right(
    tmp_path: Path, said: Sequence[str | None], changes: dict[str, Any], outcome: str, right: str | None,
    agreement: float | None, why: str,
) -> None:  # fmt: skip
    record = judge_review(review(item(1), *said), spec(tmp_path, **changes))
    assert (record.outcome.value, record.right, record.agreement, record.why) == (outcome, right, agreement, why)
    assert record.correct == (None if right is None else right == "card")
    assert record.annotators == tuple("abcdef"[number] for number, one in enumerate(said) if one is not None)


def test_the_last_word_of_a_person_counts(tmp_path: Path) -> None:
    first = Reviewed(item="request-1", annotator="a", answer="card", at=NOON + timedelta(hours=1))
    second = first.model_copy(update={"answer": "loan", "at": NOON + timedelta(hours=2)})
    record = judge_review(Review(item=item(1), said=(second, first)), spec(tmp_path))
    assert (record.right, record.annotators, record.reviewed_at) == ("loan", ("a",), second.at)


@pytest.mark.parametrize(
    ("task", "said", "text", "problem"),
    [
        (CLASSIFY, "card ", "card", None),
        (CLASSIFY, "Card", "Card", "'Card' is no label of the task"),
        (EXTRACT, '{"b": 1.0,\n "a": 2}', '{"a": 2, "b": 1}', None),
        (EXTRACT, "{", "{", "'{' is not JSON"),
        (EXTRACT, '{"a": NaN}', '{"a": NaN}', "'{\"a\": NaN}' is not JSON"),
        (CHAT, " Yes. ", "Yes.", None),
        (CHAT, " ", "", "it is empty"),
        (CALL, '[{"name": "find", "arguments": {"b": 1, "a": 2}}]',
         '[{"arguments": {"a": 2, "b": 1}, "name": "find"}]', None),
        (CALL, '[{"id": "x", "type": "function", "function": {"name": "find", "arguments": "{\\"a\\": 1}"}}]',
         '[{"arguments": {"a": 1}, "name": "find"}]', None),
        (CALL, "I cannot.", "I cannot.", None),
        (CALL, '{"name": ', '{"name":', "is no call of a tool"),
    ],
)  # fmt: skip
def test_answers_are_compared_in_one_form(task: TaskSpec, said: str, text: str, problem: str | None) -> None:
    found = read_said(said, task)
    assert found.text == text
    assert (found.problem is None) == (problem is None)
    assert problem is None or problem in str(found.problem)


def test_rows_have_the_columns_of_the_data(tmp_path: Path) -> None:
    data = DataSpec(source="rows.jsonl", text_field="body", target_field="team", source_field="from", time_field="when")
    ours = spec(tmp_path, data=data)
    write_reviews([review(item(1), "loan", "card", "loan")], ours)
    (row,) = lines(ours.rows)
    assert row == {
        "id": "review-request-1", "body": "text 1", "team": "loan", "from": "review:a,c",
        "when": "2026-05-01T12:00:01+00:00",
    }  # fmt: skip


def test_rows_of_messages_and_of_json(tmp_path: Path) -> None:
    chat = DataSpec(source="rows.jsonl", messages_field="messages", id_field=None)
    one = item(1, answer='{"price": 3}', choices=())
    ours = spec(tmp_path, data=chat, task=EXTRACT)
    write_reviews([review(one, '{"price": 4}')], ours)
    assert lines(ours.rows) == [
        {"messages": [{"role": "user", "content": "text 1"}, {"role": "assistant", "content": '{"price": 4}'}]}
    ]
    plain = spec(tmp_path / "plain", task=EXTRACT)
    write_reviews([review(one, '{"price": 4}')], plain)
    assert lines(plain.rows) == [{"id": "review-request-1", "text": "text 1", "label": {"price": 4}}]


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        (({"role": "user", "content": "hello"},), "hello"),
        (({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},), "a\nb"),
        (({"role": "developer", "content": "Other."}, {"role": "user", "content": "hello"}),
         [{"role": "system", "content": "Other."}, {"role": "user", "content": "hello"}]),
        (({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}),
         [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]),
        (({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]},), None),
        (({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}), None),
        ((), None),
    ],
    ids=["text", "parts", "own instruction", "conversation", "picture", "no question", "nothing"],
)  # fmt: skip
def test_what_a_request_becomes(tmp_path: Path, messages: tuple[dict[str, Any], ...], text: Any) -> None:
    ours = spec(tmp_path)
    written = write_reviews([review(item(1, messages=messages), "card")], ours)
    if text is None:
        assert written.records[0].outcome is ReviewOutcome.UNUSABLE
        assert lines(ours.rows) == []
    else:
        assert [row["text"] for row in lines(ours.rows)] == [text]


def test_candidates_for_the_golden_set_are_never_rows(tmp_path: Path) -> None:
    ours = spec(tmp_path)
    same = item(3, messages=({"role": "user", "content": "Text  2"},))
    reviews = [review(item(1), "card"), review(item(2), "card"), review(same, "card")]
    assert write_reviews(reviews, ours).new == 3
    assert ids(ours.rows) == ["review-request-1", "review-request-2", "review-request-3"]
    # Somebody ticks it later: it leaves the rows, and so does what asks the same.
    ticked = review(item(2), "card", "card", golden=[1])
    written = write_reviews([reviews[0], ticked, reviews[2]], ours)
    assert ids(ours.rows) == ["review-request-1"]
    assert ids(ours.golden_candidates) == ["review-request-2"]
    assert [record.outcome.value for record in written.records] == ["row", "golden", "golden_text"]
    assert written.records[2].why == "a candidate for the golden set asks the same"
    assert written.new == 0


def test_a_wish_keeps_an_item_out_of_the_rows_even_where_people_disagree(tmp_path: Path) -> None:
    ours = spec(tmp_path)
    same = item(2, messages=item(1).messages)
    written = write_reviews([review(item(1), "card", "loan", golden=[0]), review(same, "card")], ours)
    assert [record.outcome.value for record in written.records] == ["disputed", "golden_text"]
    assert (lines(ours.rows), lines(ours.golden_candidates)) == ([], [])
    silent = write_reviews([review(item(1), None, golden=[0]), review(same, "card")], ours)
    assert [record.outcome.value for record in silent.records] == ["declined", "golden_text"]


def test_files_do_not_depend_on_the_order_or_the_number_of_runs(tmp_path: Path) -> None:
    reviews = [review(item(number), "card" if number % 2 else "loan") for number in range(1, 6)]
    one, many = spec(tmp_path / "one"), spec(tmp_path / "many")
    write_reviews(reviews, one)
    news = [write_reviews(reviews[: number + 1][::-1], many).new for number in (2, 0, 4)]
    assert news == [3, 0, 2]
    for file in ("rows.jsonl", "golden.jsonl", "reviews.jsonl"):
        assert (tmp_path / "one/reviews" / file).read_bytes() == (tmp_path / "many/reviews" / file).read_bytes()
    assert ids(one.rows) == [f"review-request-{number}" for number in range(1, 6)]


def test_what_the_queue_has_forgotten_is_kept(tmp_path: Path) -> None:
    ours = spec(tmp_path)
    write_reviews([review(item(1), "card"), review(item(2), "loan")], ours)
    written = write_reviews([review(item(2), "card")], ours)  # the queue wins where it has it
    assert [(record.item, record.right) for record in written.records] == [("request-1", "card"), ("request-2", "card")]
    assert written.agreement == 1.0
    assert write_reviews([], ours).records == written.records


def test_a_file_that_stays_as_it_is_keeps_its_time_of_change(tmp_path: Path) -> None:
    ours = spec(tmp_path)
    write_reviews([review(item(1), "card")], ours)
    before = Path(ours.rows).stat()
    write_reviews([review(item(1), "card")], ours)
    assert Path(ours.rows).stat().st_mtime_ns == before.st_mtime_ns
    assert not list(Path(ours.rows).parent.glob("*.part"))


def test_the_record_says_what_a_monitor_needs(tmp_path: Path) -> None:
    ours = spec(tmp_path)
    one = item(1, reason=ReviewReason.DISAGREED, other="loan", confidence=0.4)
    write_reviews([review(one, "loan", "loan", "card")], ours)
    (record,) = lines(Path(ours.rows).with_name("reviews.jsonl"))
    assert {name: record[name] for name in record if name != "review"} == {
        "item": "request-1", "name": "complaints", "version": "complaints@1", "at": "2026-05-01T12:00:01Z",
        "reviewed_at": "2026-05-01T13:02:00Z", "reason": "disagreed", "answer": "card", "right": "loan",
        "correct": False, "agreement": pytest.approx(2 / 3), "annotators": ["a", "b", "c"], "outcome": "row", "why": "",
    }  # fmt: skip
    assert record["review"]["item"]["other"] == "loan"
    assert read_records(Path(ours.rows).with_name("reviews.jsonl"))[0].review.item == one


def test_a_record_that_is_none_is_an_error_with_its_line(tmp_path: Path) -> None:
    ours = spec(tmp_path)
    write_reviews([review(item(1), "card")], ours)
    path = Path(ours.rows).with_name("reviews.jsonl")
    path.write_text(path.read_text() + '{"item": "x"}\n')
    with pytest.raises(StoreError, match="no record of a review") as error:
        write_reviews([review(item(2), "card")], ours)
    assert error.value.where == f"{path}:2"
    assert ids(ours.rows) == ["review-request-1"]  # nothing was written


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "reviews").write_text("a file where a folder should be")
    with pytest.raises(StoreError, match="cannot be"):
        write_reviews([review(item(1), "card")], spec(tmp_path))


def test_counts_of_a_run(tmp_path: Path) -> None:
    reviews = [
        review(item(1), "card"), review(item(2), "loan"), review(item(3), "card", golden=[0]),
        review(item(4), "card", "loan"), review(item(5)), review(item(6), "nonsense"),
    ]  # fmt: skip
    result = write_reviews(reviews, spec(tmp_path)).result(sent=4, waiting=2, page="http://page", trouble="")
    assert result.model_dump(exclude={"page", "trouble"}) == {
        "sent": 4, "waiting": 2, "rows": 2, "candidates": 1, "disputed": 1, "declined": 1, "unusable": 1,
        "agreement": pytest.approx(2 / 3), "new": 3,
    }  # fmt: skip
    assert judge_reviews([], spec(tmp_path)) == ()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rows": "s3://bucket/rows.jsonl"}, "has to be a file of this machine"),
        ({"golden_candidates": "rows.jsonl", "rows": "rows.jsonl"}, "must be different files"),
        ({"golden_candidates": "x/reviews.jsonl", "rows": "x/rows.jsonl"}, "must be different files"),
        ({"queue": "label_studio"}, "needs `url`"),
        ({"url": "http://x"}, "is for label_studio"),
        ({"annotators": 2, "users": ("ada",)}, "need as many `users`"),
        ({"users": ("ada", "ada")}, "twice"),
        ({"users": tuple("abcdefghijk")}, "10 people"),
        ({"min_agreement": 0.5}, "greater than 0.5"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        spec(tmp_path, **changes)


def lines(path: str | Path) -> list[Any]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def ids(path: str) -> list[str]:
    return [row["id"] for row in lines(path)]
