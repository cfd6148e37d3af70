"""The one clock for all trainers: how long steps take, without loading, looks at the dev loss and checkpoints.

`python -m bench.training.clock CLOCK.json MODULE ARGUMENTS...` runs a module as `python -m` would, with the clock among
the callbacks of every transformers Trainer in it, and writes what it saw when a training ends.
"""

from __future__ import annotations

import json
import runpy
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

BEGIN, STEP, PAUSE = "begin", "step", "pause"


class Event(NamedTuple):
    """Something that the clock saw.

    Attributes:
        kind: "begin" (all is loaded), "step" (an optimiser step has ended) or "pause" (a look or a checkpoint has).
        wall: seconds on the wall clock.
        cpu: processor seconds of the process, all threads together.
        peak_bytes: largest memory so far: resident set, on CUDA what tensors took of the device.
    """

    kind: str
    wall: float
    cpu: float
    peak_bytes: int


class Account(NamedTuple):
    """What the steps of a training took.

    Attributes:
        steps: how many are counted.
        seconds: wall time of these steps, with fetching their batches and logging, without looks and checkpoints.
        cpu_seconds: processor time likewise.
        pause_seconds: wall time of looks and checkpoints between them.
        first_seconds: wall time of the very first step, counted or not.
        peak_bytes: largest memory from the start of the process to the last step.
    """

    steps: int
    seconds: float
    cpu_seconds: float
    pause_seconds: float
    first_seconds: float
    peak_bytes: int


def account(events: Sequence[Event], warm_up: int = 0) -> Account:
    """Add up the steps after the first `warm_up` ones.

    From the end of a step to the last look or checkpoint before the next step ends, time does not count: trainers log,
    look and save there, one after the other, and only then fetch the next batch.

    Raises:
        ValueError: there are not more than `warm_up` steps.
    """
    before = events[0]
    assert before.kind == BEGIN
    steps = seconds = cpu = paused = first = 0.0
    last = resumed = before
    for event in events[1:]:
        if event.kind == PAUSE:
            resumed = event
            continue
        took = event.wall - resumed.wall
        if not steps:
            first = took
        if steps >= warm_up:
            seconds += took
            cpu += event.cpu - resumed.cpu
            paused += resumed.wall - last.wall
        steps += 1
        last = resumed = event
    if steps <= warm_up:
        raise ValueError(f"a training of {steps:.0f} steps has none after {warm_up} to warm up")
    return Account(int(steps) - warm_up, seconds, cpu, paused, first, last.peak_bytes)


class Training(NamedTuple):
    """A whole training as the clock saw it.

    Attributes:
        events: in order.
        losses: (step, training loss in nats per answer token) of each entry of the log.
    """

    events: list[Event]
    losses: list[tuple[int, float]]

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return sum(event.kind == STEP for event in self.events)


def read_clock(path: Path) -> Training | None:
    """The longest training that a clock file tells of (a check beforehand may be a training too); None before any."""
    if not path.exists():
        return None
    trainings = [
        Training([Event(*event) for event in one["events"]], [(step, loss) for step, loss in one["losses"]])
        for one in json.loads(path.read_text(encoding="utf-8"))
    ]
    return max(trainings, key=lambda one: one.steps)


def resident_peak() -> int:
    """Largest resident set of this process in bytes. (`ru_maxrss` would count that of its parent as well.)"""
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def install(path: Path) -> None:
    """Put a clock into every Trainer that this process makes from now on."""
    import torch
    from transformers import TrainerCallback, trainer

    finished: list[dict[str, Any]] = []
    on_cuda = torch.cuda.is_available()

    class Clock(TrainerCallback):
        """Notes when steps, looks and checkpoints end."""

        def __init__(self) -> None:
            self.events: list[Event] = []

        def _note(self, kind: str) -> None:
            if on_cuda:
                torch.cuda.synchronize()  # what was asked of the device has then been done
            peak = torch.cuda.max_memory_allocated() if on_cuda else resident_peak()
            self.events.append(Event(kind, time.perf_counter(), time.process_time(), peak))

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.events.clear()
            self._note(BEGIN)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self._note(STEP)

        def on_evaluate(self, *_: Any, **__: Any) -> None:
            self._note(PAUSE)

        def on_save(self, *_: Any, **__: Any) -> None:
            self._note(PAUSE)

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            losses = [(entry["step"], entry["loss"]) for entry in state.log_history if "loss" in entry]
            finished.append({"events": self.events, "losses": losses})
            part = path.with_suffix(".part")
            part.write_text(json.dumps(finished), encoding="utf-8")
            part.replace(path)

    trainer.DEFAULT_CALLBACKS.append(Clock)


def main() -> None:
    """Run the module that the command line names, with a clock in it."""
    clock, module, *rest = sys.argv[1:]
    install(Path(clock))
    sys.argv = [module, *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
