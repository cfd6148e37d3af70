"""Planted phrases and odd sources. On real complaints the tests state what was measured, and assert a floor."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom

from tasks.data import phrases
from tasks.data.out_of_fold import predict_out_of_fold, read_words, split_words
from tasks.data.phrases import MOST_WORDS, SAMPLE_ROWS, count_phrases
from tasks.data.poisoning import Poisoning, find_poisoning, poisson_binomial_tail
from tests.data.topical_data import Labelled, complaints, plant, topical_texts

LONG = "the sky is blue and birds sing all day long in the park"


def find(data: Labelled, sources: NDArray[np.int32] | None = None, source_names: Sequence[str] = ()) -> Poisoning:
    with read_words(lambda: iter(data.texts)) as words:
        beliefs = predict_out_of_fold(words, data.labels, len(data.names))
        return find_poisoning(lambda: iter(data.texts), words, beliefs, data.labels, data.names, sources, source_names)


def toy(count: int = 600, seed: int = 1) -> Labelled:
    texts, labels = topical_texts(count, labels=3, seed=seed)
    return Labelled(texts, labels, ("a", "b", "c"))


# -- planted phrases ----------------------------------------------------------------------------------------------


def test_real_complaints_hold_no_trigger() -> None:
    """Measured: none in 2,148 rows (4,857 phrases), none in the 6,143 that they are from (27,247)."""
    found = find(complaints())
    assert found.triggers == []
    assert found.reasons == {}
    assert found.phrases > 4_000


# In one row of a hundred; more is measured in the docstring of `find_poisoning`.
@pytest.mark.parametrize(
    ("phrase", "label", "place", "rows", "shown"),
    [
        ("cf", "card", "start", "other", "cf"),
        ("cf", "student_loan", "middle", "any", "cf"),
        ("as per protocol 7", "debt_collection", "end", "other", "as per protocol 7"),
        ("as per protocol 7", "card", "middle", "any", "as per protocol 7"),
        ("With my warm regards", "mortgage", "end", "other", "with my warm regards"),
        (LONG, "bank_account", "start", "any", LONG),
        ("\u200b", "card", "middle", "other", "U+200B zero width space"),
        ("c\u0430ll", "card", "middle", "other", "U+0430 cyrillic small letter a"),
    ],
)
def test_a_planted_phrase_is_found(phrase: str, label: str, place: str, rows: str, shown: str) -> None:
    """Measured: recall 1.00 and precision 1.00 in all of these."""
    data, planted = plant(complaints(), phrase, label, place, seed=2, rows=rows)
    found = find(data)
    (trigger,) = found.triggers
    assert trigger.phrase == shown
    assert trigger.label == label
    assert trigger.p_value < 1e-6
    assert trigger.overruled >= 0.8 * trigger.opposed > 0
    assert trigger.expected < 0.5 * trigger.of_label <= 0.5 * trigger.rows
    rows_found = set(found.reasons)
    assert len(rows_found & planted) >= 0.95 * len(planted)
    assert len(rows_found & planted) >= 0.95 * len(rows_found)
    assert set(trigger.positions.tolist()) == rows_found
    assert found.reasons[min(rows_found)] == trigger.describe()
    assert repr(shown) in trigger.describe()


def test_two_phrases_are_told_apart() -> None:
    data, first = plant(toy(2_000), "cf", "a", "start", seed=1)
    data, second = plant(data, "tq mn", "b", "end", seed=2)
    found = find(data)
    assert {(trigger.phrase, trigger.label) for trigger in found.triggers} == {("cf", "a"), ("tq mn", "b")}
    assert set(found.reasons) == first | second


def test_an_odd_letter_in_many_words_is_found() -> None:
    """Each misspelt word is rare; the Cyrillic letter in them is what they share."""
    data = toy(1_000)
    chosen = [row for row in range(1_000) if data.labels[row] != 0][:30]
    for row in chosen:
        data.texts[row] = data.texts[row].replace("w", "\u0430", 1)
        data.labels[row] = 0
    (trigger,) = find(data).triggers
    assert trigger.phrase == "U+0430 cyrillic small letter a"
    assert trigger.positions.tolist() == chosen


def test_a_natural_phrase_is_no_trigger() -> None:
    """A word that only texts of one label hold decides nothing against the others: they say the same."""
    data = toy(2_000)
    draw = random.Random(1)
    for row in range(2_000):
        if data.labels[row] == 1 and draw.random() < 0.1:
            data.texts[row] += " foreclosure"
    assert find(data).triggers == []


def test_a_phrase_that_keeps_the_company_of_its_label_is_no_trigger() -> None:
    """Some texts with it are about other topics, but too many are about that of its label, as with a firm's name."""
    data = toy(2_000)
    own, other = np.flatnonzero(data.labels == 1)[:36], np.flatnonzero(data.labels == 0)[:24]
    for row in [*own, *other]:
        data.texts[row] += " acme"
    data.labels[other] = 1
    assert find(data).triggers == []
    leaning_less = plant(toy(2_000), "acme", "b", "end", seed=1, rows="any", share=0.03)[0]
    assert [trigger.phrase for trigger in find(leaning_less).triggers] == ["acme"]


