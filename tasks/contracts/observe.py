"""What is seen of live requests: a canary beside the live version, a shadow behind it, and whether inputs drift."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from pydantic import Field

from tasks.contracts.spec import CanarySpec as CanarySpec  # a part of a task's configuration
from tasks.contracts.spec import ExecutionSpec, Frozen, knob

# -- canary -----------------------------------------------------------------------------------------------------------


class ShareCounts(Frozen):
    """Keys that something has happened to, while the canary had one share.

    Attributes:
        share: of the canary, at the time.
        canary: such keys that were the canary's.
        live: the live version's.
    """

    share: float = Field(gt=0.0, lt=1.0)
    canary: int = 0
    live: int = 0


class CanaryState(Frozen):
    """What a canary has come to so far: counts alone, so that anybody can work the verdict out again.

    Attributes:
        slow_above_ms: an answer that takes longer is slow; fixed before the canary begins.
        canary_requests: requests that were the canary's.
        canary_failed: of these, failed ones.
        live_requests: the live version's.
        live_failed: of these, failed ones.
        errors: keys with a failed request.
        slow: keys with a slow answer.
        unsure: keys with an answer below its version's threshold.
    """

    slow_above_ms: float = Field(gt=0.0)
    canary_requests: int = 0
    canary_failed: int = 0
    live_requests: int = 0
    live_failed: int = 0
    errors: tuple[ShareCounts, ...] = ()
    slow: tuple[ShareCounts, ...] = ()
    unsure: tuple[ShareCounts, ...] = ()


class CanaryEvidence(Frozen):
    """What is known of one quality of the canary against the live version.

    Attributes:
        quality: "errors", "slow" or "unsure".
        canary: keys of the canary that it has happened to.
        live: keys of the live version.
        expected: of all these, as many would be the canary's if both were alike.
        ratio: how many times as often it happens with the canary (best estimate); None where nothing tells.
        ratio_low: at least as many times, by a bound that holds at every look at once; 0 where nothing is known.
        ratio_high: at most; None where nothing is known.
        allowed: as many times is allowed.
        evidence: e-value against "no more often than allowed"; however often one looks, it reaches 20 by chance in at
            most one of 20 canaries that are no worse.
        needed: e-value at which the canary is taken back.
        exceeded: whether it has got there.
    """

    quality: str
    canary: int
    live: int
    expected: float
    ratio: float | None
    ratio_low: float
    ratio_high: float | None
    allowed: float
    evidence: float
    needed: float
    exceeded: bool


class CanaryFinding(Frozen):
    """Whether a canary is taken back, and on what evidence.

    Attributes:
        abort: take it back.
        reasons: why, a sentence each; empty where it goes on.
        qualities: the evidence on each quality.
    """

    abort: bool
    reasons: tuple[str, ...] = ()
    qualities: tuple[CanaryEvidence, ...]


# -- shadow -----------------------------------------------------------------------------------------------------------


class ShadowSpec(Frozen):
    """Live requests that another version answers as well, unseen by callers."""

    share: float = knob(0, "Share of the requests that the shadow answers too.", default=0.1, gt=0.0, le=1.0)
    margin: float = knob(
        1,
        "Difference in accuracy that matters: a larger one is to be found, two versions that differ by less are alike.",
        default=0.02,
        gt=0.0,
        lt=1.0,
    )
    alpha: float = knob(
        2, "Chance of a wrong decision, however often the report is looked at.", default=0.05, gt=0.0, le=0.5
    )


class Preferred(StrEnum):
    """What a person said of two answers that differ."""

    LIVE = "live"  # the live version's answer is right, the shadow's is not
    SHADOW = "shadow"
    BOTH = "both"
    NEITHER = "neither"


class ShadowDecision(StrEnum):
    """What a shadow report comes to."""

    SHADOW = "shadow"  # the shadow is better
    LIVE = "live"  # the live version is
    ALIKE = "alike"  # they differ by less than the margin
    OPEN = "open"


class PairedCost(Frozen):
    """What requests cost on both sides: milliseconds, or money.

    Attributes:
        pairs: requests of which both are known.
        live: mean of the live version.
        shadow: mean of the shadow.
        difference: shadow minus live.
        low: lower end of its 95 % interval (bootstrap over the keys).
        high: upper end.
        live_p95: 95th percentile of the live version.
        shadow_p95: of the shadow.
        p95_difference: shadow minus live.
        p95_low: lower end of its 95 % interval.
        p95_high: upper end.
    """

    pairs: int
    live: float
    shadow: float
    difference: float
    low: float
    high: float
    live_p95: float
    shadow_p95: float
    p95_difference: float
    p95_low: float
    p95_high: float


class ShadowReport(Frozen):
    """A shadow against the live version.

    Attributes:
        pairs: requests that both were asked.
        failed: of these, without an answer of the shadow.
        failed_low: lower end of the 95 % interval of their share (Wilson).
        failed_high: upper end.
        agreed: answered alike.
        agreement: share of the answered ones that agree; None without any.
        agreement_low: lower end of its 95 % interval (Wilson).
        agreement_high: upper end.
        wins: reviewed disagreements in which the shadow alone is right.
        losses: in which the live version alone is.
        ties: in which both are, or neither.
        win_share: wins / (wins + losses); None without any.
        win_share_low: lower end of its exact 95 % interval (Clopper-Pearson).
        win_share_high: upper end.
        p_value: of "as many wins as losses", two-sided sign test (exact McNemar), for a single look.
        difference: estimated accuracy of the shadow minus that of the live version, over all requests; None without
            reviews.
        difference_low: lower end of its interval at 1 - alpha, which holds at every look at once.
        difference_high: upper end.
        latency: in milliseconds; None where nothing is known of both sides.
        cost: likewise.
        decision: what it comes to.
        pairs_more: requests that are still needed for a decision, with 80 % power; None where it is not known.
        reviews_more: reviews of disagreements likewise.
        days: how long that takes at the present rate; None where there is no rate yet.
        days_low: lower end of its 95 % interval, from the chance in the rate alone.
        days_high: upper end.
        why: a sentence for people.
    """

    pairs: int
    failed: int
    failed_low: float
    failed_high: float
    agreed: int
    agreement: float | None
    agreement_low: float
    agreement_high: float
    wins: int
    losses: int
    ties: int
    win_share: float | None
    win_share_low: float
    win_share_high: float
    p_value: float
    difference: float | None
    difference_low: float
    difference_high: float
    latency: PairedCost | None
    cost: PairedCost | None
    decision: ShadowDecision
    pairs_more: int | None
    reviews_more: int | None
    days: float | None
    days_low: float | None
    days_high: float | None
    why: str


class ShadowReportSpec(Frozen):
    """Which comparison is reported: `goldgate shadow NAME --report` and the flow `shadow-report`."""

    name: str = knob(0, "Name of the task: what requests call the model.", pattern=r"^[a-z][a-z0-9_-]{0,62}$")
    shadow: str | None = knob(
        1, "Id of the comparison; none takes the newest.", default=None, pattern=r"^[A-Za-z0-9_-]{1,64}$"
    )
    reviews: str | None = knob(
        2, "What people said of answers, as `goldgate review` keeps it (reviews.jsonl); none knows of no reviews.",
        default=None,
    )  # fmt: skip
    folder: str | None = knob(
        3, "Folder of comparisons; none is the gateway's in the store (serving/shadow).", default=None
    )
    execution: ExecutionSpec = knob(4, "Where store and registry are.", default_factory=ExecutionSpec)


class ShadowResult(Frozen):
    """What a comparison says so far.

    Attributes:
        name: what requests call the model.
        id: of the comparison.
        live: label of the version whose answers callers get.
        shadow: label of the other version, or the vendor's model.
        report: the comparison.
        margin: difference in accuracy that matters.
        other_live: requests that were compared with an earlier live version; they are left out.
        shadow_cost: sum of what the shadow's answers cost; None where nothing is known of it.
        errors: why the shadow gave no answer, with how often.
    """

    name: str
    id: str
    live: str
    shadow: str
    report: ShadowReport
    margin: float
    other_live: int
    shadow_cost: float | None
    errors: dict[str, int]


# -- drift ------------------------------------------------------------------------------------------------------------


class DriftSpec(Frozen):
    """When requests, or what is answered to them, count as no longer what they were."""

    alpha: float = knob(0, "Chance of a false alarm at one look, over all tests.", default=0.01, ge=0.001, le=0.5)
    min_rows: int = knob(1, "Fewest requests in each of the two windows.", default=200, ge=20, le=1_000_000)
    min_reviewed: int = knob(2, "Fewest reviewed answers in each window.", default=50, ge=10, le=1_000_000)
    max_length_shift: float = knob(
        3,
        "Largest difference between the distributions of lengths (Kolmogorov-Smirnov, 0 to 1).",
        default=0.1,
        gt=0.0,
        lt=1.0,
    )
    max_vocabulary_shift: float = knob(
        4,
        "Largest divergence of the words used (Jensen-Shannon, in bits, above what chance gives).",
        default=0.01,
        gt=0.0,
        lt=1.0,
    )
    max_class_shift: float = knob(
        5, "Largest change of the answers' mix (population stability index).", default=0.1, gt=0.0, le=10.0
    )
    max_confidence_shift: float = knob(
        6,
        "Largest difference between the distributions of confidence (Kolmogorov-Smirnov, 0 to 1).",
        default=0.1,
        gt=0.0,
        lt=1.0,
    )
    max_disagreement_rise: float = knob(
        7, "Largest rise of the share of reviewed answers that a person corrects.", default=0.05, gt=0.0, lt=1.0
    )
    retrain_at_most_every_hours: float = knob(
        8, "Shortest time between two retrains that drift starts.", default=24.0, gt=0.0, le=24.0 * 366
    )


class DriftTest(Frozen):
    """One thing that may have drifted.

    Attributes:
        what: "lengths", "vocabulary", "classes", "confidence" or "disagreement".
        method: how it is tested.
        reference_rows: rows of the reference window.
        current_rows: rows of the current window.
        statistic: the test's own number.
        effect: how large the drift is, in the unit of its limit.
        limit: from here on it matters.
        p_value: how likely so much is without any drift.
        level: what the p-value is compared with (Holm's method over all tests made).
        drifted: significant and above its limit; either alone is no drift.
        words: what has changed, for people.
    """

    what: str
    method: str
    reference_rows: int
    current_rows: int
    statistic: float
    effect: float
    limit: float
    p_value: float
    level: float
    drifted: bool
    words: str


class DriftReport(Frozen):
    """Whether the current window differs from the reference.

    Attributes:
        tests: those that were made.
        left_out: what could not be tested, and why.
        drifted: whether any did.
        reason: for the name of a run: "drift: classes (0.34, limit 0.1)", or "no drift".
    """

    tests: tuple[DriftTest, ...]
    left_out: dict[str, str] = {}
    drifted: bool
    reason: str


class RetrainPermit(Frozen):
    """Whether drift may start a retrain now.

    Attributes:
        allowed: whether it may.
        next_at: from when on it may; None where it may now.
        why: a sentence for people.
    """

    allowed: bool
    next_at: datetime | None
    why: str
