"""The Prefect tasks of evaluation on the tiny model, called as functions: reuse, refusals, and what reaches MLflow."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.contracts.errors import GoldenSetError
from tasks.contracts.progress import Progress
from tasks.contracts.prompt import base_prompt, tuned_prompt
from tasks.contracts.references import (
    BaseModelRef,
    EvaluationRef,
    GoldenSetRef,
    ItemOutcome,
    SplitsRef,
    SuiteRef,
    SystemUnderTest,
)
from tasks.contracts.rows import Message, Row, write_rows
from tasks.contracts.spec import EvaluateSpec, EvaluationSpec, Policy, RetrainSpec, TaskSpec
from tasks.evaluation.steps import choose_baseline_prompt, evaluate_on_suites, evaluate_system
from tasks.runtime import display
from tasks.store import Store, digest_file, digest_folder

LABELS = ("billing", "support")


def rows(count: int, start: int = 0) -> list[Row]:
    return [
        Row(f"r{n}", n, (Message("user", f"ticket {n} about {LABELS[n % 2]}"),), LABELS[n % 2])
        for n in range(start, start + count)
    ]


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RetrainSpec:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return RetrainSpec.model_validate(
        {
            "name": "tickets",
            "task": {"kind": "classify", "instruction": "Which team?", "labels": LABELS},
            "data": {"source": "unused.jsonl"},
            "golden": {"path": str(tmp_path / "golden")},
            "base_model": "unused",
            "evaluate": {"batch_size": 4, "baseline_shots": 2, "baseline_dev_items": 10},
            "execution": {"store": str(tmp_path / "store")},
        }
    )


@pytest.fixture
def golden(tmp_path: Path) -> GoldenSetRef:
    (tmp_path / "golden").mkdir()
    count = write_rows(tmp_path / "golden" / "items.jsonl", rows(8))
    return GoldenSetRef(
        path=str(tmp_path / "golden"), digest=digest_file(tmp_path / "golden" / "items.jsonl"), items=count
    )


def system(spec: RetrainSpec, folder: Path, **changes: str) -> SystemUnderTest:
    fields = {"uri": str(folder), "digest": digest_folder(folder), "role": "candidate", "label": "candidate"} | changes
    return SystemUnderTest(prompt=tuned_prompt(spec.task), **fields)  # type: ignore[arg-type]


def evaluate(asked: SystemUnderTest, golden: GoldenSetRef, spec: EvaluationSpec) -> EvaluationRef:
    return evaluate_system.fn(asked, golden, spec)


def test_an_evaluation_is_kept_and_found_again_whoever_asks(
    spec: RetrainSpec, golden: GoldenSetRef, tiny_model: Path
) -> None:
    first = evaluate(system(spec, tiny_model), golden, spec.evaluation())
    assert (first.reused, first.items, first.conditions.golden_digest) == (False, 8, golden.digest)
    assert first.metrics["valid_output"] == 1.0, "choices hold even a random model to the labels"
    assert set(first.metrics) == {"exact_match", "valid_output", "macro_f1"}

    store = Store(spec.execution.store)
    lines = (store.files(store.open(first.uri)) / "items.jsonl").read_text().splitlines()
    outcomes = [ItemOutcome.model_validate_json(line) for line in lines]
    assert [outcome.id for outcome in outcomes] == [f"r{n}" for n in range(8)]

    bigger = spec.evaluation().model_copy(update={"evaluate": EvaluateSpec(batch_size=8)})
    again = evaluate(system(spec, tiny_model, role="champion", label="champion v1"), golden, bigger)
    assert (again.reused, again.digest) == (True, first.digest)
    assert (again.system.role, again.system.label) == ("champion", "champion v1"), "the reference names who was asked"

    longer = spec.evaluation().model_copy(update={"evaluate": EvaluateSpec(max_new_tokens=20)})
    assert not evaluate(system(spec, tiny_model), golden, longer).reused, "other decoding is another evaluation"


def test_items_reach_mlflow_as_a_table_that_its_evaluation_view_compares(
    spec: RetrainSpec, golden: GoldenSetRef, tiny_model: Path
) -> None:
    from tasks.tracking import connect

    asked = evaluate(system(spec, tiny_model), golden, spec.evaluation())
    client = connect(spec.execution)
    experiment = client.get_experiment_by_name("tickets")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.metrics["exact_match"] == asked.metrics["exact_match"]
    assert [listed["path"] for listed in json.loads(run.data.tags["mlflow.loggedArtifacts"])] == [
        "eval_results_table.json"
    ]
    table = json.loads(Path(client.download_artifacts(run.info.run_id, "eval_results_table.json")).read_text())
    assert table["columns"][:4] == ["id", "input", "target", "output"]
    assert [line[0] for line in table["data"]] == [f"r{n}" for n in range(8)]


class Shown:
    """A display that keeps what steps say."""

    def __init__(self) -> None:
        self.said: dict[str, str] = {}

    def start(self, step: str) -> None:
        return

    def update(self, step: str, progress: Progress) -> None:
        return

    def finish(self, step: str, summary: str, *, reused: bool) -> None:
        self.said[step] = summary


@pytest.fixture
def shown() -> Iterator[Shown]:
    listening = Shown()
    token = display.set(listening)
    yield listening
    display.reset(token)


def test_a_repetition_is_wanted_for_its_own_sake(
    spec: RetrainSpec, golden: GoldenSetRef, tiny_model: Path, shown: Shown
) -> None:
    asked = system(spec, tiny_model)
    first = evaluate_system.fn(asked, golden, spec.evaluation())
    again = evaluate_system.fn(asked, golden, spec.evaluation(), again=1)
    assert (again.reused, again.fingerprint != first.fingerprint) == (False, True)
    assert again.conditions == first.conditions, "the two can be compared"
    assert evaluate_system.fn(asked, golden, spec.evaluation(), again=1).reused
    assert evaluate_system.fn(asked, golden, spec.evaluation(), again=0).digest == first.digest
    assert evaluate_system.fn(asked, golden, spec.evaluation(), on="old").reused, "what it is called is no matter"
    assert shown.said.keys() == {"ask candidate", "ask candidate, old"}
    assert f"exact_match {first.metrics['exact_match']:.3f}" in shown.said["ask candidate"]


def test_scores_can_be_withheld(spec: RetrainSpec, golden: GoldenSetRef, tiny_model: Path, shown: Shown) -> None:
    from tasks.tracking import connect

    ladder = spec.model_copy(update={"policy": Policy(looks="ladder")}).evaluation()
    assert ladder.withhold_scores
    asked = evaluate_system.fn(system(spec, tiny_model), golden, ladder)
    assert shown.said == {"ask candidate": "candidate: scores withheld"}
    client = connect(spec.execution)
    (run,) = client.search_runs([client.get_experiment_by_name("tickets").experiment_id])
    assert run.data.metrics == {}
    assert client.list_artifacts(run.info.run_id) == []
    assert run.data.params["model"] == "candidate"
    assert asked.metrics["valid_output"] == 1.0, "the gate has them"


def test_a_suite_is_asked_through_the_base_prompt_of_its_own_task(
    spec: RetrainSpec, tiny_model: Path, tmp_path: Path, shown: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.evaluation.steps.evaluate_system", evaluate_system.fn)  # no server
    task = TaskSpec(kind="classify", instruction="Which animal?", labels=("cat", "dog"))
    (tmp_path / "old").mkdir()
    items = [Row(f"a{n}", n, (Message("user", f"animal {n}"),), task.labels[n % 2]) for n in range(6)]
    count = write_rows(tmp_path / "old" / "items.jsonl", items)
    frozen = GoldenSetRef(path=str(tmp_path / "old"), digest=digest_file(tmp_path / "old" / "items.jsonl"), items=count)
    asked = system(spec, tiny_model)

    results = evaluate_on_suites(asked, (SuiteRef(name="old", task=task, frozen=frozen),), spec)

    assert results.keys() == {"old"}
    result = results["old"]
    assert (result.items, result.conditions.golden_digest) == (6, frozen.digest)
    assert result.conditions.instruction == "Which animal?"
    assert result.conditions.decoding.choices == task.labels
    assert result.system.prompt == base_prompt(task)
    assert (result.system.digest, result.system.role) == (asked.digest, "candidate")
    assert list(shown.said) == ["ask candidate, old"]
    assert evaluate_on_suites(asked, (), spec) == {}


def test_a_golden_set_that_changed_meanwhile_stops_it(
    spec: RetrainSpec, golden: GoldenSetRef, tiny_model: Path
) -> None:
    items = Path(golden.path) / "items.jsonl"
    items.write_text(items.read_text().replace("billing", "support", 1))
    with pytest.raises(GoldenSetError, match="was changed") as caught:
        evaluate(system(spec, tiny_model), golden, spec.evaluation())
    assert caught.value.where == str(items)
    assert not list(Store(spec.execution.store).list("evaluate")), "nothing is kept"


def test_the_baseline_is_the_better_prompt_on_dev(spec: RetrainSpec, tiny_model: Path) -> None:
    import shutil

    store = Store(spec.execution.store)

    def model(folder: Path) -> dict[str, int]:
        shutil.copytree(tiny_model, folder / "model")
        return {}

    def splits(folder: Path) -> dict[str, int]:
        write_rows(folder / "train.jsonl", rows(20))
        write_rows(folder / "dev.jsonl", rows(30, start=100))
        return {}

    base = BaseModelRef(**store.produce("base_model", 1, {}, {}, model).reference(), source="tiny")
    split = SplitsRef(**store.produce("curate", 1, {}, {}, splits).reference(), train_rows=20, dev_rows=30, removed={})
    chosen = choose_baseline_prompt.fn(spec, base, split)
    (kept,) = store.list("baseline_prompt")
    scores = kept.manifest.facts["scores"]
    assert set(scores) == {"0-shot", "2-shot"}
    few_is_better = scores["2-shot"] > scores["0-shot"]
    assert chosen.label == ("base model, 2-shot" if few_is_better else "base model, zero-shot")
    assert chosen.prompt.system == base_prompt(spec.task).system
    assert len(chosen.prompt.shots) == (2 if few_is_better else 0)
    assert (chosen.uri, chosen.digest, chosen.role) == (f"{base.uri}#model", base.digest, "base_model")
    assert choose_baseline_prompt.fn(spec, base, split) == chosen
    assert len(list(store.list("baseline_prompt"))) == 1
