"""The request log in a real PostgreSQL."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from tasks.contracts.errors import ServiceError
from tasks.contracts.serving import LogSpec
from tasks.serving.monitor.windows import PostgresLog, read_windows
from tasks.serving.request_log import COLUMNS, PostgresSink, open_log, read_log_rows
from tests.docker.test_on_postgres import PASSWORD, Postgres, folder, postgres
from tests.serving.requests_made import last_day, steady
from tests.serving.test_monitor import NOW, spec
from tests.serving.test_request_log import DAY, Counts, asked, mask, rows, until

pytest.importorskip("psycopg2", reason="a request log in PostgreSQL needs the extra postgres")

pytestmark = pytest.mark.services

__all__ = ["folder", "postgres"]  # fixtures: a server that is started once for this file


def test_requests_are_written_pruned_and_written_again_when_the_server_was_away(
    postgres: Postgres, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    postgres.ask("postgres", "CREATE DATABASE requests")
    address = f"postgresql://goldgate:{PASSWORD}@127.0.0.1:{postgres.port}/requests"
    sink = PostgresSink(address)
    sink.write(rows(asked(1), asked(2, DAY + timedelta(days=3), first_byte=None, error="a\0b")))
    shown = postgres.ask("requests", "SELECT id, answer, error, first_byte_seconds FROM goldgate_requests ORDER BY id")
    assert shown.splitlines() == ["r1|card of [EMAIL]||0.4", "r2|card of [EMAIL]|ab|"]
    sink.prune(DAY + timedelta(days=1))
    assert postgres.ask("requests", "SELECT id FROM goldgate_requests") == "r2"
    sink.close()

    postgres.ask("postgres", "ALTER DATABASE requests ALLOW_CONNECTIONS false")
    counts = Counts()
    log = open_log(
        LogSpec(to="postgres", keep_days=3000.0), tmp_path, mask=mask, dropped=counts.drop, written=counts.write,
        environment={"GOLDGATE_LOG_DB": address}, flush_seconds=0.05,
    )  # fmt: skip
    assert log is not None
    log.offer(asked(3))
    until(lambda: "cannot be written" in caplog.text)
    postgres.ask("postgres", "ALTER DATABASE requests ALLOW_CONNECTIONS true")
    until(lambda: counts.written == 1)
    log.close()
    assert counts.dropped == {}
    assert postgres.ask("requests", "SELECT id FROM goldgate_requests ORDER BY id").splitlines() == ["r2", "r3"]
    assert PASSWORD not in caplog.text


def test_rows_are_read_back_by_name_and_time(postgres: Postgres) -> None:
    postgres.ask("postgres", "CREATE DATABASE reading")
    address = f"postgresql://goldgate:{PASSWORD}@127.0.0.1:{postgres.port}/reading"
    with pytest.raises(ServiceError, match="The database has no request log"):
        next(read_log_rows(address, "complaints"))
    sink = PostgresSink(address)
    hour = timedelta(hours=1)
    sink.write(
        rows(
            asked(1), asked(2, DAY + hour, confidence=0.25, canary=True), asked(3, DAY + 2 * hour),
            asked(4, DAY + hour, name="prices"),
        )
    )  # fmt: skip
    sink.close()
    (found,) = read_log_rows(address, "complaints", DAY + hour, DAY + hour)
    assert tuple(sorted(found)) == tuple(sorted(COLUMNS))
    assert (found["id"], found["at"], found["confidence"], found["canary"]) == ("r2", DAY + hour, 0.25, True)
    assert [row["id"] for row in read_log_rows(address, "complaints", DAY + hour)] == ["r2", "r3"]
    assert list(read_log_rows(address, "prices", columns=("id", "answer"))) == [
        {"id": "r4", "answer": "card of [EMAIL]"}
    ]
    postgres.ask("reading", "ALTER TABLE goldgate_requests DROP COLUMN confidence, DROP COLUMN canary")
    assert [row["confidence"] for row in read_log_rows(address, "complaints")] == [None] * 3  # an earlier gateway's
    again = PostgresSink(address)  # and a gateway of today adds what it lacks
    again.write(rows(asked(5, DAY + 3 * hour, confidence=0.5)))
    again.close()
    assert [row["confidence"] for row in read_log_rows(address, "complaints")] == [None, None, None, 0.5]
    with pytest.raises(ServiceError, match="cannot be read: OperationalError") as refused:
        next(read_log_rows(address.replace(PASSWORD, "wrong"), "complaints"))
    assert "wrong" not in str(refused.value)


def test_windows_are_drawn_from_it(postgres: Postgres) -> None:
    postgres.ask("postgres", "CREATE DATABASE windows")
    address = f"postgresql://goldgate:{PASSWORD}@127.0.0.1:{postgres.port}/windows"
    sink = PostgresSink(address)
    sink.write([*steady(NOW), *last_day(NOW, drifted=True)])
    sink.close()
    seen = read_windows(PostgresLog(address), spec(most_rows=200), NOW)
    assert seen.windows is not None
    assert (seen.windows.reference_facts.requests, seen.windows.current_facts.requests) == (1680, 240)
    assert (len(seen.windows.reference.texts), len(seen.windows.current.texts)) == (200, 200)
    assert set(seen.windows.current.answers) == {"money_transfer", "card"}
