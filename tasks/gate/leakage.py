"""No verdict on a candidate that may have seen the golden set: the contamination report must be there, and clean."""

from __future__ import annotations

from pydantic import ValidationError

from tasks.contracts.errors import LeakageError
from tasks.contracts.references import CONTAMINATION_FILE, ContaminationReport, GoldenSetRef, SplitsRef, TrainedModelRef
from tasks.store import Manifest, Store

TRAINED_FROM = {"base", "splits"}  # all that training may read; whatever else it comes to read needs a report as well
TUNED_FROM = TRAINED_FROM | {"trained", "pairs"}  # preference tuning
MINED_FROM = {"answers", "splits"}  # its pairs
ANSWERED_FROM = {"model", "splits"}  # the answers that these are mined from


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
    contamination report of its own before this list may name it. Preference pairs are such an input: the model that
    they are for, and the answers that they are mined from, must be made of the same splits, each by its manifest.

    Raises:
        LeakageError: names the input.
    """
    manifest = store.open(trained.uri).manifest
    if manifest.step != "prefer":
        _check_inputs(trained.uri, manifest, splits, TRAINED_FROM)
        return
    _check_inputs(trained.uri, manifest, splits, TUNED_FROM)
    _check_inputs(*_made(store, "train", manifest.inputs["trained"], trained.uri), splits, TRAINED_FROM)
    uri, pairs = _made(store, "mine_pairs", manifest.inputs["pairs"], trained.uri)
    _check_inputs(uri, pairs, splits, MINED_FROM)
    _check_inputs(*_made(store, "ask_dev", pairs.inputs["answers"], uri), splits, ANSWERED_FROM)


def _check_inputs(uri: str, made: Manifest, splits: SplitsRef, allowed: set[str]) -> None:
    unknown = sorted(made.inputs.keys() - allowed)
    if unknown:
        raise LeakageError(
            f"The candidate was trained on something that was not checked for golden items: {', '.join(unknown)}.",
            where=uri,
            fix="train on the curated splits alone",
        )
    if made.inputs.get("splits") != splits.digest:
        raise LeakageError(
            "The candidate was trained on other splits than those that were checked for golden items.",
            where=f"{uri}: {made.inputs.get('splits')}, run: {splits.digest}",
            fix="run the flow again from the data on",
        )


def _made(store: Store, step: str, digest: str, of: str) -> tuple[str, Manifest]:
    for artefact in store.list(step):
        if artefact.manifest.digest == digest:
            return artefact.uri, artefact.manifest
    raise LeakageError(
        f"Nothing says what the candidate's input of the step {step} was made of: it is no longer in the store.",
        where=f"{of}: {digest}",
        fix="delete the candidate's folder and run the flow again; it will be made anew",
    )
