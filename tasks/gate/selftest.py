"""The gate on a baseline against versions of itself that are no better: how often does it promote one?

A gate that promotes more often than it promises is no gate, whatever its formulas say. So a policy is tried on the very
outcomes that it will judge, before it judges, and cannot be armed if it is caught.
"""

from __future__ import annotations

import numpy as np

from tasks.contracts.errors import SpecError
from tasks.contracts.references import SelfTest
from tasks.contracts.spec import LookPolicy, Objective, Policy
from tasks.gate.effects import PairedShares, difference_of
from tasks.gate.looks import look_level
from tasks.gate.pairs import Ints, Pairs
from tasks.gate.requirements import ask_all, is_failed, is_shown
from tasks.gate.resample import SEED
from tasks.gate.statistics import binomial_interval

RESAMPLED = "resampled"
TWO_EVALUATIONS = "two evaluations"
HISTORIES = 1_000  # the rate of a gate at 5 % then has a standard error of 0.7 %
HISTORIES_DEAR = 200  # where each judgement resamples
CONFIDENCE = 0.99  # that a policy which cannot be armed truly promotes too often: one in two hundred is wronged

_DISCORDANCE = (0.02, 0.3)  # shares of items whose answers a made-up candidate changes, from a retrain to another model


def self_test(pairs: Pairs, policy: Policy, *, noise: str, histories: int | None = None, looks: int = 1) -> SelfTest:
    """Judge made-up candidates that are no better than the baseline, and count promotions.

    resampled: a candidate is the baseline with the answers of some items exchanged among items of the same class, so
    that over all items every metric is exactly what it was. two evaluations: both sides are real evaluations of one
    model, so that the differences are the engine's own noise. In both, groups are then drawn with replacement, as if
    the golden set were another sample of the same size; of two evaluations, the sides of each drawn group are exchanged
    at random, so that none is better over all that could be drawn.

    Only the deciding requirement is judged: guards can but take promotions away. Made-up candidates are not worse, so a
    policy that asks for no more than that is tried on whether it would take them for better. With one look the whole of
    `alpha` is put at it; with more, each look of a history gets the level that the policy gives it.

    Args:
        pairs: the baseline's outcomes on both sides, or two evaluations of it.
        policy: what is to be tried.
        noise: `RESAMPLED` or `TWO_EVALUATIONS`.
        histories: how many; None takes as many as the method can judge in a few seconds.
        looks: candidates in each history.

    Raises:
        NotComparableError: the outcomes do not have what the policy decides on.
    """
    bare = policy.model_copy(update={"guards": (), "max_latency_ratio": None, "max_cost_ratio": None})
    if policy.objective is Objective.NON_INFERIOR:
        bare = bare.model_copy(update={"objective": Objective.SUPERIOR})
    if histories is None:
        cheap = isinstance(difference_of(pairs, policy.metric, policy.alpha), PairedShares)
        histories = HISTORIES if cheap else HISTORIES_DEAR
    levels = [policy.alpha] if looks == 1 else [look_level(policy, number, 0) for number in range(1, looks + 1)]
    rng = np.random.default_rng(SEED)
    members = _members(pairs)
    promotions = rejections = 0
    for _ in range(histories):
        promoted = rejected = False
        for level in levels:
            made_up = _no_better(pairs, members, noise, rng)
            asked = ask_all(made_up, {}, bare, level)
            promoted = all(is_shown(one, level) for one in asked)
            rejected = rejected or any(is_failed(one, level) for one in asked)
            if promoted:
                break
        promotions += promoted
        rejections += rejected and not promoted
    interval = binomial_interval(promotions, histories, CONFIDENCE)
    return SelfTest(
        histories=histories,
        looks=looks,
        promotions=promotions,
        rejections=rejections,
        rate=promotions / histories,
        low=interval.low,
        high=interval.high,
        alpha=policy.alpha,
        noise=noise,
    )


def may_be_armed(result: SelfTest, policy: Policy) -> bool:
    """Whether a policy keeps its promise as far as a self-test can tell. `off` promises nothing over several looks."""
    return result.low <= policy.alpha or (policy.looks is LookPolicy.OFF and result.looks > 1)


def check_armed(result: SelfTest, policy: Policy) -> None:
    """Refuse a policy that was caught promoting more often than it promises.

    Raises:
        SpecError: with the rates.
    """
    if not may_be_armed(result, policy):
        raise SpecError(
            f"This policy cannot be armed: it promoted {result.promotions:,} of {result.histories:,} made-up histories "
            f"of candidates that are no better ({100 * result.rate:.1f} %, 99 % interval {100 * result.low:.1f} % to "
            f"{100 * result.high:.1f} %), and it promises at most {100 * policy.alpha:g} %.",
            where="policy",
            fix="use a larger golden set, a metric of right or wrong (exact_match), or a smaller `policy.alpha`",
        )


def _members(pairs: Pairs) -> list[Ints]:
    order = np.argsort(pairs.groups, kind="stable")
    return np.split(order, np.cumsum(np.bincount(pairs.groups))[:-1])


def _no_better(pairs: Pairs, members: list[Ints], noise: str, rng: np.random.Generator) -> Pairs:
    """A golden set drawn anew, and a candidate on it that is no better than the baseline."""
    everything = np.arange(pairs.n)
    world = pairs if noise == TWO_EVALUATIONS else pairs.take(everything, _shuffled_within_classes(pairs, rng))
    if pairs.grouped:
        chosen = rng.integers(0, len(members), len(members))
        items = np.concatenate([members[group] for group in chosen])
        codes = np.repeat(np.arange(len(chosen)), [len(members[group]) for group in chosen])
        drawn = world.take(items, groups=codes)
    else:
        drawn = world.take(rng.integers(0, pairs.n, pairs.n), groups=everything)
    if noise == TWO_EVALUATIONS:
        # Only now: had they been exchanged before, one side would be ahead in all that is drawn.
        drawn = _exchange(drawn, rng.random(drawn.group_count)[drawn.groups] < 0.5)
    return drawn


def _shuffled_within_classes(pairs: Pairs, rng: np.random.Generator) -> Ints:
    """Whose answer each item's candidate gets: its own, or that of another item of its class."""
    giver = np.arange(pairs.n)
    changed = rng.random(pairs.n) < rng.uniform(*_DISCORDANCE)
    for target in np.unique(pairs.targets):
        places = np.flatnonzero(changed & (pairs.targets == target))
        giver[places] = rng.permutation(places)
    return giver


def _exchange(pairs: Pairs, turned: np.ndarray) -> Pairs:
    """The two sides exchanged on some items."""

    def sides(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.where(turned, right, left), np.where(turned, left, right)

    return Pairs(
        scores={name: sides(*both) for name, both in pairs.scores.items()},
        expenses={name: sides(*both) for name, both in pairs.expenses.items()},
        groups=pairs.groups,
        slices=pairs.slices,
        targets=pairs.targets,
        answers=sides(*pairs.answers),
        classes=pairs.classes,
    )
