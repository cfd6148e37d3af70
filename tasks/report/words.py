"""What a verdict says, as short texts that report, run page and terminal share. Plain text, no markup."""

from __future__ import annotations

import math
from datetime import datetime
from enum import StrEnum
from typing import NamedTuple, Protocol
from urllib.parse import unquote

from tasks.contracts.numbers import level, moment, percent, points, ratio, subject
from tasks.contracts.references import (
    Ask,
    Look,
    Outcome,
    Release,
    ReleaseKind,
    Requirement,
    SelfTest,
    Status,
    Verdict,
)
from tasks.contracts.spec import LookPolicy

LITTLE_LEFT = 0.2  # share of the error budget below which a fresh golden set is advised

_OUTCOMES = {Outcome.PROMOTE: "Promoted", Outcome.REJECT: "Rejected", Outcome.INCONCLUSIVE: "Inconclusive"}
_RELEASES = {
    ReleaseKind.AWAITING: "Awaiting approval",
    ReleaseKind.DECLINED: "Declined",
    ReleaseKind.FORCED: "Forced promotion",
}
_PLACED = {
    "forced": "forced against its verdict",
    "first_baseline": "set as first baseline, without a verdict,",
    "re_baseline": "set as new baseline, without a verdict,",
}


# -- how it ended -------------------------------------------------------------------------------------------------


def state_word(verdict: Verdict, release: Release) -> str:
    """How a run ended, as a heading: the verdict, unless a person's word counts for more or is waited for."""
    return _RELEASES.get(release.kind, _OUTCOMES[verdict.outcome])


def outcome_word(outcome: Outcome) -> str:
    """The verdict as a heading."""
    return _OUTCOMES[outcome]


def release_sentence(release: Release) -> str:
    """Who decided and when, "Approved by Anna Meier, 22 November 2026, 14:57 UTC"; "" where no person has a part."""
    match release.kind:
        case ReleaseKind.BY_VERDICT | ReleaseKind.NOT_PROMOTED:
            return ""
        case ReleaseKind.AWAITING:
            return "A person has to approve this promotion, and nobody has answered yet"
        case kind:
            return f"{_capital(kind.value)} {_who_and_when(release)}"


class Placed(Protocol):
    """How a version came to be champion: a `Release`, or what the registry knows of one without a verdict."""

    @property
    def kind(self) -> StrEnum:
        """Why it is there; of what the registry says beyond `ReleaseKind`, the text is shown."""

    @property
    def by(self) -> str | None:
        """Who decided it."""

    @property
    def reason(self) -> str | None:
        """Why, in that person's words."""

    @property
    def at(self) -> datetime | None:
        """When."""


def champion_sentence(champion: Placed | None) -> str:
    """How the baseline came to be champion; "" where its own verdict put it there or nobody knows."""
    if champion is None or champion.kind.value == ReleaseKind.BY_VERDICT.value:
        return ""
    how = "is champion by override" if by_override(champion) else "is champion"
    kind = _PLACED.get(champion.kind.value, champion.kind.value.replace("_", " "))
    return f"The baseline {how}: {kind} {_who_and_when(champion)}"


def by_override(champion: Placed | None) -> bool:
    """Whether a person put the champion in its place without a verdict, or against one."""
    shown = (ReleaseKind.BY_VERDICT.value, ReleaseKind.APPROVED.value)
    return champion is not None and champion.kind.value not in shown


def one_line(text: str) -> str:
    """What a person wrote, on one line and without control characters: for a terminal, a table, a log."""
    return " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())


def to_copy(address: str) -> str:
    """An address as text to copy: a file by its path."""
    return unquote(address.removeprefix("file://")) if address.startswith("file://") else address


def _who_and_when(release: Placed) -> str:
    who = f"by {one_line(release.by)}" if release.by else "by somebody whose name was not recorded"
    return f"{who}, {moment(release.at)}" if release.at else who


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:].replace("_", " ")


# -- requirements -------------------------------------------------------------------------------------------------


def about(requirement: Requirement) -> str:
    """What a requirement is about: "Exact match, slice phone"."""
    return subject(requirement.metric, requirement.slice, requirement.suite)


