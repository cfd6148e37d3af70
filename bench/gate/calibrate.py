"""How often candidates that are no better are promoted: simulated histories of 1 to 52 looks at one golden set.

Every true difference lies exactly on the limit of what may not be promoted, so each rate is the largest there is. The
counts (or arrays) are simulated, the verdicts are those of the gate's own code. What its first test must refuse is not
handed on to the others (`_possible`), and a random part of what was left out is judged all the same, as an audit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binom, norm

from bench.gate.judge import (
    METRIC,
    Floats,
    Ints,
    counts_promote,
    difference_promotes,
    pairs_promote,
    rate_of,
    score_pairs,
)
from tasks.contracts.spec import MACRO_F1, LookPolicy, Objective, Policy
from tasks.gate.effects import difference_of, expense_ratio
from tasks.gate.looks import MOST_LOOKS, look_level
from tasks.gate.pairs import Pairs
from tasks.gate.statistics import _score_statistics

SEED = 20_260
HISTORIES = 20_000
# Of the histories that are written at each cell: a fifth takes some minutes on two cores, and gives each policy more
# than 400,000 histories in all.
SHARE = 0.2
LOOKS = (1, 10, 52)
MOST = max(LOOKS)
AUDITED = 100

POLICIES = {
    "alpha_spending": Policy(),
    "bonferroni": Policy(looks=LookPolicy.BONFERRONI, declared_looks=MOST),
    "ladder": Policy(looks=LookPolicy.LADDER),
    "off": Policy(looks=LookPolicy.OFF),
}
ALPHA = Policy().alpha
Row = dict[str, Any]


@cache
def levels(policy: str) -> Floats:
    """The level of each look of a history in which nothing was promoted before."""
    return np.array([look_level(POLICIES[policy], number, 0) for number in range(1, MOST + 1)])


# -- right or wrong, items that stand alone ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Counted:
    """Candidates against one baseline on one golden set, all with the same true difference `limit`.

    Attributes:
        n: items.
        accuracy: the baseline's true accuracy.
        discordance: share of items on which candidate and baseline differ.
        limit: the true difference, and what must be exceeded.
        shared: share of a candidate's changed answers that come from the recipe, alike in all candidates of a history.
        histories: how many are simulated.
    """

    n: int
    accuracy: float
    discordance: float
    limit: float
    shared: float
    histories: int


def counted_cells(scale: float) -> Iterator[Counted]:
    """Sizes, accuracies, discordances, limits, and candidates of their own or of one recipe."""
    for n in (50, 200, 1000, 5000):
        for accuracy in (0.5, 0.8, 0.98):
            for limit in (0.0, 0.02, -0.02):
                for discordance in _discordances(accuracy, limit):
                    dear = limit != 0 and discordance > 0.1  # the exact test off zero takes 2 to 100 ms
                    if dear and accuracy != 0.8:
                        continue
                    histories = {200: 10_000, 1000: 3_000, 5000: 1_000}.get(n, HISTORIES) if dear else HISTORIES
                    for shared in (0.0, 0.8):
                        yield Counted(n, accuracy, discordance, limit, shared, max(200, int(histories * scale)))


def _discordances(accuracy: float, limit: float) -> list[float]:
    few = 0.03 if limit == 0 else abs(limit)
    many = min(0.3, 2 * (1 - accuracy) - limit, 2 * accuracy + limit)
    return [few, many] if many > few + 0.01 else [few]


def simulate_counts(cell: Counted, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Wins and losses of each look, [histories, looks].

    The baseline's answers are drawn once a history; a candidate gets right what the baseline has wrong with one
    probability, and wrong what it has right with another.
    """
    size = (cell.histories, MOST)
    right = rng.binomial(cell.n, cell.accuracy, size=(cell.histories, 1))
    win, loss = (cell.discordance + cell.limit) / 2, (cell.discordance - cell.limit) / 2

    def changed(items: Ints, probability: float) -> Ints:
        of_recipe = rng.binomial(items, probability)
        kept = rng.binomial(of_recipe, cell.shared + (1 - cell.shared) * probability, size=size)
        return kept + rng.binomial(items - of_recipe, (1 - cell.shared) * probability, size=size)

    return changed(cell.n - right, min(1.0, win / (1 - cell.accuracy))), changed(right, min(1.0, loss / cell.accuracy))


