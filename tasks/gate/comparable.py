"""Whether two evaluations may be compared at all. Nothing is repaired here: what differs is named and refused."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from tasks.contracts.errors import NotComparableError
from tasks.contracts.references import Conditions, ItemOutcome

MIN_ITEMS = 2  # with one item there is no spread, so nothing can be said about it
_SHOWN = 3  # ids named in a message; a person needs a few to look at, not all

_REMEDIES = {
    "golden_digest": "evaluate both models on the same golden set",
    "instruction": "evaluate both models with the same `task.instruction`",
    "decoding": "evaluate both models with the same labels or tools and the same `evaluate.max_new_tokens`",
    "engine": "evaluate both models with the same `evaluate.engine` and library versions",
    "scorer_version": "evaluate the older of the two again, so that the same code scores both",
}


def check_conditions(baseline: Conditions, candidate: Conditions, part: str = "") -> None:
    """Refuse evaluations that were not made under the same conditions; `part` names a suite in the message.

    Raises:
        NotComparableError: names each condition that differs, with both values.
    """
    differing = [name for name in _REMEDIES if getattr(baseline, name) != getattr(candidate, name)]
    if differing:
        lines = [
            f"{name}: baseline {_value(baseline, name)}, candidate {_value(candidate, name)}" for name in differing
        ]
        raise NotComparableError(
            f"Baseline and candidate were evaluated under different conditions ({', '.join(differing)}).",
            where=part + "; ".join(lines),
            fix="; ".join(_REMEDIES[name] for name in differing),
        )


def check_outcomes(
    baseline: Sequence[ItemOutcome], candidate: Sequence[ItemOutcome]
) -> tuple[list[ItemOutcome], list[ItemOutcome]]:
    """Both sides in one order (by id), if each item was answered once by each model and every score is a number.

    Raises:
        NotComparableError: an item is twice or on one side only, an item's text, target, group or slice differs, the
            metrics differ, a score is not a finite number in [0, 1], or there are fewer than two items.
    """
    for side, outcomes in (("baseline", baseline), ("candidate", candidate)):
        twice = [id_ for id_, count in Counter(outcome.id for outcome in outcomes).items() if count > 1]
        if twice:
            raise NotComparableError(
                f"The {side} has {len(twice)} item(s) more than once.", where=_some(twice), fix="evaluate it again"
            )
    by_id = {outcome.id: outcome for outcome in baseline}
    missing = by_id.keys() - {outcome.id for outcome in candidate}
    extra = {outcome.id for outcome in candidate} - by_id.keys()
    if missing or extra:
        raise NotComparableError(
            f"The two evaluations do not hold the same items: {len(missing)} of the baseline's are missing from the "
            f"candidate, {len(extra)} of the candidate's from the baseline.",
            where=_some(missing | extra),
            fix="evaluate both models on all items of the same golden set; items are never left out to make sides fit",
        )
    if len(by_id) < MIN_ITEMS:
        raise NotComparableError(
            f"There are {len(by_id)} item(s) to compare, and a comparison needs at least {MIN_ITEMS}.",
            fix="freeze a golden set with several hundred items",
        )
    left = sorted(baseline, key=lambda outcome: outcome.id)
    right = sorted(candidate, key=lambda outcome: outcome.id)
    changed = [b.id for b, c in zip(left, right, strict=True) if (b.text, b.target) != (c.text, c.target)]
    if changed:
        raise NotComparableError(
            f"{len(changed)} item(s) have another text or target in the two evaluations.",
            where=_some(changed),
            fix="evaluate both models on the same golden set",
        )
    _check_parts(left, right)
    _check_scores("baseline", left, left[0])
    _check_scores("candidate", right, left[0])
    return left, right


def _check_parts(baseline: Sequence[ItemOutcome], candidate: Sequence[ItemOutcome]) -> None:
    """Groups and slices must be the same on both sides: a side without groups would make noise look like proof."""
    for part, does in (("group", "tells which items belong together"), ("slice", "tells which part an item is of")):
        differing = [
            left.id for left, right in zip(baseline, candidate, strict=True)
            if getattr(left, part) != getattr(right, part)
        ]  # fmt: skip
        if differing:
            raise NotComparableError(
                f"{len(differing)} item(s) have another {part} in the two evaluations, and the {part} {does}.",
                where=_some(differing),
                fix=f"give both sides the same column `{part}`",
            )


def _check_scores(side: str, outcomes: Iterable[ItemOutcome], model: ItemOutcome) -> None:
    for outcome in outcomes:
        differing = outcome.scores.keys() ^ model.scores.keys()
        if differing:
            raise NotComparableError(
                f"Not every item has the same metrics: {', '.join(sorted(differing))}.",
                where=f"{side}, item {outcome.id}",
                fix="evaluate both models with the same version of Goldgate",
            )
        for metric, score in outcome.scores.items():
            if not (math.isfinite(score) and 0.0 <= score <= 1.0):
                raise NotComparableError(
                    f"A score is {score}, and a score is a number from 0 to 1.",
                    where=f"{side}, item {outcome.id}, {metric}",
                    fix="correct the scorer and evaluate again",
                )


def _value(conditions: Conditions, name: str) -> str:
    value = getattr(conditions, name)
    return value.model_dump_json() if hasattr(value, "model_dump_json") else repr(value)


def _some(ids: Iterable[str]) -> str:
    named = sorted(ids)
    rest = f" and {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
    return ", ".join(named[:_SHOWN]) + rest
