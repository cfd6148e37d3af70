"""`training.json`: what made a model, without places and secrets."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import pytest

from tasks.contracts.guards import Finding
from tasks.contracts.references import BaseModelRef, SplitsRef, TrainRequest
from tasks.contracts.spec import ExecutionSpec, Guard, TaskKind, TaskSpec, TrainSpec
from tasks.training.energy import Energy
from tasks.training.job import TrainJob, TrainResult
from tasks.training.manifest import (
    MANIFEST,
    AcceptedRisk,
    SelfCheckFacts,
    facts_to_log,
    library_versions,
    read_manifest,
    without_place,
    write_manifest,
)
from tasks.training.recipe import make_plan
from tasks.training.selfcheck import SelfCheck

RECIPE = TrainSpec(seed=23)
PLAN = make_plan(RECIPE, 3, 20)
SECRET = "hunter2-token"
WORDS = "AMD EPYC 9654, 2 cores (cpu)"
ENERGY = Energy(joules=7_200.0, source="RAPL", missing=None, seconds=61.0)
RESULT = TrainResult(
    steps=3, planned_steps=4, best_step=2, dev_loss=0.41, seconds=1_800.0, tokens=900, tokens_per_second=0.5,
    peak_memory_bytes=2 * 10**9, resumed_from_step=1, trainable_parameters=10, device="cpu", compute_dtype="bfloat16",
    stopped_early=True, mlflow_run_id="abc", mlflow_url=f"https://me:{SECRET}@mlflow.example/",
)  # fmt: skip


class Skew(NamedTuple):
    kl: float
    same_top: float
    onto: str


def job_in(folder: Path, source: str = "gguf:pkg:llm_small/model.gguf", **execution: object) -> TrainJob:
    folder.mkdir(exist_ok=True)
    (folder / "train.jsonl").write_bytes(b'{"id": 1}\n{"id": 2}\n{"id": 3}\n')
    (folder / "dev.jsonl").write_bytes(b'{"id": 4}\n')
    made = {"uri": f"{folder}/made", "fingerprint": "f" * 64}
    request = TrainRequest(
        name="toy",
        task=TaskSpec(kind=TaskKind.CLASSIFY, instruction="Which?", labels=("yes", "no")),
        splits=SplitsRef(**made, step="curate", digest="5" * 64, train_rows=3, dev_rows=1, removed={}),
        base=BaseModelRef(**made, step="base_model", digest="b" * 64, source=source),
        recipe=RECIPE,
        accept_risks={Guard.DEV_ROWS: "one dev row will do for a toy", Guard.FEW_ROWS: "a toy"},
        execution=ExecutionSpec(
            store=str(folder / "store"), tracking_uri=f"postgresql://me:{SECRET}@db/mlflow", **execution
        ),
    )
    return TrainJob(
        request=request,
        fingerprint="f" * 64,
        model_folder=folder / "model",
        train_file=folder / "train.jsonl",
        dev_file=folder / "dev.jsonl",
        scratch=folder / "scratch",
        out=folder,
    )


def test_what_made_a_model(tmp_path: Path) -> None:
    job = job_in(tmp_path, prices={"EPYC": 0.5})
    finding = Finding(Guard.DEV_ROWS, "the dev loss rests on 1 row", "add rows")
    check = SelfCheck(4.0, 1.5, 2, 2e-3, 1.234)
    manifest = write_manifest(
        tmp_path,
        job,
        PLAN,
        RESULT,
        WORDS,
        ENERGY,
        devices=2,
        tokens_computed=700,
        changes=["batches of 4 rows"],
        skews=[Skew(0.003, 0.99, "dequantised"), Skew(0.1, 0.9, "as it is")],
        self_check=check,
        findings=[finding],
    )
    assert read_manifest(tmp_path) == manifest
    assert manifest.schema_version == 1
    assert (manifest.base.source, manifest.base.digest) == ("gguf:pkg:llm_small/model.gguf", "b" * 64)
    train = hashlib.sha256(b'{"id": 1}\n{"id": 2}\n{"id": 3}\n').hexdigest()
    dev = hashlib.sha256(b'{"id": 4}\n').hexdigest()
    assert tuple(manifest.data.model_dump().values()) == ("5" * 64, train, 3, dev, 1)
    assert (manifest.recipe, manifest.plan, manifest.seed) == (RECIPE, PLAN, 23)
    assert manifest.python == platform.python_version()
    assert manifest.libraries["torch"] == version("torch")
    assert "unsloth" not in manifest.libraries
    assert (manifest.hardware.device, manifest.hardware.devices, manifest.hardware.cuda) == (WORDS, 2, None)
    assert (manifest.tokens, manifest.tokens_computed, manifest.resumed_from_step) == (900, 700, 1)
    assert manifest.energy == ENERGY
    assert manifest.cost is not None
    assert (manifest.cost.price_per_hour, manifest.cost.total) == (0.5, 0.5)  # half an hour of two devices
    assert manifest.skews == (
        {"kl": 0.003, "same_top": 0.99, "onto": "dequantised"},
        {"kl": 0.1, "same_top": 0.9, "onto": "as it is"},
    )
    assert manifest.self_check == SelfCheckFacts(
        first_loss=4.0, last_loss=1.5, steps=2, learning_rate=2e-3, seconds=1.23, skipped=None
    )
    assert manifest.accepted_risks == (
        AcceptedRisk(guard=Guard.DEV_ROWS, found=finding.found, reason="one dev row will do for a toy"),
    )
    assert facts_to_log(manifest) == {"energy_joules": 7_200.0, "cost": 0.5}


@pytest.mark.parametrize("source", ["{place}/models/llama", "gguf:{place}/llama.gguf"])
def test_no_place_and_no_secret_is_in_it(source: str, tmp_path: Path) -> None:
    place = tmp_path / "someone"
    write_manifest(place, job_in(place, source.format(place=place)), PLAN, RESULT, WORDS, ENERGY)
    text = (place / MANIFEST).read_text()
    for absent in (str(tmp_path), "someone", SECRET, "mlflow.example", platform.node()):
        assert absent not in text
    assert "llama" in json.loads(text)["base"]["source"]


def test_what_is_not_known_is_null(tmp_path: Path) -> None:
    energy = Energy(joules=None, source=None, missing="no counter here", seconds=3.0)
    skipped = SelfCheck(math.nan, math.nan, 0, 0.0, 0.0, skipped="the run has fewer than 60 steps")
    manifest = write_manifest(tmp_path, job_in(tmp_path), PLAN, RESULT, WORDS, energy, self_check=skipped)
    record = json.loads((tmp_path / MANIFEST).read_text())
    assert (record["cost"], record["energy"]["joules"], record["tokens_computed"]) == (None, None, None)
    assert record["energy"]["missing"] == "no counter here"
    assert record["self_check"]["first_loss"] is None
    assert record["self_check"]["skipped"] == "the run has fewer than 60 steps"
    assert facts_to_log(manifest) == {}


def test_a_finding_that_nobody_accepted_is_a_defect(tmp_path: Path) -> None:
    finding = Finding(Guard.GRADIENTS, "gradients explode", "lower the rate")
    with pytest.raises(KeyError):
        write_manifest(tmp_path, job_in(tmp_path), PLAN, RESULT, WORDS, ENERGY, findings=[finding])
    assert not (tmp_path / MANIFEST).exists()


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("hf:owner/model", "hf:owner/model"),
        ("models:/toy@champion", "models:/toy@champion"),
        ("gguf:pkg:package/file.gguf", "gguf:pkg:package/file.gguf"),
        ("gguf:/home/me/file.gguf", "gguf:file.gguf"),
        ("/home/me/models/llama", "llama"),
        ("models/llama", "llama"),
    ],
)
def test_names_without_places(source: str, named: str) -> None:
    assert without_place(source) == named


def test_versions_are_of_what_is_installed() -> None:
    assert library_versions(["numpy", "no-such-distribution"]) == {"numpy": version("numpy")}
