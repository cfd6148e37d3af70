"""Have a teacher rewrite the answers of training rows, and write the splits that training takes in their place.

    train.jsonl ─► asked ─► filters ─► the best of the samples ─► train.jsonl, and originals.jsonl beside it
    dev.jsonl ────────────────────────────────────────────────► dev.jsonl, byte for byte

Neither dev nor the golden set is shown to the teacher. The finished splits are looked through for golden items again.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from tasks.contracts.distill import DistillSpec
from tasks.contracts.errors import DataError
from tasks.contracts.progress import Progress, ProgressListener, ignore_progress
from tasks.contracts.prompt import tuned_prompt
from tasks.contracts.references import CONTAMINATION_FILE, ContaminationReport, GoldenSetRef
from tasks.contracts.rows import Row, read_rows
from tasks.contracts.spec import TaskKind
from tasks.contracts.synthesis import MANNERS
from tasks.data.contamination import MEASURES, find_overlaps, index_golden
from tasks.data.curate import DEV, REPORT, TRAIN
from tasks.data.distill.filters import Judge, choose
from tasks.data.distill.prompts import ask_for_rewrite
from tasks.data.distill.report import build_report
from tasks.data.distill.source import write_source
from tasks.data.draw import stratum
from tasks.data.golden import ITEMS
from tasks.data.guards import check_guards
from tasks.data.similar import NGRAM_WORDS, Banding
from tasks.data.synthesis.asker import Answer, Asker, Failed, Traffic, Unasked
from tasks.data.synthesis.filters import Refusal
from tasks.data.synthesis.journal import Journal
from tasks.data.synthesis.prompts import answer_schema
from tasks.data.synthesis.purse import Purse
from tasks.data.synthesis.teacher import Ask, Clock, Teacher
from tasks.data.table import build_table
from tasks.data.tokens import TokenCounter, TokenLimit
from tasks.store import canonical, digest_bytes

ORIGINALS = "originals.jsonl"
SOURCE = "source.jsonl"
REWRITTEN, UNCHANGED = "rewritten", "unchanged"
NOT_ASKED = ("withheld", "budget")  # why a row is not shown to the teacher; it keeps its answer
_WAVE = 256  # rows that are asked before the next are read; no result depends on it


class Rewriting(NamedTuple):
    """What became of the answer of a row.

    Attributes:
        id: of the row.
        original: its answer before.
        rewritten: the one that is taken; None where there is none.
        reason: `REWRITTEN`, `UNCHANGED`, one of `NOT_ASKED`, "no_answer", or the filter that refused it.
        detail: what is wrong with the rewriting, in words.
        written: what the teacher wrote, where it was refused.
        agreeing: how many of the samples say the same as the one that is taken.
    """

    id: str
    original: str
    rewritten: str | None
    reason: str
    detail: str = ""
    written: str | None = None
    agreeing: int = 0

    @property
    def refused(self) -> bool:
        """Whether the teacher was asked and brought nothing that may be used."""
        return self.reason not in (REWRITTEN, UNCHANGED, *NOT_ASKED)

    def used(self, *, keep_original: bool) -> str | None:
        """The answer that the row has from now on; None for a row that is left out."""
        if self.reason == REWRITTEN:
            return self.rewritten
        return None if self.refused and not keep_original else self.original


class Distilled(NamedTuple):
    """Rows of the new splits, distinct training rows by what became of them, and what this process asked."""

    train: int
    dev: int
    rewritten: int
    left_out: int
    stopped: str | None
    traffic: Traffic


def rewrite_answers(
    spec: DistillSpec,
    splits: Path,
    valid_rows: Path,
    golden: GoldenSetRef,
    model_folder: Path,
    folder: Path,
    scratch: Path,
    key: str | None = None,
    withheld: Container[str] = frozenset(),
    listener: ProgressListener = ignore_progress,
    clock: Clock | None = None,
) -> Distilled:
    """Write `train.jsonl`, `dev.jsonl`, `originals.jsonl`, `source.jsonl`, `contamination.json` and `report.json`.

    The same specification, splits and answers give the same bytes, however often it was interrupted.

    Args:
        spec: what is wanted.
        splits: folder of the splits as curating made them.
        valid_rows: the rows before curating, which still have the weights of the data.
        golden: the golden set; it is looked for in the new splits, and shown to nobody.
        model_folder: the base model, whose tokenizer says how long a row is.
        folder: where to write.
        scratch: where the journal of paid answers lies, which outlives this process.
        key: the server's; kept nowhere.
        withheld: ids of rows that no teacher is shown; they keep their answers.
        listener: hears how many rows are through.
        clock: how waiting is done.

    Raises:
        ServiceError: the teacher fails; what was paid is kept in the journal.
        DataError: rows were left out, and what remains is too little to train on.
        SpecError: the task's JSON Schema or the teacher's address cannot be used.
        StoreError: the journal cannot be written, or another run writes it.
    """
    counter = _Tokens(TokenLimit(model_folder, tuned_prompt(spec.training.task), spec.training.train.max_tokens))
    judge = Judge(
        spec.training.task, relabel=spec.relabel, max_growth=spec.max_growth, too_many_tokens=counter.too_many
    )
    with Journal(scratch, _run_of(spec)) as journal:
        purse = Purse(spec.budget, spec.price)

        async def work() -> tuple[list[Rewriting], Asker]:
            async with Teacher(spec.teacher, key) as teacher:
                asker = Asker(teacher, journal, purse, spec.teacher, clock)
                return await _rewrite(spec, splits / TRAIN, judge, asker, withheld, listener), asker

        found, asker = asyncio.run(work())
    by_id = {one.id: one for one in found}
    train = _write_train(folder / TRAIN, splits / TRAIN, by_id, spec)
    shutil.copyfile(splits / DEV, folder / DEV)
    left_out = sum(one.used(keep_original=spec.keep_original_when_refused) is None for one in found)
    findings = _check_left(splits, by_id, left_out, spec) if left_out or spec.relabel else {}
    _write_originals(folder / ORIGINALS, found, spec)
    write_source(folder / SOURCE, valid_rows, _answers_of(by_id, splits / DEV, spec), _rewritten(by_id), spec)
    contamination = look_for_golden([folder / TRAIN, folder / DEV], golden, spec, folder)
    (folder / CONTAMINATION_FILE).write_text(contamination.model_dump_json(indent=2) + "\n", encoding="utf-8")
    report = build_report(spec, found, asker.stopped, purse.account()) | {"accepted_risks": findings}
    (folder / REPORT).write_text(json.dumps(report, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return Distilled(
        train,
        contamination.rows - train,
        sum(one.reason == REWRITTEN for one in found),
        left_out,
        asker.stopped,
        asker.traffic,
    )


def look_for_golden(
    files: Sequence[Path], golden: GoldenSetRef, spec: DistillSpec, folder: Path
) -> ContaminationReport:
    """Look for golden items in the rows that training will see, as they were written.

    Args:
        files: rows of train and dev.
        golden: what is looked for.
        spec: says from which similarity on a row counts as a near-duplicate.
        folder: for temporary files.
    """
    threshold = spec.training.curate.near_duplicate
    index = index_golden(list(read_rows(Path(golden.path) / ITEMS)), Banding.for_threshold(threshold))
    rows = 0
    found: Counter[str] = Counter()
    for path in files:
        table = build_table(path, spec.training.task, index.banding, index.runs, folder)
        rows += len(table)
        found.update(one.reason for one in find_overlaps(table, index))
    return ContaminationReport(
        golden_digest=golden.digest,
        golden_items=golden.items,
        rows=rows,
        near_duplicate=threshold,
        ngram_words=NGRAM_WORDS,
        measures=MEASURES,
        found=dict(found),
    )


def _run_of(spec: DistillSpec) -> str:
    """What has to be the same for one run to go on from another, and to be charged for its losses."""
    asked = spec.model_dump(mode="json", include={"instruction", "samples", "relabel"})
    said = asked | {
        "task": spec.training.task.model_dump(mode="json"),
        "teacher": spec.teacher.model_dump(mode="json", exclude=MANNERS),
    }
    return digest_bytes(canonical(said).encode())


class _Tokens:
    """Counts tokens with a tokenizer that is loaded when the first rewriting has to be counted."""

    def __init__(self, limit: TokenLimit) -> None:
        self._limit = limit
        self._counter: TokenCounter | None = None

    def too_many(self, row: Row, target: str) -> int | None:
        """How many tokens the row has with this answer, if they are more than the limit."""
        if self._counter is None:
            self._counter = TokenCounter(self._limit)
        return self._counter.too_many(replace(row, target=target))


# -- asking -------------------------------------------------------------------------------------------------------


async def _rewrite(
    spec: DistillSpec,
    train: Path,
    judge: Judge,
    asker: Asker,
    withheld: Container[str],
    listener: ProgressListener,
) -> list[Rewriting]:
    total = sum(1 for _ in _distinct(train))
    schema = answer_schema(spec.training.task)
    rows = _distinct(train)
    found: list[Rewriting] = []
    listener(Progress(0, total, "rows"))
    while wave := list(islice(rows, _WAVE)):
        shown = [row for row in wave if row.id not in withheld]
        asks = [
            Ask(
                ask_for_rewrite(spec.training.task, row, spec.instruction, relabel=spec.relabel),
                schema,
                spec.teacher.temperature,
                draw,
            )
            for row in shown
            for draw in range(spec.samples)
        ]
        answers = iter(await asker.answers(asks))
        for row in wave:
            if row.id in withheld:
                found.append(Rewriting(row.id, row.target, None, "withheld", "something private was found in it"))
            else:
                found.append(_settle(row, list(islice(answers, spec.samples)), judge, spec))
        changed = sum(one.reason == REWRITTEN for one in found)
        listener(Progress(len(found), total, "rows", f"{changed:,} rewritten"))
    return found


def _settle(row: Row, answers: Sequence[Answer], judge: Judge, spec: DistillSpec) -> Rewriting:
    """What becomes of a row after all that the teacher said to it."""
    passed: list[str] = []
    first: Rewriting | None = None
    for answer in answers:
        if isinstance(answer, Unasked):
            continue
        if isinstance(answer, Failed):
            first = first or Rewriting(row.id, row.target, None, "no_answer", answer.reason)
            continue
        verdict = judge.judge(row, answer.content, answer.finish)
        if isinstance(verdict, Refusal):
            first = first or Rewriting(row.id, row.target, None, verdict.reason, verdict.detail, answer.content)
        else:
            passed.append(verdict)
    if passed:
        choice = choose(passed, spec.training.task)
        reason = UNCHANGED if choice.target == row.target else REWRITTEN
        return Rewriting(row.id, row.target, choice.target, reason, agreeing=choice.agreeing)
    if first is not None:
        return first
    why = next((answer.reason for answer in answers if isinstance(answer, Unasked)), "")
    return Rewriting(row.id, row.target, None, "budget", f"not asked, since {why}")


def _distinct(train: Path) -> Iterator[Row]:
    """The training rows, each once: a row that balancing repeats has repetitions behind it, numbered from 2."""
    return (row for row, repeats in _with_repeats(train) if repeats is None)


def _with_repeats(train: Path) -> Iterator[tuple[Row, str | None]]:
    """Each line's row, and the id of the row that it repeats."""
    first: Row | None = None
    number = 1
    for row in read_rows(train):
        if (
            first is not None
            and row.id == f"{first.id}#{number + 1}"
            and (row.messages, row.target) == (first.messages, first.target)
        ):
            number += 1
            yield row, first.id
        else:
            first, number = row, 1
            yield row, None


