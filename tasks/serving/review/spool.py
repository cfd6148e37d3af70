"""The answers that a gateway has put aside for people, until somebody fetches them; never at the expense of an answer.

An item is put into a queue and forgotten. A thread masks it and writes it into a small database in the gateway's
folder. What does not fit, or cannot be written, is dropped and counted.
"""

from __future__ import annotations

import logging
import queue
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tasks.contracts.errors import SpecError, StoreError
from tasks.contracts.review import ReviewItem, ReviewReason, SpoolSpec
from tasks.serving.request_log import Mask, said_without_values

SPOOL_FILE = "reviews.db"

Dropped = Callable[[str, int], None]
MakeItem = Callable[[], ReviewItem | None]

_QUEUE = 2_000  # items that wait to be written
_ROWS = 500  # in one transaction
_SAY_SECONDS = 60.0
_BUSY_SECONDS = 5.0
_LONGEST = 200_000  # characters of one text that are kept
_MISSING = "…"
# The better reason is kept where a request has two: a shadow answers after the request was flagged.
_RANK = {ReviewReason.SAMPLED: 0, ReviewReason.FLAGGED: 1, ReviewReason.DISAGREED: 2}
# Of a chat's messages: names that stay, and those whose values stay too, so that a masked message is still one.
_FORM = frozenset({"role", "type"})
_KEYS = _FORM | {"content", "text", "tool_calls", "function", "name", "arguments", "id", "tool_call_id"}
_TABLE = """
CREATE TABLE IF NOT EXISTS reviews (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, at REAL NOT NULL, rank INTEGER NOT NULL, item TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS reviews_in_order ON reviews (name, at, id);
"""
_log = logging.getLogger(__name__)


