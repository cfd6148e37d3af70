"""Holding an answer to a list of choices: which tokens may come next. The same rule as xgrammar has in vLLM.

A token is allowed if its bytes go on towards some choice, however the tokenizer would split that choice itself; the
end token is allowed once the text is a whole choice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tasks.contracts.errors import EvaluationError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_bytes(tokenizer: Any) -> dict[bytes, list[int]]:
    """The ids of all tokens that write text, by the bytes they write. Special tokens write none.

    Args:
        tokenizer: a fast tokenizer of transformers.

    Raises:
        EvaluationError: the tokenizer's vocabulary is written neither byte-level nor with byte fall-back.
    """
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"] or {}
    steps = [step["type"] for step in decoder.get("decoders", [decoder]) if "type" in step]
    if "ByteLevel" in steps:
        alphabet = {character: value for value, character in _byte_level_alphabet().items()}
        write = lambda token: bytes(alphabet[character] for character in token)  # noqa: E731 - one of two, chosen here
    elif "ByteFallback" in steps or "Metaspace" in steps:
        write = _sentencepiece_bytes
    else:
        raise EvaluationError(
            "The tokenizer's vocabulary is of a kind that cannot be held to choices.",
            where=f"{tokenizer.name_or_path}/tokenizer.json, decoder {steps or 'none'}",
            fix="use the engine vllm, or a model with a byte-level or SentencePiece tokenizer",
        )
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    special = set(tokenizer.all_special_ids)
    ids: dict[bytes, list[int]] = {}
    for token, number in tokenizer.get_vocab().items():
        if number not in special:
            ids.setdefault(token.encode() if token in added else write(token), []).append(number)
    return ids


class Choices:
    """The next tokens that are allowed after a text, for a fixed list of choices."""

    def __init__(self, choices: Sequence[str], tokens: Mapping[bytes, list[int]], end_ids: Iterable[int]) -> None:
        """Hold answers to `choices`, given the tokens by their bytes and the ids that end an answer."""
        self._choices = [choice.encode() for choice in choices]
        self._tokens = tokens
        self._texts = {number: text for text, numbers in tokens.items() for number in numbers}
        self._end_ids = sorted(end_ids)
        self._allowed: dict[bytes, list[int]] = {}

    def allowed(self, text: bytes) -> list[int]:
        """Ids of the tokens that may follow `text`; the end tokens are among them when it is a whole choice."""
        if text not in self._allowed:
            ids = set(self._end_ids if text in self._choices else [])
            for choice in self._choices:
                if choice.startswith(text):
                    for end in range(len(text) + 1, len(choice) + 1):
                        ids.update(self._tokens.get(choice[len(text) : end], ()))
            self._allowed[text] = sorted(ids)
        return self._allowed[text]

    def after(self, text: bytes, token: int) -> bytes:
        """The text with one more token."""
        return text + self._texts[token]

    def settled(self, text: bytes) -> str | None:
        """The one choice that every continuation leads to, or None while there are several."""
        left = [choice for choice in self._choices if choice.startswith(text)]
        return left[0].decode() if len(left) == 1 else None


def _sentencepiece_bytes(token: str) -> bytes:
    single = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(single[1], 16)]) if single else token.replace("▁", " ").encode()


def _byte_level_alphabet() -> dict[int, str]:
    """Byte -> character, as GPT-2's tokenizer writes bytes: printable ones as they are, the others from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [value for value in range(256) if value not in printable]
    return {value: chr(value) for value in printable} | {value: chr(256 + n) for n, value in enumerate(others)}
