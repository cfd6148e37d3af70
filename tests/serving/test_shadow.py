"""A shadow against the live version: by hand, and over simulated shadows that are looked at while they grow."""

from __future__ import annotations

import itertools
import math
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from tasks.contracts.errors import SpecError
from tasks.contracts.observe import Preferred, ShadowDecision, ShadowReport, ShadowSpec
from tasks.serving.shadow import (
    ShadowPair,
    compare_costs,
    decided_needed,
    shadow_report,
    share_sequence,
    sign_test,
)

START = datetime(2026, 11, 1, tzinfo=UTC)
SPEC = ShadowSpec()


def pairs(
    agreed: int = 0, wins: int = 0, losses: int = 0, ties: int = 0, unseen: int = 0, failed: int = 0, days: float = 10.0
) -> list[ShadowPair]:
    """So many pairs of each kind, evenly over the days, each with a key of its own."""
    kinds: list[tuple[bool | None, Preferred | None]] = [
        *[(True, None)] * agreed,
        *[(False, Preferred.SHADOW)] * wins,
        *[(False, Preferred.LIVE)] * losses,
        *[(False, Preferred.NEITHER)] * ties,
        *[(False, None)] * unseen,
        *[(None, None)] * failed,
    ]
    step = timedelta(days=days) / max(1, len(kinds) - 1)
    return [
        ShadowPair(f"key-{place}", START + place * step, agrees, review=review)
        for place, (agrees, review) in enumerate(kinds)
    ]


def test_counts_and_intervals_by_hand() -> None:
    report = shadow_report(pairs(agreed=80, wins=8, losses=2, ties=4, unseen=6, failed=5), SPEC)
    assert (report.pairs, report.failed, report.agreed) == (105, 5, 80)
    assert (report.wins, report.losses, report.ties) == (8, 2, 4)
    assert report.agreement == 0.8
    # Wilson of 80 in 100: 0.711 to 0.867; Clopper-Pearson of 8 in 10: 0.444 to 0.975; sign test of 8 to 2: 112 / 1024
    assert (round(report.agreement_low, 3), round(report.agreement_high, 3)) == (0.711, 0.867)
    assert report.win_share == 0.8
    assert (round(report.win_share_low, 3), round(report.win_share_high, 3)) == (0.444, 0.975)
    assert report.p_value == pytest.approx(112 / 1024)
    # a fifth disagrees, and of 14 reviewed ones 6 more are won than lost
    assert report.difference == pytest.approx(0.2 * 6 / 14)
    assert report.difference_low < 0 < report.difference < report.difference_high
    assert (report.decision, report.latency, report.cost) == (ShadowDecision.OPEN, None, None)


def test_a_failed_shadow_neither_agrees_nor_loses() -> None:
    without, failing = (shadow_report(pairs(agreed=90, wins=5, losses=5, failed=n), SPEC) for n in (0, 50))
    assert (failing.agreement, failing.difference) == (without.agreement, without.difference)
    assert failing.failed == 50
    assert failing.failed_low < 50 / 150 < failing.failed_high


def test_a_review_of_answers_that_agree_says_nothing() -> None:
    odd = [ShadowPair("a", START, True, review=Preferred.SHADOW), ShadowPair("b", START, False, review=Preferred.BOTH)]
    report = shadow_report(odd, SPEC)
    assert (report.wins, report.losses, report.ties) == (0, 0, 1)


