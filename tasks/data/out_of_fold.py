"""What each row's text says about its label, by a model that did not see the row: a bag of words, fold by fold.

Texts are read once. Their words lie as 32-bit hashes in a temporary file, so that memory does not grow with their
length. Everything is worked out in the order of the texts' hashes, so the order of the rows changes nothing.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

# A word is a run of letters and digits, one ideograph or kana (written without blanks), or a run of symbols.
_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{_IDEOGRAPHS}]|[^\W{_IDEOGRAPHS}]+|[^\w\s]+")
_NOT_ASCII = re.compile(r"[^\x00-\x7f]")
BREAK = 0  # stands between a text's words and its odd characters; no word hashes to it
_KNOWN_WORDS = 500_000  # word hashes that are kept; more are forgotten and worked out again
_FLUSH = 1 << 20  # words that are held before they go to the file

MIN_ROWS = 100  # below, the model guesses, and so would whoever believes it
MIN_CLASS_ROWS = 8  # of a label, outside of each fold: fewer do not show what its texts are like
FOLDS = 5
_FOLDS_WHEN_MANY = 3  # a smaller part of the rows is enough to learn from
_MANY_ROWS = 200_000
# What a linear model of words has learned from so many rows, more rows hardly add to.
_TRAINING_ROWS = 100_000
_TRAINING_WORDS = 20_000_000
_BATCH_WORDS = 2_000_000  # words that are turned into features at a time
_BUCKETS = 1 << 20
_WEIGHTS = 1 << 21  # features times labels
_INVERSE_PENALTY = 5.0  # on complaints: accuracy 0.77 at 1 to 10, and there confidence (0.74) is nearest to it


@dataclass(frozen=True)
class Words:
    """The words of n texts, as hashes.

    Attributes:
        tokens: the words of all texts one after another, each text's followed by `BREAK` and its odd characters if it
            has any (characters beyond ASCII that are not words of their own). A file, not memory.
        starts: where each text begins, shape [n + 1].
        content: a hash of each text, shape [n].
    """

    tokens: NDArray[np.uint32]
    starts: NDArray[np.int64]
    content: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.content)

    def gather(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """The tokens of some texts, and for each token the index into `rows` that it is of."""
        lengths = self.starts[rows + 1] - self.starts[rows]
        owners = np.repeat(np.arange(len(rows)), lengths)
        firsts = np.cumsum(lengths) - lengths
        at = np.arange(len(owners)) + np.repeat(self.starts[rows] - firsts, lengths)
        return self.tokens[at], owners

    def batches(self, rows: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """`rows` in parts of about `_BATCH_WORDS` words."""
        ends = np.cumsum(self.starts[rows + 1] - self.starts[rows])
        part = ends // _BATCH_WORDS
        for piece in np.split(rows, np.flatnonzero(np.diff(part)) + 1):
            if len(piece):
                yield piece


def split_words(text: str) -> list[str]:
    """The words of a text, case folded."""
    return _WORD.findall(text.casefold())


def odd_characters(text: str, words: Sequence[str]) -> list[str]:
    """The characters beyond ASCII that are not words of their own, sorted: a letter of another script, a blank that
    cannot be seen.
    """
    if text.isascii():
        return []
    return sorted(set(_NOT_ASCII.findall(text.casefold())).difference(words))


def hash_word(word: str) -> int:
    """32 bits, never `BREAK`."""
    digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=4).digest()
    return int.from_bytes(digest, "little") or 1


@contextmanager
def read_words(texts: Callable[[], Iterator[str]]) -> Iterator[Words]:
    """The words of the texts, for as long as the context is open."""
    known: dict[str, int] = {}

    def hashes(words: Sequence[str]) -> list[int]:
        found = []
        for word in words:
            value = known.get(word)
            if value is None:
                if len(known) >= _KNOWN_WORDS:
                    known.clear()
                value = known[word] = hash_word(word)
            found.append(value)
        return found

    with tempfile.TemporaryFile(prefix="goldgate-words-") as file:
        lengths: list[NDArray[np.int32]] = []
        content: list[NDArray[np.uint64]] = []
        held: list[int] = []
        of_texts: list[int] = []
        digests: list[bytes] = []

        def flush() -> None:
            file.write(np.array(held, dtype=np.uint32).tobytes())
            lengths.append(np.array(of_texts, dtype=np.int32))
            content.append(np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64))
            for filled in (held, of_texts, digests):
                filled.clear()

        for text in texts():
            words = split_words(text)
            tokens = hashes(words)
            odd = odd_characters(text, words)
            if odd:
                tokens += [BREAK, *hashes(odd)]
            held += tokens
            of_texts.append(len(tokens))
            digests.append(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())
            if len(held) >= _FLUSH:
                flush()
        flush()
        file.flush()
        starts = np.concatenate([[0], np.cumsum(np.concatenate(lengths), dtype=np.int64)])
        yield Words(_map(file, int(starts[-1])), starts, np.concatenate(content))


def _map(file: IO[bytes], count: int) -> NDArray[np.uint32]:
    if count == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype=np.uint32)
    return np.memmap(file, dtype=np.uint32, mode="r", shape=(count,))


# -- the model ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Features:
    """Words as columns of a matrix: tf-idf with 1 + log(tf), rows of length 1.

    Attributes:
        columns: the column of each bucket of word hashes, -1 for none, shape [`_BUCKETS`].
        idf: log((1 + rows) / (1 + rows with the word)) + 1, shape [columns].
    """

    columns: NDArray[np.int32]
    idf: NDArray[np.float32]

    def matrix(self, words: Words, rows: NDArray[np.int64]) -> csr_matrix:
        """Shape [rows, columns], float32; columns ascend in each row."""
        from scipy.sparse import csr_matrix

        tokens, owners = words.gather(rows)
        columns = self.columns[_bucket(tokens)]
        known = (columns >= 0) & (tokens != BREAK)
        cells, counts = np.unique(owners[known] * len(self.idf) + columns[known], return_counts=True)
        at_row, at_column = np.divmod(cells, max(1, len(self.idf)))
        values = (1.0 + np.log(counts)) * self.idf[at_column]
        squares = np.bincount(at_row, values**2, minlength=len(rows))
        values /= np.sqrt(squares[at_row])
        ends = np.concatenate([[0], np.cumsum(np.bincount(at_row, minlength=len(rows)))])
        shape = (len(rows), len(self.idf))
        return csr_matrix((values.astype(np.float32), at_column.astype(np.int32), ends.astype(np.int32)), shape=shape)


@dataclass(frozen=True)
class OutOfFold:
    """What the text of each of n rows says about its label, of `labels` many.

    Attributes:
        probabilities: of each label by the model that did not see the row's fold, shape [n, labels]; 0 for labels
            that are not judged, and in rows of such labels.
        judged: the labels that have rows enough, shape [labels].
        folds: the fold of each row, shape [n].
        order: the rows by the hash of their texts: for sums that must not depend on the order of the rows.
        features: the words that count.
        weights: of each fold's model, shape [folds, columns, labels].
        intercepts: shape [folds, labels]; -inf for labels that are not judged.
        refusal: why nothing can be said at all; None if something can. Then all probabilities are 0.
    """

    probabilities: NDArray[np.float32]
    judged: NDArray[np.bool_]
    folds: NDArray[np.int8]
    order: NDArray[np.int64]
    features: Features
    weights: NDArray[np.float32]
    intercepts: NDArray[np.float32]
    refusal: str | None

    def judged_rows(self, labels: NDArray[np.int32]) -> NDArray[np.int64]:
        """The rows whose label is judged, in `order`."""
        return np.empty(0, dtype=np.int64) if self.refusal else self.order[self.judged[labels[self.order]]]


def predict_out_of_fold(
    words: Words, labels: NDArray[np.int32], label_count: int, groups: NDArray[np.int32] | None = None
) -> OutOfFold:
    """Predict each row's label from its words, by multinomial logistic regression on the other folds.

    Rows with the same text, and rows of one group, are in one fold. The folds have like shares of each label. From
    more than `_TRAINING_ROWS` rows the models learn from a part, drawn by label; all rows are predicted.

    Args:
        words: of the texts.
        labels: a code in [0, label_count) for each row.
        label_count: how many labels there are.
        groups: the group of each row; negative for none.
    """
    count = len(words)
    order = np.lexsort((labels, words.content))
    fold_count = FOLDS if count <= _MANY_ROWS else _FOLDS_WHEN_MANY
    folds = _assign_folds(words.content, labels, groups, order, fold_count)
    table = np.zeros((label_count, fold_count), dtype=np.int64)
    np.add.at(table, (labels, folds), 1)
    judged = (table.sum(axis=1, keepdims=True) - table).min(axis=1) >= MIN_CLASS_ROWS
    refusal = None
    if count < MIN_ROWS:
        refusal = f"{count:,} rows are fewer than the {MIN_ROWS} that it takes to learn what belongs to a label"
    elif judged.sum() < 2:
        refusal = f"fewer than two labels have {MIN_CLASS_ROWS} rows outside of each fold (groups stay in one fold)"
    probabilities = np.zeros((count, label_count), dtype=np.float32)
    intercepts = np.full((fold_count, label_count), -np.inf, dtype=np.float32)
    if refusal:
        nothing = Features(np.full(_BUCKETS, -1, dtype=np.int32), np.empty(0, dtype=np.float32))
        weights = np.zeros((fold_count, 0, label_count), dtype=np.float32)
        return OutOfFold(probabilities, judged, folds, order, nothing, weights, intercepts, refusal)

    usable = order[judged[labels[order]]]
    sample, sample_weights = _draw_sample(words, labels, usable, label_count)
    features = _choose_features(words, sample, _WEIGHTS // int(judged.sum()))
    weights = np.zeros((fold_count, len(features.idf), label_count), dtype=np.float32)
    learned = features.matrix(words, sample)
    for fold in range(fold_count):
        use = np.flatnonzero(folds[sample] != fold)
        _fit(learned[use], labels[sample[use]], sample_weights[use], weights[fold], intercepts[fold])
    del learned
    for rows in words.batches(usable):
        found = features.matrix(words, rows)
        for fold in range(fold_count):
            here = np.flatnonzero(folds[rows] == fold)
            probabilities[rows[here]] = softmax(found[here] @ weights[fold] + intercepts[fold])
    return OutOfFold(probabilities, judged, folds, order, features, weights, intercepts, None)


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Probabilities over the last axis."""
    raised = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return raised / raised.sum(axis=-1, keepdims=True)


