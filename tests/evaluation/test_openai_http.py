"""The HTTP engine against a server that misbehaves in every way that servers do."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tasks.contracts.errors import EvaluationError, ServiceError, SpecError
from tasks.contracts.progress import ignore_progress
from tasks.contracts.prompt import Decoding, Prompt
from tasks.contracts.rows import Message, Row
from tasks.evaluation.engines.openai_http import OpenAIEngine, openai_identity

PROMPT = Prompt(system="Answer with one label.")
ROWS = [Row(f"r{n}", n, (Message("user", f"text {n}"),), "card") for n in range(6)]
CHOICES = Decoding(max_new_tokens=8, choices=("card", "loan"))
KEY = "sk-very-secret"

Reply = tuple[int, str, dict[str, str]]  # status, body, headers


def said(text: str | None) -> Reply:
    usage = {"prompt_tokens": 11, "completion_tokens": 2}
    return 200, json.dumps({"choices": [{"message": {"content": text}}], "usage": usage}), {}


def echo(body: dict[str, Any]) -> Reply:
    return said(body["messages"][-1]["content"])


@dataclass
class Fake:
    """What the server says, and what it was asked."""

    url: str = ""
    models: Reply = (200, '{"data": [{"id": "m"}, {"id": "other"}]}', {})
    reply: Callable[[dict[str, Any]], Reply] = echo
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)

    def engine(self, model: str = "m", **settings: Any) -> OpenAIEngine:
        return OpenAIEngine(self.url, model, batch_size=3, backoff=0.01, **settings)

    def ask(self, rows: list[Row] = ROWS[:1], **settings: Any) -> list[str]:
        engine = self.engine(**settings)
        try:
            return [answer.prediction for answer in engine.answer(PROMPT, rows, CHOICES, ignore_progress)]
        finally:
            engine.close()


@pytest.fixture
def fake() -> Iterator[Fake]:
    state = Fake()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/v1/models"
            self.send(state.models)

        def do_POST(self) -> None:
            assert self.path == "/v1/chat/completions"
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.asked.append(body)
            state.keys.append(self.headers.get("Authorization"))
            self.send(state.reply(body))

        def send(self, reply: Reply) -> None:
            status, text, headers = reply
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield state
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def in_turn(*replies: Reply) -> Callable[[dict[str, Any]], Reply]:
    """Each reply once, then echoes."""
    left = list(replies)
    return lambda body: left.pop(0) if left else echo(body)


def test_answers_come_in_the_order_of_the_rows_with_their_numbers(fake: Fake) -> None:
    def slow_first(body: dict[str, Any]) -> Reply:
        if body["messages"][-1]["content"] == "text 0":
            time.sleep(0.2)
        return echo(body)

    fake.reply = slow_first
    answers = fake.engine().answer(PROMPT, ROWS, CHOICES, ignore_progress)
    assert [answer.prediction for answer in answers] == [f"text {n}" for n in range(6)]
    assert {(answer.prompt_tokens, answer.output_tokens, answer.confidence) for answer in answers} == {(11, 2, None)}
    assert answers[0].latency_ms >= 200


def test_what_is_sent(fake: Fake) -> None:
    fake.ask()
    assert fake.asked == [
        {
            "model": "m",
            "messages": [
                {"role": "system", "content": "Answer with one label."},
                {"role": "user", "content": "text 0"},
            ],
            "temperature": 0,
            "max_tokens": 8,
            "structured_outputs": {"choice": ["card", "loan"]},
        }
    ]
    assert fake.keys == [None]


def test_the_key_comes_from_the_environment_and_shows_in_no_error(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    fake.reply = lambda body: (400, f"bad request by {KEY}", {})
    with pytest.raises(ServiceError, match=r"bad request by \*\*\*") as caught:
        fake.ask()
    assert fake.keys == [f"Bearer {KEY}"]
    assert KEY not in str(caught.value)


def test_an_ignored_constraint_stays_visible(fake: Fake) -> None:
    fake.reply = lambda body: said("It is a card, I think.")
    assert fake.ask() == ["It is a card, I think."]


def test_no_content_is_an_empty_answer(fake: Fake) -> None:
    fake.reply = lambda body: said(None)
    assert fake.ask() == [""]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_busy_servers_are_asked_again(fake: Fake, status: int) -> None:
    fake.reply = in_turn((status, "busy", {}), (status, "busy", {"Retry-After": "0"}))
    assert fake.ask() == ["text 0"]
    assert len(fake.asked) == 3


def test_a_server_that_stays_broken_is_named_with_its_words(fake: Fake) -> None:
    fake.reply = lambda body: (500, "out of memory", {})
    with pytest.raises(ServiceError, match="did not answer after 5 attempts: HTTP 500: out of memory") as caught:
        fake.ask()
    assert caught.value.where == f"{fake.url}/v1/chat/completions (item r0)"
    assert len(fake.asked) == 5


def test_a_server_that_hangs_is_given_up(fake: Fake) -> None:
    fake.reply = lambda body: (time.sleep(0.5), said("late"))[1]
    with pytest.raises(ServiceError, match=r"after 5 attempts: no answer within 0.05 s"):
        fake.ask(timeout=0.05)


def test_nobody_there() -> None:
    engine = OpenAIEngine("http://127.0.0.1:9", "m", batch_size=1, backoff=0.01)
    with pytest.raises(ServiceError, match=r"did not answer after 5 attempts: .*refused"):
        engine.answer(PROMPT, ROWS[:1], CHOICES, ignore_progress)


@pytest.mark.parametrize("headers", [{"Content-Type": "text/html"}, {}])
def test_a_web_page_is_no_answer(fake: Fake, headers: dict[str, str]) -> None:
    fake.models = (200, "<!DOCTYPE html><title>Welcome</title>", headers)
    with pytest.raises(ServiceError, match="sends a web page, not JSON") as caught:
        fake.ask()
    assert "/v1" in caught.value.fix
    assert fake.asked == []


def test_an_unknown_model_is_told_which_there_are(fake: Fake) -> None:
    with pytest.raises(ServiceError, match="does not know the model 'absent'; it has: m, other"):
        fake.ask(model="absent")
    assert fake.asked == [], "no item is asked"


def test_an_unknown_model_of_a_server_without_a_list(fake: Fake) -> None:
    fake.models = (404, "{}", {})
    fake.reply = lambda body: (404, '{"error": "model `m` does not exist"}', {})
    with pytest.raises(ServiceError, match=r"refuses the request \(HTTP 404\): .*`m` does not exist"):
        fake.ask()
    assert len(fake.asked) == 1, "what is refused is not tried again"


@pytest.mark.parametrize("status", [401, 403])
def test_refused_access_names_the_variable(fake: Fake, status: int) -> None:
    fake.models = (status, "{}", {})
    with pytest.raises(ServiceError, match=f"refuses access \\(HTTP {status}\\)") as caught:
        fake.ask()
    assert "OPENAI_API_KEY" in caught.value.fix
    assert "it is not set" in caught.value.fix


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("pong", "is no JSON: pong"),
        ("{}", "holds no answer"),
        ('{"choices": []}', "holds no answer"),
        ('{"choices": null}', "holds no answer"),
    ],
)
def test_strange_answers_are_shown(fake: Fake, body: str, message: str) -> None:
    fake.reply = lambda _: (200, body, {})
    with pytest.raises(ServiceError, match=message):
        fake.ask()


def test_one_failure_ends_the_rest(fake: Fake) -> None:
    fake.reply = lambda body: (400, "no", {})
    rows = [Row(f"r{n}", n, (Message("user", "text"),), "card") for n in range(500)]
    with pytest.raises(ServiceError, match="HTTP 400"):
        fake.ask(rows)
    assert len(fake.asked) < 250


@pytest.mark.parametrize(
    ("url", "identity"),
    [
        ("http://host:8000", "openai/http://host:8000/v1"),
        ("http://host:8000/v1/", "openai/http://host:8000/v1"),
        ("https://host/openai/v1beta?key=x", "openai/https://host/openai/v1beta"),
    ],
)
def test_identity_is_the_address_without_query(url: str, identity: str) -> None:
    assert openai_identity(url) == identity


def test_a_password_in_the_address_is_refused() -> None:
    with pytest.raises(SpecError, match="user or password") as caught:
        openai_identity("https://me:hunter2@host/v1")
    assert "hunter2" not in str(caught.value)


def token(text: str, probability: float) -> dict[str, Any]:
    return {"token": text, "bytes": list(text.encode()), "logprob": math.log(probability)}


@pytest.mark.parametrize(
    ("answer", "tokens", "expected"),
    [
        ("card", [token("ca", 0.8), token("rd", 0.5)], 0.8),  # from its first token on it is settled
        ("car", [token("ca", 0.8), token("r", 0.5)], None),  # cut: no choice, so no probability among them
    ],
)
def test_a_closed_answer_has_its_probability_where_the_server_is_known_to_say_it(
    fake: Fake, answer: str, tokens: list[dict[str, Any]], expected: float | None
) -> None:
    choice = {"message": {"content": answer}, "logprobs": {"content": tokens}}
    fake.reply = lambda _: (200, json.dumps({"choices": [choice]}), {})
    for known, confidence in ((True, expected), (False, None)):
        engine = fake.engine(says_confidence=known)
        (found,) = engine.answer(PROMPT, ROWS[:1], CHOICES, ignore_progress)
        assert found.confidence == (None if confidence is None else pytest.approx(confidence))
        assert ("logprobs" in fake.asked[-1]) is known
    engine = fake.engine(says_confidence=True)
    (found,) = engine.answer(PROMPT, ROWS[:1], Decoding(max_new_tokens=8), ignore_progress)
    assert found.confidence is None  # an open answer has none
    assert "logprobs" not in fake.asked[-1]


def test_log_probabilities_that_do_not_come_are_an_error(fake: Fake) -> None:
    fake.reply = lambda _: said("card")
    with pytest.raises(ServiceError, match=r"holds no answer .*logprobs"):
        fake.ask(says_confidence=True)
    odd = {"message": {"content": "card"}, "logprobs": {"content": [token("x", 0.5)]}}
    fake.reply = lambda _: (200, json.dumps({"choices": [odd]}), {})
    with pytest.raises(EvaluationError, match="do not spell the answer"):
        fake.ask(says_confidence=True)
