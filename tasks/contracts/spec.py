"""What a person sets. One `RetrainSpec` is the whole configuration of a run: the YAML file of the command line,
the form of the Prefect UI and the body of an API call are the same record.

Every field has a description, bounds or choices, and a position, since the Prefect UI renders the schema as a form.
Knobs that nobody should need to turn are not here; they are constants beside the code that uses them, with a reason.
"""

from __future__ import annotations

import os
import re
from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from tasks.contracts.calls import Tools, read_tools


def _title(name: str, _: object) -> str:
    return name.replace("_", " ").capitalize()


class Frozen(BaseModel):
    """A record that cannot be changed and knows all of its fields."""

    # Without a title of its own, a group or a choice appears in the form under the name of its class.
    model_config = ConfigDict(frozen=True, extra="forbid", field_title_generator=_title)


_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def knob(position: int, description: str, **constraints: Any) -> Any:
    """A field of a form: its place in it, what it means, its default and bounds (as `pydantic.Field` takes them).

    Bounds are written behind the description, since the form shows them only once they are broken.
    """
    bounds = ", ".join(f"{words} {constraints[name]:,}" for name, words in _BOUNDS.items() if name in constraints)
    text = f"{description} ({bounds})" if bounds else description
    return Field(description=text, json_schema_extra={"position": position}, **constraints)


def _off(value: Any) -> Any:
    """YAML reads a bare `off` as false."""
    return "off" if value is False else value


def none_there(value: Any) -> bool:
    """Whether a value is left out of a record, so that specs of before its field existed keep their fingerprints."""
    return not value


MACRO_F1 = "macro_f1"  # the metric that is no mean over items


class TaskKind(StrEnum):
    """What kind of answer the model gives."""

    CLASSIFY = "classify"
    EXTRACT = "extract"
    CHAT = "chat"
    CALL = "call"


class PromptKind(StrEnum):
    """How a model is asked: tuned, with the bare instruction; base, with the answers spelled out."""

    TUNED = "tuned"
    BASE = "base"


class DataFormat(StrEnum):
    """How a source is written."""

    AUTO = "auto"
    JSONL = "jsonl"
    CSV = "csv"
    PARQUET = "parquet"
    DATASET = "dataset"
    LABEL_STUDIO = "label_studio"


class Guard(StrEnum):
    """A check that stops a run which practice says will disappoint. `accept_risks` overrides one, with a reason."""

    FEW_ROWS = "few_rows"
    SMALL_CLASS = "small_class"
    LEARNING_RATE = "learning_rate"
    LABEL_DRIFT = "label_drift"
    LONG_ROWS = "long_rows"
    UNSEEN_ANSWER = "unseen_answer"
    DEV_ROWS = "dev_rows"
    SELF_CHECK = "self_check"
    GRADIENTS = "gradients"
    UNCHANGED = "unchanged"


class PrivatePolicy(StrEnum):
    """What is done about secrets, or personal data, in a row."""

    OFF = "off"
    REPORT = "report"
    MASK = "mask"
    QUARANTINE = "quarantine"


class SuspectPolicy(StrEnum):
    """What is done about rows whose label is probably wrong."""

    OFF = "off"
    REPORT = "report"
    DROP = "drop"
    DOWN_WEIGHT = "down_weight"
    REVIEW = "review"


class PoisonPolicy(StrEnum):
    """What is done about rows that look planted; `stop` ends the run where any are found."""

    OFF = "off"
    REPORT = "report"
    QUARANTINE = "quarantine"
    STOP = "stop"


class Balance(StrEnum):
    """What is done about classes of very different size."""

    NONE = "none"
    OVERSAMPLE = "oversample"
    WEIGHT = "weight"


class SplitBy(StrEnum):
    """How dev is parted from train: by the hash of the content, or the newest rows."""

    CONTENT = "content"
    TIME = "time"


class GoldenSlice(StrEnum):
    """A part of the golden set that is drawn, or made, to show how a model does where inputs are unlike most others."""

    NEWEST = "newest"
    RARE_CLASS = "rare_class"
    LONG = "long"
    SHORT = "short"
    TYPED_NOISE = "typed_noise"
    PARAPHRASE = "paraphrase"
    ADVERSARIAL = "adversarial"


class Objective(StrEnum):
    """What a candidate has to show on the deciding metric."""

    SUPERIOR = "superior"
    NON_INFERIOR = "non_inferior"
    NON_INFERIOR_AND_CHEAPER = "non_inferior_and_cheaper"


class Expense(StrEnum):
    """What an answer costs, per item: a quantity whose mean a candidate may have to keep low."""

    LATENCY = "latency_ms"
    COST = "cost"
    PROMPT_TOKENS = "prompt_tokens"
    OUTPUT_TOKENS = "output_tokens"


