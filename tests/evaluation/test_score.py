"""Scoring, by tables."""

from __future__ import annotations

import pytest

from tasks.contracts.references import ItemOutcome
from tasks.contracts.spec import TaskSpec
from tasks.evaluation.score import class_scores, macro_f1, means, metric_of, score_answer
from tests.tool_toys import BOTH, CALL, REFUND, RESTART, WORDS

CLASSIFY = TaskSpec(kind="classify", instruction="Which?", labels=("card", "loan", "mortgage"))
EXTRACT = TaskSpec(
    kind="extract",
    instruction="Read the price.",
    json_schema={
        "type": "object",
        "properties": {"amount": {"type": ["number", "null"]}, "currency": {"type": ["string", "null"]}},
        "required": ["amount"],
        "additionalProperties": False,
    },
)
CHAT = TaskSpec(kind="chat", instruction="Talk.")


@pytest.mark.parametrize(
    ("prediction", "exact", "valid"),
    [
        ("card", 1, 1),
        (" card\n", 1, 1),
        ("loan", 0, 1),
        ("Card", 0, 0),
        ("card.", 0, 0),
        ("The product is card", 0, 0),
        ("", 0, 0),
    ],
)
def test_a_label_is_right_or_wrong_and_known_or_not(prediction: str, exact: float, valid: float) -> None:
    assert score_answer(CLASSIFY, "card", prediction) == {"exact_match": exact, "valid_output": valid}


@pytest.mark.parametrize(
    ("prediction", "exact", "valid", "amount", "currency"),
    [
        ('{"amount": 29, "currency": "€"}', 1, 1, 1, 1),
        ('{ "currency":"€","amount":29.0 }', 1, 1, 1, 1),
        ('{"amount": 29.5, "currency": "€"}', 0, 1, 0, 1),
        ('{"amount": 29}', 0, 1, 1, 0),
        ('{"currency": "€"}', 0, 0, 0, 1),
        ('{"amount": "29", "currency": "€"}', 0, 0, 0, 1),
        ('{"amount": 29, "currency": "€", "tax": 0}', 0, 0, 1, 1),
        ('{"amount": true, "currency": "€"}', 0, 0, 0, 1),
        ('{"amount": NaN, "currency": "€"}', 0, 0, 0, 0),
        ('{"amount": 1e999, "currency": "€"}', 0, 0, 0, 0),
        ('{"amount": 29, "currency": "€"', 0, 0, 0, 0),
        ('```json\n{"amount": 29, "currency": "€"}\n```', 0, 0, 0, 0),
        ("[29]", 0, 0, 0, 0),
        ("29", 0, 0, 0, 0),
        ("[" * 100_000, 0, 0, 0, 0),
        ("", 0, 0, 0, 0),
    ],
)
def test_json_is_compared_by_value_and_held_to_its_schema(
    prediction: str, exact: float, valid: float, amount: float, currency: float
) -> None:
    assert score_answer(EXTRACT, '{"amount": 29, "currency": "€"}', prediction) == {
        "exact_match": exact,
        "valid_output": valid,
        "field:amount": amount,
        "field:currency": currency,
        "field_match": (amount + currency) / 2,
    }


def test_a_field_that_both_lack_matches() -> None:
    assert score_answer(EXTRACT, '{"amount": null}', '{"amount": null}')["field:currency"] == 1.0


@pytest.mark.parametrize(("prediction", "exact", "valid"), [("Hello.", 1, 1), ("Hi.", 0, 1), ("  ", 0, 0)])
def test_free_text_matches_exactly_or_not(prediction: str, exact: float, valid: float) -> None:
    assert score_answer(CHAT, "Hello. ", prediction) == {"exact_match": exact, "valid_output": valid}


@pytest.mark.parametrize(
    ("target", "prediction", "exact", "valid", "name", "arguments"),
    [
        (REFUND, REFUND, 1, 1, 1, 1),
        (REFUND, '<tool_call>{"name": "refund", "arguments": {"order": 7.0}}</tool_call>', 1, 1, 1, 1),
        (BOTH, f"{RESTART[:-1]}, {REFUND[1:]}", 1, 1, 1, 1),
        (REFUND, REFUND.replace("7", "8"), 0, 1, 1, 0),
        (REFUND, REFUND.replace("7", '"7"'), 0, 0, 1, 0),
        (REFUND, REFUND.replace('"order": 7', '"order": 7, "why": "late"'), 0, 0, 1, 0.5),
        (REFUND, RESTART, 0, 1, 0, 0),
        (REFUND, '[{"arguments": {}, "name": "delete"}]', 0, 0, 0, 0),
        (REFUND, BOTH, 0, 1, 0, 0.5),
        (BOTH, REFUND, 0, 1, 0, 0.5),
        (REFUND, f"{REFUND[:-1]}, {REFUND[1:]}", 0, 1, 0, 0.5),
        (REFUND, WORDS, 0, 1, 0, 0),
        (WORDS, WORDS, 1, 1, 1, 1),
        (WORDS, "I cannot do that.", 1, 1, 1, 1),
        (WORDS, REFUND, 0, 1, 0, 0),
        (WORDS, "", 0, 0, 0, 0),
        (WORDS, '<tool_call>{"name": "refund"', 0, 0, 0, 0),
        (REFUND, REFUND[:-1], 0, 0, 0, 0),
    ],
)
def test_calls_are_right_whatever_their_order_and_form(
    target: str, prediction: str, exact: float, valid: float, name: float, arguments: float
) -> None:
    assert score_answer(CALL, target, prediction) == {
        "exact_match": exact, "valid_output": valid, "call:name": name, "call:arguments": arguments,
    }  # fmt: skip


