"""The whole flow for a task whose answers are calls of tools: from conversations in JSON Lines to a verdict."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.retrain import retrain
from tasks.contracts.errors import ModelError
from tasks.contracts.references import ItemOutcome, Outcome, RunResult
from tasks.contracts.spec import (
    CurateSpec,
    DataSpec,
    EvaluateSpec,
    ExecutionSpec,
    GoldenSpec,
    Guard,
    Policy,
    RetrainSpec,
    TrainMethod,
    TrainSpec,
)
from tasks.data.golden import freeze
from tasks.store import Store
from tasks.tracking import registered_files
from tests.prefect_server import prefect_server
from tests.tiny import make_tiny_model
from tests.tool_toys import CALL, REFUND, RESTART, WORDS, openai_call, tool_rows, vocabulary, with_template
from tests.toys import toy_risks, write_jsonl

pytestmark = pytest.mark.timeout(600)

_BAD = {"role": "assistant", "content": None, "tool_calls": [openai_call("delete_all", "{}")]}


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    with prefect_server():
        yield


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> RetrainSpec:
    folder = tmp_path_factory.mktemp("calls")
    plain = make_tiny_model(folder / "plain", vocabulary())
    bad = {"id": "bad", "messages": [{"role": "user", "content": "please table"}, _BAD]}
    made = RetrainSpec(
        name="helpdesk",
        task=CALL,
        data=DataSpec(
            source=str(write_jsonl(folder / "rows.jsonl", [*tool_rows(360), bad])), messages_field="messages"
        ),
        golden=GoldenSpec(path=str(folder / "golden"), items=60),
        base_model=str(with_template(plain, folder / "base")),
        curate=CurateSpec(accept_risks=toy_risks(Guard.FEW_ROWS, Guard.LEARNING_RATE)),
        # All weights, since an adapter on random ones does not learn to write JSON in seconds.
        train=TrainSpec(
            method=TrainMethod.FULL, epochs=20, learning_rate=4e-3, batch_size=16, max_tokens=384, evaluations=2
        ),
        evaluate=EvaluateSpec(max_new_tokens=40, batch_size=30, baseline_shots=2, baseline_dev_items=10),
        policy=Policy(guards=({"metric": "call:name", "floor": 0.5},)),
        execution=ExecutionSpec(store=str(folder / "store"), tracking_uri=f"sqlite:///{folder}/mlflow.db"),
    )
    freeze(made)
    return made


def test_a_base_model_that_cannot_render_tools_is_refused_before_it_is_trained(spec: RetrainSpec) -> None:
    plain = spec.model_copy(update={"base_model": str(Path(spec.base_model).with_name("plain"))})
    with pytest.raises(ModelError, match="cannot render tools: it leaves out the definition of a tool") as refusal:
        retrain(plain)
    assert refusal.value.where == plain.base_model
    store = Store(spec.execution.store)
    assert [list(store.list(step)) for step in ("validate", "curate", "train")] == [[], [], []]


@pytest.mark.slow
def test_calls_are_learned_judged_and_served(spec: RetrainSpec) -> None:
    import mlflow

    result = retrain(spec)
    assert isinstance(result, RunResult)
    verdict = result.verdict
    assert verdict.outcome is Outcome.PROMOTE, verdict.reasons
    by_metric = {row.metric: row for row in verdict.metrics if row.slice is None}
    assert by_metric.keys() >= set(CALL.metrics)
    assert by_metric["exact_match"].candidate > 0.5 > by_metric["exact_match"].baseline

    store = Store(spec.execution.store)
    (valid,) = store.list("validate")
    assert valid.manifest.facts["reasons"] == {"calls": 1}
    outcomes = [
        [ItemOutcome.model_validate_json(line) for line in (store.files(one) / "items.jsonl").open(encoding="utf-8")]
        for one in store.list("evaluate")
    ]
    candidate = max(outcomes, key=lambda items: sum(item.scores["exact_match"] for item in items))
    said = Counter(item.prediction for item in candidate)
    assert said.keys() >= {REFUND, RESTART, WORDS}

    assert result.registered is not None
    files = registered_files(f"models:/{spec.name}@champion", spec.execution)
    served = json.loads(files.artifacts["task"].read_text(encoding="utf-8"))
    assert [tool["name"] for tool in served["prompt"]["tools"]] == ["refund", "restart"]
    model = mlflow.pyfunc.load_model(str(files.root))
    model.unwrap_python_model().model.float()  # as the evaluation on a CPU; in bfloat16 a tiny model answers otherwise
    assert model.predict([item.text for item in candidate]) == [item.prediction for item in candidate]
