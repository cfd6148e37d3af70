"""Artefacts on any fsspec file system. The manifest is written last, so its existence means that all else is there.

Layout below the root:

    <step>/<first 20 of the fingerprint>/manifest.json     names the folder of files
    <step>/<first 20 of the fingerprint>/<attempt>/...     the files, never changed afterwards
    scratch/<step>-<first 20>/                             unfinished work that can go on (checkpoints), local only

Each attempt writes a folder of its own, so two processes that make the same artefact never mix their files; the
first to write the manifest wins and the other takes over its result.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from pydantic import Field, ValidationError

from tasks.contracts.errors import StoreError
from tasks.contracts.spec import Frozen
from tasks.store.digest import canonical, digest_file, digest_files, fingerprint

MANIFEST = "manifest.json"
_SHORT = 20  # characters of a fingerprint in a path: 80 bits, no collisions, readable paths
_LIBRARIES = (
    "accelerate", "bitsandbytes", "cleanlab", "datasets", "great_expectations", "mlflow", "numpy", "pandas", "peft",
    "prefect", "presidio-analyzer", "pydantic", "torch", "transformers", "trl",
)  # fmt: skip


class FileEntry(Frozen):
    """One file of an artefact; size in bytes."""

    sha256: str
    size: int


class Manifest(Frozen):
    """What made an artefact and what it holds."""

    step: str
    step_version: int
    fingerprint: str
    digest: str
    config: Any
    inputs: dict[str, str]
    files: dict[str, FileEntry]
    folder: str
    facts: dict[str, Any] = Field(default={}, description="counts and numbers that the step says of its result")
    libraries: dict[str, str] = {}
    git_commit: str | None = None
    created: datetime


@dataclass(frozen=True)
class Artefact:
    """A finished artefact: its manifest, where it is, and whether it was found finished."""

    uri: str
    manifest: Manifest
    reused: bool

    def reference(self) -> dict[str, Any]:
        """The fields that every `ArtefactRef` has."""
        return {
            "uri": self.uri,
            "step": self.manifest.step,
            "fingerprint": self.manifest.fingerprint,
            "digest": self.manifest.digest,
            "reused": self.reused,
        }


@cache
def _libraries() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def _git_commit() -> str | None:
    """The commit of the code that runs, "-dirty" behind it when files differ; None outside a checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=here, capture_output=True, text=True, check=True, timeout=10,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}-dirty" if changed.strip() else commit


