"""How sure the answer to a request is that was held to a version's own choices.

The engine is asked for log-probabilities too, and what it says of them is taken out again where the client has not
asked for them. Nothing here fails a request: where the numbers do not add up, the answer has no confidence, and a
person looks at it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import orjson

from tasks.contracts.errors import EvaluationError
from tasks.contracts.serving import Trust, VersionRef
from tasks.logprobs import closed_answer_probability, read_logprobs
from tasks.serving.trust import sureness

NO_CHOICE = "no_choice"  # it was cut, or the engine ignored the choices
ODD = "odd_logprobs"  # log-probabilities that are missing, are no numbers or do not spell the answer
UNREADABLE = "unreadable"  # no JSON, or no answer in it

# What may change log-probabilities or answers, with the values that change nothing. Engines draw for several requests
# at a time, so what cuts off unlikely tokens counts even where nothing is drawn.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "top_p": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "use_beam_search": (False,),
    "ignore_eos": (False,),
    "echo": (False,),
    "continue_final_message": (False,),
    "return_tokens_as_token_ids": (False,),
    "logit_bias": ({},),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "stop": ("", []),
    "stop_token_ids": ([],),
    "logits_processors": ([],),
    "thinking_token_budget": (),
    "tools": ([],),
    "tool_choice": ("none",),
    "response_format": ({"type": "text"},),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
}
_DATA = b"data: "
_END = b"\n\n"


class Read(NamedTuple):
    """What an answer says of itself.

    Attributes:
        confidence: the probability of the answer among the choices, as the model gives it; None where there is none.
        certainty: the same, calibrated; None where nothing could be learnt, too.
        flagged: whether a person is to look.
        why: why there is no confidence, in one word; empty where there is one.
    """

    confidence: float | None
    certainty: float | None
    flagged: bool
    why: str

    @property
    def shown(self) -> float | None:
        """The number that people see: calibrated where that could be learnt."""
        return self.confidence if self.certainty is None else self.certainty


def without_confidence(why: str) -> Read:
    """An answer that a person has to look at, since nothing says how sure it is."""
    return Read(None, None, True, why)


class Closed(NamedTuple):
    """A request whose answer is one of the version's choices.

    Attributes:
        choices: the answers that are allowed.
        trust: of the version.
        fields: what the engine is asked beside what the client asks.
        hidden: whether the client has not asked for log-probabilities, so that it gets none.
        label: of the version.
    """

    choices: tuple[str, ...]
    trust: Trust
    fields: Mapping[str, Any]
    hidden: bool
    label: str

    def whole(self, body: bytes) -> tuple[Read, bytes]:
        """Read an answer that came at once; return it as the client gets it, too."""
        try:
            record = orjson.loads(body)
            (choice,) = record["choices"]
            said, logprobs = choice["message"]["content"], choice.get("logprobs")
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError):
            return without_confidence(UNREADABLE), body
        read = self.read(said, _tokens(logprobs))
        if self.hidden and logprobs is not None:
            choice["logprobs"] = None
            body = orjson.dumps(record)
        return read, body

    def stream(self) -> ClosedStream:
        """Reads an answer that comes in events."""
        return ClosedStream(self)

    def read(self, said: Any, tokens: list[dict[str, Any]] | None) -> Read:
        """Read an answer from its text and the log-probabilities of its tokens."""
        if said not in self.choices:
            return without_confidence(NO_CHOICE)
        if not tokens:
            return without_confidence(ODD)
        try:
            confidence = closed_answer_probability(read_logprobs(tokens, self.label), said, self.choices, self.label)
            certainty, flagged = sureness(confidence, self.trust)
        except (EvaluationError, TypeError, ValueError, AttributeError, OverflowError):
            return without_confidence(ODD)
        return Read(confidence, certainty, flagged, "")


class ClosedStream:
    """One answer that comes in events. Whoever hands them over hands over whole ones."""

    def __init__(self, asked: Closed) -> None:
        self._asked = asked
        self._said: list[str] = []
        self._tokens: list[dict[str, Any]] = []
        self._choices = False  # whether any event held a part of an answer
        self._odd = False

    def events(self, data: bytes) -> bytes:
        """Read some events; return them as the client gets them."""
        return _END.join(self._event(event) for event in data.split(_END))

    def read(self) -> Read:
        """What the answer says of itself, once it is whole."""
        if self._odd or not self._choices:
            return without_confidence(UNREADABLE)
        return self._asked.read("".join(self._said), self._tokens)

    def _event(self, event: bytes) -> bytes:
        if not event.startswith(_DATA) or event == b"data: [DONE]":
            return event
        try:
            record = orjson.loads(event[len(_DATA) :])
            choices = record["choices"]
            if not choices:  # the last one, with the usage
                return event
            (choice,) = choices
            self._choices = True
            self._said.append(choice["delta"].get("content") or "")
            logprobs = choice.get("logprobs")
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError):
            self._odd = True  # such as an error: it passes untouched, and the answer has no confidence
            return event
        if logprobs is None:
            return event
        self._tokens += _tokens(logprobs) or []
        if not self._asked.hidden:
            return event
        choice["logprobs"] = None
        return _DATA + orjson.dumps(record)


def closed_request(
    body: Mapping[str, Any], filled_in: Mapping[str, Any], version: VersionRef, *, chat: bool
) -> Closed | None:
    """The request as one with a closed answer; None for any other, whose answer has no confidence.

    Closed is what is held to the version's own choices and to greedy decoding, by the client or by what was filled in,
    of a version whose trust was learnt. A request that sets anything else which may change the probabilities is not.

    Args:
        body: the client's request.
        filled_in: what replaces it or comes to it (`left_open`).
        version: that answers.
        chat: whether it is a chat; a bare completion has no confidence.
    """
    trust, choices = version.trust, version.decoding.choices
    if not chat or trust is None or not choices:
        return None
    held = filled_in.get("structured_outputs", body.get("structured_outputs"))
    if not isinstance(held, dict) or held.keys() != {"choice"} or not _are(held["choice"], choices):
        return None
    if filled_in.get("temperature", body.get("temperature")) != 0:
        return None
    for name in body.keys() & _NEUTRAL.keys():
        value = filled_in.get(name, body[name])
        if value is not None and value not in _NEUTRAL[name]:
            return None
    asked = bool(body.get("logprobs"))
    if not asked and body.get("top_logprobs"):
        return None  # the engine refuses this, and is to go on doing so
    fields: dict[str, Any] = {} if asked else {"logprobs": True}
    if "top_logprobs" in body and body["top_logprobs"] is None:
        fields["top_logprobs"] = 0  # null would have none come at all
    return Closed(choices, trust, fields, hidden=not asked, label=version.label)


def whole_events(data: bytes, longest: int) -> tuple[bytes, bytes]:
    """Cut what came of a stream behind its last whole event; an event that is too long counts as whole.

    Returns:
        The whole events, and the rest.
    """
    end = data.rfind(_END)
    if end < 0:
        return (b"", data) if len(data) < longest else (data, b"")
    end += len(_END)
    return (data, b"") if end == len(data) else (data[:end], data[end:])


def _are(held: Any, choices: tuple[str, ...]) -> bool:
    """Whether these are the choices, in whatever order."""
    if not isinstance(held, list | tuple) or not all(isinstance(one, str) for one in held):
        return False
    return held == list(choices) or frozenset(held) == frozenset(choices)


def _tokens(logprobs: Any) -> list[dict[str, Any]] | None:
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    return content if isinstance(content, list) else None
