"""Stops a training at the end of a step, with a checkpoint, when the process is told to end (SIGTERM)."""

from __future__ import annotations

import logging
import signal
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from tasks.training.job import Preempted

log = logging.getLogger("goldgate.training")


def install() -> Preemption:
    """Have SIGTERM end the training after the step that it is at; outside of steps it is an interrupt, as before.

    Only the main thread can do this. From then on, a second SIGTERM, or a SIGINT, interrupts at once.
    """
    preemption = Preemption()
    signal.signal(signal.SIGTERM, preemption.hear)
    return preemption


class Preemption:
    """A wish to stop, from the signal until training has stopped.

    Attributes:
        step: the step after which training stopped for it; None as long as it has not.
    """

    def __init__(self) -> None:
        self.step: int | None = None
        self.asked = False
        self.stepping = False  # before and after the steps there is nothing to keep, and so nothing to wait for

    def hear(self, *_: object) -> None:
        """Answer the signal.

        Raises:
            KeyboardInterrupt: no steps are being taken, or it is the second time.
        """
        if self.asked or not self.stepping:
            raise KeyboardInterrupt
        self.asked = True
        log.info("told to stop: saving a checkpoint after this step; once more ends it at once")

    def callback(self) -> TrainerCallback:
        """What makes the Trainer save and stop; add it after all others that decide about saving."""
        return _StopAfterStep(self)

    def leave_if_preempted(self) -> None:
        """Go no further than the steps.

        Raises:
            Preempted: training was told to stop and did.
        """
        if self.step is not None:
            raise Preempted(self.step)


class _StopAfterStep(TrainerCallback):
    def __init__(self, preemption: Preemption) -> None:
        self.preemption = preemption

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.preemption.stepping = True

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if agree(self.preemption.asked, args.device):
            self.preemption.step = state.global_step
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.preemption.stepping = False
        if self.preemption.asked and self.preemption.step is None:  # after the last step, whose checkpoint is there
            raise KeyboardInterrupt


def agree(asked: bool, device: torch.device) -> bool:
    """Whether any of the processes that train together was asked: all of them must stop at the same step."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return asked
    anyone = torch.tensor(int(asked), device=device)
    distributed.all_reduce(anyone, op=distributed.ReduceOp.MAX)
    return bool(anyone.item())
