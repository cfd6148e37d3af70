"""Guards on the splits, from practice: with less, a fine-tuned model mostly learns its few examples by heart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from tasks.contracts.errors import DataError
from tasks.contracts.guards import Finding, settle
from tasks.contracts.spec import CurateSpec, Guard, TaskSpec

MIN_TRAIN_ROWS = 500
MIN_CLASS_ROWS = 10
HIGH_LEARNING_RATE = 2e-4  # what QLoRA's authors used for models of up to 13 B parameters (arXiv:2305.14314, table 9)
ROWS_FOR_HIGH_LEARNING_RATE = 1_000
TOO_MANY_TOKENS = "too_many_tokens"  # how the expectation on tokens is counted (`expectations.training_rows`)
MAX_LONG_SHARE = 0.01  # above it the model is not taught long inputs, and still meets them once it is served


class LongRows(NamedTuple):
    """How many of the rows of a source are longer in tokens than training takes, and were quarantined for it."""

    too_long: int
    rows: int

    @property
    def too_many(self) -> bool:
        """Whether they are more than may be left out without a word."""
        return self.too_long > MAX_LONG_SHARE * self.rows


NO_LONG_ROWS = LongRows(0, 0)  # also where no base model has said how long rows are


def check_guards(
    train: Mapping[str, int],
    dev: Mapping[str, int],
    drift: float,
    task: TaskSpec,
    learning_rate: float,
    spec: CurateSpec,
    long_rows: LongRows = NO_LONG_ROWS,
) -> list[Finding]:
    """The guards that object and are overridden.

    Args:
        train: distinct training rows of each class.
        dev: dev rows of each class.
        drift: distance of the label mix from the golden set's, in [0, 1].
        task: its labels.
        learning_rate: the recipe's.
        spec: limits and overrides.
        long_rows: what was left out for its length.

    Raises:
        DataError: a label has no training row, or a guard objects and `accept_risks` has no reason for it.
    """
    rows = sum(train.values())
    for label in task.labels:
        if not train.get(label):
            in_dev = dev.get(label, 0)
            raise DataError(
                f"The label {label!r} has no training row{f' ({in_dev} in dev)' if in_dev else ''}.",
                where="task.labels",
                fix="add rows with this label, or take it out of `task.labels` and freeze a golden set without it",
            )
    findings = []
    if long_rows.too_many:
        findings.append(
            Finding(
                Guard.LONG_ROWS,
                f"{long_rows.too_long:,} of {long_rows.rows:,} rows ({long_rows.too_long / long_rows.rows:.1%}) are "
                f"longer in tokens than training takes, more than {MAX_LONG_SHARE:.0%}, and are left out",
                "raise `train.max_tokens`, or shorten these rows in the source the way inputs will be shortened later",
            )
        )
    if rows < MIN_TRAIN_ROWS:
        findings.append(
            Finding(
                Guard.FEW_ROWS,
                f"{rows:,} training rows, fewer than {MIN_TRAIN_ROWS}",
                "add rows" if spec.max_train_rows is None or spec.max_train_rows >= MIN_TRAIN_ROWS
                else "raise `curate.max_train_rows`",
            )
        )  # fmt: skip
    small = {label: train[label] for label in task.labels if train[label] < MIN_CLASS_ROWS}
    if small:
        listed = ", ".join(f"{label} {count}" for label, count in small.items())
        findings.append(
            Finding(
                Guard.SMALL_CLASS,
                f"labels with fewer than {MIN_CLASS_ROWS} training rows: {listed}",
                "add rows with these labels, or raise `curate.max_train_rows`",
            )
        )
    if learning_rate > HIGH_LEARNING_RATE and rows < ROWS_FOR_HIGH_LEARNING_RATE:
        findings.append(
            Finding(
                Guard.LEARNING_RATE,
                f"a learning rate above {HIGH_LEARNING_RATE:g} with {rows:,} training rows, "
                f"fewer than {ROWS_FOR_HIGH_LEARNING_RATE:,}",
                f"set `train.learning_rate` to {HIGH_LEARNING_RATE:g} or less, or add rows",
            )
        )
    if drift > spec.max_label_drift:
        findings.append(
            Finding(
                Guard.LABEL_DRIFT,
                f"the label mix of the rows is {drift:.2f} away from that of the golden set, more than "
                f"{spec.max_label_drift:g}",
                "look at the classes in the data report, since the golden set then measures another task than the rows "
                "teach: freeze a new one, or raise `curate.max_label_drift`",
            )
        )
    return settle(findings, spec.accept_risks, DataError)
