"""Parquet files and folders saved by `datasets`, read batch by batch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tasks.contracts.errors import DataError
from tasks.data.sources.opening import Part, local_folder, open_seekable
from tasks.data.sources.parts import Source
from tasks.data.sources.record import Columns, Record

_BATCH_ROWS = 1_000
_PAGE_BYTES = 2**20  # a column is read piece by piece, or a row group of a gigabyte would be held whole


def read_parquet(part: Part, columns: Columns, digests: dict[str, str]) -> Iterator[tuple[Record, int]]:
    """Records, each with about how many bytes of the part are read. Class numbers of `datasets` become their names.

    Raises:
        DataError: it cannot be read, is cut short or damaged, or holds a value that cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if part.compression is not None:
        raise DataError(
            "A Parquet file may not be compressed as a whole.",
            where=part.shown,
            fix="decompress it; Parquet compresses its columns itself",
        )
    with open_seekable(part, digests) as file:
        try:
            with pq.ParquetFile(file, buffer_size=_PAGE_BYTES, pre_buffer=False) as table:
                names = table.schema_arrow.names
                present = [name for name in columns.wanted if name in names]
                coded = _class_names(table.schema_arrow.metadata, present)
                total = table.metadata.num_rows
                if total:
                    columns.see(dict.fromkeys(names).keys())
                number = 0
                # An empty selection would give batches without rows, and the missing columns are told of afterwards.
                for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=present or None):
                    for values in _rows_of(batch, coded, number, part.shown):
                        number += 1
                        yield Record(number, values), part.size * number // total
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise DataError(
                f"The Parquet file cannot be read: {error}.",
                where=part.shown,
                fix="write the file again; it is cut short, damaged, or no Parquet",
            ) from error


def read_saved(source: Source, columns: Columns, digests: dict[str, str]) -> Iterator[tuple[Record, int]]:
    """Records of a folder that `Dataset.save_to_disk` wrote, each with about how many of its bytes are read.

    Raises:
        DataError: it holds several splits, or is no readable dataset.
    """
    import pyarrow as pa
    from datasets import ClassLabel, load_from_disk

    if any(part.name == "dataset_dict.json" for part in source.parts):
        splits = sorted({part.name.split("/")[0] for part in source.parts if "/" in part.name})
        first = f"{source.uri.rstrip('/')}/{splits[0]}" if splits else source.uri
        raise DataError(
            f"The folder holds several splits: {', '.join(splits) or 'none'}.",
            where=source.uri,
            fix=f"name one of them in `data.source`, such as {first}",
        )
    with local_folder(source.path, source.parts, digests) as folder:
        try:
            dataset = load_from_disk(str(folder))
            present = [name for name in columns.wanted if name in dataset.column_names]
            total = len(dataset)
            if total:
                columns.see(dict.fromkeys(dataset.column_names).keys())
            features = {name: dataset.features[name] for name in present}
            coded = {name: kind.names for name, kind in features.items() if isinstance(kind, ClassLabel)}
            number = 0
            chosen = dataset.select_columns(present) if present else dataset
            for batch in chosen.with_format("arrow").iter(batch_size=_BATCH_ROWS):
                for values in _rows_of(batch, coded, number, source.uri):
                    number += 1
                    yield Record(number, values), source.size * number // total
        except (FileNotFoundError, pa.ArrowException, ValueError, KeyError) as error:
            raise DataError(
                f"The folder is no readable dataset: {error}.",
                where=source.uri,
                fix="save it again with `Dataset.save_to_disk`",
            ) from error


def _class_names(metadata: Mapping[bytes, bytes] | None, columns: Sequence[str]) -> dict[str, list[str]]:
    """The names of the class numbers in those columns, as `datasets` keeps them in a Parquet file."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        kinds = {name: features[name] for name in columns if name in features}
        return {name: kind["names"] for name, kind in kinds.items() if kind.get("_type") == "ClassLabel"}
    except (KeyError, TypeError, ValueError, AttributeError):  # written by something else
        return {}


def _rows_of(batch: Any, coded: Mapping[str, Sequence[str]], before: int, shown: str) -> Iterator[dict[str, Any]]:
    """The rows of a batch (or table) whose first row follows `before` others."""
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError) as error:  # text in another encoding is a UnicodeDecodeError
        raise _unreadable_cell(batch, before, shown) from error
    for number, values in enumerate(rows, start=before + 1):
        for name, names in coded.items():
            code = values[name]  # -1 is "no label"
            if code is not None and code >= len(names):
                raise DataError(
                    f"The class number {code} of the column {name!r} has no name; there are {len(names)}.",
                    where=f"{shown}, row {number}",
                    fix="write the file again, with all the names of its classes",
                )
            values[name] = names[code] if code is not None and code >= 0 else None
        yield values


def _unreadable_cell(batch: Any, before: int, shown: str) -> DataError:
    """The error of the first cell that Python has no value for."""
    for name in batch.schema.names:
        for number, cell in enumerate(batch.column(name), start=before + 1):
            try:
                cell.as_py()
            except (ValueError, OverflowError) as error:
                return DataError(
                    f"The column {name!r} holds a value that cannot be read: {error}.",
                    where=f"{shown}, row {number}",
                    fix="write it again: text as UTF-8, and times within the years 1 to 9999",
                )
    return DataError("A batch of rows cannot be read.", where=f"{shown}, row {before + 1}", fix="write the file again")
