"""How sure a model is of a closed answer, what that is worth, and from where on nobody needs to look.

*Confidence* is the probability of the answer under the constrained decoding: of all the ways on that were allowed, how
much of the model's probability went into this one. It is what the embedded engine says of an item, and what a vLLM
answer with `logprobs` says token by token.

Only closed answers have one. Of a free text the same product is the probability of this wording: it falls with every
token, and a right answer that could be put in ten ways gets a tenth for each. The mean over the tokens mends the first
and not the second, and on dev there is nothing to learn from, since a free text is not simply right or wrong. So an
open answer has no confidence here, which is said by its absence and never by a number.

What a gateway calls for every request is plain arithmetic; numpy and scipy are loaded by what learns from dev.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

from tasks.contracts.confidence import (
    Calibration,
    ConfidenceSpec,
    CoveragePoint,
    Reliability,
    ReliabilityBin,
    ReviewThreshold,
    Scaling,
)
from tasks.contracts.errors import EvaluationError
from tasks.statistics import POWER, exact_share_interval, share_interval

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Flags = NDArray[np.bool_]
    Rows = NDArray[np.int64]

_LOGIT_LIMIT = 16.0  # a float32 probability is 1 from here on: log(1 / 2^-24) is 16.6
_LEAST_LOG_PROBABILITY = -30.0  # a label that the model rules out would make the loss infinite
_TEMPERATURES = (0.05, 20.0)  # searched; at an end the rows do not say what the temperature is
_LEAST_OF_A_KIND = 5  # right ones, and wrong ones: one parameter needs both, in each of the folds
_FOLDS = 5
_BIN_ROWS = 25  # of a reliability diagram: fewer say nothing
_BINS = 15
_CHANCE_DRAWS = 1_000
_SEED = 7

# Thresholds that are tried, strictest first, evenly spaced on the logit: most answers of a tuned model are very sure,
# so an even spacing of the probability would leave them all between two thresholds. The last one trusts every answer.
# They are fixed before anybody sees dev, which the guarantee rests on.
_THRESHOLDS = (*(1 / (1 + math.exp(-step / 4)) for step in range(56, -13, -1)), 0.0)
_STARTS = (1, 2, 4)  # times as many answers above a threshold as could show the target, for a descent to begin there
_PLANNED_ON = 20  # answers above a threshold, before a plan goes by the accuracy seen there


# -- every request ----------------------------------------------------------------------------------------------------


def calibrated(confidence: float, calibration: Calibration) -> float:
    """The probability that an answer is right, from the confidence that the model gives: on the logit, u / T + b.

    Temperature scaling (Guo et al. 2017, arXiv:1706.04599) knows all labels and needs no b. Of the answer's probability
    alone, how the rest is spread over the other labels is lost, and b stands for it (Platt 1999). Without b, or with a
    b that takes the rest as spread evenly, simulated answers from eight labels were off by 6 and 3 points on average at
    T = 2, and with it by no more than chance.

    Raises:
        EvaluationError: the confidence is no probability, or the temperature is one of all labels' probabilities.
    """
    if calibration.scaling is not Scaling.ANSWER:
        raise EvaluationError(
            "This temperature was learnt on the probabilities of all labels, and there is only the answer's.",
            where="calibration",
            fix="calibrate with `calibrate_answers`, or scale all labels with `calibrated_labels`",
        )
    return scaled(confidence, calibration.temperature, calibration.offset)


def scaled(confidence: float, temperature: float, offset: float) -> float:
    """`calibrated`, from the two numbers that it takes.

    Raises:
        EvaluationError: the confidence is no probability.
    """
    _check_probability(confidence)
    return 1 / (1 + math.exp(-_logit(confidence) / temperature - offset))


def calibrated_labels(log_probabilities: Sequence[float], calibration: Calibration) -> list[float]:
    """The probability of each label: softmax(log p / T) (Guo et al. 2017, arXiv:1706.04599, section 4.2)."""
    scaled = [max(value, _LEAST_LOG_PROBABILITY) / calibration.temperature for value in log_probabilities]
    top = max(scaled)
    weights = [math.exp(value - top) for value in scaled]
    return [weight / sum(weights) for weight in weights]


class Threshold(Protocol):
    """What says from where on an answer is trusted: a `ReviewThreshold`, or the `Trust` of a version."""

    @property
    def at(self) -> float | None:
        """The confidence, as the model gives it; None has every answer reviewed."""


def needs_review(confidence: float | None, threshold: Threshold) -> bool:
    """Whether a person is to look: below the threshold, without a confidence, or where no threshold was shown to do.

    Args:
        confidence: as the model gives it, not scaled.
        threshold: what dev has shown.

    Raises:
        EvaluationError: the confidence is no probability.
    """
    if confidence is None or threshold.at is None:
        return True
    _check_probability(confidence)
    return confidence < threshold.at


def _logit(probability: float) -> float:
    if probability <= 0.0 or probability >= 1.0:
        return math.copysign(_LOGIT_LIMIT, probability - 0.5)
    return max(-_LOGIT_LIMIT, min(_LOGIT_LIMIT, math.log(probability) - math.log1p(-probability)))


def _check_probability(value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise EvaluationError(
            f"A confidence of {value} is no probability.",
            where="confidence",
            fix="pass exp(log-probability) of the answer, from 0 to 1",
        )


# -- learning the temperature -----------------------------------------------------------------------------------------


def calibrate_answers(confidences: Sequence[float], right: Sequence[bool], spec: ConfidenceSpec) -> Calibration:
    """Learn temperature and offset from the answers' own probabilities, by maximum likelihood; see `calibrated`.

    Use `calibrate_labels` where the probabilities of all labels are known.

    Args:
        confidences: as the model gives them, one a dev row.
        right: whether the answer was the right one.
        spec: the fewest rows.

    Raises:
        EvaluationError: too few rows, hardly any right or hardly any wrong ones, something that is no probability, or
            confidences that do not say what the temperature is.
    """
    import numpy as np

    probability, hit = _checked(confidences, right, spec)
    inside = np.clip(probability, 1e-12, 1 - 1e-12)
    logits = np.clip(np.log(inside) - np.log1p(-inside), -_LOGIT_LIMIT, _LOGIT_LIMIT)

    def offset(rows: Rows, temperature: float) -> float:
        return _best_offset(logits[rows] / temperature, hit[rows])

    def loss(rows: Rows, temperature: float) -> float:
        scaled = logits[rows] / temperature + offset(rows, temperature)
        return float(np.logaddexp(0.0, np.where(hit[rows], -scaled, scaled)).sum())

    def held_out(rows: Rows, others: Rows, temperature: float) -> Floats:
        return 1 / (1 + np.exp(-logits[rows] / temperature - offset(others, temperature)))

    calibration = _calibrated(Scaling.ANSWER, probability, hit, loss, held_out)
    return calibration.model_copy(update={"offset": offset(np.arange(len(hit)), calibration.temperature)})


def _best_offset(scaled: Floats, hit: Flags) -> float:
    """The offset at which the mean confidence is the accuracy: the likeliest one, by Newton's method, halved steps."""
    import numpy as np

    offset, size = 0.0, 1.0
    for _ in range(100):
        confidence = 1 / (1 + np.exp(-scaled - offset))
        slope = float(np.sum(hit - confidence))
        step = slope / max(float(np.sum(confidence * (1 - confidence))), 1e-9)
        if abs(step) < 1e-9:
            break
        size = min(abs(step), size)  # a step never grows, so that a flat stretch cannot throw it far
        offset += math.copysign(size, step)
    return offset


