"""The gateway over real sockets: who answers, what passes through, and what callers see when something is wrong."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.contracts.serving import EngineState, GatewaySpec, LimitSpec, LogSpec
from tasks.contracts.spec import ExecutionSpec
from tasks.serving.gateway import server
from tasks.serving.gateway.server import listen
from tasks.serving.keys import add_key
from tests.serving.fake_engine import Behaviour, FakeCommand
from tests.serving.records import version
from tests.serving.running import ADMIN_KEY, ENGINE_KEY, Host, Running, engine, gateway, listening

SEVEN, EIGHT = version(7), version(8)
Scene = Callable[[Running, FakeCommand], Coroutine[Any, Any, None]]


def play(tmp_path: Path, scene: Scene, behaviour: Behaviour | None = None, **options: Any) -> None:
    """Play a scene in front of a gateway with complaints@7 live."""

    async def run() -> None:
        host = Host()
        async with (
            engine(host, SEVEN, tmp_path / "fakes", behaviour) as fakes,
            gateway(tmp_path, host, **options) as running,
        ):
            running.live(SEVEN)
            await scene(running, fakes)

    asyncio.run(run())


# -- what passes through --------------------------------------------------------------------------------------------


def test_a_name_means_the_live_version_and_the_answer_says_which(tmp_path: Path) -> None:
    async def scene(running: Running, fakes: FakeCommand) -> None:
        for model in ("complaints", "complaints@7"):
            answer = await running.ask("hello", model)
            assert (answer.status, answer.text) == (200, "complaints@7: hello")
            assert answer.headers["x-goldgate-version"] == answer.json["model"] == "complaints@7"

    play(tmp_path, scene)


def test_the_request_reaches_the_engine_as_it_was_but_for_its_model(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}
    fields = {
        "tools": [tool], "tool_choice": "auto", "structured_outputs": {"choice": ["card", "loan"]}, "temperature": 0,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
        "seed": 2**53 + 1, "logprobs": True, "extra": [None, 1.5, {"ü": "\u2028😀"}],
    }  # fmt: skip

    async def scene(running: Running, fakes: FakeCommand) -> None:
        answer = await running.ask("Grüße", **fields)
        assert answer.text == "card"
        (asked,) = fakes.requests("complaints@7")
        assert asked == {
            "model": "complaints@7", "messages": [{"role": "user", "content": "Grüße"}], **fields
        }  # fmt: skip

    play(tmp_path, scene)


@pytest.mark.parametrize("model", ["complaints", "complaints@7"])
def test_who_names_no_temperature_gets_the_decoding_that_was_evaluated(tmp_path: Path, model: str) -> None:
    async def scene(running: Running, fakes: FakeCommand) -> None:
        await running.ask("hello", model)
        await running.ask("hello", model, temperature=0.7)
        assert [asked["temperature"] for asked in fakes.requests("complaints@7")] == [0, 0.7]

    play(tmp_path, scene)


def test_what_a_request_leaves_open_is_said_as_the_model_was_evaluated(tmp_path: Path) -> None:
    async def scene(running: Running, fakes: FakeCommand) -> None:
        answer = await running.ask("I lost it")
        (asked,) = fakes.requests("complaints@7")
        assert asked == {
            "model": "complaints@7",
            "messages": [
                {"role": "system", "content": "Which product is it about?"}, {"role": "user", "content": "I lost it"}
            ],
            "temperature": 0, "max_tokens": 8, "structured_outputs": {"choice": ["card", "loan"]},
        }  # fmt: skip
        assert answer.text == "card"

    play(tmp_path, scene, fill_in=True)


def test_tool_calls_come_back_whole(tmp_path: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": '{"a": 1}'}}

    async def scene(running: Running, fakes: FakeCommand) -> None:
        whole = await running.ask("where is it")
        assert whole.json["choices"][0]["message"]["tool_calls"] == [call]
        streamed = await running.ask("where is it", stream=True)
        deltas = [event["choices"][0]["delta"] for event in streamed.events[:-1]]
        assert [one["tool_calls"] for one in deltas if "tool_calls" in one] == [[call]]

    play(tmp_path, scene, Behaviour(answers={"where is it": {"content": None, "tool_calls": [call]}}))


def test_a_stream_passes_through_as_it_comes(tmp_path: Path) -> None:
    async def scene(running: Running, fakes: FakeCommand) -> None:
        body = {"model": "complaints", "messages": [{"role": "user", "content": "q"}], "stream": True}
        async with running.client.post(f"{running.url}/v1/chat/completions", json=body) as answer:
            assert answer.content_type == "text/event-stream"
            assert answer.headers["x-goldgate-version"] == "complaints@7"
            pieces = b""
            while b'"one"' not in pieces:  # it is here, and the engine will not say more for a minute
                pieces += await answer.content.readany()
            assert pieces.endswith(b"\n\n")
        fakes.behave("complaints@7", Behaviour(answers={"q": "one two"}))
        said = await running.ask("q", stream=True, stream_options={"include_usage": True})
        assert said.events[-1] == "[DONE]"
        assert said.events[-2]["usage"]["completion_tokens"] == 2

    play(tmp_path, scene, Behaviour(answers={"q": "one two"}, token_delay=60.0))


def test_plain_completions_pass_through(tmp_path: Path) -> None:
    async def scene(running: Running, fakes: FakeCommand) -> None:
        answer = await running.send("POST", "/v1/completions", {"model": "complaints", "prompt": "tell"})
        assert answer.json["choices"][0]["text"] == "complaints@7: tell"

    play(tmp_path, scene)


def test_what_an_engine_refuses_is_passed_on_in_its_own_words(tmp_path: Path) -> None:
    async def scene(running: Running, fakes: FakeCommand) -> None:
        answer = await running.ask()
        assert (answer.status, answer.error["message"]) == (422, "the fake engine fails as it was told")

    play(tmp_path, scene, Behaviour(status=422))


def test_of_the_clients_headers_an_engine_sees_only_what_it_should(tmp_path: Path) -> None:
    seen: list[dict[str, str]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append({name.decode(): value.decode() for name, value in scope["headers"]})
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"set-cookie", b"a=b"), (b"server", b"x")]}
        )
        await send({"type": "http.response.body", "body": b"{}"})

    async def run() -> None:
        host = Host()
        async with listening(app) as port, gateway(tmp_path, host) as running:
            host.add(SEVEN, f"http://127.0.0.1:{port}/v1")
            running.live(SEVEN)
            answer = await running.ask(headers={
                "Authorization": "Bearer of-the-client", "Cookie": "c=1", "X-Forwarded-For": "1.2.3.4",
                "X-Request-Id": "mine-1", "Accept-Encoding": "gzip", "traceparent": f"00-{'a' * 32}-{'b' * 16}-01",
            })  # fmt: skip
            assert answer.headers["x-request-id"] == "mine-1"
            assert "set-cookie" not in answer.headers
            assert "server" not in answer.headers
            await running.ask(headers={"X-Request-Id": "no good\tone"})

    asyncio.run(run())
    first, second = seen
    assert first["authorization"] == f"Bearer {ENGINE_KEY}"
    assert first["x-request-id"] == "mine-1"
    assert first["traceparent"].startswith("00-a")
    assert set(first) & {"cookie", "x-forwarded-for", "accept-encoding"} == set()
    assert first["host"].startswith("127.0.0.1:")
    assert len(second["x-request-id"]) == 32  # one of ours


# -- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["complains", "complaints@9", "complaints@", "@7", "", "../admin", "x" * 5000])
def test_an_unknown_name_gets_the_names_that_there_are(tmp_path: Path, model: str) -> None:
    async def scene(running: Running, fakes: FakeCommand) -> None:
        answer = await running.ask(model=model)
        assert answer.status == 404
        assert (answer.error["code"], answer.error["type"], answer.error["param"]) == (
            "model_not_found", "invalid_request_error", "model",
        )  # fmt: skip
        assert answer.error["message"].endswith("does not exist. There is: complaints, complaints@7.")
        assert len(answer.error["message"]) < 300

    play(tmp_path, scene)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "The request is not JSON"),
        (b"[]", "must be a JSON object"),
        (b"{}", "`model` must name a model"),
        (b'{"model": 7}', "`model` must name a model"),
        (b"\xff", "The request is not JSON"),
    ],
)
def test_a_request_that_is_none_is_refused_in_words(tmp_path: Path, body: bytes, says: str) -> None:
    async def scene(running: Running, fakes: FakeCommand) -> None:
        answer = await running.send("POST", "/v1/chat/completions", body)
        assert answer.status == 400
        assert says in answer.error["message"]

    play(tmp_path, scene)


def test_other_paths_and_models_in_openais_shape(tmp_path: Path) -> None:
    async def scene(running: Running, fakes: FakeCommand) -> None:
        models = (await running.send("GET", "/v1/models")).json
        assert [(one["id"], one.get("root")) for one in models["data"]] == [
            ("complaints", "complaints@7"), ("complaints@7", None),
        ]  # fmt: skip
        assert (await running.send("GET", "/v1/models/complaints@7")).json["id"] == "complaints@7"
        assert (await running.send("GET", "/v1/models/none")).error["code"] == "model_not_found"
        for method, path, status in (
            ("POST", "/v1/embeddings", 404), ("GET", "/v1/chat/completions", 404), ("POST", "/tokenize", 404),
            ("POST", "/invocations", 404), ("POST", "/health", 405),
        ):  # fmt: skip
            answer = await running.send(method, path)
            assert (path, answer.status) == (path, status)
            assert path in answer.error["message"]

    play(tmp_path, scene)


def test_a_version_that_runs_beside_can_be_named_until_it_drains(tmp_path: Path) -> None:
    async def scene(running: Running, fakes: FakeCommand) -> None:
        async with engine(running.host, EIGHT, tmp_path / "fakes"):
            assert (await running.ask(model="complaints@8")).text == "complaints@8: hello"
            assert (await running.admin("DELETE", f"/engines/{EIGHT.engine}?drain_seconds=3")).json[
                "state"
            ] == "draining"
            assert (await running.ask(model="complaints@8")).status == 404
            assert running.host.stopped == [(EIGHT.engine, 3.0, 0)]

    play(tmp_path, scene)


# -- keys -----------------------------------------------------------------------------------------------------------


def test_keys_let_in_and_keep_out(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    key = add_key(keys, "shop")

    async def scene(running: Running, fakes: FakeCommand) -> None:
        def given(key: str) -> dict[str, str]:
            return {"Authorization": f"Bearer {key}"}

        for headers, says in (
            ({}, "This gateway needs a key"),
            ({"Authorization": f"Basic {key}"}, "This gateway needs a key"),
            (given("gg-wrong"), "This key is not valid"),
            (given(key[:-1] + "_"), "This key is not valid"),
            (given(ENGINE_KEY), "This key is not valid"),
        ):
            answer = await running.ask(headers=headers)
            assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
            assert says in answer.error["message"]
        assert fakes.requests("complaints@7") == []
        assert (await running.ask(headers=given(key))).status == 200
        assert (await running.ask(headers=given(ADMIN_KEY))).status == 200
        for path, status in (("/v1/models", 401), ("/metrics", 401), ("/health", 200), ("/ready", 200)):
            assert (path, (await running.send("GET", path)).status) == (path, status)
        assert (await running.send("GET", "/metrics", key=key)).status == 200
        assert (await running.send("GET", "/admin/traffic", key=key)).status == 401

    play(tmp_path, scene, keys=keys)


def test_a_key_that_is_used_up_is_told_when_to_come_again(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    slow, other = add_key(keys, "slow", per_minute=2), add_key(keys, "other")

    async def scene(running: Running, fakes: FakeCommand) -> None:
        answers = [await running.ask(headers={"Authorization": f"Bearer {slow}"}) for _ in range(3)]
        assert [answer.status for answer in answers] == [200, 200, 429]
        assert answers[2].error["code"] == "rate_limit_exceeded"
        assert 1 <= int(answers[2].headers["retry-after"]) <= 31
        assert (await running.ask(headers={"Authorization": f"Bearer {other}"})).status == 200

    play(tmp_path, scene, keys=keys)


# -- sizes, times, numbers ------------------------------------------------------------------------------------------


def test_ten_megabytes_get_413_however_they_come(tmp_path: Path) -> None:
    async def in_pieces() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b"x" * 100_000

    async def scene(running: Running, fakes: FakeCommand) -> None:
        url = f"{running.url}/v1/chat/completions"
        for data, headers in (
            (b"x" * 10_000_000, {}),
            (in_pieces(), {}),
            (b"x" * 10_000_000, {"Expect": "100-continue"}),
        ):
            async with running.client.post(url, data=data, headers=headers) as answer:
                assert answer.status == 413
                assert (await answer.json())["error"]["code"] == "request_too_large"
                assert answer.headers["connection"] == "close"
        assert (await running.ask("x " * 450_000)).status == 200  # and no memory of it

    play(tmp_path, scene)


def test_answers_do_not_wait_for_late_acknowledgements() -> None:
    async def run() -> int:
        option: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            taken = writer.get_extra_info("socket")
            option.set_result(taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listener = listen(GatewaySpec(port=0))
        async with await asyncio.start_server(connected, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            writer.close()
            return await option

    assert asyncio.run(run()) == 1


async def _trickle(port: int, head: bytes, rest: bytes) -> bytes:
    """Send the head at once and the rest a byte at a time, and read until the gateway ends it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head)

    async def slowly() -> None:
        for byte in rest:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.05)

    sending = asyncio.create_task(slowly())
    answer = await reader.read()
    sending.cancel()
    writer.close()
    return answer


