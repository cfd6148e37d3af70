"""Why a verdict is what it is, in sentences that a person can read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tasks.contracts.numbers import items, level, metric_name, p_words, percent, points, ratio, subject
from tasks.contracts.references import Ask, Look, Outcome, Requirement, Status
from tasks.contracts.spec import LookPolicy, Policy
from tasks.gate.effects import value_of
from tasks.gate.plan import Plan
from tasks.gate.requirements import Asked
from tasks.statistics import POWER

_DOES = {"exact_match": "is right on", "valid_output": "gives a valid answer on"}


def verdict_reasons(
    outcome: Outcome,
    asked: Sequence[Asked],
    requirements: Sequence[Requirement],
    plans: Mapping[int, Plan],
    changes: tuple[int, int],
    policy: Policy,
) -> tuple[str, ...]:
    """The deciding numbers first, then what they mean, which items tell the two apart, and what would settle it.

    Args:
        outcome: the verdict.
        asked: what was asked, in the order of `requirements`.
        requirements: what the outcomes say of it.
        plans: for each open requirement, by its place, what would settle it.
        changes: items on which the candidate is ahead, and on which the baseline is.
        policy: what was asked.
    """
    primary = requirements[0]
    failed = [one for one in requirements if one.status is Status.FAILED]
    open_ = [one for one in requirements if one.status is Status.OPEN]
    numbers = [_numbers(asked[0], primary)]
    numbers += [_finding(one) for one in requirements[1:] if one.decides]
    told = _told_apart(changes, primary)
    match outcome:
        case Outcome.PROMOTE:
            others = len(requirements) - 1
            guarded = f" All {others} other requirements are shown as well." if others > 1 else ""
            guarded = " The other requirement is shown as well." if others == 1 else guarded
            return (
                *numbers,
                f"{_above(primary)} A candidate that is not would pass this look with a chance of at most "
                f"{level(primary.level)}.{guarded}",
                told,
            )
        case Outcome.REJECT if failed[0] is primary:
            return (*numbers, _below(primary), told, *[_finding(one) for one in failed[1:] if not one.decides])
        case Outcome.REJECT:
            return (*[_finding(one) for one in failed], numbers[0], told)
        case Outcome.INCONCLUSIVE:
            meanings = [_between(primary)] if primary.status is Status.OPEN else [_above(primary)]
            meanings += [_finding(one) for one in open_ if one is not primary and not one.decides]
            wanted = [
                _plan_words(one, plans[index], policy) for index, one in enumerate(requirements) if index in plans
            ]
            return (*numbers, *meanings, told, *wanted)


def ladder_reasons(outcome: Outcome, rung: float, policy: Policy) -> tuple[str, ...]:
    """All that the ladder lets out: whether the candidate was promoted, and if so its score, rounded up to a step."""
    step = f"{100 * policy.ladder_step:g} point{'' if policy.ladder_step == 0.01 else 's'}"
    if outcome is Outcome.PROMOTE:
        return (
            f"The candidate is shown to be better. Its {_lower(metric_name(policy.metric))} is at most {percent(rung)} "
            f"(rounded up to a step of {step}).",
            "The ladder lets out no more than this, so that later candidates cannot be fitted to the golden set.",
        )
    return (
        "The candidate is not shown to be better.",
        "The ladder lets out no more than this: numbers would help to fit the next candidate to the golden set.",
    )


def look_reasons(look: Look, policy: Policy) -> list[str]:
    """What this look cost, where that is not obvious."""
    if look.number is None:
        return ["No ledger was kept, so this counts as the only look at these items."]
    if look.repeated:
        return [f"It was judged before, as look {look.number}: judging it again is no new look."]
    if policy.looks is LookPolicy.OFF and look.number > 1:
        return [
            f"This is look {look.number} at this golden set, and each may err with a chance of {level(look.level)}: "
            "the policy shares no error budget over them, so all together they may err much more often."
        ]
    if look.number == 1:
        return []
    return [
        f"This is look {look.number} at this golden set: it may spend {level(look.level)} of the "
        f"{level(look.budget)} that all looks share."
    ]


# -- sentences --------------------------------------------------------------------------------------------------------


def _numbers(asked: Asked, one: Requirement) -> str:
    """Both models on the deciding metric, with the interval of the difference."""
    difference = (
        f"{points(one.estimate)} points ({_confidence(one)} interval {points(one.low)} to {points(one.high)}), "
        f"{p_words(one.p_value)}."
    )
    counted = items(one.n, one.groups)
    before, after = (value_of(asked.pairs, one.metric, side, one.level).estimate for side in (0, 1))
    if one.metric in _DOES:
        return (
            f"The candidate {_DOES[one.metric]} {percent(after)} of {counted}, the baseline on {percent(before)}: "
            f"{difference}"
        )
    return (
        f"The candidate's {_lower(metric_name(one.metric))} is {percent(after)} over {counted}, the baseline's "
        f"{percent(before)}: {difference}"
    )


def _finding(one: Requirement) -> str:
    """A requirement and what was found, in one sentence."""
    what = subject(one.metric, one.slice, one.suite)
    verdict = {Status.SHOWN: "is shown", Status.FAILED: "is shown to fail", Status.OPEN: "is open"}[one.status]
    match one.ask:
        case Ask.SUPERIOR:
            asked, seen = f"better by more than {_size(one.limit)}", points(one.estimate)
            bounds = f"{points(one.low)} to {points(one.high)}"
        case Ask.NON_INFERIOR:
            asked, seen = f"not worse by {_size(-one.limit)}", f"{points(one.estimate)} points"
            bounds = f"{points(one.low)} to {points(one.high)}"
        case Ask.FLOOR:
            asked, seen = f"at least {percent(one.limit)}", percent(one.estimate)
            bounds = f"{percent(one.low)} to {percent(one.high)}"
        case Ask.RATIO:
            asked, seen = f"at most {ratio(one.limit)} that of the baseline", ratio(one.estimate)
            bounds = f"{ratio(one.low)} to {ratio(one.high)}"
    return f"{what}: {asked} {verdict}; seen is {seen} (interval {bounds}, {items(one.n, one.groups)})."


def _above(one: Requirement) -> str:
    if one.ask is Ask.NON_INFERIOR:
        worse = f"worse by {_size(-one.limit)}"
        return f"The whole interval lies above {points(one.limit)}, so the candidate is shown not to be {worse}."
    better = "better" if one.limit == 0 else f"better by more than {_size(one.limit)}"
    return f"The whole interval lies above {_mark(one.limit)}, so the candidate is shown to be {better}."


def _below(one: Requirement) -> str:
    if one.high < 0:
        return "The whole interval lies below 0, so the candidate is shown to be worse than the baseline."
    return (
        f"The whole interval lies below {_mark(one.limit)}, so the candidate is shown not to be better by more than "
        f"{_size(one.limit)}."
    )


def _between(one: Requirement) -> str:
    if one.ask is Ask.NON_INFERIOR:
        better = f"worse by {_size(-one.limit)}"
    else:
        better = "better" if one.limit == 0 else f"better by more than {_size(one.limit)}"
    return (
        f"The interval holds {_mark(one.limit)}, so the candidate is neither shown to be {better} nor shown not to be."
    )


def _told_apart(changes: tuple[int, int], primary: Requirement) -> str:
    wins, losses = changes
    if wins + losses == 0:
        return "The two models score the same on every single item, so no item tells them apart."
    return (
        f"{wins + losses:,} of the items tell the two apart: {wins:,} speak for the candidate, {losses:,} for the "
        "baseline."
    )


def _plan_words(one: Requirement, made: Plan, policy: Policy) -> str:
    power = f"{100 * POWER:.0f} % power"
    what = "" if one.decides else f"For {_lower(subject(one.metric, one.slice, one.suite))}: "
    where = "items in all" if one.slice is None else "items of this slice"
    say = {Ask.FLOOR: percent, Ask.RATIO: ratio}.get(one.ask, points)
    unit = " points" if one.ask in (Ask.SUPERIOR, Ask.NON_INFERIOR) else ""
    asked = "" if one.ask is not Ask.SUPERIOR or one.limit == 0 else f", of which {_size(one.limit)} are asked for"
    reach = "or less" if one.ask is Ask.RATIO else "or more"
    if made.shown is None:
        able = f"these {one.n:,} items could hardly show anything with {power}."
    else:
        able = f"with {power}, these {one.n:,} items can show {say(made.shown)}{unit} {reach}{asked}."
    able = what + able if what else able[0].upper() + able[1:]
    if made.observed:
        return (
            f"{able} If the observed {say(made.effect)}{unit} are real, about {made.items:,} {where} would settle it."
        )
    return (
        f"{able} What was seen is too close to {_limit(one)} to plan on; about {made.items:,} {where} would show "
        f"{say(made.effect)}{unit}."
    )


def _limit(one: Requirement) -> str:
    return {Ask.FLOOR: percent, Ask.RATIO: ratio}.get(one.ask, _mark)(one.limit)


def _confidence(one: Requirement) -> str:
    return f"{float(f'{100 * (1 - one.level - one.fail_level):.4g}'):g} %"


def _mark(limit: float) -> str:
    return "0" if limit == 0 else points(limit)


def _size(limit: float) -> str:
    return f"{100 * limit:.1f} points"


def _lower(text: str) -> str:
    return text[0].lower() + text[1:]
