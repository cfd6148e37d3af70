"""The request log in a real PostgreSQL."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from tasks.contracts.serving import LogSpec
from tasks.serving.request_log import PostgresSink, open_log
from tests.docker.test_on_postgres import PASSWORD, Postgres, folder, postgres
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
