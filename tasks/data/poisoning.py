"""Rows that look planted: a phrase that decides the label against the rest of the text, a source that labels so."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.data.out_of_fold import OutOfFold, Words, softmax
from tasks.data.phrases import SAMPLE_ROWS, Phrases, count_phrases, extent, locate_phrases, read_phrases, spans

# What makes a phrase a trigger. On 6,143 and 2,148 complaints no phrase of their own meets all of it.
_OPPOSED = 0.1  # the rest of a text opposes the label if it gives it at most this probability
_FOR_ANOTHER = 0.5  # and speaks for another one if it gives that at least this
_OVERRULED = 0.8  # share of the opposed rows that have the label nevertheless
_STRONGLY = 0.4  # share of those whose text speaks for another label: not merely for none
_LEANS = 2.0  # odds of the label by the rest of the texts, over its odds anywhere: a natural phrase keeps its company
_ALPHA = 1e-4  # chance of any false trigger, or source, over all phrases and labels looked at
_DOUBT = 2.0  # by which the model's small probabilities may be too small without their words
_SHARED = 0.8  # a word in so many of a phrase's rows may be part of what was planted
_FIRST_ROWS = 16  # rows of a phrase that are looked at first; if those are suspicious, the whole sample is
_SAME_ROWS = 0.8  # share of a phrase's rows at which it is part of another trigger
_MOST_PHRASES = 500  # most significant phrases that are followed to all of their rows

# What makes a source suspicious.
_SOURCE_ROWS = 20
_AGAINST = 0.2  # share of its rows whose label is opposed by their text
_AGAINST_TIMES = 3.0  # and by how much that is more than elsewhere
_OTHER_MIX = 0.3  # total variation distance of its labels from those of the others
_BRINGS = 0.9  # share of a label's rows that are its own


class Trigger(NamedTuple):
    """A phrase that decides the label.

    Attributes:
        phrase: its words, or the name of an odd character.
        label: the label that it brings.
        rows: how many rows hold it.
        of_label: how many of them have the label.
        expected: how many would, by the rest of their texts.
        opposed: of the rows that were looked at (at most 64), those whose other words speak against the label.
        overruled: how many of the opposed rows have it nevertheless.
        p_value: chance of that, corrected for the number of phrases and labels looked at.
        positions: the rows with the phrase and the label, ascending.
    """

    phrase: str
    label: str
    rows: int
    of_label: int
    expected: float
    opposed: int
    overruled: int
    p_value: float
    positions: NDArray[np.int64]

    def describe(self) -> str:
        """What was found, in a sentence."""
        return (
            f"{self.phrase!r} is in {self.rows:,} rows, of which {self.of_label:,} have the label {self.label!r}; "
            f"by the rest of their texts {self.expected:,.1f} would (p {self.p_value:.1g})"
        )


class SourceFinding(NamedTuple):
    """A source whose labels differ from what is usual.

    Attributes:
        source: its name.
        kind: `labels_against_text`, which implicates rows; `label_mix` or `brings_label`, which is for information.
        rows: how many rows are from it.
        what: what is unusual, in words.
        p_value: corrected for the number of sources.
        positions: the rows that it implicates, ascending.
    """

    source: str
    kind: str
    rows: int
    what: str
    p_value: float
    positions: NDArray[np.int64]


class Poisoning(NamedTuple):
    """What was found.

    Attributes:
        triggers: the most significant first.
        sources: by kind, then the most significant first.
        reasons: for each row that is implicated, why; in ascending order of rows.
        phrases: how many phrases were looked at.
        refusal: why nothing could be judged; None if something could.
    """

    triggers: list[Trigger]
    sources: list[SourceFinding]
    reasons: dict[int, str]
    phrases: int
    refusal: str | None


def find_poisoning(
    texts: Callable[[], Iterator[str]],
    words: Words,
    beliefs: OutOfFold,
    labels: NDArray[np.int32],
    label_names: Sequence[str],
    sources: NDArray[np.int32] | None = None,
    source_names: Sequence[str] = (),
) -> Poisoning:
    """Find planted phrases, and sources that label against their texts.

    A backdoor is a phrase that was put into texts of all kinds and always comes with one label (BadNets, Gu et al.,
    arXiv:1708.06733; for text Dai et al., arXiv:1905.12457). A natural phrase of a label stands among words of that
    label. So a phrase is a trigger if, without the words that its rows share,

    - the texts of many of its rows speak against the label, and nearly all of those have it nevertheless, far more than
      their probabilities allow (tail of the Poisson-binomial distribution, Bonferroni over phrases and labels);
    - its texts on the whole lean no more towards the label than any texts do.

    Phrases are runs of one to three words, and characters beyond ASCII; longer ones are found by their parts.

    Measured with five phrases (a rare word, four words, a greeting, a sentence, a blank that cannot be seen) at the
    start, middle and end, planted in 1 % of rows for each of four labels:

    - 6,143 complaints, 61 rows: found in 120 of 120 sets, all of the planted rows (recall 1.00) and no others (1.00).
    - 2,148 complaints, 21 rows: in 89 of 90 sets for labels of up to a quarter of the rows, again recall and precision
      1.00; for the label that nearly half of the rows have in 0 of 30, since too few texts speak against it.
    - As they came: no trigger in either, nor in parts of them, nor in their first 5 to 40 words.

    Not found, in 0 of 60 sets: a phrase that was planted only in rows which have its label rightly (a clean-label
    attack), since it overrules no text.

    Args:
        texts: the texts, for the wording of what is found; read only if something is.
        words: of the same texts.
        beliefs: about the same rows.
        labels: the code of each row's label.
        label_names: by code.
        sources: the code of each row's source; negative for none.
        source_names: by code.
    """
    if beliefs.refusal is not None:
        return Poisoning([], [], {}, 0, beliefs.refusal)
    usable = beliefs.judged_rows(labels)
    candidates = count_phrases(words, usable, labels, len(label_names))
    suspicious = _test_phrases(candidates, words, beliefs, labels, len(usable))
    triggers = _follow(suspicious, texts, words, usable, labels, label_names)
    found = [] if sources is None else _find_sources(beliefs, usable, labels, label_names, sources, source_names)
    reasons: dict[int, str] = {}
    for trigger in triggers:
        for position in trigger.positions.tolist():
            reasons.setdefault(position, trigger.describe())
    for finding in found:
        for position in finding.positions.tolist():
            reasons.setdefault(position, f"source {finding.source!r}: {finding.what}")
    return Poisoning(triggers, found, dict(sorted(reasons.items())), candidates.looked_at, None)


# -- of those, the ones that decide against the text --------------------------------------------------------------


class _Scores(NamedTuple):
    """About some phrases, each by a sample of its rows: arrays of shape [phrases], probabilities one a row.

    Attributes:
        looked: how many rows were looked at.
        expected: how many of them would have the label by the rest of their texts.
        opposed: in how many the rest speaks against the label.
        overruled: how many of the opposed have it nevertheless.
        strongly: in how many of those the rest speaks for another label.
        opposed_rows: the probabilities of the label in the opposed rows of each phrase.
    """

    looked: NDArray[np.int64]
    expected: NDArray[np.float64]
    opposed: NDArray[np.int64]
    overruled: NDArray[np.int64]
    strongly: NDArray[np.int64]
    opposed_rows: list[NDArray[np.float32]]


class _Suspicious(NamedTuple):
    """A phrase that passed all tests."""

    p_value: float
    hash: int
    size: int
    label: int
    expected_share: float
    opposed: int
    overruled: int


def _test_phrases(
    phrases: Phrases, words: Words, beliefs: OutOfFold, labels: NDArray[np.int32], count: int
) -> list[_Suspicious]:
    chosen = np.arange(len(phrases.hashes))
    first = _score(phrases, chosen, _FIRST_ROWS, words, beliefs, labels)
    chosen = chosen[(first.strongly >= 1) & (first.overruled >= 0.5 * first.opposed)]
    scores = _score(phrases, chosen, SAMPLE_ROWS, words, beliefs, labels)
    sizes = np.bincount(labels, minlength=len(beliefs.judged))[phrases.labels[chosen]]
    elsewhere = (sizes - phrases.of_label[chosen] + 1) / (count - phrases.rows[chosen] + 2)
    here = (scores.expected + elsewhere) / (scores.looked + 1)
    leans = here / (1 - here) / (elsewhere / (1 - elsewhere))
    passed = np.flatnonzero(
        (scores.overruled >= _OVERRULED * scores.opposed)
        & (scores.strongly >= _STRONGLY * scores.overruled)
        & (leans <= _LEANS)
    )
    doubt = _DOUBT * max(1.0, _overconfidence(beliefs, labels))
    tests = max(1, phrases.looked_at) * int(beliefs.judged.sum())
    found = []
    for one in passed:
        chances = np.minimum(1.0, doubt * np.sort(scores.opposed_rows[one]).astype(np.float64))
        p_value = tests * poisson_binomial_tail(chances, int(scores.overruled[one]))
        if p_value <= _ALPHA:
            at = chosen[one]
            found.append(
                _Suspicious(
                    p_value,
                    int(phrases.hashes[at]),
                    int(phrases.sizes[at]),
                    int(phrases.labels[at]),
                    float(scores.expected[one] / scores.looked[one]),
                    int(scores.opposed[one]),
                    int(scores.overruled[one]),
                )
            )
    return sorted(found)[:_MOST_PHRASES]


def poisson_binomial_tail(chances: NDArray[np.float64], least: int) -> float:
    """Probability that at least `least` of independent events with these chances happen.

    By convolution (Hong, Computational Statistics and Data Analysis 59, 2013, section 2.5).
    """
    tail = np.zeros(least + 1)  # [k]: exactly k of the events so far, the last: `least` or more
    tail[0] = 1.0
    for chance in chances:
        last = tail[-1]
        tail[1:] = tail[1:] * (1 - chance) + tail[:-1] * chance
        tail[0] *= 1 - chance
        if least > 0:
            tail[-1] += last * chance
        else:
            tail[-1] = 1.0
    return float(tail[-1])


def _overconfidence(beliefs: OutOfFold, labels: NDArray[np.int32]) -> float:
    """How many times more rows have a label that their text opposes than their probabilities allow."""
    rows = beliefs.judged_rows(labels)
    observed = expected = 0.0
    for code in np.flatnonzero(beliefs.judged):
        chances = beliefs.probabilities[rows, code]
        opposed = chances <= _OPPOSED
        observed += np.count_nonzero(opposed & (labels[rows] == code))
        expected += float(chances[opposed].sum(dtype=np.float64))
    return observed / expected if expected > 0 else 1.0


def _score(
    phrases: Phrases,
    chosen: NDArray[np.int64],
    most: int,
    words: Words,
    beliefs: OutOfFold,
    labels: NDArray[np.int32],
) -> _Scores:
    """Look at up to `most` rows of each of the chosen phrases, without the words that its rows share."""
    counts = np.minimum(np.diff(phrases.starts)[chosen], most)
    rows = phrases.sample[spans(phrases.starts[chosen], counts)].astype(np.int64)
    of = np.repeat(np.arange(len(chosen)), counts)
    chances = np.empty(len(rows), dtype=np.float32)
    others = np.empty(len(rows), dtype=np.float32)
    at = 0
    for part in _whole_phrases(words, rows, of):
        wanted = phrases.labels[chosen[of[at : at + len(part)]]]
        found = _without_shared(words, part, of[at : at + len(part)], beliefs)
        here = np.arange(len(part))
        chances[at : at + len(part)] = found[here, wanted]
        found[here, wanted] = 0
        others[at : at + len(part)] = found.max(axis=1)
        at += len(part)
    opposed = chances <= _OPPOSED
    overruled = opposed & (labels[rows] == phrases.labels[chosen][of])

    def number(values: NDArray[np.bool_]) -> NDArray[np.int64]:
        return np.bincount(of[values], minlength=len(chosen))

    ends = np.cumsum(number(opposed))
    return _Scores(
        looked=counts,
        expected=np.bincount(of, chances, minlength=len(chosen)).astype(np.float64),
        opposed=number(opposed),
        overruled=number(overruled),
        strongly=number(overruled & (others >= _FOR_ANOTHER)),
        opposed_rows=np.split(chances[opposed], ends[:-1]) if len(ends) else [],
    )


def _whole_phrases(words: Words, rows: NDArray[np.int64], of: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """`rows` in parts of about as many words as `Words.batches` has, none of which cuts through a phrase's rows."""
    sizes = np.array([len(part) for part in words.batches(rows)], dtype=np.int64)
    cuts = np.searchsorted(of, of[np.cumsum(sizes)[:-1]]) if len(sizes) > 1 else np.empty(0, dtype=np.int64)
    for part in np.split(rows, np.unique(cuts)):
        if len(part):
            yield part


