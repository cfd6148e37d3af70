"""Time and cost to the end of a training, and the price of a device."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tasks.contracts.spec import TrainSpec
from tasks.training.forecast import cost_of, device_words, duration, forecast, looks_to_go, price_of, seconds_to_go
from tasks.training.recipe import TrainPlan, make_plan


def plan_of(total_steps: int, evaluations: int = 4) -> TrainPlan:
    return make_plan(TrainSpec(batch_size=1, epochs=1, evaluations=evaluations), total_steps, 20)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (130, "2 min 10 s"),
        (3_599.9, "1 h"),
        (3_600, "1 h"),
        (3_629, "1 h"),
        (3_631, "1 h 1 min"),
        (11_100, "3 h 5 min"),
        (86_399, "24 h"),
        (86_400, "1 d"),
        (93_600, "1 d 2 h"),
    ],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("total", "evaluations", "step", "looks"),
    [(100, 4, 0, 4), (100, 4, 24, 4), (100, 4, 25, 3), (100, 4, 99, 1), (100, 4, 100, 0), (10, 4, 0, 4), (10, 4, 9, 1)],
)
def test_looks_to_go(total: int, evaluations: int, step: int, looks: int) -> None:
    """10 steps in 4 looks: after 3, 6, 9 and the last."""
    assert looks_to_go(plan_of(total, evaluations), step) == looks


def test_the_forecast() -> None:
    plan = plan_of(128)
    assert seconds_to_go(plan, 3, 1.0) == 125.0
    assert seconds_to_go(plan, 3, 1.0, 5.0) == 145.0
    assert forecast(plan, 1.04, step=3) == "125 steps to go, about 2 min 10 s"
    assert (
        forecast(plan, 1.04, 0.08, step=3) == "125 steps to go, about 2 min 10 s, cost about 0.0029 (at 0.08 an hour)"
    )
    assert forecast(plan, 1.04, 3.6, step=3, devices=2) == (
        "125 steps to go, about 2 min 10 s, cost about 0.26 (at 3.6 an hour for each of 2 devices)"
    )
    assert forecast(plan, 1.0, step=127, seconds_per_look=9.0) == "1 step to go, about 10 s"
    assert forecast(plan, 1.0, 0.0, step=127) == "1 step to go, about 1 s, cost about 0 (at 0 an hour)"
    assert cost_of(1_800, 3.0, 2) == 3.0


@pytest.mark.parametrize(
    ("prices", "words", "price"),
    [
        ({}, "NVIDIA H200 (cuda)", None),
        ({"H100": 2.0}, "NVIDIA H200 (cuda)", None),
        ({"h200": 4.0, "nvidia": 1.0}, "NVIDIA H200 (cuda)", 1.0),
        ({"H200": 4.0, "GPU": 1.0}, "NVIDIA H200 (cuda)", 4.0),
        ({"cpu": 0.08, "EPYC": 0.1}, "AMD EPYC 9654, 2 cores (cpu)", 0.1),
        ({"cpu": 0.08}, "AMD EPYC 9654, 2 cores (cpu)", 0.08),
        ({"H200": 4.0, "cuda": 5.0}, "NVIDIA H200 (cuda)", 5.0),  # as long as each other: the dearer
        ({"": 9.0}, "NVIDIA H200 (cuda)", None),
    ],
)
def test_the_price_of_a_device(prices: dict[str, float], words: str, price: float | None) -> None:
    assert price_of(prices, words) == price


def test_the_words_for_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: AMD EPYC 9654\nprocessor\t: 1\nmodel name\t: AMD EPYC 9654\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5})
    assert device_words("cpu", cpuinfo) == "AMD EPYC 9654, 2 cores (cpu)"
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert device_words("cpu", tmp_path / "missing") == "aarch64, 1 core (cpu)"
