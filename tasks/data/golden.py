"""The golden set: chosen once, frozen with its digest, opened only if not one byte of it has changed."""

from __future__ import annotations

import fcntl
import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import ValidationError

from tasks.contracts.errors import GoldenSetError, SpecError, StoreError
from tasks.contracts.parse import problems
from tasks.contracts.progress import Progress, ProgressListener, ignore_progress
from tasks.contracts.references import GoldenSetRef, SuiteRef
from tasks.contracts.rows import Row, read_rows, write_rows
from tasks.contracts.spec import (
    DataSpec,
    EvaluationSpec,
    GoldenSlice,
    GoldenSpec,
    RetrainSpec,
    SuiteSpec,
    TaskKind,
    TaskSpec,
)
from tasks.data.draw import stratum
from tasks.data.duplicates import Named, find_duplicates
from tasks.data.facts import RowChecks, facts_of, schema_check
from tasks.data.golden_slices import (
    MADE,
    MIN_SLICE_ITEMS,
    TYPICAL,
    Part,
    Pool,
    add_slices,
    changed_by_rule,
    check_slices,
    draw_positions,
    origin_problem,
    part_of,
)
from tasks.data.ingest import ROWS, digest_source, ingest
from tasks.data.similar import Banding, Clusters
from tasks.data.suites import run_suite
from tasks.data.table import NOTHING, RowReader, RowTable, build_table
from tasks.data.validate import validate, with_repeated_ids
from tasks.store import Store, digest_file

ITEMS = "items.jsonl"
MANIFEST = "golden.json"
MIN_CLASS_ITEMS = 10  # below this a class's precision and recall say nothing


class Planner(NamedTuple):
    """What the gate needs, and what it can show; `tasks.gate` works it out, and this room does not import it.

    Attributes:
        items_needed: from the name of a slice to how many items it takes.
        smallest_effect: from a part of the set to the smallest difference that it shows with 80 % power; None where it
            shows none.
    """

    items_needed: Callable[[str], int]
    smallest_effect: Callable[[Part], float | None]


class Draft(NamedTuple):
    """What would be frozen.

    Attributes:
        items: the items, in order; `line` is the line in `items.jsonl`.
        parts: all items first, then each slice.
        left: rows that differ and are not in the set: the most that training can have.
        synthetic: rows that a model wrote; none of them was looked at.
        notes: what else there is to say, in sentences without a full stop.
    """

    items: list[Row]
    parts: list[Part]
    left: int
    synthetic: int = 0
    notes: tuple[str, ...] = ()