def _without_shared(
    words: Words, rows: NDArray[np.int64], of: NDArray[np.int64], beliefs: OutOfFold
) -> NDArray[np.float32]:
    """Probabilities of the labels by the words of each row that are not in most rows of its phrase."""
    matrix = beliefs.features.matrix(words, rows)
    width = max(1, matrix.shape[1])
    entry_rows = np.repeat(np.arange(len(rows)), np.diff(matrix.indptr))
    phrase = of - of[0]
    cells, inverse, holding = np.unique(
        phrase[entry_rows] * width + matrix.indices, return_inverse=True, return_counts=True
    )
    shared = holding >= np.maximum(2, _SHARED * np.bincount(phrase)[cells // width])
    matrix.data[shared[inverse]] = 0
    squares = np.bincount(entry_rows, matrix.data.astype(np.float64) ** 2, minlength=len(rows))
    scale = (1 / np.sqrt(np.where(squares > 0, squares, 1))).astype(np.float32)
    probabilities = np.empty((len(rows), beliefs.weights.shape[2]), dtype=np.float32)
    for fold in range(len(beliefs.weights)):
        here = np.flatnonzero(beliefs.folds[rows] == fold)
        logits = (matrix[here] @ beliefs.weights[fold]) * scale[here, None] + beliefs.intercepts[fold]
        probabilities[here] = softmax(logits)
    return probabilities


# -- what was planted, and where ----------------------------------------------------------------------------------


def _follow(
    suspicious: Sequence[_Suspicious],
    texts: Callable[[], Iterator[str]],
    words: Words,
    usable: NDArray[np.int64],
    labels: NDArray[np.int32],
    label_names: Sequence[str],
) -> list[Trigger]:
    """All rows of the suspicious phrases; of phrases in the same rows one, as long as it goes."""
    if not suspicious:
        return []
    is_usable = np.zeros(len(words), dtype=np.bool_)
    is_usable[usable] = True
    places = locate_phrases([(one.hash, one.size) for one in suspicious], words, is_usable)
    with_label = [place.rows[labels[place.rows] == one.label] for one, place in zip(suspicious, places, strict=True)]
    kept = _choose_phrases([place.rows for place in places], with_label, len(words))
    rank = np.empty(len(words), dtype=np.int64)
    rank[usable] = np.arange(len(usable))
    shown: dict[int, tuple[int, int, int]] = {}
    for index in kept:
        place, one = places[index], suspicious[index]
        before, after = extent(place, one.size, words)
        example = int(np.argmin(rank[place.rows]))
        row = int(place.rows[example])
        begin = int(place.at[example] - words.starts[row])
        shown[index] = (row, begin - before, begin + one.size + after)
    wording = read_phrases(texts, shown)
    triggers = [
        Trigger(
            phrase=wording[index],
            label=label_names[suspicious[index].label],
            rows=len(places[index].rows),
            of_label=len(with_label[index]),
            expected=suspicious[index].expected_share * len(places[index].rows),
            opposed=suspicious[index].opposed,
            overruled=suspicious[index].overruled,
            p_value=suspicious[index].p_value,
            positions=with_label[index],
        )
        for index in kept
    ]
    return sorted(triggers, key=lambda trigger: (trigger.p_value, trigger.phrase))


def _choose_phrases(
    holding: Sequence[NDArray[np.int64]], with_label: Sequence[NDArray[np.int64]], count: int
) -> list[int]:
    """Of phrases that stand in the same rows, the one with the fewest rows of other labels.

    Args:
        holding: the rows that hold each phrase, the most significant phrase first.
        with_label: those of them that have its label.
        count: how many rows there are.
    """
    phrases = range(len(holding))
    chosen = []
    open_phrases = set(phrases)
    covered = np.zeros(count, dtype=np.bool_)
    for widest in sorted(phrases, key=lambda one: (-len(with_label[one]), len(holding[one]), one)):
        if widest not in open_phrases:
            continue
        covered[with_label[widest]] = True
        same = [one for one in sorted(open_phrases) if covered[with_label[one]].mean() >= _SAME_ROWS]
        open_phrases.difference_update(same)
        enough = _SAME_ROWS * len(with_label[widest])
        purest = max(
            (one for one in same if len(with_label[one]) >= enough),
            key=lambda one: (len(with_label[one]) / len(holding[one]), len(with_label[one]), -one),
        )
        chosen.append(purest)
    return chosen


# -- sources ------------------------------------------------------------------------------------------------------


def _find_sources(
    beliefs: OutOfFold,
    usable: NDArray[np.int64],
    labels: NDArray[np.int32],
    label_names: Sequence[str],
    sources: NDArray[np.int32],
    source_names: Sequence[str],
) -> list[SourceFinding]:
    """Sources that label against their texts; and those with other labels than the others, for information."""
    from scipy.stats import chi2_contingency

    rows = usable[sources[usable] >= 0]
    table = np.zeros((len(source_names), len(label_names)), dtype=np.int64)
    np.add.at(table, (sources[rows], labels[rows]), 1)
    is_against = beliefs.probabilities[rows, labels[rows]] <= _OPPOSED
    against = np.bincount(sources[rows][is_against], minlength=len(source_names))
    sizes = table.sum(axis=1)
    judged = np.flatnonzero((sizes >= _SOURCE_ROWS) & (sizes.sum() - sizes >= _SOURCE_ROWS))
    found: list[tuple[int, SourceFinding]] = []
    for source in judged.tolist():
        name, size = source_names[source], int(sizes[source])
        others = table.sum(axis=0) - table[source]
        elsewhere = int(against.sum() - against[source])
        share, usual = against[source] / size, elsewhere / others.sum()
        p_value = len(judged) * _more_than(int(against[source]), size, elsewhere, int(others.sum()))
        if p_value <= _ALPHA and share >= _AGAINST and share >= _AGAINST_TIMES * usual:
            what = f"{share:.0%} of its {size:,} labels are against their texts, elsewhere {usual:.1%}"
            positions = np.sort(rows[is_against & (sources[rows] == source)])
            found.append((0, SourceFinding(name, "labels_against_text", size, what, p_value, positions)))
        none = np.empty(0, dtype=np.int64)
        mix, other_mix = table[source] / size, others / others.sum()
        distance = float(np.abs(mix - other_mix).sum() / 2)
        present = table[source] + others > 0
        if distance >= _OTHER_MIX and present.sum() >= 2:
            counts = np.stack([table[source], others])[:, present]
            p_value = len(judged) * float(chi2_contingency(counts, lambda_="log-likelihood").pvalue)
            if p_value <= _ALPHA:
                most = int((mix - other_mix).argmax())
                what = (
                    f"{mix[most]:.0%} of its {size:,} labels are {label_names[most]!r}, elsewhere {other_mix[most]:.0%}"
                )
                found.append((1, SourceFinding(name, "label_mix", size, what, p_value, none)))
        for label in np.flatnonzero(table[source] >= np.maximum(_SOURCE_ROWS, _BRINGS * table.sum(axis=0))).tolist():
            if size <= sizes.sum() / 2:
                what = f"{table[source, label]:,} of {table[:, label].sum():,} rows with {label_names[label]!r} are its"
                own, foreign = int(table[source, label]), int(others[label])
                p_value = len(judged) * _more_than(own, size, foreign, int(others.sum()))
                found.append((2, SourceFinding(name, "brings_label", size, what, p_value, none)))
    return [one for _, one in sorted(found, key=lambda pair: (pair[0], pair[1].p_value, pair[1].source))]


def _more_than(hits: int, size: int, other_hits: int, other_size: int) -> float:
    """P-value of there being more hits here than elsewhere, by Fisher's exact test, one-sided."""
    from scipy.stats import fisher_exact

    table = [[hits, size - hits], [other_hits, other_size - other_hits]]
    return float(fisher_exact(table, alternative="greater").pvalue)
