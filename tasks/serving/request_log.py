"""The request log: what was asked and answered, masked, kept for a time; never at the expense of an answer.

A request is put into a queue and forgotten. A thread masks it and writes: Parquet files, a folder for each day, or a
table in PostgreSQL. What does not fit into the queue, or cannot be written, is dropped and counted.
"""

from __future__ import annotations

import logging
import os
import queue
import shutil
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

import orjson

from tasks.contracts.errors import ServiceError, SpecError
from tasks.contracts.serving import LogSpec

if TYPE_CHECKING:
    import pyarrow as pa
    from sqlalchemy import Connection, Engine, Table

LOG_DB = "GOLDGATE_LOG_DB"  # environment: address of the PostgreSQL database
FLUSH_SECONDS = 60.0  # a file of requests a minute

_QUEUE = 5_000  # requests; a minute at eighty a second
_HELD = 5_000  # requests that wait while nothing can be written
_ROWS = 2_000  # in one file
_SAY_SECONDS = 60.0
_PRUNE_SECONDS = 3600.0
_LONGEST = 200_000  # characters of one request or answer that are kept
_MISSING = "…"
_log = logging.getLogger(__name__)

Mask = Callable[[str], str]
Item = TypeVar("Item")


class Asked(NamedTuple):
    """A request that has ended, as the gateway hands it over; nothing here was copied or parsed for the log.

    Attributes:
        at: when it came, seconds since the epoch.
        id: its `x-request-id`.
        name: the model as the client wrote it.
        version: the version that answered, such as `complaints@7`; empty for none.
        key: name of the client's key; empty for none, `keys.ADMIN` for what a rollout asks.
        path: the path of the request.
        status: of the answer.
        stream: whether it was streamed.
        seconds: from the request's body to the end of its answer.
        first_byte: to its first byte; None where there was none.
        body: the request, parsed.
        answer: the answer's bytes, in pieces.
        error: what went wrong in the gateway; empty for nothing.
        canary: whether it was a canary's by its key; None where there was none.
        confidence: of a closed answer, as the model gives it; None where there is none.
        certainty: the same, calibrated.
        flagged: whether a person is to look; None where nobody says.
    """

    at: float
    id: str
    name: str
    version: str
    key: str
    path: str
    status: int
    stream: bool
    seconds: float
    first_byte: float | None
    body: Mapping[str, Any]
    answer: Sequence[bytes]
    error: str = ""
    canary: bool | None = None
    confidence: float | None = None
    certainty: float | None = None
    flagged: bool | None = None


