"""A model becomes a version: uploaded as a pyfunc model, named with all of its tags at once, then given its alias.

Each step leaves a state that the next call recognises: killed anywhere and called again, it ends the same.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tasks.contracts.spec import ExecutionSpec
from tasks.registry.versions import CHAMPION, PREVIOUS, PROMOTED, ServedTask, aliases_of
from tasks.store import Store
from tasks.tracking import open_run, quiet

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

    from tasks.tracking import TrackedRun

TRUST_DIGEST = "goldgate.trust_digest"
_REQUIREMENTS = ("mlflow", "torch", "transformers", "tokenizers", "safetensors", "accelerate", "numpy", "pandas")
_EXAMPLE = "I was charged twice for the same payment."
_LONGEST_RUN_TAG = 8_000  # characters that MLflow keeps of a run's tag; a version's may be longer


class NewVersion(NamedTuple):
    """What a version is made of.

    Attributes:
        served: how it is asked.
        artifacts: files and folders by name; `model` is the merged model.
        tags: tags of the version, set in the same request that makes it.
        description: its page, in Markdown.
    """

    served: ServedTask
    artifacts: Mapping[str, Path]
    tags: Mapping[str, str]
    description: str


def add_version(execution: ExecutionSpec, name: str, title: str, new: NewVersion, *, key: str) -> ModelVersion:
    """Upload a model and name it a version. A call that was killed is gone on with by the next of the same key.

    Args:
        execution: where store and registry are.
        name: the registered model, made if it is not there, and the experiment.
        title: what the run of MLflow that holds the files is called.
        new: what the version is made of.
        key: sha256 of what it is about; the same key must mean the same files.

    Raises:
        ServiceError: MLflow cannot be reached or refuses.
    """
    from mlflow.entities import LoggedModelStatus
    from mlflow.exceptions import MlflowException

    short = {tag: text for tag, text in new.tags.items() if len(text) <= _LONGEST_RUN_TAG}
    with open_run(execution, name, title, key=key, tags=short, params={}) as run:
        client = run.client
        model = _logged_model(run, name)
        if model.status != LoggedModelStatus.READY:
            scratch = Store(execution.store).scratch("register", key)
            try:
                client.log_model_artifacts(model.model_id, str(_save(scratch, model, new)))
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
            client.finalize_logged_model(model.model_id, "READY")
        try:
            client.create_registered_model(name, description=new.served.task.instruction)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        return client.create_model_version(
            name,
            source=model.artifact_location,
            run_id=run.id,
            tags=dict(new.tags),
            description=new.description,
            model_id=model.model_id,
            await_creation_for=0,  # a version is there at once; the wait is for hosted registries
        )


def move_aliases(client: MlflowClient, name: str, version: str) -> str | None:
    """Name the champion of now `previous`, then the new version `champion`; return the previous version, if any."""
    aliases = aliases_of(client, name)
    champion = aliases.get(CHAMPION)
    if champion == version:
        return aliases.get(PREVIOUS)
    if champion is not None:
        client.set_registered_model_alias(name, PREVIOUS, champion)
    client.set_registered_model_alias(name, CHAMPION, version)
    return champion


def let_wait(client: MlflowClient, name: str, version: str) -> tuple[str, str | None]:
    """Name a version `promoted`, unless it is champion already; return its alias, and the version before a champion.

    A version that waited before loses the alias: the newest promotion is the one that is rolled out.
    """
    aliases = aliases_of(client, name)
    if aliases.get(CHAMPION) == version:
        return CHAMPION, aliases.get(PREVIOUS)
    if aliases.get(PROMOTED) != version:
        client.set_registered_model_alias(name, PROMOTED, version)
    return PROMOTED, None


def _logged_model(run: TrackedRun, name: str) -> LoggedModel:
    """Where the run's model is kept: the place that a killed call began, else a new one."""
    experiment = run.client.get_run(run.id).info.experiment_id
    begun = run.client.search_logged_models([experiment], filter_string=f"source_run_id = '{run.id}'")
    return next(iter(begun), None) or run.client.create_logged_model(experiment, name=name, source_run_id=run.id)


def _save(scratch: Path, model: LoggedModel, new: NewVersion) -> Path:
    """Write the pyfunc model into a local folder: code, weights, how it is asked, and all that speaks for it."""
    import mlflow
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

    shutil.rmtree(scratch / "model", ignore_errors=True)  # what a killed process left
    task_file = scratch / "task.json"
    task_file.write_text(new.served.model_dump_json(indent=2), encoding="utf-8")
    # One column without a name: a plain list of texts fits it, and a data frame with one column.
    texts = Schema([ColSpec(DataType.string)])
    with quiet("mlflow"):
        mlflow.pyfunc.save_model(
            scratch / "model",
            python_model=str(Path(__file__).with_name("served_model.py")),
            artifacts={name: str(path) for name, path in new.artifacts.items()} | {"task": str(task_file)},
            pip_requirements=[f"{name}=={installed(name)}" for name in _REQUIREMENTS],
            signature=ModelSignature(inputs=texts, outputs=texts),
            input_example=[_EXAMPLE],
            mlflow_model=Model(
                artifact_path=model.artifact_location,
                model_uuid=model.model_id,
                model_id=model.model_id,
                run_id=model.source_run_id,
            ),
        )
    return scratch / "model"
