"""From a model's URI to a local folder with its files."""

from __future__ import annotations

import shutil
import uuid
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import url2pathname

from tasks.contracts.errors import ModelError, RegistryError
from tasks.contracts.spec import ExecutionSpec
from tasks.store import Store, digest_folder
from tasks.tracking.address import connect, tracking_uri, without_password

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

MERGED_DIGEST = "goldgate.merged_digest"


@dataclass(frozen=True)
class RegisteredFiles:
    """A registered version on this machine.

    Attributes:
        name: the registered model.
        version: its version.
        tags: the version's tags.
        root: folder of the whole pyfunc model.
        artifacts: the model's artefacts by name, folders or files: "model" and "task", and where a verdict let it in
            "adapter", "verdict", "certificate", "evidence" and, for a closed answer, "trust".
    """

    name: str
    version: str
    tags: dict[str, str]
    root: Path
    artifacts: dict[str, Path]


def model_folder(uri: str, execution: ExecutionSpec) -> Path:
    """A local folder that holds the plain transformers model of a URI.

    Args:
        uri: a local folder, `<artefact>#<subfolder>` of the store, `models:/<name>@<alias>` or
            `models:/<name>/<version>`.
        execution: where store and registry are.

    Raises:
        ModelError: the URI is of another kind, or no model is there.
        RegistryError: the registered files are not those that were registered.
        StoreError: the artefact is not there or was changed.
    """
    if uri.startswith("models:/"):
        return registered_files(uri, execution).artifacts["model"]
    if uri.startswith(("hf:", "gguf:")):
        raise ModelError(
            "This names a base model, not a folder of weights.",
            where=uri,
            fix="convert it first (the step `base_model` does), or give a local folder",
        )
    if uri.startswith("openai:"):
        raise ModelError(
            "This model is behind a server; its files are not here.",
            where=uri,
            fix="evaluate it by its server's address",
        )
    artefact, _, subfolder = uri.partition("#")
    if subfolder:
        store = Store(execution.store)
        folder = store.files(store.open(artefact)) / subfolder
    else:
        folder = Path(uri).expanduser()
    if not (folder / "config.json").is_file():
        raise ModelError(
            "No transformers model is there (no config.json).",
            where=str(folder),
            fix="give the folder of a saved model",
        )
    return folder


def registered_files(uri: str, execution: ExecutionSpec, *, checked: bool = True) -> RegisteredFiles:
    """The files of a registered version, used in place where the registry keeps them on this machine, else downloaded.

    Args:
        uri: `models:/<name>@<alias>` or `models:/<name>/<version>`.
        execution: where store and registry are.
        checked: refuse files that do not have the registered digest; False is for who checks them otherwise.

    Raises:
        ModelError: there is no such version, or it was not registered by Goldgate.
        RegistryError: the model's files do not have the digest that was registered.
        ServiceError: MLflow cannot be reached.
    """
    version = _version(uri, execution)
    shown = f"models:/{version.name}/{version.version}"
    root = _local_root(version, execution)
    artifacts = _artifacts(root, shown)
    expected = version.tags.get(MERGED_DIGEST)
    if checked and expected is not None and digest_folder(artifacts["model"]) != expected:
        raise RegistryError(
            f"The files of {shown} are not those that were registered (their sha256 differs).",
            where=str(artifacts["model"]),
            fix="restore the folder from a copy; a download can be deleted, it is then made anew; "
            f"or move the alias away (`goldgate rollback {version.name} --reason …`)",
        )
    return RegisteredFiles(version.name, str(version.version), dict(version.tags), root, artifacts)


def _version(uri: str, execution: ExecutionSpec) -> ModelVersion:
    from mlflow.exceptions import MlflowException

    client = connect(execution)
    name, at, alias = uri.removeprefix("models:/").partition("@")
    try:
        if at:
            return client.get_model_version_by_alias(name, alias)
        name, slash, number = name.partition("/")
        if slash and number.isdigit():
            return client.get_model_version(name, number)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise ModelError(
            f"The registry has no such model: {error.message}",
            where=f"{uri} in {without_password(tracking_uri(execution))}",
            fix="see what is registered with `goldgate status`",
        ) from error
    raise ModelError(
        "This names no registered version.", where=uri, fix="write models:/<name>@<alias> or models:/<name>/<version>"
    )


def _local_root(version: ModelVersion, execution: ExecutionSpec) -> Path:
    """The version's own folder if it is on this machine, else a download, kept under the cache for the next time."""
    from mlflow.artifacts import download_artifacts

    client = connect(execution)
    source = client.get_model_version_download_uri(version.name, version.version)
    if source.startswith("models:/"):
        source = client.get_logged_model(source.removeprefix("models:/")).artifact_location
    parts = urlsplit(source)
    if parts.scheme in ("", "file"):
        return Path(url2pathname(parts.path))
    uri = tracking_uri(execution)
    home = Store(execution.store).scratch("registered", sha256(f"{uri} {source}".encode()).hexdigest())
    folder = home / f"{version.name}-{version.version}"
    if not folder.exists():
        part = home / uuid.uuid4().hex
        part.mkdir()
        try:
            download_artifacts(artifact_uri=source, dst_path=str(part), tracking_uri=uri)
            (downloaded,) = part.rglob("MLmodel")
            try:
                downloaded.parent.replace(folder)
            except OSError:
                if not folder.exists():  # where it is, another process was first, with the same files
                    raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder


def _artifacts(root: Path, shown: str) -> dict[str, Path]:
    import yaml

    try:
        flavors = yaml.safe_load((root / "MLmodel").read_text(encoding="utf-8"))["flavors"]
        entries = flavors["python_function"]["artifacts"]
        artifacts = {name: root / entry["path"] for name, entry in entries.items()}
    except (OSError, KeyError, TypeError, yaml.YAMLError) as error:
        raise ModelError(
            f"{shown} has no files that can be read as a model of Goldgate: {error}",
            where=str(root),
            fix="name a version that `goldgate` registered",
        ) from error
    if not (artifacts.get("model", root) / "config.json").is_file():
        raise ModelError(
            f"{shown} holds no merged transformers model.",
            where=str(root),
            fix="name a version that `goldgate` registered",
        )
    return artifacts
