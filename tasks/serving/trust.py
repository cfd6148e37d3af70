"""How far a model's closed answers are trusted, learnt from dev; and what that comes to for one answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tasks.contracts.confidence import Calibration, LearntTrust, ReviewThreshold
from tasks.contracts.errors import EvaluationError
from tasks.contracts.numbers import percent
from tasks.contracts.references import ItemOutcome
from tasks.contracts.serving import Trust
from tasks.contracts.spec import ConfidenceSpec
from tasks.serving.confidence import calibrate_answers, choose_threshold, needs_review, no_threshold, scaled


class Sureness(NamedTuple):
    """How sure an answer is.

    Attributes:
        certainty: the probability that it is right; None where it has no confidence or nothing could be learnt.
        flagged: whether a person is to look.
    """

    certainty: float | None
    flagged: bool


def sureness(confidence: float | None, trust: Trust) -> Sureness:
    """What a version's trust makes of the confidence of one of its answers.

    Raises:
        EvaluationError: the confidence is no probability.
    """
    flagged = needs_review(confidence, trust)
    if confidence is None or trust.temperature is None or trust.offset is None:
        return Sureness(None, flagged)
    return Sureness(scaled(confidence, trust.temperature, trust.offset), flagged)


def learn(
    outcomes: Sequence[ItemOutcome], choices: Sequence[str], spec: ConfidenceSpec, *, dev: str, engine: str
) -> LearntTrust:
    """Learn calibration and threshold from the answers to dev rows.

    What dev does not show is no error: then every answer is reviewed, or confidences are shown as the model gives them,
    and `why` says so. An answer that is none of the choices counts as wrong, at the confidence 0.

    Args:
        outcomes: an answer to each dev row, of the model that is to be served.
        choices: the answers that were allowed.
        spec: target, error, and the fewest rows.
        dev: sha256 of the answers.
        engine: what the model was asked with.

    Raises:
        EvaluationError: there are no answers, or a confidence is no probability.
    """
    allowed = frozenset(choices)
    spoken = [one for one in outcomes if one.prediction in allowed]
    no_choice = len(outcomes) - len(spoken)
    silent = sum(one.confidence is None for one in spoken)
    if silent:
        calibration, threshold = None, _nothing(outcomes, spec)
        why = (
            f"{silent:,} of {len(spoken):,} answers on dev have no confidence, since the engine ({engine}) gives none."
        )
    else:
        calibration, why = _calibrated(spoken, spec)
        threshold = choose_threshold(
            [one.confidence or 0.0 if one.prediction in allowed else 0.0 for one in outcomes],
            [_is_right(one) for one in outcomes],
            spec,
        )
    return LearntTrust(
        calibration=calibration,
        threshold=threshold,
        rows=len(outcomes),
        no_choice=no_choice,
        choices=tuple(choices),
        dev=dev,
        engine=engine,
        why=(why, threshold.why, *_reservations(outcomes, no_choice)),
    )


def _reservations(outcomes: Sequence[ItemOutcome], no_choice: int) -> list[str]:
    """What makes the numbers worth less than they seem."""
    said = []
    if no_choice:
        said.append(
            f"{no_choice:,} of {len(outcomes):,} answers were none of the choices; they count as wrong, and such "
            "answers are always reviewed."
        )
    groups = [one.group for one in outcomes if one.group is not None]
    together = len(groups) - len(set(groups))
    if together:
        said.append(
            f"The {len(outcomes):,} dev rows come in {len(outcomes) - together:,} groups, and rows of a group are "
            "alike: what is shown is shown less surely than it says."
        )
    return said


def _nothing(outcomes: Sequence[ItemOutcome], spec: ConfidenceSpec) -> ReviewThreshold:
    """No threshold, where there is nothing to choose it from."""
    return no_threshold(
        len(outcomes),
        spec,
        "So no threshold can be chosen, and every answer goes to review. The engines `embedded` and `vllm` give "
        "confidences.",
    )


def _calibrated(spoken: Sequence[ItemOutcome], spec: ConfidenceSpec) -> tuple[Calibration | None, str]:
    """The calibration and what it says; without one, why."""
    confidences = [one.confidence for one in spoken if one.confidence is not None]
    try:
        found = calibrate_answers(confidences, [_is_right(one) for one in spoken], spec)
    except EvaluationError as error:
        return None, f"Confidences are shown as the model gives them, not calibrated: {error.what}"
    before, after = found.before, found.after
    too = "too sure of itself" if before.confidence > before.accuracy else "less sure than it could be"
    return found, (
        f"On {before.rows:,} dev rows the model is {percent(before.confidence)} sure on average and right on "
        f"{percent(before.accuracy)}, so it is {too}; scaled by the temperature {found.temperature:.2f} "
        f"({found.temperature_low:.2f} to {found.temperature_high:.2f}) it is {percent(after.confidence)} sure."
    )


def _is_right(outcome: ItemOutcome) -> bool:
    return outcome.scores["exact_match"] == 1.0
