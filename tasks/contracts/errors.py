"""Errors that a person can meet: each says what is wrong, where, and what to do about it."""

from __future__ import annotations

from typing import Any


class GoldgateError(Exception):
    """A refusal with its reason. Base of every error that Goldgate raises on purpose.

    Args:
        what: what is wrong, one sentence.
        where: the file, line, field or address that it is about, if there is one.
        fix: what the reader can do about it.
    """

    def __init__(self, what: str, *, where: str | None = None, fix: str) -> None:
        super().__init__(what, where, fix)
        self.what = what
        self.where = where
        self.fix = fix

    def __reduce__(self) -> tuple[Any, ...]:
        """How an error crosses from one process to another."""
        return _raised_elsewhere, (type(self), self.what, self.where, self.fix)

    def __str__(self) -> str:
        lines = [self.what]
        if self.where is not None:
            lines.append(f"  where:  {self.where}")
        lines.append(f"  to fix: {self.fix}")
        return "\n".join(lines)


def _raised_elsewhere(kind: type[GoldgateError], what: str, where: str | None, fix: str) -> GoldgateError:
    return kind(what, where=where, fix=fix)


class SpecError(GoldgateError):
    """The configuration cannot be used."""


class DataError(GoldgateError):
    """The training data cannot be used."""


class GoldenSetError(GoldgateError):
    """The golden set is missing, was changed, or does not fit the task."""


class ModelError(GoldgateError):
    """A model cannot be found, loaded or trusted."""


class TrainingError(GoldgateError):
    """Training did not produce a model."""


class PrunedError(TrainingError):
    """Training was given up at a look, since others were better by then."""


class EvaluationError(GoldgateError):
    """A model could not be evaluated."""


class NotComparableError(GoldgateError):
    """Two evaluations were made under different conditions, so no verdict can be given."""


class LeakageError(GoldgateError):
    """Nothing shows that the golden set is absent from what the candidate was trained on, or something shows that it
    is there.
    """


class LedgerError(GoldgateError):
    """The ledger of looks cannot be read or written, or the golden set's error budget is spent."""


class CertificateError(GoldgateError):
    """A certificate is missing, was altered, or does not cover this model."""


class RegistryError(GoldgateError):
    """The model registry refused, or a verdict does not cover the artefact."""


class StoreError(GoldgateError):
    """The artefact store cannot be read or written, or its contents were changed."""


class ServiceError(GoldgateError):
    """A server that this run needs does not answer."""
