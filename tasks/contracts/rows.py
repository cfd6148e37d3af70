"""The one shape that a row of data has after ingest, and how rows are kept on disk (JSON Lines, UTF-8)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import orjson

Role = Literal["system", "user", "assistant", "tool"]


class Message(NamedTuple):
    """One turn of a conversation."""

    role: Role
    content: str

    def as_chat(self) -> dict[str, str]:
        """The turn as chat templates and the OpenAI protocol write it."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True, slots=True)
class Row:
    """One example: the conversation up to the answer, and the answer that is wanted.

    Attributes:
        id: unique in its dataset; made from the content when the source has none.
        line: 1-based line (or row) of the source that it came from.
        messages: what the model is shown, without the task's instruction.
        target: the answer wanted, exactly as the model should write it (a label, canonical JSON, or text).
        group: rows that belong together (same document, same conversation) share it; None for none.
        slice: a named part of the data to report on; None for none.
        label: the class that a row is drawn and balanced by where that is not its target; None for none.
        source: where it came from (a file of a folder, an annotator, a teacher); None for a source of one file.
        time: when it was made, ISO 8601; None if that is not known. Text order is time order.
        weight: how much it counts in the training loss, relative to other rows; above 0.
        synthetic: whether a model wrote it. A row keeps this mark for ever.
    """

    id: str
    line: int
    messages: tuple[Message, ...]
    target: str
    group: str | None = None
    slice: str | None = None
    label: str | None = None
    source: str | None = None
    time: str | None = None
    weight: float = 1.0
    synthetic: bool = False

    @property
    def text(self) -> str:
        """What the model is shown, as one string: the last user turn, or all turns of a longer conversation."""
        if len(self.messages) == 1:
            return self.messages[0].content
        return "\n".join(f"{message.role}: {message.content}" for message in self.messages)

    def to_json(self) -> str:
        """One line of JSON, without the line break; keys in a fixed order, so that equal rows have equal bytes.

        Fields after `slice` are written only where they say something: files of before they existed keep their bytes.
        """
        record: dict[str, Any] = {
            "id": self.id,
            "line": self.line,
            "messages": [message.as_chat() for message in self.messages],
            "target": self.target,
            "group": self.group,
            "slice": self.slice,
        }
        for name, unsaid in _WRITTEN_WHERE_SAID.items():
            value = getattr(self, name)
            if value != unsaid:
                record[name] = value
        return orjson.dumps(record).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> Row:
        """The row that `to_json` wrote."""
        record = orjson.loads(text)
        return cls(
            id=record["id"],
            line=record["line"],
            messages=tuple([Message(m["role"], m["content"]) for m in record["messages"]]),
            target=record["target"],
            group=record["group"],
            slice=record["slice"],
            **{name: record[name] for name in _WRITTEN_WHERE_SAID if name in record},
        )


_WRITTEN_WHERE_SAID: dict[str, Any] = {"label": None, "source": None, "time": None, "weight": 1.0, "synthetic": False}


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a file that `write_rows` wrote, in order."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield Row.from_json(line)


def write_rows(path: Path, rows: Iterable[Row]) -> int:
    """Write rows as JSON Lines; return how many."""
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as out:
        for row in rows:
            out.write(row.to_json() + "\n")
            count += 1
    return count


def canonical_json(value: Any) -> str:
    """The one way in which an answer that is JSON is written: keys sorted, no spaces after separators but `": "`.

    Whole floats are written as integers (`29.0` -> `29`), so that equal numbers have equal text.
    """

    def plain(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: plain(node[key]) for key in sorted(node)}
        if isinstance(node, list):
            return [plain(item) for item in node]
        if isinstance(node, float) and node.is_integer():
            return int(node)
        return node

    return json.dumps(plain(value), ensure_ascii=False, allow_nan=False)
