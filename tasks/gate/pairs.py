"""Both models' outcomes side by side, as arrays: what the tests are made on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tasks.contracts.errors import NotComparableError
from tasks.contracts.references import ItemOutcome
from tasks.contracts.spec import MACRO_F1, Expense

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
NO_CLASS = -1  # an answer that is none of the classes


@dataclass(frozen=True)
class Pairs:
    """The same n items answered by two models; every array is in one order, [n].

    Attributes:
        scores: per metric the baseline's and the candidate's score of each item, in [0, 1].
        expenses: the same for what an answer costs; only those that every item of both sides has.
        groups: which items belong together, as codes 0..G-1; an item that stands alone has a code of its own.
        slices: the name of each item's slice, or None.
        targets: class of each item, as an index into `classes`.
        answers: the baseline's and the candidate's class, `NO_CLASS` where the answer is none.
        classes: the labels there are; empty where there are none.
    """

    scores: Mapping[str, tuple[Floats, Floats]]
    expenses: Mapping[str, tuple[Floats, Floats]]
    groups: Ints
    slices: Sequence[str | None]
    targets: Ints
    answers: tuple[Ints, Ints]
    classes: tuple[str, ...]

    @property
    def n(self) -> int:
        """Number of items."""
        return len(self.groups)

    @cached_property
    def group_count(self) -> int:
        """Number of groups; `n` where every item stands alone."""
        return int(self.groups.max()) + 1 if self.n else 0

    @property
    def grouped(self) -> bool:
        """Whether any two items belong together."""
        return self.group_count < self.n

    @property
    def metrics(self) -> list[str]:
        """The metrics that can be compared, macro-F1 last where there are classes."""
        return [*self.scores, MACRO_F1] if self.classes else list(self.scores)

    def slice_names(self) -> list[str]:
        """The slices there are, in order."""
        return sorted({name for name in self.slices if name is not None})

    def of_slice(self, name: str) -> Pairs:
        """The items of one slice."""
        return self.take(np.flatnonzero([one == name for one in self.slices]))

    def take(self, baseline: Ints, candidate: Ints | None = None, groups: Ints | None = None) -> Pairs:
        """Other items from these, each as often as it is named.

        Args:
            baseline: whose baseline side, [m].
            candidate: whose candidate side, [m]; the same items unless a made-up pairing is wanted.
            groups: groups of the m items, any codes; None keeps those of the baseline's items.
        """
        other = baseline if candidate is None else candidate
        codes = self.groups[baseline] if groups is None else groups
        return Pairs(
            scores={name: (left[baseline], right[other]) for name, (left, right) in self.scores.items()},
            expenses={name: (left[baseline], right[other]) for name, (left, right) in self.expenses.items()},
            groups=np.unique(codes, return_inverse=True)[1].astype(np.int64),
            slices=[self.slices[index] for index in baseline] if any(self.slices) else [None] * len(baseline),
            targets=self.targets[baseline],
            answers=(self.answers[0][baseline], self.answers[1][other]),
            classes=self.classes,
        )


def make_pairs(baseline: Sequence[ItemOutcome], candidate: Sequence[ItemOutcome], labels: Sequence[str]) -> Pairs:
    """Arrays of outcomes that were found comparable; both sides hold the same items in the same order.

    Args:
        baseline: what runs today.
        candidate: what wants its place.
        labels: the classes there are. With none, they are taken from the targets if each item has one, at most a
            hundred differ, and both sides answer; then macro-F1 can be compared.
    """
    names = list(baseline[0].scores)
    classes = tuple(labels) or _classes(baseline, candidate)
    index = {label: position for position, label in enumerate(classes)}

    def answers(side: Sequence[ItemOutcome]) -> Ints:
        return np.array([index.get(outcome.prediction.strip(), NO_CLASS) for outcome in side], dtype=np.int64)

    return Pairs(
        scores={
            name: (
                np.array([outcome.scores[name] for outcome in baseline], dtype=np.float64),
                np.array([outcome.scores[name] for outcome in candidate], dtype=np.float64),
            )
            for name in names
        },
        expenses=_expenses(baseline, candidate),
        groups=_codes([outcome.group for outcome in baseline]),
        slices=[outcome.slice for outcome in baseline],
        targets=np.array([index.get(outcome.target.strip(), NO_CLASS) for outcome in baseline], dtype=np.int64),
        answers=(answers(baseline), answers(candidate)),
        classes=classes,
    )


def scores_of(pairs: Pairs, metric: str, where: str) -> tuple[Floats, Floats]:
    """Both sides' scores of a metric that is a mean over items.

    Raises:
        NotComparableError: the outcomes do not have it.
    """
    found = pairs.scores.get(metric)
    if found is None:
        fix = "name a metric that they have, or score the answers with it"
        if metric == MACRO_F1:
            fix = "give every item the columns `target` and `prediction`: macro-F1 is worked out from them"
        raise NotComparableError(
            f"The outcomes have no {metric}, but {', '.join(sorted(pairs.metrics))}.", where=where, fix=fix
        )
    return found


def _classes(baseline: Sequence[ItemOutcome], candidate: Sequence[ItemOutcome]) -> tuple[str, ...]:
    targets = sorted({outcome.target.strip() for outcome in baseline})
    # An empty answer is an answer, but a side with no other has none: a file of scores alone.
    answered = all(any(outcome.prediction for outcome in side) for side in (baseline, candidate))
    if "" in targets or not answered:
        return ()
    return tuple(targets) if 2 <= len(targets) <= min(100, len(baseline) // 2) else ()


def _expenses(baseline: Sequence[ItemOutcome], candidate: Sequence[ItemOutcome]) -> dict[str, tuple[Floats, Floats]]:
    """What every item of both sides has a number for; zero everywhere counts as not measured."""
    found = {}
    for expense in Expense:
        sides = tuple([getattr(outcome, expense.value) for outcome in side] for side in (baseline, candidate))
        if all(value is not None for side in sides for value in side) and all(any(side) for side in sides):
            found[expense.value] = (np.array(sides[0], dtype=np.float64), np.array(sides[1], dtype=np.float64))
    return found


def _codes(groups: Sequence[str | None]) -> Ints:
    """Groups as codes; an item without one gets a code of its own."""
    codes: dict[object, int] = {}
    return np.array(
        [
            codes.setdefault((group, None if group is not None else index), len(codes))
            for index, group in enumerate(groups)
        ],
        dtype=np.int64,
    )
