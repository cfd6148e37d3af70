"""Rows whose label is probably wrong, by confident learning on out-of-fold predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.data.out_of_fold import OutOfFold

_LEAST_WEIGHT = 0.1


class Suspect(NamedTuple):
    """A row whose label is probably wrong.

    Attributes:
        position: of the row.
        given: code of its label.
        suggested: code of the label that its text speaks for most.
        p_given: probability of the label given, by a model that did not see the row.
        p_suggested: that of the label suggested.
    """

    position: int
    given: int
    suggested: int
    p_given: float
    p_suggested: float


class Suspects(NamedTuple):
    """What was found.

    Attributes:
        found: the suspects, the most suspicious first.
        judged: how many rows could be judged.
        unjudged: rows of each label that has too few of them to be judged; nor is such a label ever suggested.
        refusal: why nothing could be judged; None if something could.
    """

    found: list[Suspect]
    judged: int
    unjudged: dict[str, int]
    refusal: str | None


def find_suspects(beliefs: OutOfFold, labels: NDArray[np.int32], label_names: Sequence[str]) -> Suspects:
    """Find the rows whose label is probably wrong.

    cleanlab estimates how many labels are wrong from the counts of rows that are confidently of another label
    (confident learning, Northcutt, Jiang and Chuang, JAIR 70, 2021), and flags so many rows: those with the least
    probable labels, unless the label given is the most probable one. They are ranked by `p_given / p_suggested`.

    Measured on 6,143 complaints, where 527 rows are suspects as they came (by eye most of the first ones are wrong or
    cannot be told): of 5 % of labels made wrong by lot 0.86 to 0.92 were found, and 0.76 to 0.84 of the first hundred
    suspects were such rows; of labels swapped for one that is easily confused 0.66 to 0.70, and 0.39 to 0.43.

    Args:
        beliefs: about the same rows.
        labels: the code of each row's label.
        label_names: by code.
    """
    unjudged = {
        name: int(count)
        for name, count, judged in zip(
            label_names, np.bincount(labels, minlength=len(label_names)), beliefs.judged, strict=True
        )
        if count and (beliefs.refusal is not None or not judged)
    }
    rows = beliefs.judged_rows(labels)
    if beliefs.refusal is not None:
        return Suspects([], 0, unjudged, beliefs.refusal)
    from cleanlab.filter import find_label_issues

    codes = np.flatnonzero(beliefs.judged)
    given = np.searchsorted(codes, labels[rows])
    probabilities = beliefs.probabilities[np.ix_(rows, codes)].astype(np.float64)
    flagged = np.flatnonzero(find_label_issues(given, probabilities, filter_by="low_self_confidence", n_jobs=1))
    p_given = probabilities[flagged, given[flagged]]
    suggested = probabilities[flagged].argmax(axis=1)
    p_suggested = probabilities[flagged, suggested]
    # Equal rows have equal ratios; `rows` is in an order that the content decides, and a stable sort keeps it.
    ranked = np.argsort(p_given / p_suggested, kind="stable")
    found = [
        Suspect(
            int(rows[flagged[one]]),
            int(labels[rows[flagged[one]]]),
            int(codes[suggested[one]]),
            float(p_given[one]),
            float(p_suggested[one]),
        )
        for one in ranked
    ]
    return Suspects(found, len(rows), unjudged, None)


def weigh_down(found: Sequence[Suspect], count: int) -> NDArray[np.float32]:
    """A factor for the weight of each of `count` rows: `p_given / p_suggested` of a suspect, at least 0.1; else 1.

    The ratio is how much less the text speaks for the label given than for the other; the least keeps a hard row that
    was suspected wrongly from being lost.
    """
    factors = np.ones(count, dtype=np.float32)
    for suspect in found:
        factors[suspect.position] = min(1.0, max(_LEAST_WEIGHT, suspect.p_given / suspect.p_suggested))
    return factors
