"""The request log: what is kept of a request, masked; days, retention and torn files; and that it never holds up."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest

from tasks.contracts.errors import ServiceError, SpecError
from tasks.contracts.serving import LogSpec
from tasks.serving.request_log import Asked, ParquetSink, RequestLog, open_log, read_answer, read_log, row_of

DAY = datetime(2026, 3, 4, 12, tzinfo=UTC)


def asked(number: int = 0, at: datetime = DAY, **changes: Any) -> Asked:
    """A request that has ended."""
    body = {"model": "complaints", "messages": [{"role": "user", "content": f"mail to ann@example.com, {number}"}]}
    answer = orjson.dumps(
        {
            "choices": [{"index": 0, "message": {"content": "card of ann@example.com"}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 5, "completion_tokens": 1},
        }
    )
    fields: dict[str, Any] = {
        "at": at.timestamp(), "id": f"r{number}", "name": "complaints", "version": "complaints@7", "key": "shop",
        "path": "/v1/chat/completions", "status": 200, "stream": False, "seconds": 0.5, "first_byte": 0.4, "body": body,
        "answer": [answer], "error": "",
    }  # fmt: skip
    return Asked(**{**fields, **changes})


def mask(text: str) -> str:
    return text.replace("ann@example.com", "[EMAIL]")


class Counts:
    """What was dropped, by reason, and what was written."""

    def __init__(self) -> None:
        self.dropped: dict[str, int] = {}
        self.written = 0

    def drop(self, reason: str, count: int) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + count

    def write(self, count: int) -> None:
        self.written += count


class Memory:
    """A sink that fails or waits when a test says so."""

    def __init__(self) -> None:
        self.rows: list[Mapping[str, Any]] = []
        self.fails: Exception | None = None
        self.attempts = 0
        self.meanwhile: Callable[[], None] = lambda: None
        self.pruned: list[datetime] = []

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.attempts += 1
        self.meanwhile()
        if self.fails is not None:
            raise self.fails
        self.rows += rows

    def prune(self, before: datetime) -> None:
        self.pruned.append(before)

    def close(self) -> None:
        pass


def until(condition: Callable[[], bool]) -> None:
    """Wait until it is so; the test's own time limit ends a wait in vain."""
    while not condition():
        time.sleep(0.005)


# -- rows -----------------------------------------------------------------------------------------------------------


def test_a_row_has_the_request_and_the_answer_masked() -> None:
    row = row_of(asked(), mask)
    assert orjson.loads(row["request"])["messages"] == [{"role": "user", "content": "mail to [EMAIL], 0"}]
    assert (row["answer"], row["finish_reason"], row["prompt_tokens"], row["completion_tokens"]) == (
        "card of [EMAIL]", "stop", 5, 1,
    )  # fmt: skip
    assert (row["at"], row["version"], row["key"], row["status"]) == (DAY, "complaints@7", "shop", 200)
    assert "ann@example.com" not in str(row)


def test_every_text_is_masked_wherever_it_stands() -> None:
    body = {
        "model": "ann@example.com", "tools": [{"function": {"ann@example.com": ["ann@example.com", 1, None, True]}}],
    }  # fmt: skip
    row = row_of(asked(body=body, name="ann@example.com", error="no ann@example.com", answer=[]), mask)
    assert "ann@example.com" not in str(row)
    assert orjson.loads(row["request"])["tools"] == [{"function": {"[EMAIL]": ["[EMAIL]", 1, None, True]}}]


def test_a_very_long_text_is_cut() -> None:
    row = row_of(asked(body={"prompt": "x" * 300_000}), None)
    assert len(row["request"]) < 201_000
    assert orjson.loads(row["request"])["prompt"].endswith("x…")


@pytest.mark.parametrize(
    ("pieces", "stream", "text", "reason", "error"),
    [
        ([b'{"choices": [{"text": "loan", "finish_reason": "length"}]}'], False, "loan", "length", ""),
        ([b'{"choices": [{"index": 1, "text": "no"}, {"index": 0, "text": "yes"}]}'], False, "yes", None, ""),
        ([b"<html>"], False, "", None, ""),
        ([b'{"error": {"message": "too long"}}'], False, "", None, "too long"),
        (
            [b'data: {"choices": [{"delta": {"role": "assistant"}}]}\n\ndata: {"choices": [{"delta": {"con',
             b'tent": "ca"}}]}\n\n', b'data: {"choices": [{"delta": {"content": "rd"}, "finish_reason": "stop"}]}\n\n',
             b"data: [DONE]\n\n"],
            True, "card", "stop", "",
        ),
        (
            [b'data: {"choices": [{"delta": {"content": "ca"}}]}\n\ndata: {"error": {"message": "it died"}}\n\n'],
            True, "ca", None, "it died",
        ),
        (
            [b'{"choices": [{"message": {"content": null, "tool_calls": [{"id": "1"}]}}]}'],
            False, '[{"id":"1"}]', None, "",
        ),
        ([], False, "", None, ""),
    ],
)  # fmt: skip
def test_an_answer_is_read_whole_or_streamed(
    pieces: list[bytes], stream: bool, text: str, reason: str | None, error: str
) -> None:
    answer = read_answer(pieces, stream=stream)
    assert (answer.text, answer.finish_reason, answer.error) == (text, reason, error)


