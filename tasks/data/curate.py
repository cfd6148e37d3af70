"""From valid rows to a train and a dev split: nothing twice, nothing from the golden set, and enough to learn from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.contracts.errors import DataError
from tasks.contracts.progress import Progress, ProgressListener, ignore_progress
from tasks.contracts.references import CONTAMINATION_FILE, ContaminationReport, GoldenSetRef
from tasks.contracts.rows import Row, read_rows
from tasks.contracts.spec import CurateSpec, TaskKind, TaskSpec
from tasks.data.contamination import MEASURES, SEMANTIC, GoldenIndex, find_overlaps, index_golden
from tasks.data.content import CONTENT, write_content
from tasks.data.draw import stratum
from tasks.data.duplicates import Named, Removed, find_duplicates
from tasks.data.golden import ITEMS
from tasks.data.golden_slices import typical_of
from tasks.data.guards import NO_LONG_ROWS, LongRows, check_guards
from tasks.data.ingest import ROWS
from tasks.data.meaning import Meaning, find_same_meaning
from tasks.data.parallel import read_lines
from tasks.data.similar import NGRAM_WORDS, Banding
from tasks.data.splits import Balanced, balance, label_drift, split
from tasks.data.suspicion import PLANTED, SUSPECT, look_for_suspicion
from tasks.data.table import NOTHING, RowReader, RowTable, build_table
from tasks.data.validate import QUARANTINE

TRAIN = "train.jsonl"
DEV = "dev.jsonl"
REPORT = "report.json"
# Why rows leave, in the order in which they do.
REASONS = (
    *MEASURES,
    "conflicting_labels",
    "exact_duplicate",
    "near_duplicate",
    SEMANTIC,
    "semantic_duplicate",
    PLANTED,
    SUSPECT,
    "over_synthetic_share",
    "over_max_train_rows",
)
_ITEMS_FOR_DRIFT = 50
_LARGEST = 20  # clusters and sources that the report names
_BARS = 20  # of the histogram of lengths


class Curated(NamedTuple):
    """Rows in each split, and how many were removed for which reason."""

    train: int
    dev: int
    removed: dict[str, int]


def curate(
    valid: Path,
    golden: GoldenSetRef | None,
    task: TaskSpec,
    spec: CurateSpec,
    learning_rate: float,
    folder: Path,
    listener: ProgressListener = ignore_progress,
    long_rows: LongRows = NO_LONG_ROWS,
) -> Curated:
    """Write `train.jsonl`, `dev.jsonl`, `quarantine.jsonl`, `report.json` and `contamination.json`.

    Rows leave in the order of `REASONS`: rows that overlap the golden set (`golden_…`), contradictions, exact and
    near-duplicates (see `find_duplicates`), and rows over a limit. Groups stay whole and near-duplicates on one side.
    Splits go by the hash of the content, so the same content gives the same splits whatever the order of the rows.
    `long_rows` says what the validation left out for its length, which a guard looks at.

    A line of the quarantine is `{"line", "id", "checks", "reasons", "record"}`. Without a golden set nothing is looked
    for in it, and `contamination.json` is not written.

    Raises:
        DataError: nothing is left, a label has no training row, or a guard objects and no reason is given to go on.
    """
    banding = Banding.for_threshold(spec.near_duplicate)
    index = index_golden(list(read_rows(Path(golden.path) / ITEMS)), banding) if golden is not None else None
    total = _count_lines(valid / ROWS)

    def tell(note: str) -> Any:
        return lambda rows: listener(Progress(rows, total, "rows", note))

    table = build_table(valid / ROWS, task, banding, index.runs if index else None, folder, tell("reading"))
    with table.reader() as reader:
        removed = _with_golden(table, index)
        free = _without(len(table), removed)
        found = find_duplicates(
            table.sketch.take(free),
            table.shingles.in_order(free),
            table.targets[free],
            banding,
            task.kind,
            lambda at: _named(reader, int(free[at])),
        )
        removed += [one._replace(position=int(free[one.position])) for one in found.removed]
        links = [(int(free[one]), int(free[other])) for one, other in found.links]
        kept = free[found.kept]
        meaning = _look_for_meaning(reader, table, kept, index, spec)
        if meaning is not None:
            removed += [one._replace(position=int(kept[one.position])) for one in meaning.removed]
            links += [(int(kept[one]), int(kept[other])) for one, other in meaning.links]
            kept = _without(len(table), removed)
        suspicion = look_for_suspicion(reader, table, kept, task, spec)
        removed += suspicion.removed
        kept = _without(len(table), removed)
        _check_left(len(table), len(kept), Counter(one.reason for one in removed))

        parts = split(table, kept.tolist(), links, spec)
        removed += parts.left
        counts = Counter(one.reason for one in removed)
        by_reason = {reason: counts[reason] for reason in REASONS if counts[reason]}
        _check_sum(len(table), len(parts.train) + len(parts.dev), removed, by_reason)

        train = np.array(parts.train, dtype=np.int64)
        weights = _weights(reader, parts.train) * suspicion.factors[train]
        balanced = balance(table.strata[train], table.stratum_names, weights, spec)
        classes = {
            "valid": _classes(table, np.arange(len(table))),
            "kept": _classes(table, kept),
            "train": _classes(table, parts.train),
            "dev": _classes(table, parts.dev),
            "golden": _classes_of(index, task),
        }
        drift = _drift(classes["kept"], classes["golden"], task)
        findings = check_guards(classes["train"], classes["dev"], drift or 0.0, task, learning_rate, spec, long_rows)

        written = _write_train(folder / TRAIN, reader, parts.train, balanced)
        _write_dev(folder / DEV, reader, parts.dev)
        _write_quarantine(folder / QUARANTINE, reader, removed)
        write_content(folder / CONTENT, table, parts.train, parts.dev, removed)
    report = {
        "funnel": _funnel(len(table), counts),
        "removed": by_reason,
        "train": {"rows": written, "distinct_rows": len(parts.train), "strata": classes["train"]},
        "dev": {"rows": len(parts.dev), "strata": classes["dev"]},
        "golden": {"digest": golden.digest, "items": golden.items, "strata": classes["golden"]} if golden else None,
        "near_duplicate": {
            "jaccard": spec.near_duplicate,
            "found_at_it": round(banding.proposed(spec.near_duplicate), 4),
        },
        "semantic": None if meaning is None else {"threshold": spec.semantic_duplicate, "pairs": meaning.pairs},
        "suspects": suspicion.suspects,
        "poisoning": suspicion.poisoning,
        "classes": classes,
        "lengths": {"train": {"words": _lengths(table, parts.train)}, "dev": {"words": _lengths(table, parts.dev)}},
        "sources": _sources(table, kept),
        "synthetic": _synthetic(table, parts.train),
        "clusters": _clusters(table, free, found.clusters),
        "balance": {"by": spec.balance.value, "classes": balanced.effect},
        "label_drift": None if drift is None else round(drift, 4),
        "accepted_risks": {
            finding.guard.value: {"found": finding.found, "reason": spec.accept_risks[finding.guard]}
            for finding in findings
        },
    }
    (folder / REPORT).write_text(json.dumps(report, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    if index is not None and golden is not None:
        contamination = _look_for_golden([folder / TRAIN, folder / DEV], index, golden, task, spec, folder)
        (folder / CONTAMINATION_FILE).write_text(contamination.model_dump_json(indent=2) + "\n", encoding="utf-8")
    listener(Progress(total, total, "rows"))
    return Curated(written, len(parts.dev), by_reason)


def _count_lines(path: Path) -> int:
    return sum(len(batch.lines) for batch in read_lines(path))


def _without(count: int, removed: Iterable[Removed]) -> NDArray[np.int64]:
    stays = np.ones(count, dtype=np.bool_)
    stays[[one.position for one in removed]] = False
    return np.flatnonzero(stays)


def _named(reader: RowReader, position: int) -> Named:
    row = reader.row(position)
    return Named(row.id, row.target)


def _weights(reader: RowReader, positions: Sequence[int]) -> NDArray[np.float64]:
    return np.array([reader.row(position).weight for position in positions], dtype=np.float64)


def _classes(table: RowTable, positions: Sequence[int] | NDArray[np.int64]) -> dict[str, int]:
    counts = np.bincount(table.strata[np.array(positions, dtype=np.int64)], minlength=len(table.stratum_names))
    return {name: int(count) for name, count in sorted(zip(table.stratum_names, counts, strict=True)) if count}


def _classes_of(golden: GoldenIndex | None, task: TaskSpec) -> dict[str, int]:
    """Of the items that were drawn as the rows are: slices for shift have another mix on purpose."""
    items = typical_of(golden.items) if golden is not None else []
    return dict(sorted(Counter(stratum(item, task) for item in items).items()))


def _look_for_meaning(
    reader: RowReader, table: RowTable, kept: NDArray[np.int64], golden: GoldenIndex | None, spec: CurateSpec
) -> Meaning | None:
    if spec.semantic_model is None:
        return None
    return find_same_meaning(
        lambda: reader.texts(kept),
        golden.items if golden is not None else [],
        table.targets[kept],
        lambda at: _named(reader, int(kept[at])),
        spec.semantic_model,
        spec.semantic_duplicate,
    )


# -- the golden set -----------------------------------------------------------------------------------------------


def _with_golden(table: RowTable, golden: GoldenIndex | None) -> list[Removed]:
    return find_overlaps(table, golden) if golden is not None else []


def _drift(rows: Mapping[str, int], golden: Mapping[str, int], task: TaskSpec) -> float | None:
    """Distance of the label mixes; None without labels, or for a golden set so small that its mix is luck."""
    enough = task.kind is TaskKind.CLASSIFY and sum(golden.values()) >= _ITEMS_FOR_DRIFT
    return label_drift(rows, golden) if enough else None


def _look_for_golden(
    files: Sequence[Path], index: GoldenIndex, golden: GoldenSetRef, task: TaskSpec, spec: CurateSpec, folder: Path
) -> ContaminationReport:
    """Look through the rows that training will see, as they were written, as if nothing had been removed before."""
    rows = 0
    found: Counter[str] = Counter()
    for path in files:
        table = build_table(path, task, index.banding, index.runs, folder)
        rows += len(table)
        found.update(one.reason for one in find_overlaps(table, index))
    return ContaminationReport(
        golden_digest=golden.digest,
        golden_items=golden.items,
        rows=rows,
        near_duplicate=spec.near_duplicate,
        ngram_words=NGRAM_WORDS,
        measures=MEASURES,
        found=dict(found),
    )


# -- files --------------------------------------------------------------------------------------------------------


def _write_train(path: Path, reader: RowReader, positions: Sequence[int], balanced: Balanced) -> int:
    """Each row as often, and with the weight, that balancing gave it; a repetition has a number behind its id."""
    count = 0
    with path.open("wb") as out:
        for position, repeats, weight in zip(
            positions, balanced.repeats.tolist(), balanced.weights.tolist(), strict=True
        ):
            line = reader.line(position)
            if abs(weight - 1.0) > 1e-9 or repeats > 1:
                row = replace(reader.row(position), weight=1.0 if abs(weight - 1.0) <= 1e-9 else float(f"{weight:.6g}"))
                line = (row.to_json() + "\n").encode()
            out.write(line)
            for number in range(2, repeats + 1):
                out.write((replace(row, id=f"{row.id}#{number}").to_json() + "\n").encode())
            count += repeats
    return count


def _write_dev(path: Path, reader: RowReader, positions: Sequence[int]) -> None:
    """As they are, but each row counts as much as another: the dev loss says how well rows are learned, not wanted."""
    with path.open("wb") as out:
        for position in positions:
            line = reader.line(position)
            row = Row.from_json(line)
            out.write(line if row.weight == 1.0 else (replace(row, weight=1.0).to_json() + "\n").encode())


def _write_quarantine(path: Path, reader: RowReader, removed: Sequence[Removed]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as out:
        for one in sorted(removed):
            row = reader.row(one.position)
            entry = {
                "line": row.line,
                "id": row.id,
                "checks": [one.reason],
                "reasons": [one.detail],
                "record": json.loads(row.to_json()),
            }
            out.write(json.dumps(entry, ensure_ascii=False) + "\n")


# -- report -------------------------------------------------------------------------------------------------------


def _check_left(total: int, kept: int, removed: Counter[str]) -> None:
    golden = sum(count for reason, count in removed.items() if reason.startswith("golden_"))
    repeated = sum(removed[reason] for reason in ("exact_duplicate", "near_duplicate", "semantic_duplicate"))
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


def _check_sum(total: int, used: int, removed: Sequence[Removed], by_reason: Mapping[str, int]) -> None:
    if total != used + sum(by_reason.values()) or len({one.position for one in removed}) != len(removed):
        raise AssertionError("the funnel does not add up")  # a defect of this module, not of the data


def _funnel(total: int, removed: Counter[str]) -> list[dict[str, Any]]:
    """What came in, what left for which reason and what was left then, in the order in which rows leave."""
    steps: list[dict[str, Any]] = [{"step": "valid rows", "removed": 0, "left": total}]
    left = total
    for reason in REASONS:
        left -= removed[reason]
        steps.append({"step": reason, "removed": removed[reason], "left": left})
    return steps


def _lengths(table: RowTable, positions: Sequence[int]) -> dict[str, Any]:
    """Words of each row's text: the spread, and a histogram as [up to so many words, rows]."""
    words = table.sketch.words[np.array(positions, dtype=np.int64)]
    if not len(words):
        return {}
    edges = np.unique(np.ceil(np.geomspace(max(1, words.min()), max(2, words.max()), _BARS)).astype(np.int64))
    counts, _ = np.histogram(words, bins=np.concatenate(([0], edges + 1)))
    return {
        "min": int(words.min()),
        "median": float(np.median(words)),
        "p95": float(np.percentile(words, 95)),
        "max": int(words.max()),
        "histogram": [[int(edge), int(count)] for edge, count in zip(edges, counts, strict=True)],
    }


def _sources(table: RowTable, kept: NDArray[np.int64]) -> dict[str, int]:
    codes = table.sources[kept]
    counts = np.bincount(codes[codes != NOTHING], minlength=len(table.source_names))
    ranked = sorted(zip(table.source_names, counts.tolist(), strict=True), key=lambda item: (-item[1], item[0]))
    return dict(ranked[:_LARGEST])


def _synthetic(table: RowTable, train: Sequence[int]) -> dict[str, Any]:
    rows = int(table.synthetic[np.array(train, dtype=np.int64)].sum())
    return {"rows": rows, "share": round(rows / len(train), 4) if train else 0.0}


def _clusters(table: RowTable, free: NDArray[np.int64], clusters: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """How many clusters of the same or nearly the same text there are, of which size, and the largest by name."""
    return {
        "count": len(clusters),
        "rows": sum(size for size, _ in clusters),
        "sizes": {str(size): count for size, count in sorted(Counter(size for size, _ in clusters).items())},
        "largest": [{"rows": size, "first": table.ids[int(free[first])]} for size, first in clusters[:_LARGEST]],
    }
