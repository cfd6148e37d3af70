"""`/admin` over real sockets: its key, each route, and what it refuses; and the rollouts' own client against it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tasks.contracts.serving import EngineSpec, EngineState, Phase
from tasks.serving.client import ConflictError, GatewayClient
from tests.serving.records import rollout, version
from tests.serving.running import ADMIN_KEY, Host, Running, gateway
from tests.serving.test_gateway import Scene

SEVEN, EIGHT = version(7), version(8)


def play(tmp_path: Path, scene: Scene) -> None:
    """Play a scene in front of a gateway whose engines only seem to run."""

    async def run() -> None:
        host = Host()
        host.add(SEVEN, "http://127.0.0.1:1/v1")
        async with gateway(tmp_path, host) as running:
            await scene(running, None)  # type: ignore[arg-type]

    asyncio.run(run())


def moving(live: Any, previous: Any, revision: int) -> dict[str, Any]:
    return {
        "live": live.model_dump(mode="json"), "previous": previous and previous.model_dump(mode="json"),
        "from_revision": revision, "by": "ann", "why": "because",
    }  # fmt: skip


@pytest.mark.parametrize("key", [None, "", "wrong", ADMIN_KEY + "x"])
def test_nothing_without_the_key(tmp_path: Path, key: str | None) -> None:
    async def scene(running: Running, _: Any) -> None:
        for method, path in (
            ("GET", "/admin/engines"), ("GET", f"/admin/engines/{SEVEN.engine}"),
            ("PUT", f"/admin/engines/{SEVEN.engine}"), ("DELETE", f"/admin/engines/{SEVEN.engine}"),
            ("GET", "/admin/traffic"), ("GET", "/admin/traffic/complaints"), ("PUT", "/admin/traffic/complaints"),
            ("GET", "/admin/intents/complaints"), ("POST", "/admin/intents/complaints"),
            ("PUT", "/admin/intents/complaints"), ("GET", "/admin/intents/complaints/history"),
            ("POST", "/admin/intents/complaints/lease"), ("POST", "/admin/intents/complaints/take"),
            ("POST", "/admin/rollback/complaints"), ("GET", "/admin/canary/complaints"),
            ("PUT", "/admin/canary/complaints"), ("DELETE", "/admin/canary/complaints"),
            ("PUT", "/admin/shadow/complaints"), ("DELETE", "/admin/shadow/complaints"),
        ):  # fmt: skip
            answer = await running.send(method, path, {}, key)
            assert (path, answer.status, answer.error["type"]) == (path, 401, "goldgate")
        assert running.host.stopped == []

    play(tmp_path, scene)


def test_engines_are_started_shown_and_ended(tmp_path: Path) -> None:
    async def scene(running: Running, _: Any) -> None:
        body = {"version": EIGHT.model_dump(mode="json"), "spec": EngineSpec().model_dump(mode="json")}
        started = await running.admin("PUT", f"/engines/{EIGHT.engine}", body)
        assert (started.status, started.json["state"], started.json["version"]["version"]) == (200, "starting", "8")
        wrong = await running.admin("PUT", f"/engines/{SEVEN.engine}", body)
        assert (wrong.status, wrong.error["type"]) == (400, "goldgate")
        assert f"is called {EIGHT.engine}" in wrong.error["message"]
        assert [one["name"] for one in (await running.admin("GET", "/engines")).json] == [SEVEN.engine, EIGHT.engine]
        assert (await running.admin("GET", "/engines/none")).status == 404
        assert (await running.admin("DELETE", "/engines/none")).status == 404
        assert (await running.admin("DELETE", f"/engines/{EIGHT.engine}?drain_seconds=-1")).status == 400
        assert (await running.admin("DELETE", f"/engines/{EIGHT.engine}?drain_seconds=x")).status == 400
        running.live(SEVEN)
        kept = await running.admin("DELETE", f"/engines/{SEVEN.engine}")
        assert (kept.status, kept.error["code"]) == (409, "conflict")
        assert "This engine serves complaints" in kept.error["message"]
        ended = await running.admin("DELETE", f"/engines/{EIGHT.engine}?drain_seconds=2.5")
        assert ended.json["state"] == "draining"
        assert running.host.stopped == [(EIGHT.engine, 2.5, 0)]

    play(tmp_path, scene)


def test_traffic_moves_once_and_only_to_a_ready_engine(tmp_path: Path) -> None:
    async def scene(running: Running, _: Any) -> None:
        assert (await running.admin("GET", "/traffic/complaints")).status == 404
        assert (await running.send("GET", "/ready")).json["why"] == "nothing was rolled out yet"
        first = await running.admin("PUT", "/traffic/complaints", moving(SEVEN, None, 0))
        assert (first.status, first.json["revision"]) == (200, 1)
        assert (await running.send("GET", "/ready")).json == {"ready": True, "names": {"complaints": True}, "why": None}
        again = await running.admin("PUT", "/traffic/complaints", moving(SEVEN, None, 0))
        assert again.json == first.json
        not_ready = await running.admin("PUT", "/traffic/complaints", moving(EIGHT, SEVEN, 1))
        assert (not_ready.status, "not ready" in not_ready.error["message"]) == (409, True)
        running.host.add(EIGHT, "http://127.0.0.1:1/v1")
        other = await running.admin("PUT", "/traffic/complaints", moving(EIGHT, SEVEN, 0))
        assert (other.status, other.json["traffic"]["revision"]) == (409, 1)
        assert (await running.admin("PUT", "/traffic/complaints", moving(EIGHT, SEVEN, 1))).json["revision"] == 2
        assert [one["name"] for one in (await running.admin("GET", "/traffic")).json] == ["complaints"]

    play(tmp_path, scene)


@pytest.mark.parametrize(
    ("method", "path", "body", "says"),
    [
        ("PUT", "/traffic/complaints", b"{", "Invalid JSON"),
        ("PUT", "/traffic/complaints", {"from_revision": 0}, "live: Field required"),
        ("PUT", "/traffic/complaints", {**moving(SEVEN, None, -1)}, "from_revision"),
        ("PUT", "/traffic/complaints", {**moving(SEVEN, None, 0), "reason": "x"}, "reason: there is no such field"),
        ("PUT", "/traffic/prices", moving(SEVEN, None, 0), "complaints@7 is a version of another model"),
        ("PUT", "/traffic/Complaints", moving(SEVEN, None, 0), "is no name of a model"),
        ("POST", "/intents/complaints", {"intent": {}, "lease_seconds": 1}, "intent.id: Field required"),
        ("POST", "/intents/complaints/take", {"holder": "b", "lease_seconds": 0}, "lease_seconds"),
        ("POST", "/intents/complaints/take", {"holder": "b", "lease_seconds": "NaN"}, "lease_seconds"),
    ],
)
def test_a_body_that_does_not_fit_is_400_and_says_where(
    tmp_path: Path, method: str, path: str, body: Any, says: str
) -> None:
    async def scene(running: Running, _: Any) -> None:
        answer = await running.admin(method, path, body)
        assert (answer.status, answer.error["type"]) == (400, "goldgate")
        assert says in answer.error["message"]
        assert running.books.all_traffic() == []

    play(tmp_path, scene)


def test_changes_are_begun_advanced_and_refused_with_the_open_one(tmp_path: Path) -> None:
    def body(**changes: Any) -> dict[str, Any]:
        return {"intent": rollout(EIGHT, **changes).model_dump(mode="json"), "lease_seconds": 20.0}

    async def scene(running: Running, _: Any) -> None:
        assert (await running.admin("GET", "/intents/complaints")).status == 404
        assert (await running.admin("POST", "/intents/prices", body())).status == 400
        assert (await running.admin("POST", "/intents/complaints", body())).status == 201
        second = await running.admin("POST", "/intents/complaints", body(id="other", holder="flow-b"))
        assert (second.status, second.json["intent"]["id"]) == (409, "rollout-of-8")
        assert 15.0 < second.json["lease_left"] <= 20.0
        taken = await running.admin("POST", "/intents/complaints/take", {"holder": "flow-b", "lease_seconds": 5})
        assert (taken.status, taken.json["intent"]["holder"]) == (409, "flow-a")
        lease = {"id": "rollout-of-8", "holder": "flow-a", "lease_seconds": 5}
        assert (await running.admin("POST", "/intents/complaints/lease", lease)).status == 200
        assert (await running.admin("POST", "/intents/complaints/lease", {**lease, "holder": "b"})).status == 409
        assert (await running.admin("PUT", "/intents/complaints", body(phase=Phase.CHECKED))).json["phase"] == "checked"
        assert (await running.admin("GET", "/intents/complaints")).json["phase"] == "checked"
        assert (await running.admin("PUT", "/intents/complaints", body(phase=Phase.REFUSED))).status == 200
        late = await running.admin("PUT", "/intents/complaints", body(phase=Phase.SWITCHING))
        assert (late.status, "It has ended: refused" in late.error["message"]) == (409, True)
        assert [one["phase"] for one in (await running.admin("GET", "/intents/complaints/history")).json] == ["refused"]

    play(tmp_path, scene)


def test_a_rollback_while_requests_go_on(tmp_path: Path) -> None:
    async def scene(running: Running, _: Any) -> None:
        body = {"by": "ann", "why": "nonsense", "holder": "ann@here", "lease_seconds": 10}
        assert (await running.admin("POST", "/rollback/complaints", body)).status == 404
        running.live(SEVEN)
        assert (await running.admin("POST", "/rollback/complaints", body)).status == 409
        running.live(EIGHT, SEVEN)
        done = await running.admin("POST", "/rollback/complaints", body)
        assert (done.json["traffic"]["live"]["version"], done.json["intent"]["phase"]) == ("7", "switching")
        assert (await running.admin("POST", "/rollback/complaints", body)).json == done.json
        assert (await running.send("GET", "/v1/models/complaints")).json["root"] == "complaints@7"

    play(tmp_path, scene)


def test_a_disk_that_is_full_is_507_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    async def scene(running: Running, _: Any) -> None:
        running.live(SEVEN)
        running.host.add(EIGHT, "http://127.0.0.1:1/v1")
        with monkeypatch.context() as patch:
            patch.setattr("tasks.serving.durable.os.fsync", full)
            answer = await running.admin("PUT", "/traffic/complaints", moving(EIGHT, SEVEN, 1))
        assert (answer.status, answer.error["code"]) == (507, "store")
        assert "No space left on device" in answer.error["message"]
        assert running.books.traffic("complaints").revision == 1  # type: ignore[union-attr]

    play(tmp_path, scene)


def test_what_a_rollout_does_through_its_client(tmp_path: Path) -> None:
    def change(url: str) -> None:
        with GatewayClient(url, ADMIN_KEY, patience=0.0) as client:
            assert (client.traffic("complaints"), client.open_intent("complaints"), client.engine("none")) == (
                None,
            ) * 3
            assert client.start_engine(EIGHT, EngineSpec()).state is EngineState.READY
            intent = client.begin(rollout(EIGHT))
            with pytest.raises(ConflictError) as refused:
                client.begin(rollout(SEVEN, id="other", holder="flow-b"))
            assert refused.value.open == intent
            assert refused.value.lease_left is not None
            client.write(intent.model_copy(update={"phase": Phase.SWITCHING}))
            step: dict[str, Any] = {"by": "a", "why": "b", "change": intent}
            assert client.move_traffic("complaints", SEVEN, None, from_revision=0, **step).revision == 1
            with pytest.raises(ConflictError, match="rollout to complaints@8 by retrain is under way") as held:
                client.move_traffic("complaints", EIGHT, SEVEN, from_revision=1, by="a", why="b")  # without its change
            assert held.value.open is not None
            assert client.move_traffic("complaints", EIGHT, SEVEN, from_revision=1, **step).revision == 2
            client.write(intent.model_copy(update={"phase": Phase.DONE}))
            rolled_back = client.roll_back("complaints", by="ann", why="nonsense", holder="ann@here")
            assert rolled_back.traffic.live == SEVEN
            client.write(rolled_back.intent.model_copy(update={"phase": Phase.DONE}))
            assert [one.kind for one in client.history("complaints")] == ["rollback", "rollout"]
            with pytest.raises(ConflictError, match="This engine serves complaints"):
                client.end_engine(EIGHT.engine, 1.0)
            client.end_engine("none", 1.0)

    async def scene(running: Running, _: Any) -> None:
        running.host.add(EIGHT, "http://127.0.0.1:1/v1")
        await asyncio.to_thread(change, running.url)

    play(tmp_path, scene)
