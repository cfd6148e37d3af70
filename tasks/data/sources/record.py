"""What every adapter yields, and the words that all of them share."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Set
from typing import Any, NamedTuple

from tasks.contracts.errors import DataError
from tasks.contracts.spec import DataSpec

MAX_ROW_BYTES = 64 * 2**20  # no row of a narrow task is that long; a file without line breaks is
SYNTHETIC = "synthetic"  # the one column that no setting renames: a row keeps this mark for ever
_SHOWN_COLUMNS = 50
_MAX_DEPTH = 100  # levels of JSON; what reads a row later goes as deep by recursion


class Record(NamedTuple):
    """A row as its source has it.

    Attributes:
        line: its 1-based line, or its number where there are no lines.
        values: what its columns hold.
        reasons: why the adapter itself finds it unusable.
        original: what is kept of it if it is unusable, where that is more than `values`.
    """

    line: int
    values: dict[str, Any]
    reasons: tuple[str, ...] = ()
    original: Any = None


class Columns:
    """Which columns the spec names and which ones a source has, part by part.

    The answer and what is shown have to be in every part. So have all other named columns where a part has a header;
    where rows stand alone (JSON Lines, Label Studio) a column may be left out of the rows that have nothing to say in
    it, and it is enough that one part has it.
    """

    def __init__(self, data: DataSpec) -> None:
        if data.messages_field is not None:
            needed: dict[str, str | None] = {"messages_field": data.messages_field}
        else:
            needed = {"text_field": data.text_field, "target_field": data.target_field}
        named = {
            "group_field": data.group_field,
            "slice_field": data.slice_field,
            "label_field": data.label_field,
            "source_field": data.source_field,
            "time_field": data.time_field,
            "weight_field": data.weight_field,
        }
        if data.id_field != DataSpec.model_fields["id_field"].default:  # a source need not have ids, unless asked to
            named["id_field"] = data.id_field
        self._needed = {field: column for field, column in needed.items() if column is not None}
        self._named = {field: column for field, column in named.items() if column is not None}
        others = [*self._named.values(), *([data.id_field] if data.id_field else []), SYNTHETIC]
        self.wanted = list(dict.fromkeys([*self._needed.values(), *others]))
        self._unseen = set(self._named.values())
        self._unseen_in_part: set[str] = set()
        self._seen: dict[str, None] = {}
        self.start_part()

    @property
    def needed(self) -> Collection[str]:
        """The columns without which there is no row."""
        return self._needed.values()

    def start_part(self) -> None:
        """Begin to watch a part of its own."""
        self._unseen_in_part = {*self._needed.values(), *self._named.values()}
        self._seen = {}

    def see(self, names: Set[str]) -> None:
        """Note the columns of a row, or of a header."""
        if self._unseen_in_part:
            self._unseen_in_part.difference_update(names)
        # What an error shows is cut short, so that rows with keys of their own do not fill the memory.
        if len(self._seen) < _SHOWN_COLUMNS and not names <= self._seen.keys():
            self._seen.update(dict.fromkeys(names))

    def end_part(self, shown: str, *, has_header: bool) -> None:
        """Refuse a part (called `shown`) that lacks a column that it has to have."""
        self._unseen &= self._unseen_in_part
        asked = self._needed | self._named if has_header else self._needed
        self._refuse(asked, self._unseen_in_part, shown)

    def end(self, shown: str) -> None:
        """Refuse a source that lacks a named column in all its parts."""
        self._refuse(self._named, self._unseen, shown)

    def _refuse(self, asked: dict[str, str], unseen: Collection[str], shown: str) -> None:
        for field, column in sorted(asked.items()):
            if column in unseen:
                names = [*map(repr, self._seen)]
                listed = ", ".join(names[:_SHOWN_COLUMNS]) + (", …" if len(names) > _SHOWN_COLUMNS else "")
                raise DataError(
                    f"No row has the column {column!r} that `data.{field}` names. There are: {listed or 'none'}.",
                    where=f"{shown}, column {column!r}",
                    fix=f"set `data.{field}` to one of the columns that are there, or add the column to this file",
                )


def name_value(value: Any) -> str:
    """What a value is, in words."""
    names = {dict: "an object", list: "a list", bool: "true or false", int: "a number", float: "a number", str: "text"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def is_deep(value: Any, text: str) -> bool:
    """Whether a value, whose JSON is `text`, is nested deeper than is safe."""
    if text.count("{") + text.count("[") <= _MAX_DEPTH:
        return False
    level = [value]
    for _ in range(_MAX_DEPTH):
        children = [iter(node.values()) if isinstance(node, dict) else node for node in level]
        level = [child for nodes in children for child in nodes if isinstance(child, dict | list)]
        if not level:
            return False
    return True


def count_noun(count: int, noun: str) -> str:
    """A number with its noun: `1 column`, `2 columns`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def say_counts(counts: Iterable[tuple[str, int]]) -> str:
    """Counts in words: `2 × billing, 1 × support`."""
    return ", ".join(f"{number:,} × {name}" for name, number in counts)
