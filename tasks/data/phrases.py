"""Phrases of a corpus that nearly always come with one label, and where they stand.

A phrase is a run of one to three words, or a character beyond ASCII. They are counted by their hashes, part by part, so
that memory does not grow with the number of different phrases.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.data.out_of_fold import BREAK, Words, odd_characters, split_words

MOST_WORDS = 3  # longer phrases are found by their parts, and shown whole
SAMPLE_ROWS = 64  # rows of each phrase that are kept to be looked at
_LEAST_ROWS = 5
_ROWS_FOR_EACH_LEAST = 50_000  # a planted phrase in one row of so many does little; so at a million rows 20 is least
_MOST_SHARE = 0.2  # of all rows: what more rows hold is no secret
_PURE = 0.85  # share of the rows with the phrase that have its label
_LONGEST_SHOWN = 16  # words
_EXTENDS = 0.9  # share of the rows in which the word beside a phrase is the same, so that it belongs to it
_COUNTED_AT_ONCE = 6_000_000  # words
_PARTS_OF_HASH = np.uint64(32)
_BASE = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xD6E8FEB86659FD93)


@dataclass(frozen=True)
class Phrases:
    """Phrases, c of them.

    Attributes:
        hashes: shape [c], as all that follow unless it says otherwise.
        sizes: how many words they have.
        labels: the label that most of their rows have.
        rows: how many rows hold them.
        of_label: how many of those have the label.
        starts: where the sample of each begins, shape [c + 1].
        sample: rows that hold the phrases, at most `SAMPLE_ROWS` of each, by the hash of their content.
        looked_at: how many phrases there were before those without a label of their own were left out.
    """

    hashes: NDArray[np.uint64]
    sizes: NDArray[np.int8]
    labels: NDArray[np.int32]
    rows: NDArray[np.int64]
    of_label: NDArray[np.int64]
    starts: NDArray[np.int64]
    sample: NDArray[np.int32]
    looked_at: int


def _hash_phrases(
    tokens: NDArray[np.uint32], owners: NDArray[np.int64], size: int
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Hashes of the runs of `size` words within a text, and where each begins."""
    count = len(tokens) - size + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int64)
    total = np.full(count, size, dtype=np.uint64)
    whole = owners[:count] == owners[size - 1 :]
    for offset in range(size):
        word = tokens[offset : offset + count]
        total = total * _BASE + word
        whole &= word != BREAK
    at = np.flatnonzero(whole)
    total = total[at]
    total ^= total >> np.uint64(32)  # so that the high bits, by which phrases are parted, depend on all of the words
    total *= _MIX
    return total ^ (total >> np.uint64(29)), at


def _scan(words: Words, size: int) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64]]]:
    """For batches of texts: hashes of phrases, the row that each is in, and where among all words it begins."""
    for rows in words.batches(np.arange(len(words))):
        first = int(words.starts[rows[0]])
        tokens = np.asarray(words.tokens[first : int(words.starts[rows[-1] + 1])])
        owners = np.repeat(rows, words.starts[rows + 1] - words.starts[rows])
        hashes, at = _hash_phrases(tokens, owners, size)
        yield hashes, owners[at], at + first


