"""What the thin Prefect tasks of every room share: opening the store, and saying how far a step is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Protocol
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import FlowRunContext
from prefect.exceptions import MissingContextError

from tasks.contracts.progress import Progress, ProgressListener
from tasks.contracts.spec import ExecutionSpec
from tasks.store import Store

_ARTIFACT_SECONDS = 3.0  # a progress artifact is one HTTP call; more often than this only costs


class Display(Protocol):
    """A terminal that shows steps. The command line sets one; a worker has none."""

    def start(self, step: str) -> None:
        """A step begins."""

    def update(self, step: str, progress: Progress) -> None:
        """A step has come this far."""

    def finish(self, step: str, summary: str, *, reused: bool) -> None:
        """A step is done."""


display: ContextVar[Display | None] = ContextVar("display", default=None)


def open_store(execution: ExecutionSpec) -> Store:
    """The artefact store of a run."""
    return Store(execution.store)


def say(step: str, text: str) -> None:
    """Log what a step is about, on the run's page."""
    with suppress(MissingContextError):  # a task function can be called outside a run
        get_run_logger().info("%s: %s", step, text)


def say_done(step: str, summary: str, *, reused: bool) -> None:
    """Log how a step ended, on the run's page and in the terminal."""
    say(step, f"{summary} (reused)" if reused else summary)
    shown = display.get()
    if shown is not None:
        shown.finish(step, summary, reused=reused)


@contextmanager
def progress_of(step: str) -> Iterator[ProgressListener]:
    """Listen to a step's progress: in the terminal if there is one, else as a progress artifact of the run's page."""
    shown = display.get()
    if shown is not None:
        shown.start(step)
        yield lambda progress: shown.update(step, progress)
        return
    if FlowRunContext.get() is None:
        yield lambda progress: None
        return

    artifact: UUID | None = None
    last = 0.0

    def to_artifact(progress: Progress) -> None:
        nonlocal artifact, last
        percent = 100.0 * progress.done / progress.total if progress.total else 0.0
        now = time.monotonic()
        if progress.done < progress.total and now - last < _ARTIFACT_SECONDS:
            return
        last = now
        text = f"{step}: {progress.done:,.0f} of {progress.total:,.0f} {progress.unit} {progress.note}".rstrip()
        if artifact is None:
            artifact = create_progress_artifact(progress=percent, description=text)  # type: ignore[assignment]
        else:
            update_progress_artifact(artifact_id=artifact, progress=percent, description=text)

    yield to_artifact
