"""The two windows that drift is looked for between, read from the request log.

The current window is the last `hours`. The reference is the first `reference_hours` in which the version that is live
now answered, as far back as the log goes; it stays where it is, so slow drift adds up against it. (The log is kept for
a time only, so under a version that is live for longer the reference wanders along behind.) Of a younger version the
reference is what there is before the current window, from when it is as long as that on.

A new version begins anew. Its answers and confidences are its own: held against another's they would find the version,
not drift. Requests could be compared across versions, and are not: a version that was trained on what had drifted would
be found to have drifted once more, and be trained again.

Only requests by the bare name count: who asks for `complaints@7` is testing. A canary's keys are drawn by hash, so the
requests that it answers count as requests, and its answers are left out.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from hashlib import blake2b
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import orjson

from tasks.contracts.errors import StoreError
from tasks.contracts.monitor import MonitorSpec, WindowFacts
from tasks.contracts.review import ReviewOutcome, ReviewReason
from tasks.serving.drift import Window
from tasks.serving.request_log import read_log, read_log_rows
from tasks.serving.review.rows import read_records

NO_CHOICE = "(none of the answers)"  # what was cut off, or was asked for something else; its text is nobody's business

_LONGEST = 20_000  # characters of a request that are compared, so that a window fits into memory
_WHO = ("at", "name", "version", "status", "canary")
_WHAT = (*_WHO, "id", "request", "answer", "confidence", "flagged")


class Log(Protocol):
    """A request log that can be read."""

    def rows(
        self, name: str, columns: Sequence[str], first: datetime | None, last: datetime
    ) -> Iterator[Mapping[str, Any]]:
        """Rows from one moment to another; there may be rows of other names and moments among them."""


@dataclass(frozen=True)
class ParquetLog:
    """The files of a gateway."""

    folder: Path

    def rows(
        self, name: str, columns: Sequence[str], first: datetime | None, last: datetime
    ) -> Iterator[Mapping[str, Any]]:
        """The rows of these days.

        Raises:
            StoreError: there is no such folder.
        """
        if not self.folder.is_dir():
            raise StoreError(
                "There is no request log.",
                where=str(self.folder),
                fix="start the gateway (`goldgate serve`; its `log.to` is parquet), or set `log` to its folder",
            )
        return read_log(self.folder, first.date() if first is not None else None, last.date(), columns)


@dataclass(frozen=True)
class PostgresLog:
    """The table of a gateway; the address may hold a password."""

    address: str = field(repr=False)

    def rows(
        self, name: str, columns: Sequence[str], first: datetime | None, last: datetime
    ) -> Iterator[Mapping[str, Any]]:
        """The rows of this name. Raises ServiceError: see `read_log_rows`."""
        return read_log_rows(self.address, name, first, last, columns)


class Windows(NamedTuple):
    """What is compared.

    Attributes:
        reference: the first window.
        current: the second.
        reference_facts: what is known of the first.
        current_facts: of the second.
        notes: why there is nothing to compare in an aspect, by the name of its test.
    """

    reference: Window
    current: Window
    reference_facts: WindowFacts
    current_facts: WindowFacts
    notes: Mapping[str, str]


class Seen(NamedTuple):
    """What a look at the log has found: windows, or why there are none."""

    windows: Windows | None
    why_not: str


class _Lives(NamedTuple):
    """The version that answered last, and since when."""

    live: str
    since: datetime


def read_windows(log: Log, spec: MonitorSpec, now: datetime) -> Seen:
    """Read both windows. The log is gone through, never held: at most `most_rows` requests of each window are.

    Raises:
        StoreError: there is no log, or the file of reviews cannot be read.
        ServiceError: the log's database cannot be read.
    """
    lives = _who_answers(log, spec.name, now)
    if lives is None:
        return Seen(None, f"No request for {spec.name} has been answered, as far as the log goes.")
    span = timedelta(hours=spec.hours)
    begin = now - span
    if begin - lives.since < span:
        return Seen(
            None,
            f"{lives.live} answers since {_at(lives.since)}, as far as the log goes; the last {spec.hours:g} hours are "
            f"compared with as many before at least. A first comparison can be made from {_at(lives.since + 2 * span)} "
            "on.",
        )
    end = min(begin, lives.since + timedelta(hours=spec.reference_hours))
    choices = spec.retrain.task.labels if spec.retrain is not None else None
    reference = _draw(log, spec, _Span(lives.since, end, with_end=False), lives.live, choices)
    current = _draw(log, spec, _Span(begin, now, with_end=True), lives.live, choices)
    notes = _notes(reference, current, choices)
    reviewed: list[ReviewedAnswer] = []
    if spec.reviews is None:
        notes["disagreement"] = "no file of reviews is named"
    elif not Path(spec.reviews).exists():
        notes["disagreement"] = f"nobody has reviewed an answer yet: {spec.reviews} is not there"
    else:
        reviewed = drawn_reviews(Path(spec.reviews), spec.name, lives.live)
    return Seen(
        Windows(_window(reference, reviewed), _window(current, reviewed), reference.facts, current.facts, notes), ""
    )


def _at(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"


def _notes(then: _Drawn, now: _Drawn, choices: Sequence[str] | None) -> dict[str, str]:
    notes = {}
    if choices is not None and not choices:
        notes["classes"] = "the task's answers are open"
    elif choices is None and not then.answers and not now.answers:
        notes["classes"] = "nothing says which answers there are: name the training"
    if not then.confidences and not now.confidences:
        notes["confidence"] = "no answer has a confidence"
    return notes


# -- the log ----------------------------------------------------------------------------------------------------------


def _who_answers(log: Log, name: str, now: datetime) -> _Lives | None:
    """Who answered last; a canary is on trial, and who stood in for it is not new by that."""
    first: dict[str, datetime] = {}
    last: dict[str, datetime] = {}
    for row in _answered(log.rows(name, _WHO, None, now), name):
        at, version = row["at"], row["version"]
        if at > now or row["canary"]:
            continue
        first[version] = min(at, first.get(version, at))
        last[version] = max(at, last.get(version, at))
    if not last:
        return None
    live = max(last, key=lambda version: (last[version], version))
    return _Lives(live, first[live])


def _answered(rows: Iterable[Mapping[str, Any]], name: str) -> Iterator[Mapping[str, Any]]:
    return (row for row in rows if row["name"] == name and row["status"] == 200 and row["version"])


class _Span(NamedTuple):
    """From a moment to another; the last one belongs to it or not."""

    first: datetime
    end: datetime
    with_end: bool

    def has(self, at: datetime) -> bool:
        return self.first <= at < self.end or (self.with_end and at == self.end)


class _Kept(NamedTuple):
    """Of one request: its text, and of the version that is compared the answer and its confidence."""

    text: str
    answer: str | None
    confidence: float | None


class _Drawn(NamedTuple):
    """The requests of a window."""

    span: _Span
    kept: list[_Kept]
    requests: int
    versions: dict[str, int]

    @property
    def answers(self) -> list[str]:
        return [one.answer for one in self.kept if one.answer is not None]

    @property
    def confidences(self) -> list[float]:
        return [one.confidence for one in self.kept if one.confidence is not None]

    @property
    def facts(self) -> WindowFacts:
        return WindowFacts(
            start=self.span.first,
            end=self.span.end,
            requests=self.requests,
            rows=len(self.kept),
            versions=self.versions,
        )


def _draw(log: Log, spec: MonitorSpec, span: _Span, owner: str, choices: Sequence[str] | None) -> _Drawn:
    """The requests with the smallest hashes of their ids: the same ones whenever this is asked."""
    heap: list[tuple[int, int, _Kept]] = []  # the largest hash first
    number = count()  # tells two of one hash apart
    versions: Counter[str] = Counter()
    for row in _answered(log.rows(spec.name, _WHAT, span.first, span.end), spec.name):
        if not span.has(row["at"]):
            continue
        versions[row["version"]] += 1
        rank = -_hash(row["id"] or "")
        if len(heap) == spec.most_rows and rank <= heap[0][0]:
            continue
        text = input_of(row["request"])
        if text is None:
            continue
        mine = row["version"] == owner
        entry = (
            rank,
            next(number),
            _Kept(text[:_LONGEST], _class_of(row, choices) if mine else None, row["confidence"] if mine else None),
        )
        if len(heap) < spec.most_rows:
            heapq.heappush(heap, entry)
        else:
            heapq.heapreplace(heap, entry)
    kept = [one for _, _, one in sorted(heap, key=lambda entry: entry[:2])]
    return _Drawn(span, kept, versions.total(), dict(sorted(versions.items())))


def _hash(request: str) -> int:
    """Another one than that of the log's own share, which takes ids whose crc32 is small."""
    return int.from_bytes(blake2b(request.encode(), digest_size=8).digest(), "big")


