"""The run folder from a store, and the verdict in short."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tasks.contracts.errors import StoreError
from tasks.contracts.references import (
    EvaluationRef,
    GoldenSetRef,
    Outcome,
    RawDatasetRef,
    RegisteredModelRef,
    SplitsRef,
    TrainedModelRef,
    ValidDatasetRef,
)
from tasks.contracts.spec import ExecutionSpec, Policy, TaskKind
from tasks.gate.files import judge_files, read_policy
from tasks.gate.keep import keep_verdict, verify_verdict
from tasks.report.folder import Run, write_folder
from tasks.report.links import as_address, keep_in_mlflow, read_links
from tasks.report.steps import named_state, write_run_folder
from tasks.report.summary import next_steps, verdict_markdown, verdict_table
from tasks.store import Store
from tasks.tracking import connect
from tests.report.example import (
    conditions,
    example_curves,
    example_report,
    example_spec,
    example_trained,
    outcomes,
    summary,
    systems,
)


def keep(store: Store, step: str, files: Mapping[str, str], facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Files as an artefact of the store; the fields of its reference."""

    def make(folder: Path) -> Mapping[str, Any]:
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
        return facts or {}

    return store.produce(step, 1, {}, {"files": " ".join(sorted(files))}, make).reference()


def lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture
def run(store: Store) -> Run:
    """A whole run in a store, up to its verdict."""
    spec = example_spec()
    evaluations = []
    for number, (system, share) in enumerate(zip(systems(), (0.41, 0.78), strict=True)):
        items = outcomes(200, share, number, TaskKind.CLASSIFY)
        made = keep(
            store,
            f"evaluate{number}",
            {
                "items.jsonl": "".join(item.model_dump_json() + "\n" for item in items),
                "summary.json": summary(system, spec, items, 40).model_dump_json(),
            },
        )
        evaluations.append(EvaluationRef(**made, system=system, conditions=conditions(spec), items=200, metrics={}))
    quarantine = [
        {"line": 7, "id": None, "reasons": ["the label 'cra\u2028sh' is not one of the task's"], "record": {}},
        {"line": 9, "id": "c9", "reasons": ["the text is empty"], "record": {}},
    ]
    valid = keep(
        store, "validate", {"quarantine.jsonl": lines(quarantine)}, {"reasons": {"unknown_label": 1, "no_text": 1}}
    )
    points = [
        {name: value for name, value in point._asdict().items() if value is not None} for point in example_curves()
    ]
    trained = example_trained().model_dump() | keep(
        store, "train", {"curves.jsonl": lines(points), "summary.json": "{}"}
    )
    splits = SplitsRef(
        **keep(store, "curate", {"train.jsonl": ""}), train_rows=800, dev_rows=90, removed={"near_duplicate": 108}
    )
    golden = GoldenSetRef(path="golden", digest="9" * 64, items=200)
    return Run(
        spec=spec,
        raw=RawDatasetRef(**keep(store, "ingest", {"rows.jsonl": ""}), rows=1000),
        valid=ValidDatasetRef(**valid, rows=998, quarantined=2, data_docs="/docs/index.html"),
        splits=splits,
        trained=TrainedModelRef(**trained),
        baseline=evaluations[0],
        candidate=evaluations[1],
        verdict=keep_verdict(store, evaluations[0], evaluations[1], splits, golden, Policy()),
        registered=None,
        links={"Data Docs": "file:///docs/index.html"},
    )


def test_the_folder_holds_the_verdict_and_the_report(store: Store, run: Run) -> None:
    folder = Path(write_folder(store, run))

    assert folder.parent == Path(store.root, "runs")
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "verdict.json"]
    name, stamp, _ = folder.name.rsplit("-", 2)
    assert name == "complaints"
    assert datetime.strptime(stamp, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC) <= datetime.now(UTC)

    kept, record = run.verdict.verdict, json.loads((folder / "verdict.json").read_text())
    assert record["verdict"] == "promote"
    assert record["reasons"] == list(kept.reasons)
    assert record["looks"] == 1
    assert list(record["metrics"]) == ["exact_match", "macro_f1", "valid_output"]
    primary, shown = kept.metrics[0], record["metrics"]["exact_match"]
    assert (shown["baseline"], shown["candidate"], shown["difference"], shown["n"]) == (
        primary.baseline, primary.candidate, primary.difference, 200,
    )  # fmt: skip
    assert shown["interval"] == [primary.low, primary.high]
    assert record["digests"] == {**kept.digests, "raw_data": run.raw.digest, "artefact": run.candidate.system.digest}
    assert {"data", "golden_set", "candidate", "baseline"} <= record["digests"].keys()
    assert record["registered"] is None
    assert read_links(str(folder)) == run.links

    html = (folder / "report.html").read_text(encoding="utf-8")
    assert kept.reasons[0].replace("<", "&lt;") in html
    assert "cra\u2028sh" in html
    assert "Rows read" in html
    evidence = html.split("--policy ")[1].split("/verdict.json")[0]
    assert verify_verdict(Path(evidence)) == kept
    again = judge_files(
        Path(evidence, "baseline"), Path(evidence, "candidate"), read_policy(Path(evidence, "verdict.json"))
    )
    assert (again.outcome, again.metrics) == (kept.outcome, kept.metrics)  # what the report says to run


