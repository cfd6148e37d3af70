"""Ask a teacher many things: in order, several at a time, within the budget, and nothing twice."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from tasks.contracts.errors import GoldgateError, ServiceError
from tasks.contracts.synthesis import TeacherSpec
from tasks.data.synthesis.journal import Journal, Reply
from tasks.data.synthesis.purse import Cost, Purse
from tasks.data.synthesis.teacher import KEPT, Ask, Clock, NoReply, Request, Teacher
from tasks.store import digest_bytes

_ATTEMPTS = 4  # at a request whose failure is not the server's "busy"
_FIRST_WAIT = 1.0  # seconds; doubled for each further one
_LONGEST_WAIT = 60.0


class Failed(NamedTuple):
    """A request that brought nothing after all attempts."""

    reason: str


class Unasked(NamedTuple):
    """A request that was not made, since asking ended before."""

    reason: str


Answer = Reply | Failed | Unasked


class Traffic(NamedTuple):
    """What happened in this process: it depends on interruptions, so no artefact holds it.

    Attributes:
        paid: requests that this process paid for.
        reused: requests that an earlier one had paid for.
        repeated: attempts that had to be repeated.
    """

    paid: int
    reused: int
    repeated: int


class Asker:
    """A teacher, the journal of what it answered, and the purse that it is paid from.

    Requests are let through in their order, each only once its most fits into the budget beside all that came before.
    What is set aside is never less than what a request costs, so where asking stops does not depend on which answers
    came first, nor on whether they came from the journal.
    """

    def __init__(
        self, teacher: Teacher, journal: Journal, purse: Purse, spec: TeacherSpec, clock: Clock | None = None
    ) -> None:
        self._teacher = teacher
        self._journal = journal
        self._purse = purse
        self._spec = spec
        self._clock = clock or Clock()
        self._hold_until = 0.0  # while the server is busy, nobody asks
        self._failures = 0
        self._trouble: GoldgateError | None = None
        self._paid = self._reused = self._repeated = 0
        self.stopped: str | None = None
        purse.remember(journal.lost)

    @property
    def traffic(self) -> Traffic:
        """What happened in this process so far."""
        return Traffic(self._paid, self._reused, self._repeated)

    def most(self, ask: Ask) -> Cost:
        """The most that a question can cost."""
        return self._teacher.prepare(ask).most

    async def answers(self, asks: Sequence[Ask]) -> list[Answer]:
        """The answers, in the order of the questions; after the budget is spent, `Unasked`.

        Raises:
            ServiceError: the teacher refuses everything, or `teacher.max_failures` requests failed in a row. What is
                under way is waited for and kept.
            StoreError: the journal cannot be written.
        """
        found: list[Answer | None] = [None] * len(asks)
        flying: set[asyncio.Task[None]] = set()

        async def fly(place: int, request: Request) -> None:
            try:
                found[place] = await self._ask(request)
            except GoldgateError as error:
                self._trouble = self._trouble or error

        try:
            for place, ask in enumerate(asks):
                request = self._teacher.prepare(ask)
                while not self._ended and (
                    len(flying) >= self._spec.concurrency or not self._purse.set_aside(request.most)
                ):
                    if not flying:
                        self.stopped = self._purse.limit(request.most)
                        break
                    flying = await _first(flying)
                if self._ended:
                    break
                kept = self._from_journal(request)
                if kept is None:
                    flying.add(asyncio.create_task(fly(place, request)))
                else:
                    found[place] = kept
            while flying:
                flying = await _first(flying)
        finally:
            for task in flying:
                task.cancel()
            await asyncio.gather(*flying, return_exceptions=True)
        if self._trouble is not None:
            raise self._trouble
        return [Unasked(self.stopped or "") if answer is None else answer for answer in found]

    @property
    def _ended(self) -> bool:
        return self._trouble is not None or self.stopped is not None

    def _from_journal(self, request: Request) -> Reply | None:
        reply = self._journal.find(request.digest)
        if reply is not None:
            self._reused += 1
            self._pay(request, reply)
        return reply

    def _pay(self, request: Request, reply: Reply) -> None:
        self._purse.pay(request.most, Cost(1, reply.prompt_tokens, reply.completion_tokens), measured=reply.measured)

    async def _ask(self, request: Request) -> Answer:
        attempts, tries, waited = 0, 0, 0.0
        while True:
            await self._wait_for_turn()
            if self._trouble is not None:
                self._purse.give_back(request.most)
                return Unasked("the teacher failed")
            outcome = await self._teacher.attempt(request)
            if isinstance(outcome, Reply):
                self._journal.keep(request.digest, outcome)
                self._paid += 1
                self._failures = 0
                self._pay(request, outcome)
                return outcome
            if outcome.maybe_paid:
                self._journal.keep_loss(request.most)
                self._paid += 1
                self._purse.lose(request.most)
                if not self._purse.set_aside(request.most):
                    self.stopped = self.stopped or self._purse.limit(request.most)
                    return Unasked(self.stopped or "")
            pause = self._pause(request, outcome, tries)
            tries += 1
            if outcome.busy:
                waited += pause
                over = waited > self._spec.patience_seconds
            else:
                attempts += 1
                over = not outcome.again or attempts >= _ATTEMPTS
            if over:
                self._purse.give_back(request.most)
                self._count_failure(outcome)
                return Failed(outcome.reason)
            self._repeated += 1
            if outcome.busy:
                self._hold_until = max(self._hold_until, self._clock.now() + pause)
            else:
                await self._clock.sleep(pause)

    async def _wait_for_turn(self) -> None:
        while (left := self._hold_until - self._clock.now()) > 0:
            await self._clock.sleep(left)

    def _pause(self, request: Request, outcome: NoReply, tries: int) -> float:
        """Seconds to wait: at least what the server asks for, else doubled each time; both with jitter, so that
        requests that failed together do not come again together.
        """
        share = int(digest_bytes(f"{request.digest} {tries}".encode())[:8], 16) / 0xFFFFFFFF
        if outcome.wait:
            return outcome.wait * (1 + 0.1 * share)
        return min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** min(tries, 16)) * (0.5 + 0.5 * share)

    def _count_failure(self, outcome: NoReply) -> None:
        self._failures += 1
        if self._failures >= self._spec.max_failures and self._trouble is None:
            times = "a request" if self._failures == 1 else f"{self._failures:,} requests one after the other"
            self._trouble = ServiceError(
                f"The teacher failed {times}: {outcome.reason}", where=self._teacher.root, fix=f"{outcome.fix}; {KEPT}"
            )


async def _first(flying: set[asyncio.Task[None]]) -> set[asyncio.Task[None]]:
    """Wait until one has landed; return the others."""
    done, left = await asyncio.wait(flying, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()
    return left
