"""What stages hand on: small frozen records that say where something is, which bytes it has, and how much it holds.

A stage takes the reference type of the stage before it and no other, so the order of the stages is kept by types.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Literal

from tasks.contracts.prompt import Decoding, Prompt
from tasks.contracts.spec import ExecutionSpec, Frozen, Guard, Policy, RetrainSpec, TaskSpec, TrainSpec, knob


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
    """Rows that met every expectation (`rows.jsonl`), the others with their reasons (`quarantine.jsonl`), and what was
    found in rows that go on (`notes.jsonl`).

    `told` counts those by what was found; in `masked` rows something was masked. `data_docs` is the address of the page
    of the Data Docs that holds the result, in a folder of its own.
    """

    kind: Literal["valid"] = "valid"
    rows: int
    quarantined: int
    data_docs: str
    told: dict[str, int] = {}
    masked: int = 0


class GoldenSetRef(Frozen):
    """A frozen golden set: `digest` is the sha256 of its `items.jsonl`."""

    kind: Literal["golden"] = "golden"
    path: str
    digest: str
    items: int


class SuiteRef(Frozen):
    """A frozen set of a task of its own, that guards ask about by `name`."""

    kind: Literal["suite"] = "suite"
    name: str
    task: TaskSpec
    frozen: GoldenSetRef


class SplitsRef(ArtefactRef):
    """`train.jsonl` and `dev.jsonl`, `quarantine.jsonl` (the other rows and their reasons), `report.json` (a funnel,
    and what was found) and `contamination.json`: that no golden item is in the splits, looked up in the splits
    themselves.
    """

    kind: Literal["splits"] = "splits"
    train_rows: int
    dev_rows: int
    removed: dict[str, int]


CONTAMINATION_FILE = "contamination.json"


class ContaminationReport(Frozen):
    """What of the golden set is in the splits (`contamination.json`).

    Attributes:
        golden_digest: the golden set that was looked for.
        golden_items: how many items it has.
        rows: how many rows of train and dev were looked through.
        near_duplicate: Jaccard similarity of word 3-shingles from which a row counts as a near-duplicate.
        ngram_words: length of the runs of words that were looked for.
        measures: the ways in which a row could be a golden item, each of which was tried on each row.
        found: rows found by each measure; empty when it is clean.
    """

    golden_digest: str
    golden_items: int
    rows: int
    near_duplicate: float
    ngram_words: int
    measures: tuple[str, ...]
    found: dict[str, int]


class BaseModelRef(ArtefactRef):
    """A base model as safetensors with tokenizer and chat template (`model/`)."""

    kind: Literal["base_model"] = "base_model"
    source: str


class DevLossLimit(Frozen):
    """Training is given up at the look number `look` (from 1) if the best dev loss so far is above `dev_loss`."""

    look: int
    dev_loss: float


class TrainRequest(Frozen):
    """Everything that training needs, wherever it runs: the parameter of the `train` flow.

    `execution` says where store and tracking server are; on another machine both must be reachable there.

    Attributes:
        accept_risks: guards that are overridden, with reasons.
        stop_above: looks at which a training that is no better than others were is given up (a sweep's pruning).
        within: key of the MLflow run that this training's run is nested in (a sweep's); None for none.
    """

    name: str
    task: TaskSpec
    splits: SplitsRef
    base: BaseModelRef
    recipe: TrainSpec
    accept_risks: dict[Guard, str] = {}
    stop_above: tuple[DevLossLimit, ...] = ()
    within: str | None = None
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
        group: items that belong together share it; the gate resamples them together.
        cost: money for this answer, in any one currency; None where nothing says.
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
    cost: float | None = None


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
    """One metric of both models on the same items, of the whole set, of a slice of it, or of a suite.

    `low` and `high` bound the difference (candidate minus baseline) at `confidence`; `baseline_low` .. `candidate_high`
    bound the two values alone. `method` names how the difference was bounded.
    """

    metric: str
    slice: str | None = None
    suite: str | None = None
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


class Ask(StrEnum):
    """What a requirement asks of a candidate."""

    SUPERIOR = "superior"
    NON_INFERIOR = "non_inferior"
    FLOOR = "floor"
    RATIO = "ratio"


class Status(StrEnum):
    """What the outcomes say of a requirement."""

    SHOWN = "shown"
    FAILED = "failed"
    OPEN = "open"


class Requirement(Frozen):
    """One thing that the policy asks, and what the outcomes say of it.

    `estimate`, `low` and `high` are a difference (superior, non_inferior), the candidate's value (floor), or candidate
    over baseline (ratio). The requirement is shown if the whole interval lies on the right side of `limit` (above it;
    for a ratio below it), failed if it lies on the other side, and open otherwise.

    Attributes:
        level: one-sided error level of the end that shows it.
        fail_level: one-sided error level of the end that fails it; for guards it is shared over them by Holm.
        p_value: one-sided, of "not met"; below `level` when it is shown.
        method: how it was bounded and tested.
        n: items that it rests on.
        groups: groups that they form, each counted as one draw; equals `n` where items stand alone.
        decides: it is about the deciding metric (or the saving), and no guard.
    """

    ask: Ask
    metric: str
    slice: str | None = None
    suite: str | None = None
    limit: float
    estimate: float
    low: float
    high: float
    level: float
    fail_level: float
    p_value: float
    status: Status
    method: str
    n: int
    groups: int
    decides: bool


class Look(Frozen):
    """One look of one candidate at a golden set, as the ledger numbers it.

    Attributes:
        page: what the look was at: sha256 of the golden set.
        number: 1 for the first look at this page; None where no ledger was kept.
        level: error level that this look may spend.
        spent: what all looks so far have spent, this one included.
        budget: what the page may spend in all (`policy.alpha`).
        promotions: how many earlier looks at this page promoted.
        repeated: the same candidate was judged against the same baseline before; this is no new look.
        first_outcome: what was said then; None for a new look.
        same_answers: the answers are those of then; True for a new look.
    """

    page: str
    number: int | None
    level: float
    spent: float
    budget: float
    promotions: int = 0
    repeated: bool = False
    first_outcome: Outcome | None = None
    same_answers: bool = True


class SelfTest(Frozen):
    """The gate on a baseline against no-better versions of itself: how often it would have promoted one.

    Attributes:
        histories: how many made-up histories were judged.
        looks: candidates in each history.
        promotions: histories with a promotion, each of them false.
        rejections: histories whose every candidate was rejected or open, with at least one rejection.
        rate: promotions over histories.
        low: lower end of its exact 99 % interval; above `alpha` the policy cannot be armed.
        high: upper end of the same interval.
        alpha: what the policy promises.
        noise: where the differences came from ("resampled", "two evaluations").
    """

    histories: int
    looks: int
    promotions: int
    rejections: int
    rate: float
    low: float
    high: float
    alpha: float
    noise: str


class Verdict(Frozen):
    """What the gate decided, with everything that is needed to doubt it.

    Attributes:
        reasons: sentences a person can read, the deciding one first.
        requirements: everything that was asked, the deciding ones first.
        wins: items on which the candidate scores higher on the deciding metric.
        losses: items on which the baseline does.
        groups: groups that the items form; equals `n` where items stand alone.
        p_value: one-sided, of "not met", of the deciding requirement.
        smallest_effect: the smallest true difference that these items show with 80 % power; None if there is none.
        items_to_settle: about how many items in all would settle it; None unless inconclusive.
        look: which look at the golden set this was, and what it may spend.
        self_test: how the policy did on a baseline against itself; None where it was not asked.
        withheld: the ladder is in force: numbers are not to be shown to whoever makes candidates.
        digests: sha256 of `data`, `golden_set`, `candidate`, `baseline`, `candidate_outcomes`, `baseline_outcomes`, and
            of `contamination`, the report that says that no golden item is in the training data.
    """

    outcome: Outcome
    reasons: tuple[str, ...]
    policy: Policy
    requirements: tuple[Requirement, ...]
    metrics: tuple[MetricComparison, ...]
    p_value: float
    wins: int
    losses: int
    ties: int
    n: int
    groups: int
    smallest_effect: float | None
    items_to_settle: int | None
    look: Look
    self_test: SelfTest | None
    withheld: bool
    candidate: SystemUnderTest
    baseline: SystemUnderTest
    digests: dict[str, str]


class VerdictRef(ArtefactRef):
    """A verdict that is kept (`verdict.json`, and both outcome files beside it)."""

    kind: Literal["verdict"] = "verdict"
    verdict: Verdict


class Approval(Frozen):
    """A person's answer to "may this candidate be promoted?"; good for the candidate with this digest alone."""

    approve: bool = knob(0, "Whether the candidate may be promoted.")
    by: str = knob(1, "Who decides this.", min_length=1, max_length=200)
    comment: str = knob(2, "Why; it goes into the certificate.", min_length=1, max_length=2000)
    candidate: str = knob(
        3, "sha256 of the candidate that is meant; another one is refused.", pattern=r"^[0-9a-f]{64}$"
    )


