"""The facts of each row that expectations are about, worked out once, in several processes for many rows."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, best_match
from referencing import Registry

from tasks.contracts.calls import calls_check, calls_of, read_answer
from tasks.contracts.errors import SpecError
from tasks.contracts.rows import Call, Message, Row
from tasks.contracts.spec import DataSpec, PoisonPolicy, PrivatePolicy, TaskKind, TaskSpec
from tasks.data.draw import content_hash
from tasks.data.hidden import hidden_character, injection, template_tokens
from tasks.data.language import language_problem
from tasks.data.parallel import Lines
from tasks.data.private import Found, Scanner, build_scanner, describe, mask_json, mask_text, scan_json
from tasks.data.similar import normalise
from tasks.data.tokens import TokenCounter, TokenLimit

SHORT_VALUE = 200  # characters of a value in a reason; the whole record is in the quarantine anyway
_ROLES_AFTER = {
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
# What a text decoded with a wrong encoding has: the replacement character, and control characters other than
# tab, line feed and carriage return (0x80 to 0x9f are what WINDOWS-1252 punctuation becomes in ISO 8859-1).
_DAMAGE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd]")
# Great Expectations sees a column of nothing but nulls as one of its type.
COLUMNS = {
    "row": "int64", "unreadable": "string", "id": "string", "content": "string", "text_characters": "int64",
    "text_visible_characters": "int64", "target": "string", "target_visible_characters": "int64",
    "text_damage": "string", "target_damage": "string", "hidden": "string", "template_tokens": "string",
    "injection": "string", "schema_problem": "string", "role_problem": "string", "language_problem": "string",
    "tokens": "int64", "secret": "string", "personal_data": "string", "text_identity": "string",
}  # fmt: skip


@dataclass(frozen=True)
class RowChecks:
    """What is looked at in each row; picklable, and called in each process to make the function that looks.

    Attributes:
        task: kind and schema.
        data: languages, and what is done about private data.
        poisoning: whether answers are searched for injected instructions.
        tokens: the limit in tokens; None where no base model is known yet.
    """

    task: TaskSpec
    data: DataSpec
    poisoning: PoisonPolicy = PoisonPolicy.REPORT
    tokens: TokenLimit | None = None

    def __call__(self) -> Callable[[Lines], dict[str, list[Any]]]:
        """A function from lines of rows to their facts, one list a column."""
        facts = RowFacts(self)

        def read(batch: Lines) -> dict[str, list[Any]]:
            columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
            for index, line in enumerate(batch.lines, start=batch.first):
                for name, value in facts.of(index, Row.from_json(line)).items():
                    columns[name].append(value)
            return columns

        return read

    @property
    def masked(self) -> Scanner | None:
        """A scanner for what is to be masked; None for nothing."""
        secrets, personal = (policy is PrivatePolicy.MASK for policy in (self.data.secrets, self.data.personal_data))
        return build_scanner(secrets=secrets, personal=personal) if secrets or personal else None


class Private(NamedTuple):
    """What is private in a row, in words; None for nothing."""

    secret: str | None
    personal_data: str | None


class RowFacts:
    """Works out the facts of rows.

    Raises:
        SpecError: `task.json_schema` is no JSON Schema.
    """

    def __init__(self, checks: RowChecks) -> None:
        self._checks = checks
        self._schema_problem = schema_check(checks.task)
        self._counter = TokenCounter(checks.tokens) if checks.tokens is not None else None
        self._scan: Scanner | None = None
        secrets, personal = (
            policy is not PrivatePolicy.OFF for policy in (checks.data.secrets, checks.data.personal_data)
        )
        if secrets or personal:
            self._scan = build_scanner(secrets=secrets, personal=personal)

    def of(self, index: int, row: Row) -> dict[str, Any]:
        """Each of `COLUMNS`, null where a fact does not apply."""
        checks = self._checks
        contents = [message.text for message in row.messages]
        text = "\n".join(contents)
        identity = normalise(row.text)
        free = checks.task.kind is not TaskKind.CLASSIFY  # the answer is more than one of a few labels
        private = self._private(row, row.target if free else None)
        refused = self._counter.refusal(row) if self._counter is not None and checks.task.tools else None
        return {
            "row": index,
            "unreadable": None,
            "id": row.id,
            "content": content_hash(row)[:16],
            "text_characters": len(text),
            "text_visible_characters": len(row.messages[-1].content.strip()),
            "target": None if free else row.target,
            "target_visible_characters": len(row.target.strip()),
            "text_damage": _damage(text),
            "target_damage": _damage(row.target),
            "hidden": hidden_character(text) or (hidden_character(row.target) if free else None),
            "template_tokens": template_tokens(text),
            "injection": injection(row.target) if free and checks.poisoning is not PoisonPolicy.OFF else None,
            "schema_problem": self._schema_problem(row.target) or refused,
            "role_problem": _role_problem(row.messages),
            "language_problem": language_problem(row.text, checks.data.languages) if checks.data.languages else None,
            "tokens": self._counter.too_many(row) if self._counter is not None and refused is None else None,
            "secret": private.secret,
            "personal_data": private.personal_data,
            "text_identity": hashlib.sha256(identity.encode()).hexdigest()[:16],
        }

    def _private(self, row: Row, target: str | None) -> Private:
        if self._scan is None:
            return Private(None, None)
        found = [one for message in row.messages for one in self._scan(message.content)]
        found += [
            one for message in row.messages for call in message.calls for one in scan_json(call.arguments, self._scan)
        ]
        if target is not None:
            as_json = _is_json(target, self._checks.task)
            found += scan_json(target, self._scan) if as_json else self._scan(target)
        return Private(*(_described(found, group) for group in ("secret", "personal")))


def _described(found: list[Found], group: str) -> str | None:
    of_group = [one for one in found if one.group == group]
    return describe(of_group) if of_group else None


def masked_row(row: Row, task: TaskSpec, scan: Scanner) -> tuple[Row, list[Found]]:
    """The row with what the scanner finds masked, and what cannot be; labels are left as they are.

    A number, or a key, of an answer in JSON cannot be masked: it would fit the schema no longer.
    """
    messages = tuple([_masked_turn(message, scan) for message in row.messages])
    left = [one for message in messages for call in message.calls for one in scan_json(call.arguments, scan)]
    target = row.target
    if _is_json(target, task):
        target = mask_json(target, scan)
        left += scan_json(target, scan)
        if task.kind is TaskKind.CALL:  # masked arguments may stand in another order
            target = read_answer(target).answer
    elif task.kind is not TaskKind.CLASSIFY:
        target = mask_text(target, scan)
    return replace(row, messages=messages, target=target), left


def _masked_turn(message: Message, scan: Scanner) -> Message:
    calls = tuple(Call(call.name, mask_json(call.arguments, scan)) for call in message.calls)
    return message._replace(content=mask_text(message.content, scan), calls=calls)


def _is_json(target: str, task: TaskSpec) -> bool:
    """Whether an answer is JSON: always where it is to be, and where it calls tools."""
    return task.kind is TaskKind.EXTRACT or (task.kind is TaskKind.CALL and bool(calls_of(target)))


def facts_of(rows: Iterable[Row], checks: RowChecks) -> Iterator[dict[str, Any]]:
    """For each row the facts that `expectations.training_rows` describes, and `content` and `text_identity`.

    Raises:
        SpecError: `task.json_schema` is no JSON Schema.
    """
    facts = RowFacts(checks)
    for index, row in enumerate(rows):
        yield facts.of(index, row)


def unreadable_facts(index: int, entry: dict[str, Any]) -> dict[str, Any]:
    """The facts of a row that ingest could not use."""
    return dict.fromkeys(COLUMNS) | {
        "row": index,
        "unreadable": "; ".join(entry["reasons"])[:SHORT_VALUE],
        "id": entry["id"],
        "content": hashlib.sha256(json.dumps(entry["record"]).encode()).hexdigest()[:16],
    }


def _damage(text: str) -> str | None:
    found = _DAMAGE.search(text)
    if found is None:
        return None
    character = found.group()
    name = unicodedata.name(character, "a control character").lower()
    return f"{name} (U+{ord(character):04X}) at character {found.start() + 1}"


def _role_problem(messages: tuple[Message, ...]) -> str | None:
    """What is wrong with the order of turns before an answer; None when it is right."""
    previous = "system"
    for number, message in enumerate(messages, start=1):
        first = number == 1 and message.role == "system"
        if not first and message.role not in _ROLES_AFTER[previous]:
            before = f"after {previous}" if number > 1 else "at the start"
            return f"chat turn {number} is {message.role} {before}"
        previous = message.role
    if previous not in ("user", "tool"):
        return f"the chat turn before the answer is {previous}, not user"
    return None


def schema_check(task: TaskSpec) -> Callable[[str], str | None]:
    """A function from target to what is wrong with it by the task's JSON Schema, or its tools.

    None when it fits, or the task has neither.

    Raises:
        SpecError: `task.json_schema` is no JSON Schema.
    """
    if task.tools:
        fits = calls_check(task.tools)
        return lambda target: fits(calls_of(target))
    if task.json_schema is None:
        return lambda target: None
    try:
        Draft202012Validator.check_schema(task.json_schema)
    except SchemaError as error:
        raise SpecError(
            f"The JSON Schema is not valid: {error.message}.",
            where=f"task.json_schema, at {error.json_path}",
            fix="correct the schema (JSON Schema, draft 2020-12)",
        ) from error
    # An empty registry of its own, so that a `$ref` to an address is never fetched.
    validator = Draft202012Validator(task.json_schema, registry=Registry())

    def problem(target: str) -> str | None:
        try:
            value = json.loads(target)
        except ValueError as error:
            return f"no valid JSON: {error}"
        if validator.is_valid(value):
            return None
        worst = best_match(validator.iter_errors(value))
        return None if worst is None else f"{worst.message[:SHORT_VALUE]} (at {worst.json_path})"

    return problem
