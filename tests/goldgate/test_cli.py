"""The command line: exit codes, and that every refusal is a message and never a traceback."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from goldgate import cli
from tests.toys import write_jsonl


class Ended(NamedTuple):
    code: int
    out: str
    err: str


class Call:
    """Calls the program as a shell would, in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: object) -> Ended:
        self._monkeypatch.setattr(sys, "argv", ["goldgate", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = self._capsys.readouterr()
        return Ended(int(ended.value.code or 0), out, err)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    monkeypatch.setenv("GOLDGATE_STORE", str(tmp_path / "store"))
    for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "PREFECT_HOME"):
        monkeypatch.delenv(name, raising=False)
    return Call(monkeypatch, capsys)


def scores(path: Path, right: int, items: int = 100) -> Path:
    return write_jsonl(path, [{"id": f"i{n}", "score": 1 if n < right else 0} for n in range(items)])


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.yaml"
    path.write_text("alpha: 0.05\n")
    return path


@pytest.fixture
def prices() -> Path:
    return Path(__file__).parents[2] / "examples" / "prices" / "prices.yaml"


@pytest.mark.parametrize(
    ("baseline", "candidate", "code", "word"),
    [(50, 80, 0, "PROMOTE"), (80, 50, 1, "REJECT"), (60, 61, 2, "INCONCLUSIVE")],
)
def test_gate_exits_with_its_verdict(
    call: Call, tmp_path: Path, policy: Path, baseline: int, candidate: int, code: int, word: str
) -> None:
    one, other = scores(tmp_path / "b.jsonl", baseline), scores(tmp_path / "c.jsonl", candidate)
    ended = call("gate", one, other, "--policy", policy)
    assert ended.code == code
    assert word in ended.out


def test_gate_prints_json(call: Call, tmp_path: Path, policy: Path) -> None:
    one, other = scores(tmp_path / "b.jsonl", 50), scores(tmp_path / "c.jsonl", 80)
    record = json.loads(call("gate", one, other, "--policy", policy, "--json").out)
    assert record["outcome"] == "promote"
    assert (record["wins"], record["losses"], record["n"]) == (30, 0, 100)


def test_gate_refuses_results_that_cannot_be_compared(call: Call, tmp_path: Path, policy: Path) -> None:
    one, other = scores(tmp_path / "b.jsonl", 50), scores(tmp_path / "c.jsonl", 80, items=99)
    ended = call("gate", one, other, "--policy", policy)
    assert ended.code == 3
    assert "i99" in ended.err
    assert "to fix:" in ended.err


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
    assert json.loads(call("status", "--json").out) == {"services": None, "models": []}


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
