"""The servers of one machine: Prefect, MLflow and a worker for each pool, on loopback, with all they keep in the store.

`up` starts them in the background and deploys every flow, `down` ends just those. What runs is written to
`<store>/services.json` as soon as it is started, so that `down` also cleans up after an `up` that was killed.
"""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml
from rich.console import Console

from tasks.contracts.errors import ServiceError, StoreError
from tasks.contracts.spec import ExecutionSpec, Frozen

PROJECT = Path(__file__).resolve().parent.parent
DEPLOYMENTS = PROJECT / "deployments"
PREFECT_PORT = 4200
MLFLOW_PORT = 5000

_STATE = "services.json"
_START_SECONDS = 180.0  # a cold first start on two busy cores takes about a minute
_CANCEL_SECONDS = 10.0
_STOP_SECONDS = 8.0
_PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds between tries while Prefect is busy
_HEARTBEAT_SECONDS = 30  # the automation in deployments/automations.yaml waits for three of these
_ACTIVE = ["PENDING", "RUNNING", "CANCELLING"]


class Process(Frozen):
    """A process that `up` started.

    Attributes:
        name: what it is ("prefect", "mlflow", "worker-cpu", "worker-gpu").
        started: when, in seconds since the epoch; with the pid it names one process and no other.
        log: the file with its output.
    """

    name: str
    pid: int
    started: float
    log: str


class Services(Frozen):
    """What `up` started: where the servers answer, and the processes in the order of their start."""

    store: str
    prefect_url: str
    mlflow_url: str
    processes: tuple[Process, ...] = ()


class ProcessStatus(Frozen):
    """A process now: whether it runs, and the memory of it and its children in bytes."""

    process: Process
    alive: bool
    memory_bytes: int


def client_environment(execution: ExecutionSpec) -> dict[str, str]:
    """Environment with which Prefect and MLflow use the servers of this store when they run, and else its files.

    Only names that are missing should be set from it: what a person exported wins.
    """
    environment = {
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "1",
        "TQDM_DISABLE": "1",  # libraries' own progress bars: the display shows how far a step is
    }
    if "://" in execution.store:
        return environment
    store = Path(execution.store).absolute()
    environment["PREFECT_HOME"] = str(store / "prefect")
    services = _read_state(store)
    if services is not None and _whole(services) and all(_alive(process) for process in services.processes):
        environment["PREFECT_API_URL"] = f"{services.prefect_url}/api"
        environment["MLFLOW_TRACKING_URI"] = services.mlflow_url
    return environment


def status(store: Path) -> tuple[Services, tuple[ProcessStatus, ...]] | None:
    """What `up` started in this store and what became of it; None if nothing was."""
    services = _read_state(store.absolute())
    if services is None:
        return None
    return services, tuple(
        ProcessStatus(process=process, alive=_alive(process), memory_bytes=_memory(process))
        for process in services.processes
    )


def up(
    store: Path,
    console: Console,
    *,
    prefect_port: int | None = None,
    mlflow_port: int | None = None,
    prefect_file: Path = DEPLOYMENTS / "prefect.yaml",
) -> Services:
    """Start the servers and workers in the background, deploy every flow, and say where each page is.

    Args:
        store: the folder that everything is kept in.
        console: where to say so.
        prefect_port: None takes 4200, or a free one when that is taken.
        mlflow_port: None takes 5000, or a free one when that is taken.
        prefect_file: the deployments.

    Raises:
        ServiceError: a port is taken, or a server does not come up (with the end of its log); nothing stays running.
        StoreError: the store cannot be written.
    """
    store = store.absolute()
    with _locked(store):
        running = _read_state(store)
        if running is not None:
            if _whole(running) and all(_alive(process) for process in running.processes):
                console.print("Already up.", highlight=False)
                _say_where(running, console)
                return running
            if any(_alive(process) for process in running.processes):
                ended = next((process for process in running.processes if not _alive(process)), None)
                if ended is None:
                    raise ServiceError(
                        "An earlier `goldgate up` was cut off before all was started.",
                        where=str(store),
                        fix="`goldgate down`, then `goldgate up`",
                    )
                raise ServiceError(
                    f"{ended.name} has ended, the others still run. The end of its log:\n{_tail(Path(ended.log))}",
                    where=ended.log,
                    fix="`goldgate down`, then `goldgate up`",
                )
        services = Services(
            store=str(store),
            prefect_url=f"http://127.0.0.1:{choose_port('Prefect', PREFECT_PORT, prefect_port, console)}",
            mlflow_url=f"http://127.0.0.1:{choose_port('MLflow', MLFLOW_PORT, mlflow_port, console)}",
        )
        children: list[subprocess.Popen[bytes]] = []
        try:
            return _start_all(services, store, prefect_file, console, children)
        except BaseException:
            console.print("Stopping what was started.", highlight=False)
            try:
                _stop_all(store, console)
            finally:  # an interrupt may have come before what was started last was written down
                _stop([_process("", child, "") for child in children if child.poll() is None])
            raise


