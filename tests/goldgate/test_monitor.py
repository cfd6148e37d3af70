"""What `goldgate monitor` reads: the training that it is about, its paths, and what is said of mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from goldgate.config import load_spec
from goldgate.monitor import load_monitor, load_preset
from tasks.contracts.errors import SpecError
from tasks.contracts.monitor import MonitorSpec

TRAINING: dict[str, Any] = {
    "name": "tickets",
    "task": {"kind": "classify", "instruction": "Which team?", "labels": ["billing", "support"]},
    "data": {"source": "rows.jsonl"},
    "golden": {"path": "golden"},
    "base_model": "base",
    "execution": {"store": "/somewhere/store"},
}


def write(folder: Path, record: dict[str, Any], training: dict[str, Any] = TRAINING) -> Path:
    (folder / "below").mkdir()
    (folder / "below" / "tickets.yaml").write_text(yaml.safe_dump(training))
    path = folder / "monitor.yaml"
    path.write_text(yaml.safe_dump(record))
    return path


def test_name_and_execution_are_the_trainings(tmp_path: Path) -> None:
    path = write(tmp_path, {"training_from": "below/tickets.yaml", "hours": 12, "log": "log", "reviews": "r.jsonl"})
    spec = load_monitor(path)
    assert (spec.name, spec.hours, spec.execution.store) == ("tickets", 12.0, "/somewhere/store")
    assert (spec.log, spec.reviews) == (str(tmp_path / "log"), str(tmp_path / "r.jsonl"))
    assert spec.retrain is not None
    assert spec.retrain.data.source == str(tmp_path / "below" / "rows.jsonl")
    assert spec.retrain.execution.train_deployment == "train/gpu"  # a worker's run, whoever looked
    assert load_preset(str(path)) == {"spec": spec.model_dump(mode="json")}
    assert MonitorSpec.model_validate(load_preset(str(path))["spec"]) == spec


def test_what_the_training_says_itself_wins(tmp_path: Path) -> None:
    named = TRAINING | {"execution": {"store": "/s", "train_deployment": "train/mine"}}
    changed = {"training_from": "below/tickets.yaml", "training": {"data": {"source": "new.jsonl"}}}
    spec = load_monitor(write(tmp_path, changed, named), ["training.train.epochs=2", "drift.alpha=0.05"])
    assert spec.retrain is not None
    assert spec.retrain.execution.train_deployment == "train/mine"
    assert spec.retrain.data.source == str(tmp_path / "new.jsonl")
    assert (spec.retrain.train.epochs, spec.drift.alpha) == (2, 0.05)


def test_without_a_training_it_only_reports(tmp_path: Path) -> None:
    spec = load_monitor(write(tmp_path, {"name": "tickets"}))
    assert (spec.name, spec.retrain) == ("tickets", None)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({}, "name: Field required"),
        ({"name": "tickets", "hour": 3}, "hour: there is no such field; did you mean hours?"),
        ({"name": "other", "training_from": "below/tickets.yaml"}, "`retrain` is about 'tickets'"),
        ({"training_from": "nowhere.yaml"}, "does not exist"),
        ({"training_from": 7}, "It must name a file"),
        ({"name": "tickets", "drift": {"alpha": 2}}, "drift.alpha: Input should be less than or equal to 0.5"),
    ],
)
def test_what_is_said_of_mistakes(tmp_path: Path, record: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError) as refused:
        load_monitor(write(tmp_path, record))
    assert said in str(refused.value)


def test_the_example_is_about_the_example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GOLDGATE_STORE", str(tmp_path))
    folder = Path(__file__).parents[2] / "examples" / "complaints"
    spec = load_monitor(folder / "monitor.yaml")
    below = load_spec(folder / "complaints.yaml")
    assert spec.retrain is not None
    assert spec.retrain.model_copy(update={"execution": below.execution}) == below
    assert (spec.name, spec.execution.store) == ("complaints", str(tmp_path))
