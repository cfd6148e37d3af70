"""Where MLflow is, and what is said when it cannot be used."""

from __future__ import annotations

import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tasks.contracts.errors import ServiceError
from tasks.contracts.spec import ExecutionSpec
from tasks.tracking import ensure_reachable, tracking_uri, without_password


def test_spec_wins_over_environment_wins_over_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = str(tmp_path / "store")
    assert tracking_uri(ExecutionSpec(store=store)) == f"sqlite:///{store}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://env:1/")
    assert tracking_uri(ExecutionSpec(store=store)) == "http://env:1"
    assert tracking_uri(ExecutionSpec(store=store, tracking_uri="http://spec:2")) == "http://spec:2"


def test_remote_store_needs_a_server() -> None:
    with pytest.raises(ServiceError, match="SQLite database cannot be kept there") as caught:
        tracking_uri(ExecutionSpec(store="memory://goldgate"))
    assert "execution.tracking_uri" in caught.value.fix
    named = ExecutionSpec(store="memory://goldgate", tracking_uri="http://127.0.0.1:5000")
    assert tracking_uri(named) == "http://127.0.0.1:5000"


def test_importing_is_light() -> None:
    code = "import sys, tasks.tracking, tasks.registry.steps; print({'mlflow', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://user:secret@host:5000/x", "http://host:5000/x"),
        ("postgresql://u:p@db/mlflow", "postgresql://db/mlflow"),
        ("http://host:5000", "http://host:5000"),
        ("/a/folder@home", "/a/folder@home"),
    ],
)
def test_passwords_are_not_shown(uri: str, shown: str) -> None:
    assert without_password(uri) == shown


@pytest.fixture
def free_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.fixture
def other_server() -> Iterator[str]:
    """A web server that is no MLflow."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>a printer</html>")

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Page)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_server_that_is_down(free_port: int) -> None:
    with pytest.raises(ServiceError, match="MLflow server does not answer") as caught:
        ensure_reachable(f"http://me:secret@127.0.0.1:{free_port}")
    assert caught.value.where == f"http://127.0.0.1:{free_port}"
    assert "goldgate up" in caught.value.fix


def test_server_that_accepts_and_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.tracking.address._ANSWER_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ServiceError, match="does not answer: timed out"):
            ensure_reachable(address)


def test_another_server(other_server: str) -> None:
    with pytest.raises(ServiceError, match=r"no healthy MLflow server \(HTTP 200\)"):
        ensure_reachable(other_server)


@pytest.mark.parametrize("uri", ["./mlruns", "file:///tmp/mlruns", "databricks"])
def test_addresses_of_other_kinds(uri: str) -> None:
    with pytest.raises(ServiceError, match="no address of an MLflow server or database"):
        ensure_reachable(uri)


def test_file_that_is_no_database(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    file.write_text("not a database at all, " * 100)
    with pytest.raises(ServiceError, match="cannot be written: file is not a database") as caught:
        ensure_reachable(f"sqlite:///{file}")
    assert caught.value.where == str(file)
    assert file.read_text().startswith("not a database")


def test_folder_that_cannot_be_made() -> None:
    with pytest.raises(ServiceError, match="MLflow database cannot be written"):
        ensure_reachable("sqlite:////proc/no/such/mlflow.db")


def test_database_that_another_process_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.tracking.address._ANSWER_SECONDS", 0.2)
    file = tmp_path / "mlflow.db"
    ensure_reachable(f"sqlite:///{file}")
    holder = sqlite3.connect(file, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(ServiceError, match="database is locked"):
        ensure_reachable(f"sqlite:///{file}")
    holder.execute("ROLLBACK")
    holder.close()
    ensure_reachable(f"sqlite:///{file}")