class LookPolicy(StrEnum):
    """How the error level `alpha` is shared over the candidates that one golden set judges (see `tasks.gate.looks`)."""

    ALPHA_SPENDING = "alpha_spending"
    BONFERRONI = "bonferroni"
    LADDER = "ladder"
    OFF = "off"


class TaskSpec(Frozen):
    """The narrow task: what goes in and what a right answer looks like."""

    kind: TaskKind = knob(
        0,
        "classify: one label of a fixed list. extract: JSON. chat: free text. call: calls of tools, or words where "
        "none fits.",
    )
    instruction: str = knob(
        1, "What the model is told before each input. Short is cheap: every row pays for it.", min_length=1
    )
    labels: tuple[str, ...] = knob(2, "The answers there are (classify only).", default=())
    json_schema: dict[str, Any] | None = knob(3, "The JSON Schema that an answer fits (extract only).", default=None)
    tools: Tools = knob(
        4,
        "The tools that may be called, as OpenAI function definitions: name, description, parameters as a JSON Schema "
        "(call only).",
        default=(),
        exclude_if=none_there,
    )

    @field_validator("tools")
    @classmethod
    def _read_tools(cls, tools: Tools) -> Tools:
        return read_tools(tools)

    @model_validator(mode="after")
    def _fits_kind(self) -> Self:
        if self.kind is TaskKind.CLASSIFY and len(self.labels) < 2:
            raise ValueError("a classify task needs at least two labels")
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels must differ from each other")
        if any(label != label.strip() or not label for label in self.labels):
            raise ValueError("a label must not be empty, nor start or end with white space")
        if self.kind is not TaskKind.CLASSIFY and self.labels:
            raise ValueError(f"labels are for classify tasks, this one is {self.kind.value}")
        if self.kind is TaskKind.EXTRACT and self.json_schema is None:
            raise ValueError("an extract task needs a json_schema")
        if self.kind is not TaskKind.EXTRACT and self.json_schema is not None:
            raise ValueError(f"json_schema is for extract tasks, this one is {self.kind.value}")
        if self.kind is TaskKind.CALL and not self.tools:
            raise ValueError("a call task needs tools")
        if self.kind is not TaskKind.CALL and self.tools:
            raise ValueError(f"tools are for call tasks, this one is {self.kind.value}")
        return self

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that answers to this task have."""
        match self.kind:
            case TaskKind.CLASSIFY:
                return ("exact_match", "valid_output", MACRO_F1)
            case TaskKind.EXTRACT:
                fields = tuple(f"field:{name}" for name in (self.json_schema or {}).get("properties", {}))
                return ("exact_match", "valid_output", *fields, *(("field_match",) if fields else ()))
            case TaskKind.CHAT:
                return ("exact_match", "valid_output")
            case TaskKind.CALL:
                return ("exact_match", "valid_output", "call:name", "call:arguments")


class DataSpec(Frozen):
    """Where the rows come from and which columns hold what."""

    source: str = knob(
        0,
        "Rows: a file or a folder of parts (JSONL, CSV, Parquet), a folder saved by `datasets`, a Label Studio export; "
        "local, or an fsspec URI such as s3://bucket/rows/.",
        min_length=1,
    )
    format: DataFormat = knob(1, "How the source is written; auto goes by its ending.", default=DataFormat.AUTO)
    text_field: str | None = knob(
        2, "Column with the input: text, or chat messages without the answer.", default="text"
    )
    target_field: str | None = knob(
        3, "Column with the answer: a label, JSON, text, calls of tools, or one assistant message.", default="label"
    )
    messages_field: str | None = knob(
        4, "Column with chat messages; the last assistant turn is the answer. Replaces text and target.", default=None
    )
    id_field: str | None = knob(
        5, "Column with the row's id; a row without one gets one from its content.", default="id"
    )
    group_field: str | None = knob(6, "Column that ties rows which belong together.", default=None)
    slice_field: str | None = knob(7, "Column that names a part of the data to report on.", default=None)
    label_field: str | None = knob(
        8, "Column with a class to draw and balance by (not for classify, where the answer is it).", default=None
    )
    source_field: str | None = knob(
        9, "Column that says where a row came from; none takes the file of a folder of parts.", default=None
    )
    time_field: str | None = knob(10, "Column with the time at which a row was made, ISO 8601.", default=None)
    weight_field: str | None = knob(11, "Column with the row's weight in the loss, above 0.", default=None)
    min_agreement: float = knob(
        12,
        "Share of the annotators who must agree on a label, where several gave one (label_studio only).",
        default=0.51,
        gt=0.0,
        le=1.0,
    )
    max_characters: int = knob(
        13,
        "Longest input that is accepted, in characters; longer rows are quarantined.",
        default=20_000,
        ge=1,
        le=1_000_000,
    )
    languages: tuple[str, ...] = knob(
        14, "Languages that rows may be in (ISO 639-1, such as en); none is not checked.", default=()
    )
    secrets: PrivatePolicy = knob(
        15, "Keys, tokens and passwords in rows: report, mask, quarantine, or off.", default=PrivatePolicy.REPORT
    )
    personal_data: PrivatePolicy = knob(
        16,
        "E-mail addresses, telephone, card and account numbers in rows: report, mask, quarantine, or off.",
        default=PrivatePolicy.REPORT,
    )
    max_invalid_share: float = knob(
        17, "Share of quarantined rows above which the run stops.", default=0.02, ge=0.0, le=1.0
    )
    provenance: str | None = knob(
        18, "Where the data come from; kept with golden set, model card and certificate.", default=None, min_length=1
    )
    licence: str | None = knob(
        19, "Licence of the data (an SPDX id or words); kept likewise.", default=None, min_length=1
    )
    also: tuple[str, ...] = knob(
        20,
        "Further files of rows with the same columns (JSONL), such as what reviews gave; one that is not there yet has "
        "no rows.",
        default=(),
    )

    _read_off = field_validator("secrets", "personal_data", mode="before")(_off)

    @model_validator(mode="after")
    def _columns(self) -> Self:
        if self.messages_field is None and (self.text_field is None or self.target_field is None):
            raise ValueError("name text_field and target_field, or messages_field")
        return self


class GoldenSpec(Frozen):
    """The golden set: frozen before training, looked at only by the gate."""

    path: str = knob(0, "Folder of the frozen golden set.", min_length=1)
    items: int = knob(
        1, "How many items to freeze (used by `goldgate golden freeze` alone).", default=400, ge=1, le=100_000
    )
    digest: str | None = knob(
        2,
        "sha256 that the golden set must have; none trusts the digest kept in its folder.",
        default=None,
        pattern=r"^[0-9a-f]{64}$",
    )
    slices: tuple[GoldenSlice, ...] = knob(
        3,
        "Slices to add to the drawn items (used by `goldgate golden freeze` alone). Drawn: newest, rare_class, long, "
        "short. Made from drawn items: typed_noise, paraphrase, adversarial.",
        default=(),
    )
    slice_items: int | None = knob(
        4,
        "Items of each slice; none takes as many as the gate needs to show `slice_loss`.",
        default=None,
        ge=10,
        le=100_000,
    )
    slice_loss: float = knob(
        5,
        "Loss on a slice that its items must be able to rule out, where no guard of the policy gives it a margin.",
        default=0.1,
        gt=0.0,
        lt=1.0,
    )
    discordance: float = knob(
        6,
        "Share of items on which baseline and candidate are expected to differ in being right; slices are planned "
        "with it.",
        default=0.2,
        gt=0.0,
        le=1.0,
    )
    paraphrases: str | None = knob(
        7,
        "JSONL of {id, text}: items said in other words, by people or a teacher (the slice paraphrase only).",
        default=None,
        min_length=1,
    )

    @model_validator(mode="after")
    def _slices_can_be_made(self) -> Self:
        if len(set(self.slices)) != len(self.slices):
            raise ValueError("a slice is named twice")
        if GoldenSlice.PARAPHRASE in self.slices and self.paraphrases is None:
            raise ValueError(
                "the slice paraphrase needs `golden.paraphrases`, a file of {id, text}; nothing is paraphrased by "
                "rule. `goldgate golden plan CONFIG --to-paraphrase FILE` writes the items to say in other words"
            )
        if self.paraphrases is not None and GoldenSlice.PARAPHRASE not in self.slices:
            raise ValueError("paraphrases are for the slice paraphrase, which is not in `golden.slices`")
        return self


class CurateSpec(Frozen):
    """How rows become a train and a dev split."""

    dev_share: float = knob(
        0, "Share of the rows kept for dev (early stopping, prompt choice).", default=0.1, gt=0.0, lt=0.5
    )
    max_train_rows: int | None = knob(
        1, "At most this many training rows, drawn by class; none takes all.", default=None, ge=1
    )
    near_duplicate: float = knob(
        2,
        "Jaccard similarity of word 3-shingles from which two rows count as near-duplicates.",
        default=0.8,
        gt=0.3,
        le=1.0,
    )
    semantic_model: str | None = knob(
        3,
        "Folder of a model2vec or sentence-transformers model, by which rows that say the same in other words are "
        "found too; none does not look.",
        default=None,
        min_length=1,
    )
    semantic_duplicate: float = knob(
        4,
        "Cosine similarity from which two rows count as saying the same; what fits depends on the model.",
        default=0.9,
        gt=0.5,
        le=1.0,
    )
    suspects: SuspectPolicy = knob(
        5,
        "Rows whose label is probably wrong (classify only): report, drop, down_weight, review (kept out of training "
        "and listed), or off.",
        default=SuspectPolicy.REPORT,
    )
    poisoning: PoisonPolicy = knob(
        6,
        "Rows that look planted (a rare phrase that always brings one label): report, quarantine, stop, or off.",
        default=PoisonPolicy.REPORT,
    )
    split: SplitBy = knob(7, "content: dev is drawn by class. time: dev is the newest rows.", default=SplitBy.CONTENT)
    balance: Balance = knob(
        8,
        "Classes of different size: none, oversample (small ones are repeated), weight (they count more in the loss).",
        default=Balance.NONE,
    )
    max_repeats: int = knob(
        9,
        "How often a row may stand in train at most (oversample), or count at most (weight).",
        default=5,
        ge=2,
        le=100,
    )
    max_synthetic_share: float = knob(
        10, "Share of the training rows that a model may have written, at most.", default=0.5, ge=0.0, le=1.0
    )
    max_label_drift: float = knob(
        11,
        "How far the shares of the labels may lie from the golden set's (total variation distance, 0 to 1).",
        default=0.2,
        gt=0.0,
        le=1.0,
    )
    accept_risks: dict[Guard, Annotated[str, Field(min_length=10)]] = knob(
        12, "Guards to override, each with the reason (recorded in the run).", default={}
    )

    _read_off = field_validator("suspects", "poisoning", mode="before")(_off)


class TrainMethod(StrEnum):
    """What is trained."""

    QLORA = "qlora"
    LORA = "lora"
    FULL = "full"


class TrainBackend(StrEnum):
    """Which library holds the model while it is trained."""

    TRANSFORMERS = "transformers"
    UNSLOTH = "unsloth"


class BaseWeights(StrEnum):
    """How a QLoRA base is kept: in 4 bits, or written out once as the numbers that the 4 bits stand for."""

    AUTO = "auto"
    PACKED = "packed"
    DEQUANTISED = "dequantised"


class ComputeType(StrEnum):
    """What matrix products are made in."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class BatchLayout(StrEnum):
    """How the rows of a batch lie in memory; each gives the same gradients, to rounding."""

    AUTO = "auto"
    PADDED = "padded"
    FLAT = "flat"
    SHARED_PREFIX = "shared_prefix"