class ReleaseKind(StrEnum):
    """Why a candidate goes into the registry, or why not."""

    BY_VERDICT = "by_verdict"  # PROMOTE, and the policy asks nobody
    APPROVED = "approved"  # PROMOTE, and a person agreed
    FORCED = "forced"  # the verdict is not PROMOTE, and a person overrode it
    DECLINED = "declined"  # PROMOTE, and a person said no
    AWAITING = "awaiting"  # PROMOTE, and nobody has answered yet
    NOT_PROMOTED = "not_promoted"  # the verdict is not PROMOTE


class Release(Frozen):
    """What follows from a verdict, with the person's word where one was asked or given.

    `by` and `reason` are that person's name and comment; `at` is when it was decided. All are None where no person was.
    """

    kind: ReleaseKind
    by: str | None = None
    reason: str | None = None
    at: datetime | None = None

    @property
    def promoted(self) -> bool:
        """Whether the candidate goes into the registry."""
        return self.kind in (ReleaseKind.BY_VERDICT, ReleaseKind.APPROVED, ReleaseKind.FORCED)


class CertificateRef(ArtefactRef):
    """A signed statement about a promotion (`certificate.json`, a DSSE envelope) and all that it rests on (`evidence/`:
    the verdict and both models' outcomes).
    """

    kind: Literal["certificate"] = "certificate"
    key_id: str
    release: Release


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
    release: Release
    folder: str
    registered: RegisteredModelRef | None
