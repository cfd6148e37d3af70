"""How an item is put to a model: one rendering for training, evaluation and serving, so that they cannot differ."""

from __future__ import annotations

from tasks.contracts.rows import Message, Row
from tasks.contracts.spec import Frozen, TaskKind, TaskSpec


class Shot(Frozen):
    """A worked example shown before the item."""

    user: str
    assistant: str


class Prompt(Frozen):
    """What comes before an item: the instruction as system message, and worked examples."""

    system: str
    shots: tuple[Shot, ...] = ()

    def prefix(self) -> list[Message]:
        """The messages that are the same for every item."""
        messages = [Message("system", self.system)]
        for shot in self.shots:
            messages += [Message("user", shot.user), Message("assistant", shot.assistant)]
        return messages

    def messages(self, row: Row) -> list[Message]:
        """All messages for one item, ready for the chat template; a row with its own system turn keeps that one."""
        if row.messages and row.messages[0].role == "system":
            return [row.messages[0], *self.prefix()[1:], *row.messages[1:]]
        return [*self.prefix(), *row.messages]


def tuned_prompt(task: TaskSpec) -> Prompt:
    """The prompt of a fine-tuned model: the bare instruction. What the answers are, training has taught it."""
    return Prompt(system=task.instruction)


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
    return Prompt(system=f"{task.instruction} {rule}".strip(), shots=shots)


class Decoding(Frozen):
    """How an answer is drawn. Always greedy: the same model and prompt give the same answer.

    Attributes:
        max_new_tokens: longest answer.
        choices: the answers that are allowed; empty for free text.
    """

    max_new_tokens: int
    choices: tuple[str, ...] = ()


def decoding_for(task: TaskSpec, max_new_tokens: int) -> Decoding:
    """Greedy; held to the labels when there are labels."""
    return Decoding(max_new_tokens=max_new_tokens, choices=task.labels)
