"""The Prefect tasks of this room."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.context import FlowRunContext

from tasks.contracts.numbers import moment
from tasks.contracts.prompt import tuned_prompt
from tasks.contracts.references import BaseModelRef, GoldenSetRef, RawDatasetRef, SplitsRef, SuiteRef, ValidDatasetRef
from tasks.contracts.spec import EvaluationSpec, RetrainSpec
from tasks.runtime import open_store, progress_of, say, say_done
from tasks.store import Artefact, Store, fingerprint

# What of the data's specification the validation depends on.
_JUDGED_BY = {"max_characters", "max_invalid_share", "languages", "secrets", "personal_data"}
# Each is raised when the step's code changes what it makes.
_INGEST_VERSION = 2
_VALIDATE_VERSION = 3
_CURATE_VERSION = 3
_REPORT_VERSION = 1
_CONTENT, _PAGE = "rows.parquet", "data_report.html"


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
    from tasks.data.ingest import digest_source, ingest, missing_also, source_format

    data, kind = spec.data, spec.task.kind
    config = data.model_dump(mode="json", exclude={"source", "format", "provenance", "licence", "also", *_JUDGED_BY})
    config |= {"format": source_format(data), "kind": kind}
    digest = digest_source(data)
    for uri in missing_also(data):
        say("ingest", f"{uri} of `data.also` is not there yet, so it has no rows")
    with progress_of("ingest") as listener:
        artefact = open_store(spec.execution).produce(
            "ingest",
            _INGEST_VERSION,
            config,
            {"source": digest},
            # What is read has to be what the digest is of: a source can change, or end, while it is read.
            lambda folder: ingest(data, kind, folder, listener, expected_digest=digest)._asdict(),
        )
    facts = artefact.manifest.facts
    read = facts["rows"] + facts["unreadable"]
    summary = f"{read:,} rows read, {facts['unreadable']:,} of them unusable"
    say_done("ingest", summary, reused=artefact.reused)
    return RawDatasetRef(**artefact.reference(), rows=read)


@task(name="validate", persist_result=False, cache_policy=NO_CACHE)
def validate_dataset(raw: RawDatasetRef, base: BaseModelRef | None, spec: RetrainSpec) -> ValidDatasetRef:
    """Check the rows; part good from bad. The base model says how many tokens a row has; None does not look."""
    store = open_store(spec.execution)
    config, inputs = _judging(raw, base, spec)
    recipe = fingerprint("validate", _VALIDATE_VERSION, config, inputs)

    with progress_of("validate") as listener:

        def make(folder: Path) -> dict[str, object]:
            from tasks.data.tokens import TokenLimit, check_renders_tools
            from tasks.data.validate import validate

            files = store.files(store.open(raw.uri))
            keep = partial(store.scratch, "validate", recipe)
            limit = None
            if base is not None:
                model = store.files(store.open(base.uri)) / "model"
                limit = TokenLimit(model, tuned_prompt(spec.task), spec.train.max_tokens)
                check_renders_tools(limit, base.source)
            return validate(
                files, spec.task, spec.data, folder, keep, listener, poisoning=spec.curate.poisoning, tokens=limit
            )._asdict()

        artefact = store.produce("validate", _VALIDATE_VERSION, config, inputs, make)
    facts = artefact.manifest.facts
    reasons = _listed(facts["reasons"])
    summary = f"{facts['rows']:,} rows valid, {facts['quarantined']:,} quarantined{f' ({reasons})' if reasons else ''}"
    if facts["told"]:
        summary += f"; found in valid rows: {_listed(facts['told'])}"
    if facts["masked"]:
        summary += f"; masked in {facts['masked']:,}"
    say_done("validate", summary, reused=artefact.reused)
    return ValidDatasetRef(
        **artefact.reference(),
        rows=facts["rows"],
        quarantined=facts["quarantined"],
        told=facts["told"],
        masked=facts["masked"],
        data_docs=f"{artefact.uri}/{artefact.manifest.folder}/data_docs/index.html",
    )


def kept_of_validation(raw: RawDatasetRef, base: BaseModelRef | None, spec: RetrainSpec) -> Path:
    """Where a validation that refused keeps its quarantine and its Data Docs."""
    config, inputs = _judging(raw, base, spec)
    return open_store(spec.execution).scratch("validate", fingerprint("validate", _VALIDATE_VERSION, config, inputs))


def _judging(
    raw: RawDatasetRef, base: BaseModelRef | None, spec: RetrainSpec
) -> tuple[dict[str, object], dict[str, str]]:
    """Configuration and inputs of a validation."""
    config: dict[str, object] = {
        "task": spec.task.model_dump(mode="json", exclude={"instruction"}),
        "data": spec.data.model_dump(mode="json", include=_JUDGED_BY),
        "poisoning": spec.curate.poisoning,
        "prompt": tuned_prompt(spec.task),
        "max_tokens": spec.train.max_tokens if base is not None else None,
    }
    return config, {"raw": raw.digest} | ({"base": base.digest} if base is not None else {})


@task(name="curate", persist_result=False, cache_policy=NO_CACHE)
def curate_dataset(valid: ValidDatasetRef, golden: GoldenSetRef | None, spec: RetrainSpec) -> SplitsRef:
    """Make the train and the dev split, without duplicates and without anything of the golden set.

    Without a golden set nothing is looked for in it, and the splits can be looked at but not trained on.
    """
    from tasks.data.curate import curate
    from tasks.data.guards import HIGH_LEARNING_RATE, TOO_MANY_TOKENS, LongRows
    from tasks.data.meaning import digest_model

    store = open_store(spec.execution)
    found = store.open(valid.uri)
    rate = spec.train.learning_rate
    long_rows = LongRows(found.manifest.facts["reasons"].get(TOO_MANY_TOKENS, 0), valid.rows + valid.quarantined)
    config = {
        "task": {"kind": spec.task.kind, "labels": spec.task.labels},
        "curate": spec.curate.model_dump(mode="json", exclude={"semantic_model"}),
        "high_learning_rate": rate > HIGH_LEARNING_RATE,  # all that the splits depend on
    }
    if long_rows.too_many:  # what the guard objects to, or is told to let pass
        config["long_rows"] = long_rows._asdict()
    # The rows alone: the result of a validation holds the time at which it was made.
    inputs = {"rows": found.manifest.files["rows.jsonl"].sha256}
    inputs |= {"golden": golden.digest} if golden is not None else {}
    if spec.curate.semantic_model is not None:
        inputs["semantic_model"] = digest_model(spec.curate.semantic_model)

    with progress_of("curate") as listener:

        def make(folder: Path) -> dict[str, object]:
            counts = curate(store.files(found), golden, spec.task, spec.curate, rate, folder, listener, long_rows)
            return counts._asdict() | {"name": spec.name}

        artefact = store.produce("curate", _CURATE_VERSION, config, inputs, make)
    facts = artefact.manifest.facts
    removed = _listed(facts["removed"])
    summary = f"{facts['train']:,} train, {facts['dev']:,} dev; removed: {removed or 'none'}"
    say_done("curate", summary, reused=artefact.reused)
    return SplitsRef(**artefact.reference(), train_rows=facts["train"], dev_rows=facts["dev"], removed=facts["removed"])


@task(name="report data", persist_result=False, cache_policy=NO_CACHE)
def report_data(raw: RawDatasetRef, valid: ValidDatasetRef, splits: SplitsRef, spec: RetrainSpec) -> str:
    """Write `data_report.html` and `data.json`: what became of the rows, and what is new since the last other data of
    this task; return where the page is.
    """
    store = open_store(spec.execution)
    judged, curated = store.open(valid.uri), store.open(splits.uri)
    before = _last_data(store, curated, spec.name)
    tokens, golden = "base" in judged.manifest.inputs, "golden" in curated.manifest.inputs
    inputs = {
        "valid": valid.digest,
        "splits": splits.digest,
        "previous": before.manifest.digest if before is not None else "none",
    }
    config = {
        "name": spec.name,
        "kind": spec.task.kind,
        "source": hashlib.sha256(spec.data.source.encode()).hexdigest(),  # an address can hold a password
        "limits": [spec.data.max_invalid_share, spec.curate.max_label_drift],
        "looked_for": [spec.data.secrets, spec.data.personal_data, tokens, golden],
    }

    def make(folder: Path) -> dict[str, object]:
        from tasks.data.changes import compare_rows
        from tasks.data.report import about_data, gather
        from tasks.data.report_page import write_report

        changes = None
        if before is not None:
            changes = compare_rows(store.files(before) / _CONTENT, store.files(curated) / _CONTENT)
        about = about_data(
            spec,
            raw.rows,
            tokens=tokens,
            golden=golden,
            folders={
                "Validation": f"{judged.uri}/{judged.manifest.folder}",
                "Data Docs": valid.data_docs,
                "Splits": f"{curated.uri}/{curated.manifest.folder}",
            },
        )
        report = gather(
            about,
            store.files(judged),
            store.files(curated),
            masked=valid.masked,
            changes=changes,
            since=moment(before.manifest.created) if before is not None else None,
        )
        write_report(folder, report)
        return {"funnel": report.funnel(), "changes": changes.sentence() if changes is not None else None}

    artefact = store.produce("data_report", _REPORT_VERSION, config, inputs, make)
    facts, page = artefact.manifest.facts, f"{artefact.uri}/{artefact.manifest.folder}/{_PAGE}"
    new = f"new since last data: {facts['changes']}" if facts["changes"] is not None else "no earlier data"
    say_done("data report", f"{facts['funnel']}; {new}", reused=artefact.reused)
    if FlowRunContext.get() is not None:
        from tasks.data.report_page import read_record, report_markdown

        text = report_markdown(read_record(store.files(artefact)), page)
        create_markdown_artifact(text, key=f"{spec.name.replace('_', '-')}-data", description=facts["funnel"])
    return page


def _last_data(store: Store, splits: Artefact, name: str) -> Artefact | None:
    """The newest other splits of the same task that can be compared with."""
    others = [
        one
        for one in store.list("curate")
        if one.manifest.facts.get("name") == name
        and one.manifest.digest != splits.manifest.digest
        and _CONTENT in one.manifest.files
    ]
    return max(others, key=lambda one: one.manifest.created, default=None)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())
