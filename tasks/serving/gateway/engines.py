"""What the gateway needs of the engine host. Its methods are quick and may be called from any thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from tasks.contracts.serving import EngineSpec, EngineStatus, VersionRef


class Reached(Protocol):
    """Where an engine listens: `url` ends in /v1, `key` is the one that it asks for."""

    @property
    def engine(self) -> str:
        """Its name."""

    @property
    def label(self) -> str:
        """The version that it serves, as it calls it itself: `complaints@7`."""

    @property
    def url(self) -> str:
        """Its address on this machine."""

    @property
    def key(self) -> str:
        """Its key; it reaches no client."""

    @property
    def model(self) -> str | None:
        """What it is asked for, where that is not its label: an adapter's name."""


class Engines(Protocol):
    """Starts engines, watches them and ends them. See `tasks.serving.host.EngineHost`."""

    def start(self, version: VersionRef, spec: EngineSpec) -> EngineStatus:
        """Have an engine run; one that runs is left alone."""

    def status(self, engine: str) -> EngineStatus | None:
        """One engine; None for one that is not known."""

    def statuses(self) -> Sequence[EngineStatus]:
        """All that are known."""

    def endpoint(self, engine: str) -> Reached | None:
        """Where it listens; None unless it is ready or draining."""

    def stop(self, engine: str, drain_seconds: float, under_way: Callable[[], int]) -> EngineStatus:
        """End it once nothing is under way there, or the time is over; returns at once."""

    def suspect(self, engine: str) -> None:
        """A connection to it has failed: look at once whether it lives."""
