"""From valid rows to a train and a dev split: nothing twice, nothing from the golden set, and enough to learn from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.contracts.errors import DataError
from tasks.contracts.progress import Progress, ProgressListener, ignore_progress
from tasks.contracts.references import CONTAMINATION_FILE, ContaminationReport, GoldenSetRef
from tasks.contracts.rows import Row, read_rows, write_rows
from tasks.contracts.spec import CurateSpec, Guard, TaskKind, TaskSpec
from tasks.data.draw import Unit, content_hash, draw, make_units, quotas, stratum
from tasks.data.duplicates import Removed, find_duplicates
from tasks.data.golden import ITEMS, MIN_CLASS_ITEMS
from tasks.data.ingest import ROWS
from tasks.data.similar import NGRAM_WORDS, Clusters, NearDuplicates, Profile, long_runs, normalise, profile_texts

TRAIN = "train.jsonl"
DEV = "dev.jsonl"
REMOVED = "removed.jsonl"
REPORT = "report.json"
_REPORT_EVERY = 500
# Why rows leave, in the order in which they do.
_REASONS = (
    "golden_item",
    "golden_same_id",
    "golden_same_text",
    "golden_same_group",
    "golden_near_duplicate",
    "golden_ngram",
    "conflicting_labels",
    "exact_duplicate",
    "near_duplicate",
    "over_max_train_rows",
)

# Guards, from practice: with less, a fine-tuned model mostly learns its few examples by heart.
MIN_TRAIN_ROWS = 500
MIN_CLASS_ROWS = 10
HIGH_LEARNING_RATE = 2e-4  # what QLoRA's authors used for models of up to 13 B parameters (arXiv:2305.14314, table 9)
ROWS_FOR_HIGH_LEARNING_RATE = 1_000


class Curated(NamedTuple):
    """Rows in each split, and how many were removed for which reason."""

    train: int
    dev: int
    removed: dict[str, int]


class Finding(NamedTuple):
    """What a guard found."""

    guard: Guard
    found: str
    fix: str


def curate(
    valid: Path,
    golden: GoldenSetRef,
    task: TaskSpec,
    spec: CurateSpec,
    learning_rate: float,
    folder: Path,
    listener: ProgressListener = ignore_progress,
) -> Curated:
    """Write `train.jsonl`, `dev.jsonl`, `removed.jsonl` (`{"id", "line", "reason", "detail"}`), `report.json` and
    `contamination.json`.

    Rows leave in this order: rows that overlap the golden set (`golden_…`), contradictions, exact and near-duplicates
    (see `find_duplicates`), and rows over `spec.max_train_rows`. Dev has `spec.dev_share` of the rows that are kept, by
    label; groups stay whole and near-duplicates on one side. Splits go by the hash of the content, so the same content
    gives the same splits whatever the order of the rows.

    Raises:
        DataError: nothing is left, a label has no training row, or a guard objects and no reason is given to go on.
    """
    rows = sorted(read_rows(valid / ROWS), key=lambda row: (content_hash(row), row.id, row.line))
    profiles = []
    for profile in profile_texts(row.text for row in rows):
        profiles.append(profile)
        if len(profiles) % _REPORT_EVERY == 0:
            listener(Progress(len(profiles), len(rows), "rows", "shingles"))
    golden_index = _index_golden(list(read_rows(Path(golden.path) / ITEMS)), spec.near_duplicate)
    free, removed = _without_golden(rows, profiles, golden_index)
    duplicates = find_duplicates(
        [rows[index] for index in free], [profiles[index] for index in free], task, spec.near_duplicate
    )
    removed += [Removed(free[one.position], one.reason, one.detail) for one in duplicates.removed]
    kept = [free[index] for index in duplicates.kept]
    counts = Counter(one.reason for one in removed)
    _check_left(len(rows), len(kept), counts)

    hashes = [content_hash(row) for row in rows]
    strata = [stratum(row, task) for row in rows]
    together = Clusters(len(rows))
    for left, right in duplicates.links:
        together.join(free[left], free[right])
    first_of_group: dict[str, int] = {}
    for index in kept:
        group = rows[index].group
        if group is not None:
            together.join(index, first_of_group.setdefault(group, index))
    by_root: dict[int, list[int]] = {}
    for index in kept:
        by_root.setdefault(together.root(index), []).append(index)
    split = _split(make_units(list(by_root.values()), hashes, strata), spec, len(kept))
    limit = f"curate.max_train_rows is {spec.max_train_rows}"
    removed += [Removed(index, "over_max_train_rows", limit) for index in split.left]
    train, dev = [rows[index] for index in split.train], [rows[index] for index in split.dev]
    counts = Counter(one.reason for one in removed)
    by_reason = {reason: counts[reason] for reason in _REASONS if counts[reason]}
    if len(rows) != len(train) + len(dev) + sum(by_reason.values()) or len({one.position for one in removed}) != len(
        removed
    ):
        raise AssertionError("the funnel does not add up")  # a defect of this module, not of the data

    findings = _check_guards(train, dev, task, learning_rate, spec)
    write_rows(folder / TRAIN, train)
    write_rows(folder / DEV, dev)
    with (folder / REMOVED).open("w", encoding="utf-8", newline="\n") as out:
        for one in sorted(removed):
            row = rows[one.position]
            entry = {"id": row.id, "line": row.line, "reason": one.reason, "detail": one.detail}
            out.write(json.dumps(entry, ensure_ascii=False) + "\n")
    report = {
        "funnel": _funnel(len(rows), counts),
        "removed": by_reason,
        "train": _describe(train, task),
        "dev": _describe(dev, task),
        "golden": {"digest": golden.digest, "items": golden.items},
        "near_duplicate": spec.near_duplicate,
        "accepted_risks": {
            finding.guard.value: {"found": finding.found, "reason": spec.accept_risks[finding.guard]}
            for finding in findings
        },
    }
    (folder / REPORT).write_text(json.dumps(report, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    contamination = _look_for_golden([*train, *dev], golden_index, golden, spec)
    (folder / CONTAMINATION_FILE).write_text(contamination.model_dump_json(indent=2) + "\n", encoding="utf-8")
    listener(Progress(len(rows), len(rows), "rows"))
    return Curated(len(train), len(dev), by_reason)


# -- the golden set -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _GoldenIndex:
    """The golden items in every way in which a row could be one of them."""

    items: list[Row]
    ids: dict[str, Row]
    texts: dict[str, Row]
    groups: dict[str, Row]
    near: NearDuplicates
    ngrams: NDArray[np.uint64]
    ngram_owners: NDArray[np.int64]


def _index_golden(items: list[Row], threshold: float) -> _GoldenIndex:
    profiles = list(profile_texts(item.text for item in items))
    runs = [long_runs(profile.words) for profile in profiles]
    flat = np.concatenate([np.empty(0, dtype=np.uint64), *runs])
    owners = np.repeat(np.arange(len(items)), [len(run) for run in runs])
    order = np.argsort(flat, kind="stable")
    return _GoldenIndex(
        items=items,
        ids={item.id: item for item in items},
        texts={normalise(item.text): item for item in items},
        groups={item.group: item for item in items if item.group is not None},
        near=NearDuplicates(profiles, threshold),
        ngrams=flat[order],
        ngram_owners=owners[order],
    )


def _without_golden(
    rows: Sequence[Row], profiles: Sequence[Profile], index: _GoldenIndex
) -> tuple[list[int], list[Removed]]:
    """Indices of the rows that share nothing with the golden set, and the others with what they share."""
    free: list[int] = []
    removed: list[Removed] = []
    for number, (row, profile) in enumerate(zip(rows, profiles, strict=True)):
        overlap = _overlap(row, profile, index)
        if overlap is None:
            free.append(number)
        else:
            removed.append(Removed(number, *overlap))
    return free, removed


def _look_for_golden(
    rows: Sequence[Row], index: _GoldenIndex, golden: GoldenSetRef, spec: CurateSpec
) -> ContaminationReport:
    """Look through the rows that training will see, as if nothing had been removed before."""
    profiles = profile_texts(row.text for row in rows)
    overlaps = [_overlap(row, profile, index) for row, profile in zip(rows, profiles, strict=True)]
    return ContaminationReport(
        golden_digest=golden.digest,
        golden_items=golden.items,
        rows=len(rows),
        near_duplicate=spec.near_duplicate,
        ngram_words=NGRAM_WORDS,
        measures=tuple(reason for reason in _REASONS if reason.startswith("golden_")),
        found=dict(Counter(overlap[0] for overlap in overlaps if overlap is not None)),
    )


def _overlap(row: Row, profile: Profile, golden: _GoldenIndex) -> tuple[str, str] | None:
    """How a row overlaps the golden set, the strongest way first: (reason, detail); None if it does not.

    Same item, same id, same normalised text, same group, near-duplicate, or a run of `NGRAM_WORDS` words in common.
    Texts shorter than that run, such as prices, can share no run, and ones under `similar.MIN_WORDS` words are no
    near-duplicates: for them the same normalised text is what counts.
    """
    item = golden.ids.get(row.id)
    same = golden.texts.get(normalise(row.text))
    if item is not None and same is item:
        return "golden_item", f"is golden item {item.id}"
    if item is not None:
        return "golden_same_id", f"has the id of golden item {item.id}, with another text"
    if same is not None:
        return "golden_same_text", f"same text as golden item {same.id}"
    if row.group is not None and row.group in golden.groups:
        return "golden_same_group", f"in group {row.group!r} with golden item {golden.groups[row.group].id}"
    near = golden.near.most_similar(profile)
    if near is not None:
        similar = golden.items[near.position]
        return "golden_near_duplicate", f"Jaccard similarity {near.jaccard:.2f} with golden item {similar.id}"
    runs = long_runs(profile.words)
    if len(runs) and len(golden.ngrams):
        at = np.minimum(np.searchsorted(golden.ngrams, runs), len(golden.ngrams) - 1)
        hits = np.flatnonzero(golden.ngrams[at] == runs)
        if len(hits):
            owner = golden.items[int(golden.ngram_owners[at[hits[0]]])]
            return "golden_ngram", f"{len(hits)} runs of {NGRAM_WORDS} words in common, one with golden item {owner.id}"
    return None


# -- splits -------------------------------------------------------------------------------------------------------


class _Split(NamedTuple):
    """Indices of rows."""

    train: list[int]
    dev: list[int]
    left: list[int]


def _split(units: Sequence[Unit], spec: CurateSpec, kept: int) -> _Split:
    """Dev first, then train up to its limit, each by stratum; what is over the limit is left."""
    counts: Counter[str] = Counter()
    for unit in units:
        counts.update(unit.strata)
    limit = spec.max_train_rows
    used = kept if limit is None else min(kept, round(limit / (1 - spec.dev_share)))
    dev, rest = draw(units, quotas(counts, max(1, round(used * spec.dev_share)), minimum=1))
    if not dev:
        raise DataError(
            f"No dev split can be made: the rows are in {len(units):,} groups that stay whole, each too large.",
            where="data.group_field, curate.dev_share",
            fix="group by a finer column, raise `curate.dev_share`, or add rows",
        )
    left: list[Unit] = []
    if limit is not None:
        counts = Counter()
        for unit in rest:
            counts.update(unit.strata)
        rest, left = draw(rest, quotas(counts, limit, MIN_CLASS_ITEMS))

    def indices(chosen: Sequence[Unit]) -> list[int]:
        return [index for unit in chosen for index in unit.members]

    return _Split(indices(rest), indices(dev), indices(left))


# -- guards and report --------------------------------------------------------------------------------------------


def _check_left(total: int, kept: int, removed: Counter[str]) -> None:
    golden = sum(count for reason, count in removed.items() if reason.startswith("golden_"))
    repeated = removed["exact_duplicate"] + removed["near_duplicate"]
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in removed.most_common())
    if kept <= 1 and repeated > 0:
        raise DataError(
            f"All {total - golden:,} rows outside the golden set are duplicates of each other or contradict each other "
            f"({reasons}).",
            where="data.source",
            fix="check how the source was made; a model cannot learn from one text",
        )
    if kept <= 1:
        raise DataError(
            f"Of {total:,} rows {kept} is left for training ({reasons or 'none was removed'}).",
            where="data.source",
            fix="add rows that are not in the golden set",
        )


def _check_guards(
    train: Sequence[Row], dev: Sequence[Row], task: TaskSpec, learning_rate: float, spec: CurateSpec
) -> list[Finding]:
    """The guards that object and are overridden.

    Raises:
        DataError: a label has no training row, or a guard objects and `accept_risks` has no reason for it.
    """
    classes = Counter(row.target for row in train) if task.kind is TaskKind.CLASSIFY else Counter()
    for label in task.labels:
        if classes[label] == 0:
            in_dev = sum(row.target == label for row in dev)
            raise DataError(
                f"The label {label!r} has no training row{f' ({in_dev} in dev)' if in_dev else ''}.",
                where="task.labels",
                fix="add rows with this label, or take it out of `task.labels` and freeze a golden set without it",
            )
    findings = []
    if len(train) < MIN_TRAIN_ROWS:
        findings.append(
            Finding(
                Guard.FEW_ROWS,
                f"{len(train):,} training rows, fewer than {MIN_TRAIN_ROWS}",
                "add rows" if spec.max_train_rows is None or spec.max_train_rows >= MIN_TRAIN_ROWS
                else "raise `curate.max_train_rows`",
            )
        )  # fmt: skip
    small = {label: classes[label] for label in task.labels if classes[label] < MIN_CLASS_ROWS}
    if small:
        listed = ", ".join(f"{label} {count}" for label, count in small.items())
        findings.append(
            Finding(
                Guard.SMALL_CLASS,
                f"labels with fewer than {MIN_CLASS_ROWS} training rows: {listed}",
                "add rows with these labels, or raise `curate.max_train_rows`",
            )
        )
    if learning_rate > HIGH_LEARNING_RATE and len(train) < ROWS_FOR_HIGH_LEARNING_RATE:
        findings.append(
            Finding(
                Guard.LEARNING_RATE,
                f"a learning rate above {HIGH_LEARNING_RATE:g} with {len(train):,} training rows, "
                f"fewer than {ROWS_FOR_HIGH_LEARNING_RATE:,}",
                f"set `train.learning_rate` to {HIGH_LEARNING_RATE:g} or less, or add rows",
            )
        )
    for finding in findings:
        if finding.guard not in spec.accept_risks:
            raise DataError(
                f"This run would likely disappoint: {finding.found}.",
                where=f"guard {finding.guard.value}",
                fix=f"{finding.fix}; or give a reason in `curate.accept_risks.{finding.guard.value}`",
            )
    return findings


def _funnel(total: int, removed: Counter[str]) -> list[dict[str, Any]]:
    """What came in, what left for which reason and what was left then, in the order in which rows leave."""
    steps: list[dict[str, Any]] = [{"step": "valid rows", "removed": 0, "left": total}]
    left = total
    for reason in _REASONS:
        left -= removed[reason]
        steps.append({"step": reason, "removed": removed[reason], "left": left})
    return steps


def _describe(rows: Sequence[Row], task: TaskSpec) -> dict[str, Any]:
    return {"rows": len(rows), "strata": dict(sorted(Counter(stratum(row, task) for row in rows).items()))}
