"""Damaged weights are told from good ones, each fault with the tensor or file that has it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.contracts.errors import ModelError
from tasks.serving.weights import (
    adapter_faults,
    check_adapter,
    check_model,
    expected_shapes,
    model_faults,
)

Tensors = dict[str, tuple[str, list[int], bytes]]
FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
Q = "model.layers.0.self_attn.q_proj.weight"


def read(file: Path) -> Tensors:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    return {
        name: (entry["dtype"], entry["shape"], data[8 + length :][slice(*entry["data_offsets"])])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def write(file: Path, tensors: Tensors) -> None:
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in tensors.values()))


def change(folder: Path, name: str, **to: Any) -> None:
    """Change a tensor of a one-file model: its dtype, shape or data; None takes it away."""
    tensors = read(folder / FILE)
    dtype, shape, data = tensors[name]
    tensors[name] = (to.get("dtype", dtype), to.get("shape", shape), to.get("data", data))
    write(folder / FILE, tensors)


def rename(folder: Path, name: str, to: str | None) -> None:
    tensors = read(folder / FILE)
    tensor = tensors.pop(name)
    if to is not None:
        tensors[to] = tensor
    write(folder / FILE, tensors)


def configure(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def poison(folder: Path, place: int, bits: int) -> None:
    """Put a bfloat16 number, given by its bits, into the query weights."""
    data = np.frombuffer(read(folder / FILE)[Q][2], "<u2").copy()
    data[place] = bits
    change(folder, Q, data=data.tobytes())


def cut(file: Path, by: int) -> None:
    file.write_bytes(file.read_bytes()[:-by])


def shard(folder: Path) -> None:
    """The same model in two files with an index."""
    tensors = read(folder / FILE)
    (folder / FILE).unlink()
    places = {}
    for number in (1, 2):
        name = f"model-0000{number}-of-00002.safetensors"
        part = {one: tensors[one] for place, one in enumerate(sorted(tensors)) if place % 2 == number - 1}
        write(folder / name, part)
        places |= dict.fromkeys(part, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def edit_index(folder: Path, edit: Callable[[dict[str, str]], Any]) -> None:
    shard(folder)
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model, tmp_path / "model")


def test_a_good_model_has_no_fault(model: Path) -> None:
    assert model_faults(model) == []
    check_model(model)
    shard(model)
    assert model_faults(model) == []


SECOND = "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("damage", "of", "what"),
    [
        (lambda m: poison(m, 5, 0x7FC0), Q, r"1 of 4,096 numbers are not finite"),  # NaN
        (lambda m: poison(m, 4095, 0xFF80), Q, r"1 of 4,096 numbers are not finite"),  # minus infinity
        (lambda m: cut(m / FILE, 1), FILE, r"cut short: its header says [\d,]+ bytes, it has"),
        (lambda m: cut(m / FILE, (m / FILE).stat().st_size - 5), FILE, r"cut short or no safetensors file \(5 bytes\)"),
        (lambda m: (m / FILE).write_bytes(b""), FILE, r"cut short or no safetensors file \(0 bytes\)"),
        (lambda m: (m / FILE).write_bytes((m / FILE).read_bytes() + b"x"), FILE, "bytes that belong to no tensor"),
        (lambda m: (m / FILE).write_bytes(b"\x02" + bytes(7) + b"[]"), FILE, "header that cannot be read"),
        (lambda m: change(m, Q, shape=[32, 64]), Q, "place in the file does not fit its shape"),
        (lambda m: change(m, Q, dtype="I4"), Q, "number format I4"),
        (lambda m: change(m, Q, shape=[32, 128]), Q, r"shape \[32, 128\], and config.json asks for \[64, 64\]"),
        (lambda m: rename(m, Q, None), Q, "is missing"),
        (lambda m: rename(m, "model.norm.weight", None), "model.norm.weight", "is missing"),
        (lambda m: configure(m, num_hidden_layers=1), None, "has no place in a model with this config.json"),
        (lambda m: configure(m, vocab_size=500), "model.embed_tokens.weight", r"asks for \[500, 64\]"),
        (lambda m: configure(m, tie_word_embeddings=False), "lm_head.weight", "is missing"),
        (lambda m: configure(m, hidden_size=None), "config.json", "lacks a number, or it is none"),
        (lambda m: (m / "config.json").write_text("{"), "config.json", "cannot be read"),
        (lambda m: (m / "config.json").unlink(), "config.json", "cannot be read"),
        (lambda m: (m / FILE).unlink(), None, "no safetensors file is there"),
        (lambda m: (m / "pytorch_model.bin").write_bytes(b"x"), "pytorch_model.bin", "may run code"),
        (lambda m: (m / "optimizer.PT").write_bytes(b"x"), "optimizer.PT", "may run code"),
        (lambda m: (m / "scaler.pkl").write_bytes(b"x"), "scaler.pkl", "may run code"),
        (lambda m: (m / FILE).rename(m / "other.safetensors"), INDEX, "is missing, and there are other.safetensors"),
        (lambda m: edit_index(m, lambda i: i.pop(Q)), Q, f"and {INDEX} does not name it"),
        (lambda m: edit_index(m, lambda i: i.update({"x": SECOND})), "x", f"is not in {SECOND}, where"),
        (lambda m: (shard(m), shutil.copy(m / SECOND, m / "z.safetensors")), "z.safetensors", "does not name it"),
        (lambda m: (shard(m), (m / INDEX).write_text("{}")), INDEX, "cannot be read"),
    ],
)  # fmt: skip
def test_each_fault_is_named_with_its_tensor(
    model: Path, damage: Callable[[Path], Any], of: str | None, what: str
) -> None:
    damage(model)
    faults = model_faults(model)
    found = [fault for fault in faults if of in (None, fault.of) and re.search(what, fault.what)]
    assert found, faults
    with pytest.raises(ModelError, match=re.escape(found[0].what.partition(":")[0])) as caught:
        check_model(model)
    assert caught.value.where == str(model)


@pytest.mark.parametrize(
    "damage",
    [
        lambda m: poison(m, 5, 0x7FC0),
        lambda m: cut(m / FILE, 1),
        lambda m: change(m, Q, shape=[32, 128]),
        lambda m: rename(m, Q, None),
        lambda m: (m / "pytorch_model.bin").write_bytes(b"x"),
        lambda m: edit_index(m, lambda i: i.pop(Q)),
    ],
)
def test_one_fault_is_one_line(model: Path, damage: Callable[[Path], Any]) -> None:
    damage(model)
    assert len(model_faults(model)) == 1


def test_a_missing_shard_is_named_once(model: Path) -> None:
    shard(model)
    (model / SECOND).unlink()
    assert next(fault for fault in model_faults(model) if fault.of == SECOND).what.startswith("is missing, and")


def test_large_numbers_are_numbers(model: Path) -> None:
    poison(model, 5, 0x7F7F)  # the largest bfloat16
    poison(model, 6, 0xFF7F)
    assert model_faults(model) == []


@pytest.mark.parametrize(
    ("dtype", "kind", "value"),
    [("F32", "<f4", np.inf), ("F16", "<f2", np.nan), ("F64", "<f8", -np.inf), ("F32", "<f4", np.nan)],
)
def test_every_number_format_is_looked_at(model: Path, dtype: str, kind: str, value: float) -> None:
    numbers = np.zeros(4096, kind)
    numbers[0] = np.finfo(kind).max
    change(model, Q, dtype=dtype, data=numbers.tobytes())
    assert model_faults(model) == []
    numbers[7] = value
    change(model, Q, dtype=dtype, data=numbers.tobytes())
    assert model_faults(model) == [(Q, "1 of 4,096 numbers are not finite")]


def test_many_faults_are_counted(model: Path) -> None:
    configure(model, num_hidden_layers=9)
    with pytest.raises(ModelError, match=r"and 43 more"):
        check_model(model)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}, {"mlp_bias": True}])
def test_expected_shapes_are_those_of_transformers(kind: str, options: dict[str, bool]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = AutoConfig.for_model(kind, **sizes, **heads, **{"tie_word_embeddings": False, **options})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    real = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    assert expected_shapes(json.loads(config.to_json_string(use_diff=False))) == real


def test_an_unknown_architecture_is_still_read(model: Path) -> None:
    configure(model, model_type="mamba")
    rename(model, "model.norm.weight", "backbone.norm.weight")
    assert model_faults(model) == []
    poison(model, 5, 0x7FC0)
    assert [fault.of for fault in model_faults(model)] == [Q]


# -- adapters --------------------------------------------------------------------------------------------------------

RANK = 4
A, B = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight" for part in "AB")


def halves(*shape: int, value: float = 0.5) -> tuple[str, list[int], bytes]:
    return "F32", list(shape), np.full(shape, value, "<f4").tobytes()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    write(folder / "adapter_model.safetensors", {A: halves(RANK, 64), B: halves(64, RANK)})
    (tmp_path / "training.json").write_text(json.dumps({"base": {"source": "base", "digest": "ab"}}))
    return folder


def test_a_good_adapter_has_no_fault(adapter: Path, tiny_model: Path, tmp_path: Path) -> None:
    assert adapter_faults(adapter, tiny_model, "ab", tmp_path / "training.json") == []
    check_adapter(adapter, tiny_model, "ab", tmp_path / "training.json")


LAYER = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("tensors", "config", "of", "what"),
    [
        ({A: halves(2, 64), B: halves(64, 2)}, {}, A, r"shape \[2, 64\]; rank 4 on this layer is \[4, 64\]"),
        ({A: halves(2, 64), B: halves(64, 2)}, {}, B, r"shape \[64, 2\]; rank 4 on this layer is \[64, 4\]"),
        ({A: halves(RANK, 32)}, {}, A, r"rank 4 on this layer is \[4, 64\]"),
        ({A: halves(RANK, 64, value=float("nan"))}, {}, A, "256 of 256 numbers are not finite"),
        ({B: None}, {}, f"{LAYER}.lora_B", "is missing"),
        (
            {A: None, B: None, A.replace("0", "9"): halves(4, 64), B.replace("0", "9"): halves(64, 4)},
            {},
            LAYER.replace("0", "9"),
            "the base model has no such layer",
        ),
        ({"base_model.model.lm_head.weight": halves(2, 2)}, {}, "base_model.model.lm_head.weight", "no part of a LoRA"),
        ({}, {"r": 8}, A, r"rank 8 on this layer is \[8, 64\]"),
        ({}, {"r": None}, "adapter_config.json", "its rank is None"),
        ({}, {"use_dora": True}, "adapter_config.json", "DoRA"),
        ({}, {"rank_pattern": {"q_proj": 2}}, "adapter_config.json", "ranks of its own"),
        ({}, {"target_modules": ["q_proj", "up_proj"]}, "up_proj", "has no weights"),
    ],
)
def test_each_fault_of_an_adapter_is_named(
    adapter: Path,
    tiny_model: Path,
    tmp_path: Path,
    tensors: dict[str, tuple[str, list[int], bytes] | None],
    config: dict[str, Any],
    of: str,
    what: str,
) -> None:
    file = adapter / "adapter_model.safetensors"
    write(file, {name: tensor for name, tensor in (read(file) | tensors).items() if tensor is not None})
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | config))
    faults = adapter_faults(adapter, tiny_model, "ab", tmp_path / "training.json")
    assert [fault for fault in faults if fault.of == of and re.search(what, fault.what)], faults
    with pytest.raises(ModelError, match="weights cannot be served"):
        check_adapter(adapter, tiny_model, "ab", tmp_path / "training.json")


def test_an_adapter_of_another_base(adapter: Path, tiny_model: Path, tmp_path: Path) -> None:
    faults = adapter_faults(adapter, tiny_model, "cd", tmp_path / "training.json")
    assert faults == [("training.json", "it was trained on the base ab, not on cd")]


def test_files_that_an_adapter_lacks_or_should_not_have(adapter: Path, tiny_model: Path, tmp_path: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    (adapter / "adapter_config.json").unlink()
    (tmp_path / "training.json").unlink()
    faults = adapter_faults(adapter, tiny_model, "ab", tmp_path / "training.json")
    assert {fault.of for fault in faults} == {
        "adapter_model.bin", "adapter_config.json", "training.json", "adapter_model.safetensors",
    }  # fmt: skip
