"""Who may come in: a bounded number at a time for each name, a bounded number that waits, and a rate for each key."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

from tasks.contracts.serving import LimitSpec
from tasks.serving.gateway.refusal import Refusal


class Turnstile:
    """Lets `max_under_way` requests of one name through at a time; others wait in the order in which they came."""

    def __init__(self, limits: LimitSpec) -> None:
        self._limits = limits
        self._inside = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    async def enter(self) -> None:
        """Come in, or wait until somebody leaves.

        Raises:
            Refusal: too many wait already, or it took too long.
        """
        if self._inside < self._limits.max_under_way and not self._waiting:
            self._inside += 1
            return
        if len(self._waiting) >= self._limits.max_waiting:
            raise _too_many(
                f"{len(self._waiting)} requests wait already, which is the most that may.", "queue_full", 1.0
            )
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(mine)
        try:
            async with asyncio.timeout(self._limits.wait_seconds):
                await mine
        except TimeoutError:
            if self._was_let_in(mine):  # in the very moment
                return
            raise _too_many(
                f"Others were answered for {self._limits.wait_seconds:g} seconds.", "waited_too_long", 2.0
            ) from None
        except asyncio.CancelledError:
            if self._was_let_in(mine):
                self.leave()
            raise

    def leave(self) -> None:
        """Let the next one in."""
        while self._waiting:
            following = self._waiting.popleft()
            if not following.done():
                following.set_result(None)
                return
        self._inside -= 1

    def _was_let_in(self, mine: asyncio.Future[None]) -> bool:
        if mine.done() and not mine.cancelled():
            return True
        if mine in self._waiting:
            self._waiting.remove(mine)
        return False


def _too_many(why: str, reason: str, retry_after: float) -> Refusal:
    return Refusal(
        429,
        f"Too many requests at a time. {why} Try again later.",
        reason=reason,
        kind="rate_limit_error",
        retry_after=retry_after,
    )


class Rate:
    """Requests of one key in a minute: as many at once as in a minute, then evenly (a token bucket)."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute = per_minute
        self._left, self._clock, self._at = float(per_minute), clock, clock()

    def take(self) -> None:
        """Use up one request.

        Raises:
            Refusal: none is left; says when the next one is.
        """
        now = self._clock()
        self._left = min(float(self.per_minute), self._left + (now - self._at) * self.per_minute / 60.0)
        self._at = now
        if self._left < 1.0:
            seconds = (1.0 - self._left) * 60.0 / self.per_minute
            raise Refusal(
                429,
                f"This key's {self.per_minute} requests a minute are used up. Try again in {seconds:.0f} s.",
                reason="rate_limit_exceeded",
                kind="rate_limit_error",
                retry_after=seconds,
            )
        self._left -= 1.0
