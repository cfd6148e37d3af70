"""A canary: who is in it, and when it is taken back.

A key (a user, a session; a request's own id where there is none) belongs to the canary by a hash. Whether the canary is
worse is asked after every request, so the answer must hold however often one looks.

The test goes by what happened and whose it was. Take the keys that something bad has happened to. If it happens to the
canary's keys no more often than to others, each of them is the canary's with at most the canary's share w, whatever the
rate is, and however it changes over the day: an outage that hits both alike moves nothing. If it happens r times as
often, with

    P(canary | bad) = w r / (w r + 1 - w)

So each such key is a coin, and the canary is worse if the coin falls on it too often (the conditional test of two
rates: Przyborowski and Wilenski, Biometrika 31 (1940) 313-323; continuously monitored, as in vaccine safety: Kulldorff
et al., Sequential Analysis 30 (2011) 58-78). The likelihood ratio of r against the most that is allowed, averaged over
several r, is an e-value at every look: its expectation is at most 1, and by Ville's inequality it ever reaches
1 / alpha with probability at most alpha (a mixture sequential test: Robbins 1970; Johari et al., arXiv:1512.04922;
Ramdas et al., arXiv:2210.01948).

**A key counts once.** Requests of one key are all the canary's or all not. A client that sends rubbish a thousand times
would be a thousand errors of whichever side it fell to, and the coins would not be independent. Its first one is a
single coin, and that is all that the test takes (`Firsts`). Where the canary is better, the live version's keys are
used up sooner, and later coins fall on the canary more often; but never have more of its keys been counted than if both
were alike, and the e-value grows with these alone, so the promise stays.

A gateway calls this for every request, so it is plain arithmetic: `count_request` and `is_worse` take microseconds;
`judge_canary` searches intervals, takes milliseconds, and is for when there is something to say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import NamedTuple

from tasks.contracts.errors import SpecError
from tasks.contracts.observe import CanaryEvidence, CanaryFinding, CanarySpec, CanaryState, ShareCounts

_HASHES = 2**64
# The ratios that the e-value is averaged over, in multiples of what is allowed: hardly worse up to nothing but bad.
# Many cost little (the logarithm of how many they are); without small ones a small excess would never be found.
_MULTIPLES = (1.05, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0)
_QUALITIES = ("errors", "slow", "unsure")
_MARK_BYTES = 9  # the quality, and half of a hash
_RATIO_ENDS = (1e-4, 1e4)  # of a ratio that is searched
_BRAKE_REQUESTS = 20
_BRAKE_SHARE = 0.5


# -- who is in it -----------------------------------------------------------------------------------------------------


def in_canary(key: str, salt: str, share: float) -> bool:
    """Whether a key belongs to a canary of this share: the same answer everywhere, as long as the salt stays.

    Who is in at a share is in at every larger one. Another salt draws others, so give each canary its own (the id of
    its rollout), or the same people try out everything.

    Raises:
        SpecError: the share is none.
    """
    if not 0.0 <= share <= 1.0:
        raise SpecError(f"A share of {share} is none.", where="canary.share", fix="give a share from 0 to 1")
    # The lengths keep salt "a" with key "bc" apart from salt "ab" with key "c".
    digest = sha256(f"{len(salt)}:{salt}{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * _HASHES


class Firsts:
    """Which keys something has happened to already, so that it counts once for each.

    Attributes:
        full: whether as many keys are known as there is room for; from then on nothing counts any more, which makes the
            test blind and never wrong.
    """

    def __init__(self, room: int = 1_000_000) -> None:
        """Remember up to `room` keys for each quality (about 100 bytes a key)."""
        self._room = room
        self._seen: dict[str, set[int]] = {}
        self._new = bytearray()

    @property
    def full(self) -> bool:
        """See the class."""
        return any(len(keys) >= self._room for keys in self._seen.values())

    def is_first(self, quality: str, key: str) -> bool:
        """Whether this has not happened to the key before; asking takes note of it."""
        keys = self._seen.setdefault(quality, set())
        mark = int.from_bytes(sha256(key.encode()).digest()[:8], "big")
        if mark in keys or len(keys) >= self._room:
            return False
        keys.add(mark)
        self._new += bytes([_QUALITIES.index(quality)]) + mark.to_bytes(8, "big")
        return True

    def take_new(self) -> bytes:
        """What has come to be known since the last call, nine bytes a key; to be read by `know` after a restart."""
        new, self._new = bytes(self._new), bytearray()
        return new

    def know(self, marks: bytes) -> None:
        """Remember what `take_new` gave; what a kill has cut off at the end is left out."""
        for at in range(0, len(marks) - _MARK_BYTES + 1, _MARK_BYTES):
            quality = _QUALITIES[marks[at]]
            self._seen.setdefault(quality, set()).add(int.from_bytes(marks[at + 1 : at + _MARK_BYTES], "big"))


# -- what has happened ------------------------------------------------------------------------------------------------


class Request(NamedTuple):
    """One request while a canary runs.

    Attributes:
        key: of its user or session.
        canary: whether the key belongs to the canary. By assignment: a request that the canary failed and the live
            version then answered is the canary's.
        failed: whether it failed by no fault of the caller (a 5xx, a time-out, an answer that is none of the choices).
        milliseconds: how long it took; None of one that failed.
        unsure: whether the answer is below its version's own threshold; None where there is none.
    """

    key: str
    canary: bool
    failed: bool
    milliseconds: float | None
    unsure: bool | None


def slow_limit(milliseconds: Sequence[float]) -> float:
    """What counts as slow: the 95th percentile of the live version's latency, taken before the canary begins.

    Raises:
        SpecError: fewer than 100 requests, of which five would be the slow ones.
    """
    if len(milliseconds) < 100:
        raise SpecError(
            f"{len(milliseconds)} requests are too few to say what is slow for the live version (at least 100).",
            where="canary",
            fix="begin the canary when the live version has answered more, or give the limit",
        )
    ordered = sorted(milliseconds)
    return ordered[math.ceil(0.95 * len(ordered)) - 1]


def count_request(state: CanaryState, request: Request, share: float, firsts: Firsts) -> CanaryState:
    """The state with one request more.

    Args:
        state: so far.
        request: what happened.
        share: of the canary now.
        firsts: who has been counted; it takes note of this key.
    """
    happened = {
        "errors": request.failed,
        "slow": request.milliseconds is not None and request.milliseconds > state.slow_above_ms,
        "unsure": bool(request.unsure),
    }
    side = "canary" if request.canary else "live"
    changes: dict[str, object] = {f"{side}_requests": getattr(state, f"{side}_requests") + 1}
    if request.failed:
        changes[f"{side}_failed"] = getattr(state, f"{side}_failed") + 1
    for quality in _QUALITIES:
        if happened[quality] and firsts.is_first(quality, request.key):
            changes[quality] = _with_one_more(getattr(state, quality), request.canary, share)
    return state.model_copy(update=changes)


def _with_one_more(counts: tuple[ShareCounts, ...], canary: bool, share: float) -> tuple[ShareCounts, ...]:
    known = {one.share: one for one in counts}
    one = known.get(share) or ShareCounts(share=share)
    known[share] = ShareCounts(share=share, canary=one.canary + canary, live=one.live + (not canary))
    return tuple(known.values())


# -- whether it is worse ----------------------------------------------------------------------------------------------


def is_worse(state: CanaryState, spec: CanarySpec) -> bool:
    """Whether `judge_canary` would take it back: the same verdict without its intervals, in microseconds."""
    needed = math.log(len(_QUALITIES) / spec.alpha)
    allowed = (spec.max_error_ratio, spec.max_slow_ratio, spec.max_unsure_ratio)
    return _brakes(state) or any(
        log_e_value(getattr(state, quality), ratio) >= needed
        for quality, ratio in zip(_QUALITIES, allowed, strict=True)
    )


def _brakes(state: CanaryState) -> bool:
    return state.canary_requests >= _BRAKE_REQUESTS and state.canary_failed > _BRAKE_SHARE * state.canary_requests


def judge_canary(state: CanaryState, spec: CanarySpec) -> CanaryFinding:
    """Whether the canary is shown to be worse than allowed. May be asked after every request.

    Each of the three qualities is tested at a third of alpha. Beside the tests there is a brake: 20 requests of the
    canary or more, and more than half of them failed. It compares nothing and needs no evidence; without it a canary of
    few keys could fail for long, since a key counts once.
    """
    needed = len(_QUALITIES) / spec.alpha
    allowed = (spec.max_error_ratio, spec.max_slow_ratio, spec.max_unsure_ratio)
    qualities = tuple(
        _evidence(quality, getattr(state, quality), ratio, needed)
        for quality, ratio in zip(_QUALITIES, allowed, strict=True)
    )
    reasons = [_reason(one, state) for one in qualities if one.exceeded]
    if _brakes(state):
        reasons.append(
            f"{state.canary_failed:,} of the canary's {state.canary_requests:,} requests failed, more than half (the "
            f"live version: {state.live_failed:,} of {state.live_requests:,})."
        )
    return CanaryFinding(abort=bool(reasons), reasons=tuple(reasons), qualities=qualities)


def log_e_value(counts: Sequence[ShareCounts], allowed: float) -> float:
    """Logarithm of the e-value against "it happens to the canary's keys at most `allowed` times as often".

    The mean over several multiples m of the likelihood ratio of m x allowed against `allowed`, each share for itself.
    Under a ratio below the allowed one each factor's expectation is smaller still, so the whole null is covered.
    """
    logs = [_log_ratio(counts, multiple * allowed, allowed) for multiple in _MULTIPLES]
    top = max(logs)
    return top + math.log(sum(math.exp(value - top) for value in logs) / len(logs))


def _log_ratio(counts: Sequence[ShareCounts], ratio: float, against: float) -> float:
    total = 0.0
    for one in counts:
        rest = 1 - one.share
        total += one.canary * math.log(ratio / against)
        total += (one.canary + one.live) * math.log((one.share * against + rest) / (one.share * ratio + rest))
    return total


def _evidence(quality: str, counts: Sequence[ShareCounts], allowed: float, needed: float) -> CanaryEvidence:
    canary, live = sum(one.canary for one in counts), sum(one.live for one in counts)
    evidence = log_e_value(counts, allowed)
    threshold = math.log(needed)
    # Both bounds fall back on the test: a ratio is ruled out if its e-value, or that of the sides exchanged, is large.
    low = _crossing(lambda ratio: log_e_value(counts, ratio) - threshold)
    mirrored = [ShareCounts(share=1 - one.share, canary=one.live, live=one.canary) for one in counts]
    high = _crossing(lambda ratio: threshold - log_e_value(mirrored, 1 / ratio))
    return CanaryEvidence(
        quality=quality,
        canary=canary,
        live=live,
        expected=sum(one.share * (one.canary + one.live) for one in counts),
        ratio=_likeliest_ratio(counts) if canary and live else None,
        ratio_low=0.0 if low <= _RATIO_ENDS[0] else low,
        ratio_high=None if high >= _RATIO_ENDS[1] else high,
        allowed=allowed,
        evidence=math.exp(min(evidence, 700.0)),
        needed=needed,
        exceeded=evidence >= threshold,
    )


def _likeliest_ratio(counts: Sequence[ShareCounts]) -> float:
    """Where the canary's keys are as many as expected."""

    def excess(ratio: float) -> float:
        return sum(
            one.canary - (one.canary + one.live) * one.share * ratio / (one.share * ratio + 1 - one.share)
            for one in counts
        )

    return _crossing(excess)