class Sink(Protocol):
    """Where rows are written; called by one thread."""

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write all rows or none. Raises OSError, or what its library raises."""

    def prune(self, before: datetime) -> None:
        """Delete what is older."""

    def close(self) -> None:
        """Let go of what it holds."""


class RowWriter(Generic[Item]):
    """Writes what a gateway hands over, behind its back: a queue, a thread, and a sink.

    Args:
        what: it is called in the gateway's own log.
        sink: where it is written.
        row: makes a row of an item, masked; called in the thread.
        keep_days: older rows are deleted.
        mask: takes what is private out of a text; called in the thread, first with an empty text, so that it can load
            what it needs. None masks nothing.
        dropped: is told the reason and the number of items that are not written.
        written: is told how many are.
        flush_seconds: how long an item may wait to be written.
        queue_size: items that wait to be masked.
    """

    def __init__(
        self,
        what: str,
        sink: Sink,
        row: Callable[[Item, Mask | None], dict[str, Any]],
        *,
        keep_days: float,
        mask: Mask | None,
        dropped: Callable[[str, int], None],
        written: Callable[[int], None] = lambda _: None,
        flush_seconds: float = FLUSH_SECONDS,
        queue_size: int = _QUEUE,
    ) -> None:
        self._what, self._sink, self._row, self._keep_days, self._mask = what, sink, row, keep_days, mask
        self._dropped, self._written, self._flush_seconds = dropped, written, flush_seconds
        self._queue: queue.Queue[Item | None] = queue.Queue(queue_size)
        self._held: list[dict[str, Any]] = []
        self._unsaid, self._said_at, self._failing = 0, -_SAY_SECONDS, False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=what, daemon=True)
        self._thread.start()

    def offer(self, item: Item) -> None:
        """Keep an item. Never waits: where there is no room it is dropped, counted, and said once a minute."""
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self._drop("queue_full", 1)

    def close(self, seconds: float = 10.0) -> None:
        """Write what is there, for so many seconds at most, and end."""
        self._closing.set()
        with suppress(queue.Full):
            self._queue.put_nowait(None)  # wakes the thread
        self._thread.join(seconds)

    def _run(self) -> None:
        if self._mask is not None:
            self._mask("")
        flush_at, prune_at = time.monotonic() + self._flush_seconds, time.monotonic()
        while True:
            now = time.monotonic()
            if now >= prune_at:
                self._prune()
                prune_at = now + _PRUNE_SECONDS
            item = None
            with suppress(queue.Empty):
                item = self._queue.get(timeout=max(0.0, flush_at - now))
            if item is not None:
                self._hold(item)
            ending = self._closing.is_set() and self._queue.empty()
            full = len(self._held) >= _ROWS and not self._failing  # what fails is tried again in its time only
            if ending or full or time.monotonic() >= flush_at:
                self._flush(last=ending)
                flush_at = time.monotonic() + self._flush_seconds
            self._say_dropped(now)
            if ending:
                self._sink.close()
                return

    def _hold(self, item: Item) -> None:
        try:
            row = self._row(item, self._mask)
        except Exception:  # a request of a client must not end the log
            _log.exception("a request cannot be written to the %s", self._what)
            self._drop("unreadable", 1)
            return
        if len(self._held) >= _HELD:
            self._drop("not_written", 1)
            return
        self._held.append(row)

    def _flush(self, *, last: bool) -> None:
        if not self._held:
            return
        try:
            self._sink.write(self._held)
        except Exception as error:  # whatever its library raises: answers go on
            if not self._failing:
                self._failing = True
                _log.error("the %s cannot be written, answers go on: %s", self._what, said_without_values(error))
            if last:  # else it is tried again, also while the queue is emptied at the end
                self._drop("not_written", len(self._held))
            return
        if self._failing:
            self._failing = False
            _log.warning("the %s is written again", self._what)
        self._written(len(self._held))
        self._held = []

    def _prune(self) -> None:
        try:
            self._sink.prune(datetime.now(UTC) - timedelta(days=self._keep_days))
        except Exception as error:
            _log.error("old requests cannot be deleted from the %s: %s", self._what, said_without_values(error))

    def _drop(self, reason: str, count: int) -> None:
        self._unsaid += count
        self._dropped(reason, count)

    def _say_dropped(self, now: float) -> None:
        if self._unsaid and now - self._said_at >= _SAY_SECONDS:
            count, self._unsaid, self._said_at = self._unsaid, 0, now
            _log.warning("%d requests are missing in the %s", count, self._what)


class RequestLog:
    """The log of one gateway.

    Args:
        sink: where it is written.
        spec: how much is kept, and how long.
        mask: see `RowWriter`.
        dropped: see `RowWriter`.
        written: see `RowWriter`.
        flush_seconds: see `RowWriter`.
        queue_size: see `RowWriter`.

    Raises:
        SpecError: it is to be masked, and `mask` is None.
    """

    def __init__(
        self,
        sink: Sink,
        spec: LogSpec,
        *,
        mask: Mask | None,
        dropped: Callable[[str, int], None],
        written: Callable[[int], None] = lambda _: None,
        flush_seconds: float = FLUSH_SECONDS,
        queue_size: int = _QUEUE,
    ) -> None:
        if spec.mask and mask is None:
            raise SpecError(
                "The request log is to be masked, and nothing that masks was given.",
                where="log.mask",
                fix="give one, or set log.mask to false",
            )
        self._share = spec.share
        self._writer: RowWriter[Asked] = RowWriter(
            "request log", sink, row_of, keep_days=spec.keep_days, mask=mask if spec.mask else None, dropped=dropped,
            written=written, flush_seconds=flush_seconds, queue_size=queue_size,
        )  # fmt: skip

    def wants(self, request: str) -> bool:
        """Whether this request is in the share that is kept; the same one always is or never is."""
        return zlib.crc32(request.encode()) < self._share * 2**32

    def offer(self, asked: Asked) -> None:
        """Keep a request; never waits."""
        self._writer.offer(asked)

    def close(self, seconds: float = 10.0) -> None:
        """Write what is there, for so many seconds at most, and end."""
        self._writer.close(seconds)


def said_without_values(error: BaseException) -> str:
    """What went wrong; of a database's errors only their kind, since they repeat rows, and addresses with passwords."""
    if isinstance(error, OSError):
        return f"{error.strerror or type(error).__name__} ({error.filename or 'no file'})"
    return type(error).__name__


