"""Distilling as a whole, with a teacher behind HTTP and a model of two layers: what it trains, asks and says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.client.schemas.sorting import ArtifactSort

from flows.distill import distill
from tasks.contracts.distill import DistillEffect, DistillSpec
from tasks.contracts.errors import DataError, GoldenSetError
from tasks.contracts.rows import read_rows
from tasks.contracts.spec import (
    CurateSpec,
    ExecutionSpec,
    GoldenSpec,
    Guard,
    RetrainSpec,
)
from tasks.data.golden import ITEMS
from tasks.data.steps import curate_dataset, ingest_dataset, open_golden_set, validate_dataset
from tasks.gate.leakage import check_contamination, check_training_inputs
from tasks.store import Store, digest_file
from tests.data.synthesis.fake_teacher import Body, FakeTeacher, Say, fake_teacher, label_of, says
from tests.prefect_server import prefect_server
from tests.toys import LABELS, toy_risks, toy_rows, toy_spec

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    with prefect_server():
        yield


@pytest.fixture
def teacher() -> Iterator[FakeTeacher]:
    with fake_teacher() as state:
        yield state


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> RetrainSpec:
    """Toy rows, a frozen golden set and a tiny model."""
    folder = tmp_path_factory.mktemp("world")
    risks = toy_risks(Guard.FEW_ROWS, Guard.LEARNING_RATE, Guard.SELF_CHECK)
    return toy_spec(folder, toy_rows(400, seed=1), curate=CurateSpec(accept_risks=risks))


@pytest.fixture
def spec(tmp_path: Path, teacher: FakeTeacher, training: RetrainSpec) -> DistillSpec:
    """A teacher that may give other labels, and a store of the test's own."""
    execution = ExecutionSpec(store=str(tmp_path / "store"), tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    asked = {"url": teacher.url, "model": "big", "max_tokens": 64}
    return DistillSpec.model_validate(
        {
            "teacher": asked,
            "relabel": True,
            "training": training.model_copy(update={"execution": execution}),
        }
    )


def contrary(body: Body) -> Say:
    """Gives each ticket to the other team."""
    text = body["messages"][-1]["content"].partition("</input>")[0]
    return says({"answer": LABELS[1 - LABELS.index(label_of(text))]})


def page_of(key: str) -> str:
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(
            artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])), sort=ArtifactSort.CREATED_DESC
        )
    return str(found[0].data)


def test_both_are_trained_and_a_teacher_that_is_wrong_is_found_out_on_dev(
    spec: DistillSpec, teacher: FakeTeacher
) -> None:
    teacher.reply = contrary
    result = distill(spec)
    training, store = spec.training, Store(spec.training.execution.store)

    # Both sides are models of the store, one for each version of the answers.
    curated, rewritten = (next(iter(store.list(step))) for step in ("curate", "distill"))
    assert [side.splits for side in (result.original, result.rewritten)] == [
        curated.manifest.digest, rewritten.manifest.digest,
    ]  # fmt: skip
    assert len(list(store.list("train"))) == 2
    files = [store.files(one) for one in (curated, rewritten)]
    assert digest_file(files[0] / "dev.jsonl") == digest_file(files[1] / "dev.jsonl")
    answers = [[row.target for row in read_rows(folder / "train.jsonl")] for folder in files]
    assert all(one != other for one, other in zip(*answers, strict=True))
    assert result.changed == result.rows == len(answers[0])

    # Dev has the right answers, so the model that learned the wrong ones is worse on it, and shown to be.
    first = result.comparisons[0]
    assert result.effect is DistillEffect.LOSS
    assert (first.metric, first.n) == ("exact_match", curated.manifest.facts["dev"])
    assert first.baseline == result.original.metrics["exact_match"] > 0.8
    assert first.candidate == result.rewritten.metrics["exact_match"] < 0.2
    assert first.high < 0
    assert result.rewritten.dev_loss > result.original.dev_loss
    page = page_of("tickets-distillation")
    kept = Path(result.report).read_text(encoding="utf-8")
    assert page.startswith(kept)
    assert page.startswith("# Answers rewritten by `big`: loss\n\nLoss: Exact match is shown to be worse")
    assert f"{result.changed} of {result.rows} answers rewritten" in page
    assert "Better on dev: the original answers; keep them." in page
    assert f"--set data.source={result.source} --set data.source_field=source" in page
    record = json.loads(Path(result.report).with_name("report.json").read_text(encoding="utf-8"))
    assert record["effect"] == "loss"
    assert str(training.execution.store) not in json.dumps(record) + kept  # what is kept is the same in any store

    # Golden items are neither shown to the teacher nor asked; no look is taken.
    golden = [item.text for item in read_rows(Path(training.golden.path) / ITEMS)]
    asked = json.dumps(teacher.asked)
    assert not [text for text in golden if text in asked]
    assert list(store.list("evaluate")) == []
    assert not list(Path(training.execution.store).glob("ledger*"))

    # A second run asks nobody and finds the same.
    count = len(teacher.asked)
    again = distill(spec)
    assert (again.reused, again.digest, len(teacher.asked)) == (True, result.digest, count)

    # The rewritten splits fit the gate, and so does a run on the rewritten rows as its source.
    reference = open_golden_set.fn(training.evaluation())
    trained = next(one for one in store.list("train") if one.manifest.inputs["splits"] == rewritten.manifest.digest)
    splits_of_run = rewritten.reference() | {
        "train_rows": len(answers[1]), "dev_rows": first.n, "removed": {},
    }  # fmt: skip
    check_gate_takes(store, splits_of_run, trained.uri, reference)
    data = training.data.model_copy(update={"source": result.source, "source_field": "source"})
    next_run = training.model_copy(update={"data": data})
    raw = ingest_dataset.fn(next_run)
    splits = curate_dataset.fn(validate_dataset.fn(raw, None, next_run), reference, next_run)
    assert splits.train_rows + splits.dev_rows == raw.rows == len(answers[1]) + first.n
    assert check_contamination(store, splits, reference)


def check_gate_takes(store: Store, splits: dict[str, object], trained: str, golden: object) -> None:
    """The gate's own checks on leakage let the model of the rewritten splits pass."""
    from tasks.contracts.references import GoldenSetRef, SplitsRef, TrainedModelRef

    reference = SplitsRef.model_validate(splits)
    assert isinstance(golden, GoldenSetRef)
    assert check_contamination(store, reference, golden)
    kept = store.open(trained)
    facts = {name: kept.manifest.facts[name] for name in TrainedModelRef.model_fields if name in kept.manifest.facts}
    check_training_inputs(store, TrainedModelRef(**kept.reference(), **facts), reference)


def test_a_teacher_that_changes_nothing_ends_the_run_before_anything_is_trained(
    spec: DistillSpec, teacher: FakeTeacher
) -> None:
    def agrees(body: Body) -> Say:
        return says({"answer": body["messages"][-1]["content"].split("<answer>\n")[1].partition("\n")[0]})

    teacher.reply = agrees
    with pytest.raises(DataError, match=r"The teacher changed none of the \d+ answers") as caught:
        distill(spec)
    assert str(caught.value.where).endswith("originals.jsonl")
    assert list(Store(spec.training.execution.store).list("train")) == []


def test_without_a_golden_set_nothing_is_asked(spec: DistillSpec, teacher: FakeTeacher, tmp_path: Path) -> None:
    training = spec.training.model_copy(update={"golden": GoldenSpec(path=str(tmp_path / "elsewhere"))})
    with pytest.raises(GoldenSetError, match="not frozen yet"):
        distill(spec.model_copy(update={"training": training}))
    assert teacher.asked == []
