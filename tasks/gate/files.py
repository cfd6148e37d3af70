"""Outcomes and policies from files of anyone's making, for the gate as a command of its own."""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from tasks.contracts.errors import EvaluationError, SpecError
from tasks.contracts.parse import as_mapping, no_such_field, parse, read_mapping
from tasks.contracts.prompt import Prompt
from tasks.contracts.references import Conditions, EvaluationSummary, ItemOutcome, SystemUnderTest
from tasks.contracts.spec import MACRO_F1, Expense, Policy, RetrainSpec
from tasks.gate.harness_logs import read_harness_log
from tasks.store import digest_file

_TEXTS = ("text", "target", "prediction", "group", "slice")
_EXPENSES = tuple(expense.value for expense in Expense)
_NOT_SCORES = set(ItemOutcome.model_fields) - {"scores"}
_FORMATS = (
    "an evaluation folder, a .jsonl, .csv or .parquet file with the columns `id` and `score`, "
    "a samples_….jsonl of lm-evaluation-harness, or an .eval or .json log of inspect_ai"
)


class EvaluationFile(NamedTuple):
    """Outcomes of one model that were read from a file or a folder.

    Attributes:
        system: the model; of a bare file nothing is known but its name and its digest.
        conditions: how it was evaluated; None for a file, where nothing says so.
        outcomes: the items in the order of the file.
        digest: sha256 of the outcome file.
        items_digest: sha256 of what was asked (see `items_digest`): the name of a golden set that has no other.
        expenses: those that the file gives for its items; of any other an outcome's number is no measurement.
        left_out: metrics and expenses of a harness's log that cannot be judged, each with the reason.
    """

    system: SystemUnderTest
    conditions: Conditions | None
    outcomes: list[ItemOutcome]
    digest: str
    items_digest: str
    expenses: frozenset[Expense]
    left_out: dict[str, str]


class _Read(NamedTuple):
    outcomes: list[ItemOutcome]
    expenses: frozenset[Expense]
    left_out: dict[str, str]


def items_digest(outcomes: Iterable[ItemOutcome]) -> str:
    """sha256 over what was asked, whatever the order and the answers: id, text, target, group, slice of each item."""
    items = sorted((one.id, one.text, one.target, one.group or "", one.slice or "") for one in outcomes)
    return hashlib.sha256("".join(json.dumps(item) + "\n" for item in items).encode()).hexdigest()


def read_policy(path: Path) -> Policy:
    """The policy in a YAML or JSON file: its own fields, or those in the `policy` of a configuration or of a verdict.

    A configuration may leave its policy out, and an empty file is the policy with all defaults.

    Raises:
        SpecError: the file cannot be read, or fields are unknown or out of bounds; names them all.
    """
    content = read_mapping(path, subject="policy", may_be_empty=True)
    is_verdict = {"policy", "outcome"} <= content.keys()
    if not is_verdict and not content.keys() & RetrainSpec.model_fields.keys():
        return parse(Policy, content, where=str(path), subject="policy")
    # The other parts of a configuration are not this command's business; but a name that it does not have may be a
    # misspelt `policy`, or a field that belongs into it, and must not be passed over.
    unknown = [] if is_verdict else sorted(content.keys() - RetrainSpec.model_fields.keys(), key=str)
    if unknown:
        lines = [
            f"  - {name}: {'it belongs into `policy`' if name in Policy.model_fields else _not_in_configuration(name)}"
            for name in unknown
        ]
        raise SpecError(
            "\n".join(["The configuration does not fit:", *lines]), where=str(path), fix="change the fields named above"
        )
    where, policy = f"{path}: policy", content.get("policy")
    record = {} if policy is None else as_mapping(policy, where=where, subject="policy")
    return parse(Policy, record, where=where, subject="policy")


