"""An item as a question of the OpenAI protocol, and how its answer is read: evaluation and serving share them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tasks.contracts.calls import read_answer, read_tool_calls, write_calls
from tasks.contracts.prompt import Decoding, Prompt
from tasks.contracts.rows import Row


def question(model: str, prompt: Prompt, row: Row, decoding: Decoding) -> dict[str, Any]:
    """The body of `POST /v1/chat/completions` that asks a vLLM server for one item, greedily.

    Where there are tools, the server hands on calls as the model writes them, and `said` reads them.
    """
    body: dict[str, Any] = {
        "model": model,
        "messages": [as_protocol(turn) for turn in prompt.conversation(row)],
        "temperature": 0,
        "max_tokens": decoding.max_new_tokens,
        **prompt.template_options,
    }
    if prompt.tools:
        body |= {"tool_choice": "none", "skip_special_tokens": False}  # special tokens mark calls in some templates
    if decoding.choices:
        body["structured_outputs"] = {"choice": list(decoding.choices)}  # vLLM ignores the older guided_choice
    return body


def said(message: Mapping[str, Any], *, tools: bool) -> str:
    """What a message answers: its calls in canonical form where there are tools, else its text.

    Raises:
        KeyError: it holds neither.
    """
    calls = message.get("tool_calls") if tools else None
    if calls:
        try:
            return write_calls(read_tool_calls(calls))
        except (ValueError, RecursionError):
            return json.dumps(calls)  # no call, and kept as what it is
    text: str = message["content"] or ""  # null when the model refused or only thought: not valid, but an answer
    return read_answer(text).answer if tools else text


def as_protocol(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn as the protocol has it: the arguments of calls are JSON in a text."""
    for call in turn.get("tool_calls", ()):
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return turn
