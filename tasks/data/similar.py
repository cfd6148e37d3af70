"""Which texts are the same, or nearly so: normalised equality, word 3-shingles with MinHash LSH, long word n-grams.

Everything here works on batches of texts and on arrays, since a million texts are to be compared in minutes and in
less memory than the texts themselves take. Only numpy is imported: worker processes start with this module.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, lru_cache
from itertools import islice
from typing import NamedTuple

import numpy as np
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
_HIGH = np.uint64(32)
_KNOWN_WORDS = 500_000  # word hashes that are kept; more are forgotten and worked out again
_BATCH = 1_000  # texts that are sketched at a time
_SMALL_BUCKET = 32  # a bucket of up to so many texts has all of its pairs listed at once
_KEPT_SETS = 4_096
_BLOCK = 2_000  # texts of a larger bucket that are compared with each other at a time
_DEVIATIONS = 5.0  # standard errors by which an estimated similarity may fall short before it is trusted to be too low


def normalise(text: str) -> str:
    """The text as it counts for equality: NFKC, case folded, white space as single blanks. Punctuation stays."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split())


def identity_of(normalised: str) -> bytes:
    """128 bits that stand for a normalised text: equal for equal texts, and for others never in practice."""
    return hashlib.blake2b(normalised.encode(), digest_size=16).digest()


def hash64(text: str) -> int:
    """64 bits that stand for a text wherever it came from, half surrogate pairs included."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


class WordHasher:
    """Normalised texts as 64-bit word hashes; a word is hashed once for all texts.

    A word is what stands between blanks, without punctuation at its ends (`"$1.00"` stays).
    """

    def __init__(self) -> None:
        self._hashes: dict[str, int] = {}

    def hashes(self, normalised: str) -> list[int]:
        """One hash a word; words that are punctuation alone are left out."""
        known = self._hashes
        found = []
        for raw in normalised.split():
            value = known.get(raw)
            if value is None:
                word = raw.strip(_EDGES)
                # 0 stands for punctuation alone; no word hashes to it in practice.
                value = hash64(word) if word else 0
                if len(known) >= _KNOWN_WORDS:
                    known.clear()
                known[raw] = value
            if value:
                found.append(value)
        return found


# -- what texts are compared by -----------------------------------------------------------------------------------


class Banding(NamedTuple):
    """How MinHash values are cut into bands, for one threshold of Jaccard similarity.

    With b bands of r rows a pair of similarity s is proposed with probability 1 - (1 - s^r)^b (Leskovec, Rajaraman and
    Ullman, Mining of Massive Datasets, 3.4). r is the largest for which a pair right at the threshold is missed at most
    once in a thousand.
    """

    threshold: float
    bands: int
    rows: int

    @classmethod
    def for_threshold(cls, threshold: float) -> Banding:
        """The bands for a threshold in (0, 1]."""
        rows = max(r for r in range(1, 17) if r == 1 or (1 - threshold**r) ** (_PERMUTATIONS // r) <= _MISSED)
        return cls(threshold, _PERMUTATIONS // rows, rows)

    def proposed(self, similarity: float) -> float:
        """Probability that a pair of this similarity is proposed, and so compared exactly."""
        return float(1 - (1 - similarity**self.rows) ** self.bands)


class Sketch(NamedTuple):
    """What n texts are compared by.

    Attributes:
        identity: hash of the normalised text, uint64, shape [n, 2].
        words: how many words, int32, shape [n].
        bands: a hash of each band of MinHash values, uint32, shape [n, bands]; means nothing where `sizes` is 0.
        minima: the last byte of each MinHash value, uint8, shape [n, bands · rows]; likewise.
        sizes: how many 3-shingles, repetitions included, int32, shape [n]; 0 under `MIN_WORDS` words.
        shingles: their hashes, one text after the other, uint32, shape [sum of sizes].
    """

    identity: NDArray[np.uint64]
    words: NDArray[np.int32]
    bands: NDArray[np.uint32]
    minima: NDArray[np.uint8]
    sizes: NDArray[np.int32]
    shingles: NDArray[np.uint32]

    def take(self, order: NDArray[np.int64]) -> Sketch:
        """Texts of it, in another order; the shingles stay as they are (see `Shingles.in_order`)."""
        return Sketch(
            self.identity[order],
            self.words[order],
            self.bands[order],
            self.minima[order],
            self.sizes[order],
            self.shingles,
        )


class Words(NamedTuple):
    """Word hashes of several texts, one after the other, and where each text starts (one more than texts)."""

    flat: NDArray[np.uint64]
    starts: NDArray[np.int64]


def words_of(normalised: Sequence[str], hasher: WordHasher) -> Words:
    """The word hashes of normalised texts."""
    lists = [hasher.hashes(text) for text in normalised]
    starts = np.zeros(len(lists) + 1, dtype=np.int64)
    np.cumsum([len(one) for one in lists], out=starts[1:])
    flat = np.fromiter((value for one in lists for value in one), dtype=np.uint64, count=int(starts[-1]))
    return Words(flat, starts)


def sketch(normalised: Sequence[str], words: Words, banding: Banding) -> Sketch:
    """Sketch a batch of normalised texts."""
    identity = np.frombuffer(b"".join(map(identity_of, normalised)), dtype=np.uint64).reshape(len(normalised), 2)
    counts = np.diff(words.starts).astype(np.int32)
    long_enough = counts >= MIN_WORDS
    hashes, owners = ngrams(words, _SHINGLE_WORDS)
    taken = long_enough[owners]
    shingles = (hashes[taken] >> _HIGH).astype(np.uint32)
    sizes = np.where(long_enough, counts - (_SHINGLE_WORDS - 1), 0).astype(np.int32)
    bands, minima = _min_hashes(shingles, sizes, banding)
    return Sketch(identity, counts, bands, minima, sizes, shingles)


def sketch_texts(texts: Iterable[str], banding: Banding) -> Sketch:
    """Sketch texts that are not normalised yet, of any number that fits into memory."""
    hasher = WordHasher()
    parts = []
    rest = iter(texts)
    while batch := [normalise(text) for text in islice(rest, _BATCH)]:
        parts.append(sketch(batch, words_of(batch, hasher), banding))
    if not parts:
        parts.append(sketch([], words_of([], hasher), banding))
    return concatenate(parts)


def concatenate(parts: Sequence[Sketch]) -> Sketch:
    """One sketch of all texts, in order."""
    return Sketch(
        np.concatenate([part.identity for part in parts]),
        np.concatenate([part.words for part in parts]),
        np.concatenate([part.bands for part in parts]),
        np.concatenate([part.minima for part in parts]),
        np.concatenate([part.sizes for part in parts]),
        np.concatenate([part.shingles for part in parts]),
    )


def ngrams(words: Words, n: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Hashes of all runs of n words within one text, by Horner's rule modulo 2^64, and the text of each."""
    flat, starts = words
    count = len(flat) - n + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int64)
    total = np.zeros(count, dtype=np.uint64)
    for offset in range(n):
        total *= _BASE
        total += flat[offset : offset + count]
    owners = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    whole = owners[:count] == owners[n - 1 :]
    return total[whole], owners[:count][whole]


