"""How an answer is scored, and how scores become the metrics of a model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, NoReturn

from jsonschema import Draft202012Validator

from tasks.contracts.calls import calls_check, calls_of, read_answer
from tasks.contracts.references import ClassScore, ItemOutcome
from tasks.contracts.rows import Call, canonical_json
from tasks.contracts.spec import MACRO_F1, TaskKind, TaskSpec

SCORER_VERSION = 1  # raise it when the same answers would score differently


def score_answer(task: TaskSpec, target: str, prediction: str) -> dict[str, float]:
    """The scores of one answer, each 0 or 1 (`field_match` and `call:arguments`: a share).

    White space around the answer does not count; nothing else is repaired.

    classify: `exact_match`; `valid_output`, it is one of the labels.
    extract: `exact_match` of the parsed values, so key order and spaces do not count and 29.0 equals 29;
    `valid_output`, it parses and fits the JSON Schema; `field:<name>` for each field of the schema; `field_match`,
    their mean. A field that both lack matches.
    chat: `exact_match`; `valid_output`, it is not empty.
    call: `exact_match`, the same calls, whatever their order, or words where words are wanted (which words is not
    judged); `valid_output`, it is words, or calls of tools that there are with arguments that fit; `call:name`, the
    right tools, each as often as wanted; `call:arguments`, the share of the arguments that agree, over the calls that
    are wanted (a tool that is not called has none), or over those that are made where they are more.
    """
    answer = prediction.strip()
    match task.kind:
        case TaskKind.CLASSIFY:
            return {"exact_match": float(answer == target), "valid_output": float(answer in task.labels)}
        case TaskKind.CHAT:
            return {"exact_match": float(answer == target.strip()), "valid_output": float(bool(answer))}
        case TaskKind.EXTRACT:
            return _score_json(task.json_schema or {}, json.loads(target), answer)
        case TaskKind.CALL:
            return _score_calls(task, target, answer)


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


def _score_calls(task: TaskSpec, target: str, answer: str) -> dict[str, float]:
    wanted, reading = calls_of(target), read_answer(answer)
    made = reading.calls
    readable = reading.problem is None and bool(made or reading.words)
    valid = readable and calls_check(task.tools)(made) is None
    same_tools = Counter(call.name for call in made) == Counter(call.name for call in wanted)
    return {
        "exact_match": float(readable and sorted(made) == sorted(wanted)),
        "valid_output": float(valid),
        "call:name": float(readable and same_tools),
        "call:arguments": _agreement(wanted, made) if readable else 0.0,
    }


def _agreement(wanted: Sequence[Call], made: Sequence[Call]) -> float:
    """Mean share of the arguments that agree; each wanted call is held against the call of its tool that is most alike.

    Pairs are made greedily, most alike first, so that equal calls always meet.
    """
    if not wanted and not made:
        return 1.0
    pairs = sorted(
        (-_alike(one.arguments, other.arguments), place, at)
        for place, one in enumerate(wanted)
        for at, other in enumerate(made)
        if one.name == other.name
    )
    total = 0.0
    paired: set[int] = set()
    used: set[int] = set()
    for share, place, at in pairs:
        if place not in paired and at not in used:
            paired.add(place)
            used.add(at)
            total -= share
    return total / max(len(wanted), len(made))


def _alike(one: str, other: str) -> float:
    """Share of the arguments, of either side, that both have with the same value; 1 where neither has any."""
    left, right = json.loads(one), json.loads(other)
    names = left.keys() | right.keys()
    same = sum(
        name in left and name in right and canonical_json(left[name]) == canonical_json(right[name]) for name in names
    )
    return same / len(names) if names else 1.0


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
