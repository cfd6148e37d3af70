"""The stages of a run that look at data, without training: what they make of a source, up to where one refuses."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from goldgate.config import load_spec, parse, set_key
from tasks.contracts.errors import DataError, GoldgateError, ModelError, StoreError
from tasks.contracts.references import BaseModelRef, GoldenSetRef, RawDatasetRef, ValidDatasetRef
from tasks.contracts.spec import Guard, RetrainSpec, TaskKind

NOT_ACCEPTED = "not accepted: a run stops here"
_GUESS_ROWS = 10_000  # rows whose answers say what kind of task it is
_GUESS_LABELS = 50  # different answers that a task with labels has at most
_GUESS_SHARE = 5  # and at most one in so many answers is another one
_ANY_LABELS = ("?", "??")  # of a task whose labels nobody knows yet
_NONE = "none"  # in place of a golden set and of a base model


class Columns(NamedTuple):
    """Where a bare source has what; None takes the default."""

    text: str | None = None
    target: str | None = None
    messages: str | None = None


class Asked(NamedTuple):
    """What is to be checked.

    Attributes:
        spec: as a run would have it.
        golden: the golden set; None for none.
        base: the base model; None for none at hand.
        said: what was inferred, a sentence each.
        raw: the rows as read, where they had to be read to know the task.
    """

    spec: RetrainSpec
    golden: GoldenSetRef | None
    base: BaseModelRef | None
    said: tuple[str, ...] = ()
    raw: RawDatasetRef | None = None


class Checked(NamedTuple):
    """What came out.

    Attributes:
        record: the data report as plain JSON.
        page: where the page is.
        quarantines: files of rejected rows by stage.
        refusal: why a run would stop; None if it would go on.
    """

    record: Mapping[str, Any]
    page: str
    quarantines: Mapping[str, Path]
    refusal: GoldgateError | None


def is_config(source: str) -> bool:
    """Whether this names a configuration, and no data."""
    return source.endswith((".yaml", ".yml")) and "://" not in source


def ask_about_config(config: Path, overrides: Sequence[str], golden: Path | None, *, tokens: bool) -> Asked:
    """What a configuration asks for.

    Args:
        config: the YAML file.
        overrides: `key.path=value` each.
        golden: folder of a golden set, in place of the configuration's.
        tokens: fetch the base model if it is not in the store, to check the length of rows in tokens.

    Raises:
        GoldgateError: the configuration, the golden set or the base model cannot be used.
    """
    from tasks.data.golden import MANIFEST
    from tasks.data.steps import open_golden_set
    from tasks.training.steps import fetch_base_model

    given = [f"golden.path={golden.absolute()}"] if golden is not None else []
    spec = load_spec(config, [*overrides, *given])
    frozen = golden is not None or Path(spec.golden.path, MANIFEST).exists()
    said = () if frozen else (f"The golden set is not frozen yet ({spec.golden.path}); a run would stop at that.",)
    return Asked(
        spec,
        open_golden_set.fn(spec.evaluation()) if frozen else None,
        fetch_base_model.fn(spec) if tokens else _base_at_hand(spec),
        said,
    )


def ask_about_source(
    source: str,
    columns: Columns,
    overrides: Sequence[str],
    *,
    kind: TaskKind | None = None,
    golden: Path | None = None,
) -> Asked:
    """A specification for rows that have no configuration; what nobody says is inferred from the answers.

    With a golden set, the task is the one that it was frozen for. Else it is a task with labels if the first 10,000
    answers have at most 50 different values, and at most a fifth as many values as answers; if not, it is a chat.

    Args:
        source: file, folder or URI.
        columns: where it has what.
        overrides: `key.path=value` each, of the specification.
        kind: what the answers are; None infers it.
        golden: folder of a golden set; None has none.

    Raises:
        GoldgateError: the source or the golden set cannot be used.
    """
    from tasks.data.golden import read_task
    from tasks.data.steps import ingest_dataset, open_golden_set

    named = {"text_field": columns.text, "target_field": columns.target, "messages_field": columns.messages}
    place = source if "://" in source else str(Path(source).expanduser().absolute())
    data = {"source": place} | {field: column for field, column in named.items() if column is not None}

    def spec_of(task: Mapping[str, Any]) -> RetrainSpec:
        record: dict[str, Any] = {
            "name": _name_of(source),
            "task": {"instruction": "Answer.", **task},
            "data": dict(data),
            "golden": {"path": str(golden.absolute()) if golden is not None else _NONE},
            "base_model": _NONE,
        }
        for override in overrides:
            set_key(record, override)
        return parse(RetrainSpec, record, where="goldgate data")

    raw = None
    if golden is not None and kind is None:
        name, task = read_task(golden)
        spec = spec_of(task.model_dump(mode="json"))
        said = [f"The task is the one that the golden set was frozen for: {name}, {task.kind.value}."]
    elif kind in (TaskKind.CHAT, TaskKind.CALL):  # the latter is refused where no `--set task.tools=…` names tools
        spec, said = spec_of({"kind": kind}), []
    elif kind is TaskKind.EXTRACT:
        spec = spec_of({"kind": kind, "json_schema": {}})
        said = [] if spec.task.json_schema else ["No JSON Schema (`--set task.json_schema=…`): any JSON will do."]
    else:
        asked = spec_of({"kind": TaskKind.CLASSIFY, "labels": list(_ANY_LABELS)})
        if asked.task.labels != _ANY_LABELS:  # somebody has said which
            spec, said = asked, []
        else:
            raw = ingest_dataset.fn(asked)
            task_found, said = _infer(asked, raw, kind)
            spec = spec_of(task_found)
            raw = raw if spec.task.kind is TaskKind.CLASSIFY else None  # answers are read otherwise for a chat
    frozen = open_golden_set.fn(spec.evaluation()) if golden is not None else None
    return Asked(spec, frozen, None, tuple(said), raw)


def _infer(spec: RetrainSpec, raw: RawDatasetRef, kind: TaskKind | None) -> tuple[dict[str, Any], list[str]]:
    """The task by the answers of the rows, and what is said of it."""
    from tasks.contracts.rows import read_rows
    from tasks.data.ingest import ROWS
    from tasks.runtime import open_store

    store = open_store(spec.execution)
    first: Counter[str] = Counter()
    later: Counter[str] = Counter()
    for number, row in enumerate(read_rows(store.files(store.open(raw.uri)) / ROWS)):
        if number < _GUESS_ROWS:
            first[row.target] += 1
        elif len(later) <= _GUESS_LABELS or row.target in later:
            later[row.target] += 1
    few = len(first) <= _GUESS_LABELS and _GUESS_SHARE * len(first) <= first.total()
    if kind is None and not (first and few):
        return {"kind": TaskKind.CHAT}, [
            f"Taken for chat: the first {first.total():,} answers have {len(first):,} different values "
            "(`--kind` says otherwise)."
        ]
    found = first | later if len(first | later) <= _GUESS_LABELS else first
    labels = sorted(label for label in found if label and label == label.strip())
    if len(labels) < 2:
        raise DataError(
            f"All answers are the same: {labels[0]!r}." if labels else "No answer can be a label.",
            where=f"{spec.data.source}, column {spec.data.messages_field or spec.data.target_field!r}",
            fix="name the column with the answer (`--target`), or say what the answers are (`--kind`)",
        )
    said = [f"Labels inferred from the data ({len(labels)}): {', '.join(labels)}."]
    if unlisted := later.keys() - found.keys():
        said.append(f"After row {_GUESS_ROWS:,} come more than {len(unlisted) - 1:,} others, which count as unknown.")
    return {"kind": TaskKind.CLASSIFY, "labels": labels}, said


def _name_of(source: str) -> str:
    name = re.sub(r"[^a-z0-9_-]+", "-", PurePosixPath(source.rstrip("/")).stem.lower()).strip("-_")[:50]
    return name if name[:1].isalpha() else f"data-{name}".rstrip("-")


def _base_at_hand(spec: RetrainSpec) -> BaseModelRef | None:
    """The base model if an earlier run has put it into the store, and it is found without the network."""
    from tasks.runtime import open_store
    from tasks.training.base_model import resolve

    known = {one.manifest.inputs.get("source"): one for one in open_store(spec.execution).list("base_model")}
    if not known or spec.base_model.startswith("hf:"):
        return None
    try:
        found = known.get(resolve(spec.base_model).digest)
    except ModelError:
        return None
    return None if found is None else BaseModelRef(**found.reference(), source=spec.base_model)


# -- the stages ---------------------------------------------------------------------------------------------------


def check_data(asked: Asked) -> Checked:
    """Run the stages of a run that look at data, and report what they found; finished ones are reused, by runs too.

    Where a stage refuses, the report goes as far as the rows went. Where a guard of the curation objects, the report
    and the quarantine are what they would be if nothing objected.

    Raises:
        GoldgateError: the source cannot be read, or nothing is known of its rows.
    """
    from tasks.data.steps import curate_dataset, ingest_dataset, kept_of_validation, report_data, validate_dataset
    from tasks.data.validate import QUARANTINE
    from tasks.runtime import open_store

    spec, store = asked.spec, open_store(asked.spec.execution)
    raw = asked.raw or ingest_dataset.fn(spec)
    try:
        valid = validate_dataset.fn(raw, asked.base, spec)
    except StoreError:
        raise
    except GoldgateError as error:
        kept = kept_of_validation(raw, asked.base, spec)
        if not (kept / QUARANTINE).is_file():
            raise
        return _report_refusal(asked, raw, kept, None, error, {"validate": kept / QUARANTINE})
    judged = store.files(store.open(valid.uri))
    quarantines = {"validate": judged / QUARANTINE}
    try:
        splits = curate_dataset.fn(valid, asked.golden, spec)
    except StoreError:
        raise
    except GoldgateError as error:
        anyway = _curate_anyway(asked, valid)
        if anyway is not None:
            quarantines["curate"] = anyway / QUARANTINE
        return _report_refusal(asked, raw, judged, anyway, error, quarantines, masked=valid.masked)
    page = report_data.fn(raw, valid, splits, spec)
    quarantines["curate"] = store.files(store.open(splits.uri)) / QUARANTINE
    return Checked(_record_beside(page, asked), page, quarantines, None)


def _record_beside(page: str, asked: Asked) -> Mapping[str, Any]:
    from tasks.data.report_page import read_record
    from tasks.runtime import open_store

    store = open_store(asked.spec.execution)
    return read_record(store.files(store.open(page.rsplit("/", 2)[0])))


def _curate_anyway(asked: Asked, valid: ValidDatasetRef) -> Path | None:
    """The folder of a curation without guards; None where none can be made."""
    from tasks.data.curate import curate
    from tasks.runtime import open_store, progress_of

    store, spec = open_store(asked.spec.execution), asked.spec
    folder = _scratch(asked, valid.digest) / "curate"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    risks = {guard: spec.curate.accept_risks.get(guard, NOT_ACCEPTED) for guard in Guard}
    lenient = spec.curate.model_copy(update={"accept_risks": risks})
    try:
        with progress_of("curate") as listener:
            files = store.files(store.open(valid.uri))
            curate(files, asked.golden, spec.task, lenient, spec.train.learning_rate, folder, listener)
    except GoldgateError:  # the same refusal, most likely; the first one is what is reported
        shutil.rmtree(folder)
        return None
    return folder


def _report_refusal(
    asked: Asked,
    raw: RawDatasetRef,
    judged: Path,
    curated: Path | None,
    error: GoldgateError,
    quarantines: Mapping[str, Path],
    *,
    masked: int = 0,
) -> Checked:
    from tasks.data.report import about_data, gather
    from tasks.data.report_page import write_report

    folders = {"Rejected rows": str(quarantines["validate"]), "Data Docs": str(judged / "data_docs" / "index.html")}
    if "curate" in quarantines:
        folders["Curated away"] = str(quarantines["curate"])
    about = about_data(
        asked.spec,
        raw.rows,
        tokens=asked.base is not None,
        golden=asked.golden is not None,
        refusal=str(error),
        folders=folders,
    )
    report = gather(about, judged, curated, masked=masked)
    page = write_report(_scratch(asked, raw.digest), report)
    return Checked(report.record(), str(page), quarantines, error)


def _scratch(asked: Asked, digest: str) -> Path:
    """A folder for what no finished stage holds, one for each question about the same rows."""
    from tasks.runtime import open_store
    from tasks.store import fingerprint

    spec = asked.spec
    config = {"spec": spec.model_dump(mode="json", exclude={"execution"})}
    inputs = {"rows": digest, "golden": asked.golden.digest if asked.golden is not None else _NONE}
    return open_store(spec.execution).scratch("data_report", fingerprint("data_report", 1, config, inputs))