# -- the thread -----------------------------------------------------------------------------------------------------


def test_masking_is_not_left_out_silently() -> None:
    with pytest.raises(SpecError, match="nothing that masks was given"):
        RequestLog(Memory(), LogSpec(), mask=None, dropped=lambda *_: None)


@pytest.mark.parametrize(("share", "least", "most"), [(0.0, 0, 0), (0.25, 180, 320), (1.0, 1000, 1000)])
def test_the_share_is_drawn_by_the_requests_id(share: float, least: int, most: int) -> None:
    log = RequestLog(Memory(), LogSpec(share=share, mask=False), mask=None, dropped=lambda *_: None)
    wanted = [log.wants(f"request-{n}") for n in range(1000)]
    assert least <= sum(wanted) <= most
    assert wanted == [log.wants(f"request-{n}") for n in range(1000)]
    log.close()


def test_what_finds_no_room_is_dropped_counted_and_said(caplog: pytest.LogCaptureFixture) -> None:
    sink, counts = Memory(), Counts()
    stuck, going = [True], [False]

    def wait() -> None:
        going[0] = True
        until(lambda: not stuck[0])

    sink.meanwhile = wait
    log = RequestLog(
        sink, LogSpec(), mask=mask, dropped=counts.drop, written=counts.write, flush_seconds=0.01, queue_size=10
    )  # fmt: skip
    log.offer(asked())
    until(lambda: going[0])
    for number in range(50):
        log.offer(asked(number))  # each returns at once, though the sink stands still
    assert counts.dropped == {"queue_full": 40}
    stuck[0] = False
    log.close()
    assert (len(sink.rows), counts.written) == (11, 11)
    assert [record.message for record in caplog.records] == ["40 requests are missing in the request log"]


def test_a_full_disk_is_said_once_and_made_good_when_there_is_room(caplog: pytest.LogCaptureFixture) -> None:
    sink, counts = Memory(), Counts()
    sink.fails = OSError(28, "No space left on device", "part")
    log = RequestLog(sink, LogSpec(), mask=mask, dropped=counts.drop, written=counts.write, flush_seconds=0.01)
    log.offer(asked(1))
    until(lambda: sink.attempts >= 3)
    sink.fails = None
    log.offer(asked(2))
    until(lambda: len(sink.rows) == 2)
    log.close()
    assert [row["id"] for row in sink.rows] == ["r1", "r2"]
    assert counts.dropped == {}
    assert [record.message for record in caplog.records] == [
        "the request log cannot be written, answers go on: No space left on device (part)",
        "the request log is written again",
    ]


def test_a_disk_that_stays_full_costs_the_log_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    sink, counts = Memory(), Counts()
    sink.fails = RuntimeError("INSERT … 'ann@example.com' postgresql://me:secret@host/db")
    log = RequestLog(sink, LogSpec(), mask=mask, dropped=counts.drop, flush_seconds=0.01)
    for number in range(3):
        log.offer(asked(number))
    log.close()
    assert counts.dropped == {"not_written": 3}
    said = " ".join(record.message for record in caplog.records)
    assert "RuntimeError" in said
    assert "ann@example.com" not in said
    assert "secret" not in said


def test_what_a_full_disk_costs_is_counted_once_though_the_end_comes_while_it_is_tried() -> None:
    sink, counts, going, stuck = Memory(), Counts(), threading.Event(), threading.Event()
    sink.fails = OSError(28, "No space left on device", "part")

    def wait() -> None:
        going.set()
        stuck.wait(60.0)

    sink.meanwhile = wait
    log = RequestLog(sink, LogSpec(), mask=mask, dropped=counts.drop, flush_seconds=0.01)
    log.offer(asked(0))
    assert going.wait(60.0)
    log.offer(asked(1))
    log.offer(asked(2))
    log.close(0.0)  # the first is being written, the others are in the queue
    stuck.set()
    log.close()
    assert counts.dropped == {"not_written": 3}


def test_a_request_that_cannot_be_kept_does_not_end_the_log() -> None:
    sink, counts = Memory(), Counts()
    log = RequestLog(sink, LogSpec(), mask=mask, dropped=counts.drop, flush_seconds=0.01)
    log.offer(asked(1, body={"n": {1, 2}}))
    log.offer(asked(2))
    until(lambda: len(sink.rows) == 1)
    log.close()
    assert counts.dropped == {"unreadable": 1}


