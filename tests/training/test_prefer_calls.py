"""Preference pairs of a task with tools: a wrong call beside the right one, both as the template writes calls."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.contracts.prompt import tuned_prompt
from tasks.contracts.references import ItemOutcome
from tasks.contracts.rows import Message, Row
from tasks.evaluation.score import score_answer
from tasks.training.prefer import Pair, mine
from tests.tool_toys import BOTH, CALL, HERMES, REFUND, RESTART, WORDS

BROKEN = '<tool_call>{"name": "refund"'


@pytest.mark.parametrize(
    ("target", "answer", "pairs"),
    [
        (REFUND, RESTART, 1),
        (REFUND, REFUND.replace("7", "8"), 1),
        (REFUND, WORDS, 1),
        (REFUND, BROKEN, 1),
        (REFUND, '{"name": "refund", "parameters": {"order": 7.0}}', 0),
        (BOTH, f"{RESTART[:-1]}, {REFUND[1:]}", 0),
        (WORDS, REFUND, 1),
        (WORDS, "", 1),
        (WORDS, "I cannot do that.", 0),
    ],
)
def test_a_pair_is_a_call_that_should_have_been_another(target: str, answer: str, pairs: int) -> None:
    row = Row("d1", 1, (Message("user", "Help?"),), target)
    outcome = ItemOutcome(
        id="d1", text="Help?", target=target, prediction=answer, scores=score_answer(CALL, target, answer),
        latency_ms=1.0, prompt_tokens=9, output_tokens=9,
    )  # fmt: skip
    assert mine([row], [outcome], CALL, 32) == [Pair(row, answer, False)][:pairs]


def test_both_answers_of_a_pair_are_written_as_calls(tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    from tasks.training.prefer_fit import tokenize_pair

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = HERMES
    row = Row("d1", 1, (Message("user", "Help?"),), REFUND)
    chosen, rejected = tokenize_pair(Pair(row, RESTART, False), tuned_prompt(CALL), tokenizer, 5000)
    shared = len(chosen.input_ids) - chosen.answer_tokens
    assert chosen.input_ids[:shared] == rejected.input_ids[:shared]
    written = [tokenizer.decode(one.input_ids[shared:]) for one in (chosen, rejected)]
    assert written == [
        '<tool_call>\n{"name": "refund", "arguments": {"order": 7}}\n</tool_call><|im_end|>',
        '<tool_call>\n{"name": "restart", "arguments": {"device": "screen"}}\n</tool_call><|im_end|>',
    ]
