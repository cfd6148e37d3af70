"""The verdicts: what they are, what they say, what never changes them, and what stands when asked again."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from tasks.contracts.errors import NotComparableError
from tasks.contracts.references import ItemOutcome, Look, Outcome, Status
from tasks.contracts.spec import MACRO_F1, LookPolicy, MetricGuard, Policy
from tasks.gate import resample
from tasks.gate.decide import Comparison, Decision, Side, decide, give_verdict, outcome_of
from tasks.gate.effects import difference_of
from tasks.gate.pairs import NO_CLASS, Pairs, make_pairs
from tasks.gate.requirements import ask_all, judge_requirements
from tasks.gate.statistics import exact_p, exact_p_beyond, score_interval
from tests.gate.made_up import CONDITIONS, LABELS, item, scored, sides, system, with_column

PAGE = CONDITIONS.golden_digest


def judge(wins: int, losses: int, both: int, neither: int, **policy: Any) -> Decision:
    return decide(Comparison(*sides(wins, losses, both, neither)), Policy(**policy))


def outcome_alone(wins: int, losses: int, n: int, **policy: Any) -> Outcome:
    """The same without reasons and tables, for the many verdicts of a simulation."""
    scores = np.repeat([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], [wins, losses, n - wins - losses], axis=0)
    nothing = np.full(n, NO_CLASS)
    pairs = Pairs(
        scores={"exact_match": (scores[:, 0], scores[:, 1])}, expenses={}, groups=np.arange(n), slices=[None] * n,
        targets=nothing, answers=(nothing, nothing), classes=(),
    )  # fmt: skip
    asked = ask_all(pairs, {}, Policy(**policy), 0.05)
    return outcome_of(judge_requirements(asked, 0.05))


# -- what it is -----------------------------------------------------------------------------------------------------


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
    decision = judge(wins, losses, both, neither, min_improvement=margin)
    assert decision.outcome is expected
    assert (decision.wins, decision.losses, decision.ties) == (wins, losses, both + neither)
    assert (decision.n, decision.groups) == (wins + losses + both + neither,) * 2
    if decision.outcome is Outcome.PROMOTE:
        assert decision.p_value == exact_p_beyond(wins, losses, decision.n, margin)
    assert (decision.items_to_settle is not None) == (expected is Outcome.INCONCLUSIVE)


STATUSES = {"s": Status.SHOWN, "f": Status.FAILED, "o": Status.OPEN}


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ("s", Outcome.PROMOTE),
        ("sss", Outcome.PROMOTE),
        ("sso", Outcome.INCONCLUSIVE),
        ("oss", Outcome.INCONCLUSIVE),
        ("ssf", Outcome.REJECT),
        ("fss", Outcome.REJECT),
        ("oof", Outcome.REJECT),
    ],
)
def test_all_must_be_shown_and_any_may_fail(statuses: str, expected: Outcome) -> None:
    one = judge(10, 10, 10, 10).requirements[0]
    made = [one.model_copy(update={"status": STATUSES[letter]}) for letter in statuses]
    assert outcome_of(made) is expected


def test_another_metric_can_decide() -> None:
    before, after = sides(0, 0, 40, 40)
    before = [one.model_copy(update={"scores": {"exact_match": 0.0, "valid_output": 0.0}}) for one in before]
    decision = decide(Comparison(before, after), Policy(metric="valid_output"))
    assert decision.outcome is Outcome.PROMOTE
    assert decision.metrics[0].metric == "valid_output"
    assert decision.reasons[0].startswith(
        "The candidate gives a valid answer on 100.0 % of 80 items, the baseline on 0.0 %"
    )


# -- what it says ---------------------------------------------------------------------------------------------------


def test_a_promotion_says_its_numbers_in_sentences() -> None:
    assert judge(165, 16, 149, 70).reasons == (
        "The candidate is right on 78.5 % of 400 items, the baseline on 41.3 %: +37.3 points (90 % interval +32.6 to "
        "+41.8), p < 0.0001.",
        "The whole interval lies above 0, so the candidate is shown to be better. A candidate that is not would pass "
        "this look with a chance of at most 5 %.",
        "181 of the items tell the two apart: 165 speak for the candidate, 16 for the baseline.",
    )


def test_a_promotion_says_how_many_guards_are_shown_as_well() -> None:
    guards = (MetricGuard(metric="valid_output", margin=0.1), MetricGuard(metric="valid_output", suite="s", floor=0.9))
    suites = {"s": Comparison(*sides(0, 0, 50, 0))}
    for count, says in ((1, "The other requirement is shown as well."), (2, "All 2 other requirements are shown")):
        decision = decide(Comparison(*sides(60, 10, 100, 30)), Policy(guards=guards[:count]), suites=suites)
        assert decision.outcome is Outcome.PROMOTE
        assert says in decision.reasons[1]


def test_a_rejection_says_whether_it_is_worse_or_not_better_by_enough() -> None:
    worse = judge(20, 60, 200, 120, min_improvement=0.05)
    small = judge(30, 28, 200, 142, min_improvement=0.1)
    assert "shown to be worse than the baseline" in worse.reasons[1]
    assert "shown not to be better by more than 10.0 points" in small.reasons[1]


def test_a_rejection_for_a_guard_names_the_guard_first() -> None:
    before, after = sides(60, 10, 100, 30)
    invalid = [one.model_copy(update={"scores": {**one.scores, "valid_output": float(n % 4 > 0)}}) for n, one in
               enumerate(after)]  # fmt: skip
    decision = decide(Comparison(before, invalid), Policy(guards=(MetricGuard(metric="valid_output", margin=0.05),)))
    assert decision.outcome is Outcome.REJECT
    assert decision.reasons[0] == (
        "Valid output: not worse by 5.0 points is shown to fail; seen is −25.0 points "
        "(interval −30.3 to −20.3, 200 items)."
    )
    assert decision.reasons[1].startswith("The candidate is right on 80.0 %")


def test_an_open_verdict_says_what_would_settle_it() -> None:
    decision = judge(48, 34, 200, 118)
    assert decision.outcome is Outcome.INCONCLUSIVE
    assert decision.items_to_settle is not None
    assert 900 < decision.items_to_settle < 1200
    assert "The interval holds 0, so the candidate is neither shown to be better nor shown not to be." in (
        decision.reasons
    )
    assert (
        f"If the observed +3.5 points are real, about {decision.items_to_settle:,} items in all would settle it."
        in decision.reasons[-1]
    )


@pytest.mark.parametrize(("wins", "losses"), [(40, 40), (40, 43), (43, 40), (0, 0)])
def test_a_difference_near_zero_is_not_planned_on(wins: int, losses: int) -> None:
    decision = judge(wins, losses, 200, 200 - wins - losses)
    assert decision.items_to_settle is not None
    assert 400 < decision.items_to_settle < 1700  # about four times as many halve what can be shown
    assert "too close to 0 to plan on" in decision.reasons[-1]


def test_the_wrong_side_is_planned_towards_a_rejection() -> None:
    decision = judge(34, 48, 200, 118)
    assert decision.outcome is Outcome.INCONCLUSIVE
    assert "If the observed −3.5 points are real" in decision.reasons[-1]


def test_identical_models_are_inconclusive_with_a_clear_reason() -> None:
    outcomes, _ = sides(0, 0, 250, 150)
    decision = decide(Comparison(outcomes, outcomes), Policy())
    assert decision.outcome is Outcome.INCONCLUSIVE
    assert "The two models score the same on every single item, so no item tells them apart." in decision.reasons


def test_every_open_requirement_is_planned_and_the_largest_plan_counts() -> None:
    before, after = sides(48, 34, 200, 118)
    slices = ["a", "b", "b", "b"] * 100
    decision = decide(
        Comparison(with_column(before, slice=slices), with_column(after, slice=slices)),
        Policy(guards=(MetricGuard(slice="a", margin=0.02), MetricGuard(metric="valid_output", floor=0.9))),
    )
    assert [one.status for one in decision.requirements] == [Status.OPEN, Status.OPEN, Status.SHOWN]
    assert "For exact match, slice a: with 80 % power, these 100 items can show" in decision.reasons[-1]
    assert "items of this slice" in decision.reasons[-1]
    alone = judge(48, 34, 200, 118).items_to_settle
    assert decision.items_to_settle is not None
    assert alone is not None
    assert decision.items_to_settle > alone  # a quarter of the items are of the slice


# -- how much would settle it ---------------------------------------------------------------------------------------


def test_with_the_items_that_would_settle_it_four_in_five_do() -> None:
    wins, losses, n = 48, 34, 400
    more = judge(wins, losses, 200, n - 200 - wins - losses).items_to_settle
    assert more is not None
    shares = [wins / n, losses / n, 1 - (wins + losses) / n]
    drawn = np.random.default_rng(2).multinomial(more, shares, size=2000)
    shown = np.mean(
        [exact_p(w, x) < 0.05 and score_interval(w, x, more, 0.05).low > 0 for w, x, _ in drawn.tolist()]
    )  # fmt: skip
    assert 0.76 < shown < 0.84


def test_with_the_items_that_would_settle_it_four_in_five_do_in_groups_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """New groups like those seen, so many that the items are as many as was said."""
    rng = np.random.default_rng(23)
    shift = np.repeat(rng.normal(0.0, 0.25, 80), 5)  # of the group: its five items speak with one voice, mostly
    right = rng.random((2, 400)) < np.clip(0.6 + np.stack([np.zeros(400), shift + 0.06]), 0, 1)
    group = [f"g{number // 5}" for number in range(400)]
    before, after = (scored(side.astype(float), group=group) for side in right)
    decision = decide(Comparison(before, after), Policy())
    assert decision.outcome is Outcome.INCONCLUSIVE
    assert "If the observed" in decision.reasons[-1]
    assert decision.items_to_settle is not None
    pairs = make_pairs(before, after, ())
    groups = round(decision.items_to_settle / 5)
    monkeypatch.setattr(resample, "RESAMPLES", 500)
    shown = 0
    for _ in range(150):
        chosen = rng.integers(0, 80, groups)
        items = (5 * chosen[:, None] + np.arange(5)).ravel()
        effect = difference_of(pairs.take(items, groups=np.repeat(np.arange(groups), 5)), "exact_match", 0.05)
        shown += effect.p_above(0.0, 0.05) < 0.05
    assert 0.7 < shown / 150 < 0.9
    # Had every item stood alone, these would have been enough.
    alone = [with_column(side, group=[None] * 400) for side in (before, after)]
    assert decide(Comparison(alone[0], alone[1]), Policy()).outcome is Outcome.PROMOTE


@pytest.mark.parametrize("metric", ["exact_match", "graded", MACRO_F1])
def test_a_smaller_level_asks_for_more_items_and_a_larger_effect(metric: str) -> None:
    before, after = sides(24, 18, 70, 38)
    before, after = (
        [one.model_copy(update={"scores": one.scores | {"graded": 0.9 * one.scores["exact_match"]}}) for one in side]
        for side in (before, after)
    )
    made = [decide(Comparison(before, after, LABELS), Policy(metric=metric), level=level) for level in (0.05, 0.001)]
    assert [one.outcome for one in made] == [Outcome.INCONCLUSIVE] * 2
    smallest = [one.smallest_effect or 0.0 for one in made]
    assert 0.0 < smallest[0] < smallest[1] < 0.5
    settles = [one.items_to_settle or 0 for one in made]
    assert 150 < settles[0] <= settles[1]  # four times the present ones, where what was seen is too small to plan on


# -- where there is little to say -----------------------------------------------------------------------------------

PAIRED_UP = [f"g{number // 2}" for number in range(40)]


@pytest.mark.parametrize("metric", ["exact_match", "graded", MACRO_F1])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(
    ("wins", "losses", "expected"),
    [(0, 0, Outcome.INCONCLUSIVE), (40, 0, Outcome.PROMOTE), (0, 40, Outcome.REJECT), (20, 20, Outcome.INCONCLUSIVE)],
)
def test_all_alike_and_all_different(metric: str, grouped: bool, wins: int, losses: int, expected: Outcome) -> None:
    before, after = sides(wins, losses, 20 if wins + losses == 0 else 0, 20 if wins + losses == 0 else 0)
    sides_ = [
        [one.model_copy(update={"scores": one.scores | {"graded": 0.25 + one.scores["exact_match"] / 2}}) for one in s]
        for s in (before, after)
    ]  # fmt: skip
    if grouped:
        sides_ = [with_column(side, group=PAIRED_UP) for side in sides_]
    decision = decide(Comparison(sides_[0], sides_[1], LABELS), Policy(metric=metric))
    assert decision.outcome is expected
    assert (decision.wins, decision.losses, decision.groups) == (wins, losses, 20 if grouped else 40)
    (one,) = decision.requirements
    assert -1.0 <= one.low <= one.estimate <= one.high <= 1.0
    assert decision.smallest_effect is not None
    assert 0.05 < decision.smallest_effect < 1.0
    if expected is Outcome.INCONCLUSIVE:
        assert decision.items_to_settle is not None
        assert 40 < decision.items_to_settle < 1000


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("metric", ["exact_match", MACRO_F1])
def test_two_items_show_nothing(metric: str, grouped: bool) -> None:
    group = ["g", "g"] if grouped else [None, None]
    for wins, losses in ((2, 0), (0, 2), (1, 1), (0, 0)):
        before, after = sides(wins, losses, 2 - wins - losses, 0)
        decision = decide(
            Comparison(with_column(before, group=group), with_column(after, group=group), LABELS), Policy(metric=metric)
        )
        assert decision.outcome is Outcome.INCONCLUSIVE
        assert (decision.items_to_settle or 0) > 2


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ({"min_improvement": 0.99}, Outcome.REJECT),
        ({"guards": [{"floor": 0.999}]}, Outcome.REJECT),
        ({"guards": [{"margin": 0.999}]}, Outcome.PROMOTE),
        ({"guards": [{"margin": 1e-9}]}, Outcome.PROMOTE),  # better is not worse by anything
        ({"guards": [{"metric": "valid_output", "margin": 1e-9}]}, Outcome.INCONCLUSIVE),  # alike, but how exactly?
        ({"guards": [{"metric": "valid_output", "floor": 0.999}]}, Outcome.INCONCLUSIVE),
        ({"max_latency_ratio": 1e-6}, Outcome.REJECT),
        ({"max_latency_ratio": 1e6}, Outcome.PROMOTE),
        ({"alpha": 1e-9}, Outcome.PROMOTE),
        ({"alpha": 1e-30}, Outcome.INCONCLUSIVE),
        ({"alpha": 0.5}, Outcome.PROMOTE),
    ],
)
def test_extreme_policies_have_a_verdict(policy: dict[str, Any], expected: Outcome) -> None:
    decision = decide(Comparison(*sides(60, 5, 100, 35)), Policy.model_validate(policy))
    assert decision.outcome is expected
    assert all(np.isfinite([one.low, one.high, one.p_value]).all() for one in decision.requirements)


# -- table and verdict ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("margin", [0.0, 0.01, 0.05])
@pytest.mark.parametrize("metric", ["exact_match", "graded"])
def test_table_and_verdict_agree(metric: str, margin: float) -> None:
    draw = random.Random(8)
    seen = set()
    for _ in range(30):
        wins, losses = draw.randrange(0, 30), draw.randrange(0, 30)
        before, after = (
            [
                one.model_copy(
                    update={"scores": one.scores | {"graded": one.scores["exact_match"] * 0.8}, "target": ""}
                )
                for one in side
            ]
            for side in sides(wins, losses, 20, 40)
        )
        decision = decide(Comparison(before, after), Policy(metric=metric, min_improvement=margin))
        (one,), row = decision.requirements, decision.metrics[0]
        seen.add(decision.outcome)
        assert (one.low > margin) == (decision.outcome is Outcome.PROMOTE)
        assert (one.high < margin) == (decision.outcome is Outcome.REJECT)
        assert (decision.p_value < 0.05) >= (decision.outcome is Outcome.PROMOTE)
        assert (row.difference, row.method) == (one.estimate, one.method)
        if margin == 0:
            assert (row.low, row.high) == (one.low, one.high)
            if metric == "exact_match":
                assert (decision.outcome is Outcome.PROMOTE) == (exact_p(wins, losses) < 0.05)
                assert (decision.outcome is Outcome.REJECT) == (exact_p(losses, wins) < 0.05)
    assert seen == set(Outcome)


def test_a_margin_is_never_easier_than_none() -> None:
    # 7 against 1 of 21 at 2.5 %: the score test alone would find it better than a hair above 0.
    assert judge(7, 1, 12, 1, alpha=0.025, min_improvement=0.001).outcome is Outcome.INCONCLUSIVE


def test_an_interval_that_touches_the_limit_decides_nothing() -> None:
    # 7 against 1 of 21: the score test alone excludes 0 at 2.5 %, the exact test (p = 0.035) does not.
    assert score_interval(7, 1, 21, 0.025).low > 0
    for wins, losses in ((7, 1), (1, 7)):
        touched = judge(wins, losses, 12, 1, alpha=0.025)
        (one,) = touched.requirements
        assert touched.outcome is Outcome.INCONCLUSIVE
        assert 0.0 in (one.low, one.high)
        assert (touched.metrics[0].low, touched.metrics[0].high) == (one.low, one.high)
        assert judge(wins, losses, 12, 1, alpha=0.05).outcome is not Outcome.INCONCLUSIVE


def test_every_metric_is_compared_with_its_method() -> None:
    def with_fields(outcomes: list[ItemOutcome]) -> list[ItemOutcome]:
        return [
            one.model_copy(update={"scores": {**one.scores, "field:b": one.scores["exact_match"], "field_match": 0.5}})
            for one in outcomes
        ]

    before, after = sides(31, 12, 40, 30)
    metrics = decide(Comparison(with_fields(before), with_fields(after), LABELS), Policy()).metrics
    assert [(row.metric, row.method) for row in metrics] == [
        ("exact_match", "McNemar exact + Tango score"),
        ("macro_f1", "BCa bootstrap + swapped sides"),
        ("field_match", "BCa bootstrap + sign flips"),
        ("valid_output", "McNemar exact + Tango score"),
        ("field:b", "McNemar exact + Tango score"),
    ]
    assert all(row.n == 113 and row.confidence == pytest.approx(0.9) for row in metrics)
    assert all(row.low <= row.difference <= row.high for row in metrics)
    assert all(row.baseline_low <= row.baseline <= row.baseline_high for row in metrics)
    assert all(row.candidate_low <= row.candidate <= row.candidate_high for row in metrics)


def test_who_is_right_is_counted_where_a_metric_has_no_score_of_an_item() -> None:
    before, after = sides(31, 12, 40, 30)
    bare = [[one.model_copy(update={"scores": {"valid_output": 1.0}}) for one in side] for side in (before, after)]
    decision = decide(Comparison(bare[0], bare[1], LABELS), Policy(metric=MACRO_F1))
    assert (decision.wins, decision.losses, decision.ties) == (31, 12, 70)
    assert decision.reasons[0].startswith("The candidate's macro-F1 is 62.8 % over 113 items, the baseline's 46.0 %: +")


# -- what never changes it ------------------------------------------------------------------------------------------


def test_the_order_of_items_never_matters() -> None:
    before, after = sides(31, 12, 40, 30)
    group, names = [f"g{number // 3}" for number in range(113)], ["x", "y"] * 56 + ["x"]
    before, after = (
        with_column(side, group=group, slice=names, latency_ms=np.random.default_rng(1).random(113).tolist())
        for side in (before, after)
    )
    policy = Policy(metric=MACRO_F1, max_latency_ratio=1.1, guards=(MetricGuard(slice="*", margin=0.1),))
    expected = decide(Comparison(before, after, LABELS), policy)
    for seed in range(2):
        random.Random(seed).shuffle(before)
        random.Random(seed + 10).shuffle(after)
        assert decide(Comparison(before, after, LABELS), policy) == expected


def test_swapping_the_sides_mirrors_every_difference() -> None:
    before, after = sides(31, 12, 40, 30)
    there = decide(Comparison(before, after, LABELS), Policy())
    back = decide(Comparison(after, before, LABELS), Policy())
    assert (there.outcome, back.outcome) == (Outcome.PROMOTE, Outcome.REJECT)
    assert (there.wins, there.losses) == (back.losses, back.wins)
    for one, other in zip(there.metrics, back.metrics, strict=True):
        assert one.metric == other.metric
        assert (one.difference, one.low, one.high) == (-other.difference, -other.high, -other.low)
        assert (one.baseline, one.baseline_low, one.candidate_high) == (
            other.candidate, other.candidate_low, other.baseline_high,
        )  # fmt: skip


@pytest.mark.parametrize("margin", [0.0, 0.03])
def test_ties_never_turn_a_rejection_into_a_promotion(margin: float) -> None:
    draw = random.Random(2)
    rejected = 0
    for _ in range(40):
        wins, losses = draw.randrange(0, 40), draw.randrange(0, 40)
        outcomes = [
            outcome_alone(wins, losses, wins + losses + ties, min_improvement=margin)
            for ties in (20, 21, 30, 120, 1000)
        ]  # fmt: skip
        rejected += Outcome.REJECT in outcomes
        if Outcome.REJECT in outcomes:
            assert Outcome.PROMOTE not in outcomes[outcomes.index(Outcome.REJECT) :]
    assert rejected > 5


@pytest.mark.parametrize(
    ("discordance", "n", "margin"), [(0.3, 300, 0.0), (0.05, 300, 0.0), (0.4, 40, 0.0), (0.3, 300, 0.05)]
)
def test_no_better_candidates_are_promoted_at_most_at_alpha(discordance: float, n: int, margin: float) -> None:
    shares = [(discordance + margin) / 2, (discordance - margin) / 2, 1 - discordance]
    drawn = np.random.default_rng(11).multinomial(n, shares, size=1000)
    promoted = sum(
        int(times)
        for (wins, losses, _), times in zip(*np.unique(drawn, axis=0, return_counts=True), strict=True)
        if outcome_alone(int(wins), int(losses), n, min_improvement=margin) is Outcome.PROMOTE
    )
    # Three standard errors of 1,000 draws at 5 % are 2.1 %.
    assert promoted / 1000 <= 0.05 + 0.021


def test_white_space_around_an_answer_is_no_other_answer() -> None:
    before, after = sides(10, 5, 10, 5)
    padded = [one.model_copy(update={"prediction": f" {one.prediction}\n"}) for one in after]
    assert decide(Comparison(before, padded, LABELS), Policy()) == decide(Comparison(before, after, LABELS), Policy())


# -- what cannot be compared ----------------------------------------------------------------------------------------


def changed(outcomes: list[ItemOutcome], **changes: object) -> list[ItemOutcome]:
    return [outcomes[0].model_copy(update=changes), *outcomes[1:]]


BASE, CAND = sides(10, 5, 10, 5)


@pytest.mark.parametrize(
    ("candidate", "says"),
    [
        (CAND[1:], "1 of the baseline's are missing from the candidate"),
        ([*CAND, item(99, True)], "1 of the candidate's from the baseline"),
        ([*CAND, CAND[0]], "The candidate has 1 item(s) more than once"),
        ([], "30 of the baseline's are missing from the candidate"),
        (changed(CAND, text="another"), "another text or target"),
        (changed(CAND, target="dog"), "another text or target"),
        (changed(CAND, group="g"), "1 item(s) have another group in the two evaluations, and the group tells which"),
        (changed(CAND, slice="x"), "1 item(s) have another slice in the two evaluations, and the slice tells which"),
        (changed(CAND, scores={"exact_match": 1.0}), "Not every item has the same metrics: valid_output"),
        (changed(CAND, scores={"exact_match": float("nan"), "valid_output": 1.0}), "A score is nan"),
        (changed(CAND, scores={"exact_match": float("inf"), "valid_output": 1.0}), "A score is inf"),
        (changed(CAND, scores={"exact_match": float("-inf"), "valid_output": 1.0}), "A score is -inf"),
        (changed(CAND, scores={"exact_match": 1.5, "valid_output": 1.0}), "A score is 1.5"),
        (changed(CAND, scores={"exact_match": -0.1, "valid_output": 1.0}), "A score is -0.1"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(candidate: list[ItemOutcome], says: str) -> None:
    with pytest.raises(NotComparableError) as refused:
        decide(Comparison(BASE, candidate), Policy())
    assert says in str(refused.value)
    assert refused.value.fix


def test_what_the_baseline_has_too_much_is_refused_as_well() -> None:
    with pytest.raises(NotComparableError, match="The baseline has 1 item"):
        decide(Comparison([*BASE, BASE[0]], CAND), Policy())
    with pytest.raises(NotComparableError, match="A score is nan") as refused:
        decide(Comparison(changed(BASE, scores={"exact_match": float("nan"), "valid_output": 1.0}), CAND), Policy())
    assert str(refused.value.where).startswith("baseline, item i0000, exact_match")


def test_groups_on_one_side_alone_are_refused() -> None:
    """Without its groups, a side would make a few conversations look like many items."""
    grouped = with_column(CAND, group=[f"g{number // 3}" for number in range(30)])
    for before, after in ((BASE, grouped), (grouped, BASE)):
        with pytest.raises(NotComparableError, match=r"30 item\(s\) have another group"):
            decide(Comparison(before, after), Policy())


@pytest.mark.parametrize("count", [0, 1])
def test_one_item_is_too_few(count: int) -> None:
    with pytest.raises(NotComparableError, match=rf"There are {count} item\(s\) to compare.* at least 2"):
        decide(Comparison(BASE[:count], CAND[:count]), Policy())


def test_a_suite_is_checked_as_the_golden_set_is() -> None:
    policy = Policy(guards=(MetricGuard(suite="s", margin=0.1),))
    with pytest.raises(NotComparableError, match="do not hold the same items"):
        decide(Comparison(BASE, CAND), policy, suites={"s": Comparison(BASE, CAND[1:])})


# -- conditions, looks and what was said before ---------------------------------------------------------------------


def verdict_of(
    comparison: tuple[list[ItemOutcome], list[ItemOutcome]], look: Look, policy: Policy, **given: Any
) -> Any:
    before, after = comparison
    return give_verdict(
        Side(system("champion", "b"), CONDITIONS, before), Side(system("candidate", "c"), CONDITIONS, after), policy,
        look=look, digests={"candidate": "c"}, **given,
    )  # fmt: skip


def look(number: int | None = 1, level: float = 0.025, **changes: Any) -> Look:
    return Look(page=PAGE, number=number, level=level, spent=level, budget=0.05, **changes)


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
    before, after = Side(system("champion", "b"), CONDITIONS, BASE), Side(system("candidate", "c"), other, CAND)
    with pytest.raises(NotComparableError, match=name) as refused:
        give_verdict(before, after, Policy(), look=look(), digests={})
    assert str(refused.value.where).startswith(f"{name}: baseline")
    good = Side(system("candidate", "c"), CONDITIONS, CAND)
    with pytest.raises(NotComparableError, match=name) as refused:
        give_verdict(before, good, Policy(), look=look(), digests={}, suites={"sums": (before, after)})
    assert str(refused.value.where).startswith(f"suite sums: {name}: baseline")


def test_a_bare_file_is_taken_on_trust_and_the_verdict_says_so() -> None:
    before, after = Side(system("champion", "b"), CONDITIONS, BASE), Side(system("candidate", "c"), None, CAND)
    verdict = give_verdict(before, after, Policy(), look=look(None), digests={})
    assert "is taken on trust" in verdict.reasons[-1]
    assert "No ledger was kept, so this counts as the only look at these items." in verdict.reasons


@pytest.mark.parametrize(
    ("taken", "policy", "says"),
    [
        (look(1), {}, None),
        (look(3, 0.05 / 12), {}, "This is look 3 at this golden set: it may spend 0.417 % of the 5 % that all looks"),
        (look(None), {}, "No ledger was kept"),
        (look(2, 0.05), {"looks": LookPolicy.OFF}, "This is look 2 at this golden set, and each may err with a chance"),
        (
            look(2, repeated=True, first_outcome=Outcome.PROMOTE),
            {},
            "It was judged before, as look 2: judging it again is no new look.",
        ),
    ],
)
def test_what_a_look_costs_is_said_and_its_level_is_used(taken: Look, policy: dict[str, Any], says: str | None) -> None:
    verdict = verdict_of(sides(60, 20, 100, 20), taken, Policy(**policy))
    assert (verdict.look, verdict.requirements[0].level) == (taken, taken.level)
    assert verdict.digests == {"candidate": "c"}
    if says is None:
        assert not any("look 1" in reason for reason in verdict.reasons)
    else:
        assert any(reason.startswith(says) for reason in verdict.reasons), verdict.reasons


def test_the_level_of_a_look_decides() -> None:
    made = sides(10, 1, 30, 30)  # p = 0.0059
    assert verdict_of(made, look(1, 0.025), Policy()).outcome is Outcome.PROMOTE
    assert verdict_of(made, look(3, 0.05 / 12), Policy()).outcome is Outcome.INCONCLUSIVE


GOOD, POOR, BAD = sides(60, 20, 100, 20), sides(30, 25, 100, 45), sides(20, 60, 100, 20)
P, R, N = Outcome.PROMOTE, Outcome.REJECT, Outcome.INCONCLUSIVE


@pytest.mark.parametrize(
    ("made", "first", "same_answers", "stands", "says"),
    [
        (GOOD, None, True, P, None),
        (GOOD, P, True, P, None),
        (POOR, N, True, N, None),
        (BAD, R, True, R, None),
        # Other answers cannot promote what was not promoted ...
        (GOOD, N, False, N, "with other answers, and the verdict was INCONCLUSIVE. What it shows now would be enough"),
        (GOOD, R, False, N, "with other answers, and the verdict was REJECT. What it shows now would be enough"),
        # ... nor can the same answers, on a machine that is quicker today ...
        (GOOD, N, True, N, "with the same answers in another time or at another cost, and the verdict was INCONCL"),
        # ... but they can take a promotion away, or reject.
        (POOR, P, False, N, "This candidate was judged before on this golden set, with other answers."),
        (BAD, P, False, R, "This candidate was judged before on this golden set, with other answers."),
        (BAD, N, False, R, "This candidate was judged before on this golden set, with other answers."),
        (GOOD, P, False, P, "This candidate was judged before on this golden set, with other answers."),
        (POOR, P, True, N, "judged before on this golden set, with the same answers in another time"),
    ],
)
def test_a_candidate_is_not_asked_again_until_it_passes(
    made: tuple[list[ItemOutcome], list[ItemOutcome]],
    first: Outcome | None,
    same_answers: bool,
    stands: Outcome,
    says: str | None,
) -> None:
    taken = look(2, 0.05, repeated=first is not None, first_outcome=first, same_answers=same_answers)
    verdict = verdict_of(made, taken, Policy())
    assert verdict.outcome is stands
    about = [reason for reason in verdict.reasons if "judged before on this golden set" in reason]
    if says is None:
        assert about == []
    else:
        assert [says in reason for reason in about] == [True]
    if stands is N and made is GOOD:
        assert verdict.reasons[0] == about[0]  # what decides comes first


# -- the ladder -----------------------------------------------------------------------------------------------------

LADDER = Policy(looks=LookPolicy.LADDER, ladder_step=0.05)


def test_the_ladder_lets_out_one_bit_and_a_rounded_score() -> None:
    promoted = verdict_of(GOOD, look(1, 0.0125), LADDER)
    assert (promoted.outcome, promoted.withheld, promoted.items_to_settle) == (P, True, None)
    assert promoted.reasons == (
        "The candidate is shown to be better. Its exact match is at most 80.0 % (rounded up to a step of 5 points).",
        "The ladder lets out no more than this, so that later candidates cannot be fitted to the golden set.",
    )
    assert promoted.metrics[0].candidate == pytest.approx(0.8)


def test_the_ladder_does_not_tell_worse_from_not_better() -> None:
    verdicts = [verdict_of(made, look(1, 0.0125), LADDER) for made in (POOR, BAD)]
    assert [one.outcome for one in verdicts] == [N, N]
    assert verdicts[0].reasons == verdicts[1].reasons
    assert [one.items_to_settle for one in verdicts] == [None, None]
    assert not any(character.isdigit() for reason in verdicts[0].reasons for character in reason)


def test_asked_again_the_ladder_does_not_tell_that_it_would_have_passed_now() -> None:
    for same_answers, asked in ((False, (GOOD, POOR, BAD)), (True, (POOR, BAD))):
        taken = look(1, 0.0125, repeated=True, first_outcome=N, same_answers=same_answers)
        verdicts = [verdict_of(made, taken, LADDER) for made in asked]
        assert {one.outcome for one in verdicts} == {N}
        assert len({one.reasons for one in verdicts}) == 1
