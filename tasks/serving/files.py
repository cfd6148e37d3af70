"""From a registered version to an unchangeable folder of this machine, whose digest was computed from its own bytes."""

from __future__ import annotations

import logging
import re
import shutil
import uuid
from collections.abc import Set
from pathlib import Path

from tasks.contracts.errors import RegistryError, SpecError
from tasks.contracts.serving import VersionRef
from tasks.contracts.spec import ExecutionSpec
from tasks.store import digest_folder
from tasks.tracking import MERGED_DIGEST, registered_files

log = logging.getLogger("goldgate.serving")

_PART, _TRASH = ".part-", ".trash-"


def local_model(models: Path, version: VersionRef, execution: ExecutionSpec) -> Path:
    """The folder `<models>/<digest>` with a version's merged model; copied there the first time, checked each time.

    The registry is asked only for the copy, so what was served once is served again without it.

    Raises:
        SpecError: the digest is no sha256.
        RegistryError: the registered files have another digest than `version` says.
        ModelError: there is no such version.
        ServiceError: MLflow cannot be reached.
    """
    if not re.fullmatch(r"[0-9a-f]{64}", version.digest):
        raise SpecError(
            f"The digest of {version.label} is no sha256: {version.digest!r}.",
            where=version.uri,
            fix="take the version from the registry (`goldgate rollout` does)",
        )
    folder = models / version.digest
    if folder.is_dir():
        if digest_folder(folder) == version.digest:
            return folder
        log.warning("the copy of %s in %s was changed; it is made anew", version.label, folder)
        remove_folder(folder)
    registered = registered_files(version.uri, execution, checked=False)  # the copy is checked below
    tag = registered.tags.get(MERGED_DIGEST)
    if tag != version.digest:
        raise _other_digest("The registry has other bytes under this version", version, str(tag), version.uri)
    models.mkdir(parents=True, exist_ok=True)
    part = models / f"{_PART}{uuid.uuid4().hex}"
    try:
        shutil.copytree(registered.artifacts["model"], part, copy_function=shutil.copyfile)
        found = digest_folder(part)
        if found != version.digest:
            raise _other_digest(
                "The registered files are not those that were registered",
                version,
                found,
                str(registered.artifacts["model"]),
            )
        for path in part.rglob("*"):
            path.chmod(0o555 if path.is_dir() else 0o444)
        try:
            part.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another engine of the same bytes was first
                raise
        folder.chmod(0o555)
    finally:
        if part.exists():
            remove_folder(part)
    return folder


def _other_digest(what: str, version: VersionRef, found: str, where: str) -> RegistryError:
    return RegistryError(
        f"{what}: {version.label} is to have sha256 {version.digest}, and has {found}.",
        where=where,
        fix="restore the registered folder from a copy, or register the model anew; nothing was started",
    )


def forget_models(models: Path, kept: Set[str]) -> list[Path]:
    """Move the copies whose digest is not in `kept` out of the way, at once; the caller deletes what is returned.

    Copies that a killed process left half made are among them, so nobody may be copying meanwhile.
    """
    if not models.is_dir():
        return []
    away = []
    for folder in sorted(models.iterdir()):
        if folder.name.startswith(_TRASH):
            away.append(folder)
        elif folder.name not in kept and folder.is_dir():
            trash = models / f"{_TRASH}{uuid.uuid4().hex}"
            folder.rename(trash)
            away.append(trash)
    return away


def remove_folder(folder: Path) -> None:
    """Delete a folder that was made unchangeable."""
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(folder)
