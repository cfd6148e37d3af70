"""The prices example with the real 135M model, as a user runs it: from the command line to an answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ASK = """
import json, mlflow
answers = mlflow.pyfunc.load_model("models:/prices@champion").predict(["EUR 1.234,50", "$ 12.99"])
print("ANSWERS " + json.dumps(answers))
"""


def goldgate(store: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_", "OMP_"))
    }
    return subprocess.run(
        [sys.executable, "-m", "goldgate", *arguments],
        cwd=ROOT,
        env=environment | {"GOLDGATE_STORE": str(store)},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_prices_from_rows_to_an_answer(tmp_path: Path) -> None:
    store = tmp_path / "store"
    config = "examples/prices/prices.yaml"

    first = goldgate(store, "run", config, "--require-promote")

    assert first.returncode == 0, first.stdout + first.stderr
    folder = Path(first.stdout.strip().splitlines()[-1])
    verdict = json.loads((folder / "verdict.json").read_text())
    assert verdict["verdict"] == "promote"
    metrics = verdict["metrics"]
    assert {"exact_match", "valid_output", "field:amount", "field:currency"} <= metrics.keys()
    # Far below what the example's README states, far above what an untuned or broken model reaches.
    assert metrics["exact_match"]["candidate"] > 0.4
    assert metrics["valid_output"]["candidate"] > 0.9
    assert verdict["registered"]["version"] == "1"
    assert "<html" in (folder / "report.html").read_text()

    checked = goldgate(store, "verify", "models:/prices@champion")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "PROMOTE, computed again from 240 items: the same" in checked.stdout

    again = goldgate(store, "run", config)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "Reused from earlier runs:" in again.stdout
    kept = json.loads((Path(again.stdout.strip().splitlines()[-1]) / "verdict.json").read_text())
    assert kept["metrics"] == metrics
    assert kept["registered"] == verdict["registered"]
    assert "1 look, 1 promoted" in goldgate(store, "ledger", "show", "prices").stdout

    asked = subprocess.run(
        [sys.executable, "-c", ASK],
        cwd=tmp_path,
        env=os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{store}/mlflow.db", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert asked.returncode == 0, asked.stderr
    (line,) = [line for line in asked.stdout.splitlines() if line.startswith("ANSWERS ")]
    answers = [json.loads(answer) for answer in json.loads(line.removeprefix("ANSWERS "))]
    assert [set(answer) for answer in answers] == [{"amount", "currency"}] * 2
    assert answers[1] == {"amount": 12.99, "currency": "$"}
