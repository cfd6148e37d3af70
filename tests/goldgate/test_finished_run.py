"""What people do with a finished run, each as a command of its own: approve, verify, look at the ledger, override."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from tests.tiny import make_tiny_model
from tests.toys import LABELS, toy_rows, vocabulary, write_jsonl

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(600)
_OURS = ("GOLDGATE_", "PREFECT_", "MLFLOW_")


class Desk(NamedTuple):
    """A folder with a configuration, from which the program is called; its first run waits for a person."""

    folder: Path
    waiting: str
    said: str

    def call(self, *arguments: str, code: int = 0) -> str:
        """What a command printed; refused if it ended otherwise."""
        done = program(self.folder, *arguments)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr


def program(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}
    return subprocess.run(
        [sys.executable, "-m", "goldgate", *arguments],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(ROOT), "GOLDGATE_STORE": str(folder / "store"), "COLUMNS": "400"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    folder = tmp_path_factory.mktemp("desk")
    make_tiny_model(folder / "base", vocabulary())
    write_jsonl(folder / "rows.jsonl", toy_rows(400, seed=1))
    risk = "a toy task with a model of two layers"
    record = {
        "name": "tickets",
        "task": {"kind": "classify", "instruction": "Which team?", "labels": list(LABELS)},
        "data": {"source": "rows.jsonl"},
        "golden": {"path": "golden", "items": 80},
        "base_model": "base",
        "curate": {"accept_risks": {"few_rows": risk, "learning_rate": risk}},
        "train": {"epochs": 6, "learning_rate": 5e-3, "batch_size": 16, "max_tokens": 128, "evaluations": 2},
        "evaluate": {"max_new_tokens": 8, "batch_size": 40, "baseline_shots": 0, "baseline_dev_items": 20},
        "policy": {"approval_hours": 1},
    }
    (folder / "tickets.yaml").write_text(yaml.safe_dump(record))
    frozen = program(folder, "golden", "freeze", "tickets.yaml")
    assert frozen.returncode == 0, frozen.stdout + frozen.stderr
    ran = program(folder, "run", "tickets.yaml", "--require-promote")
    assert ran.returncode == 3, ran.stdout + ran.stderr
    return Desk(folder, ran.stdout.strip().splitlines()[-1], ran.stdout)


def test_a_run_that_waits_says_how_to_answer(desk: Desk) -> None:
    assert "\nPROMOTE  " in desk.said
    assert "A person has to approve this promotion, and nobody has answered yet." in desk.said
    assert f"approve:   goldgate approve {desk.waiting} --by NAME --comment '…'" in desk.said
    assert "The registry is untouched until a person answers" in desk.said
    said = desk.call("approve", desk.waiting, "--by", "", "--comment", "fine", code=1)
    assert "by: String should have at least 1 character" in said
    assert "No decisions of people." in desk.call("ledger", "show")


@pytest.fixture(scope="module")
def approved(desk: Desk) -> str:
    return desk.call("approve", desk.waiting, "--by", "Grace Hopper", "--comment", "read the lost items")


def test_an_approval_promotes_and_everything_says_by_whom(desk: Desk, approved: str) -> None:
    assert "Approved by Grace Hopper, " in approved
    assert "Registered: tickets version 1, alias champion, approved by Grace Hopper" in approved
    assert "Reused from earlier runs: " in approved
    assert "train" in approved.split("Reused from earlier runs: ")[1].split(".")[0].split(", ")

    shown = desk.call("ledger", "show", "tickets")
    assert "1 look, 1 promoted" in shown
    assert "approved  tickets, model " in shown
    assert "Grace Hopper: read the lost items" in shown
    assert "Approved by Grace Hopper." in desk.call("status")


def test_a_champion_is_verified(desk: Desk, approved: str) -> None:
    said = desk.call("verify", "models:/tickets@champion")
    assert said.rstrip().endswith("The certificate holds.")
    assert "promoted by its verdict, and approved by Grace Hopper" in said
    record = json.loads(desk.call("verify", "models:/tickets/1", "--json"))
    assert record["holds"] is True
    assert {check["finding"] for check in record["checks"]} == {"ok"}

    weights = next((desk.folder / "store" / "mlartifacts").rglob("model.safetensors"))
    whole = weights.read_bytes()
    try:
        weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        said = desk.call("verify", "models:/tickets@champion", code=1)
        assert "FAILED" in said
        assert "A file of the model was altered" in said
    finally:
        weights.write_bytes(whole)
    assert "no such model" in desk.call("verify", "models:/tickets/9", code=1)


@pytest.fixture(scope="module")
def rejected(desk: Desk, approved: str) -> str:
    """Folder of a run whose candidate has hardly been trained."""
    said = desk.call("run", "tickets.yaml", "--set", "train.epochs=0.1")
    assert "\nREJECT  " in said
    assert "overrid" not in said.lower(), "nothing hints at an override"
    return said.strip().splitlines()[-1]


def test_there_is_nothing_to_approve_in_a_rejected_run(desk: Desk, rejected: str) -> None:
    said = desk.call("approve", rejected, "--by", "Grace Hopper", "--comment", "all the same", code=1)
    assert "There is nothing to approve" in said
    assert "the verdict on candidate" in said
    assert "is REJECT" in said


def test_an_override_promotes_against_the_verdict(desk: Desk, rejected: str) -> None:
    said = desk.call("override", "promote", rejected, "--by", "Ada Lovelace", "--reason", "so", code=1)
    assert "reason: String should have at least 10 characters" in said
    said = desk.call("override", "promote", rejected, "--by", "Ada Lovelace", "--reason", "hotfix, read by hand")
    assert "against its verdict, which was REJECT" in said
    assert "Registered: tickets version 2, alias champion, forced by Ada Lovelace" in said
    again = said.strip().splitlines()[-1]
    assert "has registered its candidate already: version 2" in desk.call(
        "override", "promote", again, "--by", "Ada Lovelace", "--reason", "hotfix, read by hand", code=1
    )

    said = desk.call("verify", "models:/tickets@champion")
    assert "REJECT, computed again" in said
    assert "forced against its verdict by Ada Lovelace" in said
    assert "FORCED: Forced against its verdict by Ada Lovelace" in desk.call("status")
    shown = desk.call("ledger", "show")
    assert "forced promotion  tickets, model " in shown
    assert "2 looks, 1 promoted" in shown
