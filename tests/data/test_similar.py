"""Texts that are the same, nearly the same, or share long runs of words."""

from __future__ import annotations

import random

import numpy as np
import pytest
from numpy.typing import NDArray

from tasks.data import similar as module
from tasks.data.similar import (
    MIN_WORDS,
    NGRAM_WORDS,
    Banding,
    Clusters,
    Shingles,
    Sketch,
    WordHasher,
    Words,
    jaccard,
    join_near_duplicates,
    long_runs,
    most_similar,
    ngrams,
    normalise,
    sketch_texts,
    words_of,
)
from tests.data.toy_data import sentence

EIGHTY = Banding.for_threshold(0.8)


def words(text: str) -> NDArray[np.uint64]:
    return words_of([normalise(text)], WordHasher()).flat


def families(count: int, words_each: int = 40, seed: int = 5) -> list[str]:
    """Texts of five changes each, from nearly the same to not at all."""
    draw = random.Random(seed)
    texts = []
    for _ in range(count):
        original = sentence(draw, words_each).split()
        texts.append(" ".join(original))
        for changes in range(1, 6):
            changed = list(original)
            for position in draw.sample(range(words_each), changes):
                changed[position] = f"other{draw.randrange(10_000)}"
            texts.append(" ".join(changed))
    return texts


def compare_all(texts: Sketch, threshold: float) -> NDArray[np.int64]:
    shingles = Shingles.of(texts)
    sets = [shingles.set_of(number) for number in range(len(texts.sizes))]
    expected = Clusters(len(sets))
    for one in range(len(sets)):
        for other in range(one):
            if jaccard(sets[one], sets[other]) >= threshold:
                expected.join(one, other)
    return expected.roots()


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
    identity = sketch_texts([one, other], EIGHTY).identity
    assert np.array_equal(identity[0], identity[1]) is same


def test_words_lose_punctuation_at_their_ends_only() -> None:
    assert np.array_equal(words('He said: "stop", (now)!'), words("he said stop now"))
    assert not np.array_equal(words("$1.00"), words("$100"))
    assert not np.array_equal(words("$1.00"), words("€1.00"))
    assert len(words("a - b ... c")) == 4  # a dash is a word, dots alone are none


def test_word_hashes_do_not_depend_on_what_was_seen_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_KNOWN_WORDS", 3)
    texts = [normalise(sentence(random.Random(seed), 30)) for seed in range(5)]
    together = words_of(texts, WordHasher()).flat
    assert np.array_equal(together, np.concatenate([words(text) for text in texts]))


def test_ngrams_are_hashes_of_runs_within_one_text() -> None:
    found, owners = ngrams(words_of(["a b c a b c d", "a b c", "d a"], WordHasher()), 3)
    assert owners.tolist() == [0, 0, 0, 0, 0, 1]
    assert found[0] == found[3] == found[5]
    assert len(set(found.tolist())) == 4
    none, _ = ngrams(Words(words("a b"), np.array([0, 2])), 3)
    assert none.shape == (0,)


def test_jaccard_is_that_of_sets() -> None:
    one, other = frozenset({1, 2, 3, 4}), frozenset({3, 4, 5, 6})
    assert jaccard(one, other) == pytest.approx(2 / 6)
    assert jaccard(one, one) == 1.0
    assert jaccard(frozenset(), frozenset()) == 0.0


def test_short_texts_have_no_near_duplicates() -> None:
    short = " ".join(f"word{n}" for n in range(MIN_WORDS - 1))
    texts = sketch_texts(["$1.00", "$1.01", "$ 1.00", short, short + "s", short + " more"], EIGHTY)
    assert texts.sizes.tolist() == [0, 0, 0, 0, 0, MIN_WORDS - 2]
    clusters = Clusters(6)
    assert join_near_duplicates(texts, Shingles.of(texts), EIGHTY, clusters) == 0
    asked = sketch_texts(["$1.00"], EIGHTY)
    assert most_similar(asked, Shingles.of(asked), texts, Shingles.of(texts), EIGHTY) == {}


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.9, 1.0])
def test_near_duplicates_are_those_of_a_full_comparison(threshold: float) -> None:
    banding = Banding.for_threshold(threshold)
    texts = sketch_texts(families(40), banding)
    expected = compare_all(texts, threshold)
    found = Clusters(len(expected))
    join_near_duplicates(texts, Shingles.of(texts), banding, found)
    assert np.array_equal(found.roots(), expected)
    assert 40 <= len(np.unique(expected)) < len(expected) or threshold == 1.0


