"""What a verdict says in words, by tables."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from enum import StrEnum
from types import SimpleNamespace
from typing import Any

import pytest

from tasks.contracts.numbers import items, level, metric_name, moment, p_words, percent, points, ratio, subject
from tasks.contracts.references import Ask, Outcome, Release, ReleaseKind, Requirement, SelfTest, Status
from tasks.contracts.spec import LookPolicy, Policy
from tasks.report.summary import hangs_on, lost_most, next_steps, what_would_change
from tasks.report.words import (
    asked,
    budget,
    budget_sentences,
    by_override,
    champion_sentence,
    counted,
    found,
    interval,
    levels_note,
    limit,
    look_sentences,
    one_line,
    release_sentence,
    rung,
    self_test_sentence,
    slack,
    state_word,
    why,
    withheld_sentence,
)
from tests.report.example import APPROVED, FORCED, WHEN, example_look, example_report, example_reports

REPORTS = example_reports()
BY_VERDICT = Release(kind=ReleaseKind.BY_VERDICT)


def requirement(ask: Ask, limit: float, estimate: float, low: float, high: float, **more: Any) -> Requirement:
    shown, failed = (high < limit, low > limit) if ask is Ask.RATIO else (low > limit, high < limit)
    plain: dict[str, Any] = {
        "ask": ask, "metric": "exact_match", "limit": limit, "estimate": estimate, "low": low, "high": high,
        "level": 0.025, "fail_level": 0.025, "p_value": 0.01, "method": "exact", "n": 300, "groups": 300,
        "status": Status.SHOWN if shown else Status.FAILED if failed else Status.OPEN, "decides": True,
    }  # fmt: skip
    return Requirement(**(plain | more))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (percent(0.785), "78.5 %"),
        (percent(331 / 400), "82.8 %"),  # 82.75: halves go up, as people round
        (points(121 / 400), "+30.3"),
        (points(-0.02), "−2.0"),
        (points(0.0), "0.0"),
        (points(-0.0001), "0.0"),
        (ratio(0.8), "0.80 ×"),
        (ratio(0.0123), "0.012 ×"),
        (ratio(float("inf")), "∞ ×"),
        (level(0.05), "5 %"),
        (level(0.05 / 12), "0.417 %"),
        (level(0.0), "0 %"),
        (level(1e-9), "below 0.001 %"),
        (p_words(0.00001), "p < 0.0001"),
        (p_words(0.0031), "p = 0.0031"),
        (p_words(0.5), "p = 0.500"),
        (metric_name("field:amount"), "Field: amount"),
        (metric_name("schema_valid"), "Schema valid"),
        (metric_name("latency_ms"), "Latency"),
        (subject("exact_match"), "Exact match"),
        (subject("exact_match", slice="phone"), "Exact match, slice phone"),
        (subject("macro_f1", suite="general"), "Macro-F1, suite general"),
        (items(300, 300), "300 items"),
        (items(300, 120), "300 items in 120 groups"),
        (items(1, 1), "1 item"),
        (items(1200, 1), "1,200 items in 1 group"),
        (moment(datetime(2026, 3, 1, 0, 5, tzinfo=timezone(timedelta(hours=1)))), "28 February 2026, 23:05 UTC"),
        (moment(datetime(2026, 3, 1, 0, 5)), "1 March 2026, 00:05 UTC"),
    ],
)
def test_numbers_read_as_people_write_them(text: str, expected: str) -> None:
    assert text == expected


@pytest.mark.parametrize(
    ("one", "asks", "finds", "bounds", "at", "says"),
    [
        (
            requirement(Ask.SUPERIOR, 0.0, 0.05, 0.01, 0.09),
            "better than the baseline", "+5.0", "+1.0 to +9.0", "0", "the whole interval, +1.0 to +9.0, lies above 0",
        ),
        (
            requirement(Ask.SUPERIOR, 0.02, 0.03, 0.01, 0.09),
            "better by more than 2.0 points", "+3.0", "+1.0 to +9.0", "+2.0",
            "the interval, +1.0 to +9.0, lies on both sides of +2.0",
        ),
        (
            requirement(Ask.NON_INFERIOR, -0.02, -0.06, -0.091, -0.03),
            "loses less than 2.0 points", "−6.0", "−9.1 to −3.0", "−2.0",
            "the whole interval, −9.1 to −3.0, lies below −2.0",
        ),
        (
            requirement(Ask.FLOOR, 0.85, 0.88, 0.81, 0.902),
            "above 85.0 %", "88.0 %", "81.0 to 90.2 %", "85.0 %",
            "the interval, 81.0 to 90.2 %, lies on both sides of 85.0 %",
        ),
        (
            requirement(Ask.RATIO, 1.2, 0.8, 0.7, 0.95),
            "below 1.20 × the baseline", "0.80 ×", "0.70 to 0.95 ×", "1.20 ×",
            "the whole interval, 0.70 to 0.95 ×, lies below 1.20 ×",
        ),
        (
            requirement(Ask.RATIO, 0.8, 0.9, 0.85, 0.95),
            "below 0.80 × the baseline", "0.90 ×", "0.85 to 0.95 ×", "0.80 ×",
            "the whole interval, 0.85 to 0.95 ×, lies above 0.80 ×",
        ),
    ],
)  # fmt: skip
def test_a_requirement_is_said_in_its_own_unit(
    one: Requirement, asks: str, finds: str, bounds: str, at: str, says: str
) -> None:
    assert (asked(one), found(one), interval(one), limit(one), why(one)) == (asks, finds, bounds, at, says)


def test_slack_is_measured_from_the_end_that_shows() -> None:
    assert slack(requirement(Ask.SUPERIOR, 0.0, 0.06, 0.02, 0.5)) == pytest.approx(0.5)
    assert slack(requirement(Ask.RATIO, 1.2, 0.8, 0.0, 1.0)) == pytest.approx(1.0)


def test_requirements_are_counted_and_their_levels_told() -> None:
    failed = requirement(Ask.NON_INFERIOR, -0.02, -0.06, -0.09, -0.03, decides=False, fail_level=0.0125)
    wide = requirement(Ask.FLOOR, 0.85, 0.88, 0.81, 0.9, decides=False)
    shown = requirement(Ask.SUPERIOR, 0.0, 0.05, 0.01, 0.09)
    assert counted((shown,)) == "1 of 1 requirement shown"
    assert counted((shown, failed, wide)) == "1 of 3 requirements shown, 1 failed, 1 open"
    assert levels_note((shown,)) == "Each end of the interval is at a one-sided error level of 2.5 %."
    note = levels_note((shown, failed, wide))
    assert "The end of an interval that shows a requirement is at 2.5 %" in note
    assert "The end that fails it is at 1.25 to 2.5 %" in note
    assert note.endswith("guards share it by Holm.")


# -- how it ended -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("promote", "Promoted"),
        ("approved", "Promoted"),
        ("reject", "Rejected"),
        ("inconclusive", "Inconclusive"),
        ("awaiting", "Awaiting approval"),
        ("declined", "Declined"),
        ("forced", "Forced promotion"),
    ],
)
def test_the_heading_is_the_verdict_or_what_a_person_said(name: str, word: str) -> None:
    assert state_word(REPORTS[name].verdict, REPORTS[name].release) == word


def test_a_person_is_named_with_the_time() -> None:
    assert release_sentence(BY_VERDICT) == release_sentence(Release(kind=ReleaseKind.NOT_PROMOTED)) == ""
    assert release_sentence(APPROVED) == "Approved by Anna Meier, 22 November 2026, 14:57 UTC"
    assert release_sentence(FORCED) == "Forced by Jonas Brandt, 22 November 2026, 14:57 UTC"
    assert release_sentence(Release(kind=ReleaseKind.DECLINED, by="A\nB\x1b[31m")) == "Declined by A B [31m"
    assert "nobody has answered yet" in release_sentence(Release(kind=ReleaseKind.AWAITING))
    assert "name was not recorded" in release_sentence(Release(kind=ReleaseKind.APPROVED))
    assert one_line("a\t b\r\n\x07c") == "a b c"


class OtherKind(StrEnum):
    RE_BASELINE = "re_baseline"
    FOUND_ON_A_SHELF = "found_on_a_shelf"


@pytest.mark.parametrize(
    ("champion", "override", "says"),
    [
        (None, False, ""),
        (BY_VERDICT, False, ""),
        (APPROVED, False, "The baseline is champion: approved by Anna Meier, 22 November 2026, 14:57 UTC"),
        (
            FORCED,
            True,
            "The baseline is champion by override: forced against its verdict by Jonas Brandt, "
            "22 November 2026, 14:57 UTC",
        ),
        (
            SimpleNamespace(kind=OtherKind.RE_BASELINE, by="Ada", reason="it is old", at=WHEN),
            True,
            "The baseline is champion by override: set as new baseline, without a verdict, by Ada, "
            "22 November 2026, 14:57 UTC",
        ),
        (
            SimpleNamespace(kind=OtherKind.FOUND_ON_A_SHELF, by="Ada", reason=None, at=None),
            True,
            "The baseline is champion by override: found on a shelf by Ada",
        ),
    ],
)
def test_how_the_champion_got_its_place_is_said(champion: Any, override: bool, says: str) -> None:
    assert by_override(champion) is override
    assert champion_sentence(champion) == says


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("approved", "Version 3 is kept as `previous`"),
        ("promote", "the alias `champion` now names it."),
        ("worse", "A new candidate is needed."),
        ("inconclusive", "larger golden set"),
        ("declined", "the promotion was declined, and the baseline (base model, few-shot) stays"),
        ("awaiting", "`goldgate approve /runs/x --by NAME --comment '…'` promotes the candidate; with `--decline`"),
        ("forced", "Registered as complaints version 4"),
    ],
)
def test_what_follows_is_said(name: str, says: str) -> None:
    data = REPORTS[name]
    assert says in next_steps(data.verdict, data.release, data.registered, "/runs/x")


def test_a_promotion_that_was_not_registered_says_so() -> None:
    assert "has not registered it" in next_steps(REPORTS["promote"].verdict, BY_VERDICT, None, "/runs/x")


@pytest.mark.parametrize("name", ["worse", "reject", "inconclusive"])
def test_nothing_hints_at_an_override(name: str) -> None:
    data = REPORTS[name]
    told = [next_steps(data.verdict, data.release, None, "/runs/x"), *what_would_change(data.verdict)]
    assert not any(word in " ".join(told).lower() for word in ("force", "overrid"))


# -- what it hangs on ---------------------------------------------------------------------------------------------


def test_a_promotion_hangs_on_the_requirement_nearest_to_its_limit() -> None:
    verdict = REPORTS["promote"].verdict
    nearest = min(verdict.requirements, key=slack)
    first, second = what_would_change(verdict)
    assert first.startswith("Nearest to its limit: Exact match, slice phone, loses less than 5.0 points: the whole")
    assert interval(nearest) in first
    assert second == f"The candidate does better on {verdict.wins} items and worse on {verdict.losses}."
    assert hangs_on(verdict) == "What the verdict hangs on"


def test_a_rejection_names_what_failed_and_nothing_else() -> None:
    verdict = REPORTS["reject"].verdict
    assert [one.slice for one in verdict.requirements if one.status is Status.FAILED] == ["phone"]
    (told,) = what_would_change(verdict)
    assert told.startswith("Failed: Exact match, slice phone, loses less than 8.0 points: the whole interval, ")
    assert told.endswith(", lies below −8.0.")
    assert hangs_on(verdict) == "What would change the verdict"


def test_an_open_verdict_names_what_is_open_and_what_would_settle_it() -> None:
    verdict = REPORTS["inconclusive"].verdict
    opened, settle, effect = what_would_change(verdict)
    assert opened.startswith("Open: Exact match, better than the baseline: the interval, ")
    assert settle == f"About {verdict.items_to_settle:,} items in all would settle it, where there are 300 now."
    assert verdict.smallest_effect is not None
    assert f"show a true difference of {points(verdict.smallest_effect)} points or more" in effect


def test_many_open_requirements_are_counted() -> None:
    verdict = REPORTS["inconclusive"].verdict
    many = verdict.model_copy(update={"requirements": verdict.requirements * 5})
    assert what_would_change(many)[3] == "2 more are open."


def test_the_classes_that_lost_most_are_named() -> None:
    data = REPORTS["worse"]
    assert lost_most(data.candidate, data.candidate) == ""
    assert lost_most(data.baseline, data.candidate).startswith("It lost most on ")


# -- looks --------------------------------------------------------------------------------------------------------


def test_a_look_says_what_it_spends_and_what_is_left() -> None:
    verdict = REPORTS["promote"].verdict
    assert look_sentences(verdict) == ["Look 2 at this golden set.", "1 earlier look has promoted."]
    assert budget_sentences(verdict) == [
        "Error budget: earlier looks spent 2.5 %, this one may spend 0.833 %; 1.67 % of 5 % are left."
    ]
    first = REPORTS["approved"].verdict
    assert budget_sentences(first) == ["Error budget: this look may spend 2.5 %; 2.5 % of 5 % are left."]


@pytest.mark.parametrize(("number", "little"), [(1, False), (3, False), (5, True), (40, True)])
def test_a_fresh_golden_set_is_advised_when_little_is_left(number: int, little: bool) -> None:
    verdict = REPORTS["approved"].verdict.model_copy(update={"look": example_look(Policy(), number)})
    spent = budget(verdict)
    assert spent is not None
    assert spent.earlier + spent.this + spent.left == pytest.approx(spent.whole)
    assert spent.little_left is little
    assert any("freeze a fresh golden set" in said for said in budget_sentences(verdict)) is little


def test_a_repeated_look_spends_nothing_and_says_what_was_said_first() -> None:
    verdict = REPORTS["repeated"].verdict
    assert look_sentences(verdict) == [
        "Repeated: this candidate was judged against this baseline before (look 2), so this is no new look and spends "
        "nothing. The verdict then was INCONCLUSIVE. The answers are not those of then."
    ]
    spent = budget(verdict)
    assert spent is not None
    assert (spent.this, spent.earlier) == (0.0, verdict.look.spent)
    assert budget_sentences(verdict) == ["Error budget: looks have spent 3.33 %; 1.67 % of 5 % are left."]


def test_without_a_ledger_nobody_counts() -> None:
    verdict = REPORTS["forced"].verdict
    (said,) = look_sentences(verdict)
    assert said.startswith("No ledger was kept, so nobody counts")
    assert said.endswith("5 % holds for this look alone.")
    assert budget(verdict) is None
    assert budget_sentences(verdict) == []


def test_a_policy_without_a_shared_budget_says_what_that_means() -> None:
    verdict = REPORTS["off"].verdict
    assert verdict.policy.looks is LookPolicy.OFF
    assert "shares no error budget over looks" in look_sentences(verdict)[1]
    assert budget(verdict) is None


# -- the ladder ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0.01, 0.03, 0.1])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.66, 0.78, 0.995])
def test_the_rung_is_the_one_that_the_ladder_counts_on(step: float, share: float) -> None:
    from tasks.gate.looks import ladder_value

    data = example_report(0.01, share, policy=Policy(looks=LookPolicy.LADDER, ladder_step=step), withheld=True)
    verdict = data.verdict.model_copy(update={"outcome": Outcome.PROMOTE})
    assert rung(verdict) == percent(ladder_value(verdict.metrics[0].candidate, step))


def test_only_a_promotion_has_a_rung() -> None:
    assert rung(REPORTS["withheld"].verdict) == "83.0 %"
    assert rung(REPORTS["withheld_reject"].verdict) == ""
    assert rung(REPORTS["withheld"].verdict.model_copy(update={"metrics": ()})) == ""
    assert "rounded up to a step of 1.0 points" in withheld_sentence(REPORTS["withheld"].verdict)


def test_nothing_else_is_said_where_numbers_are_withheld() -> None:
    verdict = REPORTS["withheld"].verdict
    assert what_would_change(verdict) == budget_sentences(verdict) == []
    assert look_sentences(verdict) == ["Look 3 at this golden set."]


# -- the self-test ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {},
            "The gate judged 2,000 made-up candidates that are no better, promoted 61 "
            "(3.05 %, 99 % interval 2.15 to 4.25 %), promise 5 %.",
        ),
        (
            {"looks": 5},
            "The gate judged 2,000 made-up histories of 5 candidates that are no better, promoted one in 61 "
            "(3.05 %, 99 % interval 2.15 to 4.25 %), promise 5 %.",
        ),
        (
            {"alpha": 0.01},
            "The gate judged 2,000 made-up candidates that are no better, promoted 61 "
            "(3.05 %, 99 % interval 2.15 to 4.25 %), promise 1 %: more than promised.",
        ),
    ],
)
def test_the_self_test_is_one_line(changes: dict[str, Any], says: str) -> None:
    plain: dict[str, Any] = {
        "histories": 2000, "looks": 1, "promotions": 61, "rejections": 40, "rate": 0.0305, "low": 0.0215,
        "high": 0.0425, "alpha": 0.05, "noise": "resampled",
    }  # fmt: skip
    assert self_test_sentence(SelfTest(**(plain | changes))) == says
