"""The Prefect tasks that have a teacher write examples."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from tasks.contracts.errors import SpecError
from tasks.contracts.numbers import percent
from tasks.contracts.references import GoldenSetRef, RawDatasetRef, ValidDatasetRef
from tasks.contracts.rows import read_rows
from tasks.contracts.synthesis import MANNERS, SynthesisRef, SynthesizeSpec, TeacherSpec
from tasks.runtime import open_store, progress_of, say_done
from tasks.store import fingerprint

_SYNTHESIZE_VERSION = 1  # raise when the same answers of a teacher give other rows
_CHECK_VERSION = 1  # raise when the validation of rows changes
_JOURNAL_VERSION = 1  # raise when a journal of before can no longer be read; what it paid for is then lost
# What of the data's specification the check depends on.
_JUDGED_BY = {"max_characters", "max_invalid_share", "languages", "secrets", "personal_data"}


@task(name="check real rows", persist_result=False, cache_policy=NO_CACHE)
def check_real_rows(raw: RawDatasetRef, spec: SynthesizeSpec) -> ValidDatasetRef:
    """Part good rows from bad, as for a training, but for the base model's limit of tokens: no model is known here.

    What `data.secrets` and `data.personal_data` mask or quarantine is thereby kept from the teacher.

    Raises:
        SpecError: no teacher writes examples of such a task.
    """
    from tasks.data.synthesis.prompts import check_can_be_written

    check_can_be_written(spec.task)
    store = open_store(spec.execution)
    config = {
        "task": spec.task.model_dump(mode="json", exclude={"instruction"}),
        "data": spec.data.model_dump(mode="json", include=_JUDGED_BY),
    }
    inputs = {"raw": raw.digest}

    with progress_of("check real rows") as listener:

        def make(folder: Path) -> dict[str, Any]:
            from tasks.data.validate import validate

            recipe = fingerprint("check_real_rows", _CHECK_VERSION, config, inputs)
            keep = partial(store.scratch, "check_real_rows", recipe)
            return validate(store.files(store.open(raw.uri)), spec.task, spec.data, folder, keep, listener)._asdict()

        artefact = store.produce("check_real_rows", _CHECK_VERSION, config, inputs, make)
    facts = artefact.manifest.facts
    summary = f"{facts['rows']:,} rows valid, {facts['quarantined']:,} quarantined; masked in {facts['masked']:,}"
    say_done("check real rows", summary, reused=artefact.reused)
    return ValidDatasetRef(
        **artefact.reference(),
        rows=facts["rows"],
        quarantined=facts["quarantined"],
        told=facts["told"],
        masked=facts["masked"],
        data_docs=f"{artefact.uri}/{artefact.manifest.folder}/data_docs/index.html",
    )


@task(name="synthesize", persist_result=False, cache_policy=NO_CACHE)
def write_synthetic_rows(valid: ValidDatasetRef, golden: GoldenSetRef, spec: SynthesizeSpec) -> SynthesisRef:
    """Have the teacher write examples and keep those that pass every filter; what was paid is paid once."""
    from tasks.data.golden import ITEMS
    from tasks.data.ingest import ROWS
    from tasks.data.synthesis.documents import digest_documents
    from tasks.data.synthesis.write import REPORT, SYNTHETIC, write_examples
    from tasks.data.validate import NOTES

    store = open_store(spec.execution)
    found = store.open(valid.uri)
    config = spec.model_dump(mode="json", exclude={"execution": True, "golden": True, "teacher": MANNERS})
    read = {name for name in config["data"] if name.endswith("_field")} | {"max_characters"}
    config["data"] = {name: value for name, value in config["data"].items() if name in read}
    # The rows alone: the result of a validation holds the time at which it was made.
    inputs = {
        "notes": found.manifest.files[NOTES].sha256,
        "rows": found.manifest.files[ROWS].sha256,
        "golden": golden.digest,
    }
    if spec.documents is not None:
        inputs["documents"] = digest_documents(spec.documents)
        config["documents"].pop("path")
    # One for a task and a teacher: whatever else changes, an answer that was paid for is found there.
    journal = fingerprint(
        "synthesize-answers",
        _JOURNAL_VERSION,
        {"name": spec.name, "url": spec.teacher.url, "model": spec.teacher.model},
        {},
    )

    with progress_of("synthesize") as listener:

        def make(folder: Path) -> dict[str, Any]:
            files = store.files(found)
            rows, notes = files / ROWS, files / NOTES
            items = Path(golden.path) / ITEMS
            made = write_examples(
                spec,
                lambda: read_rows(rows),
                lambda: read_rows(items),
                folder,
                store.scratch("synthesize-answers", journal),
                teacher_key(spec.teacher),
                noted_ids(notes),
                listener,
            )
            return {**made._asdict(), "traffic": made.traffic._asdict()}

        artefact = store.produce("synthesize", _SYNTHESIZE_VERSION, config, inputs, make)
    facts = artefact.manifest.facts
    files = store.files(artefact)
    report = json.loads((files / REPORT).read_text(encoding="utf-8"))
    survived = f" ({percent(report['survival'])})" if report["survival"] is not None else ""
    stopped = f"; stopped early, {facts['stopped']}" if facts["stopped"] else ""
    say_done(
        "synthesize",
        f"{facts['rows']:,} rows kept of {facts['asked']:,} asked for{survived}{stopped}",
        reused=artefact.reused,
    )
    return SynthesisRef(
        **artefact.reference(),
        path=str(files / SYNTHETIC),
        rows=facts["rows"],
        asked=facts["asked"],
        stopped=facts["stopped"],
        report=report,
    )


@task(name="publish synthesis", persist_result=False, cache_policy=NO_CACHE)
def publish_synthesis(spec: SynthesizeSpec, result: SynthesisRef) -> None:
    """Show the funnel and the costs on the page of the run."""
    from tasks.data.synthesis.report import report_markdown

    create_markdown_artifact(
        report_markdown(result.report, result.path),
        key=f"{spec.name.replace('_', '-')}-synthesis",
        description=f"{result.rows:,} rows written by {spec.teacher.model} for {spec.name}",
    )


def noted_ids(notes: Path) -> frozenset[str]:
    """Ids of the rows that go on although something was found in them, such as a secret: no teacher is shown these."""
    with notes.open(encoding="utf-8") as lines:
        return frozenset(json.loads(line)["id"] for line in lines)


def teacher_key(teacher: TeacherSpec) -> str | None:
    """The teacher's key, from the environment or from Prefect's Secret block; None where neither has one.

    Raises:
        SpecError: the block that the spec names is not there.
    """
    from tasks.data.synthesis.teacher import API_KEY

    key = os.environ.get(API_KEY)
    if key or teacher.key_block is None:
        return key or None
    from prefect.blocks.system import Secret

    try:
        value = Secret.load(teacher.key_block).get()  # type: ignore[union-attr]  # in a synchronous task
    except ValueError as error:
        raise SpecError(
            f"There is no Prefect Secret block {teacher.key_block!r}.",
            where="teacher.key_block",
            fix=f"make it in the Prefect UI (Blocks, Secret), or set the environment's {API_KEY}",
        ) from error
    return str(value)
