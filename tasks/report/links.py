"""Where else a run can be looked at: MLflow's pages and the Data Docs."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec

from tasks.contracts.references import EvaluationRef, TrainedModelRef, ValidDatasetRef
from tasks.contracts.spec import RetrainSpec
from tasks.tracking import run_link


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


def read_links(folder: str) -> dict[str, str]:
    """The links that a run folder's `verdict.json` holds."""
    with fsspec.open(f"{folder}/verdict.json", "rt", encoding="utf-8") as file:
        return dict(json.load(file)["links"])


def as_address(place: str) -> str:
    """A path as an address that a browser opens; an address stays as it is."""
    return place if "://" in place else Path(place).absolute().as_uri()
