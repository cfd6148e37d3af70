"""Watching what live requests look like, and when that calls for a new training."""

from __future__ import annotations

from datetime import datetime
from typing import Self

from pydantic import model_validator

from tasks.contracts.observe import DriftReport, DriftSpec, RetrainPermit
from tasks.contracts.spec import ExecutionSpec, Frozen, RetrainSpec, knob

DRIFTED_EVENT = "goldgate.model.drifted"  # what `monitor` emits, and what starts a retrain


class MonitorSpec(Frozen):
    """What is compared, and what happens then: `goldgate monitor` and the flow `monitor`."""

    name: str = knob(0, "Name of the task: what requests call the model.", pattern=r"^[a-z][a-z0-9_-]{0,62}$")
    drift: DriftSpec = knob(1, "When requests count as no longer what they were.", default=DriftSpec())
    hours: float = knob(2, "The last so many hours are compared.", default=24.0, gt=0.0, le=24.0 * 90)
    reference_hours: float = knob(
        3,
        "With the first so many hours after the version went live; of a younger one with what there is, but at least "
        "as many as are compared.",
        default=24.0 * 7,
        gt=0.0,
        le=24.0 * 90,
    )
    most_rows: int = knob(
        4, "Most requests of a window; of more, so many are drawn.", default=20_000, ge=100, le=1_000_000
    )
    log: str | None = knob(
        5,
        "Folder of the request log; none is the database in the environment's GOLDGATE_LOG_DB, else the gateway's "
        "folder in the store.",
        default=None,
        min_length=1,
    )
    reviews: str | None = knob(
        6, "File with what people said of answers (`reviews.jsonl` of `goldgate review`).", default=None, min_length=1
    )
    retrain: RetrainSpec | None = knob(
        7, "The training that drift starts, by the event that it emits, and whose answers are watched.", default=None
    )
    report_only: bool = knob(8, "Start nothing, whatever has drifted.", default=False)
    execution: ExecutionSpec = knob(9, "Where store and registry are.", default_factory=ExecutionSpec)

    @model_validator(mode="after")
    def _retrains_the_same(self) -> Self:
        if self.retrain is not None and self.retrain.name != self.name:
            raise ValueError(f"`retrain` is about {self.retrain.name!r}, and what is watched is {self.name!r}")
        return self

    @model_validator(mode="after")
    def _draws_enough(self) -> Self:
        if self.most_rows < self.drift.min_rows:
            raise ValueError(
                f"`most_rows` ({self.most_rows:,}) is below `drift.min_rows` ({self.drift.min_rows:,}), so there would "
                "never be enough to compare"
            )
        return self


class WindowFacts(Frozen):
    """A stretch of requests that was compared.

    Attributes:
        start: its first moment.
        end: its last.
        requests: in it, of this name and answered.
        rows: of these, compared.
        versions: labels of the versions that answered, with how often.
    """

    start: datetime
    end: datetime
    requests: int
    rows: int
    versions: dict[str, int]


class MonitorResult(Frozen):
    """What one look has found, and what came of it.

    Attributes:
        name: what requests call the model.
        report: the comparison; None where there was too little to compare.
        reference: its first window; None likewise.
        current: its second window; None likewise.
        why_not: why nothing was compared; empty where it was.
        permit: whether drift may start a retrain now; None without drift, or where nothing is to be started.
        started: whether the event was emitted.
    """

    name: str
    report: DriftReport | None
    reference: WindowFacts | None
    current: WindowFacts | None
    why_not: str = ""
    permit: RetrainPermit | None = None
    started: bool = False
