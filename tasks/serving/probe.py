"""Whether an engine answers. Its `/health` says only that it runs, also with weights that are not numbers."""

from __future__ import annotations

import json
import math
from enum import StrEnum
from typing import Any, NamedTuple

import httpx

from tasks.contracts.prompt import Decoding
from tasks.contracts.serving import VersionRef

_ASKED = "Hello"
_EXCERPT = 200  # characters of a reply that a fault shows
_NO_PROBABILITY = -9999.0  # what vLLM writes for minus infinity, which JSON cannot hold


class Looked(StrEnum):
    """What asking an engine has shown."""

    ANSWERED = "answered"
    SILENT = "silent"  # nothing listens, it is not ready (503), or it took too long
    WRONG = "wrong"  # what it says is no answer


class Look(NamedTuple):
    """What asking has shown, and for all but an answer, why in words."""

    looked: Looked
    why: str = ""


def known_question(version: VersionRef, model: str | None = None) -> dict[str, Any]:
    """The body of the question that each engine is asked: as in evaluation, but the text is always the same.

    The answer is not compared with an earlier one: in bfloat16 it may change with what is answered beside it.

    Args:
        version: what the engine serves.
        model: what it is called there; None for its label.
    """
    decoding = version.decoding
    body: dict[str, Any] = {
        "model": model or version.label,
        "messages": [
            {"role": "system", "content": version.prompt.system},
            {"role": "user", "content": _ASKED},
        ],
        "temperature": 0,
        "max_tokens": min(decoding.max_new_tokens, 16),
        "logprobs": True,
    }
    if decoding.choices:
        body["max_tokens"] = decoding.max_new_tokens
        body["structured_outputs"] = {"choice": list(decoding.choices)}
    else:
        body["min_tokens"] = 1  # a model may have nothing to say to this text; what is asked is whether it can
    return body


def fault_of_reply(status: int, text: str, decoding: Decoding) -> str | None:
    """What is wrong with a reply to the known question; None where nothing is.

    An answer holds at least one token, each with a finite log probability; with choices, it is one of them.
    """
    if status != httpx.codes.OK:
        return f"it replies HTTP {status}: {text[:_EXCERPT]}"
    try:
        choice = json.loads(text)["choices"][0]
        said, tokens = choice["message"]["content"], choice["logprobs"]["content"]
        values = [token["logprob"] for token in tokens]
    except (ValueError, KeyError, IndexError, TypeError):
        return f"its reply holds no answer with logprobs: {text[:_EXCERPT]}"
    if not isinstance(said, str) or not values or not said:
        return "its answer is empty"
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        return f"its answer has log probabilities that are not numbers: {values[:5]}"
    if min(values) <= _NO_PROBABILITY:
        return "its answer has a token without any probability"
    if decoding.choices and said not in decoding.choices:
        return f"its answer is none of the choices: {said[:_EXCERPT]!r}"
    return None


def look(
    client: httpx.Client, url: str, key: str, version: VersionRef, seconds: float, model: str | None = None
) -> Look:
    """Ask an engine the known question.

    Args:
        client: for loopback; no proxy of the environment must come between.
        url: of the engine, ending in `/v1`.
        key: its key.
        version: what it serves.
        seconds: longest time to its reply.
        model: what the version is called there; None for its label.
    """
    try:
        reply = client.post(
            f"{url}/chat/completions",
            json=known_question(version, model),
            headers={"Authorization": f"Bearer {key}"},
            timeout=httpx.Timeout(seconds, connect=5.0),
        )
        text = reply.text
    except httpx.ConnectError:
        return Look(Looked.SILENT, "nothing listens there")
    except httpx.TimeoutException:
        return Look(Looked.SILENT, f"it did not reply within {seconds:.0f} s")
    except httpx.TransportError as error:
        return Look(Looked.SILENT, f"the connection broke ({type(error).__name__})")
    fault = fault_of_reply(reply.status_code, text, version.decoding)
    if fault is None:
        return Look(Looked.ANSWERED)
    starts = reply.status_code == httpx.codes.SERVICE_UNAVAILABLE
    return Look(Looked.SILENT if starts else Looked.WRONG, fault)
