"""The run folder: what a run leaves for people, written whole or not at all."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import fsspec

from tasks.contracts.confidence import TRUST_FILE, LearntTrust, TrustRef
from tasks.contracts.errors import StoreError
from tasks.contracts.references import (
    EvaluationRef,
    EvaluationSummary,
    ItemOutcome,
    RawDatasetRef,
    RegisteredModelRef,
    Release,
    SplitsRef,
    TrainedModelRef,
    ValidDatasetRef,
    VerdictRef,
)
from tasks.contracts.spec import RetrainSpec
from tasks.report.noise import find_noise
from tasks.report.record import verdict_record
from tasks.report.render import ReportData, render_report
from tasks.report.views import MAX_QUARANTINE, CurvePoint, Funnel, QuarantinedRow
from tasks.report.words import Placed
from tasks.store import Store


class Run(NamedTuple):
    """The references of a whole run, from rows to what followed from the verdict.

    `links` maps what a page is called to its address; `champion_release` is how the baseline came to be champion;
    `trust` is what dev has shown of the candidate's confidence.
    """

    spec: RetrainSpec
    raw: RawDatasetRef
    valid: ValidDatasetRef
    splits: SplitsRef
    trained: TrainedModelRef
    baseline: EvaluationRef
    candidate: EvaluationRef
    verdict: VerdictRef
    release: Release
    registered: RegisteredModelRef | None
    links: Mapping[str, str]
    champion_release: Placed | None = None
    trust: TrustRef | None = None


def write_folder(store: Store, run: Run) -> str:
    """Write `verdict.json` and `report.html` to `runs/<name>-<UTC time>-<id>/` of the store; return the folder.

    Raises:
        StoreError: an artefact of the run is gone or was changed, or the store cannot be written.
    """
    created = datetime.now(UTC)
    name = f"{run.spec.name}-{created:%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:6]}"
    folder = str(Path(store.root, "runs", name)) if store.local else f"{store.root}/runs/{name}"
    record = verdict_record(
        run.spec, created, run.verdict, run.raw, run.release, run.registered, run.links, run.champion_release
    )
    files = {
        "report.html": render_report(gather(store, run, created, folder)),
        "verdict.json": json.dumps(record, indent=2, ensure_ascii=False) + "\n",
    }
    try:
        return _write_local(Path(folder), files) if store.local else _put(folder, files)
    except OSError as error:
        raise StoreError(
            f"The run folder cannot be written: {error.strerror or error}",
            where=folder,
            fix="free space or allow writing, then run again; finished steps are kept",
        ) from error


def gather(store: Store, run: Run, created: datetime, folder: str) -> ReportData:
    """Read what the report shows out of the store; `folder` is where it will be."""
    trained = store.files(store.open(run.trained.uri))
    valid = store.open(run.valid.uri)
    baseline = store.files(store.open(run.baseline.uri))
    candidate = store.files(store.open(run.candidate.uri))
    noise = find_noise(store, run.trained)
    return ReportData(
        spec=run.spec,
        created=created,
        folder=folder,
        verdict=run.verdict.verdict,
        release=run.release,
        evidence=str(store.files(store.open(run.verdict.uri))) if store.local else run.verdict.uri,
        baseline=_summary(baseline, run.baseline),
        candidate=_summary(candidate, run.candidate),
        baseline_outcomes=_outcomes(baseline),
        candidate_outcomes=_outcomes(candidate),
        trained=run.trained,
        curves=[CurvePoint.from_record(record) for record in _lines(trained / "curves.jsonl")],
        funnel=Funnel(
            read=run.raw.rows,
            quarantined=run.valid.quarantined,
            quarantine_reasons=valid.manifest.facts["reasons"],
            quarantine=[
                QuarantinedRow(record["line"], record["id"] or "", record["reasons"])
                for record in islice(_lines(store.files(valid) / "quarantine.jsonl"), MAX_QUARANTINE)
            ],
            removed=run.splits.removed,
            train=run.splits.train_rows,
            dev=run.splits.dev_rows,
        ),
        registered=run.registered,
        links=run.links,
        champion_release=run.champion_release,
        retrain_noise=None if noise is None else noise.sentence(),
        trust=read_trust(store, run.trust),
    )


def read_trust(store: Store, trust: TrustRef | None) -> LearntTrust | None:
    """What dev has shown of the candidate's confidence; None where that was not asked.

    Raises:
        StoreError: its file is gone or was changed.
    """
    if trust is None:
        return None
    path = store.files(store.open(trust.uri)) / TRUST_FILE
    return LearntTrust.model_validate_json(path.read_text(encoding="utf-8"))


def _write_local(folder: Path, files: Mapping[str, str]) -> str:
    part = folder.with_name(f".{folder.name}.part")
    part.mkdir(parents=True)
    try:
        for name, text in files.items():
            (part / name).write_text(text, encoding="utf-8")
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return str(folder)


def _put(folder: str, files: Mapping[str, str]) -> str:
    """Copy to a store that knows no rename; `verdict.json` comes last, so a folder with it is whole."""
    fs, root = fsspec.url_to_fs(folder)
    for file, text in files.items():
        fs.pipe_file(f"{root}/{file}", text.encode())
    return folder


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        yield from (json.loads(line) for line in lines if line.strip())


def _summary(folder: Path, evaluation: EvaluationRef) -> EvaluationSummary:
    """The summary of an evaluation, in the role that the model has in this run."""
    summary = EvaluationSummary.model_validate_json((folder / "summary.json").read_text(encoding="utf-8"))
    return summary.model_copy(update={"system": evaluation.system})


def _outcomes(folder: Path) -> list[ItemOutcome]:
    with (folder / "items.jsonl").open(encoding="utf-8") as lines:
        return [ItemOutcome.model_validate_json(line) for line in lines if line.strip()]
