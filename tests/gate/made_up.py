"""Outcomes and evaluations with chosen counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.contracts.prompt import Decoding, Prompt
from tasks.contracts.references import Conditions, EvaluationRef, EvaluationSummary, ItemOutcome, SystemUnderTest
from tasks.store import Store

LABELS = ("cat", "dog")
CONDITIONS = Conditions(
    golden_digest="9" * 64,
    instruction="Which animal?",
    decoding=Decoding(max_new_tokens=8, choices=LABELS),
    engine="embedded/transformers 5.19.0/bfloat16",
    scorer_version=1,
)


def item(number: int, right: bool, **changes: Any) -> ItemOutcome:
    """The outcome of one item; cats and dogs take turns."""
    target = LABELS[number % 2]
    plain: dict[str, Any] = {
        "id": f"i{number:04d}",
        "text": f"animal {number}",
        "target": target,
        "prediction": target if right else LABELS[1 - number % 2],
        "scores": {"exact_match": float(right), "valid_output": 1.0},
        "latency_ms": 10.0,
        "prompt_tokens": 20,
        "output_tokens": 1,
    }
    return ItemOutcome(**(plain | changes))


def sides(wins: int, losses: int, both: int, neither: int) -> tuple[list[ItemOutcome], list[ItemOutcome]]:
    """Baseline and candidate with so many items that only the candidate, only the baseline, both or none have right."""
    pairs = [(False, True)] * wins + [(True, False)] * losses + [(True, True)] * both + [(False, False)] * neither
    return (
        [item(number, before) for number, (before, _) in enumerate(pairs)],
        [item(number, after) for number, (_, after) in enumerate(pairs)],
    )


def scored(scores: Sequence[float], **columns: Sequence[Any]) -> list[ItemOutcome]:
    """One side by its scores on exact_match; `columns` give other fields item by item (group, slice, latency_ms)."""
    plain = [
        item(number, score >= 0.5, scores={"exact_match": float(score), "valid_output": 1.0})
        for number, score in enumerate(scores)
    ]
    return with_column(plain, **columns)


def labelled(targets: Sequence[str], answers: Sequence[str], **columns: Sequence[Any]) -> list[ItemOutcome]:
    """One side by its answers; right where they are the targets."""
    rights = [float(answer == target) for answer, target in zip(answers, targets, strict=True)]
    return scored(rights, target=targets, prediction=answers, **columns)


def with_column(outcomes: list[ItemOutcome], **columns: Sequence[Any]) -> list[ItemOutcome]:
    """The same outcomes with other fields, item by item."""
    return [
        one.model_copy(update={name: values[number] for name, values in columns.items()})
        for number, one in enumerate(outcomes)
    ]


def system(role: str, digest: str) -> SystemUnderTest:
    return SystemUnderTest(
        uri=f"/models/{role}", digest=digest, prompt=Prompt(system="Which animal?"), role=role, label=role
    )  # type: ignore[arg-type]


def evaluation(
    store: Store, role: str, digest: str, items: list[ItemOutcome], conditions: Conditions = CONDITIONS
) -> EvaluationRef:
    """An evaluation in the store, as the evaluate stage keeps it."""
    summary = EvaluationSummary(
        system=system(role, digest), conditions=conditions, items=len(items), metrics={}, latency_p50_ms=1,
        latency_p95_ms=2, prompt_tokens=1, output_tokens=1, seconds=1,
    )  # fmt: skip

    def make(folder: Path) -> Mapping[str, Any]:
        write_evaluation(folder, summary, items)
        return {}

    scores = {"right": sum(one.scores["exact_match"] for one in items)}
    made = store.produce("evaluate", 1, {"role": role, **scores}, {"model": digest}, make)
    return EvaluationRef(**made.reference(), system=summary.system, conditions=conditions, items=len(items), metrics={})


def write_evaluation(folder: Path, summary: EvaluationSummary, items: list[ItemOutcome]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "items.jsonl").write_text("".join(one.model_dump_json() + "\n" for one in items), encoding="utf-8")
    (folder / "summary.json").write_text(summary.model_dump_json(), encoding="utf-8")
