"""What every engine does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from tasks.contracts.progress import ProgressListener
from tasks.contracts.prompt import Decoding, Prompt
from tasks.contracts.rows import Row


class Answer(NamedTuple):
    """What a model said to one item.

    Attributes:
        prediction: the text, as it came.
        confidence: probability of this text under the decoding used, in [0, 1]; None where the engine has none.
        latency_ms: time of the request; a batched engine gives its time divided by its items.
        prompt_tokens: tokens the model was shown, the shared beginning included.
        output_tokens: tokens it was asked for; an engine that stops once a choice is settled draws fewer.
    """

    prediction: str
    confidence: float | None
    latency_ms: float
    prompt_tokens: int
    output_tokens: int


class Engine(Protocol):
    """Asks one model, greedily: the same item, prompt and decoding give the same tokens whatever the engine."""

    @property
    def identity(self) -> str:
        """Engine, version and number format: what two evaluations must share. Names no model and no device."""

    def answer(
        self, prompt: Prompt, rows: Sequence[Row], decoding: Decoding, listener: ProgressListener
    ) -> list[Answer]:
        """Ask every row; answers come in the order of the rows.

        Raises:
            EvaluationError: a row cannot be asked (too long for the model), or the engine died.
            ServiceError: a server does not answer.
        """

    def close(self) -> None:
        """Give back memory, connections and processes; calling it again does nothing."""
