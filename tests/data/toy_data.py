"""Toy rows and tasks for the tests of this room."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tasks.contracts.spec import TaskKind, TaskSpec

LABELS = ("billing", "support")
SCHEMA = {
    "type": "object",
    "properties": {"amount": {"type": "number"}},
    "required": ["amount"],
    "additionalProperties": False,
}
CLASSIFY = TaskSpec(kind=TaskKind.CLASSIFY, instruction="Which team?", labels=LABELS)
EXTRACT = TaskSpec(kind=TaskKind.EXTRACT, instruction="Write JSON.", json_schema=SCHEMA)
CHAT = TaskSpec(kind=TaskKind.CHAT, instruction="Answer.")


def sentence(draw: random.Random, words: int = 20) -> str:
    """Random words; two sentences have next to no 3-shingle in common."""
    return " ".join(f"w{draw.randrange(100_000)}" for _ in range(words))


def rows(count: int, seed: int = 1, labels: Sequence[str] = LABELS) -> list[dict[str, Any]]:
    """Rows that all differ, labels in turn."""
    draw = random.Random(seed)
    return [{"id": f"r{n:04d}", "text": sentence(draw), "label": labels[n % len(labels)]} for n in range(count)]


def write_lines(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