def freeze(
    spec: RetrainSpec,
    listener: ProgressListener = ignore_progress,
    planner: Planner | None = None,
    show: Callable[[Draft], None] = lambda draft: None,
) -> GoldenSetRef:
    """Choose `spec.golden.items` items from the training source and freeze them in `spec.golden.path`.

    Items are drawn by label in proportion, at least `MIN_CLASS_ITEMS` of each label as long as that is no more than
    half of its rows; whole groups (so that up to a tenth may be missing from the number asked for), no two
    near-duplicates, no text with contradicting labels, none that a model wrote. The draw goes by the
    hash of the content, so the same content gives the same items and the same digest whatever the order of the rows.
    `spec.golden.slices` come in addition (see `tasks.data.golden_slices`); the items drawn before are the same with
    them and without. An item's `line` is its line in `items.jsonl`. `golden.json` is written last: without it nothing
    is frozen.

    Args:
        spec: what to freeze, from what, and where.
        listener: told of the progress.
        planner: how many items slices need, and what they show; that is kept in `golden.json`.
        show: called with what will be frozen, before it is.

    Raises:
        SpecError: slices are asked for that these data cannot have.
        GoldenSetError: it is frozen already, there are too few rows, a slice has fewer than `MIN_SLICE_ITEMS`, or the
            items do not meet the golden suite.
        DataError: the source cannot be used.
        StoreError: the folder cannot be written.
    """
    folder = Path(spec.golden.path)
    _check_not_frozen(folder)
    try:
        source_digest = digest_source(_fair(spec.data))
        draft = draft_golden(spec, listener, planner, source_digest)
        _check_slices_are_filled(draft.parts, spec)
        show(draft)
        listener(Progress(3, 4, "steps", "checking the chosen items"))
        _check_suite(draft.items, spec)
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            _check_not_frozen(folder)  # another may have frozen it while this one chose
            write_rows(folder / ITEMS, draft.items)
            digest = digest_file(folder / ITEMS)
            manifest = {
                "digest": digest,
                "items": len(draft.items),
                "strata": dict(sorted(Counter(stratum(row, spec.task) for row in draft.items).items())),
                "name": spec.name,
                "task": spec.task.model_dump(mode="json"),
                "source_digest": source_digest,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                **_said_of(draft, spec, planner),
            }
            part = folder / f"{MANIFEST}.part"
            part.write_text(json.dumps(manifest, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
            part.replace(folder / MANIFEST)
    except OSError as error:
        raise StoreError(
            f"The golden set cannot be written: {error.strerror or error}.",
            where=str(error.filename or folder),
            fix="free space, allow writing, or set `golden.path` to another folder",
        ) from error
    listener(Progress(4, 4, "steps"))
    return GoldenSetRef(path=str(folder.absolute()), digest=digest, items=len(draft.items))


def _check_not_frozen(folder: Path) -> None:
    if (folder / MANIFEST).exists():
        raise GoldenSetError(
            "The golden set is frozen already; a set that could be changed would prove nothing.",
            where=str(folder / MANIFEST),
            fix="keep it, or name another folder in `golden.path` to freeze a new one",
        )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time writes here. The folder itself is locked: a golden set is kept under version control."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def draft_golden(
    spec: RetrainSpec,
    listener: ProgressListener = ignore_progress,
    planner: Planner | None = None,
    source_digest: str | None = None,
) -> Draft:
    """What `freeze` would freeze, without freezing it; a slice with too few items is no error here.

    Raises:
        SpecError: slices are asked for that these data cannot have.
        GoldenSetError: there are too few rows.
        DataError: the source cannot be used.
        OSError: there is no room for temporary files.
    """
    check_slices(spec)
    digest = digest_source(_fair(spec.data)) if source_digest is None else source_digest
    with tempfile.TemporaryDirectory(prefix="goldgate-golden-") as work:
        raw, valid = Path(work, "raw"), Path(work, "valid")
        raw.mkdir()
        valid.mkdir()
        listener(Progress(0, 4, "steps", "reading"))
        ingest(_fair(spec.data), spec.task.kind, raw, expected_digest=digest)
        listener(Progress(1, 4, "steps", "checking"))
        validate(
            raw,
            spec.task,
            spec.data,
            valid,
            keep=lambda: Store(spec.execution.store).scratch("freeze", digest),
        )
        listener(Progress(2, 4, "steps", "choosing"))
        real = Path(work, "real.jsonl")
        synthetic = _leave_out_synthetic(valid / ROWS, real)
        return choose(real, spec, Path(work), planner)._replace(synthetic=synthetic)


def choose(path: Path, spec: RetrainSpec, folder: Path, planner: Planner | None = None) -> Draft:
    """The items of a golden set: drawn ones in the order of their hashes, then those of each slice.

    Args:
        path: the rows to choose from, as `write_rows` writes them.
        spec: how many, and which slices.
        folder: for temporary files.
        planner: says how many items a slice needs, where `spec.golden.slice_items` does not.

    Raises:
        GoldenSetError: fewer rows differ from each other than items are wanted.
        SpecError: nothing says how many items the slices should have.
        DataError: the file of paraphrases cannot be used.
    """
    sizes = {name: _slice_items(name, spec, planner) for name in spec.golden.slices}
    table = build_table(path, spec.task, Banding.for_threshold(spec.curate.near_duplicate), None, folder)
    of_data: Counter[str] = Counter()
    with table.reader() as reader:
        kept = _distinct_rows(table, reader, spec)
        typical = _draw_typical(table, kept, spec)
        if sizes:
            typical_items, slices, notes = add_slices(Pool(table, reader, kept), typical, spec, sizes)
        else:
            typical_items, slices, notes = [reader.row(position) for position in typical], [], []
        if spec.data.slice_field is not None:
            of_data.update(name for position in kept if (name := reader.row(int(position)).slice) is not None)
    items = [*typical_items, *(row for one in slices for row in one.rows)]
    asked = spec.golden.items + sum(sizes.values())
    parts = [part_of(None, items, len(kept), asked)]
    if slices:
        parts.append(part_of(TYPICAL, typical_items, len(kept), spec.golden.items))
        parts += [part_of(one.name.value, one.rows, one.available, one.wanted) for one in slices]
    parts += [
        part_of(name, [row for row in items if row.slice == name], of_data[name], None) for name in sorted(of_data)
    ]
    drawn = len(typical) + sum(len(one.rows) for one in slices if one.name not in MADE)
    return Draft(
        [
            replace(row, line=line, source=None, weight=1.0)  # the set is the same wherever its rows came from
            for line, row in enumerate(items, start=1)
        ],
        parts,
        left=len(kept) - drawn,
        notes=tuple(notes),
    )


def _fair(data: DataSpec) -> DataSpec:
    """The source without what was added later: reviews are of answers that a model was unsure of, no fair sample."""
    return data.model_copy(update={"also": ()})


def _leave_out_synthetic(path: Path, real: Path) -> int:
    """Copy the rows that no model wrote; return how many others there are."""
    left_out = 0
    with path.open("rb") as lines, real.open("wb") as out:
        for line in lines:
            if b'"synthetic":true' in line and Row.from_json(line).synthetic:
                left_out += 1
            else:
                out.write(line)
    return left_out


def _slice_items(name: GoldenSlice, spec: RetrainSpec, planner: Planner | None) -> int:
    if spec.golden.slice_items is not None:
        return spec.golden.slice_items
    if planner is None:
        raise SpecError(
            f"Nothing says how many items the slice {name.value} should have.",
            where="golden.slice_items",
            fix="set it, or freeze with `goldgate golden freeze CONFIG.yaml`, which plans it",
        )
    return max(MIN_SLICE_ITEMS, planner.items_needed(name.value))


def _distinct_rows(table: RowTable, reader: RowReader, spec: RetrainSpec) -> NDArray[np.int64]:
    """Positions of rows of which no two say nearly the same, ascending."""

    def named(at: int) -> Named:
        row = reader.row(at)
        return Named(row.id, row.target)

    found = find_duplicates(
        table.sketch,
        table.shingles,
        table.targets,
        Banding.for_threshold(spec.curate.near_duplicate),
        spec.task.kind,
        named,
    )
    linked = Clusters(len(table))
    for one, other in found.links:
        linked.join(one, other)
    first: dict[int, int] = {}  # of texts that are nearly the same with different answers one is enough here
    for position in found.kept.tolist():
        first.setdefault(linked.root(position), position)
    return np.array(sorted(first.values()), dtype=np.int64)


def _draw_typical(table: RowTable, kept: NDArray[np.int64], spec: RetrainSpec) -> list[int]:
    """Positions of the items that are drawn as the data come."""
    chosen = draw_positions(table, kept, table.content_hash, spec.golden.items, MIN_CLASS_ITEMS)
    groups = table.groups[kept]
    units = np.count_nonzero(groups == NOTHING) + len(np.unique(groups[groups != NOTHING]))
    if len(chosen) < _fewest(spec):
        raise GoldenSetError(
            f"{spec.golden.items:,} golden items are wanted, but only {len(chosen):,} can be had: {len(table):,} valid "
            f"rows, {len(kept):,} without duplicates and contradictions, in {units:,} groups that stay whole.",
            where="golden.items",
            fix=f"set `golden.items` to {len(chosen):,} or less, or add data",
        )
    return chosen


def _fewest(spec: RetrainSpec) -> int:
    """Groups stay whole, so the number asked for can be missed by a little."""
    return math.ceil(0.9 * spec.golden.items)


def _check_slices_are_filled(parts: Sequence[Part], spec: RetrainSpec) -> None:
    asked = {name.value for name in spec.golden.slices}
    for part in parts:
        if part.name in asked and part.items < MIN_SLICE_ITEMS:
            raise GoldenSetError(
                f"The slice {part.name} would have {part.items:,} items: {part.available:,} can be had, "
                f"{part.wanted or 0:,} are wanted, and below {MIN_SLICE_ITEMS} it would say nothing.",
                where="golden.slices",
                fix=f"add data that fit it, or take {part.name} out",
            )


def _said_of(draft: Draft, spec: RetrainSpec, planner: Planner | None) -> dict[str, Any]:
    """What the manifest says beside what every manifest says, where there is anything to say."""
    said: dict[str, Any] = {}
    if planner is not None or spec.golden.slices:
        said["parts"] = [
            part._asdict() | ({"smallest_effect": planner.smallest_effect(part)} if planner is not None else {})
            for part in draft.parts
        ]
        said["discordance"] = spec.golden.discordance
    if draft.synthetic:
        said["synthetic_left_out"] = draft.synthetic
    return said | {
        name: value for name, value in (("provenance", spec.data.provenance), ("licence", spec.data.licence)) if value
    }


def open_golden(spec: EvaluationSpec) -> GoldenSetRef:
    """The frozen golden set, after a look at every byte of it.

    Raises:
        GoldenSetError: it is not frozen, was changed, or does not fit the task.
    """
    folder = Path(spec.golden.path)
    manifest = _read_manifest(folder)
    path = folder / ITEMS
    try:
        found = digest_file(path)
    except OSError as error:
        raise GoldenSetError(
            f"The items of the golden set cannot be read: {error.strerror or error}.",
            where=str(path),
            fix="bring the file back from version control or a backup",
        ) from error
    if found != manifest["digest"]:
        raise GoldenSetError(
            f"The golden set was changed: expected sha256 {manifest['digest']}, found {found}.",
            where=str(path),
            fix="bring the file back from version control or a backup; for a new golden set, freeze it in a new folder",
        )
    if spec.golden.digest is not None and found != spec.golden.digest:
        raise GoldenSetError(
            f"This is another golden set than the configuration asks for: expected sha256 {spec.golden.digest}, "
            f"found {found}.",
            where=f"golden.digest and {path}",
            fix="set `golden.path` to the right folder, or `golden.digest` to this set's digest if it is the one meant",
        )
    _check_fit(read_rows(path), manifest, spec, path)
    return GoldenSetRef(path=str(folder.absolute()), digest=found, items=manifest["items"])


def open_suite(suite: SuiteSpec, spec: RetrainSpec) -> SuiteRef:
    """A frozen set of a task of its own, after a look at every byte of it; it describes its own task.

    Raises:
        GoldenSetError: it is not frozen, or was changed.
        SpecError: a guard asks it for a metric that its task does not have.
    """
    name, task = read_task(Path(suite.path))
    asked_for = [guard.metric for guard in spec.policy.guards if guard.suite == suite.name]
    missing = [metric for metric in asked_for if metric not in task.metrics]
    if missing:
        raise SpecError(
            f"policy.guards asks the suite {suite.name} for {', '.join(missing)}, and its task has "
            f"{', '.join(task.metrics)}.",
            where="policy.guards",
            fix="ask for one of these",
        )
    asked = EvaluationSpec(
        name=name,
        task=task,
        golden=GoldenSpec(path=suite.path, digest=suite.digest),
        evaluate=spec.evaluate,
        execution=spec.execution,
    )
    return SuiteRef(name=suite.name, task=task, frozen=open_golden(asked))


def read_task(folder: Path) -> tuple[str, TaskSpec]:
    """Name and task that a golden set was frozen for.

    Raises:
        GoldenSetError: it is not frozen, or its manifest cannot be read.
    """
    manifest = _read_manifest(folder)
    return str(manifest["name"]), _task_of(manifest)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(manifest, dict) or not {"digest", "items", "name", "task"} <= manifest.keys():
            raise ValueError("it lacks digest, items, name or task")
        _task_of(manifest)
    except FileNotFoundError as error:
        raise GoldenSetError(
            "The golden set is not frozen yet.", where=str(folder), fix="run `goldgate golden freeze CONFIG.yaml` once"
        ) from error
    except (OSError, ValueError) as error:
        raise GoldenSetError(
            f"The manifest of the golden set cannot be read: {error}.",
            where=str(path),
            fix="bring the file back from version control or a backup",
        ) from error
    return manifest


def _task_of(manifest: dict[str, Any]) -> TaskSpec:
    try:
        return TaskSpec.model_validate(manifest["task"])
    except ValidationError as error:
        raise ValueError("; ".join(f"task.{problem}" for problem in problems(TaskSpec, error))) from error


def _check_fit(items: Iterable[Row], manifest: dict[str, Any], spec: EvaluationSpec, path: Path) -> None:
    """Whether the items can judge this task: their kind, their labels, their schema."""
    task = spec.task
    fix = "correct `task`, or freeze a golden set for the new task in a new folder"
    frozen_for = _task_of(manifest)
    if frozen_for.kind is not task.kind:
        raise GoldenSetError(
            f"The golden set was frozen for a task of kind {frozen_for.kind.value}, this one is {task.kind.value}.",
            where=f"task.kind and {path}",
            fix=fix,
        )
    targets: dict[str, int] = {}
    count = 0
    for count, row in enumerate(items, start=1):
        targets.setdefault(row.target, count)
    if count != manifest["items"]:
        raise GoldenSetError(
            f"The golden set should have {manifest['items']:,} items and has {count:,}.",
            where=str(path),
            fix="bring both files of the golden set back from version control or a backup",
        )
    if task.kind is TaskKind.CLASSIFY:
        for label in task.labels:
            if label not in targets:
                raise GoldenSetError(
                    f"The label {label!r} of the task is unknown to the golden set: no item has it.",
                    where=f"task.labels and {path}",
                    fix=fix,
                )
        for label, line in targets.items():
            if label not in task.labels:
                raise GoldenSetError(
                    f"The golden set has the label {label!r}, which the task does not have.",
                    where=f"{path}:{line} and task.labels",
                    fix=fix,
                )
    schema_problem = schema_check(task)
    for target, line in targets.items():
        problem = schema_problem(target)
        if problem is not None:
            raise GoldenSetError(
                f"A golden item does not fit the task's {'tools' if task.tools else 'JSON Schema'}: {problem}.",
                where=f"{path}:{line} and task.{'tools' if task.tools else 'json_schema'}",
                fix=fix,
            )


def _check_suite(items: list[Row], spec: RetrainSpec) -> None:
    from expectations import golden_items

    made = any(name in MADE for name in spec.golden.slices)
    by_id = {row.id: row for row in items}
    frame = with_repeated_ids(pd.DataFrame(facts_of(items, RowChecks(spec.task, spec.data))))
    frame = frame.assign(origin_problem=pd.Series([origin_problem(row, by_id) for row in items], dtype=object))
    # Which language a mistyped text is in is no question: that of its original, which was asked before.
    frame.loc[[changed_by_rule(row) for row in items], "language_problem"] = None
    suite = golden_items.build_suite(spec.task, spec.data, min_items=_fewest(spec), made=made)
    found = run_suite(suite, frame)
    of_rows = [(items[row].id, why) for row, all_ in found.by_row.items() for why in all_ if not why.only_told]
    reasons = [*found.of_set, *(f"{item}: {why.text}" for item, why in of_rows)]
    if reasons:
        raise GoldenSetError(
            f"The chosen items are not fit for a golden set: {'; '.join(reasons[:5])}.",
            where=spec.data.source,
            fix="add rows to the source, or raise `golden.items`, until every label has an item",
        )