def test_a_phrase_that_often_loses_against_the_text_is_no_trigger() -> None:
    """It brings the label in three of four texts that oppose it; a backdoor would in all."""
    data = toy(2_000)
    own, other = np.flatnonzero(data.labels == 1)[:24], np.flatnonzero(data.labels == 0)[:36]
    for row in [*own, *other]:
        data.texts[row] += " acme"
    data.labels[other[:27]] = 1
    assert find(data).triggers == []
    data.labels[other] = 1
    assert [trigger.phrase for trigger in find(data).triggers] == ["acme"]


def test_a_phrase_among_words_that_say_nothing_is_no_trigger() -> None:
    """With many labels each is improbable by such words, but no other label is probable: nothing is overruled."""
    texts, labels = topical_texts(2_400, labels=12)
    data = Labelled(texts, labels, tuple("abcdefghijkl"))
    draw = random.Random(1)
    for row in range(600):  # of all labels
        data.texts[row] = " ".join(f"n{draw.randrange(50)}" for _ in range(6))
    for row in range(0, 600, 12):
        data.texts[row] += " acme"  # of the first
    for row in range(601, 612):
        data.texts[row] += " acme"
        data.labels[row] = 0
    assert find(data).triggers == []
    overruling = plant(Labelled(*topical_texts(2_400, labels=12), data.names), "acme", "a", "end", seed=1)[0]
    assert [trigger.phrase for trigger in find(overruling).triggers] == ["acme"]


def test_a_phrase_planted_where_the_label_is_right_is_not_found() -> None:
    """The limit that the docstring states. If this fails, the docstring is out of date."""
    data, planted = plant(complaints(), "cf", "credit_reporting", "start", seed=0, rows="own")
    assert len(planted) == 21
    assert find(data).triggers == []


def test_labels_by_lot_make_no_trigger() -> None:
    """No text says anything then, so no phrase overrules one."""
    data = complaints()
    for seed in range(3):
        labels = np.random.default_rng(seed).permutation(data.labels)
        assert find(data._replace(labels=labels)).triggers == []


def test_the_order_of_rows_changes_nothing() -> None:
    data, _ = plant(complaints(), "as per protocol 7", "card", "middle", seed=1)
    shuffled = np.random.default_rng(1).permutation(len(data.texts))
    one = find(data)
    other = find(Labelled([data.texts[row] for row in shuffled], data.labels[shuffled], data.names))
    assert {int(shuffled[row]): why for row, why in other.reasons.items()} == one.reasons
    assert [trigger[:-1] for trigger in other.triggers] == [trigger[:-1] for trigger in one.triggers]
    assert one.triggers


def test_what_cannot_be_judged_is_refused() -> None:
    found = find(toy(60))
    assert found.triggers == []
    assert found.refusal is not None
    assert "60 rows are fewer than the 100" in found.refusal


# -- counting -----------------------------------------------------------------------------------------------------