def run_counted(cell: Counted, seed: int) -> list[Row]:
    """Every policy, and a gate that compares two accuracies, on the same histories."""
    rng = np.random.default_rng((SEED, seed))
    wins, losses = simulate_counts(cell, rng)
    statistics = _score_statistics(wins, losses, cell.n, cell.limit)
    rows: list[Row] = []

    def judge(history: int, look: int, level: float) -> bool:
        return counts_promote(int(wins[history, look]), int(losses[history, look]), cell.n, cell.limit, level)

    for policy in POLICIES:
        looks = LOOKS if policy != "off" or cell.limit == 0 else LOOKS[:1]
        possible = statistics >= norm.isf(levels(policy)) - 1e-9  # else the interval holds the limit
        possible[:, max(looks) :] = False
        first = _first(possible, lambda history, look, p=policy: judge(history, look, float(levels(p)[look])))
        left_out = ~possible[:, : max(looks)]
        _audit(left_out, lambda history, look, p=policy: judge(history, look, float(levels(p)[look])), rng)
        rows += _rates(asdict(cell) | {"kind": "counted", "policy": policy}, first, looks)
    ahead = wins - losses - cell.n * cell.limit
    for name, promoted in (("naive >", ahead > 1e-9), ("naive >=", ahead > -1e-9)):
        first = np.where(promoted.any(axis=1), promoted.argmax(axis=1), MOST)
        rows += _rates(asdict(cell) | {"kind": "counted", "policy": name}, first, LOOKS)
    return rows


def _first(possible: np.ndarray, judge: Callable[[int, int], bool]) -> Ints:
    """The first look of each history that promotes, `MOST` where none does; only `possible` ones are judged."""
    first = np.full(len(possible), MOST)
    for history, look in zip(*np.nonzero(possible), strict=True):
        if first[history] == MOST and judge(int(history), int(look)):
            first[history] = look
    return first


def _audit(left_out: np.ndarray, judge: Callable[[int, int], bool], rng: np.random.Generator) -> None:
    """Judge a random part of what was left out as impossible."""
    where = np.flatnonzero(left_out)
    for index in rng.choice(where, size=min(AUDITED, len(where)), replace=False):
        history, look = divmod(int(index), left_out.shape[1])
        assert not judge(history, look), "a promotion was left out as impossible"


def _rates(row: Row, first: Ints, looks: tuple[int, ...]) -> list[Row]:
    return [row | {"looks": most} | rate_of(int((first < most).sum()), len(first)) for most in looks]


# -- groups of items and graded scores --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """What the items of a group may add up to, candidate minus baseline, and how likely."""

    size: int
    sums: tuple[float, ...]
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class Summed:
    """Candidates whose groups of items draw their differences from tables; the mean is `limit`.

    Attributes:
        name: what is simulated.
        n: items.
        tables: for each group in turn, over and over.
        limit: the true difference, and what must be exceeded.
        shared: share of groups on which all candidates of a history do as the recipe does.
        lopsided: whether gains and losses about the limit are of different sizes, so that no side can be exchanged.
        looks: of each history.
        histories: how many are simulated.
    """

    name: str
    n: int
    tables: tuple[Table, ...]
    limit: float
    shared: float
    lopsided: bool
    looks: int
    histories: int


def grouped_table(size: int, discordance: float, limit: float, correlation: float) -> Table:
    """The net wins in a group: each item does as its group with probability sqrt(correlation), else as it likes."""
    win, loss = (discordance + limit) / 2, (discordance - limit) / 2
    one = np.array([loss, 1 - win - loss, win])
    sums = np.zeros(2 * size + 1)
    for common in range(size + 1):
        own = np.ones(1)
        for _ in range(size - common):
            own = np.convolve(own, one)
        for direction, chance in zip((-1, 0, 1), one, strict=True):
            start = size + direction * common - (size - common)
            sums[start : start + len(own)] += binom.pmf(common, size, math.sqrt(correlation)) * chance * own
    return Table(size, tuple(np.arange(-size, size + 1).astype(float)), tuple(sums / sums.sum()))


