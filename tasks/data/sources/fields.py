"""From a record to a row: which fields are the conversation, the answer, and what else is known of the row.

What cannot be used is said as a reason, every one of a row; the words before its first colon are the same for all rows
with the same fault, so that they can be counted.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable
from datetime import UTC, date, datetime
from typing import Any, cast, get_args

from tasks.contracts.calls import read_answer, read_tool_calls, write_calls
from tasks.contracts.rows import Call, Message, Role, Row, canonical_json
from tasks.contracts.spec import DataSpec, TaskKind
from tasks.data.sources.record import SYNTHETIC, Record, is_deep, name_value

_ROLES = frozenset(get_args(Role))
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_EPOCH = re.compile(r"-?[0-9]{9,}(\.[0-9]+)?")  # shorter ones are dates such as 20260131
_LONGEST_SHOWN = 40


class _UnusableError(Exception):
    """Why a field cannot be used."""


class RowMaker:
    """Makes rows from records, by the columns that a spec names."""

    def __init__(self, data: DataSpec, kind: TaskKind) -> None:
        self._data = data
        self._kind = kind
        columns: list[tuple[str, str | None, Callable[[Any, str], Any]]] = [
            ("group", data.group_field, _read_name),
            ("slice", data.slice_field, _read_name),
            ("label", data.label_field, _read_name),
            ("source", data.source_field, _read_name),
            ("time", data.time_field, _read_time),
            ("weight", data.weight_field, _read_weight),
            (SYNTHETIC, SYNTHETIC, _read_mark),
        ]
        self._extras = [(name, column, read) for name, column, read in columns if column is not None]

    def make(self, record: Record, part: str | None) -> tuple[Row | None, list[str]]:
        """The row, or None and every reason why there is none.

        `part` is the row's source where no column says it.
        """
        values = record.values
        reasons = list(record.reasons)
        messages: tuple[Message, ...] | None = None
        target: str | None = None
        if not reasons:  # else the adapter has said what is wrong with the answer
            messages, target = self._read_turns(values, reasons)
        extras: dict[str, Any] = {}
        for name, column, read in self._extras:
            value = values.get(column)
            if value is not None and value != "":
                try:
                    extras[name] = read(value, column)
                except _UnusableError as why:
                    reasons.append(str(why))
        row_id = None
        try:
            row_id = self._read_id(values)
        except _UnusableError as why:
            reasons.append(str(why))
        if reasons or messages is None or target is None:
            return None, reasons
        if row_id is None:
            content = [[message.as_chat() for message in messages], target, extras.get("group"), extras.get("slice")]
            row_id = _content_id(json.dumps(content, ensure_ascii=False))
        if part is not None:
            extras.setdefault("source", part)
        return Row(row_id, record.line, messages, target, **extras), []

    def name_unusable(self, record: Record) -> str:
        """The id of a record that gives no row."""
        try:
            row_id = self._read_id(record.values)
        except _UnusableError:
            row_id = None
        try:
            content = json.dumps(record.values, sort_keys=True, default=str)
        except RecursionError:  # of a row that is nested so deep its place has to do
            content = str(record.line)
        return row_id or _content_id(content)

    def _read_id(self, values: dict[str, Any]) -> str | None:
        column = self._data.id_field
        value = None if column is None else values.get(column)
        return None if value is None or value == "" else _read_name(value, str(column))

    def _read_turns(self, values: dict[str, Any], reasons: list[str]) -> tuple[tuple[Message, ...] | None, str | None]:
        """What is shown and the answer; the reasons are added to where one of them cannot be used."""
        data, kind = self._data, self._kind
        messages: tuple[Message, ...] | None = None
        target: str | None = None
        if data.messages_field is not None:
            try:
                messages, answer = _split_conversation(_present(values, data.messages_field), data.messages_field, kind)
                target = _read_answer(answer, kind, "the last assistant turn")
            except _UnusableError as why:
                reasons.append(str(why))
            return messages, target
        text_field, target_field = str(data.text_field), str(data.target_field)  # the spec refuses anything else
        conversational = False
        try:
            shown = _present(values, text_field)
            conversational = isinstance(shown, list)
            if conversational:
                messages = tuple(_read_messages(shown, text_field, kind))
                if not messages:
                    raise _UnusableError(f"{text_field} holds no turns")
            elif isinstance(shown, str):
                messages = (Message("user", _whole(shown, text_field)),)
            else:
                raise _UnusableError(f"{text_field} is {name_value(shown)}, not text")
        except _UnusableError as why:
            reasons.append(str(why))
        try:
            answer = _present(values, target_field)
            # A list is an answer of its own where answers are JSON, unless the input is a list of messages too.
            if _is_messages(answer) and (conversational or kind is not TaskKind.EXTRACT):
                answer = _read_completion(answer, target_field, kind)
            target = _read_answer(answer, kind, target_field)
        except _UnusableError as why:
            reasons.append(str(why))
        return messages, target


def _content_id(content: str) -> str:
    return "sha-" + hashlib.sha256(content.encode("utf-8")).hexdigest()[:16]


# -- text and answers ---------------------------------------------------------------------------------------------


def _present(values: dict[str, Any], field: str) -> Any:
    value = values.get(field)
    if value is None:
        raise _UnusableError(f"{field} is {'null' if field in values else 'missing'}")
    return value


def _whole(text: str, field: str) -> str:
    found = None if text.isascii() else _SURROGATE.search(text)
    if found:
        at = found.start() + 1
        raise _UnusableError(f"{field} holds half a surrogate pair at character {at}, which UTF-8 cannot write")
    return text


def _read_answer(value: Any, kind: TaskKind, field: str) -> str:
    if kind is TaskKind.EXTRACT:
        return _read_json(value, field)
    if kind is TaskKind.CALL:
        return _read_calls(value, field)
    if kind is TaskKind.CLASSIFY and isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # the same label whether a part holds it as number or as text
    if kind is TaskKind.CLASSIFY and isinstance(value, float):
        raise _UnusableError(f"{field} is a number with a fraction, labels are text or whole numbers: {value}")
    if not isinstance(value, str):
        raise _UnusableError(f"{field} is {name_value(value)}, not text")
    return _whole(value, field)


def _read_calls(value: Any, field: str) -> str:
    """Calls of tools in canonical form, from a list, one object, or a text as a model writes them; or words."""
    if isinstance(value, str):
        reading = read_answer(_whole(value, field))
        if reading.problem is not None:
            raise _UnusableError(f"{field} is no call of a tool: {reading.problem}")
        return reading.answer if reading.calls else value
    calls = [value] if isinstance(value, dict) else value
    if not isinstance(calls, list):
        raise _UnusableError(f"{field} is {name_value(value)}, neither text nor calls of tools")
    if not calls:
        raise _UnusableError(f"{field} is an empty list: where no tool is called, it has to say what is answered")
    return write_calls(_find_calls(calls, field))


def _find_calls(calls: list[Any], where: str) -> list[Call]:
    try:
        found = read_tool_calls(calls)
        if any(is_deep(json.loads(call.arguments), call.arguments) for call in found):
            raise RecursionError
    except RecursionError as error:
        raise _UnusableError(f"{where} is nested too deep") from error
    except UnicodeEncodeError as error:
        raise _UnusableError(f"{where} holds half a surrogate pair, which UTF-8 cannot write") from error
    except (ValueError, TypeError) as error:
        raise _UnusableError(f"{where} is no call of a tool: {error}") from error
    return found


def _read_json(value: Any, field: str) -> str:
    try:
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise _UnusableError(f"{field} is not valid JSON: {error}") from error
        text = canonical_json(value)
        if is_deep(value, text):
            raise RecursionError
        return _whole(text, field)
    except RecursionError as error:
        raise _UnusableError(f"{field} is nested too deep") from error
    except ValueError as error:
        raise _UnusableError(f"{field} holds NaN or Infinity, which JSON does not have") from error
    except TypeError as error:
        raise _UnusableError(f"{field} holds a value that JSON does not have: {error}") from error


# -- conversations ------------------------------------------------------------------------------------------------


def _split_conversation(turns: Any, field: str, kind: TaskKind) -> tuple[tuple[Message, ...], str]:
    """The turns before the last assistant turn, and that turn."""
    if isinstance(turns, str):  # CSV has no lists
        try:
            turns = json.loads(turns)
        except (ValueError, RecursionError) as error:
            raise _UnusableError(f"{field} is not valid JSON: {error}") from error
    if not isinstance(turns, list):
        raise _UnusableError(f"{field} is {name_value(turns)}, not a list of turns")
    messages = _read_messages(turns, field, kind)
    if not messages or messages[-1].role != "assistant":
        raise _UnusableError(f"{field} does not end with an assistant turn, so there is no answer to learn")
    if len(messages) == 1:
        raise _UnusableError(f"{field} has no turn before the answer")
    return tuple(messages[:-1]), _answer_of(messages[-1], f"{field}: turn {len(messages)}")


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) and "role" in turn for turn in value)


def _read_completion(turns: list[Any], field: str, kind: TaskKind) -> str:
    """The answer of a completion in trl's conversational form: exactly one assistant message."""
    messages = _read_messages(turns, field, kind)
    if len(messages) != 1 or messages[0].role != "assistant":
        roles = ", ".join(message.role for message in messages)
        raise _UnusableError(f"{field} is not exactly one assistant message: {roles}")
    return _answer_of(messages[0], f"{field}: turn 1")


