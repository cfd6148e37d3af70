"""Ctrl-C while a command runs: what it waits for, and that it leaves. The command is a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from goldgate import cli
from tasks.training.job import read_progress
from tests.processes import lives
from tests.tiny import make_tiny_model
from tests.toys import LABELS, toy_rows, vocabulary, write_jsonl

# A flow whose step has a script for training process, and which then waits for ever, as Prefect does for its server.
_COMMAND = """
import sys, time
from pathlib import Path
from goldgate import cli
from tasks.contracts.progress import ignore_progress
from tasks.training import launcher
from tests.training.test_launch import make_job
folder, trains, threads = Path(sys.argv[1]), sys.argv[2] == "trains", int(sys.argv[3])
cli._GRACE_SECONDS = cli._TIDY_SECONDS = 0.3
tether = [sys.executable, "-m", "tasks.training.tether"]
launcher.command = lambda job, parent, _: [*tether, str(parent), str(folder / "training.py"), str(job.scratch)]

def train(number):
    from tasks.training.launch import run_training
    run_training(make_job(folder / str(number)), ignore_progress)

def step():
    from concurrent.futures import ThreadPoolExecutor
    if not trains:
        (folder / "ready-0").touch()
        time.sleep(600)
    if threads == 1:
        return train(0)
    with ThreadPoolExecutor() as pool:
        return [one.result() for one in [pool.submit(train, number) for number in range(threads)]]

with cli._ending_soon():
    try:
        step()
    finally:
        time.sleep(600)
"""
# Its checkpoint takes longer than the command leaves a step to tidy up.
_TRAINING = """
import os, signal, sys, time
from pathlib import Path
scratch = Path(sys.argv[1])
def save(*_):
    signal.signal(signal.SIGTERM, lambda *_: os._exit(1))
    (scratch / "told").touch()
    time.sleep({seconds})
    (scratch / "saved").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
(scratch / "pid").write_text(str(os.getpid()))
(scratch.parent.parent / ("ready-" + scratch.parent.name)).touch()
while True: time.sleep(0.05)
"""


def wait_until(holds: Callable[[], object], command: subprocess.Popen[str]) -> None:
    while not holds():  # pytest's time limit ends this
        assert command.poll() is None, command.communicate()[1]
        time.sleep(0.05)


def start(folder: Path, *arguments: str, seconds: float) -> subprocess.Popen[str]:
    (folder / "command.py").write_text(_COMMAND)
    (folder / "training.py").write_text(_TRAINING.format(seconds=seconds))
    return subprocess.Popen(
        [sys.executable, str(folder / "command.py"), str(folder), *arguments],
        env=os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("threads", [1, 2], ids=["one training", "trainings side by side"])
def test_the_command_waits_until_a_training_has_kept_its_step(tmp_path: Path, threads: int) -> None:
    command = start(tmp_path, "trains", str(threads), seconds=1.5)
    numbers = range(threads)
    wait_until(lambda: all((tmp_path / f"ready-{number}").exists() for number in numbers), command)
    command.send_signal(signal.SIGINT)
    _, said = command.communicate()
    assert command.returncode == cli.EXIT_INTERRUPTED, said
    assert all((tmp_path / str(number) / "scratch" / "saved").exists() for number in numbers), "each was told once"
    assert "saving a checkpoint … (at most 60 s)" in said
    assert "Ctrl-C again leaves at once." in said
    assert "the same command goes on" in said


def test_a_second_ctrl_c_leaves_at_once_and_the_training_with_it(tmp_path: Path) -> None:
    command = start(tmp_path, "trains", "1", seconds=600)
    scratch = tmp_path / "0" / "scratch"
    wait_until(lambda: (tmp_path / "ready-0").exists(), command)
    command.send_signal(signal.SIGINT)
    wait_until(lambda: (scratch / "told").exists(), command)
    command.send_signal(signal.SIGINT)
    _, said = command.communicate()  # pytest's time limit ends this if it waits for the checkpoint
    assert command.returncode == cli.EXIT_INTERRUPTED, said
    assert said.count("the same command goes on") == 1
    training = int((scratch / "pid").read_text())
    while lives(training):
        time.sleep(0.05)  # likewise, if it lives on


def test_it_leaves_without_waiting_where_nothing_trains(tmp_path: Path) -> None:
    command = start(tmp_path, "asks", "1", seconds=0)
    wait_until(lambda: (tmp_path / "ready-0").exists(), command)
    command.send_signal(signal.SIGINT)
    _, said = command.communicate()
    assert command.returncode == cli.EXIT_INTERRUPTED, said
    assert "checkpoint" not in said


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_interrupted_run_keeps_the_step_that_it_is_at(tmp_path: Path) -> None:
    """The real command, started and stopped as in a terminal: Ctrl-C reaches its whole process group."""
    config = toy_config(tmp_path)
    store = tmp_path / "store"
    environment = os.environ | {"GOLDGATE_STORE": str(store), "PREFECT_HOME": str(tmp_path / "prefect")}
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "GOLDGATE_LEDGER"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "goldgate"]
    subprocess.run([*command, "golden", "freeze", str(config)], env=environment, check=True, capture_output=True)
    run = subprocess.Popen(
        [*command, "run", str(config)], env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        start_new_session=True,
    )  # fmt: skip

    def trains() -> bool:
        found = [read_progress(path.parent) for path in store.glob("scratch/*/progress.json")]
        return any(one is not None and one.done >= 2 for one in found)

    wait_until(trains, run)
    os.killpg(run.pid, signal.SIGINT)
    _, said = run.communicate()
    assert run.returncode == cli.EXIT_INTERRUPTED, said
    assert "saving a checkpoint" in said
    assert "Traceback" not in said
    (scratch,) = {path.parent for path in store.glob("scratch/*/progress.json")}
    log = (scratch / "worker.log").read_text()
    assert "told to stop; did so after step" in log, "it was left time to"
    assert list(scratch.glob("checkpoint-*")), log


def toy_config(folder: Path) -> Path:
    make_tiny_model(folder / "base", vocabulary())
    write_jsonl(folder / "rows.jsonl", toy_rows(300, seed=1))
    reason = "a toy task with a model of two layers"
    record: dict[str, Any] = {
        "name": "tickets",
        "task": {"kind": "classify", "instruction": "Which team?", "labels": list(LABELS)},
        "data": {"source": "rows.jsonl"},
        "golden": {"path": "golden", "items": 60},
        "base_model": "base",
        "curate": {"accept_risks": {"few_rows": reason, "learning_rate": reason, "self_check": reason}},
        "train": {"epochs": 50, "batch_size": 4, "max_tokens": 128, "save_every": 1_000},
        "evaluate": {"max_new_tokens": 8},
    }
    path = folder / "tickets.yaml"
    path.write_text(yaml.safe_dump(record))
    return path
