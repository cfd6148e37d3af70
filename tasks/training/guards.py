"""Guards on a training, from practice: before it, on what it will be shown; during it, on its gradients; after it, on
whether it changed anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.contracts.errors import TrainingError
from tasks.contracts.guards import Finding, settle
from tasks.contracts.rows import Row
from tasks.contracts.spec import Guard, TaskSpec
from tasks.training.examples import Example

if TYPE_CHECKING:
    from torch import Tensor

MIN_DEV_ROWS = 20  # with fewer, one odd row moves the dev loss more than an epoch does
# A gradient is exploding when its norm stays above so many times its running median, over so many logs on end, while
# the loss lies above so many times its own. A single odd batch does not do that, nor does the start of a training,
# where norms are large and fall; nor does a warm-up, where norms may rise and the loss falls.
EXPLODING_NORM = 20.0
EXPLODING_LOSS = 1.5
EXPLODING_LOGS = 3
_BEFORE = 20  # logs that the medians are taken over, right before those
_MIN_BEFORE = 5
_PARTED = 1.02  # times the best dev loss; less is the noise of a look


# -- before -------------------------------------------------------------------------------------------------------


def check_training(
    examples: Sequence[Example],
    rows: Sequence[Row],
    order: Sequence[int],
    dev_rows: int,
    task: TaskSpec,
    accept_risks: Mapping[Guard, str],
) -> list[Finding]:
    """The guards on what a training will be shown that object and are overridden.

    Args:
        examples: the training rows as tokens.
        rows: the same rows, in the same order.
        order: the rows that are trained on, as indices into them.
        dev_rows: rows that the dev loss is taken on.
        task: its labels.
        accept_risks: guards that are overridden, with reasons.

    Raises:
        TrainingError: a guard objects and there is no reason to go on.
    """
    findings = []
    empty = [row for row, example in zip(rows, examples, strict=True) if example.answer_tokens < 1]
    if empty:
        findings.append(
            Finding(
                Guard.UNSEEN_ANSWER,
                f"{len(empty):,} of {len(rows):,} training rows have no token of their answer in the loss, the first "
                f"is {empty[0].id} (line {empty[0].line} of the source)",
                "use a base model whose chat template writes the answer, and look at these rows",
            )
        )
    trained = {rows[index].target for index in order}
    unseen = [label for label in task.labels if label not in trained]
    if unseen:
        findings.append(
            Finding(
                Guard.UNSEEN_ANSWER,
                f"training takes {len(order):,} rows, and none of them has the label {', '.join(map(repr, unseen))}",
                "raise `train.epochs` to 1 or more so that every row is seen, or add rows with the label",
            )
        )
    if dev_rows < MIN_DEV_ROWS:
        findings.append(
            Finding(
                Guard.DEV_ROWS,
                f"the dev loss rests on {dev_rows} row{'' if dev_rows == 1 else 's'}, fewer than {MIN_DEV_ROWS}, and "
                "early stopping and the choice of the best checkpoint go by it",
                "raise `curate.dev_share`, or add rows",
            )
        )
    return settle(findings, accept_risks, TrainingError)


# -- during -------------------------------------------------------------------------------------------------------


class GradientLog(NamedTuple):
    """What a training logged at a step: the norm of the gradient before clipping, and the training loss."""

    step: int
    norm: float
    loss: float


def gradient_logs(history: Sequence[Mapping[str, Any]]) -> list[GradientLog]:
    """The logs of training steps in the Trainer's `log_history`, which checkpoints keep; looks at dev are left out."""
    return [
        GradientLog(int(entry["step"]), float(entry["grad_norm"]), float(entry["loss"]))
        for entry in history
        if entry.get("grad_norm") is not None and entry.get("loss") is not None
    ]


