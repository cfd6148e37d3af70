"""A shadow behind the live version: what it is asked, what is kept, and that callers never notice; on real sockets."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tasks.contracts.observe import ShadowSpec
from tasks.contracts.prompt import Decoding
from tasks.contracts.review import ReviewItem, ReviewReason, SpoolSpec
from tasks.contracts.serving import Shadow, Vendor, VersionRef
from tasks.serving.canary import in_canary
from tasks.serving.gateway.shadowing import Shadowing
from tasks.serving.request_log import read_log
from tasks.serving.review.spool import Spool
from tasks.serving.shadow_pairs import RECORD_FILE, ShadowRecord, pair_schema
from tests.serving.fake_engine import Behaviour, FakeCommand
from tests.serving.records import version
from tests.serving.running import Answered, Host, Running, engine, gateway, listening

SEVEN, EIGHT = version(7), version(8)
Scene = Callable[[Running, FakeCommand], Coroutine[Any, Any, None]]


class Desk:
    """In the spool's place."""

    def __init__(self) -> None:
        self.items: list[ReviewItem | None] = []

    def put(self, item: ReviewItem | Callable[[], ReviewItem | None]) -> None:
        self.items.append(item if isinstance(item, ReviewItem) else item())


def play(
    tmp_path: Path,
    scene: Scene,
    eight: Behaviour | None = None,
    *,
    seven: Behaviour | None = None,
    fill_in: bool = False,
    **options: Any,
) -> None:
    """Play a scene in front of a gateway with complaints@7 live and complaints@8 ready."""
    shadow = {"mask": lambda text: text.replace("ann", "[NAME]"), "flush_seconds": 0.02, "fill_in": fill_in, **options}

    async def run() -> None:
        host = Host()
        async with AsyncExitStack() as stack:
            fakes = await stack.enter_async_context(engine(host, SEVEN, tmp_path / "fakes", seven))
            await stack.enter_async_context(engine(host, EIGHT, tmp_path / "fakes", eight))
            running = await stack.enter_async_context(gateway(tmp_path, host, shadow=shadow, fill_in=fill_in))
            running.live(SEVEN)
            await scene(running, fakes)

    asyncio.run(run())


async def begin(running: Running, of: VersionRef | Vendor = EIGHT, share: float = 1.0, name: str = "first") -> Answered:
    shadow = Shadow(
        id=name, version=of if isinstance(of, VersionRef) else None, vendor=of if isinstance(of, Vendor) else None,
        spec=ShadowSpec(share=share), since=datetime(2026, 3, 1, tzinfo=UTC),
    )  # fmt: skip
    traffic = running.books.traffic("complaints")
    assert traffic is not None
    body = {"shadow": shadow.model_dump(mode="json"), "from_revision": traffic.revision, "by": "Ada"}
    return await running.admin("PUT", "/shadow/complaints", body)


def kept(tmp_path: Path, name: str = "first") -> list[dict[str, Any]]:
    return sorted(read_log(tmp_path / "serving" / "shadow" / name, schema=pair_schema), key=lambda row: row["at"])


async def pairs(tmp_path: Path, count: int, name: str = "first") -> list[dict[str, Any]]:
    """The pairs, once so many are written."""
    until = time.monotonic() + 20.0
    while len(found := kept(tmp_path, name)) < count:
        assert time.monotonic() < until, found
        await asyncio.sleep(0.02)
    assert len(found) == count
    return found


async def metric(running: Running, line: str) -> float:
    text = (await running.send("GET", "/metrics")).data.decode()
    return next((float(one.rsplit(" ", 1)[1]) for one in text.splitlines() if one.startswith(line)), 0.0)


async def until_metric(running: Running, line: str, value: float) -> None:
    until = time.monotonic() + 20.0
    while await metric(running, line) < value:
        assert time.monotonic() < until, line
        await asyncio.sleep(0.02)
    assert await metric(running, line) == value


