"""One model on one set: an outcome for each row, and what they come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256

import pytest

from tasks.contracts.errors import EvaluationError, GoldenSetError, SpecError
from tasks.contracts.progress import ProgressListener, ignore_progress
from tasks.contracts.prompt import Decoding, Prompt, Shot, base_prompt, decoding_for, tuned_prompt
from tasks.contracts.references import SystemUnderTest
from tasks.contracts.rows import Message, Row
from tasks.contracts.spec import EvaluateSpec, TaskSpec
from tasks.evaluation.baseline import PromptScore, best, score_prompts
from tasks.evaluation.engines import Answer, check_engine, engine_identity
from tasks.evaluation.evaluate import evaluate

TASK = TaskSpec(kind="classify", instruction="Which?", labels=("card", "loan"))
DECODING = decoding_for(TASK, 8)
SYSTEM = SystemUnderTest(uri="m", digest="d" * 64, prompt=tuned_prompt(TASK), role="candidate", label="candidate")


@dataclass
class Scripted:
    """Says what it was told to, item by item; with examples in the prompt it is always right."""

    says: tuple[str, ...]
    identity: str = "scripted/1"

    def answer(
        self, prompt: Prompt, rows: Sequence[Row], decoding: Decoding, listener: ProgressListener
    ) -> list[Answer]:
        texts = [row.target for row in rows] if prompt.shots else self.says
        return [Answer(text, 0.5, 10.0 * (n + 1), 100, 2) for n, text in enumerate(texts)]

    def close(self) -> None:
        return


def rows(*targets: str) -> list[Row]:
    return [Row(f"r{n}", n, (Message("user", f"text {n}"),), target, slice="s") for n, target in enumerate(targets)]


def run(says: Sequence[str], items: Sequence[Row]) -> object:
    return evaluate(Scripted(tuple(says)), SYSTEM, items, TASK, DECODING, "g" * 64, ignore_progress)


def test_outcomes_and_summary() -> None:
    outcomes, summary = evaluate(
        Scripted(("card", "card", "loan", "what?")), SYSTEM, rows("card", "loan", "loan", "loan"), TASK, DECODING,
        "g" * 64, ignore_progress,
    )  # fmt: skip
    assert [outcome.id for outcome in outcomes] == ["r0", "r1", "r2", "r3"]
    assert [outcome.scores["exact_match"] for outcome in outcomes] == [1, 0, 1, 0]
    assert outcomes[3].prediction == "what?"
    assert (outcomes[0].confidence, outcomes[0].text, outcomes[0].slice) == (0.5, "text 0", "s")
    assert summary.metrics == {
        "exact_match": 0.5,
        "valid_output": 0.75,
        "macro_f1": pytest.approx((2 / 3 + 1 / 2) / 2),
    }
    assert (summary.items, summary.prompt_tokens, summary.output_tokens) == (4, 400, 8)
    assert (summary.latency_p50_ms, summary.latency_p95_ms) == (25.0, pytest.approx(38.5))
    assert summary.conditions.engine == "scripted/1"
    assert summary.conditions.golden_digest == "g" * 64
    assert summary.conditions.decoding.choices == ("card", "loan")


def test_an_unanswered_item_is_an_error() -> None:
    with pytest.raises(EvaluationError, match="answered 1 of 2 items"):
        run(["card"], rows("card", "loan"))


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "no items"),
        ([*rows("card"), *rows("loan")], "same id"),
        (rows("card", "yacht"), "label 'yacht', which the task does not know"),
    ],
)
def test_sets_that_cannot_be_evaluated_on(items: list[Row], message: str) -> None:
    with pytest.raises(GoldenSetError, match=message):
        run(["card"] * len(items), items)


def test_the_better_prompt_on_dev_is_the_baselines() -> None:
    prompts = [base_prompt(TASK), base_prompt(TASK, (Shot(user="text", assistant="card"),))]
    scored = score_prompts(
        Scripted(("card", "loan")), prompts, rows("card", "card", "card"), 2, TASK, DECODING, "exact_match",
        ignore_progress,
    )  # fmt: skip
    assert [one.score for one in scored] == [0.5, 1.0], "two rows of three were asked"
    assert best(scored).prompt == prompts[1]
    assert best([PromptScore(prompts[0], 0.5), PromptScore(prompts[1], 0.5)]).prompt == prompts[0], "the shorter one"


def test_the_policys_metric_chooses_the_prompt() -> None:
    """Zero-shot answers are right on two of three rows and never say "loan"; the examples know both."""

    class Halves(Scripted):
        def answer(
            self, prompt: Prompt, rows: Sequence[Row], decoding: Decoding, listener: ProgressListener
        ) -> list[Answer]:
            says = ["card", "loan", "loan"] if prompt.shots else ["card", "card", "card"]
            return [Answer(text, 0.5, 10.0, 100, 2) for text in says]

    prompts = [base_prompt(TASK), base_prompt(TASK, (Shot(user="text", assistant="card"),))]
    dev = sorted(rows("card", "card", "loan"), key=lambda row: sha256(row.id.encode()).hexdigest())
    dev = [replace(row, target=target) for row, target in zip(dev, ("card", "card", "loan"), strict=True)]
    scored = {
        metric: [
            one.score for one in score_prompts(Halves(()), prompts, dev, 3, TASK, DECODING, metric, ignore_progress)
        ]
        for metric in ("exact_match", "macro_f1", "valid_output")
    }
    assert scored == {
        "exact_match": pytest.approx([2 / 3, 2 / 3]),
        "macro_f1": pytest.approx([(0.8 + 0) / 2, (2 / 3 + 2 / 3) / 2]),
        "valid_output": [1.0, 1.0],
    }


@pytest.mark.parametrize(
    ("engine", "uri", "message"),
    [
        ("embedded", "openai:gpt", "behind a server, and no server is named"),
        ("http://127.0.0.1:1/v1", "/models/tiny", "this model is in files"),
    ],
)
def test_engine_and_model_must_go_together(engine: str, uri: str, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        check_engine(EvaluateSpec(engine=engine), uri)


def test_identities_differ_between_engines_only() -> None:
    assert engine_identity(EvaluateSpec(batch_size=1)) == engine_identity(EvaluateSpec(batch_size=64))
    assert engine_identity(EvaluateSpec(engine="http://h/v1")) == "openai/http://h/v1"
    with pytest.raises(SpecError, match="user or password"):
        engine_identity(EvaluateSpec(engine="http://u:p@h/v1"))