# -- files --------------------------------------------------------------------------------------------------------


def _write_train(path: Path, train: Path, by_id: dict[str, Rewriting], spec: DistillSpec) -> int:
    """The training rows in their order with the answers that they have from now on; how many lines that are."""
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as out:
        for row, repeats in _with_repeats(train):
            target = by_id[repeats or row.id].used(keep_original=spec.keep_original_when_refused)
            if target is not None:
                out.write(replace(row, target=target).to_json() + "\n")
                count += 1
    return count


def _write_originals(path: Path, found: Sequence[Rewriting], spec: DistillSpec) -> None:
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as out:
        for one in found:
            used = one.used(keep_original=spec.keep_original_when_refused)
            record: dict[str, Any] = {
                "id": one.id,
                "original": one.original,
                "rewritten": one.rewritten,
                "used": "none" if used is None else "rewritten" if one.reason == REWRITTEN else "original",
                "reason": one.reason,
            }
            if one.detail:
                record["detail"] = one.detail
            if one.written is not None:
                record["written"] = one.written
            if one.agreeing and spec.samples > 1:
                record["agreeing"] = one.agreeing
            out.write(json.dumps(record, ensure_ascii=False) + "\n")


def _answers_of(by_id: dict[str, Rewriting], dev: Path, spec: DistillSpec) -> Callable[[Row], str | None]:
    """The answer that a valid row has in the new splits; None for one that is in none of them."""
    in_dev = {row.id for row in read_rows(dev)}

    def answer(row: Row) -> str | None:
        if row.id in in_dev:
            return row.target
        one = by_id.get(row.id)
        return None if one is None else one.used(keep_original=spec.keep_original_when_refused)

    return answer


