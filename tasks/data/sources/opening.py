"""Open the parts of a source, and take their digests of the very bytes that the rows come from."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fsspec.implementations.local import LocalFileSystem

from tasks.contracts.errors import DataError
from tasks.store.digest import digest_file

_BLOCK = 2**20


@dataclass(frozen=True, slots=True)
class Part:
    """A file of rows.

    Attributes:
        fs: the file system that it lies on.
        path: its path there.
        name: its path below the source's folder, or its own name.
        shown: how an error calls it.
        size: bytes, as stored; 0 where the file system does not say.
        compression: how it is compressed (gzip, bz2, xz, zstd), by its ending; None for not at all.
    """

    fs: Any
    path: str
    name: str
    shown: str
    size: int
    compression: str | None


class _ReadError(OSError):
    """What the package of a remote file system raised while it read."""


class HashedReader(io.RawIOBase):
    """A file that is read from its beginning to its end, and hashed on the way.

    Errors of remote file systems that are no OSErrors become such ones.
    """

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__()
        self._file = file
        self._sha256 = hashlib.sha256()
        self.position = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer; return how many bytes were read, 0 at the end."""
        try:
            found = self._file.read(len(buffer))
        except (OSError, MemoryError):
            raise
        except Exception as error:
            raise _ReadError(f"{type(error).__name__}: {error}") from error
        buffer[: len(found)] = found
        self._sha256.update(found)
        self.position += len(found)
        return len(found)

    def drain(self) -> None:
        """Read what is left."""
        block = bytearray(_BLOCK)
        while self.readinto(block):
            pass

    @property
    def digest(self) -> str:
        """sha256 of what was read so far."""
        return self._sha256.hexdigest()


@contextmanager
def open_part(part: Part, digests: dict[str, str]) -> Iterator[tuple[io.BufferedReader, HashedReader]]:
    """Open a part to be read once from its beginning; at the end its digest is in `digests`, by its name.

    Gives the bytes, decompressed, and the reader below, which knows how many stored bytes are read.

    Raises:
        DataError: it disappeared, may not be read, or is damaged.
    """
    with read_once(part) as raw:
        yield decompressed(raw, part), raw
        raw.drain()
        digests[part.name] = raw.digest


@contextmanager
def open_seekable(part: Part, digests: dict[str, str]) -> Iterator[IO[bytes]]:
    """Open a part, as stored, to be read in any order; at the end its digest is in `digests`, by its name.

    A remote part is copied to a temporary file first and hashed on the way; a local one is hashed when it has been
    read, through the same handle, so that the digest is that of the bytes that the rows came from.

    Raises:
        DataError: it disappeared, may not be read, or is damaged.
    """
    if not isinstance(part.fs, LocalFileSystem):
        with tempfile.TemporaryFile(prefix="goldgate-part-") as copy:
            with read_once(part) as raw:
                _copy(raw, copy)
                digests[part.name] = raw.digest
            copy.seek(0)
            yield copy
        return
    with _told_of(part), Path(part.path).open("rb") as file:
        yield file
        file.seek(0)
        digests[part.name] = hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def local_folder(path: str, parts: Sequence[Part], digests: dict[str, str]) -> Iterator[Path]:
    """The folder `path`, or its copy on this machine, with these files; at the end their digests are in `digests`.

    Raises:
        DataError: a file disappeared or may not be read.
    """
    if not parts or isinstance(parts[0].fs, LocalFileSystem):
        yield Path(path)
        for part in parts:
            with _told_of(part):
                digests[part.name] = digest_file(Path(part.path))
        return
    with tempfile.TemporaryDirectory(prefix="goldgate-dataset-") as folder:
        for part in parts:
            copy = Path(folder, part.name)
            copy.parent.mkdir(parents=True, exist_ok=True)
            with read_once(part) as raw, copy.open("wb") as out:
                _copy(raw, out)
                digests[part.name] = raw.digest
        yield Path(folder)


def decompressed(file: Any, part: Part) -> io.BufferedReader:
    """The bytes of a part, from a file opened as stored."""
    match part.compression:
        case None:
            opened = file
        case "gzip":
            opened = gzip.GzipFile(fileobj=file)
        case "bz2":
            opened = bz2.BZ2File(file)
        case "xz":
            opened = lzma.LZMAFile(file)  # noqa: SIM115  closed with the reader around it
        case _:
            # Python's own package for zstd stops at the end of the first frame, and takes a file cut short for whole.
            import pyarrow as pa

            opened = pa.CompressedInputStream(pa.PythonFile(file, mode="r"), part.compression)
    return io.BufferedReader(opened, _BLOCK)


@contextmanager
def read_once(part: Part) -> Iterator[HashedReader]:
    """Open a part, as stored, to be read once from its beginning."""
    with _told_of(part):
        try:
            file = part.fs.open(part.path, "rb")
        except OSError:
            raise
        except Exception as error:
            raise _ReadError(f"{type(error).__name__}: {error}") from error
        with file:
            yield HashedReader(file)


@contextmanager
def _told_of(part: Part) -> Iterator[None]:
    """Errors of the file and of its decompression, said as the source's."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(
            "The data source disappeared while it was read.",
            where=part.shown,
            fix="run again when nothing writes to it or moves it",
        ) from error
    except OSError as error:
        # gzip, bz2 and pyarrow raise bare OSErrors at what they cannot decompress.
        if part.compression is not None and error.errno is None and not isinstance(error, _ReadError):
            raise _damaged(part, error) from error
        raise cannot_read(part.shown, error) from error
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise _damaged(part, error) from error


def _copy(raw: HashedReader, out: IO[bytes]) -> None:
    block = bytearray(_BLOCK)
    while count := raw.readinto(block):
        out.write(memoryview(block)[:count])


# -- errors ---------------------------------------------------------------------------------------------------------


def cannot_read(shown: str, error: OSError) -> DataError:
    """The error that a file which may not be read gives."""
    return DataError(
        f"The data source cannot be read: {error.strerror or error}.",
        where=str(error.filename or shown),
        fix="check that it exists and that this user may read it",
    )


def _damaged(part: Part, error: Exception) -> DataError:
    return DataError(
        f"The part cannot be decompressed: {error}.",
        where=part.shown,
        fix="write the file again; it is cut short, damaged, or not compressed as its ending says",
    )