# -- rows -----------------------------------------------------------------------------------------------------------


def row_of(asked: Asked, mask: Mask | None) -> dict[str, Any]:
    """A request as it is kept: the request as JSON and the answer as text, with what is private masked."""
    answer = read_answer(asked.answer, stream=asked.stream)
    return {
        "at": datetime.fromtimestamp(asked.at, UTC),
        "id": asked.id,
        "name": _masked(asked.name, mask),
        "version": asked.version,
        "key": asked.key,
        "path": asked.path,
        "status": asked.status,
        "stream": asked.stream,
        "seconds": asked.seconds,
        "first_byte_seconds": asked.first_byte,
        "request": orjson.dumps(_masked(dict(asked.body), mask)).decode(),
        "answer": _masked(answer.text, mask),
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "error": _masked(asked.error or answer.error, mask),
        "canary": asked.canary,
        "confidence": asked.confidence,
        "certainty": asked.certainty,
        "flagged": asked.flagged,
    }


class Answer(NamedTuple):
    """What an answer's bytes say: its text (tool calls as JSON), how it ended, and its tokens where it says so."""

    text: str
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    error: str = ""


def read_answer(pieces: Sequence[bytes], *, stream: bool) -> Answer:
    """Read the answer of a chat or a completion, whole or as a stream; of several choices the first."""
    text, reason, error = "", None, ""
    calls: dict[Any, dict[str, Any]] = {}
    usage: Mapping[str, Any] = {}
    for record in _records(b"".join(pieces), stream=stream):
        usage = record.get("usage") or usage
        error = error or str((record.get("error") or {}).get("message", ""))
        for choice in record.get("choices") or ():
            if choice.get("index", 0) != 0:
                continue
            message = choice.get("message") or choice.get("delta") or {}
            text += message.get("content") or choice.get("text") or ""
            for place, call in enumerate(message.get("tool_calls") or []):
                _add_call(calls, call.get("index", place), call)
            reason = choice.get("finish_reason") or reason
    if calls:
        text += orjson.dumps(list(calls.values())).decode()
    return Answer(text, reason, usage.get("prompt_tokens"), usage.get("completion_tokens"), error)


def _add_call(calls: dict[Any, dict[str, Any]], index: Any, piece: Mapping[str, Any]) -> None:
    """Put a piece of a stream to the call that it belongs to: names and arguments may come in many."""
    known = calls.get(index)
    if known is None:
        calls[index] = dict(piece)
        return
    before, more = known.get("function") or {}, piece.get("function") or {}
    joined = {one: (before.get(one) or "") + (more.get(one) or "") for one in ("name", "arguments")}
    calls[index] = {**known, "function": {**before, **joined}}