def input_of(request: str) -> str | None:
    """What was asked: the text of the last message of a user, or a completion's prompt; None without any."""
    try:
        body = orjson.loads(request)
    except (orjson.JSONDecodeError, TypeError):
        return None
    if not isinstance(body, dict):
        return None
    messages = body.get("messages")
    if not isinstance(messages, list):
        prompt = body.get("prompt")
        return prompt if isinstance(prompt, str) else None
    for message in reversed(messages):
        if isinstance(message, dict) and message.get("role") == "user":
            return _text(message.get("content"))
    return None


def _text(content: Any) -> str | None:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return None
    parts = [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
    return "\n".join(parts) if parts else None


def _class_of(row: Mapping[str, Any], choices: Sequence[str] | None) -> str | None:
    """The answer if answers are closed: by the task's labels, else by there being a confidence or a flag."""
    answer = (row["answer"] or "").strip()
    if choices is not None:
        return (answer if answer in choices else NO_CHOICE) if choices else None
    if row["confidence"] is not None:
        return answer
    return NO_CHOICE if row["flagged"] is not None else None


# -- reviews ----------------------------------------------------------------------------------------------------------


class ReviewedAnswer(NamedTuple):
    """An answer that people looked at since it was drawn, whatever its confidence.

    Attributes:
        at: when it was asked.
        corrected: whether they say otherwise than the model.
    """

    at: datetime
    corrected: bool


def drawn_reviews(path: Path, name: str, version: str) -> list[ReviewedAnswer]:
    """What a file of reviews says of a version's answers that were drawn.

    Those that were flagged, or that a shadow disagreed with, were chosen for being doubtful: how often they are
    corrected says nothing of all. Those that people do not agree on, or passed over, say nothing either. A right answer
    that is none the task has is a correction.

    Args:
        path: `reviews.jsonl`, as `goldgate review` writes it.
        name: what requests call the model.
        version: label of the version.

    Raises:
        StoreError: it cannot be read, or holds something else; names file and line.
    """
    return [
        ReviewedAnswer(record.at, not record.correct)
        for record in read_records(path)
        if (record.name, record.version, record.reason) == (name, version, ReviewReason.SAMPLED)
        and (record.correct is not None or record.outcome is ReviewOutcome.UNUSABLE)
    ]


def _window(drawn: _Drawn, reviewed: Sequence[ReviewedAnswer]) -> Window:
    looked_at = [one for one in reviewed if drawn.span.has(one.at)]
    return Window(
        texts=[one.text for one in drawn.kept],
        answers=drawn.answers,
        confidences=drawn.confidences,
        reviewed=len(looked_at),
        corrected=sum(one.corrected for one in looked_at),
    )
