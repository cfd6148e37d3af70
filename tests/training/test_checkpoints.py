"""Which checkpoints are whole, which is taken, and which may go."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.training.checkpoints import (
    MARK,
    drop_half_written,
    fault_of,
    find_checkpoint,
    has_stopped,
    mark_complete,
    newest_bytes,
    prune,
)

PLAN = '{"total_steps": 18}'


def write_checkpoint(
    scratch: Path, step: int, *, best: int | None = None, marked: bool = True, looks: tuple[float, ...] = ()
) -> Path:
    """A checkpoint as the Trainer lays it out, with random bytes for tensors."""
    folder = scratch / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name, size in (
        ("adapter_model.safetensors", 4000), ("optimizer.pt", 8000), ("scheduler.pt", 100), ("rng_state.pth", 300)
    ):  # fmt: skip
        (folder / name).write_bytes(os.urandom(size))
    state = {
        "global_step": step,
        "best_model_checkpoint": None if best is None else f"/elsewhere/checkpoint-{best}",
        "log_history": [{"loss": 1.0}, *({"eval_loss": look} for look in looks)],
    }
    (folder / "trainer_state.json").write_text(json.dumps(state))
    if marked:
        mark_complete(folder, step, 10.0 * step)
    return folder


def steps_in(scratch: Path) -> list[int]:
    return sorted(int(folder.name.split("-")[1]) for folder in scratch.glob("checkpoint-*"))


def cut(name: str, keep: float = 0.5) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(keep * len(content))])

    return damage


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "optimizer.pt").read_bytes())
    content[4000] ^= 1
    (folder / "optimizer.pt").write_bytes(content)


def take_mark_of_another(folder: Path) -> None:
    (folder / MARK).write_text((folder.parent / "checkpoint-6" / MARK).read_text())


def longer(folder: Path) -> None:
    with (folder / "scheduler.pt").open("ab") as out:
        out.write(b"more")


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no mark": (remove(MARK), "it was cut off half-way (no mark)"),
    "mark torn": (cut(MARK), "its mark cannot be read"),
    "mark empty": (cut(MARK, 0.0), "its mark cannot be read"),
    "mark of an older form": (lambda folder: (folder / MARK).write_text('{"step": 9, "seconds": 1.0}'),
                              "its mark cannot be read"),
    "mark of another": (take_mark_of_another, "its mark is that of another checkpoint"),
    "optimizer cut": (cut("optimizer.pt"), "optimizer.pt has 4,000 bytes of 8,000"),
    "adapter cut": (cut("adapter_model.safetensors", 0.9), "adapter_model.safetensors has 3,600 bytes of 4,000"),
    "state half": (cut("trainer_state.json"), "trainer_state.json has"),
    "state missing": (remove("trainer_state.json"), "trainer_state.json is missing"),
    "random numbers missing": (remove("rng_state.pth"), "rng_state.pth is missing"),
    "longer": (longer, "scheduler.pt has 104 bytes of 100"),
    "one bit": (flip_a_bit, "optimizer.pt is not what was written"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "fault"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], fault: str
) -> None:
    assert find_checkpoint(tmp_path, PLAN) is None  # keeps the plan
    for step in (3, 6, 9):
        write_checkpoint(tmp_path, step)
    assert find_checkpoint(tmp_path, PLAN) == (tmp_path / "checkpoint-9", 9, 90.0)

    damage(tmp_path / "checkpoint-9")
    assert (fault_of(tmp_path / "checkpoint-9") or "").startswith(fault)
    with caplog.at_level(logging.WARNING):
        found = find_checkpoint(tmp_path, PLAN)
    assert found == (tmp_path / "checkpoint-6", 6, 60.0)
    assert f"passing over the checkpoint of step 9: {fault}" in caplog.text
    assert steps_in(tmp_path) == [3, 6]  # what is damaged takes no room


def test_a_checkpoint_is_of_no_use_without_the_best_one_up_to_it(tmp_path: Path) -> None:
    find_checkpoint(tmp_path, PLAN)
    write_checkpoint(tmp_path, 3, best=3)
    write_checkpoint(tmp_path, 6, best=6)
    write_checkpoint(tmp_path, 9, best=6)
    found = find_checkpoint(tmp_path, PLAN)
    assert found is not None
    assert found.step == 9
    flip_a_bit(tmp_path / "checkpoint-6")
    found = find_checkpoint(tmp_path, PLAN)
    assert found is not None
    assert found.step == 3
    assert steps_in(tmp_path) == [3]


def test_another_plan_clears_all(tmp_path: Path) -> None:
    find_checkpoint(tmp_path, PLAN)
    write_checkpoint(tmp_path, 3)
    (tmp_path / "curves.jsonl").write_text('{"step": 3}\n')
    assert find_checkpoint(tmp_path, '{"total_steps": 9}') is None
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json"}


def test_the_order_is_that_of_steps_whatever_the_files_times_say(tmp_path: Path) -> None:
    find_checkpoint(tmp_path, PLAN)
    now = time.time()
    for step in (3, 6, 9, 12):  # as if each host's clock were behind that of the one before; the first is in the future
        folder = write_checkpoint(tmp_path, step)
        for path in (*folder.iterdir(), folder):
            os.utime(path, (now + 7200 - 3600 * step, now + 7200 - 3600 * step))
    prune(tmp_path)
    assert steps_in(tmp_path) == [9, 12]
    found = find_checkpoint(tmp_path, PLAN)
    assert found is not None
    assert found.step == 12


@pytest.mark.parametrize(
    ("bests", "left"),
    [
        ({2: None, 4: None, 6: None}, [4, 6]),
        ({2: 2, 4: 2, 6: 2, 8: 2, 10: 2}, [2, 8, 10]),
        ({2: 2, 4: 4, 6: 6}, [4, 6]),
        ({2: 2, 4: 4, 6: 4, 8: 4, 10: 10}, [4, 8, 10]),  # 4 is the best up to 8, should 10 be damaged
        ({2: 2, 4: 2, 6: 6, 8: 6, 10: 6}, [6, 8, 10]),
        ({2: 2}, [2]),
        ({}, []),
    ],
    ids=str,
)
def test_old_checkpoints_go_and_the_best_stays(tmp_path: Path, bests: dict[int, int | None], left: list[int]) -> None:
    for step, best in bests.items():
        write_checkpoint(tmp_path, step, best=best)
        prune(tmp_path)
        assert len(steps_in(tmp_path)) <= 4
    assert steps_in(tmp_path) == left
    (tmp_path / "plan.json").write_text(PLAN)
    found = find_checkpoint(tmp_path, PLAN)
    assert (found.step if found else None) == max(bests, default=None)
    assert steps_in(tmp_path) == left  # each that stayed has the best one that it needs


def test_what_is_being_written_is_not_pruned(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        write_checkpoint(tmp_path, step)
    write_checkpoint(tmp_path, 5, marked=False)  # a killed process left it
    write_checkpoint(tmp_path, 8, marked=False)
    prune(tmp_path)
    assert steps_in(tmp_path) == [4, 6, 8]
    drop_half_written(tmp_path)
    assert steps_in(tmp_path) == [4, 6]


def test_a_checkpoint_that_is_being_removed_does_not_look_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (2, 4, 6):
        write_checkpoint(tmp_path, step)

    def die(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tasks.training.checkpoints.shutil.rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        prune(tmp_path)
    assert fault_of(tmp_path / "checkpoint-2") == "it was cut off half-way (no mark)"


def test_all_is_on_the_disk_before_the_mark_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path, 3, marked=False)
    (folder / "optimizer_0").mkdir()  # as several processes write it
    (folder / "optimizer_0" / "part.distcp").write_bytes(b"x" * 10)
    flushed: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def note(handle: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def rename(path: Path, target: Path) -> Path:
        flushed.append(f"-> {target.name}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(Path, "replace", rename)
    mark_complete(folder, 3, 1.0)

    at = flushed.index(f"-> {MARK}")
    assert set(flushed[: at - 1]) == {
        "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
        "part.distcp", "optimizer_0", "checkpoint-3",
    }  # fmt: skip
    assert flushed[at - 1].startswith(MARK)  # the mark's own bytes
    assert flushed[at + 1 :] == ["checkpoint-3", tmp_path.name]  # and its name
    assert json.loads((folder / MARK).read_text())["files"]["optimizer_0/part.distcp"]["bytes"] == 10
    assert newest_bytes(tmp_path) == 4000 + 8000 + 100 + 300 + 10 + (folder / "trainer_state.json").stat().st_size


@pytest.mark.parametrize(
    ("looks", "stopped"),
    [((), False), ((2.0, 1.0), False), ((2.0, 1.0, 1.5), False), ((1.0, 1.5, 1.2), True), ((1.0, 1.0, 1.0), True)],
)
def test_whether_training_had_stopped_early_is_read_from_its_looks(
    tmp_path: Path, looks: tuple[float, ...], stopped: bool
) -> None:
    find_checkpoint(tmp_path, PLAN)
    write_checkpoint(tmp_path, 3, looks=looks)
    found = find_checkpoint(tmp_path, PLAN)
    assert found is not None
    assert has_stopped(found, patience=2) is stopped
