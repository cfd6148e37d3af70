"""Engines as processes: started, asked, watched, adopted, started anew and ended; a fake server in vLLM's place."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain, repeat
from pathlib import Path

import httpx
import psutil
import pytest

from tasks.contracts.errors import ModelError, ServiceError, SpecError
from tasks.contracts.prompt import Decoding, Prompt
from tasks.contracts.serving import EngineSpec, EngineState, EngineStatus, VersionRef
from tasks.contracts.spec import ExecutionSpec
from tasks.serving.durable import write_durably
from tasks.serving.host import EngineHost, Pace, end_engines
from tasks.serving.process import EngineProcess, _after_boot, end_of_log
from tests.serving.fake_engine import ROOT, Behaviour, FakeCommand

QUICK = Pace(look=0.05, probe=0.2, probe_timeout=5.0, retry=0.02, back_off=(0.0, 0.0), stable=600.0, end=5.0)
SPEC = EngineSpec(start_seconds=120.0)  # of a machine that has other things to do


def version(number: str = "7", name: str = "complaints") -> VersionRef:
    return VersionRef(
        name=name,
        version=number,
        digest=f"{int(number):064x}",
        uri=f"models:/{name}/{number}",
        prompt=Prompt(system="Answer with one label."),
        decoding=Decoding(max_new_tokens=8, choices=("card", "debt")),
    )


def no_model(version: VersionRef, spec: EngineSpec) -> Path:
    return Path("/model")


@pytest.fixture
def fakes(tmp_path: Path) -> FakeCommand:
    return FakeCommand(tmp_path / "fakes")


Hosts = Callable[..., EngineHost]


@pytest.fixture
def hosts(tmp_path: Path, fakes: FakeCommand) -> Iterator[Hosts]:
    """Makes hosts on one folder; at the end all that they started is killed."""
    made: list[EngineHost] = []

    def make(pace: Pace = QUICK, prepare: Callable[[VersionRef, EngineSpec], Path] = no_model) -> EngineHost:
        made.append(EngineHost(tmp_path / "serving", ExecutionSpec(), fakes, prepare=prepare, pace=pace))
        return made[-1]

    yield make
    for host in made:
        host.close()
    for process in engines_of(fakes):
        with suppress(ProcessLookupError):  # it has just ended
            os.killpg(process.pid, signal.SIGKILL)


def engines_of(fakes: FakeCommand) -> list[psutil.Process]:
    """Engines that run for this test, however they were started."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("FAKE_ENGINE_FOLDER") == str(fakes.folder) and process.status() != "zombie":
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 150.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for: {what}"
        time.sleep(0.02)


def wait_for_state(host: EngineHost, engine: str, *states: EngineState) -> EngineStatus:
    wait_for(lambda: status_of(host, engine).state in states, f"{engine} to be {states}")
    return status_of(host, engine)


def status_of(host: EngineHost, engine: str) -> EngineStatus:
    status = host.status(engine)
    assert status is not None
    return status


def started(host: EngineHost, ref: VersionRef) -> EngineStatus:
    host.start(ref, SPEC)
    status = wait_for_state(host, ref.engine, EngineState.READY, EngineState.FAILED)
    assert status.state is EngineState.READY, status.why
    return status


def ask(host: EngineHost, ref: VersionRef) -> str:
    endpoint = host.endpoint(ref.engine)
    assert endpoint is not None
    reply = httpx.post(
        f"{endpoint.url}/chat/completions",
        json={"model": endpoint.label, "messages": [{"role": "user", "content": "hi"}]},
        headers={"Authorization": f"Bearer {endpoint.key}"},
        trust_env=False,
        timeout=60.0,
    )
    return str(reply.json()["choices"][0]["message"]["content"])