class GradientWatch:
    """Stops a training whose gradients explode, or are not finite.

    All that it knows are the last logs. A resumed training hands over the log history of its checkpoint and goes on as
    if it had never stopped.
    """

    def __init__(self, learning_rate: float, clip: float, accept_risks: Mapping[Guard, str]) -> None:
        """Watch a training.

        Args:
            learning_rate: its peak, for words.
            clip: what the gradient's norm is clipped at; a norm below it does no harm, however it compares.
            accept_risks: guards that are overridden, with reasons.
        """
        self._learning_rate = learning_rate
        self._clip = clip
        self._accept_risks = accept_risks
        self._logs: list[GradientLog] = []

    def restore(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Know what was logged up to a checkpoint; says nothing of it."""
        self._logs = gradient_logs(history)[-(_BEFORE + EXPLODING_LOGS) :]

    def look(self, log: GradientLog) -> Finding | None:
        """Take in a log; the finding where gradients have just begun to explode and the guard is overridden.

        Raises:
            TrainingError: norm or loss is not finite, or gradients explode and there is no reason to go on.
        """
        for name, value in (("training loss", log.loss), ("gradient norm", log.norm)):
            if not math.isfinite(value):
                raise TrainingError(
                    f"Training diverged: the {name} at step {log.step} is {value}.",
                    where=f"train.learning_rate = {self._learning_rate}",
                    fix="lower `train.learning_rate` (half is a good try), or look for damaged rows",
                )
        was_exploding = _exploding(self._logs, self._clip)
        self._logs = [*self._logs, log][-(_BEFORE + EXPLODING_LOGS) :]
        if was_exploding or not _exploding(self._logs, self._clip):
            return None
        before = self._logs[:-EXPLODING_LOGS]
        finding = Finding(
            Guard.GRADIENTS,
            f"gradients explode: at step {log.step} their norm is {log.norm:.3g}, for {EXPLODING_LOGS} logs on end "
            f"more than {EXPLODING_NORM:g} times its median ({median(one.norm for one in before):.3g}), and the loss "
            f"has risen to {log.loss:.3g} from {median(one.loss for one in before):.3g}",
            "lower `train.learning_rate` (half is a good try), or look for damaged rows",
        )
        return settle([finding], self._accept_risks, TrainingError, "Training is going wrong")[0]


def _exploding(logs: Sequence[GradientLog], clip: float) -> bool:
    before, last = logs[:-EXPLODING_LOGS], logs[-EXPLODING_LOGS:]
    if len(before) < _MIN_BEFORE:
        return False
    norm = max(clip, EXPLODING_NORM * median(log.norm for log in before))
    loss = EXPLODING_LOSS * median(log.loss for log in before)
    return all(log.norm > norm and log.loss > loss for log in last)


def losses_at_looks(history: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    """The mean training loss between looks at dev, and the dev losses, from the Trainer's `log_history`.

    A look with no training log since the last one has that one's training loss; looks before any log are left out.
    """
    losses: list[float] = []
    dev_losses: list[float] = []
    since: list[float] = []
    for entry in history:
        if entry.get("loss") is not None:
            since.append(float(entry["loss"]))
        if entry.get("eval_loss") is not None and (since or losses):
            losses.append(sum(since) / len(since) if since else losses[-1])
            dev_losses.append(float(entry["eval_loss"]))
            since = []
    return losses, dev_losses


def dev_loss_parted(losses: Sequence[float], dev_losses: Sequence[float]) -> str | None:
    """Words on a dev loss that rises while the training loss falls; None where it does not.

    Args:
        losses: training loss up to each look, nats per answer token.
        dev_losses: dev loss at each look.

    Raises:
        ValueError: there is not one training loss for each look.
    """
    if len(losses) != len(dev_losses):
        raise ValueError(f"{len(losses)} training losses and {len(dev_losses)} dev losses")
    if len(losses) < 2:
        return None
    best = min(range(len(dev_losses)), key=dev_losses.__getitem__)
    if dev_losses[-1] <= _PARTED * dev_losses[best] or losses[-1] >= losses[best]:
        return None
    return (
        f"dev loss parted from training loss after look {best + 1} of {len(dev_losses)}: dev rose from "
        f"{dev_losses[best]:.3f} to {dev_losses[-1]:.3f} while training fell from {losses[best]:.3f} to "
        f"{losses[-1]:.3f}, so rows were being learned by heart; what was best on dev is kept"
    )


# -- after --------------------------------------------------------------------------------------------------------


def fingerprint_weights(model: Any) -> dict[str, int]:
    """A number for each trainable parameter that any change of its bits changes, but for chance: their sum, as
    integers of 64 bits. It is worked out where the parameter is, so that it costs one pass over it.
    """
    return {name: _sum_of_bits(weight) for name, weight in model.named_parameters() if weight.requires_grad}


def _sum_of_bits(weight: Tensor) -> int:
    import torch

    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    return int(weight.detach().contiguous().view(whole).sum(dtype=torch.int64).item())


def check_changed(before: Mapping[str, int], model: Any, accept_risks: Mapping[Guard, str]) -> list[Finding]:
    """Refuse a training that changed nothing that matters.

    An adapter adds B A, and B starts at zero: while every B is zero it adds nothing, whatever became of A. Without an
    adapter (a full fine-tune) some weight must have other bits than `before`, see `fingerprint_weights`.

    Raises:
        TrainingError: nothing is trainable; or nothing changed, and there is no reason to go on.
    """
    trained = (
        dict(model)  # gathered from several processes
        if isinstance(model, Mapping)
        else {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    )
    if not trained:
        raise TrainingError(
            "Nothing was trained: the model has no trainable weight.",
            where="train.method",
            fix="use `train.adapter.targets` that match layers of the base model, or leave it out",
        )
    ups = [weight for name, weight in trained.items() if "lora_B" in name]
    if ups:
        changed = any(bool(weight.detach().any()) for weight in ups)
        found = "training changed nothing: every B of the adapter is zero, as it was at the start"
    else:
        changed = {name: _sum_of_bits(weight) for name, weight in trained.items()} != dict(before)
        found = f"training changed nothing: the {len(trained):,} trained weight matrices are as they were at the start"
    if changed:
        return []
    finding = Finding(Guard.UNCHANGED, found, "raise `train.epochs` or `train.learning_rate`")
    return settle([finding], accept_risks, TrainingError, "The model is the base model")
