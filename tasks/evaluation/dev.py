"""One model on dev rows, asked as it would be asked the golden set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.contracts.dev import DevPart, rows_of_part
from tasks.contracts.errors import EvaluationError
from tasks.contracts.progress import ProgressListener
from tasks.contracts.prompt import Decoding
from tasks.contracts.references import ItemOutcome, SystemUnderTest
from tasks.contracts.rows import read_rows
from tasks.contracts.spec import PreferenceSpec, RetrainSpec
from tasks.evaluation.engines import open_engine
from tasks.evaluation.evaluate import evaluate
from tasks.store import digest_file

ITEMS = "items.jsonl"
SUMMARY = "summary.json"


def ask_and_keep(
    system: SystemUnderTest,
    dev_file: Path,
    part: DevPart,
    spec: RetrainSpec,
    decoding: Decoding,
    folder: Path,
    listener: ProgressListener,
) -> dict[str, Any]:
    """Ask a model the rows of a part of dev; write `items.jsonl` and `summary.json`, return metrics and count.

    Raises:
        EvaluationError: the part has no rows, or a row cannot be asked.
        ServiceError, ModelError: as the engine.
    """
    rows = rows_of_part(read_rows(dev_file), part, spec.preference or PreferenceSpec())
    if not rows:
        raise EvaluationError(
            f"There are no dev rows to ask (part: {part.value.replace('_', ' ')}).",
            where="curate.dev_share",
            fix="raise `curate.dev_share`"
            + ("" if part is DevPart.ALL else ", or move `preference.mine_share` towards 0.5"),
        )
    with open_engine(spec.evaluate, system.uri, spec.execution) as engine:
        result = evaluate(engine, system, rows, spec.task, decoding, digest_file(dev_file), listener)
    with (folder / ITEMS).open("w", encoding="utf-8") as out:
        out.writelines(outcome.model_dump_json() + "\n" for outcome in result.outcomes)
    (folder / SUMMARY).write_text(result.summary.model_dump_json(indent=2), encoding="utf-8")
    return {"metrics": result.summary.metrics, "items": result.summary.items}


def read_outcomes(folder: Path) -> list[ItemOutcome]:
    """The answers that `ask_and_keep` wrote, in the order of the dev rows."""
    with (folder / ITEMS).open(encoding="utf-8") as lines:
        return [ItemOutcome.model_validate_json(line) for line in lines]
