"""From a registered version to an unchangeable folder of this machine, whose digest was computed from its own bytes."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Set
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tasks.contracts.errors import ModelError, RegistryError, SpecError
from tasks.contracts.serving import VersionRef
from tasks.contracts.spec import ExecutionSpec
from tasks.store import Store, digest_folder
from tasks.tracking import MERGED_DIGEST, registered_files

log = logging.getLogger("goldgate.serving")

# Tags of a version, as the registry writes them.
ADAPTER_DIGEST = "goldgate.adapter_digest"
RUN_FINGERPRINT = "goldgate.fingerprint"

_TRAINED_BY = ("train", "prefer")  # steps of the store that make adapters
_TRAINING = "training.json"
_MERGED_INSTEAD = "serve the merged model (`engine.adapters: false`)"

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
    if _is_whole(folder, version.digest, version.label):
        return folder
    registered = registered_files(version.uri, execution, checked=False)  # the copy is checked below
    tag = registered.tags.get(MERGED_DIGEST)
    if tag != version.digest:
        raise _other_digest("The registry has other bytes under this version", version, str(tag), version.uri)
    return _copy(models, registered.artifacts["model"], version.digest, version)


class AdapterFiles(NamedTuple):
    """A version's adapter on this machine, and what it was trained on.

    Attributes:
        folder: `adapter_config.json` and `adapter_model.safetensors`; unchangeable.
        digest: sha256 of its files.
        base: the base model's files; unchangeable.
        base_digest: sha256 of the store's artefact that `base` is part of, as the training says it.
        training: the training's `training.json`.
    """

    folder: Path
    digest: str
    base: Path
    base_digest: str
    training: Path


def local_adapter(models: Path, version: VersionRef, execution: ExecutionSpec) -> AdapterFiles:
    """The files of a version's adapter and of the base model that it was trained on, copied as `local_model` does.

    The adapter is the registered one. On which base it was trained, the training in the store says, which the version
    names; the base is the store's artefact with the digest that stands there.

    Raises:
        RegistryError: the version has no adapter, or the registered files have other digests than its tags say.
        ModelError: there is no such version, or the store lacks its training or its base model.
        StoreError: files in the store were changed.
        ServiceError: MLflow cannot be reached.
    """
    registered = registered_files(version.uri, execution, checked=False)  # the copy is checked below
    tag = registered.tags.get(MERGED_DIGEST)
    if tag != version.digest:
        raise _other_digest("The registry has other bytes under this version", version, str(tag), version.uri)
    adapter, digest = registered.artifacts.get("adapter"), registered.tags.get(ADAPTER_DIGEST)
    if adapter is None or digest is None:
        raise RegistryError(
            f"{version.label} was registered without an adapter, as a baseline is that a person set.",
            where=version.uri,
            fix=_MERGED_INSTEAD,
        )
    store, recipe = Store(execution.store), registered.tags.get(RUN_FINGERPRINT, "")
    trained = next((found for step in _TRAINED_BY if (found := store.find(step, recipe)) is not None), None)
    if trained is None or trained.manifest.fingerprint != recipe:
        raise ModelError(
            f"The store has no training of {version.label} (recipe {recipe or 'unknown'}), which says what the adapter "
            "was trained on.",
            where=execution.store,
            fix=f"{_MERGED_INSTEAD}, or give the gateway the store that the version was trained in",
        )
    training = store.files(trained) / _TRAINING
    try:
        base_digest = str(json.loads(training.read_text(encoding="utf-8"))["base"]["digest"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"The training of {version.label} does not say what it was trained on: {error!r}",
            where=str(training),
            fix=_MERGED_INSTEAD,
        ) from error
    base = local_base(models, base_digest, execution)
    folder = models / digest
    if not _is_whole(folder, digest, version.label):
        folder = _copy(models, adapter, digest, version)
    return AdapterFiles(folder, digest, base, base_digest, training)


def local_base(models: Path, digest: str, execution: ExecutionSpec) -> Path:
    """The folder of a base model that the store has under this digest, copied the first time.

    Raises:
        ModelError: the store has none.
        StoreError: its files were changed.
    """
    folder = models / digest
    if not _is_whole(folder, digest, "a base model"):
        store = Store(execution.store)
        kept = next((one for one in store.list("base_model") if one.manifest.digest == digest), None)
        if kept is None:
            raise ModelError(
                f"The store has no base model with the digest {digest}.",
                where=execution.store,
                fix=f"{_MERGED_INSTEAD}, or give the gateway the store that the version was trained in",
            )
        folder = _copy(models, store.files(kept), digest, None)
    return folder / "model"


def _is_whole(folder: Path, digest: str, what: str) -> bool:
    """Whether a copy is there with this digest; one that was changed is deleted."""
    if not folder.is_dir():
        return False
    if digest_folder(folder) == digest:
        return True
    log.warning("the copy of %s in %s was changed; it is made anew", what, folder)
    remove_folder(folder)
    return False


def _copy(models: Path, source: Path, digest: str, version: VersionRef | None) -> Path:
    """Copy a folder to `<models>/<digest>`, unchangeable; its digest is computed from the copy's own bytes."""
    folder = models / digest
    models.mkdir(parents=True, exist_ok=True)
    part = models / f"{_PART}{uuid.uuid4().hex}"
    try:
        shutil.copytree(source, part, copy_function=shutil.copyfile)
        found = digest_folder(part)
        if found != digest:
            raise _other_digest(
                "The registered files are not those that were registered", version, found, str(source), digest
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


def _other_digest(
    what: str, version: VersionRef | None, found: str, where: str, digest: str | None = None
) -> RegistryError:
    who = "a base model" if version is None else version.label
    expected = digest or (version.digest if version is not None else "")
    return RegistryError(
        f"{what}: {who} is to have sha256 {expected}, and has {found}.",
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
    """Delete a folder that was made unchangeable; another thread may be deleting it too."""
    for path, _, _ in os.walk(folder):  # what it cannot list is said by the next line
        with suppress(FileNotFoundError):
            Path(path).chmod(0o755)
    shutil.rmtree(folder, onerror=_unless_gone)


def _unless_gone(
    do: Callable[..., object], path: str, error: tuple[type[BaseException], BaseException, object]
) -> None:
    """Of what goes wrong while a folder is deleted: that another has just deleted it is what was wanted."""
    if not isinstance(error[1], FileNotFoundError):
        raise error[1]
