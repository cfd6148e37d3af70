"""Who is in a canary, and when it is taken back: by hand, and over simulated canaries, looked at all the time."""

from __future__ import annotations

import math
import random
import subprocess
import sys

import numpy as np
import pytest
from scipy.stats import binom

from tasks.contracts.errors import SpecError
from tasks.contracts.observe import CanarySpec, CanaryState, ShareCounts
from tasks.serving.canary import (
    Firsts,
    Request,
    count_request,
    in_canary,
    judge_canary,
    log_e_value,
    reach,
    slow_limit,
)

SPEC = CanarySpec(share=0.1)
START = CanaryState(slow_above_ms=500.0)

# -- who is in it -----------------------------------------------------------------------------------------------------


def test_who_is_in_stays_in_as_the_share_grows() -> None:
    keys = [f"user-{number}" for number in range(2_000)]
    before: set[str] = set()
    for share in (0.0, 0.01, 0.05, 0.2, 0.5, 1.0):
        inside = {key for key in keys if in_canary(key, "rollout-1", share)}
        assert before <= inside
        assert binom.ppf(0.0005, 2_000, share) <= len(inside) <= binom.ppf(0.9995, 2_000, share)
        before = inside
    assert len(before) == 2_000


def test_another_salt_draws_others() -> None:
    keys = [f"user-{number}" for number in range(5_000)]
    one, other = ({key for key in keys if in_canary(key, salt, 0.2)} for salt in ("rollout-1", "rollout-2"))
    both = len(one & other)
    assert binom.ppf(0.0005, 5_000, 0.04) <= both <= binom.ppf(0.9995, 5_000, 0.04)


def test_salt_and_key_do_not_run_into_each_other() -> None:
    shares = [number / 1000 for number in range(1001)]
    assert [in_canary("bc", "a", share) for share in shares] != [in_canary("c", "ab", share) for share in shares]


def test_it_is_the_same_in_another_process() -> None:
    code = "from tasks.serving.canary import in_canary; print([in_canary(str(n), 's', 0.5) for n in range(50)])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([in_canary(str(n), "s", 0.5) for n in range(50)])


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(SpecError, match="is none"):
        in_canary("user", "salt", share)


# -- counting ---------------------------------------------------------------------------------------------------------


def request(key: str, canary: bool, *, failed: bool = False, ms: float | None = 100.0, unsure: bool = False) -> Request:
    return Request(key, canary, failed, None if failed else ms, unsure)


def test_what_happens_to_a_key_counts_once_and_requests_count_all() -> None:
    state, firsts = START, Firsts()
    for one in (
        request("a", True, failed=True),
        request("a", True, failed=True),
        request("a", True, ms=500.1),  # another quality of the same key
        request("b", False, failed=True),
        request("c", False, ms=500.0),  # at the limit is not above it
        request("c", False, unsure=True),
        request("d", False),
    ):
        state = count_request(state, one, 0.1, firsts)
    assert state.errors == (ShareCounts(share=0.1, canary=1, live=1),)
    assert state.slow == (ShareCounts(share=0.1, canary=1),)
    assert state.unsure == (ShareCounts(share=0.1, live=1),)
    assert (state.canary_requests, state.canary_failed, state.live_requests, state.live_failed) == (3, 2, 4, 1)
    assert START.errors == ()


def test_each_share_is_counted_for_itself() -> None:
    state, firsts = START, Firsts()
    for number, share in enumerate((0.1, 0.1, 0.5, 0.1)):
        state = count_request(state, request(f"k{number}", number == 2, failed=True), share, firsts)
    assert state.errors == (ShareCounts(share=0.1, live=3), ShareCounts(share=0.5, canary=1))


def test_without_room_nothing_counts_any_more() -> None:
    firsts = Firsts(room=2)
    assert [firsts.is_first("errors", key) for key in ("a", "b", "a", "c")] == [True, True, False, False]
    assert firsts.full


def test_slow_is_above_the_95th_percentile() -> None:
    assert slow_limit([float(n) for n in range(1, 101)]) == 95.0
    with pytest.raises(SpecError, match="99 requests are too few"):
        slow_limit([1.0] * 99)


