"""How sure a model is of a closed answer: the scaling that makes it a probability, and from where on it is trusted."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import Field

from tasks.contracts.references import ArtefactRef
from tasks.contracts.spec import ConfidenceSpec as ConfidenceSpec  # a part of a task's configuration
from tasks.contracts.spec import Frozen

TRUST_FILE = "trust.json"
TRUST = "trust"  # the same file among a version's files, and among the digests of its certificate


class ReliabilityBin(Frozen):
    """Answers of about the same confidence.

    Attributes:
        low: smallest confidence among them.
        high: largest.
        rows: how many they are.
        right: of these, right ones.
        confidence: their mean confidence.
        accuracy: right / rows.
        accuracy_low: lower end of its 95 % interval (Wilson).
        accuracy_high: upper end.
    """

    low: float
    high: float
    rows: int
    right: int
    confidence: float
    accuracy: float
    accuracy_low: float
    accuracy_high: float


class Reliability(Frozen):
    """How well confidence and accuracy go together.

    Attributes:
        rows: answers.
        accuracy: share that is right.
        confidence: mean confidence.
        ece: expected calibration error, the mean over the bins of |accuracy - confidence|, weighted by their rows. It
            is above zero even where confidences are perfect, because each bin's accuracy is noisy.
        ece_by_chance: what it would be on average if they were perfect: the part that is noise.
        ece_p_value: how often it would be as large as here if they were perfect.
        brier: mean of (confidence - right)^2.
        log_loss: mean of -log of the probability given to what came out.
        bins: the reliability diagram; about as many rows in each.
    """

    rows: int
    accuracy: float
    confidence: float
    ece: float
    ece_by_chance: float
    ece_p_value: float
    brier: float
    log_loss: float
    bins: tuple[ReliabilityBin, ...]


class Scaling(StrEnum):
    """What the temperature is applied to."""

    LABELS = "labels"  # the probabilities of all labels
    ANSWER = "answer"  # the probability of the answer alone


class Calibration(Frozen):
    """A temperature learnt on dev.

    Attributes:
        scaling: what it is applied to.
        temperature: above 1 the model was too sure of itself, below 1 not sure enough.
        temperature_low: lower end of its 95 % interval (profile likelihood).
        temperature_high: upper end.
        offset: added to the logit of an answer's probability, where that alone is known; else 0.
        before: confidences as they came.
        after: scaled, each fifth of the rows by the temperature of the other four, so that no row judges itself.
    """

    scaling: Scaling
    temperature: float = Field(gt=0.0)
    temperature_low: float
    temperature_high: float
    offset: float = 0.0
    before: Reliability
    after: Reliability


class CoveragePoint(Frozen):
    """What a threshold would come to on dev.

    Attributes:
        at: the threshold, a probability as the model gives it (not scaled).
        rows: answers at or above it.
        right: of these, right ones.
        coverage: rows / all rows.
        accuracy: right / rows; None without rows.
        accuracy_low: lower bound of the accuracy at `level`; 0 without rows.
        level: one-sided level at which it was tested; 0 where none was left for it.
        shown: whether the accuracy is shown to reach the target.
    """

    at: float
    rows: int
    right: int
    coverage: float
    accuracy: float | None
    accuracy_low: float
    level: float
    shown: bool


class ReviewThreshold(Frozen):
    """From which confidence on an answer is trusted; below it a person looks.

    Attributes:
        target_accuracy: what answers at or above the threshold are to have.
        alpha: chance that they do not, over the dev sets that could have been drawn.
        rows: dev rows.
        at: the threshold, as the model gives probabilities (not scaled); None if none is shown to do, and then every
            answer is reviewed.
        coverage: share of the answers at or above it; 0 without a threshold.
        coverage_low: lower end of its 95 % interval (Clopper-Pearson).
        coverage_high: upper end.
        accuracy: of these, the share that was right on dev; None without a threshold.
        accuracy_low: its lower bound, at the level at which the threshold was chosen.
        curve: all thresholds that were tried, from the strictest to the one that trusts every answer.
        more_rows: without a threshold, about how many dev rows more would show one, with 80 % power; None if rows would
            hardly help, because nowhere on dev is the accuracy above the target.
        why: a sentence for people.
    """

    target_accuracy: float
    alpha: float
    rows: int
    at: float | None
    coverage: float
    coverage_low: float
    coverage_high: float
    accuracy: float | None
    accuracy_low: float | None
    curve: tuple[CoveragePoint, ...]
    more_rows: int | None = None
    why: str

    @property
    def reviews_per_thousand(self) -> tuple[float, float, float]:
        """Expected reviews in 1,000 requests, with the ends of the 95 % interval: expected, low, high."""
        shares = 1 - self.coverage, 1 - self.coverage_high, 1 - self.coverage_low
        return 1000 * shares[0], 1000 * shares[1], 1000 * shares[2]


class LearntTrust(Frozen):
    """What dev has shown of a model's confidence: the file `TRUST_FILE`, in the store and beside the model's weights.

    Attributes:
        calibration: what makes its confidence a probability; None where dev does not say.
        threshold: from where on an answer is trusted.
        rows: dev rows that were asked.
        no_choice: of these, answers that were none of the choices; they count as wrong, and are always reviewed.
        choices: the answers that were allowed.
        dev: sha256 of the answers that it was learnt from.
        engine: what the model was asked with.
        why: what was learnt and what was not, in sentences for people.
    """

    calibration: Calibration | None
    threshold: ReviewThreshold
    rows: int
    no_choice: int
    choices: tuple[str, ...]
    dev: str
    engine: str
    why: tuple[str, ...]


class TrustRef(ArtefactRef):
    """A finished `LearntTrust` (`trust.json`).

    Attributes:
        calibrated: whether there is a calibration.
        at: from which confidence on an answer is trusted; None has every answer reviewed.
        reviewed: share of the answers that go to review, as expected from dev.
    """

    kind: Literal["trust"] = "trust"
    calibrated: bool
    at: float | None
    reviewed: float
