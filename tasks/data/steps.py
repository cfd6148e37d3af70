"""The Prefect tasks of this room."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.contracts.references import GoldenSetRef, RawDatasetRef, SplitsRef, SuiteRef, ValidDatasetRef
from tasks.contracts.spec import EvaluationSpec, RetrainSpec
from tasks.runtime import open_store, progress_of, say_done
from tasks.store import fingerprint

# Each is raised when the step's code changes what it makes.
_INGEST_VERSION = 1
_VALIDATE_VERSION = 2
_CURATE_VERSION = 2


@task(name="open golden set", persist_result=False, cache_policy=NO_CACHE)
def open_golden_set(spec: EvaluationSpec) -> GoldenSetRef:
    """Check every byte of the golden set before any compute is spent."""
    from tasks.data.golden import open_golden

    golden = open_golden(spec)
    say_done("golden set", f"{golden.items:,} items, sha256 {golden.digest[:12]}", reused=False)
    return golden


@task(name="open suites", persist_result=False, cache_policy=NO_CACHE)
def open_suites(spec: RetrainSpec) -> tuple[SuiteRef, ...]:
    """Check every byte of the frozen sets that guards ask about."""
    from tasks.data.golden import open_suite

    suites = tuple(open_suite(suite, spec) for suite in spec.suites)
    if suites:
        listed = ", ".join(f"{suite.name} ({suite.frozen.items:,} items)" for suite in suites)
        say_done("suites", listed, reused=False)
    return suites


@task(name="ingest", persist_result=False, cache_policy=NO_CACHE)
def ingest_dataset(spec: RetrainSpec) -> RawDatasetRef:
    """Read the source into rows."""
    from tasks.data.ingest import digest_source, ingest, source_format

    data, kind = spec.data, spec.task.kind
    config = data.model_dump(mode="json", exclude={"source", "format", "max_characters", "max_invalid_share"})
    config |= {"format": source_format(data), "kind": kind}
    with progress_of("ingest") as listener:
        artefact = open_store(spec.execution).produce(
            "ingest",
            _INGEST_VERSION,
            config,
            {"source": digest_source(data)},
            lambda folder: ingest(data, kind, folder, listener)._asdict(),
        )
    facts = artefact.manifest.facts
    read = facts["rows"] + facts["unreadable"]
    summary = f"{read:,} rows read, {facts['unreadable']:,} of them unusable"
    say_done("ingest", summary, reused=artefact.reused)
    return RawDatasetRef(**artefact.reference(), rows=read)


@task(name="validate", persist_result=False, cache_policy=NO_CACHE)
def validate_dataset(raw: RawDatasetRef, spec: RetrainSpec) -> ValidDatasetRef:
    """Check the rows; part good from bad."""
    store = open_store(spec.execution)
    config = {
        "task": spec.task.model_dump(mode="json", exclude={"instruction"}),
        "max_characters": spec.data.max_characters,
        "max_invalid_share": spec.data.max_invalid_share,
    }
    inputs = {"raw": raw.digest}

    with progress_of("validate") as listener:

        def make(folder: Path) -> dict[str, object]:
            from tasks.data.validate import validate

            files = store.files(store.open(raw.uri))
            recipe = fingerprint("validate", _VALIDATE_VERSION, config, inputs)
            keep = partial(store.scratch, "validate", recipe)
            return validate(files, spec.task, spec.data, folder, keep, listener)._asdict()

        artefact = store.produce("validate", _VALIDATE_VERSION, config, inputs, make)
    facts = artefact.manifest.facts
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in facts["reasons"].items())
    summary = f"{facts['rows']:,} rows valid, {facts['quarantined']:,} quarantined{f' ({reasons})' if reasons else ''}"
    say_done("validate", summary, reused=artefact.reused)
    return ValidDatasetRef(
        **artefact.reference(),
        rows=facts["rows"],
        quarantined=facts["quarantined"],
        data_docs=f"{artefact.uri}/{artefact.manifest.folder}/data_docs/index.html",
    )


@task(name="curate", persist_result=False, cache_policy=NO_CACHE)
def curate_dataset(valid: ValidDatasetRef, golden: GoldenSetRef, spec: RetrainSpec) -> SplitsRef:
    """Make the train and the dev split, without duplicates and without anything of the golden set."""
    from tasks.data.curate import HIGH_LEARNING_RATE, curate

    store = open_store(spec.execution)
    found = store.open(valid.uri)
    rate = spec.train.learning_rate
    config = {
        "task": {"kind": spec.task.kind, "labels": spec.task.labels},
        "curate": spec.curate,
        "high_learning_rate": rate > HIGH_LEARNING_RATE,  # all that the splits depend on
    }
    # The rows alone: the result of a validation holds the time at which it was made.
    inputs = {"rows": found.manifest.files["rows.jsonl"].sha256, "golden": golden.digest}

    with progress_of("curate") as listener:

        def make(folder: Path) -> dict[str, object]:
            return curate(store.files(found), golden, spec.task, spec.curate, rate, folder, listener)._asdict()

        artefact = store.produce("curate", _CURATE_VERSION, config, inputs, make)
    facts = artefact.manifest.facts
    removed = ", ".join(f"{count:,} {reason}" for reason, count in facts["removed"].items())
    summary = f"{facts['train']:,} train, {facts['dev']:,} dev; removed: {removed or 'none'}"
    say_done("curate", summary, reused=artefact.reused)
    return SplitsRef(**artefact.reference(), train_rows=facts["train"], dev_rows=facts["dev"], removed=facts["removed"])
