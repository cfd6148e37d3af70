"""The registered model, answering as it was evaluated: same prompt, chat template, number format and decoding.

MLflow copies this file into the model and runs it wherever the model is loaded. So it stands alone: it imports nothing
of Goldgate, and torch and transformers only when a model is loaded.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext

BATCH = 16


class ServedModel(PythonModel):
    """Answers texts: one of the labels when the task has labels, else what the model writes (JSON, or free text)."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the merged model, its tokenizer, and the prompt and decoding that it was evaluated with."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

        task = json.loads(Path(context.artifacts["task"]).read_text(encoding="utf-8"))
        folder = context.artifacts["model"]
        self.prompt: dict[str, Any] = task["prompt"]
        self.choices = [choice.encode() for choice in task["decoding"]["choices"]]
        self.max_new_tokens: int = task["decoding"]["max_new_tokens"]
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, local_files_only=True, use_safetensors=True
        ).eval()
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        ends = self.model.generation_config.eos_token_id
        self.ends = {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token_id = min(self.ends)
        # The model's own file may ask for sampling or penalties, which the evaluation did not use.
        self.model.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=sorted(self.ends), pad_token_id=self.tokenizer.pad_token_id
        )
        self.token_bytes = token_bytes(self.tokenizer) if self.choices else {}

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[str]:
        """Answer each text of a list, or of a data frame's column `text`, in order.

        Raises:
            ValueError: the column has another name, or a text is too long for the model.
        """
        column = model_input.columns[0]
        if column not in ("text", 0, "0"):  # a plain list arrives as column 0
            raise ValueError(f"give a list of texts or a data frame with the one column 'text', not {column!r}")
        prompts = [self.render(text) for text in model_input[column]]
        by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        answers = [""] * len(prompts)
        for start in range(0, len(prompts), BATCH):
            batch = by_length[start : start + BATCH]
            for index, answer in zip(batch, self.answer([prompts[index] for index in batch]), strict=True):
                answers[index] = answer
        return answers

    def render(self, text: str) -> list[int]:
        """The tokens that the model is shown for one text: system turn, worked examples, text, by the chat template."""
        messages = [{"role": "system", "content": self.prompt["system"]}]
        for shot in self.prompt["shots"]:
            messages += [{"role": "user", "content": shot["user"]}, {"role": "assistant", "content": shot["assistant"]}]
        messages.append({"role": "user", "content": text})
        ids: list[int] = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and len(ids) + self.max_new_tokens > limit:
            raise ValueError(f"a text is too long: {len(ids)} tokens and {self.max_new_tokens} to answer, of {limit}")
        return ids

    def answer(self, prompts: list[list[int]]) -> list[str]:
        """Draw the likeliest answer to each prompt, held to the choices when there are some."""
        import torch

        inputs = self.tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(self.model.device)
        width = inputs["input_ids"].shape[1]
        with torch.inference_mode():
            rows = self.model.generate(
                **inputs,
                max_new_tokens=self.max_new_tokens,
                prefix_allowed_tokens_fn=self.allowed_after(width) if self.choices else None,
            )
        return [self.text_of([token for token in row[width:].tolist() if token not in self.ends]) for row in rows]

    def allowed_after(self, width: int) -> Callable[[int, Any], list[int]]:
        """Which tokens may follow: those whose bytes go on towards a choice; the end, once no other choice is left."""
        by_bytes: dict[bytes, list[int]] = {}
        for token, text in self.token_bytes.items():
            by_bytes.setdefault(text, []).append(token)

        def allowed(_: int, ids: Any) -> list[int]:
            drawn = ids[width:].tolist()
            text = b"".join(self.token_bytes.get(token, b"") for token in drawn)
            left = [choice for choice in self.choices if choice.startswith(text)]
            if len(left) == 1 or self.ends & set(drawn):
                return sorted(self.ends)
            tokens = set(self.ends if text in left else ())
            for choice in left:
                for end in range(len(text) + 1, len(choice) + 1):
                    tokens.update(by_bytes.get(choice[len(text) : end], ()))
            return sorted(tokens)

        return allowed

    def text_of(self, tokens: list[int]) -> str:
        """The answer that tokens write: with choices, the one choice that they lead to."""
        if not self.choices:
            text: str = self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            return text
        written = b"".join(self.token_bytes.get(token, b"") for token in tokens)
        left = [choice for choice in self.choices if choice.startswith(written)]
        return (left[0] if len(left) == 1 else written).decode(errors="replace")


def token_bytes(tokenizer: Any) -> dict[int, bytes]:
    """The bytes that each token writes; special tokens write none and are left out.

    Raises:
        ValueError: the tokenizer is neither byte-level nor SentencePiece.
    """
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"] or {}
    kinds = {step.get("type") for step in decoder.get("decoders", [decoder])}
    if not kinds & {"ByteLevel", "ByteFallback", "Metaspace"}:
        raise ValueError(f"a tokenizer with decoder {sorted(map(str, kinds))} cannot be held to choices")
    # Byte-level vocabularies write a byte that is not printable as a character from U+0100 on (GPT-2).
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [value for value in range(256) if value not in printable]
    alphabet = {chr(value): value for value in printable} | {chr(256 + n): value for n, value in enumerate(others)}

    def written(token: str) -> bytes:
        if "ByteLevel" in kinds:
            return bytes(alphabet[character] for character in token)
        single = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)
        return bytes([int(single[1], 16)]) if single else token.replace("▁", " ").encode()

    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    special = set(tokenizer.all_special_ids)
    return {
        number: token.encode() if token in added else written(token)
        for token, number in tokenizer.get_vocab().items()
        if number not in special
    }


mlflow.models.set_model(ServedModel())