class Spool:
    """The items of one gateway: a queue, a thread, and a database.

    Args:
        path: the database; made where it is missing.
        spec: what is put aside, and how much.
        mask: takes what is private out of a text; called in the spool's thread, first with an empty text.
        dropped: is told the reason and the number of items that are not put aside.
        queue_size: items that wait to be written.

    Raises:
        SpecError: it is to be masked, and `mask` is None.
    """

    def __init__(
        self, path: Path, spec: SpoolSpec, *, mask: Mask | None, dropped: Dropped = lambda *_: None,
        queue_size: int = _QUEUE,
    ) -> None:  # fmt: skip
        if spec.mask and mask is None:
            raise SpecError(
                "Answers for review are to be masked, and nothing that masks was given.",
                where="review.mask",
                fix="give one, or set review.mask to false",
            )
        self.spec = spec
        self._path, self._mask, self._dropped = path, mask if spec.mask else None, dropped
        self._queue: queue.Queue[ReviewItem | MakeItem | None] = queue.Queue(queue_size)
        self._connection: sqlite3.Connection | None = None
        self._lock = threading.Lock()  # of the connection
        self._waiting: Counter[str] = Counter()
        self._failing = False
        self._unsaid, self._said_at = 0, -_SAY_SECONDS
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="review spool", daemon=True)
        self._thread.start()

    def put(self, item: ReviewItem | MakeItem) -> None:
        """Put an item aside. Never waits and never raises: where there is no room it is dropped and counted.

        Args:
            item: it; or what makes it, called in the spool's thread, where None is nothing to keep. A second item of
                the same request replaces the first where it says more (`disagreed` over `flagged` over `sampled`).
        """
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self._drop("queue_full", 1)

    def waiting(self) -> dict[str, int]:
        """Items that nobody has fetched, by name; as of the last write."""
        return dict(self._waiting)

    def items(self, name: str, limit: int) -> list[ReviewItem]:
        """The oldest items of a name.

        Raises:
            StoreError: the database cannot be read.
        """
        with self._database() as connection:
            found = connection.execute(
                "SELECT item FROM reviews WHERE name = ? ORDER BY at, id LIMIT ?", (name, limit)
            ).fetchall()
        return [ReviewItem.model_validate_json(text) for (text,) in found]

    def take(self, name: str, ids: Sequence[str]) -> int:
        """Forget items that have reached a queue; those that are gone already are well.

        Returns:
            How many were there.

        Raises:
            StoreError: the database cannot be written.
        """
        with self._database() as connection:
            before = connection.total_changes
            connection.executemany("DELETE FROM reviews WHERE name = ? AND id = ?", [(name, one) for one in ids])
            gone = connection.total_changes - before
            self._count(connection)
        return gone

    def close(self, seconds: float = 10.0) -> None:
        """Write what is there, for so many seconds at most, and end."""
        self._closing.set()
        with suppress(queue.Full):
            self._queue.put_nowait(None)  # wakes the thread
        self._thread.join(seconds)
        with self._lock:
            self._close_connection()

    # -- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        if self._mask is not None:
            self._mask("")
        with suppress(StoreError), self._database() as connection:
            self._count(connection)
        while True:
            batch = self._next_batch()
            ending = self._closing.is_set() and self._queue.empty()
            items = [item for item in map(self._made, batch) if item is not None]
            if items:
                self._write(items)
            self._say_dropped()
            if ending:
                return

    def _next_batch(self) -> list[ReviewItem | MakeItem]:
        """What is in the queue; waits for the first."""
        batch = [self._queue.get()]
        with suppress(queue.Empty):
            while len(batch) < _ROWS:
                batch.append(self._queue.get_nowait())
        return [one for one in batch if one is not None]

    def _made(self, item: ReviewItem | MakeItem) -> ReviewItem | None:
        try:
            made = item if isinstance(item, ReviewItem) else item()
            return None if made is None else masked_item(made, self._mask)
        except Exception as error:  # a request of a client must not end the spool
            _log.error("an answer cannot be put aside for review: %s", type(error).__name__)
            self._drop("unreadable", 1)
            return None

    def _write(self, items: Sequence[ReviewItem]) -> None:
        try:
            with self._database() as connection:
                dropped = self._insert(connection, items)
                self._count(connection)
        except StoreError as error:
            if not self._failing:
                self._failing = True
                _log.error("answers for review cannot be written, requests are answered all the same: %s", error.what)
            self._drop("not_written", len(items))
            return
        if self._failing:
            self._failing = False
            _log.warning("answers for review are written again")
        if dropped:
            self._drop("full", dropped)

    def _insert(self, connection: sqlite3.Connection, items: Sequence[ReviewItem]) -> int:
        """Write what there is room for; returns how many there was none for."""
        room = self.spec.most - int(connection.execute("SELECT count(*) FROM reviews").fetchone()[0])
        dropped = 0
        for item in items:
            rank, text = _RANK[item.reason], item.model_dump_json()
            known = connection.execute("SELECT rank FROM reviews WHERE id = ?", (item.id,)).fetchone()
            if known is None and room <= 0:
                dropped += 1
            elif known is None:
                values = (item.id, item.name, item.at.timestamp(), rank, text)
                connection.execute("INSERT INTO reviews (id, name, at, rank, item) VALUES (?, ?, ?, ?, ?)", values)
                room -= 1
            elif rank > known[0]:
                connection.execute("UPDATE reviews SET rank = ?, item = ? WHERE id = ?", (rank, text, item.id))
        return dropped

    def _count(self, connection: sqlite3.Connection) -> None:
        counts = connection.execute("SELECT name, count(*) FROM reviews GROUP BY name").fetchall()
        names = {*self._waiting, *(name for name, _ in counts)}
        self._waiting = Counter(dict.fromkeys(names, 0) | dict(counts))  # a name that is empty now still has a gauge

    # -- the database -----------------------------------------------------------------------------------------------

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """One transaction; opened when it is needed, so that a gateway starts and answers whatever state it is in."""
        with self._lock:
            try:
                connection = self._open()
                with connection:
                    yield connection
            except (sqlite3.Error, OSError) as error:
                with suppress(sqlite3.Error):
                    self._close_connection()  # the next one begins anew
                said = str(error) if isinstance(error, sqlite3.Error) else said_without_values(error)
                raise StoreError(
                    f"The answers that wait for review cannot be read or written: {said}",
                    where=str(self._path),
                    fix="make room on the disk and allow writing there; a damaged file may be moved away, a new one is "
                    "made",
                ) from error

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            connection = sqlite3.connect(self._path, timeout=_BUSY_SECONDS, check_same_thread=False)
            try:
                self._path.chmod(0o600)  # it holds what people have asked
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = NORMAL")  # a power cut loses the last ones, never the file
                connection.executescript(_TABLE)
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def _close_connection(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    # -- what is missing --------------------------------------------------------------------------------------------

    def _drop(self, reason: str, count: int) -> None:
        self._unsaid += count
        self._dropped(reason, count)

    def _say_dropped(self) -> None:
        now = time.monotonic()
        if self._unsaid and now - self._said_at >= _SAY_SECONDS:
            count, self._unsaid, self._said_at = self._unsaid, 0, now
            _log.warning("%d answers were not put aside for review", count)


def masked_item(item: ReviewItem, mask: Mask | None) -> ReviewItem:
    """The item with every text in it masked, and cut where it is very long; the answers that are allowed stay."""
    allowed = frozenset(item.choices)

    def words(text: str) -> str:
        if text in allowed:  # a label is no personal data, and has to stay one
            return text
        kept = text if len(text) <= _LONGEST else text[:_LONGEST] + _MISSING
        return mask(kept) if mask is not None else kept

    return item.model_copy(
        update={
            "messages": tuple(_masked(message, words) for message in item.messages),
            "answer": words(item.answer),
            "other": None if item.other is None else words(item.other),
        }
    )


def _masked(value: Any, words: Mask) -> Any:
    match value:
        case str():
            return words(value)
        case dict():
            return {
                name if name in _KEYS else words(str(name)): one if name in _FORM else _masked(one, words)
                for name, one in value.items()
            }
        case list() | tuple():
            return [_masked(one, words) for one in value]
    return value