# -- the e-value ------------------------------------------------------------------------------------------------------


def counts(canary: int, live: int, share: float = 0.1) -> list[ShareCounts]:
    return [ShareCounts(share=share, canary=canary, live=live)]


def test_the_e_value_by_hand() -> None:
    # One key of the canary at a share of 0.1: the mean over m of m / (0.1 m + 0.9).
    multiples = (1.05, 1.1, 1.25, 1.5, 2, 3, 5, 10, 30, 100)
    expected = sum(m / (0.1 * m + 0.9) for m in multiples) / 10
    assert math.exp(log_e_value(counts(1, 0), 1.0)) == pytest.approx(expected, rel=1e-12)
    # One of the live version: the mean of 1 / (0.1 m + 0.9). Weighted by the shares they come to 1: a fair bet.
    other = sum(1 / (0.1 * m + 0.9) for m in multiples) / 10
    assert math.exp(log_e_value(counts(0, 1), 1.0)) == pytest.approx(other, rel=1e-12)
    assert 0.1 * expected + 0.9 * other == pytest.approx(1.0)
    assert log_e_value([], 1.0) == pytest.approx(0.0)


@pytest.mark.parametrize("allowed", [1.0, 1.25, 2.0])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0, 1.25, 2.0])
def test_what_is_allowed_never_makes_the_bet_better_than_fair(ratio: float, allowed: float) -> None:
    # The expectation after two keys at shares of 0.1 and 0.4, over all four outcomes.
    total = 0.0
    for first in (0, 1):
        for second in (0, 1):
            both = [
                ShareCounts(share=0.1, canary=first, live=1 - first),
                ShareCounts(share=0.4, canary=second, live=1 - second),
            ]
            probability = 1.0
            for one in both:
                coin = one.share * ratio / (one.share * ratio + 1 - one.share)
                probability *= coin if one.canary else 1 - coin
            total += probability * math.exp(log_e_value(both, allowed))
    if ratio <= allowed:
        assert total <= 1 + 1e-12
    else:
        assert total > 1
    if ratio == allowed:
        assert total == pytest.approx(1.0)


def test_three_errors_that_are_all_the_canarys_do() -> None:
    state = START.model_copy(update={"errors": tuple(counts(3, 0, 0.05)), "canary_requests": 40, "canary_failed": 3})
    finding = judge_canary(state, CanarySpec(share=0.05))
    assert finding.abort
    errors = finding.qualities[0]
    assert (errors.canary, errors.live, errors.ratio, errors.ratio_high) == (3, 0, None, None)
    assert errors.expected == pytest.approx(0.15)
    assert errors.evidence > errors.needed == 60
    assert finding.reasons[0].startswith("With the canary requests fail at least ")
    assert "3 of the 3 keys that it happened to are the canary's, 0.2 expected" in finding.reasons[0]
    two = START.model_copy(update={"errors": tuple(counts(2, 0, 0.05))})
    assert not judge_canary(two, CanarySpec(share=0.05)).abort


@pytest.mark.parametrize(("field", "words"), [("slow", "slower than 500 ms"), ("unsure", "threshold of confidence")])
def test_slow_and_unsure_answers_end_it_too(field: str, words: str) -> None:
    much = START.model_copy(update={field: tuple(counts(150, 350))})
    finding = judge_canary(much, SPEC)
    assert finding.abort
    assert len(finding.reasons) == 1
    assert words in finding.reasons[0]
    assert [one.exceeded for one in finding.qualities] == [q == field for q in ("errors", "slow", "unsure")]


def test_a_little_more_than_alike_is_allowed_where_it_is_said() -> None:
    # 1.2 times as often, and enough of them to be sure that it is more than once.
    share = 0.1 * 1.2 / (0.1 * 1.2 + 0.9)
    many = tuple(counts(round(60_000 * share), round(60_000 * (1 - share))))
    assert judge_canary(START.model_copy(update={"errors": many}), SPEC).abort
    assert not judge_canary(START.model_copy(update={"slow": many}), SPEC).abort
    kept = judge_canary(START.model_copy(update={"slow": many}), SPEC).qualities[1]
    assert kept.ratio == pytest.approx(1.2, abs=0.01)
    assert 1.1 < kept.ratio_low < 1.2
    assert kept.ratio_high is not None
    assert 1.2 < kept.ratio_high < 1.27