def test_an_engine_is_started_answers_and_is_ended(hosts: Hosts, fakes: FakeCommand, tmp_path: Path) -> None:
    host, ref = hosts(), version()
    first = host.start(ref, SPEC)
    assert (first.name, first.state) == ("complaints-7-00000000", EngineState.STARTING)
    assert host.endpoint(ref.engine) is None

    status = wait_for_state(host, ref.engine, EngineState.READY)
    assert status.ready_seconds is not None
    assert status.ready_seconds > 0
    assert status.memory_bytes > 1_000_000
    assert ask(host, ref) == "complaints@7: hi"
    (process,) = engines_of(fakes)
    endpoint = host.endpoint(ref.engine)
    assert endpoint is not None
    assert endpoint.key not in " ".join(process.cmdline())
    key_file = tmp_path / "serving" / "engines" / f"{ref.engine}.key"
    assert key_file.stat().st_mode & 0o777 == 0o600
    assert endpoint.key not in (tmp_path / "serving" / "engines" / f"{ref.engine}.json").read_text()
    probe = fakes.requests("complaints@7")[0]
    assert probe["structured_outputs"] == {"choice": ["card", "debt"]}
    assert probe["logprobs"] is True

    assert host.stop(ref.engine, 0.0, lambda: 0).state is EngineState.DRAINING
    wait_for_state(host, ref.engine, EngineState.STOPPED)
    assert host.endpoint(ref.engine) is None
    assert engines_of(fakes) == []
    assert [status.name for status in host.statuses()] == [ref.engine]


def test_a_start_that_is_repeated_starts_nothing_more(hosts: Hosts, fakes: FakeCommand) -> None:
    host, ref = hosts(), version()
    for _ in range(3):
        host.start(ref, SPEC)
    started(host, ref)
    assert host.start(ref, SPEC).state is EngineState.READY
    assert len(engines_of(fakes)) == 1
    with pytest.raises(ServiceError, match="runs with other settings"):
        host.start(ref, SPEC.model_copy(update={"eager": True}))


@pytest.mark.parametrize(
    ("behaviour", "spec", "reason"),
    [
        (Behaviour(start_exit=3), SPEC, r"ended while it started \(exit status 3\)[\s\S]*no such architecture"),
        (Behaviour(dies_after=0), SPEC, r"ended while it started \(exit status 9\)[\s\S]*dies as it was told"),
        (Behaviour(poisoned="empty"), SPEC, "started, but its answer is empty"),
        (Behaviour(poisoned="null"), SPEC, "started, but its answer is empty"),
        (Behaviour(poisoned="nan"), SPEC, "started, but it replies HTTP 500"),
        (Behaviour(poisoned="html"), SPEC, "started, but its reply holds no answer"),
        (Behaviour(answers={"Hello": "neither"}), SPEC, "its answer is none of the choices: 'neither'"),
        (
            Behaviour(healthy=False),
            EngineSpec(start_seconds=10),  # it has to listen by then
            "did not answer within 10 s; at last: it replies HTTP 503",
        ),
        (Behaviour(start_seconds=60), EngineSpec(start_seconds=1), "within 1 s; at last: nothing listens there"),
    ],
)
def test_an_engine_that_never_answers_fails_with_the_reason(
    hosts: Hosts, fakes: FakeCommand, behaviour: Behaviour, spec: EngineSpec, reason: str
) -> None:
    fakes.behave("complaints@7", behaviour)
    host, ref = hosts(), version()
    host.start(ref, spec)
    status = wait_for_state(host, ref.engine, EngineState.FAILED, EngineState.READY)
    assert status.state is EngineState.FAILED
    assert status.why is not None
    assert re.search(reason, status.why), status.why
    assert status.ready_seconds is None
    assert host.endpoint(ref.engine) is None
    assert engines_of(fakes) == []

    fakes.behave("complaints@7", Behaviour())
    started(host, ref)
    assert status_of(host, ref.engine).why is None


def test_a_model_that_is_refused_is_not_started(hosts: Hosts, fakes: FakeCommand) -> None:
    def prepare(version: VersionRef, spec: EngineSpec) -> Path:
        raise ModelError("model.norm.weight is missing", where="here", fix="make it anew")

    host, ref = hosts(prepare=prepare), version()
    host.start(ref, SPEC)
    status = wait_for_state(host, ref.engine, EngineState.FAILED)
    assert "model.norm.weight is missing" in str(status.why)
    assert engines_of(fakes) == []


