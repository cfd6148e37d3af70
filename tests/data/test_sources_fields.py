"""What the fields of a record become: labels, prompts and completions, tool calls, times, weights and marks."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.contracts.rows import Message, Row
from tasks.contracts.spec import DataSpec, TaskKind
from tasks.data.ingest import ingest
from tasks.data.sources.fields import RowMaker
from tasks.data.sources.record import Record
from tests.data.toy_data import read_lines

ALL = DataSpec(
    source="x",
    label_field="class",
    source_field="from",
    time_field="time",
    weight_field="weight",
    group_field="group",
    slice_field="slice",
)
GOOD = {"id": "a", "text": "t", "label": "x"}


def make(values: dict[str, Any], kind: TaskKind = TaskKind.CLASSIFY, data: DataSpec = ALL) -> Row | list[str]:
    """The row, or the reasons why there is none."""
    row, reasons = RowMaker(data, kind).make(Record(3, values), None)
    assert (row is None) == bool(reasons)
    return row if row is not None else reasons


def test_a_row_holds_all_that_its_columns_say() -> None:
    values = GOOD | {
        "class": 4,
        "from": "ann",
        "time": "2026-01-31T12:00:00+02:00",
        "weight": 2,
        "group": 5,
        "slice": "web",
        "synthetic": True,
    }
    assert make(values) == Row(
        "a", 3, (Message("user", "t"),), "x", "5", "web", "4", "ann", "2026-01-31T10:00:00.000000Z", 2.0, True
    )


@pytest.mark.parametrize("nothing", [{}, dict.fromkeys(["class", "from", "time", "weight", "synthetic"]), None])
def test_a_row_of_which_nothing_more_is_known(nothing: Any) -> None:
    empty_cells = dict.fromkeys(["class", "from", "time", "weight", "synthetic", "group", "slice"], "")
    assert make(GOOD | (empty_cells if nothing is None else nothing)) == Row("a", 3, (Message("user", "t"),), "x")


def test_the_part_is_the_source_where_no_column_says_one() -> None:
    maker = RowMaker(ALL, TaskKind.CLASSIFY)
    assert [
        row.source if row else None
        for row, _ in (maker.make(Record(1, GOOD | {"from": who}), "a.jsonl") for who in ("ann", "", None))
    ] == ["ann", "a.jsonl", "a.jsonl"]


def test_every_reason_is_said() -> None:
    values = {"text": 5, "label": None, "class": [], "time": "soon", "weight": 0, "synthetic": "perhaps", "id": 1.5}
    assert make(values) == [
        "text is a number, not text",
        "label is null",
        "class is a list, not text or a whole number",
        "time is no time in ISO 8601 or in seconds since 1970: 'soon'",
        "weight is not above 0 and finite: 0.0",
        "synthetic is neither true nor false: 'perhaps'",
        "id is a number, not text or a whole number",
    ]


# -- labels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "found"),
    [
        ("1", "1"),
        (1, "1"),
        (-3, "-3"),
        (0, "0"),
        (1.0, ["label is a number with a fraction, labels are text or whole numbers: 1.0"]),
        (0.5, ["label is a number with a fraction, labels are text or whole numbers: 0.5"]),
        (True, ["label is true or false, not text"]),
        ([1], ["label is a list, not text"]),
    ],
)
def test_a_label_may_be_a_whole_number(label: Any, found: Any) -> None:
    made = make(GOOD | {"label": label})
    assert (made.target if isinstance(made, Row) else made) == found


def test_a_label_is_the_same_as_number_in_one_part_and_as_text_in_the_next(tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    parts.mkdir()
    pq.write_table(pa.table({"text": ["a", "b"], "label": [1, None]}), parts / "1.parquet")
    pq.write_table(pa.table({"text": ["c"], "label": ["1"]}), parts / "2.parquet")
    pq.write_table(pa.table({"text": ["d"], "label": [1.0]}), parts / "3.parquet")
    assert ingest(DataSpec(source=str(parts)), TaskKind.CLASSIFY, tmp_path) == (2, 2)
    assert [row["target"] for row in read_lines(tmp_path / "rows.jsonl")] == ["1", "1"]
    assert [(entry["source"], entry["reasons"]) for entry in read_lines(tmp_path / "unreadable.jsonl")] == [
        ("1.parquet", ["label is null"]),
        ("3.parquet", ["label is a number with a fraction, labels are text or whole numbers: 1.0"]),
    ]


def test_a_number_is_no_answer_of_a_chat() -> None:
    assert make(GOOD | {"label": 1}, TaskKind.CHAT) == ["label is a number, not text"]


# -- prompts and completions --------------------------------------------------------------------------------------

PROMPT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
ANSWER = [{"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize("kind", [TaskKind.CHAT, TaskKind.CLASSIFY])
@pytest.mark.parametrize(("text", "target"), [(PROMPT, ANSWER), (PROMPT, "Hello"), ("Hi", ANSWER)])
def test_prompt_and_completion_may_be_messages(kind: TaskKind, text: Any, target: Any) -> None:
    shown = (Message("system", "Be brief."), Message("user", "Hi")) if text is PROMPT else (Message("user", "Hi"),)
    assert make({"id": "a", "text": text, "label": target}, kind) == Row("a", 3, shown, "Hello")


def test_a_list_is_an_answer_of_its_own_where_answers_are_json() -> None:
    answer = [{"role": "assistant", "content": '{"b": 1.0}'}]
    made = make({"text": "Hi", "label": answer}, TaskKind.EXTRACT)
    assert isinstance(made, Row)
    assert json.loads(made.target) == answer
    made = make({"text": PROMPT, "label": answer}, TaskKind.EXTRACT)
    assert isinstance(made, Row)
    assert made.target == '{"b": 1}'
    made = make({"text": PROMPT, "label": [{"item": "pen"}]}, TaskKind.EXTRACT)
    assert isinstance(made, Row)
    assert made.target == '[{"item": "pen"}]'


@pytest.mark.parametrize(
    ("text", "target", "reasons"),
    [
        ([], ANSWER, ["text holds no turns"]),
        ([5], ANSWER, ["text: turn 1 is a number, not an object with role and content"]),
        (
            [{"role": "bot", "content": "x"}],
            "x",
            ["text: turn 1 has the role 'bot'; there are assistant, system, tool, user"],
        ),
        (PROMPT, [], ["label is a list, not text"]),
        (PROMPT, ["Hello"], ["label is a list, not text"]),
        (PROMPT, PROMPT, ["label is not exactly one assistant message: system, user"]),
        (PROMPT, ANSWER * 2, ["label is not exactly one assistant message: assistant, assistant"]),
        (PROMPT, ANSWER[0], ["label is an object, not text"]),
        (PROMPT, [{"role": "assistant", "content": None}], ["label: the content of turn 1 is null, not text"]),
    ],
)
def test_messages_that_cannot_be_used(text: Any, target: Any, reasons: list[str]) -> None:
    assert make({"text": text, "label": target}, TaskKind.CHAT) == reasons


# -- tool calls ---------------------------------------------------------------------------------------------------

CHAT = DataSpec(source="x", messages_field="messages")


def calling(call: Any, **turn: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "Weather?"}, {"role": "assistant", "content": None, "tool_calls": call} | turn]


@pytest.mark.parametrize(
    "call",
    [
        {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"to": "Rome", "days": 2}'}},
        {"id": "c2", "type": "function", "function": {"arguments": {"days": 2.0, "to": "Rome"}, "name": "look"}},
        {"name": "look", "arguments": {"to": "Rome", "days": 2}},
    ],
)
def test_the_same_tool_calls_are_the_same_text(call: dict[str, Any]) -> None:
    written = '[{"arguments": {"days": 2, "to": "Rome"}, "name": "look"}]'
    made = make({"messages": calling([call])}, TaskKind.CHAT, CHAT)
    assert isinstance(made, Row)
    assert made.target == written
    turns = [
        *calling([call], content=""),
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "Sun."},
    ]
    made = make({"messages": turns}, TaskKind.CHAT, CHAT)
    assert isinstance(made, Row)
    assert made.messages == (Message("user", "Weather?"), Message("assistant", written), Message("tool", "sunny"))


@pytest.mark.parametrize("none", [None, []])
def test_a_turn_without_tool_calls_may_say_so(none: Any) -> None:
    made = make({"messages": calling(none, content="Sun.")}, TaskKind.CHAT, CHAT)
    assert isinstance(made, Row)
    assert made.target == "Sun."


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        (
            calling([{"name": "look"}], content="Let me see."),
            "has both text and tool calls, a turn here is one of them",
        ),
        (calling([{"arguments": {}}]), "has a tool call without the name of a function"),
        (calling(["look"]), "has a tool call without the name of a function"),
        (calling("look"), "has tool calls that are no list"),
        (calling(None, function_call={"name": "look"}), "has tool calls that are no list"),
        (calling([{"name": "look"}], role="tool"), "has tool calls, but is no assistant turn"),
        (
            calling([{"name": "look", "arguments": "{to"}]),
            "has a tool call whose arguments are not valid JSON: Expecting property name enclosed in double quotes: "
            "line 1 column 2 (char 1)",
        ),
    ],
)
def test_tool_calls_that_cannot_be_used(turns: Any, reason: str) -> None:
    assert make({"messages": turns}, TaskKind.CHAT, CHAT) == [f"messages: turn 2 {reason}"]


# -- times, weights, marks ----------------------------------------------------------------------------------------

NOON = "2026-01-31T12:00:00.000000Z"


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("2026-01-31T12:00:00Z", NOON),
        (" 2026-01-31 12:00 ", NOON),
        ("2026-01-31T14:00:00+02:00", NOON),
        ("20260131T120000Z", NOON),
        ("2026-W05-6T12:00:00", NOON),
        (datetime(2026, 1, 31, 12), NOON),
        (datetime(2026, 1, 31, 7, tzinfo=timezone(timedelta(hours=-5))), NOON),
        (pd.Timestamp("2026-01-31T12:00:00.000000999", tz="UTC"), NOON),
        (1769860800, NOON),
        (1769860800.25, "2026-01-31T12:00:00.250000Z"),
        ("1769860800", NOON),
        ("1769860800.5", "2026-01-31T12:00:00.500000Z"),
        ("2026-01-31", "2026-01-31T00:00:00.000000Z"),
        (date(2026, 1, 31), "2026-01-31T00:00:00.000000Z"),
        (0, "1970-01-01T00:00:00.000000Z"),
        ("0001-02-03", "0001-02-03T00:00:00.000000Z"),
    ],
)
def test_a_time_is_written_in_one_way(value: Any, found: str) -> None:
    made = make(GOOD | {"time": value})
    assert isinstance(made, Row)
    assert made.time == found


def test_the_order_of_texts_is_the_order_of_times() -> None:
    start = datetime(2026, 1, 31, 12, tzinfo=UTC)
    steps = [0, 1e-6, 0.1, 0.999999, 1, 1.5, 60, 3600, 86400]
    zones = [timezone(timedelta(hours=hours)) for hours in (0, 9, -11)]
    moments = [(start + timedelta(seconds=step)).astimezone(zones[n % 3]) for n, step in enumerate(steps)]
    rows = [make(GOOD | {"time": moment.isoformat()}) for moment in moments]
    texts = [row.time for row in rows if isinstance(row, Row)]
    assert texts == sorted(texts, key=str)
    assert len(set(texts)) == len(steps)


@pytest.mark.parametrize(
    "value",
    [
        "soon",
        "31.01.2026",
        "2026-02-30",
        1769860800000,
        float("nan"),
        1e300,
        10**400,
        "9" * 30,
        "0001-01-01T00:00+09:00",
    ],
)
def test_what_is_no_time(value: Any) -> None:
    shown = str(value)[:40]
    assert make(GOOD | {"time": value}) == [f"time is no time in ISO 8601 or in seconds since 1970: {shown!r}"]


@pytest.mark.parametrize(("value", "name"), [(True, "true or false"), ([1], "a list")])
def test_what_is_no_time_at_all(value: Any, name: str) -> None:
    assert make(GOOD | {"time": value}) == [f"time is {name}, not a time"]


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (1, 1.0),
        (0.25, 0.25),
        ("2.5", 2.5),
        (0, ["weight is not above 0 and finite: 0.0"]),
        (-1, ["weight is not above 0 and finite: -1.0"]),
        (float("inf"), ["weight is not above 0 and finite: inf"]),
        ("nan", ["weight is not above 0 and finite: nan"]),
        (10**400, ["weight is not above 0 and finite: inf"]),
        ("much", ["weight is no number: 'much'"]),
        (True, ["weight is true or false, not a number"]),
    ],
)
def test_a_weight_is_above_zero_and_finite(value: Any, found: Any) -> None:
    made = make(GOOD | {"weight": value})
    assert (made.weight if isinstance(made, Row) else made) == found


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (True, True),
        (False, False),
        ("true", True),
        (" False ", False),
        (None, False),
        (1, ["synthetic is neither true nor false: '1'"]),
        (0, ["synthetic is neither true nor false: '0'"]),
        ("yes", ["synthetic is neither true nor false: 'yes'"]),
    ],
)
def test_a_mark_is_never_guessed(value: Any, found: Any) -> None:
    made = make(GOOD | {"synthetic": value})
    assert (made.synthetic if isinstance(made, Row) else made) == found


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_the_mark_is_read_from_every_format(ending: str, tmp_path: Path) -> None:
    table = pd.DataFrame({"text": ["a", "b"], "label": ["x", "y"], "synthetic": [True, False]})
    if ending == "csv":
        table.to_csv(tmp_path / "x.csv", index=False)
    else:
        table.to_parquet(tmp_path / "x.parquet")
    ingest(DataSpec(source=str(tmp_path / f"x.{ending}")), TaskKind.CLASSIFY, tmp_path)
    assert [row.get("synthetic") for row in read_lines(tmp_path / "rows.jsonl")] == [True, None]