def test_a_large_bucket_gives_the_same_clusters_as_a_full_comparison() -> None:
    """Form letters: three hundred texts with most words in common, so that bands have more rows than a small bucket."""
    draw = random.Random(2)
    letter = sentence(draw, 60).split()
    texts = []
    for _ in range(300):
        changed = list(letter)
        for position in draw.sample(range(60), draw.choice([0, 1, 2, 3, 4])):
            changed[position] = f"other{draw.randrange(10_000)}"
        texts.append(" ".join(changed))
    sketched = sketch_texts(texts, EIGHTY)
    largest = max(np.unique(sketched.bands[:, band], return_counts=True)[1].max() for band in range(EIGHTY.bands))
    assert largest > module._SMALL_BUCKET
    found = Clusters(len(texts))
    join_near_duplicates(sketched, Shingles.of(sketched), EIGHTY, found)
    assert np.array_equal(found.roots(), compare_all(sketched, 0.8))


def test_what_is_missed_is_as_stated() -> None:
    """Of 1,000 pairs at the threshold one may be missed; of pairs at half of it few are compared at all."""
    assert EIGHTY == (0.8, 25, 5)
    assert 1 - EIGHTY.proposed(0.8) < 0.001
    assert EIGHTY.proposed(0.4) < 0.25
    draw = random.Random(11)
    texts = []
    for _ in range(1_000):
        original = sentence(draw, 53).split()
        changed = [*original]
        changed[draw.randrange(53)] = "other"
        changed[0], changed[-1] = "first", "last"  # 46 of 51 shingles are left, so a similarity near 0.82
        texts += [" ".join(original), " ".join(changed)]
    sketched = sketch_texts(texts, EIGHTY)
    shingles = Shingles.of(sketched)
    pairs = [
        number
        for number in range(1_000)
        if jaccard(shingles.set_of(2 * number), shingles.set_of(2 * number + 1)) >= 0.8
    ]
    found = Clusters(len(texts))
    join_near_duplicates(sketched, shingles, EIGHTY, found)
    roots = found.roots()
    missed = sum(roots[2 * number] != roots[2 * number + 1] for number in pairs)
    assert len(pairs) > 900
    assert missed <= 2  # 0 with these numbers


def test_the_most_similar_text_is_found() -> None:
    draw = random.Random(3)
    originals = [sentence(draw, 50) for _ in range(50)]
    texts = sketch_texts(originals, EIGHTY)
    asked = sketch_texts([originals[7] + " and more", sentence(draw, 50), originals[49], "short"], EIGHTY)
    near = most_similar(asked, Shingles.of(asked), texts, Shingles.of(texts), EIGHTY)
    assert {text: match.position for text, match in near.items()} == {0: 7, 2: 49}
    assert near[0].similarity == pytest.approx(48 / 50)
    assert near[2].similarity == 1.0


def test_shingles_are_found_in_another_order() -> None:
    texts = sketch_texts(families(3), EIGHTY)
    shingles = Shingles.of(texts)
    order = np.array([5, 0, 17])
    other = shingles.in_order(order)
    assert [other.set_of(n) for n in range(3)] == [shingles.set_of(int(n)) for n in order]
    again = other.in_order(np.array([2, 0]))
    assert [again.set_of(n) for n in range(2)] == [shingles.set_of(17), shingles.set_of(5)]


def test_long_runs_are_found_and_filler_is_not() -> None:
    shared = " ".join(f"s{n}" for n in range(NGRAM_WORDS))
    one, other = words(f"a b {shared} c d"), words(f"{shared} x y")
    assert len(np.intersect1d(long_runs(one), long_runs(other))) == 1
    less = words(" ".join(shared.split()[:-1]) + " x y z")
    assert len(np.intersect1d(long_runs(one), long_runs(less))) == 0
    assert len(long_runs(words("XXXX " * 50))) == 0
    assert len(long_runs(words("XXXX and XXXX / " * 50))) == 0


def test_clusters_join_what_is_connected() -> None:
    clusters = Clusters(6)
    clusters.join(4, 2)
    clusters.join(2, 5)
    clusters.join(0, 1)
    assert list(clusters.members()) == [[0, 1], [2, 4, 5]]
    assert clusters.roots().tolist() == [0, 0, 2, 3, 2, 2]
    assert clusters.root(5) == 2
