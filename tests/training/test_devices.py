"""Several processes on one host or two train what one process trains, and end together."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from tasks.contracts.references import BaseModelRef, SplitsRef, TrainRequest
from tasks.contracts.rows import Message, Row, write_rows
from tasks.contracts.spec import ExecutionSpec, Guard, TaskKind, TaskSpec, TrainSpec
from tasks.training.job import TrainJob, TrainResult
from tasks.training.launcher import failed_process, lost_process
from tasks.training.recipe import SpeedPlan, make_plan
from tasks.training.together import find_difference, most_careful

ROOT = Path(__file__).resolve().parents[2]
STEPS = 18
CLOSE = 1e-4  # sums of gradients are rounded in another order
LAUNCHER = [sys.executable, "-m", "tasks.training.launcher"]


def several_launches(test: Any) -> Any:
    """Each launch imports torch in three processes."""
    return pytest.mark.slow(pytest.mark.timeout(900)(test))


def make_job(folder: Path, base: Path, accumulation: int) -> TrainJob:
    """48 rows three times over in batches of 4, so 18 steps of 8 rows, in `accumulation` batches a process."""
    rows = []
    for number in range(48):
        text = ("crimson and round" if number % 2 else "green and long") + " fruit" * (number % 5)
        rows.append(Row(f"r{number}", number + 1, (Message("user", text),), "red apple" if number % 2 else "pear"))
    for made in ("scratch", "out"):
        (folder / made).mkdir(parents=True)
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "dev.jsonl", rows[:12])
    digest = "1" * 64
    job = TrainJob(
        request=TrainRequest(
            name="fruit",
            task=TaskSpec(kind=TaskKind.CLASSIFY, instruction="Which fruit?", labels=("red apple", "pear")),
            splits=SplitsRef(
                uri="splits", step="splits", fingerprint=digest, digest=digest, train_rows=48, dev_rows=12, removed={}
            ),
            base=BaseModelRef(uri="base", step="base_model", fingerprint=digest, digest=digest, source="tiny"),
            recipe=TrainSpec(
                epochs=3,
                learning_rate=1e-2,
                lora_rank=4,
                batch_size=4,
                gradient_accumulation=accumulation,
                evaluations=6,
            ),
            execution=ExecutionSpec(store=str(folder / "store")),
            accept_risks=dict.fromkeys(Guard, "rows of a test"),
        ),
        fingerprint="2" * 64,
        model_folder=base,
        train_file=folder / "train.jsonl",
        dev_file=folder / "dev.jsonl",
        scratch=folder / "scratch",
        out=folder / "out",
    )
    (job.scratch / "spec.json").write_text(job.model_dump_json())
    return job


def start(job: TrainJob, command: Sequence[str] = LAUNCHER, **environment: str) -> subprocess.Popen[bytes]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("GOLDGATE_")}
    with (job.scratch / "launcher.log").open("wb") as log:
        return subprocess.Popen(
            [*command, str(job.scratch / "spec.json")],
            cwd=ROOT, env=own | {"CUDA_VISIBLE_DEVICES": ""} | environment,
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip


def finish(job: TrainJob, process: subprocess.Popen[bytes]) -> TrainResult:
    assert process.wait() == 0, (job.scratch / "launcher.log").read_text()
    return TrainResult.model_validate_json((job.scratch / "result.json").read_text())


def workers_of(job: TrainJob) -> dict[int, psutil.Process]:
    """The training processes of a job by their rank."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        if str(job.scratch / "spec.json") in (process.info["cmdline"] or ()):
            try:
                rank = process.environ().get("RANK")
            except psutil.Error:
                continue
            if rank is not None:
                found[int(rank)] = process
    return found


def curve(job: TrainJob) -> list[tuple[Any, ...]]:
    lines = (job.scratch / "curves.jsonl").read_text().splitlines()
    points = [json.loads(line) for line in lines]
    return [(point["step"], point.get("loss"), point.get("dev_loss")) for point in points]


@dataclass(frozen=True)
class Outcome:
    """What a training made."""

    result: TrainResult
    curve: list[tuple[Any, ...]]
    weights: dict[str, Any] = field(repr=False)


def outcome(job: TrainJob, result: TrainResult) -> Outcome:
    from safetensors.torch import load_file

    return Outcome(result, curve(job), load_file(job.out / "adapter" / "adapter_model.safetensors"))


def assert_same(one: Outcome, other: Outcome) -> None:
    assert [point[0] for point in other.curve] == [point[0] for point in one.curve]
    for (step, loss, dev), (_, other_loss, other_dev) in zip(one.curve, other.curve, strict=True):
        assert other_loss == pytest.approx(loss, abs=CLOSE), step
        assert other_dev == pytest.approx(dev, abs=CLOSE), step
    assert other.weights.keys() == one.weights.keys()
    largest = max(weight.abs().max() for weight in one.weights.values())
    for name, weight in one.weights.items():
        assert other.weights[name].shape == weight.shape
        assert (other.weights[name] - weight).abs().max() < 1e-3 * largest, name
    assert (other.result.best_step, other.result.tokens) == (one.result.best_step, one.result.tokens)
    assert other.result.dev_loss == pytest.approx(one.result.dev_loss, abs=CLOSE)


