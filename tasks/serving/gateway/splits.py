"""Which version answers a request for a name, the live one or the one on trial; and when the latter is taken back.

Counting is done in the event loop, for it takes microseconds. What has happened is written by a thread, at most once a
second, and at once when a canary is taken back; a gateway that starts again goes on from there.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from prometheus_client import Counter

from tasks.contracts.errors import GoldgateError, SpecError, StoreError
from tasks.contracts.observe import CanaryFinding, CanaryState
from tasks.contracts.serving import Canary, CanaryStatus, Traffic, VersionRef
from tasks.contracts.spec import CanarySpec
from tasks.serving.books import Books, ConflictError
from tasks.serving.canary import Firsts, Request, count_request, in_canary, is_worse, judge_canary, slow_limit
from tasks.serving.gateway.engines import Engines
from tasks.serving.gateway.public import Exchange
from tasks.serving.metrics import Metrics

KEY_HEADER = b"x-goldgate-key"

_KEY_FIELDS = ("user", "safety_identifier")  # OpenAI's older and newer name for who asks
_REMEMBERED = 1_000  # answers of each live version whose latency is known
_WRITE_SECONDS = 1.0
_MARK_BYTES = 9
_NOBODYS_FAULT = frozenset({"client_gone", "shutting_down"})
_log = logging.getLogger(__name__)


def key_of(exchange: Exchange) -> str:
    """Whose request it is: what its body says, else a header, else the request is its own key."""
    for field_name in _KEY_FIELDS:
        given = exchange.body.get(field_name)
        if isinstance(given, str) and given:
            return given
    for header, value in exchange.headers:
        if header == KEY_HEADER and value:
            return value.decode("latin-1")
    return exchange.id


def as_request(exchange: Exchange, canary: str, *, sureness: bool) -> Request | None:
    """What a request that has ended says of its version; None where it says nothing.

    Failed is what ends with a 5xx, is cut off, or was to be none but one of the choices and is not. A request of the
    canary that the live version had to answer in its place has failed too, though its caller has not seen that: else an
    engine that is away would be promoted on the live version's answers.

    Args:
        exchange: it; its key was drawn.
        canary: label of the version on trial.
        sureness: whether both versions have a threshold. If one alone has, all unsure answers are that one's.
    """
    if exchange.reason in _NOBODYS_FAULT or exchange.status < 200 or 400 <= exchange.status < 500:
        return None  # the caller's own, or the gateway's
    stood_in = bool(exchange.canary) and exchange.version != canary
    no_choice = bool(exchange.flagged) and exchange.confidence is None
    failed = exchange.status >= 500 or bool(exchange.reason) or no_choice or stood_in
    return Request(
        key=exchange.canary_key,
        canary=bool(exchange.canary),
        failed=failed,
        milliseconds=None if failed else latency_ms(exchange),
        unsure=exchange.flagged if sureness and not failed else None,
    )


def _has_threshold(version: VersionRef) -> bool:
    return version.trust is not None and version.trust.at is not None


def latency_ms(exchange: Exchange) -> float | None:
    """Milliseconds that the engine took; None where it gave no answer."""
    if exchange.sent is None or exchange.last is None:
        return None
    return 1000 * (exchange.last - exchange.sent)


@dataclass(slots=True)
class _Trial:
    """A canary as this gateway sees it, which is ahead of what is written."""

    canary: Canary
    state: CanaryState
    finding: CanaryFinding | None
    firsts: Firsts
    written: tuple[CanaryState, CanaryFinding | None]
    unwritten: bytearray = field(default_factory=bytearray)
    failing: bool = False


class _Latencies(NamedTuple):
    label: str
    milliseconds: deque[float]


class Splits:
    """Draws who is in a canary, counts what happens, and takes it back. Lives in the gateway's event loop."""

    def __init__(self, engines: Engines, books: Books, metrics: Metrics) -> None:
        """Go on with the canaries that are in the books.

        Raises:
            StoreError: what is known of one cannot be read.
        """
        self._engines, self._books = engines, books
        self._folder = books.folder / "canary"
        self._trials: dict[str, _Trial] = {}
        self._drawn: dict[int, _Trial] = {}
        self._latencies: dict[str, _Latencies] = {}
        self._taken_back = asyncio.Event()
        self._requests = Counter(
            "goldgate_canary_requests", "Requests while a canary ran, by whose key it was.", ["name", "side"],
            registry=metrics.registry,
        )  # fmt: skip
        self._aborted = Counter(
            "goldgate_canary_aborted", "Canaries that were taken back.", ["name"], registry=metrics.registry
        )
        kept = set()
        try:
            for traffic in books.all_traffic():
                if traffic.canary is not None:
                    path = self._marks(traffic.canary.salt)
                    self._trial(traffic.name, traffic.canary).firsts.know(_read(path))
                    kept.add(path)
            for path in set(self._folder.glob("*.keys")) - kept:
                path.unlink()
        except OSError as error:
            raise StoreError(
                f"Which keys a canary has counted cannot be read: {error.strerror}",
                where=str(error.filename or self._folder),
                fix="allow reading and writing there",
            ) from error

    # -- for each request ---------------------------------------------------------------------------------------

    def choose(self, traffic: Traffic, exchange: Exchange) -> VersionRef:
        """The version that answers. Asked a second time, since an engine could not be reached, it is the live one."""
        canary = traffic.canary
        if canary is None:
            return traffic.live
        trial = self._trial(traffic.name, canary)
        if trial.finding is not None or exchange.canary is not None:
            return traffic.live
        exchange.canary_key = key_of(exchange)
        exchange.canary = in_canary(exchange.canary_key, canary.salt, canary.spec.share)
        self._drawn[id(exchange)] = trial
        away = self._engines.endpoint(canary.version.engine) is None
        return canary.version if exchange.canary and not away else traffic.live

    def wants(self, exchange: Exchange) -> bool:
        """It needs no answer's bytes."""
        return False

    def ended(self, exchange: Exchange) -> None:
        """Count a request, and take the canary back if that shows it to be worse."""
        trial = self._drawn.pop(id(exchange), None)
        traffic = self._books.traffic(exchange.name)
        if traffic is None:
            return
        self._remember(traffic, exchange)
        if trial is None or trial.finding is not None:
            return
        on_trial = trial.canary.version
        sureness = _has_threshold(on_trial) and _has_threshold(traffic.live)
        request = as_request(exchange, on_trial.label, sureness=sureness)
        if request is None:
            return
        before, spec = trial.state, trial.canary.spec
        trial.state = after = count_request(before, request, spec.share, trial.firsts)
        self._requests.labels(traffic.name, "canary" if request.canary else "live").inc()
        counted = (before.errors, before.slow, before.unsure, before.canary_failed)
        if counted != (after.errors, after.slow, after.unsure, after.canary_failed) and is_worse(after, spec):
            self._take_back(traffic.name, trial)

    def _take_back(self, name: str, trial: _Trial) -> None:
        trial.finding = judge_canary(trial.state, trial.canary.spec)  # from here on it is not chosen any more
        self._aborted.labels(name).inc()
        self._taken_back.set()
        _log.warning("%s is taken back: %s", trial.canary.version.label, " ".join(trial.finding.reasons))

    def _remember(self, traffic: Traffic, exchange: Exchange) -> None:
        label = traffic.live.label
        took = latency_ms(exchange)
        if exchange.version != label or exchange.status != 200 or exchange.reason or took is None:
            return
        known = self._latencies.get(traffic.name)
        if known is None or known.label != label:
            known = self._latencies[traffic.name] = _Latencies(label, deque(maxlen=_REMEMBERED))
        known.milliseconds.append(took)

    # -- for `/admin` -------------------------------------------------------------------------------------------

    def slow_above_ms(self, name: str, spec: CanarySpec) -> float:
        """From where on an answer is slow: what the spec says, else the live version's 95th percentile.

        Raises:
            ConflictError: the live version has answered too few requests since this gateway was started. The trial
                waits for them: a limit out of a handful of answers would take a good version back, or no bad one.
        """
        if spec.slow_ms is not None:
            return spec.slow_ms
        try:
            return slow_limit(self._known(name))
        except SpecError as error:
            raise ConflictError(error.what, where=name, fix="wait for more requests, or set canary.slow_ms") from error

    async def status(self, traffic: Traffic) -> CanaryStatus:
        """How a canary stands, ahead of what is written."""
        answers = len(self._known(traffic.name))
        if traffic.canary is None:
            return CanaryStatus(live_answers=answers)
        trial = self._trial(traffic.name, traffic.canary)
        canary = traffic.canary.model_copy(update={"state": trial.state, "finding": trial.finding})
        finding = trial.finding or await asyncio.to_thread(judge_canary, canary.state, canary.spec)
        return CanaryStatus(canary=canary, finding=finding, live_answers=answers)

    def _known(self, name: str) -> list[float]:
        traffic, known = self._books.traffic(name), self._latencies.get(name)
        of_live = known is not None and traffic is not None and known.label == traffic.live.label
        return list(known.milliseconds) if known is not None and of_live else []

    # -- what is written ----------------------------------------------------------------------------------------

    @asynccontextmanager
    async def keeping(self) -> AsyncIterator[None]:
        """Write what happens, until the block ends."""
        ended = asyncio.Event()
        writing = asyncio.create_task(self._go_on_writing(ended))
        try:
            yield
        finally:
            # Not cancelled: the thread of a write under way would go on beside the last one, and could end after it.
            ended.set()
            self._taken_back.set()  # wakes it
            await writing
            await self._write()

    async def _go_on_writing(self, ended: asyncio.Event) -> None:
        while not ended.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._taken_back.wait(), _WRITE_SECONDS)
            self._taken_back.clear()
            await self._write()

    async def _write(self) -> None:
        for name, trial in list(self._trials.items()):
            traffic = self._books.traffic(name)
            over = traffic is None or traffic.canary is None or traffic.canary.salt != trial.canary.salt
            trial.unwritten += trial.firsts.take_new()
            if not over and (trial.state, trial.finding) == trial.written and not trial.unwritten:
                continue
            marks, state, finding = bytes(trial.unwritten), trial.state, trial.finding
            try:
                there = not over and await asyncio.to_thread(self._put_down, name, trial, marks, state, finding)
            except (GoldgateError, OSError) as error:
                if not trial.failing:
                    _log.error("what happens to the canary of %s cannot be written, it goes on: %s", name, error)
                trial.failing = True
                continue
            trial.failing = False
            if there:
                del trial.unwritten[: len(marks)]
                trial.written = (state, finding)
                continue
            with suppress(OSError):
                self._marks(trial.canary.salt).unlink(missing_ok=True)
            if self._trials.get(name) is trial:
                del self._trials[name]

    def _put_down(
        self, name: str, trial: _Trial, marks: bytes, state: CanaryState, finding: CanaryFinding | None
    ) -> bool:
        # Keys first: one that is known and was not counted makes the test blind for it, and never wrong.
        if marks:
            self._folder.mkdir(exist_ok=True)
            _append(self._marks(trial.canary.salt), marks)
        return self._books.note_canary(name, trial.canary.salt, state, finding)

    def _trial(self, name: str, canary: Canary) -> _Trial:
        trial = self._trials.get(name)
        if trial is None or trial.canary.salt != canary.salt:
            written = (canary.state, canary.finding)
            trial = self._trials[name] = _Trial(canary, canary.state, canary.finding, Firsts(), written)
        return trial

    def _marks(self, salt: str) -> Path:
        # A salt is the id of a change, which its maker has named: it must not become a path.
        return self._folder / f"{sha256(salt.encode()).hexdigest()[:32]}.keys"


def _append(path: Path, marks: bytes) -> None:
    with path.open("ab") as out:
        out.truncate(out.tell() - out.tell() % _MARK_BYTES)  # what a full disk has cut off
        out.write(marks)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
