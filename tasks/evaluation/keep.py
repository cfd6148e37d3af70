"""An evaluation as an artefact, and as a run of MLflow that can be compared with another item by item.

The items are logged as a table, not through `mlflow.genai.evaluate`: on SQLite, over 400 static answers, that had not
finished after 4 minutes on two busy cores and had lost traces (its connection pool ran out), where asking the answers
takes one to two minutes. A tenth of the evaluation was the limit. The table takes 0.06 s.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.contracts.errors import GoldenSetError
from tasks.contracts.progress import ProgressListener
from tasks.contracts.prompt import Decoding
from tasks.contracts.references import GoldenSetRef, SystemUnderTest
from tasks.contracts.rows import read_rows
from tasks.contracts.spec import EvaluationSpec
from tasks.evaluation.engines import open_engine
from tasks.evaluation.evaluate import Evaluation, evaluate
from tasks.store import digest_file
from tasks.tracking import TrackedRun, open_run

ITEMS = "items.jsonl"
TABLE = "eval_results_table"  # the name under which MLflow's evaluation view looks for per-item outcomes


def evaluate_and_keep(
    system: SystemUnderTest,
    golden: GoldenSetRef,
    spec: EvaluationSpec,
    decoding: Decoding,
    folder: Path,
    listener: ProgressListener,
    *,
    key: str,
) -> dict[str, Any]:
    """Evaluate a model on a golden set; write `items.jsonl` and `summary.json`, log both to MLflow.

    `key` is the evaluation's fingerprint, by which its run in MLflow is found.

    Raises:
        GoldenSetError: the items changed since the golden set was opened.
        EvaluationError, ServiceError, ModelError: as the engine.
    """
    items = Path(golden.path) / ITEMS
    if digest_file(items) != golden.digest:
        raise GoldenSetError(
            "The golden set was changed while the run was going on.",
            where=str(items),
            fix="bring the file back from version control or a backup",
        )
    rows = list(read_rows(items))
    tags = {"goldgate.model": system.uri, "goldgate.digest": system.digest, "goldgate.role": system.role}
    params = {
        "model": system.label,
        "engine": spec.evaluate.engine,
        "shots": len(system.prompt.shots),
        "max_new_tokens": decoding.max_new_tokens,
    }
    with open_run(spec.execution, spec.name, f"evaluate {system.label}", key=key, tags=tags, params=params) as run:
        with open_engine(spec.evaluate, system.uri, spec.execution) as engine:
            result = evaluate(engine, system, rows, spec.task, decoding, golden_digest=golden.digest, listener=listener)
        if not spec.withhold_scores:
            _log(run, result, golden)
    with (folder / ITEMS).open("w", encoding="utf-8") as out:
        out.writelines(outcome.model_dump_json() + "\n" for outcome in result.outcomes)
    (folder / "summary.json").write_text(result.summary.model_dump_json(indent=2), encoding="utf-8")
    return {"metrics": result.summary.metrics, "items": result.summary.items}


def _log(run: TrackedRun, result: Evaluation, golden: GoldenSetRef) -> None:
    summary = result.summary
    run.log_dataset("golden set", golden.digest, golden.path, golden.items)
    run.log_metrics(
        {
            **{name.replace(":", "."): value for name, value in summary.metrics.items()},
            "latency_p50_ms": summary.latency_p50_ms,
            "latency_p95_ms": summary.latency_p95_ms,
            "prompt_tokens": summary.prompt_tokens,
            "output_tokens": summary.output_tokens,
        }
    )
    run.log_table(
        TABLE,
        [
            {"id": one.id, "input": one.text, "target": one.target, "output": one.prediction, **one.scores}
            for one in result.outcomes
        ],
    )
