"""The registered model, answering as it was evaluated: same prompt, chat template, number format and decoding.

MLflow copies this file into the model and runs it wherever the model is loaded. So it stands alone: it imports nothing
of Goldgate, and torch and transformers only when a model is loaded.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import mlflow
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext

BATCH = 16
# How models write calls of tools, and what follows a call in a worked example: as the evaluation has it.
TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
MARKS = re.compile(r"\[TOOL_CALLS\]|<\|python_tag\|>")
FENCED = re.compile(r"```\w*\s*(.*?)```", re.DOTALL)
JSON = re.compile(r"\s*(?:\{|\[\s*\{)")
NAMED = re.compile(r"([A-Za-z0-9_-]{1,64})(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(?=\{)")
BETWEEN = re.compile(r"[\s;,]*")
RESULT = "OK"
AFTERWARDS = "Done."


class ServedModel(PythonModel):
    """Answers texts: one of the labels when the task has labels, else what the model writes (JSON, or free text).

    Where the task has tools, calls are answered as a JSON list of `{"arguments", "name"}`.
    """

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
        tools = self.prompt.get("tools", [])
        messages: list[dict[str, Any]] = [{"role": "system", "content": self.prompt["system"]}]
        calls = 0
        for shot in self.prompt["shots"]:
            if tools:
                turns = exchange(shot["user"], shot["assistant"], calls)
                calls += len(turns[1].get("tool_calls", ()))
                messages += turns
            else:
                messages += [
                    {"role": "user", "content": shot["user"]},
                    {"role": "assistant", "content": shot["assistant"]},
                ]
        messages.append({"role": "user", "content": text})
        options = {"tools": [{"type": "function", "function": tool} for tool in tools]} if tools else {}
        ids: list[int] = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, **options
        )
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
            if not self.prompt.get("tools"):
                return text
            # Some chat templates mark calls by special tokens.
            marked: str = self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            found = read_calls(marked)
            return text if found is None else found
        written = b"".join(self.token_bytes.get(token, b"") for token in tokens)
        left = [choice for choice in self.choices if choice.startswith(written)]
        return (left[0] if len(left) == 1 else written).decode(errors="replace")


def exchange(user: str, answer: str, before: int) -> list[dict[str, Any]]:
    """The turns of a worked example; where the answer is calls, of which there were `before`, their results follow."""
    asked = {"role": "user", "content": user}
    if not answer.startswith("[{") or read_calls(answer) != answer:
        return [asked, {"role": "assistant", "content": answer}]
    calls: list[dict[str, Any]] = [
        {"type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}, "id": f"call{at:05d}"}
        for at, call in enumerate(json.loads(answer), start=before + 1)
    ]
    results = [
        {"role": "tool", "content": RESULT, "name": call["function"]["name"], "tool_call_id": call["id"]}
        for call in calls
    ]
    called = {"role": "assistant", "content": "", "tool_calls": calls}
    return [asked, called, *results, {"role": "assistant", "content": AFTERWARDS}]


def read_calls(text: str) -> str | None:
    """The calls that a text makes, as the evaluation writes them; the text if they cannot be read, None for words."""
    text = text.strip()
    pieces: list[str] = TAGGED.findall(text)
    if not pieces and MARKS.search(text):
        pieces = MARKS.split(text)[1:]
    if not pieces:
        pieces = [piece for piece in FENCED.findall(text) if JSON.match(piece) and '"name"' in piece]
    if not pieces and JSON.match(text):
        pieces = [text]
    if not pieces:
        return None
    try:
        calls = sorted(call for piece in pieces for call in calls_in(piece))
        written = canonical([{"name": name, "arguments": json.loads(arguments)} for name, arguments in calls])
        written.encode()
    except (ValueError, RecursionError):
        return text
    return written if calls else text


def calls_in(piece: str) -> Iterator[tuple[str, str]]:
    """Name and canonical arguments of each call in the part of a text that has to be calls.

    Raises:
        ValueError: it is no JSON, or no call.
    """
    decoder = json.JSONDecoder(parse_constant=no_json)
    at = BETWEEN.match(piece).end()  # type: ignore[union-attr]  # it matches nothing, too
    while at < len(piece):
        named = NAMED.match(piece, at)
        value, at = decoder.raw_decode(piece, named.end() if named else at)
        at = BETWEEN.match(piece, at).end()  # type: ignore[union-attr]
        if named:
            value = {"name": named[1], "arguments": value}
        for call in value if isinstance(value, list) else [value]:
            function = call.get("function", call) if isinstance(call, dict) else None
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise ValueError("a call has no name of a function")
            arguments = function.get("arguments", function.get("parameters"))
            if isinstance(arguments, str):
                arguments = json.loads(arguments, parse_constant=no_json)
            if arguments is not None and not isinstance(arguments, dict):
                raise ValueError("arguments are no object")
            yield function["name"], canonical(arguments or {})


def canonical(value: Any) -> str:
    """The JSON of a value: keys sorted, whole floats as integers."""

    def plain(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: plain(node[key]) for key in sorted(node)}
        if isinstance(node, list):
            return [plain(item) for item in node]
        return int(node) if isinstance(node, float) and node.is_integer() else node

    return json.dumps(plain(value), ensure_ascii=False, allow_nan=False)


def no_json(name: str) -> NoReturn:
    """Refuse NaN and infinity, which JSON does not have."""
    raise ValueError(f"{name} is no JSON")


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
