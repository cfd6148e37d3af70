"""Answers that wait for a person, and what people said of them."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from pathlib import PurePath
from typing import Any, Self

from pydantic import Field, model_validator

from tasks.contracts.spec import DataSpec, ExecutionSpec, Frozen, TaskSpec, knob

LABEL_STUDIO_KEY = "GOLDGATE_LABEL_STUDIO_KEY"  # environment: an access token of Label Studio
REVIEWS_FILE = "reviews.jsonl"  # beside the rows: a `ReviewRecord` a line

_MLFLOW_USERS = 10  # most that MLflow assigns to one queue


class QueueKind(StrEnum):
    """Where people review."""

    MLFLOW = "mlflow"  # the review queues of the MLflow server
    LABEL_STUDIO = "label_studio"


class ReviewReason(StrEnum):
    """Why a request waits for a person."""

    FLAGGED = "flagged"  # its confidence is below the threshold
    SAMPLED = "sampled"  # drawn, whatever its confidence
    DISAGREED = "disagreed"  # the shadow answered otherwise


class SpoolSpec(Frozen):
    """Which answers a gateway puts aside for people, and how many it keeps."""

    sample: float = knob(
        0, "Share of the answers that is reviewed whatever their confidence, to see what the flags miss.",
        default=0.01, ge=0.0, le=1.0,
    )  # fmt: skip
    most: int = knob(
        1, "Answers that wait in the gateway's folder at most; further ones are counted, not kept.", default=10_000,
        ge=1, le=10_000_000,
    )  # fmt: skip
    mask: bool = knob(
        2, "Replace personal data by their kind before anything is written; rows made of them are masked too.",
        default=True,
    )  # fmt: skip


class ReviewItem(Frozen):
    """A request and its answer, for a person to look at.

    Attributes:
        id: the request's; an item sent twice is one item.
        name: what the request called the model.
        version: label of the version that answered.
        at: when it came.
        reason: why it waits.
        messages: what was asked, as chat messages; the last one is the input.
        answer: what the model said: what the form is filled in with.
        other: what the shadow said; None but for `disagreed`.
        confidence: of the answer, calibrated where it could be; None where it has none.
        choices: the answers that are allowed; empty for open ones.
    """

    id: str
    name: str
    version: str
    at: datetime
    reason: ReviewReason
    messages: tuple[dict[str, Any], ...]
    answer: str
    other: str | None = None
    confidence: float | None = None
    choices: tuple[str, ...] = ()


class Reviewed(Frozen):
    """What one person said of one item.

    Attributes:
        item: id of the item.
        annotator: who said it.
        answer: the right answer; None where they gave none.
        golden: whether this person wants it as a candidate for the golden set; it is then kept out of training.
        at: when.
    """

    item: str
    annotator: str
    answer: str | None
    golden: bool = False
    at: datetime


class Review(Frozen):
    """An item that people have finished, and what they said.

    Attributes:
        item: it.
        said: the last word of each of them; empty where they declined.
    """

    item: ReviewItem
    said: tuple[Reviewed, ...] = ()


class ReviewOutcome(StrEnum):
    """What became of a reviewed item."""

    ROW = "row"
    GOLDEN = "golden"  # a candidate for the golden set
    GOLDEN_TEXT = "golden_text"  # asks what a candidate asks, so it is kept out of training too
    DISPUTED = "disputed"  # too few said the same
    UNUSABLE = "unusable"  # the right answer is none that the task has, or the request holds more than text
    DECLINED = "declined"  # nobody gave an answer


class ReviewRecord(Frozen):
    """What is known of a reviewed item: a line of `reviews.jsonl`.

    Attributes:
        item: id of the item, which is the id of the request.
        name: what the request called the model.
        version: label of the version that answered.
        at: when the request came.
        reviewed_at: when the last person answered; None where nobody did.
        reason: why it was reviewed.
        answer: what the model said.
        right: what people say is right; None where they do not agree, or said nothing.
        correct: whether both are the same; None likewise.
        agreement: share of the people that say `right`, or of the largest group where they do not agree.
        annotators: who they are.
        outcome: what became of it.
        why: the same in words, where it became nothing.
        review: all of it, from which the rest follows.
    """

    item: str
    name: str
    version: str
    at: datetime
    reviewed_at: datetime | None
    reason: ReviewReason
    answer: str
    right: str | None
    correct: bool | None
    agreement: float | None
    annotators: tuple[str, ...]
    outcome: ReviewOutcome
    why: str = ""
    review: Review


class ReviewSpec(Frozen):
    """How answers reach people and come back: `goldgate review` and the flow `review`."""

    name: str = knob(0, "Name of the task: what requests call the model.", pattern=r"^[a-z][a-z0-9_-]{0,62}$")
    queue: QueueKind = knob(1, "Where people review.", default=QueueKind.MLFLOW)
    url: str | None = knob(
        2, "Address of Label Studio; its key is the environment's GOLDGATE_LABEL_STUDIO_KEY.", default=None
    )
    annotators: int = knob(3, "People who look at each answer.", default=1, ge=1, le=9)
    min_agreement: float = knob(
        4, "Smallest share of them that says the same; less is no row.", default=0.51, gt=0.5, le=1.0
    )
    users: tuple[str, ...] = knob(5, "Who they are, as MLflow knows them; none is whoever opens its page.", default=())
    rows: str = knob(
        6, "File of training rows that answers become (JSONL, the columns of `data`); name it in `data.also`.",
        min_length=1,
    )  # fmt: skip
    golden_candidates: str = knob(7, "File of candidates for the golden set, never trained on.", min_length=1)
    batch: int = knob(8, "Most items sent in one run.", default=500, ge=1, le=100_000)
    data: DataSpec = knob(9, "The task's data: which columns hold what.")
    task: TaskSpec = knob(10, "The narrow task: what answers there are.")
    execution: ExecutionSpec = knob(11, "Where store and registry are.", default_factory=ExecutionSpec)

    @model_validator(mode="after")
    def _files_differ(self) -> Self:
        for field, path in (("rows", self.rows), ("golden_candidates", self.golden_candidates)):
            if "://" in path:
                raise ValueError(f"`{field}` is written piece by piece, so it has to be a file of this machine")
        beside = str(PurePath(self.rows).with_name(REVIEWS_FILE))
        if len({self.rows, self.golden_candidates, beside}) < 3:
            raise ValueError(f"`rows`, `golden_candidates` and {REVIEWS_FILE} beside the rows must be different files")
        return self

    @model_validator(mode="after")
    def _queue_can_do_it(self) -> Self:
        if self.queue is QueueKind.LABEL_STUDIO and self.url is None:
            raise ValueError("label_studio needs `url`, its address")
        if self.queue is QueueKind.MLFLOW and self.url is not None:
            raise ValueError("`url` is for label_studio; mlflow is the run's own server, `execution.tracking_uri`")
        if len(set(self.users)) != len(self.users):
            raise ValueError("`users` names somebody twice")
        if self.queue is QueueKind.MLFLOW and self.annotators > 1 and len(self.users) < self.annotators:
            raise ValueError(
                f"MLflow gives each person a queue, so {self.annotators} annotators need as many `users` at least"
            )
        if self.queue is QueueKind.MLFLOW and self.annotators == 1 and len(self.users) > _MLFLOW_USERS:
            raise ValueError(f"MLflow lets {_MLFLOW_USERS} people share a queue at most")
        return self


class ReviewResult(Frozen):
    """What one run of the flow has done.

    Attributes:
        sent: items that went to the queue.
        waiting: items that people have not finished.
        rows: training rows, all that there are now.
        candidates: candidates for the golden set, likewise.
        disputed: items whose annotators did not agree.
        declined: items that nobody gave an answer to.
        unusable: items whose right answer the task does not have, or that hold more than text.
        agreement: share of the reviewed answers that people left as the model gave them; None without any.
        new: rows and candidates that this run added.
        page: where people review.
        trouble: why nothing could be fetched from the gateway; empty where it could.
    """

    sent: int = Field(ge=0)
    waiting: int
    rows: int
    candidates: int
    disputed: int
    declined: int = 0
    unusable: int = 0
    agreement: float | None
    new: int
    page: str = ""
    trouble: str = ""
