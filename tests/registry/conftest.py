"""A registry in a store of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.contracts.spec import ExecutionSpec
from tests.registry.workshop import Workshop


@pytest.fixture(scope="session")
def lively_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with larger weights: as made, it gives every text the same answer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("lively-model")
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    with torch.no_grad():
        for weights in model.parameters():
            if weights.ndim > 1:
                weights.mul_(12)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory, lively_model: Path) -> Workshop:
    """One SQLite registry for the room, since making its tables takes seconds; each test takes a name of its own."""
    return Workshop(ExecutionSpec(store=str(tmp_path_factory.mktemp("registry") / "store")), lively_model)


@pytest.fixture(autouse=True)
def _no_tracking_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A registered model of the test's own."""
    return "".join(c if c.isalnum() else "-" for c in request.node.name.lower())[:60].strip("-")
