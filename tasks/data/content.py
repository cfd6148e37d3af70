"""What became of each row, by its content: a small table to compare this data with the next by (`rows.parquet`)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.data.duplicates import Removed
from tasks.data.table import RowTable

CONTENT = "rows.parquet"
SCHEMA = pa.schema(
    [
        ("content", pa.binary(16)),
        ("text", pa.binary(16)),
        ("target", pa.uint64()),
        ("outcome", pa.dictionary(pa.int16(), pa.string())),
    ]
)


def write_content(
    path: Path, table: RowTable, train: Iterable[int], dev: Iterable[int], left: Iterable[Removed]
) -> None:
    """Write one line for each row, in the order of the content's hashes.

    Columns: half the sha256 of what the row shows and asks for, a hash of its normalised text, a hash of its answer,
    and where it went: `train`, `dev`, or the reason for which it left.
    """
    names = ["train", "dev"]
    codes = np.full(len(table), -1, dtype=np.int16)
    codes[list(train)], codes[list(dev)] = 0, 1
    for one in left:
        if one.reason not in names:
            names.append(one.reason)
        codes[one.position] = names.index(one.reason)
    columns = [
        pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(16), len(table), [None, pa.py_buffer(np.ascontiguousarray(table.content[:, :2]).astype(">u8"))]
        ),
        pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(16), len(table), [None, pa.py_buffer(np.ascontiguousarray(table.sketch.identity))]
        ),
        pa.array(table.targets),
        pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(names)),
    ]
    pq.write_table(pa.Table.from_arrays(columns, schema=SCHEMA), path, compression="zstd")