def _crossing(falling: Callable[[float], float]) -> float:
    """Where a function of a ratio that falls goes through zero, by bisection of the logarithm; else an end."""
    low, high = (math.log(end) for end in _RATIO_ENDS)
    if falling(math.exp(low)) <= 0:
        return _RATIO_ENDS[0]
    if falling(math.exp(high)) > 0:
        return _RATIO_ENDS[1]
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if falling(math.exp(middle)) > 0 else (low, middle)
    return math.exp((low + high) / 2)


_WORDS = {
    "errors": "requests fail",
    "slow": "answers are slower than {slow:.0f} ms",
    "unsure": "answers are below their threshold of confidence",
}


def _reason(one: CanaryEvidence, state: CanaryState) -> str:
    words = _WORDS[one.quality].format(slow=state.slow_above_ms)
    return (
        f"With the canary {words} at least {one.ratio_low:.2f} times as often as with the live version "
        f"({one.allowed:g} allowed): {one.canary:,} of the {one.canary + one.live:,} keys that it happened to are the "
        f"canary's, {one.expected:.1f} expected (e-value {one.evidence:.3g}, {one.needed:g} needed)."
    )


# -- planning ---------------------------------------------------------------------------------------------------------


class Reach(NamedTuple):
    """What it takes to find a canary out.

    Attributes:
        keys: that it happened to, of both versions.
        requests: of both versions, one a key.
    """

    keys: int
    requests: int


