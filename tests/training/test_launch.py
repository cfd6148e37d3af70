"""How the launcher answers every way in which a training process can end; with a script in its place."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.contracts.errors import GoldgateError, StoreError, TrainingError
from tasks.contracts.progress import Progress, ignore_progress
from tasks.contracts.references import BaseModelRef, SplitsRef, TrainRequest
from tasks.contracts.spec import ExecutionSpec, TaskKind, TaskSpec, TrainSpec
from tasks.training import launch, launcher
from tasks.training.checkpoints import mark_complete
from tasks.training.failures import PREFERENCE_TUNING, TRAINING, Stage, explain
from tasks.training.job import TrainJob, TrainResult
from tasks.training.launch import reason_of, run_training
from tests.processes import lives

StandIn = Callable[[str], None]

RESULT = TrainResult(
    steps=4, planned_steps=4, best_step=4, dev_loss=1.0, seconds=1.0, tokens=10, tokens_per_second=10.0,
    peak_memory_bytes=1, resumed_from_step=0, trainable_parameters=1, device="cpu", compute_dtype="float32",
    stopped_early=False, mlflow_run_id="r", mlflow_url=None,
)  # fmt: skip
OUT_OF_MEMORY = {"type": "TrainingError", "what": "Training ran out of memory: 2 GiB", "where": "train.batch_size",
                 "fix": "halve it", "out_of_memory": True}  # fmt: skip

# What stands in for the worker: `job` is the spec file, `scratch` its folder, `attempt` counts from 1.
_HEAD = """
import json, os, signal, sys, time
from pathlib import Path
job = json.loads(Path(sys.argv[1]).read_text())
scratch = Path(job["scratch"])
attempts = scratch / "attempts"
attempt = int(attempts.read_text()) + 1 if attempts.exists() else 1
attempts.write_text(str(attempt))
RESULT, ERROR = {result!r}, {error!r}
def result(**changes): (scratch / "result.json").write_text(json.dumps(json.loads(RESULT) | changes))
def error(): (scratch / "error.json").write_text(json.dumps(ERROR)); sys.exit(1)
"""


def make_job(folder: Path, batch_size: int = 8) -> TrainJob:
    digest = "1" * 64
    request = TrainRequest(
        name="fruit",
        task=TaskSpec(kind=TaskKind.CLASSIFY, instruction="Which fruit?", labels=("apple", "pear")),
        splits=SplitsRef(uri="splits", step="splits", digest=digest, fingerprint=digest, train_rows=48, dev_rows=12,
                         removed={}),
        base=BaseModelRef(uri="base", step="base_model", digest=digest, fingerprint=digest, source="hf:base"),
        recipe=TrainSpec(batch_size=batch_size),
        execution=ExecutionSpec(store=str(folder / "store")),
    )  # fmt: skip
    return TrainJob(
        request=request, fingerprint=digest, model_folder=folder, train_file=folder / "t", dev_file=folder / "d",
        scratch=folder / "scratch", out=folder / "out",
    )  # fmt: skip


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StandIn:
    """Have a script run in place of the worker."""

    def put(body: str) -> None:
        script = tmp_path / "worker.py"
        script.write_text(_HEAD.format(result=RESULT.model_dump_json(), error=OUT_OF_MEMORY) + body)

        def command(job: TrainJob, parent: int, environment: object) -> list[str]:
            assert parent == os.getpid()
            return [sys.executable, str(script), str(job.scratch / launcher.SPEC)]

        monkeypatch.setattr(launcher, "command", command)

    return put


def test_out_of_memory_is_tried_once_more_with_half_the_batch(
    tmp_path: Path, stand_in: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    stand_in("error() if job['halve_batches'] == 0 else result(halve_batches=job['halve_batches'])")
    heard: list[Progress] = []
    with caplog.at_level(logging.WARNING):
        result = run_training(make_job(tmp_path), heard.append)
    assert result.halve_batches == 1
    assert (tmp_path / "scratch" / "attempts").read_text() == "2"
    note = "It ran out of memory; training again with half the batch and twice the accumulation"
    assert note in [progress.note for progress in heard]
    assert f"{note} (Training ran out of memory: 2 GiB)" in caplog.text
    assert "with half the batch, after running out of memory" in result.sentence()


@pytest.mark.parametrize(
    ("body", "batch_size", "attempts", "what"),
    [
        ("error()", 8, "2", "ran out of memory: 2 GiB"),
        ("error()", 1, "1", "ran out of memory: 2 GiB"),  # nothing to halve
        ("ERROR['out_of_memory'] = False; error()", 8, "1", "ran out of memory: 2 GiB"),
        ("del ERROR['out_of_memory']; error()", 8, "1", "ran out of memory: 2 GiB"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 8, "1", "was killed"),  # by the kernel, say: not again, blindly
        ("os.kill(os.getpid(), signal.SIGTERM)", 8, "1", "told to stop"),
        ("sys.exit(3)", 8, "1", "exit code 3"),
    ],
)
def test_what_is_not_tried_again(
    tmp_path: Path, stand_in: StandIn, body: str, batch_size: int, attempts: str, what: str
) -> None:
    stand_in(body)
    with pytest.raises(TrainingError, match=what):
        run_training(make_job(tmp_path, batch_size), ignore_progress)
    assert (tmp_path / "scratch" / "attempts").read_text() == attempts


def test_an_end_is_explained_by_its_own_log_and_the_one_before_is_kept(tmp_path: Path, stand_in: StandIn) -> None:
    stand_in("print('words of attempt', attempt); sys.exit(3)")
    for attempt in (1, 2, 3):
        with pytest.raises(TrainingError, match=f"Its last words:\n    words of attempt {attempt}\n  where"):
            run_training(make_job(tmp_path), ignore_progress)
    assert (tmp_path / "scratch" / "worker.previous.log").read_text() == "words of attempt 2\n"


_TELL = """
def stop(*_):
    (scratch / "told").touch()
    if {seconds}: time.sleep({seconds})
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
(scratch / "part").write_text(json.dumps(dict(done=3, total=18, unit="steps", note="loss 1.0")))
(scratch / "part").replace(scratch / "progress.json")  # whole at once, as the worker writes it
while True: time.sleep(0.05)
"""


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit], ids=["Ctrl-C", "the worker of Prefect ends"])
def test_an_interrupt_lets_the_training_keep_its_step_and_says_what_it_waits_for(
    tmp_path: Path, stand_in: StandIn, interrupt: type[BaseException]
) -> None:
    stand_in(_TELL.format(seconds=0.2))
    heard: list[Progress] = []

    def listen(progress: Progress) -> None:
        heard.append(progress)
        if progress.note == "loss 1.0":
            raise interrupt

    with pytest.raises(interrupt):
        run_training(make_job(tmp_path), listen)
    assert (tmp_path / "scratch" / "told").exists()
    assert heard[-1] == Progress(
        3, 18, "steps", "saving a checkpoint before it ends (at most 60 s); interrupt again to end at once"
    )


def test_a_second_interrupt_and_a_minute_end_it_at_once(
    tmp_path: Path, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stand_in(_TELL.format(seconds=600))

    def interrupt_twice(progress: Progress) -> None:
        if progress.note == "loss 1.0":
            threading.Thread(target=again, daemon=True).start()
            raise KeyboardInterrupt

    def again() -> None:
        while not (tmp_path / "scratch" / "told").exists():
            time.sleep(0.02)
        time.sleep(0.5)  # by then it waits for the checkpoint
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run_training(make_job(tmp_path), interrupt_twice)  # pytest's time limit ends this if it waits
    assert (tmp_path / "scratch" / "told").exists()

    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.5)

    def interrupt_once(progress: Progress) -> None:
        if progress.note == "loss 1.0":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_training(make_job(tmp_path), interrupt_once)
    assert "did not end in time and was killed" in caplog.text


@pytest.mark.parametrize("moment", ["told", "said", "shown"])
def test_a_second_interrupt_ends_it_whenever_it_comes(
    tmp_path: Path, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    stand_in('(scratch / "pid").write_text(str(os.getpid()))' + _TELL.format(seconds=600))
    tell = launch._Training.tell_to_end

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt  # as SIGINT does, in the midst of it

    def tell_and_be_interrupted(training: launch._Training) -> None:
        tell(training)
        raise KeyboardInterrupt

    def listen(progress: Progress) -> None:
        if progress.note == "loss 1.0" or (moment == "shown" and "saving a checkpoint" in progress.note):
            raise KeyboardInterrupt

    if moment == "told":
        monkeypatch.setattr(launch._Training, "tell_to_end", tell_and_be_interrupted)
    if moment == "said":
        monkeypatch.setattr(launch.log, "warning", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_training(make_job(tmp_path), listen)
    pid = int((tmp_path / "scratch" / "pid").read_text())
    if lives(pid):
        os.kill(pid, signal.SIGKILL)
        pytest.fail("the training was left running")


def test_a_broken_listener_does_not_leave_the_training_running(tmp_path: Path, stand_in: StandIn) -> None:
    stand_in(_TELL.format(seconds=0))

    def broken(progress: Progress) -> None:
        if progress.done:
            raise ConnectionError("the server is gone")

    with pytest.raises(ConnectionError, match="the server is gone"):
        run_training(make_job(tmp_path), broken)
    assert (tmp_path / "scratch" / "told").exists()


def test_ctrl_c_in_a_terminal_reaches_the_launcher_alone(tmp_path: Path, stand_in: StandIn) -> None:
    stand_in("print(os.getpgid(0) == os.getpid(), flush=True); result()")
    run_training(make_job(tmp_path), ignore_progress)
    assert (tmp_path / "scratch" / "worker.log").read_text() == "True\n"


@pytest.mark.parametrize(
    ("error", "kind", "what", "out_of_memory"),
    [
        (MemoryError(), TrainingError, "ran out of memory: MemoryError", True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), TrainingError, "Tried to allocate 2 GiB", True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), TrainingError, "allocate", True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling"), TrainingError, "CUBLAS", True),
        (OSError(errno.ENOSPC, "No space left on device", "f"), StoreError, "no room left", False),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "f"), StoreError, "no room left", False),
        (RuntimeError("I/O error: No space left on device (os error 28)"), StoreError, "no room left", False),
        (RuntimeError("PytorchStreamWriter failed writing file data/0"), StoreError, "no room left", False),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"), StoreError, "room", False),
        (OSError(errno.EROFS, "Read-only file system", "f"), StoreError, "cannot write: Read-only file system", False),
        (TrainingError("too long", where="row 1", fix="shorten it"), TrainingError, "too long", False),
    ],
    ids=str,
)
def test_what_an_exception_means(
    tmp_path: Path, error: Exception, kind: type[GoldgateError], what: str, out_of_memory: bool
) -> None:
    failure = explain(error, tmp_path)
    assert failure is not None
    assert type(failure.refusal) is kind
    assert what in failure.refusal.what
    assert failure.out_of_memory is out_of_memory
    assert failure.refusal.fix


def raised_over(error: Exception, *, named: bool) -> Exception:
    """What a library puts over an error: raised from it, by name, or while it was being handled."""
    outer = RuntimeError("Error while serializing")
    outer.__cause__, outer.__context__ = (error if named else None), error
    outer.__suppress_context__ = named
    return outer


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        (TRAINING, ("not even a first checkpoint fits", "goes on from the last checkpoint")),
        (PREFERENCE_TUNING, ("MB are free (", "the stage starts anew")),
    ],
    ids=["training", "preference tuning"],
)
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "f"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
        ValueError("(sqlite3.OperationalError) database or disk is full\n[SQL: INSERT INTO metrics]"),
        raised_over(OSError(errno.ENOSPC, "No space left on device", "f"), named=True),
        raised_over(raised_over(OSError(errno.EDQUOT, "Quota", "f"), named=True), named=False),
    ],
    ids=["by its number", "in words", "by a database", "under another", "under two"],
)
def test_a_full_disk_is_told_whichever_exception_brings_it(
    tmp_path: Path, error: Exception, stage: Stage, words: tuple[str, str]
) -> None:
    failure = explain(error, tmp_path, stage)
    assert failure is not None
    assert type(failure.refusal) is StoreError
    assert failure.refusal.what.startswith("There is no room left to write: ")
    assert "\n" not in failure.refusal.what
    assert words[0] in failure.refusal.what
    assert words[1] in failure.refusal.fix
    assert failure.refusal.where == str(tmp_path)


def test_what_preference_tuning_lacks_is_told_of_its_own_settings(tmp_path: Path) -> None:
    memory = explain(MemoryError(), tmp_path, PREFERENCE_TUNING)
    assert memory is not None
    assert memory.refusal.what == "Preference tuning ran out of memory: MemoryError"
    assert memory.refusal.where == "preference.batch_size"
    assert "preference.batch_size" in memory.refusal.fix
    read_only = explain(OSError(errno.EROFS, "Read-only file system", "f"), tmp_path, PREFERENCE_TUNING)
    assert read_only is not None
    assert (read_only.refusal.what, read_only.refusal.where) == (
        "Preference tuning cannot write: Read-only file system",
        "f",
    )


def test_what_nobody_foresaw_is_not_explained(tmp_path: Path) -> None:
    for error in (ValueError("out of memory"), RuntimeError("shapes differ"), KeyError("x"), OSError(errno.EIO, "x")):
        assert explain(error, tmp_path) is None


def test_no_room_names_the_folder_what_is_free_and_what_is_needed(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "f")
    first = explain(full, tmp_path)
    assert first is not None
    assert "not even a first checkpoint fits" in first.refusal.what
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / "trainer_state.json").write_bytes(b"x" * 2_500_000)
    mark_complete(folder, 3, 1.0)
    again = explain(full, tmp_path)
    assert again is not None
    assert "a checkpoint needs about 2.5 MB" in again.refusal.what
    assert "MB are free" in again.refusal.what
    assert again.refusal.where == str(tmp_path)
    assert "goes on from the last checkpoint" in again.refusal.fix


def test_a_worker_that_cannot_even_write_why_is_understood(tmp_path: Path) -> None:
    (tmp_path / "worker.log").write_text("")
    refusal = reason_of(74, tmp_path, tmp_path / "worker.log")
    assert isinstance(refusal, StoreError)
    assert "There is no room left to write" in refusal.what


def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "scratch").write_text("a file")
    with pytest.raises(StoreError, match="cannot be used") as refusal:
        run_training(make_job(tmp_path), ignore_progress)
    assert refusal.value.where == str(tmp_path / "scratch")


_WITHOUT_PRCTL = """
import os, subprocess, sys
child = (
    "import sys, time; sys.platform = 'darwin'\\n"
    "from tasks.training.tether import die_with_parent\\n"
    "die_with_parent(None); print('ready', flush=True); time.sleep(300)"
)
process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE)
process.stdout.readline()
print(process.pid, flush=True)
"""


def test_it_ends_with_its_parent_where_the_kernel_does_not_see_to_it() -> None:
    done = subprocess.run([sys.executable, "-c", _WITHOUT_PRCTL], capture_output=True, text=True, check=True)
    pid = int(done.stdout)
    while lives(pid):
        time.sleep(0.05)  # pytest's time limit ends this if it lives on