class Kernels(StrEnum):
    """Which code computes adapters, norms and attention."""

    AUTO = "auto"
    PLAIN = "plain"
    FUSED = "fused"
    LIGER = "liger"


class Switch(StrEnum):
    """On, off, or whichever fits."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


class AdapterSpec(Frozen):
    """The finer points of a LoRA adapter."""

    alpha: float | None = knob(
        0, "Scale of the adapter: it counts alpha / rank; none is twice the rank.", default=None, gt=0.0, le=4096.0
    )
    dropout: float = knob(1, "Share of an adapter's inputs dropped at random.", default=0.0, ge=0.0, lt=1.0)
    targets: tuple[Annotated[str, Field(min_length=1)], ...] = knob(
        2, "Names of the linear layers that get an adapter (such as q_proj); none is all of them.", default=()
    )
    rslora: bool = knob(3, "Scale by alpha / sqrt(rank) (rank-stabilised LoRA, arXiv:2312.03732).", default=False)
    dora: bool = knob(4, "Train magnitudes apart from directions (DoRA, arXiv:2402.09353); slower.", default=False)


class SpeedSpec(Frozen):
    """How the training computes. Nothing here changes what is learned by more than rounding."""

    base: BaseWeights = knob(
        0,
        "QLoRA's frozen base: packed in 4 bits, or dequantised once; auto takes packed on a GPU, dequantised on a CPU.",
        default=BaseWeights.AUTO,
    )
    compute: ComputeType = knob(
        1, "Matrix products; auto takes bfloat16 where the device multiplies it in hardware.", default=ComputeType.AUTO
    )
    batches: BatchLayout = knob(
        2,
        "padded: rows side by side. flat: one after the other, none padded. shared_prefix: flat, and what all rows of "
        "a batch begin with is computed once.",
        default=BatchLayout.AUTO,
    )
    kernels: Kernels = knob(
        3, "plain: transformers' and peft's. fused: fewer passes over memory. liger: liger-kernel (GPU).",
        default=Kernels.AUTO,
    )  # fmt: skip
    checkpointing: Switch = knob(
        4, "Recompute activations in the backward pass; auto does so only when memory asks.", default=Switch.AUTO
    )
    compile: bool = knob(5, "Compile the layers (torch.compile); takes a minute to begin with.", default=False)

    @field_validator("checkpointing", mode="before")
    @classmethod
    def _read_switch(cls, value: Any) -> Any:
        """YAML reads a bare `on` as true and a bare `off` as false."""
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


class TrainSpec(Frozen):
    """The recipe."""

    epochs: float = knob(0, "Passes over the training rows.", default=2.0, gt=0.0, le=50.0)
    learning_rate: float = knob(1, "Peak learning rate of the cosine schedule.", default=2e-4, gt=0.0, le=1e-2)
    lora_rank: int = knob(2, "Rank of the LoRA adapter (qlora and lora).", default=16, ge=1, le=256)
    batch_size: int = knob(3, "Rows in one forward pass.", default=8, ge=1, le=512)
    gradient_accumulation: int = knob(4, "Forward passes in one optimiser step.", default=1, ge=1, le=512)
    max_tokens: int = knob(
        5,
        "Longest row in tokens, prompt and answer together; a longer one stops the run.",
        default=1024,
        ge=16,
        le=131_072,
    )
    evaluations: int = knob(6, "How often the dev loss is looked at (and a checkpoint kept).", default=4, ge=1, le=100)
    patience: int = knob(7, "Looks without a better dev loss after which training stops.", default=2, ge=1, le=100)
    seed: int = knob(8, "Seed of everything random in training.", default=17, ge=0, le=2**31 - 1)
    method: TrainMethod = knob(
        9,
        "qlora: an adapter on a 4-bit base. lora: an adapter on the base as it is. full: all weights, for tiny models.",
        default=TrainMethod.QLORA,
    )
    adapter: AdapterSpec = knob(10, "The finer points of the adapter (qlora and lora).", default=AdapterSpec())
    speed: SpeedSpec = knob(11, "How the training computes.", default=SpeedSpec())
    save_every: int | None = knob(
        12,
        "Optimiser steps between checkpoints, the most that a killed training loses; none is a twelfth of them.",
        default=None,
        ge=1,
    )
    backend: TrainBackend = knob(
        13, "transformers, or unsloth on a GPU that has it installed.", default=TrainBackend.TRANSFORMERS
    )
    trust_remote_code_of: str | None = knob(
        14,
        "sha256 of a base model whose own code may be run; another one's is refused.",
        default=None,
        pattern=r"^[0-9a-f]{40,64}$",
    )

    @model_validator(mode="after")
    def _options_fit_method(self) -> Self:
        if self.method is TrainMethod.FULL and self.adapter != AdapterSpec():
            raise ValueError("method full trains no adapter; leave out `adapter`")
        if self.method is not TrainMethod.QLORA and self.speed.base is not BaseWeights.AUTO:
            raise ValueError("speed.base is about the 4-bit base of method qlora")
        return self


class PreferenceSpec(Frozen):
    """A second stage: DPO on pairs from dev rows that the tuned model gets wrong (arXiv:2305.18290).

    The right answer is chosen, the model's own rejected. Dev is parted: pairs come from one part, and what the stage
    did is measured on the other, which it never sees.
    """

    mine_share: float = knob(
        0, "Share of dev that pairs are mined from; the rest shows the effect.", default=0.5, gt=0.0, lt=1.0
    )
    min_pairs: int = knob(1, "Fewer pairs than this stop the stage.", default=8, ge=1, le=100_000)
    beta: float = knob(
        2, "How strongly the model is held to where it started (DPO's beta).", default=0.1, gt=0.0, le=10.0
    )
    learning_rate: float = knob(3, "Peak learning rate.", default=5e-5, gt=0.0, le=1e-2)
    epochs: float = knob(4, "Passes over the pairs.", default=2.0, gt=0.0, le=50.0)
    batch_size: int = knob(5, "Pairs in one forward pass.", default=4, ge=1, le=512)
    answer_weight: float = knob(
        6,
        "Weight of the chosen answer's own likelihood beside the preference; without it both may become unlikely.",
        default=0.2,
        ge=0.0,
        le=10.0,
    )
    seed: int = knob(7, "Seed of the split of dev and of the training.", default=17, ge=0, le=2**31 - 1)


class EvaluateSpec(Frozen):
    """How models are asked. The same for baseline and candidate."""

    engine: str = knob(
        0,
        "embedded (transformers), vllm (started by Goldgate), or the base URL of an OpenAI-compatible server.",
        default="embedded",
        pattern=r"^(embedded|vllm|https?://\S+)$",
    )
    max_new_tokens: int = knob(1, "Longest answer in tokens.", default=32, ge=1, le=4096)
    batch_size: int = knob(2, "Items asked at a time.", default=16, ge=1, le=1024)
    baseline_shots: int = knob(
        3,
        "Examples in the base model's few-shot prompt; the better of zero- and few-shot on dev is the baseline.",
        default=8,
        ge=0,
        le=64,
    )
    baseline_dev_items: int = knob(
        4, "Dev items on which the baseline's prompt is chosen.", default=100, ge=10, le=10_000
    )


EVERY_SLICE = "*"
_METRIC_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.:/ -]{0,99}$"


class MetricGuard(Frozen):
    """Something that a candidate must not make worse, or must reach, whatever the deciding metric says."""

    metric: str = knob(0, "The metric that is guarded.", default="exact_match", pattern=_METRIC_NAME)
    slice: str | None = knob(
        1, "A slice of the golden set; * is each of them; none is the whole set.", default=None, min_length=1
    )
    suite: str | None = knob(
        2, "A suite of its own (see `suites`), such as what must not be forgotten.", default=None, min_length=1
    )
    margin: float | None = knob(
        3,
        "By how much the candidate may be worse; this much must be shown not to be lost.",
        default=None,
        gt=0.0,
        lt=1.0,
    )
    floor: float | None = knob(4, "What the candidate must be shown to reach.", default=None, gt=0.0, lt=1.0)

    @model_validator(mode="after")
    def _asks_something(self) -> Self:
        if self.margin is None and self.floor is None:
            raise ValueError("a guard needs a margin or a floor")
        if self.slice is not None and self.suite is not None:
            raise ValueError("a guard is about a slice of the golden set or about a suite, not both")
        return self


class Policy(Frozen):
    """What the gate asks of a candidate."""

    metric: str = knob(
        0,
        "The metric that decides: exact_match, valid_output, macro_f1, field_match, field:<name>, call:name, "
        "call:arguments, or one of your own.",
        default="exact_match",
        pattern=_METRIC_NAME,
    )
    alpha: float = knob(
        1,
        "Chance of promoting a candidate that is no better, over all looks at a golden set.",
        default=0.05,
        gt=0.0,
        le=0.5,
    )
    min_improvement: float = knob(
        2, "By how much the candidate must be better, in units of the metric.", default=0.0, ge=0.0, lt=1.0
    )
    objective: Objective = knob(
        3,
        "superior: better on the metric. non_inferior: not worse by `margin`. non_inferior_and_cheaper: not worse by "
        "`margin`, and cheaper by `min_saving`.",
        default=Objective.SUPERIOR,
    )
    margin: float = knob(
        4, "Loss on the metric that counts as not worse (not for the objective superior).", default=0.02, gt=0.0, lt=1.0
    )
    min_saving: float = knob(
        5, "Share of the expense to be saved (non_inferior_and_cheaper only).", default=0.2, gt=0.0, lt=1.0
    )
    saving_in: Expense = knob(6, "The expense to be saved (non_inferior_and_cheaper only).", default=Expense.LATENCY)
    guards: tuple[MetricGuard, ...] = knob(7, "What else must not get worse, or must be reached.", default=())
    max_latency_ratio: float | None = knob(
        8, "Latency of the candidate over that of the baseline, at most.", default=None, gt=0.0
    )
    max_cost_ratio: float | None = knob(
        9, "Cost of the candidate over that of the baseline, at most.", default=None, gt=0.0
    )
    looks: LookPolicy = knob(
        10,
        "How alpha is shared over the candidates that a golden set judges: alpha_spending (any number of looks), "
        "bonferroni (`declared_looks` alike), ladder (for people who tune against the verdicts), off.",
        default=LookPolicy.ALPHA_SPENDING,
    )
    declared_looks: int | None = knob(
        11, "How many looks there will be (bonferroni only).", default=None, ge=1, le=10_000
    )
    ladder_step: float = knob(
        12, "Smallest improvement that the ladder lets out (ladder only).", default=0.01, gt=0.0, lt=1.0
    )
    approval_hours: float | None = knob(
        13,
        "Ask a person before a promotion, and wait this many hours for the answer; none does not ask.",
        default=None,
        gt=0.0,
        le=24 * 30,
    )

    _read_off = field_validator("looks", mode="before")(_off)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.objective is not Objective.SUPERIOR and self.min_improvement:
            raise ValueError(f"min_improvement is for the objective superior; {self.objective.value} has margin")
        if (self.looks is LookPolicy.BONFERRONI) != (self.declared_looks is not None):
            raise ValueError("declared_looks goes with looks: bonferroni, and bonferroni needs it")
        asked = [guard.model_dump_json(include={"metric", "slice", "suite"}) for guard in self.guards]
        if len(set(asked)) != len(asked):
            raise ValueError("two guards are about the same metric of the same slice or suite")
        return self


class SuiteSpec(Frozen):
    """A frozen set beside the golden set, of another task perhaps, that guards can ask about."""

    name: str = knob(0, "What guards call it.", pattern=r"^[a-z][a-z0-9_-]{0,62}$")
    path: str = knob(1, "Folder of the frozen set.", min_length=1)
    digest: str | None = knob(
        2,
        "sha256 that it must have; none trusts the digest kept in its folder.",
        default=None,
        pattern=r"^[0-9a-f]{64}$",
    )


class Override(Frozen):
    """A person's word in place of a verdict's, or on top of it; kept in ledger, registry and report."""

    by: str = knob(0, "Who decides this.", min_length=1, max_length=200)
    reason: str = knob(1, "Why; read by whoever asks later.", min_length=10, max_length=2000)
    candidate: str | None = knob(
        2,
        "sha256 of the candidate that is meant; another one is refused. None means whichever the run makes.",
        default=None,
        pattern=r"^[0-9a-f]{64}$",
    )


def _absolute(store: str) -> str:
    """A folder as absolute path, since the parts of a run work in different folders; a URI as it is."""
    return store if "://" in store else os.path.abspath(store)


class ExecutionSpec(Frozen):
    """Where things run and are kept. Nothing here changes a result, so nothing here enters a fingerprint."""

    store: Annotated[str, AfterValidator(_absolute)] = knob(
        0,
        "Where artefacts are kept: a folder or an fsspec URI; else the environment's GOLDGATE_STORE, else .goldgate.",
        default_factory=lambda: _absolute(os.environ.get("GOLDGATE_STORE", ".goldgate")),
        min_length=1,
    )
    tracking_uri: str | None = knob(
        1,
        "MLflow tracking server or database; none is the environment's MLFLOW_TRACKING_URI, else SQLite in the store.",
        default=None,
    )
    train_deployment: str | None = knob(
        2,
        "Prefect deployment that trains and tunes (flow/deployment); none does it inside this run.",
        default=None,
        pattern=r"^[^/]+/[^/]+$",
    )
    ledger: str | None = knob(
        3,
        "Database of the ledger of looks, without a password; none is the environment's GOLDGATE_LEDGER, else SQLite "
        "in the store.",
        default=None,
    )
    prices: dict[str, Annotated[float, Field(ge=0.0)]] = knob(
        4,
        "What an hour of a device costs, by a part of its name (H200, EPYC, cpu), to say what a training costs.",
        default_factory=dict,
    )


class EngineSpec(Frozen):
    """How an engine is run."""

    max_model_len: int = knob(0, "Longest prompt and answer together, in tokens.", default=4096, ge=64, le=1_048_576)
    dtype: str = knob(
        1,
        "float32 or bfloat16; auto is bfloat16 on CUDA and, as evaluation has it, by the CPU otherwise.",
        default="auto",
        pattern=r"^(auto|float32|bfloat16)$",
    )
    eager: bool = knob(2, "Skip compiling: starts in a third of the time, answers slower.", default=False)
    start_seconds: float = knob(3, "Longest time to its first answer.", default=600.0, gt=0.0, le=7200.0)
    arguments: tuple[str, ...] = knob(4, "Further arguments of `vllm serve`, for those who know.", default=())
    adapters: bool = knob(
        5, "Load adapters into one engine in place of merged models (CUDA only; see the README).", default=False
    )


class ConfidenceSpec(Frozen):
    """From where on an answer is trusted without a person."""

    target_accuracy: float = knob(
        0,
        "Accuracy that answers above the threshold are shown to have; the others are reviewed.",
        default=0.95,
        gt=0.0,
        lt=1.0,
    )
    alpha: float = knob(1, "Chance that they do not have it after all.", default=0.05, gt=0.0, le=0.5)
    min_rows: int = knob(2, "Fewest dev rows to learn the scaling from.", default=100, ge=20, le=1_000_000)


class CanarySpec(Frozen):
    """A share of the traffic for a version on trial, and when it is taken back."""

    share: float = knob(
        0,
        "Share of the keys (users, sessions) whose requests the version on trial answers.",
        default=0.05,
        gt=0.0,
        le=0.9,
    )
    alpha: float = knob(
        1,
        "Chance that a version that is no worse is taken back, however long it runs and however often one looks.",
        default=0.05,
        gt=0.0,
        le=0.5,
    )
    max_error_ratio: float = knob(
        2, "How many times as often as with the live version may requests fail.", default=1.0, ge=1.0, le=100.0
    )
    max_slow_ratio: float = knob(
        3,
        "How many times as often may answers be slower than the live version's 95th percentile.",
        default=1.25,
        ge=1.0,
        le=100.0,
    )
    max_unsure_ratio: float = knob(
        4,
        "How many times as often may answers be below their version's threshold of confidence.",
        default=1.25,
        ge=1.0,
        le=100.0,
    )
    min_requests: int = knob(
        5, "Requests that the version on trial answers before it may take over.", default=500, ge=1, le=10**9
    )
    min_hours: float = knob(6, "Shortest time that it is on trial.", default=1.0, ge=0.0, le=24.0 * 60)
    max_hours: float = knob(
        7, "Longest time that it waits for its requests; then it is refused, for want of evidence.", default=72.0,
        gt=0.0, le=24.0 * 60,
    )  # fmt: skip
    slow_ms: float | None = knob(
        8, "Answers that take longer are slow; none takes the live version's 95th percentile of the last requests.",
        default=None, gt=0.0,
    )  # fmt: skip


class RolloutSettings(Frozen):
    """How what was promoted is brought into service: the part of a rollout that a task's configuration says."""

    smoke_items: int = knob(
        0, "Golden items that the new engine has to answer as evaluated.", default=64, ge=1, le=2000
    )
    min_agreement: float = knob(
        1,
        "Smallest share of them that is answered as evaluated (float32 gives 1.0, bfloat16 a little less).",
        default=0.95,
        gt=0.0,
        le=1.0,
    )
    max_latency_ms: float | None = knob(
        2, "Limit of the 95th percentile of their latency; none sets none.", default=None, gt=0.0
    )
    engine: EngineSpec = knob(3, "How the engine is run.", default=EngineSpec())
    drain_seconds: float = knob(
        4, "How long the engine that is not needed any more may finish its requests.", default=30.0, ge=0.0, le=3600.0
    )
    confidence: ConfidenceSpec = knob(
        5, "Tasks with a closed answer: from where on an answer is trusted without a person.", default=ConfidenceSpec()
    )
    canary: CanarySpec | None = knob(
        6, "A share of the traffic tries the version out before all of it moves; none moves all at once.", default=None
    )


