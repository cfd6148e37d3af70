"""What `up` and `down` do about ports, strangers, broken servers and the record of what runs; without real servers."""

from __future__ import annotations

import io
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from goldgate import services
from goldgate.services import Process, Services
from tasks.contracts.errors import ServiceError, StoreError
from tasks.contracts.spec import ExecutionSpec


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def sleeper() -> Iterator[psutil.Process]:
    """A process of somebody else."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    yield psutil.Process(child.pid)
    child.kill()
    child.wait()


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def record(store: Path, process: psutil.Process, *, started: float) -> None:
    """A services.json as `up` leaves it, with one process."""
    running = Services(
        store=str(store),
        prefect_url="http://127.0.0.1:1",
        mlflow_url="http://127.0.0.1:2",
        processes=(Process(name="mlflow", pid=process.pid, started=started, log=str(store / "mlflow.log")),),
    )
    (store / "services.json").write_text(running.model_dump_json())


def test_down_ends_what_it_started_with_all_its_children(tmp_path: Path, console: Console) -> None:
    below = "import time; time.sleep(300)"
    above = (
        f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {below!r}]); print('ready', flush=True)"
    )
    child = subprocess.Popen([sys.executable, "-c", f"{above}; time.sleep(300)"], text=True, stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    parent = psutil.Process(child.pid)
    (grandchild,) = parent.children()
    record(tmp_path, parent, started=parent.create_time())

    services.down(tmp_path, console)

    assert not parent.is_running() or parent.status() == psutil.STATUS_ZOMBIE
    assert not grandchild.is_running() or grandchild.status() == psutil.STATUS_ZOMBIE
    assert not (tmp_path / "services.json").exists()


def test_down_leaves_a_stranger_with_a_recycled_pid_alone(
    tmp_path: Path, console: Console, sleeper: psutil.Process
) -> None:
    record(tmp_path, sleeper, started=sleeper.create_time() - 3600)

    services.down(tmp_path, console)

    assert sleeper.is_running()
    assert not (tmp_path / "services.json").exists()


def test_down_where_nothing_runs_says_so_and_makes_nothing(tmp_path: Path, console: Console) -> None:
    services.down(tmp_path / "store", console)
    assert "Nothing runs here" in said(console)
    assert not (tmp_path / "store").exists()


def test_status_tells_the_living_from_the_ended(tmp_path: Path, sleeper: psutil.Process) -> None:
    assert services.status(tmp_path) is None
    record(tmp_path, sleeper, started=sleeper.create_time())
    found = services.status(tmp_path)
    assert found is not None
    assert [(one.alive, one.memory_bytes > 1_000_000) for one in found[1]] == [(True, True)]

    sleeper.kill()
    sleeper.wait(timeout=10)
    found = services.status(tmp_path)
    assert found is not None
    assert [(one.alive, one.memory_bytes) for one in found[1]] == [(False, 0)]


def test_an_unreadable_record_is_named(tmp_path: Path, console: Console) -> None:
    (tmp_path / "services.json").write_text("{")
    with pytest.raises(ServiceError, match=r"cannot be read[\s\S]*services\.json"):
        services.up(tmp_path, console)


def test_up_refuses_when_a_part_has_ended(tmp_path: Path, console: Console, sleeper: psutil.Process) -> None:
    record(tmp_path, sleeper, started=sleeper.create_time())
    running = services.status(tmp_path)
    assert running is not None
    (tmp_path / "worker.log").write_text("first\nthe worker's last words\n")
    ended = Process(name="worker-cpu", pid=sleeper.pid, started=0.0, log=str(tmp_path / "worker.log"))
    both = running[0].model_copy(update={"processes": (*running[0].processes, ended)})
    (tmp_path / "services.json").write_text(both.model_dump_json())

    with pytest.raises(ServiceError, match=r"worker-cpu has ended[\s\S]*last words[\s\S]*goldgate down"):
        services.up(tmp_path, console)
    assert sleeper.is_running()


def test_a_taken_port_that_was_asked_for_is_refused(tmp_path: Path, console: Console) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ServiceError, match=f"port for MLflow is taken[\\s\\S]*127.0.0.1:{port}"):
            services.up(tmp_path, console, mlflow_port=port)
    assert not (tmp_path / "services.json").exists()


def test_a_taken_default_port_is_replaced_and_said(console: Console) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        port = services.choose_port("MLflow", taken, None, console)
    assert port != taken
    assert said(console) == f"Port {taken} is taken by another program: MLflow gets port {port}.\n"


def test_a_store_that_cannot_be_written(tmp_path: Path, console: Console) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        services.up(tmp_path / "file" / "store", console)


def test_clients_find_the_servers_only_while_they_run(tmp_path: Path, sleeper: psutil.Process) -> None:
    execution = ExecutionSpec(store=str(tmp_path))
    without = services.client_environment(execution)
    assert without["PREFECT_HOME"] == f"{tmp_path}/prefect"
    assert without.keys().isdisjoint({"PREFECT_API_URL", "MLFLOW_TRACKING_URI"})

    record(tmp_path, sleeper, started=sleeper.create_time())
    with_servers = services.client_environment(execution)
    assert with_servers["PREFECT_API_URL"] == "http://127.0.0.1:1/api"
    assert with_servers["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:2"

    record(tmp_path, sleeper, started=0.0)
    assert services.client_environment(execution) == without
    assert "PREFECT_HOME" not in services.client_environment(ExecutionSpec(store="memory://store"))


def test_a_persons_own_prefect_settings_reach_no_process() -> None:
    mine = {"PREFECT_API_KEY": "pnu_x", "PREFECT_PROFILE": "cloud", "PREFECT_API_URL": "https://cloud", "PATH": "/bin"}
    environment = services.worker_environment(
        Services(store="/s", prefect_url="http://127.0.0.1:1", mlflow_url="http://127.0.0.1:2"), mine
    )
    assert environment.keys().isdisjoint({"PREFECT_API_KEY", "PREFECT_PROFILE"})
    assert environment["PREFECT_API_URL"] == "http://127.0.0.1:1/api"
    assert environment["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert environment["PATH"] == "/bin"
