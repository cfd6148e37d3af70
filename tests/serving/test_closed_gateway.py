"""How sure an answer is, at a gateway over real sockets: in headers, in the log and in the counts."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, cast

import pytest

from tasks.contracts.serving import Trust
from tasks.serving.confidence import scaled
from tasks.serving.request_log import Asked, RequestLog
from tests.serving.fake_engine import Behaviour, FakeCommand
from tests.serving.records import version
from tests.serving.running import Host, Running, engine, gateway

TRUST = Trust(temperature=2.0, offset=-0.1, at=0.8, target_accuracy=0.95, reviewed=0.2, why="made up")
SEVEN = version(7).model_copy(update={"trust": TRUST})
SURE, UNSURE = -0.1, -0.5
BEHAVIOUR = Behaviour(
    answers={"sure": "card", "unsure": "loan", "cut": "car", "odd": "card"},
    confidences={"sure": SURE, "unsure": UNSURE, "odd": 0.0},
)


class Kept:
    """In the log's place."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []

    def wants(self, request: str) -> bool:
        return True

    def offer(self, asked: Asked) -> None:
        self.asked.append(asked)


Scene = Callable[[Running, FakeCommand, Kept], Coroutine[Any, Any, None]]


def play(folder: Path, scene: Scene, trust: Trust | None = TRUST, *, fill_in: bool = True) -> None:
    """Play a scene in front of a gateway with complaints@7 live."""
    seven, kept = SEVEN.model_copy(update={"trust": trust}), Kept()

    async def run() -> None:
        host = Host()
        async with (
            engine(host, seven, folder / "fakes", BEHAVIOUR) as fakes,
            gateway(folder, host, fill_in=fill_in, log=cast(RequestLog, kept)) as running,
        ):
            running.live(seven)
            await scene(running, fakes, kept)

    asyncio.run(run())


def sureness(logprob: float) -> float:
    return scaled(math.exp(logprob), 2.0, -0.1)


def test_a_whole_answer_says_how_sure_it_is_and_whether_a_person_is_to_look(tmp_path: Path) -> None:
    async def scene(running: Running, fakes: FakeCommand, kept: Kept) -> None:
        for text, logprob, review in (("sure", SURE, "no"), ("unsure", UNSURE, "yes")):
            answer = await running.ask(text)
            assert answer.headers["x-goldgate-confidence"] == f"{sureness(logprob):.4f}"
            assert answer.headers["x-goldgate-review"] == review
            assert answer.headers["x-goldgate-version"] == "complaints@7"
            assert answer.json["choices"][0]["logprobs"] is None
            asked = kept.asked[-1]
            assert (asked.confidence, asked.certainty) == (
                pytest.approx(math.exp(logprob)), pytest.approx(sureness(logprob)),
            )  # fmt: skip
            assert asked.flagged is (review == "yes")
            assert b"".join(asked.answer) == answer.data
        assert [one["logprobs"] for one in fakes.requests("complaints@7")] == [True, True]
        assert "logprobs" not in kept.asked[0].body
        text = (await running.send("GET", "/metrics")).data.decode()
        assert 'goldgate_confidence_count{name="complaints"} 2.0' in text
        assert 'goldgate_flagged_total{name="complaints",version="complaints@7"} 1.0' in text
        assert "goldgate_no_confidence_total{" not in text

    play(tmp_path, scene)


def test_a_client_who_asks_for_log_probabilities_gets_them(tmp_path: Path) -> None:
    async def scene(running: Running, fakes: FakeCommand, kept: Kept) -> None:
        answer = await running.ask("sure", logprobs=True, top_logprobs=2)
        (token,) = answer.json["choices"][0]["logprobs"]["content"]
        assert (token["token"], token["logprob"]) == ("card", SURE)
        assert answer.headers["x-goldgate-confidence"] == f"{sureness(SURE):.4f}"
        streamed = await running.ask("sure", logprobs=True, stream=True)
        assert streamed.events[1]["choices"][0]["logprobs"]["content"][0]["logprob"] == SURE

    play(tmp_path, scene)