def test_nothing_seen_is_no_evidence() -> None:
    finding = judge_canary(START, SPEC)
    assert (finding.abort, finding.reasons) == (False, ())
    assert [one.evidence for one in finding.qualities] == pytest.approx([1.0, 1.0, 1.0])
    assert [(one.ratio, one.ratio_low, one.ratio_high) for one in finding.qualities] == [(None, 0.0, None)] * 3


def test_the_brake_needs_no_comparison() -> None:
    # One key, so one coin; but all of its requests fail.
    state, firsts = START, Firsts()
    for _ in range(19):
        state = count_request(state, request("only", True, failed=True), 0.1, firsts)
    assert not judge_canary(state, SPEC).abort
    state = count_request(state, request("only", True, failed=True), 0.1, firsts)
    finding = judge_canary(state, SPEC)
    assert finding.abort
    assert finding.reasons == ("20 of the canary's 20 requests failed, more than half (the live version: 0 of 0).",)
    half = START.model_copy(update={"canary_requests": 40, "canary_failed": 20})
    assert not judge_canary(half, SPEC).abort


# -- looked at all the time -------------------------------------------------------------------------------------------


def ever_exceeds(coins: list[int], share: float, allowed: float, needed: float) -> int | None:
    """After how many keys the e-value first reaches what is needed; asked after each of them."""
    canary = 0
    for number, coin in enumerate(coins, start=1):
        canary += coin
        if log_e_value(counts(canary, number - canary, share), allowed) >= math.log(needed):
            return number
    return None


@pytest.mark.parametrize(("share", "allowed"), [(0.05, 1.0), (0.3, 1.0), (0.1, 1.25)])
def test_a_canary_that_is_no_worse_is_taken_back_in_at_most_alpha(share: float, allowed: float) -> None:
    # One quality at alpha = 0.1, with a look after every key that something has happened to: nothing else moves it.
    generator = np.random.default_rng(1)
    coin = share * allowed / (share * allowed + 1 - share)
    taken_back = sum(
        ever_exceeds((generator.random(500) < coin).astype(int).tolist(), share, allowed, 10.0) is not None
        for _ in range(300)
    )
    assert taken_back <= binom.ppf(0.99, 300, 0.1)


def test_looking_at_an_ordinary_test_all_the_time_would_take_back_far_more() -> None:
    # Why it is no p-value: the exact binomial test at 0.1, looked at just as often.
    generator = np.random.default_rng(1)
    coins = (generator.random((300, 500)) < 0.3).cumsum(axis=1)
    p_values = binom.sf(coins - 1, np.arange(1, 501), 0.3)
    assert (p_values <= 0.1).any(axis=1).mean() > 0.3


def live_through(requests: int, ratio: float, rate: float, seed: int, spec: CanarySpec, keys: int) -> int | None:
    """A whole canary, asked after every request that something happened to; the request at which it was taken back."""
    draw = random.Random(seed)
    state, firsts = START, Firsts()
    for number in range(1, requests + 1):
        key = f"{seed}-{draw.randrange(keys)}"
        canary = in_canary(key, str(seed), spec.share)
        failed = draw.random() < rate * (ratio if canary else 1.0)
        before = state.errors
        state = count_request(state, request(key, canary, failed=failed), spec.share, firsts)
        if state.errors != before and judge_canary(state, spec).abort:
            return number
    return None


