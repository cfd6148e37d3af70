"""Calls of tools through the gateway: what clients of OpenAI's interface send and get."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from tests.serving.fake_engine import Behaviour, FakeCommand, _FakeEngine
from tests.serving.records import version
from tests.serving.running import ENGINE_KEY, Host, engine, gateway, listening
from tests.serving.test_as_calls import CALLING, ONE, TOOLS, WORDS

ANSWERS: dict[str, str | dict[str, Any]] = {"refund order 7": ONE, "hello": WORDS}


def test_calls_come_as_calls_and_words_as_words(tmp_path: Path) -> None:
    asyncio.run(_scene(tmp_path))


async def _scene(tmp_path: Path) -> None:
    host = Host()
    async with (
        engine(host, CALLING, tmp_path / "fakes", Behaviour(answers=ANSWERS)) as fakes,
        gateway(tmp_path, host, fill_in=True) as running,
    ):
        running.live(CALLING)
        called = await running.ask("refund order 7", tools=TOOLS)
        assert (called.status, called.headers["x-goldgate-version"]) == (200, CALLING.label)
        (choice,) = called.json["choices"]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["tool_calls"][0]["function"] == {"name": "refund", "arguments": '{"order": 7}'}
        asked = fakes.requests(CALLING.label)[-1]
        assert (asked["tool_choice"], asked["skip_special_tokens"], asked["tools"]) == ("none", False, TOOLS)

        assert (await running.ask("hello", tools=TOOLS)).text == WORDS

        stream = await running.ask("refund order 7", tools=TOOLS, stream=True, stream_options={"include_usage": True})
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert stream.events[1]["choices"][0]["delta"]["tool_calls"][0]["function"]["name"] == "refund"
        assert stream.events[-2]["usage"]["completion_tokens"] > 0
        assert stream.events[-1] == "[DONE]"
        assert fakes.requests(CALLING.label)[-1]["stream"] is False

        bare = await running.ask("refund order 7")  # as it was evaluated: the version's own tools
        assert bare.json["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "refund"
        assert fakes.requests(CALLING.label)[-1]["tools"][0]["function"]["name"] == "refund"

        text = await running.ask("refund order 7", tools=TOOLS, tool_choice="none")
        assert text.text == ONE


def test_an_adapter_is_asked_for_by_its_own_name_and_answers_under_its_version(tmp_path: Path) -> None:
    asyncio.run(_adapter_scene(tmp_path))


async def _adapter_scene(tmp_path: Path) -> None:
    host, seven, name = Host(), version(7), "complaints@7-77777777"
    fakes = FakeCommand(tmp_path / "fakes")
    async with listening(_FakeEngine(name, fakes.folder, ENGINE_KEY)) as port, gateway(tmp_path, host) as running:
        host.add(seven, f"http://127.0.0.1:{port}/v1")
        host.endpoints[seven.engine] = host.endpoints[seven.engine]._replace(model=name)
        running.live(seven)
        for model in ("complaints", "complaints@7"):
            answer = await running.ask("hello", model)
            assert (answer.status, answer.headers["x-goldgate-version"]) == (200, "complaints@7")
            assert answer.json["model"] == name
