"""From the registry to an unchangeable folder whose bytes have the digest that was asked for."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from tasks.contracts.errors import ModelError, RegistryError, SpecError
from tasks.contracts.prompt import Decoding, Prompt
from tasks.contracts.serving import VersionRef
from tasks.contracts.spec import ExecutionSpec
from tasks.serving.files import forget_models, local_model, remove_folder
from tasks.store import digest_folder
from tasks.tracking import MERGED_DIGEST, connect


@pytest.fixture(scope="module")
def execution(tmp_path_factory: pytest.TempPathFactory) -> ExecutionSpec:
    """One SQLite database for the module, since making its tables takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return ExecutionSpec(store=str(tmp_path_factory.mktemp("files") / "store"))


@pytest.fixture(autouse=True)
def _no_tracking_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def registered(execution: ExecutionSpec, tmp_path: Path) -> tuple[VersionRef, Path]:
    """A registered version, and its folder in the registry."""
    root = tmp_path / "registered"
    model = root / "artifacts" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "part").mkdir()
    (model / "part" / "model.safetensors").write_bytes(bytes(1000))
    artifacts = {"model": {"path": "artifacts/model", "uri": "x"}}
    (root / "MLmodel").write_text(yaml.safe_dump({"flavors": {"python_function": {"artifacts": artifacts}}}))
    client = connect(execution)
    name = f"model-{uuid.uuid4().hex}"
    client.create_registered_model(name)
    digest = digest_folder(model)
    made = client.create_model_version(name, source=root.as_uri(), tags={MERGED_DIGEST: digest})
    ref = VersionRef(
        name=name,
        version=str(made.version),
        digest=digest,
        uri=f"models:/{name}/{made.version}",
        prompt=Prompt(system=""),
        decoding=Decoding(max_new_tokens=1),
    )
    return ref, model


def test_it_is_copied_once_and_cannot_be_written(
    execution: ExecutionSpec, registered: tuple[VersionRef, Path], tmp_path: Path
) -> None:
    ref, model = registered
    folder = local_model(tmp_path / "models", ref, execution)
    assert folder == tmp_path / "models" / ref.digest
    assert digest_folder(folder) == ref.digest
    assert {path.stat().st_mode & 0o222 for path in (folder, *folder.rglob("*"))} == {0}
    assert list((tmp_path / "models").iterdir()) == [folder]
    shutil.rmtree(model)  # neither the registry nor its files are needed again
    assert local_model(tmp_path / "models", ref, ExecutionSpec(tracking_uri="http://127.0.0.1:9")) == folder


def test_a_copy_that_was_changed_is_made_anew(
    execution: ExecutionSpec, registered: tuple[VersionRef, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ref, _ = registered
    folder = local_model(tmp_path / "models", ref, execution)
    (folder / "config.json").chmod(0o644)
    (folder / "config.json").write_text('{"changed": 1}')
    assert digest_folder(local_model(tmp_path / "models", ref, execution)) == ref.digest
    assert "was changed; it is made anew" in caplog.text


def test_registered_files_that_were_changed_are_refused_with_both_digests(
    execution: ExecutionSpec, registered: tuple[VersionRef, Path], tmp_path: Path
) -> None:
    ref, model = registered
    (model / "config.json").write_text('{"changed": 1}')
    with pytest.raises(RegistryError, match="not those that were registered") as caught:
        local_model(tmp_path / "models", ref, execution)
    assert f"is to have sha256 {ref.digest}, and has {digest_folder(model)}" in caught.value.what
    assert caught.value.where == str(model)
    assert list((tmp_path / "models").iterdir()) == []


def test_another_version_than_was_meant_is_refused_with_both_digests(
    execution: ExecutionSpec, registered: tuple[VersionRef, Path], tmp_path: Path
) -> None:
    ref = registered[0].model_copy(update={"digest": "a" * 64})
    with pytest.raises(RegistryError, match="other bytes under this version") as caught:
        local_model(tmp_path / "models", ref, execution)
    assert f"{'a' * 64}, and has {registered[0].digest}" in caught.value.what


@pytest.mark.parametrize("digest", ["", "../../etc", "A" * 64, "a" * 63])
def test_what_is_no_digest_is_no_folder(
    execution: ExecutionSpec, registered: tuple[VersionRef, Path], tmp_path: Path, digest: str
) -> None:
    with pytest.raises(SpecError, match="is no sha256"):
        local_model(tmp_path / "models", registered[0].model_copy(update={"digest": digest}), execution)


def test_a_version_that_is_not_there(execution: ExecutionSpec, tmp_path: Path) -> None:
    ref = VersionRef(
        name="nobody",
        version="1",
        digest="a" * 64,
        uri="models:/nobody/1",
        prompt=Prompt(system=""),
        decoding=Decoding(max_new_tokens=1),
    )
    with pytest.raises(ModelError, match="registry has no such model"):
        local_model(tmp_path / "models", ref, execution)


def test_copies_that_nobody_needs_are_forgotten(
    execution: ExecutionSpec, registered: tuple[VersionRef, Path], tmp_path: Path
) -> None:
    ref, _ = registered
    models = tmp_path / "models"
    assert forget_models(models, set()) == []
    folder = local_model(models, ref, execution)
    (models / ".part-of-a-killed-process").mkdir()
    (half_made,) = forget_models(models, {ref.digest})
    assert folder.is_dir()
    assert set(models.iterdir()) == {folder, half_made}
    away = forget_models(models, set())
    assert len(away) == 2
    for one in away:
        remove_folder(one)
    assert list(models.iterdir()) == []


def _by_another_first(real: Callable[..., Any]) -> Callable[..., Any]:
    """What another thread does just before this one does the same."""

    def twice(*args: Any, **options: Any) -> Any:
        real(*args, **options)
        return real(*args, **options)

    return twice


@pytest.mark.parametrize(("module", "name"), [(shutil, "rmtree"), (os, "unlink"), (os, "rmdir")])
def test_two_may_delete_the_same_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str
) -> None:
    folder = tmp_path / ".trash-1"
    (folder / "part").mkdir(parents=True)
    for path in (folder / "config.json", folder / "part" / "weights"):
        path.write_bytes(b"x")
    (folder / "part").chmod(0o555)
    folder.chmod(0o555)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, _by_another_first(getattr(module, name)))
        remove_folder(folder)
    assert list(tmp_path.iterdir()) == []
    remove_folder(folder)  # and whoever comes when all is done


def test_a_folder_that_cannot_be_deleted_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "weights").write_bytes(b"x")

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr("os.unlink", refuse)
        with pytest.raises(PermissionError):
            remove_folder(tmp_path / "models")
    assert (tmp_path / "models" / "weights").exists()