def test_copies_of_models_go_with_the_last_engine_that_needs_them(hosts: Hosts, tmp_path: Path) -> None:
    models = tmp_path / "serving" / "models"

    def prepare(version: VersionRef, spec: EngineSpec) -> Path:
        (models / version.digest).mkdir(parents=True, exist_ok=True)
        return models / version.digest

    first = hosts(prepare=prepare)
    old, new = version("7"), version("8")
    started(first, old)
    started(first, new)
    first.stop(old.engine, 0.0, lambda: 0)
    wait_for_state(first, old.engine, EngineState.STOPPED)
    wait_for(lambda: [folder.name for folder in models.iterdir()] == [new.digest], "the old copy to go")
    (models / ".part-half-made").mkdir()
    first.close()
    second = hosts(prepare=prepare)
    assert [folder.name for folder in models.iterdir()] == [new.digest]
    second.stop(new.engine, 0.0, lambda: 0)
    wait_for(lambda: list(models.iterdir()) == [], "the new copy to go")


def test_an_error_that_nobody_thought_of_is_a_failure_too(hosts: Hosts) -> None:
    def prepare(version: VersionRef, spec: EngineSpec) -> Path:
        raise OSError(28, "No space left on device")

    host, ref = hosts(prepare=prepare), version()
    host.start(ref, SPEC)
    assert "No space left on device" in str(wait_for_state(host, ref.engine, EngineState.FAILED).why)


@pytest.mark.parametrize("name", ["../outside", "a/b", "a.b", ""])
def test_a_name_that_is_no_file_name_is_refused(hosts: Hosts, name: str) -> None:
    with pytest.raises(SpecError, match="cannot be the name of an engine"):
        hosts().start(version(name=name), SPEC)


def test_an_engine_that_dies_while_it_serves_is_started_anew(hosts: Hosts, fakes: FakeCommand) -> None:
    host, ref = hosts(), version()
    started(host, ref)
    (process,) = engines_of(fakes)
    before = host.endpoint(ref.engine)

    process.kill()
    wait_for(lambda: not process.is_running() or process.status() == "zombie", "its end")
    host.suspect(ref.engine)
    assert host.endpoint(ref.engine) != before
    wait_for(lambda: (found := host.endpoint(ref.engine)) is not None and found != before, "another one that answers")
    status = status_of(host, ref.engine)
    assert status.state is EngineState.READY
    assert "It ended while it served (signal SIGKILL)." in str(status.why)
    assert "Start 1 of 2 after a failure." in str(status.why)
    assert ask(host, ref) == "complaints@7: hi"


def test_engines_that_go_on_can_be_ended_without_a_gateway(hosts: Hosts, fakes: FakeCommand, tmp_path: Path) -> None:
    host = hosts()
    started(host, version())
    with pytest.raises(ServiceError, match="Another `goldgate serve` runs"):
        end_engines(tmp_path / "serving")
    host.close()
    assert len(engines_of(fakes)) == 1
    assert end_engines(tmp_path / "serving") == ["complaints@7"]
    assert engines_of(fakes) == []
    assert end_engines(tmp_path / "serving") == []
    wait_for_state(hosts(), version().engine, EngineState.READY)  # the next gateway starts it again
    assert end_engines(tmp_path / "nowhere") == []


def test_it_is_not_started_anew_for_ever(hosts: Hosts, fakes: FakeCommand) -> None:
    host, ref = hosts(), version()
    started(host, ref)
    fakes.behave("complaints@7", Behaviour(dies_after=1))  # the first probe only
    status = wait_for_state(host, ref.engine, EngineState.FAILED)
    assert "It was started anew 2 times and died again." in str(status.why)
    assert "dies as it was told" in str(status.why)
    assert engines_of(fakes) == []


def test_one_that_is_stable_gets_its_starts_back(hosts: Hosts, fakes: FakeCommand) -> None:
    host, ref = hosts(pace=Pace(look=0.02, probe=60.0, back_off=(0.0,), stable=0.1, end=5.0)), version()
    started(host, ref)
    for _ in range(3):
        before = engines_of(fakes)
        before[0].kill()
        wait_for(lambda b=before: engines_of(fakes) not in ([], b), "another process")  # type: ignore[misc]
        wait_for_state(host, ref.engine, EngineState.READY, EngineState.FAILED)
        wait_for(lambda: status_of(host, ref.engine).why is None, "it to be stable again")