def _answer_of(turn: Message, where: str) -> str:
    """The answer that an assistant turn is: what it says, or what it calls."""
    if turn.calls and turn.content:
        raise _UnusableError(f"{where} has both text and tool calls, an answer is one of them")
    return write_calls(turn.calls) if turn.calls else turn.content


def _read_messages(turns: list[Any], field: str, kind: TaskKind) -> list[Message]:
    """The turns of a conversation. Calls of tools are calls where the task is to call; else the text of one."""
    messages: list[Message] = []
    ids: list[str | None] = []  # of the calls of the last assistant turn
    results: list[tuple[int, Message]] = []  # of these calls, each with the place of its call
    for number, turn in enumerate(turns, start=1):
        where = f"{field}: turn {number}"
        if not isinstance(turn, dict):
            raise _UnusableError(f"{where} is {name_value(turn)}, not an object with role and content")
        role: Any = turn.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            raise _UnusableError(f"{where} has the role {role!r}; there are {', '.join(sorted(_ROLES))}")
        content = turn.get("content")
        calls: tuple[Call, ...] = ()
        if turn.get("tool_calls") or turn.get("function_call"):
            if kind is TaskKind.CALL:
                calls = _read_turn_calls(turn, where)
                content = "" if content is None else content
            else:
                content = _read_tool_calls(turn, where)
        if not isinstance(content, str):
            raise _UnusableError(f"{field}: the content of turn {number} is {name_value(content)}, not text")
        message = Message(cast(Role, role), _whole(content, where), calls)
        if kind is TaskKind.CALL and role == "tool":
            place, message = _find_call_of(turn, message, messages, ids, len(results), where)
            results.append((place, message))
            # Results stand in the order of their calls, which is how they are found again without ids.
            results.sort(key=lambda result: result[0])
            messages[len(messages) - len(results) + 1 :] = [result for _, result in results]
            continue
        results = []
        ids = [_call_id(call) for call in turn["tool_calls"]] if calls else []
        messages.append(message)
    return messages


