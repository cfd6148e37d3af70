"""A toy task that a tiny model learns in seconds: which team a ticket goes to, told by a few key words."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tasks.contracts.spec import (
    CurateSpec,
    DataSpec,
    EvaluateSpec,
    ExecutionSpec,
    GoldenSpec,
    Guard,
    RetrainSpec,
    TaskKind,
    TaskSpec,
    TrainSpec,
)
from tasks.data.golden import freeze
from tests.tiny import make_tiny_model

LABELS = ("billing", "support")
_KEYS = {
    "billing": ("invoice", "refund", "charge", "payment"),
    "support": ("crash", "login", "screen", "update"),
}
_FILLERS = [
    "please",
    "today",
    "again",
    "my",
    "your",
    "the",
    "our",
    "new",
    "old",
    "first",
    "last",
    "red",
    "blue",
    "green",
    "north",
    "south",
    "east",
    "west",
    "early",
    "late",
    "left",
    "right",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "paper",
    "table",
    "window",
    "garden",
    "river",
    "winter",
    "summer",
    "copper",
    "silver",
]


def toy_rows(count: int, *, seed: int, prefix: str = "t") -> list[dict[str, str]]:
    """Rows with id, text and label; the label follows from the key words, the rest is noise."""
    draw = random.Random(seed)
    rows = []
    for index in range(count):
        label = LABELS[index % len(LABELS)]
        words = draw.sample(_FILLERS, 5)
        for key in draw.sample(_KEYS[label], 3):
            words.insert(draw.randrange(len(words) + 1), key)
        rows.append({"id": f"{prefix}{index:04d}", "text": " ".join(words), "label": label})
    return rows


def vocabulary() -> list[str]:
    """Texts from which a tokenizer learns every word of the task as one token."""
    words = [*_FILLERS, *(key for keys in _KEYS.values() for key in keys), *LABELS]
    return [f"{word} {word}" for word in words for _ in range(3)] + ["Which team? Answer with exactly one of: ,"] * 3


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def toy_risks(*guards: Guard) -> dict[Guard, str]:
    """What practice says against so small a task, accepted."""
    return dict.fromkeys(guards, "a toy task with a model of two layers")


def toy_spec(
    folder: Path, rows: list[dict[str, Any]], *, items: int = 80, slice_field: str | None = None, **changes: Any
) -> RetrainSpec:
    """A training on toy rows with a tiny model, its golden set frozen, all below a folder.

    Args:
        folder: has the rows, the golden set, the model and, unless `changes` has another `execution`, the store.
        rows: the data.
        items: of the golden set.
        slice_field: a field of the rows by which results are told apart.
        changes: other fields of the spec, in place of a recipe by which the task is learnt in seconds.
    """
    fields: dict[str, Any] = {
        "name": "tickets",
        "task": TaskSpec(kind=TaskKind.CLASSIFY, instruction="Which team?", labels=LABELS),
        "data": DataSpec(source=str(write_jsonl(folder / "rows.jsonl", rows)), slice_field=slice_field),
        "golden": GoldenSpec(path=str(folder / "golden"), items=items),
        "base_model": str(make_tiny_model(folder / "base", vocabulary())),
        "curate": CurateSpec(accept_risks=toy_risks(Guard.FEW_ROWS, Guard.LEARNING_RATE)),
        "train": TrainSpec(epochs=6, learning_rate=5e-3, batch_size=16, max_tokens=128, evaluations=2),
        "evaluate": EvaluateSpec(max_new_tokens=8, batch_size=40),
        "execution": ExecutionSpec(store=str(folder / "store"), tracking_uri=f"sqlite:///{folder}/mlflow.db"),
    }
    spec = RetrainSpec(**(fields | changes))
    freeze(spec)
    return spec