@pytest.mark.parametrize(("poisoned", "says"), [("empty", "its answer is empty"), ("nan", "it replies HTTP 500")])
def test_an_engine_that_is_poisoned_while_it_serves_is_taken_out(
    hosts: Hosts, fakes: FakeCommand, poisoned: str, says: str
) -> None:
    """Its `/health` is 200 all the time."""
    host, ref = hosts(pace=Pace(look=0.05, probe=0.1, retry=1.0, back_off=(60.0,), end=5.0)), version()
    started(host, ref)
    endpoint = host.endpoint(ref.engine)
    assert endpoint is not None
    fakes.behave("complaints@7", Behaviour.model_validate({"poisoned": poisoned}))
    assert httpx.get(endpoint.url.replace("/v1", "/health"), trust_env=False).status_code == 200
    wait_for(lambda: host.endpoint(ref.engine) is None, "it to be taken out")
    status = wait_for_state(host, ref.engine, EngineState.STARTING)
    assert "It runs, but its answer is empty" in str(status.why) or "It runs, but it replies HTTP 500" in str(
        status.why
    )


def test_a_single_wrong_answer_ends_nothing(hosts: Hosts, fakes: FakeCommand) -> None:
    host, ref = hosts(), version()
    started(host, ref)
    (process,) = engines_of(fakes)
    fakes.behave("complaints@7", Behaviour(fail_every=3))
    asked = len(fakes.requests("complaints@7"))
    wait_for(lambda: len(fakes.requests("complaints@7")) > asked + 8, "some probes")
    assert engines_of(fakes) == [process]
    assert status_of(host, ref.engine).state is EngineState.READY


def test_draining_waits_for_requests_under_way(hosts: Hosts, fakes: FakeCommand) -> None:
    host, ref = hosts(), version()
    started(host, ref)
    left = [2]
    host.stop(ref.engine, 60.0, lambda: left[0])
    status = status_of(host, ref.engine)
    assert (status.state, status.under_way) == (EngineState.DRAINING, 2)
    assert ask(host, ref) == "complaints@7: hi"
    left[0] = 0
    wait_for_state(host, ref.engine, EngineState.STOPPED)
    assert engines_of(fakes) == []


def test_draining_ends_with_its_time_and_sigterm_may_be_ignored(hosts: Hosts, fakes: FakeCommand) -> None:
    fakes.behave("complaints@7", Behaviour(ignores_sigterm=True))
    host, ref = hosts(pace=Pace(look=0.05, end=0.3)), version()
    started(host, ref)
    host.stop(ref.engine, 0.2, lambda: 1)
    wait_for_state(host, ref.engine, EngineState.STOPPED)
    assert engines_of(fakes) == []


@pytest.mark.parametrize("hangs", [Behaviour(start_seconds=600), Behaviour(delay=600)])
def test_one_that_is_still_starting_is_ended_at_once(hosts: Hosts, fakes: FakeCommand, hangs: Behaviour) -> None:
    fakes.behave("complaints@7", hangs)
    host, ref = hosts(), version()
    host.start(ref, EngineSpec(start_seconds=600.0))
    asked = len(fakes.requests("complaints@7")) if hangs.start_seconds else 1
    wait_for(lambda: len(engines_of(fakes)) == 1 and len(fakes.requests("complaints@7")) >= asked, "its process")
    host.stop(ref.engine, 60.0, lambda: 1)
    wait_for_state(host, ref.engine, EngineState.STOPPED)
    assert engines_of(fakes) == []


def test_its_port_is_kept_until_it_has_it(hosts: Hosts, fakes: FakeCommand, tmp_path: Path) -> None:
    fakes.behave("complaints@7", Behaviour(start_seconds=600))
    host, ref = hosts(), version()
    host.start(ref, SPEC)
    wait_for(lambda: len(engines_of(fakes)) == 1, "its process")
    record = json.loads((tmp_path / "serving" / "engines" / f"{ref.engine}.json").read_text())
    with socket.socket() as other, pytest.raises(OSError, match="Address already in use"):
        other.bind(("127.0.0.1", record["port"]))