class Store:
    """Finished work below one root URI."""

    def __init__(self, root: str) -> None:
        """Open the store at `root`, a folder or any fsspec URI; a relative folder becomes absolute.

        Raises:
            StoreError: the file system of the URI cannot be reached.
        """
        try:
            fs, path = fsspec.url_to_fs(root)
        except (ImportError, OSError, ValueError) as error:
            raise StoreError(
                f"The store cannot be opened: {error}", where=root, fix="check `execution.store` and its fsspec package"
            ) from error
        self._fs = fs
        self._path = path.rstrip("/")
        self.local = isinstance(fs, LocalFileSystem)
        self.root = self._path if self.local else fs.unstrip_protocol(self._path)

    # -- finding ------------------------------------------------------------------------------------------------

    def find(self, step: str, recipe: str) -> Artefact | None:
        """The finished artefact of a step with this fingerprint, or None."""
        return self._read(f"{self._path}/{step}/{recipe[:_SHORT]}", reused=True)

    def open(self, uri: str) -> Artefact:
        """The artefact behind a reference's URI.

        Raises:
            StoreError: nothing finished is there.
        """
        artefact = self._read(self._fs._strip_protocol(uri), reused=True)
        if artefact is None:
            raise StoreError("No finished artefact is there.", where=uri, fix="run the step that makes it again")
        return artefact

    def list(self, step: str) -> Iterator[Artefact]:
        """All finished artefacts of a step, in no order."""
        try:
            folders = self._fs.ls(f"{self._path}/{step}", detail=False)
        except FileNotFoundError:
            return
        for folder in folders:
            artefact = self._read(folder.rstrip("/"), reused=True)
            if artefact is not None:
                yield artefact

    def files(self, artefact: Artefact) -> Path:
        """A local folder with the artefact's files, each checked against the manifest.

        Raises:
            StoreError: a file is missing, was added or was changed.
        """
        source = f"{self._fs._strip_protocol(artefact.uri)}/{artefact.manifest.folder}"
        if self.local:
            folder = Path(source)
        else:
            folder = _cache_home() / artefact.manifest.digest
            if not folder.exists():
                part = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}")
                self._fs.get(f"{source}/", f"{part}/", recursive=True)
                try:
                    part.rename(folder)
                except OSError:  # another process was first
                    shutil.rmtree(part, ignore_errors=True)
        present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        expected = artefact.manifest.files
        fix = f"delete {artefact.uri if self.local else folder} and run again; it will be made anew"
        for name in sorted(expected.keys() - present):
            raise StoreError("A file of a finished artefact is missing.", where=f"{folder}/{name}", fix=fix)
        for name in sorted(present - expected.keys()):
            raise StoreError("A finished artefact has a file too many.", where=f"{folder}/{name}", fix=fix)
        for name, entry in expected.items():
            if digest_file(folder / name) != entry.sha256:
                raise StoreError("A file of a finished artefact was changed.", where=f"{folder}/{name}", fix=fix)
        return folder

    # -- making -------------------------------------------------------------------------------------------------

    def produce(
        self,
        step: str,
        step_version: int,
        config: Any,
        inputs: Mapping[str, str],
        make: Callable[[Path], Mapping[str, Any]],
    ) -> Artefact:
        """Find the artefact of this recipe, or make it.

        Args:
            step: name of the step; the folder in the store.
            step_version: raise it when the step's code changes what it makes.
            config: what of the configuration the result depends on.
            inputs: digests of what the step reads, by name.
            make: writes the files into the folder it is given and returns facts for the manifest (plain JSON).

        Raises:
            StoreError: the store cannot be written (full, read-only); nothing half-written stays visible.
        """
        recipe = fingerprint(step, step_version, config, inputs)
        found = self.find(step, recipe)
        if found is not None:
            return found
        home = f"{self._path}/{step}/{recipe[:_SHORT]}"
        attempt = uuid.uuid4().hex[:12]
        try:
            work = Path(home, attempt) if self.local else Path(tempfile.mkdtemp(prefix=f"goldgate-{step}-"))
            work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            facts = make(work)
            entries = {
                path.relative_to(work).as_posix(): FileEntry(sha256=digest_file(path), size=path.stat().st_size)
                for path in sorted(work.rglob("*"))
                if path.is_file()
            }
            manifest = Manifest(
                step=step,
                step_version=step_version,
                fingerprint=recipe,
                digest=digest_files({name: entry.sha256 for name, entry in entries.items()}),
                config=json.loads(canonical(config)),
                inputs=dict(inputs),
                files=entries,
                folder=attempt,
                facts=dict(facts),
                libraries=_libraries(),
                git_commit=_git_commit(),
                created=datetime.now(UTC),
            )
            if not self.local:
                self._fs.put(f"{work}/", f"{home}/{attempt}/", recursive=True)
            first = self._read(home, reused=True) or self._write_last(home, manifest)
            if first is not None:  # another process finished the same recipe meanwhile
                shutil.rmtree(work, ignore_errors=True)
                return first
        except OSError as error:
            shutil.rmtree(work, ignore_errors=True)
            if not _is_about_writing(error, work.parent):
                raise
            raise self._unwritable(error) from error
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        if not self.local:
            shutil.rmtree(work, ignore_errors=True)
        return Artefact(self._uri(home), manifest, reused=False)

    def scratch(self, step: str, recipe: str) -> Path:
        """A local folder that outlives a killed process, for work that goes on where it stopped (checkpoints)."""
        root = Path(self._path) if self.local else _cache_home()
        folder = root / "scratch" / f"{step}-{recipe[:_SHORT]}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error
        return folder

    # -- inside -------------------------------------------------------------------------------------------------

    def _uri(self, path: str) -> str:
        return path if self.local else str(self._fs.unstrip_protocol(path))

    def _read(self, home: str, *, reused: bool) -> Artefact | None:
        path = f"{home}/{MANIFEST}"
        try:
            text = self._fs.cat_file(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StoreError(
                f"The store cannot be read: {error}", where=path, fix="check its permissions and that it is mounted"
            ) from error
        try:
            manifest = Manifest.model_validate_json(text)
        except ValidationError as error:
            raise StoreError(
                f"A manifest cannot be read: {error.errors()[0]['msg']}",
                where=path,
                fix=f"delete {home} and run again; it will be made anew",
            ) from error
        return Artefact(self._uri(home), manifest, reused)

    def _write_last(self, home: str, manifest: Manifest) -> Artefact | None:
        """Write the manifest, whole or not at all; return the artefact of another process that was first, if one was.

        Two processes can be first at once on a remote store; both results are whole and of the same recipe there.
        """
        path, data = f"{home}/{MANIFEST}", manifest.model_dump_json(indent=2).encode()
        if not self.local:
            self._fs.pipe_file(path, data)
            return None
        part = Path(f"{path}.{uuid.uuid4().hex}")
        try:
            with part.open("wb") as out:
                out.write(data)
                out.flush()
                os.fsync(out.fileno())
            try:
                os.link(part, path)  # fails if the name is taken, unlike a rename
            except FileExistsError:
                return self._read(home, reused=True)
            except OSError:  # a file system without hard links
                part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        return None

    def _unwritable(self, error: OSError) -> StoreError:
        return StoreError(
            f"The store cannot be written: {error.strerror or error}",
            where=str(error.filename or self.root),
            fix="free space, allow writing, or set `execution.store` to another place; finished steps are kept",
        )


def _is_about_writing(error: OSError, home: Path) -> bool:
    """Whether the store is to blame, and not a file that a step reads."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return True
    return error.filename is not None and Path(os.fsdecode(error.filename)).is_relative_to(home)


def _cache_home() -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))) / "goldgate"
    home.mkdir(parents=True, exist_ok=True)
    return home