def asked(fakes: FakeCommand, label: str) -> list[dict[str, Any]]:
    return fakes.requests(label)


# -- what is asked and kept -------------------------------------------------------------------------------------------


def test_both_answers_are_kept_masked_and_the_caller_has_the_live_one(tmp_path: Path) -> None:
    async def scene(running: Running, fakes: FakeCommand) -> None:
        assert (await begin(running)).json["shadow"]["version"]["version"] == "8"
        for text in ("ann owes", "same", "alike"):
            answer = await running.ask(text, user="ben", headers={"x-request-id": f"r-{text[:3]}"})
            assert (answer.status, answer.headers["x-goldgate-version"]) == (200, "complaints@7")
        found = {row["id"]: row for row in await pairs(tmp_path, 3)}
        first = found["r-ann"]
        assert (first["live"], first["shadow"], first["agrees"]) == ("complaints@7", "complaints@8", False)
        assert (first["live_answer"], first["shadow_answer"]) == (
            "complaints@7: [NAME] owes",
            "complaints@8: [NAME] owes",
        )
        assert 0 < first["live_ms"] < 5_000
        assert 0 < first["shadow_ms"] < 5_000
        assert (found["r-sam"]["agrees"], found["r-ali"]["agrees"]) == (True, True)
        assert len({row["key"] for row in found.values()}) == 1  # of one user
        assert "ben" not in json.dumps(first, default=str)
        text = 'goldgate_shadow_requests_total{name="complaints",outcome='
        assert (await metric(running, text + '"agreed"}'), await metric(running, text + '"disagreed"}')) == (2.0, 1.0)
        record = ShadowRecord.model_validate_json((tmp_path / "serving" / "shadow" / "first" / RECORD_FILE).read_text())
        assert (record.name, record.shadow.id, record.closed) == ("complaints", "first", True)

    said = {"same": "card", "alike": "  loan"}
    play(tmp_path, scene, Behaviour(answers=said), seven=Behaviour(answers=said | {"alike": "loan"}))


def test_a_share_of_the_requests_is_drawn_by_their_ids(tmp_path: Path) -> None:
    ids = [f"r{number}" for number in range(60)]
    drawn = [one for one in ids if in_canary(one, "first", 0.3)]
    assert 8 < len(drawn) < 30

    async def scene(running: Running, fakes: FakeCommand) -> None:
        await begin(running, share=0.3)
        for one in ids:
            await running.ask("hello", headers={"x-request-id": one})
        assert {row["id"] for row in await pairs(tmp_path, len(drawn))} == set(drawn)
        assert len(asked(fakes, "complaints@8")) == len(drawn)

    play(tmp_path, scene)


def test_it_is_asked_as_its_own_version_was_evaluated_and_whole(tmp_path: Path) -> None:
    async def scene(running: Running, fakes: FakeCommand) -> None:
        await begin(running)
        streamed = await running.ask("hello", stream=True, stream_options={"include_usage": True})
        assert streamed.streamed == "card"  # the first of the choices that were filled in
        (found,) = await pairs(tmp_path, 1)
        assert (found["live_answer"], found["shadow_answer"], found["agrees"]) == ("card", "card", True)
        (body,) = asked(fakes, "complaints@8")
        assert body == {
            "model": "complaints@8", "temperature": 0, "max_tokens": 8,
            "structured_outputs": {"choice": ["card", "loan"]},
            "messages": [
                {"role": "system", "content": "Which product is it about?"}, {"role": "user", "content": "hello"},
            ],
        }  # fmt: skip

    play(tmp_path, scene, fill_in=True)