def graded_table(skewed: bool) -> Table:
    """Differences of a graded score with mean zero: alike on both sides, or many small gains and a few large losses."""
    if skewed:
        return Table(1, (-0.6, -0.2, 0.0, 0.1, 0.2), (0.05, 0.10, 0.45, 0.30, 0.10))
    return Table(1, (-0.6, -0.4, -0.2, 0.0, 0.2, 0.4, 0.6), (0.02, 0.05, 0.13, 0.60, 0.13, 0.05, 0.02))


def broken_table(size: int, broken: float) -> Table:
    """A few groups lost as a whole, and as much won by single items of the others: mean zero."""
    win = broken / (1 - broken)
    rest = (1 - broken) * binom.pmf(np.arange(size + 1), size, win)
    return Table(size, (-float(size), *map(float, range(size + 1))), (broken, *map(float, rest)))


def summed_cells(scale: float) -> Iterator[Summed]:
    """Groups of one size and of several, graded scores; limits at zero and off it."""

    def cell(name: str, n: int, tables: tuple[Table, ...], limit: float = 0.0, shared: float = 0.0) -> Summed:
        looks, histories = {50: (52, 20_000), 200: (52, 10_000), 1000: (52, 4_000)}.get(n, (10, 1_000))
        return Summed(name, n, tables, limit, shared, False, looks, max(100, int(histories * scale)))

    def lopsided(name: str, n: int, table: Table, limit: float = 0.0) -> Summed:
        return Summed(name, n, (table,), limit, 0.0, True, MOST, max(100, int(2_000 * scale)))

    for n in (50, 200, 1000, 5000):
        for correlation in (0.3, 0.8):
            yield cell(f"groups of 5, correlation {correlation}", n, (grouped_table(5, 0.2, 0.0, correlation),))
        sizes = tuple(grouped_table(size, 0.2, 0.0, 0.5) for size in (1, 3, 5, 7, 9))
        yield cell("groups of 1 to 9, correlation 0.5", n, sizes)
        if n > 1000:
            continue
        one_recipe = (grouped_table(5, 0.2, 0.0, 0.5),)
        yield cell("groups of 5, correlation 0.5, one recipe", n, one_recipe, shared=0.7)
        yield cell("graded scores, gains as losses", n, (graded_table(skewed=False),))
        for limit in (0.02, -0.02):
            for discordance in (0.03, 0.2):
                name = f"groups of 5, correlation 0.5, {discordance:.0%} of the answers change"
                yield lopsided(name, n, grouped_table(5, discordance, limit, 0.5), limit)
        yield lopsided("graded scores, many small gains, few large losses", n, graded_table(skewed=True))
        yield lopsided("groups of 5, 5 % of them lost as a whole, single wins elsewhere", n, broken_table(5, 0.05))