def _records(data: bytes, *, stream: bool) -> Iterator[dict[str, Any]]:
    pieces = (line[5:].strip() for line in data.split(b"\n") if line.startswith(b"data:")) if stream else (data,)
    for piece in pieces:
        try:
            record = orjson.loads(piece)
        except orjson.JSONDecodeError:  # [DONE], or what a client who left did not wait for
            continue
        if isinstance(record, dict):
            yield record


def _masked(value: Any, mask: Mask | None) -> Any:
    """The value with every text in it masked, and cut where it is very long; also the names in mappings."""
    match value:
        case str():
            text = value if len(value) <= _LONGEST else value[:_LONGEST] + _MISSING
            return mask(text) if mask is not None else text
        case dict():
            return {_masked(name, mask): _masked(one, mask) for name, one in value.items()}
        case list():
            return [_masked(one, mask) for one in value]
    return value


# -- Parquet --------------------------------------------------------------------------------------------------------


def _schema() -> pa.Schema:
    import pyarrow as pa

    kinds = {
        "at": pa.timestamp("us", tz="UTC"), "status": pa.int16(), "stream": pa.bool_(), "seconds": pa.float64(),
        "first_byte_seconds": pa.float64(), "prompt_tokens": pa.int32(), "completion_tokens": pa.int32(),
        "canary": pa.bool_(), "confidence": pa.float64(), "certainty": pa.float64(), "flagged": pa.bool_(),
    }  # fmt: skip
    return pa.schema([(name, kinds.get(name, pa.string())) for name in COLUMNS])


COLUMNS = (
    "at", "id", "name", "version", "key", "path", "status", "stream", "seconds", "first_byte_seconds", "request",
    "answer", "finish_reason", "prompt_tokens", "completion_tokens", "error", "canary", "confidence", "certainty",
    "flagged",
)  # fmt: skip


class ParquetSink:
    """Files `day=2026-01-31/<number>.parquet` in a folder. A file is there when it is whole, and never changes."""

    def __init__(self, folder: Path, schema: Callable[[], pa.Schema] | None = None) -> None:
        self._folder, self._schema = folder, schema or _schema

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write a file for each day. Raises OSError, and leaves nothing half-written under a name that is read."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        for day in sorted({row["at"].date() for row in rows}):
            home = self._folder / f"day={day.isoformat()}"
            home.mkdir(parents=True, exist_ok=True)
            name = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
            part = home / f".{name}.part"
            table = pa.Table.from_pylist([row for row in rows if row["at"].date() == day], schema=self._schema())
            try:
                with part.open("wb") as out:
                    pq.write_table(table, out, compression="zstd")
                    out.flush()
                    os.fsync(out.fileno())
                part.replace(home / f"{name}.parquet")
            except BaseException:
                part.unlink(missing_ok=True)
                raise

    def prune(self, before: datetime, *, parts: bool = True) -> None:
        """Delete the days that are wholly older, and what a killed gateway left half-written.

        Args:
            before: days that are over by then go.
            parts: whether half-written files go too. Only who writes here can tell that nobody is writing one.
        """
        for home, day in _days(self._folder):
            if day < before.date():
                shutil.rmtree(home)
                continue
            for part in home.glob(".*.part") if parts else ():
                part.unlink(missing_ok=True)

    def close(self) -> None:
        """Nothing is held."""