def test_calls_are_asked_for_as_in_the_evaluation_and_read_from_what_the_model_writes(tmp_path: Path) -> None:
    tools = ({"name": "refund", "description": "", "parameters": {"type": "object", "properties": {}}},)
    changes = {"prompt": SEVEN.prompt.model_copy(update={"tools": tools}), "decoding": Decoding(max_new_tokens=8)}
    seven, eight = SEVEN.model_copy(update=changes), EIGHT.model_copy(update=changes)

    async def scene(running: Running, fakes: FakeCommand) -> None:
        running.books.move_traffic("complaints", seven, None, from_revision=1, by="a", why="b", ready=lambda _: True)
        await begin(running, eight)
        asked_tools = [{"type": "function", "function": dict(tools[0])}]
        await running.ask("hello", tools=asked_tools)
        (found,) = await pairs(tmp_path, 1)
        assert found["agrees"] is True
        (body,) = asked(fakes, "complaints@8")
        assert (body["tool_choice"], body["skip_special_tokens"], body["tools"]) == ("none", False, asked_tools)

    written = '<tool_call>{"name": "refund", "arguments": {"b": 1, "a": 2}}</tool_call>'
    called = [{"id": "c", "type": "function", "function": {"name": "refund", "arguments": '{"a":2,"b":1}'}}]
    play(
        tmp_path, scene, Behaviour(answers={"hello": written}),
        seven=Behaviour(answers={"hello": {"content": None, "tool_calls": called}}),
    )  # fmt: skip


def test_tool_calls_in_a_stream_are_compared_as_calls(tmp_path: Path) -> None:
    def call(number: int, arguments: str) -> dict[str, Any]:
        made = {
            "index": 0,
            "id": f"c{number}",
            "type": "function",
            "function": {"name": "refund", "arguments": arguments},
        }
        return {"content": None, "tool_calls": [made]}

    async def scene(running: Running, _: FakeCommand) -> None:
        await begin(running)
        tools = [{"type": "function", "function": {"name": "refund", "parameters": {"type": "object"}}}]
        await running.ask("hello", stream=True, tools=tools)
        (found,) = await pairs(tmp_path, 1)
        assert found["agrees"] is True

    open_answers = SEVEN.model_copy(update={"decoding": SEVEN.decoding.model_copy(update={"choices": ()})})
    assert open_answers.engine == SEVEN.engine

    async def opened(running: Running, fakes: FakeCommand) -> None:
        running.books.move_traffic(
            "complaints", open_answers, None, from_revision=1, by="a", why="b", ready=lambda _: True
        )
        await scene(running, fakes)

    play(
        tmp_path, opened, Behaviour(answers={"hello": call(1, '{"id": 5, "all": true}')}),
        seven=Behaviour(answers={"hello": call(2, '{"all":true,"id":5}')}),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"model": "complaints@7"}, "who insists on a version is no part of the name's traffic"),
        ({"n": 2}, "two answers are not one"),
        ({"text": "fail"}, "the live version has not answered"),
    ],
)
def test_what_is_not_compared(tmp_path: Path, fields: dict[str, Any], why: str) -> None:
    async def scene(running: Running, fakes: FakeCommand) -> None:
        await begin(running)
        if fields.get("text") == "fail":
            fakes.behave("complaints@7", Behaviour(status=500))
        await running.ask(**fields)
        fakes.behave("complaints@7", Behaviour())
        await running.ask("after", headers={"x-request-id": "after"})
        assert [row["id"] for row in await pairs(tmp_path, 1)] == ["after"], why
        assert len(asked(fakes, "complaints@8")) == 1

    play(tmp_path, scene)


def test_disagreements_wait_for_a_person(tmp_path: Path) -> None:
    desk = Desk()

    async def scene(running: Running, _: FakeCommand) -> None:
        await begin(running)
        await running.ask("same")
        await running.ask("my card", headers={"x-request-id": "r1"})
        await pairs(tmp_path, 2)
        (item,) = desk.items
        assert item is not None
        assert (item.id, item.name, item.version, item.reason) == (
            "r1", "complaints", "complaints@7", ReviewReason.DISAGREED,
        )  # fmt: skip
        assert (item.answer, item.other, item.choices) == ("card", "loan", ("card", "loan"))
        assert item.messages[-1] == {"role": "user", "content": "my card"}

    play(
        tmp_path, scene, Behaviour(answers={"same": "card", "my card": "loan"}), spool=desk,
        seven=Behaviour(answers={"same": "card", "my card": "card"}),
    )  # fmt: skip


