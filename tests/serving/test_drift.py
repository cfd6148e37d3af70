"""Drift: each test by hand, false alarms without drift, and drift made on purpose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta, timezone

import numpy as np
import pytest
from scipy.stats import binom, chi2_contingency

from tasks.contracts.errors import SpecError
from tasks.contracts.observe import DriftReport, DriftSpec, DriftTest
from tasks.serving.drift import Window, compare_windows, may_retrain

SPEC = DriftSpec()
TOPICS = {
    "card": ["card", "charge", "fee", "declined", "statement", "limit", "interest", "payment", "store", "purchase"],
    "loan": ["loan", "rate", "month", "repay", "lender", "term", "balance", "due", "principal", "servicer"],
    "fraud": ["stolen", "identity", "police", "report", "account", "opened", "unknown", "dispute", "never", "thief"],
    "other": ["branch", "teller", "letter", "phone", "waited", "manager", "rude", "visit", "appointment", "desk"],
}
PLAIN = [
    "i",
    "have",
    "been",
    "told",
    "that",
    "the",
    "bank",
    "will",
    "not",
    "help",
    "me",
    "with",
    "this",
    "again",
    "now",
]


def requests(
    n: int,
    seed: int,
    mix: Sequence[float] = (0.4, 0.3, 0.2, 0.1),
    length: float = 40.0,
    sure: tuple[float, float] = (6, 1),
    corrected: float = 0.1,
    new_words: float = 0.0,
) -> Window:
    """Requests about topics, answered with their topic, some of them reviewed."""
    generator = np.random.default_rng(seed)
    topics = generator.choice(list(TOPICS), size=n, p=mix)
    texts = []
    for topic in topics:
        words = [
            str(generator.choice(TOPICS[topic] if generator.random() < 0.4 else PLAIN))
            for _ in range(1 + generator.poisson(length))
        ]
        if generator.random() < new_words:
            words += ["crypto", "wallet", "token", "exchange", "swap"]
        texts.append(" ".join(words))
    reviewed = n // 4
    return Window(
        texts=texts,
        answers=[str(topic) for topic in topics],
        confidences=generator.beta(*sure, size=n).tolist(),
        reviewed=reviewed,
        corrected=int(generator.binomial(reviewed, corrected)),
    )


def test_of(report: DriftReport, what: str) -> DriftTest:
    return next(test for test in report.tests if test.what == what)


test_of.__test__ = False  # type: ignore[attr-defined]

REFERENCE = requests(600, seed=0)


def test_without_drift_there_is_none() -> None:
    report = compare_windows(REFERENCE, requests(500, seed=1), SPEC)
    assert (report.drifted, report.reason, report.left_out) == (False, "no drift", {})
    assert [test.what for test in report.tests] == ["lengths", "vocabulary", "classes", "confidence", "disagreement"]
    assert all((test.reference_rows, test.current_rows) == (600, 500) for test in report.tests[:4])
    assert (report.tests[4].reference_rows, report.tests[4].current_rows) == (150, 125)


@pytest.mark.parametrize(
    ("change", "what", "words"),
    [
        ({"length": 60.0}, "lengths", "characters then, "),
        ({"new_words": 0.5}, "vocabulary", "wallet (0 % to "),
        ({"mix": (0.15, 0.3, 0.45, 0.1)}, "classes", "card 36 % to 15 %"),
        ({"sure": (4, 1.5)}, "confidence", "median confidence 0.886 then, 0.760 now"),
        ({"corrected": 0.4}, "disagreement", "of the reviewed answers corrected then"),
    ],
)
def test_drift_made_on_purpose_is_found_and_named(change: dict[str, object], what: str, words: str) -> None:
    report = compare_windows(REFERENCE, requests(600, seed=2, **change), SPEC)  # type: ignore[arg-type]
    found = test_of(report, what)
    assert found.drifted
    assert found.p_value < found.level <= SPEC.alpha
    assert found.effect > found.limit
    assert words in found.words
    assert report.drifted
    assert f"{what} ({found.effect:.2g}, limit {found.limit:g})" in report.reason
    others = {test.what for test in report.tests if test.drifted} - {what}
    # another mix has other words, and more words are longer; nothing else may go along
    assert others <= {"classes": {"vocabulary"}, "vocabulary": {"lengths"}}.get(what, set())


def test_the_worst_comes_first_in_the_reason() -> None:
    current = requests(600, seed=2, length=60.0, mix=(0.1, 0.1, 0.7, 0.1))
    report = compare_windows(REFERENCE, current, SPEC)
    drifted = [test for test in report.tests if test.drifted]
    assert len(drifted) >= 3
    worst = max(drifted, key=lambda test: test.effect / test.limit)
    assert report.reason.startswith(f"drift: {worst.what} (")


def test_many_requests_do_not_cry_wolf() -> None:
    # 40,000 answers whose mix has moved by two points: surely no chance, and of no importance.
    many = Window(texts=["a"] * 40_000, answers=["card"] * 20_000 + ["loan"] * 20_000)
    moved = Window(texts=["a"] * 40_000, answers=["card"] * 20_800 + ["loan"] * 19_200)
    found = test_of(compare_windows(many, moved, SPEC), "classes")
    assert found.p_value < 1e-6
    assert found.effect < 0.01
    assert not found.drifted


def test_few_requests_do_not_either() -> None:
    # A large effect that chance alone could make.
    few = DriftSpec(min_rows=20)
    then = Window(texts=["a"] * 20, answers=["card"] * 10 + ["loan"] * 10)
    now = Window(texts=["a"] * 20, answers=["card"] * 6 + ["loan"] * 14)
    found = test_of(compare_windows(then, now, few), "classes")
    assert found.effect > found.limit
    assert found.p_value > 0.1
    assert not found.drifted


def test_false_alarms_are_at_most_alpha_even_with_limits_of_nothing() -> None:
    # Without the limits, so that significance alone decides: Holm keeps the alarms at alpha over all five tests.
    spec = DriftSpec(
        alpha=0.1,
        min_rows=60,
        min_reviewed=10,
        max_length_shift=1e-9,
        max_vocabulary_shift=1e-9,
        max_class_shift=1e-9,
        max_confidence_shift=1e-9,
        max_disagreement_rise=1e-9,
    )
    alarms = sum(
        compare_windows(requests(60, 2 * seed, length=12), requests(60, 2 * seed + 1, length=12), spec).drifted
        for seed in range(80)
    )
    assert alarms <= binom.ppf(0.99, 80, 0.1)


def test_planted_drift_is_found_nearly_always_and_none_nearly_never() -> None:
    found = sum(
        compare_windows(
            requests(250, seed, length=12), requests(250, 900 + seed, mix=(0.2, 0.3, 0.4, 0.1), length=12), SPEC
        ).drifted
        for seed in range(12)
    )
    none = sum(
        compare_windows(requests(250, seed, length=12), requests(250, 500 + seed, length=12), SPEC).drifted
        for seed in range(12)
    )
    assert found >= 11
    assert none <= 1


# -- each test --------------------------------------------------------------------------------------------------------


def test_the_largest_distance_by_hand() -> None:
    # lengths 1..4 against 3..6, 50 each: half of the reference is below 3, nothing of the current
    then = Window(texts=["a" * n for n in (1, 2, 3, 4)] * 50)
    now = Window(texts=["a" * n for n in (3, 4, 5, 6)] * 50)
    found = test_of(compare_windows(then, now, SPEC), "lengths")
    assert (found.statistic, found.effect) == (0.5, 0.5)
    assert found.words == "median length 2 characters then, 4 now"


def test_stability_index_and_chi_square_by_hand() -> None:
    then = Window(texts=["a"] * 200, answers=["card"] * 100 + ["loan"] * 100)
    now = Window(texts=["a"] * 200, answers=["card"] * 150 + ["loan"] * 50)
    found = test_of(compare_windows(then, now, SPEC), "classes")
    assert found.statistic == pytest.approx(400 * (100 * 50 - 100 * 150) ** 2 / (200 * 200 * 250 * 150))
    p, q = 100.5 / 201, 150.5 / 201
    assert found.effect == pytest.approx((q - p) * math.log(q / p) + (p - q) * math.log((1 - q) / (1 - p)))
    assert found.words == "card 50 % to 75 %, loan 50 % to 25 %"


def test_a_class_that_is_new_is_drift_and_rare_ones_are_together() -> None:
    rare = [f"rare-{n}" for n in range(4)]
    then = Window(texts=["a"] * 200, answers=["card"] * 196 + rare)
    now = Window(texts=["a"] * 200, answers=["card"] * 136 + rare + ["crypto"] * 60)
    found = test_of(compare_windows(then, now, SPEC), "classes")
    assert found.drifted
    assert math.isfinite(found.effect)
    assert "crypto 0 % to 30 %" in found.words
    same = test_of(compare_windows(then, then, SPEC), "classes")
    assert (same.statistic, same.effect, same.p_value) == (0.0, 0.0, 1.0)


def test_one_class_alone_cannot_drift() -> None:
    one = Window(texts=["a"] * 200, answers=["card"] * 200)
    found = test_of(compare_windows(one, one, SPEC), "classes")
    assert (found.p_value, found.effect, found.drifted) == (1.0, 0.0, False)


def test_other_words_altogether_diverge_by_one_bit() -> None:
    then, now = Window(texts=["alpha beta"] * 200), Window(texts=["gamma delta"] * 200)
    found = test_of(compare_windows(then, now, SPEC), "vocabulary")
    assert found.statistic == pytest.approx(1.0)
    assert 0.95 < found.effect < 1.0  # less what exchanged windows have by chance
    assert found.p_value == 1 / 1000
    assert found.words == ("more often now: delta (0 % to 100 % of requests), gamma (0 % to 100 % of requests)")


def test_numbers_and_case_are_no_other_words() -> None:
    then = Window(texts=[f"Invoice {n} of 2025" for n in range(200)])
    now = Window(texts=[f"invoice {1000 + n} of 2026" for n in range(200)])
    found = test_of(compare_windows(then, now, SPEC), "vocabulary")
    assert (found.statistic, found.p_value) == (0.0, 1.0)


def test_words_of_few_requests_are_not_named() -> None:
    # A name that five of 600 requests hold, and one that 30 hold.
    now = Window(texts=["hello"] * 565 + ["hello jane"] * 5 + ["hello refund"] * 30)
    found = test_of(compare_windows(Window(texts=["hello"] * 600), now, SPEC), "vocabulary")
    assert "refund" in found.words
    assert "jane" not in found.words


def test_the_words_of_one_request_hang_together() -> None:
    # Ten of 400 requests repeat one word a hundred times; whichever side they fall to, it is no drift. Were each word
    # drawn by itself, it would be a sure one.
    texts = ["hello there"] * 390 + ["spam " * 100] * 10
    order = np.random.default_rng(8).permutation(400)
    then, now = ([texts[n] for n in half] for half in (order[:200], order[200:]))
    spam = [100 * sum(text.startswith("spam") for text in side) for side in (then, now)]
    other = [2 * sum(text.startswith("hello") for text in side) for side in (then, now)]
    assert chi2_contingency([spam, other]).pvalue < 1e-4
    found = test_of(compare_windows(Window(texts=then), Window(texts=now), SPEC), "vocabulary")
    assert found.p_value > 0.05


def test_a_rise_of_corrections_counts_and_a_fall_does_not() -> None:
    def windows(before: int, after: int) -> DriftTest:
        then, now = (Window(texts=["a"] * 200, reviewed=100, corrected=n) for n in (before, after))
        return test_of(compare_windows(then, now, SPEC), "disagreement")

    rise, fall = windows(10, 40), windows(40, 10)
    assert rise.drifted
    assert (rise.statistic, rise.effect) == (pytest.approx(0.3), pytest.approx(0.3))
    assert not fall.drifted
    assert (fall.statistic, fall.effect) == (pytest.approx(-0.3), 0.0)
    assert rise.words == "10.0 % of the reviewed answers corrected then, 40.0 % now"


# -- what cannot be tested --------------------------------------------------------------------------------------------


def test_what_has_too_few_rows_is_left_out_and_said() -> None:
    then = Window(texts=REFERENCE.texts, answers=REFERENCE.answers[:100], reviewed=49)
    report = compare_windows(then, REFERENCE, SPEC)
    assert [test.what for test in report.tests] == ["lengths", "vocabulary"]
    assert report.left_out == {
        "classes": "100 rows in the reference and 600 now, at least 200 needed",
        "confidence": "0 rows in the reference and 600 now, at least 200 needed",
        "disagreement": "49 rows in the reference and 150 now, at least 50 needed",
    }


def test_of_nothing_no_drift_is_not_said() -> None:
    with pytest.raises(SpecError, match="too little to say whether anything has drifted: lengths: 10 rows"):
        compare_windows(Window(texts=["a"] * 10), REFERENCE, SPEC)


@pytest.mark.parametrize(
    ("window", "reason"),
    [
        (Window(texts=["a"] * 200, confidences=[1.5] * 200), "1.5 is no probability"),
        (Window(texts=["a"] * 200, confidences=[math.nan] * 200), "nan is no probability"),
        (Window(texts=["a"] * 200, reviewed=60, corrected=61), "61 of 60 reviewed answers"),
    ],
)
def test_what_cannot_be_is_refused(window: Window, reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        compare_windows(window, window, SPEC)


def test_the_same_windows_give_the_same_report() -> None:
    current = requests(300, seed=4, new_words=0.1)
    report = compare_windows(REFERENCE, current, SPEC)
    assert compare_windows(REFERENCE, current, SPEC) == report
    assert DriftReport.model_validate_json(report.model_dump_json()) == report


# -- no storm ---------------------------------------------------------------------------------------------------------

NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("last", "allowed"),
    [
        (None, True),
        (NOON - timedelta(hours=24), True),
        (NOON - timedelta(hours=24) + timedelta(seconds=1), False),
        (NOON, False),
        (NOON + timedelta(minutes=4), False),  # clocks differ a little
        # the same moment told in another zone
        ((NOON - timedelta(hours=25)).astimezone(timezone(timedelta(hours=9))), True),
        ((NOON - timedelta(hours=23)).astimezone(timezone(timedelta(hours=9))), False),
    ],
)
def test_at_most_one_retrain_in_the_set_time(last: datetime | None, allowed: bool) -> None:
    permit = may_retrain(last, NOON, SPEC)
    assert permit.allowed is allowed
    if allowed:
        assert permit.next_at is None
    else:
        assert last is not None
        assert permit.next_at == last + timedelta(hours=24)
        assert "at most one in 24 hours" in permit.why


def test_a_month_of_constant_drift_starts_one_retrain_a_week() -> None:
    spec = DriftSpec(retrain_at_most_every_hours=24 * 7)
    last: datetime | None = None
    started = 0
    for hour in range(24 * 28):
        now = NOON + timedelta(hours=hour)
        if may_retrain(last, now, spec).allowed:
            last, started = now, started + 1
    assert started == 4


@pytest.mark.parametrize(
    ("last", "now", "reason"),
    [
        (None, NOON.replace(tzinfo=None), "without a zone"),
        (NOON.replace(tzinfo=None), NOON, "without a zone"),
        (NOON + timedelta(minutes=6), NOON, "lies in the future"),
    ],
)
def test_clocks_that_cannot_be_right_are_refused(last: datetime | None, now: datetime, reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        may_retrain(last, now, SPEC)
