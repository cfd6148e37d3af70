"""A whole search with a tiny model: its trials, what it leaves, and that it leaves the golden set alone."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.client.schemas.objects import FlowRun
from prefect.states import Completed
from rich.console import Console

import flows.sweep as module
import flows.train
from flows.sweep import sweep
from goldgate.sweep import load_preset, load_sweep, print_sweep
from tasks.contracts.errors import PrunedError, ServiceError, SpecError
from tasks.contracts.progress import Progress
from tasks.contracts.references import BaseModelRef, DevLossLimit, SplitsRef, TrainRequest
from tasks.contracts.spec import (
    CurateSpec,
    EvaluateSpec,
    ExecutionSpec,
    Guard,
    TaskKind,
    TaskSpec,
    TrainSpec,
)
from tasks.contracts.sweep import LearningRates, SearchSpace, SweepRef, SweepSpec, TrialState
from tasks.data.golden import ITEMS
from tasks.gate.ledger import Ledger, ledger_url
from tasks.store import Store
from tasks.training.job import append_record, write_progress
from tasks.training.pruned import keep_pruned
from tests.prefect_server import prefect_server
from tests.toys import LABELS, toy_risks, toy_rows, toy_spec

pytestmark = pytest.mark.timeout(600)  # whoever comes first starts the server and trains

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    with prefect_server():
        yield


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> SweepSpec:
    """A search over rates of which the lowest learn nothing, so that some trial is far behind."""
    folder = tmp_path_factory.mktemp("world")
    training = toy_spec(
        folder,
        toy_rows(400, seed=1),
        curate=CurateSpec(accept_risks=toy_risks(*Guard)),
        train=TrainSpec(epochs=2, batch_size=16, max_tokens=128, evaluations=4),
        evaluate=EvaluateSpec(max_new_tokens=8, batch_size=40, baseline_shots=2, baseline_dev_items=20),
    )
    return SweepSpec(
        trials=4,
        startup_trials=2,
        at_once=2,
        space=SearchSpace(lora_rank=(4, 8), learning_rate=LearningRates(low=1e-6, high=1e-2)),
        seed=12,  # its fourth trial gets a rate of a millionth
        noise_seeds=2,
        then_gate=True,
        training=training,
    )


@contextmanager
def without_golden_items(spec: SweepSpec) -> Iterator[None]:
    """Nobody can read a golden item here."""
    items = Path(spec.training.golden.path) / ITEMS
    hidden = items.with_name("hidden")
    items.rename(hidden)
    try:
        yield
    finally:
        hidden.rename(items)


@pytest.fixture(scope="module")
def swept(spec: SweepSpec) -> SweepRef:
    """The search, in which the golden items are out of reach from the first trial until the result is kept."""
    tracked_sweep = module.tracked_sweep

    @contextmanager
    def in_the_dark(*about: Any) -> Iterator[Any]:
        with without_golden_items(spec), tracked_sweep(*about) as run:
            yield run

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "tracked_sweep", in_the_dark)
        return sweep(spec)


def runs(spec: SweepSpec) -> list[Run]:
    client = MlflowClient(spec.training.execution.tracking_uri)
    experiment = client.get_experiment_by_name(spec.training.name)
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


def made(spec: SweepSpec, step: str) -> int:
    return len(list(Store(spec.training.execution.store).list(step)))


def test_trials_are_compared_on_dev(spec: SweepSpec, swept: SweepRef) -> None:
    assert [trial.number for trial in swept.trials] == [1, 2, 3, 4]
    finished = [trial for trial in swept.trials if trial.state is TrialState.FINISHED]
    assert len(finished) >= 2
    assert all(len(trial.dev_losses) == 4 for trial in finished)
    assert all(trial.dev_loss == pytest.approx(min(trial.dev_losses), abs=1e-5) for trial in finished)
    winner = swept.trials[swept.winner - 1]
    assert winner.dev_loss == min(trial.dev_loss for trial in finished if trial.dev_loss is not None)
    assert all(trial.mlflow_run_id and trial.tokens and trial.steps == trial.planned_steps for trial in finished)


def test_a_trial_that_is_behind_is_given_up_and_its_process_says_so(spec: SweepSpec, swept: SweepRef) -> None:
    given_up = [trial for trial in swept.trials if trial.state is TrialState.PRUNED]
    assert len(given_up) >= 1
    for trial in given_up:
        assert trial.reason is not None
        assert trial.reason.startswith(f"Given up at look {len(trial.dev_losses)} (step {trial.steps})")
        assert trial.steps is not None
        assert trial.planned_steps is not None
        assert 0 < trial.steps < trial.planned_steps
    assert made(spec, "pruned") == len(given_up)
    scratch = Path(spec.training.execution.store) / "scratch"
    assert list(scratch.glob("train-*/checkpoint-*")) == []


def test_trials_are_runs_of_prefect_and_a_pruned_one_is_no_failure(swept: SweepRef) -> None:
    with get_client(sync_client=True) as client:
        flow = client.read_flow_by_name("train")
        states = Counter(str(run.state_name) for run in client.read_flow_runs() if run.flow_id == flow.id)
    assert states["Pruned"] == sum(trial.state is TrialState.PRUNED for trial in swept.trials)
    assert set(states) == {"Completed", "Pruned"}


def test_their_runs_in_mlflow_are_nested_in_that_of_the_search(spec: SweepSpec, swept: SweepRef) -> None:
    assert swept.noise is not None
    (parent,) = [run for run in runs(spec) if run.data.tags.get("goldgate.step") == "sweep"]
    children = [run for run in runs(spec) if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == len(swept.trials) + len(swept.noise.seeds) - 1
    states = Counter(run.info.status for run in children)
    pruned = sum(trial.state is TrialState.PRUNED for trial in swept.trials)
    assert states == {"FINISHED": len(children) - pruned, "KILLED": pruned}
    assert {trial.mlflow_run_id for trial in swept.trials if trial.mlflow_run_id} <= {
        run.info.run_id for run in children
    }
    assert parent.info.status == "FINISHED"
    assert json.loads(parent.data.params["space"])["lora_rank"] == [4, 8]
    assert parent.data.tags["goldgate.winner"] == str(swept.winner)
    assert parent.data.metrics["best_dev_loss"] == swept.trials[swept.winner - 1].dev_loss
    client = MlflowClient(spec.training.execution.tracking_uri)
    table = json.loads(Path(client.download_artifacts(parent.info.run_id, "trials.json")).read_text())
    assert [row[table["columns"].index("state")] for row in table["data"]] == [one.state.value for one in swept.trials]


def test_noise_of_the_winner(spec: SweepSpec, swept: SweepRef) -> None:
    winner, noise = swept.trials[swept.winner - 1], swept.noise
    assert noise is not None
    assert noise.seeds == (17, 18)
    assert noise.dev_loss.values[0] == winner.dev_loss
    assert noise.dev_loss.values[1] != winner.dev_loss
    assert noise.exact_match.values[0] == swept.metrics["exact_match"]
    kept = json.loads((Path(swept.folder) / "noise.json").read_text())
    assert kept == noise.model_dump(mode="json")
    lines = (Path(swept.folder) / "trials.jsonl").read_text().splitlines()
    assert [json.loads(line)["number"] for line in lines] == [1, 2, 3, 4]
    with get_client(sync_client=True) as client:
        (page,) = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["tickets-sweep"])))
    assert "# A search over 4 recipes" in str(page.data)
    assert "## Retrain noise" in str(page.data)


def test_only_the_winner_has_a_look_at_the_golden_set(spec: SweepSpec, swept: SweepRef) -> None:
    assert swept.gate is not None
    with Ledger.open(ledger_url(spec.training.execution)) as ledger:
        (page,) = ledger.pages()
        (look,) = ledger.looks(page.page)
    assert look.candidate == swept.gate.verdict.candidate.digest
    winner = swept.trials[swept.winner - 1]
    trained = list(Store(spec.training.execution.store).list("train"))
    (of_winner,) = [one for one in trained if one.manifest.facts["merged_digest"] == look.candidate]
    assert of_winner.manifest.facts["mlflow_run_id"] == winner.mlflow_run_id, "it was not trained again"
    assert of_winner.manifest.config["recipe"] == winner.recipe.model_dump(mode="json")


def no_training(*_: object) -> None:
    raise AssertionError("nothing is to be trained")


def test_the_same_search_again_trains_nothing(
    spec: SweepSpec, swept: SweepRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.training.launch.run_training", no_training)
    again = sweep(spec.model_copy(update={"then_gate": False}))
    assert again == swept.model_copy(update={"reused": True, "gate": None})
    without = sweep(spec.model_copy(update={"then_gate": False, "noise_seeds": 0}))
    assert (without.trials, without.winner, without.noise) == (swept.trials, swept.winner, None)
    assert not (Path(without.folder) / "noise.json").exists()


def test_a_search_that_was_killed_trains_only_what_is_missing(
    spec: SweepSpec, swept: SweepRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was killed in the trial that is given up: of that trial, and of the result, nothing is there."""
    store = Store(spec.training.execution.store)
    shutil.rmtree(Path(store.root) / "sweep")
    lost = next(trial for trial in swept.trials if trial.state is TrialState.PRUNED)
    (known,) = [one for one in store.list("pruned") if one.manifest.facts["reason"] == lost.reason]
    shutil.rmtree(known.uri)
    from tasks.training import launch

    trained: list[TrainSpec] = []
    run_training = launch.run_training

    def counted(job: Any, listener: Any) -> Any:
        trained.append(job.request.recipe)
        return run_training(job, listener)

    monkeypatch.setattr(launch, "run_training", counted)
    again = sweep(spec.model_copy(update={"then_gate": False}))
    assert trained == [lost.recipe]
    assert again.trials == swept.trials
    assert (again.winner, again.noise) == (swept.winner, swept.noise)