def test_the_gateways_own_spool_has_a_disagreement_once_with_both_answers(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "reviews.db", SpoolSpec(mask=False), mask=None)

    async def scene(running: Running, _: FakeCommand) -> None:
        await begin(running)
        flagged = ReviewItem(
            id="r1", name="complaints", version="complaints@7", at=datetime.now(UTC), reason=ReviewReason.FLAGGED,
            messages=({"role": "user", "content": "my card"},), answer="card",
        )  # fmt: skip
        spool.put(flagged)  # as the gateway does when the answer is below its threshold
        await running.ask("my card", headers={"x-request-id": "r1"})
        until = time.monotonic() + 20.0
        while not (found := spool.items("complaints", 10)) or found[0].reason is not ReviewReason.DISAGREED:
            assert time.monotonic() < until, found
            await asyncio.sleep(0.02)
        assert [(one.id, one.answer, one.other) for one in found] == [("r1", "card", "loan")]

    try:
        play(
            tmp_path, scene, Behaviour(answers={"my card": "loan"}), spool=spool,
            seven=Behaviour(answers={"my card": "card"}),
        )  # fmt: skip
    finally:
        spool.close()


# -- a vendor ---------------------------------------------------------------------------------------------------------


class Service:
    """A vendor's service, which is not a vLLM."""

    def __init__(self, answer: str = "card") -> None:
        self.answer = answer
        self.asked: list[tuple[str, dict[bytes, bytes], Any]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        self.asked.append((scope["path"], dict(scope["headers"]), json.loads(message["body"])))
        record = {
            "choices": [{"index": 0, "message": {"role": "assistant", "content": self.answer}}],
            "usage": {"prompt_tokens": 1_000, "completion_tokens": 500},
        }  # fmt: skip
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(record).encode()})


def test_a_vendor_is_asked_with_the_instruction_its_own_key_and_nothing_of_the_callers(tmp_path: Path) -> None:
    service = Service()

    async def scene(running: Running, _: FakeCommand) -> None:
        async with listening(service) as port:
            vendor = Vendor(url=f"http://127.0.0.1:{port}/v1/", model="large-1", input_price=2.0, output_price=8.0)
            assert (await begin(running, vendor)).status == 200
            headers = {"Authorization": "Bearer a-clients-key", "x-secret": "y"}
            answer = await running.ask("hello", user="ben", headers=headers)
            assert answer.text == "card"
            (found,) = await pairs(tmp_path, 1)
        assert (found["shadow"], found["agrees"], found["shadow_cost"]) == ("large-1", True, pytest.approx(0.006))
        assert (found["prompt_tokens"], found["completion_tokens"], found["live_cost"]) == (1_000, 500, None)
        ((path, headers_there, body),) = service.asked
        assert path == "/v1/chat/completions"
        assert headers_there[b"authorization"] == b"Bearer vendors-key"
        assert b"x-secret" not in headers_there
        assert body == {
            "model": "large-1", "temperature": 0, "max_tokens": 8, "stream": False,
            "messages": [
                {"role": "system", "content": "Which product is it about?"}, {"role": "user", "content": "hello"},
            ],
        }  # fmt: skip
        assert b"vendors-key" not in b"".join(path.read_bytes() for path in (tmp_path / "serving").rglob("*.json"))

    play(tmp_path, scene, fill_in=True, vendor_key="vendors-key")


