"""A worker loads a flow to read its schema and to start it: that must not load what only some stages need."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "vllm", "great_expectations", "mlflow", "datasets", "peft", "trl", "bitsandbytes")
LIGHT = (
    "flows.retrain",
    "flows.train",
    "flows.evaluate",
    "flows.synthesize",
    "flows.distill",
    "flows.prefer",
    "flows.sweep",
    "flows.rollout",
    "flows.monitor",
    "flows.review",
    "flows.shadow_report",
    "tasks.contracts",
    "tasks.contracts.spec",
    "tasks.contracts.references",
    "tasks.contracts.synthesis",
    "tasks.contracts.distill",
    "tasks.contracts.sweep",
    "tasks.contracts.prefer",
    "tasks.contracts.monitor",
    "tasks.contracts.dev",
    "tasks.store",
    "tasks.runtime",
    "goldgate.cli",
    "goldgate.services",
    "goldgate.presets",
    "goldgate.synthesize",
    "goldgate.distill",
    "goldgate.prefer",
    "goldgate.sweep",
    "goldgate.monitor",
    "goldgate.review",
    "goldgate.rollout",
    "goldgate.shadow",
)
_SCRIPT = """
import importlib, json, sys
for name in sys.argv[2].split(","):
    importlib.import_module(name)
print(json.dumps([name for name in sys.argv[1].split(",") if name in sys.modules]))
"""


def loaded_by(*modules: str) -> list[str]:
    """Which heavy packages a fresh process has loaded after importing these modules."""
    command = [sys.executable, "-c", _SCRIPT, ",".join(HEAVY), ",".join(modules)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert isinstance(found, list)
    return found


def test_flows_and_contracts_load_nothing_heavy() -> None:
    assert loaded_by(*LIGHT) == []


@pytest.mark.parametrize(("module", "heavy"), [("mlflow", "mlflow")])
def test_the_check_can_fail(module: str, heavy: str) -> None:
    assert heavy in loaded_by(module)
