"""What we expect of each row that a model may learn from.

The suite looks at a frame of facts about the rows, one line a row, and not at the rows themselves: the facts are small
whatever the rows' length, and the Data Docs show no one's text. Columns (`null` where a fact does not apply):

| column | holds |
|---|---|
| `row` | index of the row, to find it again |
| `unreadable` | why the row could not be used at all; null for a usable row |
| `id` | the row's id |
| `repeated_id` | the id, if it names several rows that differ |
| `text_characters`, `text_visible_characters` | length of the input, and without white space |
| `target`, `target_visible_characters` | the answer wanted (classify only), and its length without white space |
| `text_damage`, `target_damage` | the first character that a wrong encoding leaves behind, and where |
| `hidden` | the first character that is there but not seen, and where |
| `template_tokens` | a token of a chat template in the input, which would be read as the start of another turn |
| `injection` | an instruction to a model, or markup that acts, in the answer (not for classify) |
| `language_problem` | the language that the input seems to be in, if it is none that is wanted |
| `tokens` | tokens of prompt and answer, if they are more than training takes |
| `secret`, `personal_data` | what of these was found and where, without the thing itself |
| `schema_problem` | why the answer does not fit the JSON Schema (extract), or the tools and the chat template (call) |
| `role_problem` | what is wrong with the order of the chat turns |
"""

from __future__ import annotations

from typing import Any

import great_expectations as gx
from great_expectations import expectations as gxe

from tasks.contracts.spec import DataSpec, PoisonPolicy, PrivatePolicy, TaskKind, TaskSpec

_DONE = {
    PrivatePolicy.REPORT: "listed, and go on",
    PrivatePolicy.MASK: "masked",
    PrivatePolicy.QUARANTINE: "quarantined",
}


def reason(code: str, text: str, *, only_told: bool = False) -> dict[str, Any]:
    """The meta data of an expectation: a code to count by, and what a failing row is told; `{value}` is its value.

    A row that fails an expectation which is `only_told` is listed, and goes on.
    """
    return {"code": code, "reason": text} | ({"only_told": True} if only_told else {})


def row_expectations(
    task: TaskSpec,
    data: DataSpec,
    *,
    poisoning: PoisonPolicy = PoisonPolicy.REPORT,
    max_tokens: int | None = None,
) -> list[Any]:
    """The expectations that every single row has to meet.

    Args:
        task: kind, labels and schema.
        data: limits, languages, and what is done about private data.
        poisoning: what is done about injected instructions.
        max_tokens: the limit in tokens; None where no base model is known yet.
    """
    limit = data.max_characters
    expectations = [
        gxe.ExpectColumnValuesToBeNull(
            column="unreadable",
            meta=reason("unreadable", "{value}"),
            notes="Every row has its fields, of the right type.",
        ),
        gxe.ExpectColumnValuesToNotBeNull(
            column="id", meta=reason("id_missing", "id is missing"), notes="Every row has an id."
        ),
        gxe.ExpectColumnValuesToBeNull(
            column="repeated_id",
            meta=reason("id_repeated", "id {value!r} names several rows that differ"),
            notes="An id names one row. Repetitions of a whole row are removed later.",
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="text_visible_characters",
            min_value=1,
            meta=reason("text_blank", "text is blank"),
            notes="The input says something.",
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="text_characters",
            max_value=limit,
            meta=reason("text_too_long", f"text has {{value:,}} characters, the limit is {limit:,}"),
            notes="The input is no longer than `data.max_characters`.",
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="target_visible_characters",
            min_value=1,
            meta=reason("target_blank", "target is blank"),
            notes="There is an answer.",
        ),
        gxe.ExpectColumnValuesToBeNull(
            column="text_damage",
            meta=reason("text_damaged", "text is damaged: {value}"),
            notes="The input has no trace of a wrong encoding.",
        ),
        gxe.ExpectColumnValuesToBeNull(
            column="target_damage",
            meta=reason("target_damaged", "target is damaged: {value}"),
            notes="The answer has no trace of a wrong encoding.",
        ),
        gxe.ExpectColumnValuesToBeNull(
            column="role_problem",
            meta=reason("chat_roles", "{value}"),
            notes="A system turn comes first or not at all, then user and assistant take turns; the answer follows.",
        ),
    ]
    expectations += [
        gxe.ExpectColumnValuesToBeNull(
            column="hidden",
            meta=reason("hidden_character", "{value}"),
            notes="No character is there that nobody sees.",
        ),
        gxe.ExpectColumnValuesToBeNull(
            column="template_tokens",
            meta=reason("template_token", "{value}"),
            notes="The input does not play the chat template.",
        ),
    ]
    if max_tokens is not None:
        expectations.append(
            gxe.ExpectColumnValuesToBeNull(
                column="tokens",
                meta=reason(
                    "too_many_tokens", f"prompt and answer have {{value:,}} tokens, the limit is {max_tokens:,}"
                ),
                notes="Prompt and answer have no more tokens than `train.max_tokens`; nothing is cut off.",
            )
        )
    if data.languages:
        expectations.append(
            gxe.ExpectColumnValuesToBeNull(
                column="language_problem",
                meta=reason("language", "{value}"),
                notes=f"The input is in one of: {', '.join(data.languages)}, or too short to tell.",
            )
        )
    for column, policy, what in (
        ("secret", data.secrets, "key, token or password"),
        ("personal_data", data.personal_data, "personal data"),
    ):
        if policy is not PrivatePolicy.OFF:
            told = policy is not PrivatePolicy.QUARANTINE
            expectations.append(
                gxe.ExpectColumnValuesToBeNull(
                    column=column,
                    meta=reason(column, "{value}", only_told=told),
                    notes=f"No {what} is in the row (rows with one are {_DONE[policy]}).",
                )
            )
    if task.kind is not TaskKind.CLASSIFY and poisoning is not PoisonPolicy.OFF:
        expectations.append(
            gxe.ExpectColumnValuesToBeNull(
                column="injection",
                meta=reason("injection", "{value}", only_told=poisoning is PoisonPolicy.REPORT),
                notes="The answer tells no model what to do.",
            )
        )
    if task.kind is TaskKind.CLASSIFY:
        expectations.append(
            gxe.ExpectColumnValuesToBeInSet(
                column="target",
                value_set=list(task.labels),
                meta=reason("label_unknown", "label {value!r} is none of the task's labels"),
                notes="Each label is one of `task.labels`.",
            )
        )
    if task.kind is TaskKind.EXTRACT:
        expectations.append(
            gxe.ExpectColumnValuesToBeNull(
                column="schema_problem",
                meta=reason("schema", "target does not fit the schema: {value}"),
                notes="Each answer fits `task.json_schema`.",
            )
        )
    if task.kind is TaskKind.CALL:
        expectations.append(
            gxe.ExpectColumnValuesToBeNull(
                column="schema_problem",
                meta=reason("calls", "the answer cannot be used: {value}"),
                notes="Each call is of one of `task.tools`, its arguments fit, and the chat template can write it.",
            )
        )
    return expectations


def build_suite(
    task: TaskSpec,
    data: DataSpec,
    *,
    poisoning: PoisonPolicy = PoisonPolicy.REPORT,
    max_tokens: int | None = None,
) -> Any:
    """The suite `training_rows`; arguments as `row_expectations`."""
    expectations = row_expectations(task, data, poisoning=poisoning, max_tokens=max_tokens)
    return gx.ExpectationSuite(name="training_rows", expectations=expectations)
