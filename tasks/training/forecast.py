"""Time and cost to the end of a training, said after its first steps, and what an hour of the device costs."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path

from tasks.training.recipe import TrainPlan

FIRST_STEPS = 3  # the first one pays for what is done once; the next ones say what a step takes
_MINUTE, _HOUR, _DAY = 60, 3_600, 86_400


def looks_to_go(plan: TrainPlan, step: int) -> int:
    """Looks at the dev loss after so many steps; the last step is always one."""
    regular = plan.total_steps // plan.evaluation_steps - step // plan.evaluation_steps
    last = plan.total_steps % plan.evaluation_steps != 0 and step < plan.total_steps
    return regular + last


def seconds_to_go(plan: TrainPlan, step: int, seconds_per_step: float, seconds_per_look: float = 0.0) -> float:
    """Seconds from `step` to the end, if nothing stops it early."""
    return (plan.total_steps - step) * seconds_per_step + looks_to_go(plan, step) * seconds_per_look


def forecast(
    plan: TrainPlan,
    seconds_per_step: float,
    price_per_hour: float | None = None,
    *,
    step: int = 0,
    seconds_per_look: float = 0.0,
    devices: int = 1,
) -> str:
    """Time and cost to the end of a training, in one line.

    Args:
        plan: how many steps there are, and how many looks at the dev loss.
        seconds_per_step: of an optimiser step, measured.
        price_per_hour: of one device, in whatever money `execution.prices` is in; None says nothing of the cost.
        step: steps taken.
        seconds_per_look: of a look at the dev loss; 0 leaves looks out.
        devices: how many work on it.
    """
    seconds = seconds_to_go(plan, step, seconds_per_step, seconds_per_look)
    steps = plan.total_steps - step
    words = f"{steps:,} step{'' if steps == 1 else 's'} to go, about {duration(seconds)}"
    if price_per_hour is not None:
        hourly = f"{price_per_hour:g} an hour" + (f" for each of {devices} devices" if devices > 1 else "")
        words += f", cost about {cost_of(seconds, price_per_hour, devices):.2g} (at {hourly})"
    return words


def cost_of(seconds: float, price_per_hour: float, devices: int = 1) -> float:
    """What so many seconds of so many devices cost, in the money of the price."""
    return seconds / _HOUR * price_per_hour * devices


def duration(seconds: float) -> str:
    """A length of time in its two largest units: "2 min 10 s", "3 h 5 min", "1 d 2 h"."""
    whole = round(seconds)
    if whole < _MINUTE:
        return f"{whole} s"
    units = ((_DAY, "d", _HOUR, "h"), (_HOUR, "h", _MINUTE, "min"), (_MINUTE, "min", 1, "s"))
    for size, name, part, part_name in units:
        if whole >= size:
            large, rest = divmod(round(whole / part) * part, size)
            small = rest // part
            return f"{large} {name}" + (f" {small} {part_name}" if small else "")
    raise AssertionError("a minute is the smallest of the units")


def price_of(prices: Mapping[str, float], words: str) -> float | None:
    """The price of an hour of a device: of the longest key that is part of its name, in whatever case.

    Of keys of the same length the dearer one counts, so that no cost is told too low.

    Args:
        prices: `execution.prices`.
        words: the device, see `device_words`.

    Returns:
        The price; None where no key is part of the name.
    """
    fitting = [(len(key), price) for key, price in prices.items() if key and key.lower() in words.lower()]
    return max(fitting)[1] if fitting else None


def device_words(device: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The device by name: "NVIDIA H200 (cuda)", or "AMD EPYC 9654, 2 cores (cpu)" with the cores that may be used."""
    if device != "cpu":
        import torch

        return f"{torch.cuda.get_device_name()} ({device})"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return f"{_cpu_model(cpuinfo)}, {cores} core{'' if cores == 1 else 's'} (cpu)"


def _cpu_model(cpuinfo: Path) -> str:
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()
