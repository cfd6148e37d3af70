"""The registry's side of bringing a version into service: which one waits, and the aliases that move with traffic.

Each change can be made again: killed between any two of its steps and called anew, it ends the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import ValidationError

from tasks.contracts.confidence import TRUST, LearntTrust
from tasks.contracts.errors import RegistryError
from tasks.contracts.serving import Aliases, Intent, Trust, VersionRef
from tasks.contracts.spec import ExecutionSpec
from tasks.registry.add import TRUST_DIGEST
from tasks.registry.versions import (
    CHAMPION,
    PREVIOUS,
    PROMOTED,
    ROLLED_BACK,
    ROLLOUT_REFUSED,
    BaselineKind,
    Refusal,
    Rollback,
    ServedTask,
    aliases_of,
    registry_errors,
    release_of,
)
from tasks.store import digest_file
from tasks.tracking import MERGED_DIGEST, RegisteredFiles, connect, registered_files

if TYPE_CHECKING:
    from mlflow import MlflowClient

_BASELINE_DIGEST = "goldgate.digest.baseline"  # what the verdict compared with


def resolve_version(name: str, version: str | None, execution: ExecutionSpec) -> VersionRef:
    """The version that is to go live, by its number or as the alias `promoted` names it now.

    Its certificate and its files are for others to check; this says what the registry claims.

    Raises:
        ModelError: there is no such version.
        RegistryError: none waits, it was not registered by Goldgate, its verdict was not reached against today's
            champion, or what was learnt of its confidence was changed.
        ServiceError: MLflow cannot be reached.
    """
    client = connect(execution)
    with registry_errors(execution):
        aliases = read_aliases(name, execution)
        number = version or aliases.promoted
        if number is None:
            raise RegistryError(
                f"No version of {name!r} waits for its rollout.",
                where=f"models:/{name}@{PROMOTED}",
                fix="nothing, if it was rolled out meanwhile (`goldgate status`); to roll out a version by its number, "
                f"`goldgate rollout CONFIG --version {aliases.champion or 'N'}`",
            )
    uri = f"models:/{name}/{number}"
    files = registered_files(uri, execution, checked=False)
    digest = files.tags.get(MERGED_DIGEST)
    if digest is None:
        raise RegistryError(
            f"The version has no tag {MERGED_DIGEST}, so nothing says which bytes it is.",
            where=uri,
            fix="name a version that `goldgate` registered",
        )
    try:
        served = ServedTask.model_validate_json(files.artifacts["task"].read_text(encoding="utf-8"))
    except (KeyError, OSError, ValidationError) as error:
        raise RegistryError(
            f"The version does not say how it is asked: {error}", where=uri, fix="restore its file task.json"
        ) from error
    certified = {"certificate", "evidence"} <= files.artifacts.keys()
    with registry_errors(execution):
        if not certified:
            _check_baseline(client, name, number, named=version is not None)
        if version is None and aliases.champion not in (None, number):
            _check_opponent(client, name, number, aliases.champion or "")
    return VersionRef(
        name=name,
        version=number,
        digest=digest,
        uri=uri,
        prompt=served.prompt,
        decoding=served.decoding,
        certified=certified,
        trust=_trust(files, uri),
    )


def read_aliases(name: str, execution: ExecutionSpec) -> Aliases:
    """Which versions the aliases name; none for a model that is not there.

    Raises:
        RegistryError: MLflow refuses.
        ServiceError: MLflow cannot be reached.
    """
    client = connect(execution)
    with registry_errors(execution):
        found = aliases_of(client, name)
    return Aliases(champion=found.get(CHAMPION), previous=found.get(PREVIOUS), promoted=found.get(PROMOTED))


def move_champion(intent: Intent, execution: ExecutionSpec) -> None:
    """Name a change's new version `champion` and the old one `previous`, and take `promoted` from the new one.

    A rollback tags the old one with why, as `goldgate rollback` does without a gateway. What marks of an earlier
    rollback or refusal the new one bears is taken away: it is wanted now.

    Raises:
        RegistryError: MLflow refuses.
        ServiceError: MLflow cannot be reached.
    """
    client = connect(execution)
    name, to, previous = intent.name, intent.to.version, intent.previous_after
    with registry_errors(execution):
        if intent.kind == "rollback" and intent.was is not None:
            mark = Rollback(reason=intent.why, to_version=to, at=intent.at)
            client.set_model_version_tag(name, intent.was.version, ROLLED_BACK, mark.model_dump_json())
        tags = client.get_model_version(name, to).tags
        for tag in (ROLLED_BACK, ROLLOUT_REFUSED):
            if tag in tags:
                client.delete_model_version_tag(name, to, tag)
        _name(client, name, PREVIOUS, previous)
        _name(client, name, CHAMPION, to)
        if aliases_of(client, name).get(PROMOTED) == to:
            _name(client, name, PROMOTED, None)


def restore_aliases(intent: Intent, execution: ExecutionSpec) -> None:
    """Put the aliases back as they were when a change began; a version promoted since then keeps `promoted`.

    Raises:
        RegistryError: MLflow refuses.
        ServiceError: MLflow cannot be reached.
    """
    client = connect(execution)
    name, before = intent.name, intent.aliases
    with registry_errors(execution):
        _name(client, name, CHAMPION, before.champion)
        _name(client, name, PREVIOUS, before.previous)
        if aliases_of(client, name).get(PROMOTED) is None:
            _name(client, name, PROMOTED, before.promoted)


def refuse_version(intent: Intent, execution: ExecutionSpec) -> None:
    """Tag a version with why it did not go live, and take `promoted` from it; champion and traffic stay.

    Raises:
        RegistryError: MLflow refuses.
        ServiceError: MLflow cannot be reached.
    """
    client = connect(execution)
    name, version = intent.name, intent.to.version
    mark = Refusal(reasons=intent.problems, at=intent.at)
    with registry_errors(execution):
        client.set_model_version_tag(name, version, ROLLOUT_REFUSED, mark.model_dump_json())
        if aliases_of(client, name).get(PROMOTED) == version:
            _name(client, name, PROMOTED, None)


def _trust(files: RegisteredFiles, uri: str) -> Trust | None:
    """How far the version's answers are trusted; None where it was registered without."""
    path, expected = files.artifacts.get(TRUST), files.tags.get(TRUST_DIGEST)
    if path is None and expected is None:
        return None
    try:
        if path is None or digest_file(path) != expected:
            raise ValueError(f"its sha256 is not the one that the tag {TRUST_DIGEST} says")
        return Trust.of(LearntTrust.model_validate_json(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise RegistryError(
            f"The version does not say how far its answers are trusted: {error}",
            where=uri,
            fix="restore its file trust.json from a copy",
        ) from error


def _name(client: MlflowClient, name: str, alias: str, version: str | None) -> None:
    """Have an alias name a version, or none; nothing is written where it does so already."""
    now = aliases_of(client, name).get(alias)
    if now == version:
        return
    if version is None:
        client.delete_registered_model_alias(name, alias)
    else:
        client.set_registered_model_alias(name, alias, version)


def _check_baseline(client: MlflowClient, name: str, version: str, *, named: bool) -> None:
    """A version without a certificate goes live only if a person set it as baseline, and a person names it now."""
    release = release_of(client.get_model_version(name, version))
    if named and release is not None and isinstance(release.kind, BaselineKind):
        return
    raise RegistryError(
        "This version has no certificate, so nothing shows that it may go live.",
        where=f"models:/{name}/{version}",
        fix="promote it through the gate; a baseline that a person set with `goldgate override baseline` is rolled out "
        "by its number (--version)",
    )


def _check_opponent(client: MlflowClient, name: str, version: str, champion: str) -> None:
    """A version that was promoted against another champion than today's has not been shown to be better than it."""
    against = client.get_model_version(name, version).tags.get(_BASELINE_DIGEST)
    if against == client.get_model_version(name, champion).tags.get(MERGED_DIGEST):
        return
    raise RegistryError(
        f"Version {version} was judged against another champion; version {champion} is champion now.",
        where=f"models:/{name}@{PROMOTED}",
        fix="run `goldgate run` again: the candidate is then compared with today's champion. To roll it out on your "
        f"own word, name it: `goldgate rollout CONFIG --version {version}`",
    )
