"""What the tests of the command line share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.goldgate.shell import Call


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """The program, with a store of the test's own and nothing else in its environment."""
    monkeypatch.setenv("GOLDGATE_STORE", str(tmp_path / "store"))
    for name in (
        "MLFLOW_TRACKING_URI", "PREFECT_API_URL", "PREFECT_HOME", "GOLDGATE_LEDGER", "GOLDGATE_PUBLIC_KEY",
        "GOLDGATE_SIGNING_KEY",
    ):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    return Call(monkeypatch, capsys)


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    """A policy file that leaves all but alpha at the defaults."""
    path = tmp_path / "policy.yaml"
    path.write_text("alpha: 0.05\n")
    return path
