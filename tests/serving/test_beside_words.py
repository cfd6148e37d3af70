"""What people read of a version on trial and of a shadow."""

from __future__ import annotations

from typing import Any

import pytest

from tasks.contracts.observe import (
    CanaryEvidence,
    CanaryFinding,
    CanaryState,
    PairedCost,
    ShadowDecision,
    ShadowReport,
    ShadowResult,
    ShadowSpec,
)
from tasks.contracts.serving import Canary, Phase, RolloutResult, Shadow, Traffic, TrialResult, Vendor
from tasks.contracts.spec import CanarySpec
from tasks.serving.shadow_words import shadow_lines, shadow_markdown
from tasks.serving.words import change_lines, rollout_markdown
from tests.serving.records import rollout, version

AT = rollout(version(1)).at
SPEC = CanarySpec(share=0.05)
STATE = CanaryState(slow_above_ms=812.4, canary_requests=1_200, canary_failed=31, live_requests=20_000, live_failed=40)
FINDING = CanaryFinding(
    abort=True, reasons=("It fails.",),
    qualities=(
        CanaryEvidence(
            quality="errors", canary=31, live=40, expected=3.6, ratio=14.7, ratio_low=6.2, ratio_high=None, allowed=1.0,
            evidence=9.1e9, needed=60.0, exceeded=True,
        ),
        CanaryEvidence(
            quality="slow", canary=0, live=0, expected=0.0, ratio=None, ratio_low=0.0, ratio_high=None, allowed=1.25,
            evidence=1.0, needed=60.0, exceeded=False,
        ),
    ),
)  # fmt: skip


def test_the_page_of_a_rollout_has_the_evidence_of_its_canary() -> None:
    trial = TrialResult(spec=SPEC, state=STATE, finding=FINDING, hours=2.5)
    result = RolloutResult(
        name="complaints", phase=Phase.REFUSED, version=version(8), was=version(7), check=None, problems=("It fails.",),
        trial=trial,
    )  # fmt: skip
    text = rollout_markdown(result)
    assert (
        "complaints@8 was taken back after 1,200 requests on trial, beside 20,000 of the live version: It fails. "
        "5.00% of the keys were its." in text
    )
    assert "| Failed requests | 31 | 40 | 3.6 | 14.70 (6.20 to any) | 1 | 9.1e+09 | 60 |" in text
    assert "| Answers slower than 812 ms | 0 | 0 | 0.0 | unknown | 1.25 | 1 | 60 |" in text


def test_a_name_says_what_is_beside_its_live_version() -> None:
    canary = Canary(version=version(8), spec=SPEC, salt="x", since=AT, state=STATE)
    vendor = Vendor(url="https://vendor.example/v1", model="large-1")
    traffic = Traffic(
        name="complaints", live=version(7), canary=canary, revision=3, by="a", why="b", at=AT,
        shadow=Shadow(id="first", vendor=vendor, spec=ShadowSpec(share=0.1), since=AT),
    )  # fmt: skip
    assert change_lines(traffic, None, ())[1:] == [
        "complaints@8 is on trial for 5.00% of the keys, 1,200 requests so far",
        "large-1 at https://vendor.example/v1 answers 10.0% of the requests unseen, since 2026-01-01 00:00 UTC "
        "(comparison first)",
    ]
    over = traffic.model_copy(update={"canary": canary.model_copy(update={"finding": FINDING}), "shadow": None})
    assert change_lines(over, None, ())[1:] == [
        "complaints@8 is on trial for 5.00% of the keys, 1,200 requests so far, taken back: It fails."
    ]


def report(**changes: Any) -> ShadowResult:
    known: dict[str, Any] = {
        "pairs": 100, "failed": 2, "failed_low": 0.005, "failed_high": 0.07, "agreed": 90, "agreement": 90 / 98,
        "agreement_low": 0.85, "agreement_high": 0.96, "wins": 4, "losses": 1, "ties": 1, "win_share": 0.8,
        "win_share_low": 0.28, "win_share_high": 0.99, "p_value": 0.375, "difference": 0.03, "difference_low": -0.05,
        "difference_high": 0.08, "latency": None, "cost": None, "decision": ShadowDecision.OPEN, "pairs_more": 4_000,
        "reviews_more": 300, "days": 6.0, "days_low": 3.0, "days_high": 12.5, "why": "Open.",
    }  # fmt: skip
    return ShadowResult(
        name="complaints", id="first", live="complaints@7", shadow="large_1", report=ShadowReport(**(known | changes)),
        margin=0.02, other_live=7, shadow_cost=0.5, errors={"HTTP 500": 1, "no answer in time": 1},
    )  # fmt: skip


def test_a_report_says_what_is_known_with_its_intervals_and_when_it_is_decided() -> None:
    lines = shadow_lines(report())
    assert lines[0] == "Open."
    assert "Without an answer of the shadow: 2 (0.5% to 7.0%)" in lines
    assert "Answered alike: 91.8% (85.0% to 96.0%)" in lines
    assert "Reviewed disagreements: 6 of 8" in lines
    difference = "+3.0 points, between -5.0 and +8.0 points at every look (2 points matter)"
    assert f"Accuracy, shadow minus live: {difference}" in lines
    assert (
        "When it can be decided: after 4,000 more requests and 300 more reviews: 6.0 days at the present rate (3.0 to "
        "12.5)" in lines
    )
    assert "Milliseconds, shadow minus live: not known of both" in lines
    assert "Cost of the shadow's answers in all: 0.5000" in lines
    assert lines[-3:] == [
        "Without an answer, since HTTP 500: 1", "Without an answer, since no answer in time: 1",
        "7 requests that an earlier version answered are left out.",
    ]  # fmt: skip
    text = shadow_markdown(report())
    assert text.startswith("# large\\_1 beside complaints@7\n\n**Open.**\n")
    assert "| HTTP 500 | 1 |" in text


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"decision": ShadowDecision.LIVE, "pairs_more": None, "reviews_more": None}, "When it can be decided: now"),
        ({"pairs_more": None, "reviews_more": None}, "When it can be decided: nothing tells yet"),
        ({"days": None}, "When it can be decided: after 4,000 more requests and 300 more reviews; there is no rate yet "
         "to say when"),
        ({"agreement": None}, "Answered alike: nothing was answered by both"),
        ({"win_share": None}, "Of these the shadow alone is right: unknown: nobody has reviewed one in which only one "
         "of the two is right"),
        ({"wins": 0, "losses": 0, "ties": 0},
         "Nobody has reviewed a disagreement, so nothing is known of who is right."),
        ({"latency": PairedCost(pairs=5, live=20.0, shadow=12.0, difference=-8.0, low=-9.0, high=-7.5, live_p95=40.0,
                                shadow_p95=30.5, p95_difference=-9.5, p95_low=-12.0, p95_high=-8.0)},
         "Milliseconds, shadow minus live: -8.0 ms (-9.0 to -7.5); 95th percentile 30.5 against 40.0 ms"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_said(changes: dict[str, Any], line: str) -> None:
    assert line in shadow_lines(report(**changes))
