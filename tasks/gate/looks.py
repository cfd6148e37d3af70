"""How the error level of a golden set is shared over the looks at it. Pure functions; `tasks.gate.ledger` keeps count.

A verdict is a look: it lets out something about the golden set, and each further look is one more chance to promote a
candidate that is no better. `policy.alpha` is what all looks together may risk, and each look gets a share of it, so
the union bound holds: P(any false promotion) <= the sum of the levels <= alpha.

- alpha_spending: look k spends alpha / (k (k + 1)). The sum over all k is alpha, since 1 / (k (k + 1)) is
  1 / k - 1 / (k + 1); before look k, alpha / k is left. Any number of looks, none of them announced; early looks get
  most. (Such a sequence is an alpha-spending rule in the words of Foster & Stine, JRSS B 70 (2008) 429-444.)
- bonferroni: alpha / declared_looks each, for a number of looks that is fixed before the first.
- ladder: for people who choose the next candidate by what earlier verdicts said; see `ladder_level`.
- off: alpha each. Nothing is shared, so nothing holds for all looks together.

The first two hold for candidates that were not made by looking at earlier verdicts of the same golden set. Reusing it
for candidates that were needs the ladder (Dwork et al., The reusable holdout, Science 349 (2015) 636-638). ease.ml/ci
shares the error probability of a test set over a declared number of such steps, too, and more thinly where developers
see pass or fail (Renggli et al., Continuous integration of machine learning models, arXiv 1903.00278).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import assert_never

from tasks.contracts.numbers import percent
from tasks.contracts.references import ItemOutcome
from tasks.contracts.spec import LookPolicy, Policy
from tasks.store import canonical, digest_bytes

# After 99 looks alpha / 100 is left, 1 % of the budget, for all looks that would ever follow. The next one alone would
# have to show its difference at alpha / 10,100 (5e-6 for an alpha of 0.05), and whoever has asked a golden set so often
# knows it better than the task.
MOST_LOOKS = 99

# The exact test reaches this level with 40 wins and no loss, and needs many more of both. A ladder with steps of 0.01
# gets here at its fourth promotion or before, one with steps of 0.1 at its seventh.
SMALLEST_LEVEL = 1e-12

_OUT_OF_REQUIREMENTS = {"approval_hours"}  # whom to ask, and how long to wait, is no part of the verdict


def look_level(policy: Policy, number: int, promotions: int) -> float:
    """One-sided error level that a look may spend.

    Args:
        policy: says how alpha is shared (`looks`, `alpha`, `declared_looks`, `ladder_step`).
        number: 1 for the first look at this golden set.
        promotions: how many of the looks before it promoted.

    Returns:
        The level; 0 for a look beyond `declared_looks`.

    Raises:
        ValueError: there is no such look.
    """
    _check(number, promotions)
    match policy.looks:
        case LookPolicy.ALPHA_SPENDING:
            return policy.alpha / (number * (number + 1))
        case LookPolicy.BONFERRONI:
            declared = _declared(policy)
            return policy.alpha / declared if number <= declared else 0.0
        case LookPolicy.LADDER:
            return ladder_level(policy.alpha, policy.ladder_step, number, promotions)
        case LookPolicy.OFF:
            return policy.alpha
    assert_never(policy.looks)


def ladder_level(alpha: float, step: float, number: int, promotions: int) -> float:
    """Level of look t after j promotions: alpha * 1/(t (t + 1)) * 2**-(j + 1) / (C(t - 1, j) * m**j).

    Here m = ceil(1 / step). Whoever makes candidates sees of each look only "promoted, at this value", with the value
    rounded to one of the ladder's m steps (`ladder_value`), or "not promoted". Letting out only improvements, rounded,
    is the idea of the Ladder, and so is counting what could have been let out (Blum & Hardt, arXiv 1502.04585). They
    bound the error of a leaderboard; here it is the level of each test that has to be found:

    1. Before look t there have been t - 1 answers. With j promotions among them, they are one of at most
       C(t - 1, j) * m**j transcripts: which looks promoted, and at which step each.
    2. How somebody chooses candidates, however cleverly, is a function from transcripts to candidates (coin tosses are
       fixed in advance), and so is the champion they are compared with. Given the transcript, both are therefore fixed
       *before* the golden set is drawn, and a test at level l promotes a candidate that is no better with probability
       at most l.
    3. The chance that any look on any transcript promotes falsely is at most the sum over t, j and transcripts of the
       level: sum_t sum_j C(t - 1, j) m**j * level(t, j) = alpha * sum_t 1/(t (t + 1)) * sum_j 2**-(j + 1) <= alpha.

    The weights 1/(t (t + 1)) and 2**-(j + 1) could be any that sum to 1; these need no number announced beforehand. A
    look that never promotes costs only the choice C(t - 1, j); a promotion costs a factor of m, so a coarse step is
    cheap. With no promotion yet, the level is half that of alpha_spending.
    """
    transcripts = math.comb(number - 1, promotions) * math.ceil(1 / step) ** promotions
    # As a fraction, since the number of transcripts soon passes what a float can hold.
    return float(Fraction(alpha) / (number * (number + 1) * 2 ** (promotions + 1) * transcripts))


def ladder_value(value: float, step: float) -> float:
    """A promoted candidate's value in [0, 1] as the ladder lets it out: rounded up to one of ceil(1 / step) steps.

    Up, since rounding down or to the nearest would give one value more (0) than the m that `ladder_level` counts.
    """
    highest = math.ceil(1 / step)
    return min(1.0, min(highest, max(1, math.ceil(value / step))) * step)


def budget_spent(policy: Policy, looks: int) -> float:
    """What so many looks have spent of alpha.

    For the ladder this is what look by look was set aside for all transcripts that could have led there (the weights
    1/(t (t + 1))), not the smaller levels along the transcript that came about. `off` has no budget: its looks add up
    to more than alpha, and that is what it says.
    """
    match policy.looks:
        case LookPolicy.ALPHA_SPENDING | LookPolicy.LADDER:
            return policy.alpha * looks / (looks + 1)
        case LookPolicy.BONFERRONI:
            return policy.alpha * min(1.0, looks / _declared(policy))
        case LookPolicy.OFF:
            return policy.alpha * looks
    assert_never(policy.looks)


def why_spent(policy: Policy, number: int, promotions: int) -> str | None:
    """Why look `number` may not be taken, in a sentence; None if it may.

    Args:
        policy: says how alpha is shared.
        number: 1 for the first look at this golden set.
        promotions: how many of the looks before it promoted.

    Raises:
        ValueError: there is no such look.
    """
    _check(number, promotions)
    taken = f"{number - 1} look{'' if number == 2 else 's'}"
    match policy.looks:
        case LookPolicy.OFF:
            return None
        case LookPolicy.BONFERRONI:
            declared = _declared(policy)
            return f"{taken} taken of {declared} declared (bonferroni)" if number > declared else None
        case LookPolicy.ALPHA_SPENDING | LookPolicy.LADDER:
            if number > MOST_LOOKS:
                left = percent(1 / number)
                return f"{taken} have been taken ({policy.looks.value}), which leaves {left} of alpha for all to come"
            level = look_level(policy, number, promotions)
            if policy.looks is LookPolicy.LADDER and level < SMALLEST_LEVEL:
                return (
                    f"after {taken} with {promotions} promotions the ladder leaves the next one a level of "
                    f"{level:.1g}, which no golden set can meet"
                )
            return None
    assert_never(policy.looks)


def requirements_digest(policy: Policy) -> str:
    """sha256 of all in a policy that decides a verdict: what makes two looks at the same models the same question."""
    return digest_bytes(canonical(policy.model_dump(mode="json", exclude=_OUT_OF_REQUIREMENTS)).encode())


def answers_digest(outcomes: Sequence[ItemOutcome]) -> str:
    """sha256 over what was answered and how it scored, in any order; not over how long it took or what it cost.

    Raises:
        TypeError: a score is not a finite number.
    """
    lines = sorted(canonical([outcome.id, outcome.prediction, outcome.scores]) for outcome in outcomes)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _check(number: int, promotions: int) -> None:
    if number < 1 or not 0 <= promotions < number:
        raise ValueError(f"look {number} after {promotions} promotions: looks count from 1, each promotes at most once")


def _declared(policy: Policy) -> int:
    if policy.declared_looks is None:
        raise ValueError("bonferroni without declared_looks")  # `Policy` refuses it
    return policy.declared_looks
