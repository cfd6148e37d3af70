"""The Prefect tasks of distilling."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.context import FlowRunContext

from tasks.contracts.dev import DevResult
from tasks.contracts.distill import DistillEffect, DistillResult, DistillSpec, RewrittenRef, SideOnDev
from tasks.contracts.errors import DataError
from tasks.contracts.references import (
    BaseModelRef,
    GoldenSetRef,
    MetricComparison,
    SplitsRef,
    TrainedModelRef,
    ValidDatasetRef,
)
from tasks.contracts.synthesis import MANNERS
from tasks.runtime import open_store, progress_of, say_done
from tasks.store import fingerprint

_DISTILL_VERSION = 1  # raise when the same answers of a teacher give other splits
_JOURNAL_VERSION = 1  # raise when a journal of before can no longer be read; what it paid for is then lost
_REPORT_VERSION = 1
# What of a result names places: where the store is does not belong into its files.
_PLACES = {"uri", "step", "fingerprint", "digest", "reused", "kind", "source", "settings", "report"}


@task(name="rewrite answers", persist_result=False, cache_policy=NO_CACHE)
def rewrite_training_answers(
    splits: SplitsRef, valid: ValidDatasetRef, golden: GoldenSetRef, base: BaseModelRef, spec: DistillSpec
) -> RewrittenRef:
    """Have the teacher rewrite the answers of the training rows; what was paid is paid once.

    Raises:
        DataError: the teacher changed nothing, so there is nothing to compare.
        SpecError: no teacher rewrites answers of such a task.
    """
    from tasks.data.curate import REPORT
    from tasks.data.distill.report import funnel_words
    from tasks.data.distill.rewrite import ORIGINALS, SOURCE, rewrite_answers
    from tasks.data.ingest import ROWS
    from tasks.data.synthesis.prompts import check_can_be_written
    from tasks.data.synthesis.steps import noted_ids, teacher_key
    from tasks.data.validate import NOTES

    training = spec.training
    check_can_be_written(training.task)
    store = open_store(training.execution)
    checked, curated = store.open(valid.uri), store.open(splits.uri)
    config = spec.model_dump(mode="json", exclude={"training": True, "teacher": MANNERS})
    config |= {
        "task": training.task.model_dump(mode="json"),
        "columns": training.data.model_dump(
            mode="json", include={name for name in type(training.data).model_fields if name.endswith("_field")}
        ),
        "near_duplicate": training.curate.near_duplicate,
        "accept_risks": training.curate.accept_risks,
        "max_tokens": training.train.max_tokens,
        "learning_rate": training.train.learning_rate,
    }
    # The rows alone: the result of a validation holds the time at which it was made.
    inputs = {
        "splits": splits.digest,
        "rows": checked.manifest.files[ROWS].sha256,
        "notes": checked.manifest.files[NOTES].sha256,
        "golden": golden.digest,
        "base": base.digest,
    }
    # One for a task and a teacher: whatever else changes, an answer that was paid for is found there.
    journal = fingerprint(
        "distill-answers",
        _JOURNAL_VERSION,
        {"name": training.name, "url": spec.teacher.url, "model": spec.teacher.model},
        {},
    )

    with progress_of("rewrite answers") as listener:

        def make(folder: Path) -> dict[str, Any]:
            rows = store.files(checked)
            made = rewrite_answers(
                spec,
                store.files(curated),
                rows / ROWS,
                golden,
                store.files(store.open(base.uri)) / "model",
                folder,
                store.scratch("distill-answers", journal),
                teacher_key(spec.teacher),
                noted_ids(rows / NOTES),
                listener,
            )
            return {**made._asdict(), "traffic": made.traffic._asdict(), "name": training.name}

        artefact = store.produce("distill", _DISTILL_VERSION, config, inputs, make)
    facts, files = artefact.manifest.facts, store.files(artefact)
    report = json.loads((files / REPORT).read_text(encoding="utf-8"))
    stopped = f"; stopped early, {facts['stopped']}" if facts["stopped"] else ""
    say_done("rewrite answers", f"{funnel_words(report)}{stopped}", reused=artefact.reused)
    if not facts["rewritten"] and not facts["left_out"]:
        raise DataError(
            f"The teacher changed none of the {report['rows']:,} answers ({funnel_words(report)}), so there is nothing "
            "to compare.",
            where=str(files / ORIGINALS),
            fix="read there why; change `instruction`, set `relabel`, raise the budget, or ask another teacher",
        )
    return RewrittenRef(
        splits=SplitsRef(
            **artefact.reference(), train_rows=facts["train"], dev_rows=facts["dev"], removed=splits.removed
        ),
        originals=str(files / ORIGINALS),
        source=str(files / SOURCE),
        rewritten=facts["rewritten"],
        left_out=facts["left_out"],
        report=report,
    )


@task(name="report distillation", persist_result=False, cache_policy=NO_CACHE)
def report_distillation(
    spec: DistillSpec,
    rewritten: RewrittenRef,
    trained: tuple[TrainedModelRef, TrainedModelRef],
    on_dev: tuple[DevResult, DevResult],
    comparisons: Sequence[MetricComparison],
) -> DistillResult:
    """Write `report.json` and `report.md`, and show them on the page of the run.

    Args:
        spec: what was asked.
        rewritten: the new splits.
        trained: on the original answers, and on the rewritten ones.
        on_dev: both on the same dev rows.
        comparisons: the differences, the deciding one first.
    """
    from tasks.data.distill.report import better_sentence, effect_sentence, report_markdown, way_to_the_gate
    from tasks.data.distill.source import settings_for
    from tasks.data.synthesis.report import cost_words

    store = open_store(spec.training.execution)
    sides = [
        SideOnDev(
            splits=store.open(model.uri).manifest.inputs["splits"],
            model=model.uri,
            merged_digest=model.merged_digest,
            dev_loss=model.dev_loss,
            metrics=dev.metrics,
        )
        for model, dev in zip(trained, on_dev, strict=True)
    ]
    inputs = {
        "answers": rewritten.splits.digest,
        "original": on_dev[0].digest,
        "rewritten": on_dev[1].digest,
        "original_model": trained[0].digest,
        "rewritten_model": trained[1].digest,
    }
    config = {"name": spec.training.name, "metric": spec.training.policy.metric}
    said = {
        "effect": effect_of(comparisons[0]),
        "original": sides[0],
        "rewritten": sides[1],
        "comparisons": tuple(comparisons),
        "rows": rewritten.report["rows"],
        "changed": rewritten.rewritten,
        "source": rewritten.source,
        "settings": settings_for(rewritten.source, spec.training.data),
    }

    def result_at(folder: Path, **reference: Any) -> DistillResult:
        return DistillResult(**reference, **said, report=str(folder / "report.md"))

    def make(folder: Path) -> dict[str, Any]:
        result = result_at(folder, uri="", step="", fingerprint="", digest="")
        record = result.model_dump(mode="json", exclude=_PLACES)
        for side in ("original", "rewritten"):
            record[side].pop("model")
        record["answers"] = rewritten.report
        (folder / "report.json").write_text(json.dumps(record, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        text = report_markdown(result, rewritten.report, cost_words(rewritten.report))
        (folder / "report.md").write_text(text, encoding="utf-8")
        return {"effect": result.effect.value}

    artefact = store.produce("distill_report", _REPORT_VERSION, config, inputs, make)
    files = store.files(artefact)
    result = result_at(files, **artefact.reference())
    sentence = effect_sentence(result.effect, result.comparisons[0])
    say_done("distillation", f"{sentence} {better_sentence(result).split('.')[0]}.", reused=artefact.reused)
    if FlowRunContext.get() is not None:
        create_markdown_artifact(
            (files / "report.md").read_text(encoding="utf-8") + way_to_the_gate(result),
            key=f"{spec.training.name.replace('_', '-')}-distillation",
            description=sentence,
        )
    return result


def effect_of(deciding: MetricComparison) -> DistillEffect:
    """A gain or a loss is shown if the whole interval lies on one side of zero."""
    if deciding.low > 0:
        return DistillEffect.GAIN
    return DistillEffect.LOSS if deciding.high < 0 else DistillEffect.NONE_SHOWN
