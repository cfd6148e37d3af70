"""A toy task that a tiny model learns in seconds: which team a ticket goes to, told by a few key words."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

LABELS = ("billing", "support")
_KEYS = {
    "billing": ("invoice", "refund", "charge", "payment"),
    "support": ("crash", "login", "screen", "update"),
}
_FILLERS = [
    "please",
    "today",
    "again",
    "my",
    "your",
    "the",
    "our",
    "new",
    "old",
    "first",
    "last",
    "red",
    "blue",
    "green",
    "north",
    "south",
    "east",
    "west",
    "early",
    "late",
    "left",
    "right",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "paper",
    "table",
    "window",
    "garden",
    "river",
    "winter",
    "summer",
    "copper",
    "silver",
]


def toy_rows(count: int, *, seed: int, prefix: str = "t") -> list[dict[str, str]]:
    """Rows with id, text and label; the label follows from the key words, the rest is noise."""
    draw = random.Random(seed)
    rows = []
    for index in range(count):
        label = LABELS[index % len(LABELS)]
        words = draw.sample(_FILLERS, 5)
        for key in draw.sample(_KEYS[label], 3):
            words.insert(draw.randrange(len(words) + 1), key)
        rows.append({"id": f"{prefix}{index:04d}", "text": " ".join(words), "label": label})
    return rows


def vocabulary() -> list[str]:
    """Texts from which a tokenizer learns every word of the task as one token."""
    words = [*_FILLERS, *(key for keys in _KEYS.values() for key in keys), *LABELS]
    return [f"{word} {word}" for word in words for _ in range(3)] + ["Which team? Answer with exactly one of: ,"] * 3


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
