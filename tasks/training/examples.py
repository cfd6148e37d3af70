"""From rows to tokens: what the model is shown, and which tokens the loss is taken on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tasks.contracts.errors import TrainingError
from tasks.contracts.prompt import Prompt
from tasks.contracts.rows import Row, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Example(NamedTuple):
    """A row as tokens: prompt and answer in one sequence, the answer ending with the end-of-turn token.

    Attributes:
        input_ids: all tokens.
        answer_tokens: how many of them, at the end, are the answer; the loss is taken on these alone.
    """

    input_ids: list[int]
    answer_tokens: int


def tokenize_row(row: Row, prompt: Prompt, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Example:
    """Render a row through the model's own chat template, up to and including the token that ends the answer.

    Raises:
        TrainingError: the row is longer than `max_tokens`, the template renders the answer in a way that cannot be
            told from the prompt, or it never ends the answer.
    """
    asked = [message.as_chat() for message in prompt.messages(row)]
    prompt_ids = _render(tokenizer, asked, ask=True)
    whole = _render(tokenizer, [*asked, {"role": "assistant", "content": row.target}], ask=False)
    if whole[: len(prompt_ids)] != prompt_ids:
        raise TrainingError(
            "The chat template renders the prompt differently when an answer follows, so the model would be trained on "
            "something it is never asked.",
            where=f"row {row.id} (line {row.line})",
            fix="use a base model whose chat template renders earlier turns the same way whatever follows",
        )
    answer = whole[len(prompt_ids) :]
    ends = [at for at, token in enumerate(answer) if token == tokenizer.eos_token_id]
    if not ends:
        raise TrainingError(
            f"The chat template does not end an answer with the end token {tokenizer.eos_token!r}, so the model would "
            "never learn to stop.",
            where=f"row {row.id} (line {row.line})",
            fix="set the tokenizer's eos_token to the token with which the chat template ends a turn",
        )
    answer = answer[: ends[-1] + 1]  # what a template writes between turns is no part of the answer
    length = len(prompt_ids) + len(answer)
    if length > max_tokens:
        raise TrainingError(
            f"A row has {length} tokens, more than the {max_tokens} allowed; nothing is cut off silently.",
            where=f"row {row.id} (line {row.line} of the source)",
            fix=f"raise `train.max_tokens` to {length} or more, or lower `data.max_characters`",
        )
    return Example(prompt_ids + answer, len(answer))


def tokenize_file(path: Path, prompt: Prompt, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[Example]:
    """The examples of a file of rows, in its order.

    Raises:
        TrainingError: as `tokenize_row`.
    """
    return [tokenize_row(row, prompt, tokenizer, max_tokens) for row in read_rows(path)]


def as_columns(examples: Sequence[Example]) -> dict[str, list[list[int]]]:
    """The examples as SFTTrainer reads them: `completion_mask` is 1 on the answer's tokens."""
    return {
        "input_ids": [example.input_ids for example in examples],
        "completion_mask": [
            [0] * (len(example.input_ids) - example.answer_tokens) + [1] * example.answer_tokens for example in examples
        ],
    }


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *, ask: bool) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    # The template writes all special tokens itself.
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