def test_the_terminal_shows_trials_winner_and_noise(spec: SweepSpec, swept: SweepRef, tmp_path: Path) -> None:
    with (tmp_path / "shown").open("w") as out:
        print_sweep(Console(file=out, width=200), spec, swept)
    shown = (tmp_path / "shown").read_text()
    assert f"Trial {swept.winner} is best on dev" in shown
    assert shown.count("pruned at look") == sum(trial.state is TrialState.PRUNED for trial in swept.trials)
    assert "2 trainings of the winner, with the seeds 17, 18" in shown
    assert shown.rstrip().endswith(swept.folder)


# -- on another machine ---------------------------------------------------------------------------------------------


def test_a_trial_that_a_worker_gave_up_is_told_from_one_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_of = {"uri": "unused", "fingerprint": "f" * 64, "digest": "d" * 64}
    request = TrainRequest(
        name="tickets",
        task=TaskSpec(kind=TaskKind.CLASSIFY, instruction="Which team?", labels=LABELS),
        splits=SplitsRef(**made_of, step="curate", train_rows=1, dev_rows=1, removed={}),
        base=BaseModelRef(**made_of, step="base_model", source="base"),
        recipe=TrainSpec(),
        stop_above=(DevLossLimit(look=1, dev_loss=1.5),),
        execution=ExecutionSpec(store=str(tmp_path / "store"), train_deployment="train/gpu"),
    )

    def on_a_worker(name: str, parameters: dict[str, Any], timeout: float) -> FlowRun:
        asked = TrainRequest.model_validate(parameters["request"])
        append_record(tmp_path / "curves.jsonl", {"step": 2, "dev_loss": 1.9})
        write_progress(tmp_path, Progress(2, 8, "steps"))
        keep_pruned(asked, tmp_path, PrunedError("Given up at look 1.", fix="nothing"))
        return FlowRun(id=uuid4(), flow_id=uuid4(), name="brave-otter", state=Completed(name="Pruned"))

    monkeypatch.setattr(flows.train, "run_deployment", on_a_worker)
    with pytest.raises(PrunedError, match="Given up at look 1"):
        flows.train.train_where_told(request)


