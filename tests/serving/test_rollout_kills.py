"""SIGKILL between any two changes that a rollout or a rollback makes: the next run finishes or undoes it.

Real processes: the gateway with fake engines, a registry on SQLite, Prefect's server, and the one that is killed.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from prefect.settings import PREFECT_API_URL

from tasks.contracts.serving import EngineSpec, EngineState, Phase, VersionRef
from tasks.contracts.spec import CanarySpec
from tasks.gate import selftest
from tasks.registry.serving_aliases import move_champion, resolve_version
from tasks.serving.client import GatewayClient, gateway_of
from tests.prefect_server import prefect_server
from tests.serving.fake_engine import ROOT, Behaviour, FakeCommand
from tests.serving.gateway_process import end_engines, gateway_process, running_gateway, wait_for_address
from tests.serving.promoted import ANSWERS, OTHERWISE, Shop
from tests.serving.records import rollout

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

# What each makes, in this order; the tests say so first, so that none is passed over.
ROLLOUT = [
    "begin checking", "start_engine", "write checked", "write switching", "move_traffic", "set_registered_model_alias",
    "set_registered_model_alias", "delete_registered_model_alias", "write switched", "end_engine", "write done",
]  # fmt: skip
REFUSAL = [
    "begin checking", "start_engine", "write checking", "end_engine", "set_model_version_tag",
    "delete_registered_model_alias", "write refused",
]  # fmt: skip
# With a canary in between.
TRIED = [*ROLLOUT[:3], "begin_canary", "write checked", *ROLLOUT[3:]]
TAKEN_BACK = [*ROLLOUT[:3], "begin_canary", "write checked", "end_canary", *REFUSAL[3:]]
ROLLBACK = [
    "roll_back", "set_model_version_tag", "set_registered_model_alias", "set_registered_model_alias",
    "write switched", "write done",
]  # fmt: skip


class Task:
    """A task whose newest version waits, while the one before it answers and the one before that is kept warm."""

    def __init__(self, shop: Shop, gateway: GatewayClient, folder: Path, name: str) -> None:
        self.shop, self.gateway, self.folder, self.name = shop, gateway, folder, name
        self.canary: CanarySpec | None = None
        folder.mkdir(exist_ok=True)

    def set_up(self, versions: int, *, waits: bool = True) -> None:
        """Have so many versions; all but one that waits are in service or were."""
        for number in range(1, versions + 1):
            self.shop.promote(self.name, f"note-{number}")
            if number == versions and waits:
                break
            version = resolve_version(self.name, None, self.shop.execution)
            now = self.gateway.traffic(self.name)
            change = rollout(version, was=now and now.live, was_previous=now and now.previous)
            self.start(version)
            revision = now.revision if now is not None else 0
            self.gateway.move_traffic(self.name, version, change.was, from_revision=revision, by="a test", why="set up")
            move_champion(change, self.shop.execution)
            if change.was_previous is not None:
                self.gateway.end_engine(change.was_previous.engine, 0.0)

    def start(self, version: VersionRef) -> None:
        self.gateway.start_engine(version, EngineSpec())
        until = time.monotonic() + 60.0
        while (found := self.gateway.engine(version.engine)) is None or found.state is not EngineState.READY:
            assert time.monotonic() < until, found
            time.sleep(0.05)

    def run(self, what: str = "rollout", count: int = -1) -> int:
        """The exit status: -9 for SIGKILL."""
        spec = self.folder / "spec.json"
        spec.write_text(self.shop.rollout(self.name, smoke_items=3, canary=self.canary).model_dump_json())
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PREFECT_API_URL": str(PREFECT_API_URL.value())}
        command = [sys.executable, "-m", "tests.serving.rollout_child", what, str(spec), str(count),
                   str(self.folder / "journal")]  # fmt: skip
        with (self.folder / "child.log").open("w") as log:
            return subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, check=False).returncode

    @property
    def log(self) -> str:
        return (self.folder / "child.log").read_text()

    @property
    def made(self) -> list[str]:
        return (self.folder / "journal").read_text().splitlines()

    def check_in_step(self, where: str) -> tuple[str, str | None]:
        """One champion, which is what answers; the engines of traffic run and no others; nothing is left open."""
        traffic = self.gateway.traffic(self.name)
        assert traffic is not None, where
        aliases = self.shop.aliases(self.name)
        previous = traffic.previous.version if traffic.previous else None
        assert (aliases.get("champion"), aliases.get("previous")) == (traffic.live.version, previous), where
        assert self.gateway.open_intent(self.name) is None, where
        until = time.monotonic() + 20.0
        while self.running() != {traffic.live.version, previous} - {None} and time.monotonic() < until:
            time.sleep(0.1)  # an engine that is drained takes its time
        assert self.running() == {traffic.live.version, previous} - {None}, where
        body = {"model": self.name, "messages": [{"role": "user", "content": "animal 3"}]}
        answer = httpx.post(f"{self.gateway.url}/v1/chat/completions", json=body, timeout=30.0)
        assert answer.headers["x-goldgate-version"] == traffic.live.label, where
        return traffic.live.version, previous

    def running(self) -> set[str]:
        over = (EngineState.STOPPED, EngineState.FAILED)
        return {one.version.version for one in self.gateway.engines(self.name) if one.state not in over}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Shop]:
    with prefect_server() as patched:
        patched.setattr(selftest, "HISTORIES", 60)
        patched.setattr(selftest, "HISTORIES_DEAR", 10)
        yield Shop(tmp_path_factory.mktemp("shop"), tiny_model)


@pytest.fixture(scope="module")
def fakes(shop: Shop) -> FakeCommand:
    return FakeCommand(shop.root / "fakes", Behaviour(answers=ANSWERS))


@pytest.fixture
def gateway(shop: Shop, fakes: FakeCommand) -> Iterator[GatewayClient]:
    with running_gateway(Path(shop.execution.store), fakes), gateway_of(shop.execution) as client:
        yield client


@pytest.fixture
def task(request: pytest.FixtureRequest, shop: Shop, gateway: GatewayClient, tmp_path: Path) -> Task:
    name = "".join(c if c.isalnum() else "-" for c in request.node.name.lower())[:60].strip("-")
    return Task(shop, gateway, tmp_path / "task", name)


@pytest.mark.parametrize("done", range(1, len(ROLLOUT) + 1), ids=lambda done: f"{done}-{ROLLOUT[done - 1]}")
def test_a_rollout_killed_anywhere_is_finished_or_undone(task: Task, done: int) -> None:
    task.set_up(3)
    assert task.run(count=done) == -signal.SIGKILL, task.log
    assert task.made == ROLLOUT[:done]
    where = f"killed after {ROLLOUT[done - 1]}"
    status = task.run()
    if done < len(ROLLOUT):
        assert (status, "ended: Rolled out" in task.log) == (0, True), task.log
    else:  # all had been done; a run of its own finds nothing that waits
        assert "No version of" in task.log, task.log
    assert task.check_in_step(where) == ("3", "2")
    assert task.shop.aliases(task.name) == {"champion": "3", "previous": "2"}, where
    phases = [one.phase for one in task.gateway.history(task.name)]
    assert phases == ([Phase.DONE, Phase.UNDONE] if done <= ROLLOUT.index("write checked") + 1 else [Phase.DONE]), where


@pytest.mark.parametrize("done", range(1, len(REFUSAL) + 1), ids=lambda done: f"{done}-{REFUSAL[done - 1]}")
def test_a_refusal_killed_anywhere_leaves_the_old_one(task: Task, fakes: FakeCommand, done: int) -> None:
    task.set_up(2)
    fakes.behave(f"{task.name}@2", Behaviour(answers=OTHERWISE))
    assert task.run(count=done) == -signal.SIGKILL, task.log
    assert task.made == REFUSAL[:done]
    status = task.run()
    if done < len(REFUSAL):
        assert (status, "ended: Refused" in task.log) == (0, True), task.log
    assert task.check_in_step(f"killed after {REFUSAL[done - 1]}") == ("1", None)
    assert task.shop.aliases(task.name) == {"champion": "1"}
    assert "goldgate.rollout_refused" in task.shop.tags(task.name, "2")
    assert task.gateway.history(task.name)[0].phase is Phase.REFUSED


@contextmanager
def asking(task: Task, while_tried: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Requests of ever new users; once a version is on trial, `while_tried` has been called before the next one."""
    over = threading.Event()

    def ask() -> None:
        number, told = 0, False
        while not over.wait(0.02):
            number += 1
            traffic = task.gateway.traffic(task.name)
            if traffic is not None and traffic.canary is not None and not told:
                while_tried()
                told = True
            body = {
                "model": task.name, "user": f"user {number}", "messages": [{"role": "user", "content": "animal 3"}],
            }  # fmt: skip
            httpx.post(f"{task.gateway.url}/v1/chat/completions", json=body, timeout=30.0)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


