"""Finished work is found again, unfinished work is not, and changed work is refused."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tasks.contracts.errors import StoreError
from tasks.store import Artefact, Store, digest_folder

Make = Callable[[Path], Mapping[str, Any]]


def writes(files: Mapping[str, str], **facts: Any) -> Make:
    """A step that writes files."""

    def make(folder: Path) -> Mapping[str, Any]:
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        return facts

    return make


def must_not_run(_: Path) -> Mapping[str, Any]:
    """A step that was finished before."""
    raise AssertionError("made again, though it is there")


def made(root: Path | str, text: str = "hello") -> Artefact:
    """One small artefact."""
    return Store(str(root)).produce("step", 1, {"a": 1}, {"in": "x"}, writes({"a.txt": text, "sub/b.txt": "b"}, rows=2))


def left_over(root: Path) -> list[str]:
    """All files below a root."""
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def test_same_recipe_is_found(tmp_path: Path) -> None:
    first = made(tmp_path)
    assert not first.reused
    again = Store(str(tmp_path)).produce("step", 1, {"a": 1}, {"in": "x"}, must_not_run)
    assert again.reused
    assert again.manifest == first.manifest
    assert again.reference() == {**first.reference(), "reused": True}
    assert again.manifest.facts == {"rows": 2}
    store = Store(str(tmp_path))
    assert store.open(first.uri).manifest == first.manifest
    assert store.find("step", first.manifest.fingerprint) is not None
    assert [found.uri for found in store.list("step")] == [first.uri]
    assert list(store.list("other")) == []
    folder = store.files(again)
    assert (folder / "sub" / "b.txt").read_text() == "b"
    assert digest_folder(folder) == first.manifest.digest


@pytest.mark.parametrize(
    ("step", "version", "config", "inputs"),
    [
        ("other", 1, {"a": 1}, {"in": "x"}),
        ("step", 2, {"a": 1}, {"in": "x"}),
        ("step", 1, {"a": 2}, {"in": "x"}),
        ("step", 1, {"a": 1}, {"in": "y"}),
    ],
)
def test_another_recipe_is_another_artefact(
    tmp_path: Path, step: str, version: int, config: dict[str, int], inputs: dict[str, str]
) -> None:
    first = made(tmp_path)
    other = Store(str(tmp_path)).produce(step, version, config, inputs, writes({"a.txt": "hello", "sub/b.txt": "b"}))
    assert not other.reused
    assert other.uri != first.uri
    assert other.manifest.digest == first.manifest.digest  # the same bytes, by another recipe


def test_two_roots_give_equal_fingerprints_and_digests(tmp_path: Path) -> None:
    one, two = made(tmp_path / "one"), made(tmp_path / "two" / "deeper")
    assert one.manifest.fingerprint == two.manifest.fingerprint
    assert one.manifest.digest == two.manifest.digest
    assert one.uri != two.uri


def test_relative_root_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Store("here").root == str(tmp_path / "here")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="No finished artefact is there") as caught:
        Store(str(tmp_path)).open(str(tmp_path / "step" / ("0" * 20)))
    assert caught.value.where is not None


def test_unknown_file_system() -> None:
    with pytest.raises(StoreError, match="store cannot be opened"):
        Store("gopher://old/place")


@pytest.mark.parametrize(
    ("change", "reason", "file"),
    [
        (lambda folder: (folder / "a.txt").write_text("hellO"), "was changed", "a.txt"),
        (lambda folder: (folder / "sub" / "b.txt").unlink(), "is missing", "sub/b.txt"),
        (lambda folder: (folder / "sub" / "c.txt").write_text(""), "has a file too many", "sub/c.txt"),
    ],
)
def test_changed_files_are_named(tmp_path: Path, change: Callable[[Path], Any], reason: str, file: str) -> None:
    artefact = made(tmp_path)
    store = Store(str(tmp_path))
    folder = store.files(artefact)
    change(folder)
    with pytest.raises(StoreError, match=reason) as caught:
        store.files(artefact)
    assert caught.value.where == f"{folder}/{file}"
    assert artefact.uri in caught.value.fix


def test_damaged_manifest_is_named(tmp_path: Path) -> None:
    artefact = made(tmp_path)
    (Path(artefact.uri) / "manifest.json").write_text('{"step": "st')
    with pytest.raises(StoreError, match="manifest cannot be read") as caught:
        made(tmp_path)
    assert caught.value.where == f"{artefact.uri}/manifest.json"


def test_error_of_the_step_leaves_nothing(tmp_path: Path) -> None:
    def fails(folder: Path) -> Mapping[str, Any]:
        (folder / "half.txt").write_text("half")
        raise ValueError("the step's own")

    with pytest.raises(ValueError, match="the step's own"):
        Store(str(tmp_path)).produce("step", 1, {"a": 1}, {"in": "x"}, fails)
    assert left_over(tmp_path) == []
    assert not made(tmp_path).reused


def test_missing_source_is_not_blamed_on_the_store(tmp_path: Path) -> None:
    def reads(_: Path) -> Mapping[str, Any]:
        return {"text": (tmp_path / "source.jsonl").read_text()}

    with pytest.raises(FileNotFoundError, match=r"source\.jsonl"):
        Store(str(tmp_path / "store")).produce("step", 1, {}, {}, reads)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_full_disk_in_the_step_leaves_nothing(tmp_path: Path, code: int) -> None:
    def fills(folder: Path) -> Mapping[str, Any]:
        (folder / "half.txt").write_text("half")
        raise OSError(code, os.strerror(code))

    with pytest.raises(StoreError, match=f"store cannot be written: {os.strerror(code)}") as caught:
        Store(str(tmp_path)).produce("step", 1, {"a": 1}, {"in": "x"}, fills)
    assert "free space" in caught.value.fix
    assert left_over(tmp_path) == []


def test_full_disk_at_the_manifest_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match="No space left on device"):
            made(tmp_path)
    assert left_over(tmp_path) == []
    assert not made(tmp_path).reused


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mount.returncode != 0:
        pytest.skip("mounting needs root; the tests with a simulated error cover the same path")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_disk_that_is_really_full(small_disk: Path) -> None:
    kept = made(small_disk / "store")
    with pytest.raises(StoreError, match="No space left on device"):
        Store(str(small_disk / "store")).produce("big", 1, {}, {}, writes({"big.txt": "x" * 200_000}))
    assert Store(str(small_disk / "store")).open(kept.uri).manifest == kept.manifest
    assert not list((small_disk / "store" / "big").rglob("*.txt"))


def test_disk_that_is_really_read_only(small_disk: Path) -> None:
    kept = made(small_disk / "store")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert made(small_disk / "store").reused
    store = Store(str(small_disk / "store"))
    with pytest.raises(StoreError, match="Read-only file system") as caught:
        store.produce("step", 2, {}, {}, must_not_run)
    assert caught.value.where is not None
    assert caught.value.where.startswith(str(small_disk))
    with pytest.raises(StoreError, match="Read-only file system"):
        store.scratch("step", "f" * 64)
    assert store.files(kept).is_dir()


def test_root_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="store cannot be written"):
        made(tmp_path / "file" / "store")


_DIES = """
import os, signal, sys, time
from pathlib import Path
from tasks.store import Store