def asked(requirement: Requirement) -> str:
    """What a requirement asks: "better than the baseline", "loses less than 2.0 points", "above 85.0 %"."""
    threshold = requirement.limit
    match requirement.ask:
        case Ask.SUPERIOR if threshold == 0:
            return "better than the baseline"
        case Ask.SUPERIOR:
            return f"better by more than {_size(threshold)} points"
        case Ask.NON_INFERIOR:
            return f"loses less than {_size(threshold)} points"
        case Ask.FLOOR:
            return f"above {percent(threshold)}"
        case Ask.RATIO:
            return f"below {ratio(threshold)} the baseline"


def found(requirement: Requirement) -> str:
    """The estimate of a requirement in its own unit."""
    return _value(requirement, requirement.estimate)


def interval(requirement: Requirement) -> str:
    """The interval of a requirement in its own unit: "+17.6 to +27.8", "81.0 to 90.2 %", "0.70 to 0.95 ×"."""
    low, high = _value(requirement, requirement.low), _value(requirement, requirement.high)
    unit = {Ask.FLOOR: " %", Ask.RATIO: " ×"}.get(requirement.ask, "")
    return f"{low.removesuffix(unit)} to {high}" if unit else f"{low} to {high}"


def why(requirement: Requirement) -> str:
    """What a requirement's interval says of its limit: "the whole interval, −9.1 to −3.0, lies below −2.0"."""
    bounds, at = interval(requirement), limit(requirement)
    if requirement.status is Status.OPEN:
        return f"the interval, {bounds}, lies on both sides of {at}"
    above = (requirement.status is Status.SHOWN) != (requirement.ask is Ask.RATIO)
    return f"the whole interval, {bounds}, lies {'above' if above else 'below'} {at}"


def slack(requirement: Requirement) -> float:
    """How far the end that shows a requirement is from its limit, in lengths of that side of the interval.

    The smallest one is the requirement that a promotion hangs on.
    """
    if requirement.ask is Ask.RATIO:
        room, side = requirement.limit - requirement.high, requirement.high - requirement.estimate
    else:
        room, side = requirement.low - requirement.limit, requirement.estimate - requirement.low
    return room / max(side, 1e-9)


def counted(requirements: tuple[Requirement, ...]) -> str:
    """How many requirements are how: "5 of 6 requirements shown, 1 open"."""
    number = {status: sum(one.status is status for one in requirements) for status in Status}
    rest = [f"{number[status]} {status.value}" for status in (Status.FAILED, Status.OPEN) if number[status]]
    noun = "requirement" if len(requirements) == 1 else "requirements"
    return ", ".join([f"{number[Status.SHOWN]} of {len(requirements)} {noun} shown", *rest])


def levels_note(requirements: tuple[Requirement, ...]) -> str:
    """At which error levels the ends of the intervals are."""
    shows, fails = (_range([getattr(one, end) for one in requirements]) for end in ("level", "fail_level"))
    if len(requirements) == 1 and shows == fails:
        return f"Each end of the interval is at a one-sided error level of {shows}."
    note = (
        f"Error levels are one-sided. The end of an interval that shows a requirement is at {shows}: all have to be "
        f"shown, so their number needs no correction. The end that fails it is at {fails}"
    )
    guarded = any(not one.decides for one in requirements)
    return f"{note}: one failed guard is enough to reject, so guards share it by Holm." if guarded else f"{note}."


def _range(levels: list[float]) -> str:
    least, most = level(min(levels)), level(max(levels))
    return least if least == most else f"{least.removesuffix(' %')} to {most}"


def limit(requirement: Requirement) -> str:
    """The limit of a requirement in its own unit, without digits where it is zero."""
    return "0" if requirement.limit == 0 else _value(requirement, requirement.limit)


def _value(requirement: Requirement, value: float) -> str:
    match requirement.ask:
        case Ask.FLOOR:
            return percent(value)
        case Ask.RATIO:
            return ratio(value)
        case _:
            return points(value)


def _size(difference: float) -> str:
    return points(abs(difference)).removeprefix("+")


# -- looks --------------------------------------------------------------------------------------------------------


class Budget(NamedTuple):
    """The error budget of a golden set, as shares of one: what earlier looks spent, this one, and what is left."""

    whole: float
    earlier: float
    this: float
    left: float

    @property
    def little_left(self) -> bool:
        """Whether a fresh golden set is due."""
        return self.left < LITTLE_LEFT * self.whole