CANARY = CanarySpec(share=0.5, slow_ms=30_000.0, min_requests=3, min_hours=0.0, max_hours=0.1)


@pytest.mark.parametrize("done", range(4, 8), ids=lambda done: f"{done}-{TRIED[done - 1]}")
def test_a_trial_killed_anywhere(task: Task, done: int) -> None:
    task.set_up(3)
    task.canary = CANARY
    with asking(task):
        assert task.run(count=done) == -signal.SIGKILL, task.log
        assert task.made == TRIED[:done]
        traffic = task.gateway.traffic(task.name)
        assert traffic is not None
        assert (traffic.canary is not None) == (done < 7)  # its users go on being answered
        status = task.run()
    assert (status, "ended: Rolled out" in task.log) == (0, True), task.log
    assert task.check_in_step(f"killed after {TRIED[done - 1]}") == ("3", "2")
    phases = [one.phase for one in task.gateway.history(task.name)]
    assert phases == ([Phase.DONE, Phase.UNDONE] if done < 6 else [Phase.DONE])
    trial = task.gateway.history(task.name)[0].trial
    assert trial is not None
    assert (trial.state.canary_requests >= 3, trial.state.canary_failed, trial.finding.abort) == (True, 0, False)


@pytest.mark.parametrize("done", range(5, 8), ids=lambda done: f"{done}-{TAKEN_BACK[done - 1]}")
def test_a_bad_trial_killed_anywhere(task: Task, fakes: FakeCommand, done: int) -> None:
    task.set_up(2)
    task.canary = CANARY.model_copy(update={"min_requests": 500})
    with asking(task, lambda: fakes.behave(f"{task.name}@2", Behaviour(status=500))):
        assert task.run(count=done) == -signal.SIGKILL, task.log
        assert task.made == TAKEN_BACK[:done]
        assert task.run() == 0, task.log
    assert "ended: Refused" in task.log, task.log
    assert task.check_in_step(f"killed after {TAKEN_BACK[done - 1]}") == ("1", None)
    assert task.shop.aliases(task.name) == {"champion": "1"}
    (refused,) = task.gateway.history(task.name)
    assert refused.phase is Phase.REFUSED
    assert refused.problems[0].startswith("With the canary requests fail at least ")
    assert refused.trial is not None
    assert refused.trial.finding.abort