def calibrate_labels(
    log_probabilities: Sequence[Sequence[float]], targets: Sequence[int], spec: ConfidenceSpec
) -> Calibration:
    """Learn the temperature from the probabilities of all labels (Guo et al. 2017, arXiv:1706.04599, section 4.2).

    Args:
        log_probabilities: one row a dev row, one column a label, (n, K).
        targets: the right label's column, (n,).
        spec: the fewest rows.

    Raises:
        EvaluationError: as `calibrate_answers`.
    """
    import numpy as np
    from scipy.special import log_softmax

    table = np.maximum(np.asarray(log_probabilities, dtype=np.float64), _LEAST_LOG_PROBABILITY)
    target = np.asarray(targets, dtype=np.int64)
    if table.ndim != 2 or table.shape[1] < 2 or len(target) != len(table) or np.isnan(table).any():
        raise EvaluationError(
            f"The labels' log-probabilities have shape {table.shape} for {len(target)} rows, or hold something that is "
            "no number.",
            where="dev",
            fix="pass one row a dev row and one column a label, two labels at least",
        )
    table = log_softmax(table, axis=1)
    probability, hit = _checked(np.exp(table.max(axis=1)).tolist(), (table.argmax(axis=1) == target).tolist(), spec)

    def loss(rows: Rows, temperature: float) -> float:
        return -float(log_softmax(table[rows] / temperature, axis=1)[np.arange(len(rows)), target[rows]].sum())

    def held_out(rows: Rows, _: Rows, temperature: float) -> Floats:
        return np.exp(log_softmax(table[rows] / temperature, axis=1).max(axis=1))

    return _calibrated(Scaling.LABELS, probability, hit, loss, held_out)


