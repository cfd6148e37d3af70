"""Confidence from a real vLLM, through the gateway: the same number that evaluation has for the same answer."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest

from tasks.contracts.progress import ignore_progress
from tasks.contracts.prompt import Decoding, Prompt
from tasks.contracts.rows import Message, Row
from tasks.contracts.serving import Trust
from tasks.evaluation.engines.embedded import EmbeddedEngine
from tasks.evaluation.engines.engine import Answer
from tasks.serving.host import EngineHost
from tasks.serving.request_log import RequestLog
from tests.serving.real_engine import real_engine
from tests.serving.records import version
from tests.serving.running import Host, gateway
from tests.serving.test_closed_gateway import Kept

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

# One begins another, one is of several bytes a character, and they share first tokens.
LABELS = ("card", "card_fraud", "credit_reporting", "debt_collection", "loan", "student_loan", "prêt immobilier")
TEXTS = (
    "They reported a debt that is not mine.", "The bank charged a fee on my card.", "My student loan was sold.",
    "Somebody used my card in another country.", "Hello", "J'ai un prêt pour ma maison.",
)  # fmt: skip
SEVEN = version(7).model_copy(
    update={
        "prompt": Prompt(system="Which product is this complaint about?"),
        "decoding": Decoding(max_new_tokens=16, choices=LABELS),
        "trust": Trust(at=0.5, target_accuracy=0.9, reviewed=0.5, why="made up"),
    }
)


def test_it_is_the_number_that_evaluation_has(tmp_path: Path) -> None:
    from tests.tiny import small_model

    model = small_model(tmp_path / "model")
    rows = [Row(f"r{n}", n, (Message("user", text),), "card") for n, text in enumerate(TEXTS)]
    inside = EmbeddedEngine(model, batch_size=2, dtype="float32")
    expected = inside.answer(SEVEN.prompt, rows, SEVEN.decoding, ignore_progress)
    inside.close()
    with real_engine(tmp_path / "engines", SEVEN, model) as host:
        asyncio.run(_scene(tmp_path, host, expected))


async def _scene(tmp_path: Path, host: EngineHost, expected: list[Answer]) -> None:
    kept = Kept()
    async with gateway(tmp_path, cast(Host, cast(Any, host)), fill_in=True, log=cast(RequestLog, kept)) as running:
        running.live(SEVEN)
        wholes = [await running.ask(text) for text in TEXTS]
        assert [answer.text for answer in wholes] == [answer.prediction for answer in expected]
        confidences = [asked.confidence for asked in kept.asked]
        assert confidences == pytest.approx([answer.confidence for answer in expected], abs=1e-3)
        assert [answer.headers["x-goldgate-confidence"] for answer in wholes] == [f"{one:.4f}" for one in confidences]
        kept.asked.clear()

        # Several at a time, some of which are drawn at random, and as streams.
        others = [running.ask(text, temperature=1.0, top_p=0.5, seed=1) for text in TEXTS]
        streams = await asyncio.gather(*[running.ask(text, stream=True) for text in TEXTS], *others)
        assert [answer.streamed for answer in streams[: len(TEXTS)]] == [answer.prediction for answer in expected]
        assert all(b'"bytes"' not in answer.data for answer in streams)
        closed = {asked.body["messages"][0]["content"]: asked for asked in kept.asked if asked.body.get("stream")}
        assert [closed[text].confidence for text in TEXTS] == pytest.approx(confidences, abs=1e-3)
        assert [asked.confidence for asked in kept.asked if not asked.body.get("stream")] == [None] * len(TEXTS)
