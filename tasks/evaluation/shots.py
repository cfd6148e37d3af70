"""Worked examples for the base model's few-shot prompt, from the training split. Deterministic."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from hashlib import sha256

from tasks.contracts.calls import name_tools
from tasks.contracts.prompt import Shot
from tasks.contracts.rows import Row
from tasks.contracts.spec import TaskKind, TaskSpec

_USUAL_SHORT = 0.25  # quantile of length that examples are taken near: typical texts, and yet a small prompt


def choose_shots(rows: Sequence[Row], task: TaskSpec, count: int) -> tuple[Shot, ...]:
    """At most `count` examples, spread evenly over the answers there are.

    classify: one label after the other. extract: one kind of answer (which fields are null, text or number) after the
    other, with texts of different shapes. chat: any. call: one choice of tools after the other, words being one too.
    Rows of several turns are no examples.

    Args:
        rows: the training split.
        task: what is asked.
        count: how many examples; fewer come back only when there are fewer rows.
    """
    usable = [row for row in rows if len(row.messages) == 1 and row.messages[0].role == "user"]
    match task.kind:
        case TaskKind.CLASSIFY:
            groups = [[row for row in usable if row.target == label] for label in task.labels]
        case TaskKind.EXTRACT:
            groups = _grouped(usable, lambda row: _answer_kind(row.target))
        case TaskKind.CHAT:
            groups = [usable]
        case TaskKind.CALL:
            groups = _grouped(usable, lambda row: name_tools(row.target))
    queues = [_typical_first(group) for group in groups if group]
    chosen: list[Row] = []
    shapes: set[str] = set()
    while len(chosen) < count and any(queues):
        for queue in queues:
            if queue and len(chosen) < count:
                new = next((row for row in queue if _shape(row.text) not in shapes), queue[0])
                queue.remove(new)
                shapes.add(_shape(new.text))
                chosen.append(new)
    return tuple(Shot(user=row.text, assistant=row.target) for row in chosen)


def _typical_first(rows: Sequence[Row]) -> list[Row]:
    """Nearest to the lower quartile of length first; ties by a hash of the id, so that file order plays no part."""
    lengths = sorted(len(row.text) for row in rows)
    usual = lengths[int(_USUAL_SHORT * (len(lengths) - 1))]
    return sorted(rows, key=lambda row: (abs(len(row.text) - usual), sha256(row.id.encode()).hexdigest()))


def _grouped(rows: Sequence[Row], key: Callable[[Row], str]) -> list[list[Row]]:
    """Rows by key, the largest group first."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return [groups[name] for name in sorted(groups, key=lambda name: (-len(groups[name]), name))]


def _answer_kind(target: str) -> str:
    """Which fields an answer has and of which kind each is: `amount:float currency:str`."""
    value = json.loads(target)
    if not isinstance(value, dict):
        return type(value).__name__
    return " ".join(f"{name}:{type(value[name]).__name__}" for name in sorted(value))


def _shape(text: str) -> str:
    """What a text looks like: each run of digits is 9, of letters a ("1,299.00 USD" -> "9,9.9 a")."""
    return re.sub(r"[^\W\d_]+", "a", re.sub(r"\d+", "9", text))
