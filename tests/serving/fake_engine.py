"""A small OpenAI server in vLLM's place: `python -m tests.serving.fake_engine MODEL --port 1 --served-model-name NAME`.

How it behaves stands in a file that is read again for each request, so a test can change its mind while it runs:

    fakes = FakeCommand(tmp_path / "fakes")
    fakes.behave("complaints@7", Behaviour(answers={"My card was charged": "card"}))
    host = EngineHost(tmp_path / "serving", execution, fakes)
    ...
    fakes.behave("complaints@7", Behaviour(poisoned="empty"))     # from now on
    fakes.requests("complaints@7")                                # what it was asked: the bodies, in order
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from tasks.contracts.serving import EngineSpec

ROOT = Path(__file__).parents[2]
_FOLDER, _KEY = "FAKE_ENGINE_FOLDER", "VLLM_API_KEY"


class Behaviour(BaseModel):
    """What a fake engine does; read again for each request, but for what is said to be of its start.

    Attributes:
        answers: answer by the text of the last user message (or of the prompt of /v1/completions); others get the first
            of the request's choices (`structured_outputs`), else "<label>: <text>". An answer may also be a record
            that is merged into the message of the reply ({"content": null, "tool_calls": [...]}).
        logprob: log probability of each token of an answer; the rest of the probability is the token "other"'s.
        confidences: by text, another log probability for each token.
        delay: seconds before an answer begins.
        waits_for: a file that has to be there before an answer begins.
        token_delay: seconds between the tokens of a stream.
        status: HTTP status of every answer, if it is to fail; `/health` stays 200.
        fail_every: every so manieth question gets status 500.
        drop: the connection is closed: "before" any byte of the answer, or "during" a stream, after its first token.
        poisoned: `/health` is 200, but answers are "empty", have "nan" logprobs (which vLLM answers with 500), are
            "null", or are "html".
        healthy: False: every path but `/v1/models` answers 503, for ever.
        dies_after: it ends, with its last word in the log, instead of answering one question more.
        start_seconds: of its start: it does not listen before.
        start_exit: of its start: it ends with this exit status instead of listening.
        start_children: of its start: so many processes of its own, which do nothing.
        ignores_sigterm: of its start.
    """

    model_config = ConfigDict(extra="forbid")

    answers: dict[str, str | dict[str, Any]] = {}
    logprob: float = -0.05
    confidences: dict[str, float] = {}
    delay: float = 0.0
    waits_for: str | None = None
    token_delay: float = 0.0
    status: int | None = None
    fail_every: int | None = None
    drop: Literal["before", "during"] | None = None
    poisoned: Literal["empty", "nan", "null", "html"] | None = None
    healthy: bool = True
    dies_after: int | None = None
    start_seconds: float = 0.0
    start_exit: int | None = None
    start_children: int = 0
    ignores_sigterm: bool = False


class FakeCommand:
    """An `EngineCommand` for fake engines. Behaviours and what was asked lie in `folder`, a file for each label."""

    def __init__(self, folder: Path, default: Behaviour | None = None) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        if default is not None:
            self.behave("default", default)

    def behave(self, label: str, behaviour: Behaviour) -> None:
        """From now on the engine with this label does so; "default" is for those that have none of their own."""
        path = self.folder / f"{label}.json"
        part = path.with_suffix(".part")
        part.write_text(behaviour.model_dump_json())
        part.replace(path)

    def requests(self, label: str) -> list[dict[str, Any]]:
        """The bodies of the questions that the engine with this label was asked, in order, the host's probes too."""
        path = self.folder / f"{label}.requests"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def command(self, model: Path, label: str, port: int, spec: EngineSpec) -> list[str]:
        """See `EngineCommand.command`."""
        return [
            sys.executable, "-m", "tests.serving.fake_engine", str(model), "--port", str(port),
            "--served-model-name", label, *spec.arguments,
        ]  # fmt: skip

    def environment(self, key: str) -> dict[str, str]:
        """See `EngineCommand.environment`."""
        return {
            "PATH": os.environ.get("PATH", os.defpath),
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            _FOLDER: str(self.folder),
            _KEY: key,
        }

    def check_adapters(self) -> None:
        """See `EngineCommand.check_adapters`; fake engines load them as vLLM does, each by a behaviour of its own."""


# -- the server -----------------------------------------------------------------------------------------------------


def _tokens(text: str) -> list[str]:
    """Pieces of a text, each beginning with its white space."""
    pieces: list[str] = []
    for character in text:
        if not pieces or (character.isspace() and not pieces[-1].isspace()):
            pieces.append(character)
        else:
            pieces[-1] += character
    return pieces


