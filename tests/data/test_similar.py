"""Texts that are the same, nearly the same, or share long runs of words."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tasks.data.similar import (
    MIN_WORDS,
    NGRAM_WORDS,
    Clusters,
    NearDuplicates,
    Profile,
    jaccard,
    long_runs,
    ngrams,
    normalise,
    profile_texts,
)
from tests.data.toy_data import sentence


def profile(text: str) -> Profile:
    return next(profile_texts([text]))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Hello  World", " hello\nworld ", True),
        ("ＡＢＣ", "abc", True),  # full-width letters
        ("straße", "STRASSE", True),
        ("$1.00", "$100", False),
        ("$1.00", "€1.00", False),
        ("1 000", "1000", False),
    ],
)
def test_normalised_equality(one: str, other: str, same: bool) -> None:
    assert (normalise(one) == normalise(other)) is same


def test_words_lose_punctuation_at_their_ends_only() -> None:
    assert np.array_equal(profile('He said: "stop", (now)!').words, profile("he said stop now").words)
    assert not np.array_equal(profile("$1.00").words, profile("$100").words)
    assert not np.array_equal(profile("$1.00").words, profile("€1.00").words)
    assert len(profile("a - b ... c").words) == 4  # a dash is a word, dots alone are none


def test_ngrams_are_hashes_of_runs() -> None:
    words = profile("a b c a b c d").words
    found = ngrams(words, 3)
    assert found.shape == (5,)
    assert found[0] == found[3]
    assert len(set(found.tolist())) == 4
    assert ngrams(words, 8).shape == (0,)


def test_jaccard_is_that_of_sets() -> None:
    one, other = np.array([1, 2, 3, 4], dtype=np.uint64), np.array([3, 4, 5, 6], dtype=np.uint64)
    assert jaccard(one, other) == pytest.approx(2 / 6)
    assert jaccard(one, one) == 1.0
    assert jaccard(one[:0], one[:0]) == 0.0


def test_short_texts_have_no_near_duplicates() -> None:
    short = " ".join(f"word{n}" for n in range(MIN_WORDS - 1))
    assert profile(short).sketch is None
    assert profile(short + " more").sketch is not None
    index = NearDuplicates(list(profile_texts(["$1.00", "$1.01", "$ 1.00", short, short + "s"])), 0.8)
    assert list(index.pairs()) == []
    assert index.most_similar(profile("$1.00")) is None


def test_near_duplicates_are_those_of_a_full_comparison() -> None:
    draw = random.Random(5)
    texts = []
    for _ in range(40):
        words = sentence(draw, 40).split()
        texts.append(" ".join(words))
        for changes in range(1, 6):  # from nearly the same to not at all
            changed = list(words)
            for position in draw.sample(range(40), changes):
                changed[position] = f"other{draw.randrange(10_000)}"
            texts.append(" ".join(changed))
    profiles = list(profile_texts(texts))
    for threshold in (0.5, 0.8, 0.9):
        expected = Clusters(len(texts))
        for one in range(len(texts)):
            for other in range(one):
                if jaccard(profiles[one].shingles, profiles[other].shingles) >= threshold:
                    expected.join(one, other)
        found = Clusters(len(texts))
        for one, other in NearDuplicates(profiles, threshold).pairs():
            found.join(one, other)
        assert found.members() == expected.members()
        assert 40 < len(expected.members()) < len(texts)


def test_the_most_similar_text_is_found() -> None:
    draw = random.Random(3)
    texts = [sentence(draw, 50) for _ in range(50)]
    index = NearDuplicates(list(profile_texts(texts)), 0.8)
    near = index.most_similar(profile(texts[7] + " and more"))
    assert near is not None
    assert near.position == 7
    assert near.jaccard == pytest.approx(48 / 50)
    assert index.most_similar(profile(sentence(draw, 50))) is None


def test_long_runs_are_found_and_filler_is_not() -> None:
    shared = " ".join(f"s{n}" for n in range(NGRAM_WORDS))
    one, other = profile(f"a b {shared} c d"), profile(f"{shared} x y")
    assert len(np.intersect1d(long_runs(one.words), long_runs(other.words))) == 1
    less = profile(" ".join(shared.split()[:-1]) + " x y z")
    assert len(np.intersect1d(long_runs(one.words), long_runs(less.words))) == 0
    assert len(long_runs(profile("XXXX " * 50).words)) == 0
    assert len(long_runs(profile("XXXX and XXXX / " * 50).words)) == 0


def test_clusters_join_what_is_connected() -> None:
    clusters = Clusters(6)
    clusters.join(4, 2)
    clusters.join(2, 5)
    clusters.join(0, 1)
    assert clusters.members() == [[0, 1], [2, 4, 5], [3]]
    assert clusters.root(5) == 2