def forget_the_end(job: TrainJob) -> int:
    """As if killed before the newest checkpoint was whole; the step of the one before."""
    *_, before, newest = sorted(job.scratch.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    shutil.rmtree(newest)
    (job.scratch / "result.json").unlink()
    shutil.rmtree(job.out)
    job.out.mkdir()
    return int(before.name.split("-")[1])


@pytest.fixture(scope="module")
def alone(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """One process that takes two batches in each step."""
    job = make_job(tmp_path_factory.mktemp("alone"), tiny_model, accumulation=2)
    one = outcome(job, finish(job, start(job)))
    losses = [loss for _, loss, _ in one.curve if loss is not None]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.5
    return one


def test_two_processes_take_the_steps_of_one(tiny_model: Path, tmp_path: Path, alone: Outcome) -> None:
    job = make_job(tmp_path, tiny_model, accumulation=1)
    result = finish(job, start(job, GOLDGATE_PROCESSES="2"))
    assert_same(alone, outcome(job, result))
    merged = {file.name for file in (job.out / "merged").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= merged  # by the first process, while others ended


@several_launches
def test_killed_process_ends_the_others_and_training_goes_on_where_it_was(
    tiny_model: Path, tmp_path: Path, alone: Outcome
) -> None:
    job = make_job(tmp_path, tiny_model, accumulation=1)
    launched = start(job, GOLDGATE_PROCESSES="2")
    while launched.poll() is None and not list(job.scratch.glob("checkpoint-*/goldgate_complete.json")):
        time.sleep(0.02)
    workers = workers_of(job)
    assert set(workers) == {0, 1}, (job.scratch / "launcher.log").read_text()
    workers[1].send_signal(signal.SIGKILL)
    assert launched.wait() == 1  # ends by itself; pytest's time limit ends this if it hangs
    assert not any(worker.is_running() for worker in workers.values())
    assert not (job.scratch / "result.json").exists()
    lost = lost_process(job.scratch / "launcher.log")
    assert lost is not None
    assert "Training process 1 on" in lost.what
    assert "was killed (SIGKILL)" in lost.what
    assert "goes on from the last checkpoint" in lost.fix

    result = finish(job, start(job, GOLDGATE_PROCESSES="2"))
    assert 0 < result.resumed_from_step < STEPS
    assert_same(alone, outcome(job, result))


@several_launches
def test_what_one_process_refuses_is_said_once_and_ends_all(tiny_model: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path, tiny_model, accumulation=1)
    recipe = job.request.recipe.model_copy(update={"max_tokens": 16})
    job = job.model_copy(update={"request": job.request.model_copy(update={"recipe": recipe})})
    (job.scratch / "spec.json").write_text(job.model_dump_json())
    assert start(job, GOLDGATE_PROCESSES="2").wait() == 1
    error = json.loads((job.scratch / "error.json").read_text())
    assert error["type"] == "TrainingError"
    assert "the 16 allowed" in error["what"]
    assert lost_process(job.scratch / "launcher.log") is None
    failed = failed_process(job.scratch / "launcher.log")
    assert failed is not None
    assert "ended with exit code 1" in failed.what


@several_launches
def test_sharded_processes_take_the_steps_of_one(tiny_model: Path, tmp_path: Path, alone: Outcome) -> None:
    job = make_job(tmp_path, tiny_model, accumulation=1)
    fsdp = [
        sys.executable, "-m", "accelerate.commands.launch",
        "--config_file", "deployments/accelerate/fsdp.yaml", "--num_processes", "2", "-m", "tests.training.fsdp_on_cpu",
    ]  # fmt: skip
    result = finish(job, start(job, fsdp))
    assert list(job.scratch.glob("checkpoint-*/pytorch_model_fsdp.bin"))  # it was FSDP indeed
    assert_same(alone, outcome(job, result))

    before = forget_the_end(job)
    resumed = finish(job, start(job, fsdp))
    assert resumed.resumed_from_step == before
    assert_same(alone, outcome(job, resumed))


@dataclass(frozen=True)
class Hosts:
    """Two hosts that can reach each other: how to run a command on each, and an address of the first."""

    commands: tuple[list[str], list[str]]
    environments: tuple[dict[str, str], dict[str, str]]
    address: str
    apart: bool


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture(params=["namespaces", "one network"])
def hosts(request: pytest.FixtureRequest) -> Iterator[Hosts]:
    """Two network namespaces joined by a cable, with host names in the wrong order; or processes of one network."""
    if request.param == "one network":
        yield Hosts(([], []), ({}, {}), "127.0.0.1", apart=False)
        return
    names = [f"gg{os.getpid()}{side}" for side in "ab"]
    cables = [f"v{os.getpid()}{side}" for side in "ab"]
    try:
        try:
            for name in names:
                _ip("netns", "add", name)
                _ip("-n", name, "link", "set", "lo", "up")
            _ip(
                "link",
                "add",
                cables[0],
                "netns",
                names[0],
                "type",
                "veth",
                "peer",
                "name",
                cables[1],
                "netns",
                names[1],
            )
            for name, cable, address in zip(names, cables, ("10.213.0.1/24", "10.213.0.2/24"), strict=True):
                _ip("-n", name, "addr", "add", address, "dev", cable)
                _ip("-n", name, "link", "set", cable, "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")
        # Were hosts numbered by their names, as c10d does, the second would be the first.
        commands = tuple(
            ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", f'hostname {host}; exec "$@"', "sh"]
            for name, host in zip(names, ("zulu", "alpha"), strict=True)
        )
        one, two = ({"GLOO_SOCKET_IFNAME": cable} for cable in cables)
        yield Hosts((commands[0], commands[1]), (one, two), "10.213.0.1", apart=True)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


@several_launches
def test_two_hosts_with_folders_of_their_own_take_the_steps_of_one(
    tiny_model: Path, tmp_path: Path, alone: Outcome, hosts: Hosts
) -> None:
    jobs = [make_job(tmp_path / name, tiny_model, accumulation=1) for name in ("first", "second")]

    def train() -> TrainResult:
        meet = {"GOLDGATE_NODES": "2", "GOLDGATE_RENDEZVOUS": f"{hosts.address}:{free_port()}"}
        second, first = (
            start(
                jobs[node],
                [*hosts.commands[node], *LAUNCHER],
                **meet,
                **hosts.environments[node],
                GOLDGATE_NODE=str(node),
            )
            for node in (1, 0)
        )
        try:
            result = finish(jobs[0], first)
            assert second.wait() == 0, (jobs[1].scratch / "launcher.log").read_text()
        finally:
            for process in (first, second):
                process.kill()
                process.wait()
        return result

    assert_same(alone, outcome(jobs[0], train()))
    assert not (jobs[1].scratch / "result.json").exists()
    assert not any(jobs[1].out.iterdir())
    assert not list(jobs[1].scratch.glob("checkpoint-*/trainer_state.json"))  # the first host alone writes

    before = forget_the_end(jobs[0])
    resumed = train()
    assert resumed.resumed_from_step == before
    assert_same(alone, outcome(jobs[0], resumed))
    sent = {folder.parent.name for folder in jobs[1].scratch.glob("checkpoint-*/trainer_state.json")}
    assert sent == {f"checkpoint-{before}"}  # which the second host had not seen


SAME = {"the training rows": "a" * 64, "the libraries": "torch 2.13.0, peft 0.21.2"}


@pytest.mark.parametrize(
    ("found", "what"),
    [
        ([("a", SAME)], None),
        ([("a", SAME), ("b", SAME), ("b", SAME)], None),
        (
            [("a", SAME), ("b", SAME), ("c", SAME | {"the training rows": "b" * 64})],
            f"Host c differs from host a in the training rows: {'b' * 64} against {'a' * 64}.",
        ),
        (
            [("a", SAME), ("b", SAME | {"the libraries": "torch 2.12.0, peft 0.21.2"})],
            "Host b differs from host a in the libraries: torch 2.12.0, peft 0.21.2 against torch 2.13.0, peft 0.21.2.",
        ),
        (
            [("a", SAME | {"the plan": "{" * 300}), ("b", SAME | {"the plan": "}"})],
            "Host b differs from host a in the plan.",
        ),
    ],
)
def test_hosts_that_would_train_other_things_are_refused(
    found: list[tuple[str, dict[str, str]]], what: str | None
) -> None:
    refusal = find_difference(found)
    assert (refusal.what if refusal else None) == what
    if refusal is not None:
        assert refusal.where == found[-1][0]
        assert refusal.fix


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [
        ([(8, False)], 0),
        ([(8, False), (8, False)], 0),
        ([(8, False), (4, False), (8, True)], 1),
        ([(8, False), (8, True)], 1),
        ([(8, True), (4, False), (2, False), (2, True)], 3),
    ],
)
def test_plan_of_all_is_that_of_the_device_with_least_memory(asked: list[tuple[int, bool]], chosen: int) -> None:
    plans = [
        make_plan(TrainSpec(batch_size=size), 48, 12, speed=SpeedPlan(checkpointing=again)) for size, again in asked
    ]
    assert most_careful(plans) == chosen
