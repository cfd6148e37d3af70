"""The name of a run of `retrain`, as Prefect shows it."""

from __future__ import annotations

from typing import Any

import pytest

from tasks.report import steps


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"spec": {"name": "prices"}}, "retrain prices"),  # parameters of a deployment, as they come over the API
        ({"spec": {"name": "prices"}, "reason": None}, "retrain prices"),
        ({"spec": {"name": "prices"}, "reason": "drift: lengths (0.2, limit 0.1)"},
         "retrain prices (drift: lengths (0.2, limit 0.1))"),
    ],
)  # fmt: skip
def test_a_run_is_named_for_its_task_and_its_reason(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], name: str
) -> None:
    monkeypatch.setattr(steps.flow_run, "parameters", given, raising=False)
    assert steps.retrain_run_name() == name
