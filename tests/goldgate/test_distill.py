"""The command: how its configuration is read, and what it prints."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from goldgate.distill import load_distillation, load_preset, print_distillation
from tasks.contracts.distill import DistillEffect, DistillResult, SideOnDev
from tasks.contracts.errors import SpecError
from tasks.contracts.references import MetricComparison

EXAMPLE = Path(__file__).parents[2] / "examples/prices/distill.yaml"
TRAINING = {
    "name": "tickets",
    "task": {"kind": "classify", "instruction": "Which team?", "labels": ["billing", "support"]},
    "data": {"source": "rows.jsonl"},
    "golden": {"path": "golden"},
    "base_model": "base",
    "train": {"epochs": 3, "seed": 5},
}
DISTILLATION = {
    "training_from": "there/training.yaml",
    "teacher": {"url": "http://127.0.0.1:1/v1", "model": "big"},
    "relabel": True,
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "there").mkdir()
    (tmp_path / "there/training.yaml").write_text(yaml.safe_dump(TRAINING))
    return write(tmp_path, DISTILLATION)


def write(folder: Path, record: dict[str, Any]) -> Path:
    path = folder / "distill.yaml"
    path.write_text(yaml.safe_dump(record))
    return path


def test_the_training_is_taken_from_its_own_file_and_changed_where_this_one_says_so(
    config: Path, tmp_path: Path
) -> None:
    write(tmp_path, DISTILLATION | {"training": {"train": {"epochs": 1}}})
    spec = load_distillation(config, ["training.curate.dev_share=0.3", "samples=4"])
    assert (spec.training.train.epochs, spec.training.train.seed, spec.training.curate.dev_share) == (1, 5, 0.3)
    assert spec.samples == 4
    there = tmp_path / "there"
    assert (spec.training.data.source, spec.training.golden.path) == (str(there / "rows.jsonl"), str(there / "golden"))
    assert spec.training.base_model == str(there / "base")


def test_a_training_can_be_written_out_and_its_paths_are_beside_the_file(tmp_path: Path) -> None:
    record = {name: value for name, value in DISTILLATION.items() if name != "training_from"}
    spec = load_distillation(write(tmp_path, record | {"training": TRAINING}))
    assert spec.training.data.source == str(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        ({"training_from": 3}, "It must name a file."),
        ({"training": 3}, "must be a mapping"),
        ({"training": {"train": {"epoch": 3}}}, "training.train.epoch: there is no such field; did you mean epochs?"),
        ({"techer": {}}, "techer: there is no such field; did you mean teacher?"),
    ],
)
def test_what_cannot_be_read_is_named(config: Path, tmp_path: Path, parts: dict[str, Any], problem: str) -> None:
    write(tmp_path, DISTILLATION | parts)
    with pytest.raises(SpecError) as caught:
        load_distillation(config)
    assert problem in str(caught.value)


def test_the_example_is_a_preset_of_a_deployment(monkeypatch: pytest.MonkeyPatch) -> None:
    preset = load_preset(str(EXAMPLE))
    training = preset["spec"]["training"]
    assert training["data"]["source"] == str(EXAMPLE.parent / "prices.jsonl")
    assert training["curate"]["accept_risks"].keys() == {"learning_rate", "few_rows"}
    json.dumps(preset)


def comparison(metric: str, low: float, high: float) -> MetricComparison:
    return MetricComparison(
        metric=metric, baseline=0.5, baseline_low=0.4, baseline_high=0.6, candidate=0.6, candidate_low=0.5,
        candidate_high=0.7, difference=0.1, low=low, high=high, confidence=0.95, method="any", n=200,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("effect", "low", "sentence", "better"),
    [
        (
            DistillEffect.GAIN,
            0.02,
            "Gain: Exact match is shown to be better with the rewritten answers, +10.0 points (95 % interval +2.0 to "
            "+18.0) on 200 dev rows.",
            "Better on dev: the rewritten answers. The gate has the last word; to send them there:",
        ),
        (
            DistillEffect.NONE_SHOWN,
            -0.02,
            "None shown: Exact match differs by +10.0 points (95 % interval −2.0 to +18.0) on 200 dev rows, which may "
            "be chance.",
            "Neither is shown to be better on dev; keep the original answers, which cost nothing.",
        ),
    ],
)
def test_what_it_prints(effect: DistillEffect, low: float, sentence: str, better: str) -> None:
    sides = [
        SideOnDev(splits="s", model="m", merged_digest="d", dev_loss=loss, metrics={"exact_match": 0.5})
        for loss in (0.25, 0.2)
    ]
    result = DistillResult(
        uri="u", step="distill_report", fingerprint="f", digest="d", effect=effect, original=sides[0],
        rewritten=sides[1], comparisons=(comparison("exact_match", low, 0.18),), rows=450, changed=16,
        source="/store/source.jsonl", settings=("data.source=/store/source.jsonl", "data.source_field=source"),
        report="/store/report.md",
    )  # fmt: skip
    out = io.StringIO()
    print_distillation(Console(file=out, width=120), result, "prices.yaml")
    lines = out.getvalue().splitlines()
    assert sentence in lines
    assert next(line.split() for line in lines if line.startswith("dev loss")) == [
        "dev", "loss", "0.2500", "0.2000", "−0.0500",
    ]  # fmt: skip
    assert "16 of 450 training rows have a rewritten answer. Report: /store/report.md" in lines
    assert lines[-2].startswith(better)
    assert lines[-1] == (
        "goldgate run prices.yaml --set data.source=/store/source.jsonl --set data.source_field=source"
    )
