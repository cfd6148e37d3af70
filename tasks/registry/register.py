"""From a verdict that says PROMOTE to a version in the registry that is champion, and the way back.

Each step leaves a state that the next call recognises: killed anywhere and called again, it ends the same.
"""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tasks.contracts.errors import RegistryError
from tasks.contracts.prompt import decoding_for
from tasks.contracts.references import Outcome, RegisteredModelRef, TrainedModelRef, Verdict, VerdictRef
from tasks.contracts.spec import ExecutionSpec, RetrainSpec
from tasks.registry.versions import (
    CHAMPION,
    PREVIOUS,
    ROLLED_BACK,
    VERDICT_DIGEST,
    Rollback,
    ServedTask,
    aliases_of,
    describe,
    registry_errors,
    rollback_of,
    version_tags,
    versions_of,
)
from tasks.store import Store, digest_folder
from tasks.tracking import MERGED_DIGEST, TrackedRun, connect, open_run, quiet, registered_files

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

_REQUIREMENTS = ("mlflow", "torch", "transformers", "tokenizers", "safetensors", "accelerate", "numpy", "pandas")
_EXAMPLE = "I was charged twice for the same payment."


class _Files(NamedTuple):
    """What goes into the registered model, each checked."""

    merged: Path
    adapter: Path
    verdict: Path


def register(verdict: VerdictRef, trained: TrainedModelRef, spec: RetrainSpec) -> RegisteredModelRef:
    """Register the candidate that a verdict promotes, and make it champion.

    Args:
        verdict: must say PROMOTE, name the digest of `trained`, and have been reached against today's champion.
        trained: the candidate.
        spec: gives the registered model's name, the task, the length of answers, and where the registry is.

    Raises:
        RegistryError: the verdict does not cover this, the candidate was rolled back before, or MLflow refuses. The
            alias `champion` has not moved.
        StoreError: a file of the candidate or of the verdict was changed.
        ServiceError: MLflow cannot be reached.
    """
    store = Store(spec.execution.store)
    files = _checked(verdict, trained, store)
    client = connect(spec.execution)
    with registry_errors(spec.execution):
        found = _check_registry(client, verdict, trained, spec.name)
        if found is None:
            key = sha256(f"register {trained.merged_digest} {verdict.digest}".encode()).hexdigest()
            with open_run(
                spec.execution,
                spec.name,
                f"register {trained.merged_digest[:8]}",
                key=key,
                tags=version_tags(verdict, trained),
                params={},
            ) as run:
                found = _add_version(run, verdict, trained, spec, files, store.scratch("register", key))
        previous = _move_aliases(client, spec.name, str(found.version))
    return RegisteredModelRef(
        name=spec.name,
        version=str(found.version),
        alias=CHAMPION,
        digest=trained.merged_digest,
        previous_version=previous,
    )


def rollback(name: str, execution: ExecutionSpec, reason: str) -> RegisteredModelRef:
    """Make the previous version champion again; the champion becomes the previous one, tagged with the reason.

    Killed half-way and called again, it goes on where it was. A second call swaps back.

    Raises:
        RegistryError: there is no previous version, or its files were changed.
        ServiceError: MLflow cannot be reached.
    """
    client = connect(execution)
    with registry_errors(execution):
        aliases = aliases_of(client, name)
        champion, previous = aliases.get(CHAMPION), aliases.get(PREVIOUS)
        if champion is not None and champion == previous:
            taken_back = [
                (r.at, v) for v in versions_of(client, name) if (r := rollback_of(v)) and r.to_version == champion
            ]
            if taken_back:
                _, version = max(taken_back, key=lambda pair: pair[0])
                client.set_registered_model_alias(name, PREVIOUS, version.version)
                return _champion_ref(client, name)
        if champion is None or previous is None or champion == previous:
            raise RegistryError(
                f"{name!r} has no previous version to go back to.",
                where=f"models:/{name}@{PREVIOUS}",
                fix="see `goldgate status`; a first champion can only be taken out of service",
            )
    registered_files(f"models:/{name}/{previous}", execution)  # checks that the old one still is what it was
    with registry_errors(execution):
        mark = Rollback(reason=reason, to_version=previous, at=datetime.now(UTC))
        client.set_model_version_tag(name, champion, ROLLED_BACK, mark.model_dump_json())
        client.set_registered_model_alias(name, CHAMPION, previous)
        if ROLLED_BACK in client.get_model_version(name, previous).tags:  # a person wants it back
            client.delete_model_version_tag(name, previous, ROLLED_BACK)
        client.set_registered_model_alias(name, PREVIOUS, champion)
        return _champion_ref(client, name)


def _champion_ref(client: MlflowClient, name: str) -> RegisteredModelRef:
    aliases = aliases_of(client, name)
    digest = client.get_model_version(name, aliases[CHAMPION]).tags[MERGED_DIGEST]
    return RegisteredModelRef(
        name=name, version=aliases[CHAMPION], alias=CHAMPION, digest=digest, previous_version=aliases.get(PREVIOUS)
    )


