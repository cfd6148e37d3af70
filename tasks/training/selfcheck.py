"""Before the long run one batch is learned by heart: what cannot do that will not learn from thousands either.

It finds labels that are all masked, an adapter that is frozen or not connected, a loss that is not about the answers,
and a learning rate that moves nothing, within seconds instead of at the end. The run that follows is the run that would
have been without it, bit for bit.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

from tasks.contracts.errors import TrainingError
from tasks.contracts.guards import Finding, settle
from tasks.contracts.spec import Guard

LEARNED = 0.5  # of the first loss: reached, the check ends
# By so much of the first loss it has to fall with each step, or the guard objects. Asked for is a sign of life, since
# an objection that is wrong costs a person more than this check saves. Measured, loss after 0, 1, 2, 3 steps: adapter
# of rank 16 on a 135M model, two complaints, at 2e-4 10.4, 9.1, 7.7, 6.5, at 2e-3 10.4, 4.8, 1.4, 0.1, at 1e-2 10.4,
# 7.3, 7.4, 0.8 and back at 7; all of its weights at 5e-5 10.4, 5.2, 2.9, 1.4, at 1e-3 10.4, 8.1, 4.0, 0.6; a model of
# random weights, which has no knowledge to build on, loses 1 to 2 % with each step.
LEAST_FALL = 0.005
MAX_STEPS = 10
COST_SHARE = 0.05  # of the run's steps, at most
_MIN_STEPS = 3
# Ten times the run's rate, since there are few steps, but no more than what learns one batch without jumping about.
_FASTER = 10.0
_HIGHEST_RATE_OF_ADAPTER, _HIGHEST_RATE = 2e-3, 1e-3
_KNOWN = 0.01  # nats per answer token: the model says this batch already, and there is nothing to see


class SelfCheck(NamedTuple):
    """What became of one batch.

    Attributes:
        first_loss: before any step, in the unit of the loss; NaN where it was skipped.
        last_loss: after the last step.
        steps: steps taken.
        rate: learning rate of these steps.
        seconds: wall time.
        finding: what the guard found and was overridden on; None where the batch was learned.
        skipped: why there was no check; None where there was one.
    """

    first_loss: float
    last_loss: float
    steps: int
    rate: float
    seconds: float
    finding: Finding | None = None
    skipped: str | None = None

    def sentence(self) -> str:
        """The result in one line."""
        if self.skipped is not None:
            return f"self-check skipped: {self.skipped}"
        words = "self-check" if self.finding is None else "self-check, overridden"
        return (
            f"{words}: loss of one batch {self.first_loss:.3f} -> {self.last_loss:.3f} in {self.steps} "
            f"step{'' if self.steps == 1 else 's'}, {self.seconds:.1f} s"
        )


def steps_for(total_steps: int) -> int:
    """How many steps a self-check may take before a run of so many; 0 where the run is too short to be worth one."""
    steps = min(MAX_STEPS, math.floor(COST_SHARE * total_steps))
    return steps if steps >= _MIN_STEPS else 0


def check_it_can_learn(
    model: torch.nn.Module,
    batches: Sequence[Mapping[str, Any]],
    loss_of: Callable[[Any, Any], torch.Tensor],
    learning_rate: float,
    accept_risks: Mapping[Guard, str],
    *,
    steps: int = MAX_STEPS,
) -> SelfCheck:
    """Learn one batch by heart in a few steps of plain AdamW, then put everything back as it was.

    Trainable weights, buffers, gradients, the training mode and the states of all random number generators (Python,
    NumPy, torch on CPU and GPU) are restored to the bit, whatever happens.

    Args:
        model: in the state in which training begins.
        batches: what makes one step; the losses of several are added up. A few rows are enough, and cheap.
        loss_of: the loss of the model on a batch, as training takes it: negative log-likelihood, a scalar.
        learning_rate: the run's peak.
        accept_risks: guards that are overridden, with reasons.
        steps: at most so many (see `steps_for`); 0 skips the check.

    Raises:
        TrainingError: the batch cannot be learned and there is no reason to go on.
    """
    if steps == 0:
        least = math.ceil(_MIN_STEPS / COST_SHARE)
        why = f"the run has fewer than {least} steps"
        return SelfCheck(math.nan, math.nan, 0, 0.0, 0.0, skipped=why)
    started = time.monotonic()
    trainable = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    highest = _HIGHEST_RATE_OF_ADAPTER if any("lora_" in name for name in trainable) else _HIGHEST_RATE
    rate = min(_FASTER * learning_rate, highest)
    losses: list[float] = []
    found: tuple[str, str] | None
    if not trainable:
        found = "no weight of the model is trainable", "look at `train.adapter.targets` and at what froze the model"
    else:
        with _restored(model, trainable):
            found = _learn(model, trainable, batches, loss_of, rate, steps, losses)
    first, last = (losses[0], losses[-1]) if losses else (math.nan, math.nan)
    check = SelfCheck(first, last, max(0, len(losses) - 1), rate, time.monotonic() - started)
    if found is None:
        return check
    finding = Finding(Guard.SELF_CHECK, *found)
    return check._replace(finding=settle([finding], accept_risks, TrainingError, "One batch cannot be learned")[0])


def _learn(
    model: torch.nn.Module,
    trainable: Mapping[str, torch.nn.Parameter],
    batches: Sequence[Mapping[str, Any]],
    loss_of: Callable[[Any, Any], torch.Tensor],
    rate: float,
    steps: int,
    losses: list[float],
) -> tuple[str, str] | None:
    """Take the steps, noting the loss before each and after the last; what is wrong and what to do, or None."""
    model.train()
    optimizer = torch.optim.AdamW(trainable.values(), lr=rate, weight_decay=0.0)
    for step in range(steps + 1):
        optimizer.zero_grad(set_to_none=True)
        loss = 0.0
        for batch in batches:
            part = loss_of(model, batch)
            loss += float(part.detach())
            # Not after the last step, where nothing follows; a loss that hangs on no weight has no gradient at all.
            if step < steps and part.requires_grad:
                part.backward()
        losses.append(loss)
        found = _is_no_loss(loss)
        if found is not None:
            return found
        if step == 0:
            found = _has_no_gradient(trainable)
            if found is not None:
                return found
        if loss <= max(LEARNED * losses[0], _KNOWN):
            return None
        if step < steps:
            optimizer.step()
    if min(losses) <= (1.0 - LEAST_FALL * steps) * losses[0]:
        return None
    return (
        f"in {steps} steps at a learning rate of {rate:.2g} its loss went from {losses[0]:.4f} to {losses[-1]:.4f}, "
        f"and {LEAST_FALL * steps:.1%} less was the least to expect",
        "raise `train.learning_rate`, or look at which layers are trained (`train.adapter.targets`)",
    )


def _is_no_loss(loss: float) -> tuple[str, str] | None:
    if not math.isfinite(loss):
        return f"its loss is {loss}", "lower `train.learning_rate`, or look for damaged rows and weights"
    if loss == 0.0:
        return (
            "its loss is 0, so no token of an answer is in it",
            "look at how answers are marked: the labels of this batch seem to be masked, all of them",
        )
    if loss < 0.0:
        return (
            f"its loss is {loss:.3f}, and a negative log-likelihood is never below 0",
            "look at the loss that is handed to the trainer",
        )
    return None


def _has_no_gradient(trainable: Mapping[str, torch.nn.Parameter]) -> tuple[str, str] | None:
    if any(weight.grad is not None and bool(weight.grad.any()) for weight in trainable.values()):
        return None
    return (
        f"none of the {len(trainable):,} trainable weight matrices has a gradient",
        "look at what stands between them and the loss: a layer that is frozen or not used, a loss that is detached",
    )


@contextmanager
def _restored(model: torch.nn.Module, trainable: Mapping[str, torch.nn.Parameter]) -> Iterator[None]:
    """Put the model and all random number generators back as they were when the block began."""
    training = {module: module.training for module in model.modules()}
    # On the CPU, since a GPU that is nearly full has no room for a second copy.
    kept = {name: weight.detach().to("cpu", copy=True) for name, weight in trainable.items()}
    gradients = {name: weight.grad for name, weight in trainable.items()}
    buffers = [(buffer, buffer.detach().to("cpu", copy=True)) for buffer in model.buffers()]
    for weight in trainable.values():
        weight.grad = None  # so that what was there is not added to
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    device_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        with torch.no_grad():
            for name, weight in trainable.items():
                weight.copy_(kept[name])  # in place: optimisers and fused layers hold on to this very tensor
                weight.grad = gradients[name]
            for buffer, before in buffers:
                buffer.copy_(before)
        for module, mode in training.items():
            module.training = mode
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if device_states:
            torch.cuda.set_rng_state_all(device_states)