@pytest.mark.parametrize(
    ("url", "options", "says"),
    [
        ("http://vendor.example/v1", {"vendor_key": "k"}, "would go to the vendor in the clear"),
        ("https://ann:secret@vendor.example/v1", {"vendor_key": "k"}, "address holds a user or password"),
        ("https://vendor.example/v1", {}, "The gateway has no key for the vendor"),
        ("https://vendor.example/v1", {"vendor_key": "k", "mask": None}, "was given nothing that masks"),
    ],
)
def test_a_vendor_that_must_not_be_asked_is_refused(
    tmp_path: Path, url: str, options: dict[str, Any], says: str
) -> None:
    async def scene(running: Running, _: FakeCommand) -> None:
        refused = await begin(running, Vendor(url=url, model="m"))
        assert (refused.status, says in refused.error["message"]) == (400, True), refused.data
        assert running.books.traffic("complaints").shadow is None  # type: ignore[union-attr]
        assert not (tmp_path / "serving" / "shadow" / "first").exists()

    play(tmp_path, scene, **options)


# -- callers never notice ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [
        (Behaviour(status=500), "HTTP 500"),
        (Behaviour(drop="before"), "it cannot be reached (ServerDisconnectedError)"),
        (Behaviour(poisoned="html"), "what it said is no answer"),
        (Behaviour(poisoned="null"), "what it said is no answer"),
        (Behaviour(delay=30.0), "no answer in time"),
    ],
)
def test_a_shadow_that_gives_no_answer_is_a_pair_without_one(tmp_path: Path, behaviour: Behaviour, error: str) -> None:
    desk = Desk()

    async def scene(running: Running, _: FakeCommand) -> None:
        await begin(running)
        answer = await running.ask("hello")
        assert (answer.status, answer.text) == (200, "complaints@7: hello")
        (found,) = await pairs(tmp_path, 1)
        assert (found["agrees"], found["error"], found["shadow_answer"], found["shadow_ms"]) == (None, error, "", None)
        assert desk.items == []
        assert await metric(running, 'goldgate_shadow_requests_total{name="complaints",outcome="failed"}') == 1.0

    play(tmp_path, scene, behaviour, spool=desk, seconds=0.3 if behaviour.delay else 30.0)


def test_a_shadow_that_hangs_holds_up_nobody_and_what_is_too_much_is_counted(tmp_path: Path) -> None:
    async def scene(running: Running, fakes: FakeCommand) -> None:
        await begin(running)
        answers = await asyncio.gather(*(running.ask(f"text {number}") for number in range(40)))
        assert {answer.status for answer in answers} == {200}
        # two are asked, up to three wait, and the others were let go
        assert 35 <= await metric(running, 'goldgate_shadow_dropped_total{reason="queue_full"}') <= 37
        assert len(asked(fakes, "complaints@8")) == 2
        assert running.gateway.public.active == 0

    play(tmp_path, scene, Behaviour(delay=60.0), at_a_time=2, queue_size=3)


def test_a_shadow_that_nobody_can_reach_is_counted_and_left_alone(tmp_path: Path) -> None:
    async def scene(running: Running, _: FakeCommand) -> None:
        await begin(running)
        running.host.add(EIGHT, "http://127.0.0.1:9/v1")
        assert (await running.ask("hello")).status == 200
        (found,) = await pairs(tmp_path, 1)
        assert found["error"].startswith("it cannot be reached (")
        assert running.host.suspected == []
        running.host.endpoints.pop(EIGHT.engine)
        assert (await running.ask("hello")).status == 200
        await until_metric(running, 'goldgate_shadow_dropped_total{reason="not_ready"}', 1.0)

    play(tmp_path, scene)


def test_an_answer_without_end_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.serving.gateway.shadowing._MOST_BYTES", 1_000)

    async def scene(running: Running, _: FakeCommand) -> None:
        await begin(running)
        assert (await running.ask("hello")).status == 200
        (found,) = await pairs(tmp_path, 1)
        assert (found["agrees"], found["error"]) == (None, "its answer is too long")

    play(tmp_path, scene, Behaviour(answers={"hello": "x " * 5_000}))


