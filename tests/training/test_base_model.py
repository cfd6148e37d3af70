"""Where base models come from, and which are refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from tasks.contracts.errors import ModelError
from tasks.contracts.progress import Progress, ignore_progress
from tasks.store import digest_folder
from tasks.training.base_model import convert, resolve


def test_folder_is_named_by_its_bytes_and_copied_whole(tiny_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(tiny_model, copy)
    source, other = resolve(str(tiny_model)), resolve(str(copy))
    assert source.digest == other.digest == digest_folder(tiny_model)
    (copy / "evil.py").write_text("raise SystemExit")
    (copy / "pytorch_model.bin").write_bytes(b"pickle")
    heard: list[Progress] = []
    facts = convert(resolve(str(copy)), tmp_path / "out", heard.append)
    made = {file.name for file in (tmp_path / "out" / "model").iterdir()}
    assert made == {file.name for file in tiny_model.iterdir()}
    assert facts["architecture"] == "LlamaForCausalLM"
    assert facts["context_tokens"] == 512
    assert heard[-1][:2] == (3, 3)


def test_changed_byte_changes_the_digest(tiny_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    assert resolve(str(copy)).digest != resolve(str(tiny_model)).digest


@pytest.mark.parametrize(
    ("uri", "what", "fix"),
    [
        ("nowhere", "no such folder", "base_model"),
        ("gguf:nowhere.gguf", "no such file", "base_model"),
        ("gguf:pkg:not_installed_pkg/a.gguf", "package not_installed_pkg is not installed", "pip install"),
        ("gguf:pkg:json/missing.gguf", "no such file", "base_model"),
        ("gguf:pkg:json/../x.gguf", "no file of a package", "import name"),
        ("gguf:pkg:json", "no file of a package", "import name"),
        ("openai:some-model", "cannot be trained", "hf:<repo>"),
        ("models:/a@champion", "cannot be trained", "hf:<repo>"),
        ("s3:bucket/model", "cannot be trained", "hf:<repo>"),
        ("hf:nobody/nothing", "cannot be found on the hub", "local folder"),
    ],
)
def test_refused_before_anything_is_loaded(uri: str, what: str, fix: str) -> None:
    with pytest.raises(ModelError) as refusal:
        resolve(uri)
    assert what in refusal.value.what
    assert fix in refusal.value.fix


def test_package_is_found_without_running_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "weights_in_a_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    source = resolve("gguf:pkg:weights_in_a_package/m.gguf")
    assert source.location == str(package / "m.gguf")
    assert "weights_in_a_package" not in sys.modules


def test_no_gguf_inside_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"not a model")
    with pytest.raises(ModelError, match="GGUF file cannot be read"):
        convert(resolve(f"gguf:{tmp_path / 'm.gguf'}"), tmp_path / "out", ignore_progress)


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ((), "no config.json"),
        (("config.json",), "no weights"),
        (("config.json", "pytorch_model.bin"), "weights are pickled (pytorch_model.bin)"),
        (("config.json", "model.pt"), "weights are pickled (model.pt)"),
    ],
)
def test_folder_without_safe_weights_is_refused(tmp_path: Path, files: tuple[str, ...], what: str) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(ModelError) as refusal:
        resolve(str(tmp_path))
    assert what in refusal.value.what


def test_model_without_chat_template_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model, bare)
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template") as refusal:
        convert(resolve(str(bare)), tmp_path / "out", ignore_progress)
    assert "instruction-tuned" in refusal.value.fix


def test_model_that_needs_its_own_code_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    coded = tmp_path / "coded"
    shutil.copytree(tiny_model, coded)
    config = json.loads((coded / "config.json").read_text())
    config |= {"model_type": "its_own", "auto_map": {"AutoConfig": "code.Config"}}
    (coded / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="transformers cannot load"):
        convert(resolve(str(coded)), tmp_path / "out", ignore_progress)
