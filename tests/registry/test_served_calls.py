"""The registered model of a task with tools stands alone, and answers as the evaluation's rules say."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tasks.contracts.calls import read_answer
from tasks.contracts.prompt import Prompt, Shot, base_prompt, decoding_for
from tasks.contracts.rows import Message, Row
from tasks.evaluation.engines.embedded import EmbeddedEngine
from tasks.registry.served_model import ServedModel, read_calls
from tasks.registry.versions import ServedTask
from tests.contracts.test_calls import BROKEN, WRITTEN
from tests.tool_toys import BOTH, CALL, REFUND, WORDS, with_template

PROMPT = base_prompt(
    CALL, (Shot(user="Both", assistant=BOTH), Shot(user="Poem", assistant=WORDS), Shot(user="Back", assistant=REFUND))
)


@pytest.mark.parametrize("text", [text for text, _ in (*WRITTEN, *BROKEN)])
def test_calls_are_read_as_the_evaluation_reads_them(text: str) -> None:
    reading = read_answer(text)
    assert read_calls(text) == (None if not reading.calls and reading.problem is None else reading.answer)


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    folder = tmp_path_factory.mktemp("served")
    served = ServedTask(task=CALL, prompt=PROMPT, decoding=decoding_for(CALL, 8))
    (folder / "task.json").write_text(served.model_dump_json())
    artifacts = {"task": str(folder / "task.json"), "model": str(with_template(tiny_model, folder / "model"))}
    model = ServedModel()
    model.load_context(SimpleNamespace(artifacts=artifacts))  # type: ignore[arg-type]  # all of it that is used
    model.model.config.max_position_embeddings = 2048  # the vocabulary of these tests spells tools letter by letter
    return model


@pytest.mark.parametrize("shots", [PROMPT.shots, PROMPT.shots[:1], ()])
def test_the_model_is_shown_what_the_evaluation_showed_it(model: ServedModel, shots: tuple[Shot, ...]) -> None:
    prompt = PROMPT.model_copy(update={"shots": shots})
    model.prompt = json.loads(prompt.model_dump_json())
    folder = Path(model.tokenizer.name_or_path)
    shown = EmbeddedEngine(folder, batch_size=1).prompt_tokens(prompt, Row("r", 1, (Message("user", "Money"),), REFUND))
    assert model.render("Money") == shown


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ('<tool_call>\n{"name": "refund", "arguments": {"order": 7.0}}\n</tool_call>', REFUND),
        ("<|pad|>ask someone else", WORDS),
        ("<tool_call>{", "<tool_call>{"),
    ],
)
def test_calls_are_answered_in_canonical_form(model: ServedModel, said: str, answer: str) -> None:
    model.prompt = json.loads(PROMPT.model_dump_json())
    tokens: Any = model.tokenizer(said, add_special_tokens=False)["input_ids"]
    assert model.text_of(tokens) == answer


def test_a_task_without_tools_is_answered_as_it_is_written(model: ServedModel) -> None:
    model.prompt = json.loads(Prompt(system="Talk.").model_dump_json())
    tokens: Any = model.tokenizer(REFUND.replace("7", "7.0"), add_special_tokens=False)["input_ids"]
    assert model.text_of(tokens) == REFUND.replace("7", "7.0")
