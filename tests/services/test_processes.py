"""What `up` and `down` do about ports, strangers, broken servers and the record of what runs; without real servers."""

from __future__ import annotations

import io
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import httpx
import psutil
import pytest
from rich.console import Console

from goldgate import services
from goldgate.services import Process, Services
from tasks.contracts.errors import ServiceError, StoreError
from tasks.contracts.spec import ExecutionSpec
from tests.processes import lives

ALL = ("prefect", "mlflow", "worker-cpu", "worker-gpu")  # what `up` starts, in this order


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def sleeper() -> Iterator[psutil.Process]:
    """A process of somebody else."""
    code = "import time; print('ready', flush=True); time.sleep(300)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    yield psutil.Process(child.pid)
    child.kill()
    child.wait()
    child.stdout.close()


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def record(
    store: Path,
    process: psutil.Process,
    *,
    started: float,
    names: Sequence[str] = ("mlflow",),
    prefect_url: str = "http://127.0.0.1:1",
) -> None:
    """A services.json as `up` leaves it, with one process under these names."""
    running = Services(
        store=str(store),
        prefect_url=prefect_url,
        mlflow_url="http://127.0.0.1:2",
        processes=tuple(
            Process(name=name, pid=process.pid, started=started, log=str(store / f"{name}.log")) for name in names
        ),
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


def test_down_is_not_stopped_by_what_ends_just_before_it_is_killed(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True)"
    child = subprocess.Popen([sys.executable, "-c", f"{deaf}; time.sleep(300)"], text=True, stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    record(tmp_path, psutil.Process(child.pid), started=psutil.Process(child.pid).create_time())

    def wait_procs(trees: list[psutil.Process], timeout: float) -> tuple[list[psutil.Process], list[psutil.Process]]:
        if trees:
            child.kill()
            child.wait()
        return [], trees

    monkeypatch.setattr(psutil, "wait_procs", wait_procs)
    services.down(tmp_path, console)
    child.stdout.close()
    assert not (tmp_path / "services.json").exists()


def test_an_interrupt_before_a_process_is_written_down_leaves_none(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[psutil.Process] = []
    spawn = services._spawn

    def spawn_sleeper(command: list[str], *rest: Any) -> subprocess.Popen[bytes]:
        child = spawn([sys.executable, "-c", "import time; time.sleep(300)"], *rest)
        started.append(psutil.Process(child.pid))
        return child

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(services, "_spawn", spawn_sleeper)
    monkeypatch.setattr(services, "_write_state", interrupt)
    with pytest.raises(KeyboardInterrupt):
        services.up(tmp_path, console)
    (left,) = started
    assert not lives(left.pid)


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


@pytest.mark.parametrize("begun", [ALL[:number] for number in range(1, len(ALL))], ids=" ".join)
def test_what_an_up_that_was_killed_had_begun_is_not_taken_for_all(
    tmp_path: Path, console: Console, sleeper: psutil.Process, begun: Sequence[str]
) -> None:
    record(tmp_path, sleeper, started=sleeper.create_time(), names=begun)
    with pytest.raises(ServiceError, match="cut off before all was started") as refused:
        services.up(tmp_path, console)
    assert (refused.value.where, refused.value.fix) == (str(tmp_path), "`goldgate down`, then `goldgate up`")
    assert "Already up" not in said(console)
    assert sleeper.is_running()
    without = services.client_environment(ExecutionSpec(store=str(tmp_path)))
    assert without.keys().isdisjoint({"PREFECT_API_URL", "MLFLOW_TRACKING_URI"})


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

    record(tmp_path, sleeper, started=sleeper.create_time(), names=ALL)
    with_servers = services.client_environment(execution)
    assert with_servers["PREFECT_API_URL"] == "http://127.0.0.1:1/api"
    assert with_servers["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:2"

    record(tmp_path, sleeper, started=0.0, names=ALL)
    assert services.client_environment(execution) == without
    assert "PREFECT_HOME" not in services.client_environment(ExecutionSpec(store="memory://store"))


class Busy(BaseHTTPRequestHandler):
    """Prefect that gives the answers of `statuses` in turn, and the last one for ever."""

    statuses: ClassVar[list[int]] = []

    def do_GET(self) -> None:
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(b'{"id": "the-deployment"}')

    def log_message(self, *_: object) -> None:
        return


@pytest.mark.parametrize(
    ("statuses", "tells", "complains"),
    [
        ([200], True, None),
        ([503, 503, 200], True, None),
        ([404], False, None),
        ([503], False, "HTTP 503"),
        ([500, 200], False, "HTTP 500"),
    ],
    ids=str,
)
def test_where_to_start_a_run_is_asked_until_prefect_is_less_busy(
    tmp_path: Path,
    console: Console,
    sleeper: psutil.Process,
    monkeypatch: pytest.MonkeyPatch,
    statuses: list[int],
    tells: bool,
    complains: str | None,
) -> None:
    monkeypatch.setattr(services, "_PAUSES", (0.0, 0.0, 0.0))
    monkeypatch.setattr(Busy, "statuses", statuses)
    with ThreadingHTTPServer(("127.0.0.1", 0), Busy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        record(tmp_path, sleeper, started=sleeper.create_time(), names=ALL, prefect_url=url)
        services.up(tmp_path, console)
        server.shutdown()
    assert said(console).startswith("Already up.")
    assert ("deployment/the-deployment/run" in said(console)) is tells
    assert "http://127.0.0.1:2" in said(console), "and all that is known is said"
    assert ("could not be asked" in said(console)) is (complains is not None)
    assert complains is None or complains in said(console)


@pytest.mark.parametrize(("method", "tries"), [("GET", 3), ("POST", 1)])
def test_what_changes_something_is_not_asked_again_after_a_wait(
    monkeypatch: pytest.MonkeyPatch, method: str, tries: int
) -> None:
    asked: list[str] = []

    def wait(request: httpx.Request) -> httpx.Response:
        asked.append(request.method)
        raise httpx.ReadTimeout("too slow", request=request)

    monkeypatch.setattr(services, "_PAUSES", (0.0, 0.0))
    with (
        httpx.Client(base_url="http://prefect/api", transport=httpx.MockTransport(wait)) as api,
        pytest.raises(ServiceError, match=f"does not answer {method} /flows in time"),
    ):
        services._ask(api, method, "/flows", {})
    assert asked == [method] * tries


def test_a_persons_own_prefect_settings_reach_no_process() -> None:
    mine = {"PREFECT_API_KEY": "pnu_x", "PREFECT_PROFILE": "cloud", "PREFECT_API_URL": "https://cloud", "PATH": "/bin"}
    environment = services.worker_environment(
        Services(store="/s", prefect_url="http://127.0.0.1:1", mlflow_url="http://127.0.0.1:2"), mine
    )
    assert environment.keys().isdisjoint({"PREFECT_API_KEY", "PREFECT_PROFILE"})
    assert environment["PREFECT_API_URL"] == "http://127.0.0.1:1/api"
    assert environment["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert environment["PATH"] == "/bin"