def _read_turn_calls(turn: dict[str, Any], where: str) -> tuple[Call, ...]:
    calls = turn.get("tool_calls")
    if turn["role"] != "assistant":
        raise _UnusableError(f"{where} has tool calls, but is no assistant turn")
    if not isinstance(calls, list):
        raise _UnusableError(f"{where} has tool calls that are no list")
    return tuple(_find_calls(calls, where))


def _call_id(call: dict[str, Any]) -> str | None:
    found = call.get("id")
    return found if isinstance(found, str) else None


def _find_call_of(
    turn: dict[str, Any], result: Message, before: list[Message], ids: list[str | None], number: int, where: str
) -> tuple[int, Message]:
    """The place of the call that a tool turn answers, by its id, else by its own place, and the turn with its name."""
    named, asked = turn.get("name"), turn.get("tool_call_id")
    place = number
    if asked is not None and any(ids):
        if asked not in ids:
            raise _UnusableError(f"{where} is the result of the call {asked!r}, which no turn before it makes")
        place = ids.index(asked)
    calls = next((message.calls for message in reversed(before) if message.role != "tool"), ())
    if not isinstance(named, str):
        named = calls[place].name if place < len(calls) else None
    return place, result._replace(name=named)


def _read_tool_calls(turn: dict[str, Any], where: str) -> str:
    """The tool calls of a turn as the text to write: a JSON list of `{"arguments", "name"}`.

    The ids of calls are left out: they are made up by whoever serves the model, and no model could learn them.
    """
    if turn["role"] != "assistant":
        raise _UnusableError(f"{where} has tool calls, but is no assistant turn")
    if turn.get("content"):
        raise _UnusableError(f"{where} has both text and tool calls, a turn here is one of them")
    calls = turn.get("tool_calls")
    if not isinstance(calls, list):
        raise _UnusableError(f"{where} has tool calls that are no list")
    found = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _UnusableError(f"{where} has a tool call without the name of a function")
        arguments = function.get("arguments")
        if isinstance(arguments, str):  # as the OpenAI protocol writes them
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError) as error:
                raise _UnusableError(f"{where} has a tool call whose arguments are not valid JSON: {error}") from error
        found.append({"name": function["name"], "arguments": {} if arguments is None else arguments})
    return _read_json(found, where)