def test_a_start_while_it_is_ended_begins_anew(hosts: Hosts, fakes: FakeCommand) -> None:
    host, ref = hosts(), version()
    started(host, ref)
    (process,) = engines_of(fakes)
    left = [1]
    host.stop(ref.engine, 60.0, lambda: left[0])
    assert host.start(ref, SPEC).state is EngineState.DRAINING
    left[0] = 0
    wait_for_state(host, ref.engine, EngineState.READY)
    assert engines_of(fakes) not in ([], [process])


def test_a_failed_one_can_be_stopped_and_nobody_is_an_error(hosts: Hosts, fakes: FakeCommand) -> None:
    fakes.behave("complaints@7", Behaviour(start_exit=1))
    host, ref = hosts(), version()
    host.start(ref, SPEC)
    wait_for_state(host, ref.engine, EngineState.FAILED)
    assert host.stop(ref.engine, 60.0, lambda: 0).state is EngineState.STOPPED
    with pytest.raises(ServiceError, match="no such engine"):
        host.stop("nobody-1-00000000", 0.0, lambda: 0)
    assert host.status("nobody-1-00000000") is None
    assert host.endpoint("nobody-1-00000000") is None
    host.suspect("nobody-1-00000000")


@pytest.mark.parametrize("what", ["key", "json"])
def test_an_engine_whose_files_cannot_be_written_is_not_started(
    hosts: Hosts, fakes: FakeCommand, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Another host could not find it."""
    full_disk(monkeypatch, f".{what}")
    host, ref = hosts(), version()
    host.start(ref, SPEC)
    assert "No space left on device" in str(wait_for_state(host, ref.engine, EngineState.FAILED).why)
    assert engines_of(fakes) == []


def test_a_full_disk_ends_no_engine_that_runs(
    hosts: Hosts, fakes: FakeCommand, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    host, ref = hosts(), version()
    started(host, ref)
    full_disk(monkeypatch, ".json")
    asked = len(fakes.requests("complaints@7"))
    wait_for(lambda: len(fakes.requests("complaints@7")) > asked + 2, "some probes")
    assert ask(host, ref) == "complaints@7: hi"
    host.stop(ref.engine, 0.0, lambda: 0)
    wait_for_state(host, ref.engine, EngineState.STOPPED)
    assert engines_of(fakes) == []
    assert "could not be written: [Errno 28]" in caplog.text


def full_disk(monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    def write(path: Path, text: str, *, mode: int = 0o644) -> None:
        if path.suffix == suffix:
            raise OSError(28, "No space left on device")
        write_durably(path, text, mode=mode)

    monkeypatch.setattr("tasks.serving.engine.write_durably", write)


def test_a_process_whose_run_was_replaced_does_not_become_an_engine(tmp_path: Path) -> None:
    """A host was killed right after it had made the process, and the next one was quicker."""
    record = tmp_path / "engine.json"
    record.write_text('{"run": "b"}')
    process = EngineProcess.start(
        [sys.executable, "-c", f"open({str(tmp_path / 'became')!r}, 'w')"],
        dict(os.environ),
        run="a",
        record=record,
        mark=tmp_path / "a.process",
        log=tmp_path / "log",
    )
    assert process.wait(30.0)
    assert process.ended() == "exit status 1"
    assert "another run was started in the meantime" in end_of_log(tmp_path / "log")
    assert not (tmp_path / "became").exists()


@pytest.mark.parametrize("mark", [None, "", "{", '{"run": "a", "pid": 1}'])
def test_a_mark_that_says_nothing_is_nobody(tmp_path: Path, mark: str | None) -> None:
    if mark is not None:
        (tmp_path / "mark").write_text(mark)
    assert EngineProcess.find(tmp_path / "mark") is None


def test_the_end_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert end_of_log(log) == "    (no log)"
    log.write_bytes(b"")
    assert end_of_log(log) == "    (nothing)"
    log.write_bytes(b"".join(b"line %d\n" % number for number in range(50_000)) + b"\xff last")
    assert end_of_log(log, lines=2) == "    line 49999\n    \ufffd last"


def test_a_file_is_whole_or_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "key"
    write_durably(path, "old", mode=0o600)
    assert path.stat().st_mode & 0o777 == 0o600

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_durably(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# -- hosts that come and go ------------------------------------------------------------------------------------------


def test_two_hosts_on_one_folder_are_refused(hosts: Hosts) -> None:
    first = hosts()
    with pytest.raises(ServiceError, match="Another `goldgate serve` runs from this folder"):
        hosts()
    first.close()
    hosts()


def test_engines_go_on_and_are_adopted(hosts: Hosts, fakes: FakeCommand) -> None:
    first, ref = hosts(), version()
    started(first, ref)
    (process,) = engines_of(fakes)
    before = first.endpoint(ref.engine)
    first.close()
    assert engines_of(fakes) == [process]

    second = hosts()
    assert second.endpoint(ref.engine) == before  # at once
    assert ask(second, ref) == "complaints@7: hi"
    assert second.start(ref, SPEC).state is EngineState.READY
    assert status_of(second, ref.engine).memory_bytes > 1_000_000
    assert engines_of(fakes) == [process]
    second.stop(ref.engine, 0.0, lambda: 0)
    wait_for_state(second, ref.engine, EngineState.STOPPED)
    assert engines_of(fakes) == []
    second.close()
    assert hosts().statuses() == []


def test_an_adopted_engine_that_is_poisoned_is_found_out(hosts: Hosts, fakes: FakeCommand) -> None:
    first, ref = hosts(), version()
    started(first, ref)
    first.close()
    fakes.behave("complaints@7", Behaviour(poisoned="empty"))
    second = hosts(pace=Pace(look=0.05, probe=600.0, retry=0.02, back_off=(), end=5.0))
    status = wait_for_state(second, ref.engine, EngineState.FAILED)
    assert "It runs, but its answer is empty" in str(status.why)


def test_an_engine_that_died_while_no_host_was_there_is_started_anew(hosts: Hosts, fakes: FakeCommand) -> None:
    first, ref = hosts(), version()
    started(first, ref)
    first.close()
    (process,) = engines_of(fakes)
    process.kill()
    wait_for(lambda: engines_of(fakes) == [], "its end")
    second = hosts()
    wait_for_state(second, ref.engine, EngineState.READY)
    wait_for(lambda: "nobody watched" in str(status_of(second, ref.engine).why), "the reason")
    wait_for(lambda: second.endpoint(ref.engine) is not None, "it to answer")
    assert ask(second, ref) == "complaints@7: hi"


@pytest.mark.parametrize("answered", [True, False])
def test_one_that_failed_is_tried_again_by_the_next_host_if_it_ever_answered(
    hosts: Hosts, fakes: FakeCommand, answered: bool
) -> None:
    first, ref = hosts(), version()
    if answered:
        started(first, ref)
    fakes.behave("complaints@7", Behaviour(dies_after=0))
    first.start(ref, SPEC)
    wait_for_state(first, ref.engine, EngineState.FAILED)
    first.close()
    fakes.behave("complaints@7", Behaviour())
    second = hosts()
    if answered:
        wait_for_state(second, ref.engine, EngineState.READY)
    else:
        assert status_of(second, ref.engine).state is EngineState.FAILED
        assert "ended while it started" in str(status_of(second, ref.engine).why)
        assert engines_of(fakes) == []


def test_a_stranger_with_the_pid_is_left_alone(hosts: Hosts, fakes: FakeCommand, tmp_path: Path) -> None:
    first, ref = hosts(), version()
    started(first, ref)
    first.close()
    (process,) = engines_of(fakes)
    process.kill()
    wait_for(lambda: engines_of(fakes) == [], "its end")
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    try:
        (mark,) = (tmp_path / "serving" / "engines").glob("*.process")
        mark.write_text(json.dumps(json.loads(mark.read_text()) | {"pid": stranger.pid}))
        second = hosts()
        wait_for(lambda: second.endpoint(ref.engine) is not None, "it to answer")
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_what_is_being_ended_is_ended_by_the_next_host(hosts: Hosts, fakes: FakeCommand) -> None:
    first, ref = hosts(), version()
    started(first, ref)
    first.stop(ref.engine, 600.0, lambda: 1)
    first.close()
    assert len(engines_of(fakes)) == 1
    second = hosts()
    wait_for_state(second, ref.engine, EngineState.STOPPED)
    assert engines_of(fakes) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from tasks.contracts.spec import ExecutionSpec
from tasks.serving import engine, process
from tasks.serving.host import EngineHost
from tests.serving.fake_engine import FakeCommand
from tests.serving.test_host import QUICK, SPEC, no_model, status_of, version, wait_for

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

place, root = sys.argv[1], Path(sys.argv[2])
host = EngineHost(root / "serving", ExecutionSpec(), FakeCommand(root / "fakes"), prepare=no_model, pace=QUICK)
if place == "before the process":
    engine.EngineProcess.start = die
elif place == "after the process":
    process._after_boot = die
elif place == "before it is ready":
    engine.look = die
host.start(version(), SPEC)
wait_for(lambda: status_of(host, version().engine).state == "ready", "it to be ready")
die()
"""


@pytest.mark.parametrize("place", ["before the process", "after the process", "before it is ready", "ready"])
def test_a_host_that_is_killed_loses_no_engine(hosts: Hosts, fakes: FakeCommand, tmp_path: Path, place: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, place, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    host, ref = hosts(), version()
    assert status_of(host, ref.engine).state in (EngineState.STARTING, EngineState.READY)
    wait_for(lambda: host.endpoint(ref.engine) is not None, "it to answer")
    assert ask(host, ref) == "complaints@7: hi"
    assert len(engines_of(fakes)) == 1
    host.stop(ref.engine, 0.0, lambda: 0)
    wait_for_state(host, ref.engine, EngineState.STOPPED)
    assert engines_of(fakes) == []


def test_a_record_that_cannot_be_read_is_named(hosts: Hosts, tmp_path: Path) -> None:
    hosts().close()
    (tmp_path / "serving" / "engines" / "complaints-7-00000000.json").write_text("{")
    with pytest.raises(ServiceError, match="record of an engine cannot be read") as caught:
        hosts()
    assert "complaints-7-00000000.json" in str(caught.value.where)
    (tmp_path / "serving" / "engines" / "complaints-7-00000000.json").unlink()
    hosts()  # the folder is free again


def test_the_clock_of_the_machine_does_not_matter(
    hosts: Hosts, fakes: FakeCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Set by an hour, start times of processes seem to move with it; none is taken for a stranger."""
    first, ref = hosts(), version()
    started(first, ref)
    first.close()
    (process,) = engines_of(fakes)
    real_boot, real_start = psutil.boot_time, psutil.Process.create_time
    monkeypatch.setattr(psutil, "boot_time", lambda: real_boot() + 3600)
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: real_start(self) + 3600)
    second = hosts()
    assert ask(second, ref) == "complaints@7: hi"
    monkeypatch.undo()
    assert engines_of(fakes) == [process]


def test_a_clock_that_is_set_while_it_is_read_makes_no_stranger(monkeypatch: pytest.MonkeyPatch) -> None:
    process, boots = psutil.Process(), chain([1000.0], repeat(1001.0))
    monkeypatch.setattr(psutil, "boot_time", lambda: next(boots))
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: 50.0 + psutil.boot_time())
    assert _after_boot(process) == 50.0


def test_what_a_dead_server_had_started_is_ended_with_it(hosts: Hosts, fakes: FakeCommand) -> None:
    """As vLLM's server, whose engine is a process of its own."""
    host, ref = hosts(pace=Pace(look=0.05, back_off=(600.0,), end=5.0)), version()
    fakes.behave("complaints@7", Behaviour(start_children=1))
    started(host, ref)
    server, child = sorted(engines_of(fakes), key=lambda process: process.pid != os.getsid(process.pid))
    assert child.ppid() == server.pid
    server.kill()
    wait_for_state(host, ref.engine, EngineState.STARTING)
    wait_for(lambda: engines_of(fakes) == [], "the end of its child")
