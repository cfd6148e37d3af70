"""Runs of MLflow that a killed process can continue, without MLflow's global active run."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.contracts.errors import PrunedError, ServiceError
from tasks.contracts.spec import ExecutionSpec
from tasks.tracking.address import artifact_root, connect, tracking_uri, without_password

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

KEY = "goldgate.key"
_PARENT = "mlflow.parentRunId"  # the tag by which MLflow nests runs
_TABLES = "mlflow.loggedArtifacts"  # the tag by which MLflow's evaluation view finds tables
_BATCH = 100  # most params or tags that MLflow takes in one request
_DIGEST_CHARACTERS = 36  # longest digest that MLflow keeps of a dataset
_CREDENTIALS = re.compile(r"(?<=://)[^/\s@]+@")


@dataclass(frozen=True)
class TrackedRun:
    """A run that is being written. `url` is its page, None where no server shows one."""

    client: MlflowClient
    id: str
    url: str | None

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Keep numbers, by name, at a step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(self.id, metrics=[Metric(name, float(metrics[name]), now, step) for name in metrics])

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Keep settings. MLflow never changes one: on a continued run a new value becomes the tag `now.<name>`."""
        from mlflow.entities import Param

        known = self.client.get_run(self.id).data.params
        texts = {name: _text(value) for name, value in params.items()}
        new = [Param(name, text) for name, text in texts.items() if name not in known]
        for batch in _batches(new):
            self.client.log_batch(self.id, params=batch)
        self.set_tags({f"now.{name}": text for name, text in texts.items() if known.get(name, text) != text})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set or overwrite tags."""
        from mlflow.entities import RunTag

        for batch in _batches([RunTag(name, _text(value)) for name, value in tags.items()]):
            self.client.log_batch(self.id, tags=batch)

    def log_table(self, name: str, records: Sequence[Mapping[str, Any]]) -> None:
        """Keep a table `<name>.json` that MLflow's evaluation view compares; replaces an earlier one of this name."""
        columns = list(dict.fromkeys(column for record in records for column in record))
        table = {"columns": columns, "data": [[record.get(column) for column in columns] for record in records]}
        file = f"{name}.json"
        self.client.log_text(self.id, json.dumps(table, ensure_ascii=False, default=str), file)
        listed = json.loads(self.client.get_run(self.id).data.tags.get(_TABLES, "[]"))
        entry = {"path": file, "type": "table"}
        if entry not in listed:
            self.client.set_tag(self.id, _TABLES, json.dumps([*listed, entry]))

    def log_artifact(self, path: Path, into: str | None = None) -> None:
        """Keep a file, or a folder with all that is in it, under its own name; `into` is a folder of the run."""
        self.client.log_artifact(self.id, str(path), artifact_path=into)

    def log_dataset(self, name: str, digest: str, source: str, rows: int) -> None:
        """Name a dataset that the run read. MLflow shows the digest's first 36 characters; its profile has all."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=name,
            digest=digest[:_DIGEST_CHARACTERS],
            source_type="local" if "://" not in source else source.split("://")[0],
            source=json.dumps({"uri": without_password(source)}),
            profile=json.dumps({"num_rows": rows, "sha256": digest}),
        )
        self.client.log_inputs(self.id, datasets=[DatasetInput(dataset, [InputTag("mlflow.data.context", name)])])


@contextmanager
def open_run(
    execution: ExecutionSpec,
    experiment: str,
    name: str,
    *,
    key: str,
    tags: Mapping[str, str],
    params: Mapping[str, Any],
    within: str | None = None,
) -> Iterator[TrackedRun]:
    """Open the run of this key, continuing the one that is there (finished or not), else a new one.

    It ends FINISHED; FAILED when an exception leaves the block, KILLED when that is an interrupt or a pruning.

    Args:
        execution: where MLflow is.
        experiment: the experiment; made if it is not there.
        name: how people call the run.
        key: what the run is about (a fingerprint): the same key is the same run.
        tags: tags to set; passwords in addresses are taken out.
        params: settings to keep, as text; passwords in addresses are taken out.
        within: key of the run of this experiment that this one is nested in; None for none.

    Raises:
        ServiceError: MLflow cannot be reached or refuses, has no run of the key `within`, or keeps the experiment's
            files behind a server that this process does not talk to.
    """
    from mlflow.exceptions import MlflowException

    client = connect(execution)
    experiment_number = ensure_experiment(client, execution, experiment)
    nesting = {} if within is None else {_PARENT: _parent(client, execution, experiment_number, within)}
    found = _find(client, experiment_number, key)
    if found is None:
        found = client.create_run(experiment_number, run_name=name, tags={KEY: key})
    else:
        client.update_run(found.info.run_id, status="RUNNING")
    run = TrackedRun(client, found.info.run_id, _link(tracking_uri(execution), experiment_number, found.info.run_id))
    try:
        run.set_tags({**tags, **nesting})
        run.log_params(params)
        yield run
        client.set_terminated(run.id, "FINISHED")
    except BaseException as error:
        with suppress(MlflowException):  # the error that is on its way says more than that this failed too
            client.set_terminated(run.id, "KILLED" if isinstance(error, KeyboardInterrupt | PrunedError) else "FAILED")
        if isinstance(error, MlflowException):
            raise ServiceError(
                f"MLflow did not take what the run has to say: {error.message}",
                where=without_password(tracking_uri(execution)),
                fix="see that the server or the disk is well and run again; finished steps are kept",
            ) from error
        raise


def run_link(execution: ExecutionSpec, experiment: str, key: str) -> str | None:
    """The page of the run of this key; None when there is no such run, or no server that shows it."""
    uri = tracking_uri(execution)
    if not uri.startswith("http"):
        return None
    client = connect(execution)
    there = client.get_experiment_by_name(experiment)
    run = None if there is None else _find(client, there.experiment_id, key)
    return None if run is None else _link(uri, run.info.experiment_id, run.info.run_id)


def ensure_experiment(client: MlflowClient, execution: ExecutionSpec, name: str) -> str:
    """The id of an experiment, which is made if it is not there.

    Raises:
        ServiceError: its files are behind a server, and this process talks to the database directly.
    """
    from mlflow.exceptions import MlflowException

    uri = tracking_uri(execution)
    there = client.get_experiment_by_name(name)
    if there is None:
        root = artifact_root(uri, execution)
        try:
            return client.create_experiment(name, artifact_location=f"{root}/{name}" if root else None)
        except MlflowException:  # another process was first
            there = client.get_experiment_by_name(name)
            if there is None:
                raise
    if there.artifact_location.startswith("mlflow-artifacts:") and not uri.startswith("http"):
        raise ServiceError(
            f"The files of experiment {name!r} are kept by an MLflow server, which this run does not talk to.",
            where=without_password(uri),
            fix="start it (`goldgate up`) and set `execution.tracking_uri` to its address, "
            "or use another `execution.store`",
        )
    return there.experiment_id


def _find(client: MlflowClient, experiment_id: str, key: str) -> Run | None:
    """The newest run of a key; an unfinished one first."""
    if "'" in key:
        raise ValueError(f"a run's key must not hold a quote: {key}")
    runs = client.search_runs([experiment_id], f"tags.\"{KEY}\" = '{key}'", order_by=["attributes.start_time DESC"])
    unfinished = [run for run in runs if run.info.status != "FINISHED"]
    return next(iter([*unfinished, *runs]), None)


def _parent(client: MlflowClient, execution: ExecutionSpec, experiment_id: str, key: str) -> str:
    run = _find(client, experiment_id, key)
    if run is None:
        raise ServiceError(
            "MLflow has no run that this one could be nested in.",
            where=without_password(tracking_uri(execution)),
            fix="give all workers one `execution.tracking_uri`, or leave out `within`",
        )
    return str(run.info.run_id)


def _link(uri: str, experiment_id: str, run_id: str) -> str | None:
    if not uri.startswith("http"):
        return None
    return f"{without_password(uri)}/#/experiments/{experiment_id}/runs/{run_id}"


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return _CREDENTIALS.sub("", text)


def _batches(items: list[Any]) -> Iterator[list[Any]]:
    rest = iter(items)
    while batch := list(islice(rest, _BATCH)):
        yield batch
