"""Trainings that are killed, stopped, starved and lied to, and what is left of them; on the tiny model."""

from __future__ import annotations

import json
import os
import pickle
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tasks.contracts.references import TrainRequest
from tasks.contracts.spec import ExecutionSpec
from tasks.store import digest_folder
from tasks.training.checkpoints import fault_of, mark_complete
from tasks.training.job import TrainJob, TrainResult
from tests.training.nursery import Harm, Nursery
from tests.training.test_training import RECIPE, STEPS, curves, make_job, make_request

KILLED, TERMINATED, INTERRUPTED = -9, 143, 130
STEP_BEGIN = "transformers.trainer_callback:CallbackHandler.on_step_begin"
SUBSTEP_END = "transformers.trainer_callback:CallbackHandler.on_substep_end"
STEP_END = "transformers.trainer_callback:CallbackHandler.on_step_end"


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as started:
        yield started


@dataclass(frozen=True)
class Whole:
    """An uninterrupted training: what every interrupted one has to come to."""

    request: TrainRequest
    job: TrainJob


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    request = make_request(folder, tiny_model)
    job = make_job(folder / "whole", request)
    assert nursery.run(spec_of(job)) == 0, end_of_log(job)
    return Whole(request, job)


def spec_of(job: TrainJob) -> Path:
    job.scratch.mkdir(exist_ok=True)
    (job.scratch / "spec.json").write_text(job.model_dump_json())
    return job.scratch / "spec.json"


def end_of_log(job: TrainJob) -> str:
    return (job.scratch / "nursery.log").read_text()[-3000:]


def result_of(job: TrainJob) -> TrainResult:
    return TrainResult.model_validate_json((job.scratch / "result.json").read_text())


def error_of(job: TrainJob) -> dict[str, Any]:
    record = json.loads((job.scratch / "error.json").read_text())
    assert isinstance(record, dict)
    return record


def steps_kept(job: TrainJob) -> list[int]:
    """Steps of the whole checkpoints."""
    return sorted(
        int(folder.name.split("-")[1]) for folder in job.scratch.glob("checkpoint-*") if fault_of(folder) is None
    )


def run_of(job: TrainJob) -> tuple[str, dict[str, Counter[int]], dict[str, dict[int, float]]]:
    """Status of the one MLflow run, and of each metric: how often a step is there, and the values."""
    from tasks.tracking import connect

    client = connect(job.request.execution)
    experiment = client.get_experiment_by_name("fruit")
    (run,) = client.search_runs([experiment.experiment_id])
    histories = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    return (
        run.info.status,
        {name: Counter(point.step for point in points) for name, points in histories.items()},
        {name: {point.step: point.value for point in points} for name, points in histories.items()},
    )


def assert_as_if_nothing_had_happened(job: TrainJob, whole: Whole) -> None:
    for part in ("adapter", "merged"):
        assert digest_folder(job.out / part) == digest_folder(whole.job.out / part), part
    points = [(point["step"], point.get("loss"), point.get("dev_loss")) for point in curves(job.out)]
    assert points == [(p["step"], p.get("loss"), p.get("dev_loss")) for p in curves(whole.job.out)]
    status, times, values = run_of(job)
    _, _, wanted = run_of(whole.job)
    assert status == "FINISHED"
    assert {(name, step): n for name, steps in times.items() for step, n in steps.items() if n != 1} == {}
    assert values.keys() == wanted.keys()
    for name in ("loss", "dev_loss", "learning_rate", "best_dev_loss"):
        assert values[name] == wanted[name], name


def test_killed_anywhere_again_and_again_it_ends_as_if_nothing_had_happened(
    whole: Whole, nursery: Nursery, tmp_path: Path
) -> None:
    job = make_job(tmp_path, whole.request)
    draw = random.Random(11)
    kills = [
        Harm(STEP_END, draw.randint(2, 4)),
        Harm("tasks.tracking.runs:TrackedRun.log_metrics", draw.randint(2, 5)),  # in the curves, not in MLflow
        Harm("transformers.trainer:Trainer._save_optimizer_and_scheduler", 2),  # the model is written, no more
        Harm("transformers.trainer:Trainer._save_rng_state", 1),
        Harm("tasks.training.checkpoints:write_whole", 3),  # all but the mark (the first two are of other files)
        Harm("shutil:rmtree", draw.randint(1, 2)),  # while old ones are cleared away
        Harm("tasks.training.fit:merge_adapter", 1),
    ]
    for kill in kills:
        assert nursery.run(spec_of(job), kill) == KILLED, f"{kill}: {end_of_log(job)}"
        save_every = json.loads((job.scratch / "plan.json").read_text())["checkpoint_steps"]
        done = json.loads((job.scratch / "progress.json").read_text())["done"]
        assert done - max(steps_kept(job), default=0) <= save_every, kill

    assert nursery.run(spec_of(job)) == 0, end_of_log(job)
    assert result_of(job).resumed_from_step == STEPS
    assert_as_if_nothing_had_happened(job, whole)
    assert len(list(job.scratch.glob("checkpoint-*"))) <= 4


