"""Which answers a gateway puts aside for people, as what, and how they are fetched."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tasks.contracts.prompt import Prompt, Shot
from tasks.contracts.review import ReviewItem, SpoolSpec
from tasks.contracts.serving import Trust, VersionRef
from tasks.serving.gateway.reviews import drawn, without_prefix
from tasks.serving.review.spool import SPOOL_FILE, Spool
from tests.serving.fake_engine import Behaviour
from tests.serving.records import version
from tests.serving.running import ADMIN_KEY, Host, Running, engine, gateway
from tests.serving.test_review_spool import OPEN

TRUSTED = version(7).model_copy(
    update={"trust": Trust(temperature=1.0, offset=0.0, at=0.9, target_accuracy=0.9, reviewed=0.2, why="made up")}
)
SURE_AND_NOT = Behaviour(
    answers={"sure": "card", "unsure": "loan", "open": "card"}, logprob=-0.01, confidences={"unsure": -1.0}
)


@asynccontextmanager
async def serving(
    tmp_path: Path, spec: SpoolSpec = OPEN, behaviour: Behaviour = SURE_AND_NOT, served: VersionRef = TRUSTED
) -> AsyncIterator[tuple[Running, Spool]]:
    (tmp_path / "serving").mkdir()
    spool = Spool(tmp_path / "serving" / SPOOL_FILE, spec, mask=None)
    host = Host()
    try:
        async with (
            engine(host, served, tmp_path / "fakes", behaviour),
            gateway(tmp_path, host, fill_in=True, spool=spool) as running,
        ):
            running.live(served)
            yield running, spool
    finally:
        spool.close()


async def waiting(spool: Spool, count: int) -> list[ReviewItem]:
    for _ in range(1000):
        if spool.waiting().get("complaints", 0) >= count:
            break
        await asyncio.sleep(0.01)
    found = spool.items("complaints", 100)
    assert len(found) == count
    return found


def test_flagged_answers_wait_for_a_person_and_sure_ones_do_not(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path, SpoolSpec(mask=False, sample=0.0)) as (running, spool):
            sure = await running.ask("sure", headers={"x-request-id": "one"})
            unsure = await running.ask("unsure", headers={"x-request-id": "two"})
            streamed = await running.ask("unsure", stream=True, headers={"x-request-id": "three"})
            assert (sure.text, unsure.text, streamed.streamed) == ("card", "loan", "loan")
            two, three = await waiting(spool, 2)
            assert (two.id, three.id) == ("two", "three")
            assert (two.name, two.version, two.reason.value, two.answer) == (
                "complaints", "complaints@7", "flagged", "loan",
            )  # fmt: skip
            # Neither instruction nor what the gateway has filled in is part of the item.
            assert two.messages == ({"role": "user", "content": "unsure"},)
            assert two.choices == ("card", "loan")
            assert two.confidence is not None
            assert two.confidence < 0.9
            assert three.answer == "loan"

    asyncio.run(run())


def test_a_share_is_drawn_by_their_ids(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path, SpoolSpec(mask=False, sample=0.3)) as (running, spool):
            ids = [f"id-{number}" for number in range(40)]
            for one in ids:
                await running.ask("sure", headers={"x-request-id": one})
            expected = {one for one in ids if drawn(one, 0.3)}
            assert 4 < len(expected) < 22
            found = await waiting(spool, len(expected))
            assert {one.id for one in found} == expected
            assert {one.reason.value for one in found} == {"sampled"}

    asyncio.run(run())


def test_the_sample_stands_for_all_answers_flagged_ones_among_them(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path, SpoolSpec(mask=False, sample=0.3)) as (running, spool):
            ids = [f"id-{number}" for number in range(20)]
            for one in ids:
                await running.ask("unsure", headers={"x-request-id": one})
            found = {one.id: one.reason.value for one in await waiting(spool, 20)}
            assert found == {one: "sampled" if drawn(one, 0.3) else "flagged" for one in ids}
            assert set(found.values()) == {"sampled", "flagged"}

    asyncio.run(run())


def test_what_was_not_answered_is_nobodys_to_review(tmp_path: Path) -> None:
    async def run() -> None:
        everything = SpoolSpec(mask=False, sample=1.0)
        async with serving(tmp_path, everything, Behaviour(fail_every=2, answers={"sure": "card"})) as (running, spool):
            statuses = [(await running.ask("sure", headers={"x-request-id": f"{n}"})).status for n in range(4)]
            assert statuses == [200, 502, 200, 502]
            unknown = await running.ask("sure", model="nobody")
            assert unknown.status == 404
            completion = await running.send("POST", "/v1/completions", {"model": "complaints", "prompt": "sure"})
            assert completion.status in (200, 502)
            assert [one.id for one in await waiting(spool, 2)] == ["0", "2"]

    asyncio.run(run())


def test_what_a_rollout_asks_is_not_put_aside(tmp_path: Path) -> None:
    """They are golden items: nobody may make rows of them, and nobody needs to look."""

    async def run() -> None:
        async with serving(tmp_path, SpoolSpec(mask=False, sample=1.0)) as (running, spool):
            gateways_own = {"Authorization": f"Bearer {ADMIN_KEY}"}
            for text, model in (("sure", "complaints@7"), ("unsure", "complaints@7"), ("unsure", "complaints")):
                assert (await running.ask(text, model, headers=gateways_own)).status == 200
            for number, headers in enumerate(({}, {"Authorization": "Bearer anything"})):
                pinned = {"x-request-id": f"pinned-{number}", **headers}
                assert (await running.ask("sure", "complaints@7", headers=pinned)).status == 200
            assert [one.id for one in await waiting(spool, 2)] == ["pinned-0", "pinned-1"]

    asyncio.run(run())


def test_a_stream_that_was_cut_is_not_put_aside(tmp_path: Path) -> None:
    async def run() -> None:
        everything = SpoolSpec(mask=False, sample=1.0)
        cut = Behaviour(answers={"long": "a b c"}, drop="during")
        plain = version(7).model_copy(update={"decoding": version(7).decoding.model_copy(update={"choices": ()})})
        async with serving(tmp_path, everything, cut, plain) as (running, spool):
            assert (await running.ask("long", stream=True)).status == 200
            await asyncio.sleep(0.2)
            assert spool.items("complaints", 10) == []

    asyncio.run(run())


def test_items_are_fetched_with_the_admin_key_and_forgotten_once_taken(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path, SpoolSpec(mask=False, sample=1.0)) as (running, spool):
            for number in range(3):
                await running.ask("sure", headers={"x-request-id": f"r{number}"})
            await waiting(spool, 3)
            for method, path in (("GET", "/admin/reviews/complaints"), ("POST", "/admin/reviews/complaints/taken")):
                assert (await running.send(method, path)).status == 401
            two = await running.admin("GET", "/reviews/complaints?limit=2")
            assert [one["id"] for one in two.json] == ["r0", "r1"]
            assert ReviewItem.model_validate(two.json[0]).answer == "card"
            assert (await running.admin("GET", "/reviews/nobody")).json == []
            for limit in ("0", "-1", "x", "100001"):
                refused = await running.admin("GET", f"/reviews/complaints?limit={limit}")
                assert (refused.status, refused.error["type"]) == (400, "goldgate")
            assert (await running.admin("POST", "/reviews/complaints/taken", {"names": []})).status == 400
            taken = await running.admin("POST", "/reviews/complaints/taken", {"ids": ["r0", "r1", "gone"]})
            assert taken.json == {"taken": 2}
            assert [one["id"] for one in (await running.admin("GET", "/reviews/complaints")).json] == ["r2"]

    asyncio.run(run())


def test_a_spool_that_cannot_be_read_is_said_and_answers_go_on(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path, SpoolSpec(mask=False, sample=1.0)) as (running, spool):
            spool.close()
            (tmp_path / "serving" / SPOOL_FILE).unlink(missing_ok=True)
            (tmp_path / "serving" / SPOOL_FILE).mkdir()
            refused = await running.admin("GET", "/reviews/complaints")
            assert (refused.status, refused.error["code"]) == (507, "store")
            assert "To fix" in refused.error["message"]
            assert (await running.ask("sure")).text == "card"

    asyncio.run(run())


SHOTS = Prompt(system="Which product is it about?", shots=(Shot(user="I lost it", assistant="card"),))
PREFIX = [
    {"role": "system", "content": "Which product is it about?"},
    {"role": "user", "content": "I lost it"},
    {"role": "assistant", "content": "card"},
]
OTHER = {"role": "system", "content": "Something else."}
ASKED = {"role": "user", "content": "hello"}


@pytest.mark.parametrize(
    ("messages", "left"),
    [
        ([ASKED], [ASKED]),
        ([*PREFIX, ASKED], [ASKED]),
        ([PREFIX[0], ASKED], [ASKED]),
        ([*PREFIX], [PREFIX[1], PREFIX[2]]),
        ([OTHER, ASKED], [OTHER, ASKED]),
        ([*PREFIX[1:], ASKED], [*PREFIX[1:], ASKED]),
    ],
    ids=["bare", "whole prefix", "instruction alone", "nothing else", "another instruction", "a conversation"],
)  # fmt: skip
def test_the_versions_own_instruction_is_no_part_of_an_item(
    messages: list[dict[str, Any]], left: list[dict[str, Any]]
) -> None:
    asked = version(1).model_copy(update={"prompt": SHOTS})
    assert without_prefix(messages, asked) == left
    assert without_prefix(messages, None) == messages


def test_the_draw_is_a_share_and_the_same_each_time() -> None:
    ids = [f"{number}" for number in range(4000)]
    assert sum(drawn(one, 0.25) for one in ids) == pytest.approx(1000, abs=120)
    assert not any(drawn(one, 0.0) for one in ids)
    assert all(drawn(one, 1.0) for one in ids)
    assert [drawn(one, 0.25) for one in ids] == [drawn(one, 0.25) for one in ids]
