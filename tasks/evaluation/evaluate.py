"""One model on one frozen set."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from tasks.contracts.errors import EvaluationError, GoldenSetError
from tasks.contracts.progress import ProgressListener
from tasks.contracts.prompt import Decoding
from tasks.contracts.references import Conditions, EvaluationSummary, ItemOutcome, SystemUnderTest
from tasks.contracts.rows import Row
from tasks.contracts.spec import TaskKind, TaskSpec
from tasks.evaluation.engines import Answer, Engine
from tasks.evaluation.score import SCORER_VERSION, class_scores, macro_f1, means, score_answer


class Evaluation(NamedTuple):
    """Per-item outcomes in the order of the rows, and what they come to."""

    outcomes: list[ItemOutcome]
    summary: EvaluationSummary


def conditions(task: TaskSpec, golden_digest: str, decoding: Decoding, engine: str) -> Conditions:
    """What another evaluation must share with this one to be comparable."""
    return Conditions(
        golden_digest=golden_digest,
        instruction=task.instruction,
        decoding=decoding,
        engine=engine,
        scorer_version=SCORER_VERSION,
    )


def evaluate(
    engine: Engine,
    system: SystemUnderTest,
    rows: Sequence[Row],
    task: TaskSpec,
    decoding: Decoding,
    golden_digest: str,
    listener: ProgressListener,
) -> Evaluation:
    """Ask the model every row and score what it says: one outcome for each row, none left out.

    Raises:
        GoldenSetError: there are no rows, two share an id, or one has a label that the task does not know.
        EvaluationError: a row cannot be asked, or the engine left one unanswered.
        ServiceError: a server does not answer.
    """
    _check_rows(rows, task)
    started = time.perf_counter()
    answers = engine.answer(system.prompt, rows, decoding, listener)
    seconds = time.perf_counter() - started
    if len(answers) != len(rows):
        raise EvaluationError(
            f"The engine answered {len(answers)} of {len(rows)} items.",
            where=engine.identity,
            fix="run again; if it stays, the engine is faulty",
        )
    outcomes = [outcome_of(row, answer, task) for row, answer in zip(rows, answers, strict=True)]
    shared = conditions(task, golden_digest, decoding, engine.identity)
    return Evaluation(outcomes, _summary(system, shared, task, outcomes, seconds))


def outcome_of(row: Row, answer: Answer, task: TaskSpec) -> ItemOutcome:
    """One answer, scored."""
    return ItemOutcome(
        id=row.id,
        text=row.text,
        target=row.target,
        prediction=answer.prediction,
        scores=score_answer(task, row.target, answer.prediction),
        latency_ms=answer.latency_ms,
        prompt_tokens=answer.prompt_tokens,
        output_tokens=answer.output_tokens,
        confidence=answer.confidence,
        group=row.group,
        slice=row.slice,
    )


def _summary(
    system: SystemUnderTest, shared: Conditions, task: TaskSpec, outcomes: Sequence[ItemOutcome], seconds: float
) -> EvaluationSummary:
    import numpy as np

    metrics = means(outcomes)
    classes = class_scores(task, outcomes) if task.kind is TaskKind.CLASSIFY else ()
    if classes:
        metrics["macro_f1"] = macro_f1(classes)
    p50, p95 = np.percentile([outcome.latency_ms for outcome in outcomes], [50, 95])
    return EvaluationSummary(
        system=system,
        conditions=shared,
        items=len(outcomes),
        metrics=metrics,
        classes=classes,
        latency_p50_ms=float(p50),
        latency_p95_ms=float(p95),
        prompt_tokens=sum(outcome.prompt_tokens for outcome in outcomes),
        output_tokens=sum(outcome.output_tokens for outcome in outcomes),
        seconds=seconds,
    )


def _check_rows(rows: Sequence[Row], task: TaskSpec) -> None:
    fix = "freeze the golden set anew (`goldgate golden freeze`), or correct the task's labels"
    if not rows:
        raise GoldenSetError("The set to evaluate on has no items.", fix=fix)
    seen: set[str] = set()
    for row in rows:
        if row.id in seen:
            raise GoldenSetError("Two items have the same id.", where=f"item {row.id}", fix=fix)
        seen.add(row.id)
        if task.labels and row.target not in task.labels:
            raise GoldenSetError(
                f"An item has the label {row.target!r}, which the task does not know.",
                where=f"item {row.id} (line {row.line})",
                fix=fix,
            )
