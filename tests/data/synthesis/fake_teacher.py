"""A teacher behind a real HTTP server of this process, which does what a test tells it to."""

from __future__ import annotations

import json
import random
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]
PROMPT_TOKENS = 100
COMPLETION_TOKENS = 20
KEYS = {"billing": ("invoice", "refund", "charge", "payment"), "support": ("crash", "login", "screen", "update")}


@dataclass
class Say:
    """An answer of the server. `stream` sends its pieces in place of the text, without a length."""

    text: str
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    stream: Callable[[], Iterator[bytes]] | None = None


def says(content: Any, *, finish: str = "stop", usage: Any = ..., **more: Any) -> Say:
    """A well-formed answer; content that is no text is written as JSON."""
    text = content if isinstance(content, str) or content is None else json.dumps(content)
    counts = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": COMPLETION_TOKENS} if usage is ... else usage
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return Say(json.dumps({"choices": [choice], "usage": counts, **more}))


def is_vote(body: Body) -> bool:
    """Whether the teacher is asked for the answer to an example, and not to write one."""
    return not body["messages"][0]["content"].startswith("You write examples")


def wanted_label(body: Body) -> str:
    """The class that an example should have."""
    request = next(turn for turn in body["messages"] if turn["role"] == "user")["content"]
    return re.findall(r"Write one new example whose answer is (\w+)", request)[0]


def ticket(label: str, seed: int, words: int = 12) -> str:
    """A made-up ticket that is unlike any with another seed."""
    draw = random.Random(seed)
    return " ".join([*(f"w{draw.randrange(100_000)}" for _ in range(words)), *draw.sample(KEYS[label], 2)])


def label_of(text: str) -> str:
    """The class of a ticket, by its key words."""
    counts = Counter(label for label, keys in KEYS.items() for key in keys if key in text.lower().split())
    return counts.most_common(1)[0][0] if counts else "billing"


def good_teacher(body: Body) -> Say:
    """Writes tickets of the class that is asked for, and knows the class of each."""
    if is_vote(body):
        return says({"answer": label_of(body["messages"][-1]["content"])})
    return says({"text": ticket(wanted_label(body), body["seed"])})


@dataclass
class FakeTeacher:
    """What the server says, and what it was asked."""

    url: str = ""
    reply: Callable[[Body], Say] = good_teacher
    asked: list[Body] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    most_at_once: int = 0
    _at_once: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def written(self) -> list[Body]:
        """The requests for an example."""
        return [body for body in self.asked if not is_vote(body)]

    @property
    def repeated(self) -> list[str]:
        """Requests that came more than once."""
        return [body for body, count in Counter(json.dumps(one) for one in self.asked).items() if count > 1]

    def _enter(self, body: Body, headers: dict[str, str]) -> None:
        with self._lock:
            self.asked.append(body)
            self.headers.append(headers)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)

    def _leave(self) -> None:
        with self._lock:
            self._at_once -= 1


@contextmanager
def fake_teacher() -> Iterator[FakeTeacher]:
    state = FakeTeacher()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/chat/completions"
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state._enter(body, dict(self.headers))
            try:
                said = state.reply(body)
            finally:
                state._leave()
            try:
                self.send_response(said.status)
                for name, value in said.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                if said.stream is None:
                    self.wfile.write(said.text.encode())
                else:
                    for piece in said.stream():
                        self.wfile.write(piece)
                        self.wfile.flush()
            except (BrokenPipeError, ConnectionResetError):
                return

        def log_message(self, *_: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    state.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
