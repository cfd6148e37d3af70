"""Tokens of a row, as training counts them, and only where there could be too many."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tasks.contracts.prompt import tuned_prompt
from tasks.contracts.rows import Message, Row
from tasks.contracts.spec import DataSpec
from tasks.data.ingest import ingest
from tasks.data.tokens import TokenCounter, TokenLimit
from tasks.data.validate import validate
from tasks.training.examples import tokenize_row
from tests.data.toy_data import CHAT, CLASSIFY, read_lines, rows, sentence, write_lines


def limit(model: Path, tokens: int, task: Any = CLASSIFY) -> TokenLimit:
    return TokenLimit(model, tuned_prompt(task), tokens)


def conversations() -> list[Row]:
    draw = random.Random(3)
    texts = [sentence(draw, n) for n in (1, 5, 40)] + ["😀 é ﷺ 漢字 " * 5, "\n\n  \t", "x" * 300]
    one = [Row(f"r{n}", n, (Message("user", text),), "billing") for n, text in enumerate(texts)]
    turns = (Message("system", "Be brief."), Message("user", "a"), Message("assistant", "b"), Message("user", "c d"))
    return [*one, Row("chat", 9, turns, "an answer\nof two lines")]


def test_tokens_are_those_that_training_counts(tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    counter = TokenCounter(limit(tiny_model, 10))
    for row in conversations():
        example = tokenize_row(row, tuned_prompt(CLASSIFY), tokenizer, 10_000)
        assert counter.count(row) == len(example.input_ids), row.id


def test_a_row_is_too_long_from_one_token_over_the_limit(tiny_model: Path) -> None:
    for row in conversations():
        tokens = TokenCounter(limit(tiny_model, 1)).count(row)
        assert TokenCounter(limit(tiny_model, tokens)).too_many(row) is None
        assert TokenCounter(limit(tiny_model, tokens - 1)).too_many(row) == tokens


def test_short_rows_are_not_tokenised(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = TokenCounter(limit(tiny_model, 1_000))
    monkeypatch.setattr(TokenCounter, "count", lambda self, row: pytest.fail("tokenised"))
    assert [counter.too_many(row) for row in conversations()] == [None] * 7


def test_a_row_that_would_be_cut_is_quarantined_with_its_length(tiny_model: Path, tmp_path: Path) -> None:
    records = [*rows(20), {"id": "long", "text": "word " * 400, "label": "billing"}]
    data = DataSpec(source=str(write_lines(tmp_path / "rows.jsonl", records)), max_invalid_share=0.1)
    for name in ("raw", "valid"):
        (tmp_path / name).mkdir()
    ingest(data, CLASSIFY.kind, tmp_path / "raw")
    counts = validate(
        tmp_path / "raw", CLASSIFY, data, tmp_path / "valid", lambda: tmp_path, tokens=limit(tiny_model, 512)
    )
    assert (counts.rows, counts.reasons) == (20, {"too_many_tokens": 1})
    (entry,) = read_lines(tmp_path / "valid/quarantine.jsonl")
    row = Row("long", 21, (Message("user", "word " * 400),), "billing")
    tokens = TokenCounter(limit(tiny_model, 512)).count(row)
    assert entry["reasons"] == [f"prompt and answer have {tokens:,} tokens, the limit is 512"]
    assert entry["checks"] == ["too_many_tokens"]


def test_chat_answers_count_too(tiny_model: Path, tmp_path: Path) -> None:
    row = Row("r", 1, (Message("user", "hi"),), "word " * 600)
    assert TokenCounter(limit(tiny_model, 512, CHAT)).too_many(row) is not None
    assert TokenCounter(limit(tiny_model, 5_000, CHAT)).too_many(row) is None