def count_phrases(words: Words, usable: NDArray[np.int64], labels: NDArray[np.int32], label_count: int) -> Phrases:
    """The phrases that are in enough rows, not in too many, and nearly always with one label."""
    least = max(_LEAST_ROWS, len(usable) // _ROWS_FOR_EACH_LEAST)
    most = int(_MOST_SHARE * len(usable))
    rank = np.full(len(words), -1, dtype=np.int32)
    rank[usable] = np.arange(len(usable))
    of_rank = labels[usable].astype(np.int64)
    # Phrases are counted part by part, so that the hashes of one part only are in memory.
    parts = 1 + len(words.tokens) // _COUNTED_AT_ONCE
    found: list[Phrases] = []
    for size in range(1, MOST_WORDS + 1):
        for part in range(parts):
            hashes, ranks = _collect(words, size, part, parts, rank)
            found.append(_keep_pure(hashes, ranks, size, of_rank, label_count, least, most, usable))
    sample_sizes = np.concatenate([np.diff(one.starts) for one in found])
    return Phrases(
        hashes=np.concatenate([one.hashes for one in found]),
        sizes=np.concatenate([one.sizes for one in found]),
        labels=np.concatenate([one.labels for one in found]),
        rows=np.concatenate([one.rows for one in found]),
        of_label=np.concatenate([one.of_label for one in found]),
        starts=np.concatenate([[0], np.cumsum(sample_sizes)]),
        sample=np.concatenate([one.sample for one in found]),
        looked_at=sum(one.looked_at for one in found),
    )


def _collect(
    words: Words, size: int, part: int, parts: int, rank: NDArray[np.int32]
) -> tuple[NDArray[np.uint64], NDArray[np.int32]]:
    """The phrases of one part and the ranks of their rows, sorted by both, each once a row."""
    all_hashes, all_ranks = [], []
    for hashes, rows, _ in _scan(words, size):
        ranks = rank[rows]
        use = ranks >= 0
        if parts > 1:
            use &= ((hashes >> _PARTS_OF_HASH) * np.uint64(parts)) >> _PARTS_OF_HASH == part
        all_hashes.append(hashes[use])
        all_ranks.append(ranks[use])
    hashes, ranks = np.concatenate(all_hashes), np.concatenate(all_ranks)
    order = np.lexsort((ranks, hashes))
    hashes, ranks = hashes[order], ranks[order]
    first = np.ones(len(hashes), dtype=np.bool_)
    first[1:] = (hashes[1:] != hashes[:-1]) | (ranks[1:] != ranks[:-1])
    return hashes[first], ranks[first]


def _keep_pure(
    hashes: NDArray[np.uint64],
    ranks: NDArray[np.int32],
    size: int,
    of_rank: NDArray[np.int64],
    label_count: int,
    least: int,
    most: int,
    usable: NDArray[np.int64],
) -> Phrases:
    starts = np.flatnonzero(np.concatenate([[True], hashes[1:] != hashes[:-1]])) if len(hashes) else np.empty(0, int)
    counts = np.diff(np.append(starts, len(hashes)))
    fits = (counts >= least) & (counts <= most)
    starts, counts = starts[fits], counts[fits]
    phrase = np.repeat(np.arange(len(starts)), counts)
    ranks = ranks[spans(starts, counts)]
    cells, cell_counts = np.unique(phrase * label_count + of_rank[ranks], return_counts=True)
    # Of each phrase the label with most rows, the first of equals: cells ascend by phrase and label.
    cell_phrase, cell_label = np.divmod(cells, label_count)
    best = np.lexsort((cell_label, -cell_counts, cell_phrase))
    best = best[np.concatenate([[True], np.diff(cell_phrase[best]) > 0])] if len(best) else best
    pure = np.flatnonzero(cell_counts[best] >= _PURE * counts)
    offsets = np.cumsum(counts) - counts
    sampled = np.minimum(counts[pure], SAMPLE_ROWS)
    return Phrases(
        hashes=hashes[starts[pure]],
        sizes=np.full(len(pure), size, dtype=np.int8),
        labels=cell_label[best][pure].astype(np.int32),
        rows=counts[pure],
        of_label=cell_counts[best][pure],
        starts=np.concatenate([[0], np.cumsum(sampled)]),
        sample=usable[ranks[spans(offsets[pure], sampled)]].astype(np.int32),
        looked_at=len(starts),
    )


def spans(starts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The indices start, start + 1, ... of each span, one span after another."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + counts, counts)


# -- where they stand ---------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """The rows that hold a phrase, ascending, and where among all words it first begins in each."""

    rows: NDArray[np.int64]
    at: NDArray[np.int64]


def locate_phrases(phrases: Sequence[tuple[int, int]], words: Words, is_usable: NDArray[np.bool_]) -> list[Place]:
    """The usable rows that hold each of the phrases, given by hash and number of words."""
    places: dict[int, list[Place]] = {index: [] for index in range(len(phrases))}
    for size in sorted({size for _, size in phrases}):
        indices = np.array([index for index, (_, words_in) in enumerate(phrases) if words_in == size])
        wanted = np.array([phrases[index][0] for index in indices], dtype=np.uint64)
        order = np.argsort(wanted)
        for hashes, rows, at in _scan(words, size):
            near = np.minimum(np.searchsorted(wanted[order], hashes), len(wanted) - 1)
            hits = np.flatnonzero((wanted[order][near] == hashes) & is_usable[rows])
            for which in np.unique(near[hits]):
                these = hits[near[hits] == which]
                first_rows, first = np.unique(rows[these], return_index=True)
                places[int(indices[order[which]])].append(Place(first_rows, at[these[first]]))
    return [
        Place(np.concatenate([one.rows for one in found]), np.concatenate([one.at for one in found]))
        for _, found in sorted(places.items())
    ]


def extent(place: Place, size: int, words: Words) -> tuple[int, int]:
    """By how many words the phrase goes on to the left and to the right in nearly all of its rows."""
    begins, ends = words.starts[place.rows], words.starts[place.rows + 1]

    def same(at: NDArray[np.int64]) -> bool:
        inside = (at >= begins) & (at < ends)
        beside = words.tokens[at[inside]]
        values, counts = np.unique(beside, return_counts=True)
        return len(values) > 0 and values[counts.argmax()] != BREAK and counts.max() >= _EXTENDS * len(at)

    before = after = 0
    while before + size + after < _LONGEST_SHOWN and same(place.at - before - 1):
        before += 1
    while before + size + after < _LONGEST_SHOWN and same(place.at + size + after):
        after += 1
    return before, after


def read_phrases(texts: Callable[[], Iterator[str]], shown: Mapping[int, tuple[int, int, int]]) -> dict[int, str]:
    """The wording of phrases, each given by a row and its first and last word in it."""
    of_row: dict[int, list[int]] = {}
    for index, (row, _, _) in shown.items():
        of_row.setdefault(row, []).append(index)
    wording = {}
    for row, text in enumerate(texts()):
        for index in of_row.get(row, ()):
            _, begin, end = shown[index]
            found = split_words(text)
            odd = odd_characters(text, found)
            if begin > len(found):  # after the break
                wording[index] = _name_characters(odd[begin - len(found) - 1])
            else:
                words = found[max(0, begin) : end]
                wording[index] = " ".join(word if word.isprintable() else _name_characters(word) for word in words)
        if len(wording) == len(shown):
            break
    return wording


def _name_characters(text: str) -> str:
    names = [f"U+{ord(character):04X} {unicodedata.name(character, 'without a name').lower()}" for character in text]
    return ", ".join(names)