def _checked(verdict: VerdictRef, trained: TrainedModelRef, store: Store) -> _Files:
    """The files to register, after every check that needs no registry."""
    decided = verdict.verdict
    if decided.outcome is not Outcome.PROMOTE:
        raise RegistryError(
            f"The verdict is {decided.outcome.value}; only a promotion is registered.",
            where=verdict.uri,
            fix="nothing: the registry stays as it is; train another candidate",
        )
    named = decided.digests.get("candidate")
    if named != trained.merged_digest or decided.candidate.digest != trained.merged_digest:
        raise RegistryError(
            f"The verdict is about {named or 'no model'}, this model is {trained.merged_digest}.",
            where=verdict.uri,
            fix="run the flow again, so that this model gets a verdict of its own",
        )
    verdict_file = store.files(store.open(verdict.uri)) / "verdict.json"
    if Verdict.model_validate_json(verdict_file.read_text(encoding="utf-8")) != decided:
        raise RegistryError(
            "The verdict that was handed over is not the one that was kept.",
            where=str(verdict_file),
            fix="run the flow again from the gate",
        )
    folder = store.files(store.open(trained.uri))
    for name, expected in (("merged", trained.merged_digest), ("adapter", trained.adapter_digest)):
        if digest_folder(folder / name) != expected:
            raise RegistryError(
                f"The files of {name}/ do not have the digest {expected} that the verdict was reached on.",
                where=str(folder / name),
                fix=f"delete {trained.uri} and run again; it will be trained anew",
            )
    return _Files(folder / "merged", folder / "adapter", verdict_file)


def _check_registry(
    client: MlflowClient, verdict: VerdictRef, trained: TrainedModelRef, name: str
) -> ModelVersion | None:
    """The version that an earlier call made of the same model and verdict, or None, if it may become champion."""
    versions = versions_of(client, name)
    same_model = [version for version in versions if version.tags.get(MERGED_DIGEST) == trained.merged_digest]
    for version in same_model:
        taken_back = rollback_of(version)
        if taken_back is not None:
            raise RegistryError(
                f"This model was version {version.version} and was rolled back: {taken_back.reason}",
                where=f"models:/{name}/{version.version}",
                fix="train another candidate; to take this one back after all, "
                f"call `goldgate rollback {name} --reason …` again",
            )
    found = next((version for version in same_model if version.tags.get(VERDICT_DIGEST) == verdict.digest), None)
    number = aliases_of(client, name).get(CHAMPION)
    if number is not None and (found is None or str(found.version) != number):
        champion = client.get_model_version(name, number)
        if champion.tags.get(MERGED_DIGEST) != verdict.verdict.digests.get("baseline"):
            raise RegistryError(
                f"The verdict was reached against {verdict.verdict.baseline.label}; version {number} is champion now.",
                where=f"models:/{name}@{CHAMPION}",
                fix="run again: the candidate is then compared with today's champion",
            )
    return found


def _add_version(
    run: TrackedRun, verdict: VerdictRef, trained: TrainedModelRef, spec: RetrainSpec, files: _Files, scratch: Path
) -> ModelVersion:
    """Upload the model and name it a version, with all of its tags in the same request."""
    from mlflow.entities import LoggedModelStatus
    from mlflow.exceptions import MlflowException

    client = run.client
    model = _logged_model(run, spec.name)
    if model.status != LoggedModelStatus.READY:
        try:
            folder = _save(scratch, model, verdict, spec, files)
            client.log_model_artifacts(model.model_id, str(folder))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        client.finalize_logged_model(model.model_id, "READY")
    try:
        client.create_registered_model(spec.name, description=spec.task.instruction)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    return client.create_model_version(
        spec.name,
        source=model.artifact_location,
        run_id=run.id,
        tags=version_tags(verdict, trained),
        description=describe(verdict.verdict),
        model_id=model.model_id,
        await_creation_for=0,  # a version is there at once; the wait is for hosted registries
    )


def _logged_model(run: TrackedRun, name: str) -> LoggedModel:
    """Where the run's model is kept: the place that a killed call began, else a new one."""
    experiment = run.client.get_run(run.id).info.experiment_id
    begun = run.client.search_logged_models([experiment], filter_string=f"source_run_id = '{run.id}'")
    return next(iter(begun), None) or run.client.create_logged_model(experiment, name=name, source_run_id=run.id)


def _save(scratch: Path, model: LoggedModel, verdict: VerdictRef, spec: RetrainSpec, files: _Files) -> Path:
    """Write the pyfunc model into a local folder: code, weights, adapter, how it is asked, and the verdict."""
    import mlflow
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

    shutil.rmtree(scratch / "model", ignore_errors=True)  # what a killed process left
    served = ServedTask(
        task=spec.task,
        prompt=verdict.verdict.candidate.prompt,
        decoding=decoding_for(spec.task, spec.evaluate.max_new_tokens),
    )
    task_file = scratch / "task.json"
    task_file.write_text(served.model_dump_json(indent=2), encoding="utf-8")
    # One column without a name: a plain list of texts fits it, and a data frame with one column.
    texts = Schema([ColSpec(DataType.string)])
    with quiet("mlflow"):
        mlflow.pyfunc.save_model(
            scratch / "model",
            python_model=str(Path(__file__).with_name("served_model.py")),
            artifacts={
                "model": str(files.merged),
                "adapter": str(files.adapter),
                "task": str(task_file),
                "verdict": str(files.verdict),
            },
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


def _move_aliases(client: MlflowClient, name: str, version: str) -> str | None:
    """Name the champion of now `previous`, then the new version `champion`; return the previous version, if any."""
    aliases = aliases_of(client, name)
    champion = aliases.get(CHAMPION)
    if champion == version:
        return aliases.get(PREVIOUS)
    if champion is not None:
        client.set_registered_model_alias(name, PREVIOUS, champion)
    client.set_registered_model_alias(name, CHAMPION, version)
    return champion
