"""Find the files of a source, say how they are written, and take their digest.

A source is a file, a folder of parts, a glob of parts, or a folder saved by `datasets`; local, or any fsspec URI. As
in Spark and Hive, files and folders whose name begins with `_` or `.` are no parts (`_SUCCESS`, `.part.crc`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations

from tasks.contracts.errors import DataError
from tasks.contracts.spec import DataFormat, DataSpec
from tasks.data.sources.opening import Part, cannot_read, decompressed, read_once
from tasks.data.sources.record import say_counts
from tasks.store.digest import digest_files

_JSON = ".json"  # a list of Label Studio tasks, or JSON Lines: the first character tells
_ENDINGS = {
    ".jsonl": DataFormat.JSONL,
    ".ndjson": DataFormat.JSONL,
    ".csv": DataFormat.CSV,
    ".tsv": DataFormat.CSV,
    ".parquet": DataFormat.PARQUET,
}
_MAGIC = re.compile(r"[*?\[]")
_BOM = b"\xef\xbb\xbf"
_COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
_FORMATS = "jsonl, csv, parquet, label_studio or dataset"


@dataclass(frozen=True, slots=True)
class Source:
    """Where the rows are.

    Attributes:
        uri: as the spec names it.
        fs: its file system.
        path: its path there; of a glob the folder that all its parts are below.
        format: how it is written; never `auto`.
        parts: its files in the order of their names; of a `dataset` all files of the folder.
        several: whether it is a folder or a glob, so that a row's file says something.
    """

    uri: str
    fs: Any
    path: str
    format: DataFormat
    parts: tuple[Part, ...]
    several: bool

    @property
    def size(self) -> int:
        """Bytes, as stored."""
        return sum(part.size for part in self.parts)


def find_source(data: DataSpec) -> Source:
    """Find the files of a source and say how they are written.

    In a folder whose format the spec names, files whose ending says another format are no parts.

    Raises:
        DataError: it does not exist or cannot be reached, its file system needs a package that is not installed, or
            nothing says how it is written.
    """
    fs, path = _file_system(data.source)
    try:
        return _find(data, fs, path)
    except OSError as error:
        raise cannot_read(data.source, error) from error
    except DataError:
        raise
    except Exception as error:
        if isinstance(fs, LocalFileSystem):
            raise
        # Each cloud's package has errors of its own, such as those about credentials.
        raise _cannot_reach(data.source, error) from error


def find_also(data: DataSpec, source: Source) -> tuple[Part, ...]:
    """The further files of rows that are there and not empty, in the order in which the spec names them.

    Raises:
        DataError: one is no file, is a part of the source already, or cannot be reached.
    """
    own = {(type(part.fs), part.path) for part in source.parts}
    parts: list[Part] = []
    for uri in data.also:
        fs, path = _file_system(uri)
        try:
            fs.invalidate_cache()
            if not fs.exists(path):
                continue
            if not fs.isfile(path):
                raise _wrong_also(uri, "is no file")
            size = fs.size(path)
        except OSError as error:
            raise cannot_read(uri, error) from error
        except DataError:
            raise
        except Exception as error:
            if isinstance(fs, LocalFileSystem):
                raise
            raise _cannot_reach(uri, error) from error
        if (type(fs), path) in own:
            raise _wrong_also(uri, "is a part of the source, or named twice, so its rows would be read twice")
        own.add((type(fs), path))
        if size != 0:
            parts.append(_part(fs, path, PurePosixPath(path).name, uri, size))
    return tuple(parts)


def missing_also(data: DataSpec) -> tuple[str, ...]:
    """Those of the further files that are not there yet.

    Raises:
        DataError: one cannot be reached.
    """
    missing = []
    for uri in data.also:
        fs, path = _file_system(uri)
        try:
            there = fs.exists(path)
        except Exception as error:
            raise _cannot_reach(uri, error) from error
        if not there:
            missing.append(uri)
    return tuple(missing)


def digest_of(source: Source) -> str:
    """sha256 of a file's bytes, or over the names and bytes of all parts of a folder.

    Raises:
        DataError: it is empty, or may not be read.
    """
    digests: dict[str, str] = {}
    size = 0
    for part in source.parts:
        with read_once(part) as raw:
            raw.drain()
            digests[part.name] = raw.digest
            size += raw.position
    if source.parts and size == 0:
        raise no_rows(source.uri, "is empty")
    return join_digests(source, digests)


def join_digests(source: Source, digests: dict[str, str]) -> str:
    """The digest of a source from those of its parts (by name)."""
    if source.several or source.format is DataFormat.DATASET:
        return digest_files(digests)
    return digests[source.parts[0].name]


def digest_part(part: Part) -> str:
    """sha256 of a file's bytes, as stored.

    Raises:
        DataError: it may not be read.
    """
    with read_once(part) as raw:
        raw.drain()
        return raw.digest


def join_also(digest: str, also: Sequence[str]) -> str:
    """The digest of a source and of its further files, from their own; without any it is the source's."""
    if not also:
        return digest
    return digest_files({"source": digest, **{f"also {number}": one for number, one in enumerate(also, start=1)}})


