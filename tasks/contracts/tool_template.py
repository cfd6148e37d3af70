"""Whether a chat template has a place for tools, and writes calls in a way that can be read."""

from __future__ import annotations

from typing import Any

from tasks.contracts.calls import make_call, read_answer, wrap_tools
from tasks.contracts.errors import ModelError
from tasks.contracts.rows import Message, as_conversation

_SHOWN = 80  # characters of a text that a reason repeats
_CALL = make_call("look_up_weather", {"city": "Ulm-on-Danube"})
_TOOLS = wrap_tools(
    (
        {
            "name": _CALL.name,
            "description": "Weather-of-a-city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "A city."}}},
        },
    )
)
_TOLD = Message("system", "Help.")
_ASKED = Message("user", "Hello")
_CALLED = Message("assistant", "", (_CALL,))
_ANSWERED = Message("tool", "Seven-degrees", name=_CALL.name)


def check_tools_rendered(tokenizer: Any, where: str) -> None:
    """Refuse a chat template that cannot render tools, for a task that has them.

    Raises:
        ModelError: it leaves out definitions, calls or results of tools, fails on them, or writes calls in a way that
            cannot be read back.
    """
    reason = tools_left_out(tokenizer) or call_not_read_back(tokenizer)
    if reason:
        raise ModelError(
            f"The chat template cannot render tools: {reason}.",
            where=where,
            fix="use a model whose chat template has tools and writes calls as JSON (Hermes, Qwen, Llama, Mistral), or "
            "put a chat_template.jinja that does into a copy of the folder",
        )


def tools_left_out(tokenizer: Any) -> str | None:
    """What a chat template does not say of tools; None when it renders definition, call and result."""
    return left_out(
        tokenizer,
        as_conversation([_ASKED, _CALLED, _ANSWERED]),
        {
            "Weather-of-a-city.": "the definition of a tool",
            "Ulm-on-Danube": "the call of a tool",
            "Seven-degrees": "the result of a tool",
        },
        tools=_TOOLS,
    )


def call_not_read_back(tokenizer: Any) -> str | None:
    """Why an answer that the template has rendered would not be read as the call that it is; None where it is."""
    from jinja2 import TemplateError

    def render(*turns: Message, ask: bool) -> str:
        text: str = tokenizer.apply_chat_template(
            as_conversation(turns), tokenize=False, add_generation_prompt=ask, tools=_TOOLS
        )
        return text

    try:
        asked, whole = render(_TOLD, _ASKED, ask=True), render(_TOLD, _ASKED, _CALLED, ask=False)
    except TemplateError as error:
        return f"it says {shortened(str(error))}"
    if not whole.startswith(asked):
        return "it renders the prompt differently when a call follows"
    end = getattr(tokenizer, "eos_token", None)
    written = whole.removeprefix(asked)
    written = written.split(end)[0] if end else written
    if read_answer(written).calls == (_CALL,):
        return None
    return f"it writes a call as {shortened(written.strip())}, which is no form of JSON that is read here"


def left_out(tokenizer: Any, messages: list[dict[str, Any]], wanted: dict[str, str], **options: Any) -> str | None:
    """Which of the wanted texts a chat template leaves out, or how it fails; None when it renders them all.

    Args:
        tokenizer: has the template.
        messages: the conversation to render.
        wanted: texts that have to be there, each with what it is.
        options: what the template is given beside the messages.
    """
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    except (TemplateError, TypeError, KeyError, ValueError, AttributeError) as error:
        return f"it says {shortened(str(error))}"
    return next((f"it leaves out {what}" for marker, what in wanted.items() if marker not in text), None)


def shortened(text: str) -> str:
    """A text in quotes, cut where it is long."""
    return repr(text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "...")
