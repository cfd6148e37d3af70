"""What counts as an answer to the known question."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tasks.contracts.prompt import Decoding, Prompt, Shot
from tasks.contracts.serving import VersionRef
from tasks.serving.probe import fault_of_reply, known_question

FREE, CLOSED = Decoding(max_new_tokens=64), Decoding(max_new_tokens=8, choices=("card", "debt"))


def reply(content: Any = "card", logprobs: Any = (-0.1, 0.0)) -> str:
    tokens = None if logprobs is None else {"content": [{"token": "x", "logprob": value} for value in logprobs]}
    return json.dumps({"choices": [{"message": {"content": content}, "logprobs": tokens}]})


@pytest.mark.parametrize(
    ("status", "text", "decoding", "fault"),
    [
        (200, reply(), CLOSED, None),
        (200, reply("anything"), FREE, None),
        (200, reply("anything"), CLOSED, "none of the choices: 'anything'"),
        (200, reply(""), FREE, "is empty"),
        (200, reply(None), FREE, "is empty"),
        (200, reply(logprobs=()), FREE, "is empty"),
        (200, reply(logprobs=(-0.1, float("nan"))), CLOSED, r"not numbers: \[-0.1, nan\]"),
        (200, reply(logprobs=(float("-inf"),)), CLOSED, "not numbers"),
        (200, reply(logprobs=(None,)), CLOSED, r"not numbers: \[None\]"),
        (200, reply(logprobs=(-0.1, -9999.0)), CLOSED, "a token without any probability"),
        (200, reply(logprobs=None), CLOSED, "no answer with logprobs"),
        (200, "{}", FREE, "no answer with logprobs: {}"),
        (200, "[]", FREE, "no answer with logprobs"),
        (200, "<html>", FREE, "no answer with logprobs: <html>"),
        (200, '{"choices": []}', FREE, "no answer with logprobs"),
        (500, "x" * 1000, FREE, "replies HTTP 500: x{200}$"),
        (404, reply(), FREE, "replies HTTP 404"),
    ],
)
def test_what_is_an_answer(status: int, text: str, decoding: Decoding, fault: str | None) -> None:
    found = fault_of_reply(status, text, decoding)
    assert found is None if fault is None else re.search(fault, str(found)), found


@pytest.mark.parametrize(
    ("decoding", "expected"),
    [
        (FREE, {"max_tokens": 16, "min_tokens": 1}),
        (CLOSED, {"max_tokens": 8, "structured_outputs": {"choice": ["card", "debt"]}}),
    ],
)
def test_the_question_is_asked_as_in_evaluation(decoding: Decoding, expected: dict[str, Any]) -> None:
    prompt = Prompt(system="Answer.", shots=(Shot(user="a", assistant="b"),))
    ref = VersionRef(name="c", version="7", digest="a" * 64, uri="models:/c/7", prompt=prompt, decoding=decoding)
    assert known_question(ref) == {
        "model": "c@7",
        "messages": [{"role": "system", "content": "Answer."}, {"role": "user", "content": "Hello"}],
        "temperature": 0,
        "logprobs": True,
        **expected,
    }