class _FakeEngine:
    def __init__(self, label: str, folder: Path, key: str) -> None:
        self.label, self.folder, self.key = label, folder, key
        self.adapters: dict[str, str] = {}
        self.answered = 0
        self.under_way = 0

    @property
    def behaviour(self) -> Behaviour:
        return self.behaviour_of(self.label)

    def behaviour_of(self, model: str) -> Behaviour:
        for name in (model, "default"):
            with suppress(FileNotFoundError):
                return Behaviour.model_validate_json((self.folder / f"{name}.json").read_text())
        return Behaviour()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        self.under_way += 1
        try:
            await self._answer(scope, receive, send)
        finally:
            self.under_way -= 1

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        path, does = scope["path"], self.behaviour
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        if path == "/health":
            await _reply(send, 200 if does.healthy else 503, b"")
        elif path == "/metrics":
            await _reply(send, 200, f"vllm:num_requests_running {self.under_way}\n".encode(), "text/plain")
        elif not path.startswith("/v1/"):
            await _reply(send, 404, b'{"detail":"Not Found"}')
        elif dict(scope["headers"]).get(b"authorization") != f"Bearer {self.key}".encode():
            await _reply(send, 401, b'{"error":"Unauthorized"}')
        elif path == "/v1/models":
            names = [self.label, *self.adapters]
            models = {"object": "list", "data": [{"id": name, "object": "model", "owned_by": "vllm"} for name in names]}
            await _reply(send, 200, json.dumps(models).encode())
        elif path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
            await self._adapter(path.endswith("/unload_lora_adapter"), json.loads(body), send)
        elif path in ("/v1/chat/completions", "/v1/completions"):
            await self._question(path.endswith("chat/completions"), json.loads(body), receive, send)
        else:
            await _reply(send, 404, b'{"detail":"Not Found"}')

    async def _adapter(self, away: bool, asked: dict[str, Any], send: Any) -> None:
        name = asked["lora_name"]
        with (self.folder / f"{self.label}.adapters").open("a") as file:
            file.write(f"{'unload' if away else 'load'} {name}\n")
        if away and name not in self.adapters:
            await _error(send, 404, f"The lora adapter '{name}' cannot be found.", "NotFoundError")
        elif away:
            del self.adapters[name]
            await _reply(send, 200, b"Success", "text/plain")
        elif name in self.adapters:
            await _error(send, 400, f"The lora adapter '{name}' has already been loaded.", "InvalidUserInput")
        else:
            self.adapters[name] = asked["lora_path"]
            await _reply(send, 200, b"Success", "text/plain")

    async def _question(self, chat: bool, asked: dict[str, Any], receive: Any, send: Any) -> None:
        with (self.folder / f"{self.label}.requests").open("a") as file:
            file.write(json.dumps(asked) + "\n")
        self.answered += 1
        does = self.behaviour_of(str(asked.get("model")))
        if does.dies_after is not None and self.answered > does.dies_after:
            print("the fake engine dies as it was told", flush=True)
            os._exit(9)
        if asked.get("model") not in (self.label, *self.adapters):
            await _error(send, 404, f"The model `{asked.get('model')}` does not exist.", "NotFoundError")
            return
        await asyncio.sleep(does.delay)
        while does.waits_for is not None and not Path(does.waits_for).exists():
            await asyncio.sleep(0.01)
        if does.drop == "before":
            _drop(send)
            return
        failing = does.fail_every is not None and self.answered % does.fail_every == 0
        status = 503 if not does.healthy else 500 if failing or does.poisoned == "nan" else does.status
        if status is not None:
            await _error(send, status, "the fake engine fails as it was told", "InternalServerError")
            return
        if does.poisoned == "html":
            await _reply(send, 200, b"<html>what is this</html>", "text/html")
            return
        text = asked["messages"][-1]["content"] if chat else asked["prompt"]
        choices = (asked.get("structured_outputs") or {}).get("choice") or [f"{asked['model']}: {text}"]
        said = does.answers.get(text, choices[0])
        message: dict[str, Any] = {"role": "assistant", "content": said} if isinstance(said, str) else {
            "role": "assistant", **said
        }  # fmt: skip
        if does.poisoned in ("empty", "null"):
            message["content"] = "" if does.poisoned == "empty" else None
        longest = asked.get("max_tokens") or asked.get("max_completion_tokens")
        tokens = _tokens(message["content"] or "")[:longest]
        if message["content"]:
            message["content"] = "".join(tokens)
        logprob = does.confidences.get(text, does.logprob)
        if asked.get("stream"):
            await self._stream(chat, asked, message, tokens, logprob, does, send)
        else:
            whole = self._whole(chat, asked, message, tokens, logprob, text)
            await _reply(send, 200, json.dumps(whole).encode())

    def _head(self, kind: str, model: str) -> dict[str, Any]:
        name = f"{'chatcmpl' if kind.startswith('chat') else 'cmpl'}-{self.answered}"
        return {"id": name, "object": kind, "created": int(time.time()), "model": model}

    def _whole(
        self, chat: bool, asked: dict[str, Any], message: dict[str, Any], tokens: list[str], logprob: float, text: str
    ) -> dict[str, Any]:
        read = len(_tokens(text))
        usage = {"prompt_tokens": read, "completion_tokens": len(tokens), "total_tokens": read + len(tokens)}
        end = "tool_calls" if message.get("tool_calls") else "stop"
        if chat:
            logprobs = _chat_logprobs(tokens, logprob) if asked.get("logprobs") else None
            choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": end}
            return {**self._head("chat.completion", asked["model"]), "choices": [choice], "usage": usage}
        wanted = asked.get("logprobs") is not None
        logprobs = {"tokens": tokens, "token_logprobs": [logprob] * len(tokens)} if wanted else None
        choice = {"index": 0, "text": message["content"], "logprobs": logprobs, "finish_reason": end}
        return {**self._head("text_completion", asked["model"]), "choices": [choice], "usage": usage}

    async def _stream(
        self, chat: bool, asked: dict[str, Any], message: dict[str, Any], tokens: list[str], logprob: float,
        does: Behaviour, send: Any,
    ) -> None:  # fmt: skip
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        head = self._head("chat.completion.chunk" if chat else "text_completion", asked["model"])

        async def event(choice: dict[str, Any] | None, **more: Any) -> None:
            record = {**head, "choices": [] if choice is None else [{"index": 0, **choice}], **more}
            data = f"data: {json.dumps(record)}\n\n".encode()
            await send({"type": "http.response.body", "body": data, "more_body": True})

        if chat:
            await event({"delta": {"role": "assistant", "content": ""}, "finish_reason": None})
        if message.get("tool_calls"):
            await event({"delta": {"tool_calls": message["tool_calls"]}, "finish_reason": None})
        for place, token in enumerate(tokens):
            if place and does.drop == "during":
                _drop(send)
                return
            if place:
                await asyncio.sleep(does.token_delay)
            if chat:
                logprobs = _chat_logprobs([token], logprob) if asked.get("logprobs") else None
                await event({"delta": {"content": token}, "logprobs": logprobs, "finish_reason": None})
            else:
                await event({"text": token, "logprobs": None, "finish_reason": None})
        end = "tool_calls" if message.get("tool_calls") else "stop"
        await event({"delta": {}, "finish_reason": end} if chat else {"text": "", "finish_reason": end})
        if (asked.get("stream_options") or {}).get("include_usage"):
            read = 1
            usage = {"prompt_tokens": read, "completion_tokens": len(tokens), "total_tokens": read + len(tokens)}
            await event(None, usage=usage)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


