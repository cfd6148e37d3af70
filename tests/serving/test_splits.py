"""Who answers while a version is on trial, what is counted of it, and that it is taken back: over real sockets."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from tasks.contracts.serving import CanaryStatus, EngineState, Phase, Traffic, Trust, VersionRef
from tasks.contracts.spec import CanarySpec
from tasks.serving.books import Books, Change, ConflictError
from tasks.serving.canary import Firsts, Request, in_canary
from tasks.serving.gateway.public import Exchange
from tasks.serving.gateway.splits import Splits, as_request, key_of
from tasks.serving.metrics import Metrics
from tests.serving.fake_engine import Behaviour, FakeCommand
from tests.serving.records import rollout, version
from tests.serving.running import Host, Running, engine, gateway

SEVEN, EIGHT = version(7), version(8)
CHANGE = Change("rollout-of-8", "flow-a")
SPEC = CanarySpec(share=0.5, slow_ms=1_000.0, min_requests=5, min_hours=0.0)
KEYS = [f"user {number}" for number in range(400)]
INSIDE = [key for key in KEYS if in_canary(key, CHANGE.id, SPEC.share)]
OUTSIDE = [key for key in KEYS if key not in INSIDE]
Scene = Callable[[Running, FakeCommand], Coroutine[Any, Any, None]]


def play(tmp_path: Path, scene: Scene, eight: Behaviour | None = None) -> None:
    """Play a scene in front of a gateway with complaints@7 live and complaints@8 checked."""

    async def run() -> None:
        host = Host()
        async with AsyncExitStack() as stack:
            fakes = await stack.enter_async_context(engine(host, SEVEN, tmp_path / "fakes"))
            await stack.enter_async_context(engine(host, EIGHT, tmp_path / "fakes", eight))
            running = await stack.enter_async_context(gateway(tmp_path, host))
            running.live(SEVEN)
            running.books.begin(rollout(EIGHT, Phase.CHECKED, was=SEVEN), 60.0)
            await scene(running, fakes)

    asyncio.run(run())


async def begin(running: Running, spec: CanarySpec = SPEC, revision: int = 1) -> Any:
    body = {"change": CHANGE._asdict(), "spec": spec.model_dump(mode="json"), "from_revision": revision}
    return await running.admin("PUT", "/canary/complaints", body)


async def status(running: Running) -> CanaryStatus:
    return CanaryStatus.model_validate_json((await running.admin("GET", "/canary/complaints")).data)


async def who(running: Running, **fields: Any) -> str:
    answer = await running.ask("hello", **fields)
    assert answer.status == 200, answer.data
    return str(answer.headers["x-goldgate-version"])


# -- what a request says ----------------------------------------------------------------------------------------------


def exchange(**fields: Any) -> Exchange:
    known: dict[str, Any] = {
        "version": "complaints@7", "canary": False, "canary_key": "ann", "status": 200, "sent": 10.0, "last": 10.25,
    }  # fmt: skip
    return Exchange("id", 0.0, "/v1/chat/completions", fields.pop("headers", []), **(known | fields))


ON_TRIAL = {"canary": True, "version": "complaints@8"}


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        (exchange(), Request("ann", False, False, 250.0, None)),
        (exchange(**ON_TRIAL), Request("ann", True, False, 250.0, None)),
        (exchange(**ON_TRIAL, flagged=True, confidence=0.4), Request("ann", True, False, 250.0, True)),
        (exchange(**ON_TRIAL, flagged=False, confidence=0.9), Request("ann", True, False, 250.0, False)),
        # it was to be one of the choices, and is not
        (exchange(**ON_TRIAL, flagged=True), Request("ann", True, True, None, None)),
        (exchange(**ON_TRIAL, status=502, reason="engine_failed"), Request("ann", True, True, None, None)),
        (exchange(**ON_TRIAL, status=504, reason="answer_timeout"), Request("ann", True, True, None, None)),
        (exchange(**ON_TRIAL, reason="engine_failed"), Request("ann", True, True, None, None)),  # a stream, cut off
        (exchange(canary=True), Request("ann", True, True, None, None)),  # the live version stood in
        (exchange(status=503, reason="engine_not_ready", version=""), Request("ann", False, True, None, None)),
        (exchange(status=499, reason="client_gone"), None),
        (exchange(status=503, reason="shutting_down"), None),
        (exchange(status=400), None),
        (exchange(status=0), None),
    ],
)
def test_what_a_request_says_of_its_version(what: Exchange, expected: Request | None) -> None:
    assert as_request(what, "complaints@8", sureness=True) == expected
    alone = expected and expected._replace(unsure=None)
    assert as_request(what, "complaints@8", sureness=False) == alone  # nothing to compare with


@pytest.mark.parametrize(
    ("body", "headers", "expected"),
    [
        ({"user": "ann", "safety_identifier": "ben"}, [(b"x-goldgate-key", b"carl")], "ann"),
        ({"safety_identifier": "ben"}, [(b"x-goldgate-key", b"carl")], "ben"),
        ({"user": 5}, [(b"x-goldgate-key", b"carl")], "carl"),
        ({"user": ""}, [], "id"),
        ({}, [(b"x-goldgate-key", b"")], "id"),
    ],
)
def test_whose_request_it_is(body: dict[str, Any], headers: list[tuple[bytes, bytes]], expected: str) -> None:
    assert key_of(exchange(body=body, headers=headers)) == expected


# -- who answers ------------------------------------------------------------------------------------------------------


def test_a_share_of_the_keys_gets_the_version_on_trial_and_always_the_same(tmp_path: Path) -> None:
    async def scene(running: Running, _: FakeCommand) -> None:
        assert await who(running, user=INSIDE[0]) == "complaints@7"  # before it begins
        begun = await begin(running)
        assert (begun.status, begun.json["canary"]["version"]["version"]) == (200, "8")
        for _again in range(2):
            assert {await who(running, user=key) for key in INSIDE[:10]} == {"complaints@8"}
            assert {await who(running, user=key) for key in OUTSIDE[:10]} == {"complaints@7"}
        headers = {"x-goldgate-key": INSIDE[0]}
        assert await who(running, headers=headers) == "complaints@8"
        assert await who(running, safety_identifier=INSIDE[0]) == "complaints@8"
        # who insists on a version gets that, and is in no canary
        assert await who(running, model="complaints@7", user=INSIDE[0]) == "complaints@7"
        assert await who(running, model="complaints@8", user=OUTSIDE[0]) == "complaints@8"
        now = await status(running)
        assert now.canary is not None
        assert (now.canary.state.canary_requests, now.canary.state.live_requests) == (22, 20)
        assert now.finding is not None
        assert not now.finding.abort
        text = (await running.send("GET", "/metrics")).data.decode()
        assert 'goldgate_canary_requests_total{name="complaints",side="canary"} 22.0' in text
        assert 'goldgate_canary_requests_total{name="complaints",side="live"} 20.0' in text

    play(tmp_path, scene)


def test_a_version_that_fails_is_taken_back_with_the_evidence_and_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.serving.gateway.splits._WRITE_SECONDS", 3600.0)  # that it ends is written at once

    async def scene(running: Running, _: FakeCommand) -> None:
        await begin(running)
        failed = 0
        for key in INSIDE:
            answer = await running.ask("hello", user=key)
            if answer.status == 200:
                break
            assert (answer.status, answer.error["code"]) == (502, "engine_failed")
            failed += 1
            await running.ask("hello", user=OUTSIDE[failed])
        assert 5 <= failed <= 20  # as soon as chance is ruled out
        assert {await who(running, user=key) for key in INSIDE[:20]} == {"complaints@7"}
        now = await status(running)
        assert now.canary is not None
        assert now.canary.finding is not None
        assert now.canary.finding.abort
        (reason,) = now.canary.finding.reasons
        assert reason.startswith("With the canary requests fail at least ")
        assert f"{failed} of the {failed} keys that it happened to are the canary's" in reason
        until = time.monotonic() + 60.0
        while True:
            path = tmp_path / "serving" / "traffic" / "complaints.json"
            kept = Traffic.model_validate_json(path.read_bytes())  # not Books: it clears half-written files away
            assert kept.canary is not None
            if kept.canary.finding is not None:
                break
            assert time.monotonic() < until
            await asyncio.sleep(0.01)
        assert kept.canary.finding == now.canary.finding
        assert kept.revision == 2
        assert (
            'goldgate_canary_aborted_total{name="complaints"} 1.0'
            in (await running.send("GET", "/metrics")).data.decode()
        )

    play(tmp_path, scene, Behaviour(status=500))


def test_where_its_engine_is_away_callers_notice_nothing_and_it_counts_as_failed(tmp_path: Path) -> None:
    async def scene(running: Running, _: FakeCommand) -> None:
        await begin(running)
        running.host.add(EIGHT, "http://127.0.0.1:9/v1")  # nothing listens there
        assert await who(running, user=INSIDE[0]) == "complaints@7"
        assert running.host.suspected == [EIGHT.engine]
        running.host.add(EIGHT, "", EngineState.FAILED)  # and now the host knows
        assert await who(running, user=INSIDE[1]) == "complaints@7"
        now = await status(running)
        assert now.canary is not None
        state = now.canary.state
        assert (state.canary_requests, state.canary_failed, state.live_requests) == (2, 2, 0)

    play(tmp_path, scene)


def test_a_slow_version_is_taken_back(tmp_path: Path) -> None:
    async def scene(running: Running, _: FakeCommand) -> None:
        await begin(running, SPEC.model_copy(update={"slow_ms": 40.0}))
        for key in INSIDE:
            if await who(running, user=key) == "complaints@7":
                break
        now = await status(running)
        assert now.finding is not None
        assert "With the canary answers are slower than 40 ms at least" in now.finding.reasons[0]
        assert {one.quality: one.exceeded for one in now.finding.qualities} == {
            "errors": False, "slow": True, "unsure": False,
        }  # fmt: skip

    play(tmp_path, scene, Behaviour(delay=0.06))


@pytest.mark.parametrize(("live", "on_trial", "taken_back"), [(0.5, 0.5, True), (None, 0.5, False), (0.5, None, False)])
def test_a_version_that_is_less_sure_is_taken_back_if_both_have_a_threshold(
    tmp_path: Path, live: float | None, on_trial: float | None, taken_back: bool
) -> None:
    seven, eight = trusted(SEVEN, live), trusted(EIGHT, on_trial)

    async def run() -> None:
        host = Host()
        folder = tmp_path / "fakes"
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(engine(host, seven, folder, Behaviour(logprob=-0.01)))
            await stack.enter_async_context(engine(host, eight, folder, Behaviour(logprob=-2.0)))
            running = await stack.enter_async_context(gateway(tmp_path, host, fill_in=True))
            running.live(seven)
            running.books.begin(rollout(eight, Phase.CHECKED, was=seven), 60.0)
            await begin(running)
            answers = [await running.ask("hello", user=key) for key in INSIDE[:20]]
            assert {answer.text for answer in answers} == {"card"}
            now = await status(running)
            assert now.canary is not None
            assert (now.canary.finding is not None) is taken_back
            assert (answers[-1].headers["x-goldgate-version"] == "complaints@7") is taken_back
            if now.canary.finding is not None:
                assert now.canary.finding.reasons[0].startswith(
                    "With the canary answers are below their threshold of confidence at least "
                )

    asyncio.run(run())


def trusted(one: VersionRef, at: float | None) -> VersionRef:
    """The version, whose answers are trusted from there on; None for one that was promoted without a threshold."""
    trust = Trust(at=at, target_accuracy=0.9, reviewed=0.1, why="-") if at is not None else None
    return one.model_copy(update={"trust": trust})


def test_requests_of_one_key_count_once(tmp_path: Path) -> None:
    async def scene(running: Running, _: FakeCommand) -> None:
        await begin(running)
        for _again in range(15):
            await running.ask("hello", user=INSIDE[0])
        now = await status(running)
        assert now.canary is not None
        (counts,) = now.canary.state.errors
        assert (counts.canary, counts.live, now.canary.state.canary_failed) == (1, 0, 15)
        assert now.canary.finding is None

    play(tmp_path, scene, Behaviour(status=500))


# -- its begin and its end --------------------------------------------------------------------------------------------


def test_without_a_limit_it_begins_when_the_live_version_says_what_is_slow(tmp_path: Path) -> None:
    spec = SPEC.model_copy(update={"slow_ms": None})

    async def scene(running: Running, _: FakeCommand) -> None:
        for _again in range(99):
            await running.ask("hello")
        early = await begin(running, spec)
        assert (early.status, early.error["code"]) == (409, "conflict")
        assert "99 requests are too few to say what is slow" in early.error["message"]
        assert (await status(running)).live_answers == 99
        await running.ask("hello", "complaints@8")  # says nothing of the live version
        assert (await status(running)).live_answers == 99
        await running.ask("hello")
        begun = await begin(running, spec)
        assert begun.status == 200
        assert 0.1 < begun.json["canary"]["state"]["slow_above_ms"] < 5_000

    async def restarted() -> None:
        host = Host()
        host.add(EIGHT, "http://127.0.0.1:9/v1")
        async with gateway(tmp_path, host) as running:
            assert (await status(running)).live_answers == 0
            again = await begin(running, spec)  # its answer was lost: it is begun once
            assert (again.status, again.json["revision"]) == (200, 2)

    play(tmp_path, scene)
    asyncio.run(restarted())


def test_it_ends_for_whoever_holds_its_rollout(tmp_path: Path) -> None:
    async def scene(running: Running, _: FakeCommand) -> None:
        assert (await status(running)) == CanaryStatus()
        assert (await running.admin("GET", "/canary/prices")).status == 404
        await begin(running)
        stranger = {"change": {"id": CHANGE.id, "holder": "flow-b"}}
        refused = await running.admin("DELETE", "/canary/complaints", stranger)
        assert (refused.status, "held by flow-a" in refused.error["message"]) == (409, True)
        ended = await running.admin("DELETE", "/canary/complaints", {"change": CHANGE._asdict()})
        assert (ended.status, ended.json["canary"], ended.json["revision"]) == (200, None, 3)
        assert await who(running, user=INSIDE[0]) == "complaints@7"
        assert (await status(running)).canary is None

    play(tmp_path, scene)


def test_a_gateway_that_starts_again_goes_on_and_counts_no_key_twice(tmp_path: Path) -> None:
    async def first(running: Running, _: FakeCommand) -> None:
        await begin(running)
        for key in INSIDE[:4]:
            await running.ask("hello", user=key)
        await running.ask("hello", user=OUTSIDE[0])

    async def second() -> None:
        host = Host()
        async with (
            engine(host, SEVEN, tmp_path / "fakes"),
            engine(host, EIGHT, tmp_path / "fakes", Behaviour(status=500)),
            gateway(tmp_path, host) as running,
        ):
            now = await status(running)
            assert now.canary is not None
            assert (now.canary.state.canary_requests, now.canary.state.live_requests) == (4, 1)
            for key in INSIDE[:4]:
                await running.ask("hello", user=key)
            await running.ask("hello", user=INSIDE[4])
            now = await status(running)
            assert now.canary is not None
            (counts,) = now.canary.state.errors
            assert (counts.canary, now.canary.state.canary_failed) == (5, 9)

    play(tmp_path, first, Behaviour(status=500))
    asyncio.run(second())


def test_one_that_was_taken_back_stays_so_after_a_restart(tmp_path: Path) -> None:
    async def first(running: Running, _: FakeCommand) -> None:
        await begin(running)
        for key in INSIDE[:30]:
            await running.ask("hello", user=key)

    async def second() -> None:
        host = Host()
        async with (
            engine(host, SEVEN, tmp_path / "fakes"),
            engine(host, EIGHT, tmp_path / "fakes"),
            gateway(tmp_path, host) as running,
        ):
            assert {await who(running, user=key) for key in INSIDE[:10]} == {"complaints@7"}
            now = await status(running)
            assert now.canary is not None
            assert now.canary.finding is not None

    play(tmp_path, first, Behaviour(status=500))
    asyncio.run(second())


def test_a_write_under_way_at_the_end_does_not_come_after_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    going, go, put_down = threading.Event(), threading.Event(), Splits._put_down
    calls = itertools.count()

    def slowly(self: Splits, *what: Any) -> bool:
        if next(calls) == 0:
            going.set()
            go.wait(0.5)  # a disk that takes its time; a second write beside this one would be done first
            return put_down(self, *what)
        there = put_down(self, *what)
        go.set()
        return there

    async def scene(running: Running, _: FakeCommand) -> None:
        await begin(running)
        monkeypatch.setattr(Splits, "_put_down", slowly)
        await who(running, user=OUTSIDE[0])
        while not going.is_set():
            await asyncio.sleep(0.01)
        await who(running, user=OUTSIDE[1])

    play(tmp_path, scene)
    kept = Books(tmp_path / "serving").traffic("complaints")
    assert kept is not None
    assert kept.canary is not None
    assert kept.canary.state.live_requests == 2


def test_a_full_disk_takes_nothing_from_the_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(running: Running, _: FakeCommand) -> None:
        await begin(running)

        def full(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("tasks.serving.books.write_durably", full)
            for key in INSIDE[:30]:
                await running.ask("hello", user=key)
            assert await who(running, user=INSIDE[0]) == "complaints@7"
            await asyncio.sleep(0.1)
            assert running.books.traffic("complaints").canary.finding is None  # type: ignore[union-attr]
        until = time.monotonic() + 60.0
        while running.books.traffic("complaints").canary.finding is None:  # type: ignore[union-attr]
            assert time.monotonic() < until
            await asyncio.sleep(0.05)

    play(tmp_path, scene, Behaviour(status=500))


def test_what_is_known_of_keys_outlives_a_restart_and_a_torn_end() -> None:
    firsts = Firsts()
    assert [firsts.is_first("errors", key) for key in ("ann", "ben", "ann")] == [True, True, False]
    assert firsts.is_first("slow", "ann")
    marks = firsts.take_new()
    assert (len(marks), firsts.take_new()) == (27, b"")
    again = Firsts()
    again.know(marks + b"\x01torn")
    assert [again.is_first("errors", key) for key in ("ann", "ben", "carl")] == [False, False, True]
    assert not again.is_first("slow", "ann")
    assert again.is_first("slow", "ben")


def test_a_marks_file_that_was_cut_off_is_mended_when_it_grows(tmp_path: Path) -> None:
    from tasks.serving.gateway.splits import _append, _read

    path = tmp_path / "x.keys"
    assert _read(path) == b""
    path.write_bytes(b"a" * 9 + b"torn")
    _append(path, b"b" * 18)
    assert _read(path) == b"a" * 9 + b"b" * 18


def test_records_of_trials_that_are_over_are_cleared_away(tmp_path: Path) -> None:
    (tmp_path / "serving" / "canary").mkdir(parents=True)
    old = tmp_path / "serving" / "canary" / "old.keys"
    old.write_bytes(b"x" * 9)
    Splits(Host(), Books(tmp_path / "serving"), Metrics())
    assert not old.exists()


def test_a_limit_of_the_spec_needs_no_answers(tmp_path: Path) -> None:
    splits = Splits(Host(), Books(tmp_path), Metrics())
    assert splits.slow_above_ms("complaints", SPEC) == 1_000.0
    with pytest.raises(ConflictError, match="0 requests are too few") as refused:
        splits.slow_above_ms("complaints", CanarySpec())
    assert refused.value.fix == "wait for more requests, or set canary.slow_ms"


def test_a_body_that_is_no_canary_is_refused(tmp_path: Path) -> None:
    async def scene(running: Running, _: FakeCommand) -> None:
        answer = await running.admin("PUT", "/canary/complaints", json.dumps({"spec": {}}).encode())
        assert (answer.status, "change: Field required" in answer.error["message"]) == (400, True)

    play(tmp_path, scene)
