"""Rows that say the same in other words, as each other or as a golden item, by a model of meaning."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.contracts.errors import SpecError
from tasks.contracts.rows import Row
from tasks.data.contamination import SEMANTIC
from tasks.data.duplicates import Named, Removed, keep_one_of_each_meaning
from tasks.data.semantic import find_semantic_pairs
from tasks.data.similar import Clusters
from tasks.store import digest_folder


def digest_model(model: str) -> str:
    """sha256 of a model of meaning, over its files.

    Raises:
        SpecError: there is no such folder.
    """
    if not Path(model).is_dir():
        raise SpecError(
            "There is no folder with the model for semantic duplicates.",
            where=f"curate.semantic_model: {model}",
            fix="name the folder of a model2vec or sentence-transformers model, or leave it out",
        )
    return digest_folder(Path(model))


class Meaning(NamedTuple):
    """What a model of meaning finds: rows that leave, pairs of rows that stay together, and how many pairs it found."""

    removed: list[Removed]
    links: list[tuple[int, int]]
    pairs: int


def find_same_meaning(
    texts: Callable[[], Iterator[str]],
    items: Sequence[Row],
    targets: NDArray[np.uint64],
    named: Callable[[int], Named],
    model: str,
    threshold: float,
) -> Meaning:
    """Find rows that say the same as a golden item (`golden_semantic`), or as another row (`semantic_duplicate`).

    A row that is connected with an item by other rows counts as saying the same as the item.

    Args:
        texts: what the n rows show; called twice.
        items: the golden items.
        targets: a hash of each row's answer, shape [n].
        named: id and answer of a row.
        model: folder of the model.
        threshold: cosine similarity, in (0, 1].

    Raises:
        SpecError: the folder holds no such model.
    """
    count = len(targets)
    pairs = find_semantic_pairs(
        lambda: chain(texts(), (item.text for item in items)), model, threshold, count + len(items)
    )
    clusters = Clusters(count + len(items))
    for pair in pairs:
        clusters.join(pair.one, pair.other)
    roots = clusters.roots()
    item_of = {int(roots[count + number]): item for number, item in reversed([*enumerate(items)])}
    removed = [
        Removed(row, SEMANTIC, f"says the same as golden item {item_of[root].id}")
        for row, root in enumerate(roots[:count].tolist())
        if root in item_of
    ]
    gone = {one.position for one in removed}
    among_rows = [(pair.one, pair.other) for pair in pairs if pair.other < count and pair.one not in gone]
    kept = keep_one_of_each_meaning(among_rows, targets, named)
    return Meaning([*removed, *kept.removed], kept.links, len(pairs))