def down(store: Path, console: Console) -> None:
    """Cancel the runs of the workers, then end every process that `up` started in this store, and no other.

    Raises:
        ServiceError: a process could not be ended.
        StoreError: the store cannot be written.
    """
    store = store.absolute()
    if not store.is_dir():
        console.print(f"Nothing runs here ({store}).", highlight=False)
        return
    with _locked(store):
        if _read_state(store) is None:
            console.print(f"Nothing runs here ({store}).", highlight=False)
            return
        _stop_all(store, console)
        console.print("Down. Everything kept stays in the store.", highlight=False)


def worker_environment(services: Services, inherited: Mapping[str, str]) -> dict[str, str]:
    """The environment of servers and workers. A person's own Prefect profile and settings have no say in it."""
    kept = {name: value for name, value in inherited.items() if not name.startswith("PREFECT_")}
    return {
        **kept,
        "PREFECT_HOME": f"{services.store}/prefect",
        "PREFECT_API_URL": f"{services.prefect_url}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_SERVER_DEPLOYMENTS_CONCURRENCY_SLOT_WAIT_SECONDS": "10",  # until a waiting run asks for its turn again
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(_HEARTBEAT_SECONDS),
        "MLFLOW_TRACKING_URI": services.mlflow_url,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # its job runner is for LLM judges and costs 400 MB
        "DO_NOT_TRACK": "1",
        "GOLDGATE_STORE": services.store,
        "NO_PROXY": ",".join(filter(None, (kept.get("NO_PROXY"), "127.0.0.1", "localhost"))),
        "PYTHONUNBUFFERED": "1",
    }


