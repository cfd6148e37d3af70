"""What is trained on: the examples' own splits, cut by the data room, and their base model; made once."""

from __future__ import annotations

import hashlib
import json
import shutil
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tasks.contracts.spec import TaskSpec, TrainSpec

ROOT = Path(__file__).parents[2]
TASKS = ("complaints", "prices")
_DONE = "case.json"


class Case(NamedTuple):
    """One task to train on.

    Attributes:
        name: of the task.
        task: what the answers are.
        recipe: how it is trained; one pass over all of the training rows, one look at the dev loss, at the end.
        model: folder of the base model.
        model_uri: what it was made from.
        train: file of training rows.
        dev: file of dev rows.
    """

    name: str
    task: TaskSpec
    recipe: TrainSpec
    model: Path
    model_uri: str
    train: Path
    dev: Path


def example_case(name: str, work: Path, rows: int | None = None) -> Case:
    """The case of `examples/NAME`, made by the data room below `work`; `rows` cuts it short for a quick look.

    Where the example trains on a part of a pass, that part of the rows is drawn beforehand, by hash, so that every
    trainer sees the same rows and the same number of tokens, in whatever order it likes.
    """
    from goldgate.config import load_spec
    from tasks.contracts.rows import read_rows, write_rows

    spec = load_spec(ROOT / "examples" / name / f"{name}.yaml")
    folder = work / name
    if not (folder / _DONE).exists():
        _make_splits(name, folder)
    kept = list(read_rows(folder / "curate" / "train.jsonl"))
    if spec.train.epochs < 1:
        kept = sorted(kept, key=lambda row: hashlib.sha256(row.id.encode()).digest())
        kept = kept[: round(spec.train.epochs * len(kept))]
    dev = list(islice(read_rows(folder / "curate" / "dev.jsonl"), rows))
    files = folder / "rows" / ("all" if rows is None else f"{rows}")
    files.mkdir(parents=True, exist_ok=True)
    write_rows(files / "train.jsonl", kept[:rows])
    write_rows(files / "dev.jsonl", dev)
    recipe = spec.train.model_copy(update={"epochs": max(1.0, spec.train.epochs), "evaluations": 1})
    model = base_model(spec.base_model, work)
    return Case(name, spec.task, recipe, model, spec.base_model, files / "train.jsonl", files / "dev.jsonl")


def base_model(uri: str, work: Path) -> Path:
    """The base model as a folder of safetensors; converted once."""
    from tasks.contracts.progress import ignore_progress
    from tasks.training.base_model import convert, resolve

    folder = work / f"base-{hashlib.sha256(uri.encode()).hexdigest()[:12]}"
    if not folder.exists():
        part = folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        convert(resolve(uri), part, ignore_progress)
        part.rename(folder)
    return folder / "model"


def _make_splits(name: str, folder: Path) -> None:
    """Ingest, validate and curate, as a run of the example does."""
    from goldgate.config import load_spec
    from tasks.contracts.references import GoldenSetRef
    from tasks.data.curate import curate
    from tasks.data.golden import MANIFEST
    from tasks.data.ingest import ingest
    from tasks.data.validate import validate

    spec = load_spec(ROOT / "examples" / name / f"{name}.yaml")
    shutil.rmtree(folder, ignore_errors=True)
    for part in ("ingest", "validate", "curate", "kept"):
        (folder / part).mkdir(parents=True)
    ingest(spec.data, spec.task.kind, folder / "ingest")
    validate(folder / "ingest", spec.task, spec.data, folder / "validate", lambda: folder / "kept")
    manifest = json.loads((Path(spec.golden.path) / MANIFEST).read_text(encoding="utf-8"))
    golden = GoldenSetRef(path=spec.golden.path, digest=manifest["digest"], items=manifest["items"])
    curate(folder / "validate", golden, spec.task, spec.curate, spec.train.learning_rate, folder / "curate")
    (folder / _DONE).write_text(json.dumps({"golden": golden.digest}), encoding="utf-8")