def test_the_task_writes_the_folder_with_its_links(store: Store, run: Run) -> None:
    execution = ExecutionSpec(store=store.root, tracking_uri=f"sqlite:///{store.root}/mlflow.db")
    spec = run.spec.model_copy(update={"execution": execution})
    folder = write_run_folder.fn(
        spec, run.raw, run.valid, run.splits, run.trained, run.baseline, run.candidate, run.verdict, None
    )
    assert read_links(folder) == {"Data Docs": "file:///docs/index.html"}  # SQLite has no pages to link to


def test_report_verdict_and_data_docs_are_kept_in_mlflow(store: Store, run: Run, tmp_path: Path) -> None:
    docs = tmp_path / "data_docs"
    docs.mkdir()
    (docs / "index.html").write_text("<html>docs</html>")
    execution = ExecutionSpec(store=store.root, tracking_uri=f"sqlite:///{store.root}/mlflow.db")
    spec = run.spec.model_copy(update={"execution": execution})
    valid = run.valid.model_copy(update={"data_docs": str(docs / "index.html")})
    folder = write_run_folder.fn(
        spec, run.raw, valid, run.splits, run.trained, run.baseline, run.candidate, run.verdict, None
    )

    assert keep_in_mlflow(spec, run.verdict, valid, folder) == {}  # no server, so no address

    client = connect(execution)
    experiment = client.get_experiment_by_name(spec.name)
    assert experiment is not None
    (kept,) = client.search_runs([experiment.experiment_id])
    assert kept.info.run_name == f"verdict {run.verdict.verdict.outcome.value}"
    root = Path(client.download_artifacts(kept.info.run_id, ""))
    assert (root / "report.html").read_text() == Path(folder, "report.html").read_text()
    assert {path.name for path in root.iterdir()} == {"report.html", "verdict.json", "data_docs"}


def test_the_final_state_is_named_for_the_verdict(run: Run) -> None:
    state = named_state(run.spec, run.verdict, None, "/runs/x")
    assert (state.name, state.is_completed()) == ("Promoted", True)
    assert state.message == run.verdict.verdict.reasons[0]
    assert state.result().folder == "/runs/x"


def test_importing_the_tasks_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "mlflow", "great_expectations", "scipy", "pandas")
    code = f"import sys, tasks.gate.steps, tasks.report.steps; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_two_runs_have_two_folders(store: Store, run: Run) -> None:
    assert write_folder(store, run) != write_folder(store, run)


def test_a_run_folder_is_written_whole_or_not_at_all(store: Store, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text = Path.write_text

    def full_disk(path: Path, text: str, **options: Any) -> int:
        if path.name == "verdict.json":
            raise OSError(28, "No space left on device")
        return write_text(path, text, **options)

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(StoreError, match="No space left on device"):
        write_folder(store, run)
    assert list(Path(store.root, "runs").iterdir()) == []


def test_a_changed_artefact_stops_the_report(store: Store, run: Run) -> None:
    quarantine = store.files(store.open(run.valid.uri)) / "quarantine.jsonl"
    quarantine.write_text("")
    with pytest.raises(StoreError, match="was changed"):
        write_folder(store, run)


def test_a_remote_store_gets_the_same_files(run: Run) -> None:
    import fsspec

    from tasks.report.folder import _put

    remote = Store("memory://bucket/store")
    where = _put(remote, "complaints-1", {"report.html": "<p>", "verdict.json": '{"links": {}}'})
    assert where.endswith("/runs/complaints-1")
    with fsspec.open(f"{where}/report.html", "rt") as file:
        assert file.read() == "<p>"
    assert read_links(where) == {}


def test_the_table_is_the_verdict_in_words() -> None:
    verdict = example_report().verdict
    first, *rest = verdict_table(verdict)
    assert (first.metric, first.baseline, first.candidate, first.difference) == (
        "Exact match", "52.5 %", "82.8 %", "+30.3",
    )  # fmt: skip
    assert (first.interval, first.items, first.decides) == ("+25.0 to +35.4", "400", True)
    assert not any(row.decides for row in rest)


def test_markdown_shows_verdict_reasons_table_and_links() -> None:
    verdict = example_report(0.74, 0.62).verdict
    text = verdict_markdown(
        verdict, None, {"Report": "file:///a%20b/report.html", "MLflow": "http://127.0.0.1:5000/#/x"}
    )
    assert text.startswith("# Rejected\n")
    assert all(reason in text for reason in verdict.reasons)
    assert "| **Exact match** (decides) | 78.8 % | 70.8 % | −8.0 | −13.0 to −3.0 | 400 |" in text
    assert "Nothing was changed" in text
    assert "- Report: `/a b/report.html`\n- [MLflow](http://127.0.0.1:5000/#/x)\n" in text


@pytest.mark.parametrize(
    ("outcome", "registered", "says"),
    [
        (Outcome.PROMOTE, "3", "Version 3 is kept as `previous`"),
        (Outcome.PROMOTE, "", "the alias `champion` now names it."),
        (Outcome.PROMOTE, None, "has not registered it"),
        (Outcome.REJECT, None, "A new candidate is needed"),
        (Outcome.INCONCLUSIVE, None, "larger golden set"),
    ],
)
def test_what_follows_is_said(outcome: Outcome, registered: str | None, says: str) -> None:
    verdict = example_report(n=40).verdict.model_copy(update={"outcome": outcome})
    version = RegisteredModelRef(
        name="complaints", version="4", alias="champion", digest="c", previous_version=registered or None
    )
    assert says in next_steps(verdict, None if registered is None else version)


def test_paths_become_addresses_and_addresses_stay() -> None:
    assert as_address("/a b/index.html") == "file:///a%20b/index.html"
    assert as_address("s3://bucket/x") == "s3://bucket/x"
