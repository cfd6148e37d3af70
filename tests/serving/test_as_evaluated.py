"""What the gateway adds to a request, and what it leaves alone."""

from __future__ import annotations

from typing import Any

import pytest

from tasks.contracts.prompt import Prompt, Shot
from tasks.serving.gateway.as_evaluated import left_open
from tests.serving.records import version

SEVEN = version(7)  # instruction "Which product is it about?", choices card and loan, 8 tokens
SYSTEM = {"role": "system", "content": "Which product is it about?"}
ASKED = {"role": "user", "content": "I lost it"}
CHOICE = {"structured_outputs": {"choice": ["card", "loan"]}}
WHOLE = {"messages": [SYSTEM, ASKED], "temperature": 0, "max_tokens": 8, **CHOICE}


def without(name: str) -> dict[str, Any]:
    return {field: value for field, value in WHOLE.items() if field != name}


@pytest.mark.parametrize(
    ("body", "added"),
    [
        pytest.param({"messages": [ASKED]}, WHOLE, id="nothing said"),
        pytest.param({"messages": [SYSTEM, ASKED]}, WHOLE, id="the version's own instruction"),
        pytest.param(
            {"messages": [{"role": "system", "content": "Translate."}, ASKED]}, {"temperature": 0}, id="another one"
        ),
        pytest.param({"messages": [{"role": "developer", "content": "x"}]}, {"temperature": 0}, id="developer"),
        pytest.param({"messages": [ASKED], "temperature": 0.7}, without("temperature"), id="temperature"),
        pytest.param({"messages": [ASKED], "max_completion_tokens": 3}, without("max_tokens"), id="length"),
        pytest.param(
            {"messages": [ASKED], "response_format": {"type": "json_object"}}, without("structured_outputs"), id="form"
        ),
        pytest.param(
            {"messages": [ASKED, {"role": "assistant", "content": "card"}, ASKED]},
            WHOLE | {"messages": [SYSTEM, ASKED, {"role": "assistant", "content": "card"}, ASKED]},
            id="a conversation",
        ),
        pytest.param({"messages": "no list"}, {"temperature": 0}, id="not a conversation"),
    ],
)
def test_what_is_left_open_is_filled_in(body: dict[str, Any], added: dict[str, Any]) -> None:
    before = {name: list(value) if isinstance(value, list) else value for name, value in body.items()}
    assert left_open(body, SEVEN, chat=True) == added
    assert body == before


def test_a_bare_completion_gets_the_temperature_alone() -> None:
    assert left_open({"prompt": "x"}, SEVEN, chat=False) == {"temperature": 0}
    assert left_open({"prompt": "x", "temperature": 1}, SEVEN, chat=False) == {}


def test_worked_examples_come_before_the_question_and_free_answers_stay_free() -> None:
    prompt = Prompt(system="Answer.", shots=(Shot(user="one", assistant="1"),))
    decoding = SEVEN.decoding.model_copy(update={"choices": ()})
    free = SEVEN.model_copy(update={"prompt": prompt, "decoding": decoding})
    found = left_open({"messages": [ASKED]}, free, chat=True)
    assert [turn["content"] for turn in found["messages"]] == ["Answer.", "one", "1", "I lost it"]
    assert "structured_outputs" not in found
