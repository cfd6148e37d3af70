"""Check rows against the suites of `expectations`, part good from bad, and build the Data Docs.

Rows go through in batches: their facts are worked out in as many processes as there are cores, Great Expectations
judges a frame of facts at a time, and memory holds one frame, two numbers a row to find repeated ids by, and no text.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from tasks.contracts.errors import DataError
from tasks.contracts.progress import Progress, ProgressListener, ignore_progress
from tasks.contracts.rows import Row
from tasks.contracts.spec import DataSpec, PoisonPolicy, TaskSpec
from tasks.data.docs import INDEX, write_page
from tasks.data.facts import COLUMNS, RowChecks, masked_row, schema_check, unreadable_facts
from tasks.data.ingest import ROWS, UNREADABLE
from tasks.data.language import check_languages
from tasks.data.parallel import map_batches, processes_for, read_lines
from tasks.data.private import Found, describe
from tasks.data.similar import hash64
from tasks.data.suites import Reason, SuiteTotals, run_suite, write_pages
from tasks.data.tokens import TokenLimit

QUARANTINE = "quarantine.jsonl"
NOTES = "notes.jsonl"
_DOCS = "data_docs"
_FRAME_ROWS = 50_000
_INJECTION = "injection"


class Validated(NamedTuple):
    """Counts of a validation.

    Attributes:
        rows: rows that go on.
        quarantined: rows that do not.
        reasons: quarantined rows by the code of the reason, a row with two reasons twice.
        told: rows that go on, by the code of what was found in them.
        masked: rows in which something was masked.
    """

    rows: int
    quarantined: int
    reasons: dict[str, int]
    told: dict[str, int]
    masked: int


def validate(
    raw: Path,
    task: TaskSpec,
    data: DataSpec,
    folder: Path,
    keep: Callable[[], Path],
    listener: ProgressListener = ignore_progress,
    *,
    poisoning: PoisonPolicy = PoisonPolicy.REPORT,
    tokens: TokenLimit | None = None,
) -> Validated:
    """Part the rows of an ingested dataset into `rows.jsonl` and `quarantine.jsonl`.

    A line of the quarantine is `{"line", "id", "checks", "reasons", "record"}` with every reason. A line of
    `notes.jsonl` is `{"line", "id", "checks", "reasons"}` of a row that goes on although something was found in it.
    `suite.json`, `result.json` and the site `data_docs/` (see `tasks.data.docs`) lie beside them. When too many rows
    are bad the quarantine and the site are kept in the folder that `keep` gives, since `folder` does not outlive the
    error.

    Args:
        raw: the folder of an ingest.
        task: kind, labels and schema.
        data: limits, languages, and what is done about private data.
        folder: where to write.
        keep: makes a folder that stays.
        listener: told of the progress.
        poisoning: what is done about answers with injected instructions.
        tokens: the longest row in tokens; None where no base model is known yet.

    Raises:
        DataError: the share of bad rows is over `data.max_invalid_share`, no row is good, or an answer holds an
            injected instruction and `poisoning` is stop.
        SpecError: `task.json_schema` is no JSON Schema, or a language is not known.
    """
    from expectations import training_rows

    checks = RowChecks(task, data, poisoning, tokens)
    schema_check(task)
    check_languages(data.languages)
    suite = training_rows.build_suite(
        task, data, poisoning=poisoning, max_tokens=tokens.max_tokens if tokens is not None else None
    )
    totals = SuiteTotals(suite)
    with tempfile.TemporaryDirectory(prefix="facts-", dir=folder) as spool:
        facts = _FactFile(Path(spool) / "facts.arrow")
        ids = facts.write(_all_facts(raw, checks, listener))
        repeated = _name_rows_that_differ(ids)
        with _Parting(raw, folder, task, checks) as parting:
            for first, frame in facts.frames():
                frame = frame.assign(repeated_id=frame["id"].where(repeated[first : first + len(frame)], None))
                found = run_suite(suite, frame)
                totals.add(found.outcomes)
                parting.part(first, len(frame), found.by_row)
                listener(Progress(first + len(frame), len(ids), "rows", "expectations"))
        counts = parting.counts()
    result = totals.record()
    _write_json(folder / "suite.json", suite.to_json_dict())
    _write_json(folder / "result.json", result)
    (folder / _DOCS).mkdir()
    write_pages(result, suite, folder / _DOCS)
    write_page(
        folder / _DOCS,
        result,
        folder / QUARANTINE,
        rows=counts.rows,
        quarantined=counts.quarantined,
        limit=data.max_invalid_share,
    )
    _check_limits(counts, data, poisoning, folder, keep)
    return counts


def _check_limits(
    counts: Validated, data: DataSpec, poisoning: PoisonPolicy, folder: Path, keep: Callable[[], Path]
) -> None:
    total = counts.rows + counts.quarantined
    share = counts.quarantined / total
    injected = counts.reasons.get(_INJECTION, 0) if poisoning is PoisonPolicy.STOP else 0
    if share <= data.max_invalid_share and counts.rows and not injected:
        return
    kept = keep()
    shutil.copy(folder / QUARANTINE, kept / QUARANTINE)
    shutil.rmtree(kept / _DOCS, ignore_errors=True)
    shutil.copytree(folder / _DOCS, kept / _DOCS)
    where = f"{data.source}; each bad row with its reasons: {kept / QUARANTINE}; Data Docs: {kept / _DOCS / INDEX}"
    if injected:
        raise DataError(
            f"{injected:,} answers hold an instruction to a model, and `curate.poisoning` is stop.",
            where=where,
            fix="find out where these rows come from; `curate.poisoning: quarantine` leaves them out instead",
        )
    raise DataError(
        f"{counts.quarantined:,} of {total:,} rows are invalid ({share:.1%}), the limit is "
        f"{data.max_invalid_share:.1%}: {say_counts(counts.reasons)}.",
        where=where,
        fix="correct these rows in the source, or raise `data.max_invalid_share` if they may be left out",
    )


def say_counts(counts: Mapping[str, int]) -> str:
    """Counts in words, the largest first."""
    return "; ".join(f"{number:,} × {name}" for name, number in sorted(counts.items(), key=lambda item: -item[1]))


# -- facts --------------------------------------------------------------------------------------------------------


def _all_facts(raw: Path, checks: RowChecks, listener: ProgressListener) -> Iterator[Mapping[str, Sequence[Any]]]:
    """Facts of the usable rows, then of the unreadable ones, numbered through, a batch at a time."""
    rows, size = 0, (raw / ROWS).stat().st_size
    done = 0
    for columns in map_batches(checks, _told(read_lines(raw / ROWS), size, listener), processes_for(size)):
        rows += len(columns["row"])
        yield columns
    with (raw / UNREADABLE).open(encoding="utf-8") as lines:
        while batch := [json.loads(line) for line in islice(lines, 2_000)]:
            facts = [unreadable_facts(rows + done + number, entry) for number, entry in enumerate(batch)]
            done += len(batch)
            yield {name: [fact[name] for fact in facts] for name in COLUMNS}


def _told(batches: Iterable[Any], size: int, listener: ProgressListener) -> Iterator[Any]:
    for batch in batches:
        yield batch
        listener(Progress(batch.offset / 2**20, size / 2**20, "MB", "facts of each row"))


class _FactFile:
    """Facts on disk, from when they are worked out to when Great Expectations judges them."""

    _TYPES = {"int64": pa.int64(), "string": pa.string()}

    def __init__(self, path: Path) -> None:
        self._path = path
        self._schema = pa.schema([(name, self._TYPES[kind]) for name, kind in COLUMNS.items()])

    def write(self, batches: Iterable[Mapping[str, Sequence[Any]]]) -> NDArray[np.uint64]:
        """Write all; return hashes of each row's id and content, shape [n, 2]."""
        hashes = [np.empty((0, 2), dtype=np.uint64)]
        with pa.OSFile(str(self._path), "wb") as sink, pa.ipc.new_stream(sink, self._schema) as out:
            for columns in batches:
                out.write_batch(pa.RecordBatch.from_pydict(dict(columns), schema=self._schema))
                pairs = [
                    (hash64(row_id or ""), int(content, 16))
                    for row_id, content in zip(columns["id"], columns["content"], strict=True)
                ]
                hashes.append(np.array(pairs, dtype=np.uint64).reshape(-1, 2))
        return np.concatenate(hashes)

    def frames(self) -> Iterator[tuple[int, pd.DataFrame]]:
        """The facts in frames of `_FRAME_ROWS` rows or less, each with the index of its first row."""
        waiting: list[pa.RecordBatch] = []
        first = rows = 0
        with pa.OSFile(str(self._path), "rb") as source, pa.ipc.open_stream(source) as batches:
            for batch in batches:
                if rows and rows + batch.num_rows > _FRAME_ROWS:
                    yield first, _frame(waiting)
                    first, rows, waiting = first + rows, 0, []
                waiting.append(batch)
                rows += batch.num_rows
        if rows:
            yield first, _frame(waiting)