def make(folder):
    (folder / "a.txt").write_text("half")
    if sys.argv[2] == "step":
        print("ready", flush=True)
        time.sleep(60)
    return {}

if sys.argv[2] == "manifest":
    def stop(_):
        print("ready", flush=True)
        time.sleep(60)
    os.fsync = stop
Store(sys.argv[1]).produce("step", 1, {"a": 1}, {"in": "x"}, make)
"""


@pytest.mark.parametrize("place", ["step", "manifest"])
def test_killed_before_the_manifest(tmp_path: Path, place: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _DIES, str(tmp_path), place], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGKILL)
    assert left_over(tmp_path) != []
    assert list(Store(str(tmp_path)).list("step")) == []
    whole = made(tmp_path)
    assert not whole.reused
    assert (Store(str(tmp_path)).files(whole) / "a.txt").read_text() == "hello"
    assert made(tmp_path).reused


_RACES = """
import sys, time
from pathlib import Path
from tasks.store import Store
root, number, go = sys.argv[1:]

def make(folder):
    (folder / "a.txt").write_text(number)  # each writes other bytes, so that a mixture would show
    print("ready", flush=True)
    while not Path(go).exists():
        time.sleep(0.01)
    return {"number": number}

artefact = Store(root).produce("step", 1, {}, {}, make)
print(artefact.manifest.facts["number"], artefact.reused)
"""


def test_two_processes_make_one_artefact(tmp_path: Path) -> None:
    go = tmp_path / "go"
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", _RACES, str(tmp_path / "store"), str(number), str(go)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    go.touch()
    said = [racer.communicate(timeout=60)[0].split() for racer in racers]
    (winner,) = {number for number, _ in said}
    assert sorted(reused for _, reused in said) == ["False", "True"]
    store = Store(str(tmp_path / "store"))
    (artefact,) = store.list("step")
    assert (store.files(artefact) / "a.txt").read_text() == winner
    assert len(left_over(tmp_path / "store")) == 2  # the loser's files are gone


def test_second_to_finish_takes_over_the_first(tmp_path: Path) -> None:
    def overtaken(folder: Path) -> Mapping[str, Any]:
        made(tmp_path, "first")
        (folder / "a.txt").write_text("second")
        return {}

    artefact = Store(str(tmp_path)).produce("step", 1, {"a": 1}, {"in": "x"}, overtaken)
    assert artefact.reused
    assert (Store(str(tmp_path)).files(artefact) / "a.txt").read_text() == "first"


def test_overtaken_while_the_manifest_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def late(source: Any, target: Any) -> None:
        monkeypatch.setattr(os, "link", link)
        made(tmp_path, "first")
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    artefact = made(tmp_path, "second")
    assert artefact.reused
    assert (Store(str(tmp_path)).files(artefact) / "a.txt").read_text() == "first"
    assert len(left_over(tmp_path)) == 3


def test_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: Any, __: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refused)
    assert not made(tmp_path).reused
    assert made(tmp_path).reused


def test_scratch_outlives_a_process(tmp_path: Path) -> None:
    folder = Store(str(tmp_path)).scratch("train", "f" * 64)
    (folder / "checkpoint").write_text("7")
    assert (Store(str(tmp_path)).scratch("train", "f" * 64) / "checkpoint").read_text() == "7"
    assert Store(str(tmp_path)).scratch("train", "e" * 64) != folder


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A store in memory, its local copies below `tmp_path`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = f"/goldgate-{time.monotonic_ns()}"
    yield f"memory://{root}"
    memory = fsspec.filesystem("memory")
    if memory.exists(root):
        memory.rm(root, recursive=True)


def test_remote_round_trip(remote: str, tmp_path: Path) -> None:
    store = Store(remote)
    assert store.root == remote
    first = made(remote)
    assert first.uri.startswith(f"{remote}/step/")
    assert made(remote).reused
    assert store.open(first.uri).manifest == first.manifest
    assert [found.uri for found in store.list("step")] == [first.uri]
    folder = store.files(first)
    assert folder.is_relative_to(tmp_path / "cache")
    assert (folder / "sub" / "b.txt").read_text() == "b"
    assert store.files(first) == folder
    assert first.manifest.fingerprint == made(tmp_path / "local").manifest.fingerprint
    assert not (tmp_path / "memory:").exists()

    (folder / "a.txt").write_text("hellO")
    with pytest.raises(StoreError, match="was changed") as caught:
        store.files(first)
    assert str(folder) in caught.value.fix  # the copy is at fault, not the store


def test_remote_error_of_the_step_leaves_nothing(remote: str) -> None:
    def fails(folder: Path) -> Mapping[str, Any]:
        (folder / "half.txt").write_text("half")
        raise ValueError("the step's own")

    with pytest.raises(ValueError, match="the step's own"):
        Store(remote).produce("step", 1, {}, {}, fails)
    assert list(Store(remote).list("step")) == []
