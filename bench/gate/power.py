"""How often each gate lets a candidate through that is better, and one that is not: Goldgate, evalsig, statgate.

All judge the same simulated data sets. Goldgate decides at a one-sided 5 % (a single look) and, in a second column, at
the 2.5 % that its default policy gives the first look.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.gate.calibrate import SEED, confusion, levels, true_macro_f1
from bench.gate.environment import ask_peers
from bench.gate.judge import METRIC, Floats, Ints, difference_promotes, rate_of, score_pairs
from tasks.contracts.references import ItemOutcome
from tasks.contracts.spec import MACRO_F1, Policy
from tasks.gate.decide import Comparison, decide
from tasks.gate.pairs import Pairs

RESAMPLES = 2_000  # of the peers; their default of 10,000 takes five times as long and changes few verdicts (measured)
LEVEL, FIRST_LOOK = 0.05, float(levels("alpha_spending")[0])
Row = dict[str, Any]
Jobs = dict[str, dict[str, Any]]

EVALSIG = {"n_resamples": RESAMPLES}
STATGATE = {"resamples": RESAMPLES, "permutations": 100}  # its verdict takes no notice of the permutation test
CLUSTERED = EVALSIG | {"cluster": "group"}
AS_CASES = STATGATE | {"groups_as_cases": True}


@dataclass(frozen=True)
class Scenario:
    """One kind of data.

    Attributes:
        family: the table that it belongs to.
        name: what is simulated.
        n: items.
        truth: the true difference.
        limit: what must be exceeded; a candidate at or below it should not be let through.
        data_sets: how many.
        draw: baseline and candidate scores, [data sets, n].
        evalsig: its options by column; none where it has no such decision.
        statgate: the same.
        groups: which items belong together, [n].
    """

    family: str
    name: str
    n: int
    truth: float
    limit: float
    data_sets: int
    draw: Callable[[np.random.Generator, int, int], tuple[Floats, Floats]]
    evalsig: Jobs = field(default_factory=dict)
    statgate: Jobs = field(default_factory=dict)
    groups: Ints | None = None


def binary(truth: float, discordance: float, accuracy: float = 0.8) -> Callable[..., tuple[Floats, Floats]]:
    """Right or wrong, each item on its own."""

    def draw(rng: np.random.Generator, data_sets: int, n: int) -> tuple[Floats, Floats]:
        win, loss = (discordance + truth) / 2, (discordance - truth) / 2
        baseline = rng.random((data_sets, n)) < accuracy
        turned = rng.random((data_sets, n)) < np.where(baseline, loss / accuracy, win / (1 - accuracy))
        return baseline.astype(float), (baseline ^ turned).astype(float)

    return draw


def grouped(truth: float, discordance: float, size: int = 5) -> Callable[..., tuple[Floats, Floats]]:
    """Right or wrong; seven of ten items do as their group does, so that changes correlate by 0.5 within it."""

    def draw(rng: np.random.Generator, data_sets: int, n: int) -> tuple[Floats, Floats]:
        win, loss = (discordance + truth) / 2, (discordance - truth) / 2
        edges = np.array([loss, 1 - win])

        def change(count: int) -> Ints:
            return np.searchsorted(edges, rng.random((data_sets, count)), side="right") - 1

        common = np.repeat(change(n // size), size, axis=1)
        moved = np.where(rng.random((data_sets, n)) < np.sqrt(0.5), common, change(n))
        baseline = np.where(moved == 0, rng.random((data_sets, n)) < 0.75, moved < 0)
        return baseline.astype(float), (baseline + moved).astype(float)

    return draw


def graded(truth: float) -> Callable[..., tuple[Floats, Floats]]:
    """Five fields an item, each right with the item's own probability: scores of 0, 0.2 ... 1."""

    def draw(rng: np.random.Generator, data_sets: int, n: int) -> tuple[Floats, Floats]:
        chance = rng.uniform(0.3, 0.85, size=(data_sets, n))
        before = rng.random((data_sets, n, 5)) < chance[:, :, None]
        same = rng.random((data_sets, n, 5)) < 0.6  # as the baseline has it, but for what is newly right
        again = rng.random((data_sets, n, 5)) < chance[:, :, None]
        gained = rng.random((data_sets, n, 5)) < truth / (1 - chance[:, :, None])
        return before.mean(axis=2), (np.where(same, before, again) | gained).mean(axis=2)

    return draw


