"""A registry in a store of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.contracts.spec import ExecutionSpec
from tests.registry.workshop import Workshop


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Workshop:
    """One SQLite registry for the room, since making its tables takes seconds; each test takes a name of its own."""
    return Workshop(ExecutionSpec(store=str(tmp_path_factory.mktemp("registry") / "store")), tiny_model)


@pytest.fixture(autouse=True)
def _no_tracking_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A registered model of the test's own."""
    return "".join(c if c.isalnum() else "-" for c in request.node.name.lower())[:60].strip("-")