def _model_uri(uri: str) -> str:
    if re.match(r"^[a-z][a-z0-9+.-]+:", uri) and not re.match(r"^(hf|gguf|models|openai):.+", uri):
        raise ValueError(
            f"{uri!r} is no model URI: use a local folder, hf:<repo>, gguf:<file>, "
            "models:/<name>@<alias> or openai:<model>"
        )
    return uri


ModelUri = Annotated[str, AfterValidator(_model_uri)]


class EvaluationSpec(Frozen):
    """What it takes to score a model on a golden set: a `RetrainSpec` without what only training needs."""

    name: str = knob(
        0, "Name of the task: the registered model and the MLflow experiment.", pattern=r"^[a-z][a-z0-9_-]{0,62}$"
    )
    task: TaskSpec = knob(1, "The narrow task.")
    golden: GoldenSpec = knob(2, "The golden set.")
    evaluate: EvaluateSpec = knob(3, "How models are asked.", default=EvaluateSpec())
    execution: ExecutionSpec = knob(4, "Where things run and are kept.", default_factory=ExecutionSpec)
    withhold_scores: bool = knob(
        5, "Keep the scores out of logs and MLflow (a policy with a ladder does).", default=False
    )


class RetrainSpec(Frozen):
    """Everything that one run needs to know; what is turned most often comes first in the form."""

    name: str = knob(
        0, "Name of the task: the registered model and the MLflow experiment.", pattern=r"^[a-z][a-z0-9_-]{0,62}$"
    )
    train: TrainSpec = knob(1, "The recipe of the training.", default=TrainSpec())
    curate: CurateSpec = knob(2, "From rows to splits.", default=CurateSpec())
    policy: Policy = knob(3, "What the gate asks.", default=Policy())
    evaluate: EvaluateSpec = knob(4, "How models are asked.", default=EvaluateSpec())
    data: DataSpec = knob(5, "The training data.")
    golden: GoldenSpec = knob(6, "The golden set.")
    base_model: ModelUri = knob(
        7,
        "Base model: a local folder, hf:<repo>, or gguf:<file> (gguf:pkg:<package>/<file> in an installed package).",
        min_length=1,
    )
    task: TaskSpec = knob(8, "The narrow task.")
    suites: tuple[SuiteSpec, ...] = knob(
        9, "Frozen sets of other tasks that the policy's guards ask about.", default=()
    )
    preference: PreferenceSpec | None = knob(
        10, "A second stage of training on what the first gets wrong on dev; none leaves it out.", default=None
    )
    rollout: RolloutSettings | None = knob(
        11,
        "A promoted version waits for its rollout, which checks it beside the one that answers and moves traffic and "
        "champion together (needs `goldgate serve`); none makes it champion at once.",
        default=None,
    )
    execution: ExecutionSpec = knob(12, "Where things run and are kept.", default_factory=ExecutionSpec)

    @model_validator(mode="after")
    def _suites_are_known(self) -> Self:
        names = [suite.name for suite in self.suites]
        if len(set(names)) != len(names):
            raise ValueError("two suites have the same name")
        unknown = sorted({guard.suite for guard in self.policy.guards if guard.suite} - set(names))
        if unknown:
            raise ValueError(f"policy.guards asks about suites that are not in `suites`: {', '.join(unknown)}")
        return self

    @model_validator(mode="after")
    def _policy_fits_task(self) -> Self:
        asked = [self.policy.metric, *(guard.metric for guard in self.policy.guards if guard.suite is None)]
        missing = [metric for metric in asked if metric not in self.task.metrics]
        if missing:
            raise ValueError(
                f"policy asks for {', '.join(dict.fromkeys(missing))}, and this task has {', '.join(self.task.metrics)}"
            )
        cheaper = self.policy.objective is Objective.NON_INFERIOR_AND_CHEAPER
        if self.policy.max_cost_ratio is not None or (cheaper and self.policy.saving_in is Expense.COST):
            raise ValueError("policy limits cost, which no evaluation of a run has; use latency_ms or tokens")
        return self

    def evaluation(self) -> EvaluationSpec:
        """The part that evaluating needs."""
        return EvaluationSpec(
            name=self.name,
            task=self.task,
            golden=self.golden,
            evaluate=self.evaluate,
            execution=self.execution,
            withhold_scores=self.policy.looks is LookPolicy.LADDER,
        )
