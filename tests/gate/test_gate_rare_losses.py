"""Rare and large losses: what bootstrap and sign flips cannot see in a few groups must not pass for absent."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from tasks.contracts.references import Outcome
from tasks.contracts.spec import Objective, Policy
from tasks.gate.decide import Comparison, decide
from tasks.gate.statistics import empirical_likelihood_p, rare_losses_p, sign_flip_p
from tests.gate.made_up import scored


@pytest.mark.parametrize(
    ("sums", "worst", "expected"),
    [
        # 40 groups, none lost: 0.1 gained each, a loss is 4.9. Losses on a share q = 0.1 / 4.9 would make up for it.
        ([0.1] * 40, 4.9, binom.cdf(0, 40, 0.1 / 4.9)),
        # Two losses of 1 and a possible one of 4: their mean size counts as 2.
        ([1.0] * 18 + [-1.0] * 2, 4.0, binom.cdf(2, 20, (18 / 20) / 2)),
        ([-1.0] * 5, 1.0, 1.0),
        ([0.0] * 5, 1.0, 1.0),
    ],
)
def test_the_p_value_is_that_of_so_few_losses(sums: list[float], worst: float, expected: float) -> None:
    assert rare_losses_p(np.array(sums), worst) == pytest.approx(expected)


def test_where_losses_are_many_the_flips_decide() -> None:
    sums = np.array([1.0] * 60 + [-1.0] * 40)
    assert rare_losses_p(sums, 1.0) < sign_flip_p(sums)


def test_forty_groups_without_a_loss_do_not_show_that_none_is_lost() -> None:
    """One group in thirty loses all of its five items: a fourth of all sets of forty groups shows no such group."""
    before = scored([1.0] * 200, group=[f"g{number // 5}" for number in range(200)])
    after = scored([1.0] * 200, group=[f"g{number // 5}" for number in range(200)])
    policy = Policy(objective=Objective.NON_INFERIOR, margin=0.02)
    assert decide(Comparison(before, after), policy).outcome is Outcome.INCONCLUSIVE
    assert decide(Comparison(before, after), policy.model_copy(update={"margin": 0.1})).outcome is Outcome.PROMOTE


def test_asking_for_a_little_more_is_no_way_around_it() -> None:
    # Six wins, no loss, 35 groups of up to three items: 0.943^35 of all sets would hold no loss of three.
    wins = [0.0] * 30 + [1.0] * 4 + [0.0, 1.0, 1.0]
    group = [None] * 34 + ["g"] * 3
    sides = Comparison(scored([0.0] * 37, group=group), scored(wins, group=group))
    p_values = [decide(sides, Policy(min_improvement=asked)).p_value for asked in (0.0, 0.001, 0.01, 0.05)]
    assert p_values[0] >= (1 - 6 / 35 / 3) ** 35
    assert p_values == sorted(p_values)


@pytest.mark.parametrize("limit", [0.0, -0.02])
def test_false_promotions_stay_at_alpha_where_whole_groups_are_lost(limit: float) -> None:
    rng = np.random.default_rng(3)
    groups, size = 40, 5
    lost = 0.05 if limit == 0 else 0.02
    columns = {  # without targets there is no macro-F1 to be resampled
        "group": [f"g{number // size}" for number in range(groups * size)],
        "target": [""] * groups * size,
    }
    promoted = 0
    for _ in range(200):
        fell = np.repeat(rng.random(groups) < lost, size)
        won = (rng.random(groups * size) < lost / (1 - lost)) & ~fell if limit == 0 else np.zeros(groups * size, bool)
        before, after = fell.astype(float), won.astype(float)
        policy = Policy() if limit == 0 else Policy(objective=Objective.NON_INFERIOR, margin=-limit)
        decision = decide(Comparison(scored(before, **columns), scored(after, **columns)), policy)
        promoted += decision.outcome is Outcome.PROMOTE
    assert promoted <= 18  # 5 % of 200, and two and a half standard errors


# -- empirical likelihood ---------------------------------------------------------------------------------------------


def likelihood_p_by_search(sums: list[float], worst: float) -> float:
    """The same p-value from the weights themselves: the largest likelihood of a distribution with mean zero."""
    from scipy.optimize import minimize
    from scipy.stats import norm

    values, weights = np.append(sums, -worst), np.append(np.ones(len(sums)), 0.5)
    free = weights / weights.sum()
    found = minimize(
        lambda p: -np.sum(weights * np.log(p)),
        np.full(len(values), 1 / len(values)),
        bounds=[(1e-9, 1)] * len(values),
        constraints=[{"type": "eq", "fun": lambda p: p.sum() - 1}, {"type": "eq", "fun": lambda p: p @ values}],
        options={"maxiter": 1_000, "ftol": 1e-13},
    )
    ratio = 2 * (np.sum(weights * np.log(free)) + found.fun)
    return float(norm.sf(np.sqrt(ratio)))


@pytest.mark.parametrize(
    ("sums", "worst"),
    [([0.5, 1.0, 0.2, -0.3, 0.8, 0.4], 1.0), ([0.1] * 12 + [-0.4], 1.0), ([2.0, 1.0, 3.0, -1.0, 0.0, 1.0, 2.0], 5.0)],
)
def test_the_likelihood_ratio_is_that_of_the_nearest_distribution_with_mean_zero(
    sums: list[float], worst: float
) -> None:
    assert empirical_likelihood_p(np.array(sums), worst) == pytest.approx(likelihood_p_by_search(sums, worst), rel=1e-3)


@pytest.mark.parametrize("sums", [[-1.0, -2.0], [0.0, 0.0, 0.0], [0.5, -0.5], [0.1, 0.1]])
def test_sums_that_a_possible_loss_outweighs_show_nothing(sums: list[float]) -> None:
    assert empirical_likelihood_p(np.array(sums), 1.0) == 1.0


def test_rare_large_losses_make_it_less_sure_than_the_flips() -> None:
    sums = np.array([0.1] * 190 + [-0.5] * 10)
    assert empirical_likelihood_p(sums, 1.0) > 3 * sign_flip_p(sums)