def read_evaluation(path: Path, metric: str) -> EvaluationFile:
    """Outcomes of one model: an evaluation folder (`items.jsonl`, `summary.json`), a file, or a harness's log.

    A JSONL, CSV or Parquet file needs a column `id`, and `score` (taken as `metric`) or columns named for their
    metrics. Read if there: `text`, `target`, `prediction`, `group` (items that belong together; one without a group
    stands alone), `slice`, and, given for all items or for none, `latency_ms`, `cost`, `prompt_tokens` and
    `output_tokens`. For the metric `macro_f1` it needs `target` and `prediction`; scores may then be missing, and
    `exact_match` is made of the two. Harnesses' logs are told by their content: see `tasks.gate.harness_logs`.

    Raises:
        EvaluationError: missing, empty, not readable, an id twice, a value that cannot be, or the metric is not there;
            names file, line or row, and field.
    """
    if path.is_dir():
        return _read_folder(path, metric)
    read = _read_outcomes(path, metric)
    _check_metric(path, read.outcomes[0].scores, metric, read.left_out)
    digest = digest_file(path)
    system = SystemUnderTest(uri=str(path), digest=digest, prompt=Prompt(system=""), role="other", label=path.stem)
    return _evaluation_file(system, None, read, digest)


def _read_folder(folder: Path, metric: str) -> EvaluationFile:
    items, summary_path = folder / "items.jsonl", folder / "summary.json"
    try:
        summary = EvaluationSummary.model_validate_json(summary_path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        logs = sorted(path.name for pattern in ("*.jsonl", "*.eval") for path in folder.glob(pattern))
        raise EvaluationError(
            f"The folder holds no readable summary.json: {_first_line(error)}",
            where=str(summary_path),
            fix="give a folder that `goldgate evaluate` wrote"
            + (f", or one of the files in this one: {', '.join(logs[:5])}" if logs else ""),
        ) from error
    read = _read_outcomes(items, metric)
    if len(read.outcomes) != summary.items:
        raise EvaluationError(
            f"The summary speaks of {summary.items} items, and {len(read.outcomes)} are there.",
            where=str(items),
            fix="evaluate again; a part of the file is missing",
        )
    return _evaluation_file(summary.system, summary.conditions, read, digest_file(items))


def _evaluation_file(
    system: SystemUnderTest, conditions: Conditions | None, read: _Read, digest: str
) -> EvaluationFile:
    return EvaluationFile(
        system, conditions, read.outcomes, digest, items_digest(read.outcomes), read.expenses, read.left_out
    )


def _read_outcomes(path: Path, metric: str) -> _Read:
    try:
        log = read_harness_log(path, metric)
        if log is None:
            read = _outcomes(_reader(path)(path), metric)
        else:
            _check_metric(path, log.items[0][1]["scores"], metric, log.left_out)
            read = _outcomes(log.items, metric)._replace(left_out=log.left_out)
    except UnicodeDecodeError as error:
        raise EvaluationError(
            f"The file is not UTF-8: {error.reason} at byte {error.start}.", where=str(path), fix="save it as UTF-8"
        ) from error
    except OSError as error:
        raise EvaluationError(
            f"The file cannot be read: {error.strerror or error}.", where=str(path), fix=f"give {_FORMATS}"
        ) from error
    if not read.outcomes:
        raise EvaluationError("The file holds no outcomes.", where=str(path), fix=f"give {_FORMATS}")
    return read


def _outcomes(items: Iterable[tuple[str, Mapping[str, Any]]], metric: str) -> _Read:
    outcomes: list[ItemOutcome] = []
    seen: dict[str, str] = {}
    first: Mapping[str, Any] = {}
    for where, record in items:
        outcome = _outcome(record, where, metric)
        if outcome.id in seen:
            raise EvaluationError(
                f"The item {outcome.id} is there twice, first at {seen[outcome.id]}.",
                where=where,
                fix="keep one of the two; give several answers to one item ids of their own, and one `group`",
            )
        if not outcomes:
            first = record
        elif differing := outcome.scores.keys() ^ outcomes[0].scores.keys():
            raise EvaluationError(
                f"Not every item has the same scores: {', '.join(sorted(differing))}.",
                where=f"{where}, and {seen[outcomes[0].id]}",
                fix="give every item a score of every metric, or leave the metric out",
            )
        for name in _EXPENSES:  # a mean over those that happen to have one would be no one's
            if _missing(record.get(name)) != _missing(first.get(name)):
                raise EvaluationError(
                    f"Some items have {name}, and others do not.",
                    where=f"{where}, {name}",
                    fix=f"give {name} for every item, or leave the column out",
                )
        seen[outcome.id] = where
        outcomes.append(outcome)
    return _Read(outcomes, frozenset(one for one in Expense if not _missing(first.get(one.value))), left_out={})


def _check_metric(path: Path, scores: Mapping[str, float], metric: str, left_out: Mapping[str, str]) -> None:
    """Whether the deciding metric is there; all items have the same scores, so those of one item say it."""
    if metric in scores or metric == MACRO_F1:
        return
    fix = "give the column `score`, or a metric that every item has as a number from 0 to 1"
    if scores:
        near = difflib.get_close_matches(metric, scores, n=1)
        fix = "set the policy's `metric` to one that is there" + (f", such as {near[0]}" if near else "")
    if metric in left_out:
        raise EvaluationError(
            f"The metric {metric} cannot be judged: {left_out[metric]}.", where=f"{path}, {metric}", fix=fix
        )
    there = f"it has {', '.join(sorted(scores))}" if scores else "it has none"
    without = "".join(
        f"; {name} cannot be judged: {reason}" for name, reason in left_out.items() if name not in _EXPENSES
    )
    raise EvaluationError(f"The file has no metric {metric}; {there}{without}.", where=str(path), fix=fix)


def _reader(path: Path) -> Callable[[Path], Iterator[tuple[str, Mapping[str, Any]]]]:
    readers = {".jsonl": _jsonl, ".ndjson": _jsonl, ".csv": _csv, ".parquet": _parquet}
    suffix = path.suffix.lower()
    if suffix not in readers:
        not_log = " that is no log of inspect_ai" if suffix in (".json", ".eval") else ""
        raise EvaluationError(
            f"Outcomes cannot be read from a {suffix or 'nameless'} file{not_log}.",
            where=str(path),
            fix=f"give {_FORMATS}",
        )
    return readers[suffix]


def _jsonl(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                message = error.msg if isinstance(error, json.JSONDecodeError) else _first_line(error)
                raise EvaluationError(
                    f"The line is not JSON: {message}.", where=where, fix="correct the line"
                ) from error
            if not isinstance(record, dict):
                raise EvaluationError("The line is not a JSON object.", where=where, fix='write {"id": …, "score": …}')
            yield where, record


def _csv(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        try:
            header = [name.strip() for name in rows.fieldnames or []]
            rows.fieldnames = header
            twice = sorted({name for name in header if header.count(name) > 1})
            if twice:
                raise EvaluationError(
                    f"The column {twice[0]} is there twice.", where=f"{path}:1", fix="keep one of the two"
                )
            if header and "id" not in header:
                other = next((mark for mark in (";", "\t") if mark in header[0]), None)
                raise EvaluationError(
                    f"The file has no column `id`; it has {', '.join(header)}.",
                    where=f"{path}:1",
                    fix="separate the cells by commas" if other else "give every item the column `id`",
                )
            for record in rows:
                where = f"{path}:{rows.line_num}"
                if None in record or None in record.values():
                    raise EvaluationError(
                        "The row has more or fewer cells than the header.", where=where, fix="correct the row"
                    )
                yield where, record
        except csv.Error as error:
            raise EvaluationError(
                f"The row cannot be read: {error}.",
                where=f"{path}:{rows.line_num}",
                fix="correct the row, or give JSON Lines",
            ) from error


def _parquet(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except pa.ArrowException as error:
        raise EvaluationError(
            f"The file is not Parquet: {_first_line(error)}", where=str(path), fix="write it again"
        ) from error
    if "id" not in table.column_names:
        raise EvaluationError(
            f"The file has no column `id`; it has {', '.join(table.column_names)}.",
            where=str(path),
            fix="give every item the column `id`; an index of pandas is no column",
        )
    for number, record in enumerate(table.to_pylist(), start=1):
        yield f"{path}, row {number}", record


def _outcome(record: Mapping[str, Any], where: str, metric: str) -> ItemOutcome:
    texts = {name: _text(record.get(name)) for name in ("id", *_TEXTS)}
    if not texts["id"]:
        raise EvaluationError("The item has no id.", where=f"{where}, id", fix="give every item the column `id`")
    scores = _scores(record, where, metric)
    if metric == MACRO_F1:
        # An empty answer is an answer, and an empty target is none.
        lacking = "target" if not texts["target"] else "prediction" if texts["prediction"] is None else None
        if lacking is not None:
            raise EvaluationError(
                f"The metric {MACRO_F1} is made of targets and predictions, and this item has no {lacking}.",
                where=f"{where}, {lacking}",
                fix="give the columns `target` and `prediction`, or decide on another metric",
            )
        right = (texts["prediction"] or "").strip() == (texts["target"] or "").strip()
        scores.setdefault("exact_match", float(right))  # who won an item, which macro_f1 does not say
    expenses = {name: _amount(record, name, where) for name in (*_EXPENSES, "confidence")}
    return ItemOutcome(
        id=texts["id"],
        text=texts["text"] or "",
        target=texts["target"] or "",
        prediction=texts["prediction"] or "",
        scores=scores,
        latency_ms=expenses["latency_ms"] or 0.0,
        prompt_tokens=int(expenses["prompt_tokens"] or 0),
        output_tokens=int(expenses["output_tokens"] or 0),
        cost=expenses["cost"],
        confidence=expenses["confidence"],
        group=texts["group"] or None,
        slice=texts["slice"] or None,
    )


def _scores(record: Mapping[str, Any], where: str, metric: str) -> dict[str, float]:
    columns = {name: value for name, value in record.items() if name not in _NOT_SCORES and name != "scores"}
    named = record.get("scores", columns)
    if not isinstance(named, Mapping) or (not named and metric != MACRO_F1):
        raise EvaluationError(
            "The item has no scores.",
            where=where,
            fix="give the column `score`, or columns named for their metrics"
            + (f"; {MACRO_F1} needs `target` and `prediction` alone" if metric == MACRO_F1 else ""),
        )
    if named is not columns and columns:
        raise EvaluationError(
            f"The item has `scores`, and {', '.join(columns)} beside it.",
            where=where,
            fix="move what is a score into `scores`, and leave out what is none",
        )
    if metric == MACRO_F1 and (of_item := named.keys() & {"score", MACRO_F1}):
        raise EvaluationError(
            f"The metric {MACRO_F1} is no score of an item; it is made of all targets and predictions.",
            where=f"{where}, {min(of_item)}",
            fix="give the columns `target` and `prediction`, and call other scores by their metrics",
        )
    if "score" in columns and metric in columns and metric != "score":
        raise EvaluationError(
            f"The item has `score`, which is taken as {metric}, and {metric} beside it.",
            where=where,
            fix="keep one of the two",
        )
    return {
        metric if name == "score" and named is columns else name: _score(name, value, f"{where}, {name}")
        for name, value in named.items()
    }


def _score(name: str, value: Any, where: str) -> float:
    words = {"true": 1.0, "false": 0.0}
    try:
        score = words[value.lower()] if isinstance(value, str) and value.lower() in words else float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not 0.0 <= score <= 1.0:
        meant = difflib.get_close_matches(name, _NOT_SCORES, n=1, cutoff=0.7)
        raise EvaluationError(
            f"The score is {value!r}, and a score is a number from 0 to 1.",
            where=where,
            fix=f"if it is no score but {meant[0]}, call the column so"
            if meant
            else "write 1 for right and 0 for wrong; leave out columns that are no scores",
        )
    return score


def _amount(record: Mapping[str, Any], name: str, where: str) -> float | None:
    value = record.get(name)
    if _missing(value):
        return None
    whole = name.endswith("_tokens")
    most = 1.0 if name == "confidence" else math.inf
    try:
        amount = float(value or 0)
    except (TypeError, ValueError):
        amount = math.nan
    if not (0.0 <= amount <= most and math.isfinite(amount)) or (whole and not amount.is_integer()):
        kind = "a number from 0 to 1" if name == "confidence" else f"a {'whole ' * whole}number that is not negative"
        raise EvaluationError(
            f"The {name} is {value!r}, and it is {kind}.",
            where=f"{where}, {name}",
            fix="correct it, or leave the cell empty for every item" if name in _EXPENSES else "correct it",
        )
    return amount


def _missing(value: Any) -> bool:
    return value is None or value == ""


def _text(value: Any) -> str | None:
    """A cell as text, the same from each format: numbers as CSV would have them, NaN (pandas' nothing) as None."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float):
        return None if math.isnan(value) else str(int(value)) if value.is_integer() else str(value)
    if isinstance(value, bool | Mapping | list):
        return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
    return str(value)


def _not_in_configuration(name: Any) -> str:
    return no_such_field(str(name), RetrainSpec.model_fields)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
