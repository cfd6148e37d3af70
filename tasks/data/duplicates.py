"""Find rows that repeat or contradict each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.contracts.rows import Row
from tasks.contracts.spec import TaskKind, TaskSpec
from tasks.data.draw import content_hash
from tasks.data.similar import Banding, Clusters, Shingles, Sketch, join_near_duplicates, sketch_texts


class Removed(NamedTuple):
    """A row that is left out: its position, a reason to count by, and a detail to look it up."""

    position: int
    reason: str
    detail: str


class Named(NamedTuple):
    """What a removal says of a row: its id and its answer."""

    id: str
    target: str


@dataclass(frozen=True, slots=True)
class Duplicates:
    """What is left of rows without their duplicates.

    Attributes:
        kept: positions of the rows that stay, ascending.
        removed: the others, each with its reason.
        links: pairs of rows that stay although their texts are nearly the same, since their answers differ
            (extract and chat only).
        clusters: how many texts that are nearly the same were found together, the largest first, each with its first
            row.
    """

    kept: NDArray[np.int64]
    removed: list[Removed]
    links: list[tuple[int, int]]
    clusters: list[tuple[int, int]]


def find_duplicates(
    texts: Sketch,
    shingles: Shingles,
    targets: NDArray[np.uint64],
    banding: Banding,
    kind: TaskKind,
    named: Callable[[int], Named],
) -> Duplicates:
    """Keep one row of each text: the first, in the order of the rows.

    - Same normalised text: one stays (`exact_duplicate`). If the answers differ, none does (`conflicting_labels`),
      except in chat, where two answers can both be right.
    - Near-duplicates (Jaccard similarity of word 3-shingles at least the banding's threshold, and whatever they
      connect): one stays (`near_duplicate`). If the labels differ, none does (`conflicting_labels`). For extract and
      chat one stays for each answer: there a small difference in the text can rightly change the answer.
    - Texts under `similar.MIN_WORDS` words are compared by normalised text alone.

    Args:
        texts: what the rows show, in the order of the content's hashes.
        shingles: of the same texts.
        targets: a hash of each answer, shape [n].
        banding: the threshold.
        kind: of the task; decides what contradicts.
        named: id and answer of a row, for what is said of a removal.
    """
    count = len(targets)
    by_text = Clusters(count)
    order = np.lexsort((texts.identity[:, 1], texts.identity[:, 0]))
    same = np.flatnonzero((texts.identity[order[1:]] == texts.identity[order[:-1]]).all(axis=1))
    for at in same.tolist():
        by_text.join(int(order[at]), int(order[at + 1]))
    text_of = by_text.roots()  # the first row of each text
    firsts = np.flatnonzero(text_of == np.arange(count))
    together = Clusters(len(firsts))
    join_near_duplicates(texts.take(firsts), shingles.in_order(firsts), banding, together)

    near = Clusters(count)
    for one, first in zip(firsts[together.roots()].tolist(), firsts.tolist(), strict=True):
        near.join(one, first)
    for row, first in enumerate(text_of.tolist()):
        near.join(row, first)
    removed: list[Removed] = []
    links: list[tuple[int, int]] = []
    sizes: list[tuple[int, int]] = []
    gone = np.zeros(count, dtype=np.bool_)
    for members in near.members():
        sizes.append((len(members), members[0]))
        found = _judge(members, text_of, targets, kind, named)
        removed += found.removed
        links += [(found.kept[0], other) for other in found.kept[1:]]
    gone[[one.position for one in removed]] = True
    return Duplicates(np.flatnonzero(~gone), sorted(removed), links, sorted(sizes, key=lambda one: (-one[0], one[1])))


def find_duplicate_rows(rows: Sequence[Row], task: TaskSpec, threshold: float) -> Duplicates:
    """`find_duplicates` of rows in memory, whatever their order; positions are those in `rows`."""
    banding = Banding.for_threshold(threshold)
    order = sorted(range(len(rows)), key=lambda index: (content_hash(rows[index]), rows[index].id))
    texts = sketch_texts((rows[index].text for index in order), banding)
    codes: dict[str, int] = {}
    targets = np.array([codes.setdefault(rows[index].target, len(codes)) for index in order], dtype=np.uint64)
    found = find_duplicates(
        texts,
        Shingles.of(texts),
        targets,
        banding,
        task.kind,
        lambda at: Named(rows[order[at]].id, rows[order[at]].target),
    )
    places = np.array(order, dtype=np.int64)
    return Duplicates(
        np.sort(places[found.kept]),
        sorted(Removed(order[one.position], one.reason, one.detail) for one in found.removed),
        [(order[one], order[other]) for one, other in found.links],
        [(size, order[first]) for size, first in found.clusters],
    )


class _Judged(NamedTuple):
    kept: list[int]
    removed: list[Removed]


def _judge(
    members: Sequence[int],
    text_of: NDArray[np.int64],
    targets: NDArray[np.uint64],
    kind: TaskKind,
    named: Callable[[int], Named],
) -> _Judged:
    """Which rows of a cluster stay; members in ascending order."""
    answers = targets[members]
    if kind is TaskKind.CLASSIFY and (answers != answers[0]).any():
        return _Judged([], _conflict(members, targets, named))
    by_text: dict[int, list[int]] = {}
    for row, text in zip(members, text_of[members].tolist(), strict=True):
        by_text.setdefault(text, []).append(row)
    stay: dict[int, int] = {}
    removed: list[Removed] = []
    for first, *others in by_text.values():
        if others and kind is not TaskKind.CHAT and (targets[others] != targets[first]).any():
            removed += _conflict([first, *others], targets, named)
            continue
        if others:
            detail = f"same text as {named(first).id}"
            removed += [Removed(row, "exact_duplicate", detail) for row in others]
        keeper = stay.setdefault(int(targets[first]), first)
        if keeper != first:
            removed.append(Removed(first, "near_duplicate", f"nearly the same text as {named(keeper).id}"))
    return _Judged(list(stay.values()), removed)


def _conflict(members: Sequence[int], targets: NDArray[np.uint64], named: Callable[[int], Named]) -> list[Removed]:
    """All members contradict each other; each names the first one whose answer differs from its own."""
    first = members[0]
    other = next(row for row in members if targets[row] != targets[first])
    one, another = named(first), named(other)
    removed = []
    for row in members:
        against = another if targets[row] == targets[first] else one
        own = one if targets[row] == targets[first] else named(row)
        removed.append(Removed(row, "conflicting_labels", f"{own.target!r} here, {against.target!r} in {against.id}"))
    return removed


class SameMeaning(NamedTuple):
    """Rows that say the same as others in other words: those that leave, and pairs of those that stay."""

    removed: list[Removed]
    links: list[tuple[int, int]]


def keep_one_of_each_meaning(
    pairs: Sequence[tuple[int, int]], targets: NDArray[np.uint64], named: Callable[[int], Named]
) -> SameMeaning:
    """Of rows that say the same (`semantic_duplicate`) the first stays for each answer.

    Different answers are no contradiction here, since a model judged what the rows mean; they are linked.

    Args:
        pairs: rows that say the same, by position.
        targets: a hash of each answer, shape [n].
        named: id and answer of a row.
    """
    clusters = Clusters(len(targets))
    for one, other in pairs:
        clusters.join(one, other)
    removed: list[Removed] = []
    links: list[tuple[int, int]] = []
    for members in clusters.members():
        stay: dict[int, int] = {}
        for row in members:
            keeper = stay.setdefault(int(targets[row]), row)
            if keeper != row:
                removed.append(Removed(row, "semantic_duplicate", f"says the same as {named(keeper).id}"))
        first, *others = stay.values()
        links += [(first, other) for other in others]
    return SameMeaning(removed, links)
