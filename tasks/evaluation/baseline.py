"""The base model's best honest prompt: zero-shot or few-shot, whichever scores better on dev."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import NamedTuple

from tasks.contracts.progress import Progress, ProgressListener
from tasks.contracts.prompt import Decoding, Prompt, base_prompt
from tasks.contracts.rows import Row
from tasks.contracts.spec import TaskSpec
from tasks.evaluation.engines import Engine
from tasks.evaluation.evaluate import outcome_of
from tasks.evaluation.score import metric_of
from tasks.evaluation.shots import choose_shots


class PromptScore(NamedTuple):
    """A prompt and how it did on dev, in [0, 1]."""

    prompt: Prompt
    score: float


def prompts_to_try(task: TaskSpec, train: Sequence[Row], shots: int) -> list[Prompt]:
    """Zero-shot first, then few-shot with examples from the training split."""
    prompts = [base_prompt(task)]
    if shots:
        prompts.append(base_prompt(task, choose_shots(train, task, shots)))
    return prompts


def score_prompts(
    engine: Engine,
    prompts: Sequence[Prompt],
    dev: Sequence[Row],
    items: int,
    task: TaskSpec,
    decoding: Decoding,
    metric: str,
    listener: ProgressListener,
) -> list[PromptScore]:
    """Ask the same dev rows through each prompt; `metric` over at most `items` rows, drawn by hash.

    Raises:
        EvaluationError, ServiceError: as the engine.
    """
    rows = sorted(dev, key=lambda row: sha256(row.id.encode()).hexdigest())[:items]
    scored = []
    for index, prompt in enumerate(prompts):

        def heard(progress: Progress, before: int = index * len(rows), shots: int = len(prompt.shots)) -> None:
            listener(Progress(before + progress.done, len(prompts) * len(rows), progress.unit, f"{shots}-shot"))

        answers = engine.answer(prompt, rows, decoding, heard)
        outcomes = [outcome_of(row, answer, task) for row, answer in zip(rows, answers, strict=True)]
        scored.append(PromptScore(prompt, metric_of(metric, task, outcomes)))
    return scored


def best(scored: Sequence[PromptScore]) -> PromptScore:
    """The best prompt; of equals the first, which is the shorter one."""
    return max(scored, key=lambda one: one.score)