def test_a_training_within_a_search_that_mlflow_does_not_know_is_refused(tmp_path: Path) -> None:
    from tasks.tracking import open_run

    execution = ExecutionSpec(store=str(tmp_path / "store"), tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    with (
        pytest.raises(ServiceError, match="no run that this one could be nested in"),
        open_run(execution, "tickets", "train", key="a", tags={}, params={}, within="b"),
    ):
        pass


# -- the configuration ----------------------------------------------------------------------------------------------


def test_the_example_searches_the_training_of_the_prices() -> None:
    found = load_sweep(ROOT / "examples/prices/sweep.yaml")
    assert found.training.name == "prices"
    assert found.training.train.evaluations == 4
    assert found.training.train.batch_size == 4, "what the file leaves out is as the training has it"
    assert Path(found.training.data.source) == ROOT / "examples/prices/prices.jsonl"
    assert found.space.lora_rank == (4, 8, 16)
    assert found.then_gate is False


def test_overrides_and_changes_reach_the_training(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(
        f"training_from: {ROOT}/examples/prices/prices.yaml\n"
        "training:\n  train: {evaluations: 2, learning_rate: 1e-5}\n  execution: {store: s3://bucket/store}\n"
    )
    overrides = ["trials=3", "training.train.seed=5", "space.epochs=[0.5, 1.0]"]
    found = load_sweep(tmp_path / "sweep.yaml", overrides)
    train = found.training.train
    assert (train.evaluations, train.learning_rate, train.seed) == (2, 1e-5, 5)
    assert (found.trials, found.space.epochs) == (3, (0.5, 1.0))
    assert found.training.execution.store == "s3://bucket/store"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("trials: 3\n", "does not name the training"),
        ("training_from: nowhere.yaml\n", "does not exist"),
        ("training_from: {prices}\ntrails: 3\n", "did you mean trials"),
        ("training_from: {prices}\ntraining: {{train: {{epoch: 3}}}}\n", "did you mean epochs"),
        ("training_from: {prices}\nspace: {{lora_rank: [8], learning_rate: null}}\n", "holds one recipe only"),
    ],
)
def test_a_configuration_that_does_not_fit_is_named(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "sweep.yaml").write_text(text.format(prices=ROOT / "examples/prices/prices.yaml"))
    with pytest.raises(SpecError, match=why):
        load_sweep(tmp_path / "sweep.yaml")


def test_a_deployment_hands_its_trials_to_the_pool_with_the_gpu() -> None:
    found = SweepSpec.model_validate(load_preset(str(ROOT / "examples/prices/sweep.yaml"))["spec"])
    assert found.training.execution.train_deployment == "train/gpu"
    assert found.model_copy(update={"training": found.training.model_copy(update={"execution": ExecutionSpec()})}) == (
        load_sweep(ROOT / "examples/prices/sweep.yaml").model_copy(
            update={"training": found.training.model_copy(update={"execution": ExecutionSpec()})}
        )
    )
