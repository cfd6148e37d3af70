"""A Llama-shaped model with random weights, as a folder: made from its config, shard by shard, nothing downloaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_SPREAD = 0.02  # of the weights: Llama's initializer_range
_INDEX = "model.safetensors.index.json"


def make_random_model(folder: Path, shape: dict[str, Any], *, seed: int, shard_bytes: int = 1 << 30) -> Path:
    """Write a model with `shape`, the arguments of `LlamaConfig`; done at once if the folder has that very model.

    No more than a shard and a tensor are in memory at a time, on the CUDA device where there is one. Norms are ones,
    all else is drawn from N(0, 0.02²), in bfloat16.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    recipe = json.dumps({"shape": shape, "seed": seed, "shard_bytes": shard_bytes}, sort_keys=True)
    done = folder / "made_from.json"
    if done.exists() and done.read_text(encoding="utf-8") == recipe:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tokenizer = byte_tokenizer(shape["max_position_embeddings"])
    config = LlamaConfig(
        **shape,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    draw = torch.Generator(device).manual_seed(seed)
    shards: list[list[str]] = [[]]
    size = 0
    for name, dimensions in shapes.items():
        if shards[-1] and size + 2 * dimensions.numel() > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += 2 * dimensions.numel()
    places = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name in names:
            tensor = torch.empty(shapes[name], dtype=torch.bfloat16, device=device)
            is_norm = len(shapes[name]) == 1
            tensors[name] = (tensor.fill_(1.0) if is_norm else tensor.normal_(0.0, _SPREAD, generator=draw)).cpu()
            places[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    total = sum(2 * dimensions.numel() for dimensions in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / _INDEX).write_text(json.dumps(index), encoding="utf-8")
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    done.write_text(recipe, encoding="utf-8")
    return folder


def byte_tokenizer(longest: int) -> Any:
    """A tokenizer that knows bytes and chat marks alone: a letter is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={word: at for at, word in enumerate([*marks, *letters])}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(marks)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=marks[1],
        eos_token=marks[2],
        pad_token=marks[3],
        model_max_length=longest,
    )
    tokenizer.chat_template = CHATML
    return tokenizer
