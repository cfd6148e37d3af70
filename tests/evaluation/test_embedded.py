"""The embedded engine against plain `generate`, and the rule of constrained choices."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from tasks.contracts.errors import EvaluationError, ModelError
from tasks.contracts.progress import Progress, ignore_progress
from tasks.contracts.prompt import Decoding, Prompt, Shot
from tasks.contracts.rows import Message, Row
from tasks.evaluation.engines.choices import Choices, token_bytes
from tasks.evaluation.engines.embedded import EmbeddedEngine, embedded_identity

LABELS = ("card", "credit_reporting", "debt_collection", "debt", "loan")
TEXTS = (
    "They reported a debt that is not mine on my credit report.",
    "Fee.",
    "The bank closed my account and charged a fee on my card, twice, and would not say why.",
    "café ☕ 1,299.00 USD",
    "They reported a debt.",
    "loan " * 30,
)
ROWS = [Row(f"r{n}", n, (Message("user", text),), "card") for n, text in enumerate(TEXTS)]
ROWS.append(Row("own", 9, (Message("system", "Another instruction."), Message("user", "Which?")), "card"))
PROMPTS = {
    "zero-shot": Prompt(system="Answer with one label."),
    "few-shot": Prompt(
        system="Answer with one label.",
        shots=(Shot(user="They call me.", assistant="debt"), Shot(user="My card.", assistant="card")),
    ),
}


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> EmbeddedEngine:
    return EmbeddedEngine(tiny_model, batch_size=3, dtype="float32")


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(tiny_model)


def generate(plain: tuple[Any, Any], prompt: Prompt, row: Row, **settings: Any) -> tuple[str, int, float]:
    """One row alone through `generate`: its text, prompt tokens, and probability of what was drawn."""
    import torch

    model, tokenizer = plain
    messages = [message.as_chat() for message in prompt.messages(row)]
    shown = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = model.generate(
        **shown, do_sample=False, return_dict_in_generate=True, output_scores=True, pad_token_id=3, **settings
    )
    drawn = made.sequences[0, shown["input_ids"].shape[1] :]
    log = sum(float(torch.log_softmax(s[0], -1)[t]) for s, t in zip(made.scores, drawn, strict=True))
    return tokenizer.decode(drawn, skip_special_tokens=True), shown["input_ids"].shape[1], math.exp(log)


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
def test_free_text_is_what_generate_writes_one_row_at_a_time(
    engine: EmbeddedEngine, plain: tuple[Any, Any], prompt: Prompt
) -> None:
    answers = engine.answer(prompt, ROWS, Decoding(max_new_tokens=6), ignore_progress)
    for row, answer in zip(ROWS, answers, strict=True):
        text, prompt_tokens, probability = generate(plain, prompt, row, max_new_tokens=6)
        assert (answer.prediction, answer.prompt_tokens) == (text, prompt_tokens), row.id
        assert answer.confidence == pytest.approx(probability, rel=1e-3), row.id
        assert answer.latency_ms > 0


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
def test_choices_are_what_constrained_generate_writes(
    engine: EmbeddedEngine, plain: tuple[Any, Any], prompt: Prompt
) -> None:
    """The reference works its rule out anew: try every token of the vocabulary, keep what a label starts with."""
    tokenizer = plain[1]
    written = {n: tokenizer.decode([n]) for n in range(4, len(tokenizer))}
    answers = engine.answer(prompt, ROWS, Decoding(max_new_tokens=24, choices=LABELS), ignore_progress)
    for row, answer in zip(ROWS, answers, strict=True):
        start = answer.prompt_tokens

        def allowed(_: int, ids: Any, start: int = start) -> list[int]:
            text = tokenizer.decode(ids[start:])
            ends = [tokenizer.eos_token_id] if text in LABELS else []
            return ends + [n for n, more in written.items() if any(label.startswith(text + more) for label in LABELS)]

        text, _, _ = generate(plain, prompt, row, max_new_tokens=24, prefix_allowed_tokens_fn=allowed)
        assert answer.prediction == text, row.id
        assert answer.prediction in LABELS
        assert 0 < (answer.confidence or 0) <= 1


def test_confidences_are_probabilities_of_labels(engine: EmbeddedEngine) -> None:
    """With two choices that part at the first letter, the odds are those of the first tokens that lead to each."""
    import torch

    (answer,) = engine.answer(PROMPTS["few-shot"], ROWS[:1], Decoding(max_new_tokens=9, choices=("a", "b")), _nothing)
    ids = engine.prompt_tokens(PROMPTS["few-shot"], ROWS[0])
    with torch.inference_mode():
        logits = engine._model(torch.tensor([ids])).logits[0, -1]
    pair = torch.softmax(logits[[engine._tokenizer.convert_tokens_to_ids(letter) for letter in "ab"]], -1)
    assert answer.prediction == "ab"[int(pair.argmax())]
    assert answer.confidence == pytest.approx(float(pair.max()), rel=1e-4)
    assert answer.output_tokens == 1, "one token settles it"


def _nothing(_: Progress) -> None:
    return None


def test_the_whole_conversation_is_tokenised_as_one(engine: EmbeddedEngine, plain: tuple[Any, Any]) -> None:
    fed: list[list[int]] = []
    model, forward = engine._model, engine._model.forward

    def spy(*args: Any, **kwargs: Any) -> Any:
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        if mask is None:  # the shared beginning
            fed.append(ids[0].tolist())
        elif ids.shape[1] > 1 or not fed[1:]:
            kept = mask[:, -ids.shape[1] :].bool()
            fed.extend(line[keep].tolist() for line, keep in zip(ids, kept, strict=True))
        return forward(*args, **kwargs)

    model.forward = spy
    try:
        engine.answer(PROMPTS["few-shot"], ROWS[:3], Decoding(max_new_tokens=1), ignore_progress)
    finally:
        model.forward = forward
    beginning, *rest = fed
    expected = [
        plain[1].apply_chat_template(
            [message.as_chat() for message in PROMPTS["few-shot"].messages(row)],
            add_generation_prompt=True,
            return_dict=False,
        )
        for row in ROWS[:3]
    ]
    assert len(beginning) > 20, "instruction and examples are run once"
    assert sorted(beginning + suffix for suffix in rest) == sorted(expected)


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_batching_and_order_change_nothing(tiny_model: Path, engine: EmbeddedEngine, batch_size: int) -> None:
    decoding = Decoding(max_new_tokens=24, choices=LABELS)
    expected = engine.answer(PROMPTS["zero-shot"], ROWS, decoding, ignore_progress)
    other = EmbeddedEngine(tiny_model, batch_size=batch_size, dtype="float32")
    answers = other.answer(PROMPTS["zero-shot"], ROWS[::-1], decoding, ignore_progress)[::-1]
    assert [a.prediction for a in answers] == [a.prediction for a in expected]
    assert [a.confidence for a in answers] == pytest.approx([a.confidence for a in expected], rel=1e-3)


def test_progress_reaches_the_end(engine: EmbeddedEngine) -> None:
    heard: list[Progress] = []
    engine.answer(PROMPTS["zero-shot"], ROWS, Decoding(max_new_tokens=1), heard.append)
    assert [(step.done, step.total, step.unit) for step in heard] == [
        (done, len(ROWS), "items") for done in (0, 3, 6, 7)
    ]


def test_no_rows_no_answers(engine: EmbeddedEngine) -> None:
    assert engine.answer(PROMPTS["zero-shot"], [], Decoding(max_new_tokens=1), ignore_progress) == []


def test_an_item_that_is_too_long_is_named(engine: EmbeddedEngine) -> None:
    long = Row("long one", 1, (Message("user", "9" * 600),), "card")
    with pytest.raises(EvaluationError, match="too long for the model") as caught:
        engine.answer(PROMPTS["zero-shot"], [*ROWS, long], Decoding(max_new_tokens=8), ignore_progress)
    assert "item long one" in (caught.value.where or "")


def test_identity_names_engine_version_and_number_format(tiny_model: Path) -> None:
    import transformers

    engine = EmbeddedEngine(tiny_model, batch_size=1, dtype="bfloat16")
    assert engine.identity == f"embedded/transformers {transformers.__version__}/bfloat16"
    assert embedded_identity("float32").endswith("/float32")


def test_a_model_without_chat_template_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "bare")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template"):
        EmbeddedEngine(folder, batch_size=1)


def test_a_folder_without_weights_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "empty")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        EmbeddedEngine(folder, batch_size=1)
    assert caught.value.where == str(folder)


TOKENS = {b"c": [1], b"ca": [2, 12], b"card": [3], b"rd": [4], b"d": [5], b"debt": [6], b"_x": [7], b" card": [8]}


@pytest.mark.parametrize(
    ("text", "allowed", "settled"),
    [
        (b"", [1, 2, 3, 5, 6, 12], None),
        (b"ca", [4], "card"),
        (b"card", [99], "card"),
        (b"debt", [7, 99], None),
        (b"debt_x", [99], "debt_x"),
        (b"zebra", [], None),
    ],
)
def test_a_token_is_allowed_if_it_goes_on_towards_a_choice(text: bytes, allowed: list[int], settled: str) -> None:
    choices = Choices(("card", "debt", "debt_x"), TOKENS, end_ids=[99])
    assert choices.allowed(text) == allowed
    assert choices.settled(text) == settled


def test_tokens_write_the_bytes_that_they_stand_for(plain: tuple[Any, Any]) -> None:
    tokenizer = plain[1]
    written = {number: text for text, numbers in token_bytes(tokenizer).items() for number in numbers}
    assert set(written) == set(range(len(tokenizer))) - set(tokenizer.all_special_ids)
    for text in ("credit_reporting", "29,95 €", "naïve ☕\n\t"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(written[number] for number in ids) == text.encode()