def _frame(batches: Sequence[pa.RecordBatch]) -> pd.DataFrame:
    # Objects with None, as Great Expectations' pandas engine expects them.
    frame = pa.Table.from_batches(batches).to_pandas()
    return frame.astype({name: object for name, kind in COLUMNS.items() if kind == "string"})


def _name_rows_that_differ(ids: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """For each row whether its id also names a row with another content; hashes of ids and contents, shape [n, 2]."""
    order = np.lexsort((ids[:, 1], ids[:, 0]))
    same_id = ids[order[1:], 0] == ids[order[:-1], 0]
    same_content = ids[order[1:], 1] == ids[order[:-1], 1]
    return np.isin(ids[:, 0], ids[order[1:][same_id & ~same_content], 0])


def with_repeated_ids(frame: pd.DataFrame) -> pd.DataFrame:
    """Add `repeated_id` to a frame of all facts: the id, if it names several rows that differ, else null."""
    several = frame.groupby("id")["content"].transform("nunique") > 1
    return frame.assign(repeated_id=frame["id"].where(several, None))


# -- parting ------------------------------------------------------------------------------------------------------


class _Parting:
    """Reads the rows once more, in order, and writes each where it belongs."""

    def __init__(self, raw: Path, folder: Path, task: TaskSpec, checks: RowChecks) -> None:
        self._task = task
        self._masked = checks.masked
        self._usable = (raw / ROWS).open("rb")
        self._unreadable = (raw / UNREADABLE).open(encoding="utf-8")
        self._good = (folder / ROWS).open("wb")
        # Half a surrogate pair has no UTF-8; written as the escape `\udXXX` it is valid JSON again.
        self._bad = (folder / QUARANTINE).open("w", encoding="utf-8", errors="backslashreplace", newline="\n")
        self._notes = (folder / NOTES).open("w", encoding="utf-8", errors="backslashreplace", newline="\n")
        self._reasons: Counter[str] = Counter()
        self._told: Counter[str] = Counter()
        self._rows = self._quarantined = self._masked_rows = 0

    def __enter__(self) -> _Parting:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self._usable, self._unreadable, self._good, self._bad, self._notes):
            file.close()

    def counts(self) -> Validated:
        """How many rows went where, and why."""
        return Validated(
            self._rows,
            self._quarantined,
            dict(self._reasons.most_common()),
            dict(self._told.most_common()),
            self._masked_rows,
        )

    def part(self, first: int, count: int, by_row: Mapping[int, list[Reason]]) -> None:
        """Part the next `count` rows."""
        for index in range(first, first + count):
            reasons = by_row.get(index, [])
            line = self._usable.readline()
            if not line:
                self._refuse_unreadable(json.loads(self._unreadable.readline()), reasons)
                continue
            against = [reason for reason in reasons if not reason.only_told]
            if against:
                self._refuse(json.loads(line), against)
                continue
            if reasons and self._masked is not None:
                row = Row.from_json(line)
                masked, left = masked_row(row, self._task, self._masked)
                if left:
                    self._refuse(json.loads(line), [_unmaskable(left)])
                    continue
                self._masked_rows += masked != row
                line = (masked.to_json() + "\n").encode()
            if reasons:
                self._tell(Row.from_json(line), reasons)
            self._good.write(line)
            self._rows += 1

    def _tell(self, row: Row, reasons: Sequence[Reason]) -> None:
        self._told.update({reason.code for reason in reasons})
        note = {
            "line": row.line,
            "id": row.id,
            "checks": [reason.code for reason in reasons],
            "reasons": [reason.text for reason in reasons],
        }
        self._notes.write(json.dumps(note, ensure_ascii=False) + "\n")

    def _refuse(self, record: dict[str, Any], reasons: Sequence[Reason]) -> None:
        self._reasons.update(reason.code for reason in reasons)
        self._quarantine(record["line"], record["id"], reasons, record)

    def _refuse_unreadable(self, entry: dict[str, Any], reasons: Sequence[Reason]) -> None:
        also = [reason for reason in reasons if reason.code != "unreadable"]
        why = [Reason(_code_of(text), text) for text in entry["reasons"]]
        self._reasons.update({reason.code for reason in why} | {reason.code for reason in also})
        self._quarantine(entry["line"], entry["id"], [*why, *also], entry["record"])

    def _quarantine(self, line: int, row_id: str | None, reasons: Sequence[Reason], record: Any) -> None:
        entry = {
            "line": line,
            "id": row_id,
            "checks": [reason.code for reason in reasons],
            "reasons": [reason.text for reason in reasons],
            "record": record,
        }
        self._bad.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self._quarantined += 1


def _code_of(reason: str) -> str:
    """What unusable rows are counted by: what comes before the details (`label is not valid JSON: …`, `text: …`)."""
    head = reason.split(":")[0]
    return head if " " in head else f"{head} is malformed"


def _unmaskable(left: Sequence[Found]) -> Reason:
    code = "secret" if left[0].group == "secret" else "personal_data"
    return Reason(code, f"cannot be masked in a number or a key of the answer: {describe(left)}")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2, default=str) + "\n", encoding="utf-8")
