"""The verdicts: what they are, what they say, and what never changes them."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tasks.contracts.errors import NotComparableError
from tasks.contracts.references import ItemOutcome, Outcome
from tasks.contracts.spec import Metric, Policy
from tasks.gate.decide import Side, decide, give_verdict, outcome_of
from tasks.gate.statistics import Interval, exact_p, paired_interval
from tests.gate.made_up import CONDITIONS, LABELS, item, sides, system


@pytest.mark.parametrize(
    ("wins", "losses", "both", "neither", "margin", "expected"),
    [
        (60, 20, 200, 120, 0.0, Outcome.PROMOTE),
        (20, 60, 200, 120, 0.0, Outcome.REJECT),
        (40, 38, 200, 122, 0.0, Outcome.INCONCLUSIVE),
        (0, 0, 300, 100, 0.0, Outcome.INCONCLUSIVE),
        (5, 0, 200, 195, 0.0, Outcome.PROMOTE),  # p = 1/32
        (4, 0, 200, 196, 0.0, Outcome.INCONCLUSIVE),  # p = 1/16
        (60, 20, 200, 120, 0.02, Outcome.PROMOTE),
        (60, 20, 200, 120, 0.08, Outcome.INCONCLUSIVE),
        (60, 20, 200, 120, 0.2, Outcome.REJECT),
        (2, 0, 0, 0, 0.0, Outcome.INCONCLUSIVE),
    ],
)
def test_verdict(wins: int, losses: int, both: int, neither: int, margin: float, expected: Outcome) -> None:
    decision = decide(*sides(wins, losses, both, neither), Policy(min_improvement=margin))
    assert decision.outcome is expected
    assert (decision.wins, decision.losses, decision.ties) == (wins, losses, both + neither)
    assert decision.p_value == exact_p(wins, losses)
    assert (decision.items_to_settle is not None) == (expected is Outcome.INCONCLUSIVE)


def test_a_promotion_says_its_numbers_in_sentences() -> None:
    decision = decide(*sides(165, 16, 149, 70), Policy())
    assert decision.reasons[0] == (
        "The candidate is right on 78.5 % of 400 items, the baseline on 41.3 %: +37.3 points (90 % interval +32.6 to "
        "+41.8), p < 0.0001."
    )
    assert "shown to be better" in decision.reasons[1]
    assert "165 only the candidate gets right, 16 only the baseline" in decision.reasons[2]


def test_a_rejection_says_whether_it_is_worse_or_not_better_by_enough() -> None:
    worse = decide(*sides(20, 60, 200, 120), Policy(min_improvement=0.05))
    small = decide(*sides(30, 28, 200, 142), Policy(min_improvement=0.1))
    assert "shown to be worse than the baseline" in worse.reasons[1]
    assert "shown not to be better by more than 10.0 points" in small.reasons[1]


def test_an_open_verdict_says_what_would_settle_it() -> None:
    decision = decide(*sides(48, 34, 200, 118), Policy())
    assert decision.outcome is Outcome.INCONCLUSIVE
    assert decision.items_to_settle is not None
    assert 900 < decision.items_to_settle < 1200
    assert (
        f"If the observed +3.5 points are real, about {decision.items_to_settle:,} items in all would settle it."
        in (decision.reasons[-1])
    )


@pytest.mark.parametrize(("wins", "losses"), [(40, 40), (40, 43), (43, 40), (0, 0)])
def test_a_difference_near_zero_is_not_planned_on(wins: int, losses: int) -> None:
    decision = decide(*sides(wins, losses, 200, 200 - wins - losses), Policy())
    assert decision.items_to_settle is not None
    assert 400 < decision.items_to_settle < 1700  # about four times as many halve what can be shown
    assert "too close to 0 to plan on" in decision.reasons[-1]


def test_the_wrong_side_is_planned_towards_a_rejection() -> None:
    decision = decide(*sides(34, 48, 200, 118), Policy())
    assert decision.outcome is Outcome.INCONCLUSIVE
    assert "If the observed −3.5 points are real" in decision.reasons[-1]


def test_identical_models_are_inconclusive_with_a_clear_reason() -> None:
    outcomes, _ = sides(0, 0, 250, 150)
    decision = decide(outcomes, outcomes, Policy())
    assert decision.outcome is Outcome.INCONCLUSIVE
    assert "right and wrong on exactly the same items" in decision.reasons[2]


@pytest.mark.parametrize("margin", [0.0, 0.01, 0.05])
def test_table_and_verdict_agree(margin: float) -> None:
    draw = random.Random(8)
    seen = set()
    for _ in range(40):
        wins, losses = draw.randrange(0, 30), draw.randrange(0, 30)
        decision = decide(*sides(wins, losses, 20, 40), Policy(min_improvement=margin))
        primary = decision.metrics[0]
        seen.add(decision.outcome)
        assert (primary.low > margin) == (decision.outcome is Outcome.PROMOTE)
        assert (primary.high < margin) == (decision.outcome is Outcome.REJECT)
        if decision.outcome is Outcome.PROMOTE:
            assert decision.p_value < 0.05
        if margin == 0:
            assert (decision.outcome is Outcome.PROMOTE) == (exact_p(wins, losses) < 0.05)
            assert (decision.outcome is Outcome.REJECT) == (exact_p(losses, wins) < 0.05)
    assert seen == set(Outcome)


def test_a_margin_is_never_easier_than_none() -> None:
    # 7 against 1 of 21 at 2.5 %: the score test alone would find it better than a hair above 0.
    tiny = decide(*sides(7, 1, 12, 1), Policy(alpha=0.025, min_improvement=0.001))
    assert tiny.outcome is Outcome.INCONCLUSIVE


def test_the_order_of_items_never_matters() -> None:
    baseline, candidate = sides(31, 12, 40, 30)
    policy = Policy()
    expected = decide(baseline, candidate, policy, LABELS)
    for seed in range(3):
        random.Random(seed).shuffle(baseline)
        random.Random(seed + 10).shuffle(candidate)
        assert decide(baseline, candidate, policy, LABELS) == expected


def test_swapping_the_sides_mirrors_every_difference() -> None:
    baseline, candidate = sides(31, 12, 40, 30)
    there, back = decide(baseline, candidate, Policy(), LABELS), decide(candidate, baseline, Policy(), LABELS)
    assert (there.outcome, back.outcome) == (Outcome.PROMOTE, Outcome.REJECT)
    assert (there.wins, there.losses) == (back.losses, back.wins)
    for one, other in zip(there.metrics, back.metrics, strict=True):
        assert one.metric == other.metric
        assert (one.difference, one.low, one.high) == pytest.approx(
            (-other.difference, -other.high, -other.low), abs=1e-8
        )


@pytest.mark.parametrize("margin", [0.0, 0.03])
def test_ties_never_turn_a_rejection_into_a_promotion(margin: float) -> None:
    draw = random.Random(2)
    rejected = 0
    for _ in range(200):
        wins, losses, n = draw.randrange(0, 40), draw.randrange(0, 40), 90
        policy = Policy(min_improvement=margin)
        outcomes = [
            outcome_of(paired_interval(wins, losses, n + ties, policy.alpha), margin) for ties in (0, 1, 10, 100, 5000)
        ]
        rejected += Outcome.REJECT in outcomes
        if Outcome.REJECT in outcomes:
            assert Outcome.PROMOTE not in outcomes[outcomes.index(Outcome.REJECT) :]
    assert rejected > 20


@pytest.mark.parametrize(
    ("discordance", "n", "margin"), [(0.3, 300, 0.0), (0.05, 300, 0.0), (0.4, 40, 0.0), (0.3, 300, 0.05)]
)
def test_no_better_candidates_are_promoted_at_most_at_alpha(discordance: float, n: int, margin: float) -> None:
    policy = Policy(alpha=0.05, min_improvement=margin)
    shares = [(discordance + margin) / 2, (discordance - margin) / 2, 1 - discordance]
    drawn = np.random.default_rng(11).multinomial(n, shares, size=2000)
    promoted = sum(
        int(times)
        for (wins, losses, _), times in zip(*np.unique(drawn, axis=0, return_counts=True), strict=True)
        if outcome_of(paired_interval(int(wins), int(losses), n, policy.alpha), margin) is Outcome.PROMOTE
    )
    # Three standard errors of 2,000 draws at 5 % are 1.5 %.
    assert 0 < promoted / len(drawn) <= policy.alpha + 0.015


def test_an_interval_that_touches_the_margin_decides_nothing() -> None:
    assert outcome_of(Interval(0.0, 0.1), 0.0) is Outcome.INCONCLUSIVE
    assert outcome_of(Interval(-0.1, 0.0), 0.0) is Outcome.INCONCLUSIVE


def test_every_metric_is_compared_with_its_method() -> None:
    baseline, candidate = sides(31, 12, 40, 30)

    def with_fields(outcomes: list[ItemOutcome]) -> list[ItemOutcome]:
        return [
            one.model_copy(update={"scores": {**one.scores, "field:b": one.scores["exact_match"], "field_match": 0.5}})
            for one in outcomes
        ]

    metrics = decide(with_fields(baseline), with_fields(candidate), Policy(), LABELS).metrics
    assert [(row.metric, row.method) for row in metrics] == [
        ("exact_match", "McNemar exact + Tango score"),
        ("macro_f1", "paired bootstrap"),
        ("field_match", "paired bootstrap"),
        ("valid_output", "McNemar exact + Tango score"),
        ("field:b", "McNemar exact + Tango score"),
    ]
    assert all(row.n == 113 and row.confidence == pytest.approx(0.9) for row in metrics)
    assert all(row.baseline_low <= row.baseline <= row.baseline_high for row in metrics)
    assert all(row.candidate_low <= row.candidate <= row.candidate_high for row in metrics)


def test_another_metric_can_decide() -> None:
    baseline, candidate = sides(0, 0, 40, 40)
    before = [one.model_copy(update={"scores": {"exact_match": 0.0, "valid_output": 0.0}}) for one in baseline]
    decision = decide(before, candidate, Policy(metric=Metric.VALID_OUTPUT))
    assert decision.outcome is Outcome.PROMOTE
    assert decision.metrics[0].metric == "valid_output"
    assert decision.reasons[0].startswith(
        "The candidate gives a valid answer on 100.0 % of 80 items, the baseline on 0.0 %"
    )


def changed(outcomes: list[ItemOutcome], **changes: object) -> list[ItemOutcome]:
    return [outcomes[0].model_copy(update=changes), *outcomes[1:]]


BASE, CAND = sides(10, 5, 10, 5)


@pytest.mark.parametrize(
    ("candidate", "says"),
    [
        (CAND[1:], "1 of the baseline's are missing from the candidate"),
        ([*CAND, item(99, True)], "1 of the candidate's from the baseline"),
        ([*CAND, CAND[0]], "The candidate has 1 item(s) more than once"),
        (changed(CAND, text="another"), "another text or target"),
        (changed(CAND, target="dog"), "another text or target"),
        (changed(CAND, scores={"exact_match": 1.0}), "Not every item has the same metrics: valid_output"),
        (changed(CAND, scores={"exact_match": float("nan"), "valid_output": 1.0}), "A score is nan"),
        (changed(CAND, scores={"exact_match": 1.5, "valid_output": 1.0}), "A score is 1.5"),
        (changed(CAND, scores={"exact_match": -0.1, "valid_output": 1.0}), "A score is -0.1"),
        (changed(CAND, scores={"exact_match": 0.5, "valid_output": 1.0}), "must be 0 (wrong) or 1 (right)"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(candidate: list[ItemOutcome], says: str) -> None:
    with pytest.raises(NotComparableError) as refused:
        decide(BASE, candidate, Policy())
    assert says in str(refused.value)
    assert refused.value.fix


def test_one_item_is_too_few() -> None:
    with pytest.raises(NotComparableError, match="at least 2"):
        decide(BASE[:1], CAND[:1], Policy())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("golden_digest", "8" * 64),
        ("instruction", "Which beast?"),
        ("decoding", CONDITIONS.decoding.model_copy(update={"max_new_tokens": 9})),
        ("engine", "openai/http://127.0.0.1:8000/v1"),
        ("scorer_version", 2),
    ],
)
def test_other_conditions_are_refused_by_name(name: str, value: object) -> None:
    other = CONDITIONS.model_copy(update={name: value})
    with pytest.raises(NotComparableError, match=name) as refused:
        give_verdict(
            Side(system("champion", "b"), CONDITIONS, BASE), Side(system("candidate", "c"), other, CAND), Policy(),
            looks=1, digests={},
        )  # fmt: skip
    assert "baseline" in str(refused.value.where)


def test_looks_are_said() -> None:
    verdict = give_verdict(
        Side(system("champion", "b"), CONDITIONS, BASE), Side(system("candidate", "c"), CONDITIONS, CAND), Policy(),
        looks=3, digests={"candidate": "c"},
    )  # fmt: skip
    assert verdict.looks == 3
    assert "has now judged 3 different candidates" in verdict.reasons[-1]
    assert verdict.digests == {"candidate": "c"}


def test_white_space_around_an_answer_is_no_other_answer() -> None:
    padded = [one.model_copy(update={"prediction": f" {one.prediction}\n"}) for one in CAND]
    assert decide(BASE, padded, Policy(), LABELS) == decide(BASE, CAND, Policy(), LABELS)
