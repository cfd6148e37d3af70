"""Per-item logs of other people's evaluation harnesses, read as outcomes.

lm-evaluation-harness: `samples_<task>_<time>.jsonl`, which `--log_samples` writes. The item is `doc` (not the prompt,
which may differ between two systems under test); each number that an item has becomes a score of the metric's name. A
task with several filters has a line for each: they become one item whose scores are called `<metric>/<filter>`. The
log does not say which metrics are better when lower; all are taken as better when higher.

inspect_ai: `.eval` (a zip, its members mostly Zstandard) and `.json`. Each scorer becomes a score: C 1, P 0.5, I and
N 0, yes and true 1, no and false 0, a number as it is; a scorer that gives several values becomes `<scorer>/<key>`.
Several epochs of a sample are several items (`<id>#<epoch>`) of one group, since they are no independent evidence.
Latency is that of the whole sample, scoring included.

A metric that is no number in [0, 1] on each item cannot be judged; it is left out, and `left_out` says why. Items are
never left out: a log with unfinished or failed ones is refused.
"""

from __future__ import annotations

import json
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from tasks.contracts.errors import EvaluationError
from tasks.contracts.parse import problems

_ZIP = b"PK\x03\x04"
_ZSTD = 93  # compression method of the zip format; the standard library reads it from Python 3.14 on
_SAMPLE_MEMBER = re.compile(r"^samples/.+_epoch_\d+(/sample)?\.json$", re.DOTALL)  # whole, or the head of its pieces
_HEADER, _START = "header.json", "_journal/start.json"

_WORDS = {"C": 1.0, "P": 0.5, "I": 0.0, "N": 0.0, "yes": 1.0, "true": 1.0, "no": 0.0, "false": 0.0}
_EXPENSES = ("latency_ms", "cost", "prompt_tokens", "output_tokens")
_LONGEST = 200  # characters of an error of the harness that a message repeats
_RETRY = "finish it with `inspect eval-retry LOG`, then give the new log; items are never left out"


class HarnessLog(NamedTuple):
    """A harness's log.

    Attributes:
        items: where each item was read, and its fields: those of an `ItemOutcome`, None for what is not known.
        left_out: metrics (or latency, tokens, cost) that not every item has as a usable number, each with the reason.
    """

    items: list[tuple[str, dict[str, Any]]]
    left_out: dict[str, str]


class _Logged(BaseModel):
    """A part of a log; what the gate has no use for is passed over, since harnesses add to it with each version."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class _LmEvalLine(_Logged):
    model_config = ConfigDict(extra="allow")  # the metrics

    doc_id: int | str
    doc: Any
    target: Any = None
    arguments: Any = None
    resps: Any = None
    filtered_resps: list[Any]
    filter: str | None = None  # from 0.4.8 on, as is `metrics`
    metrics: list[str] | None = None
    doc_hash: str | None = None
    prompt_hash: str | None = None
    target_hash: str | None = None


class _Error(_Logged):
    message: str = ""


class _Limit(_Logged):
    type: str


class _Score(_Logged):
    value: Any
    answer: str | None = None
    reason: str | None = None


class _Usage(_Logged):
    input_tokens: int = 0
    input_tokens_cache_read: int | None = None
    input_tokens_cache_write: int | None = None
    output_tokens: int = 0
    total_cost: float | None = None


class _Message(_Logged):
    role: str
    content: str | list[dict[str, Any]]


class _Output(_Logged):
    completion: str | None = None


class _Sample(_Logged):
    id: int | str
    epoch: int = 1
    input: str | list[_Message]
    choices: list[str] | None = None
    target: str | list[str]
    output: _Output = _Output()
    scores: dict[str, _Score] | None = None
    model_usage: dict[str, _Usage] = {}
    total_time: float | None = None
    working_time: float | None = None
    error: _Error | None = None
    limit: _Limit | None = None
    invalidation: Any = None
    attachments: dict[str, str] = {}


class _Evaluation(_Logged):
    task: str
    model: str = ""


class _Results(_Logged):
    total_samples: int = 0


class _InspectHeader(_Logged):
    status: str = "started"
    eval: _Evaluation
    results: _Results | None = None
    error: _Error | None = None


Part = TypeVar("Part", bound=_Logged)


@dataclass(frozen=True)
class _Item:
    where: str
    fields: dict[str, Any]
    scores: dict[str, float | str]  # a text says why there is no score


def read_harness_log(path: Path, metric: str) -> HarnessLog | None:
    """Read a log of lm-evaluation-harness or inspect_ai; None if the file is neither.

    Args:
        path: the log; its content decides what it is, not its name.
        metric: the deciding metric: an item's prediction is the answer that its filter or scorer saw.

    Raises:
        EvaluationError: it is one, and it is damaged, unfinished, or holds failed items.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        if file.read(len(_ZIP)) == _ZIP:
            return _read_inspect_zip(path, file, metric)
    try:
        content = _first_record(path)
    except UnicodeDecodeError:
        return None
    if isinstance(content, list) and content and _is_lm_eval(content[0]):  # a list over many lines, as 0.4.2 wrote it
        return _read_lm_eval(((f"{path}, entry {at}", entry) for at, entry in enumerate(content, 1)), metric)
    if _is_lm_eval(content):
        return _read_lm_eval(_lines(path), metric)
    if not isinstance(content, dict):
        return None
    if content.keys() >= {"results", "configs", "versions"}:
        raise EvaluationError(
            "The file holds the totals of lm-evaluation-harness, and a comparison needs its items.",
            where=str(path),
            fix="run it with --log_samples, and give the file samples_<task>_<time>.jsonl that lies beside this one",
        )
    if "status" in content and isinstance(content.get("eval"), dict) and "task" in content["eval"]:
        samples = content.get("samples")
        listed = samples if isinstance(samples, list) else []
        places = [(f"{path}, sample {at}", sample) for at, sample in enumerate(listed, start=1)]
        return _read_inspect(path, content, places, metric)
    return None


