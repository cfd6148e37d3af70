"""Whether requests, or what is answered to them, are still what they were: a reference window against the current one.

Five things are tested: how long requests are, which words they use, how the answers are mixed, how sure the model is,
and how often a person corrects it. Each has a p-value and an effect with a limit, and drift takes both. With many
requests any difference is significant, and with few any effect is large by chance; asked for both, neither cries wolf.
The p-values are compared by Holm's method, so that alpha is the chance of a false alarm over all of them.

The p-values take requests for drawn one by one. Whole weeks make fair windows (a Sunday differs from a Monday), and a
client that floods the log makes drift of its own, which is then rightly seen.

scipy does this in a page. evidently, the usual library, brings 28 packages with it (a web server and its plugins,
statsmodels, nltk, plotly, a client that reports its use), and by default decides by a p-value up to 1,000 rows and by
a distance above, never by both.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.stats import chi2_contingency, fisher_exact, ks_2samp

from tasks.contracts.errors import SpecError
from tasks.contracts.observe import DriftReport, DriftSpec, DriftTest, RetrainPermit
from tasks.statistics import holm_levels

Floats = NDArray[np.float64]

_WORD = re.compile(r"\w+")
_DIGITS = re.compile(r"\d+")
_VOCABULARY = 2_000  # most frequent words of both windows; all others are one word more
_TEXTS = 5_000  # of each window whose words are counted: more would only take longer
_LEAST_PERMUTATIONS = 999
_STEP = 250  # permutations at a time: one dense row of the vocabulary each
_SEED = 7
_LEAST_EXPECTED = 5.0  # of a class, for the chi-square distribution to hold (Cochran, Biometrics 10 (1954) 417-451)
_NAMED = 5  # words or classes that are named
_NAMED_FROM = 0.01  # a word is named if so many requests have it, and at least five: nobody's own
_SKEW = timedelta(minutes=5)  # by which clocks may differ


class TooLittleError(SpecError):
    """The windows hold too little to test anything."""


@dataclass(frozen=True)
class Window:
    """Requests of a stretch of time.

    Attributes:
        texts: what was asked, masked alike in both windows.
        answers: one a request where answers are closed; else empty.
        confidences: of those that have one, scaled or not but alike in both windows.
        reviewed: answers that a person looked at, drawn alike in both windows (by the same threshold and share).
        corrected: of these, those that the person changed.
    """

    texts: Sequence[str]
    answers: Sequence[str] = field(default=())
    confidences: Sequence[float] = field(default=())
    reviewed: int = 0
    corrected: int = 0


def compare_windows(reference: Window, current: Window, spec: DriftSpec) -> DriftReport:
    """Test what can be tested, and say what cannot and why.

    Raises:
        TooLittleError: nothing can be tested: "no drift" would be said of nothing.
        SpecError: a number cannot be what it is said to be.
    """
    left_out: dict[str, str] = {}
    tests: list[DriftTest] = []
    for what, rows, least in (
        ("lengths", (len(reference.texts), len(current.texts)), spec.min_rows),
        ("vocabulary", (len(reference.texts), len(current.texts)), spec.min_rows),
        ("classes", (len(reference.answers), len(current.answers)), spec.min_rows),
        ("confidence", (len(reference.confidences), len(current.confidences)), spec.min_rows),
        ("disagreement", (reference.reviewed, current.reviewed), spec.min_reviewed),
    ):
        if min(rows) < least:
            left_out[what] = f"{rows[0]:,} rows in the reference and {rows[1]:,} now, at least {least:,} needed"
            continue
        match what:
            case "lengths":
                tests.append(_length_drift(reference.texts, current.texts, spec))
            case "vocabulary":
                tests.append(_vocabulary_drift(reference.texts, current.texts, spec))
            case "classes":
                tests.append(_class_drift(reference.answers, current.answers, spec))
            case "confidence":
                tests.append(_confidence_drift(reference.confidences, current.confidences, spec))
            case _:
                tests.append(_disagreement_drift(reference, current, spec))
    if not tests:
        raise TooLittleError(
            "The windows hold too little to say whether anything has drifted: "
            + "; ".join(f"{what}: {why}" for what, why in left_out.items())
            + ".",
            where="monitor",
            fix="wait for more requests, take longer windows, raise the log's `share`, or lower `min_rows`",
        )
    levels = holm_levels([test.p_value for test in tests], spec.alpha)
    judged = tuple(
        test.model_copy(update={"level": level, "drifted": test.p_value < level and test.effect > test.limit})
        for test, level in zip(tests, levels, strict=True)
    )
    return DriftReport(
        tests=judged,
        left_out=left_out,
        drifted=any(test.drifted for test in judged),
        reason=_reason([test for test in judged if test.drifted]),
    )


def _reason(drifted: Sequence[DriftTest]) -> str:
    if not drifted:
        return "no drift"
    worst = sorted(drifted, key=lambda test: test.limit / test.effect)
    return "drift: " + ", ".join(f"{test.what} ({test.effect:.2g}, limit {test.limit:g})" for test in worst)


def _test(
    what: str, method: str, rows: tuple[int, int], statistic: float, effect: float, limit: float, p: float, words: str
) -> DriftTest:
    return DriftTest(
        what=what,
        method=method,
        reference_rows=rows[0],
        current_rows=rows[1],
        statistic=statistic,
        effect=effect,
        limit=limit,
        p_value=min(1.0, p),
        level=0.0,
        drifted=False,
        words=words,
    )


# -- lengths and confidence -------------------------------------------------------------------------------------------


def _length_drift(reference: Sequence[str], current: Sequence[str], spec: DriftSpec) -> DriftTest:
    then, now = ([float(len(text)) for text in texts] for texts in (reference, current))
    medians = f"median length {np.median(then):.0f} characters then, {np.median(now):.0f} now"
    return _kolmogorov_smirnov("lengths", then, now, spec.max_length_shift, medians)


def _confidence_drift(reference: Sequence[float], current: Sequence[float], spec: DriftSpec) -> DriftTest:
    for value in (*reference, *current):
        if not 0.0 <= value <= 1.0:
            raise SpecError(
                f"A confidence of {value} is no probability.",
                where="monitor",
                fix="pass probabilities, and leave out requests that have none",
            )
    medians = f"median confidence {np.median(reference):.3f} then, {np.median(current):.3f} now"
    return _kolmogorov_smirnov("confidence", reference, current, spec.max_confidence_shift, medians)


def _kolmogorov_smirnov(
    what: str, reference: Sequence[float], current: Sequence[float], limit: float, words: str
) -> DriftTest:
    """The largest distance between the two distribution functions, which is its own effect size, 0 to 1.

    Equal values make the p-value too large, never too small.
    """
    found = ks_2samp(reference, current, method="asymp")
    distance = float(found.statistic)
    rows = len(reference), len(current)
    return _test(what, "Kolmogorov-Smirnov", rows, distance, distance, limit, float(found.pvalue), words)


# -- vocabulary -------------------------------------------------------------------------------------------------------


def _vocabulary_drift(reference: Sequence[str], current: Sequence[str], spec: DriftSpec) -> DriftTest:
    """Jensen-Shannon divergence of the word counts (Lin, IEEE Transactions on Information Theory 37 (1991) 145-151).

    The p-value is that of exchanging whole requests between the windows, since the words of one request hang together.
    The divergence of two samples from one source is above 0; the effect is what it has beyond the mean of the
    exchanged ones, so that its limit means the same for small windows and large ones. A yardstick: complaints of about
    90 words, of which every tenth goes on with a sentence about something new, have 0.009, every third 0.03, and
    complaints about bank accounts against ones about cards 0.054.
    """
    generator = np.random.default_rng(_SEED)
    then, now = _sample(reference, generator), _sample(current, generator)
    counts, vocabulary = _count_words([*then, *now])
    is_now = np.zeros(len(then) + len(now), dtype=np.float32)
    is_now[len(then) :] = 1
    total = np.asarray(counts.sum(axis=0), dtype=np.float64).ravel()
    observed = float(_divergences(counts, is_now[None, :], total)[0])
    permutations = max(_LEAST_PERMUTATIONS, math.ceil(10 / spec.alpha) - 1)  # Holm asks five tests down to alpha / 5
    exchanged = np.concatenate(
        [
            _divergences(
                counts,
                generator.permuted(np.tile(is_now, (min(_STEP, permutations - start), 1)), axis=1),
                total,
            )
            for start in range(0, permutations, _STEP)
        ]
    )
    p_value = (1 + int(np.count_nonzero(exchanged >= observed - 1e-12))) / (1 + permutations)
    return _test(
        "vocabulary",
        f"Jensen-Shannon, {permutations:,} permutations of requests",
        (len(then), len(now)),
        observed,
        max(0.0, observed - float(exchanged.mean())),
        spec.max_vocabulary_shift,
        p_value,
        _grown_words(counts, is_now > 0, vocabulary),
    )


def _sample(texts: Sequence[str], generator: np.random.Generator) -> list[str]:
    if len(texts) <= _TEXTS:
        return list(texts)
    return [texts[place] for place in sorted(generator.choice(len(texts), _TEXTS, replace=False))]


def _words_of(text: str) -> list[str]:
    """Lower case, numbers alike: another invoice number is no other word."""
    return [_DIGITS.sub("0", word) for word in _WORD.findall(text.lower())]


def _count_words(texts: Sequence[str]) -> tuple[csr_matrix, list[str]]:
    """How often each text has each word, (texts, words + 1): the last column is all rare words together."""
    counted = [Counter(_words_of(text)) for text in texts]
    everywhere: Counter[str] = Counter()
    for one in counted:
        everywhere.update(one)
    # By count, then by name: of equally frequent words always the same are kept.
    vocabulary = [word for word, _ in sorted(everywhere.items(), key=lambda item: (-item[1], item[0]))[:_VOCABULARY]]
    columns = {word: place for place, word in enumerate(vocabulary)}
    entries = [
        (row, columns.get(word, len(vocabulary)), count)
        for row, one in enumerate(counted)
        for word, count in one.items()
    ]
    rows, places, values = zip(*entries, strict=True) if entries else ((), (), ())
    shape = (len(texts), len(vocabulary) + 1)
    return csr_matrix((np.array(values, dtype=np.float32), (rows, places)), shape=shape), vocabulary


def _divergences(counts: csr_matrix, is_now: NDArray[np.float32], total: Floats) -> Floats:
    """The divergence in bits for each row of marks, (permutations, texts); 0 where a side has no words."""
    now = np.asarray(counts.T @ is_now.T, dtype=np.float64).T
    then = total - now
    sizes = [np.maximum(side.sum(axis=1, keepdims=True), 1e-300) for side in (then, now)]
    shares = [side / size for side, size in zip((then, now), sizes, strict=True)]
    return np.maximum(0.0, _entropy((shares[0] + shares[1]) / 2) - (_entropy(shares[0]) + _entropy(shares[1])) / 2)


def _entropy(shares: Floats) -> Floats:
    return -np.sum(shares * np.log2(np.where(shares > 0, shares, 1.0)), axis=1)


def _grown_words(counts: csr_matrix, is_now: NDArray[np.bool_], vocabulary: Sequence[str]) -> str:
    """The words whose share of the requests has grown most. A word of few requests is not named: it may be a name."""
    has = counts.astype(bool)
    then, now = (np.asarray(has[mark].sum(axis=0), dtype=np.float64).ravel()[:-1] for mark in (~is_now, is_now))
    n_then, n_now = int((~is_now).sum()), int(is_now.sum())
    growth = now / n_now - then / n_then
    named = [
        f"{vocabulary[place]} ({100 * then[place] / n_then:.0f} % to {100 * now[place] / n_now:.0f} % of requests)"
        for place in np.argsort(-growth, kind="stable")[:_NAMED]
        if growth[place] > _NAMED_FROM and now[place] >= max(_NAMED, _NAMED_FROM * n_now)
    ]
    return f"more often now: {', '.join(named)}" if named else "no word stands out"


# -- classes ----------------------------------------------------------------------------------------------------------


def _class_drift(reference: Sequence[str], current: Sequence[str], spec: DriftSpec) -> DriftTest:
    """Chi-square test of the mix, and the population stability index: sum of (q - p) log(q / p).

    Half a request is added to each class on each side, so that a class that is new has an index at all. Classes of
    which fewer than five are expected on a side are one class.
    """
    then, now = Counter(reference), Counter(current)
    n_then, n_now = len(reference), len(current)
    smaller = min(n_then, n_now) / (n_then + n_now)
    classes = sorted(then.keys() | now.keys())
    kept = [name for name in classes if (then[name] + now[name]) * smaller >= _LEAST_EXPECTED]
    table = [[side[name] for name in kept] for side in (then, now)]
    if len(kept) < len(classes):
        for row, side in zip(table, (then, now), strict=True):
            row.append(sum(side[name] for name in classes if name not in kept))
    statistic, p_value = 0.0, 1.0
    if len(table[0]) > 1:
        found = chi2_contingency(table, correction=False)
        statistic, p_value = float(found.statistic), float(found.pvalue)
    shares = [(np.array(row) + 0.5) / (sum(row) + 0.5 * len(row)) for row in table]
    stability = float(np.sum((shares[1] - shares[0]) * np.log(shares[1] / shares[0])))
    change = sorted(classes, key=lambda name: -abs(now[name] / n_now - then[name] / n_then))[:_NAMED]
    words = ", ".join(f"{name} {100 * then[name] / n_then:.0f} % to {100 * now[name] / n_now:.0f} %" for name in change)
    rows = n_then, n_now
    return _test("classes", "chi-square", rows, statistic, stability, spec.max_class_shift, p_value, words)


# -- review -----------------------------------------------------------------------------------------------------------


def _disagreement_drift(reference: Window, current: Window, spec: DriftSpec) -> DriftTest:
    """Fisher's exact test of "not corrected more often", one-sided: a model that is corrected less needs no retrain."""
    for window in (reference, current):
        if not 0 <= window.corrected <= window.reviewed:
            raise SpecError(
                f"{window.corrected} of {window.reviewed} reviewed answers were corrected, which cannot be.",
                where="monitor",
                fix="count corrected answers among the reviewed ones",
            )
    table = [
        [current.corrected, current.reviewed - current.corrected],
        [reference.corrected, reference.reviewed - reference.corrected],
    ]
    then, now = reference.corrected / reference.reviewed, current.corrected / current.reviewed
    return _test(
        "disagreement",
        "Fisher exact, one-sided",
        (reference.reviewed, current.reviewed),
        now - then,
        max(0.0, now - then),
        spec.max_disagreement_rise,
        float(fisher_exact(table, alternative="greater").pvalue),
        f"{100 * then:.1f} % of the reviewed answers corrected then, {100 * now:.1f} % now",
    )


