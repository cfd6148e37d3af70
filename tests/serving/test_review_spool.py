"""The spool: what is put aside is there after a restart, what does not fit is counted, and nobody waits for it."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tasks.contracts.errors import SpecError, StoreError
from tasks.contracts.review import ReviewItem, ReviewReason, SpoolSpec
from tasks.serving.review.spool import SPOOL_FILE, Spool, masked_item

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)
OPEN = SpoolSpec(mask=False)


def item(number: int, **changes: Any) -> ReviewItem:
    fields: dict[str, Any] = {
        "id": f"request-{number}", "name": "complaints", "version": "complaints@1",
        "at": NOON + timedelta(seconds=number), "reason": ReviewReason.FLAGGED,
        "messages": ({"role": "user", "content": f"text {number}"},), "answer": "card", "choices": ("card", "loan"),
    }  # fmt: skip
    return ReviewItem(**(fields | changes))


def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not done():
        assert time.monotonic() < deadline, "not within 20 s"
        time.sleep(0.01)


@pytest.fixture
def dropped() -> Counter[str]:
    return Counter()


@pytest.fixture
def open_spool(tmp_path: Path, dropped: Counter[str]) -> Iterator[Callable[..., Spool]]:
    opened: list[Spool] = []

    def make(spec: SpoolSpec = OPEN, **options: Any) -> Spool:
        options = {"mask": None} | options
        path = options.pop("path", tmp_path / SPOOL_FILE)
        opened.append(Spool(path, spec, dropped=lambda why, count: dropped.update({why: count}), **options))
        return opened[-1]

    yield make
    for spool in opened:
        spool.close()


def test_items_wait_in_the_order_of_their_requests_until_they_are_taken(open_spool: Callable[..., Spool]) -> None:
    spool = open_spool()
    other = item(9, name="tickets")
    for one in (item(3), item(1), item(2), other):
        spool.put(one)
    until(lambda: spool.waiting() == {"complaints": 3, "tickets": 1})
    assert spool.items("complaints", 2) == [item(1), item(2)]
    assert spool.take("complaints", ["request-1", "request-9", "never"]) == 1  # another name's is left alone
    assert spool.items("complaints", 10) == [item(2), item(3)]
    assert spool.items("tickets", 10) == [other]
    assert spool.take("complaints", ["request-1"]) == 0
    assert spool.waiting() == {"complaints": 2, "tickets": 1}


def test_a_restarted_gateway_has_what_was_put_aside(open_spool: Callable[..., Spool], tmp_path: Path) -> None:
    spool = open_spool()
    spool.put(item(1))
    spool.close()
    again = open_spool()
    assert again.items("complaints", 10) == [item(1)]
    until(lambda: again.waiting() == {"complaints": 1})
    assert (tmp_path / SPOOL_FILE).stat().st_mode & 0o777 == 0o600


def test_a_request_is_one_item_and_the_better_reason_is_kept(open_spool: Callable[..., Spool]) -> None:
    spool = open_spool()
    disagreed = item(1, reason=ReviewReason.DISAGREED, other="loan")
    for one in (item(1), item(1, reason=ReviewReason.SAMPLED), disagreed, item(1), item(2)):
        spool.put(one)
    until(lambda: spool.waiting().get("complaints") == 2)
    assert spool.items("complaints", 10) == [disagreed, item(2)]


def test_what_does_not_fit_is_counted_and_a_known_item_always_fits(
    open_spool: Callable[..., Spool], dropped: Counter[str]
) -> None:
    spool = open_spool(SpoolSpec(mask=False, most=2))
    for one in (item(1), item(2), item(3), item(1, reason=ReviewReason.DISAGREED, other="loan"), item(4)):
        spool.put(one)
    until(lambda: dropped["full"] == 2)
    assert [one.reason.value for one in spool.items("complaints", 10)] == ["disagreed", "flagged"]
    spool.take("complaints", ["request-1"])
    spool.put(item(5))
    until(lambda: len(spool.items("complaints", 10)) == 2)
    assert dropped == {"full": 2}


def test_a_full_queue_drops_and_does_not_wait(open_spool: Callable[..., Spool], dropped: Counter[str]) -> None:
    going, go = threading.Event(), threading.Event()

    def slow() -> ReviewItem:
        going.set()
        go.wait(20)
        return item(1)

    spool = open_spool(queue_size=1)
    spool.put(slow)
    until(going.is_set)  # an empty queue would not say that it is at work
    for number in range(2, 6):
        spool.put(item(number))
    assert dropped == {"queue_full": 3}
    go.set()
    until(lambda: spool.waiting() == {"complaints": 2})


def test_what_makes_no_item_keeps_the_next_from_nothing(
    open_spool: Callable[..., Spool], dropped: Counter[str]
) -> None:
    def breaks() -> ReviewItem:
        raise ValueError("a client's nonsense")

    spool = open_spool()
    spool.put(breaks)
    spool.put(lambda: None)
    spool.put(lambda: item(1))
    until(lambda: spool.waiting() == {"complaints": 1})
    assert dropped == {"unreadable": 1}


def test_a_folder_that_cannot_be_written_costs_items_and_nothing_else(
    open_spool: Callable[..., Spool], dropped: Counter[str], tmp_path: Path
) -> None:
    spool = open_spool(path=tmp_path / "not there" / SPOOL_FILE)
    spool.put(item(1))
    until(lambda: dropped["not_written"] == 1)
    with pytest.raises(StoreError, match="cannot be read or written: unable to open database file"):
        spool.items("complaints", 10)
    (tmp_path / "not there").mkdir()  # the disk is there again
    spool.put(item(2))
    until(lambda: spool.waiting() == {"complaints": 1})
    assert spool.items("complaints", 10) == [item(2)]


def test_a_full_disk_costs_items_until_there_is_room(open_spool: Callable[..., Spool], dropped: Counter[str]) -> None:
    spool = open_spool()
    spool.put(item(1))
    until(lambda: spool.waiting() == {"complaints": 1})
    with spool._lock:
        assert spool._connection is not None
        pages = spool._connection.execute("PRAGMA page_count").fetchone()[0]
        spool._connection.execute(f"PRAGMA max_page_count = {pages}")  # SQLite's own word for a full disk
    spool.put(item(2, answer="x" * 50_000))
    until(lambda: dropped["not_written"] == 1)
    spool.put(item(3))  # the connection was given up, and with it the limit
    until(lambda: spool.waiting() == {"complaints": 2})
    assert [one.id for one in spool.items("complaints", 10)] == ["request-1", "request-3"]


def test_a_damaged_database_is_said(open_spool: Callable[..., Spool], dropped: Counter[str], tmp_path: Path) -> None:
    (tmp_path / SPOOL_FILE).write_bytes(b"no database at all, " * 100)
    spool = open_spool()
    spool.put(item(1))
    until(lambda: dropped["not_written"] == 1)
    with pytest.raises(StoreError, match="not a database") as error:
        spool.items("complaints", 1)
    assert "moved away" in error.value.fix


def test_masked_before_it_is_written(open_spool: Callable[..., Spool], tmp_path: Path) -> None:
    seen: list[str] = []

    def mask(text: str) -> str:
        seen.append(text)
        return text.replace("Ann", "[NAME]")

    spool = open_spool(SpoolSpec(), mask=mask)
    spool.put(item(1, messages=({"role": "user", "content": [{"type": "text", "text": "I am Ann"}]},), other="Ann's"))
    until(lambda: spool.waiting() == {"complaints": 1})
    assert seen[0] == ""  # so that it can load what it needs
    (found,) = spool.items("complaints", 1)
    assert found.messages == ({"role": "user", "content": [{"type": "text", "text": "I am [NAME]"}]},)
    assert (found.answer, found.other) == ("card", "[NAME]'s")
    spool.close()
    with sqlite3.connect(tmp_path / SPOOL_FILE) as database:
        assert "Ann" not in str(database.execute("SELECT * FROM reviews").fetchall())


def test_a_label_stays_a_label_whatever_the_mask() -> None:
    masked = masked_item(item(1, answer="card", other="cards"), lambda _: "[X]")
    assert (masked.answer, masked.other, masked.messages[0]["content"]) == ("card", "[X]", "[X]")
    assert masked.choices == ("card", "loan")
    assert masked.messages == ({"role": "user", "content": "[X]"},)  # still a message


def test_very_long_texts_are_cut() -> None:
    assert len(masked_item(item(1, answer="x" * 300_000), None).answer) == 200_001


def test_masking_without_a_mask_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="to be masked"):
        Spool(tmp_path / SPOOL_FILE, SpoolSpec(), mask=None)