def read_log(
    folder: Path,
    first: date | None = None,
    last: date | None = None,
    columns: Sequence[str] | None = None,
    schema: Callable[[], pa.Schema] | None = None,
) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet log from one day to another, in the order in which files were written.

    A file that is torn (a machine that lost its power) is passed over, and that is logged. A file that an earlier
    gateway wrote has None in the columns that there were not yet.

    Args:
        folder: of the log.
        first: first day.
        last: last day.
        columns: those to read; None for all.
        schema: of what is kept there; None for requests.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    asked = (schema or _schema)().names if columns is None else columns
    for home, day in _days(folder):
        if (first is not None and day < first) or (last is not None and day > last):
            continue
        for path in sorted(home.glob("*.parquet")):
            try:
                with pq.ParquetFile(path) as file:  # half the time of read_table, and there is a file a minute
                    there = set(file.schema_arrow.names)
                    table = file.read([one for one in asked if one in there], use_threads=False)
            except (pa.ArrowInvalid, OSError) as error:
                _log.warning("a file of the request log is passed over, it cannot be read: %s (%s)", path, error)
                continue
            missing = dict.fromkeys(one for one in asked if one not in there)
            yield from ({**missing, **row} for row in table.to_pylist())


def _days(folder: Path) -> Iterator[tuple[Path, date]]:
    for home in sorted(folder.glob("day=*")):
        try:
            yield home, date.fromisoformat(home.name.removeprefix("day="))
        except ValueError:  # somebody else's
            continue


# -- PostgreSQL -----------------------------------------------------------------------------------------------------


class PostgresSink:
    """The table `goldgate_requests`, made where it is missing.

    Args:
        address: `postgresql://…`, as GOLDGATE_LOG_DB has it; it may hold a password and is never shown.

    Raises:
        ServiceError: this is no such address, or its driver is missing. A database that does not answer is no reason
            not to start: it is tried again with each write.
    """

    def __init__(self, address: str) -> None:
        self._engine, self._table = _connect(address)
        self._made = False

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Insert them in one transaction. Raises SQLAlchemyError."""
        with self._engine.begin() as connection:
            if not self._made:
                self._table.metadata.create_all(connection)
                _add_missing_columns(connection, self._table)
            connection.execute(self._table.insert(), [{**row, **_without_zeros(row)} for row in rows])
        self._made = True

    def prune(self, before: datetime) -> None:
        """Delete older rows. Raises SQLAlchemyError."""
        with self._engine.begin() as connection:
            self._table.metadata.create_all(connection)
            connection.execute(self._table.delete().where(self._table.c.at < before))

    def close(self) -> None:
        """Close its connections."""
        self._engine.dispose()


def _without_zeros(row: Mapping[str, Any]) -> dict[str, Any]:
    """PostgreSQL's text holds every character but one."""
    return {name: value.replace("\0", "") for name, value in row.items() if isinstance(value, str)}


def _add_missing_columns(connection: Connection, table: Table) -> None:
    """What a table that an earlier gateway made lacks; empty in its old rows."""
    from sqlalchemy import inspect, text

    there = {one["name"] for one in inspect(connection).get_columns(table.name)}
    for column in table.columns:
        if column.name not in there:
            kind = column.type.compile(connection.dialect)
            connection.execute(text(f"ALTER TABLE {table.name} ADD COLUMN IF NOT EXISTS {column.name} {kind}"))


def _connect(address: str) -> tuple[Engine, Table]:
    from sqlalchemy import (
        BigInteger,
        Boolean,
        Column,
        DateTime,
        Float,
        Identity,
        Index,
        Integer,
        MetaData,
        Table,
        Text,
        create_engine,
    )
    from sqlalchemy.exc import ArgumentError

    fix = f"set {LOG_DB} to postgresql://user:password@host/database, and pip install 'goldgate[postgres]'"
    try:
        engine = create_engine(address, pool_pre_ping=True, pool_size=1, connect_args={"connect_timeout": 5})
    except (ArgumentError, ImportError) as error:
        raise ServiceError(
            f"The request log's database cannot be used: {type(error).__name__}", where=LOG_DB, fix=fix
        ) from None  # the address is in the error's own words
    if engine.dialect.name != "postgresql":
        raise ServiceError(
            f"The request log is kept in PostgreSQL, not in {engine.dialect.name}.", where=LOG_DB, fix=fix
        )
    kinds: dict[str, Any] = {
        "at": DateTime(timezone=True), "status": Integer, "stream": Boolean, "seconds": Float,
        "first_byte_seconds": Float, "prompt_tokens": Integer, "completion_tokens": Integer,
        "canary": Boolean, "confidence": Float, "certainty": Float, "flagged": Boolean,
    }  # fmt: skip
    columns = [Column(name, kinds.get(name, Text), nullable=name != "at") for name in COLUMNS]
    table = Table(
        "goldgate_requests", MetaData(), Column("number", BigInteger, Identity(), primary_key=True), *columns,
        Index("goldgate_requests_at", "at"),
    )  # fmt: skip
    return engine, table


