"""Prefect and MLflow on a real PostgreSQL, started by the compose file's own commands with its own environment."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import pytest
import yaml

pytestmark = [pytest.mark.services, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
SERVICES: dict[str, Any] = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text(encoding="utf-8"))["services"]
PASSWORD = "onlyForThisTest42"
LOGIN = "tester:alsoOnlyForThisTest42"  # what Prefect asks for
START_SECONDS = 200.0  # busy machine, first migration


class Postgres(NamedTuple):
    """A running server, and the folder with its programs."""

    programs: Path
    port: int

    def ask(self, database: str, question: str) -> str:
        done = subprocess.run(
            [self.programs / "psql", "-h", "127.0.0.1", "-p", str(self.port), "-U", "goldgate", "-d", database,
             "-v", "ON_ERROR_STOP=1", "-Atc", question],
            env={"PGPASSWORD": PASSWORD, "PATH": os.environ["PATH"]}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout.strip()


class Server(NamedTuple):
    url: str
    process: psutil.Process


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for(
    what: str, is_so: Callable[[], bool], log: Path | None = None, process: psutil.Popen | None = None
) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not is_so():
        ended = process is not None and process.poll() is not None
        if ended or time.monotonic() > deadline:
            pytest.fail(f"{what} did not happen:\n{log.read_text()[-3000:] if log else ''}")
        time.sleep(0.3)


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5.0, trust_env=False).is_success
    except httpx.HTTPError:
        return False


@contextmanager
def running(
    command: list[str], environment: Mapping[str, str], log: Path, *, user: str | None = None
) -> Iterator[psutil.Popen]:
    """A process in a session of its own, ended with all its children."""
    with log.open("wb") as out:
        process = psutil.Popen(
            command, env=dict(environment), cwd=log.parent, stdin=subprocess.DEVNULL, stdout=out,
            stderr=subprocess.STDOUT, start_new_session=True, user=user,
        )  # fmt: skip
    try:
        yield process
    finally:
        tree = [process, *process.children(recursive=True)] if process.is_running() else []
        process.send_signal(signal.SIGINT if user else signal.SIGTERM)  # PostgreSQL's fast shutdown is SIGINT
        _, left = psutil.wait_procs(tree, timeout=15)
        for one in left:
            one.kill()


def compose_environment(service: str, addresses: Mapping[str, str], **handed_through: str) -> dict[str, str]:
    """The environment that compose gives a service, with the other containers' addresses replaced by real ones."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    given: dict[str, str] = {}
    for name, value in SERVICES[service]["environment"].items():
        if value is None:
            if name in handed_through:
                given[name] = handed_through[name]
            continue
        text = re.sub(r"\$\{GOLDGATE_DB_PASSWORD:\?[^}]+\}", PASSWORD, value)
        text = re.sub(r"\$\{[A-Z_]+:-([^}]*)\}", r"\1", text)
        for known, real in addresses.items():
            text = text.replace(known, real)
        assert "${" not in text
        given[name] = text
    return kept | given


def compose_command(service: str, replaced: Mapping[str, str]) -> list[str]:
    program, *words = SERVICES[service]["command"]
    for known in replaced:
        assert known in words, f"{service} is not started with {known}"
    return [str(Path(sys.executable).parent / program), *(replaced.get(word, word) for word in words)]


