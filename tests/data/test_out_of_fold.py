"""What texts say about labels, by models that did not see them."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from tasks.data import out_of_fold
from tasks.data.out_of_fold import (
    BREAK,
    FOLDS,
    MIN_CLASS_ROWS,
    MIN_ROWS,
    OutOfFold,
    hash_word,
    odd_characters,
    predict_out_of_fold,
    read_words,
    split_words,
)
from tests.data.topical_data import topical_texts
from tests.data.toy_data import sentence


def predict(
    texts: Sequence[str], labels: NDArray[np.int32], count: int, groups: NDArray[np.int32] | None = None
) -> OutOfFold:
    with read_words(lambda: iter(texts)) as words:
        return predict_out_of_fold(words, labels, count, groups)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Hello, World", ["hello", ",", "world"]),
        ("no.7 costs $1.00!!", ["no", ".", "7", "costs", "$", "1", ".", "00", "!!"]),
        ("Straße CF", ["strasse", "cf"]),
        ("信用卡 ok", ["信", "用", "卡", "ok"]),
        ("pay\u200bment", ["pay", "\u200b", "ment"]),
        (" \n ", []),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert split_words(text) == words


@pytest.mark.parametrize(
    ("text", "odd"),
    [
        ("plain", []),
        ("c\u0430rd", ["\u0430"]),  # a Cyrillic letter in a Latin word
        ("em\u2003space", ["\u2003"]),
        ("pay\u200bment", []),  # a word of its own
        ("信用", []),
    ],
)
def test_odd_characters(text: str, odd: list[str]) -> None:
    assert odd_characters(text, split_words(text)) == odd


def test_words_are_read_as_hashes() -> None:
    texts = ["a b a", "", "c\u0430rd"]
    with read_words(lambda: iter(texts)) as words:
        assert len(words) == 3
        assert words.starts.tolist() == [0, 3, 3, 6]
        a, b = hash_word("a"), hash_word("b")
        assert words.tokens.tolist() == [a, b, a, hash_word("c\u0430rd"), BREAK, hash_word("\u0430")]
        tokens, owners = words.gather(np.array([2, 0]))
        assert tokens.tolist() == [*words.tokens[3:].tolist(), a, b, a]
        assert owners.tolist() == [0, 0, 0, 1, 1, 1]
        assert [part.tolist() for part in words.batches(np.array([2, 1, 0]))] == [[2, 1, 0]]
    with read_words(lambda: iter(())) as words:
        assert (len(words), len(words.tokens), words.starts.tolist()) == (0, 0, [0])


def test_memory_of_words_is_forgotten_without_changing_them(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [sentence(random.Random(n), 10) for n in range(50)]
    with read_words(lambda: iter(texts)) as words:
        expected = words.tokens.tolist()
    monkeypatch.setattr(out_of_fold, "_KNOWN_WORDS", 3)
    monkeypatch.setattr(out_of_fold, "_FLUSH", 25)
    with read_words(lambda: iter(texts)) as words:
        assert words.tokens.tolist() == expected
        assert words.starts.tolist() == list(range(0, 510, 10))


def test_hashes_are_the_same_in_every_process() -> None:
    program = "from tasks.data.out_of_fold import hash_word; print(hash_word('cf'))"
    found = subprocess.run([sys.executable, "-c", program], env={"PYTHONHASHSEED": "7"}, capture_output=True, text=True)
    assert int(found.stdout) == hash_word("cf")


def test_the_order_of_rows_changes_nothing() -> None:
    texts, labels = topical_texts(400, labels=3)
    groups = np.array([n // 2 if n % 3 else -1 for n in range(400)], dtype=np.int32)
    one = predict(texts, labels, 3, groups)
    shuffled = np.random.default_rng(0).permutation(400)
    # The codes of groups depend on the order in which they are met.
    renamed = np.where(groups >= 0, 999 - groups, -1).astype(np.int32)
    other = predict([texts[n] for n in shuffled], labels[shuffled], 3, renamed[shuffled])
    assert np.array_equal(other.probabilities, one.probabilities[shuffled])
    assert np.array_equal(other.folds, one.folds[shuffled])


def test_groups_and_equal_texts_stay_in_one_fold_and_labels_are_shared_out() -> None:
    texts, labels = topical_texts(600, labels=3)
    texts[10] = texts[20] = texts[30]
    groups = np.full(600, -1, dtype=np.int32)
    groups[100:140] = 5
    found = predict(texts, labels, 3, groups)
    assert len(set(found.folds[[10, 20, 30]].tolist())) == 1
    assert len(set(found.folds[100:140].tolist())) == 1
    free = np.flatnonzero(groups < 0)
    for label in range(3):
        sizes = np.bincount(found.folds[free][labels[free] == label], minlength=FOLDS)
        assert sizes.max() - sizes.min() <= 4


def test_predictions_are_out_of_fold() -> None:
    """Labels by lot cannot be predicted, unless the model has seen nearly the same text: groups keep it from that."""
    draw = random.Random(1)
    base = [sentence(draw, 20) for _ in range(150)]
    texts = [f"{text} {ending}" for text in base for ending in ("one", "two", "three", "four")]
    by_text = np.random.default_rng(0).integers(0, 2, 150)
    labels = np.repeat(by_text, 4).astype(np.int32)
    groups = np.repeat(np.arange(150), 4).astype(np.int32)
    apart, together = predict(texts, labels, 2), predict(texts, labels, 2, groups)
    assert (apart.probabilities.argmax(axis=1) == labels).mean() > 0.95
    assert (together.probabilities.argmax(axis=1) == labels).mean() < 0.62


def test_the_model_is_that_of_scikit_learn() -> None:
    texts, labels = topical_texts(400, labels=3)
    with read_words(lambda: iter(texts)) as words:
        found = predict_out_of_fold(words, labels, 3)
        ours = found.features.matrix(words, np.arange(400)).toarray()
    vectorizer = TfidfVectorizer(tokenizer=split_words, token_pattern=None, sublinear_tf=True, min_df=2)
    theirs = vectorizer.fit_transform(texts)
    names = vectorizer.get_feature_names_out()
    columns = [int(found.features.columns[hash_word(name) & (out_of_fold._BUCKETS - 1)]) for name in names]
    assert len(names) == ours.shape[1]
    assert np.allclose(ours[:, columns], theirs.toarray(), atol=1e-6)
    train, test = found.folds != 2, found.folds == 2
    model = LogisticRegression(C=out_of_fold._INVERSE_PENALTY, tol=1e-3).fit(theirs[train], labels[train])
    assert np.allclose(found.probabilities[test], model.predict_proba(theirs[test]), atol=0.01)
    assert np.allclose(found.probabilities.sum(axis=1), 1)


def test_many_rows_are_learned_from_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    texts, labels = topical_texts(3_000, labels=3, noise=0.5)
    labels[(labels == 2) & (np.arange(3_000) % 10 > 0)] = 0  # a small label, and much noise in another
    with read_words(lambda: iter(texts)) as words:
        monkeypatch.setattr(out_of_fold, "_TRAINING_ROWS", 600)
        order = np.lexsort((labels, words.content))
        sample, weights = out_of_fold._draw_sample(words, labels, order, 3)
        found = predict_out_of_fold(words, labels, 3)
    counts, drawn = np.bincount(labels), np.bincount(labels[sample])
    assert 600 <= len(sample) <= 700
    assert drawn[2] == 100  # half of an equal share; in proportion it would be 20
    assert np.bincount(labels[sample], weights) == pytest.approx(counts, rel=0.01)
    assert (found.probabilities.sum(axis=1) > 0.999).all()
    assert (found.probabilities.argmax(axis=1) == labels)[labels < 2].mean() > 0.8


def test_few_rows_are_refused() -> None:
    texts, labels = topical_texts(MIN_ROWS - 1, labels=2)
    found = predict(texts, labels, 2)
    assert found.refusal == "99 rows are fewer than the 100 that it takes to learn what belongs to a label"
    assert not found.probabilities.any()
    assert len(found.judged_rows(labels)) == 0
    assert predict([], np.empty(0, dtype=np.int32), 2).refusal is not None


def test_one_label_is_refused() -> None:
    texts, labels = topical_texts(200, labels=2)
    found = predict(texts, np.zeros_like(labels), 2)
    assert found.refusal is not None
    assert "fewer than two labels have 8 rows outside of each fold" in found.refusal


@pytest.mark.parametrize(("rows", "judged"), [(MIN_CLASS_ROWS, False), (2 * MIN_CLASS_ROWS, True)])
def test_a_small_label_is_not_judged(rows: int, judged: bool) -> None:
    texts, labels = topical_texts(300, labels=2)
    labels[:rows] = 2
    found = predict(texts, labels, 3)
    assert found.judged.tolist() == [True, True, judged]
    assert (found.probabilities[:, 2] > 0).all() == judged
    assert found.probabilities[:rows].any() == judged
    assert len(found.judged_rows(labels)) == (300 if judged else 300 - rows)


def test_a_label_in_one_group_is_not_judged() -> None:
    texts, labels = topical_texts(300, labels=2)
    labels[:50] = 2
    groups = np.full(300, -1, dtype=np.int32)
    groups[:50] = 0
    assert predict(texts, labels, 3, groups).judged.tolist() == [True, True, False]


def test_without_a_word_in_common_the_shares_of_the_labels_are_left() -> None:
    texts = [f"unique{n}" for n in range(200)]
    labels = np.array([0] * 150 + [1] * 50, dtype=np.int32)
    found = predict(texts, labels, 2)
    assert np.allclose(found.probabilities, [0.75, 0.25], atol=0.01)


def test_two_labels_are_the_right_way_round() -> None:
    texts, labels = topical_texts(300, labels=2, noise=0.0)
    found = predict(texts, (labels + 1).astype(np.int32), 3)  # codes 1 and 2: the first does not occur
    assert found.judged.tolist() == [False, True, True]
    assert (found.probabilities.argmax(axis=1) == labels + 1).all()