def lopsided(rng: np.random.Generator, data_sets: int, n: int) -> tuple[Floats, Floats]:
    """A graded score with many small gains and few large losses; no difference in the mean."""
    change = rng.choice([-0.6, -0.2, 0.0, 0.1, 0.2], p=[0.05, 0.10, 0.45, 0.30, 0.10], size=(data_sets, n))
    return np.full((data_sets, n), 0.7), 0.7 + change


def scenarios(scale: float) -> Iterator[Scenario]:
    """Everything that is compared."""
    for n, data_sets in ((100, 1_000), (300, 1_000), (1000, 500)):
        data_sets = max(20, int(data_sets * scale))
        for truth in (0.0, 0.03, 0.05, 0.1):
            for discordance in (truth + 0.06, 0.3):
                draw = binary(truth, discordance)
                name = f"{discordance:.0%} of the answers change"
                yield Scenario(
                    "right or wrong",
                    name,
                    n,
                    truth,
                    0.0,
                    data_sets,
                    draw,
                    evalsig={"evalsig": EVALSIG},
                    statgate={"statgate": STATGATE},
                )
    theirs: Jobs = {"evalsig": CLUSTERED, "evalsig, not told": EVALSIG}
    its: Jobs = {"statgate": STATGATE, "statgate, groups as cases": AS_CASES}
    for n, truths in ((100, (0.0, 0.1)), (300, (0.0, 0.05, 0.1)), (1000, (0.0, 0.05))):
        groups, data_sets = np.arange(n) // 5, max(20, int((500 if n < 1000 else 250) * scale))
        for truth in truths:
            draw, name = grouped(truth, 0.2), f"{n // 5} groups of 5"
            yield Scenario("grouped", name, n, truth, 0.0, data_sets, draw, groups=groups, evalsig=theirs, statgate=its)
    for n in (100, 300):
        for truth in (0.0, 0.03, 0.05):
            yield Scenario(
                "graded",
                "five fields",
                n,
                truth,
                0.0,
                max(20, int(500 * scale)),
                graded(truth),
                evalsig={"evalsig": EVALSIG},
                statgate={"statgate": STATGATE},
            )
    for n in (50, 300):
        name = "many small gains, few large losses"
        yield Scenario(
            "graded",
            name,
            n,
            0.0,
            0.0,
            max(20, int(500 * scale)),
            lopsided,
            evalsig={"evalsig": EVALSIG},
            statgate={"statgate": STATGATE},
        )
    for n in (300, 1000):
        few = max(20, int(500 * scale))
        better: Jobs = {"evalsig": EVALSIG | {"min_delta": 0.02}}
        for truth in (0.02, 0.08):
            draw = binary(truth, 0.15)
            yield Scenario("better by 2 points", "15% change", n, truth, 0.02, few, draw, evalsig=better)
        worse: Jobs = {"statgate": STATGATE | {"margin": 0.02}}
        for truth, discordance in ((-0.02, 0.02), (-0.02, 0.15), (0.0, 0.02), (0.0, 0.15)):
            draw, name = binary(truth, discordance), f"{discordance:.0%} change"
            yield Scenario("not worse by 2 points", name, n, truth, -0.02, few, draw, statgate=worse)
    draw = binary(-0.02, 0.02)
    worse = {"statgate": STATGATE | {"margin": 0.02}}
    few = max(20, int(1_000 * scale))
    yield Scenario("not worse by 2 points", "2% change", 50, -0.02, -0.02, few, draw, statgate=worse)


def _ours(task: tuple[Floats, Floats, Ints | None, float, float]) -> list[bool]:
    baselines, candidates, groups, limit, level = task
    return [
        difference_promotes(score_pairs(before, after, groups), METRIC, limit, level)
        for before, after in zip(baselines, candidates, strict=True)
    ]


