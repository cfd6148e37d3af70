"""The room's tasks: references, reuse, and fingerprints that hold no place."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.contracts.errors import DataError
from tasks.contracts.references import CONTAMINATION_FILE, BaseModelRef, ContaminationReport
from tasks.contracts.spec import ExecutionSpec, Guard, MetricGuard, Policy, RetrainSpec, SuiteSpec
from tasks.data.golden import freeze
from tasks.data.steps import curate_dataset, ingest_dataset, open_golden_set, open_suites, validate_dataset
from tasks.store import Store
from tests.data.toy_data import read_lines, rows, write_lines

MakeSpec = Callable[..., RetrainSpec]
RISK = {"accept_risks": {Guard.FEW_ROWS: "toy rows for a test"}}


def test_from_source_to_splits(make_spec: MakeSpec, tmp_path: Path) -> None:
    bad = [{"id": "bad", "text": "t", "label": "sales"}, {"id": "worse", "text": None, "label": "billing"}]
    spec = make_spec(rows(200) + bad, curate=RISK)
    freeze(spec)

    golden = open_golden_set.fn(spec)
    raw = ingest_dataset.fn(spec)
    valid = validate_dataset.fn(raw, None, spec)
    splits = curate_dataset.fn(valid, golden, spec)
    assert (raw.rows, valid.rows, valid.quarantined) == (202, 200, 2)
    assert (splits.train_rows, splits.dev_rows, splits.removed) == (144, 16, {"golden_item": 40})
    assert [ref.reused for ref in (raw, valid, splits)] == [False] * 3
    store = Store(spec.execution.store)
    kept = (store.files(store.open(splits.uri)) / CONTAMINATION_FILE).read_text()
    contamination = ContaminationReport.model_validate_json(kept)
    assert (contamination.golden_digest, contamination.golden_items) == (golden.digest, 40)
    assert (contamination.rows, contamination.found) == (160, {})
    assert Path(valid.data_docs).is_file()
    quarantine = read_lines(Path(valid.data_docs).parent.parent / "quarantine.jsonl")
    assert [(entry["id"], entry["line"], entry["reasons"]) for entry in quarantine] == [
        ("bad", 201, ["label 'sales' is none of the task's labels"]),
        ("worse", 202, ["text is null"]),
    ]

    again = [ingest_dataset.fn(spec), validate_dataset.fn(raw, None, spec), curate_dataset.fn(valid, golden, spec)]
    for first, second in zip([raw, valid, splits], again, strict=True):
        assert second == first.model_copy(update={"reused": True})

    # Another store and another place of the same source: the same recipes, and the same bytes of rows and splits.
    (tmp_path / "elsewhere").mkdir()
    moved = spec.model_copy(
        update={
            "data": spec.data.model_copy(
                update={"source": str(Path(spec.data.source).rename(tmp_path / "elsewhere/data.jsonl"))}
            ),
            "execution": ExecutionSpec(store=str(tmp_path / "store2")),
        }
    )
    raw2 = ingest_dataset.fn(moved)
    valid2 = validate_dataset.fn(raw2, None, moved)
    splits2 = curate_dataset.fn(valid2, golden, moved)
    assert (raw2.fingerprint, valid2.fingerprint, splits2.fingerprint) == (
        raw.fingerprint,
        valid.fingerprint,
        splits.fingerprint,
    )
    assert (raw2.digest, splits2.digest) == (raw.digest, splits.digest)

    # What changes the result changes the recipe; what does not, does not.
    wider = moved.model_copy(update={"curate": moved.curate.model_copy(update={"dev_share": 0.2})})
    assert curate_dataset.fn(valid2, golden, wider).fingerprint != splits.fingerprint
    slower = moved.model_copy(update={"train": moved.train.model_copy(update={"learning_rate": 1e-4})})
    assert curate_dataset.fn(valid2, golden, slower).reused
    write_lines(Path(moved.data.source), rows(201))
    assert ingest_dataset.fn(moved).fingerprint != raw.fingerprint


def test_a_quarantine_outlives_the_failed_step(make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = make_spec([*rows(10), {"id": "bad", "text": "t", "label": "sales"}])
    raw = ingest_dataset.fn(spec)
    with pytest.raises(DataError, match="1 of 11 rows are invalid") as caught:
        validate_dataset.fn(raw, None, spec)
    (quarantine,) = (tmp_path / "store/scratch").glob("validate-*/quarantine.jsonl")
    assert caught.value.where is not None
    assert str(quarantine) in caught.value.where
    assert [entry["id"] for entry in read_lines(quarantine)] == ["bad"]
    assert not list((tmp_path / "store/validate").rglob("*.jsonl"))


def test_rows_that_are_too_long_for_training_stop_the_run(
    make_spec: MakeSpec, tiny_model: Path, tmp_path: Path
) -> None:
    """What validation counts as too long is what the guard of the curation looks at, and what it decides is kept apart
    from splits of the same rows that lost none.
    """
    long = [row | {"id": f"long{n}", "text": " ".join([row["text"]] * 30)} for n, row in enumerate(rows(3, seed=9))]
    wide = {"data": {"max_invalid_share": 0.1}, "train": {"max_tokens": 400}}
    spec = make_spec(rows(200), curate=RISK, **wide)
    store = Store(spec.execution.store)

    def model(folder: Path) -> dict[str, object]:
        shutil.copytree(tiny_model, folder / "model")
        return {}

    base = BaseModelRef(**store.produce("base_model", 1, {}, {}, model).reference(), source="tiny")
    valid = validate_dataset.fn(ingest_dataset.fn(spec), base, spec)
    splits = curate_dataset.fn(valid, None, spec)
    assert (valid.quarantined, splits.train_rows) == (0, 180)

    spec = make_spec(rows(200) + long, curate=RISK, **wide)
    valid = validate_dataset.fn(ingest_dataset.fn(spec), base, spec)
    assert (valid.rows, valid.quarantined) == (200, 3)
    with pytest.raises(DataError, match=r"3 of 203 rows \(1.5%\) are longer in tokens") as caught:
        curate_dataset.fn(valid, None, spec)
    assert caught.value.where == "guard long_rows"
    accepted = {"accept_risks": {**RISK["accept_risks"], Guard.LONG_ROWS: "quoted mail threads"}}
    lenient = curate_dataset.fn(valid, None, make_spec(rows(200) + long, curate=accepted, **wide))
    assert (lenient.train_rows, lenient.reused) == (180, False)


def test_every_suite_is_opened_and_named(make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("tasks.data.steps.say_done", lambda step, summary, *, reused: said.append(f"{step}: {summary}"))
    spec = make_spec(rows(60), items=20)
    assert open_suites.fn(spec) == ()
    assert said == []

    freeze(spec)
    suites = tuple(SuiteSpec(name=name, path=spec.golden.path) for name in ("general", "old"))
    guards = tuple(MetricGuard(suite=suite.name, margin=0.1) for suite in suites)
    opened = open_suites.fn(spec.model_copy(update={"suites": suites, "policy": Policy(guards=guards)}))
    assert [suite.name for suite in opened] == ["general", "old"]
    assert said == ["suites: general (20 items), old (20 items)"]


def test_the_steps_import_nothing_heavy() -> None:
    code = (
        "import sys, tasks.data.steps; "
        "print([name for name in ('torch', 'transformers', 'great_expectations', 'mlflow', 'datasets', 'pandas')"
        " if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
