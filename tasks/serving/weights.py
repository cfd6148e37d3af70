"""Whether weights are whole, numbers, and of the shapes that their config promises. vLLM looks at none of it.

Read without torch, piece by piece, so that a model larger than memory can be checked too.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tasks.contracts.errors import ModelError

_INDEX = "model.safetensors.index.json"
_ONE_FILE = "model.safetensors"
_ADAPTER = "adapter_model.safetensors"
_RUNS_CODE = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")  # may hold pickles
_HEADER_LIMIT = 100_000_000  # bytes, as the safetensors library has it
_PIECE = 1 << 24  # numbers that are looked at together
_SHOWN = 20  # faults that an error names


class _Kind(NamedTuple):
    """A number format: bytes of a number, how they are read, and the bits that are all set where it is not finite."""

    size: int
    read_as: str
    exponent: int


_KINDS = {
    "F64": _Kind(8, "<u8", 0x7FF0_0000_0000_0000),
    "F32": _Kind(4, "<u4", 0x7F80_0000),
    "F16": _Kind(2, "<u2", 0x7C00),
    "BF16": _Kind(2, "<u2", 0x7F80),
    "F8_E5M2": _Kind(1, "u1", 0x7C),
    "F8_E4M3": _Kind(1, "u1", 0x7F),  # has no infinity, and one NaN
    **{name: _Kind(size, "u1", 0) for name, size in (
        ("I64", 8), ("U64", 8), ("I32", 4), ("U32", 4), ("I16", 2), ("U16", 2), ("I8", 1), ("U8", 1), ("BOOL", 1),
    )},
}  # fmt: skip


class WeightFault(NamedTuple):
    """What is wrong, and with which tensor or file."""

    of: str
    what: str


@dataclass(frozen=True)
class Tensor:
    """Where a tensor is: its file, and its bytes there from `begin` to `end`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int


def check_model(folder: Path) -> None:
    """Refuse a merged model that `model_faults` finds fault with.

    Raises:
        ModelError: it names the faults.
    """
    _refuse(
        model_faults(folder), folder, "roll out another version; a model that is damaged in the registry is made anew"
    )


def check_adapter(folder: Path, base: Path, base_digest: str, training: Path, *, max_rank: int | None = None) -> None:
    """Refuse an adapter that `adapter_faults` finds fault with.

    Raises:
        ModelError: it names the faults.
    """
    _refuse(
        adapter_faults(folder, base, base_digest, training, max_rank=max_rank),
        folder,
        "serve the merged model (`engine.adapters: false`), or train anew",
    )


