"""The rewritten rows as a source of data: the file that a run reads to put them before the gate."""

from __future__ import annotations

import json
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

from tasks.contracts.distill import DistillSpec
from tasks.contracts.rows import Message, Row, read_rows
from tasks.contracts.spec import DataFormat, DataSpec, TaskKind
from tasks.contracts.synthesis import SOURCE_COLUMN, SYNTHETIC_COLUMN


def write_source(
    path: Path,
    valid_rows: Path,
    answer_of: Callable[[Row], str | None],
    rewritten: Container[str],
    spec: DistillSpec,
) -> None:
    """Write the rows of train and dev in the columns of the data, under their ids and with their new answers.

    Rows that curating took out stay out: with its old answer a copy of a rewritten row would contradict it. A rewritten
    row's source says which model its answer is from; its input is what it was, so it does not count as synthetic.

    Args:
        path: where to write.
        valid_rows: the rows before curating.
        answer_of: the answer of a row; None for one that is to be left out.
        rewritten: ids of the rows whose answer is a teacher's.
        spec: the columns, the task and the teacher.
    """
    data, kind = spec.training.data, spec.training.task.kind
    column = source_column(data)
    with path.open("w", encoding="utf-8", newline="\n") as out:
        for row in read_rows(valid_rows):
            target = answer_of(row)
            if target is None:
                continue
            record = _record(row, target, data, kind)
            if column is not None:
                record[column] = f"rewritten:{spec.teacher.model}" if row.id in rewritten else row.source
            out.write(json.dumps(record, ensure_ascii=False) + "\n")


def settings_for(source: str, data: DataSpec) -> tuple[str, ...]:
    """What a run of the same configuration has to be set to, to read the rewritten rows."""
    settings = [f"data.source={source}"]
    if data.format not in (DataFormat.AUTO, DataFormat.JSONL):
        settings.append(f"data.format={DataFormat.JSONL.value}")
    column = source_column(data)
    if data.source_field is None and column is not None:
        settings.append(f"data.source_field={column}")
    return tuple(settings)


def source_column(data: DataSpec) -> str | None:
    """The column that says where a row is from; None where the data use its usual name for something else."""
    if data.source_field is not None:
        return data.source_field
    used = {
        data.text_field, data.target_field, data.messages_field, data.id_field, data.group_field, data.slice_field,
        data.label_field, data.time_field, data.weight_field,
    }  # fmt: skip
    return None if SOURCE_COLUMN in used else SOURCE_COLUMN


def _record(row: Row, target: str, data: DataSpec, kind: TaskKind) -> dict[str, Any]:
    record: dict[str, Any] = {}
    if data.id_field is not None:
        record[data.id_field] = row.id
    if data.messages_field is not None:
        turns = (*row.messages, Message("assistant", target))
        record[data.messages_field] = [turn.as_chat() for turn in turns]
    else:
        plain = len(row.messages) == 1 and row.messages[0].role == "user"
        shown = row.messages[0].content if plain else [message.as_chat() for message in row.messages]
        record[str(data.text_field)] = shown
        record[str(data.target_field)] = json.loads(target) if kind is TaskKind.EXTRACT else target
    more = {
        data.group_field: row.group,
        data.slice_field: row.slice,
        data.label_field: row.label,
        data.time_field: row.time,
        data.weight_field: row.weight,
    }
    record |= {column: value for column, value in more.items() if column is not None}
    if row.synthetic:
        record[SYNTHETIC_COLUMN] = True
    return record
