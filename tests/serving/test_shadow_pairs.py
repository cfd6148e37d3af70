"""Whether two answers say the same, what a vendor is asked, and how pairs are kept and read again."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tasks.contracts.errors import SpecError, StoreError
from tasks.contracts.observe import Preferred, ShadowSpec
from tasks.contracts.serving import Shadow, Vendor
from tasks.serving.request_log import ParquetSink, read_answer
from tasks.serving.shadow_pairs import (
    RECORD_FILE,
    Pair,
    ShadowRecord,
    agree,
    find_record,
    pair_row,
    pair_schema,
    preferred,
    read_comparison,
    vendor_body,
    vendor_cost,
)
from tests.serving.records import version

VENDOR = Vendor(url="https://vendor.example/v1", model="large-1", input_price=2.0, output_price=8.0)
START = datetime(2026, 3, 1, 12, tzinfo=UTC)


def calls(*given: tuple[str, str]) -> str:
    """Calls as the protocol has them, with ids that differ each time."""
    return json.dumps(
        [
            {"id": f"call-{number}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for number, (name, arguments) in enumerate(given)
        ]
    )


@pytest.mark.parametrize(
    ("one", "other", "closed", "tools", "same"),
    [
        ("card", " card\n", True, False, True),
        ("card", "Card", True, False, False),
        ("credit card", "credit  card", True, False, False),
        ("credit card", "credit\n card ", False, False, True),
        ("a card", "a loan", False, False, False),
        ('{"a": 1, "b": [1, 2]}', '{"b":[1,2.0],"a":1.0}', False, False, True),
        ('{"a": 1}', '{"a": true}', False, False, False),
        ('{"a": [1, 2]}', '{"a": [2, 1]}', False, False, False),
        ('{"a": NaN}', '{"a":NaN}', False, False, False),  # no JSON, and other words
        ("1", "1.0", False, False, False),  # words, not documents
        ("[" * 100_000, "[" * 100_000, False, False, True),
        # calls, in whatever order, with whatever ids, as the protocol has them or as a template writes them
        (calls(("refund", '{"id": 5}')), '[{"arguments": {"id": 5}, "name": "refund"}]', False, True, True),
        (calls(("a", "{}"), ("b", "{}")), calls(("b", "{}"), ("a", "{}")), False, True, True),
        (calls(("refund", '{"id": 5}')), calls(("refund", '{"id": 6}')), False, True, False),
        (calls(("refund", "{}")), "I cannot do that.", False, True, False),
        ("I cannot do that.", "I  cannot do that.", False, True, True),
        # a list of people is no list of calls where there are no tools
        ('[{"name": "Ann", "age": 3}]', '[{"name": "Ann", "age": 4}]', False, False, False),
    ],
)
def test_whether_they_agree(one: str, other: str, closed: bool, tools: bool, same: bool) -> None:
    assert agree(one, other, closed=closed, tools=tools) is same
    assert agree(other, one, closed=closed, tools=tools) is same


@pytest.mark.parametrize(
    ("right", "live", "shadow", "expected"),
    [
        ("card", "card", "loan", Preferred.LIVE), ("loan", "card", "loan ", Preferred.SHADOW),
        ("debt", "card", "loan", Preferred.NEITHER), ("card", "card", "card", Preferred.BOTH),
    ],
)  # fmt: skip
def test_what_a_person_prefers(right: str, live: str, shadow: str, expected: Preferred) -> None:
    assert preferred(right, live, shadow, closed=True, tools=False) is expected


def test_a_call_that_comes_in_pieces_is_one_call() -> None:
    def event(**delta: object) -> bytes:
        return b"data: " + json.dumps({"choices": [{"index": 0, "delta": delta}]}).encode() + b"\n\n"

    def piece(index: int, **function: str) -> dict[str, Any]:
        return {"index": index, "function": function}

    stream = [
        event(role="assistant", content=""),
        event(tool_calls=[piece(0, name="refund", arguments="") | {"id": "c0", "type": "function"}]),
        event(tool_calls=[piece(0, arguments='{"id"')]),
        event(tool_calls=[piece(0, arguments=": 5}"), piece(1, name="close", arguments="{}")]),
        b"data: [DONE]\n\n",
    ]
    streamed = read_answer(stream, stream=True).text
    assert json.loads(streamed)[0]["function"] == {"name": "refund", "arguments": '{"id": 5}'}
    assert agree(streamed, calls(("close", "{}"), ("refund", '{"id":5}')), closed=False, tools=True)


def test_a_vendor_is_asked_nothing_that_only_vllm_knows() -> None:
    body = {
        "model": "complaints", "messages": [{"role": "user", "content": "x"}], "temperature": 1.0, "max_tokens": 8,
        "structured_outputs": {"choice": ["card"]}, "stream": True, "user": "ann", "top_k": 5, "logprobs": True,
        "tools": [], "chat_template_kwargs": {},
    }  # fmt: skip
    assert vendor_body(body, VENDOR) == {
        "model": "large-1", "messages": [{"role": "user", "content": "x"}], "temperature": 0, "max_tokens": 8,
        "tools": [], "stream": False,
    }  # fmt: skip


def test_what_an_answer_costs() -> None:
    assert vendor_cost(VENDOR, 1_000, 500) == pytest.approx(0.006)
    assert vendor_cost(VENDOR, 1_000, None) is None
    assert vendor_cost(VENDOR.model_copy(update={"output_price": None}), 1_000, 500) is None


def record(folder: Path, name: str = "complaints", shadow: str = "first", since: datetime = START) -> ShadowRecord:
    found = ShadowRecord(
        name=name, closed=True, tools=False,
        shadow=Shadow(id=shadow, version=version(8, name), spec=ShadowSpec(), since=since),
    )  # fmt: skip
    (folder / shadow).mkdir(parents=True)
    (folder / shadow / RECORD_FILE).write_text(found.model_dump_json())
    return found


def pair(number: int, agrees: bool | None, **fields: Any) -> Pair:
    known: dict[str, Any] = {
        "at": (START + timedelta(minutes=number)).timestamp(), "id": f"r{number}", "key": f"k{number}",
        "name": "complaints", "live": "complaints@7", "shadow": "complaints@8", "live_answer": "card",
        "shadow_answer": "card" if agrees else "loan", "live_ms": 10.0, "shadow_ms": 12.0,
    }  # fmt: skip
    return Pair(agrees=agrees, **(known | fields))


def test_pairs_come_back_with_what_people_said(tmp_path: Path) -> None:
    kept = record(tmp_path)
    sink = ParquetSink(tmp_path / "first", pair_schema)
    given = [
        pair(0, True, live="complaints@6"), pair(1, True), pair(2, False), pair(3, False, shadow_cost=0.25),
        pair(4, None, error="HTTP 500", shadow_answer="", shadow_ms=None), pair(5, False),
    ]  # fmt: skip
    sink.write([pair_row(one, None) for one in given[3:]])
    sink.write([pair_row(one, None) for one in given[:3]])
    found = read_comparison(tmp_path / "first", kept, {"r1": "loan", "r2": "card", "r3": "loan", "r5": "debt"})
    assert (found.live, found.other_live, found.shadow_cost, found.errors) == ("complaints@7", 1, 0.25, {"HTTP 500": 1})
    assert [(one.key, one.agrees, one.review) for one in found.pairs] == [
        ("k1", True, None),  # they agree: what a person said of it tells nothing
        ("k2", False, Preferred.LIVE), ("k3", False, Preferred.SHADOW), ("k4", None, None),
        ("k5", False, Preferred.NEITHER),
    ]  # fmt: skip
    assert found.pairs[0].at == START + timedelta(minutes=1)


def test_answers_are_masked_and_cut_before_they_are_written() -> None:
    row = pair_row(
        pair(0, False, live_answer="ann owes", shadow_answer="ann" * 200_000),
        lambda text: text.replace("ann", "[NAME]"),
    )
    assert row["live_answer"] == "[NAME] owes"
    assert row["shadow_answer"].startswith("[NAME][NAME]")
    assert row["shadow_answer"].count("[NAME]") == 66_666
    assert row["at"] == START


def test_the_newest_comparison_of_a_name_is_found(tmp_path: Path) -> None:
    record(tmp_path, shadow="old")
    newest = record(tmp_path, shadow="new", since=START + timedelta(days=1))
    record(tmp_path, name="prices", shadow="other", since=START + timedelta(days=2))
    assert find_record(tmp_path, "complaints", None) == (tmp_path / "new", newest)
    assert find_record(tmp_path, "complaints", "old")[0] == tmp_path / "old"
    with pytest.raises(SpecError, match="complaints has had no shadow other here"):
        find_record(tmp_path, "complaints", "other")
    with pytest.raises(SpecError, match="No request has been answered by the shadow yet"):
        read_comparison(tmp_path / "new", newest, {})
    (tmp_path / "new" / RECORD_FILE).write_text("{")
    with pytest.raises(StoreError, match="record of a shadow cannot be read"):
        find_record(tmp_path, "complaints", None)
