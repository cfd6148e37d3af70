"""What stages hand on: small frozen records that say where something is, which bytes it has, and how much it holds.

A stage takes the reference type of the stage before it and no other, so the order of the stages is kept by types.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from tasks.contracts.prompt import Decoding, Prompt
from tasks.contracts.spec import ExecutionSpec, Frozen, Guard, Policy, RetrainSpec, TaskSpec, TrainSpec


class ArtefactRef(Frozen):
    """A finished artefact of the store.

    Attributes:
        uri: where its manifest is.
        step: which step made it.
        fingerprint: sha256 of the recipe (step version, configuration, digests of inputs): decides on reuse.
        digest: sha256 over its files: what verdict, registry and serving compare.
        reused: whether this run found it finished.
    """

    uri: str
    step: str
    fingerprint: str
    digest: str
    reused: bool = False


class RawDatasetRef(ArtefactRef):
    """Rows as read (`rows.jsonl`, and `unreadable.jsonl` with the ones that have no text or answer), not yet checked.

    `rows` counts both.
    """

    kind: Literal["raw"] = "raw"
    rows: int


class ValidDatasetRef(ArtefactRef):
    """Rows that met every expectation (`rows.jsonl`), the others with their reasons (`quarantine.jsonl`).

    `data_docs` is the address of the index page of the Data Docs site.
    """

    kind: Literal["valid"] = "valid"
    rows: int
    quarantined: int
    data_docs: str


class GoldenSetRef(Frozen):
    """A frozen golden set: `digest` is the sha256 of its `items.jsonl`."""

    kind: Literal["golden"] = "golden"
    path: str
    digest: str
    items: int


class SplitsRef(ArtefactRef):
    """`train.jsonl` and `dev.jsonl`, `removed.jsonl` (row, reason) and `report.json` (a funnel of counts)."""

    kind: Literal["splits"] = "splits"
    train_rows: int
    dev_rows: int
    removed: dict[str, int]


class BaseModelRef(ArtefactRef):
    """A base model as safetensors with tokenizer and chat template (`model/`)."""

    kind: Literal["base_model"] = "base_model"
    source: str


class TrainRequest(Frozen):
    """Everything that training needs, wherever it runs: the parameter of the `train` flow.

    `execution` says where store and tracking server are; on another machine both must be reachable there.
    """

    name: str
    task: TaskSpec
    splits: SplitsRef
    base: BaseModelRef
    recipe: TrainSpec
    accept_risks: dict[Guard, str] = {}
    execution: ExecutionSpec

    @classmethod
    def of(cls, spec: RetrainSpec, splits: SplitsRef, base: BaseModelRef) -> TrainRequest:
        """The training that a whole run asks for."""
        return cls(
            name=spec.name,
            task=spec.task,
            splits=splits,
            base=base,
            recipe=spec.train,
            accept_risks=dict(spec.curate.accept_risks),
            execution=spec.execution,
        )


class TrainedModelRef(ArtefactRef):
    """What training made: `adapter/` (peft), `merged/` (plain transformers), `curves.jsonl`, `summary.json`.

    Attributes:
        adapter_digest: sha256 over the files of `adapter/`.
        merged_digest: sha256 over the files of `merged/`: the unit that is evaluated, registered and served.
        steps: optimiser steps taken.
        dev_loss: best dev loss, nats per answer token.
        seconds: wall time of training, without merge.
        tokens_per_second: all tokens of the rows trained on (no padding), over `seconds`.
        peak_memory_bytes: largest resident set of the training process (on CUDA: largest device allocation).
        resumed_from_step: the checkpoint that it went on from, 0 for none.
    """

    kind: Literal["trained"] = "trained"
    adapter_digest: str
    merged_digest: str
    steps: int
    dev_loss: float
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    resumed_from_step: int = 0


class SystemUnderTest(Frozen):
    """A model with the prompt that it is asked through.

    Attributes:
        uri: the model (folder, `models:/name@alias`, `openai:<model>`).
        digest: sha256 over the model's files; for a remote model the sha256 of its URI and endpoint.
        prompt: what comes before each item.
        role: what it is in the comparison.
        label: how people call it ("champion v3", "base model, few-shot").
    """

    uri: str
    digest: str
    prompt: Prompt
    role: Literal["candidate", "champion", "base_model", "other"]
    label: str


class Conditions(Frozen):
    """What two evaluations must share to be comparable.

    Attributes:
        golden_digest: sha256 of the items file.
        instruction: the task's instruction (a base model's prompt may spell out more; a tuned model's may not).
        decoding: how answers were drawn.
        engine: which engine ("embedded/transformers 5.19.0/bfloat16", "openai/http://127.0.0.1:8000/v1").
        scorer_version: version of the scoring code.
    """

    golden_digest: str
    instruction: str
    decoding: Decoding
    engine: str
    scorer_version: int


class EvaluationRef(ArtefactRef):
    """Per-item outcomes (`items.jsonl`, one `ItemOutcome` a line) and `summary.json` (an `EvaluationSummary`)."""

    kind: Literal["evaluation"] = "evaluation"
    system: SystemUnderTest
    conditions: Conditions
    items: int
    metrics: dict[str, float]


class ItemOutcome(Frozen):
    """What one model answered to one item, and how it scored.

    Attributes:
        scores: per metric a number in [0, 1]; `exact_match` and `valid_output` are always there.
        confidence: probability of the answer under the decoding used, in [0, 1]; None where the engine has none.
        latency_ms: time of the request; batched engines give the batch's time divided by its items.
    """

    id: str
    text: str
    target: str
    prediction: str
    scores: dict[str, float]
    latency_ms: float
    prompt_tokens: int
    output_tokens: int
    confidence: float | None = None
    group: str | None = None
    slice: str | None = None


class ClassScore(Frozen):
    """Precision, recall and F1 of one label, each in [0, 1]; `support` is how many items have it."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int