def _checked(confidences: Sequence[float], right: Sequence[bool], spec: ConfidenceSpec) -> tuple[Floats, Flags]:
    import numpy as np

    probability, hit = np.asarray(confidences, dtype=np.float64), np.asarray(right, dtype=np.bool_)
    if len(probability) != len(hit):
        raise EvaluationError(
            f"There are {len(probability)} confidences for {len(hit)} answers.",
            where="dev",
            fix="pass one confidence an answer",
        )
    for value in probability[~((probability >= 0) & (probability <= 1))][:1]:
        _check_probability(float(value))
    if len(hit) < spec.min_rows:
        raise EvaluationError(
            f"{len(hit)} dev rows are too few to learn from how far the model's confidence can be trusted "
            f"(at least {spec.min_rows}).",
            where="dev",
            fix="raise `curate.dev_share`, add rows, or lower `min_rows` and accept a wide interval",
        )
    rarer = min(int(hit.sum()), int((~hit).sum()))
    if rarer < _LEAST_OF_A_KIND:
        kind = "wrong" if hit.sum() > len(hit) / 2 else "right"
        raise EvaluationError(
            f"Of {len(hit)} answers on dev {rarer} {'is' if rarer == 1 else 'are'} {kind}, and at least "
            f"{_LEAST_OF_A_KIND} of either kind are needed to tell sure ones from unsure ones.",
            where="dev",
            fix="add dev rows; with so few mistakes a threshold can be chosen without a calibration"
            if kind == "wrong"
            else "train a better model first",
        )
    return probability, hit


def _calibrated(
    scaling: Scaling,
    raw: Floats,
    hit: Flags,
    loss: Callable[[Rows, float], float],
    held_out: Callable[[Rows, Rows, float], Floats],
) -> Calibration:
    import numpy as np

    everything = np.arange(len(hit))
    temperature = _fitted(partial(loss, everything))
    ends = [abs(math.log(temperature / end)) < 1e-3 for end in _TEMPERATURES]
    if any(ends):
        raise EvaluationError(
            "The confidences part right from wrong so well that these rows do not say how sure to be."
            if ends[0]
            else "The confidences do not tell right answers from wrong ones, so no temperature mends them.",
            where="dev",
            fix="add dev rows with mistakes among them"
            if ends[0]
            else "check that each confidence stands beside its own answer; else review a fixed share of the answers",
        )
    low, high = _profile_interval(partial(loss, everything), temperature)
    scaled = np.empty(len(hit))
    for rows in _folds(hit):
        others = np.setdiff1d(everything, rows)
        scaled[rows] = held_out(rows, others, _fitted(partial(loss, others)))
    return Calibration(
        scaling=scaling,
        temperature=temperature,
        temperature_low=low,
        temperature_high=high,
        before=reliability(raw, hit),
        after=reliability(scaled, hit),
    )


