"""From a policy to the list of what it asks, and from the outcomes to what they say of each. Pure.

Which errors are shared and which are not:

- A promotion needs *every* requirement to be shown, so each is tested at the full level: a promotion that should not
  be needs at least one requirement that is not met and yet was shown (the intersection-union test; Berger,
  Technometrics 24 (1982) 295-300).
- A rejection needs *any one* guard to fail, so the guards share the level by Holm's method: a candidate that meets all
  of them is rejected for one with at most that chance, however many there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from tasks.contracts.errors import NotComparableError
from tasks.contracts.references import Ask, Requirement, Status
from tasks.contracts.spec import EVERY_SLICE, Expense, MetricGuard, Objective, Policy
from tasks.gate.effects import Effect, difference_of, expense_ratio, value_of
from tasks.gate.pairs import Pairs
from tasks.statistics import Interval, holm_levels


class Asked(NamedTuple):
    """One requirement before it is judged: what must lie beyond which limit, and on which side."""

    ask: Ask
    metric: str
    slice: str | None
    suite: str | None
    limit: float
    effect: Effect
    pairs: Pairs
    decides: bool

    @property
    def below(self) -> bool:
        """Whether small is good: a ratio must stay below its limit, all else above."""
        return self.ask is Ask.RATIO


def ask_all(pairs: Pairs, suites: Mapping[str, Pairs], policy: Policy, level: float) -> list[Asked]:
    """Everything that a policy asks, the deciding requirements first.

    Args:
        pairs: the golden set's items.
        suites: the items of each suite that guards can be about.
        policy: what is asked.
        level: the smallest one-sided level that bounds will be asked at.

    Raises:
        NotComparableError: the outcomes lack a metric, a slice, a suite or an expense that the policy names.
    """
    asked = list(_deciding(pairs, policy, level))
    smallest = level / max(1, len(policy.guards))
    for number, guard in enumerate(policy.guards):
        asked += _guarded(pairs, suites, guard, f"policy.guards[{number}]", smallest)
    for expense, limit, name in (
        (Expense.LATENCY, policy.max_latency_ratio, "max_latency_ratio"),
        (Expense.COST, policy.max_cost_ratio, "max_cost_ratio"),
    ):
        if limit is not None:
            effect = expense_ratio(pairs, expense.value, smallest, f"policy.{name}")
            asked.append(Asked(Ask.RATIO, expense.value, None, None, limit, effect, pairs, decides=False))
    return asked


def judge_requirements(asked: list[Asked], level: float) -> tuple[Requirement, ...]:
    """What the outcomes say of each requirement, at a one-sided level."""
    guards = [index for index, one in enumerate(asked) if not one.decides]
    against = [_p_against(asked[index], level) for index in guards]
    fail_levels = dict(zip(guards, holm_levels(against, level), strict=True))
    return tuple(_judge(one, level, fail_levels.get(index, level)) for index, one in enumerate(asked))


def is_shown(one: Asked, level: float) -> bool:
    """Whether a requirement is shown, as `judge_requirements` finds it, with as little work as that takes."""
    test = one.effect.quick_below if one.below else one.effect.quick_above
    return test(one.limit, level) < level and _judge(one, level, level).status is Status.SHOWN


def is_failed(one: Asked, level: float) -> bool:
    """Whether a requirement is shown to fail at this level, with as little work as that takes."""
    test = one.effect.quick_above if one.below else one.effect.quick_below
    return test(one.limit, level) < level and _judge(one, level, level).status is Status.FAILED


def _deciding(pairs: Pairs, policy: Policy, level: float) -> Iterator[Asked]:
    difference = difference_of(pairs, policy.metric, level)
    if policy.objective is Objective.SUPERIOR:
        yield Asked(Ask.SUPERIOR, policy.metric, None, None, policy.min_improvement, difference, pairs, decides=True)
        return
    yield Asked(Ask.NON_INFERIOR, policy.metric, None, None, -policy.margin, difference, pairs, decides=True)
    if policy.objective is Objective.NON_INFERIOR:
        return
    expense = policy.saving_in.value
    ratio = expense_ratio(pairs, expense, level, "policy.saving_in")
    yield Asked(Ask.RATIO, expense, None, None, 1 - policy.min_saving, ratio, pairs, decides=True)


def _guarded(
    pairs: Pairs, suites: Mapping[str, Pairs], guard: MetricGuard, where: str, level: float
) -> Iterator[Asked]:
    for part, items in _parts(pairs, suites, guard, where):
        if guard.margin is not None:
            effect = difference_of(items, guard.metric, level, where)
            yield Asked(Ask.NON_INFERIOR, guard.metric, part, guard.suite, -guard.margin, effect, items, decides=False)
        if guard.floor is not None:
            effect = value_of(items, guard.metric, 1, level, where)
            yield Asked(Ask.FLOOR, guard.metric, part, guard.suite, guard.floor, effect, items, decides=False)


def _parts(
    pairs: Pairs, suites: Mapping[str, Pairs], guard: MetricGuard, where: str
) -> Iterator[tuple[str | None, Pairs]]:
    """The items that a guard is about, with the slice's name."""
    if guard.suite is not None:
        if guard.suite not in suites:
            raise NotComparableError(
                f"The policy guards the suite {guard.suite!r}, and there are no outcomes of it.",
                where=where,
                fix="evaluate both models on it and hand the outcomes over, or take the guard out",
            )
        yield None, suites[guard.suite]
        return
    if guard.slice is None:
        yield None, pairs
        return
    names = pairs.slice_names()
    if not names or (guard.slice != EVERY_SLICE and guard.slice not in names):
        raise NotComparableError(
            f"The policy guards the slice {guard.slice!r}, and no item is in it.",
            where=where,
            fix=f"name one of the slices there are: {', '.join(names)}" if names else "name the items' slices",
        )
    for name in names if guard.slice == EVERY_SLICE else [guard.slice]:
        yield name, pairs.of_slice(name)


def _p_for(one: Asked, level: float) -> float:
    """The p-value of "not met"."""
    return one.effect.p_below(one.limit, level) if one.below else one.effect.p_above(one.limit, level)


def _p_against(one: Asked, level: float) -> float:
    """The p-value of "met"."""
    return one.effect.p_above(one.limit, level) if one.below else one.effect.p_below(one.limit, level)


def _judge(one: Asked, level: float, fail_level: float) -> Requirement:
    """Shown or failed is read off the interval that is shown, so the table and the verdict always agree.

    An end of the interval passes the limit only where the test agrees; else it is moved onto the limit.
    """
    p_value, p_against = _p_for(one, level), _p_against(one, fail_level)
    low, high = one.effect.interval(*((fail_level, level) if one.below else (level, fail_level)))
    above_allowed = (p_against < fail_level) if one.below else (p_value < level)
    below_allowed = (p_value < level) if one.below else (p_against < fail_level)
    interval = Interval(
        low if above_allowed else min(low, one.limit),
        high if below_allowed else max(high, one.limit),
    )
    beyond, short = interval.low > one.limit, interval.high < one.limit
    if one.below:
        beyond, short = short, beyond
    return Requirement(
        ask=one.ask,
        metric=one.metric,
        slice=one.slice,
        suite=one.suite,
        limit=one.limit,
        estimate=one.effect.estimate,
        low=interval.low,
        high=interval.high,
        level=level,
        fail_level=fail_level,
        p_value=p_value,
        status=Status.SHOWN if beyond else Status.FAILED if short else Status.OPEN,
        method=one.effect.method,
        n=one.pairs.n,
        groups=one.pairs.group_count,
        decides=one.decides,
    )
