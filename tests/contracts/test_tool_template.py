"""Which chat templates can be used for a task with tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tasks.contracts.errors import ModelError
from tasks.contracts.tool_template import call_not_read_back, check_tools_rendered, tools_left_out
from tests.tiny import CHATML
from tests.tool_toys import HERMES, ONE_CALL, PYTHONIC

BARE = (
    "{{ tools | tojson }}{% for message in messages %}{{ message['content'] }}"
    "{% for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}{% endfor %}"
)
NO_RESULTS = BARE.replace(
    "{{ message['content'] }}", "{% if message.role != 'tool' %}{{ message['content'] }}{% endif %}"
)
MISTRAL = (
    "{% if messages | length != 2 %}{{ raise_exception('two turns') }}{% endif %}"
    "{% if messages[1].tool_calls[0].id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (BARE, None),
        (HERMES, None),
        (ONE_CALL, None),
        (CHATML, "it leaves out the definition of a tool"),
        (NO_RESULTS, "it leaves out the result of a tool"),
        (BARE.replace("call.function", "call.id"), "it leaves out the call of a tool"),
        (BARE + "{{ raise_exception('no tools here') }}", "it says 'no tools here'"),
        (PYTHONIC, 'it writes a call as \'[look_up_weather({"city": "Ulm-on-Danube"})]\', which is no form of JSON'),
        ("{{ messages | length }}" + HERMES, "it renders the prompt differently when a call follows"),
        (
            "{% if messages[-1].role == 'user' %}{{ messages[0].content }}{% endif %}" + HERMES,
            "it renders the prompt differently when a call follows",
        ),
        (
            HERMES + "{% if messages[-1].role == 'assistant' %}{{ raise_exception('ask first') }}{% endif %}",
            "it says 'ask first'",
        ),
    ],
)
def test_whether_a_template_can_be_used_with_tools(tiny_model: Path, template: str, reason: str | None) -> None:
    tokenizer = _with(tiny_model, template)
    if reason is None:
        check_tools_rendered(tokenizer, "here")
        return
    found = tools_left_out(tokenizer) or call_not_read_back(tokenizer)
    assert reason in (found or "")
    with pytest.raises(ModelError, match="cannot render tools") as refusal:
        check_tools_rendered(tokenizer, "here")
    assert reason in refusal.value.what
    assert refusal.value.where == "here"
    assert "chat_template.jinja" in refusal.value.fix


def test_calls_have_the_ids_that_templates_ask_for(tiny_model: Path) -> None:
    from tasks.contracts.prompt import tuned_prompt
    from tasks.contracts.rows import Message, Row
    from tests.tool_toys import CALL, REFUND

    tokenizer = _with(tiny_model, MISTRAL + HERMES)
    prompt = tuned_prompt(CALL)
    turns = prompt.answered(Row("r", 1, (Message("user", "?"),), REFUND))
    assert tokenizer.apply_chat_template(turns[1:], tokenize=False, **prompt.template_options).count("refund") == 2


def _with(tiny_model: Path, template: str) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = template
    return tokenizer
