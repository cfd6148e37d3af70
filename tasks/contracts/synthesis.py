"""What a person sets to have examples written by a teacher, and what comes of it."""

from __future__ import annotations

from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import model_validator

from tasks.contracts.references import ArtefactRef
from tasks.contracts.spec import (
    DataSpec,
    EvaluationSpec,
    ExecutionSpec,
    Frozen,
    GoldenSpec,
    RetrainSpec,
    TaskKind,
    TaskSpec,
    knob,
)

# Columns that every synthetic row has beside those of the data.
SYNTHETIC_COLUMN = "synthetic"
SOURCE_COLUMN = "source"
PROVENANCE_COLUMN = "provenance"

# What of a teacher's specification changes how it is asked, and not what it answers.
MANNERS = {"concurrency", "timeout_seconds", "patience_seconds", "max_failures", "key_block"}


class TeacherSpec(Frozen):
    """The model that writes, behind any server that speaks the OpenAI protocol.

    Its key comes from the environment's GOLDGATE_TEACHER_KEY, else from `key_block`; it is kept nowhere.
    """

    url: str = knob(
        0,
        "Base URL of the server, with or without its /v1, and without a password.",
        pattern=r"^https?://\S+$",
    )
    model: str = knob(1, "The model's name there.", min_length=1)
    key_block: str | None = knob(
        2,
        "Prefect Secret block with the server's key, used where the environment has no GOLDGATE_TEACHER_KEY.",
        default=None,
        min_length=1,
    )
    temperature: float = knob(3, "How freely it writes.", default=0.9, ge=0.0, le=2.0)
    check_temperature: float = knob(4, "How freely it answers when it is checked.", default=0.7, gt=0.0, le=2.0)
    max_tokens: int = knob(5, "Longest answer in tokens.", default=1024, ge=16, le=65_536)
    structured: bool = knob(
        6, "Ask the server to hold answers to a JSON Schema; off for a server that refuses to.", default=True
    )
    concurrency: int = knob(7, "Requests under way at a time.", default=8, ge=1, le=256)
    timeout_seconds: float = knob(8, "Time for one answer, the whole of it.", default=120.0, gt=0.0, le=3600.0)
    patience_seconds: float = knob(
        9, "How long to wait in all for a server that says it is busy.", default=300.0, ge=0.0, le=86_400.0
    )
    max_failures: int = knob(
        10, "Requests that fail one after the other, each with its repetitions, before the run stops.", default=5, ge=1,
        le=1000,
    )  # fmt: skip

    @model_validator(mode="after")
    def _holds_no_password(self) -> Self:
        parts = urlsplit(self.url)
        if "@" in parts.netloc or parts.query:
            raise ValueError(
                "the URL holds a user, a password or a query, and is kept in the clear; use GOLDGATE_TEACHER_KEY"
            )
        return self


class PriceSpec(Frozen):
    """What the teacher costs."""

    per_million_prompt: float = knob(0, "Price of a million prompt tokens.", ge=0.0)
    per_million_completion: float = knob(1, "Price of a million tokens of answers.", ge=0.0)
    currency: str = knob(2, "What prices are in.", default="USD", min_length=1, max_length=8)


class SynthesisBudget(Frozen):
    """What the whole of a specification may cost, over all runs of it; asking stops before it would be exceeded."""

    money: float | None = knob(0, "Money at most, in the currency of `price`.", default=None, gt=0.0)
    tokens: int | None = knob(1, "Tokens at most, of prompts and answers together.", default=None, ge=1)
    requests: int | None = knob(2, "Requests at most that are paid, or may be.", default=10_000, ge=1)


class Fill(Frozen):
    """Rows to be written like real ones of a class or slice."""

    label: str | None = knob(
        0, "The class (classify: a label of the task; else a value of `label_field`).", default=None
    )
    slice: str | None = knob(1, "The slice.", default=None, min_length=1)
    rows: int = knob(2, "How many rows are wanted.", ge=1, le=100_000)
    looks_like: str | None = knob(
        3, "Hard negatives: rows of this class that look like ones of `label` at first sight.", default=None
    )

    @model_validator(mode="after")
    def _names_something(self) -> Self:
        if self.label is None and self.slice is None:
            raise ValueError("name a label, a slice, or both")
        if self.looks_like is not None and (self.label is None or self.label == self.looks_like):
            raise ValueError("looks_like goes with a label, another one")
        return self


class DocumentsSpec(Frozen):
    """Texts that examples are grounded in."""

    path: str = knob(0, "A folder of .txt, .md and .jsonl files, or one such file.", min_length=1)
    text_field: str = knob(1, "Column with the text (.jsonl).", default="text", min_length=1)
    id_field: str = knob(2, "Column with the document's id (.jsonl); else its file and line.", default="id")
    per_document: int = knob(
        3, "Examples asked for each document, or each part of a long one.", default=1, ge=1, le=100
    )
    max_characters: int = knob(
        4, "Longest part that is shown at once; longer documents are parted.", default=6000, ge=200, le=200_000
    )
    in_input: bool = knob(
        5, "Put the document before the question (chat only); off for a model that should know it by heart.",
        default=True,
    )  # fmt: skip


