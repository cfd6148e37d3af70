"""Where else a run can be looked at: MLflow's pages and the Data Docs."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec

from tasks.contracts.references import EvaluationRef, TrainedModelRef, ValidDatasetRef, VerdictRef
from tasks.contracts.spec import RetrainSpec
from tasks.tracking import open_run, run_link


def find_links(
    spec: RetrainSpec, valid: ValidDatasetRef, trained: TrainedModelRef, candidate: EvaluationRef
) -> dict[str, str]:
    """What a page is called to its address. MLflow has pages only where a server runs.

    Raises:
        ServiceError: the MLflow server does not answer.
    """
    found = {
        "Training in MLflow": run_link(spec.execution, spec.name, trained.fingerprint),
        "Evaluation in MLflow": run_link(spec.execution, spec.name, candidate.fingerprint),
        "Data Docs": as_address(valid.data_docs),
    }
    return {name: address for name, address in found.items() if address is not None}


def keep_in_mlflow(spec: RetrainSpec, verdict: VerdictRef, valid: ValidDatasetRef, folder: str) -> dict[str, str]:
    """Put report, verdict and Data Docs into a run of MLflow, whose server shows them to a browser on any machine.

    Returns:
        Their addresses; none where no server shows them, or where the store is remote and has addresses of its own.

    Raises:
        ServiceError: MLflow cannot be reached, or does not take the files.
    """
    if "://" in folder:
        return {}
    decided = verdict.verdict
    with open_run(
        spec.execution,
        spec.name,
        f"verdict {decided.outcome.value}",
        key=f"verdict {verdict.fingerprint}",
        tags={"goldgate.verdict": decided.outcome.value, "goldgate.reason": decided.reasons[0]},
        params={"baseline": decided.baseline.label, "candidate": decided.candidate.label},
    ) as run:
        run.log_metrics({f"{one.metric.replace(':', '.')}.difference": one.difference for one in decided.metrics})
        for path in (Path(folder) / "report.html", Path(folder) / "verdict.json", Path(valid.data_docs).parent):
            run.log_artifact(path)
    if run.url is None:
        return {}
    return {
        "Report": f"{run.url}/artifacts/report.html",
        "Data Docs": f"{run.url}/artifacts/data_docs/index.html",
    }


def read_links(folder: str) -> dict[str, str]:
    """The links that a run folder's `verdict.json` holds."""
    with fsspec.open(f"{folder}/verdict.json", "rt", encoding="utf-8") as file:
        return dict(json.load(file)["links"])


def as_address(place: str) -> str:
    """A path as an address that a browser opens; an address stays as it is."""
    return place if "://" in place else Path(place).absolute().as_uri()