def read_log_rows(
    address: str,
    name: str,
    first: datetime | None = None,
    last: datetime | None = None,
    columns: Sequence[str] = COLUMNS,
) -> Iterator[dict[str, Any]]:
    """The rows of one model's name in a PostgreSQL log, a few thousand in memory at a time, in no order.

    A column that the table has not (an earlier gateway made it) is None.

    Args:
        address: `postgresql://…`, as GOLDGATE_LOG_DB has it; never shown.
        name: the model as clients write it.
        first: from this moment on.
        last: up to this moment.
        columns: those to read.

    Raises:
        ServiceError: this is no such address, the database does not answer, or has no request log.
    """
    from sqlalchemy import inspect, select
    from sqlalchemy.exc import NoSuchTableError, SQLAlchemyError

    engine, table = _connect(address)
    try:
        with engine.connect() as connection:
            there = {one["name"] for one in inspect(connection).get_columns(table.name)}
            asked = select(*(table.c[one] for one in columns if one in there)).where(table.c.name == name)
            if first is not None:
                asked = asked.where(table.c.at >= first)
            if last is not None:
                asked = asked.where(table.c.at <= last)
            missing = dict.fromkeys(one for one in columns if one not in there)
            for row in connection.execution_options(yield_per=_ROWS).execute(asked).mappings():
                yield {**missing, **row}
    except NoSuchTableError:
        raise ServiceError(
            "The database has no request log.",
            where=LOG_DB,
            fix="name the database that the gateway writes to (its `log.to` is postgres), or wait for a first request",
        ) from None
    except SQLAlchemyError as error:
        raise ServiceError(
            f"The request log cannot be read: {said_without_values(error)}",
            where=LOG_DB,
            fix="see that the database runs and that its user may read the table goldgate_requests",
        ) from None  # its own words repeat the address
    finally:
        engine.dispose()


def open_log(
    spec: LogSpec,
    folder: Path,
    *,
    mask: Mask | None,
    dropped: Callable[[str, int], None],
    written: Callable[[int], None] = lambda _: None,
    environment: Mapping[str, str] = os.environ,
    flush_seconds: float = FLUSH_SECONDS,
) -> RequestLog | None:
    """The log that the spec asks for; None for none.

    Args:
        spec: what is kept, and where.
        folder: for Parquet files.
        mask: see `RequestLog`.
        dropped: see `RequestLog`.
        written: see `RequestLog`.
        environment: where GOLDGATE_LOG_DB is read.
        flush_seconds: how long a request may wait to be written; a killed gateway loses as much of its log.

    Raises:
        ServiceError: the database is not named, or its address is none.
        SpecError: it is to be masked, and `mask` is None.
    """
    match spec.to:
        case "none":
            return None
        case "parquet":
            sink: Sink = ParquetSink(folder)
        case _:
            address = environment.get(LOG_DB)
            if not address:
                raise ServiceError(
                    "The request log is to be kept in PostgreSQL, and no database is named.",
                    where=LOG_DB,
                    fix=f"set the environment's {LOG_DB}, or log.to to parquet",
                )
            sink = PostgresSink(address)
    return RequestLog(sink, spec, mask=mask, dropped=dropped, written=written, flush_seconds=flush_seconds)