class SynthesizeSpec(Frozen):
    """Everything that writing examples with a teacher needs to know."""

    name: str = knob(0, "Name of the task.", pattern=r"^[a-z][a-z0-9_-]{0,62}$")
    teacher: TeacherSpec = knob(1, "The model that writes.")
    budget: SynthesisBudget = knob(2, "What it may cost.", default=SynthesisBudget())
    price: PriceSpec | None = knob(3, "What the teacher costs; none counts tokens alone.", default=None)
    fill: tuple[Fill, ...] = knob(4, "Rows to be written like real ones, by class or slice.", default=())
    fill_classes_to: int | None = knob(
        5, "Every class with fewer real rows than this is filled up to it.", default=None, ge=1, le=1_000_000
    )
    fill_slices_to: int | None = knob(
        6, "Every slice with fewer real rows than this is filled up to it.", default=None, ge=1, le=1_000_000
    )
    documents: DocumentsSpec | None = knob(7, "Texts to ground examples in (extract and chat).", default=None)
    rounds: int = knob(
        8, "How often rows that are still missing from a class or slice are asked for.", default=2, ge=1, le=20
    )
    refine: bool = knob(
        9, "Tell the teacher why an example was refused, and let it write another one, once.", default=True
    )
    near_duplicate: float = knob(
        10,
        "Jaccard similarity of word 3-shingles from which two texts count as near-duplicates.",
        default=0.8,
        gt=0.3,
        le=1.0,
    )
    data: DataSpec = knob(11, "The real data.")
    golden: GoldenSpec = knob(12, "The golden set.")
    task: TaskSpec = knob(13, "The narrow task.")
    execution: ExecutionSpec = knob(14, "Where things run and are kept.", default_factory=ExecutionSpec)

    @model_validator(mode="after")
    def _asks_something(self) -> Self:
        if not self.fill and self.fill_classes_to is None and self.fill_slices_to is None and self.documents is None:
            raise ValueError("nothing is asked for; set fill, fill_classes_to, fill_slices_to or documents")
        if self.budget.money is not None and self.price is None:
            raise ValueError("budget.money needs `price`, which says what tokens cost")
        return self

    @model_validator(mode="after")
    def _fits_task(self) -> Self:
        classify = self.task.kind is TaskKind.CLASSIFY
        if classify and self.documents is not None:
            raise ValueError("documents are for extract and chat tasks; for classify use fill")
        if classify:
            named = {name for fill in self.fill for name in (fill.label, fill.looks_like) if name is not None}
            unknown = sorted(named - set(self.task.labels))
            if unknown:
                raise ValueError(f"fill names labels that the task does not have: {', '.join(unknown)}")
        elif any(fill.looks_like is not None for fill in self.fill):
            raise ValueError("looks_like is for classify tasks")
        if not classify and self.data.label_field is None:
            if self.fill_classes_to is not None:
                raise ValueError("fill_classes_to needs data.label_field, which says where the class is")
            if any(fill.label is not None for fill in self.fill):
                raise ValueError("fill.label needs data.label_field, which says where the class is")
        if self.data.slice_field is None and (
            self.fill_slices_to is not None or any(fill.slice is not None for fill in self.fill)
        ):
            raise ValueError("filling slices needs data.slice_field, which says where the slice is")
        return self

    @model_validator(mode="after")
    def _columns_are_free(self) -> Self:
        data = self.data
        used = {
            data.text_field, data.target_field, data.messages_field, data.id_field, data.group_field, data.slice_field,
            data.label_field, data.time_field, data.weight_field,
        }  # fmt: skip
        taken = [name for name in (SYNTHETIC_COLUMN, SOURCE_COLUMN, PROVENANCE_COLUMN) if name in used]
        if taken or data.source_field in (SYNTHETIC_COLUMN, PROVENANCE_COLUMN):
            raise ValueError(
                "the data use a column that synthetic rows need for themselves "
                f"({', '.join(taken) or data.source_field}); rename it in the data"
            )
        return self

    def evaluation(self) -> EvaluationSpec:
        """What opening the golden set needs."""
        return EvaluationSpec(name=self.name, task=self.task, golden=self.golden, execution=self.execution)

    def reading(self) -> RetrainSpec:
        """What reading the real rows needs; that step looks at no model."""
        return RetrainSpec(
            name=self.name, task=self.task, data=self.data, golden=self.golden, base_model="none",
            execution=self.execution,
        )  # fmt: skip


class SynthesisRef(ArtefactRef):
    """Rows that a teacher wrote (`synthetic.jsonl`), what was refused (`quarantine.jsonl`), and `report.json`.

    Attributes:
        path: `synthetic.jsonl`, ready to be put beside the real rows in a folder of parts.
        rows: how many rows it has.
        asked: examples that the teacher was asked for.
        stopped: why asking ended early; None if it did not.
        report: the content of `report.json`.
    """

    kind: Literal["synthesis"] = "synthesis"
    path: str
    rows: int
    asked: int
    stopped: str | None
    report: dict[str, Any]
