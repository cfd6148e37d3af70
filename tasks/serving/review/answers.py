"""One way to write an answer, so that what two people, or a person and a model, say can be compared."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import NamedTuple

from tasks.contracts.calls import read_answer, read_tool_calls, write_calls
from tasks.contracts.rows import canonical_json
from tasks.contracts.spec import TaskKind, TaskSpec


class Answer(NamedTuple):
    """An answer as a row's target has it.

    Attributes:
        text: it; as it was written, where it is none of this task.
        problem: why it is none of this task; None where it is one.
    """

    text: str
    problem: str | None = None


def read_said(text: str, task: TaskSpec) -> Answer:
    """Read what was said to a task: a label of its own, JSON in its one form, calls of tools in theirs, or words."""
    stripped = text.strip()
    match task.kind:
        case TaskKind.CLASSIFY:
            return Answer(stripped, None if stripped in task.labels else f"{_short(stripped)} is no label of the task")
        case TaskKind.EXTRACT:
            try:
                return Answer(canonical_json(json.loads(stripped)))
            except (ValueError, RecursionError):
                return Answer(stripped, f"{_short(stripped)} is not JSON")
        case TaskKind.CALL:
            with suppress(ValueError, TypeError, RecursionError):  # as the protocol has them, with ids
                calls = json.loads(stripped)
                if calls and all("function" in call for call in calls):
                    return Answer(write_calls(read_tool_calls(calls)))
            reading = read_answer(stripped)
            if reading.problem is not None:
                return Answer(stripped, f"{_short(stripped)} is no call of a tool: {reading.problem}")
            return Answer(reading.answer if reading.calls else stripped, None if stripped else "it is empty")
        case TaskKind.CHAT:
            return Answer(stripped, None if stripped else "it is empty")


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}…")