def reach(ratio: float, rate: float, spec: CanarySpec, allowed: float = 1.0) -> Reach:
    """About how many requests find out a canary to which something happens `ratio` times as often.

    Each such key adds the Kullback-Leibler divergence between the coins of `ratio` and of `allowed` to the logarithm of
    the e-value, on average, from which the mixture takes log(number of ratios) at most; Wald's approximation.

    Args:
        ratio: that is to be found out.
        rate: how often it happens with the live version, a share of the requests.
        spec: share and alpha.
        allowed: what is allowed.

    Raises:
        SpecError: the ratio is allowed, or the rate is no share.
    """
    if ratio <= allowed or not 0 < rate * ratio <= 1:
        raise SpecError(
            f"A ratio of {ratio:g} at a rate of {rate:g} cannot be told from {allowed:g}.",
            where="canary",
            fix="give a ratio above the allowed one, and a rate that stays a share when multiplied by it",
        )
    share = spec.share
    worse, null = (share * value / (share * value + 1 - share) for value in (ratio, allowed))
    gain = worse * math.log(worse / null) + (1 - worse) * math.log((1 - worse) / (1 - null))
    keys = math.log(len(_QUALITIES) / spec.alpha * len(_MULTIPLES)) / gain
    return Reach(math.ceil(keys), math.ceil(keys / (rate * (share * ratio + 1 - share))))