def _rewritten(by_id: dict[str, Rewriting]) -> frozenset[str]:
    return frozenset(one.id for one in by_id.values() if one.reason == REWRITTEN)


# -- guards -------------------------------------------------------------------------------------------------------


def _check_left(splits: Path, by_id: dict[str, Rewriting], left_out: int, spec: DistillSpec) -> dict[str, Any]:
    """The guards of curating once more, on the rows that are left and the labels that they have now.

    The distance of the label mix from the golden set's is judged by the data's own labels, in curating.
    """
    training = spec.training
    counts: Counter[str] = Counter()
    for row in _distinct(splits / TRAIN):
        target = by_id[row.id].used(keep_original=spec.keep_original_when_refused)
        if target is not None:
            label = target if training.task.kind is TaskKind.CLASSIFY else stratum(row, training.task)
            counts[label] += 1
    dev = Counter(stratum(row, training.task) for row in read_rows(splits / DEV))
    if not counts:
        raise DataError(
            f"The teacher's answers to all {left_out:,} training rows were refused, so none is left.",
            where="keep_original_when_refused",
            fix="turn keep_original_when_refused on, or ask another teacher",
        )
    findings = check_guards(counts, dev, 0.0, training.task, training.train.learning_rate, training.curate)
    return {
        finding.guard.value: {"found": finding.found, "reason": training.curate.accept_risks[finding.guard]}
        for finding in findings
    }
