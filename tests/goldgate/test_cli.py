"""The command line: exit codes, and that every refusal is a message and never a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from goldgate import cli
from tests.goldgate.shell import Call


@pytest.fixture
def prices() -> Path:
    return Path(__file__).parents[2] / "examples" / "prices" / "prices.yaml"


def test_a_refusal_is_a_message(call: Call, tmp_path: Path) -> None:
    ended = call("run", tmp_path / "none.yaml")
    assert ended.code == 1
    assert "Stopped. The configuration file does not exist." in ended.err
    assert f"where:  {tmp_path}/none.yaml" in ended.err
    assert "Traceback" not in ended.err


def test_a_golden_set_that_is_not_there_is_named(call: Call, tmp_path: Path) -> None:
    ended = call("evaluate", tmp_path, tmp_path / "golden")
    assert ended.code == 1
    assert "goldgate golden freeze" in ended.err


def test_status_of_an_empty_store(call: Call) -> None:
    ended = call("status")
    assert ended.code == 0
    assert "none started here" in ended.out
    assert "none registered yet" in ended.out
    assert call("status", "--json").json == {"services": None, "models": []}


def test_rollback_without_a_model_says_so(call: Call) -> None:
    ended = call("rollback", "tickets", "--reason", "wrong on refunds")
    assert ended.code == 1
    assert "tickets" in ended.err


def test_an_interrupt_is_not_a_failure(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load_spec", interrupted)
    ended = call("run", tmp_path / "any.yaml")
    assert ended.code == 130
    assert "the same command goes on" in ended.err


def test_a_remote_store_has_no_servers(call: Call) -> None:
    ended = call("up", "--store", "s3://bucket/store")
    assert ended.code == 1
    assert "s3://bucket/store" in ended.err


def test_a_prefect_server_that_does_not_answer_is_named(
    call: Call, prices: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    ended = call("run", prices)
    assert ended.code == 1
    assert "The Prefect server does not answer" in ended.err
    assert "PREFECT_API_URL=http://127.0.0.1:9/api" in ended.err


def test_a_store_that_cannot_be_written_is_named(call: Call, prices: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ended = call("run", prices, "--set", f"execution.store={tmp_path}/file/store")
    assert ended.code == 1
    assert "The store cannot be written: Not a directory" in ended.err