def test_pairs_that_cannot_be_written_are_no_callers_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(running: Running, _: FakeCommand) -> None:
        await begin(running)

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("tasks.serving.request_log.ParquetSink.write", full)
            assert (await running.ask("hello")).status == 200
            await until_metric(running, 'goldgate_shadow_requests_total{name="complaints",outcome="disagreed"}', 1.0)
            await asyncio.sleep(0.1)
        assert len(await pairs(tmp_path, 1)) == 1  # it was held, and is written when there is room again

    play(tmp_path, scene)


# -- its begin and its end --------------------------------------------------------------------------------------------


def test_it_ends_and_another_one_has_pairs_of_its_own(tmp_path: Path) -> None:
    async def scene(running: Running, fakes: FakeCommand) -> None:
        await begin(running)
        again = await begin(running, name="second")
        assert (again.status, "has a shadow already" in again.error["message"]) == (409, True)
        assert not (tmp_path / "serving" / "shadow" / "second").exists()
        await running.ask("one")
        await pairs(tmp_path, 1)
        kept_alive = await running.admin("DELETE", f"/engines/{EIGHT.engine}")
        assert (kept_alive.status, "goldgate shadow NAME --end" in kept_alive.error["message"]) == (409, True)
        ended = await running.admin("DELETE", "/shadow/complaints?by=Ada")
        assert (ended.json["shadow"], ended.json["by"]) == (None, "Ada")
        await running.ask("two")
        again = await begin(running)
        assert (again.status, "was a comparison with this id" in again.error["message"]) == (400, True)
        assert len(kept(tmp_path)) == 1
        await begin(running, name="second")
        await running.ask("three")
        await pairs(tmp_path, 1, "second")
        assert len(kept(tmp_path)) == 1
        assert len(asked(fakes, "complaints@8")) == 2
        assert (await running.admin("DELETE", f"/engines/{SEVEN.engine}")).status == 409

    play(tmp_path, scene)


def test_pairs_are_deleted_after_their_time_also_when_their_shadow_has_ended(tmp_path: Path) -> None:
    ended = tmp_path / "serving" / "shadow" / "ended"
    old, new = (ended / f"day={day}" for day in (datetime(2026, 1, 1).date(), datetime.now(UTC).date()))
    for folder in (old, new):
        folder.mkdir(parents=True)
    (ended / RECORD_FILE).write_text("{}")
    part = new / ".1.part"  # the thread that writes pairs is just writing it
    part.write_bytes(b"")

    async def scene(running: Running, _: FakeCommand) -> None:
        until = time.monotonic() + 20.0
        while old.exists() and time.monotonic() < until:
            await asyncio.sleep(0.02)
        assert (old.exists(), part.exists(), (ended / RECORD_FILE).exists()) == (False, True, True)

    play(tmp_path, scene, keep_days=7.0)


@pytest.mark.parametrize("name", ["", "../x", "a/b", "x" * 65])
def test_an_id_that_is_none_never_becomes_a_folder(tmp_path: Path, name: str) -> None:
    async def scene(running: Running, _: FakeCommand) -> None:
        refused = await begin(running, name=name)
        assert (refused.status, refused.error["type"]) == (400, "goldgate")
        assert list((tmp_path / "serving").glob("shadow/*")) == []

    play(tmp_path, scene)


def test_a_gateway_that_masks_nothing_needs_no_mask(tmp_path: Path) -> None:
    async def scene(running: Running, _: FakeCommand) -> None:
        assert isinstance(running.gateway.shadowing, Shadowing)
        assert (await begin(running)).status == 200
        await running.ask("ann owes")
        (found,) = await pairs(tmp_path, 1)
        assert found["live_answer"] == "complaints@7: ann owes"

    play(tmp_path, scene, mask=None, unmasked=True)
