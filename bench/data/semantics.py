"""Semantic duplicates: precision and recall on planted paraphrases, and the approximate index beside all pairs.

The texts are the real complaints, each of at least twelve words once; to every fifth a paraphrase is added (synonyms,
sentences in another order, fillers) that shares too few runs of three words to be a near-duplicate by its words.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.data.make_rows import COMPLAINTS, ROWS
from bench.data.rewrite import jaccard, paraphrased

THRESHOLDS = (0.98, 0.97, 0.96, 0.95, 0.93, 0.9, 0.88, 0.85, 0.8)
_EVERY = 5
_FEWEST_WORDS = 12
_DIFFERENT = 0.6  # Jaccard similarity below which a paraphrase is planted


def plant(seed: int = 5) -> tuple[list[str], dict[int, int]]:
    """Texts, and the paraphrases among them: position to the position of the original."""
    with COMPLAINTS.open(encoding="utf-8") as lines:
        texts = list(dict.fromkeys(json.loads(line)["text"] for line in lines))
    texts = [text for text in texts if len(text.split()) >= _FEWEST_WORDS]
    draw = random.Random(seed)  # noqa: S311  no secret
    planted = {}
    for position, text in enumerate(texts[::_EVERY]):
        words = text.split()
        new = paraphrased(words, draw)
        if jaccard(words, new) < _DIFFERENT:
            planted[len(texts)] = position * _EVERY
            texts.append(" ".join(new))
    return texts, planted


def thresholds(models: dict[str, Path]) -> list[dict[str, Any]]:
    """For each model and threshold: pairs joined, planted ones among them, planted ones found.

    Precision is a lower bound: real complaints repeat each other too. A planted pair that is joined through another
    text counts as found.
    """
    from tasks.data.semantic import find_semantic_pairs

    texts, planted = plant()
    rows = []
    for name, folder in models.items():
        for threshold in THRESHOLDS:
            pairs = find_semantic_pairs(lambda: iter(texts), str(folder), threshold, len(texts))
            cluster = clusters(len(texts), ((pair.one, pair.other) for pair in pairs))
            found = sum(cluster[new] == cluster[old] for new, old in planted.items())
            right = sum(planted.get(pair.other) == pair.one for pair in pairs)
            rows.append({
                "model": name, "threshold": threshold, "planted": len(planted), "found": found, "pairs": len(pairs),
                "right": right,
            })  # fmt: skip
    return rows


def index_recall(folder: Path, model: Path, threshold: float, limit: int) -> dict[str, Any]:
    """The index beside the comparison of all pairs, on made rows: links that only one of them has."""
    from tasks.data import semantic

    texts: list[str] = []
    with (folder / ROWS).open("rb") as lines:
        for line in lines:
            text = json.loads(line)["text"]
            if isinstance(text, str) and text.strip() and len(texts) < limit:
                texts.append(text[:2_000])

    def again() -> Iterator[str]:
        return iter(texts)

    seconds = []
    found = []
    kept = semantic.EXACT_ROWS
    try:
        for exact_rows in (len(texts), 0):
            semantic.EXACT_ROWS = exact_rows
            start = time.perf_counter()
            found.append(semantic.find_semantic_pairs(again, str(model), threshold, len(texts)))
            seconds.append(time.perf_counter() - start)
    finally:
        semantic.EXACT_ROWS = kept
    by_index = clusters(len(texts), ((pair.one, pair.other) for pair in found[1]))
    return {
        "rows": len(texts), "threshold": threshold, "exact_seconds": seconds[0], "index_seconds": seconds[1],
        "joined": len(found[0]), "joined_too": sum(by_index[pair.one] == by_index[pair.other] for pair in found[0]),
    }  # fmt: skip


def clusters(count: int, pairs: Iterator[tuple[int, int]]) -> list[int]:
    """For each text the smallest text that it is connected with."""
    parent = list(range(count))

    def root(item: int) -> int:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    for one, other in pairs:
        low, high = sorted((root(one), root(other)))
        parent[high] = low
    return [root(item) for item in range(count)]
