"""Look for golden items among the rows that a model is to learn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tasks.contracts.rows import Row
from tasks.data.duplicates import Removed
from tasks.data.similar import (
    NGRAM_WORDS,
    Banding,
    Shingles,
    Sketch,
    WordHasher,
    long_runs,
    most_similar,
    normalise,
    sketch_texts,
    words_of,
)
from tasks.data.table import GoldenRuns, RowTable

# The ways in which a row can be a golden item, the strongest first.
MEASURES = (
    "golden_item",
    "golden_same_id",
    "golden_same_text",
    "golden_same_group",
    "golden_near_duplicate",
    "golden_ngram",
)
SEMANTIC = "golden_semantic"  # looked for where a model of meaning is given, see `tasks.data.meaning`


@dataclass(frozen=True, slots=True)
class GoldenIndex:
    """The golden items in every way in which a row could be one of them."""

    items: list[Row]
    ids: dict[str, Row]
    groups: dict[str, Row]
    texts: Sketch
    shingles: Shingles
    runs: GoldenRuns
    banding: Banding


def index_golden(items: Sequence[Row], banding: Banding) -> GoldenIndex:
    """Index golden items; the texts of a few thousand are held in memory."""
    texts = sketch_texts((item.text for item in items), banding)
    words = words_of([normalise(item.text) for item in items], WordHasher())
    runs = [long_runs(words.flat[start:stop]) for start, stop in zip(words.starts, words.starts[1:], strict=False)]
    flat = np.concatenate([np.empty(0, dtype=np.uint64), *runs])
    owners = np.repeat(np.arange(len(items)), [len(run) for run in runs])
    order = np.argsort(flat, kind="stable")
    return GoldenIndex(
        items=list(items),
        ids={item.id: item for item in items},
        groups={item.group: item for item in items if item.group is not None},
        texts=texts,
        shingles=Shingles.of(texts),
        runs=GoldenRuns(flat[order], owners[order]),
        banding=banding,
    )


def find_overlaps(table: RowTable, golden: GoldenIndex) -> list[Removed]:
    """The rows that overlap the golden set, each with the strongest way in which it does, in the order of the table.

    Same item, same id, same normalised text, same group, near-duplicate, or a run of `NGRAM_WORDS` words in common.
    Texts shorter than that run, such as prices, can share no run, and ones under `similar.MIN_WORDS` words are no
    near-duplicates: for them the same normalised text is what counts.

    Args:
        table: built with the runs of this golden set.
        golden: the index.
    """
    found: dict[int, Removed] = {}

    def add(position: int, measure: str, detail: str) -> None:
        found.setdefault(position, Removed(position, measure, detail))

    same_text = _same_text(table, golden)
    for position, row_id in enumerate(table.ids):
        item = golden.ids.get(row_id)
        if item is None:
            continue
        if same_text.get(position) is item:
            add(position, "golden_item", f"is golden item {item.id}")
        else:
            add(position, "golden_same_id", f"has the id of golden item {item.id}, with another text")
    for position, item in same_text.items():
        add(position, "golden_same_text", f"same text as golden item {item.id}")
    codes = [code for code, name in enumerate(table.group_names) if name in golden.groups]
    for position in np.flatnonzero(np.isin(table.groups, codes)).tolist():
        group = table.group_names[table.groups[position]]
        add(position, "golden_same_group", f"in group {group!r} with golden item {golden.groups[group].id}")
    near = most_similar(table.sketch, table.shingles, golden.texts, golden.shingles, golden.banding)
    for position, match in near.items():
        item = golden.items[match.position]
        add(position, "golden_near_duplicate", f"Jaccard similarity {match.similarity:.2f} with golden item {item.id}")
    for position in np.flatnonzero(table.run_hits).tolist():
        item = golden.items[int(table.run_owners[position])]
        hits = int(table.run_hits[position])
        add(position, "golden_ngram", f"{hits} runs of {NGRAM_WORDS} words in common, one with golden item {item.id}")
    return sorted(found.values())


def _same_text(table: RowTable, golden: GoldenIndex) -> dict[int, Row]:
    """For each row with the normalised text of an item, that item; the row's own, where several items have the text."""
    items: dict[bytes, list[Row]] = {}
    for item, identity in zip(golden.items, golden.texts.identity, strict=True):
        items.setdefault(identity.tobytes(), []).append(item)
    found = {}
    for position in np.flatnonzero(np.isin(table.sketch.identity[:, 0], golden.texts.identity[:, 0])).tolist():
        same = items.get(table.sketch.identity[position].tobytes(), [])
        own = [item for item in same if item.id == table.ids[position]]
        if same:
            found[position] = (own or same)[0]
    return found
