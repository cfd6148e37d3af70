"""Which requests have a closed answer, what an answer says of its own confidence, and what of that a client gets."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import pytest

from tasks.contracts.prompt import Decoding
from tasks.contracts.serving import Trust
from tasks.serving.confidence import scaled
from tasks.serving.gateway.as_evaluated import left_open
from tasks.serving.gateway.closed import (
    NO_CHOICE,
    ODD,
    UNREADABLE,
    Closed,
    Read,
    closed_request,
    whole_events,
)
from tests.serving.records import version

TRUST = Trust(temperature=2.0, offset=-0.1, at=0.8, target_accuracy=0.95, reviewed=0.2, why="made up")
SEVEN = version(7).model_copy(update={"trust": TRUST})
CHOICES = {"structured_outputs": {"choice": ["card", "loan"]}}
GREEDY: dict[str, Any] = {"temperature": 0, **CHOICES}
NO = Read(None, None, True, "")


def closed(trust: Trust = TRUST, choices: tuple[str, ...] = ("card", "loan"), *, hidden: bool = True) -> Closed:
    return Closed(choices, trust, {}, hidden, "complaints@7")


def token(text: str, logprob: float = -0.05) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []}


def whole(said: Any, tokens: Sequence[Any] | None, **choice: Any) -> bytes:
    logprobs = None if tokens is None else {"content": list(tokens)}
    message = {"role": "assistant", "content": said}
    one = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": "stop", **choice}
    return json.dumps({"id": "x", "model": "complaints@7", "choices": [one], "usage": {"total_tokens": 3}}).encode()


def events(*parts: tuple[str, Sequence[dict[str, Any]] | None], usage: bool = False) -> bytes:
    """A stream as vLLM sends it: a head, the parts, an end."""

    def event(delta: dict[str, Any], tokens: Sequence[Any] | None = None, finish: str | None = None) -> bytes:
        logprobs = None if tokens is None else {"content": list(tokens)}
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return b"data: " + json.dumps({"id": "x", "model": "complaints@7", "choices": [choice]}).encode() + b"\n\n"

    told = event({"role": "assistant", "content": ""})
    told += b"".join(event({"content": text}, tokens) for text, tokens in parts)
    told += event({}, finish="stop")
    if usage:
        told += b'data: {"id":"x","choices":[],"usage":{"total_tokens":3}}\n\n'
    return told + b"data: [DONE]\n\n"


# -- which requests -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        {},  # all of it filled in
        {"temperature": 0},
        {"temperature": 0.0, "n": 1, "top_p": 1, "top_k": -1, "min_p": 0, "presence_penalty": 0},
        {"n": None, "stop": None, "tool_choice": None},
        {**GREEDY, "tools": None, "response_format": {"type": "text"}, "logit_bias": {}},
        GREEDY,
        {"structured_outputs": {"choice": ["loan", "card"]}},  # in whatever order
        {"stream": True, "seed": 7, "user": "u", "max_tokens": 4},
        {"logprobs": False},
        {"logprobs": None, "top_logprobs": None},
    ],
)
def test_closed_is_what_is_held_to_the_versions_own_choices(body: dict[str, Any]) -> None:
    asked = {"model": "complaints", "messages": [{"role": "user", "content": "hello"}], **body}
    found = closed_request(asked, left_open(asked, SEVEN, chat=True), SEVEN, chat=True)
    assert found is not None
    assert (found.choices, found.trust, found.hidden, found.label) == (("card", "loan"), TRUST, True, "complaints@7")
    assert found.fields["logprobs"] is True
    assert found.fields.get("top_logprobs") == (0 if "top_logprobs" in body else None)


@pytest.mark.parametrize(
    "body",
    [
        {"temperature": 0.7},
        {"temperature": None},  # vLLM draws at 1.0
        {"n": 2},
        {"top_p": 0.9},
        {"top_k": 5},
        {"min_p": 0.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"repetition_penalty": 1.1},
        {"logit_bias": {"7": 5}},
        {"bad_words": ["card"]},
        {"allowed_token_ids": [1]},
        {"min_tokens": 2},
        {"stop": "ar"},
        {"echo": True},
        {"use_beam_search": True},
        {"return_tokens_as_token_ids": True},
        {"structured_outputs": {"choice": ["card", "loan", "dog"]}},
        {"structured_outputs": {"choice": "card"}},
        {"structured_outputs": {"choice": [["card"], "loan"]}},
        {"structured_outputs": {"regex": "card|loan"}},
        {"structured_outputs": {"choice": ["card", "loan"], "regex": "."}},
        {"structured_outputs": None},
        {"response_format": {"type": "json_object"}},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {**GREEDY, "tools": [{"type": "function", "function": {"name": "f"}}]},
        {**GREEDY, "tool_choice": "auto"},
        {"messages": [{"role": "system", "content": "Say something else."}, {"role": "user", "content": "x"}]},
        {"top_logprobs": 3},  # without `logprobs`, which the engine refuses
    ],
)
def test_what_may_change_the_probabilities_has_no_confidence(body: dict[str, Any]) -> None:
    asked = {"model": "complaints", "messages": [{"role": "user", "content": "hello"}], **body}
    assert closed_request(asked, left_open(asked, SEVEN, chat=True), SEVEN, chat=True) is None


def test_only_chats_of_a_version_with_trust_and_choices_are_closed() -> None:
    open_ended = SEVEN.model_copy(update={"decoding": Decoding(max_new_tokens=8)})
    assert closed_request(GREEDY, {}, SEVEN, chat=True) is not None
    assert closed_request(GREEDY, {}, SEVEN, chat=False) is None
    assert closed_request(GREEDY, {}, version(7), chat=True) is None
    assert closed_request(GREEDY, {}, open_ended, chat=True) is None
    assert closed_request(CHOICES, {}, SEVEN, chat=True) is None  # nobody says the temperature


@pytest.mark.parametrize("logprobs", [{"logprobs": True}, {"logprobs": True, "top_logprobs": 2}])
def test_who_asks_for_log_probabilities_gets_them(logprobs: dict[str, Any]) -> None:
    found = closed_request({**GREEDY, **logprobs}, {}, SEVEN, chat=True)
    assert found is not None
    assert (found.hidden, dict(found.fields)) == (False, {})


# -- answers that come at once --------------------------------------------------------------------------------------


def test_confidence_is_the_probability_of_the_answer_and_is_scaled_as_dev_says() -> None:
    body = whole("card", [token("ca", -0.1), token("rd", -3.0), token("", -4.0)])
    read, shown = closed().whole(body)
    assert read.confidence == pytest.approx(math.exp(-0.1))  # "ca" settles it; what follows only spells it out
    assert read.certainty == pytest.approx(scaled(math.exp(-0.1), 2.0, -0.1))
    assert (read.flagged, read.why, read.shown) == (False, "", read.certainty)
    record, was = json.loads(shown), json.loads(body)
    assert record["choices"][0].pop("logprobs") is None
    assert was["choices"][0].pop("logprobs") is not None
    assert record == was


@pytest.mark.parametrize(
    ("logprob", "at", "flagged"),
    [(-0.1, 0.8, False), (-0.3, 0.8, True), (0.0, 1.0, False), (-9.0, 0.0, False), (0.0, None, True)],
)
def test_the_threshold_is_held_against_the_models_own_confidence(
    logprob: float, at: float | None, flagged: bool
) -> None:
    trust = TRUST.model_copy(update={"at": at})
    assert closed(trust).whole(whole("card", [token("card", logprob)]))[0].flagged is flagged


def test_without_calibration_the_models_own_confidence_is_shown() -> None:
    trust = TRUST.model_copy(update={"temperature": None, "offset": None})
    read, _ = closed(trust).whole(whole("card", [token("card", -0.1)]))
    assert (read.certainty, read.flagged) == (None, False)
    assert read.shown == read.confidence == pytest.approx(math.exp(-0.1))


def test_a_client_who_asked_gets_its_answer_to_the_byte() -> None:
    body = whole("card", [token("card")])
    read, shown = closed(hidden=False).whole(body)
    assert (shown, read.flagged) == (body, False)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (whole("car", [token("car")]), NO_CHOICE),  # cut by max_tokens
        (whole("card ", [token("card ")]), NO_CHOICE),
        (whole("", []), NO_CHOICE),
        (whole(None, [token("card")]), NO_CHOICE),
        (whole(["card"], [token("card")]), NO_CHOICE),
        (whole(None, None, tool_calls=[{"function": {"name": "f"}}]), NO_CHOICE),
        (whole("card", None), ODD),
        (whole("card", []), ODD),
        (whole("card", [token("loan")]), ODD),
        (whole("card", [token("card", float("nan"))]), UNREADABLE),  # no JSON
        (whole("card", [{"token": "card", "logprob": None, "bytes": [99]}]), ODD),
        (whole("card", [{"token": "card", "logprob": -0.1}]), ODD),
        (whole("card", [{"token": "card", "logprob": -0.1, "bytes": 10**15}]), ODD),
        (whole("card", [{"token": "card", "logprob": -0.1, "bytes": [999]}]), ODD),
        (whole("card", ["card"]), ODD),
        (whole("card", [token("card")], logprobs=["what"]), ODD),
        (b'{"choices": []}', UNREADABLE),
        (b'{"choices": [{"message": {"content": "card"}}, {"message": {"content": "card"}}]}', UNREADABLE),
        (b'{"choices": {"0": 1}}', UNREADABLE),
        (b'{"choices": [{"message": null}]}', UNREADABLE),
        (b"[]", UNREADABLE),
        (b"<html>", UNREADABLE),
        (b"", UNREADABLE),
    ],
)
def test_whatever_an_engine_says_is_answered_and_looked_at(body: bytes, why: str) -> None:
    read, shown = closed().whole(body)
    assert read == NO._replace(why=why)
    if why == UNREADABLE:
        assert shown == body
    else:
        assert json.loads(shown)["choices"][0]["message"] == json.loads(body)["choices"][0]["message"]
        assert json.loads(shown)["choices"][0]["logprobs"] is None


def test_an_answer_that_another_one_begins_with_is_settled_by_its_end() -> None:
    both = closed(choices=("card", "card_fraud"))
    read, _ = both.whole(whole("card", [token("card", -0.2), token("", -0.3)]))
    assert read.confidence == pytest.approx(math.exp(-0.5))
    assert both.whole(whole("card", [token("card", -0.2)]))[0] == NO._replace(why=ODD)  # no end token
    read, _ = both.whole(whole("card_fraud", [token("card", -0.2), token("_fraud", -0.4)]))
    assert read.confidence == pytest.approx(math.exp(-0.6))


def test_an_impossible_answer_has_the_confidence_zero() -> None:
    read, _ = closed().whole(whole("card", [token("card", -9999.0)]))
    assert (read.confidence, read.flagged) == (0.0, True)


# -- answers that come in events ------------------------------------------------------------------------------------

STREAM = events(("ca", [token("ca", -0.1)]), ("rd", [token("rd", -0.2)]), ("", [token("", -0.3)]), usage=True)
PLAIN = events(("ca", None), ("rd", None), ("", None), usage=True)


def records(stream: bytes) -> list[Any]:
    return [
        one if one == b"[DONE]" else json.loads(one) for one in stream.replace(b"data: ", b"").split(b"\n\n") if one
    ]


def fed(stream: bytes, asked: Closed, cuts: Sequence[int], longest: int = 10_000) -> tuple[bytes, Read]:
    """Hand a stream over as the gateway does, in pieces that end at the cuts."""
    reading, got, rest = asked.stream(), b"", b""
    for start, end in zip((0, *cuts), (*cuts, len(stream)), strict=True):
        whole_ones, rest = whole_events(rest + stream[start:end], longest)
        got += reading.events(whole_ones)
    return got + reading.events(rest), reading.read()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 200, 10_000])
def test_a_stream_cut_anywhere_says_the_same(size: int) -> None:
    got, read = fed(STREAM, closed(), range(size, len(STREAM), size))
    assert records(got) == records(PLAIN)
    assert got.endswith(b"data: [DONE]\n\n")
    assert read.confidence == pytest.approx(math.exp(-0.1))
    assert (read.flagged, read.why) == (False, "")


def test_every_cut_in_two_says_the_same() -> None:
    for cut in range(1, len(STREAM)):
        assert fed(STREAM, closed(), [cut]) == fed(STREAM, closed(), [])


def test_several_tokens_in_one_event_are_read_in_order() -> None:
    stream = events(("card", [token("c", -0.5), token("ard", -0.25)]))
    assert fed(stream, closed(), [])[1].confidence == pytest.approx(math.exp(-0.5))


def test_a_client_who_asked_gets_its_stream_to_the_byte() -> None:
    got, read = fed(STREAM, closed(hidden=False), [])
    assert got == STREAM
    assert read.confidence == pytest.approx(math.exp(-0.1))


def test_what_needs_no_change_passes_to_the_byte() -> None:
    stream = b": still here\n\n" + PLAIN + b"event: odd\ndata: 1\n\n"
    got, read = fed(stream, closed(), [])
    assert (got, read) == (stream, NO._replace(why=ODD))


@pytest.mark.parametrize(
    ("stream", "why"),
    [
        (events(("ca", [token("ca")])), NO_CHOICE),
        (events(("loan", [token("card")])), ODD),
        (events(("card", [token("card")])).replace(b"\n\n", b"\n\ndata: {broken\n\n", 1), UNREADABLE),
        (events(("card", [token("card")])).replace(b"[DONE]", b'{"error": {"message": "dead"}}'), UNREADABLE),
        (b'data: {"choices": [{"delta": null}]}\n\n', UNREADABLE),
        (b'data: {"choices": [1, 2]}\n\n', UNREADABLE),
        (b"data: [DONE]\n\n", UNREADABLE),
        (b"", UNREADABLE),
    ],
)  # fmt: skip
def test_a_stream_that_is_odd_passes_and_is_looked_at(stream: bytes, why: str) -> None:
    got, read = fed(stream, closed(), [])
    assert read == NO._replace(why=why)
    assert b'"bytes"' not in got
    assert got.count(b"\n\n") == stream.count(b"\n\n")


def test_a_stream_that_ends_within_an_event_passes_on_what_came() -> None:
    got, read = fed(STREAM.removesuffix(b"data: [DONE]\n\n"), closed(), [])
    assert records(got) == records(PLAIN)[:-1]
    assert read.confidence == pytest.approx(math.exp(-0.1))
    got, read = fed(STREAM[:-20], closed(), [])
    assert got.endswith(STREAM[:-20].split(b"\n\n")[-1])
    assert read == NO._replace(why=UNREADABLE)


@pytest.mark.parametrize(
    ("data", "longest", "cut"),
    [
        (b"", 10, (b"", b"")),
        (b"ab", 10, (b"", b"ab")),
        (b"ab\n", 10, (b"", b"ab\n")),
        (b"ab\n\n", 10, (b"ab\n\n", b"")),
        (b"ab\n\ncd\n\ne", 10, (b"ab\n\ncd\n\n", b"e")),
        (b"abcdefghij", 10, (b"abcdefghij", b"")),  # no event is so long
    ],
)
def test_streams_are_cut_behind_whole_events(data: bytes, longest: int, cut: tuple[bytes, bytes]) -> None:
    assert whole_events(data, longest) == cut