# -- what else is known of a row ----------------------------------------------------------------------------------


def _read_name(value: Any, field: str) -> str:
    if isinstance(value, str):
        return _whole(value, field)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise _UnusableError(f"{field} is {name_value(value)}, not text or a whole number")


def _read_time(value: Any, field: str) -> str:
    """A time as UTC, always written with six digits after the seconds, so that text order is time order.

    Takes ISO 8601, `datetime`, `date` (its first moment), and seconds since 1970; without an offset it is UTC already.
    """
    try:
        if isinstance(value, str):
            moment = _parse_time(value.strip())
        elif isinstance(value, datetime):
            moment = value
        elif isinstance(value, date):
            moment = datetime(value.year, value.month, value.day, tzinfo=UTC)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            moment = datetime.fromtimestamp(value, UTC)
        else:
            raise _UnusableError(f"{field} is {name_value(value)}, not a time")
        moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError, OSError) as error:
        shown = str(value)[:_LONGEST_SHOWN]
        raise _UnusableError(f"{field} is no time in ISO 8601 or in seconds since 1970: {shown!r}") from error
    return moment.replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"


def _parse_time(text: str) -> datetime:
    return datetime.fromtimestamp(float(text), UTC) if _EPOCH.fullmatch(text) else datetime.fromisoformat(text)


def _read_weight(value: Any, field: str) -> float:
    if isinstance(value, str):
        try:
            weight = float(value)
        except ValueError as error:
            raise _UnusableError(f"{field} is no number: {value[:_LONGEST_SHOWN]!r}") from error
    elif isinstance(value, int | float) and not isinstance(value, bool):
        try:
            weight = float(value)
        except OverflowError:
            weight = math.inf
    else:
        raise _UnusableError(f"{field} is {name_value(value)}, not a number")
    if not (math.isfinite(weight) and weight > 0):
        raise _UnusableError(f"{field} is not above 0 and finite: {weight}")
    return weight


def _read_mark(value: Any, field: str) -> bool:
    said = value.strip().lower() if isinstance(value, str) else value
    if said is True or said == "true":
        return True
    if said is False or said == "false":
        return False
    shown = str(value)[:_LONGEST_SHOWN]
    raise _UnusableError(f"{field} is neither true nor false: {shown!r}")
