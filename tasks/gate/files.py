"""Outcomes from files, for the gate as a command of its own."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from tasks.contracts.errors import EvaluationError, SpecError
from tasks.contracts.prompt import Prompt
from tasks.contracts.references import Conditions, EvaluationSummary, ItemOutcome, SystemUnderTest, Verdict
from tasks.contracts.spec import Metric, Policy
from tasks.gate.decide import Side, give_verdict
from tasks.store import digest_file

_NOT_SCORES = set(ItemOutcome.model_fields) - {"scores"}
_FORMATS = "an evaluation folder, or a .jsonl, .csv or .parquet file with the columns `id` and `score`"


class EvaluationFile(NamedTuple):
    """Outcomes that were read; `conditions` is None for a bare file. `digest` is the sha256 of the outcome file."""

    system: SystemUnderTest
    conditions: Conditions | None
    outcomes: list[ItemOutcome]
    digest: str


def judge_files(baseline: Path, candidate: Path, policy: Policy) -> Verdict:
    """The verdict on two evaluations that lie in files or folders; nothing is kept, and `looks` counts this one alone.

    Raises:
        EvaluationError: a file cannot be read; names file and line.
        NotComparableError: the two cannot be compared.
    """
    left, right = read_evaluation(baseline, policy.metric), read_evaluation(candidate, policy.metric)
    digests = {
        "candidate": right.system.digest,
        "baseline": left.system.digest,
        "candidate_outcomes": right.digest,
        "baseline_outcomes": left.digest,
    }
    if left.conditions is not None:
        digests["golden_set"] = left.conditions.golden_digest
    return give_verdict(
        Side(left.system, left.conditions, left.outcomes),
        Side(right.system, right.conditions, right.outcomes),
        policy,
        looks=1,
        digests=digests,
    )


def read_policy(path: Path) -> Policy:
    """The policy in a YAML file: its own fields, or those of a whole configuration (which may leave them out).

    Raises:
        SpecError: the file cannot be read, or a field is unknown or out of bounds.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SpecError(
            f"The policy cannot be read: {error}",
            where=str(path),
            fix="give a YAML file with metric, alpha and min_improvement",
        ) from error
    if isinstance(content, dict) and ("policy" in content or "task" in content):  # a whole configuration
        content = content.get("policy")
    try:
        return Policy.model_validate(content if content is not None else {})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise SpecError(
            f"The policy is not valid: {first['msg']}.", where=f"{path}: {where or 'policy'}", fix="correct this field"
        ) from error


def read_evaluation(path: Path, metric: Metric) -> EvaluationFile:
    """Outcomes of one model: an evaluation folder (`items.jsonl`, `summary.json`), or a JSONL, CSV or Parquet file.

    A file needs a column `id`, and `score` (taken as `metric`) or columns named for their metrics; `text`, `target`,
    `prediction` and the other fields of `ItemOutcome` are read if there.

    Raises:
        EvaluationError: missing, empty, not readable, an id twice, a score that is no number in [0, 1].
    """
    if path.is_dir():
        return _read_folder(path, metric)
    outcomes = _read_outcomes(path, metric)
    digest = digest_file(path)
    system = SystemUnderTest(uri=str(path), digest=digest, prompt=Prompt(system=""), role="other", label=path.stem)
    return EvaluationFile(system, None, outcomes, digest)


def _read_folder(folder: Path, metric: Metric) -> EvaluationFile:
    items, summary_path = folder / "items.jsonl", folder / "summary.json"
    try:
        summary = EvaluationSummary.model_validate_json(summary_path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        raise EvaluationError(
            f"The folder holds no readable summary.json: {_first_line(error)}",
            where=str(summary_path),
            fix="give a folder that `goldgate evaluate` wrote",
        ) from error
    outcomes = _read_outcomes(items, metric)
    if len(outcomes) != summary.items:
        raise EvaluationError(
            f"The summary speaks of {summary.items} items, and {len(outcomes)} are there.",
            where=str(items),
            fix="evaluate again; a part of the file is missing",
        )
    return EvaluationFile(summary.system, summary.conditions, outcomes, digest_file(items))


def _read_outcomes(path: Path, metric: Metric) -> list[ItemOutcome]:
    readers = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise EvaluationError(
            f"Outcomes cannot be read from a {path.suffix or 'nameless'} file.", where=str(path), fix=f"give {_FORMATS}"
        )
    outcomes: list[ItemOutcome] = []
    seen: dict[str, str] = {}
    try:
        for where, record in reader(path):
            outcome = _outcome(record, where, metric)
            if outcome.id in seen:
                raise EvaluationError(
                    f"The item {outcome.id} is there twice, first at {seen[outcome.id]}.",
                    where=where,
                    fix="keep one of the two",
                )
            seen[outcome.id] = where
            outcomes.append(outcome)
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(
            f"The file cannot be read: {_first_line(error)}", where=str(path), fix=f"give {_FORMATS}, in UTF-8"
        ) from error
    if not outcomes:
        raise EvaluationError("The file holds no outcomes.", where=str(path), fix=f"give {_FORMATS}")
    return outcomes


def _jsonl(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise EvaluationError(
                    f"The line is not JSON: {error.msg}.", where=where, fix="correct the line"
                ) from error
            if not isinstance(record, dict):
                raise EvaluationError("The line is not a JSON object.", where=where, fix='write {"id": …, "score": …}')
            yield where, record


def _csv(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        for record in rows:
            where = f"{path}:{rows.line_num}"
            if None in record or None in record.values():
                raise EvaluationError(
                    "The row has more or fewer cells than the header.", where=where, fix="correct the row"
                )
            yield where, record


def _parquet(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise EvaluationError(
            f"The file is not Parquet: {_first_line(error)}", where=str(path), fix="write it again"
        ) from error
    for number, record in enumerate(table.to_pylist(), start=1):
        yield f"{path}, row {number}", record


def _outcome(record: Mapping[str, Any], where: str, metric: Metric) -> ItemOutcome:
    if record.get("id") in (None, ""):
        raise EvaluationError("The item has no id.", where=where, fix="give every item the column `id`")
    if "scores" in record:
        named = record["scores"]
    else:
        named = {name: value for name, value in record.items() if name not in _NOT_SCORES}
    if not isinstance(named, Mapping) or not named:
        raise EvaluationError(
            "The item has no scores.", where=where, fix="give the column `score`, or columns named for their metrics"
        )
    scores = {
        metric.value if name == "score" else name: _score(value, f"{where}, {name}") for name, value in named.items()
    }
    rest = {name: value for name, value in record.items() if name in _NOT_SCORES and value not in (None, "")}
    empty = {"text": "", "target": "", "prediction": "", "latency_ms": 0.0, "prompt_tokens": 0, "output_tokens": 0}
    try:
        return ItemOutcome.model_validate({**empty, **rest, "id": str(record["id"]), "scores": scores})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise EvaluationError(
            f"The field cannot be used: {first['msg']}.", where=f"{where}, {field}", fix="correct the field"
        ) from error


def _score(value: Any, where: str) -> float:
    words = {"true": 1.0, "false": 0.0}
    try:
        score = words[value.lower()] if isinstance(value, str) and value.lower() in words else float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not 0.0 <= score <= 1.0:
        raise EvaluationError(
            f"The score is {value!r}, and a score is a number from 0 to 1.",
            where=where,
            fix="write 1 for right and 0 for wrong; leave out columns that are no scores",
        )
    return score


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
