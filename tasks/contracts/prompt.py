"""How an item is put to a model: one rendering for training, evaluation and serving, so that they cannot differ."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from tasks.contracts.calls import Tools, calls_of, digest_tools, wrap_tools
from tasks.contracts.rows import Message, Row, as_conversation
from tasks.contracts.spec import Frozen, TaskKind, TaskSpec, none_there

# What follows a call in a worked example, since templates and servers ask that each call has a result, and that
# assistant and user take turns.
_RESULT = "OK"
_AFTERWARDS = "Done."


class Shot(Frozen):
    """A worked example shown before the item: what is said, and the answer as a row's target has it."""

    user: str
    assistant: str


class Prompt(Frozen):
    """What comes before an item: the instruction as system message, the tools that may be called, worked examples."""

    system: str
    shots: tuple[Shot, ...] = ()
    tools: Tools = Field(default=(), exclude_if=none_there)

    @property
    def template_options(self) -> dict[str, Any]:
        """What a chat template is given beside the messages: `tools`, where there are some."""
        return {"tools": wrap_tools(self.tools)} if self.tools else {}

    def prefix(self) -> list[Message]:
        """The messages that are the same for every item."""
        messages = [Message("system", self.system)]
        for shot in self.shots:
            answer = self._answer(shot.assistant)
            messages += [Message("user", shot.user), answer]
            if answer.calls:
                messages += [Message("tool", _RESULT, name=call.name) for call in answer.calls]
                messages.append(Message("assistant", _AFTERWARDS))
        return messages

    def messages(self, row: Row) -> list[Message]:
        """All messages for one item, ready for the chat template; a row with its own system turn keeps that one."""
        if row.messages and row.messages[0].role == "system":
            return [row.messages[0], *self.prefix()[1:], *row.messages[1:]]
        return [*self.prefix(), *row.messages]

    def conversation(self, row: Row) -> list[dict[str, Any]]:
        """`messages` as a chat template takes them."""
        return as_conversation(self.messages(row))

    def answered(self, row: Row) -> list[dict[str, Any]]:
        """The conversation with the row's target as its last turn; where there are tools, calls are calls."""
        return as_conversation([*self.messages(row), self._answer(row.target)])

    def _answer(self, target: str) -> Message:
        calls = calls_of(target) if self.tools else ()
        return Message("assistant", "", calls) if calls else Message("assistant", target)


def tuned_prompt(task: TaskSpec) -> Prompt:
    """The prompt of a fine-tuned model: the bare instruction. What the answers are, training has taught it."""
    return Prompt(system=task.instruction, tools=task.tools)


def base_prompt(task: TaskSpec, shots: tuple[Shot, ...] = ()) -> Prompt:
    """The prompt of a model that was not tuned: the instruction with the answers spelled out, and worked examples."""
    match task.kind:
        case TaskKind.CLASSIFY:
            rule = f"Answer with exactly one of: {', '.join(task.labels)}."
        case TaskKind.EXTRACT:
            fields = ", ".join((task.json_schema or {}).get("properties", {}))
            rule = f"Answer with one JSON object with the fields {fields}, and nothing else."
        case TaskKind.CHAT:
            rule = ""
        case TaskKind.CALL:
            rule = "Call the tools that fit, with all that the input says; answer in words only where none fits."
    return Prompt(system=f"{task.instruction} {rule}".strip(), shots=shots, tools=task.tools)


class Decoding(Frozen):
    """How an answer is drawn. Always greedy: the same model and prompt give the same answer.

    Attributes:
        max_new_tokens: longest answer.
        choices: the answers that are allowed; empty for free text.
        tools_digest: sha256 of the tools whose calls are read out of answers; None for none.
    """

    max_new_tokens: int
    choices: tuple[str, ...] = ()
    tools_digest: str | None = Field(default=None, exclude_if=none_there)


def decoding_for(task: TaskSpec, max_new_tokens: int) -> Decoding:
    """Greedy; held to the labels when there are labels."""
    return Decoding(max_new_tokens=max_new_tokens, choices=task.labels, tools_digest=digest_tools(task.tools))