def _first_record(path: Path) -> Any:
    """The first line, or a whole document over several lines, if it is JSON."""
    with path.open(encoding="utf-8-sig") as lines:
        first = next((line for line in lines if line.strip()), "")
    content = _json_or_none(first)
    if content is not None or not first.lstrip().startswith(("{", "[")):
        return content
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if path.suffix.lower() != ".json":  # lines of JSON, perhaps, of which the first is damaged
            return None
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise EvaluationError(
            f"The file is not JSON: {error}.", where=f"{path}{line}", fix="copy it again, or run the evaluation again"
        ) from error


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{path}:{number}", _json_or_none(line)


def _json_or_none(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _validate(part: type[Part], record: Any, where: str, harness: str) -> Part:
    try:
        return part.model_validate(record)
    except ValidationError as error:
        problem = problems(part, error)[0] if isinstance(record, dict) else "it is no JSON object"
        raise EvaluationError(
            f"This is not as {harness} writes it: {problem}.",
            where=where,
            fix="give the log as it was written; if it is, its version is not known to Goldgate: give a file with the "
            "columns `id` and `score` instead",
        ) from error


# lm-evaluation-harness


def _is_lm_eval(record: Any) -> bool:
    return isinstance(record, dict) and record.keys() >= {"doc_id", "doc", "filtered_resps"}


def _read_lm_eval(records: Iterable[tuple[str, Any]], metric: str) -> HarnessLog:
    by_filter: dict[str | None, dict[str, tuple[str, _LmEvalLine]]] = {}
    for where, record in records:
        line = _validate(_LmEvalLine, record, where, "lm-evaluation-harness")
        seen, id_ = by_filter.setdefault(line.filter, {}), str(line.doc_id)
        if id_ in seen:
            old = "; before 0.4.8 a task with several filters wrote a line for each without its name: use a newer one"
            raise EvaluationError(
                f"The item {id_} is there twice, first at {seen[id_][0]}.",
                where=where,
                fix="keep one of the two" + (old if line.filter is None else ""),
            )
        seen[id_] = (where, line)
    several = len(by_filter) > 1
    items: dict[str, _Item] = {}
    for filter_, entries in by_filter.items():
        for id_, (where, line) in entries.items():
            named = line.metrics if line.metrics is not None else list(line.model_extra or {})
            scores = {
                f"{name}/{filter_}" if several else name: _score((line.model_extra or {}).get(name)) for name in named
            }
            fields = {"id": id_, "text": _text(line.doc), "target": _text(line.target)}
            item = items.setdefault(id_, _Item(where, fields, {}))
            item.scores.update(scores)
            if "prediction" not in item.fields or metric.endswith(f"/{filter_}"):
                item.fields["prediction"] = _lm_eval_prediction(line)
    return _collect(list(items.values()))


def _lm_eval_prediction(line: _LmEvalLine) -> str | None:
    """The filtered answer; of a choice the most likely one, by its number if the target is a number."""
    match line.filtered_resps:
        case [str(answer)] | [[str(answer)]]:
            return answer
        case [_] | []:
            return None
    try:
        likelihoods = [float(likelihood) for likelihood, _greedy in line.filtered_resps]
        if "acc_mutual_info" in (line.model_extra or {}):  # then the second half is about choices without the question
            likelihoods = likelihoods[: len(likelihoods) // 2]
        best = max(range(len(likelihoods)), key=likelihoods.__getitem__)
        if _text(line.target).isdigit():
            return str(best)
        request = list(line.arguments.values())[best] if isinstance(line.arguments, dict) else line.arguments[best]
        return str(request["arg_1"] if isinstance(request, dict) else request[1]).strip()
    except (TypeError, ValueError, LookupError):  # another kind of task; it has no one answer
        return None


# inspect_ai


def _read_inspect_zip(path: Path, file: BinaryIO, metric: str) -> HarnessLog:
    try:
        with zipfile.ZipFile(file) as archive:
            # Of several members of one name the last counts, as for inspect_ai.
            members = {member.filename: member for member in archive.infolist()}
            start = members.get(_HEADER) or members.get(_START)  # the header is written when the run ends
            if start is None:
                raise EvaluationError(
                    "The file is a zip, and no log of inspect_ai.", where=str(path), fix="give an .eval file"
                )
            header = _read_member(path, file, archive, start)
            samples = [
                (f"{path}: {name}", _read_member(path, file, archive, member))
                for name, member in members.items()
                if _SAMPLE_MEMBER.match(name)
            ]
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise EvaluationError(
            f"The file is a damaged zip: {error}.", where=str(path), fix="copy it again, or run the evaluation again"
        ) from error
    return _read_inspect(path, header, samples, metric)


def _read_member(path: Path, file: BinaryIO, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Any:
    try:
        data = _read_zstd(file, member) if member.compress_type == _ZSTD else archive.read(member)
        return json.loads(data)
    except (OSError, ValueError, RecursionError, EOFError, struct.error, zlib.error, NotImplementedError) as error:
        raise EvaluationError(
            f"A part of the log cannot be read: {error}.",
            where=f"{path}: {member.filename}",
            fix="copy the log again, or run the evaluation again",
        ) from error


def _read_zstd(file: BinaryIO, member: zipfile.ZipInfo) -> bytes:
    import pyarrow as pa

    file.seek(member.header_offset)
    name_length, extra_length = struct.unpack("<26xHH", file.read(30))
    file.seek(member.header_offset + 30 + name_length + extra_length)
    packed = file.read(member.compress_size)
    data: bytes = pa.input_stream(pa.BufferReader(packed), compression="zstd").read()
    if zlib.crc32(data) != member.CRC:
        raise ValueError("its checksum is wrong")
    return data


def _read_inspect(path: Path, content: Any, records: Sequence[tuple[str, Any]], metric: str) -> HarnessLog:
    header = _validate(_InspectHeader, content, str(path), "inspect_ai")
    if header.status != "success":
        because = f": {_one_line(header.error.message)}" if header.error is not None else ""
        raise EvaluationError(
            f"The evaluation did not finish, its status is {header.status}{because}.", where=str(path), fix=_RETRY
        )
    samples = [_validate(_Sample, record, where, "inspect_ai") for where, record in records]
    _check_samples(path, header, samples)
    several = any(sample.epoch > 1 for sample in samples)
    items = []
    for sample in samples:
        id_ = str(sample.id)
        scores: dict[str, float | str] = {}
        for scorer, score in (sample.scores or {}).items():
            scores.update(_inspect_scores(scorer, score))
        fields = {
            "id": f"{id_}#{sample.epoch}" if several else id_,
            "group": id_ if several else None,
            "text": _inspect_text(sample),
            "target": _inspect_target(sample.target),
            "prediction": _inspect_prediction(sample, metric),
            **_inspect_expenses(sample, header.eval.model),
        }
        items.append(_Item(_place(path, sample), fields, scores))
    return _collect(items)


def _check_samples(path: Path, header: _InspectHeader, samples: Sequence[_Sample]) -> None:
    if not samples:
        raise EvaluationError("The log holds no samples.", where=str(path), fix="evaluate without --no-log-samples")
    expected = header.results.total_samples if header.results is not None else 0
    if expected not in (0, len(samples)):  # versions that did not count wrote 0
        raise EvaluationError(
            f"The log speaks of {expected} samples, and {len(samples)} are there.", where=str(path), fix=_RETRY
        )
    found = {
        "ended in an error": ([sample for sample in samples if sample.error is not None], _RETRY),
        "were stopped by hand": (
            [sample for sample in samples if sample.limit is not None and sample.limit.type == "operator"],
            "evaluate again; items are never left out",
        ),
        "were declared invalid": ([sample for sample in samples if sample.invalidation is not None], _RETRY),
        "were not scored": ([sample for sample in samples if not sample.scores], "score them with `inspect score LOG`"),
    }
    for what, (bad, fix) in found.items():
        if bad:
            because = f": {_one_line(bad[0].error.message)}" if bad[0].error is not None else ""
            raise EvaluationError(
                f"{len(bad)} of {len(samples)} samples {what}{because}.", where=_place(path, bad[0]), fix=fix
            )


def _place(path: Path, sample: _Sample) -> str:
    return f"{path}, sample {sample.id}, epoch {sample.epoch}"


def _inspect_scores(scorer: str, score: _Score) -> dict[str, float | str]:
    if isinstance(score.value, dict):
        return {f"{scorer}/{key}": _score(part) for key, part in score.value.items()}
    if isinstance(score.value, float) and math.isnan(score.value):  # inspect_ai's mark
        return {scorer: f"it was not scored ({score.reason or 'no reason is given'})"}
    return {scorer: _score(score.value)}


def _inspect_target(target: str | list[str]) -> str:
    return target[0] if isinstance(target, list) and len(target) == 1 else _text(target)


def _inspect_text(sample: _Sample) -> str:
    """The input, and the choices if there are any; of messages role and content, since their ids are new each time."""
    if isinstance(sample.input, str):
        lines = [_attached(sample.input, sample)]
    else:
        turns = [(message.role, _content(message, sample)) for message in sample.input]
        alone = len(turns) == 1 and turns[0][0] == "user"
        lines = [turns[0][1]] if alone else [f"{role}: {content}" for role, content in turns]
    return "\n".join([*lines, *(sample.choices or [])])


def _content(message: _Message, sample: _Sample) -> str:
    if isinstance(message.content, str):
        return _attached(message.content, sample)
    parts = [
        {name: _attached(value, sample) for name, value in part.items() if name not in ("id", "internal")}
        for part in message.content
    ]
    return "\n".join(part["text"] if isinstance(part.get("text"), str) else _text(part) for part in parts)


def _attached(value: Any, sample: _Sample) -> Any:
    """Long texts and images lie beside the sample, and a link stands where they were."""
    is_link = isinstance(value, str) and value.startswith("attachment://")
    return sample.attachments.get(value.removeprefix("attachment://"), value) if is_link else value


def _inspect_prediction(sample: _Sample, metric: str) -> str | None:
    """The answer that the metric's scorer took from the output, else the first that any took, else the output."""
    scores = sample.scores or {}
    asked = [scores[name] for name in (metric, metric.rpartition("/")[0]) if name in scores]
    answers = [score.answer for score in (*asked, *scores.values()) if score.answer is not None]
    return answers[0] if answers else _attached(sample.output.completion, sample)


def _inspect_expenses(sample: _Sample, model: str) -> dict[str, Any]:
    """What the sample took; tokens and cost of the evaluated model alone where it is named (not a grader's)."""
    seconds = sample.working_time if sample.working_time is not None else sample.total_time
    usages = [sample.model_usage[model]] if model in sample.model_usage else list(sample.model_usage.values())
    costs = [usage.total_cost for usage in usages if usage.total_cost is not None]
    prompts = [
        usage.input_tokens + (usage.input_tokens_cache_read or 0) + (usage.input_tokens_cache_write or 0)
        for usage in usages
    ]
    return {
        "latency_ms": None if seconds is None else 1000.0 * seconds,
        "prompt_tokens": sum(prompts) if usages else None,
        "output_tokens": sum(usage.output_tokens for usage in usages) if usages else None,
        "cost": sum(costs) if usages and len(costs) == len(usages) else None,
    }


# both


def _score(value: Any) -> float | str:
    """A number in [0, 1], or why there is none."""
    number = value
    if isinstance(value, str):
        try:  # lm-evaluation-harness writes numbers of numpy as texts
            number = _WORDS[value if value in _WORDS else value.lower()] if value.isalpha() else float(value)
        except (KeyError, ValueError):
            return f"it is the text {value[:40]!r}"
    if isinstance(number, list | dict):
        return "it is no single number; its total is made of all items at once"
    if number is None:
        return "it is not there"
    if not 0.0 <= number <= 1.0:  # or not a number
        return f"it is {value}, which is not between 0 and 1"
    return float(number)


def _collect(items: Sequence[_Item]) -> HarnessLog:
    """Items with the scores that all of them have, and the expenses that all of them have."""
    left_out: dict[str, str] = {}
    for name in dict.fromkeys(name for item in items for name in item.scores):
        for item in items:
            score = item.scores.get(name, "it is not there")
            if isinstance(score, str):
                left_out[name] = f"{score} (item {item.fields['id']})"
                break
    for name in _EXPENSES:
        without = [item for item in items if item.fields.get(name) is None]
        if 0 < len(without) < len(items):
            left_out[name] = f"it is not there (item {without[0].fields['id']})"
    records = []
    for item in items:
        fields: Mapping[str, Any] = {name: value for name, value in item.fields.items() if name not in left_out}
        scores = {name: score for name, score in item.scores.items() if name not in left_out}
        records.append((item.where, {**fields, "scores": scores}))
    return HarnessLog(records, left_out)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


def _one_line(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= _LONGEST else f"{words[:_LONGEST]} …"
