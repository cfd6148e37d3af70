"""The gateway in front of a real vLLM: what clients of OpenAI's interface send and get."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from tasks.serving.host import EngineHost
from tests.serving.real_engine import real_engine
from tests.serving.records import version
from tests.serving.running import Running, gateway

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

SEVEN = version(7)
_SCHEMA = {"type": "object", "properties": {"product": {"enum": ["card", "loan"]}}, "required": ["product"]}
_TOOL = {"type": "function", "function": {"name": "file_it", "parameters": _SCHEMA}}


def server(folder: Path) -> psutil.Process:
    """The engine's process."""
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if "serve" in command and "complaints@7" in command and str(folder) in command:
            return process
    raise AssertionError("no vLLM serves this model")


def test_chats_completions_streams_tools_and_errors_pass_through(tmp_path: Path) -> None:
    from tests.tiny import small_model

    model = small_model(tmp_path / "model")
    parser = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
    with real_engine(tmp_path / "engines", SEVEN, model, parser) as host:
        asyncio.run(_scene(tmp_path, host, model))


async def _scene(tmp_path: Path, host: EngineHost, model: Path) -> None:
    async with gateway(tmp_path, host) as running:  # type: ignore[arg-type]  # a real one in its place
        running.live(SEVEN)
        await _good(running)
        await _bad(running)
        await _killed(running, model)


async def _good(running: Running) -> None:
    chat = await running.ask("a charge", structured_outputs={"choice": ["card", "loan"]}, logprobs=True, top_logprobs=2)
    assert chat.status == 200, chat.data
    assert chat.headers["x-goldgate-version"] == chat.json["model"] == "complaints@7"
    assert chat.text in ("card", "loan")
    assert chat.json["choices"][0]["logprobs"]["content"][0]["top_logprobs"]

    stream = await running.ask(
        "a charge", stream=True, max_tokens=5, temperature=0,
        stream_options={"include_usage": True},
    )  # fmt: skip
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert stream.events[-1] == "[DONE]"
    assert {event["model"] for event in stream.events[:-1]} == {"complaints@7"}
    assert stream.events[-2]["usage"]["completion_tokens"] <= 5
    whole = await running.ask("a charge", max_tokens=5, temperature=0)
    assert whole.text == stream.streamed

    plain = await running.send("POST", "/v1/completions", {"model": "complaints", "prompt": "a", "max_tokens": 3})
    assert (plain.status, plain.json["usage"]["completion_tokens"] <= 3) == (200, True)

    form = {"type": "json_schema", "json_schema": {"name": "filed", "schema": _SCHEMA}}
    held = await running.ask("a charge", response_format=form, max_tokens=40, temperature=0)
    assert json.loads(held.text)["product"] in ("card", "loan")

    choice = {"type": "function", "function": {"name": "file_it"}}
    for wanted in ("none", "auto", choice):
        fields = {"tools": [_TOOL], "tool_choice": wanted, "max_tokens": 40, "temperature": 0}
        called = await running.ask("a charge", **fields)
        assert called.status == 200, called.data
        assert _said(called.json) == _said(await _directly(running, "a charge", fields))


async def _directly(running: Running, text: str, fields: dict[str, Any]) -> Any:
    """The engine's answer without the gateway."""
    endpoint = running.host.endpoint(SEVEN.engine)
    assert endpoint is not None
    body = {"model": endpoint.label, "messages": [{"role": "user", "content": text}], **fields}
    headers = {"Authorization": f"Bearer {endpoint.key}"}
    async with running.client.post(f"{endpoint.url}/chat/completions", json=body, headers=headers) as answer:
        return await answer.json()


def _said(record: Any) -> tuple[Any, ...]:
    """What an answer says, without the ids that are new in each."""
    (choice,) = record["choices"]
    calls = [call["function"] for call in choice["message"].get("tool_calls") or []]
    return choice["message"]["content"], calls, choice["finish_reason"], record["usage"]["completion_tokens"]


async def _bad(running: Running) -> None:
    for fields in ({"max_tokens": 10_000_000}, {"messages": []}, {"messages": "x"}, {"temperature": -1}):
        answer = await running.ask(**fields)
        assert (fields, answer.status) == (fields, 400)
        assert answer.error["message"]
        assert answer.headers["x-goldgate-version"] == "complaints@7"


async def _killed(running: Running, model: Path) -> None:
    def asked() -> Any:
        return running.ask("a story", stream=True, max_tokens=400, min_tokens=400)

    streams = [asyncio.create_task(asked()) for _ in range(4)]
    while running.gateway.public.count(SEVEN.engine) < 4:
        await asyncio.sleep(0.01)
    await asyncio.sleep(2.0)
    os.killpg(server(model).pid, signal.SIGKILL)
    for answer in await asyncio.gather(*streams):
        if answer.status == 200:  # it had begun
            assert answer.events[-1]["error"]["code"] == "engine_failed"
        else:
            assert (answer.status, answer.error["code"]) == (502, "engine_failed")
    after = await running.ask()
    assert (after.status, after.error["code"]) in ((502, "engine_failed"), (503, "engine_not_ready"))
    assert "complaints@7" in after.error["message"]