# -- finding ------------------------------------------------------------------------------------------------------


def _file_system(uri: str) -> tuple[Any, str]:
    if "://" not in uri:
        return LocalFileSystem(), str(Path(uri).absolute())
    try:
        return fsspec.url_to_fs(uri)
    except ImportError as error:
        protocol = uri.partition("://")[0].rpartition("::")[2]
        module = str(known_implementations.get(protocol, {}).get("class", "")).partition(".")[0]
        raise DataError(
            f"Sources of {protocol}:// need a package that is not installed: {error}.",
            where=uri,
            fix=f"`pip install {module}`" if module not in ("", "fsspec") else "install the package that is named",
        ) from error
    except ValueError as error:
        raise DataError(
            f"The address of the data source cannot be understood: {error}.",
            where=uri,
            fix="correct `data.source`; a local path needs no `://`, and fsspec's documentation lists the others",
        ) from error
    except Exception as error:
        raise _cannot_reach(uri, error) from error


def _find(data: DataSpec, fs: Any, path: str) -> Source:
    fs.invalidate_cache()  # a listing of before would hide a change
    if fs.isfile(path):
        if data.format is DataFormat.DATASET:
            raise _wrong_kind(data, "file")
        part = _part(fs, path, PurePosixPath(path).name, data.source, fs.size(path))
        return Source(data.source, fs, path, _format_of([part], data), (part,), several=False)
    if fs.isdir(path):
        return _find_folder(data, fs, path)
    if _MAGIC.search(path):
        steps = path.split("/")
        base = "/".join(steps[: next(number for number, step in enumerate(steps) if _MAGIC.search(step))])
        return _of_parts(data, fs, base, fs.glob(path, detail=True), None)
    raise DataError(
        "The data source does not exist.",
        where=data.source,
        fix="correct `data.source`; relative paths count from the YAML file",
    )


def _find_folder(data: DataSpec, fs: Any, path: str) -> Source:
    files = fs.find(path, detail=True)
    top = {name for name in (_below(path, file) for file in files) if "/" not in name}
    if data.format is DataFormat.DATASET or top & {"state.json", "dataset_dict.json"}:
        if data.format not in (DataFormat.AUTO, DataFormat.DATASET):
            raise _wrong_kind(data, "folder saved by `datasets`")
        parts = _parts_below(data.source, fs, path, files)
        return Source(data.source, fs, path, DataFormat.DATASET, tuple(parts), several=True)
    return _of_parts(data, fs, path, files, data.source)


def _of_parts(data: DataSpec, fs: Any, base: str, files: dict[str, Any], folder: str | None) -> Source:
    """A source of those files that are parts; `folder` is how an error calls `base`, None for a glob."""
    seen = {path: facts for path, facts in files.items() if not _is_hidden(_below(base, path))}
    parts = _parts_below(folder, fs, base, seen)
    if data.format is not DataFormat.AUTO:
        parts = [part for part in parts if _may_be(part, data.format)]
    if not parts:
        asked = "" if data.format is DataFormat.AUTO else f" of the format {data.format.value}"
        raise DataError(
            f"There are no files of rows{asked} (those whose name begins with `_` or `.` do not count).",
            where=data.source,
            fix="name a folder that has the files of rows in it, or a pattern that finds them",
        )
    return Source(data.source, fs, base, _format_of(parts, data), tuple(parts), several=True)


def _parts_below(folder: str | None, fs: Any, base: str, files: dict[str, Any]) -> list[Part]:
    parts = []
    for path, facts in files.items():
        if facts["type"] == "directory":
            continue
        name = _below(base, path)
        if folder is not None:
            shown = f"{folder.rstrip('/')}/{name}"
        else:
            shown = path if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(path)
        if facts["type"] != "file":
            raise _no_part("It is no file, or a link to one that is not there", shown)
        if ".." in name.split("/"):  # it would be copied to a place outside of the folder for copies
            raise _no_part("Its name leads out of its folder", shown)
        if name != name.encode(errors="replace").decode():  # it becomes the source of its rows
            raise _no_part("Its name is not UTF-8", repr(shown))
        parts.append(_part(fs, path, name, shown, facts.get("size")))
    return sorted(parts, key=lambda part: part.name)