@pytest.mark.parametrize(
    ("known", "reason"),
    [
        ([], "nothing to compare"),
        ([ShadowPair("a", START, True), ShadowPair("b", START.replace(tzinfo=None), True)], "have a zone"),
    ],
)
def test_nothing_to_compare_is_refused(known: list[ShadowPair], reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        shadow_report(known, SPEC)


@pytest.mark.parametrize(("wins", "losses"), list(itertools.product((0, 1, 3, 8, 20), repeat=2)))
def test_the_sign_test_is_scipys(wins: int, losses: int) -> None:
    expected = binomtest(wins, wins + losses, 0.5).pvalue if wins + losses else 1.0
    assert sign_test(wins, losses) == pytest.approx(expected)


# -- at every look ----------------------------------------------------------------------------------------------------


def test_the_sequence_is_where_the_likelihood_ratio_reaches_one_over_alpha() -> None:
    low, high = share_sequence(30, 50, 0.05)
    log_mixture = math.lgamma(30.5) + math.lgamma(20.5) - math.lgamma(51) - 2 * math.lgamma(0.5)
    for end in (low, high):
        assert log_mixture - 30 * math.log(end) - 20 * math.log(1 - end) == pytest.approx(math.log(20))
    assert share_sequence(0, 0, 0.05) == (0.0, 1.0)
    assert share_sequence(0, 40, 0.05).low == 0.0
    assert share_sequence(40, 40, 0.05).high == 1.0
    mirrored = share_sequence(20, 50, 0.05)
    assert (mirrored.low, mirrored.high) == pytest.approx((1 - high, 1 - low), abs=1e-9)


@pytest.mark.parametrize("share", [0.5, 0.05])
def test_the_sequence_ever_misses_the_share_in_at_most_alpha(share: float) -> None:
    generator = np.random.default_rng(1)
    missed = 0
    for _ in range(200):
        successes = (generator.random(400) < share).cumsum()
        missed += any(
            not low <= share <= high
            for low, high in (share_sequence(int(successes[n - 1]), n, 0.1) for n in range(10, 401, 10))
        )
    assert missed <= binom.ppf(0.99, 200, 0.1)


def decided(report: ShadowReport) -> str:
    return report.decision.value


@pytest.mark.parametrize(
    ("known", "decision", "words"),
    [
        (pairs(agreed=800, wins=150, losses=50), "shadow", "The shadow is better: its accuracy differs by between +"),
        (pairs(agreed=800, wins=50, losses=150), "live", "The live version is better: the shadow's accuracy differs"),
        (pairs(agreed=5_000, wins=10, losses=10), "alike", "They are alike"),
        # better, but by less than what matters
        (pairs(agreed=20_000, wins=150, losses=50), "alike", "less than 2."),
        (pairs(agreed=4_000), "alike", "They are alike"),
        (pairs(agreed=80, wins=8, losses=2), "open", "To tell a difference of 2 points from none takes about"),
        (pairs(agreed=20), "open", "nothing yet says how much more it takes"),
        (pairs(failed=20), "open", "nothing yet says how much more it takes"),
    ],
)
def test_what_it_comes_to(known: list[ShadowPair], decision: str, words: str) -> None:
    report = shadow_report(known, SPEC)
    assert decided(report) == decision
    assert words in report.why
    if decision != "open":
        assert (report.pairs_more, report.reviews_more, report.days) == (None, None, None)


def test_the_difference_holds_at_every_look() -> None:
    # A shadow that is no better, looked at five times as it grows: hardly ever does the interval leave out the truth.
    generator = np.random.default_rng(3)
    wronged = 0
    for _ in range(40):
        kinds = generator.choice(5, size=1_000, p=[0.7, 0.1, 0.1, 0.05, 0.05])
        counts = [np.cumsum(kinds == kind) for kind in range(5)]
        for n in range(99, 1_000, 225):
            agreed, wins, losses, ties, unseen = (int(count[n]) for count in counts)
            report = shadow_report(pairs(agreed, wins, losses, ties, unseen), SPEC)
            if not report.difference_low <= 0 <= report.difference_high:
                wronged += 1
                break
    assert wronged <= binom.ppf(0.999, 40, 0.05)


# -- when it will be decided ------------------------------------------------------------------------------------------


def test_the_needed_number_of_decided_pairs_has_its_power() -> None:
    for share in (0.6, 0.75):
        needed = decided_needed(share, 0.025)
        assert needed is not None
        wins = np.random.default_rng(2).binomial(needed, share, 400)
        found = sum(share_sequence(int(won), needed, 0.025).low > 0.5 for won in wins)
        assert 0.75 < found / 400 < 0.87
    assert decided_needed(0.5, 0.025) is None


def test_a_plan_by_hand() -> None:
    # 200 pairs in ten days, 40 of them disagreements, 20 reviewed, of which 16 decide: psi = 0.2 x 0.8 = 0.16, and a
    # margin of 8 points makes (1 + 0.08 / 0.16) / 2 = 3/4 wins.
    spec = ShadowSpec(margin=0.08)
    report = shadow_report(pairs(agreed=160, wins=9, losses=7, ties=4, unseen=20), spec)
    found = decided_needed(0.75, 0.025)
    assert found is not None
    assert report.reviews_more is not None
    assert report.pairs_more is not None
    # the larger of finding it and showing that there is none; the latter is not less than the former by much
    assert report.reviews_more >= math.ceil(found / 0.8) - 20
    assert report.pairs_more == (report.reviews_more + 20) * 5 - 200
    # reviews are the slower ones: 2 a day
    assert report.days == pytest.approx(max(report.reviews_more / 2, report.pairs_more / 20))
    assert report.days_low is not None
    assert report.days_high is not None
    # Garwood's interval of 20 events is 12.2 to 30.9
    assert report.days_low == pytest.approx(report.days * 20 / 30.9, rel=0.01)
    assert report.days_high == pytest.approx(report.days * 20 / 12.2, rel=0.01)


@pytest.mark.parametrize(
    ("known", "missing"),
    [
        (pairs(agreed=270, unseen=30), "no reviews yet"),
        (pairs(agreed=80, wins=8, losses=2, days=0.0), "too little time seen"),
    ],
)
def test_without_a_rate_no_days_are_made_up(known: list[ShadowPair], missing: str) -> None:
    report = shadow_report(known, SPEC)
    assert report.pairs_more is not None
    assert report.pairs_more > 0
    assert (report.days, report.days_low, report.days_high) == (None, None, None)
    assert missing in report.why


@pytest.mark.parametrize("advantage", [0.05, 0.0])
def test_as_many_more_decide_most_of_the_time(advantage: float) -> None:
    spec = ShadowSpec(margin=0.05)
    few = shadow_report(pairs(agreed=160, wins=20, losses=20), spec)
    assert few.pairs_more is not None
    n = few.pairs + few.pairs_more
    generator = np.random.default_rng(4)
    settled: list[str] = []
    for _ in range(60):
        shares = [0.8, 0.1 + advantage / 2, 0.1 - advantage / 2]
        agreed, wins, losses = (int(count) for count in generator.multinomial(n, shares))
        settled.append(decided(shadow_report(pairs(agreed, wins, losses), spec)))
    right = "shadow" if advantage else "alike"
    assert settled.count(right) >= 0.7 * 60
    assert settled.count("live") == 0


# -- what it costs ----------------------------------------------------------------------------------------------------


def test_costs_are_compared_in_pairs() -> None:
    # The shadow takes exactly 10 ms longer each time: paired, there is nothing uncertain about that.
    live = np.random.default_rng(0).exponential(100, 300)
    found = compare_costs([(str(n), float(ms), float(ms) + 10) for n, ms in enumerate(live)])
    assert found is not None
    assert (found.pairs, found.live) == (300, pytest.approx(live.mean()))
    assert (found.difference, found.low, found.high) == pytest.approx((10, 10, 10))
    assert (found.p95_difference, found.p95_low, found.p95_high) == pytest.approx((10, 10, 10))
    assert found.live_p95 == sorted(live)[284]  # 285 of 300 are 95 %


def test_costs_with_one_side_alone_are_left_out() -> None:
    assert compare_costs([("a", 1.0, None), ("b", None, 2.0)]) is None
    found = compare_costs([("a", 1.0, None), ("b", 1.0, 3.0), ("c", 2.0, 4.0)])
    assert found is not None
    assert (found.pairs, found.difference) == (2, 2.0)


def test_the_interval_of_the_mean_is_that_of_theory() -> None:
    generator = np.random.default_rng(0)
    live, shadow = generator.normal(100, 10, 400), generator.normal(105, 10, 400)
    found = compare_costs([(str(n), float(a), float(b)) for n, (a, b) in enumerate(zip(live, shadow, strict=True))])
    assert found is not None
    error = float(np.std(shadow - live) / 20)
    assert found.low == pytest.approx(found.difference - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(found.difference + 1.96 * error, abs=0.15 * error)


def test_requests_of_one_key_count_as_one_draw() -> None:
    # Ten keys whose twenty requests are all alike: as uncertain as ten requests, not as two hundred.
    shifts = np.random.default_rng(0).normal(0, 10, 10)
    found = compare_costs([(f"key-{n % 10}", 100.0, 100.0 + shifts[n % 10]) for n in range(200)])
    apart = compare_costs([(f"key-{n}", 100.0, 100.0 + shifts[n % 10]) for n in range(200)])
    assert found is not None
    assert apart is not None
    assert found.difference == pytest.approx(apart.difference)
    assert found.high - found.low > 3.5 * (apart.high - apart.low)


def test_a_report_has_latency_and_cost() -> None:
    known = [
        ShadowPair(str(n), START + timedelta(hours=n), n % 10 != 0, 100.0 + n % 7, 90.0 + n % 5, 2.0, 0.5)
        for n in range(50)
    ]
    report = shadow_report(known, SPEC)
    assert report.latency is not None
    assert report.latency.difference < 0
    assert report.latency.high < 0
    assert report.cost is not None
    assert (report.cost.live, report.cost.shadow, report.cost.difference) == (2.0, 0.5, -1.5)
    assert ShadowReport.model_validate_json(report.model_dump_json()) == report
