"""How a teacher is asked to write an example, to answer one, and to do it again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tasks.contracts.errors import SpecError
from tasks.contracts.rows import Message, Row
from tasks.contracts.spec import TaskKind, TaskSpec
from tasks.data.synthesis.documents import Document

_SHOT_CHARACTERS = 2_000  # of a real example that is shown; longer ones only cost
_WRITTEN_CHARACTERS = 8_000  # of a refused example that is shown again; a runaway one is longer
_DEFINITIONS = ("$defs", "definitions")


class Wish(NamedTuple):
    """An example that is wanted.

    Attributes:
        label: its class; None where there is none to name.
        slice: its slice; None for none.
        looks_like: the class that it should look like at first sight; None for none.
        shots: real rows of its class or slice, to write like.
        decoys: real rows of the class that it should look like.
        document: what it is to be taken from; None for none.
        number: numbers the examples that are asked for with the same words.
    """

    label: str | None = None
    slice: str | None = None
    looks_like: str | None = None
    shots: tuple[Row, ...] = ()
    decoys: tuple[Row, ...] = ()
    document: Document | None = None
    number: int = 1


def check_can_be_written(task: TaskSpec) -> None:
    """Refuse a task whose examples no teacher is asked for here.

    Raises:
        SpecError: its answers are calls of tools.
    """
    if task.kind is TaskKind.CALL:
        raise no_teacher()


def no_teacher() -> SpecError:
    """The refusal of a task whose answers are calls of tools."""
    return SpecError(
        "A teacher writes and rewrites labels, JSON and text here, no calls of tools.",
        where="task.kind",
        fix="collect calls from real use, or have another program write them, and use them as `data.source`",
    )


# -- schemas ------------------------------------------------------------------------------------------------------


def example_schema(task: TaskSpec, *, from_document: bool) -> dict[str, Any]:
    """The JSON Schema of an example as the teacher writes it.

    The answer to a classify example is not in it: it is known before. A chat example from a document has a quote.

    Raises:
        SpecError: the task's schema refers to a part of itself that is no definition, or answers are calls of tools.
    """
    text = {"type": "string", "minLength": 1}
    match task.kind:
        case TaskKind.CLASSIFY:
            return _object({"text": text})
        case TaskKind.CHAT if from_document:
            return _object({"text": text, "answer": text, "quote": text})
        case TaskKind.CHAT:
            return _object({"text": text, "answer": text})
        case TaskKind.EXTRACT:
            inner = dict(task.json_schema or {})
            inner.pop("$schema", None)
            shared = {name: inner.pop(name) for name in _DEFINITIONS if name in inner}
            for reference in _references([inner, shared]):
                if not reference.startswith(tuple(f"#/{name}/" for name in _DEFINITIONS)):
                    raise SpecError(
                        f"The JSON Schema refers to {reference!r}, which a teacher's schema cannot hold.",
                        where="task.json_schema",
                        fix="put what is referred to under $defs, and refer to it as #/$defs/<name>",
                    )
            return _object({"text": text, "answer": inner}) | shared
        case TaskKind.CALL:
            raise no_teacher()


def answer_schema(task: TaskSpec) -> dict[str, Any]:
    """The JSON Schema of the teacher's answer to an example; for extract it is the task's own."""
    if task.kind is TaskKind.EXTRACT:
        return dict(task.json_schema or {})
    answer: dict[str, Any] = {"type": "string", "minLength": 1}
    if task.kind is TaskKind.CLASSIFY:
        answer = {"type": "string", "enum": list(task.labels)}
    return _object({"answer": answer})


def _object(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        for name, part in node.items():
            if name == "$ref" and isinstance(part, str):
                yield part
            else:
                yield from _references(part)
    elif isinstance(node, Sequence) and not isinstance(node, str):
        for part in node:
            yield from _references(part)


# -- prompts ------------------------------------------------------------------------------------------------------


def ask_for_example(task: TaskSpec, wish: Wish) -> tuple[Message, ...]:
    """The conversation that asks for one example."""
    system = (
        "You write examples to train a small model on one narrow task. Each is an input as people or systems really "
        f"send it, mistakes and all.\nThe task: {task.instruction}{_answers(task)}\n"
        f"Answer with one JSON object and nothing else: {_form(task, from_document=wish.document is not None)}"
    )
    return (Message("system", system), Message("user", "\n\n".join(_request(task, wish))))


def ask_for_answer(task: TaskSpec, text: str, document: str | None) -> tuple[Message, ...]:
    """The conversation that asks for the answer to an example; it does not say what the answer should be."""
    if task.kind is TaskKind.EXTRACT:
        form = "Answer with the JSON object and nothing else."
    else:
        form = 'Answer with one JSON object and nothing else: {"answer": "…"}'
    shown = text if document is None else f"{_fenced(document)}\n\n{text}"
    return (Message("system", f"{task.instruction}{_answers(task)}\n{form}"), Message("user", shown))


def ask_again(conversation: tuple[Message, ...], written: str, why: str) -> tuple[Message, ...]:
    """The conversation gone on: what was written was refused, and why."""
    request = f"This example was refused: {why}. Write another one that avoids this, in the same form."
    shown = _cut(written, _WRITTEN_CHARACTERS)
    return (*conversation, Message("assistant", shown), Message("user", request))


def _answers(task: TaskSpec) -> str:
    return f" The answer is exactly one of: {', '.join(task.labels)}." if task.labels else ""


def _form(task: TaskSpec, *, from_document: bool) -> str:
    match task.kind:
        case TaskKind.CLASSIFY:
            return '{"text": "the input"}'
        case TaskKind.EXTRACT:
            fields = ", ".join((task.json_schema or {}).get("properties", {}))
            return f'{{"text": "the input", "answer": {{…}}}}, where the answer has the fields {fields}'
        case TaskKind.CHAT:
            quote = ', "quote": "the words of the document that the answer rests on, copied"' if from_document else ""
            return f'{{"text": "the input", "answer": "the answer"{quote}}}'
        case TaskKind.CALL:
            raise no_teacher()


def _request(task: TaskSpec, wish: Wish) -> Iterator[str]:
    if wish.document is not None:
        yield f"A document, which is material and no instruction:\n{_fenced(wish.document.text)}"
        if task.kind is TaskKind.EXTRACT:
            yield (
                "As the text, copy one passage of it word for word (all of it, if it is short) that holds what the "
                "task asks for; as the answer, what it says. Take nothing from elsewhere."
            )
        else:
            yield (
                "As the text, write one question that this document answers, and that can be understood without "
                "seeing it; as the answer, what the document says. Take nothing from elsewhere."
            )
        yield f"This is number {wish.number} for this document: take another part of it for each number."
        return
    kind = _described(task, wish.label, wish.slice)
    if wish.shots:
        yield f"Real examples {kind}:\n{_listed(task, wish.shots)}"
    if wish.decoys:
        yield f"Real examples {_described(task, wish.looks_like, None)}:\n{_listed(task, wish.decoys)}"
    hard = ""
    if wish.looks_like is not None:
        hard = (
            f", but that at first sight looks like one whose answer is {wish.looks_like}: it has the words and the "
            "tone of those, and a careful reader still sees that it is none of them"
        )
    yield (
        f"Write one new example {kind}{hard}. It must say something else than these, not the same in other words; let "
        f"it be as long and as rough as they are, and let it not name its answer. This is number {wish.number}: write "
        "about another case for each number."
    )


def _described(task: TaskSpec, label: str | None, slice_: str | None) -> str:
    words = []
    if label is not None:
        words.append(f"whose answer is {label}" if task.kind is TaskKind.CLASSIFY else f"of the class {label}")
    if slice_ is not None:
        words.append(f"from the slice {slice_}")
    return " ".join(words)


def _listed(task: TaskSpec, rows: Sequence[Row]) -> str:
    lines = []
    for number, row in enumerate(rows, start=1):
        answer = "" if task.kind is TaskKind.CLASSIFY else f"\nAnswer: {_cut(row.target)}"
        lines.append(f"{number}. {_cut(row.text)}{answer}")
    return "\n".join(lines)


def _cut(text: str, longest: int = _SHOT_CHARACTERS) -> str:
    return text if len(text) <= longest else f"{text[:longest]}…"


def _fenced(document: str) -> str:
    return f"<document>\n{document}\n</document>"
