"""A request log made on purpose: who asked what when, and what was answered."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from tasks.serving.request_log import COLUMNS, ParquetSink

Row = dict[str, Any]


def request(number: int, at: datetime, text: str = "my card was lost", **changes: Any) -> Row:
    """A row of the log: a chat that was answered."""
    body = {"model": "complaints", "messages": [{"role": "user", "content": text}]}
    row: Row = dict.fromkeys(COLUMNS)
    row |= {
        "at": at, "id": f"r{number}-{at.timestamp()}", "name": "complaints", "version": "complaints@7", "key": "",
        "path": "/v1/chat/completions", "status": 200, "stream": False, "seconds": 0.1, "request": json.dumps(body),
        "answer": "card", "error": "",
    }  # fmt: skip
    return row | changes


def requests(
    count: int, first: datetime, end: datetime, *, texts: Sequence[str], answers: Sequence[str], **changes: Any
) -> list[Row]:
    """So many, evenly from one moment until just before another, texts and answers in turn."""
    step = (end - first) / count
    return [
        request(
            number, first + number * step, texts[number % len(texts)],
            **({"answer": answers[number % len(answers)], "confidence": 0.9} | changes),
        )
        for number in range(count)
    ]  # fmt: skip


def write_log(folder: Path, *groups: Sequence[Row]) -> Path:
    """The log of a gateway, a file for each group and day."""
    sink = ParquetSink(folder)
    for rows in groups:
        sink.write(rows)
    return folder


def steady(now: datetime, *, version: str = "complaints@7", days: float = 10.0) -> list[Row]:
    """Ten requests an hour that are all alike, until a day ago; answers half and half."""
    hours = int(days * 24)
    return requests(
        hours * 10, now - timedelta(hours=hours + 24), now - timedelta(hours=24), version=version,
        texts=["my card was lost abroad", "the loan has a wrong rate", "a fee on my card", "my loan is denied"],
        answers=["card", "loan"],
    )  # fmt: skip


def last_day(now: datetime, *, drifted: bool, version: str = "complaints@7") -> list[Row]:
    """The requests of the last day, as before or about other things with other answers."""
    texts = ["my card was lost abroad", "the loan has a wrong rate", "a fee on my card", "my loan is denied"]
    if drifted:
        texts = ["the crypto wallet is frozen", "my card was lost abroad", "crypto transfer never came"]
    return requests(
        240, now - timedelta(hours=24), now, texts=texts, version=version,
        answers=["money_transfer", "money_transfer", "money_transfer", "card"] if drifted else ["card", "loan"],
    )  # fmt: skip