def test_told_to_stop_it_keeps_the_step_that_it_is_at_and_goes_on_from_there(
    whole: Whole, nursery: Nursery, tmp_path: Path
) -> None:
    job = make_job(tmp_path, whole.request)
    assert nursery.run(spec_of(job), Harm(STEP_BEGIN, 5, "term")) == TERMINATED, end_of_log(job)
    assert max(steps_kept(job)) == 5  # no step of the plan's own
    assert not (job.scratch / "result.json").exists()
    assert not any(job.out.iterdir())
    error = error_of(job)
    assert error["what"] == "Training was told to stop; did so after step 5, whose checkpoint is kept."
    assert "goes on from the last checkpoint" in error["fix"]
    assert run_of(job)[0] == "KILLED"

    assert nursery.run(spec_of(job)) == 0, end_of_log(job)
    assert result_of(job).resumed_from_step == 5
    assert_as_if_nothing_had_happened(job, whole)


@pytest.mark.parametrize(
    "harms",
    [
        (Harm(STEP_BEGIN, 5, "term"), Harm(SUBSTEP_END, 5, "term")),  # asked again before the step is done
        (Harm("transformers.trainer_callback:CallbackHandler.on_train_begin", 1, "term"),),  # nothing to keep yet
        (Harm("tasks.training.fit:merge_adapter", 1, "term"),),  # all is kept
    ],
    ids=["twice", "before the first step", "after the last step"],
)
def test_it_stops_at_once_where_there_is_nothing_to_wait_for(
    whole: Whole, nursery: Nursery, tmp_path: Path, harms: tuple[Harm, ...]
) -> None:
    job = make_job(tmp_path, whole.request)
    assert nursery.run(spec_of(job), *harms) == INTERRUPTED, end_of_log(job)
    assert 5 not in steps_kept(job)
    assert "interrupted between checkpoints" in error_of(job)["what"]
    assert run_of(job)[0] == "KILLED"


def test_killed_after_it_had_stopped_early_it_trains_no_further(whole: Whole, nursery: Nursery, tmp_path: Path) -> None:
    impatient = RECIPE.model_copy(update={"patience": 1, "evaluations": 18, "learning_rate": 1e-2, "epochs": 12.0})
    request = whole.request.model_copy(update={"recipe": impatient})
    straight, killed = make_job(tmp_path / "straight", request), make_job(tmp_path / "killed", request)
    assert nursery.run(spec_of(straight)) == 0, end_of_log(straight)
    assert result_of(straight).stopped_early
    assert nursery.run(spec_of(killed), Harm("tasks.training.fit:merge_adapter", 1)) == KILLED
    assert nursery.run(spec_of(killed)) == 0, end_of_log(killed)
    assert result_of(killed).resumed_from_step == result_of(killed).steps == result_of(straight).steps
    assert result_of(killed).best_step == result_of(straight).best_step
    assert digest_folder(killed.out / "merged") == digest_folder(straight.out / "merged")


def test_no_room_for_a_checkpoint_is_said_and_overcome(whole: Whole, nursery: Nursery, tmp_path: Path) -> None:
    """On a small disk of its own, which is then made larger."""
    job = make_job(tmp_path, whole.request)
    spec_of(job)
    (tmp_path / "spec.json").write_text(job.model_dump_json())
    newest = max(whole.job.scratch.glob("checkpoint-*"), key=lambda folder: folder.stat().st_mtime)
    needed = sum(file.stat().st_size for file in newest.iterdir())
    disk = str(job.scratch)
    codes = nursery.order(
        {"mount": disk, "bytes": int(1.6 * needed)},  # room for one checkpoint, not for two
        {"run": str(tmp_path / "spec.json")},
        {"copy": [f"{disk}/.", str(tmp_path / "first")]},
        {"mount": disk, "bytes": 20 * needed},
        {"run": str(tmp_path / "spec.json")},
        {"copy": [f"{disk}/.", str(tmp_path / "second")]},
    )
    if codes[0] != 0:
        if os.environ.get("CI"):
            pytest.fail("no user namespaces here, so no disk can be made small")
        pytest.skip("no user namespaces here, so no disk can be made small")
    log = (tmp_path / "nursery.log").read_text()[-3000:]
    assert codes == [0, 1, 0, 0, 0, 0], log
    error = json.loads((tmp_path / "first" / "error.json").read_text())
    assert error["type"] == "StoreError"
    assert error["where"] == disk
    assert f"a checkpoint needs about {needed / 1e6:,.1f} MB" in error["what"]
    assert "MB are free" in error["what"]
    (left,) = (tmp_path / "first").glob("checkpoint-*")  # the half-written one has made room for these words
    result = TrainResult.model_validate_json((tmp_path / "second" / "result.json").read_text())
    assert result.resumed_from_step == int(left.name.split("-")[1]) > 0
    assert digest_folder(job.out / "merged") == digest_folder(whole.job.out / "merged")