def deploy_command() -> list[str]:
    """The one-shot service's, with the image's /app replaced by this checkout."""
    program, script = SERVICES["deploy"]["command"]
    assert program == "python"
    return [sys.executable, str(ROOT / Path(script).relative_to("/app"))]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Readable for the user that PostgreSQL runs as, which pytest's own folders are not."""
    path = Path(tempfile.mkdtemp(prefix="goldgate-docker-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def postgres(folder: Path) -> Iterator[Postgres]:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    on_path = shutil.which("initdb")
    if not found and on_path is None:
        pytest.skip("no PostgreSQL server on this machine (package postgresql)")
    programs = found[-1].parent if found else Path(str(on_path)).parent
    user = None
    if os.getuid() == 0:  # PostgreSQL refuses to run as root
        try:
            user = pwd.getpwnam("postgres").pw_name
        except KeyError:
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres to run it as")
    home = folder / "postgres"
    home.mkdir()
    password = folder / "password"
    password.write_text(PASSWORD)
    if user:
        shutil.chown(home, user)
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"}
    subprocess.run(
        [programs / "initdb", "-D", home / "data", "-U", "goldgate", "-A", "scram-sha-256", "--pwfile", password,
         "-E", "UTF8", "--no-sync"],
        check=True, capture_output=True, env=environment, user=user, cwd=home,
    )  # fmt: skip
    port = free_port()
    command = [str(programs / "postgres"), "-D", str(home / "data"), "-h", "127.0.0.1", "-p", str(port),
               "-k", str(home), "-c", "fsync=off"]  # fmt: skip
    log = folder / "postgres.log"
    with running(command, environment, log, user=user) as process:
        check = [programs / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]
        wait_for("PostgreSQL", lambda: subprocess.run(check).returncode == 0, log, process)
        server = Postgres(programs, port)
        # As the official image does it: POSTGRES_DB first, then the scripts inside that database.
        server.ask("postgres", f"CREATE DATABASE {SERVICES['postgres']['environment']['POSTGRES_DB']}")
        subprocess.run(
            [programs / "psql", "-h", "127.0.0.1", "-p", str(port), "-U", "goldgate", "-d", "prefect",
             "-v", "ON_ERROR_STOP=1", "-qf", ROOT / "docker" / "postgres" / "init.sql"],
            env={"PGPASSWORD": PASSWORD, "PATH": os.environ["PATH"]}, check=True, capture_output=True,
        )  # fmt: skip
        yield server


@pytest.fixture(scope="module")
def prefect_server(postgres: Postgres, folder: Path) -> Iterator[Server]:
    port = str(free_port())
    environment = compose_environment(
        "prefect-server",
        {"@postgres:5432": f"@127.0.0.1:{postgres.port}"},
        PREFECT_SERVER_API_AUTH_STRING=LOGIN,
    )
    environment["PREFECT_HOME"] = str(folder / "prefect")
    command = compose_command("prefect-server", {"0.0.0.0": "127.0.0.1", "4200": port})
    log = folder / "prefect.log"
    with running(command, environment, log) as process:
        wait_for("Prefect", lambda: answers(f"http://127.0.0.1:{port}/api/ready"), log, process)
        yield Server(f"http://127.0.0.1:{port}", process)


@pytest.fixture(scope="module")
def api(prefect_server: Server) -> Iterator[httpx.Client]:
    user, _, password = LOGIN.partition(":")
    with httpx.Client(
        base_url=f"{prefect_server.url}/api", auth=(user, password), timeout=30.0, trust_env=False
    ) as client:
        yield client


@pytest.fixture(scope="module")
def client_environment(prefect_server: Server, folder: Path) -> dict[str, str]:
    """Of the one-shot service that deploys; the workers have the same and more."""
    environment = compose_environment(
        "deploy", {"http://prefect-server:4200": prefect_server.url}, PREFECT_API_AUTH_STRING=LOGIN
    )
    return environment | {"PREFECT_HOME": str(folder / "client"), "GOLDGATE_STORE": str(folder / "store")}


@pytest.fixture(scope="module")
def deployed(client_environment: dict[str, str], folder: Path) -> str:
    outputs = []
    for _ in range(2):  # `docker compose up` deploys again each time
        done = subprocess.run(
            deploy_command(),
            env=client_environment, cwd=folder, capture_output=True, text=True, timeout=250,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        outputs.append(done.stdout)
    return outputs[-1]


def test_prefect_keeps_its_tables_in_postgres(prefect_server: Server, postgres: Postgres) -> None:
    assert httpx.get(f"{prefect_server.url}/api/health", trust_env=False, timeout=60.0).json() is True
    assert postgres.ask("prefect", "SELECT count(*) FROM pg_extension WHERE extname = 'pg_trgm'") == "1"
    assert int(postgres.ask("prefect", "SELECT count(*) FROM pg_tables WHERE tablename = 'flow_run'")) == 1


def test_prefect_asks_for_the_login(prefect_server: Server, api: httpx.Client) -> None:
    assert httpx.get(f"{prefect_server.url}/api/admin/version", trust_env=False, timeout=60.0).status_code == 401
    assert api.get("/admin/version").status_code == 200


def test_the_page_talks_to_the_published_address(prefect_server: Server) -> None:
    settings = httpx.get(f"{prefect_server.url}/ui-settings", trust_env=False, timeout=60.0).json()
    assert settings["api_url"] == "http://127.0.0.1:4200/api"


def test_deploying_makes_pools_automations_and_deployments_once(deployed: str, api: httpx.Client) -> None:
    wanted = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]
    assert len(api.post("/deployments/filter", json={}).json()) == len(wanted)
    assert {pool["name"] for pool in api.post("/work_pools/filter", json={}).json()} >= {"cpu", "gpu"}
    automations = yaml.safe_load((ROOT / "deployments" / "automations.yaml").read_text(encoding="utf-8"))["automations"]
    names = [automation["name"] for automation in api.post("/automations/filter", json={}).json()]
    triggers = [trigger["name"] for deployment in wanted for trigger in deployment.get("triggers", [])]
    assert triggers == ["drifted complaints are trained on", "a promoted version is rolled out"]
    assert sorted(names) == sorted([*(automation["name"] for automation in automations), *triggers])


def test_deploying_with_a_wrong_login_ends_with_a_reason(
    prefect_server: Server, client_environment: dict[str, str]
) -> None:
    wrong = "tester:wrong"
    done = subprocess.run(
        deploy_command(),
        env=client_environment | {"PREFECT_API_AUTH_STRING": wrong}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Unauthorized" in done.stderr
    assert wrong not in done.stderr


def test_a_run_asked_for_over_rest_and_the_scheduled_ones_are_rows(
    deployed: str, api: httpx.Client, postgres: Postgres
) -> None:
    deployment = api.get("/deployments/name/retrain/complaints").json()["id"]
    later = {"type": "SCHEDULED", "state_details": {"scheduled_time": "2099-01-01T00:00:00Z"}}
    made = api.post(f"/deployments/{deployment}/create_flow_run", json={"state": later})
    assert made.status_code == 201, made.text
    row = f"SELECT deployment_id FROM flow_run WHERE id = '{made.json()['id']}'"
    assert postgres.ask("prefect", row) == deployment
    scheduled = f"SELECT count(*) FROM flow_run WHERE deployment_id = '{deployment}' AND auto_scheduled"
    wait_for("scheduling the weekly runs", lambda: int(postgres.ask("prefect", scheduled)) > 0)


@pytest.mark.parametrize("service", ["worker-cpu", "worker-gpu-on-cpu"])
def test_a_worker_comes_online_and_its_health_check_answers(
    service: str, deployed: str, client_environment: dict[str, str], api: httpx.Client, folder: Path
) -> None:
    port = free_port()
    environment = compose_environment(
        service,
        {"http://prefect-server:4200": client_environment["PREFECT_API_URL"].removesuffix("/api")},
        PREFECT_API_AUTH_STRING=LOGIN,
    )
    environment |= {"PREFECT_HOME": str(folder / service), "PREFECT_WORKER_WEBSERVER_PORT": str(port)}
    pool = SERVICES[service]["command"][4]
    log = folder / f"{service}.log"
    with running(compose_command(service, {}), environment, log) as process:
        wait_for(f"{service}'s health check", lambda: answers(f"http://127.0.0.1:{port}/health"), log, process)
        wait_for(
            f"{service} online",
            lambda: any(
                worker["status"] == "ONLINE"
                for worker in api.post(f"/work_pools/{pool}/workers/filter", json={}).json()
            ),
            log,
            process,
        )


@pytest.fixture(scope="module")
def mlflow_server(postgres: Postgres, folder: Path) -> Iterator[Server]:
    pytest.importorskip("psycopg2", reason="MLflow on PostgreSQL needs the extra postgres")
    port = str(free_port())
    environment = compose_environment("mlflow", {"@postgres:5432": f"@127.0.0.1:{postgres.port}"})
    command = compose_command(
        "mlflow",
        {
            "--host=0.0.0.0": "--host=127.0.0.1",
            "--port=5000": f"--port={port}",
            "--artifacts-destination=/mlartifacts": f"--artifacts-destination={folder}/mlartifacts",
        },
    )
    log = folder / "mlflow.log"
    with running(command, environment, log) as process:
        wait_for("MLflow", lambda: answers(f"http://127.0.0.1:{port}/health"), log, process)
        yield Server(f"http://127.0.0.1:{port}", process)


def test_mlflow_keeps_runs_in_postgres_and_files_in_its_volume(
    mlflow_server: Server, postgres: Postgres, folder: Path
) -> None:
    with httpx.Client(base_url=f"{mlflow_server.url}/api/2.0", timeout=60.0, trust_env=False) as client:
        experiment = client.post("/mlflow/experiments/create", json={"name": "wiring"}).json()["experiment_id"]
        run = client.post("/mlflow/runs/create", json={"experiment_id": experiment}).json()["run"]["info"]
        assert run["artifact_uri"].startswith("mlflow-artifacts:/")
        assert postgres.ask("mlflow", f"SELECT count(*) FROM runs WHERE run_uuid = '{run['run_id']}'") == "1"
        put = client.put(
            f"/mlflow-artifacts/artifacts/{experiment}/{run['run_id']}/artifacts/note.txt", content=b"kept"
        )
        assert put.is_success, put.text
    assert (folder / "mlartifacts" / experiment / run["run_id"] / "artifacts" / "note.txt").read_text() == "kept"


@pytest.mark.parametrize(
    ("host", "status"),
    [("mlflow:5000", 200), ("localhost:5000", 200), ("127.0.0.1:5001", 200), ("evil.example", 403)],
)
def test_mlflow_answers_under_its_own_names_only(mlflow_server: Server, host: str, status: int) -> None:
    answer = httpx.post(
        f"{mlflow_server.url}/api/2.0/mlflow/experiments/search",
        json={"max_results": 1}, headers={"host": host}, timeout=60.0, trust_env=False,
    )  # fmt: skip
    assert answer.status_code == status, answer.text


def test_no_command_line_shows_the_password(prefect_server: Server, mlflow_server: Server) -> None:
    for server in (prefect_server, mlflow_server):
        for process in (server.process, *server.process.children(recursive=True)):
            assert PASSWORD not in " ".join(process.cmdline())
