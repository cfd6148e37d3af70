"""What every place where people review can do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tasks.contracts.review import QueueKind, Review, ReviewItem, ReviewSpec


class ReviewQueue(Protocol):
    """Where items wait for people. Whatever cannot be done raises a ServiceError, and nothing is half sent then.

    Sent twice, an item is there once: it goes by its id.
    """

    @property
    def page(self) -> str:
        """Where people review."""

    def send(self, items: Sequence[ReviewItem]) -> int:
        """Have items wait; those that are there already, finished or not, stay as they are.

        Returns:
            How many are new.
        """

    def answers(self) -> list[Review]:
        """All items that people have finished, whoever sent them, with each one's last word."""

    def waiting(self) -> int:
        """Items that people have not finished."""


def open_queue(spec: ReviewSpec) -> ReviewQueue:
    """The queue that the spec names, ready to be used: what it needs there is made where it is missing.

    Raises:
        ServiceError: it does not answer, refuses, or its key is not known.
    """
    match spec.queue:
        case QueueKind.MLFLOW:
            from tasks.serving.review.mlflow_queue import MlflowQueue

            return MlflowQueue.open(spec)
        case QueueKind.LABEL_STUDIO:
            from tasks.serving.review.label_studio import LabelStudioQueue

            return LabelStudioQueue.open(spec)