def run_summed(cell: Summed, seed: int) -> list[Row]:
    """Every policy on the same histories; `off` for one look."""
    rng = np.random.default_rng((SEED, seed))
    groups = _group_sizes(cell)
    sizes = groups.astype(float)
    policies = list(POLICIES)
    firsts: dict[str, list[Ints]] = {policy: [] for policy in policies}
    step = max(1, 4_000_000 // (cell.looks * len(groups)))
    part = 0.0 if cell.lopsided else 0.5  # of the normal quantile; from lopsided sums little can be told beforehand
    least = part * norm.isf(np.stack([levels(policy)[: cell.looks] for policy in policies]))
    least[policies.index("off"), 1:] = np.inf
    codes = np.repeat(np.arange(len(groups)), groups)
    for start in range(0, cell.histories, step):
        size = min(step, cell.histories - start)
        sums = _simulate_sums(cell, groups, size, rng)
        excess = sums - cell.limit * sizes
        spread = np.sqrt((excess**2).sum(axis=2))
        statistics = np.divide(excess.sum(axis=2), spread, out=np.zeros_like(spread), where=spread > 0)
        judge = _SumsJudge(cell, sums, groups, codes)
        for index, policy in enumerate(policies):
            possible = np.zeros((size, MOST), dtype=bool)
            possible[:, : cell.looks] = statistics >= least[index]
            verdict = judge.at(levels(policy))
            firsts[policy].append(_first(possible, verdict))
            if start == 0:
                left_out = ~possible[:, : cell.looks]
                if policy == "off":
                    left_out[:, 1:] = False
                _audit(left_out, verdict, rng)
    shown = {key: value for key, value in asdict(cell).items() if key != "tables"} | {"kind": "summed"}
    rows: list[Row] = []
    for policy in policies:
        looks = tuple(most for most in LOOKS if most <= cell.looks) if policy != "off" else LOOKS[:1]
        rows += _rates(shown | {"groups": len(groups), "policy": policy}, np.concatenate(firsts[policy]), looks)
    return rows


class _SumsJudge:
    """Verdicts on simulated group sums; the cheap test, which knows no level, is made once a look."""

    def __init__(self, cell: Summed, sums: Floats, groups: Ints, codes: Ints) -> None:
        self.cell, self.sums, self.groups, self.codes = cell, sums, groups, codes
        self.quick: dict[tuple[int, int], float] = {}

    def at(self, by_look: Floats) -> Callable[[int, int], bool]:
        """The verdict on a look at its level."""

        def verdict(history: int, look: int) -> bool:
            level = float(by_look[look])
            pairs = self._pairs(history, look)
            if (history, look) not in self.quick:
                effect = difference_of(pairs, METRIC, level)
                self.quick[history, look] = effect.quick_above(self.cell.limit, level)
            if self.quick[history, look] >= level:
                return False
            return difference_promotes(pairs, METRIC, self.cell.limit, level)

        return verdict

    def _pairs(self, history: int, look: int) -> Pairs:
        """Items that add up to these sums: as many whole wins or losses as there are, and what is left on one item."""
        totals = self.sums[history, look]
        place = np.arange(len(self.codes)) - np.repeat(np.cumsum(self.groups) - self.groups, self.groups)
        left = np.clip(np.abs(totals)[self.codes] - place, 0.0, 1.0)
        change = np.sign(totals)[self.codes] * left
        baseline = np.where(change < 0, -change, 0.0)
        return score_pairs(baseline, np.where(change > 0, change, 0.0), self.codes)


def _group_sizes(cell: Summed) -> Ints:
    sizes: list[int] = []
    while sum(sizes) < cell.n:
        sizes.append(cell.tables[len(sizes) % len(cell.tables)].size)
    return np.array(sizes)


def _simulate_sums(cell: Summed, groups: Ints, histories: int, rng: np.random.Generator) -> Floats:
    """[histories, looks, groups]"""
    sums = np.empty((histories, cell.looks, len(groups)))
    for number, table in enumerate(cell.tables):
        columns = np.arange(number, len(groups), len(cell.tables))
        edges, values = np.cumsum(table.probabilities)[:-1], np.array(table.sums)

        def draw(looks: int, edges: Floats = edges, values: Floats = values, count: int = len(columns)) -> Floats:
            return values[np.searchsorted(edges, rng.random((histories, looks, count)), side="right")]

        drawn = draw(cell.looks)
        if cell.shared:
            drawn = np.where(rng.random(drawn.shape) < cell.shared, draw(1), drawn)
        sums[:, :, columns] = drawn
    return sums


# -- macro-F1 ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Classes:
    """Candidates with the same true macro-F1 as the baseline.

    Attributes:
        name: what is simulated.
        n: items.
        shares: how frequent each class is.
        exchanged: whether a candidate errs as the baseline does (a retrain), or in other classes.
        looks: of each history.
        histories: how many are simulated.
    """

    name: str
    n: int
    shares: tuple[float, ...]
    exchanged: bool
    looks: int
    histories: int


def class_cells(scale: float) -> Iterator[Classes]:
    """Few and many items, even and uneven classes."""
    uneven = (0.3, 0.2, 0.15, 0.12, 0.1, 0.07, 0.04, 0.02)
    for n, histories in ((200, 1_500), (1000, 1_000)):
        for shares, word in (((0.25,) * 4, "4 even classes"), (uneven, "8 uneven classes")):
            for exchanged in (True, False):
                name = f"macro-F1, {word}, " + ("a retrain" if exchanged else "errs in other classes")
                yield Classes(name, n, shares, exchanged, 10, max(50, int(histories * scale)))


def confusion(shares: tuple[float, ...], recalls: Floats) -> Floats:
    """P(class, answer): what is not recalled goes to the other classes by their share. [k, k]"""
    share = np.array(shares)
    wrong = share[None, :] * (1 - np.eye(len(share)))
    wrong /= wrong.sum(axis=1, keepdims=True)
    return share[:, None] * (np.diag(recalls) + (1 - recalls)[:, None] * wrong)


def true_macro_f1(matrix: Floats) -> float:
    """Macro-F1 of a confusion matrix."""
    return float(np.mean(2 * np.diag(matrix) / (matrix.sum(axis=0) + matrix.sum(axis=1))))


def equal_recalls(shares: tuple[float, ...]) -> tuple[Floats, Floats]:
    """Recalls of two models with the same true macro-F1: one even, one strong in every other class."""
    even = np.full(len(shares), 0.75)
    turns = np.where(np.arange(len(shares)) % 2 == 0, 0.15, -0.15)
    goal = true_macro_f1(confusion(shares, even))
    shift = brentq(lambda s: true_macro_f1(confusion(shares, even + turns + s)) - goal, -0.2, 0.1)
    return even, even + turns + shift


def run_classes(cell: Classes, seed: int) -> list[Row]:
    """Every policy but `off` on the same histories."""
    rng = np.random.default_rng((SEED, seed))
    k = len(cell.shares)
    even, other = equal_recalls(cell.shares)
    theirs = even if cell.exchanged else other
    policies = [policy for policy in POLICIES if policy != "off"]
    firsts = {policy: np.full(cell.histories, MOST) for policy in policies}
    one_look = np.full(cell.histories, MOST)
    names = tuple(f"class {number}" for number in range(k))
    for history in range(cell.histories):
        targets = rng.choice(k, size=cell.n, p=cell.shares)
        hard = rng.random(cell.n)  # an item's difficulty, alike for both models
        baseline = _answers(targets, even, hard, cell.shares, rng)
        for look in range(cell.looks):
            candidate = _answers(targets, theirs, hard, cell.shares, rng)
            open_ = [policy for policy in policies if firsts[policy][history] == MOST]
            if not open_:
                break
            scores = {METRIC: ((baseline == targets).astype(float), (candidate == targets).astype(float))}
            alone = np.arange(cell.n)
            pairs = Pairs(scores, {}, alone, [None] * cell.n, targets, (baseline, candidate), names)
            statistic = _influence(targets, baseline, candidate, k)
            for policy in open_:
                level = float(levels(policy)[look])
                if statistic >= 0.5 * norm.isf(level) and difference_promotes(pairs, MACRO_F1, 0.0, level):
                    firsts[policy][history] = look
            if look == 0 and statistic >= 0.5 * norm.isf(ALPHA) and difference_promotes(pairs, MACRO_F1, 0.0, ALPHA):
                one_look[history] = 0
            if history < 20 and statistic < 0.5 * norm.isf(ALPHA):
                assert not difference_promotes(pairs, MACRO_F1, 0.0, ALPHA), "a promotion was left out as impossible"
    shown = asdict(cell) | {"kind": "classes", "limit": 0.0, "groups": cell.n}
    rows: list[Row] = []
    for policy in policies:
        rows += _rates(shown | {"policy": policy}, firsts[policy], tuple(m for m in LOOKS if m <= cell.looks))
    return rows + _rates(shown | {"policy": "off"}, one_look, LOOKS[:1])


def _answers(targets: Ints, recalls: Floats, hard: Floats, shares: tuple[float, ...], rng: np.random.Generator) -> Ints:
    """Right with the class's recall; half of the chance is the item's own difficulty, half the model's luck."""
    own = rng.random(len(targets))
    chance = np.where(rng.random(len(targets)) < 0.7, hard, own)
    wrong = rng.choice(len(shares), size=len(targets), p=shares)
    while (same := wrong == targets).any():
        wrong[same] = rng.choice(len(shares), size=int(same.sum()), p=shares)
    return np.where(chance < recalls[targets], targets, wrong)


def _influence(targets: Ints, baseline: Ints, candidate: Ints, k: int) -> float:
    """About the normal statistic of a difference of macro-F1: what each item moves it by, to first order."""
    wanted, before, after = (np.eye(k)[codes] for codes in (targets, baseline, candidate))
    hits = (wanted * (before + after) / 2).sum(axis=0)
    both = np.maximum((wanted + (before + after) / 2).sum(axis=0), 1.0)  # a class that never comes up counts nothing
    each = (2 * wanted * (after - before) / both - 2 * hits * (after - before) / both**2).sum(axis=1)
    spread = float(np.sqrt((each**2).sum()))
    return float(each.sum()) / spread if spread else 0.0


# -- cheaper ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cheaper:
    """Candidates as good as the baseline that save exactly what must be exceeded; latencies are lognormal."""

    name: str
    n: int
    sigma: float
    looks: int
    histories: int


def cheaper_cells(scale: float) -> Iterator[Cheaper]:
    """Latencies with a short and a long tail."""
    for n in (50, 200, 1000):
        for sigma in (0.3, 1.0):
            name = f"not worse and 20 % cheaper, latencies lognormal with sigma {sigma}"
            yield Cheaper(name, n, sigma, 10, max(50, int(2_000 * scale)))


def run_cheaper(cell: Cheaper, seed: int) -> list[Row]:
    """Every policy on the same histories; `off` for one look."""
    rng = np.random.default_rng((SEED, seed))
    policy = Policy(objective=Objective.NON_INFERIOR_AND_CHEAPER, margin=0.2, min_saving=0.2)
    saving = 1 - policy.min_saving
    size = (cell.histories, cell.looks, cell.n)
    before = rng.lognormal(0.0, cell.sigma, size=(cell.histories, 1, cell.n))
    after = saving * rng.lognormal(0.0, cell.sigma, size=size)
    excess = saving * before - after
    statistics = excess.sum(axis=2) / np.sqrt((excess**2).sum(axis=2))
    same = np.ones(cell.n)
    nothing = np.full(cell.n, -1, dtype=np.int64)
    rows: list[Row] = []
    quick: dict[tuple[int, int], float] = {}
    expense = policy.saving_in.value

    def judge(history: int, look: int, level: float) -> bool:
        alone = np.arange(cell.n)
        sides = {expense: (before[history, 0], after[history, look])}
        pairs = Pairs({METRIC: (same, same)}, sides, alone, [None] * cell.n, nothing, (nothing, nothing), ())
        if (history, look) not in quick:
            quick[history, look] = expense_ratio(pairs, expense, level, "").quick_below(saving, level)
        return quick[history, look] < level and pairs_promote(pairs, policy, level)

    for name in POLICIES:
        looks = tuple(most for most in LOOKS if most <= cell.looks) if name != "off" else LOOKS[:1]
        possible = np.zeros((cell.histories, MOST), dtype=bool)
        part = slice(None, max(looks))
        possible[:, part] = statistics[:, part] >= 0.7 * norm.isf(levels(name)[part])
        first = _first(possible, lambda history, look, p=name: judge(history, look, float(levels(p)[look])))
        _audit(~possible[:, part], lambda history, look, p=name: judge(history, look, float(levels(p)[look])), rng)
        shown = asdict(cell) | {"kind": "cheaper", "limit": saving, "groups": cell.n}
        rows += _rates(shown | {"policy": name}, first, looks)
    return rows


# -- somebody who tunes against the verdicts --------------------------------------------------------------------------


@dataclass(frozen=True)
class Attack:
    """Candidates made from what earlier looks let out, as in Blum & Hardt (arXiv 1502.04585), section 4.

    The task has two answers. On `hard` of the n items nobody can do better than toss a coin, and all candidates differ
    from the baseline there alone, so none is better, whatever is known of this golden set. Each look but the last has
    random answers on the hard items; `sees` says what its verdict lets out. The last has the majority of all answers
    before, each turned and weighted by what was seen.
    """

    sees: str
    policy: str
    n: int
    hard: int
    looks: int
    histories: int


def attacks(scale: float) -> Iterator[Attack]:
    """What each policy lets out, and what the ladder would risk without its smaller levels or with per-item results."""
    histories = max(100, int(2_000 * scale))
    for looks in (10, 52, MOST_LOOKS):
        for policy in ("off", "bonferroni", "alpha_spending"):
            if policy != "bonferroni" or looks <= MOST:
                yield Attack("accuracy", policy, 1000, 400, looks, histories)
        yield Attack("ladder", "ladder", 1000, 400, looks, histories)
    yield Attack("items", "alpha_spending", 1000, 400, 2, histories)
    yield Attack("items", "ladder", 1000, 400, 2, histories)


def run_attack(cell: Attack, seed: int) -> list[Row]:
    """How often any look promotes."""
    rng = np.random.default_rng((SEED, seed))
    policy = POLICIES[cell.policy]
    by_look = [look_level(policy, number, 0) for number in range(1, cell.looks + 1)]
    hits = 0
    for _ in range(cell.histories):
        truth = rng.integers(0, 2, cell.hard) * 2 - 1
        baseline = (rng.integers(0, 2, cell.hard) * 2 - 1) * truth > 0
        answers = rng.integers(0, 2, size=(cell.looks - 1, cell.hard)) * 2 - 1
        right = answers * truth > 0
        if cell.sees == "accuracy":
            votes = (right.sum(axis=1) - baseline.sum()) @ answers
        elif cell.sees == "items":
            votes = truth * answers.shape[0]  # whatever was right is kept, and whatever was wrong is turned
        else:  # "not promoted", look after look; a promotion would have ended the history
            votes = answers.sum(axis=0)
        last = np.where(votes == 0, rng.integers(0, 2, cell.hard) * 2 - 1, np.sign(votes)) * truth > 0
        candidates = np.concatenate([right, last[None]])
        wins = (candidates & ~baseline).sum(axis=1)
        losses = (~candidates & baseline).sum(axis=1)
        hits += any(
            counts_promote(int(won), int(lost), cell.n, 0.0, level)
            for won, lost, level in zip(wins, losses, by_look, strict=True)
            if won > lost
        )
    return [asdict(cell) | {"kind": "attack", "limit": 0.0} | rate_of(hits, cell.histories)]


# -- all of it --------------------------------------------------------------------------------------------------------

_RUNS: dict[type, Callable[[Any, int], list[Row]]] = {
    Counted: run_counted,
    Summed: run_summed,
    Classes: run_classes,
    Cheaper: run_cheaper,
    Attack: run_attack,
}


def _run(task: tuple[int, Any]) -> list[Row]:
    seed, cell = task
    return _RUNS[type(cell)](cell, seed)


def calibrate(scale: float, workers: int) -> list[Row]:
    """All cells; one row a cell, policy and number of looks."""
    scale *= SHARE
    cells: list[Any] = [
        *summed_cells(scale),
        *class_cells(scale),
        *cheaper_cells(scale),
        *counted_cells(scale),
        *attacks(scale),
    ]
    tasks = list(enumerate(cells))
    with ProcessPoolExecutor(workers) as pool:
        return [row for rows in pool.map(_run, tasks) for row in rows]
