"""Which texts are the same, or nearly so: normalised equality, word 3-shingles with MinHash LSH, long word n-grams."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from datasketch import MinHash, MinHashLSH
from numpy.typing import NDArray

# A text of fewer words has so few 3-shingles that one word decides, and strings such as "$1.00" have none:
# such texts are compared by normalised equality alone.
MIN_WORDS = 8
NGRAM_WORDS = 13  # the n-gram by which GPT-3's authors looked for test items in training data (arXiv:2005.14165, C)
_DISTINCT_WORDS = 7
_SHINGLE_WORDS = 3
_PERMUTATIONS = 128
_MISSED = 0.001  # share of pairs right at the threshold that the index may miss
_EDGES = ".,;:!?\"'()[]{}<>*“”‘’…"
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying by it loses nothing modulo 2^64


class Similar(NamedTuple):
    """Another text, by its position in the index, and the Jaccard similarity of the word 3-shingles."""

    position: int
    jaccard: float


def normalise(text: str) -> str:
    """The text as it counts for equality: NFKC, case folded, white space as single blanks. Punctuation stays."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


class _WordHasher:
    """Texts as arrays of 64-bit word hashes; a word is hashed once for all texts.

    A word is what stands between blanks of the normalised text, without punctuation at its ends (`"$1.00"` stays).
    """

    def __init__(self) -> None:
        self._hashes: dict[str, int] = {}

    def hashes(self, text: str) -> NDArray[np.uint64]:
        """Shape [words]; words that are punctuation alone are left out."""
        known = self._hashes
        found = []
        for raw in normalise(text).split():
            word = raw.strip(_EDGES)
            if not word:
                continue
            value = known.get(word)
            if value is None:
                value = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
                known[word] = value
            found.append(value)
        return np.array(found, dtype=np.uint64)


def ngrams(words: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """Hashes of the runs of n words, shape [max(0, words - n + 1)], by Horner's rule modulo 2^64."""
    count = len(words) - n + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64)
    total = np.zeros(count, dtype=np.uint64)
    for offset in range(n):
        total = total * _BASE + words[offset : offset + count]
    return total


def long_runs(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The set of runs of `NGRAM_WORDS` words, sorted, without runs that mostly repeat themselves.

    A run of fewer than `_DISTINCT_WORDS` different words ("XXXX XXXX XXXX ...") is filler, and no sign of a leak.
    """
    if len(words) < NGRAM_WORDS:
        return np.empty(0, dtype=np.uint64)
    windows = np.sort(np.lib.stride_tricks.sliding_window_view(words, NGRAM_WORDS), axis=1)
    distinct = 1 + np.count_nonzero(windows[:, 1:] != windows[:, :-1], axis=1)
    return np.unique(ngrams(words, NGRAM_WORDS)[distinct >= _DISTINCT_WORDS])


def shingles(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The set of word 3-shingles, sorted; empty for a text of fewer than `MIN_WORDS` words."""
    if len(words) < MIN_WORDS:
        return np.empty(0, dtype=np.uint64)
    return np.unique(ngrams(words, _SHINGLE_WORDS))


def jaccard(one: NDArray[np.uint64], other: NDArray[np.uint64]) -> float:
    """Jaccard similarity of two sorted sets, in [0, 1]; 0 when both are empty."""
    union = len(one) + len(other)
    if union == 0:
        return 0.0
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (union - shared)


class Profile(NamedTuple):
    """What texts are compared by.

    Attributes:
        words: hashes of the words, shape [words].
        shingles: the set of word 3-shingles, sorted; empty for a text of fewer than `MIN_WORDS` words.
        sketch: MinHash of the shingles; None if there are none.
    """

    words: NDArray[np.uint64]
    shingles: NDArray[np.uint64]
    sketch: MinHash | None


def profile_texts(texts: Iterable[str]) -> Iterator[Profile]:
    """A profile for each text, in order."""
    hasher = _WordHasher()
    empty = MinHash(num_perm=_PERMUTATIONS, hashfunc=_low_bits)
    for text in texts:
        words = hasher.hashes(text)
        elements = shingles(words)
        sketch = None
        if len(elements):
            sketch = empty.copy()
            sketch.update_batch(elements.tolist())
        yield Profile(words, elements, sketch)


class NearDuplicates:
    """An index of texts that answers which ones are at least `threshold` similar.

    MinHash LSH proposes pairs and the exact Jaccard similarity decides, so there are no false ones. With b bands of r
    rows a pair of similarity s is proposed with probability 1 - (1 - s^r)^b; r is the largest for which a pair right at
    the threshold is missed at most once in a thousand.
    """

    def __init__(self, profiles: Sequence[Profile], threshold: float) -> None:
        self._profiles = profiles
        self._threshold = threshold
        rows = max(r for r in range(1, 17) if r == 1 or (1 - threshold**r) ** (_PERMUTATIONS // r) <= _MISSED)
        self._index = MinHashLSH(num_perm=_PERMUTATIONS, params=(_PERMUTATIONS // rows, rows))
        for number, profile in enumerate(profiles):
            if profile.sketch is not None:
                self._index.insert(number, profile.sketch, check_duplication=False)

    def pairs(self) -> Iterator[tuple[int, int]]:
        """Pairs (i, j), i < j, of near-duplicates, enough of them to connect all that are connected at all."""
        clusters = Clusters(len(self._profiles))
        for number, profile in enumerate(self._profiles):
            for other in self._candidates(profile):
                if other <= number or clusters.root(other) == clusters.root(number):
                    continue
                if jaccard(profile.shingles, self._profiles[other].shingles) >= self._threshold:
                    clusters.join(number, other)
                    yield number, other

    def most_similar(self, profile: Profile) -> Similar | None:
        """The most similar indexed text at or over the threshold, the first of equals; None if there is none."""
        found = [
            Similar(other, jaccard(profile.shingles, self._profiles[other].shingles))
            for other in self._candidates(profile)
        ]
        best = max(found, key=lambda similar: similar.jaccard, default=None)
        return best if best is not None and best.jaccard >= self._threshold else None

    def _candidates(self, profile: Profile) -> list[int]:
        return [] if profile.sketch is None else sorted(self._index.query(profile.sketch))


class Clusters:
    """Which of n things are connected (union-find)."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))

    def root(self, item: int) -> int:
        """The smallest member of the item's cluster."""
        while self._parent[item] != item:
            self._parent[item] = self._parent[self._parent[item]]
            item = self._parent[item]
        return item

    def join(self, one: int, other: int) -> None:
        """Make two clusters one."""
        low, high = sorted((self.root(one), self.root(other)))
        self._parent[high] = low

    def members(self) -> list[list[int]]:
        """All clusters, each in ascending order, by their smallest member."""
        by_root: dict[int, list[int]] = {}
        for item in range(len(self._parent)):
            by_root.setdefault(self.root(item), []).append(item)
        return list(by_root.values())


def _low_bits(value: int) -> int:
    """The default scheme of datasketch hashes 32 bits; shingles are hashes already."""
    return value & 0xFFFFFFFF