def test_a_client_that_sends_byte_by_byte_gets_408_wherever_it_does(tmp_path: Path) -> None:
    async def scene(running: Running, fakes: FakeCommand) -> None:
        line = b"POST /v1/chat/completions HTTP/1.1\r\n"
        head = line + b"host: x\r\ncontent-length: 1000\r\n\r\n"
        good = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
        slow = ((head, b'{"model": "complaints"' + b" " * 978), (b"", line), (b"", b""), (good, line))
        for answer in await asyncio.gather(*(_trickle(running.port, sent, rest) for sent, rest in slow)):
            assert answer.count(b"HTTP/1.1 408 Request Timeout") == 1
            assert b'"code":"request_timeout"' in answer
        assert fakes.requests("complaints@7") == []
        assert (await running.ask()).status == 200

    play(tmp_path, scene, limits=LimitSpec(receive_seconds=1.0))


def test_a_refused_body_that_trickles_in_ends_the_connection_without_a_second_answer(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    add_key(keys, "shop")

    async def scene(running: Running, fakes: FakeCommand) -> None:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n"
        answer = await _trickle(running.port, head, b" " * 1000)
        assert answer.startswith(b"HTTP/1.1 401 ")
        assert answer.count(b"HTTP/1.1 ") == 1

    play(tmp_path, scene, limits=LimitSpec(receive_seconds=0.3), keys=keys)


def test_those_who_find_no_room_get_429_and_the_others_their_turn(tmp_path: Path) -> None:
    async def scene(running: Running, fakes: FakeCommand) -> None:
        asking = [asyncio.create_task(running.ask(f"{n}")) for n in range(10)]
        while sum(one.done() for one in asking) < 5:
            await asyncio.sleep(0.01)
        (tmp_path / "go").touch()
        answers = await asyncio.gather(*asking)
        by_status = sorted(answer.status for answer in answers)
        assert by_status == [200] * 5 + [429] * 5
        for answer in answers:
            if answer.status == 429:
                assert answer.error["code"] == "queue_full"
                assert int(answer.headers["retry-after"]) >= 1
        assert len(fakes.requests("complaints@7")) == 5
        assert (await running.ask()).status == 200  # every place was given back

    waits = Behaviour(waits_for=str(tmp_path / "go"))
    play(tmp_path, scene, waits, limits=LimitSpec(max_under_way=2, max_waiting=3))


def test_who_waits_too_long_gets_429(tmp_path: Path) -> None:
    async def scene(running: Running, fakes: FakeCommand) -> None:
        first = asyncio.create_task(running.ask("first"))
        while not fakes.requests("complaints@7"):
            await asyncio.sleep(0.01)
        second = await running.ask("second")
        assert (second.status, second.error["code"]) == (429, "waited_too_long")
        (tmp_path / "go").touch()
        assert (await first).status == 200

    waits = Behaviour(waits_for=str(tmp_path / "go"))
    play(tmp_path, scene, waits, limits=LimitSpec(max_under_way=1, wait_seconds=0.1))


def test_a_thousand_at_once_are_all_answered(tmp_path: Path) -> None:
    async def scene(running: Running, fakes: FakeCommand) -> None:
        answers = await asyncio.gather(*(running.ask(f"{n}") for n in range(1000)))
        statuses = [answer.status for answer in answers]
        assert set(statuses) <= {200, 429}
        assert statuses.count(200) >= 64 + 128
        assert all("retry-after" in answer.headers for answer in answers if answer.status == 429)
        assert (running.gateway.public.active, running.gateway.public.count(SEVEN.engine)) == (0, 0)

    play(tmp_path, scene, Behaviour(delay=0.5))


# -- engines that fail ----------------------------------------------------------------------------------------------


def test_an_engine_that_is_too_slow_is_504_and_is_let_go(tmp_path: Path) -> None:
    async def scene(running: Running, fakes: FakeCommand) -> None:
        answer = await running.ask()
        assert (answer.status, answer.error["code"]) == (504, "answer_timeout")
        assert "complaints@7 has not answered within 1 seconds" in answer.error["message"]
        fakes.behave("complaints@7", Behaviour(token_delay=0.5))
        stream = await running.ask("one two three four five", stream=True)
        assert stream.status == 200
        assert stream.events[-1]["error"]["code"] == "answer_timeout"
        assert running.gateway.public.count(SEVEN.engine) == 0

    play(tmp_path, scene, Behaviour(delay=30.0), limits=LimitSpec(answer_seconds=1.0))


@pytest.mark.parametrize(
    ("behaviour", "says"),
    [
        (Behaviour(status=500), "it answered with HTTP 500: the fake engine fails as it was told"),
        (Behaviour(drop="before"), "its answer was cut off"),
    ],
)
def test_an_engine_that_fails_is_502_and_is_looked_at(tmp_path: Path, behaviour: Behaviour, says: str) -> None:
    async def scene(running: Running, fakes: FakeCommand) -> None:
        for stream in (False, True):
            answer = await running.ask(stream=stream)
            assert (answer.status, answer.error["code"]) == (502, "engine_failed")
            assert says in answer.error["message"]
            assert answer.headers["x-goldgate-version"] == "complaints@7"
        assert len(fakes.requests("complaints@7")) == 2  # a request that was heard is not asked again
        while len(running.host.suspected) < 2:
            await asyncio.sleep(0.01)
        assert running.host.suspected == [SEVEN.engine] * 2

    play(tmp_path, scene, behaviour)


def test_a_stream_that_breaks_off_ends_with_an_error_event(tmp_path: Path) -> None:
    async def scene(running: Running, fakes: FakeCommand) -> None:
        answer = await running.ask("one two three", stream=True)
        assert answer.status == 200
        assert answer.streamed.startswith("complaints@7:")
        assert "[DONE]" not in answer.events
        assert answer.events[-1]["error"]["code"] == "engine_failed"

    play(tmp_path, scene, Behaviour(drop="during"))


def test_half_an_event_never_reaches_a_client(tmp_path: Path) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for piece in (b'data: {"choices": []}\n', b'\ndata: {"cho', b'ices": [1]}\n\ndata: {"x'):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            await asyncio.sleep(0.02)
        send.__self__.transport.abort()

    async def run() -> None:
        host = Host()
        async with listening(app) as port, gateway(tmp_path, host) as running:
            host.add(SEVEN, f"http://127.0.0.1:{port}/v1")
            running.live(SEVEN)
            answer = await running.ask(stream=True)
            *events, last = answer.events
            assert events == [{"choices": []}, {"choices": [1]}]
            assert last["error"]["code"] == "engine_failed"

    asyncio.run(run())


def test_no_engine_ready_is_503(tmp_path: Path) -> None:
    async def scene(running: Running, fakes: FakeCommand) -> None:
        for state in (EngineState.STARTING, EngineState.FAILED):
            running.host.add(SEVEN, "", state)
            answer = await running.ask()
            assert (answer.status, answer.error["code"]) == (503, "engine_not_ready")
            assert f"The engine of complaints@7 is {state.value}" in answer.error["message"]
            assert "retry-after" in answer.headers
        ready = await running.send("GET", "/ready")
        assert (ready.status, ready.json) == (503, {"ready": False, "names": {"complaints": False}, "why": None})
        assert (await running.send("GET", "/health")).status == 200

    play(tmp_path, scene)


def test_a_refused_connection_is_tried_once_more_at_the_engine_that_is_live_then(tmp_path: Path) -> None:
    async def scene(running: Running, fakes: FakeCommand) -> None:
        async with engine(running.host, EIGHT, tmp_path / "fakes"):
            running.host.add(SEVEN, "http://127.0.0.1:1/v1")  # nobody listens
            answer = await running.ask()
            assert (answer.status, answer.error["code"]) == (502, "engine_failed")
            assert "it cannot be reached" in answer.error["message"]
            assert running.host.suspected == [SEVEN.engine] * 2
            running.host.on_suspect = lambda _: running.live(EIGHT, SEVEN)
            answer = await running.ask()
            assert (answer.status, answer.text) == (200, "complaints@8: hello")
            assert answer.headers["x-goldgate-version"] == answer.json["model"] == "complaints@8"

    play(tmp_path, scene)


def test_a_client_that_leaves_frees_its_engine(tmp_path: Path) -> None:
    async def scene(running: Running, fakes: FakeCommand) -> None:
        for stream in (False, True):
            asking = asyncio.create_task(running.ask("one two", stream=stream))
            while running.gateway.public.count(SEVEN.engine) == 0:
                await asyncio.sleep(0.01)
            asking.cancel()
            while running.gateway.public.active:
                await asyncio.sleep(0.01)
            assert running.gateway.public.count(SEVEN.engine) == 0
        text = (await running.send("GET", "/metrics")).data.decode()
        assert 'goldgate_requests_total{name="complaints",status="499",version="complaints@7"} 2.0' in text

    play(tmp_path, scene, Behaviour(delay=60.0))


# -- swaps ----------------------------------------------------------------------------------------------------------


def test_a_swap_under_fifty_clients_fails_none_and_mixes_nothing(tmp_path: Path) -> None:
    asked, moved = 0, 0

    async def scene(running: Running, fakes: FakeCommand) -> None:
        nonlocal asked, moved
        ended = asyncio.Event()
        seen: set[str] = set()

        async def client(number: int) -> None:
            nonlocal asked
            while not ended.is_set():
                answer = await running.ask("one two three", stream=number % 2 == 0)
                asked += 1
                assert answer.status == 200
                label = answer.headers["x-goldgate-version"]
                seen.add(label)
                if number % 2:
                    assert answer.json["model"] == label
                    assert answer.text == f"{label}: one two three"
                else:
                    assert {event["model"] for event in answer.events[:-1]} == {label}
                    assert answer.events[-1] == "[DONE]"
                    assert answer.streamed == f"{label}: one two three"

        async def swaps() -> None:
            nonlocal moved
            for live, previous in ((EIGHT, SEVEN), (SEVEN, EIGHT), (EIGHT, SEVEN)):
                before = asked
                while asked < before + 100:
                    await asyncio.sleep(0.01)
                running.live(live, previous)
                moved += 1
            ended.set()

        async with engine(running.host, EIGHT, tmp_path / "fakes"), asyncio.TaskGroup() as group:
            for number in range(50):
                group.create_task(client(number))
            group.create_task(swaps())
        assert seen == {"complaints@7", "complaints@8"}

    play(tmp_path, scene, Behaviour(token_delay=0.01))
    assert moved == 3
    assert asked > 300


def test_a_request_ends_at_the_engine_where_it_began(tmp_path: Path) -> None:
    async def scene(running: Running, fakes: FakeCommand) -> None:
        async with engine(running.host, EIGHT, tmp_path / "fakes"):
            asking = asyncio.create_task(running.ask("one two three", stream=True))
            while not fakes.requests("complaints@7"):
                await asyncio.sleep(0.01)
            running.live(EIGHT, SEVEN)
            assert (await running.ask()).text == "complaints@8: hello"
            status = await running.admin("GET", f"/engines/{SEVEN.engine}")
            assert status.json["under_way"] == 1  # what draining waits for
            (tmp_path / "go").touch()
            answer = await asking
            assert answer.streamed == "complaints@7: one two three"
            assert (await running.admin("GET", f"/engines/{SEVEN.engine}")).json["under_way"] == 0

    play(tmp_path, scene, Behaviour(waits_for=str(tmp_path / "go")))


def test_requests_that_wait_go_to_the_engine_that_is_live_when_their_turn_comes(tmp_path: Path) -> None:
    async def scene(running: Running, fakes: FakeCommand) -> None:
        async with engine(running.host, EIGHT, tmp_path / "fakes"):
            first = asyncio.create_task(running.ask("first"))
            while not fakes.requests("complaints@7"):
                await asyncio.sleep(0.01)
            second = asyncio.create_task(running.ask("second"))
            while running.gateway.public.waiting() != {"complaints": 1}:
                await asyncio.sleep(0.01)
            running.live(EIGHT, SEVEN)
            (tmp_path / "go").touch()
            assert (await first).text == "complaints@7: first"
            assert (await second).text == "complaints@8: second"

    play(tmp_path, scene, Behaviour(waits_for=str(tmp_path / "go")), limits=LimitSpec(max_under_way=1))


# -- ending ---------------------------------------------------------------------------------------------------------


def test_draining_takes_nothing_new_and_cuts_nothing(tmp_path: Path) -> None:
    async def scene(running: Running, fakes: FakeCommand) -> None:
        asking = asyncio.create_task(running.ask("one two three", stream=True))
        while not fakes.requests("complaints@7"):
            await asyncio.sleep(0.01)
        draining = asyncio.create_task(running.gateway.drain())
        await asyncio.sleep(0)
        refused = await running.ask()
        assert (refused.status, refused.error["code"]) == (503, "shutting_down")
        assert (await running.send("GET", "/ready")).status == 503
        assert (await running.send("GET", "/health")).status == 200
        (tmp_path / "go").touch()
        answer = await asking
        assert (answer.streamed, answer.events[-1]) == ("complaints@7: one two three", "[DONE]")
        await draining

    play(tmp_path, scene, Behaviour(waits_for=str(tmp_path / "go"), token_delay=0.1), shutdown_seconds=60.0)


def test_what_is_not_done_in_time_is_cut_and_told(tmp_path: Path) -> None:
    async def scene(running: Running, fakes: FakeCommand) -> None:
        body = {"model": "complaints", "messages": [{"role": "user", "content": "one two"}], "stream": True}
        async with running.client.post(f"{running.url}/v1/chat/completions", json=body) as stream:  # it has begun
            fakes.behave("complaints@7", Behaviour(delay=60.0))
            whole = asyncio.create_task(running.ask())
            while running.gateway.public.count(SEVEN.engine) < 2:
                await asyncio.sleep(0.01)
            await running.gateway.drain()
            refused = await whole
            assert (refused.status, refused.error["code"]) == (503, "shutting_down")
            last = (await stream.text()).strip().split("\n\n")[-1]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"

    play(tmp_path, scene, Behaviour(token_delay=60.0), shutdown_seconds=0.1)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[], list[str]]]:
    """Runs a gateway until it ends, and hands back what it has announced."""
    interval = sys.getswitchinterval()

    def run() -> list[str]:
        told: list[str] = []
        spec = GatewaySpec(
            port=0, execution=ExecutionSpec(store=str(tmp_path)), log=LogSpec(to="none", mask=False), review=None
        )  # fmt: skip
        server.run_gateway(spec, FakeCommand(tmp_path / "fakes"), mask=None, announce=told.append)
        return told

    yield run
    sys.setswitchinterval(interval)