def test_out_of_memory_it_goes_on_with_half_the_batch_and_the_same_rows_in_each_step(
    whole: Whole, nursery: Nursery, tmp_path: Path
) -> None:
    job = make_job(tmp_path, whole.request)
    starved = Harm(STEP_BEGIN, 10, "raise", "CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert nursery.run(spec_of(job), starved) == 1
    error = error_of(job)
    assert (error["type"], error["out_of_memory"]) == ("TrainingError", True)
    assert "Tried to allocate 2.00 GiB" in error["what"]

    smaller = job.model_copy(update={"halve_batches": 1})
    assert nursery.run(spec_of(smaller)) == 0, end_of_log(job)
    result = result_of(job)
    assert (result.halve_batches, result.steps) == (1, STEPS)
    assert result.resumed_from_step >= 8  # the checkpoints of the whole batch fit
    assert "half the batch" in result.sentence()
    _, times, values = run_of(job)
    assert set(times["loss"].values()) == {1}
    _, _, wanted = run_of(whole.job)
    assert values["loss"] == pytest.approx(wanted["loss"], rel=1e-3)  # other rows would give other losses
    assert result.dev_loss == pytest.approx(result_of(whole.job).dev_loss, rel=1e-3)


class _Planted:
    """Runs a command when it is unpickled without care."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.proof),)


def test_a_planted_pickle_is_not_run(whole: Whole, nursery: Nursery, tmp_path: Path) -> None:
    job = make_job(tmp_path, whole.request)
    assert nursery.run(spec_of(job), Harm(STEP_END, 5)) == KILLED
    folder = job.scratch / f"checkpoint-{max(steps_kept(job))}"
    (folder / "optimizer.pt").write_bytes(pickle.dumps(_Planted(tmp_path / "proof"), protocol=2))
    (folder / "goldgate_complete.json").unlink()
    mark_complete(folder, max(int(folder.name.split("-")[1]), 0), 1.0)  # as somebody would who can write here
    assert fault_of(folder) is None
    assert nursery.run(spec_of(job)) == 1
    assert not (tmp_path / "proof").exists()
    assert "weights_only" in end_of_log(job)


def test_another_plan_gets_a_run_of_its_own(whole: Whole, nursery: Nursery, tmp_path: Path) -> None:
    from tasks.tracking import connect

    job = make_job(tmp_path, whole.request)
    assert nursery.run(spec_of(job), Harm(STEP_END, 4)) == KILLED
    longer = whole.request.recipe.model_copy(update={"batch_size": 8})  # as if it started over on two devices
    other = job.model_copy(update={"request": job.request.model_copy(update={"recipe": longer})})
    assert nursery.run(spec_of(other)) == 0, end_of_log(job)
    client = connect(job.request.execution)
    runs = client.search_runs([client.get_experiment_by_name("fruit").experiment_id])
    assert sorted(run.info.status for run in runs) == ["FINISHED", "KILLED"]
    (finished,) = [run for run in runs if run.info.status == "FINISHED"]
    assert finished.info.run_id == result_of(job).mlflow_run_id
    steps = [point.step for point in client.get_metric_history(finished.info.run_id, "loss")]
    assert steps == list(range(1, STEPS // 2 + 1))


def test_a_run_begun_by_a_machine_whose_clock_is_ahead_is_continued(tmp_path: Path) -> None:
    import time

    from mlflow.entities import Metric

    from tasks.tracking import connect, open_run
    from tasks.tracking.runs import KEY
    from tasks.training.curve import continue_curve

    execution = ExecutionSpec(store=str(tmp_path))
    client = connect(execution)
    experiment = client.create_experiment("fruit")
    ahead = int((time.time() + 3600) * 1000)
    begun = client.create_run(experiment, start_time=ahead, run_name="train", tags={KEY: "k"})
    client.log_batch(begun.info.run_id, metrics=[Metric("loss", 3.0, ahead, 1), Metric("loss", 2.0, ahead, 2)])
    client.set_terminated(begun.info.run_id, "KILLED", end_time=ahead)
    with open_run(execution, "fruit", "train", key="k", tags={}, params={}) as run:
        assert run.id == begun.info.run_id
        curve = continue_curve(run)
        for step, loss in ((2, 9.0), (3, 1.0)):
            curve.log_metrics({"loss": loss}, step)
    history = [(point.step, point.value) for point in client.get_metric_history(run.id, "loss")]
    assert sorted(history) == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert client.get_run(run.id).data.metrics["loss"] == 1.0  # the newest by step, though not by the clock


def test_all_processes_stop_at_the_step_at_which_one_is_told_to(nursery: Nursery, tmp_path: Path) -> None:
    asked = [[False, False, True, True], [False, True, False, True]]
    answers = nursery.order({"agree": asked, "store": str(tmp_path / "store")})
    assert answers == [0b1110, 0b1110]


def test_one_process_asks_nobody_else() -> None:
    import torch

    from tasks.training.preempt import agree

    assert [agree(asked, torch.device("cpu")) for asked in (False, True)] == [False, True]
