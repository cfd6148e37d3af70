"""Speaking to a gateway: what is asked again, what is refused, who may work on a change, and how an item is asked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tasks.contracts.errors import ServiceError
from tasks.contracts.rows import Message, Row
from tasks.contracts.serving import EngineSpec, Intent, Phase
from tasks.contracts.spec import ExecutionSpec
from tasks.serving import client as client_module
from tasks.serving.client import ConflictError, GatewayClient, Lease, LeaseLostError, find_gateway, gateway_of
from tests.serving.records import rollout, version

SEVEN = version(7)
KEY = "secret-admin-key"
ROW = Row(id="i1", line=1, messages=(Message("user", "my card"),), target="card")


class Gateway:
    """Answers what a test says, in turn; the last answer for ever. An answer of None closes the connection."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, Any, dict[str, str]] | None] = []
        self.asked: list[tuple[str, str, Any]] = []
        self.keys: list[str | None] = []
        gateway = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                gateway.asked.append((self.command, self.path, body))
                gateway.keys.append(self.headers.get("Authorization"))
                said = gateway.answers[0] if len(gateway.answers) == 1 else gateway.answers.pop(0)
                if said is None:
                    self.close_connection = True
                    return
                status, record, headers = said
                data = record if isinstance(record, bytes) else json.dumps(record).encode()
                self.send_response(status)
                for name, value in (headers | {"Content-Length": str(len(data))}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PUT = do_DELETE = answer  # noqa: N815  # names that the library asks for

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def says(self, *answers: tuple[int, Any] | tuple[int, Any, dict[str, str]] | None) -> None:
        self.answers = [(*one, {}) if one is not None and len(one) == 2 else one for one in answers]  # type: ignore[misc]


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    made = Gateway()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def client(gateway: Gateway) -> Iterator[GatewayClient]:
    with GatewayClient(gateway.url, KEY, patience=30.0) as made:
        yield made


def wire(intent: Intent) -> dict[str, Any]:
    record: dict[str, Any] = intent.model_dump(mode="json")
    return record


def refusal(message: str, **more: Any) -> dict[str, Any]:
    return {"error": {"message": message, "type": "goldgate", "param": None, "code": None}, **more}


def test_a_gateway_that_is_away_is_asked_again(gateway: Gateway, client: GatewayClient) -> None:
    gateway.says(None, (503, refusal("starting")), (200, []))
    assert client.engines("complaints") == ()
    assert [path for _, path, _ in gateway.asked] == ["/admin/engines"] * 3
    assert set(gateway.keys) == {f"Bearer {KEY}"}


def test_one_that_stays_away_is_named(gateway: Gateway) -> None:
    gateway.says((500, refusal(f"broken, says {KEY}")))
    with (
        GatewayClient(gateway.url, KEY, patience=0.2) as client,
        pytest.raises(ServiceError, match=r"The gateway does not answer: HTTP 500: broken, says \*\*\*") as error,
    ):
        client.traffic("complaints")
    assert gateway.url in str(error.value)
    assert KEY not in str(error.value)
    with (
        GatewayClient("http://127.0.0.1:9", KEY, patience=0.0) as client,
        pytest.raises(ServiceError, match="goldgate serve"),
    ):
        client.traffic("complaints")


@pytest.mark.parametrize(
    ("status", "said"),
    [(401, "The gateway refuses access: no"), (400, r"refuses the request \(HTTP 400\): no"), (404, "HTTP 404")],
)
def test_a_refusal_is_not_asked_again(gateway: Gateway, client: GatewayClient, status: int, said: str) -> None:
    gateway.says((status, refusal("no")))
    with pytest.raises(ServiceError, match=said):
        client.start_engine(SEVEN, EngineSpec())
    assert len(gateway.asked) == 1


def test_what_is_not_there_is_none(gateway: Gateway, client: GatewayClient) -> None:
    gateway.says((404, refusal("there is no such thing")))
    assert client.traffic("complaints") is None
    assert client.open_intent("complaints") is None
    assert client.engine("complaints-7") is None
    assert client.take("complaints", "me") is None
    client.end_engine("complaints-7", 2.5)
    assert gateway.asked[-1][:2] == ("DELETE", "/admin/engines/complaints-7?drain_seconds=2.5")


def test_a_conflict_says_what_is_under_way(gateway: Gateway, client: GatewayClient) -> None:
    other = rollout(SEVEN, holder="somebody else")
    gateway.says((409, refusal("one is under way", intent=wire(other), lease_left=12.5)))
    with pytest.raises(ConflictError, match="one is under way") as conflict:
        client.begin(rollout(SEVEN, holder="me"))
    assert (conflict.value.open, conflict.value.lease_left) == (other, 12.5)
    gateway.says((409, b"not json"))
    with pytest.raises(ConflictError) as plain:
        client.write(other)
    assert (plain.value.open, plain.value.lease_left) == (None, None)


def test_a_change_whose_first_answer_was_lost_has_begun(gateway: Gateway, client: GatewayClient) -> None:
    mine = rollout(SEVEN, holder="me")
    gateway.says(None, (409, refusal("under way", intent=wire(mine), lease_left=30.0)))
    assert client.begin(mine) == mine


def test_a_rollback_whose_first_answer_was_lost_does_not_swap_back(gateway: Gateway, client: GatewayClient) -> None:
    mine = rollout(SEVEN, Phase.SWITCHING, kind="rollback", holder="me", was=version(8))
    at = mine.at.isoformat()
    goes = {"name": "complaints", "live": SEVEN.model_dump(mode="json"), "previous": None, "revision": 3, "by": "a",
            "why": "b", "at": at}  # fmt: skip
    gateway.says((409, refusal("under way", intent=wire(mine), lease_left=30.0)), (200, goes))
    done = client.roll_back("complaints", by="Ada", why="wrong", holder="me")
    assert (done.intent, done.traffic.live) == (mine, SEVEN)
    gateway.says((409, refusal("under way", intent=wire(mine), lease_left=30.0)), (200, goes))
    with pytest.raises(ConflictError):
        client.roll_back("complaints", by="Eve", why="wrong", holder="another")


def wait_for(what: Callable[[], bool]) -> None:
    until = time.monotonic() + 60.0
    while not what():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_the_lease_is_renewed_while_the_block_runs(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_RENEWALS", 3000)
    mine = rollout(SEVEN, holder="me")
    gateway.says((200, wire(mine)))
    with GatewayClient(gateway.url, KEY, lease_seconds=60.0) as client, client.holding(mine) as lease:
        wait_for(lambda: len(gateway.asked) >= 3)
        lease.check()
    body = {"id": mine.id, "holder": "me", "lease_seconds": 60.0}
    assert gateway.asked[0] == ("POST", "/admin/intents/complaints/lease", body)
    count = len(gateway.asked)
    time.sleep(0.1)
    assert len(gateway.asked) == count


def test_a_lease_that_another_has_stops_its_holder(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_RENEWALS", 3000)
    mine = rollout(SEVEN, holder="me")
    gateway.says((409, refusal("it is held by another")))
    with GatewayClient(gateway.url, KEY, lease_seconds=60.0) as client, client.holding(mine) as lease:
        wait_for(lambda: lease.lost)
        with pytest.raises(LeaseLostError, match="it is held by another"):
            lease.check()


def test_a_lease_that_cannot_be_renewed_runs_out(gateway: Gateway) -> None:
    mine = rollout(SEVEN, holder="me")
    gateway.says((503, refusal("away")))
    with GatewayClient(gateway.url, KEY, lease_seconds=0.3) as client, client.holding(mine) as lease:
        wait_for(lambda: bool(gateway.asked) and lease.lost)
        wait_for(lambda: len(gateway.asked) >= 2)  # so that the first answer has come
        with pytest.raises(LeaseLostError, match="HTTP 503: away"):
            lease.check()


def test_a_lease_counts_from_when_it_was_asked_for() -> None:
    now = [100.0]
    clock: Callable[[], float] = lambda: now[0]  # noqa: E731
    lease = Lease(rollout(SEVEN), 30.0, clock=clock)
    now[0] = 129.0
    lease.check()
    lease.renewed(125.0)
    now[0] = 154.9
    lease.check()
    now[0] = 155.1
    with pytest.raises(LeaseLostError, match="not renewed in time"):
        lease.check()


def answer(text: str | None) -> dict[str, Any]:
    return {"model": "complaints@7", "choices": [{"message": {"role": "assistant", "content": text}}]}


def test_an_item_is_asked_as_it_was_evaluated(gateway: Gateway, client: GatewayClient) -> None:
    gateway.says((200, answer("card"), {"x-goldgate-version": "complaints@7"}))
    served = client.ask(SEVEN, ROW)
    assert (served.text, served.label, served.latency_ms > 0) == ("card", "complaints@7", True)
    assert gateway.asked == [
        (
            "POST",
            "/v1/chat/completions",
            {
                "model": "complaints@7",
                "messages": [
                    {"role": "system", "content": "Which product is it about?"},
                    {"role": "user", "content": "my card"},
                ],
                "temperature": 0,
                "max_tokens": 8,
                "structured_outputs": {"choice": ["card", "loan"]},
            },
        )
    ]


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ((502, refusal("the engine is gone")), "HTTP 502: the engine is gone"),
        ((200, {"choices": []}), "This is no answer: "),
        ((200, b"<html>"), "This is no answer: <html>"),
    ],
)
def test_an_engine_that_fails_is_asked_once(
    gateway: Gateway, client: GatewayClient, said: tuple[int, Any], why: str
) -> None:
    gateway.says(said)
    with pytest.raises(ServiceError, match=why):
        client.ask(SEVEN, ROW)
    assert len(gateway.asked) == 1


def test_a_question_waits_for_a_gateway_that_is_started_again(gateway: Gateway, client: GatewayClient) -> None:
    gateway.says(None, (200, answer(None)))
    assert client.ask(SEVEN, ROW).text == ""
    assert len(gateway.asked) == 2


def test_the_gateway_is_found_by_environment_or_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("GOLDGATE_GATEWAY", "GOLDGATE_ADMIN_KEY"):
        monkeypatch.delenv(variable, raising=False)
    execution = ExecutionSpec(store=str(tmp_path))
    assert find_gateway(execution) is None
    with pytest.raises(ServiceError, match=r"No gateway is known(.|\n)*goldgate serve"):
        gateway_of(execution)
    (tmp_path / "serving").mkdir()
    (tmp_path / "serving" / "gateway.json").write_text('{"url": "http://127.0.0.1:8080", "pid": 1}')
    with pytest.raises(ServiceError, match="admin key cannot be read"):
        gateway_of(execution)
    (tmp_path / "serving" / "admin.key").write_text(f"{KEY}\n")
    found = gateway_of(execution)
    assert (found.url, found._key) == ("http://127.0.0.1:8080", KEY)
    monkeypatch.setenv("GOLDGATE_GATEWAY", "http://gate:9/")
    monkeypatch.setenv("GOLDGATE_ADMIN_KEY", "other")
    named = gateway_of(execution)
    assert (named.url, named._key) == ("http://gate:9", "other")
    monkeypatch.setenv("GOLDGATE_GATEWAY", "http://user:pass@gate:9")
    with pytest.raises(ServiceError, match="holds a user or password") as error:
        gateway_of(execution)
    assert "pass@" not in str(error.value)
    monkeypatch.delenv("GOLDGATE_GATEWAY")
    (tmp_path / "serving" / "gateway.json").write_text("{}")
    with pytest.raises(ServiceError, match="address cannot be read"):
        gateway_of(execution)


def test_a_remote_store_needs_the_key_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOLDGATE_GATEWAY", "http://gate:9")
    monkeypatch.delenv("GOLDGATE_ADMIN_KEY", raising=False)
    with pytest.raises(ServiceError, match=r"admin key is not known(.|\n)*GOLDGATE_ADMIN_KEY"):
        gateway_of(ExecutionSpec(store="memory://shop"))