# -- no storm ---------------------------------------------------------------------------------------------------------


def may_retrain(last: datetime | None, now: datetime, spec: DriftSpec) -> RetrainPermit:
    """Whether drift may start a retrain: not soon after the last one that it started, whatever became of that.

    Args:
        last: when drift last started one; None if it never did.
        now: the present time.
        spec: the shortest time between two.

    Raises:
        SpecError: a time has no zone, or the last one lies in the future by more than five minutes. To wait for it
            could be to wait for years, and not to wait would be the storm; so a person looks at the clocks.
    """
    if now.tzinfo is None or (last is not None and last.tzinfo is None):
        raise SpecError("A time without a zone cannot be compared.", where="monitor", fix="pass times in UTC")
    if last is None:
        return RetrainPermit(allowed=True, next_at=None, why="Drift has not started a retrain before.")
    if last - now > _SKEW:
        raise SpecError(
            f"The last retrain that drift started lies in the future: {last.isoformat()}, and it is {now.isoformat()}.",
            where="monitor",
            fix="set the clocks of the machines that run flows and database alike",
        )
    next_at = last + timedelta(hours=spec.retrain_at_most_every_hours)
    if now >= next_at:
        return RetrainPermit(allowed=True, next_at=None, why=f"Drift last started a retrain at {last.isoformat()}.")
    return RetrainPermit(
        allowed=False,
        next_at=next_at,
        why=f"Drift started a retrain at {last.isoformat()}, and may again from {next_at.isoformat()} on "
        f"(at most one in {spec.retrain_at_most_every_hours:g} hours).",
    )