class EvaluationSummary(Frozen):
    """One model on one golden set."""

    system: SystemUnderTest
    conditions: Conditions
    items: int
    metrics: dict[str, float]
    classes: tuple[ClassScore, ...] = ()
    latency_p50_ms: float
    latency_p95_ms: float
    prompt_tokens: int
    output_tokens: int
    seconds: float


class Outcome(StrEnum):
    """What a gate can say."""

    PROMOTE = "promote"
    REJECT = "reject"
    INCONCLUSIVE = "inconclusive"


class MetricComparison(Frozen):
    """One metric of both models on the same items.

    `low` and `high` bound the difference (candidate minus baseline) at `confidence`; `baseline_low` .. `candidate_high`
    bound the two values alone. `method` names how the difference was bounded.
    """

    metric: str
    baseline: float
    baseline_low: float
    baseline_high: float
    candidate: float
    candidate_low: float
    candidate_high: float
    difference: float
    low: float
    high: float
    confidence: float
    method: str
    n: int


class Verdict(Frozen):
    """What the gate decided, with everything that is needed to doubt it.

    Attributes:
        reasons: sentences a person can read, the deciding one first.
        wins: items that only the candidate has right.
        losses: items that only the baseline has right.
        p_value: of the one-sided exact test of "no better", on the primary metric.
        items_to_settle: about how many items in all would settle it; None unless inconclusive.
        looks: how many different candidates this golden set has judged in this store, this one included.
        digests: sha256 of `data`, `golden_set`, `candidate`, `baseline`, `candidate_outcomes`, `baseline_outcomes`.
    """

    outcome: Outcome
    reasons: tuple[str, ...]
    policy: Policy
    metrics: tuple[MetricComparison, ...]
    p_value: float
    wins: int
    losses: int
    ties: int
    n: int
    items_to_settle: int | None
    looks: int
    candidate: SystemUnderTest
    baseline: SystemUnderTest
    digests: dict[str, str]


class VerdictRef(ArtefactRef):
    """A verdict that is kept (`verdict.json`, and both outcome files beside it)."""

    kind: Literal["verdict"] = "verdict"
    verdict: Verdict


class RegisteredModelRef(Frozen):
    """A version in the registry."""

    kind: Literal["registered"] = "registered"
    name: str
    version: str
    alias: str
    digest: str
    previous_version: str | None


class RunResult(Frozen):
    """What a whole run hands to whoever started it. `folder` holds `verdict.json` and `report.html`."""

    name: str
    verdict: Verdict
    folder: str
    registered: RegisteredModelRef | None
