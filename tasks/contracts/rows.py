"""The one shape that a row of data has after ingest, and how rows are kept on disk (JSON Lines, UTF-8)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import orjson

Role = Literal["system", "user", "assistant", "tool"]


class Call(NamedTuple):
    """A call of a tool: its name, and its arguments as the `canonical_json` of an object."""

    name: str
    arguments: str


class Message(NamedTuple):
    """One turn of a conversation.

    Attributes:
        role: who speaks.
        content: what is said; empty where a turn only calls tools.
        calls: the tools that an assistant turn calls, in its order.
        name: of a tool turn, the tool whose result it is; None where that is not known.
    """

    role: Role
    content: str
    calls: tuple[Call, ...] = ()
    name: str | None = None

    @property
    def text(self) -> str:
        """All that the turn says: its content, and its calls as JSON, each on a line of its own."""
        if not self.calls:
            return self.content
        written = [canonical_json({"name": call.name, "arguments": json.loads(call.arguments)}) for call in self.calls]
        return "\n".join([*([self.content] if self.content else []), *written])

    def as_chat(self) -> dict[str, Any]:
        """The turn as chat templates take it: arguments of calls are objects. Ids are missing (`as_conversation`)."""
        turn: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.calls:
            turn["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": json.loads(call.arguments)}}
                for call in self.calls
            ]
        if self.name is not None:
            turn["name"] = self.name
        return turn

    def to_record(self) -> dict[str, Any]:
        """The turn as it is kept: arguments of calls are texts, so that no number in them is rounded."""
        record = self.as_chat()
        for kept, call in zip(record.get("tool_calls", ()), self.calls, strict=True):
            kept["function"]["arguments"] = call.arguments
        return record

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Message:
        """The turn that `to_record` wrote."""
        if len(record) == 2:
            return cls(record["role"], record["content"])
        functions = [call["function"] for call in record.get("tool_calls", ())]
        calls = tuple(Call(function["name"], function["arguments"]) for function in functions)
        return cls(record["role"], record["content"], calls, record.get("name"))


def as_conversation(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Turns as `Message.as_chat` has them, with the ids that tie results of tools to their calls.

    Ids number the calls of a conversation through, in nine letters and digits, as some chat templates ask. A result is
    that of the first call of its tool that has none yet.
    """
    turns = []
    waiting: list[tuple[str, str]] = []  # name and id of the calls without a result
    count = 0
    for message in messages:
        turn = message.as_chat()
        if message.calls:
            waiting = []
            for call in turn["tool_calls"]:
                count += 1
                call["id"] = f"call{count:05d}"
                waiting.append((call["function"]["name"], call["id"]))
        elif message.role == "tool" and waiting:
            of_tool = (at for at, (name, _) in enumerate(waiting) if name == message.name)
            turn["tool_call_id"] = waiting.pop(next(of_tool, 0))[1]
        turns.append(turn)
    return turns


@dataclass(frozen=True, slots=True)
class Row:
    """One example: the conversation up to the answer, and the answer that is wanted.

    Attributes:
        id: unique in its dataset; made from the content when the source has none.
        line: 1-based line (or row) of the source that it came from.
        messages: what the model is shown, without the task's instruction.
        target: the answer wanted, exactly as the model should write it (a label, canonical JSON, or text); where tools
            are to be called, the calls as `tasks.contracts.calls.write_calls` has them.
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
        return "\n".join(f"{message.role}: {message.text}" for message in self.messages)

    def to_json(self) -> str:
        """One line of JSON, without the line break; keys in a fixed order, so that equal rows have equal bytes.

        Fields after `slice` are written only where they say something: files of before they existed keep their bytes.
        """
        record: dict[str, Any] = {
            "id": self.id,
            "line": self.line,
            "messages": [message.to_record() for message in self.messages],
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
            messages=tuple([Message.from_record(turn) for turn in record["messages"]]),
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