def power(scale: float, workers: int) -> list[Row]:
    """One row a scenario and column."""
    rng = np.random.default_rng(SEED)
    wanted = list(scenarios(scale))
    arrays: dict[str, np.ndarray] = {}
    jobs: list[dict[str, Any]] = []
    columns: list[tuple[int, str]] = []
    ours: list[tuple[Floats, Floats, Ints | None, float, float]] = []
    for number, one in enumerate(wanted):
        before, after = one.draw(rng, one.data_sets, one.n)
        arrays |= {f"{number}.baseline": before, f"{number}.candidate": after}
        if one.groups is not None:
            arrays[f"{number}.groups"] = one.groups
        ours += [(before, after, one.groups, one.limit, level) for level in (LEVEL, FIRST_LOOK)]
        for tool, options in (("evalsig", one.evalsig), ("statgate", one.statgate)):
            for column, settings in options.items():
                jobs.append({"data": str(number), "tool": tool, "options": settings})
                columns.append((number, column))
    with ProcessPoolExecutor(workers) as pool:
        verdicts = list(pool.map(_ours, ours))
    answers = [(index // 2, ("Goldgate", "Goldgate, first look")[index % 2], a) for index, a in enumerate(verdicts)]
    theirs = ask_peers("decide", arrays, jobs, str(workers))
    answers += [(number, column, answer) for (number, column), answer in zip(columns, theirs, strict=True)]
    rows = []
    for number, column, answer in sorted(answers, key=lambda found: found[0]):
        one = wanted[number]
        shown = {key: getattr(one, key) for key in ("family", "name", "n", "truth", "limit")}
        rows.append(shown | {"scenario": number, "gate": column} | rate_of(sum(answer), len(answer)))
    return rows


# -- ten looks --------------------------------------------------------------------------------------------------------


def ten_looks(scale: float, workers: int) -> list[Row]:
    """Ten candidates that are no better, one golden set of 300 items: how often is any let through?"""
    histories, looks, n, accuracy, share = max(20, int(500 * scale)), 10, 300, 0.8, 0.15 / 2
    rng = np.random.default_rng(SEED + 1)
    baseline = rng.random((histories, 1, n)) < accuracy
    turned = rng.random((histories, looks, n)) < np.where(baseline, share / accuracy, share / (1 - accuracy))
    after = (baseline ^ turned).astype(float).reshape(-1, n)
    before = np.broadcast_to(baseline, (histories, looks, n)).astype(float).reshape(-1, n)
    arrays = {"ten.baseline": before, "ten.candidate": after}
    jobs = [
        {"data": "ten", "tool": "evalsig", "options": EVALSIG},
        {"data": "ten", "tool": "statgate", "options": STATGATE},
    ]
    answers = dict(zip(("evalsig", "statgate"), ask_peers("decide", arrays, jobs, str(workers)), strict=True))
    for policy in ("alpha_spending", "ladder", "off"):
        by_look = levels(policy)
        answers[f"Goldgate, {policy}"] = [
            difference_promotes(score_pairs(one, other), METRIC, 0.0, float(by_look[index % looks]))
            for index, (one, other) in enumerate(zip(before, after, strict=True))
        ]
    answers["higher accuracy"] = list(after.sum(axis=1) > before.sum(axis=1))
    return [
        {"gate": gate} | rate_of(int(np.reshape(answer, (histories, looks)).any(axis=1).sum()), histories)
        for gate, answer in answers.items()
    ]


# -- macro-F1, which neither peer has ---------------------------------------------------------------------------------


def macro_f1_power(scale: float) -> list[Row]:
    """Goldgate alone: eight uneven classes, every recall higher by as much as moves macro-F1 by so many points."""
    shares = (0.3, 0.2, 0.15, 0.12, 0.1, 0.07, 0.04, 0.02)
    names = tuple(f"class {number}" for number in range(len(shares)))
    rng = np.random.default_rng(SEED + 2)
    rows = []
    for n in (300, 1000):
        for higher in (0.0, 0.05, 0.1):
            before, after = np.full(8, 0.7), np.full(8, 0.7 + higher)
            truth = true_macro_f1(confusion(shares, after)) - true_macro_f1(confusion(shares, before))
            data_sets, shown = max(20, int(300 * scale)), 0
            for _ in range(data_sets):
                targets = rng.choice(8, size=n, p=shares)
                hard = rng.random(n)
                answers = []
                for recalls in (before, after):
                    chance = np.where(rng.random(n) < 0.7, hard, rng.random(n))
                    other = (targets + rng.integers(1, 8, n)) % 8
                    answers.append(np.where(chance < recalls[targets], targets, other))
                scores = {METRIC: ((answers[0] == targets) * 1.0, (answers[1] == targets) * 1.0)}
                alone = np.arange(n)
                pairs = Pairs(scores, {}, alone, [None] * n, targets, (answers[0], answers[1]), names)
                shown += difference_promotes(pairs, MACRO_F1, 0.0, LEVEL)
            row: Row = {"n": n, "truth": truth, "limit": 0.0, "gate": "Goldgate"}
            rows.append(row | rate_of(shown, data_sets))
    return rows


# -- the peers' resamples, and time -----------------------------------------------------------------------------------


def resamples_matter(scale: float, workers: int) -> dict[str, float]:
    """Share of verdicts that are the same with the peers' default of 10,000 resamples."""
    rng = np.random.default_rng(SEED + 3)
    data_sets = max(20, int(200 * scale))
    before, after = graded(0.03)(rng, data_sets, 100)
    one, other = binary(0.05, 0.15)(rng, data_sets, 300)
    arrays = {"a.baseline": before, "a.candidate": after, "b.baseline": one, "b.candidate": other}
    jobs = [
        {"data": "a", "tool": "evalsig", "options": EVALSIG},
        {"data": "a", "tool": "evalsig", "options": {}},
        {"data": "b", "tool": "statgate", "options": STATGATE},
        {"data": "b", "tool": "statgate", "options": {"permutations": 100}},
    ]
    answers = ask_peers("decide", arrays, jobs, str(workers))
    agree = [float(np.mean(np.equal(answers[index], answers[index + 1]))) for index in (0, 2)]
    return {"data_sets": data_sets, "evalsig": agree[0], "statgate": agree[1]}


def outcomes(scores: Floats, groups: Ints | None) -> list[ItemOutcome]:
    """Scores as the gate is handed them."""
    return [
        ItemOutcome(
            id=f"i{number:05d}", text="", target="", prediction="", scores={METRIC: float(score), "valid_output": 1.0},
            latency_ms=0.0, prompt_tokens=0, output_tokens=0, group=None if groups is None else f"g{groups[number]}",
        )
        for number, score in enumerate(scores)
    ]  # fmt: skip


def times(scale: float) -> list[Row]:
    """Median seconds of a decision, in turns on the same machine, each with its own defaults."""
    rng = np.random.default_rng(SEED + 4)
    count = max(4, int(12 * scale))
    kinds = {
        "right or wrong, 300 items": (300, binary(0.05, 0.15), None),
        "right or wrong, 1,000 items": (1000, binary(0.05, 0.15), None),
        "60 groups of 5": (300, grouped(0.1, 0.2), np.arange(300) // 5),
        "graded, 300 items": (300, graded(0.03), None),
    }
    rows = []
    for name, (n, draw, groups) in kinds.items():
        before, after = draw(rng, count, n)
        arrays = {"x.baseline": before, "x.candidate": after} | ({} if groups is None else {"x.groups": groups})
        jobs = [
            {"data": "x", "tool": "evalsig", "options": {} if groups is None else {"cluster": "group"}},
            {"data": "x", "tool": "statgate", "options": {} if groups is None else {"groups_as_cases": True}},
        ]
        seconds: dict[str, list[float]] = {"Goldgate": [], "evalsig": [], "statgate": []}
        sides = [(outcomes(one, groups), outcomes(other, groups)) for one, other in zip(before, after, strict=True)]
        for _ in range(3):
            for index, (one, other) in enumerate(sides):
                start = time.perf_counter()
                decide(Comparison(one, other), Policy(), level=LEVEL)
                if index:
                    seconds["Goldgate"].append(time.perf_counter() - start)
            for tool, found in zip(("evalsig", "statgate"), ask_peers("time", arrays, jobs), strict=True):
                seconds[tool] += found
        rows += [{"kind": name, "gate": gate, "seconds": statistics.median(found)} for gate, found in seconds.items()]
    return rows
