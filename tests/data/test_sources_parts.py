"""Where parts are found, how they are opened, and that a source which changes is never taken for what it was."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tasks.contracts.errors import DataError
from tasks.contracts.rows import Row, read_rows
from tasks.contracts.spec import DataFormat, DataSpec, TaskKind
from tasks.data import ingest as module
from tasks.data.ingest import digest_source, ingest, source_format
from tasks.data.sources import record as record_module
from tasks.store.digest import digest_file, digest_folder
from tests.data.toy_data import read_lines, rows, write_lines

RECORDS = rows(40)


class TestedFileSystem(MemoryFileSystem):
    """A remote file system that counts the bytes read of each file, and loses a file after some of them."""

    protocol = "tested"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    read: Counter[str] = Counter()
    broken_after: int | None = None
    failure: Exception = FileNotFoundError("gone")

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("tested://"))

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        opened = super()._open(path, mode, **options)
        return opened if mode != "rb" else CountedFile(opened.getvalue(), path)


class CountedFile(io.BytesIO):
    def __init__(self, content: bytes, path: str) -> None:
        super().__init__(content)
        self.path = path

    def read(self, size: int | None = -1) -> bytes:
        limit = TestedFileSystem.broken_after
        if limit is not None and self.tell() + (size or 0) > limit:
            if self.tell() >= limit:
                raise TestedFileSystem.failure
            size = limit - self.tell()
        found = super().read(size)
        TestedFileSystem.read[self.path] += len(found)
        return found


@pytest.fixture
def remote() -> Iterator[str]:
    fsspec.register_implementation("tested", TestedFileSystem, clobber=True)
    fs = fsspec.filesystem("tested")
    fs.mkdirs("/bucket/rows", exist_ok=True)
    TestedFileSystem.read.clear()
    yield "tested://bucket/rows"
    TestedFileSystem.broken_after = None
    TestedFileSystem.store.clear()
    TestedFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def run(data: DataSpec, folder: Path, kind: TaskKind = TaskKind.CLASSIFY) -> list[Row]:
    ingest(data, kind, folder, expected_digest=digest_source(data))
    return list(read_rows(folder / "rows.jsonl"))


def refusal(data: DataSpec, out: Path) -> DataError:
    with pytest.raises(DataError) as caught:
        ingest(data, TaskKind.CLASSIFY, out)
    return caught.value


def pack_zstd(content: bytes) -> bytes:
    return bytes(pa.compress(content, codec="zstd", asbytes=True))


def as_bytes(records: list[dict[str, Any]], ending: str) -> bytes:
    if ending.startswith(".csv"):
        lines = ["id,text,label", *(f"{r['id']},{r['text']},{r['label']}" for r in records)]
        content = ("\n".join(lines) + "\n").encode()
    elif ending == ".parquet":
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(records), sink)
        content = sink.getvalue()
    else:
        content = "".join(json.dumps(record) + "\n" for record in records).encode()
    pack: dict[str, Callable[[bytes], bytes]] = {
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
        ".zst": pack_zstd,
    }
    return pack.get(Path(ending).suffix if ending.count(".") > 1 else "", bytes)(content)


def put(root: str, files: dict[str, bytes]) -> None:
    fs, path = fsspec.url_to_fs(root)
    for name, content in files.items():
        fs.makedirs(f"{path}/{name}".rpartition("/")[0], exist_ok=True)
        fs.pipe_file(f"{path}/{name}", content)


ENDINGS = [".jsonl", ".csv", ".parquet", ".jsonl.gz", ".csv.gz", ".jsonl.bz2", ".jsonl.xz", ".jsonl.zst"]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("place", ["local", "file", "remote", "glob", "remote glob"])
def test_a_folder_of_parts_is_read_in_the_order_of_names(
    place: str, ending: str, tmp_path: Path, out: Path, remote: str
) -> None:
    local = tmp_path / "rows"
    root, source = {
        "local": (str(local), str(local)),
        "file": (local.as_uri(), local.as_uri()),
        "remote": (remote, remote),
        "glob": (str(local), f"{local}/**/*{ending}"),
        "remote glob": (remote, f"{remote}/**/*{ending}"),
    }[place]
    put(root, {f"b{ending}": as_bytes(RECORDS[20:], ending), f"a/1{ending}": as_bytes(RECORDS[:20], ending)})
    found = run(DataSpec(source=source), out)
    assert [(row.id, row.text, row.target) for row in found] == [(r["id"], r["text"], r["label"]) for r in RECORDS]
    assert [row.source for row in found] == [f"a/1{ending}"] * 20 + [f"b{ending}"] * 20
    first = 2 if ending.startswith(".csv") else 1
    assert [row.line for row in found] == [*range(first, first + 20)] * 2


def test_a_digest_says_the_same_wherever_the_parts_lie(tmp_path: Path, remote: str) -> None:
    files = {"b.jsonl": as_bytes(RECORDS[20:], ".jsonl"), "a/1.jsonl": as_bytes(RECORDS[:20], ".jsonl")}
    local = tmp_path / "rows"
    put(str(local), files)
    put(remote, files)
    roots = [str(local), f"{local}/", local.as_uri(), remote, f"{remote}/**/*.jsonl"]
    assert {digest_source(DataSpec(source=root)) for root in roots} == {digest_folder(local)}
    one = [str(local / "b.jsonl"), (local / "b.jsonl").as_uri(), f"{remote}/b.jsonl"]
    assert {digest_source(DataSpec(source=root)) for root in one} == {digest_file(local / "b.jsonl")}
    (local / "b.jsonl").rename(local / "c.jsonl")
    assert digest_source(DataSpec(source=str(local))) == digest_folder(local) != digest_source(DataSpec(source=remote))


def test_neither_an_old_listing_nor_its_order_counts(remote: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(remote, {f"{name}.jsonl": as_bytes([RECORDS[n]], ".jsonl") for n, name in enumerate("abc")})
    find = TestedFileSystem.find
    listed: list[dict[str, Any]] = []

    def find_once(self: TestedFileSystem, path: str, **options: Any) -> dict[str, Any]:
        listed[:] = listed or [dict(reversed(find(self, path, **options).items()))]
        return listed[0]

    monkeypatch.setattr(TestedFileSystem, "find", find_once)
    monkeypatch.setattr(TestedFileSystem, "invalidate_cache", lambda self, path=None: listed.clear())
    assert [row.source for row in run(DataSpec(source=remote), out)] == ["a.jsonl", "b.jsonl", "c.jsonl"]
    put(remote, {"d.jsonl": as_bytes([RECORDS[3]], ".jsonl")})
    assert len(run(DataSpec(source=remote), out)) == 4


def test_the_source_of_a_row_may_be_a_column(tmp_path: Path, out: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    write_lines(folder / "a.jsonl", [RECORDS[0] | {"who": "ann"}, RECORDS[1]])
    found = run(DataSpec(source=str(folder), source_field="who"), out)
    assert [row.source for row in found] == ["ann", "a.jsonl"]
    assert run(DataSpec(source=str(folder / "a.jsonl")), out)[0].source is None


def test_hidden_and_marked_files_are_no_parts(tmp_path: Path, out: Path) -> None:
    folder = tmp_path / "rows"
    good = as_bytes(RECORDS[:2], ".jsonl")
    others = ["_SUCCESS", ".part.crc", "_temporary/0/part.jsonl", ".cache/x.jsonl", "day=1/_x.jsonl"]
    put(str(folder), {"day=1/part-0.jsonl": good} | dict.fromkeys(others, b"no rows"))
    assert [row.source for row in run(DataSpec(source=str(folder)), out)] == ["day=1/part-0.jsonl"] * 2
    put(str(tmp_path / ".hidden"), {"a.jsonl": good})  # what is named is read, whatever its name
    assert len(run(DataSpec(source=str(tmp_path / ".hidden")), out)) == 2
    assert len(run(DataSpec(source=str(folder / "day=1" / "_x.jsonl").replace("_x", "part-0")), out)) == 2


def test_parts_in_several_formats_need_a_word(tmp_path: Path, out: Path) -> None:
    folder = tmp_path / "rows"
    files = {"a.jsonl": as_bytes(RECORDS[:2], ".jsonl"), "b.csv": as_bytes(RECORDS[2:5], ".csv")}
    put(str(folder), files | {"c.csv.gz": as_bytes(RECORDS[5:6], ".csv.gz")})
    error = refusal(DataSpec(source=str(folder)), out)
    assert error.what == "The parts are written in several formats: 1 × jsonl, 2 × csv."
    assert "data.format" in error.fix
    assert len(run(DataSpec(source=str(folder), format=DataFormat.JSONL), out)) == 2
    assert len(run(DataSpec(source=str(folder), format=DataFormat.CSV), out)) == 4
    assert "of the format parquet" in refusal(DataSpec(source=str(folder), format=DataFormat.PARQUET), out).what


def test_a_file_that_is_no_part_is_not_passed_over(tmp_path: Path, out: Path) -> None:
    folder = tmp_path / "rows"
    put(str(folder), {"a.jsonl": as_bytes(RECORDS[:2], ".jsonl"), "README.md": b"rows of last year"})
    error = refusal(DataSpec(source=str(folder)), out)
    assert error.what == "The ending '.md' does not say how the source is written."
    assert error.where == str(folder / "README.md")
    error = refusal(DataSpec(source=str(folder), format=DataFormat.JSONL), out)
    assert (error.what.split(":")[0], error.where) == ("A line is not valid JSON", f"{folder}/README.md:1")


def test_what_is_no_file_is_not_passed_over(tmp_path: Path, remote: str, out: Path) -> None:
    folder = tmp_path / "rows"
    put(str(folder), {"a.jsonl": as_bytes(RECORDS[:2], ".jsonl")})
    (folder / "b.jsonl").symlink_to(folder / "nowhere.jsonl")
    error = refusal(DataSpec(source=str(folder)), out)
    assert "no file, or a link to one that is not there" in error.what
    assert error.where == str(folder / "b.jsonl")
    (folder / "b.jsonl").rename(folder / "_b.jsonl")
    assert len(run(DataSpec(source=str(folder)), out)) == 2
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.jsonl")).write_bytes(as_bytes(RECORDS[:2], ".jsonl"))
    assert "Its name is not UTF-8" in refusal(DataSpec(source=str(folder)), out).what
    put(remote, {"a.jsonl": b"{}", "x/../../../b.jsonl": b"{}"})
    assert "leads out of its folder" in refusal(DataSpec(source=remote, format=DataFormat.DATASET), out).what


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".jsonl.gz"])
def test_parts_without_rows_are_no_fault(ending: str, tmp_path: Path, out: Path) -> None:
    folder = tmp_path / "rows"
    put(str(folder), {f"{n}{ending}": b"" for n in "ac"} | {f"b{ending}": as_bytes(RECORDS[:3], ending)})
    assert len(run(DataSpec(source=str(folder)), out)) == 3
    empty = tmp_path / "empty"
    put(str(empty), {f"{n}{ending}": b"" for n in "ac"})
    assert refusal(DataSpec(source=str(empty)), out).what == "The data source holds no rows."
    with pytest.raises(DataError, match="is empty"):
        digest_source(DataSpec(source=str(empty)))


def test_parquet_parts_without_rows(tmp_path: Path, out: Path) -> None:
    folder = tmp_path / "rows"
    put(str(folder), {"a.parquet": as_bytes([], ".parquet"), "b.parquet": as_bytes(RECORDS[:3], ".parquet")})
    assert len(run(DataSpec(source=str(folder)), out)) == 3
    put(str(folder), {"c.parquet": b""})
    error = refusal(DataSpec(source=str(folder)), out)
    assert error.what.startswith("The Parquet file cannot be read")
    assert error.where == str(folder / "c.parquet")


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_a_part_without_the_answer_is_named(ending: str, tmp_path: Path, out: Path) -> None:
    folder = tmp_path / "rows"
    other = b"id,text,team\n1,t,a\n" if ending == ".csv" else as_bytes([{"id": 1, "text": "t", "team": "a"}], ending)
    put(str(folder), {f"a{ending}": as_bytes(RECORDS[:3], ending), f"b{ending}": other})
    error = refusal(DataSpec(source=str(folder)), out)
    assert error.what == (
        "No row has the column 'label' that `data.target_field` names. There are: 'id', 'text', 'team'."
    )
    assert error.where == f"{folder}/b{ending}, column 'label'"


@pytest.mark.parametrize(("ending", "refused"), [(".jsonl", False), (".parquet", True)])
def test_a_part_without_another_column_is_refused_where_it_has_a_header(
    ending: str, refused: bool, tmp_path: Path, out: Path
) -> None:
    folder = tmp_path / "rows"
    with_group = [record | {"group": "g"} for record in RECORDS[:3]]
    put(str(folder), {f"a{ending}": as_bytes(with_group, ending), f"b{ending}": as_bytes(RECORDS[3:5], ending)})
    data = DataSpec(source=str(folder), group_field="group")
    if refused:
        assert refusal(data, out).where == f"{folder}/b{ending}, column 'group'"
    else:
        assert [row.group for row in run(data, out)] == ["g", "g", "g", None, None]
        error = refusal(data.model_copy(update={"slice_field": "nowhere"}), out)
        assert error.where == f"{folder}, column 'nowhere'"


# -- what cannot be reached or read -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "what", "fix"),
    [
        ("s3://bucket/rows/", "Sources of s3:// need a package that is not installed", "`pip install s3fs`"),
        ("gs://bucket/rows/", "Sources of gs:// need a package that is not installed", "`pip install gcsfs`"),
        ("nope://bucket", "The address of the data source cannot be understood: Protocol not known: nope", ""),
        ("memory://none/x.jsonl", "The data source does not exist.", ""),
        ("memory://none/*.jsonl", "There are no files of rows", ""),
    ],
)
def test_an_address_that_leads_nowhere(
    source: str, what: str, fix: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)  # as where they are not installed
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    for read in (digest_source, source_format):
        with pytest.raises(DataError) as caught:
            read(DataSpec(source=source))
        assert caught.value.what.startswith(what)
        assert fix in caught.value.fix
        assert caught.value.where == source


def test_what_a_clouds_package_raises_is_told(remote: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoCredentialsError(Exception):
        pass

    put(remote, {"a.jsonl": as_bytes(RECORDS, ".jsonl")})
    TestedFileSystem.broken_after, TestedFileSystem.failure = 10, NoCredentialsError("who are you?")
    error = refusal(DataSpec(source=remote), out)
    assert error.what == "The data source cannot be read: NoCredentialsError: who are you?."

    def refuse(*_: Any, **__: Any) -> bool:
        raise NoCredentialsError("who are you?")

    monkeypatch.setattr(TestedFileSystem, "isfile", refuse)
    error = refusal(DataSpec(source=remote), out)
    assert error.what == "The data source cannot be reached: NoCredentialsError: who are you?."


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.bz2", ".jsonl.xz", ".jsonl.zst"])
def test_compressed_pieces_one_after_the_other_are_all_read(ending: str, tmp_path: Path, out: Path) -> None:
    """What `cat a.gz b.gz` and parallel compressors write."""
    content = as_bytes(RECORDS[:20], ending) + as_bytes(RECORDS[20:], ending)
    put(str(tmp_path), {f"x{ending}": content})
    assert len(run(DataSpec(source=str(tmp_path / f"x{ending}")), out)) == 40


def test_a_small_part_that_becomes_a_huge_line_does_not_fill_the_memory(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_module, "MAX_ROW_BYTES", 2**20)
    for name, packed in [("gz", gzip.compress(bytes(2**26))), ("zst", pack_zstd(bytes(2**26)))]:
        put(str(tmp_path), {f"x.jsonl.{name}": packed})
        data = DataSpec(source=str(tmp_path / f"x.jsonl.{name}"))
        tracemalloc.start()
        assert refusal(data, out).what == "A line is longer than 1 MB."
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8 * 2**20


@pytest.mark.parametrize("ending", [".jsonl.gz", ".csv.gz", ".jsonl.bz2", ".jsonl.xz", ".jsonl.zst"])
@pytest.mark.parametrize("fault", ["cut short", "not compressed", "damaged"])
def test_a_damaged_compressed_part(ending: str, fault: str, tmp_path: Path, out: Path) -> None:
    whole = as_bytes(rows(500), ending)
    half = len(whole) // 2
    content = {
        "cut short": whole[:half],
        "not compressed": as_bytes(RECORDS, Path(ending).stem),
        "damaged": whole[:half] + bytes(byte ^ 0xFF for byte in whole[half : half + 200]) + whole[half + 200 :],
    }[fault]
    put(str(tmp_path), {f"x{ending}": content})
    error = refusal(DataSpec(source=str(tmp_path / f"x{ending}")), out)
    assert error.where is not None
    # Of damage in the middle the text may be the first to suffer.
    assert error.what.startswith("The part cannot be decompressed") or (
        fault == "damaged" and error.where.startswith(f"{tmp_path}/x{ending}:")
    )


def test_a_parquet_file_compressed_as_a_whole(tmp_path: Path, out: Path) -> None:
    put(str(tmp_path), {"x.parquet.gz": gzip.compress(as_bytes(RECORDS, ".parquet"))})
    error = refusal(DataSpec(source=str(tmp_path / "x.parquet.gz")), out)
    assert error.what == "A Parquet file may not be compressed as a whole."


# -- a source that changes ----------------------------------------------------------------------------------------

CHANGED = "The data source changed between the taking of its digest and the end of its reading."


def save_dataset(path: Path, records: list[dict[str, Any]]) -> None:
    from datasets import Dataset

    Dataset.from_list(records).save_to_disk(str(path))


@pytest.mark.parametrize("ending", [*ENDINGS, "dataset"])
@pytest.mark.parametrize("place", ["local", "remote"])
def test_a_source_that_changed_since_its_digest(
    ending: str, place: str, tmp_path: Path, out: Path, remote: str
) -> None:
    root = str(tmp_path / "rows") if place == "local" else remote

    def write(records: list[dict[str, Any]]) -> None:
        if ending != "dataset":
            put(root, {f"x{ending}": as_bytes(records, ending)})
            return
        save_dataset(tmp_path / "saved", records)
        put(root, {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()})

    write(RECORDS)
    data = DataSpec(source=root)
    assert source_format(data).value == (ending if ending == "dataset" else ending.split(".")[1])
    before = digest_source(data)
    assert ingest(data, TaskKind.CLASSIFY, out, expected_digest=before).rows == len(RECORDS)
    write([*RECORDS[1:], RECORDS[0]])
    with pytest.raises(DataError) as caught:
        ingest(data, TaskKind.CLASSIFY, out, expected_digest=before)
    assert (caught.value.what, caught.value.where) == (CHANGED, root)
    assert ingest(data, TaskKind.CLASSIFY, out, expected_digest=digest_source(data)).rows == len(RECORDS)


@pytest.mark.parametrize("change", ["append", "new part", "rename"])
@pytest.mark.parametrize("ending", [".jsonl", ".csv"])
def test_a_source_that_changes_while_it_is_read(
    change: str, ending: str, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_REPORT_EVERY", 10)
    folder = tmp_path / "rows"
    put(str(folder), {f"a{ending}": as_bytes(RECORDS[:20], ending), f"b{ending}": as_bytes(RECORDS[20:], ending)})
    data = DataSpec(source=str(folder))
    before = digest_source(data)
    done: list[str] = []

    def interfere(_: Any) -> None:
        if done:
            return
        done.append(change)
        if change == "append":
            with (folder / f"b{ending}").open("ab") as part:
                part.write(as_bytes([RECORDS[0]], ending).splitlines(keepends=True)[-1])
        elif change == "new part":
            (folder / f"b{ending}").write_bytes(as_bytes(RECORDS[:20], ending))
        else:
            (folder / f"b{ending}").rename(folder / f"c{ending}")

    with pytest.raises(DataError) as caught:
        ingest(data, TaskKind.CLASSIFY, out, interfere, before)
    assert caught.value.what == (CHANGED if change != "rename" else "The data source disappeared while it was read.")
    assert caught.value.where == (data.source if change != "rename" else f"{folder}/b{ending}")


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet", ".jsonl.gz"])
def test_a_source_that_disappears_in_the_middle(ending: str, remote: str, out: Path) -> None:
    put(remote, {f"a{ending}": as_bytes(RECORDS, ending)})
    TestedFileSystem.broken_after, TestedFileSystem.failure = 200, FileNotFoundError("gone")
    for read in (digest_source, lambda data: ingest(data, TaskKind.CLASSIFY, out)):
        with pytest.raises(DataError) as caught:
            read(DataSpec(source=remote))
        assert caught.value.what == "The data source disappeared while it was read."
        assert caught.value.where == f"{remote}/a{ending}"


@pytest.mark.parametrize("ending", [".jsonl", ".csv.gz", ".parquet", "dataset"])
def test_a_remote_source_is_read_once_for_its_digest_and_once_for_its_rows(
    ending: str, tmp_path: Path, remote: str, out: Path
) -> None:
    if ending == "dataset":
        save_dataset(tmp_path / "saved", RECORDS)
        files = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    else:
        files = {f"{name}{ending}": as_bytes(RECORDS, ending) for name in "ab"}
    put(remote, files)
    data = DataSpec(source=remote)
    sizes = {f"/bucket/rows/{name}": len(content) for name, content in files.items()}
    digest = digest_source(data)
    assert TestedFileSystem.read == sizes
    ingest(data, TaskKind.CLASSIFY, out, expected_digest=digest)
    assert TestedFileSystem.read == {name: 2 * size for name, size in sizes.items()}


def test_unusable_rows_say_their_part(tmp_path: Path, out: Path) -> None:
    folder = tmp_path / "rows"
    put(str(folder), {"a.jsonl": as_bytes(RECORDS[:1], ".jsonl"), "b.jsonl": b'\n{"text": null, "label": "a"}\n'})
    assert ingest(DataSpec(source=str(folder)), TaskKind.CLASSIFY, out) == (1, 1)
    (entry,) = read_lines(out / "unreadable.jsonl")
    assert (entry["source"], entry["line"], entry["reasons"]) == ("b.jsonl", 2, ["text is null"])
