"""A toy task with tools, and chat templates that render them: which ticket to open, or words where none fits."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

from tasks.contracts.spec import TaskKind, TaskSpec

# ChatML with tools as Qwen and Hermes write them.
HERMES = (
    "{% set tools = tools if tools is defined and tools else [] %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + ('user' if message.role == 'tool' else message.role) + '\n' }}"
    "{% if message.role == 'tool' %}<tool_response>{{ message.content }}</tool_response>"
    "{% else %}{{ message.content }}{% endif %}"
    "{% if loop.first and tools %}{{ '\n# Tools\n' }}{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}"
    "{% endif %}"
    "{% for call in message.tool_calls or [] %}"
    '{{ \'<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' '
    "+ (call.function.arguments | tojson) + '}\n</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The same, for one call at a time.
ONE_CALL = (
    "{% for message in messages %}{% if message.tool_calls and message.tool_calls | length > 1 %}"
    "{{ raise_exception('one call at a time') }}{% endif %}{% endfor %}"
) + HERMES
# Calls in a form of their own, which is no JSON.
PYTHONIC = HERMES.replace(
    '\'<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \'',
    "'[' + call.function.name + '(' ",
).replace("+ '}\n</tool_call>'", "+ ')]'")

TOOLS: tuple[dict[str, Any], ...] = (
    {
        "name": "refund",
        "description": "Pay back.",
        "parameters": {
            "type": "object",
            "properties": {"order": {"type": "integer"}},
            "required": ["order"],
            "additionalProperties": False,
        },
    },
    {
        "name": "restart",
        "description": "Start anew.",
        "parameters": {
            "type": "object",
            "properties": {"device": {"type": "string", "enum": ["screen", "router"]}},
            "required": ["device"],
            "additionalProperties": False,
        },
    },
)
CALL = TaskSpec(kind=TaskKind.CALL, instruction="Help.", tools=TOOLS)
REFUND = '[{"arguments": {"order": 7}, "name": "refund"}]'
RESTART = '[{"arguments": {"device": "screen"}, "name": "restart"}]'
BOTH = f"{REFUND[:-1]}, {RESTART[1:]}"
WORDS = "ask someone else"


def openai_call(name: str, arguments: Any, call_id: str = "x1") -> dict[str, Any]:
    """A call as the OpenAI protocol writes it."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def with_template(model: Path, folder: Path, template: str = HERMES) -> Path:
    """A copy of a model with another chat template."""
    shutil.copytree(model, folder)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


# Few key words, each said twice, so that two layers learn in seconds which answer they ask for.
_KEYS = {"refund": ("invoice", "money"), "restart": ("crash", "dark"), WORDS: ("poem", "weather")}
_FILLERS = tuple(
    word
    for line in (
        "please today again my your the our new old first last red blue green north south east west early late",
        "left right two three four five six nine ten paper table window garden river winter summer copper silver",
    )
    for word in line.split()
)


def tool_rows(count: int, *, seed: int = 1) -> list[dict[str, Any]]:
    """Conversations that end with a call in the protocol's form, or with words; key words tell which."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        kind = list(_KEYS)[number % 3]
        words = draw.sample(_FILLERS, 5)
        for key in _KEYS[kind] * 2:
            words.insert(draw.randrange(len(words) + 1), key)
        answer: dict[str, Any] = {"role": "assistant", "content": WORDS}
        if kind == "refund":
            answer = {"role": "assistant", "content": None, "tool_calls": [openai_call(kind, '{"order": 7}')]}
        elif kind == "restart":
            answer = {
                "role": "assistant", "content": None, "tool_calls": [openai_call(kind, {"device": "screen"})]
            }  # fmt: skip
        rows.append({"id": f"t{number:04d}", "messages": [{"role": "user", "content": " ".join(words)}, answer]})
    return rows


def vocabulary() -> list[str]:
    """Texts from which a tokenizer learns the words of the task, its tools and their calls."""
    words = [*_FILLERS, *(key for keys in _KEYS.values() for key in keys), *WORDS.split()]
    calls = ('<tool_call>\n{"name": "refund", "arguments": {"order": 7}}\n</tool_call>',)
    calls += ('<tool_call>\n{"name": "restart", "arguments": {"device": "screen"}}\n</tool_call>',)
    return [f"{word} {word}" for word in words for _ in range(3)] + [*calls] * 20 + [str(TOOLS)] * 3
