"""Who is champion, and what a candidate must beat."""

from __future__ import annotations

from typing import NamedTuple

from pydantic import ValidationError

from tasks.contracts.errors import RegistryError
from tasks.contracts.references import SystemUnderTest, TrainedModelRef, Verdict
from tasks.contracts.spec import ExecutionSpec
from tasks.registry.versions import (
    BASELINE_KEY,
    CHAMPION,
    ServedTask,
    VersionRelease,
    aliases_of,
    registry_errors,
    release_of,
)
from tasks.tracking import MERGED_DIGEST, connect, registered_files


def find_champion(name: str, execution: ExecutionSpec) -> SystemUnderTest | None:
    """The champion of a registered model, asked as it was evaluated; None when there is none yet.

    Its URI names the version, which does not change, and not the alias, which does.

    Raises:
        RegistryError: the champion was not registered by Goldgate, or its files were changed.
        ServiceError: MLflow cannot be reached.
    """
    client = connect(execution)
    with registry_errors(execution):
        version = aliases_of(client, name).get(CHAMPION)
    if version is None:
        return None
    uri = f"models:/{name}/{version}"
    fix = f"take the alias away (`MlflowClient().delete_registered_model_alias({name!r}, {CHAMPION!r})`) and run again"
    files = registered_files(uri, execution)
    digest = files.tags.get(MERGED_DIGEST)
    if digest is None:
        raise RegistryError(
            f"The champion has no tag {MERGED_DIGEST}, so nothing says which bytes it is.", where=uri, fix=fix
        )
    try:
        served = ServedTask.model_validate_json(files.artifacts["task"].read_text(encoding="utf-8"))
    except (KeyError, OSError, ValidationError) as error:
        raise RegistryError(f"The champion does not say how it is asked: {error}", where=uri, fix=fix) from error
    return SystemUnderTest(uri=uri, digest=digest, prompt=served.prompt, role="champion", label=f"champion v{version}")


class Opponent(NamedTuple):
    """What a candidate must beat.

    Attributes:
        system: the model; None where it is the base model.
        candidate_is: what the candidate is called, if it is champion already.
    """

    system: SystemUnderTest | None
    candidate_is: str | None


def find_opponent(name: str, trained: TrainedModelRef, execution: ExecutionSpec) -> Opponent:
    """What a candidate must beat: the champion, and the base model where there is none.

    A candidate that is champion already is run again: it is compared with what it was promoted against, so that the
    same run has the same verdict. One that a person set as baseline was compared with nothing; it is compared with
    itself, which shows no difference and changes nothing.

    Raises:
        RegistryError, ServiceError: as `find_champion`.
    """
    champion = find_champion(name, execution)
    if champion is None or champion.digest != trained.merged_digest:
        return Opponent(champion, None)
    files = registered_files(champion.uri, execution)
    if BASELINE_KEY in files.tags:
        return Opponent(champion, champion.label)
    try:
        baseline = Verdict.model_validate_json(files.artifacts["verdict"].read_text(encoding="utf-8")).baseline
    except (KeyError, OSError, ValidationError) as error:
        raise RegistryError(
            f"The champion does not say what it was promoted against: {error}",
            where=champion.uri,
            fix="restore its file verdict.json, or train another candidate",
        ) from error
    return Opponent(baseline if baseline.role == "champion" else None, champion.label)


def find_release(system: SystemUnderTest, execution: ExecutionSpec) -> VersionRelease | None:
    """How a registered version came into the registry; None for a model of another kind, or when nobody knows.

    Raises:
        RegistryError, ServiceError: as `find_champion`.
    """
    name, _, version = system.uri.removeprefix("models:/").partition("/")
    if not system.uri.startswith("models:/") or not version.isdigit():
        return None
    client = connect(execution)
    with registry_errors(execution):
        return release_of(client.get_model_version(name, version))
