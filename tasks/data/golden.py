"""The golden set: chosen once, frozen with its digest, opened only if not one byte of it has changed."""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import ValidationError

from tasks.contracts.errors import GoldenSetError, SpecError, StoreError
from tasks.contracts.parse import problems
from tasks.contracts.progress import Progress, ProgressListener, ignore_progress
from tasks.contracts.references import GoldenSetRef, SuiteRef
from tasks.contracts.rows import Row, read_rows, write_rows
from tasks.contracts.spec import EvaluationSpec, GoldenSpec, RetrainSpec, SuiteSpec, TaskKind, TaskSpec
from tasks.data.draw import content_hash, draw, make_units, quotas, stratum
from tasks.data.duplicates import find_duplicates
from tasks.data.ingest import ROWS, digest_source, ingest
from tasks.data.similar import Clusters, profile_texts
from tasks.data.validate import facts_of, run_suite, schema_check, validate, with_distinct_ids
from tasks.store import Store, digest_file

ITEMS = "items.jsonl"
MANIFEST = "golden.json"
MIN_CLASS_ITEMS = 10  # below this a class's precision and recall say nothing


def freeze(spec: RetrainSpec, listener: ProgressListener = ignore_progress) -> GoldenSetRef:
    """Choose `spec.golden.items` items from the training source and freeze them in `spec.golden.path`.

    Items are drawn by label in proportion, at least `MIN_CLASS_ITEMS` of each label as long as that is no more than
    half of its rows; whole groups (so that up to a tenth may be missing from the number asked for), no two
    near-duplicates, no text with contradicting labels. The draw goes by the
    hash of the content, so the same content gives the same items and the same digest whatever the order of the rows.
    An item's `line` is its line in `items.jsonl`. `golden.json` is written last: without it nothing is frozen.

    Raises:
        GoldenSetError: it is frozen already, there are too few rows, or the items do not meet the golden suite.
        DataError: the source cannot be used.
        StoreError: the folder cannot be written.
    """
    folder = Path(spec.golden.path)
    if (folder / MANIFEST).exists():
        raise GoldenSetError(
            "The golden set is frozen already; a set that could be changed would prove nothing.",
            where=str(folder / MANIFEST),
            fix="keep it, or name another folder in `golden.path` to freeze a new one",
        )
    try:
        source_digest = digest_source(spec.data)
        with tempfile.TemporaryDirectory(prefix="goldgate-golden-") as work:
            raw, valid = Path(work, "raw"), Path(work, "valid")
            raw.mkdir()
            valid.mkdir()
            listener(Progress(0, 4, "steps", "reading"))
            ingest(spec.data, spec.task.kind, raw)
            listener(Progress(1, 4, "steps", "checking"))
            validate(
                raw,
                spec.task,
                spec.data,
                valid,
                keep=lambda: Store(spec.execution.store).scratch("freeze", source_digest),
            )
            rows = list(read_rows(valid / ROWS))
        listener(Progress(2, 4, "steps", "choosing"))
        chosen = choose(rows, spec)
        listener(Progress(3, 4, "steps", "checking the chosen items"))
        _check_suite(chosen, spec)
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(folder / ITEMS, chosen)
        digest = digest_file(folder / ITEMS)
        manifest = {
            "digest": digest,
            "items": len(chosen),
            "strata": dict(sorted(Counter(stratum(row, spec.task) for row in chosen).items())),
            "name": spec.name,
            "task": spec.task.model_dump(mode="json"),
            "source_digest": source_digest,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
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
    return GoldenSetRef(path=str(folder.absolute()), digest=digest, items=len(chosen))


def choose(rows: list[Row], spec: RetrainSpec) -> list[Row]:
    """The items of a golden set, in the order of their hashes.

    Raises:
        GoldenSetError: fewer rows differ from each other than items are wanted.
    """
    profiles = list(profile_texts(row.text for row in rows))
    found = find_duplicates(rows, profiles, spec.task, spec.curate.near_duplicate)
    linked = Clusters(len(rows))
    for one, other in found.links:
        linked.join(one, other)
    hashes = [content_hash(row) for row in rows]
    kept: dict[int, int] = {}  # of texts that are nearly the same with different answers one is enough here
    for index in sorted(found.kept, key=lambda index: hashes[index]):
        kept.setdefault(linked.root(index), index)
    groups: dict[tuple[str | None, int], list[int]] = {}
    for index in kept.values():
        group = rows[index].group
        groups.setdefault((None, index) if group is None else (group, 0), []).append(index)
    strata = [stratum(row, spec.task) for row in rows]
    wanted = quotas(Counter(strata[index] for index in kept.values()), spec.golden.items, MIN_CLASS_ITEMS)
    taken, _ = draw(make_units(list(groups.values()), hashes, strata), wanted)
    chosen = [rows[index] for unit in taken for index in unit.members]
    if len(chosen) < _fewest(spec):
        raise GoldenSetError(
            f"{spec.golden.items:,} golden items are wanted, but only {len(chosen):,} can be had: {len(rows):,} valid "
            f"rows, {len(kept):,} without duplicates and contradictions, in {len(groups):,} groups that stay whole.",
            where="golden.items",
            fix=f"set `golden.items` to {len(chosen):,} or less, or add data",
        )
    return [
        Row(row.id, line, row.messages, row.target, row.group, row.slice) for line, row in enumerate(chosen, start=1)
    ]


def _fewest(spec: RetrainSpec) -> int:
    """Groups stay whole, so the number asked for can be missed by a little."""
    return math.ceil(0.9 * spec.golden.items)


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
                f"A golden item does not fit the task's JSON Schema: {problem}.",
                where=f"{path}:{line} and task.json_schema",
                fix=fix,
            )


def _check_suite(items: list[Row], spec: RetrainSpec) -> None:
    from expectations import golden_items

    suite = golden_items.build_suite(spec.task, spec.data, min_items=_fewest(spec))
    found = run_suite(suite, with_distinct_ids(pd.DataFrame(facts_of(items, spec.task))))
    reasons = [*found.of_set, *(f"{items[row].id}: {why.text}" for row, all_ in found.by_row.items() for why in all_)]
    if reasons:
        raise GoldenSetError(
            f"The chosen items are not fit for a golden set: {'; '.join(reasons[:5])}.",
            where=spec.data.source,
            fix="add rows to the source, or raise `golden.items`, until every label has an item",
        )
