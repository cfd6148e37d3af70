"""What a request leaves open is filled in as the model was evaluated: instruction, choices, length, greedy decoding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tasks.contracts.openai_chat import as_protocol
from tasks.contracts.prompt import Prompt
from tasks.contracts.rows import as_conversation
from tasks.contracts.serving import VersionRef

_INSTRUCTS = ("system", "developer")
_LENGTHS = ("max_tokens", "max_completion_tokens")
# Who sets one of these has said what answers there are.
_FORMS = ("structured_outputs", "response_format", "tools", "logit_bias")


def left_open(body: Mapping[str, Any], version: VersionRef, *, chat: bool) -> dict[str, Any]:
    """The fields that a request does not say, with the values of the version's evaluation.

    A conversation without an instruction, or with the version's, gets that and its worked examples where it has some;
    one with another instruction is left as it is, choices and all, since it may ask for something else.

    Args:
        body: the request.
        version: that answers.
        chat: whether the request has messages; a bare completion gets nothing but the temperature.

    Returns:
        Fields to add or to replace; empty for a request that says it all.
    """
    fields: dict[str, Any] = {}
    if "temperature" not in body:
        fields["temperature"] = 0  # vLLM would draw at 1.0
    messages = body.get("messages")
    if not chat or not isinstance(messages, list):
        return fields
    if messages and messages[0] == {"role": "system", "content": version.prompt.system}:
        messages = messages[1:]
    if any(_instructs(one) for one in messages):
        return fields
    fields["messages"] = [*_prefix(version.prompt), *messages]
    decoding = version.decoding
    if not any(name in body for name in _LENGTHS):
        fields["max_tokens"] = decoding.max_new_tokens
    if version.prompt.tools and not any(name in body for name in _FORMS):
        fields |= version.prompt.template_options
    if decoding.choices and not any(name in body for name in _FORMS):
        fields["structured_outputs"] = {"choice": list(decoding.choices)}
    return fields


def _instructs(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") in _INSTRUCTS


def _prefix(prompt: Prompt) -> list[dict[str, Any]]:
    return [as_protocol(turn) for turn in as_conversation(prompt.prefix())]