def test_parallel_calls_of_one_tool_are_held_against_those_most_like_them() -> None:
    orders = ", ".join(f'{{"arguments": {{"order": {number}}}, "name": "refund"}}' for number in (7, 8))
    swapped = ", ".join(f'{{"arguments": {{"order": {number}}}, "name": "refund"}}' for number in (9, 7))
    scores = score_answer(CALL, f"[{orders}]", f"[{swapped}]")
    assert scores == {"exact_match": 0, "valid_output": 1, "call:name": 1, "call:arguments": 0.5}


def outcome(number: int, target: str, prediction: str) -> ItemOutcome:
    return ItemOutcome(
        id=str(number),
        text="",
        target=target,
        prediction=prediction,
        scores=score_answer(CLASSIFY, target, prediction),
        latency_ms=1.0,
        prompt_tokens=1,
        output_tokens=1,
    )


def test_precision_recall_and_f1_of_each_label_by_hand() -> None:
    pairs = [("card", "card"), ("card", "loan"), ("card", "nonsense"), ("loan", "loan"), ("loan", "loan ")]
    outcomes = [outcome(number, *pair) for number, pair in enumerate(pairs)]
    card, loan, mortgage = class_scores(CLASSIFY, outcomes)
    assert (card.precision, card.recall, card.f1, card.support) == (1.0, pytest.approx(1 / 3), pytest.approx(0.5), 3)
    assert (loan.precision, loan.recall, loan.f1, loan.support) == (pytest.approx(2 / 3), 1.0, pytest.approx(0.8), 2)
    assert (mortgage.label, mortgage.f1, mortgage.support) == ("mortgage", 0.0, 0)
    assert macro_f1([card, loan, mortgage]) == pytest.approx((0.5 + 0.8) / 2), "a label without items does not count"
    assert means(outcomes) == {"exact_match": pytest.approx(3 / 5), "valid_output": pytest.approx(4 / 5)}


def test_every_metric_of_a_task_can_be_taken_over_all_items() -> None:
    pairs = [("card", "card"), ("card", "loan"), ("loan", "loan"), ("mortgage", "house")]
    outcomes = [outcome(number, *pair) for number, pair in enumerate(pairs)]
    found = {metric: metric_of(metric, CLASSIFY, outcomes) for metric in CLASSIFY.metrics}
    assert found == {
        "exact_match": pytest.approx(0.5),
        "valid_output": pytest.approx(0.75),
        "macro_f1": pytest.approx((2 / 3 + 2 / 3 + 0) / 3),
    }

    answers = [('{"amount": 1, "currency": "€"}', '{"amount": 1, "currency": "$"}'), ('{"amount": 2}', '{"amount": 2}')]
    extracted = [
        outcome(number, target, prediction).model_copy(update={"scores": score_answer(EXTRACT, target, prediction)})
        for number, (target, prediction) in enumerate(answers)
    ]
    assert EXTRACT.metrics == ("exact_match", "valid_output", "field:amount", "field:currency", "field_match")
    assert {metric: metric_of(metric, EXTRACT, extracted) for metric in EXTRACT.metrics} == {
        "exact_match": 0.5, "valid_output": 1.0, "field:amount": 1.0, "field:currency": 0.5, "field_match": 0.75,
    }  # fmt: skip
    assert CHAT.metrics == ("exact_match", "valid_output")
    called = [
        outcome(number, target, answer).model_copy(update={"scores": score_answer(CALL, target, answer)})
        for number, (target, answer) in enumerate([(REFUND, REFUND), (REFUND, BOTH)])
    ]
    assert {metric: metric_of(metric, CALL, called) for metric in CALL.metrics} == {
        "exact_match": 0.5, "valid_output": 1.0, "call:name": 0.5, "call:arguments": 0.75,
    }  # fmt: skip