def _bucket(tokens: NDArray[np.uint32]) -> NDArray[np.int64]:
    return (tokens & np.uint32(_BUCKETS - 1)).astype(np.int64)


def _assign_folds(
    content: NDArray[np.uint64],
    labels: NDArray[np.int32],
    groups: NDArray[np.int32] | None,
    order: NDArray[np.int64],
    fold_count: int,
) -> NDArray[np.int8]:
    """Deal the units (groups, or rows of one text) of each label to the folds in turn, in the order of their hashes.

    A unit goes by its first row in `order`.
    """
    keys = content[order]
    if groups is not None:
        of_group = groups[order]
        grouped = np.flatnonzero(of_group >= 0)
        _, first, inverse = np.unique(of_group[grouped], return_index=True, return_inverse=True)
        keys[grouped] = keys[grouped[first[inverse]]]
    _, first, unit = np.unique(keys, return_index=True, return_inverse=True)
    of_unit = labels[order][first]
    by_label = np.argsort(of_unit, kind="stable")  # units ascend by hash, and so they do within each label
    sizes = np.bincount(of_unit)
    ranks = np.arange(len(of_unit)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    fold_of_unit = np.empty(len(of_unit), dtype=np.int8)
    fold_of_unit[by_label] = ranks % fold_count
    folds = np.empty(len(content), dtype=np.int8)
    folds[order] = fold_of_unit[unit]
    return folds


def _draw_sample(
    words: Words, labels: NDArray[np.int32], usable: NDArray[np.int64], label_count: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The rows to learn from, in order, and how many rows each stands for.

    All of them if they are few; else of each label in proportion, and at least half of an equal share.
    """
    mean_words = max(1.0, float((words.starts[usable + 1] - words.starts[usable]).mean()))
    room = min(_TRAINING_ROWS, int(_TRAINING_WORDS / mean_words))
    counts = np.bincount(labels[usable], minlength=label_count)
    if len(usable) <= room:
        return usable, np.ones(len(usable), dtype=np.float32)
    floor = room / (2 * np.count_nonzero(counts))
    quota = np.minimum(counts, np.ceil(np.maximum(floor, counts * (room / len(usable))))).astype(np.int64)
    # The content's hash decides the order, so the first rows of a label are drawn as if by lot.
    by_label = np.argsort(labels[usable], kind="stable")
    ranks = np.arange(len(usable)) - np.repeat(np.cumsum(counts) - counts, counts)
    taken = np.sort(by_label[ranks < quota[labels[usable[by_label]]]])
    sample = usable[taken]
    return sample, (counts / np.maximum(1, quota))[labels[sample]].astype(np.float32)


def _choose_features(words: Words, sample: NDArray[np.int64], limit: int) -> Features:
    """The words that at least two of the rows hold, at most `limit` of them, those that most rows hold first."""
    rows_with = np.zeros(_BUCKETS, dtype=np.int64)
    for rows in words.batches(sample):
        tokens, owners = words.gather(rows)
        held = tokens != BREAK
        cells = np.unique(owners[held] * _BUCKETS + _bucket(tokens[held]))
        rows_with += np.bincount(cells % _BUCKETS, minlength=_BUCKETS)
    chosen = np.flatnonzero(rows_with >= 2)
    if len(chosen) > limit:
        chosen = np.sort(chosen[np.lexsort((chosen, -rows_with[chosen]))[:limit]])
    columns = np.full(_BUCKETS, -1, dtype=np.int32)
    columns[chosen] = np.arange(len(chosen))
    idf = np.log((1 + len(sample)) / (1 + rows_with[chosen])) + 1
    return Features(columns, idf.astype(np.float32))


def _fit(
    features: csr_matrix,
    labels: NDArray[np.int32],
    sample_weights: NDArray[np.float32],
    weights: NDArray[np.float32],
    intercepts: NDArray[np.float32],
) -> None:
    """Write a model's weights, shape [columns, labels], and intercepts, shape [labels], for the labels that occur."""
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    if features.shape[1] == 0:  # no word occurs twice: what is left are the shares of the labels
        shares = np.bincount(labels, sample_weights, minlength=len(intercepts))
        intercepts[shares > 0] = np.log(shares[shares > 0] / shares.sum())
        return
    model = LogisticRegression(C=_INVERSE_PENALTY, tol=1e-3, max_iter=200)
    # The products of sparse matrices, which most of the time goes into, use one thread; the others would only spin: on
    # two busy cores that took twenty times as long.
    with threadpool_limits(1):
        model.fit(features, labels, sample_weight=sample_weights)
    if len(model.classes_) == 2:  # one column of weights, for the second label against the first
        weights[:, model.classes_[1]] = model.coef_[0]
        intercepts[model.classes_] = [0.0, model.intercept_[0]]
        return
    weights[:, model.classes_] = model.coef_.T
    intercepts[model.classes_] = model.intercept_
