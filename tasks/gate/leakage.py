"""No verdict on a candidate that may have seen the golden set: the contamination report must be there, and clean."""

from __future__ import annotations

from pydantic import ValidationError

from tasks.contracts.errors import LeakageError
from tasks.contracts.references import CONTAMINATION_FILE, ContaminationReport, GoldenSetRef, SplitsRef, TrainedModelRef
from tasks.store import Store

TRAINED_FROM = {"base", "splits"}  # all that training may read; whatever else it comes to read needs a report as well


def check_contamination(store: Store, splits: SplitsRef, golden: GoldenSetRef) -> str:
    """The sha256 of the report that says that no golden item is in the splits.

    Raises:
        LeakageError: there is no report, it is about another golden set, or it found something.
        StoreError: the splits were changed.
    """
    artefact = store.open(splits.uri)
    entry = artefact.manifest.files.get(CONTAMINATION_FILE)
    if entry is None:
        raise LeakageError(
            "Nothing says whether golden items are in the training data.",
            where=f"{splits.uri}: {CONTAMINATION_FILE}",
            fix="curate the data again with this version of Goldgate",
        )
    path = store.files(artefact) / CONTAMINATION_FILE
    try:
        report = ContaminationReport.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise LeakageError(
            f"The contamination report cannot be read: {error.errors()[0]['msg']}.",
            where=str(path),
            fix="curate the data again",
        ) from error
    if report.golden_digest != golden.digest:
        raise LeakageError(
            "The training data was checked against another golden set.",
            where=f"{path}: {report.golden_digest}, run: {golden.digest}",
            fix="curate the data again, with the golden set of this run",
        )
    if report.rows != splits.train_rows + splits.dev_rows:
        raise LeakageError(
            f"{report.rows:,} rows were checked against the golden set, and the splits hold "
            f"{splits.train_rows + splits.dev_rows:,}.",
            where=str(path),
            fix="curate the data again",
        )
    if report.found:
        listed = ", ".join(f"{count:,} {measure}" for measure, count in report.found.items())
        raise LeakageError(
            f"Golden items are in the training data: {listed}.",
            where=str(path),
            fix="take these rows out of the source, or freeze another golden set; then train again",
        )
    return entry.sha256


def check_training_inputs(store: Store, trained: TrainedModelRef, splits: SplitsRef) -> None:
    """Refuse a candidate that was trained on anything but the splits that were checked.

    So nothing can be mined from answers to the golden set and trained on: every further input of training needs a
    contamination report of its own before this list may name it.

    Raises:
        LeakageError: names the input.
    """
    inputs = store.open(trained.uri).manifest.inputs
    unknown = sorted(inputs.keys() - TRAINED_FROM)
    if unknown:
        raise LeakageError(
            f"The candidate was trained on something that was not checked for golden items: {', '.join(unknown)}.",
            where=trained.uri,
            fix="train on the curated splits alone",
        )
    if inputs.get("splits") != splits.digest:
        raise LeakageError(
            "The candidate was trained on other splits than those that were checked for golden items.",
            where=f"{trained.uri}: {inputs.get('splits')}, run: {splits.digest}",
            fix="run the flow again from the data on",
        )
