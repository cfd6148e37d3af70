"""Where else a run can be looked at: MLflow's pages and the Data Docs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import fsspec

from tasks.contracts.references import (
    EvaluationRef,
    MetricComparison,
    Release,
    TrainedModelRef,
    ValidDatasetRef,
    VerdictRef,
)
from tasks.contracts.spec import RetrainSpec
from tasks.tracking import open_run, run_link


def find_links(
    spec: RetrainSpec,
    valid: ValidDatasetRef,
    trained: TrainedModelRef,
    candidate: EvaluationRef,
    verdict: VerdictRef,
    data_page: str | None = None,
) -> dict[str, str]:
    """What a page is called to its address. MLflow has pages only where a server runs.

    The page of the evaluation holds the candidate's scores, so no verdict that withholds numbers leads to it.

    Raises:
        ServiceError: the MLflow server does not answer.
    """
    found = {
        "Training in MLflow": run_link(spec.execution, spec.name, trained.fingerprint),
        "Evaluation in MLflow": None
        if verdict.verdict.withheld
        else run_link(spec.execution, spec.name, candidate.fingerprint),
        "Data report": as_address(data_page) if data_page is not None else None,
        "Data Docs": as_address(valid.data_docs),
    }
    return {name: address for name, address in found.items() if address is not None}


def keep_in_mlflow(
    spec: RetrainSpec,
    verdict: VerdictRef,
    release: Release,
    valid: ValidDatasetRef,
    folder: str,
    data_page: str | None = None,
) -> dict[str, str]:
    """Put the reports, the verdict and the Data Docs into a run of MLflow, whose server shows them to any browser.

    A verdict is one run of MLflow; each run folder that came to it has a folder of its own there, `runs/<its name>/`.
    The differences go with them as metrics, unless the verdict withholds numbers.

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
        tags={
            "goldgate.verdict": decided.outcome.value,
            "goldgate.reason": decided.reasons[0],
            "goldgate.release": release.kind.value,
        },
        params={"baseline": decided.baseline.label, "candidate": decided.candidate.label},
    ) as run:
        if not decided.withheld:
            run.log_metrics({_mlflow_name(one): one.difference for one in decided.metrics})
        own = f"runs/{Path(folder).name}"
        for path in (Path(folder) / "report.html", Path(folder) / "verdict.json", Path(valid.data_docs).parent):
            run.log_artifact(path, own)
        if data_page is not None:
            run.log_artifact(Path(data_page), own)
    if run.url is None:
        return {}
    pages = {"Report": "report.html", "Data report": "data_report.html", "Data Docs": "data_docs/index.html"}
    return {
        name: f"{run.url}/artifacts/{own}/{page}"
        for name, page in pages.items()
        if name != "Data report" or data_page is not None
    }


def _mlflow_name(one: MetricComparison) -> str:
    """The name of a difference, of signs that MLflow takes."""
    where = [f"slice {one.slice}"] if one.slice is not None else [f"suite {one.suite}"] if one.suite is not None else []
    return ".".join(re.sub(r"[^\w.\- ]", ".", part) for part in (one.metric, *where, "difference"))


def read_links(folder: str) -> dict[str, str]:
    """The links that a run folder's `verdict.json` holds."""
    with fsspec.open(f"{folder}/verdict.json", "rt", encoding="utf-8") as file:
        return dict(json.load(file)["links"])


def as_address(place: str) -> str:
    """A path as an address that a browser opens; an address stays as it is."""
    return place if "://" in place else Path(place).absolute().as_uri()
