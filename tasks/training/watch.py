"""Listens to a training: progress, curves and metrics as they come; ends it early."""

from __future__ import annotations

import math
import resource
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from tasks.contracts.errors import PrunedError, TrainingError
from tasks.contracts.guards import Finding
from tasks.contracts.progress import Progress
from tasks.training.checkpoints import CURVES, mark_complete, prune
from tasks.training.curve import Curve
from tasks.training.forecast import forecast
from tasks.training.guards import GradientLog, GradientWatch
from tasks.training.job import TrainJob, append_record, write_progress
from tasks.training.recipe import TrainPlan, looks_without_gain

_STEPS_TO_GO_BY = 3  # steps after which the time that is left can be told


class Watcher(TrainerCallback):
    """Writes progress, curves and metrics as they come; marks checkpoints whole; stops early."""

    def __init__(
        self,
        job: TrainJob,
        plan: TrainPlan,
        run: Curve | None,
        tokens_at: list[int],
        *,
        price: float | None = None,
        devices: int = 1,
    ) -> None:
        self.job = job
        self.plan = plan
        self.run = run
        self.price = price  # of an hour of one device
        self.devices = devices
        self.gradients = GradientWatch(plan.learning_rate, plan.gradient_norm, job.request.accept_risks)
        self.findings: list[Finding] = []  # of guards that are overridden
        self.tokens_at = tokens_at  # tokens trained on after each optimiser step
        self.seconds_before = 0.0  # spent by earlier processes, up to the checkpoint
        self.started = time.monotonic()
        self.started_step = 0
        self.loss_note = ""
        self.dev_note = ""

    def seconds(self) -> float:
        """Wall time of training so far, over all processes."""
        return self.seconds_before + time.monotonic() - self.started

    def begin(self, step: int, seconds: float) -> None:
        """Training starts now, at this step."""
        self.started_step, self.seconds_before, self.started = step, seconds, time.monotonic()
        self._say(step)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Know the gradients up to the checkpoint."""
        self.gradients.restore(state.log_history)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save at the plan's steps, look and save after the last one; say how far it is."""
        if state.global_step >= state.max_steps:  # the last step is a look too, wherever the interval falls
            control.should_evaluate = control.should_save = True
        if state.global_step % self.plan.checkpoint_steps == 0:
            control.should_save = True
        if control.should_save:
            control.should_log = True  # a point's loss is a mean since the last one, which a checkpoint does not keep
        if state.is_world_process_zero:
            self._say(state.global_step)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        """Write what was measured to the curves and MLflow.

        Raises:
            TrainingError: a loss or gradient is not finite, or gradients explode and nobody accepts that.
        """
        if not logs or not ({"loss", "eval_loss"} & logs.keys()):
            return
        step = state.global_step
        loss, dev_loss = logs.get("loss"), logs.get("eval_loss")
        if loss is not None:
            found = self.gradients.look(GradientLog(step, float(logs["grad_norm"]), float(loss)))
            self.findings += [] if found is None else [found]
        if dev_loss is not None and not math.isfinite(dev_loss):
            raise TrainingError(
                f"Training diverged: the dev loss at step {step} is {dev_loss}.",
                where=f"train.learning_rate = {self.plan.learning_rate}",
                fix="lower `train.learning_rate` (half is a good try), or look for damaged rows",
            )
        if not state.is_world_process_zero:
            return
        record: dict[str, Any] = {"step": step}
        if loss is not None:
            since = time.monotonic() - self.started
            done = self.tokens_at[step - 1] - (self.tokens_at[self.started_step - 1] if self.started_step else 0)
            record |= {
                "loss": round(loss, 6),
                "learning_rate": logs["learning_rate"],
                "tokens_per_second": round(done / since, 1),
            }
            self.loss_note = f"loss {loss:.3f}"
        if dev_loss is not None:
            record |= {"dev_loss": round(dev_loss, 6)}
            self.dev_note = f"dev loss {dev_loss:.3f}"
        append_record(self.job.scratch / CURVES, record)
        if self.run is not None:
            metrics = {name: value for name, value in record.items() if name != "step"}
            self.run.log_metrics(metrics | {"peak_memory_bytes": peak_memory_bytes()}, step=step)
        self._say(step)

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop when the dev loss has not got better for `patience` looks.

        Raises:
            PrunedError: it is above the limit that the request sets for this look.
        """
        looks = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
        for limit in self.job.request.stop_above:
            if limit.look == len(looks) and min(looks) > limit.dev_loss:
                raise PrunedError(
                    f"Given up at look {limit.look} (step {state.global_step}): the best dev loss so far is "
                    f"{min(looks):.4f}, and other trials were at {limit.dev_loss:.4f} by then.",
                    where="stop_above",
                    fix="nothing; to train it to its end all the same, train its recipe on its own",
                )
        if looks_without_gain(looks) >= self.plan.patience:
            control.should_training_stop = True

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Mark the checkpoint as whole, once all processes have written their part of it."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            mark_complete(folder, state.global_step, self.seconds())
            prune(self.job.scratch)

    def _say(self, step: int) -> None:
        note = ", ".join(part for part in (self.loss_note, self.dev_note, self._to_go(step)) if part)
        write_progress(self.job.scratch, Progress(step, self.plan.total_steps, "steps", note))

    def _to_go(self, step: int) -> str:
        """Time and cost to the end, once there are some steps to go by; what looks took is in the steps' mean."""
        taken = step - self.started_step
        if taken < _STEPS_TO_GO_BY or step >= self.plan.total_steps:
            return ""
        each = (time.monotonic() - self.started) / taken
        return forecast(self.plan, each, self.price, step=step, devices=self.devices)


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far; on CUDA the largest device allocation."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
