"""What a rewritten answer has to pass before it may stand in place of the original."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tasks.contracts.rows import Row, canonical_json
from tasks.contracts.spec import TaskKind, TaskSpec
from tasks.data.facts import schema_check
from tasks.data.similar import normalise
from tasks.data.synthesis.filters import Refusal, find_object, word_f1
from tasks.data.synthesis.grounding import new_number, ungrounded
from tasks.data.synthesis.prompts import no_teacher

SHORT = 200  # characters that are let through however short the original was
# The filters, in the order in which a rewriting passes them; each is also the code of its refusals.
FILTERS = ("schema", "talk", "echo", "too_long", "label_changed", "value_changed", "not_in_text", "new_number")
TOO_MANY_TOKENS = "too_many_tokens"  # asked last, since it needs the tokenizer

_THOUGHTS = re.compile(r"^\s*<think>.*?</think>", re.DOTALL)
# A teacher that declines, speaks of itself, or announces what it is about to write.
_TALK = re.compile(
    r"^\W*(i['’]?m|i am) ((so|very|really|truly) )?(sorry|afraid|unable|not able)\b"
    r"|^\W*(sorry|apologies|unfortunately)\b[^.]{0,40}\b(i|we) (can['’]?t|cannot|can not|am|are)\b"
    r"|^\W*i (can['’]?t|cannot|can not|won['’]?t|will not) "
    r"(help|assist|comply|provide|answer|rewrite|fulfil|do|continue)"
    r"|\bas an? (ai|artificial intelligence|(large )?language model)\b"
    r"|^\W*((sure|certainly|of course|okay|ok)\b.{0,60})?\bhere('s| is| are)\b.{0,40}\b(rewrit|revis|improved|answer\b)"
    r"|^\W*(rewritten|revised|improved) (answer|version)\b",
    re.IGNORECASE,
)


class Judge:
    """Reads rewritten answers and says which may be used, for one task."""

    def __init__(
        self,
        task: TaskSpec,
        *,
        relabel: bool,
        max_growth: float,
        too_many_tokens: Callable[[Row, str], int | None] = lambda row, target: None,
    ) -> None:
        """Prepare.

        Args:
            task: the narrow task.
            relabel: whether an answer may say something else than the original.
            max_growth: longest rewriting, in multiples of the original's characters.
            too_many_tokens: how many tokens a row has with this answer, if they are more than training takes.

        Raises:
            SpecError: the task's JSON Schema cannot be used.
        """
        self._task = task
        self._relabel = relabel
        self._max_growth = max_growth
        self._too_many = too_many_tokens
        self._problem = schema_check(task)

    def judge(self, row: Row, content: str, finish: str) -> str | Refusal:
        """The target that a teacher's answer gives, or why it gives none.

        Args:
            row: the row with its original answer.
            content: what the teacher wrote.
            finish: why it ended, as the server says.
        """
        target = self._read(content, finish)
        if isinstance(target, Refusal):
            return target
        if target == row.target.strip():
            return row.target
        return self._objection(row, target) or target

    def _read(self, content: str, finish: str) -> str | Refusal:
        value, _ = find_object(content)
        if value is None and finish == "length":
            return _refusal("schema", "it was cut off at `teacher.max_tokens`")
        match self._task.kind:
            case TaskKind.EXTRACT:
                if value is None:
                    return _refusal("schema", "it holds no JSON object")
                try:
                    target = canonical_json(value)
                except ValueError:
                    return _refusal("schema", "it holds NaN or Infinity, which JSON does not have")
                problem = self._problem(target)
                if problem is not None:
                    return _refusal("schema", problem)
            case TaskKind.CLASSIFY | TaskKind.CHAT:
                found = _THOUGHTS.sub("", content) if value is None else value.get("answer")
                if not isinstance(found, str) or not found.strip():
                    return _refusal("schema", "it holds no answer")
                target = found.strip()
                if self._task.labels and target not in self._task.labels:
                    return _refusal("schema", f"{target[:SHORT]!r} is none of the labels")
            case TaskKind.CALL:
                raise no_teacher()
        try:
            target.encode()
        except UnicodeEncodeError:
            return _refusal("schema", "half a surrogate pair, which UTF-8 cannot write")
        return target

    def _objection(self, row: Row, target: str) -> Refusal | None:
        kind, original = self._task.kind, row.target
        if kind is TaskKind.CHAT and _TALK.search(target) and not _TALK.search(original):
            return _refusal("talk", "the teacher declines, or speaks of what it does, where an answer should be")
        if kind is TaskKind.CHAT and normalise(target) == normalise(row.text):
            return _refusal("echo", "it repeats the input")
        longest = max(SHORT, round(self._max_growth * len(original)))
        if len(target) > longest:
            return _refusal("too_long", f"it has {len(target):,} characters, more than {longest:,}")
        match kind:
            case TaskKind.CLASSIFY if not self._relabel:
                return _refusal("label_changed", f"it says {target!r}, the row {original!r}")
            case TaskKind.EXTRACT if not self._relabel:
                different = _first_other_value(json.loads(original), json.loads(target), "$")
                if different is not None:
                    return _refusal("value_changed", different)
            case TaskKind.EXTRACT:
                problem = ungrounded(target, row.text, self._task.json_schema or {})
                if problem is not None:
                    return _refusal("not_in_text", problem)
            case TaskKind.CHAT:
                # A number from nowhere is the plainest way in which a better form says something else.
                number = new_number(target, f"{row.text}\n{original}")
                if number is not None:
                    return _refusal("new_number", f"it says {number}, a number that neither input nor original has")
        tokens = self._too_many(row, target)
        if tokens is not None:
            return _refusal(TOO_MANY_TOKENS, f"with it the row has {tokens:,} tokens, more than `train.max_tokens`")
        return None


class Choice(NamedTuple):
    """The rewriting that is taken, and how many of those that passed agree with it, itself included."""

    target: str
    agreeing: int


def choose(passed: Sequence[str], task: TaskSpec) -> Choice:
    """The rewriting that the others agree with most: by word F1 for chat, by being equal else; of equals the first.

    Minimum Bayes risk over the samples (Kumar & Byrne, N04-1022), which for equality is the majority vote of
    self-consistency (arXiv:2203.11171).
    """
    alike: Callable[[str, str], float] = word_f1 if task.kind is TaskKind.CHAT else lambda one, other: one == other
    scores = [sum(alike(one, other) for other in passed) for one in passed]
    best = max(range(len(passed)), key=lambda place: (scores[place], -place))
    return Choice(passed[best], sum(one == passed[best] for one in passed))


def _first_other_value(before: Any, after: Any, path: str) -> str | None:
    """The first value that is another one, in words. Case, blanks and the way a number is written do not count."""
    if isinstance(before, dict) and isinstance(after, dict):
        if before.keys() != after.keys():
            return f"{path} has the fields {', '.join(sorted(after))}, the original {', '.join(sorted(before))}"
        pairs = [(before[name], after[name], f"{path}.{name}") for name in sorted(before)]
    elif isinstance(before, list) and isinstance(after, list):
        if len(before) != len(after):
            return f"{path} has {len(after):,} values, the original {len(before):,}"
        pairs = [(one, other, f"{path}[{at}]") for at, (one, other) in enumerate(zip(before, after, strict=True))]
    else:
        if isinstance(before, str) and isinstance(after, str):
            same = normalise(before) == normalise(after)
        else:
            same = before == after and isinstance(before, bool) == isinstance(after, bool)
        return None if same else f"{path} is {after!r}, in the original {before!r}"[: 2 * SHORT]
    return next((found for one, other, at in pairs if (found := _first_other_value(one, other, at)) is not None), None)


def _refusal(reason: str, detail: str) -> Refusal:
    return Refusal(reason, detail, "")
