"""Check rows against the suites of `expectations`, part good from bad, and build the Data Docs."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, best_match
from referencing import Registry

from tasks.contracts.errors import DataError, SpecError
from tasks.contracts.progress import Progress, ProgressListener, ignore_progress
from tasks.contracts.rows import Message, Row, read_rows
from tasks.contracts.spec import DataSpec, TaskKind, TaskSpec
from tasks.data.docs import INDEX, write_page
from tasks.data.draw import content_hash
from tasks.data.ingest import ROWS, UNREADABLE
from tasks.data.similar import normalise

QUARANTINE = "quarantine.jsonl"
_DOCS = "data_docs"
_FACTS = (
    "row", "unreadable", "id", "content", "text_characters", "text_visible_characters", "target",
    "target_visible_characters", "text_damage", "target_damage", "schema_problem", "role_problem", "text_identity",
)  # fmt: skip
_ROLES_AFTER = {
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
_SHORT_VALUE = 200  # characters of a value in a reason; the whole record is in the quarantine anyway
# What a text decoded with a wrong encoding has: the replacement character, and control characters other than
# tab, line feed and carriage return (0x80 to 0x9f are what WINDOWS-1252 punctuation becomes in ISO 8859-1).
_DAMAGE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd]")


class Validated(NamedTuple):
    """Counts of a validation; `reasons` counts rows by the code of the reason, a row with two reasons twice."""

    rows: int
    quarantined: int
    reasons: dict[str, int]


class Reason(NamedTuple):
    """Why a row is bad: a code to count by, and what is wrong with this row in words."""

    code: str
    text: str


class SuiteResult(NamedTuple):
    """What a suite found.

    Attributes:
        by_row: for each failing row (by the frame's column `row`) what is wrong with it, in the suite's order.
        of_set: what is wrong with the rows as a whole.
        result: Great Expectations' own result, as plain JSON.
        suite: the suite, as plain JSON.
    """

    by_row: dict[int, list[Reason]]
    of_set: list[str]
    result: dict[str, Any]
    suite: dict[str, Any]


def validate(
    raw: Path,
    task: TaskSpec,
    data: DataSpec,
    folder: Path,
    keep: Callable[[], Path],
    listener: ProgressListener = ignore_progress,
) -> Validated:
    """Part the rows of an ingested dataset into `rows.jsonl` and `quarantine.jsonl`.

    A line of the quarantine is `{"line", "id", "reasons", "record"}` with every reason. `suite.json`, `result.json`
    and the site `data_docs/` (see `tasks.data.docs`) lie beside them. When too many rows are bad the quarantine and
    the site are kept in the folder that `keep` gives, since `folder` does not outlive the error.

    Raises:
        DataError: the share of bad rows is over `data.max_invalid_share`, or no row is good.
        SpecError: `task.json_schema` is no JSON Schema.
    """
    listener(Progress(0, 3, "steps", "facts of each row"))
    frame = pd.DataFrame(_all_facts(raw, task), columns=[*_FACTS])
    listener(Progress(1, 3, "steps", "expectations"))
    from expectations import training_rows

    frame = with_distinct_ids(frame)
    found = run_suite(training_rows.build_suite(task, data), frame, folder / _DOCS)
    _write_json(folder / "suite.json", found.suite)
    _write_json(folder / "result.json", found.result)
    listener(Progress(2, 3, "steps", "quarantine"))
    counts = _part(raw, found.by_row, folder)
    write_page(
        folder / _DOCS,
        found.result,
        folder / QUARANTINE,
        rows=counts.rows,
        quarantined=counts.quarantined,
        limit=data.max_invalid_share,
    )
    total = counts.rows + counts.quarantined
    share = counts.quarantined / total
    if share > data.max_invalid_share or counts.rows == 0:
        kept = keep()
        shutil.copy(folder / QUARANTINE, kept / QUARANTINE)
        shutil.rmtree(kept / _DOCS, ignore_errors=True)
        shutil.copytree(folder / _DOCS, kept / _DOCS)
        raise DataError(
            f"{counts.quarantined:,} of {total:,} rows are invalid ({share:.1%}), the limit is "
            f"{data.max_invalid_share:.1%}: {say_counts(counts.reasons)}.",
            where=f"{data.source}; each bad row with its reasons: {kept / QUARANTINE}; "
            f"Data Docs: {kept / _DOCS / INDEX}",
            fix="correct these rows in the source, or raise `data.max_invalid_share` if they may be left out",
        )
    listener(Progress(3, 3, "steps"))
    return counts


def say_counts(counts: dict[str, int]) -> str:
    """Counts in words, the largest first."""
    return "; ".join(f"{number:,} × {name}" for name, number in sorted(counts.items(), key=lambda item: -item[1]))


# -- facts of rows ------------------------------------------------------------------------------------------------


def facts_of(rows: Iterable[Row], task: TaskSpec) -> Iterator[dict[str, Any]]:
    """For each row the facts that `expectations.training_rows` describes, and `text_identity`.

    Raises:
        SpecError: `task.json_schema` is no JSON Schema.
    """
    schema_problem = schema_check(task)
    for index, row in enumerate(rows):
        text = "\n".join(message.content for message in row.messages)
        yield {
            "row": index,
            "unreadable": None,
            "id": row.id,
            "content": content_hash(row)[:16],
            "text_characters": len(text),
            "text_visible_characters": len(row.messages[-1].content.strip()),
            "target": row.target if task.kind is TaskKind.CLASSIFY else None,
            "target_visible_characters": len(row.target.strip()),
            "text_damage": _damage(text),
            "target_damage": _damage(row.target),
            "schema_problem": schema_problem(row.target),
            "role_problem": _role_problem(row.messages),
            "text_identity": hashlib.sha256(normalise(row.text).encode()).hexdigest()[:16],
        }


def with_distinct_ids(frame: pd.DataFrame) -> pd.DataFrame:
    """Add `id_of_distinct_row`: the id, null for the repetitions of a row whose id always has the same content."""
    several = frame.groupby("id")["content"].transform("nunique") > 1
    repeated = frame.duplicated(["id", "content"]) & frame["content"].notna()
    return frame.assign(id_of_distinct_row=frame["id"].mask(repeated & ~several, None))


def _all_facts(raw: Path, task: TaskSpec) -> Iterator[dict[str, Any]]:
    """Facts of the usable rows, then of the unreadable ones, numbered through."""
    count = 0
    for facts in facts_of(read_rows(raw / ROWS), task):
        count += 1
        yield facts
    for number, entry in enumerate(_unreadable(raw)):
        yield {
            "row": count + number,
            "unreadable": "; ".join(entry["reasons"])[:_SHORT_VALUE],
            "id": entry["id"],
            "content": hashlib.sha256(json.dumps(entry["record"]).encode()).hexdigest()[:16],
        }


def _unreadable(raw: Path) -> Iterator[dict[str, Any]]:
    with (raw / UNREADABLE).open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def _damage(text: str) -> str | None:
    found = _DAMAGE.search(text)
    if found is None:
        return None
    character = found.group()
    name = unicodedata.name(character, "a control character").lower()
    return f"{name} (U+{ord(character):04X}) at character {found.start() + 1}"


def _role_problem(messages: tuple[Message, ...]) -> str | None:
    """What is wrong with the order of turns before an answer; None when it is right."""
    previous = "system"
    for number, message in enumerate(messages, start=1):
        first = number == 1 and message.role == "system"
        if not first and message.role not in _ROLES_AFTER[previous]:
            before = f"after {previous}" if number > 1 else "at the start"
            return f"chat turn {number} is {message.role} {before}"
        previous = message.role
    if previous not in ("user", "tool"):
        return f"the chat turn before the answer is {previous}, not user"
    return None


def schema_check(task: TaskSpec) -> Callable[[str], str | None]:
    """A function from target to what is wrong with it by the task's JSON Schema; None when it fits or there is none.

    Raises:
        SpecError: `task.json_schema` is no JSON Schema.
    """
    if task.json_schema is None:
        return lambda target: None
    try:
        Draft202012Validator.check_schema(task.json_schema)
    except SchemaError as error:
        raise SpecError(
            f"The JSON Schema is not valid: {error.message}.",
            where=f"task.json_schema, at {error.json_path}",
            fix="correct the schema (JSON Schema, draft 2020-12)",
        ) from error
    # An empty registry of its own, so that a `$ref` to an address is never fetched.
    validator = Draft202012Validator(task.json_schema, registry=Registry())

    def problem(target: str) -> str | None:
        try:
            value = json.loads(target)
        except ValueError as error:
            return f"no valid JSON: {error}"
        worst = best_match(validator.iter_errors(value))
        return None if worst is None else f"{worst.message[:_SHORT_VALUE]} (at {worst.json_path})"

    return problem


# -- Great Expectations -------------------------------------------------------------------------------------------


def run_suite(suite: Any, frame: pd.DataFrame, docs: Path | None = None) -> SuiteResult:
    """Run a suite over a frame of facts, in an ephemeral context of its own.

    `docs` is a folder for Great Expectations' own pages of Data Docs.

    Raises:
        DataError: an expectation could not be evaluated at all.
    """
    import great_expectations as gx
    from great_expectations.data_context.types.base import (
        DataContextConfig,
        InMemoryStoreBackendDefaults,
        ProgressBarsConfig,
    )

    # The default configuration would make a folder for a Data Docs site of its own, and log it.
    context = gx.get_context(
        mode="ephemeral",
        project_config=DataContextConfig(
            store_backend_defaults=InMemoryStoreBackendDefaults(init_temp_docs_sites=False),
            progress_bars=ProgressBarsConfig(globally=False),
            analytics_enabled=False,
        ),
    )
    suite = context.suites.add(suite)
    batch = (
        context.data_sources.add_pandas("rows").add_dataframe_asset("rows").add_batch_definition_whole_dataframe("all")
    )
    validation = context.validation_definitions.add(gx.ValidationDefinition(name=suite.name, data=batch, suite=suite))
    actions = []
    if docs is not None:
        context.add_data_docs_site(
            "docs",
            {
                "class_name": "SiteBuilder",
                "show_how_to_buttons": False,
                "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
                "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(docs)},
            },
        )
        actions.append(gx.checkpoint.UpdateDataDocsAction(name="docs", site_names=["docs"]))
    checkpoint = context.checkpoints.add(
        gx.Checkpoint(
            name=suite.name,
            validation_definitions=[validation],
            actions=actions,
            result_format={"result_format": "COMPLETE", "unexpected_index_column_names": ["row"]},
        )
    )
    run = checkpoint.run(batch_parameters={"dataframe": frame})
    (result,) = run.run_results.values()
    by_row: dict[int, list[Reason]] = {}
    of_set: list[str] = []
    for outcome in result.results:
        if outcome.success:
            continue
        config = outcome.expectation_config
        if outcome.exception_info.get("raised_exception"):
            raise DataError(
                f"An expectation could not be evaluated: {outcome.exception_info.get('exception_message')}.",
                where=f"suite {suite.name}, {config.type}",
                fix="report it together with this message; the data were not judged",
            )
        template = config.meta["reason"]
        if "unexpected_index_list" not in outcome.result:
            missing = outcome.result.get("partial_missing_list")  # of a set of values that all have to be there
            value = outcome.result["observed_value"] if missing is None else ", ".join(map(repr, missing))
            of_set.append(template.format(value=value))
            continue
        column, code = config.kwargs["column"], config.meta["code"]
        for entry in outcome.result["unexpected_index_list"]:
            reason = Reason(code, template.format(value=_shown(entry[column])))
            by_row.setdefault(int(entry["row"]), []).append(reason)
    if docs is not None:
        shutil.rmtree(docs / "static", ignore_errors=True)  # 4 MB of fonts and pictures that its pages do not show
    plain = result.to_json_dict()
    plain["meta"].pop("active_batch_definition", None)
    return SuiteResult(by_row, of_set, plain, suite.to_json_dict())


def _shown(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():  # pandas makes counts floats in a column with nulls
        return int(value)
    if isinstance(value, str) and len(value) > _SHORT_VALUE:
        return value[:_SHORT_VALUE] + "…"
    return value


# -- parting ------------------------------------------------------------------------------------------------------


def _part(raw: Path, by_row: dict[int, list[Reason]], folder: Path) -> Validated:
    rows = quarantined = 0
    reasons: Counter[str] = Counter()
    with (
        (raw / ROWS).open(encoding="utf-8") as lines,
        (folder / ROWS).open("w", encoding="utf-8", newline="\n") as good,
        (folder / QUARANTINE).open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as bad,
    ):
        index = -1
        for index, line in enumerate(lines):
            if index not in by_row:
                good.write(line)
                rows += 1
                continue
            record = json.loads(line)
            texts = [reason.text for reason in by_row[index]]
            entry = {"line": record["line"], "id": record["id"], "reasons": texts, "record": record}
            bad.write(json.dumps(entry, ensure_ascii=False) + "\n")
            reasons.update(reason.code for reason in by_row[index])
            quarantined += 1
        for number, entry in enumerate(_unreadable(raw), start=index + 1):
            also = [reason for reason in by_row[number] if reason.code != "unreadable"]
            reasons.update({why.split(":")[0] for why in entry["reasons"]} | {reason.code for reason in also})
            entry["reasons"] += [reason.text for reason in also]
            bad.write(json.dumps(entry, ensure_ascii=False) + "\n")
            quarantined += 1
    return Validated(rows, quarantined, dict(reasons.most_common()))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