def test_twice_as_many_errors_are_found_within_the_stated_number() -> None:
    spec = CanarySpec(share=0.5)
    stated = reach(2.0, 0.05, spec)
    assert (stated.keys, stated.requests) == (113, 1_507)
    found = [live_through(2 * stated.requests, 2.0, 0.05, seed, spec, keys=10**9) for seed in range(20)]
    at = [number for number in found if number is not None]
    assert len(at) >= 17
    assert sum(number <= stated.requests for number in at) >= 6  # about half by then: it is a mean
    alike = [live_through(stated.requests, 1.0, 0.05, 1000 + seed, spec, keys=10**9) for seed in range(20)]
    assert sum(number is not None for number in alike) <= binom.ppf(0.999, 20, 0.05)


def test_an_outage_that_hits_both_alike_takes_nothing_back() -> None:
    # Errors go from none to nearly all and back; their share that is the canary's stays its share.
    draw = random.Random(3)
    taken_back = 0
    for trial in range(60):
        state, firsts = START, Firsts()
        for number in range(600):
            rate = 0.4 if 200 <= number < 400 else 0.01
            key = f"{trial}-{number}"
            canary = in_canary(key, "s", 0.3)
            state = count_request(state, request(key, canary, failed=draw.random() < rate), 0.3, firsts)
            if number % 20 == 19 and judge_canary(state, CanarySpec(share=0.3)).qualities[0].exceeded:
                taken_back += 1
                break
    assert taken_back <= binom.ppf(0.999, 60, 0.05)


def test_clients_that_always_fail_take_nothing_back_because_a_key_counts_once() -> None:
    # 200 keys, 8 of which send nothing but rubbish, and most of the traffic. The versions are alike. Were each request
    # a coin, the canary would be taken back by whose rubbish it happened to get.
    once = each = 0
    for trial in range(60):
        draw = random.Random(trial)
        state, firsts, naive = START, Firsts(), START
        for _ in range(800):
            number = draw.randrange(8) if draw.random() < 0.5 else draw.randrange(200)
            canary = in_canary(str(number), f"trial-{trial}", 0.2)
            failed = number < 8 or draw.random() < 0.01
            state = count_request(state, request(str(number), canary, failed=failed), 0.2, firsts)
            naive = count_request(naive, request(str(number), canary, failed=failed), 0.2, Firsts())
        errors, wronged = (judge_canary(one, CanarySpec(share=0.2)).qualities[0] for one in (state, naive))
        once += errors.exceeded
        each += wronged.exceeded
    assert once <= binom.ppf(0.999, 60, 0.05 / 3)
    assert each > 10


def test_a_better_canary_is_left_alone_though_its_keys_are_used_up_later() -> None:
    # Each key fails in the end; those of the live version sooner, so the last ones are nearly all the canary's.
    generator = np.random.default_rng(5)
    taken_back = 0
    for _ in range(100):
        canary = generator.random(400) < 0.3
        when = generator.exponential(np.where(canary, 3.0, 1.0))
        coins = canary[np.argsort(when)].astype(int).tolist()
        taken_back += ever_exceeds(coins, 0.3, 1.0, 10.0) is not None
    assert taken_back <= binom.ppf(0.999, 100, 0.1)


# -- planning ---------------------------------------------------------------------------------------------------------


def test_a_smaller_share_takes_longer() -> None:
    keys = [reach(2.0, 0.01, CanarySpec(share=share)).keys for share in (0.5, 0.2, 0.05)]
    assert keys == sorted(keys)
    assert reach(3.0, 0.01, SPEC).requests < reach(2.0, 0.01, SPEC).requests


@pytest.mark.parametrize(("ratio", "rate", "allowed"), [(1.0, 0.1, 1.0), (2.0, 0.6, 1.0), (1.2, 0.1, 1.25), (2, 0, 1)])
def test_what_cannot_be_found_out_is_refused(ratio: float, rate: float, allowed: float) -> None:
    with pytest.raises(SpecError, match="cannot be told from"):
        reach(ratio, rate, SPEC, allowed)


def test_a_state_can_be_written_down_and_judged_again() -> None:
    state = START.model_copy(update={"errors": tuple(counts(9, 20)), "canary_requests": 100, "canary_failed": 9})
    again = CanaryState.model_validate_json(state.model_dump_json())
    assert judge_canary(again, SPEC) == judge_canary(state, SPEC)
