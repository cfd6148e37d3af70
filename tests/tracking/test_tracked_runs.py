"""Runs are continued by their key, end as they ended, and hold what was logged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tasks.contracts.errors import ServiceError
from tasks.contracts.spec import ExecutionSpec
from tasks.tracking import TrackedRun, connect, open_run, run_link

_WORKER = """
import sys
from tasks.contracts.spec import ExecutionSpec
from tasks.tracking import open_run
store, number = sys.argv[1:]
with open_run(ExecutionSpec(store=store), "race", f"worker {number}", key=number, tags={}, params={}) as run:
    for step in range(20):
        run.log_metrics({"loss": float(number)}, step)
print(run.id)
"""


def _run(execution: ExecutionSpec, run_id: str) -> Any:
    return connect(execution).get_run(run_id)


def test_what_is_logged_is_there(execution: ExecutionSpec, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    report.write_text("<html>")
    params = {
        "lr": 2e-4,
        "labels": ("a", "b"),
        "store": "https://me:secret@store/x",
        **{f"p{n}": n for n in range(120)},
    }
    with open_run(execution, "logged", "first", key="k1", tags={"stage": "train"}, params=params) as run:
        run.log_metrics({"loss": 1.5, "lr": 0.1}, step=3)
        run.log_metrics({"loss": 1.0}, step=4)
        run.log_table("items", [{"id": "a", "right": True}, {"id": "b", "note": "…"}])
        run.log_table("items", [{"id": "c"}])
        run.log_table("confusion", [{"label": "a"}])
        run.log_artifact(report)
        run.log_dataset("train", "0123456789abcdef" * 4, "/data/train.jsonl", 500)
    kept = _run(execution, run.id)
    assert run.url is None
    assert kept.info.status == "FINISHED"
    assert kept.info.run_name == "first"
    assert kept.data.params["lr"] == "0.0002"
    assert kept.data.params["labels"] == '["a", "b"]'
    assert kept.data.params["store"] == "https://store/x"
    assert len(kept.data.params) == 123
    assert kept.data.tags["stage"] == "train"
    history = connect(execution).get_metric_history(run.id, "loss")
    assert [(point.step, point.value) for point in history] == [(3, 1.5), (4, 1.0)]
    (dataset,) = kept.inputs.dataset_inputs
    assert dataset.dataset.name == "train"
    assert json.loads(dataset.dataset.profile) == {"num_rows": 500, "sha256": "0123456789abcdef" * 4}
    assert ("0123456789abcdef" * 4).startswith(dataset.dataset.digest)
    files = Path(kept.info.artifact_uri.removeprefix("file://"))
    assert files.is_relative_to(Path(execution.store) / "mlartifacts")
    assert json.loads((files / "items.json").read_text()) == {"columns": ["id"], "data": [["c"]]}
    assert (files / "report.html").read_text() == "<html>"
    assert [table["path"] for table in json.loads(kept.data.tags["mlflow.loggedArtifacts"])] == [
        "items.json",
        "confusion.json",
    ]


@pytest.mark.parametrize("into", [None, "runs/tickets-1"])
def test_a_folder_is_kept_under_its_own_name_and_no_deeper(
    execution: ExecutionSpec, tmp_path: Path, into: str | None
) -> None:
    site, page = tmp_path / "data_docs", tmp_path / "report.html"
    (site / "more").mkdir(parents=True)
    (site / "index.html").write_text("<p>index")
    (site / "more/other.html").write_text("<p>other")
    page.write_text("<p>report")
    with open_run(execution, "folders", "run", key=f"into {into}", tags={}, params={}) as run:
        run.log_artifact(site, into)
        run.log_artifact(page, into)
    files = Path(_run(execution, run.id).info.artifact_uri.removeprefix("file://"))
    kept = {path.relative_to(files).as_posix() for path in files.rglob("*") if path.is_file()}
    where = f"{into}/" if into else ""
    assert kept == {f"{where}data_docs/index.html", f"{where}data_docs/more/other.html", f"{where}report.html"}


def test_mlflow_reads_the_tables(execution: ExecutionSpec) -> None:
    import pandas

    with open_run(execution, "logged", "tables", key="k2", tags={}, params={}) as run:
        run.log_table("items", [{"id": "a", "right": True}, {"id": "b", "right": None}])
    files = Path(_run(execution, run.id).info.artifact_uri.removeprefix("file://"))
    table = pandas.read_json(files / "items.json", orient="split")
    assert table.to_dict("records") == [
        {"id": "a", "right": 1.0},
        {"id": "b", "right": pytest.approx(float("nan"), nan_ok=True)},
    ]


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("no"), "FAILED"), (KeyboardInterrupt(), "KILLED"), (SystemExit(1), "FAILED")]
)
def test_ends_as_the_block_ended_and_goes_on_with_the_same_key(
    execution: ExecutionSpec, error: BaseException, status: str
) -> None:
    key = f"ends-{status}-{type(error).__name__}"
    with (
        pytest.raises(type(error)),
        open_run(execution, "ends", "once", key=key, tags={}, params={"lr": 1, "device": "cpu"}) as first,
    ):
        raise error
    assert _run(execution, first.id).info.status == status
    with open_run(execution, "ends", "twice", key=key, tags={"a": "b"}, params={"lr": 1, "device": "cuda"}) as second:
        assert second.id == first.id
        assert _run(execution, first.id).info.status == "RUNNING"
    kept = _run(execution, first.id)
    assert kept.info.status == "FINISHED"
    assert kept.info.run_name == "once"
    assert kept.data.params == {"lr": "1", "device": "cpu"}
    assert kept.data.tags["now.device"] == "cuda"
    assert "now.lr" not in kept.data.tags
    with open_run(execution, "ends", "third", key=key, tags={}, params={}) as third:
        assert third.id == first.id  # a finished run of this key is found too


def test_server_lost_in_the_middle(execution: ExecutionSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    def lost(*_: Any, **__: Any) -> None:
        raise MlflowException("connection refused")

    def write(run: TrackedRun) -> None:
        monkeypatch.setattr(MlflowClient, "log_batch", lost)
        monkeypatch.setattr(MlflowClient, "set_terminated", lost)
        run.log_metrics({"loss": 1.0})

    with (
        pytest.raises(ServiceError, match="did not take what the run has to say: connection refused") as caught,
        open_run(execution, "lost", "run", key="k", tags={}, params={}) as run,
    ):
        write(run)
    assert caught.value.where == f"sqlite:///{execution.store}/mlflow.db"


def test_other_keys_and_experiments_are_other_runs(execution: ExecutionSpec) -> None:
    ids = set()
    for experiment, key in (("one", "k"), ("one", "l"), ("two", "k")):
        with open_run(execution, experiment, "run", key=key, tags={}, params={}) as run:
            ids.add(run.id)
    assert len(ids) == 3


def test_no_global_run_is_left(execution: ExecutionSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.chdir(tmp_path)
    with open_run(execution, "global", "run", key="k", tags={}, params={}):
        assert mlflow.active_run() is None
    assert list(tmp_path.iterdir()) == []


def test_link_is_none_without_a_server(execution: ExecutionSpec) -> None:
    assert run_link(execution, "ends", "anything") is None


def test_files_behind_a_server_that_is_not_used(execution: ExecutionSpec) -> None:
    connect(execution).create_experiment("proxied", artifact_location="mlflow-artifacts:/7")
    with (
        pytest.raises(ServiceError, match="'proxied' are kept by an MLflow server") as caught,
        open_run(execution, "proxied", "run", key="k", tags={}, params={}),
    ):
        pytest.fail("must not open")
    assert "goldgate up" in caught.value.fix


def test_processes_that_start_together_make_one_database(tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", _WORKER, store, str(number)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    ids = set()
    for worker in workers:
        out, err = worker.communicate(timeout=240)
        assert worker.returncode == 0, err
        assert err == ""  # a migration prints dozens of lines; none may reach a person
        ids.add(out.strip())
    execution = ExecutionSpec(store=store)
    client = connect(execution)
    experiment = client.get_experiment_by_name("race")
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.run_id for run in runs} == ids
    assert all(len(client.get_metric_history(run_id, "loss")) == 20 for run_id in ids)