def test_the_log_probabilities_are_taken_out_of_a_stream_and_read(tmp_path: Path) -> None:
    async def scene(running: Running, fakes: FakeCommand, kept: Kept) -> None:
        answer = await running.ask("unsure", stream=True, stream_options={"include_usage": True})
        assert answer.streamed == "loan"
        assert answer.events[-1] == "[DONE]"
        assert answer.events[-2]["usage"]["completion_tokens"] == 1
        assert b'"bytes"' not in answer.data
        assert not {"x-goldgate-confidence", "x-goldgate-review"} & set(answer.headers)
        (asked,) = kept.asked
        assert asked.confidence == pytest.approx(math.exp(UNSURE))
        assert asked.flagged is True
        text = (await running.send("GET", "/metrics")).data.decode()
        assert 'goldgate_flagged_total{name="complaints",version="complaints@7"} 1.0' in text

    play(tmp_path, scene)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_no_choice_is_looked_at(tmp_path: Path, stream: bool) -> None:
    async def scene(running: Running, fakes: FakeCommand, kept: Kept) -> None:
        answer = await running.ask("cut", stream=stream)
        assert answer.status == 200
        if not stream:
            assert answer.headers["x-goldgate-review"] == "yes"
            assert "x-goldgate-confidence" not in answer.headers
        assert (kept.asked[0].confidence, kept.asked[0].certainty, kept.asked[0].flagged) == (None, None, True)
        text = (await running.send("GET", "/metrics")).data.decode()
        assert 'goldgate_no_confidence_total{name="complaints",reason="no_choice"} 1.0' in text

    play(tmp_path, scene)


@pytest.mark.parametrize("poisoned", ["empty", "null", "html"])
def test_odd_answers_go_out_as_before_and_are_looked_at(tmp_path: Path, poisoned: Any) -> None:
    async def scene(running: Running, fakes: FakeCommand, kept: Kept) -> None:
        fakes.behave("complaints@7", BEHAVIOUR.model_copy(update={"poisoned": poisoned}))
        answer = await running.ask("sure")
        assert (answer.status, answer.headers["x-goldgate-review"]) == (200, "yes")
        reason = "unreadable" if poisoned == "html" else "no_choice"
        text = (await running.send("GET", "/metrics")).data.decode()
        assert f'goldgate_no_confidence_total{{name="complaints",reason="{reason}"}} 1.0' in text

    play(tmp_path, scene)


@pytest.mark.parametrize(
    "fields",
    [{"temperature": 0.7}, {"n": 2}, {"tools": [{"type": "function", "function": {"name": "f"}}]}, {"logit_bias": {}}],
)
def test_other_requests_pass_untouched_and_say_nothing(tmp_path: Path, fields: dict[str, Any]) -> None:
    async def scene(running: Running, fakes: FakeCommand, kept: Kept) -> None:
        answer = await running.ask("sure", **fields)
        assert not {"x-goldgate-confidence", "x-goldgate-review"} & set(answer.headers)
        assert "logprobs" not in fakes.requests("complaints@7")[0]
        assert (kept.asked[0].confidence, kept.asked[0].flagged) == (None, None)

    play(tmp_path, scene)


def test_a_version_without_trust_says_nothing(tmp_path: Path) -> None:
    async def scene(running: Running, fakes: FakeCommand, kept: Kept) -> None:
        answer = await running.ask("sure")
        assert "x-goldgate-review" not in answer.headers
        assert "logprobs" not in fakes.requests("complaints@7")[0]
        assert kept.asked[0].flagged is None

    play(tmp_path, scene, trust=None)


def test_a_request_that_brings_the_choices_itself_is_closed_too(tmp_path: Path) -> None:
    async def scene(running: Running, fakes: FakeCommand, kept: Kept) -> None:
        answer = await running.ask("sure", structured_outputs={"choice": ["loan", "card"]})
        assert answer.headers["x-goldgate-review"] == "no"
        assert "x-goldgate-review" not in (await running.ask("sure")).headers  # nobody holds it to anything

    play(tmp_path, scene, fill_in=False)


def test_every_answer_is_looked_at_where_dev_has_shown_no_threshold(tmp_path: Path) -> None:
    async def scene(running: Running, fakes: FakeCommand, kept: Kept) -> None:
        answer = await running.ask("sure")
        assert answer.headers["x-goldgate-review"] == "yes"
        assert answer.headers["x-goldgate-confidence"] == f"{math.exp(SURE):.4f}"  # as the model gives it

    play(tmp_path, scene, trust=TRUST.model_copy(update={"temperature": None, "offset": None, "at": None}))


def test_an_engines_refusal_is_no_answer_to_look_at(tmp_path: Path) -> None:
    async def scene(running: Running, fakes: FakeCommand, kept: Kept) -> None:
        for status in (422, 500):
            fakes.behave("complaints@7", BEHAVIOUR.model_copy(update={"status": status}))
            answer = await running.ask("sure")
            assert answer.status == (422 if status == 422 else 502)
            assert "x-goldgate-review" not in answer.headers
            assert kept.asked[-1].flagged is None

    play(tmp_path, scene)


def test_a_stream_that_breaks_off_is_an_error_and_no_answer_to_look_at(tmp_path: Path) -> None:
    async def scene(running: Running, fakes: FakeCommand, kept: Kept) -> None:
        fakes.behave("complaints@7", Behaviour(answers={"sure": "card and more"}, drop="during"))
        answer = await running.ask("sure", stream=True)
        assert "error" in answer.events[-1]
        assert (kept.asked[0].flagged, kept.asked[0].error != "") == (None, True)

    play(tmp_path, scene)