def _drop(send: Any) -> None:
    send.__self__.transport.abort()  # uvicorn's; an exception would become an answer with status 500


def _chat_logprobs(tokens: list[str], logprob: float) -> dict[str, Any]:
    rest = math.log(-math.expm1(logprob)) if logprob < 0 else -9999.0
    alternatives = [("other", rest)]
    return {
        "content": [
            {
                "token": token,
                "logprob": logprob,
                "bytes": list(token.encode()),
                "top_logprobs": [
                    {"token": other, "logprob": value, "bytes": list(other.encode())}
                    for other, value in [(token, logprob), *alternatives]
                ],
            }
            for token in tokens
        ]
    }


async def _reply(send: Any, status: int, body: bytes, kind: str = "application/json") -> None:
    headers = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _error(send: Any, status: int, message: str, kind: str) -> None:
    error = {"error": {"message": message, "type": kind, "param": None, "code": status}}
    await _reply(send, status, json.dumps(error).encode())


def main(arguments: list[str]) -> None:
    """Serve until SIGTERM; requests under way are answered first."""
    import uvicorn

    def option(name: str) -> str:
        return arguments[arguments.index(name) + 1]

    label, port = option("--served-model-name"), int(option("--port"))
    engine = _FakeEngine(label, Path(os.environ[_FOLDER]), os.environ[_KEY])
    does = engine.behaviour
    print(f"loading {arguments[0]}", flush=True)
    if does.start_exit is not None:
        print("no such architecture", flush=True)
        sys.exit(does.start_exit)
    if does.ignores_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for _ in range(does.start_children):
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    time.sleep(does.start_seconds)

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            if not (does.ignores_sigterm and sig == signal.SIGTERM):
                super().handle_exit(sig, frame)

    config = uvicorn.Config(
        engine, host="127.0.0.1", port=port, lifespan="off", log_level="error", access_log=False, backlog=2048
    )
    Server(config).run()


if __name__ == "__main__":
    main(sys.argv[1:])
