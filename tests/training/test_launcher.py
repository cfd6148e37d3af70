"""The command of a training: what an environment makes of it, what it refuses, and what a launcher's log says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.contracts.errors import TrainingError
from tasks.training import launcher
from tasks.training.job import TrainJob
from tasks.training.launcher import Devices, command, failed_process, find_devices, lost_process
from tests.training.test_launch import make_job

ACCELERATE = ["-m", "accelerate.commands.launch"]
DEPLOYED = Path(__file__).resolve().parents[2] / "deployments" / "accelerate"


@pytest.fixture
def job(tmp_path: Path) -> TrainJob:
    return make_job(tmp_path)


@pytest.fixture(autouse=True)
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the NVIDIA driver would list its devices; there are none."""
    folder = tmp_path / "driver"
    monkeypatch.setattr(launcher, "_DRIVER", folder)
    return folder


@pytest.mark.parametrize(
    ("environment", "devices"),
    [
        ({}, Devices(1, cuda=False)),
        ({"CUDA_VISIBLE_DEVICES": ""}, Devices(1, cuda=False)),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, Devices(1, cuda=False)),
        ({"CUDA_VISIBLE_DEVICES": "3"}, Devices(1, cuda=True)),
        ({"CUDA_VISIBLE_DEVICES": "0,1,5"}, Devices(3, cuda=True)),
        ({"CUDA_VISIBLE_DEVICES": "0,1,5", "GOLDGATE_PROCESSES": "2"}, Devices(2, cuda=True)),
        ({"GOLDGATE_PROCESSES": "2"}, Devices(2, cuda=False)),
        ({"GOLDGATE_PROCESSES": ""}, Devices(1, cuda=False)),
        (
            {"GOLDGATE_NODES": "2", "GOLDGATE_NODE": "1", "GOLDGATE_RENDEZVOUS": "host-a:29500"},
            Devices(1, cuda=False, nodes=2, node=1, rendezvous=("host-a", 29500)),
        ),
        (
            {"GOLDGATE_NODES": "2", "GOLDGATE_RENDEZVOUS": "[fd00::1]:29500", "CUDA_VISIBLE_DEVICES": "0,1"},
            Devices(2, cuda=True, nodes=2, node=0, rendezvous=("fd00::1", 29500)),
        ),
        ({"GOLDGATE_RENDEZVOUS": "unused"}, Devices(1, cuda=False)),
    ],
)
def test_devices_of_an_environment(environment: dict[str, str], devices: Devices) -> None:
    assert find_devices(environment) == devices


def test_driver_is_asked_where_the_environment_says_nothing(driver: Path) -> None:
    for bus in ("0000:01:00.0", "0000:02:00.0"):
        (driver / bus).mkdir(parents=True)
    assert find_devices({}) == Devices(2, cuda=True)
    assert find_devices({"CUDA_VISIBLE_DEVICES": "1"}) == Devices(1, cuda=True)


@pytest.mark.parametrize(
    ("environment", "what", "where"),
    [
        ({"GOLDGATE_PROCESSES": "two"}, "'two' is no number of 1 or more", "GOLDGATE_PROCESSES"),
        ({"GOLDGATE_PROCESSES": "0"}, "'0' is no number of 1 or more", "GOLDGATE_PROCESSES"),
        ({"GOLDGATE_PROCESSES": "-1"}, "'-1' is no number of 1 or more", "GOLDGATE_PROCESSES"),
        (
            {"CUDA_VISIBLE_DEVICES": "0,1", "GOLDGATE_PROCESSES": "3"},
            "3 processes cannot train on 2 CUDA devices",
            "GOLDGATE_PROCESSES",
        ),
        ({"GOLDGATE_NODES": "2"}, "'' is none", "GOLDGATE_RENDEZVOUS"),
        ({"GOLDGATE_NODES": "2", "GOLDGATE_RENDEZVOUS": "host-a"}, "'host-a' is none", "GOLDGATE_RENDEZVOUS"),
        ({"GOLDGATE_NODES": "2", "GOLDGATE_RENDEZVOUS": "host-a:0"}, "'host-a:0' is none", "GOLDGATE_RENDEZVOUS"),
        ({"GOLDGATE_NODES": "2", "GOLDGATE_RENDEZVOUS": ":29500"}, "':29500' is none", "GOLDGATE_RENDEZVOUS"),
        ({"GOLDGATE_NODE": "1"}, "This is host 1 of 1", "GOLDGATE_NODE"),
        ({"GOLDGATE_NODES": "2", "GOLDGATE_NODE": "2"}, "This is host 2 of 2", "GOLDGATE_NODE"),
    ],
)
def test_what_an_environment_cannot_mean_is_refused_by_name(
    job: TrainJob, environment: dict[str, str], what: str, where: str
) -> None:
    with pytest.raises(TrainingError) as refusal:
        command(job, 1, environment)
    assert what in refusal.value.what
    assert refusal.value.where == where
    assert where in refusal.value.fix or "host 0" in refusal.value.fix


