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

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


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


class TaskKind(StrEnum):
    """What kind of answer the model gives."""

    CLASSIFY = "classify"
    EXTRACT = "extract"
    CHAT = "chat"


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


class Guard(StrEnum):
    """A check that stops a run which practice says will disappoint. `accept_risks` overrides one, with a reason."""

    FEW_ROWS = "few_rows"
    SMALL_CLASS = "small_class"
    LEARNING_RATE = "learning_rate"


class Metric(StrEnum):
    """A metric that a gate can decide on: the mean of a 0/1 outcome per item."""

    EXACT_MATCH = "exact_match"
    VALID_OUTPUT = "valid_output"


class TaskSpec(Frozen):
    """The narrow task: what goes in and what a right answer looks like."""

    kind: TaskKind = knob(0, "classify: one label of a fixed list. extract: JSON. chat: free text.")
    instruction: str = knob(
        1, "What the model is told before each input. Short is cheap: every row pays for it.", min_length=1
    )
    labels: tuple[str, ...] = knob(2, "The answers there are (classify only).", default=())
    json_schema: dict[str, Any] | None = knob(3, "The JSON Schema that an answer fits (extract only).", default=None)

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
        return self


class DataSpec(Frozen):
    """Where the rows come from and which columns hold what."""

    source: str = knob(0, "File or folder of rows: JSONL, CSV, Parquet, or a folder saved by `datasets`.", min_length=1)
    format: DataFormat = knob(1, "How the source is written; auto goes by its ending.", default=DataFormat.AUTO)
    text_field: str | None = knob(2, "Column with the input text.", default="text")
    target_field: str | None = knob(3, "Column with the answer: a label, JSON, or text.", default="label")
    messages_field: str | None = knob(
        4, "Column with chat messages; the last assistant turn is the answer. Replaces text and target.", default=None
    )
    id_field: str | None = knob(
        5, "Column with the row's id; a row without one gets one from its content.", default="id"
    )
    group_field: str | None = knob(6, "Column that ties rows which belong together.", default=None)
    slice_field: str | None = knob(7, "Column that names a part of the data to report on.", default=None)
    max_characters: int = knob(
        8,
        "Longest input that is accepted, in characters; longer rows are quarantined.",
        default=20_000,
        ge=1,
        le=1_000_000,
    )
    max_invalid_share: float = knob(
        9, "Share of quarantined rows above which the run stops.", default=0.02, ge=0.0, le=1.0
    )

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
    accept_risks: dict[Guard, Annotated[str, Field(min_length=10)]] = knob(
        3, "Guards to override, each with the reason (recorded in the run).", default={}
    )


class TrainSpec(Frozen):
    """The QLoRA recipe."""

    epochs: float = knob(0, "Passes over the training rows.", default=2.0, gt=0.0, le=50.0)
    learning_rate: float = knob(1, "Peak learning rate of the cosine schedule.", default=2e-4, gt=0.0, le=1e-2)
    lora_rank: int = knob(2, "Rank of the LoRA adapter (alpha is twice the rank).", default=16, ge=1, le=256)
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


class Policy(Frozen):
    """What the gate asks of a candidate."""

    metric: Metric = knob(0, "The metric that decides.", default=Metric.EXACT_MATCH)
    alpha: float = knob(1, "Chance of promoting a candidate that is no better.", default=0.05, gt=0.0, le=0.5)
    min_improvement: float = knob(
        2, "By how much the candidate must be better, in units of the metric.", default=0.0, ge=0.0, lt=1.0
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
        "Prefect deployment that trains (flow/deployment); none trains inside this run.",
        default=None,
        pattern=r"^[^/]+/[^/]+$",
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


class RetrainSpec(Frozen):
    """Everything that one run needs to know; what is turned most often comes first in the form."""

    name: str = knob(
        0, "Name of the task: the registered model and the MLflow experiment.", pattern=r"^[a-z][a-z0-9_-]{0,62}$"
    )
    train: TrainSpec = knob(1, "The QLoRA recipe.", default=TrainSpec())
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
    execution: ExecutionSpec = knob(9, "Where things run and are kept.", default_factory=ExecutionSpec)

    def evaluation(self) -> EvaluationSpec:
        """The part that evaluating needs."""
        return EvaluationSpec(
            name=self.name, task=self.task, golden=self.golden, evaluate=self.evaluate, execution=self.execution
        )