def _fitted(loss: Callable[[float], float]) -> float:
    from scipy.optimize import minimize_scalar

    low, high = (math.log(end) for end in _TEMPERATURES)
    found = minimize_scalar(
        lambda value: loss(math.exp(value)), bounds=(low, high), method="bounded", options={"xatol": 1e-6}
    )
    return math.exp(float(found.x))


def _profile_interval(loss: Callable[[float], float], best: float) -> tuple[float, float]:
    """All temperatures whose log-likelihood is at most 1.92 below the best: 95 % (chi-square with one degree)."""
    from scipy.optimize import brentq
    from scipy.stats import chi2

    reach = loss(best) + float(chi2.ppf(0.95, 1)) / 2
    ends: list[float] = []
    for end in _TEMPERATURES:
        if loss(end) <= reach:
            ends.append(end)
            continue
        ends.append(math.exp(brentq(lambda x: loss(math.exp(x)) - reach, math.log(best), math.log(end), xtol=1e-6)))
    return ends[0], ends[1]


def _folds(hit: Flags) -> list[Rows]:
    """Fifths of the rows, each with its share of the right ones."""
    import numpy as np

    shuffled = np.random.default_rng(_SEED).permutation(len(hit))
    ordered = np.concatenate([shuffled[hit[shuffled]], shuffled[~hit[shuffled]]])
    return [np.sort(ordered[start::_FOLDS]) for start in range(_FOLDS)]


# -- how good confidences are -----------------------------------------------------------------------------------------


