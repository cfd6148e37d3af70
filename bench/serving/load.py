"""A closed-loop load: so many clients, each asks its next question as soon as it has its answer.

It runs in a process of its own (`python -m bench.serving.load JOB.json RESULT.json`), so that the Python of the load
and the Python of the gateway do not share an interpreter. One question is one JSON body, whoever answers.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

VERSION_HEADER = "x-goldgate-version"


@dataclass(frozen=True)
class Job:
    """What is asked of whom.

    Attributes:
        url: ends in /v1.
        key: sent as bearer token; empty for none.
        model: name in the request.
        questions: user turns, asked in turn.
        clients: how many ask at a time.
        requests: how many are asked in all; 0 asks until `seconds` are over.
        seconds: for how long, if `requests` is 0.
        max_tokens: of an answer.
        stream: as server-sent events.
        system: system turn.
        stop_file: ends when this file is there; empty for none.
    """

    url: str
    model: str
    questions: list[str]
    clients: int
    key: str = ""
    requests: int = 0
    seconds: float = 0.0
    max_tokens: int = 8
    stream: bool = False
    system: str = ""
    stop_file: str = ""


@dataclass
class Asked:
    """One request: when it began (seconds from the start), how long it took, and what came back."""

    began: float
    seconds: float
    status: int
    version: str = ""
    body_version: str = ""
    tokens: int = 0
    error: str = ""
    text: str = ""


@dataclass
class Load:
    """What came of a job: all requests in the order of their end, and the wall time of all."""

    wall: float = 0.0
    started: float = 0.0  # seconds since the epoch
    asked: list[Asked] = field(default_factory=list)


async def run(job: Job) -> Load:
    """Ask all of a job's questions."""
    result = Load()
    counter = iter(range(sys.maxsize))
    headers = {"Authorization": f"Bearer {job.key}"} if job.key else {}
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=600)
    stop = Path(job.stop_file) if job.stop_file else None
    async with aiohttp.ClientSession(connector=connector, headers=headers, timeout=timeout) as session:
        start, result.started = time.perf_counter(), time.time()

        async def client() -> None:
            while True:
                number = next(counter)
                elapsed = time.perf_counter() - start
                if (job.requests and number >= job.requests) or (job.seconds and elapsed >= job.seconds):
                    return
                if stop is not None and stop.exists():
                    return
                result.asked.append(await ask(session, job, number, start))

        await asyncio.gather(*(client() for _ in range(job.clients)))
        result.wall = time.perf_counter() - start
    return result


async def ask(session: aiohttp.ClientSession, job: Job, number: int, start: float) -> Asked:
    """One request; whatever goes wrong is in its record."""
    turns = [{"role": "system", "content": job.system}] if job.system else []
    body: dict[str, Any] = {
        "model": job.model,
        "messages": [*turns, {"role": "user", "content": job.questions[number % len(job.questions)]}],
        "max_tokens": job.max_tokens,
        "temperature": 0,
        "ignore_eos": True,  # every answer has the same length, so that requests are alike
        "response_format": {"type": "text"},  # said, so that the gateway does not hold answers to the task's labels
        "stream": job.stream,
    }
    began = time.perf_counter()
    one = Asked(began=began - start, seconds=0.0, status=0)
    try:
        async with session.post(f"{job.url}/chat/completions", json=body) as answer:
            one.status = answer.status
            one.version = answer.headers.get(VERSION_HEADER, "")
            raw = await answer.read()
        if one.status != 200:
            one.error = raw[:300].decode(errors="replace")
        elif job.stream:
            _read_stream(raw, one)
        else:
            record = json.loads(raw)
            one.body_version = record["model"]
            one.text = record["choices"][0]["message"]["content"] or ""
            one.tokens = record["usage"]["completion_tokens"]
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError) as error:
        one.error = f"{type(error).__name__}: {error}"
    one.seconds = time.perf_counter() - began
    return one


def _read_stream(raw: bytes, one: Asked) -> None:
    """All events of an answer; more than one version in it, or no end, is an error."""
    events = [line[6:] for line in raw.split(b"\n") if line.startswith(b"data: ")]
    if not events or events[-1].strip() != b"[DONE]":
        one.error = "the stream has no end"
        return
    records = [json.loads(event) for event in events[:-1]]
    versions = {record["model"] for record in records}
    one.body_version = ",".join(sorted(versions))
    if len(versions) != 1:
        one.error = f"versions in one answer: {one.body_version}"
    pieces = [record["choices"][0]["delta"].get("content") or "" for record in records if record["choices"]]
    one.text = "".join(pieces)
    one.tokens = sum(1 for piece in pieces if piece)


def main() -> None:
    """Run the job of a file and write what came of it."""
    job = Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    Path(sys.argv[2]).write_text(json.dumps(asdict(asyncio.run(run(job)))), encoding="utf-8")


if __name__ == "__main__":
    main()