@pytest.mark.parametrize("done", range(1, len(ROLLBACK) + 1), ids=lambda done: f"{done}-{ROLLBACK[done - 1]}")
def test_a_rollback_killed_anywhere_is_finished(task: Task, done: int) -> None:
    task.set_up(2, waits=False)
    assert task.run("rollback", done) == -signal.SIGKILL, task.log
    assert task.made == ROLLBACK[:done]
    traffic = task.gateway.traffic(task.name)
    assert traffic is not None
    assert traffic.live.version == "1"  # it answers, whatever became of the rest
    assert task.run("recover") == 0, task.log
    assert task.check_in_step(f"killed after {ROLLBACK[done - 1]}") == ("1", "2")
    assert "it is wrong" in task.shop.tags(task.name, "2")["goldgate.rolled_back"]
    assert [one.phase for one in task.gateway.history(task.name)] == [Phase.DONE]


def test_two_rollouts_at_once_make_one_champion(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROLLOUT_CHILD_LEASE", "30.0")  # its holder lives: nobody has to wait for it
    task.set_up(2)
    other = Task(task.shop, task.gateway, task.folder.with_name("other"), task.name)
    ended: list[int] = []
    both = [threading.Thread(target=lambda one=one: ended.append(one.run())) for one in (task, other)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    logs = task.log + other.log
    assert logs.count("ended: Rolled out") == 1, logs
    assert sorted(ended) == [0, 1]  # the other one was refused, or waited until nothing waited for it any more
    assert any(said in logs for said in ("No version of", "is under way", "Another change has ended since")), logs
    assert task.check_in_step("two at once") == ("2", "1")
    assert [one.phase for one in task.gateway.history(task.name)] == [Phase.DONE]


def test_a_gateway_killed_under_a_rollout_is_waited_for(
    tmp_path: Path, tiny_model: Path, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROLLOUT_CHILD_LEASE", "30.0")  # its holder lives: nobody has to wait for it
    alone = Shop(tmp_path / "alone", tiny_model)
    slow = FakeCommand(tmp_path / "fakes", Behaviour(answers=ANSWERS))
    store = Path(alone.execution.store)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        with gateway_process(store, slow, port) as first:
            wait_for_address(store, first)
            with gateway_of(alone.execution) as gateway:
                task = Task(alone, gateway, tmp_path / "task", "orphan")
                task.set_up(2)
                slow.behave("orphan@2", Behaviour(answers=ANSWERS, start_seconds=4.0))
                rolling = threading.Thread(target=task.run)
                rolling.start()
                until = time.monotonic() + 60.0
                while task.running() != {"1", "2"} and time.monotonic() < until:
                    time.sleep(0.05)
            first.kill()
            first.wait()
        with gateway_process(store, slow, port) as second:
            wait_for_address(store, second)
            rolling.join()
            assert "ended: Rolled out" in task.log, task.log
            with gateway_of(alone.execution) as gateway:
                assert Task(alone, gateway, task.folder, "orphan").check_in_step("gateway killed") == ("2", "1")
    finally:
        end_engines(slow)
