"""From rows to tokens: what the model is shown, and which tokens the loss is taken on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import TemplateError

from tasks.contracts.errors import TrainingError
from tasks.contracts.prompt import Prompt
from tasks.contracts.rows import Row, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Columns of a dataset beside `input_ids`.
ANSWER_TOKENS = "answer_tokens"
WEIGHT = "weight"


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
            told from the prompt, it refuses the row, or it never ends the answer.
    """
    try:
        prompt_ids = _render(tokenizer, prompt.conversation(row), prompt, ask=True)
        whole = _render(tokenizer, prompt.answered(row), prompt, ask=False)
    except TemplateError as error:
        raise TrainingError(
            f"The chat template cannot render a row: {error}",
            where=f"row {row.id} (line {row.line})",
            fix="take the row out, or use a base model whose chat template takes such conversations",
        ) from error
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


def read_weights(path: Path) -> list[float] | None:
    """How much each row of a file of training rows counts in the loss, in its order; None where all count 1.

    None, not a list of ones: training without weights then takes the same steps, bit for bit, as if there were none.

    Raises:
        TrainingError: a weight is not a finite number above 0.
    """
    weights: list[float] = []
    for row in read_rows(path):
        # NaN and infinity are null in JSON, and come back as None.
        if not (row.weight and math.isfinite(row.weight) and row.weight > 0):
            raise TrainingError(
                f"The weight of a row is {row.weight}; it has to be a finite number above 0.",
                where=f"{path.name}, row {row.id} (line {row.line} of the source)",
                fix="correct the field that `data.weight_field` names; to train without a row, take it out of the data",
            )
        weights.append(row.weight)
    return weights if any(weight != 1.0 for weight in weights) else None


class WeightFacts(NamedTuple):
    """What a training says of its rows' weights.

    Attributes:
        weighted_rows: rows of the training file whose weight is not 1; 0 where weights are not in use.
        lowest_weight: the smallest weight of a row.
        highest_weight: the largest.
    """

    weighted_rows: int
    lowest_weight: float
    highest_weight: float


def sum_up_weights(weights: Sequence[float] | None) -> WeightFacts:
    """Count the rows that weigh more or less than 1, and find the extremes, of what `read_weights` gave."""
    if weights is None:
        return WeightFacts(0, 1.0, 1.0)
    return WeightFacts(sum(weight != 1.0 for weight in weights), min(weights), max(weights))


def as_columns(examples: Sequence[Example], weights: Sequence[float] | None = None) -> dict[str, list[Any]]:
    """The examples as columns of a dataset: `input_ids` and `answer_tokens`.

    With `weights`, one for each example, there is a column `weight` too; without them there is none.
    """
    columns: dict[str, list[Any]] = {
        "input_ids": [example.input_ids for example in examples],
        ANSWER_TOKENS: [example.answer_tokens for example in examples],
    }
    return columns if weights is None else columns | {WEIGHT: list(weights)}


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], prompt: Prompt, *, ask: bool
) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask, **prompt.template_options)
    # The template writes all special tokens itself.
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