def _is_hidden(name: str) -> bool:
    return any(step[:1] in (".", "_") for step in name.split("/"))


def _below(base: str, path: str) -> str:
    return path.removeprefix(base.rstrip("/")).lstrip("/")


def _part(fs: Any, path: str, name: str, shown: str, size: int | None) -> Part:
    compression = _COMPRESSIONS.get(PurePosixPath(path).suffix.lower())
    return Part(fs, path, name, shown, size or 0, compression)


def _ending(part: Part) -> str:
    """The ending that says how a part is written, without that of its compression."""
    path = PurePosixPath(part.path)
    return (path.with_suffix("") if part.compression else path).suffix.lower()


def _may_be(part: Part, written_as: DataFormat) -> bool:
    """Whether a part can be written so: its ending says this format, or none."""
    ending = _ending(part)
    if ending == _JSON:
        return written_as in (DataFormat.JSONL, DataFormat.LABEL_STUDIO)
    return _ENDINGS.get(ending, written_as) is written_as


def _format_of(parts: list[Part], data: DataSpec) -> DataFormat:
    """How all parts are written."""
    if data.format is not DataFormat.AUTO:
        return data.format
    found: dict[DataFormat, int] = Counter()
    json_format: DataFormat | None = None
    for part in parts:
        ending = _ending(part)
        if ending == _JSON:
            json_format = json_format or _look_into(part)
            found[json_format] += 1
        elif ending in _ENDINGS:
            found[_ENDINGS[ending]] += 1
        else:
            raise DataError(
                f"The ending {ending!r} does not say how the source is written.",
                where=part.shown,
                fix=f"set `data.format` to {_FORMATS}"
                + ("" if len(parts) == 1 else ", or begin the file's name with `_` if it holds no rows"),
            )
    if len(found) > 1:
        counts = say_counts((written_as.value, count) for written_as, count in found.items())
        raise DataError(
            f"The parts are written in several formats: {counts}.",
            where=data.source,
            fix="set `data.format` to the one whose files are to be read",
        )
    return next(iter(found))


def _look_into(part: Part) -> DataFormat:
    """Whether a `.json` file is a Label Studio export or JSON Lines.

    Raises:
        DataError: it is neither.
    """
    from tasks.data.sources.label_studio import is_export, read_list

    with read_once(part) as raw:
        stream = decompressed(raw, part)
        if stream.peek(1).removeprefix(_BOM).lstrip().startswith(b"{"):
            return DataFormat.JSONL
        first = next(read_list(stream, part.shown), None)
    if first is None or is_export(first.value):
        return DataFormat.LABEL_STUDIO
    raise DataError(
        "The file is a JSON list, but no Label Studio export (its items have no `annotations`).",
        where=part.shown,
        fix=f"write one object a line: `jq -c '.[]' {part.name} > rows.jsonl`; or set `data.format: label_studio` if "
        "it is such an export",
    )


# -- errors -------------------------------------------------------------------------------------------------------


def no_rows(shown: str, what: str) -> DataError:
    """The error that a source without rows gives."""
    return DataError(
        f"The data source {what}.", where=shown, fix="check how it was written; it must hold at least one row"
    )


def _wrong_also(uri: str, what: str) -> DataError:
    return DataError(
        f"A further file of rows {what}.",
        where=uri,
        fix="name in `data.also` JSON Lines files beside the source, each once",
    )


def _cannot_reach(uri: str, error: Exception) -> DataError:
    return DataError(
        f"The data source cannot be reached: {type(error).__name__}: {error}.",
        where=uri,
        fix="check the address, the network, and the credentials that its fsspec package looks for",
    )


def _no_part(what: str, shown: str) -> DataError:
    return DataError(
        f"A part of the data source cannot be read. {what}.",
        where=shown,
        fix="mend or rename it, or begin its name with `_` if it holds no rows",
    )


def _wrong_kind(data: DataSpec, kind: str) -> DataError:
    return DataError(
        f"The data source is a {kind}, but `data.format` is {data.format.value}.",
        where=data.source,
        fix="name a folder for `dataset` and files for the other formats, or set `data.format: auto`",
    )
