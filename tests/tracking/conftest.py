"""A tracking database for the room."""

from __future__ import annotations

import pytest

from tasks.contracts.spec import ExecutionSpec


@pytest.fixture(scope="session")
def execution(tmp_path_factory: pytest.TempPathFactory) -> ExecutionSpec:
    """One SQLite database for the room, since making its tables takes seconds; each test takes keys of its own."""
    return ExecutionSpec(store=str(tmp_path_factory.mktemp("tracking") / "store"))


@pytest.fixture(autouse=True)
def _no_tracking_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
