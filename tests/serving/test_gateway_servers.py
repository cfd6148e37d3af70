"""The gateway as a process, with engines as processes: signals, kills, restarts, a full disk; what callers see."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tasks.contracts.errors import ServiceError
from tasks.contracts.serving import EngineSpec, EngineState, GatewaySpec, LogSpec, VersionRef
from tasks.contracts.spec import ExecutionSpec
from tasks.serving.client import GatewayClient
from tasks.serving.gateway.server import run_gateway
from tasks.serving.request_log import read_log
from tests.serving.fake_engine import ROOT, Behaviour, FakeCommand
from tests.serving.gateway_process import wait_for_address
from tests.serving.records import version

pytestmark = pytest.mark.services

SEVEN, EIGHT = version(7), version(8)
SPEC = EngineSpec(start_seconds=60.0)


def until(what: str, is_so: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > end:
            pytest.fail(f"{what} did not happen")
        time.sleep(0.02)


class Served:
    """A gateway in a process of its own, from its store; it can be started again there."""

    def __init__(self, store: Path, fakes: FakeCommand, **spec: Any) -> None:
        self.store, self.fakes, self.spec = store, fakes, spec
        self.log = store / "gateway.log"
        self.url = ""

    def start(self, *, models: str = "none", environment: dict[str, str] | None = None) -> None:
        spec = GatewaySpec(port=0, fill_in=False, execution=ExecutionSpec(store=str(self.store)), **self.spec)
        arguments = [spec.model_dump_json(), str(self.fakes.folder), models]
        (self.store / "serving").mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.serving.gateway_program", *arguments], cwd=ROOT, stdout=log, stderr=log,
                env=os.environ | {"PYTHONPATH": str(ROOT)} | (environment or {}),
            )  # fmt: skip
        self.url = wait_for_address(self.store, self.process)

    @property
    def admin(self) -> GatewayClient:
        return GatewayClient(self.url, (self.store / "serving" / "admin.key").read_text().strip())

    def run(self, ref: VersionRef) -> None:
        """Have an engine run, and wait until it is ready."""
        with self.admin as admin:
            admin.start_engine(ref, SPEC)
            until("ready", lambda: admin.engine(ref.engine).state is EngineState.READY)  # type: ignore[union-attr]

    def live(self, ref: VersionRef, previous: VersionRef | None = None) -> None:
        with self.admin as admin:
            now = admin.traffic(ref.name)
            admin.move_traffic(
                ref.name, ref, previous, from_revision=now.revision if now else 0, by="test", why="test"
            )  # fmt: skip

    def engine(self, ref: VersionRef) -> psutil.Process:
        """The process of an engine."""
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if (
                    process.environ().get("FAKE_ENGINE_FOLDER") == str(self.fakes.folder)
                    and ref.label in process.cmdline()
                ):
                    return process
        raise AssertionError(f"no engine of {ref.label} runs")

    def ask(self, text: str = "hello", model: str = "complaints", **fields: Any) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": text}], **fields}
        url = f"{self.url}/v1/chat/completions"
        return httpx.post(url, json=body, timeout=60.0, trust_env=False, verify=False)  # loading certificates is slow

    def under_way(self, count: int) -> None:
        """Wait until so many requests are being answered."""

        def are() -> bool:
            with self.admin as admin:
                return sum(engine.under_way for engine in admin.engines("complaints")) == count

        until(f"{count} under way", are)

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


@pytest.fixture
def fakes(tmp_path: Path) -> Iterator[FakeCommand]:
    """Fake engines; all that run at the end of the test are killed."""
    command = FakeCommand(tmp_path / "fakes")
    yield command
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("FAKE_ENGINE_FOLDER") == str(command.folder):
                process.kill()


@pytest.fixture
def served(tmp_path: Path, fakes: FakeCommand) -> Iterator[Served]:
    one = Served(tmp_path / "store", fakes, log=LogSpec(to="parquet"), shutdown_seconds=60.0)
    yield one
    if one.process.poll() is None:
        one.process.kill()
        one.process.wait()


def text_of(answer: httpx.Response) -> str:
    return str(answer.json()["choices"][0]["message"]["content"])


def test_sigterm_with_requests_in_flight_cuts_none_and_engines_go_on(served: Served, fakes: FakeCommand) -> None:
    served.start()
    served.run(SEVEN)
    served.live(SEVEN)
    engine = served.engine(SEVEN)
    go = served.store / "go"
    fakes.behave("complaints@7", Behaviour(waits_for=str(go), token_delay=0.1))
    with ThreadPoolExecutor(20) as clients:
        wholes = [clients.submit(served.ask, f"ann {n}") for n in range(10)]
        streams = [clients.submit(served.ask, "one two three", stream=True) for _ in range(10)]
        served.under_way(20)
        served.process.send_signal(signal.SIGTERM)
        until("not ready", lambda: httpx.get(f"{served.url}/ready", trust_env=False).status_code == 503)
        late = served.ask()
        assert (late.status_code, late.json()["error"]["code"]) == (503, "shutting_down")
        assert int(late.headers["retry-after"]) > 0
        go.touch()
        assert [text_of(one.result()) for one in wholes] == [f"complaints@7: ann {n}" for n in range(10)]
        for one in streams:
            assert one.result().text.endswith("data: [DONE]\n\n")
    assert served.process.wait(30) == 0
    with pytest.raises(httpx.ConnectError):
        served.ask()
    assert engine.is_running()
    kept = [row for row in read_log(served.store / "serving" / "request_log") if row["status"] == 200]
    assert len(kept) == 20
    assert {row["answer"] for row in kept if not row["stream"]} == {f"complaints@7: [NAME] {n}" for n in range(10)}
    assert {row["answer"] for row in kept if row["stream"]} == {"complaints@7: one two three"}

    fakes.behave("complaints@7", Behaviour())
    served.start()  # the next one finds traffic and engine as they were
    assert text_of(served.ask()) == "complaints@7: hello"
    assert served.engine(SEVEN).pid == engine.pid
    assert served.end() == 0


def test_an_engine_killed_while_serving(served: Served, fakes: FakeCommand) -> None:
    served.start()
    served.run(SEVEN)
    served.live(SEVEN)
    fakes.behave("complaints@7", Behaviour(token_delay=30.0))
    with ThreadPoolExecutor(2) as clients:
        stream = clients.submit(served.ask, "one two three", stream=True)
        served.under_way(1)
        fakes.behave("complaints@7", Behaviour(delay=30.0))
        whole = clients.submit(served.ask)
        served.under_way(2)
        until(
            "both heard",
            lambda: any(one["messages"][-1]["content"] == "hello" for one in fakes.requests("complaints@7")),
        )
        served.engine(SEVEN).kill()
        assert (whole.result().status_code, whole.result().json()["error"]["code"]) == (502, "engine_failed")
        last = stream.result().text.strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_failed"
    fakes.behave("complaints@7", Behaviour())
    answers: list[httpx.Response] = []

    def answered() -> bool:
        answers.append(served.ask())
        return answers[-1].status_code == 200

    until("an answer of the engine that was started anew", answered)
    for one in answers[:-1]:
        assert one.status_code in (502, 503)
        assert "retry-after" in one.headers
    assert httpx.get(f"{served.url}/health", trust_env=False).status_code == 200
    assert served.end() == 0


def test_a_gateway_that_is_killed_loses_nothing(served: Served) -> None:
    served.start()
    served.run(SEVEN)
    served.run(EIGHT)
    served.live(SEVEN)
    served.live(EIGHT, SEVEN)
    served.process.kill()
    served.process.wait()
    served.start()
    assert text_of(served.ask()) == "complaints@8: hello"
    with served.admin as admin:
        rolled_back = admin.roll_back("complaints", by="ann", why="nonsense", holder="ann@here")
    assert rolled_back.traffic.revision == 3
    assert text_of(served.ask()) == "complaints@7: hello"
    assert served.end() == 0


def test_without_its_registry_the_last_known_good_goes_on(served: Served) -> None:
    served.start()
    served.run(SEVEN)
    served.live(SEVEN)
    assert served.end() == 0
    served.start(models="registry", environment={"MLFLOW_TRACKING_URI": "http://127.0.0.1:1"})
    assert text_of(served.ask()) == "complaints@7: hello"
    assert httpx.get(f"{served.url}/ready", trust_env=False).status_code == 200
    with served.admin as admin:
        admin.start_engine(EIGHT, SPEC)
        until("refused", lambda: admin.engine(EIGHT.engine).state is EngineState.FAILED)  # type: ignore[union-attr]
    assert text_of(served.ask()) == "complaints@7: hello"
    assert served.end() == 0


def test_a_full_disk_under_the_log_costs_the_log_alone(served: Served) -> None:
    served.start()
    served.run(SEVEN)
    served.live(SEVEN)
    gateway = psutil.Process(served.process.pid)
    gateway.rlimit(psutil.RLIMIT_FSIZE, (60_000, psutil.RLIM_INFINITY))  # no file of it grows beyond, as on a full disk
    noise = os.urandom(80_000).hex()  # does not compress below the limit
    assert served.ask(noise).status_code == 200
    assert served.ask().status_code == 200
    assert served.end() == 0
    said = served.log.read_text()
    assert said.count("the request log cannot be written, answers go on: File too large") == 1
    assert "2 requests are missing in the request log" in said
    assert list(read_log(served.store / "serving" / "request_log")) == []


def test_a_second_gateway_is_refused_its_folder_and_its_port(
    served: Served, fakes: FakeCommand, tmp_path: Path
) -> None:
    served.start()
    with pytest.raises(ServiceError, match="Another `goldgate serve` runs from this folder"):
        run_gateway(
            GatewaySpec(port=0, execution=ExecutionSpec(store=str(served.store)), log=LogSpec(to="none")),
            fakes, mask=None,
        )  # fmt: skip
    port = int(served.url.rsplit(":", 1)[1])
    with pytest.raises(ServiceError, match="cannot listen there: Address already in use"):
        run_gateway(
            GatewaySpec(port=port, execution=ExecutionSpec(store=str(tmp_path / "other"))), fakes, mask=None
        )  # fmt: skip
    assert json.loads((served.store / "serving" / "gateway.json").read_text())["pid"] == served.process.pid
    assert served.end() == 0


@pytest.mark.slow
def test_swaps_and_a_rollback_between_processes_under_fifty_clients(served: Served, fakes: FakeCommand) -> None:
    for one in (SEVEN, EIGHT):
        fakes.behave(one.label, Behaviour(delay=0.05, token_delay=0.01))
    served.start()
    served.run(SEVEN)
    served.run(EIGHT)
    served.live(SEVEN)
    ended, failed, labels, asked = threading.Event(), [], set(), [0]

    def client(number: int) -> None:
        with httpx.Client(base_url=served.url, timeout=60.0, trust_env=False) as http:
            while not ended.is_set():
                body = {
                    "model": "complaints", "messages": [{"role": "user", "content": "one two"}],
                    "stream": number % 2 == 0,
                }  # fmt: skip
                answer = http.post("/v1/chat/completions", json=body)
                label = answer.headers.get("x-goldgate-version", "")
                labels.add(label)
                asked[0] += 1
                other = ({"complaints@7", "complaints@8"} - {label}).pop()
                if answer.status_code != 200 or label not in answer.text or other in answer.text:
                    failed.append((answer.status_code, label, answer.text[:300]))

    with ThreadPoolExecutor(50) as clients:
        for number in range(50):
            clients.submit(client, number)
        try:
            for live, previous in ((EIGHT, SEVEN), (SEVEN, EIGHT), (EIGHT, SEVEN)):
                before = asked[0]
                until("a hundred more", lambda before=before: asked[0] > before + 100)  # type: ignore[misc]
                served.live(live, previous)
            with served.admin as admin:
                rolled_back = admin.roll_back("complaints", by="ann", why="nonsense", holder="ann@here")
            assert rolled_back.traffic.live == SEVEN
            with served.admin as admin:
                admin.write(rolled_back.intent.model_copy(update={"phase": "done"}))
            before = asked[0]
            until("a hundred more", lambda: asked[0] > before + 100)
        finally:
            ended.set()
    assert failed == []
    assert labels == {"complaints@7", "complaints@8"}
    assert served.end() == 0