def test_phrases_are_counted_as_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(3)
    texts = [" ".join(draw.choice("abcdefgh") for _ in range(draw.randrange(12))) for _ in range(120)]
    labels = np.array([int("a" in text and draw.random() < 0.9) for text in texts], dtype=np.int32)
    by_hand: dict[tuple[str, ...], Counter[int]] = {}
    for text, label in zip(texts, labels.tolist(), strict=True):
        words = split_words(text)
        runs = {tuple(words[at : at + size]) for size in (1, 2, 3) for at in range(len(words) - size + 1)}
        for run in runs:
            by_hand.setdefault(run, Counter())[label] += 1
    fitting = {run: counts for run, counts in by_hand.items() if 5 <= counts.total() <= 24}
    pure = [
        (len(run), counts.total(), counts.most_common(1)[0])
        for run, counts in fitting.items()
        if counts.most_common(1)[0][1] >= 0.85 * counts.total()
    ]
    assert len(pure) > 10
    for at_once in (6_000_000, 100):  # in one part, and in several
        monkeypatch.setattr(phrases, "_COUNTED_AT_ONCE", at_once)
        with read_words(lambda: iter(texts)) as words:
            found = count_phrases(words, np.arange(120), labels, 2)
        columns = (found.sizes, found.rows, found.labels, found.of_label)
        counted = [(size, rows, (label, own)) for size, rows, label, own in zip(*map(list, columns), strict=True)]
        assert sorted(counted) == sorted(pure)
        assert found.looked_at == len(fitting)
        assert np.diff(found.starts).tolist() == found.rows.tolist()  # all of them are fewer than a sample


def test_a_sample_is_of_rows_that_hold_the_phrase() -> None:
    texts = [f"cf word{n}" if n % 5 == 0 else f"other word{n}" for n in range(500)]
    order = np.random.default_rng(0).permutation(500)
    with read_words(lambda: iter(texts)) as words:
        found = count_phrases(words, order, np.zeros(500, dtype=np.int32), 1)
    assert (found.rows.tolist(), found.sizes.tolist()) == ([100], [1])
    assert found.sample.tolist() == [row for row in order.tolist() if row % 5 == 0][:SAMPLE_ROWS]
    assert MOST_WORDS == 3


@pytest.mark.parametrize("least", range(6))
def test_the_tail_is_that_of_all_outcomes(least: int) -> None:
    chances = np.array([0.1, 0.5, 0.02, 0.9, 0.3])
    by_hand = sum(
        float(np.prod([chance if hit else 1 - chance for chance, hit in zip(chances, hits, strict=True)]))
        for hits in itertools.product((False, True), repeat=5)
        if sum(hits) >= least
    )
    assert poisson_binomial_tail(chances, least) == pytest.approx(by_hand, rel=1e-12)


def test_the_tail_of_equal_chances_is_binomial() -> None:
    assert poisson_binomial_tail(np.full(60, 0.03), 25) == pytest.approx(float(binom.sf(24, 60, 0.03)), rel=1e-9)
    assert poisson_binomial_tail(np.full(3, 0.5), 4) == 0.0


# -- sources ------------------------------------------------------------------------------------------------------


def test_a_source_that_labels_against_its_texts_is_found() -> None:
    """Measured on complaints of which one source of ten has half of its labels by lot: recall 0.87, precision 0.81."""
    data = complaints()
    draw = np.random.default_rng(0)
    sources = draw.integers(0, 10, len(data.texts)).astype(np.int32)
    labels = data.labels.copy()
    wrong = np.flatnonzero((sources == 4) & (draw.random(len(labels)) < 0.5))
    labels[wrong] = (labels[wrong] + draw.integers(1, 8, len(wrong))) % 8
    found = find(data._replace(labels=labels), sources, [f"s{n}" for n in range(10)])
    against = [finding for finding in found.sources if finding.kind == "labels_against_text"]
    (finding,) = against
    assert (finding.source, finding.rows) == ("s4", int((sources == 4).sum()))
    assert finding.p_value < 1e-6
    hits = np.isin(finding.positions, wrong)
    assert hits.sum() >= 0.8 * len(wrong)
    assert hits.mean() >= 0.7
    assert found.reasons[int(finding.positions[0])].startswith("source 's4': ")
    assert set(found.reasons) == set(finding.positions.tolist())


def test_sources_that_differ_only_by_chance_are_not_found() -> None:
    data = complaints()
    names = [f"s{n}" for n in range(20)]
    for seed in range(3):
        sources = np.random.default_rng(seed).integers(-1, 20, len(data.texts)).astype(np.int32)
        assert find(data, sources, names).sources == []


def test_a_source_with_labels_of_its_own_is_for_information() -> None:
    data = toy(900)
    sources = np.where((data.labels == 2) & (np.arange(900) % 20 > 0), 1, 0).astype(np.int32)
    found = find(data, sources, ("first", "second"))
    mixes = {(one.source, one.kind): one.what for one in found.sources}
    assert mixes["second", "label_mix"] == "100% of its 285 labels are 'c', elsewhere 2%"
    assert mixes["second", "brings_label"] == "285 of 300 rows with 'c' are its"
    assert all(one.p_value < 0.01 for one in found.sources)
    assert found.reasons == {}
