"""Prefect's command line, with a server that begins every SQLite transaction as IMMEDIATE.

Prefect 3.8.8 begins most of its transactions as DEFERRED. When two of them read and then want to write, SQLite refuses
one at once ("database is locked", HTTP 503). Worse, what the refused one leaves behind is freed by the garbage
collector, which may wait for a connection's mutex with the interpreter's lock held, while the thread that owns the
mutex waits for the database: then the whole server stands still until SQLite gives up after 60 seconds. Four clients
at once met 503 in a third of their requests and a stand-still within a minute; begun as IMMEDIATE, writers wait for
each other, and 4,000 requests met neither. https://www.sqlite.org/lang_transaction.html
"""

from __future__ import annotations

import runpy
import sys
from contextlib import AbstractAsyncContextManager

from prefect.server.database.configurations import AioSqliteConfiguration
from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction


def begin_immediately() -> None:
    """Make every transaction of Prefect's server in this process take SQLite's write lock when it begins."""
    begin = AioSqliteConfiguration.begin_transaction

    def begin_transaction(
        self: AioSqliteConfiguration, session: AsyncSession, with_for_update: bool = False
    ) -> AbstractAsyncContextManager[AsyncSessionTransaction]:
        return begin(self, session, with_for_update=True)

    AioSqliteConfiguration.begin_transaction = begin_transaction  # type: ignore[method-assign,assignment]


if __name__ == "__main__":
    begin_immediately()
    sys.argv[0] = "prefect"
    runpy.run_module("prefect", run_name="__main__")
