"""What a person sets to have training answers rewritten by a teacher, and what comes of it."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal, Self

from pydantic import model_validator

from tasks.contracts.references import ArtefactRef, MetricComparison, SplitsRef
from tasks.contracts.spec import Frozen, RetrainSpec, TaskKind, knob
from tasks.contracts.synthesis import PriceSpec, SynthesisBudget, TeacherSpec

HOW_TO_REWRITE = (
    "Keep the meaning of the answer and everything that is right in it. Improve its form: correct, clear, complete and "
    "consistent from one answer to the next, and no longer than it needs to be."
)


class DistillSpec(Frozen):
    """Everything that distilling needs to know: who rewrites, what is let through, and the training to compare by.

    The inputs stay as they are; the answers of the training rows are rewritten, those of dev and golden set never.
    """

    teacher: TeacherSpec = knob(0, "The model that rewrites.")
    budget: SynthesisBudget = knob(1, "What it may cost; rows beyond it keep their answers.", default=SynthesisBudget())
    price: PriceSpec | None = knob(2, "What the teacher costs; none counts tokens alone.", default=None)
    instruction: str = knob(3, "How to rewrite.", default=HOW_TO_REWRITE, min_length=1, max_length=8000)
    samples: int = knob(
        4,
        "Rewritings asked for each row; of those that pass the filters, the one that the others agree with most is "
        "taken.",
        default=1,
        ge=1,
        le=16,
    )
    relabel: bool = knob(
        5,
        "Let the teacher change what an answer says: another label (classify), other values that stand in the text "
        "(extract). Off, it may change its form alone.",
        default=False,
    )
    keep_original_when_refused: bool = knob(
        6, "A row whose rewriting is refused keeps its answer; off, it is left out of training.", default=True
    )
    max_growth: float = knob(
        7,
        "Longest rewriting, in multiples of the original's characters; 200 characters are always let through.",
        default=3.0,
        gt=0.0,
        le=100.0,
    )
    training: RetrainSpec = knob(8, "The training: data, golden set, base model and recipe.")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.budget.money is not None and self.price is None:
            raise ValueError("budget.money needs `price`, which says what tokens cost")
        if self.training.task.kind is TaskKind.CLASSIFY and not self.relabel and self.keep_original_when_refused:
            raise ValueError(
                "an answer to a classify task is its label, so nothing could change; set relabel, or turn off "
                "keep_original_when_refused to leave out the rows whose label the teacher does not give"
            )
        return self


class RewrittenRef(Frozen):
    """Splits with rewritten answers in train (`originals.jsonl` keeps each beside its original), and dev as it was.

    Attributes:
        splits: what training takes.
        originals: path of `originals.jsonl`: id, original, rewritten, which of them is used, and why.
        source: path of `source.jsonl`: train and dev rows in the columns of the data, under their ids, ready to be the
            `data.source` of a run.
        rewritten: distinct training rows with another answer than before.
        left_out: distinct training rows that are no longer there.
        report: the content of `report.json`.
    """

    splits: SplitsRef
    originals: str
    source: str
    rewritten: int
    left_out: int
    report: dict[str, Any]


class DistillEffect(StrEnum):
    """What the rewritten answers did on dev: the whole interval of the difference lies above zero, below it, or not."""

    GAIN = "gain"
    LOSS = "loss"
    NONE_SHOWN = "none_shown"


class SideOnDev(Frozen):
    """One of the two trainings, on the same dev rows.

    Attributes:
        splits: digest of the splits that it was trained on.
        model: where it is kept.
        merged_digest: sha256 of the merged model.
        dev_loss: best dev loss, nats per answer token.
        metrics: on all dev rows, in [0, 1].
    """

    splits: str
    model: str
    merged_digest: str
    dev_loss: float
    metrics: dict[str, float]


class DistillResult(ArtefactRef):
    """Both trainings compared on dev (`report.json`, `report.md`).

    Attributes:
        effect: on the deciding metric (`training.policy.metric`).
        original: trained on the answers as they were.
        rewritten: trained on the rewritten ones.
        comparisons: every metric of both on the same dev rows, the deciding one first; original is the baseline.
        rows: distinct training rows.
        changed: of these, rewritten ones.
        source: path of the rewritten rows as a source, to send to the gate.
        settings: what a run needs to be set to for that source, as `key=value`.
        report: path of `report.md`.
    """

    kind: Literal["distillation"] = "distillation"
    effect: DistillEffect
    original: SideOnDev
    rewritten: SideOnDev
    comparisons: tuple[MetricComparison, ...]
    rows: int
    changed: int
    source: str
    settings: tuple[str, ...]
    report: str
