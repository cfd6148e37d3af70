"""A registered model answers in a new process, offline and without Goldgate, as the evaluation's rules say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tasks.contracts.prompt import Prompt
from tasks.contracts.rows import Message, Row
from tasks.tracking import registered_files, tracking_uri
from tests.registry.workshop import LABELS, PROMPT, Workshop

_TEXTS = [
    "They charged my card twice and nobody answers.",
    "loan",
    "Fraud on the card! " * 12,
    "Überweisung kam nie an – 29,95 €",
    "",
    *(f"complaint {number * 7919} about a card or loan" for number in range(15)),
]
_SCHEMA = {"type": "object", "properties": {"amount": {"type": "number"}}}

_NEW_PROCESS = """
import json, socket, sys
for room in ("tasks", "flows", "goldgate", "expectations"):
    sys.modules[room] = None  # importing it is an error
def refuse(*_):
    raise OSError("no network in this test")
socket.socket.connect = refuse
import mlflow, pandas
uri, names, texts = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
mlflow.set_tracking_uri(uri)
frame = pandas.DataFrame({"text": texts})
answers = {}
for name in names:
    model = mlflow.pyfunc.load_model(f"models:/{name}@champion")
    try:
        model.predict(frame.rename(columns={"text": "complaint"}))
        refused = ""
    except Exception as error:
        refused = str(error)
    answers[name] = {"list": model.predict(texts), "frame": model.predict(frame), "refused": refused}
print(json.dumps(answers))
"""


def _step_by_step(folder: Path, prompt: Prompt, labels: tuple[str, ...], max_new_tokens: int) -> list[str]:
    """The answers by the rule itself: one text, no cache, every token of the vocabulary looked at in each step."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    words = [tokenizer.decode([token]) for token in range(len(tokenizer))]

    def allowed(token: int, written: str) -> bool:
        if token == tokenizer.eos_token_id:
            return written in labels
        writes = token < len(words) and token not in tokenizer.all_special_ids and words[token] != ""
        return writes and any(label.startswith(written + words[token]) for label in labels)

    answers = []
    for text in _TEXTS:
        messages = [message.as_chat() for message in prompt.messages(Row("x", 1, (Message("user", text),), ""))]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        drawn: list[int] = []
        for _ in range(max_new_tokens):
            logits = model(input_ids=torch.tensor([ids + drawn])).logits[0, -1].float()
            if labels:
                written = "".join(words[token] for token in drawn)
                logits[[token for token in range(len(logits)) if not allowed(token, written)]] = -torch.inf
            token = int(logits.argmax())
            if token == tokenizer.eos_token_id:
                break
            drawn.append(token)
        answers.append(str(tokenizer.decode(drawn, skip_special_tokens=True)))
    return answers


def _served(workshop: Workshop, name: str) -> Any:
    import mlflow

    return mlflow.pyfunc.load_model(str(registered_files(f"models:/{name}@champion", workshop.execution).root))


@pytest.fixture(scope="module")
def names(workshop: Workshop) -> list[str]:
    """Two registered models: one held to labels, one that writes freely."""
    one = workshop.trained("one")
    workshop.register(workshop.verdict(one), one, workshop.spec("classify"))
    extract = workshop.spec("extract", kind="extract", labels=(), json_schema=_SCHEMA)
    workshop.register(workshop.verdict(one), one, extract)
    return ["classify", "extract"]


def test_answers_by_the_rules(workshop: Workshop, names: list[str]) -> None:
    for name, labels, longest in zip(names, (LABELS, ()), (16, 8), strict=True):
        model = _served(workshop, name)
        model.unwrap_python_model().model.float()  # in bfloat16, batching alone changes an answer now and then
        expected = _step_by_step(workshop.model, PROMPT, labels, longest)
        assert len(set(expected)) > 1
        assert not labels or set(expected) == set(labels)
        assert model.predict(_TEXTS) == expected


def test_answers_in_a_new_process(workshop: Workshop, names: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _NEW_PROCESS, tracking_uri(workshop.execution), json.dumps(names), json.dumps(_TEXTS)],
        cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(tmp_path.iterdir()) == []
    answers = json.loads(done.stdout.splitlines()[-1])
    for name in names:
        here = _served(workshop, name).predict(_TEXTS)
        assert len(set(here)) > 1
        assert answers[name]["list"] == here
        assert answers[name]["frame"] == here
        assert "one column 'text', not 'complaint'" in answers[name]["refused"]


def test_text_that_does_not_fit_is_refused(workshop: Workshop, names: list[str]) -> None:
    with pytest.raises(Exception, match=r"a text is too long: .* of 512"):
        _served(workshop, names[0]).predict(["card " * 600])