def deploy(prefect_url: str, environment: Mapping[str, str], prefect_file: Path, log: Path) -> None:
    """Make work pools and automations, then deploy all of a prefect.yaml; doing it again changes nothing.

    Raises:
        ServiceError: Prefect refuses a part (with its answer).
    """
    user, _, password = environment.get("PREFECT_API_AUTH_STRING", "").partition(":")
    auth = httpx.BasicAuth(user, password) if user else None
    with httpx.Client(base_url=f"{prefect_url}/api", auth=auth, timeout=30.0, trust_env=False) as api:
        pools = {pool["name"] for pool in _ask(api, "POST", "/work_pools/filter", {})}
        for name, pool in _yaml("work_pools.yaml").items():
            if name in pools:
                changes = {key: pool[key] for key in ("description", "concurrency_limit")}
                _ask(api, "PATCH", f"/work_pools/{name}", {**changes, "is_paused": False})  # `down` pauses
            else:
                _ask(api, "POST", "/work_pools/", {"name": name, **pool})
        automations = {known["name"]: known["id"] for known in _ask(api, "POST", "/automations/filter", {})}
        for automation in _yaml("automations.yaml")["automations"]:
            if automation["name"] in automations:
                _ask(api, "PUT", f"/automations/{automations[automation['name']]}", automation)
            else:
                _ask(api, "POST", "/automations/", automation)
    with log.open("wb") as out:
        done = subprocess.run(
            [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(prefect_file)],
            cwd=PROJECT, env=dict(environment), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
    if done.returncode != 0:
        raise ServiceError(
            f"The flows could not be deployed. The end of the log:\n{_tail(log)}",
            where=str(prefect_file),
            fix="mend what the log names, then run `goldgate up` again",
        )


# -- starting -----------------------------------------------------------------------------------------------------


def _start_all(
    services: Services, store: Path, prefect_file: Path, console: Console, children: list[subprocess.Popen[bytes]]
) -> Services:
    """Start all of it; each process is in `children` as soon as there is one."""
    environment = worker_environment(services, os.environ)
    logs = store / "logs"
    prefect_port, mlflow_port = (url.rpartition(":")[2] for url in (services.prefect_url, services.mlflow_url))

    def start(name: str, *command: str) -> None:
        nonlocal services
        log = logs / f"{name}.log"
        children.append(_spawn([sys.executable, "-m", *command], environment, store, log))
        process = _process(name, children[-1], str(log))
        services = services.model_copy(update={"processes": (*services.processes, process)})
        _write_state(store, services)

    def wait(name: str, is_up: Callable[[], bool]) -> None:
        process = next(process for process in services.processes if process.name == name)
        with console.status(f"{name} …"):
            _wait(process, is_up)
        console.print(f"  up  {name}", highlight=False)

    start("prefect", "goldgate.prefect_server", "server", "start", "--host", "127.0.0.1", "--port", prefect_port)
    # Runs keep their files in the store under plain file URIs, with or without the server: what a run without servers
    # registered can be read through the server, and the other way round.
    start(
        "mlflow", "mlflow", "server", "--host", "127.0.0.1", "--port", mlflow_port, "--workers", "1",
        "--backend-store-uri", f"sqlite:///{store}/mlflow.db",
        "--no-serve-artifacts", "--default-artifact-root", (store / "mlartifacts").as_uri(),
    )  # fmt: skip
    wait("prefect", lambda: _answers(f"{services.prefect_url}/api/ready"))
    wait("mlflow", lambda: _answers(f"{services.mlflow_url}/health"))
    with console.status("deploying …"):
        deploy(services.prefect_url, environment, prefect_file, logs / "deploy.log")
    console.print("  up  deployments", highlight=False)
    pools = list(_yaml("work_pools.yaml"))
    for pool in pools:
        start(f"worker-{pool}", "prefect", "worker", "start", "--pool", pool, "--type", "process", "--name", pool)
    for pool in pools:
        wait(f"worker-{pool}", lambda pool=pool: _worker_online(services.prefect_url, pool))  # type: ignore[misc]
    _say_where(services, console)
    return services


def _spawn(command: list[str], environment: dict[str, str], cwd: Path, log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as out:
        # A session of its own: Ctrl-C in the terminal must reach `up`, which then ends it in order.
        return subprocess.Popen(
            command, env=environment, cwd=cwd, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip


def _process(name: str, child: subprocess.Popen[bytes], log: str) -> Process:
    return Process(name=name, pid=child.pid, started=psutil.Process(child.pid).create_time(), log=log)


def _wait(process: Process, is_up: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not is_up():
        if not _alive(process):
            what = f"{process.name} ended while it started."
        elif time.monotonic() > deadline:
            what = f"{process.name} did not answer within {_START_SECONDS:.0f} seconds."
        else:
            time.sleep(0.25)
            continue
        raise ServiceError(
            f"{what} The end of its log:\n{_tail(Path(process.log))}",
            where=process.log,
            fix="mend what the log names, then run `goldgate up` again",
        )


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5.0, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def _worker_online(prefect_url: str, pool: str) -> bool:
    try:
        answer = httpx.post(
            f"{prefect_url}/api/work_pools/{pool}/workers/filter", json={}, timeout=5.0, trust_env=False
        )
    except httpx.HTTPError:
        return False
    return answer.is_success and any(
        worker["name"] == pool and worker["status"] == "ONLINE" for worker in answer.json()
    )


def choose_port(name: str, default: int, asked: int | None, console: Console) -> int:
    """The port asked for, else the default, else (and it says so) a free one.

    Raises:
        ServiceError: the port asked for is taken.
    """
    if _is_free(asked or default):
        return asked or default
    if asked is not None:
        raise ServiceError(
            f"The port for {name} is taken.", where=f"127.0.0.1:{asked}", fix="end what uses it, or give another port"
        )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    console.print(f"Port {default} is taken by another program: {name} gets port {port}.", highlight=False)
    return port


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port just left by `down` counts as free
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _say_where(services: Services, console: Console) -> None:
    answer: httpx.Response | None
    with httpx.Client(base_url=f"{services.prefect_url}/api", timeout=30.0, trust_env=False) as api:
        try:
            answer = _request(api, "GET", "/deployments/name/retrain/complaints")
            if answer.status_code != httpx.codes.NOT_FOUND:
                _check(answer)
        except ServiceError as error:  # all is up nevertheless
            answer = None
            console.print(f"Where to start a run could not be asked ({error}).", highlight=False, markup=False)
    lines = [
        f"Prefect    {services.prefect_url}",
        f"MLflow     {services.mlflow_url}",
        f"Reports    {services.store}/runs",
        f"Logs       {services.store}/logs",
    ]
    if answer is not None and answer.is_success:  # where it is not deployed there is no page to start it from
        deployment = answer.json()["id"]
        lines += [
            f"Start here {services.prefect_url}/v2/deployments/deployment/{deployment}/run",
            "or by API:",
            f"  curl -sS -X POST {services.prefect_url}/api/deployments/{deployment}/create_flow_run"
            " -H 'content-type: application/json' -d '{}'",
        ]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


# -- stopping -----------------------------------------------------------------------------------------------------


def _stop_all(store: Path, console: Console) -> None:
    """Cancel what runs, end workers, then servers."""
    services = _read_state(store)
    if services is None:
        return
    workers = [process for process in services.processes if process.name.startswith("worker-")]
    with httpx.Client(base_url=f"{services.prefect_url}/api", timeout=10.0, trust_env=False) as api:
        ours = any(process.name == "prefect" and _alive(process) for process in services.processes)
        if ours and workers:
            _cancel_runs(api, workers, console)
        _stop(workers)
        if ours and workers:
            _settle_runs(api, console)
    _stop([process for process in services.processes if process not in workers])
    left = [process for process in services.processes if _alive(process)]
    if left:
        raise ServiceError(
            f"{', '.join(process.name for process in left)} could not be ended.",
            where=f"pid {', '.join(str(process.pid) for process in left)}",
            fix="end it by hand",
        )
    (store / _STATE).unlink(missing_ok=True)


def _runs(api: httpx.Client, *kinds: str) -> list[dict[str, Any]]:
    """Runs of the pools in states of these types."""
    query = {
        "flow_runs": {"state": {"type": {"any_": list(kinds)}}},
        "work_pools": {"name": {"any_": list(_yaml("work_pools.yaml"))}},
    }
    found: list[dict[str, Any]] = _ask(api, "POST", "/flow_runs/filter", query)
    return found


def _set_state(api: httpx.Client, run: Mapping[str, Any], kind: str, message: str) -> None:
    # By Prefect's rules a run that has ended meanwhile is not cancelled any more, and a forced one would be.
    force = kind != "CANCELLING"
    state = {"type": kind, "message": message}
    _ask(api, "POST", f"/flow_runs/{run['id']}/set_state", {"state": state, "force": force})


def _cancel_runs(api: httpx.Client, workers: list[Process], console: Console) -> None:
    """Cancel what has begun. What waits for its turn stays in the queue, except trainings of a cancelled run."""
    try:
        for pool in _yaml("work_pools.yaml"):  # or a slot that comes free here starts the next run
            _ask(api, "PATCH", f"/work_pools/{pool}", {"is_paused": True})
        for run in _runs(api, *_ACTIVE):
            console.print(f"Cancelling run {run['name']}; a new run goes on from its finished work.", highlight=False)
            _set_state(api, run, "CANCELLING", "goldgate down")
        for run in _runs(api, "SCHEDULED"):
            if run["parent_task_run_id"] is not None:
                _set_state(api, run, "CANCELLED", "goldgate down")
        deadline = time.monotonic() + _CANCEL_SECONDS
        while any(_children(worker) for worker in workers) and time.monotonic() < deadline:
            time.sleep(0.2)
    except (httpx.HTTPError, ServiceError) as error:
        console.print(f"The runs could not be cancelled in order ({error}); they are ended with their workers.")


def _settle_runs(api: httpx.Client, console: Console) -> None:
    """A run whose process ended before it could say so would stay active for ever."""
    try:
        for run in _runs(api, *_ACTIVE):
            _set_state(api, run, "CANCELLED", "goldgate down")
    except (httpx.HTTPError, ServiceError) as error:
        console.print(f"The cancelled runs could not be marked so ({error}).", highlight=False, markup=False)


def _stop(processes: list[Process]) -> None:
    """End processes and all of their children: asked first, killed after a few seconds."""
    trees: list[psutil.Process] = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # it may end by itself just now
            if _alive(process):
                parent = psutil.Process(process.pid)
                trees += [parent, *_children(process)]
                parent.terminate()
    _, left = psutil.wait_procs(trees, timeout=_STOP_SECONDS)
    for process_left in left:
        with suppress(psutil.NoSuchProcess):  # likewise, as children do when their parent is killed
            process_left.kill()
    psutil.wait_procs(left, timeout=_STOP_SECONDS)


# -- what is known -------------------------------------------------------------------------------------------------


def _whole(services: Services) -> bool:
    """Whether `up` got as far as its workers, which it starts last, when the servers answer and all is deployed."""
    wanted = {"prefect", "mlflow", *(f"worker-{pool}" for pool in _yaml("work_pools.yaml"))}
    return wanted <= {process.name for process in services.processes}


def _alive(process: Process) -> bool:
    """Whether this very process still runs; a stranger with its pid has another start time."""
    try:
        found = psutil.Process(process.pid)
        return abs(found.create_time() - process.started) < 1.0 and found.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _children(process: Process) -> list[psutil.Process]:
    """All processes that it started and they started in turn."""
    try:
        return psutil.Process(process.pid).children(recursive=True) if _alive(process) else []
    except psutil.NoSuchProcess:
        return []


def _memory(process: Process) -> int:
    """Resident bytes of a process and all below it; 0 for one that ended meanwhile."""
    total = 0
    for one in [psutil.Process(process.pid), *_children(process)] if _alive(process) else []:
        with suppress(psutil.NoSuchProcess):
            total += one.memory_info().rss
    return total


def _read_state(store: Path) -> Services | None:
    try:
        return Services.model_validate_json((store / _STATE).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise ServiceError(
            "The record of running services cannot be read.", where=str(store / _STATE),
            fix="end the processes of this store by hand, then delete the file",
        ) from error  # fmt: skip


def _write_state(store: Path, services: Services) -> None:
    part = store / f"{_STATE}.part"
    part.write_text(services.model_dump_json(indent=2), encoding="utf-8")
    part.replace(store / _STATE)


@contextmanager
def _locked(store: Path) -> Iterator[None]:
    """One `up` or `down` at a time for a store."""
    try:
        (store / "logs").mkdir(parents=True, exist_ok=True)
        lock = (store / "services.lock").open("w")
    except OSError as error:
        raise StoreError(
            f"The store cannot be written: {error.strerror or error}", where=str(error.filename or store),
            fix="allow writing, or give --store another folder",
        ) from error  # fmt: skip
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ServiceError(
                "Another `goldgate up` or `goldgate down` is at work here.",
                where=str(store),
                fix="wait until it is done",
            ) from error
        yield


def _tail(log: Path, lines: int = 15) -> str:
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        return f"(no log: {error})"
    return "\n".join(f"    {line[:400]}" for line in text.splitlines()[-lines:])


def _yaml(name: str) -> Any:
    return yaml.safe_load((DEPLOYMENTS / name).read_text(encoding="utf-8"))


def _ask(api: httpx.Client, method: str, path: str, record: Any) -> Any:
    """What Prefect answers, as JSON.

    Raises:
        ServiceError: it refuses, with its answer, or goes on being too busy.
    """
    answer = _request(api, method, path, record)
    _check(answer)
    return answer.json() if answer.content else None


def _request(api: httpx.Client, method: str, path: str, record: Any = None) -> httpx.Response:
    """What Prefect answers, whatever it is.

    A server that is busy refuses with 503 or lets one wait; Prefect's own clients ask again, and so does this. What
    changes something is not asked again after a wait, since it may have been done.

    Raises:
        ServiceError: it does not answer in time.
    """
    for pause in (*_PAUSES, None):
        try:
            answer = api.request(method, path, json=record)
        except httpx.TimeoutException as error:
            if method != "GET" or pause is None:
                raise ServiceError(
                    f"Prefect does not answer {method} {path} in time.",
                    where=str(error.request.url),
                    fix="see prefect.log in the store's folder `logs`; if the machine is busy, try again later",
                ) from error
        else:
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE or pause is None:
                break
        time.sleep(pause)
    return answer


def _check(answer: httpx.Response) -> None:
    """Refuse what Prefect refuses.

    Raises:
        ServiceError: it refuses, with its answer.
    """
    if not answer.is_success:
        path = answer.url.path.removeprefix("/api")
        raise ServiceError(
            f"Prefect refuses {answer.request.method} {path}: HTTP {answer.status_code} {answer.text[:500]}",
            where=str(answer.url),
            fix="see prefect.log in the store's folder `logs`, and mend what it names in deployments/",
        )