def options(words: list[str]) -> dict[str, str]:
    """The options of accelerate in a command."""
    between = words[words.index(ACCELERATE[1]) + 1 : words.index("tasks.training.worker") - 1]
    return dict(zip(between[::2], between[1::2], strict=True))


def test_one_process_is_plain_python(job: TrainJob) -> None:
    spec = str(job.scratch / "spec.json")
    plain = [sys.executable, "-m", "tasks.training.tether", "77", "-m", "tasks.training.worker", spec]
    assert command(job, 77, {}) == plain
    assert command(job, 77, {"CUDA_VISIBLE_DEVICES": "2"}) == plain


def test_several_devices_are_started_by_accelerate(job: TrainJob) -> None:
    words = command(job, 77, {"CUDA_VISIBLE_DEVICES": "0,1"})
    assert words[:6] == [sys.executable, "-m", "tasks.training.tether", "77", *ACCELERATE]
    assert words[-3:] == ["-m", "tasks.training.worker", str(job.scratch / "spec.json")]
    assert options(words) == {
        "--config_file": str(DEPLOYED / "ddp.yaml"), "--num_processes": "2", "--num_machines": "1",
        "--machine_rank": "0", "--dynamo_backend": "no",
    }  # fmt: skip


def test_cores_are_shared_by_processes_on_a_cpu(job: TrainJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    threads = "--num_cpu_threads_per_process"
    assert options(command(job, 77, {"GOLDGATE_PROCESSES": "4"}))[threads] == "3"
    assert options(command(job, 77, {"GOLDGATE_PROCESSES": "40"}))[threads] == "1"
    assert threads not in options(command(job, 77, {"GOLDGATE_PROCESSES": "4", "OMP_NUM_THREADS": "2"}))
    assert threads not in options(command(job, 77, {"CUDA_VISIBLE_DEVICES": "0,1"}))


def test_hosts_meet_where_they_are_told(job: TrainJob) -> None:
    environment = {"GOLDGATE_NODES": "3", "GOLDGATE_NODE": "2", "GOLDGATE_RENDEZVOUS": "host-a:29500"}
    found = options(command(job, 77, environment | {"CUDA_VISIBLE_DEVICES": "0,1"}))
    assert found["--num_processes"] == "6"
    assert (found["--num_machines"], found["--machine_rank"]) == ("3", "2")
    assert (found["--main_process_ip"], found["--main_process_port"]) == ("host-a", "29500")
    assert found["--rdzv_backend"] == "static"


def test_chosen_configuration_wins(job: TrainJob, tmp_path: Path) -> None:
    two = {"CUDA_VISIBLE_DEVICES": "0,1"}
    chosen = options(command(job, 77, two | {"GOLDGATE_ACCELERATE_CONFIG": "deployments/accelerate/fsdp.yaml"}))
    assert chosen["--config_file"] == str(DEPLOYED / "fsdp.yaml")
    own = tmp_path / "own.yaml"
    own.write_text("distributed_type: MULTI_GPU\n")
    assert options(command(job, 77, two | {"GOLDGATE_ACCELERATE_CONFIG": str(own)}))["--config_file"] == str(own)
    with pytest.raises(TrainingError, match="no such file") as refusal:
        command(job, 77, two | {"GOLDGATE_ACCELERATE_CONFIG": "missing.yaml"})
    assert str(refusal.value.where).endswith("missing.yaml")


def test_sharding_on_a_cpu_is_refused_since_it_would_not_happen(job: TrainJob) -> None:
    fsdp = {"GOLDGATE_PROCESSES": "2", "GOLDGATE_ACCELERATE_CONFIG": "deployments/accelerate/fsdp.yaml"}
    with pytest.raises(TrainingError, match="takes DDP in its place") as refusal:
        command(job, 77, fsdp)
    assert "CUDA devices" in refusal.value.fix


def test_started_by_hand_it_says_what_is_wrong(job: TrainJob) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "GOLDGATE_NODES": "2"}
    run = subprocess.run(
        [sys.executable, "-m", "tasks.training.launcher", str(job.scratch / "spec.json")],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 2
    assert "Several hosts need a place to meet" in run.stderr
    assert "Traceback" not in run.stderr


def test_launcher_is_light() -> None:
    code = "import sys, tasks.training.launcher, tasks.training.backends; print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for heavy in ("'torch'", "'transformers'", "'accelerate'", "'peft'"):
        assert heavy not in loaded


def report(*failures: tuple[int, int, str]) -> str:
    """torchrun's report of failures (rank, exit code, time); the first one is what it calls the root cause."""
    blocks = [
        f"[{number}]:\n  time      : 2026-11-29_{time}\n  host      : host-{rank}\n"
        f"  rank      : {rank} (local_rank: 0)\n"
        f"  exitcode  : {code} (pid: 12{rank}) {' (SIGKILL)' if code == -9 else ''}\n  error_file: <N/A>\n"
        for number, (rank, code, time) in enumerate(failures)
    ]
    line = "-" * 60 + "\n"
    others = "".join(blocks[1:]) or "  <NO_OTHER_FAILURES>\n"
    return (
        f"{'=' * 60}\ntasks.training.worker FAILED\n{line}Failures:\n{others}{line}"
        f"Root Cause (first observed failure):\n{blocks[0]}{'=' * 60}\n"
    )


@pytest.mark.parametrize(
    ("failures", "lost", "failed"),
    [
        ([(1, -9, "10:00:00"), (0, 1, "10:00:12")], "process 1 on host-1", "process 1 on host-1"),
        ([(0, 1, "10:00:00"), (1, -9, "10:00:00")], "process 1 on host-1", "process 0 on host-0"),  # seen at once
        ([(0, 1, "10:00:00"), (1, -9, "10:00:31")], None, "process 0 on host-0"),  # did not end when it was told to
        ([(1, 1, "10:00:00"), (0, 130, "10:00:02")], None, "process 1 on host-1"),
        ([(0, 130, "10:00:00"), (1, 1, "10:00:02")], None, "process 1 on host-1"),
        ([(0, 143, "10:00:00"), (1, -15, "10:00:02")], None, None),
        ([(0, -9, "10:00:00")], "process 0 on host-0", "process 0 on host-0"),
        ([], None, None),
    ],
)
def test_log_tells_which_process_was_the_first_to_go(
    tmp_path: Path, failures: list[tuple[int, int, str]], lost: str | None, failed: str | None
) -> None:
    log = tmp_path / "worker.log"
    log.write_text("step 1\n" + (report(*failures) if failures else ""))
    for found, wanted in ((lost_process(log), lost), (failed_process(log), failed)):
        assert (found is None) == (wanted is None)
        if found is not None:
            assert f"Training {wanted} " in found.what
            assert found.where == str(log)


def test_last_words_are_those_of_the_process_that_failed(tmp_path: Path) -> None:
    log = tmp_path / "worker.log"
    log.write_text(
        "[rank0]: RuntimeError: Connection closed by peer\n"
        '[rank1]:   File "fit.py", line 7\n'
        "[rank1]: ZeroDivisionError: division by zero\n"
        "[rank1]:[W1129 16:54:31.604 reducer.cpp:1529] Warning: find_unused_parameters\n"
        + report((1, 1, "10:00:00"), (0, 1, "10:00:02"))
    )
    failed = failed_process(log)
    assert failed is not None
    assert failed.what.splitlines()[-1].strip() == "ZeroDivisionError: division by zero"
    assert "Connection closed" not in failed.what
    assert "Warning" not in failed.what