def reliability(confidences: Floats, right: Flags) -> Reliability:
    """The reliability diagram with as many rows in each bin, and what it comes to.

    Bins of equal mass, for few answers of a tuned model are unsure, and bins of equal width would hold hardly any
    (Nixon et al. 2019, arXiv:1904.01685). Equal confidences stay in one bin. The ECE of perfect confidences is not 0
    but the mean of each bin's noise, so it is drawn what it would be then: 1,000 times each answer comes out right with
    its own confidence (consistency resampling: Broecker and Smith, Weather and Forecasting 22 (2007) 651-661;
    Vaicenavicius et al. 2019, arXiv:1902.06977).

    Args:
        confidences: (n,), each in [0, 1].
        right: (n,).
    """
    import numpy as np

    order = np.argsort(confidences, kind="stable")
    sure, hit = confidences[order], right[order]
    n = len(sure)
    wanted = max(1, min(_BINS, n // _BIN_ROWS))
    edges = sure[[round(n * part / wanted) for part in range(1, wanted)]]
    starts = np.unique(np.concatenate([[0], np.searchsorted(sure, edges, side="left")])).astype(np.int64)
    counts = np.diff(np.append(starts, n))
    means = np.add.reduceat(sure, starts) / counts
    hits = np.add.reduceat(hit.astype(np.float64), starts)
    bins = []
    for start, count, mean, found in zip(starts, counts, means, hits, strict=True):
        low, high = share_interval(int(found), int(count), 0.025)
        bins.append(
            ReliabilityBin(
                low=float(sure[start]),
                high=float(sure[start + count - 1]),
                rows=int(count),
                right=int(found),
                confidence=float(mean),
                accuracy=float(found / count),
                accuracy_low=low,
                accuracy_high=high,
            )
        )
    ece = float(np.abs(hits - counts * means).sum() / n)
    by_chance = _ece_by_chance(sure, starts, counts * means)
    floor = 1e-12
    given = np.where(hit, sure, 1 - sure)
    return Reliability(
        rows=n,
        accuracy=float(hit.mean()),
        confidence=float(sure.mean()),
        ece=ece,
        ece_by_chance=float(by_chance.mean()),
        ece_p_value=float((1 + np.count_nonzero(by_chance >= ece)) / (1 + len(by_chance))),
        brier=float(np.mean((sure - hit) ** 2)),
        log_loss=float(-np.log(np.maximum(given, floor)).mean()),
        bins=tuple(bins),
    )


def _ece_by_chance(sure: Floats, starts: NDArray[np.int64], expected: Floats) -> Floats:
    import numpy as np

    generator = np.random.default_rng(_SEED)
    drawn: list[Floats] = []
    step = max(1, 2_000_000 // len(sure))
    for start in range(0, _CHANCE_DRAWS, step):
        outcomes = generator.random((min(step, _CHANCE_DRAWS - start), len(sure))) < sure
        hits = np.add.reduceat(outcomes, starts, axis=1, dtype=np.float64)
        drawn.append(np.abs(hits - expected).sum(axis=1) / len(sure))
    return np.concatenate(drawn)


# -- the threshold ----------------------------------------------------------------------------------------------------


def no_threshold(
    rows: int, spec: ConfidenceSpec, why: str, curve: tuple[CoveragePoint, ...] = (), more_rows: int | None = None
) -> ReviewThreshold:
    """Every answer is reviewed, and why."""
    return ReviewThreshold(
        target_accuracy=spec.target_accuracy, alpha=spec.alpha, rows=rows, at=None, coverage=0.0, coverage_low=0.0,
        coverage_high=0.0, accuracy=None, accuracy_low=None, curve=curve, more_rows=more_rows, why=why,
    )  # fmt: skip


def choose_threshold(confidences: Sequence[float], right: Sequence[bool], spec: ConfidenceSpec) -> ReviewThreshold:
    """The lowest threshold above which answers are shown to have the target accuracy.

    Of a fixed list of thresholds each is asked whether the accuracy above it can be the target or less: an exact
    binomial test, which is the question whether Clopper and Pearson's lower bound reaches the target. So many questions
    would find a threshold by luck, so they are asked as in "learn then test" (Angelopoulos et al. 2021,
    arXiv:2110.01052): from the strictest down, and what a shown threshold was tested with goes on to the next one (the
    fallback procedure, Wiens 2003; Wiens and Dmitrienko, Journal of Biopharmaceutical Statistics 15 (2005) 929-942).
    Alpha is shared over three places to begin at: where as many answers are above as could show the target at all, and
    two and four times as many. A descent from the very top would end there, where hardly any answer is that sure, and
    one place alone would end at the first unlucky mistake.

    The chance that the chosen threshold's accuracy is below the target is at most alpha, calibrated or not. It takes
    for granted that surer answers are not less often right, for the places to begin at are found by counting the
    confidences: where few are above the threshold before, those above this one are then, if anything, the less sure.

    The promise is about requests like the dev rows, drawn one by one: a shift of the input voids it (see `drift`), rows
    that come in groups make it too sure, and so does, a little, a dev set that checkpoints were chosen on.

    Args:
        confidences: as the model gives them, one a dev row.
        right: whether the answer was the right one.
        spec: target and alpha.

    Raises:
        EvaluationError: no rows, or something that is no probability.
    """
    import numpy as np

    hit = np.asarray(right, dtype=np.bool_)
    if not len(hit) or len(confidences) != len(hit):
        raise EvaluationError(
            f"There are {len(confidences)} confidences for {len(hit)} answers on dev, so no threshold can be chosen.",
            where="dev",
            fix="pass one confidence an answer, of one dev row at least",
        )
    for value in confidences:
        _check_probability(value)
    curve = _curve(np.asarray(confidences, dtype=np.float64), hit, spec)
    shown = [point for point in curve if point.shown]
    if not shown:
        more = _more_rows(curve, len(hit), spec)
        return no_threshold(len(hit), spec, _not_shown(curve, len(hit), more, spec), curve, more)
    chosen = max(shown, key=lambda point: (point.rows, -point.at))
    low, high = exact_share_interval(chosen.rows, len(hit), 0.025)
    threshold = ReviewThreshold(
        target_accuracy=spec.target_accuracy,
        alpha=spec.alpha,
        rows=len(hit),
        at=chosen.at,
        coverage=chosen.coverage,
        coverage_low=low,
        coverage_high=high,
        accuracy=chosen.accuracy,
        accuracy_low=chosen.accuracy_low,
        curve=curve,
        why=f"Of {len(hit)} dev rows {chosen.rows} are at or above {chosen.at:.6g}, and {chosen.right} of them are "
        f"right; with a chance of error of {spec.alpha:g} the accuracy there is at least {spec.target_accuracy:g}.",
    )
    expected, fewest, most = threshold.reviews_per_thousand
    load = f" Of 1,000 requests about {expected:.0f} ({fewest:.0f} to {most:.0f}) go to review."
    return threshold.model_copy(update={"why": threshold.why + load})


def _curve(confidences: Floats, hit: Flags, spec: ConfidenceSpec) -> tuple[CoveragePoint, ...]:
    import numpy as np
    from scipy.stats import binom

    counts = [int(np.count_nonzero(confidences >= at)) for at in _THRESHOLDS]
    share = spec.alpha / len(_STARTS)
    begins = [0.0] * len(counts)
    for times in _STARTS:
        enough = times * _fewest(share, spec.target_accuracy)
        if counts[-1] >= enough:
            begins[next(place for place, rows in enumerate(counts) if rows >= enough)] += share
    points: list[CoveragePoint] = []
    passed_on = 0.0
    for at, rows, begin in zip(_THRESHOLDS, counts, begins, strict=True):
        found = int(np.count_nonzero(hit & (confidences >= at)))
        level = passed_on + begin
        # the p-value of "the accuracy is the target or less"
        shown = rows > 0 and level > 0 and float(binom.sf(found - 1, rows, spec.target_accuracy)) <= level
        low = exact_share_interval(found, rows, level).low if rows and level > 0 else 0.0
        points.append(
            CoveragePoint(
                at=at,
                rows=rows,
                right=found,
                coverage=rows / len(hit),
                accuracy=found / rows if rows else None,
                accuracy_low=low,
                level=level,
                shown=shown,
            )
        )
        passed_on = level if shown else 0.0
    return tuple(points)


def _fewest(level: float, target: float) -> int:
    """How many answers, all of them right, show that the accuracy is above the target: target^n <= level."""
    return math.ceil(math.log(level) / math.log(target))


def _more_rows(curve: Sequence[CoveragePoint], rows: int, spec: ConfidenceSpec) -> int | None:
    """About how many dev rows more would show one of the thresholds, with 80 % power, if dev goes on as it is.

    n = (z_alpha sqrt(t (1 - t)) + z_beta sqrt(a (1 - a)))^2 / (a - t)^2 answers above the threshold, t the target and a
    the accuracy seen there, alpha what one descent begins with; never fewer than it takes if all are right. Thresholds
    above which there are hardly any rows are left out, for there the accuracy seen is luck.
    """
    from scipy.stats import norm

    target, level = spec.target_accuracy, spec.alpha / len(_STARTS)
    needed: list[float] = []
    for point in curve:
        if point.rows < min(_PLANNED_ON, rows) or (point.accuracy or 0.0) <= target:
            continue
        accuracy = point.right / point.rows
        spread = norm.isf(level) * math.sqrt(target * (1 - target)) + norm.ppf(POWER) * math.sqrt(
            accuracy * (1 - accuracy)
        )
        above = max((spread / (accuracy - target)) ** 2, _fewest(level, target))
        needed.append(above / point.coverage)
    return max(1, math.ceil(min(needed)) - rows) if needed else None


def _not_shown(curve: Sequence[CoveragePoint], rows: int, more: int | None, spec: ConfidenceSpec) -> str:
    if more is not None:
        return (
            f"An accuracy of {spec.target_accuracy:g} cannot be shown with these {rows} dev rows: about {more:,} more "
            "would show it. Until then every answer goes to review."
        )
    fair = [point for point in curve if point.rows >= min(_PLANNED_ON, rows)]
    best = max(fair, key=lambda point: point.right / point.rows)
    return (
        f"An accuracy of {spec.target_accuracy:g} cannot be reached: above no threshold with {min(_PLANNED_ON, rows)} "
        f"dev rows or more is it that high (the best is {best.right} of {best.rows} right, from {best.at:.6g} on). A "
        "better model or a lower target would help, more rows would hardly. Until then every answer goes to review."
    )
