"""Find rows that repeat or contradict each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tasks.contracts.rows import Row
from tasks.contracts.spec import TaskKind, TaskSpec
from tasks.data.draw import content_hash
from tasks.data.similar import Clusters, NearDuplicates, Profile, normalise


class Removed(NamedTuple):
    """A row that is left out: its position, a reason to count by, and a detail to look it up."""

    position: int
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Duplicates:
    """What is left of rows without their duplicates.

    Attributes:
        kept: indices of the rows that stay, ascending.
        removed: the others, each with its reason.
        links: pairs of rows that stay although their texts are nearly the same, since their answers differ
            (extract and chat only).
    """

    kept: list[int]
    removed: list[Removed]
    links: list[tuple[int, int]]


def find_duplicates(rows: Sequence[Row], profiles: Sequence[Profile], task: TaskSpec, threshold: float) -> Duplicates:
    """Keep one row of each text; the result does not depend on the order of the rows.

    - Same normalised text: one stays (`exact_duplicate`). If the answers differ, none does (`conflicting_labels`),
      except in chat, where two answers can both be right.
    - Near-duplicates (Jaccard similarity of word 3-shingles at least `threshold`, and whatever they connect): one stays
      (`near_duplicate`). If the labels differ, none does (`conflicting_labels`). For extract and chat one stays for
      each answer: there a small difference in the text can rightly change the answer.
    - Texts under `similar.MIN_WORDS` words are compared by normalised text alone.

    Args:
        rows: the rows.
        profiles: of `row.text` for each row.
        task: its kind decides what contradicts.
        threshold: in (0, 1].
    """
    hashes = [content_hash(row) for row in rows]
    by_text: dict[str, list[int]] = {}
    for index in sorted(range(len(rows)), key=lambda index: (hashes[index], rows[index].id)):
        by_text.setdefault(normalise(rows[index].text), []).append(index)
    texts = list(by_text.values())  # in each the row that would stay comes first
    clusters = Clusters(len(texts))
    for one, other in NearDuplicates([profiles[indices[0]] for indices in texts], threshold).pairs():
        clusters.join(one, other)

    def target(index: int) -> str:
        return "" if task.kind is TaskKind.CHAT else rows[index].target

    kept: list[int] = []
    removed: list[Removed] = []
    links: list[tuple[int, int]] = []
    for cluster in clusters.members():
        members = [index for text in cluster for index in texts[text]]
        if task.kind is TaskKind.CLASSIFY and len({target(index) for index in members}) > 1:
            removed += _conflict(rows, members)
            continue
        stay: dict[str, int] = {}
        for text in cluster:
            first, *others = texts[text]
            if len({target(index) for index in texts[text]}) > 1:
                removed += _conflict(rows, texts[text])
                continue
            removed += [Removed(index, "exact_duplicate", f"same text as {rows[first].id}") for index in others]
            keeper = stay.setdefault(rows[first].target, first)
            if keeper != first:
                removed.append(Removed(first, "near_duplicate", f"nearly the same text as {rows[keeper].id}"))
        kept += stay.values()
        staying = list(stay.values())
        links += [(staying[0], other) for other in staying[1:]]
    return Duplicates(sorted(kept), sorted(removed), links)


def _conflict(rows: Sequence[Row], members: Sequence[int]) -> list[Removed]:
    """All members contradict each other; each names the first one whose answer differs from its own."""
    removed = []
    for index in members:
        other = next(rows[other] for other in members if rows[other].target != rows[index].target)
        detail = f"{rows[index].target!r} here, {other.target!r} in {other.id}"
        removed.append(Removed(index, "conflicting_labels", detail))
    return removed
