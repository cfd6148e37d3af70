"""How an answer is scored, and how scores become the metrics of a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NoReturn

from jsonschema import Draft202012Validator

from tasks.contracts.references import ClassScore, ItemOutcome
from tasks.contracts.rows import canonical_json
from tasks.contracts.spec import MACRO_F1, TaskKind, TaskSpec

SCORER_VERSION = 1  # raise it when the same answers would score differently


def score_answer(task: TaskSpec, target: str, prediction: str) -> dict[str, float]:
    """The scores of one answer, each 0 or 1 (`field_match`: a share).

    White space around the answer does not count; nothing else is repaired.

    classify: `exact_match`; `valid_output`, it is one of the labels.
    extract: `exact_match` of the parsed values, so key order and spaces do not count and 29.0 equals 29;
    `valid_output`, it parses and fits the JSON Schema; `field:<name>` for each field of the schema; `field_match`,
    their mean. A field that both lack matches.
    chat: `exact_match`; `valid_output`, it is not empty.
    """
    answer = prediction.strip()
    match task.kind:
        case TaskKind.CLASSIFY:
            return {"exact_match": float(answer == target), "valid_output": float(answer in task.labels)}
        case TaskKind.CHAT:
            return {"exact_match": float(answer == target.strip()), "valid_output": float(bool(answer))}
        case TaskKind.EXTRACT:
            return _score_json(task.json_schema or {}, json.loads(target), answer)


def means(outcomes: Sequence[ItemOutcome]) -> dict[str, float]:
    """The mean of each score over all items."""
    names = dict.fromkeys(name for outcome in outcomes for name in outcome.scores)
    return {name: sum(outcome.scores[name] for outcome in outcomes) / len(outcomes) for name in names}


def metric_of(metric: str, task: TaskSpec, outcomes: Sequence[ItemOutcome]) -> float:
    """One of `task.metrics` over all items: macro-F1, or the mean of the score of that name."""
    if metric == MACRO_F1:
        return macro_f1(class_scores(task, outcomes))
    return means(outcomes)[metric]


def class_scores(task: TaskSpec, outcomes: Sequence[ItemOutcome]) -> tuple[ClassScore, ...]:
    """Precision, recall and F1 of each label, 0 where nothing was predicted or nothing is there (scikit-learn's)."""
    from sklearn.metrics import precision_recall_fscore_support

    precision, recall, f1, support = precision_recall_fscore_support(
        [outcome.target for outcome in outcomes],
        [outcome.prediction.strip() for outcome in outcomes],
        labels=list(task.labels),
        zero_division=0.0,
    )
    return tuple(
        ClassScore(label=label, precision=precision[n], recall=recall[n], f1=f1[n], support=support[n])
        for n, label in enumerate(task.labels)
    )


def macro_f1(classes: Sequence[ClassScore]) -> float:
    """The mean F1 of the labels that the items have, each label counting the same."""
    present = [entry.f1 for entry in classes if entry.support]
    return sum(present) / len(present)


def _score_json(schema: dict[str, Any], target: Any, answer: str) -> dict[str, float]:
    fields = list(schema.get("properties", {}))
    try:
        value = json.loads(answer, parse_constant=_refuse_constant)
        valid = Draft202012Validator(schema).is_valid(value)
        text = canonical_json(value)
    except (ValueError, RecursionError):  # no JSON; a number that JSON does not have; nested without end
        scores = {"exact_match": 0.0, "valid_output": 0.0}
        value = None
    else:
        scores = {"exact_match": float(text == canonical_json(target)), "valid_output": float(valid)}
    for name in fields:
        scores[f"field:{name}"] = float(isinstance(value, dict) and _same_field(name, target, value))
    if fields:
        scores["field_match"] = sum(scores[f"field:{name}"] for name in fields) / len(fields)
    return scores


def _same_field(name: str, target: dict[str, Any], value: dict[str, Any]) -> bool:
    if name not in target or name not in value:
        return (name in target) == (name in value)
    return canonical_json(target[name]) == canonical_json(value[name])


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
