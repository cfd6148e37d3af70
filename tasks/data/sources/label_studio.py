"""Label Studio's exports: JSON (a list of tasks with their annotations) and JSON-MIN (a list of flat annotations).

The answer to a task is what most of its annotators say, if enough of them do; a task without such an answer is
unusable, with the votes as the reason. See https://labelstud.io/guide/export for the two formats.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from tasks.contracts.errors import DataError
from tasks.contracts.spec import DataSpec, TaskKind
from tasks.data.sources import record
from tasks.data.sources.opening import HashedReader, Part, decompressed, open_seekable
from tasks.data.sources.record import Columns, Record, name_value, say_counts
from tasks.data.sources.text import not_utf8, too_long

_BLOCK = 2**16
# A value that the end of the block cut off fails within this many characters of it (a literal, an escape, a number).
_CUT_OFF = 16
_NO_ANSWER = "no answer"
_VALUES = {"choices": "choices", "textarea": "text"}  # where a control of that type keeps its answers
_SPACE = re.compile(r"[ \t\r\n]*")


class Item(NamedTuple):
    """A value of a JSON list, and the line that it begins in."""

    value: Any
    line: int


def is_export(item: Any) -> bool:
    """Whether an item of a JSON list is one of an export by Label Studio: a task, or an annotation of JSON-MIN."""
    return isinstance(item, dict) and (_is_task(item) or "annotation_id" in item)


def read_label_studio(
    part: Part, data: DataSpec, kind: TaskKind, columns: Columns, digests: dict[str, str]
) -> Iterator[tuple[Record, int]]:
    """Records, one a task, numbered through; each with how many bytes of the part are read.

    The columns of a record are the fields of the task's `data`, what else the task says in plain values (`created_at`),
    `id`, and the answer under `data.target_field`. A part is read twice: for the controls of its annotations, and for
    the rows.

    Raises:
        DataError: it cannot be read, is no JSON list, or nothing says which control of the annotations has the answer.
    """
    if data.messages_field is not None:
        raise DataError(
            "The answers of a Label Studio export are in its annotations, not in the last turn of `messages_field`.",
            where="data.messages_field",
            fix="leave it out, and name the field with the messages in `data.text_field`",
        )
    with open_seekable(part, digests) as file:
        # A reader around the file closes it when it goes; one around the HashedReader leaves it open.
        controls = _scan_controls(decompressed(HashedReader(file), part), part.shown)
        control = _choose_control(controls, data, kind, part.shown)
        file.seek(0)
        raw = HashedReader(file)
        number = 0
        entries: list[Any] = []
        position = 0
        for item in read_list(decompressed(raw, part), part.shown):
            if not isinstance(item.value, dict):
                raise DataError(
                    f"An item of the export is {name_value(item.value)}, not an object.",
                    where=f"{part.shown}:{item.line}",
                    fix="export the project again, as JSON or JSON-MIN",
                )
            if entries and not _same_task(entries[0], item.value, str(data.text_field)):
                yield _to_record(entries, number - len(entries) + 1, control, data, columns), position
                entries = []
            number += 1
            entries.append(item.value)
            position = raw.position
        if entries:
            yield _to_record(entries, number - len(entries) + 1, control, data, columns), position


# -- from tasks to answers ----------------------------------------------------------------------------------------


def _is_task(item: dict[str, Any]) -> bool:
    return isinstance(item.get("data"), dict) and isinstance(item.get("annotations"), list)


def _same_task(one: dict[str, Any], other: dict[str, Any], text_field: str) -> bool:
    """Whether two neighbours of JSON-MIN, which has an item an annotation, are of the same task."""
    if _is_task(one) or _is_task(other) or one.get("id") is None:
        return False
    return all(one.get(name) == other.get(name) for name in ("id", text_field))


def _scan_controls(stream: io.BufferedReader, shown: str) -> dict[str, str]:
    """The controls (`from_name`) that annotators answered with, each with its type."""
    found: dict[str, str] = {}
    for item in read_list(stream, shown):
        if isinstance(item.value, dict) and _is_task(item.value):
            for annotation in item.value["annotations"]:
                for result in _results(annotation):
                    if isinstance(result.get("from_name"), str):
                        found[result["from_name"]] = str(result.get("type"))
    return found


def _choose_control(controls: dict[str, str], data: DataSpec, kind: TaskKind, shown: str) -> str | None:
    """The control whose answers are the targets; None where nobody answered with any."""
    wanted = "choices" if kind is TaskKind.CLASSIFY else "textarea"
    if controls.get(str(data.target_field)) in ("choices", "textarea"):
        return data.target_field
    fitting = sorted(name for name, kind_of in controls.items() if kind_of == wanted)
    if len(fitting) == 1:
        return fitting[0]
    if not controls:
        return None
    listed = ", ".join(f"{name} ({kind_of})" for name, kind_of in sorted(controls.items()))
    raise DataError(
        f"{'No control' if not fitting else 'More than one control'} of the annotations has the type {wanted}, and "
        f"`data.target_field` ({data.target_field}) names none of them. There are: {listed}.",
        where=shown,
        fix="set `data.target_field` to the control (choices or textarea) that has the answer",
    )


def _to_record(
    entries: list[dict[str, Any]], number: int, control: str | None, data: DataSpec, columns: Columns
) -> Record:
    """The record of one task: a task of JSON, or all its annotations of JSON-MIN."""
    first = entries[0]
    target = str(data.target_field)
    reason: str | None = None
    if _is_task(first):
        plain = {name: value for name, value in first.items() if not isinstance(value, dict | list)}
        values = plain | first["data"] | ({"id": first["id"]} if "id" in first else {})
        counted, skipped = _counted(first["annotations"])
        votes = [_vote(annotation, control) for annotation in counted]
        reason = f"annotators skipped it: {skipped} of them" if skipped else "nobody has annotated it"
    else:
        values = dict(first)
        # Where no entry has the column it is missing, as it would be in any other format.
        asked = any(target in entry for entry in entries)
        votes = [tuple(dict.fromkeys(_answers(entry.get(target)))) for entry in _counted(entries)[0]] if asked else []
    if votes:
        values[target], reason = _decide(votes, data.min_agreement)
    columns.see((values | {target: None} if reason else values).keys())
    return Record(number, values, (reason,) if reason else (), first if len(entries) == 1 else entries)


def _counted(annotations: list[Any]) -> tuple[list[dict[str, Any]], int]:
    """The annotations that count, the newest of each annotator; and how many were skipped."""
    newest: dict[Any, dict[str, Any]] = {}
    skipped = 0
    for place, annotation in enumerate(annotations):
        if not isinstance(annotation, dict):
            continue
        if annotation.get("was_cancelled"):
            skipped += 1
            continue
        who = annotation.get("completed_by", annotation.get("annotator"))
        key = who.get("id") if isinstance(who, dict) else who
        key = ("nobody", place) if key is None or isinstance(key, list | dict) else key
        if key not in newest or _written_at(annotation) >= _written_at(newest[key]):
            newest[key] = annotation
    return list(newest.values()), skipped


def _written_at(annotation: dict[str, Any]) -> str:
    return str(annotation.get("updated_at") or annotation.get("created_at") or "")


def _results(annotation: Any) -> list[dict[str, Any]]:
    results = annotation.get("result") if isinstance(annotation, dict) else None
    return [result for result in results if isinstance(result, dict)] if isinstance(results, list) else []


def _vote(annotation: dict[str, Any], control: str | None) -> tuple[str, ...]:
    """All that an annotation answers with in a control, each once."""
    said: list[str] = []
    for result in _results(annotation):
        if result.get("from_name") == control and isinstance(result.get("value"), dict):
            said += _answers(result["value"].get(_VALUES.get(str(result.get("type")), "")))
    return tuple(dict.fromkeys(said))


def _answers(value: Any) -> list[str]:
    """The answers of a control, written as one text, as a list, or (in JSON-MIN) as a list under `choices`."""
    if isinstance(value, dict):
        value = value.get("choices")
    return [str(each) for each in (value if isinstance(value, list) else [value]) if each is not None]


def _decide(votes: list[tuple[str, ...]], least: float) -> tuple[str | None, str | None]:
    """What the annotators say together, or why they say nothing."""
    for vote in votes:
        if len(vote) > 1:
            return None, f"an annotator gave several answers, a row has one: {', '.join(sorted(vote))}"
    counts = Counter(vote[0] if vote else _NO_ANSWER for vote in votes)
    answered = Counter(vote[0] for vote in votes if vote)
    if not answered:
        return None, "annotators gave no answer"
    ranked = sorted(answered.items(), key=lambda item: (-item[1], item[0]))
    answer, most = ranked[0]
    share = most / len(votes)
    shown = say_counts(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
    if len(ranked) > 1 and ranked[1][1] == most:
        return None, f"annotators disagree: {shown} (a tie)"
    if share < least:
        return None, f"annotators disagree: {shown} (agreement {share:.2f}, at least {least:.2f} is needed)"
    return answer, None


# -- a JSON list, item by item ------------------------------------------------------------------------------------


def read_list(stream: io.BufferedReader, shown: str) -> Iterator[Item]:
    """The objects and lists of a JSON list, without ever holding more than one and a block.

    Raises:
        DataError: it is not UTF-8, no JSON list, cut short, or an item is longer than `record.MAX_ROW_BYTES`.
    """
    text = _Text(stream, shown)
    text.expect("[")
    if text.peek() == "]":
        text.expect("]")
    else:
        while True:
            text.peek()
            line = text.line
            yield Item(text.value(), line)
            if text.peek() == "]":
                text.expect("]")
                break
            text.expect(",")
    if text.peek():
        raise text.error("something follows the end of the list")


class _Text:
    """The text of a JSON file, as far as it is needed at a time."""

    def __init__(self, stream: io.BufferedReader, shown: str) -> None:
        self._stream = stream
        self._shown = shown
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder()
        self._held = ""
        self._at = 0
        self._ended = False
        self.line = 1
        self._read = 0

    def peek(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            found = _SPACE.match(self._held, self._at)
            self._advance(found.end() if found else self._at)
            if self._at < len(self._held):
                return self._held[self._at]
            if not self._more():
                return ""

    def expect(self, character: str) -> None:
        """Step over this character."""
        found = self.peek()
        if found != character:
            raise self.error(f"{character} is expected, " + (f"and {found} found" if found else "and the file ends"))
        self._advance(self._at + 1)

    def value(self) -> Any:
        """Step over the next value, and return it."""
        if self.peek() not in ("{", "["):  # only these say where they end
            raise self.error("an object is expected")
        while True:
            try:
                found, end = self._json.raw_decode(self._held, self._at)
            except json.JSONDecodeError as error:
                unfinished = error.msg.startswith("Unterminated") or len(self._held[error.pos :].strip()) <= _CUT_OFF
                if not unfinished or not self._more():
                    raise self.error(str(error.msg), error.pos) from error
            except (ValueError, RecursionError) as error:
                raise self.error(str(error)) from error
            else:
                self._advance(end)
                return found

    def error(self, what: str, at: int | None = None) -> DataError:
        """The error of a file that is no whole JSON list."""
        line = self.line + self._held.count("\n", self._at, at) if at is not None else self.line
        return DataError(
            f"The file is no whole JSON list: {what}.",
            where=f"{self._shown}:{line}",
            fix="export it again; it is cut short, changed by hand, or no list of tasks",
        )

    def _advance(self, end: int) -> None:
        self.line += self._held.count("\n", self._at, end)
        self._at = end

    def _more(self) -> bool:
        """Hold more of the file; twice as much of an item that does not end, so that it is not tried too often."""
        if self._ended:
            return False
        unread = len(self._held) - self._at
        if unread > record.MAX_ROW_BYTES:
            raise too_long("task", f"{self._shown}:{self.line}")
        block = self._stream.read(max(_BLOCK, unread))
        self._ended = not block
        try:
            text = self._decoder.decode(block, final=self._ended)
        except UnicodeDecodeError as error:
            line = self.line + self._held.count("\n", self._at) + error.object.count(b"\n", 0, error.start)
            place = f"byte {self._read - (len(error.object) - len(block)) + error.start + 1} of the file"
            raise not_utf8(error.object[error.start], place, f"{self._shown}:{line}") from error
        self._read += len(block)
        self._held = self._held[self._at :] + text
        self._at = 0
        return bool(text) or not self._ended