def test_old_requests_are_deleted_from_the_start_on() -> None:
    sink = Memory()
    log = RequestLog(sink, LogSpec(keep_days=2.0), mask=mask, dropped=lambda *_: None)
    until(lambda: bool(sink.pruned))
    log.close()
    age = datetime.now(UTC) - sink.pruned[0]
    assert timedelta(days=2) <= age < timedelta(days=2, minutes=5)


# -- Parquet --------------------------------------------------------------------------------------------------------


def rows(*requests: Asked) -> list[dict[str, Any]]:
    return [row_of(request, mask) for request in requests]


def test_files_go_by_day_and_come_back_as_they_were(tmp_path: Path) -> None:
    sink = ParquetSink(tmp_path)
    written = rows(asked(1), asked(2, DAY + timedelta(days=1)), asked(3, first_byte=None))
    sink.write(written)
    assert sorted(path.parent.name for path in tmp_path.rglob("*.parquet")) == ["day=2026-03-04", "day=2026-03-05"]
    assert list(read_log(tmp_path)) == [written[0], written[2], written[1]]
    assert [row["id"] for row in read_log(tmp_path, first=date(2026, 3, 5))] == ["r2"]
    assert [row["id"] for row in read_log(tmp_path, last=date(2026, 3, 4))] == ["r1", "r3"]


def test_a_torn_file_is_passed_over_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sink = ParquetSink(tmp_path)
    sink.write(rows(asked(1)))
    (first,) = tmp_path.rglob("*.parquet")
    sink.write(rows(asked(2)))
    first.write_bytes(first.read_bytes()[:-20])
    (tmp_path / "day=2026-03-04" / ".half.part").write_bytes(b"PAR1")
    (tmp_path / "day=yesterday").mkdir()
    assert [row["id"] for row in read_log(tmp_path)] == ["r2"]
    assert f"cannot be read: {first}" in caplog.text


def test_a_write_that_fails_leaves_nothing_under_a_name_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = ParquetSink(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            sink.write(rows(asked(1)))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_days_that_are_over_go(tmp_path: Path) -> None:
    sink = ParquetSink(tmp_path)
    sink.write(rows(*(asked(n, DAY + timedelta(days=n)) for n in range(4))))
    half = tmp_path / "day=2026-03-07" / ".half.part"
    half.write_bytes(b"")
    sink.prune(DAY + timedelta(days=2))
    assert [row["id"] for row in read_log(tmp_path)] == ["r2", "r3"]
    assert not half.exists()


def test_whoever_prunes_beside_a_writer_leaves_what_it_is_writing(tmp_path: Path) -> None:
    old, day = (tmp_path / f"day=2026-03-{number}" for number in ("04", "07"))
    for home in (old, day):
        home.mkdir()
        (home / ".half.part").write_bytes(b"")
    ParquetSink(tmp_path).prune(DAY + timedelta(days=2), parts=False)
    assert (old.exists(), (day / ".half.part").exists()) == (False, True)


# -- which one ------------------------------------------------------------------------------------------------------


def test_the_spec_says_where_it_goes(tmp_path: Path) -> None:
    def opened(spec: LogSpec, environment: dict[str, str]) -> RequestLog | None:
        return open_log(spec, tmp_path / "log", mask=mask, dropped=lambda *_: None, environment=environment)

    assert opened(LogSpec(to="none"), {}) is None
    log = opened(LogSpec(), {})
    assert log is not None
    log.offer(asked())
    log.close()
    assert [row["id"] for row in read_log(tmp_path / "log")] == ["r0"]
    with pytest.raises(ServiceError, match="no database is named"):
        opened(LogSpec(to="postgres"), {})
    for address in ("mysql://me:secret@host/db", "sqlite:///x.db", "me:secret@host"):
        with pytest.raises(ServiceError) as refused:
            opened(LogSpec(to="postgres"), {"GOLDGATE_LOG_DB": address})
        assert "secret" not in str(refused.value)


def test_a_database_that_does_not_answer_does_not_stop_the_start(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    counts = Counts()
    with caplog.at_level(logging.ERROR):
        log = open_log(
            LogSpec(to="postgres"), tmp_path, mask=mask, dropped=counts.drop,
            environment={"GOLDGATE_LOG_DB": "postgresql://me:secret@127.0.0.1:1/db"},
        )  # fmt: skip
        assert log is not None
        log.offer(asked())
        log.close()
    assert counts.dropped == {"not_written": 1}
    assert "OperationalError" in caplog.text
    assert "secret" not in caplog.text
