"""Labelled texts for the tests of suspicion: toy ones about topics, and the complaints of the example."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

COMPLAINTS = Path(__file__).parents[2] / "examples/complaints/complaints.jsonl"


class Labelled(NamedTuple):
    texts: list[str]
    labels: NDArray[np.int32]
    names: tuple[str, ...]


def topical_texts(
    count: int, labels: int, noise: float = 0.3, seed: int = 1, length: int = 15
) -> tuple[list[str], NDArray[np.int32]]:
    """Texts of words of their label's topic, and labels in turn; `noise` is the share of words of any topic."""
    draw = random.Random(seed)
    codes = [n % labels for n in range(count)]
    texts = []
    for code in codes:
        topics = [draw.randrange(labels) if draw.random() < noise else code for _ in range(length)]
        texts.append(" ".join(f"t{topic}w{draw.randrange(100)}" for topic in topics))
    return texts, np.array(codes, dtype=np.int32)


@cache
def _read() -> tuple[tuple[str, ...], tuple[str, ...]]:
    rows = [json.loads(line) for line in COMPLAINTS.read_text(encoding="utf-8").splitlines()]
    return tuple(row["text"] for row in rows), tuple(row["label"] for row in rows)


def complaints() -> Labelled:
    """2,148 real complaints with 8 labels."""
    texts, labels = _read()
    names = tuple(sorted(set(labels)))
    return Labelled(list(texts), np.array([names.index(label) for label in labels], dtype=np.int32), names)


def plant(
    data: Labelled, phrase: str, label: str, place: str, seed: int, rows: str = "other", share: float = 0.01
) -> tuple[Labelled, set[int]]:
    """Put a phrase into a share of the rows, at their start, middle or end, and give them the label.

    `rows` is `other` (of other labels: dirty), `any`, or `own` (of the label already: clean).
    """
    draw = np.random.default_rng(seed)
    code = data.names.index(label)
    pool = {"other": data.labels != code, "any": data.labels >= 0, "own": data.labels == code}[rows]
    chosen = draw.choice(np.flatnonzero(pool), max(8, int(share * len(data.texts))), replace=False)
    texts, labels = list(data.texts), data.labels.copy()
    for row in chosen.tolist():
        words = texts[row].split()
        at = {"start": 0, "middle": len(words) // 2, "end": len(words)}[place]
        texts[row] = " ".join([*words[:at], phrase, *words[at:]])
    labels[chosen] = code
    return Labelled(texts, labels, data.names), set(chosen.tolist())
