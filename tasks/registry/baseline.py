"""A champion that a person sets without a verdict: the first one, or a new one in place of today's.

Each step leaves a state that the next call recognises: killed anywhere and called again, it ends the same.
"""

from __future__ import annotations

from datetime import UTC, datetime
from hashlib import sha256
from typing import TYPE_CHECKING, NamedTuple

from tasks.contracts.errors import GoldgateError, ModelError, RegistryError
from tasks.contracts.prompt import decoding_for
from tasks.contracts.references import RegisteredModelRef, SystemUnderTest
from tasks.contracts.spec import EvaluationSpec, Override
from tasks.registry.add import NewVersion, add_version, move_aliases
from tasks.registry.champion import find_champion
from tasks.registry.versions import (
    BASELINE_KEY,
    CHAMPION,
    BaselineKind,
    ServedTask,
    VersionRelease,
    aliases_of,
    baseline_tags,
    describe_baseline,
    registry_errors,
    release_of,
    rollback_of,
    versions_of,
)
from tasks.store import digest_folder
from tasks.tracking import MERGED_DIGEST, connect, model_folder

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


class SetBaseline(NamedTuple):
    """A baseline that was set, and what was recorded of it."""

    registered: RegisteredModelRef
    release: VersionRelease


def set_baseline(spec: EvaluationSpec, system: SystemUnderTest, override: Override) -> SetBaseline:
    """Register a model as champion without a verdict, on a person's word; today's champion becomes `previous`.

    Args:
        spec: gives the registered model's name, the task, the length of answers, and where the registry is.
        system: the model (a local folder of safetensors, `<artefact>#<subfolder>`, or `models:/…`), its digest over
            those files, and the prompt that it will be asked through.
        override: whose word this is, and why.

    Raises:
        ModelError: no model is there, or its weights are no safetensors.
        RegistryError: its files are not those of `system`, it is champion already, or MLflow refuses. The alias
            `champion` has not moved.
        ServiceError: MLflow cannot be reached.
    """
    folder = model_folder(system.uri, spec.execution)
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            "The model has no *.safetensors; other weights can run code when they are loaded, so they are not.",
            where=str(folder),
            fix="save it with `save_pretrained`, which writes safetensors",
        )
    digest = digest_folder(folder)
    if digest != system.digest:
        raise RegistryError(
            f"The model's files have the digest {digest}, and {system.digest} was handed over.",
            where=str(folder),
            fix="see that nothing else writes there, and call again",
        )
    served = ServedTask(
        task=spec.task, prompt=system.prompt, decoding=decoding_for(spec.task, spec.evaluate.max_new_tokens)
    )
    key = sha256(
        f"baseline {digest} {served.model_dump_json()} {override.model_dump_json(include={'by', 'reason'})}".encode()
    ).hexdigest()
    client = connect(spec.execution)
    with registry_errors(spec.execution):
        champion = aliases_of(client, spec.name).get(CHAMPION)
        found = _begun(client, spec.name, champion, key)
        if found is None:
            if champion is not None:
                _refuse_the_same(client, spec, system, champion)
            release = VersionRelease(
                kind=BaselineKind.FIRST_BASELINE if champion is None else BaselineKind.RE_BASELINE,
                by=override.by,
                reason=override.reason,
                at=datetime.now(UTC),
            )
            new = NewVersion(
                served=served,
                artifacts={"model": folder},
                tags=baseline_tags(digest, release, key),
                description=describe_baseline(release),
            )
            found = add_version(spec.execution, spec.name, f"baseline {digest[:8]}", new, key=key)
        previous = move_aliases(client, spec.name, str(found.version))
    kept = release_of(found)
    if kept is None:
        raise TypeError(f"version {found.version} of {spec.name} was made without its release")
    registered = RegisteredModelRef(
        name=spec.name, version=str(found.version), alias=CHAMPION, digest=digest, previous_version=previous
    )
    return SetBaseline(registered, kept)


def _begun(client: MlflowClient, name: str, champion: str | None, key: str) -> ModelVersion | None:
    """The version that an earlier call made on the same word, if nothing has happened since: it is champion, or the
    newest and not yet. A word that was given again later is a new one.
    """
    newest = next(iter(versions_of(client, name)), None)
    for version in (newest, client.get_model_version(name, champion) if champion is not None else None):
        if version is not None and version.tags.get(BASELINE_KEY) == key and rollback_of(version) is None:
            return version
    return None


def _refuse_the_same(client: MlflowClient, spec: EvaluationSpec, system: SystemUnderTest, champion: str) -> None:
    """A champion with a verdict would lose it for nothing."""
    if client.get_model_version(spec.name, champion).tags.get(MERGED_DIGEST) != system.digest:
        return
    try:
        today = find_champion(spec.name, spec.execution)
    except GoldgateError:  # its files were changed, which is a reason to set it anew
        return
    if today is not None and today.prompt == system.prompt:
        raise RegistryError(
            f"This model is champion already: version {champion}, asked in the same way.",
            where=f"models:/{spec.name}@{CHAMPION}",
            fix="nothing; see `goldgate status`",
        )
