"""`goldgate synthesize`: its configuration, and what it prints."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from goldgate.synthesize import load_preset, load_synthesis, print_synthesis
from tasks.contracts.errors import SpecError
from tasks.contracts.spec import RetrainSpec
from tasks.contracts.synthesis import SynthesisRef
from tasks.data.golden import freeze
from tests.data.synthesis.fake_teacher import fake_teacher
from tests.toys import toy_rows, write_jsonl

TRAINING = {
    "name": "tickets",
    "task": {"kind": "classify", "instruction": "Which team?", "labels": ["billing", "support"]},
    "data": {"source": "rows.jsonl"},
    "golden": {"path": "golden", "items": 20},
    "base_model": "hf:some/model",
    "train": {"epochs": 1},
}
SYNTHESIS = {
    "task_from": "training.yaml",
    "teacher": {"url": "http://127.0.0.1:8000", "model": "big"},
    "fill": [{"label": "support", "rows": 3}],
}


def write_yaml(path: Path, record: object) -> Path:
    path.write_text(yaml.safe_dump(record))
    return path


def test_task_and_data_are_those_of_the_training(tmp_path: Path) -> None:
    folder = tmp_path / "training"
    folder.mkdir()
    write_yaml(folder / "training.yaml", TRAINING)
    config = write_yaml(
        tmp_path / "more.yaml",
        SYNTHESIS | {"task_from": "training/training.yaml", "data": {"slice_field": "channel"}},
    )
    spec = load_synthesis(config, ["fill=[{label: billing, rows: 7}]", "teacher.concurrency=2"])
    assert spec.name == "tickets"
    assert spec.task.labels == ("billing", "support")
    assert spec.data.source == str(folder / "rows.jsonl")
    assert spec.data.slice_field == "channel"
    assert spec.golden.path == str(folder / "golden")
    assert spec.fill[0].rows == 7
    assert spec.teacher.concurrency == 2
    assert load_preset(str(config))["spec"]["golden"]["path"] == str(folder / "golden")


def test_a_configuration_of_its_own(tmp_path: Path) -> None:
    record = {name: TRAINING[name] for name in ("name", "data", "golden")} | {
        "task": {"kind": "chat", "instruction": "Answer."},
        "teacher": SYNTHESIS["teacher"],
        "documents": {"path": "docs"},
    }
    spec = load_synthesis(write_yaml(tmp_path / "own.yaml", record))
    assert spec.documents is not None
    assert spec.documents.path == str(tmp_path / "docs")
    assert spec.data.source == str(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"task_from": "nowhere.yaml"}, "does not exist"),
        ({"task_from": ["training.yaml"]}, "must name a file"),
        ({"teachers": {}}, "did you mean teacher"),
        ({"fill": [{"label": "sales", "rows": 1}]}, "does not have: sales"),
    ],
)
def test_what_does_not_fit_is_said(tmp_path: Path, changed: dict[str, object], message: str) -> None:
    write_yaml(tmp_path / "training.yaml", TRAINING)
    with pytest.raises(SpecError, match=message):
        load_synthesis(write_yaml(tmp_path / "more.yaml", SYNTHESIS | changed))


def test_what_is_printed() -> None:
    report = {
        "funnel": [
            {"step": "self_consistency", "in": 4, "out": 3, "survival": 0.75, "rejected": {"inconsistent": 1}},
            {"step": "grounding", "in": 3, "out": 3, "survival": 1.0, "rejected": {}, "skipped": "labels"},
        ],
        "refinement": {"asked": 1, "kept": 0},
        "costs": {
            "requests": 9, "prompt_tokens": 900, "completion_tokens": 180, "money": 0.5, "currency": "EUR",
            "lost_requests": 2,
        },
        "money_per_row": 0.25,
    }  # fmt: skip
    result = SynthesisRef(
        uri="u", step="synthesize", fingerprint="f", digest="d", path="/store/synthetic.jsonl", rows=2, asked=4,
        stopped="budget.money is 0.5 EUR", report=report,
    )  # fmt: skip
    out = io.StringIO()
    print_synthesis(Console(file=out, width=120), result)
    text = out.getvalue()
    assert re.search(r"self-consistency +4 +3 +75\.0 % +1 inconsistent", text)
    assert re.search(r"grounding +3 +3 +100\.0 % +skipped: labels", text)
    assert "9 requests, 900 prompt and 180 completion tokens, 0.5000 EUR (0.2500 a row kept); 2 of the requests" in text
    assert "Stopped early: budget.money is 0.5 EUR" in text
    assert text.splitlines()[-1] == "/store/synthetic.jsonl"


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    """In a process of its own, with Prefect's temporary server."""
    write_jsonl(tmp_path / "rows.jsonl", toy_rows(200, seed=2))
    training = RetrainSpec.model_validate(TRAINING)
    freeze(
        training.model_copy(
            update={
                "data": training.data.model_copy(update={"source": str(tmp_path / "rows.jsonl")}),
                "golden": training.golden.model_copy(update={"path": str(tmp_path / "golden")}),
            }
        )
    )
    write_yaml(tmp_path / "training.yaml", TRAINING)
    with fake_teacher() as teacher:
        config = write_yaml(tmp_path / "more.yaml", SYNTHESIS | {"teacher": {"url": teacher.url, "model": "big"}})
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
        program = "import typer; from goldgate.synthesize import synthesize; typer.run(synthesize)"
        done = subprocess.run(
            [sys.executable, "-c", program, config],
            env=variables | {"GOLDGATE_STORE": str(tmp_path / "store"), "COLUMNS": "120"},
            capture_output=True, text=True, timeout=280, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.splitlines()[-1])
    assert path.name == "synthetic.jsonl"
    assert len(path.read_text().splitlines()) == 3
    assert "3 rows kept of 3 asked for" in done.stdout