def long_runs(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The set of runs of `NGRAM_WORDS` words of one text, sorted, without runs that mostly repeat themselves.

    A run of fewer than `_DISTINCT_WORDS` different words ("XXXX XXXX XXXX ...") is filler, and no sign of a leak.
    """
    if len(words) < NGRAM_WORDS:
        return np.empty(0, dtype=np.uint64)
    windows = np.sort(np.lib.stride_tricks.sliding_window_view(words, NGRAM_WORDS), axis=1)
    distinct = 1 + np.count_nonzero(windows[:, 1:] != windows[:, :-1], axis=1)
    hashes, _ = ngrams(Words(words, np.array([0, len(words)])), NGRAM_WORDS)
    return np.unique(hashes[distinct >= _DISTINCT_WORDS])


@cache
def _permutations() -> NDArray[np.uint64]:
    """Factors (odd) and summands of the hash functions, shape [2, permutations]; the same on every machine."""
    count = 2 * _PERMUTATIONS
    drawn = hashlib.shake_256(b"goldgate minhash").digest(8 * count)
    values = np.frombuffer(drawn, dtype="<u8").astype(np.uint64).reshape(2, _PERMUTATIONS).copy()
    values[0] |= np.uint64(1)
    return values


def _min_hashes(
    shingles: NDArray[np.uint32], sizes: NDArray[np.int32], banding: Banding
) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
    """Band hashes and last bytes of the MinHash values; the hash functions are multiply-shift (Dietzfelbinger 1997)."""
    used = banding.bands * banding.rows
    bands = np.zeros((len(sizes), banding.bands), dtype=np.uint32)
    minima = np.zeros((len(sizes), used), dtype=np.uint8)
    some = np.flatnonzero(sizes)
    if not len(some):
        return bands, minima
    starts = np.concatenate(([0], np.cumsum(sizes[some])[:-1]))
    factors, summands = _permutations()
    wide = shingles.astype(np.uint64)
    values = np.empty_like(wide)
    smallest = np.empty((used, len(some)), dtype=np.uint64)
    for number in range(used):
        np.multiply(wide, factors[number], out=values)
        np.add(values, summands[number], out=values)
        np.minimum.reduceat(values, starts, out=smallest[number])
    smallest >>= _HIGH
    minima[some] = (smallest & np.uint64(0xFF)).astype(np.uint8).T
    keys = np.zeros((banding.bands, len(some)), dtype=np.uint64)
    for row in range(banding.rows):
        keys *= _BASE
        keys += smallest[row :: banding.rows]
    keys *= _BASE
    bands[some] = (keys >> _HIGH).astype(np.uint32).T
    return bands, minima


# -- pairs --------------------------------------------------------------------------------------------------------


class Shingles:
    """The 3-shingles of many texts, read one text at a time: from an array, or from wherever `read` finds them.

    Args:
        sizes: how many each text has, shape [n].
        read: hashes number `start` up to `stop` of all texts one after the other, uint32.
    """

    def __init__(self, sizes: NDArray[np.int32], read: Callable[[int, int], NDArray[np.uint32]]) -> None:
        self._starts = np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))
        self._read = read
        self._place: NDArray[np.int64] | None = None
        # A text is compared with many others in a row, so its set is kept for a while.
        self.set_of = lru_cache(maxsize=_KEPT_SETS)(self._set_of)

    @classmethod
    def of(cls, texts: Sketch) -> Shingles:
        """Those of a sketch in memory."""
        return cls(texts.sizes, lambda start, stop: texts.shingles[start:stop])

    def in_order(self, order: NDArray[np.int64]) -> Shingles:
        """The same, for texts in another order; shingles stay where they are."""
        other = Shingles(np.empty(0, dtype=np.int32), self._read)
        other._starts = self._starts
        other._place = order if self._place is None else self._place[order]
        return other

    def _set_of(self, text: int) -> frozenset[int]:
        at = text if self._place is None else int(self._place[text])
        return frozenset(self._read(int(self._starts[at]), int(self._starts[at + 1])).tolist())


def jaccard(one: frozenset[int], other: frozenset[int]) -> float:
    """Jaccard similarity of two sets, in [0, 1]; 0 when both are empty."""
    shared = len(one & other)
    union = len(one) + len(other) - shared
    return shared / union if union else 0.0


class Clusters:
    """Which of n things are connected (union-find)."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))

    def root(self, item: int) -> int:
        """The smallest member of the item's cluster."""
        parent = self._parent
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    def join(self, one: int, other: int) -> None:
        """Make two clusters one."""
        low, high = sorted((self.root(one), self.root(other)))
        self._parent[high] = low

    def roots(self) -> NDArray[np.int64]:
        """The smallest member of each thing's cluster, shape [n]."""
        roots = np.array(self._parent, dtype=np.int64)
        while True:
            above = roots[roots]
            if np.array_equal(above, roots):
                return roots
            roots = above

    def members(self) -> Iterator[list[int]]:
        """The clusters of two and more, each in ascending order, by their smallest member."""
        roots = self.roots()
        order = np.argsort(roots, kind="stable")
        starts = np.flatnonzero(np.concatenate(([True], np.diff(roots[order]) != 0)))
        for start, size in zip(starts, np.diff(np.append(starts, len(order))), strict=True):
            if size > 1:
                yield order[start : start + size].tolist()


def join_near_duplicates(texts: Sketch, shingles: Shingles, banding: Banding, clusters: Clusters) -> int:
    """Connect all texts of at least the banding's similarity; return how many pairs were compared exactly.

    MinHash LSH proposes pairs, their MinHash values sort out those that are far apart, and the exact Jaccard similarity
    decides, so there are no false ones. A pair within one cluster is not looked at again.
    """
    compared = 0
    for one, other in _proposed(texts, banding, clusters):
        if clusters.root(one) == clusters.root(other):
            continue
        compared += 1
        if jaccard(shingles.set_of(one), shingles.set_of(other)) >= banding.threshold:
            clusters.join(one, other)
    return compared


def _proposed(texts: Sketch, banding: Banding, clusters: Clusters) -> Iterator[tuple[int, int]]:
    """Pairs that share a band and may be similar enough, those of small buckets first."""
    large: list[NDArray[np.int64]] = []
    count = np.int64(len(texts.sizes))
    seen = np.empty(0, dtype=np.int64)  # a pair (i, j) as i · count + j
    some = np.flatnonzero(texts.sizes)
    for band in range(banding.bands):
        keys = texts.bands[some, band]
        order = np.argsort(keys, kind="stable")
        starts = np.flatnonzero(np.concatenate(([True], np.diff(keys[order]) != 0))) if len(order) else order
        sizes = np.diff(np.append(starts, len(order)))
        found = [np.empty((0, 2), dtype=np.int64)]
        for size in np.unique(sizes[(sizes > 1) & (sizes <= _SMALL_BUCKET)]):
            members = some[order[starts[sizes == size][:, None] + np.arange(size)]]
            left, right = np.triu_indices(int(size), 1)
            found.append(np.stack((members[:, left].ravel(), members[:, right].ravel()), axis=1))
        pairs = np.concatenate(found)
        pairs = pairs[_may_be_similar(texts, pairs, banding)]
        seen = np.union1d(seen, pairs[:, 0] * count + pairs[:, 1])
        large += [some[order[start : start + size]] for start, size in zip(starts, sizes, strict=True)
                  if size > _SMALL_BUCKET]  # fmt: skip
    yield from zip((seen // count).tolist(), (seen % count).tolist(), strict=True)
    for bucket in large:
        yield from _pairs_of_large(bucket, texts, banding, clusters)


def _pairs_of_large(
    bucket: NDArray[np.int64], texts: Sketch, banding: Banding, clusters: Clusters
) -> Iterator[tuple[int, int]]:
    """Each with the first, which mostly connects them all; then whatever is still apart, block by block."""
    first = int(bucket[0])
    yield from ((first, other) for other in bucket[1:].tolist())
    roots = np.array([clusters.root(item) for item in bucket.tolist()])
    if (roots == roots[0]).all():
        return
    for start in range(0, len(bucket), _BLOCK):
        left, left_roots = bucket[start : start + _BLOCK], roots[start : start + _BLOCK]
        for at, item in enumerate(left.tolist()):
            after = slice(start + at + 1, None)
            others = bucket[after][roots[after] != left_roots[at]]
            pairs = np.stack((np.full(len(others), item), others), axis=1)
            yield from map(tuple, pairs[_may_be_similar(texts, pairs, banding)].tolist())


def _may_be_similar(
    texts: Sketch, pairs: NDArray[np.int64], banding: Banding, other: Sketch | None = None
) -> NDArray[np.bool_]:
    """Whether pairs can reach the threshold by their MinHash values: an estimate, with a wide margin.

    Last bytes agree with probability s + (1 - s) / 256 for a similarity s, independently for each value.
    """
    right = texts if other is None else other
    used = texts.minima.shape[1]
    expected = banding.threshold + (1 - banding.threshold) / 256
    least = used * expected - _DEVIATIONS * np.sqrt(used * expected * (1 - expected))
    agree = np.empty(len(pairs), dtype=np.int32)
    for start in range(0, len(pairs), 100_000):
        block = pairs[start : start + 100_000]
        agree[start : start + 100_000] = np.count_nonzero(
            texts.minima[block[:, 0]] == right.minima[block[:, 1]], axis=1
        )
    return agree >= least


class Match(NamedTuple):
    """The most similar of some other texts, by its position, and how similar it is."""

    position: int
    similarity: float


def most_similar(
    texts: Sketch, shingles: Shingles, others: Sketch, other_shingles: Shingles, banding: Banding
) -> dict[int, Match]:
    """For each text that has one, the most similar of some others at or over the threshold; the first of equals."""
    some = np.flatnonzero(others.sizes)
    asked = np.flatnonzero(texts.sizes)
    count = np.int64(len(others.sizes))
    found = np.empty(0, dtype=np.int64)
    for band in range(banding.bands):
        keys = others.bands[some, band]
        order = np.argsort(keys, kind="stable")
        wanted = texts.bands[asked, band]
        low = np.searchsorted(keys[order], wanted, side="left")
        high = np.searchsorted(keys[order], wanted, side="right")
        hits = high - low
        left = np.repeat(asked, hits)
        within = np.arange(len(left)) - np.repeat(np.cumsum(hits) - hits, hits)
        right = some[order[np.repeat(low, hits) + within]]
        pairs = np.stack((left, right), axis=1)
        pairs = pairs[_may_be_similar(texts, pairs, banding, others)]
        found = np.union1d(found, pairs[:, 0] * count + pairs[:, 1])
    best: dict[int, Match] = {}
    for text, other in zip((found // count).tolist(), (found % count).tolist(), strict=True):
        similarity = jaccard(shingles.set_of(text), other_shingles.set_of(other))
        if similarity >= banding.threshold and (text not in best or similarity > best[text].similarity):
            best[text] = Match(other, similarity)
    return best