def _refuse(faults: Sequence[WeightFault], folder: Path, fix: str) -> None:
    if not faults:
        return
    lines = [f"  {fault.of}: {fault.what}" for fault in faults[:_SHOWN]]
    more = [f"  and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
    raise ModelError("\n".join(["These weights cannot be served:", *lines, *more]), where=str(folder), fix=fix)


# -- a merged model -------------------------------------------------------------------------------------------------


def model_faults(folder: Path) -> list[WeightFault]:
    """What is wrong with the weights of a merged model; empty for a good one.

    All files are safetensors and as long as their headers say, the index names exactly what is there, every number is
    finite, and for the architectures that are known here (see `expected_shapes`) each tensor is there with its shape.
    """
    faults = list(_code_faults(folder))
    config = _read_config(folder, "config.json", faults)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        faults.append(WeightFault(str(folder), "no safetensors file is there"))
        return faults
    tensors: dict[str, Tensor] = {}
    whole = [_read_file(file, tensors, faults) for file in files]
    if all(whole):  # else each tensor of a damaged file would be missing once more
        faults += _index_faults(folder, files, tensors)
        try:
            expected = None if config is None else expected_shapes(config)
        except (KeyError, TypeError) as error:
            faults.append(WeightFault("config.json", f"lacks a number, or it is none ({error})"))
            expected = None
        faults += [] if expected is None else _shape_faults(tensors, expected)
    return faults + list(_number_faults(tensors.values()))


def expected_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
    """Name and shape of each tensor of a model with this `config.json`, in transformers' names.

    None for an architecture other than llama, mistral, qwen2 and qwen3. `lm_head.weight` is in it only where it is not
    tied to the embedding.

    Raises:
        KeyError: the config lacks a number.
        TypeError: one is none.
    """
    kind = config.get("model_type")
    if kind not in ("llama", "mistral", "qwen2", "qwen3"):
        return None
    vocabulary, hidden, inner = (config[key] for key in ("vocab_size", "hidden_size", "intermediate_size"))
    heads = config["num_attention_heads"]
    key_heads = config.get("num_key_value_heads") or heads
    width = config.get("head_dim") or hidden // heads
    layers = config["num_hidden_layers"]
    for number in (vocabulary, hidden, inner, heads, key_heads, width, layers):
        if not isinstance(number, int) or number < 1:
            raise TypeError(f"{number!r} is no size")
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (vocabulary, hidden)
    attention = {
        "q_proj": (heads * width, hidden),
        "k_proj": (key_heads * width, hidden),
        "v_proj": (key_heads * width, hidden),
        "o_proj": (hidden, heads * width),
    }
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    with_bias = set()
    if kind == "qwen2":
        with_bias = {"q_proj", "k_proj", "v_proj"}
    elif kind != "mistral" and config.get("attention_bias", False):
        with_bias = set(attention)
    if kind == "llama" and config.get("mlp_bias", False):
        with_bias |= set(mlp)
    for layer in range(layers):
        place = f"model.layers.{layer}"
        for part, linear in (("self_attn", attention), ("mlp", mlp)):
            for name, shape in linear.items():
                shapes[f"{place}.{part}.{name}.weight"] = shape
                if name in with_bias:
                    shapes[f"{place}.{part}.{name}.bias"] = shape[:1]
        shapes[f"{place}.input_layernorm.weight"] = (hidden,)
        shapes[f"{place}.post_attention_layernorm.weight"] = (hidden,)
        if kind == "qwen3":
            shapes[f"{place}.self_attn.q_norm.weight"] = (width,)
            shapes[f"{place}.self_attn.k_norm.weight"] = (width,)
    return shapes


def _shape_faults(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> Iterator[WeightFault]:
    for name, shape in expected.items():
        tensor = tensors.get(name)
        if tensor is None:
            yield WeightFault(name, "is missing")
        elif tensor.shape != shape:
            yield WeightFault(name, f"has the shape {list(tensor.shape)}, and config.json asks for {list(shape)}")
    for name in tensors:
        known = name in expected or name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight"
        if not known:
            yield WeightFault(name, "has no place in a model with this config.json")


def _index_faults(folder: Path, files: Sequence[Path], tensors: Mapping[str, Tensor]) -> Iterator[WeightFault]:
    index = folder / _INDEX
    if not index.is_file():
        if [file.name for file in files] != [_ONE_FILE]:
            yield WeightFault(_INDEX, f"is missing, and there are {', '.join(file.name for file in files)}")
        return
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        named = {str(name): str(file) for name, file in places.items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        yield WeightFault(_INDEX, f"cannot be read ({error!r})")
        return
    there = {file.name for file in files}
    for file in sorted(set(named.values()) - there):
        yield WeightFault(file, f"is missing, and {_INDEX} names it")
    for file in sorted(there - set(named.values())):
        yield WeightFault(file, f"is there, and {_INDEX} does not name it")
    for name, file in named.items():
        if file in there and (name not in tensors or tensors[name].file.name != file):
            yield WeightFault(name, f"is not in {file}, where {_INDEX} has it")
    for name, tensor in tensors.items():
        if name not in named:
            yield WeightFault(name, f"is in {tensor.file.name}, and {_INDEX} does not name it")


# -- an adapter -----------------------------------------------------------------------------------------------------


def adapter_faults(
    folder: Path, base: Path, base_digest: str, training: Path, *, max_rank: int | None = None
) -> list[WeightFault]:
    """What is wrong with a LoRA adapter for the engine's option `adapters`; empty for a good one.

    Args:
        folder: `adapter_config.json` and `adapter_model.safetensors`.
        base: the base model that it is to be loaded onto (safetensors).
        base_digest: sha256 of that base's files.
        training: the `training.json` of the training that made the adapter.
        max_rank: the largest rank that the engine takes; None for any.
    """
    faults = list(_code_faults(folder))
    config = _read_config(folder, "adapter_config.json", faults)
    facts = _read_config(training.parent, training.name, faults)
    if facts is not None and (trained_on := (facts.get("base") or {}).get("digest")) != base_digest:
        faults.append(WeightFault(training.name, f"it was trained on the base {trained_on}, not on {base_digest}"))
    if facts is not None and (onto := merged_onto(facts)) not in (None, "base"):
        # What was evaluated is the adapter on other weights: on the base as it is, it may answer otherwise.
        faults.append(WeightFault(training.name, f"the evaluated model is the adapter on `{onto}`, not on its base"))
    tensors: dict[str, Tensor] = {}
    of_base: dict[str, Tensor] = {}
    if (folder / _ADAPTER).is_file():
        _read_file(folder / _ADAPTER, tensors, faults)
    else:
        faults.append(WeightFault(_ADAPTER, "is missing"))
    for file in sorted(base.glob("*.safetensors")):
        _read_file(file, of_base, faults)
    if config is not None:
        rank = config.get("r")
        if max_rank is not None and isinstance(rank, int) and rank > max_rank:
            faults.append(WeightFault("adapter_config.json", f"its rank is {rank}; engines take at most {max_rank}"))
        faults += _lora_faults(config, tensors, of_base)
    return faults + list(_number_faults(tensors.values()))


def merged_onto(facts: Mapping[str, Any]) -> str | None:
    """What `training.json` says the evaluated model's adapter was merged onto; None if it does not say.

    "base" is the base as it is, "nf4" its 4-bit numbers written out, "nothing" a model that was trained whole.
    """
    skews = facts.get("skews") or ()
    return str(skews[0].get("onto")) if skews else None


def _lora_faults(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], of_base: Mapping[str, Tensor]
) -> Iterator[WeightFault]:
    rank = config.get("r")
    if not isinstance(rank, int) or rank < 1:
        yield WeightFault("adapter_config.json", f"its rank is {rank!r}")
        return
    if config.get("use_dora"):
        yield WeightFault("adapter_config.json", "is a DoRA adapter, which vLLM does not take")
    if config.get("rank_pattern"):
        yield WeightFault("adapter_config.json", "has ranks of its own for some layers, which vLLM does not take")
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, part = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        if part not in ("lora_A", "lora_B"):
            yield WeightFault(name, "is no part of a LoRA adapter")
            continue
        layers.setdefault(layer, {})[part] = tensor
    for layer, parts in layers.items():
        for part in ("lora_A", "lora_B"):
            if part not in parts:
                yield WeightFault(f"{layer}.{part}", "is missing")
        weight = of_base.get(f"{layer}.weight")
        if weight is None or len(weight.shape) != 2:
            yield WeightFault(layer, "the base model has no such layer")
            continue
        for part, shape in (("lora_A", (rank, weight.shape[1])), ("lora_B", (weight.shape[0], rank))):
            if part in parts and parts[part].shape != shape:
                yield WeightFault(
                    parts[part].name,
                    f"has the shape {list(parts[part].shape)}; rank {rank} on this layer is {list(shape)}",
                )
    targets = config.get("target_modules")
    for target in targets if isinstance(targets, list) else ():
        if not any(f".{layer}".endswith(f".{target}") for layer in layers):
            yield WeightFault(str(target), "is a target in adapter_config.json, and has no weights")


# -- files ----------------------------------------------------------------------------------------------------------


def _code_faults(folder: Path) -> Iterator[WeightFault]:
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in _RUNS_CODE:
            yield WeightFault(file.relative_to(folder).as_posix(), "may run code when it is loaded; only safetensors")


def _read_config(folder: Path, name: str, faults: list[WeightFault]) -> dict[str, Any] | None:
    try:
        config = json.loads((folder / name).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError) as error:
        faults.append(WeightFault(name, f"cannot be read ({error})"))
        return None
    return config


def _read_file(file: Path, tensors: dict[str, Tensor], faults: list[WeightFault]) -> bool:
    """Add the tensors of a file whose header and length agree, and say whether they do.

    The format is that of huggingface/safetensors, README, "Format".
    """
    size = file.stat().st_size
    with file.open("rb") as bytes_of:
        length = int.from_bytes(bytes_of.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER_LIMIT):
            faults.append(WeightFault(file.name, f"is cut short or no safetensors file ({size:,} bytes)"))
            return False
        try:
            header = json.loads(bytes_of.read(length))
            header.pop("__metadata__", None)
            found = [
                Tensor(
                    str(name),
                    str(entry["dtype"]),
                    tuple(int(side) for side in entry["shape"]),
                    file,
                    *(8 + length + int(offset) for offset in entry["data_offsets"]),
                )
                for name, entry in header.items()
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            faults.append(WeightFault(file.name, f"has a header that cannot be read ({error!r})"))
            return False
    found.sort(key=lambda tensor: tensor.begin)
    end = 8 + length
    for tensor in found:
        kind = _KINDS.get(tensor.dtype)
        if kind is None:
            faults.append(WeightFault(tensor.name, f"has the number format {tensor.dtype}, which is not known here"))
            return False
        if tensor.begin != end or tensor.end - tensor.begin != kind.size * prod(tensor.shape):
            faults.append(WeightFault(tensor.name, "its place in the file does not fit its shape and its neighbours"))
            return False
        end = tensor.end
    if size != end:
        what = "is cut short" if size < end else "has bytes that belong to no tensor"
        faults.append(WeightFault(file.name, f"{what}: its header says {end:,} bytes, it has {size:,}"))
        return False
    for tensor in found:
        if tensor.name in tensors:
            faults.append(WeightFault(tensor.name, f"is in {tensors[tensor.name].file.name} and in {file.name}"))
        tensors[tensor.name] = tensor
    return True


def _number_faults(tensors: Iterable[Tensor]) -> Iterator[WeightFault]:
    by_file: dict[Path, list[Tensor]] = {}
    for tensor in tensors:
        by_file.setdefault(tensor.file, []).append(tensor)
    for file, inside in by_file.items():
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            for tensor in inside:
                wrong = _not_finite(mapped, tensor)
                if wrong:
                    yield WeightFault(tensor.name, f"{wrong:,} of {prod(tensor.shape):,} numbers are not finite")


def _not_finite(mapped: mmap.mmap, tensor: Tensor) -> int:
    kind = _KINDS[tensor.dtype]
    wrong, count = 0, prod(tensor.shape)
    for first in range(0, count if kind.exponent else 0, _PIECE):
        numbers: Any = np.frombuffer(
            mapped, dtype=kind.read_as, count=min(_PIECE, count - first), offset=tensor.begin + first * kind.size
        )
        wrong += int(np.count_nonzero((numbers & kind.exponent) == kind.exponent))
        del numbers  # the map cannot be closed while an array looks into it
    return wrong
