"""How the rows of a batch lie in memory. Flat, no token is padding, and what all rows begin with is there once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from tasks.contracts.spec import BatchLayout
from tasks.training.examples import ANSWER_TOKENS, WEIGHT

# Names of a flat batch's tensors beside input_ids and position_ids.
GATHER, PLACE, POSITIONS, ROW_OF, WEIGHTS = "gather", "place", "positions", "row_of", "weights"
_IGNORED = -100


class Rows(NamedTuple):
    """Where the rows of a flat batch are.

    Attributes:
        gather: [rows, longest], the flat position of each row's tokens behind the prefix; where a row is shorter than
            the longest its last token is repeated, and what is worked out for it goes nowhere.
        place: [tokens behind the prefix], where each of them is in `gather` read line by line.
        prefix: tokens of the prefix, at the beginning of the batch.
    """

    gather: torch.Tensor
    place: torch.Tensor
    prefix: int


def rows_of(batch: dict[str, Any]) -> Rows:
    """Where the rows of a flat batch are."""
    return Rows(batch[GATHER], batch[PLACE], batch["input_ids"].shape[1] - len(batch[PLACE]))


def flatten(rows: Sequence[dict[str, Any]], *, share_prefix: bool) -> dict[str, torch.Tensor]:
    """A batch in which rows lie one after the other in one sequence of N tokens.

    Args:
        rows: each with `input_ids`, `answer_tokens` (so many, at the end, carry the loss) and perhaps `weight`.
        share_prefix: whether tokens that all rows begin with are there once. Every row sees them before its own, and
            their gradient is the sum over the rows, so it is the same batch, computed with less work.

    Returns:
        `input_ids` and `position_ids` [1, N]; `gather` and `place` (see `Rows`); `positions` [answers], where an
        answer's tokens are foretold; `labels` and `shift_labels` [answers], the tokens themselves; `row_of` [answers],
        the row of each; and, where rows have them, `weights` [rows].
    """
    ids = [row["input_ids"] for row in rows]
    prefix = 0
    if share_prefix and len(rows) > 1:
        # The token that foretells a row's first answer token stays the row's own.
        most = min(len(row["input_ids"]) - row[ANSWER_TOKENS] - 1 for row in rows)
        prefix = max(0, min(_common(ids), most))
    tokens, at = ids[0][:prefix], list(range(prefix))
    gather: list[list[int]] = []
    place: list[int] = []
    positions: list[int] = []
    wanted: list[int] = []
    row_of: list[int] = []
    longest = max(len(one) for one in ids) - prefix
    for number, row in enumerate(rows):
        own, start = row["input_ids"][prefix:], len(tokens)
        tokens += own
        at += range(prefix, prefix + len(own))
        gather.append([start + min(index, len(own) - 1) for index in range(longest)])
        place += range(number * longest, number * longest + len(own))
        answers = range(len(tokens) - row[ANSWER_TOKENS], len(tokens))
        positions += [position - 1 for position in answers]
        wanted += [tokens[position] for position in answers]
        row_of += [number] * len(answers)
    batch = {
        GATHER: torch.tensor(gather),  # first: the Trainer counts the rows of a batch by its first tensor
        "input_ids": torch.tensor([tokens]),
        "position_ids": torch.tensor([at]),
        PLACE: torch.tensor(place),
        POSITIONS: torch.tensor(positions),
        # Under both names, since the Trainer counts answer tokens in the second where the first is there.
        "labels": torch.tensor(wanted),
        "shift_labels": torch.tensor(wanted),
        ROW_OF: torch.tensor(row_of),
    }
    return _weighed(batch, rows)


def pad(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch in which rows lie side by side, shorter ones padded at their end.

    Returns:
        `input_ids`, `attention_mask` and `labels` (the answer's tokens, else -100), each [rows, longest], and, where
        rows have them, `weights` [rows].
    """
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full((len(rows), longest), _IGNORED)
    for number, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[number, :length] = torch.tensor(row["input_ids"])
        mask[number, :length] = 1
        answer = slice(length - row[ANSWER_TOKENS], length)
        labels[number, answer] = ids[number, answer]
    return _weighed({"input_ids": ids, "attention_mask": mask, "labels": labels}, rows)


def _common(sequences: Sequence[list[int]]) -> int:
    """How many tokens all sequences begin with."""
    first, last = min(sequences), max(sequences)
    return next((at for at, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))


def _weighed(batch: dict[str, torch.Tensor], rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    if WEIGHT in rows[0]:
        batch[WEIGHTS] = torch.tensor([row[WEIGHT] for row in rows], dtype=torch.float32)
    return batch


@dataclass(frozen=True)
class Collator:
    """Makes a batch of rows, in the layout of the plan."""

    layout: BatchLayout

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch of these rows."""
        if self.layout is BatchLayout.PADDED:
            return pad(rows)
        return flatten(rows, share_prefix=self.layout is BatchLayout.SHARED_PREFIX)