def budget(verdict: Verdict) -> Budget | None:
    """What is spent of the error budget; None where nobody counts, or where it is not shared over looks."""
    look = verdict.look
    if look.number is None or look.budget <= 0 or verdict.policy.looks is LookPolicy.OFF:
        return None
    this = 0.0 if look.repeated else min(look.level, look.spent)
    return Budget(look.budget, max(look.spent - this, 0.0), this, max(look.budget - look.spent, 0.0))


def look_sentences(verdict: Verdict) -> list[str]:
    """Which look at the golden set this was."""
    look = verdict.look
    if look.number is None:
        uncounted = "No ledger was kept, so nobody counts how often these items have judged a candidate"
        return [f"{uncounted}." if verdict.withheld else f"{uncounted}; {level(look.level)} holds for this look alone."]
    said = [_repeated(look, verdict.outcome)] if look.repeated else [f"Look {look.number:,} at this golden set."]
    if look.promotions and not verdict.withheld:
        said.append(f"{look.promotions:,} earlier look{' has' if look.promotions == 1 else 's have'} promoted.")
    if verdict.policy.looks is LookPolicy.OFF:
        said.append(
            f"The policy shares no error budget over looks: each one alone may promote a candidate that is no better "
            f"with a chance of {level(look.level)}, so all of them together with a larger one."
        )
    return said


def budget_sentences(verdict: Verdict) -> list[str]:
    """What this look and the earlier ones have spent, and what to do when little is left; empty if nobody counts."""
    spent = None if verdict.withheld else budget(verdict)
    if spent is None:
        return []
    return [_spent(spent), *([hint] if (hint := refresh_hint(verdict)) else [])]


def refresh_hint(verdict: Verdict) -> str:
    """Advice to freeze a fresh golden set, once little of the error budget is left; else ""."""
    spent = None if verdict.withheld else budget(verdict)
    if spent is None or not spent.little_left:
        return ""
    return (
        "Little is left: freeze a fresh golden set before judging more candidates, since each further look here needs "
        "a larger difference."
    )


def _repeated(look: Look, outcome: Outcome) -> str:
    said = (
        f"Repeated: this candidate was judged against this baseline before (look {look.number:,}), so this is no new "
        "look and spends nothing."
    )
    if look.first_outcome is not None and look.first_outcome is not outcome:
        said += f" The verdict then was {look.first_outcome.value.upper()}."
    return said if look.same_answers else f"{said} The answers are not those of then."


def _spent(spent: Budget) -> str:
    left = f"{level(spent.left)} of {level(spent.whole)} are left"
    if not spent.this:
        return f"Error budget: looks have spent {level(spent.earlier)}; {left}."
    if not spent.earlier:
        return f"Error budget: this look may spend {level(spent.this)}; {left}."
    return f"Error budget: earlier looks spent {level(spent.earlier)}, this one may spend {level(spent.this)}; {left}."


def rung(verdict: Verdict) -> str:
    """The value that the ladder lets out, "79.0 %": of a promoted candidate alone, rounded up to a step; else "".

    The same rounding as `tasks.gate.looks.ladder_value`, whose bound counts on it.
    """
    step = verdict.policy.ladder_step
    value = next((row.candidate for row in verdict.metrics if row.metric == verdict.policy.metric), None)
    if value is None or verdict.outcome is not Outcome.PROMOTE:
        return ""
    return percent(min(1.0, min(math.ceil(1 / step), max(1, math.ceil(value / step))) * step))


def withheld_sentence(verdict: Verdict) -> str:
    """Why there are no numbers, where the ladder withholds them."""
    step = _size(verdict.policy.ladder_step)
    return (
        "Numbers are withheld: the policy is a ladder, for candidates that are made by looking at earlier verdicts. Of "
        f"a promoted one it lets out the rung, its value rounded up to a step of {step} points; of any other, nothing."
    )


def self_test_sentence(test: SelfTest) -> str:
    """How the policy did on a baseline against itself, in one line."""
    judged = (
        f"{test.histories:,} made-up candidates that are no better"
        if test.looks == 1
        else f"{test.histories:,} made-up histories of {test.looks:,} candidates that are no better"
    )
    promoted = "promoted" if test.looks == 1 else "promoted one in"
    measured = f"{level(test.rate)}, 99 % interval {level(test.low).removesuffix(' %')} to {level(test.high)}"
    said = f"The gate judged {judged}, {promoted} {test.promotions:,} ({measured}), promise {level(test.alpha)}"
    return f"{said}: more than promised." if test.low > test.alpha else f"{said}."