def test_its_address_is_there_once_it_can_be_ended_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Callable[[], list[str]]
) -> None:
    write, before = server.write_durably, signal.getsignal(signal.SIGTERM)

    def ended_at_once(path: Path, text: str) -> None:
        write(path, text)
        assert signal.getsignal(signal.SIGTERM) != before  # else the signal would end it on the spot
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(server, "write_durably", ended_at_once)
    told = serve()
    assert told == [json.loads((tmp_path / "serving" / "gateway.json").read_text())["url"]]


def test_a_gateway_that_cannot_say_its_address_ends(
    monkeypatch: pytest.MonkeyPatch, serve: Callable[[], list[str]]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(server, "write_durably", full)
    with pytest.raises(OSError, match="No space left"):
        serve()


# -- what is counted ------------------------------------------------------------------------------------------------


def test_metrics_say_what_happened(tmp_path: Path) -> None:
    async def scene(running: Running, fakes: FakeCommand) -> None:
        await running.ask()
        await running.ask(stream=True)
        await running.ask(model="made-up-1")
        await running.ask(model="made-up-2")
        answer = await running.send("GET", "/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        lines = answer.data.decode().splitlines()
        for line in (
            'goldgate_requests_total{name="complaints",status="200",version="complaints@7"} 2.0',
            'goldgate_requests_total{name="unknown",status="404",version="none"} 2.0',
            'goldgate_rejected_total{reason="model_not_found"} 2.0',
            'goldgate_request_seconds_count{name="complaints"} 2.0',
            'goldgate_first_byte_seconds_count{name="complaints"} 2.0',
            'goldgate_added_seconds_count{name="complaints"} 2.0',
            'goldgate_wait_seconds_count{name="complaints"} 2.0',
            f'goldgate_engine_state{{engine="{SEVEN.engine}",state="ready",version="complaints@7"}} 1.0',
            f'goldgate_engine_state{{engine="{SEVEN.engine}",state="failed",version="complaints@7"}} 0.0',
            'goldgate_traffic_revision{name="complaints",version="complaints@7"} 1.0',
            f'goldgate_under_way{{engine="{SEVEN.engine}"}} 0.0',
            'goldgate_waiting{name="complaints"} 0.0',
        ):
            assert line in lines
        assert "made-up" not in answer.data.decode()

    play(tmp_path, scene)


def test_a_span_for_each_request_within_the_clients(tmp_path: Path) -> None:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from tasks.serving.gateway.tracing import Tracing

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))

    async def scene(running: Running, fakes: FakeCommand) -> None:
        await running.ask(headers={"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"})
        await running.ask(model="none")

    play(tmp_path, scene, tracing=Tracing(provider))
    good, bad = exporter.get_finished_spans()
    assert f"{good.context.trace_id:x}" == "a" * 32
    assert good.attributes["goldgate.version"] == "complaints@7"  # type: ignore[index]
    assert (bad.attributes["http.response.status_code"], bad.status.is_ok) == (404, False)  # type: ignore[index]


def test_a_collector_without_its_package_is_refused_at_the_start() -> None:
    from tasks.contracts.errors import ServiceError
    from tasks.serving.gateway.tracing import open_tracing

    assert open_tracing({}) is None
    with pytest.raises(ServiceError, match="not installed") as refused:
        open_tracing({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"})
    assert "pip install opentelemetry-exporter-otlp-proto-http" in refused.value.fix
