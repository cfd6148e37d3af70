"""Rejected rows as people may see them: counted by reason, with a few examples, and nothing private in full."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from tasks.contracts.rows import Row
from tasks.data.private import build_scanner, mask_json, mask_text

SHOWN = 200  # characters of a text
_LOOKED_AT = 20_000  # characters that are masked before a text is cut, so that no cut hides what a thing is
_SHOWN_ID = 60
_WORDS = {
    "golden_item": "In the golden set",
    "golden_same_id": "The id of a golden item",
    "golden_same_text": "The text of a golden item",
    "golden_same_group": "The group of a golden item",
    "golden_near_duplicate": "Nearly a golden item",
    "golden_ngram": "Shares a long run of words with a golden item",
    "golden_semantic": "Says what a golden item says",
    "conflicting_labels": "Same text, different labels",
    "exact_duplicate": "Duplicate",
    "near_duplicate": "Near-duplicate",
    "semantic_duplicate": "Says what another row says",
    "suspect_label": "Label is probably wrong",
    "planted": "Looks planted",
    "over_synthetic_share": "Over the share that a model may write",
    "over_max_train_rows": "Over the limit of training rows",
    "personal_data": "Personal data",
    "secret": "Key, token or password",
}


class Example(NamedTuple):
    """A row with what was found in it; all of it masked, cut and on one line.

    `target` is None for a record that is no row (`text` is then the whole record), and for a note.
    """

    line: int
    id: str
    why: str
    text: str = ""
    target: str | None = None


class Rejected(NamedTuple):
    """Rows of one quarantine.

    Attributes:
        rows: all of them.
        reasons: rows by the code of the reason, a row with two reasons twice; the most frequent first.
        examples: the first rows of each reason.
    """

    rows: int
    reasons: dict[str, int]
    examples: dict[str, list[Example]]


class Veil:
    """Makes texts fit to be shown: secrets and personal data masked, whatever the policy of the data says."""

    def __init__(self) -> None:
        self._scan = build_scanner(secrets=True, personal=True)

    def cover(self, text: str, shown: int = SHOWN) -> str:
        """The text masked, on one line, without characters that nobody sees, and cut."""
        return _cut(mask_text(text[:_LOOKED_AT], self._scan), shown)

    def cover_json(self, value: Any) -> str:
        """The same for any value, as JSON."""
        text = json.dumps(value, ensure_ascii=False, default=str)
        if len(text) <= _LOOKED_AT:
            text = mask_json(text, self._scan)
        return self.cover(text)

    def example(self, entry: Mapping[str, Any], code: str) -> Example:
        """A line of a quarantine, or of the notes, with what is said of it under this code."""
        why = "; ".join(
            reason for check, reason in zip(entry["checks"], entry["reasons"], strict=True) if check == code
        )
        record = entry.get("record")
        row = _as_row(record)
        if row is not None:
            text, target = self.cover(row.text), self.cover(row.target)
        else:
            text, target = "" if record is None else self.cover_json(record), None
        return Example(entry["line"], self.cover(entry["id"] or "", _SHOWN_ID), self.cover(why), text, target)


def read_rejected(
    path: Path,
    veil: Veil,
    shown: int = 3,
    see: Callable[[Mapping[str, Any]], None] = lambda entry: None,
) -> Rejected:
    """Count a quarantine, or notes, a line at a time; memory holds the examples alone.

    Args:
        path: lines of `{"line", "id", "checks", "reasons", "record"}`; notes have no record.
        veil: covers what is shown.
        shown: examples of each reason.
        see: called with each line.
    """
    rows = 0
    reasons: Counter[str] = Counter()
    examples: dict[str, list[Example]] = {}
    with path.open("rb") as lines:
        for line in lines:
            entry = orjson.loads(line)
            rows += 1
            see(entry)
            for code in dict.fromkeys(entry["checks"]):
                reasons[code] += 1
                if len(kept := examples.setdefault(code, [])) < shown:
                    kept.append(veil.example(entry, code))
    ordered = dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0])))
    return Rejected(rows, ordered, {code: examples[code] for code in ordered})


def _as_row(record: Any) -> Row | None:
    if not isinstance(record, dict) or not record.keys() >= {"id", "line", "messages", "target", "group", "slice"}:
        return None
    try:
        return Row.from_json(orjson.dumps(record))
    except (KeyError, TypeError, ValueError):  # a raw record with the same columns
        return None


def _cut(text: str, shown: int) -> str:
    line = "".join(sign if sign.isprintable() else f"\\u{ord(sign):04x}" for sign in " ".join(text.split()))
    return f"{line[: shown - 1]}…" if len(line) > shown else line


def say_code(code: str) -> str:
    """The code of a reason as people read it."""
    words = _WORDS.get(code, code.replace("_", " "))
    return words[:1].upper() + words[1:]
