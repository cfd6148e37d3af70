"""Dev rows as they are asked: which ones, what is kept, and that nothing else is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tasks.contracts.dev import DevPart, DevResult, rows_of_part
from tasks.contracts.errors import EvaluationError
from tasks.contracts.prompt import tuned_prompt
from tasks.contracts.references import SplitsRef, SystemUnderTest
from tasks.contracts.rows import Message, Row, write_rows
from tasks.contracts.spec import PreferenceSpec, RetrainSpec
from tasks.evaluation.dev_steps import ask_dev, dev_outcomes
from tasks.evaluation.engines.embedded import EmbeddedEngine
from tasks.store import Store, digest_folder

LABELS = ("billing", "support")
PARTING = PreferenceSpec(mine_share=0.5, seed=3)


def rows(count: int) -> list[Row]:
    return [Row(f"r{n}", n, (Message("user", f"about {LABELS[n % 2]}"),), LABELS[n % 2]) for n in range(count)]


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RetrainSpec:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return RetrainSpec.model_validate(
        {
            "name": "tickets",
            "task": {"kind": "classify", "instruction": "Which team?", "labels": LABELS},
            "data": {"source": "unused.jsonl"},
            "golden": {"path": str(tmp_path / "there is none")},  # so that reading it would fail
            "base_model": "unused",
            "evaluate": {"batch_size": 4},
            "preference": PARTING,
            "execution": {"store": str(tmp_path / "store")},
        }
    )


@pytest.fixture
def system(spec: RetrainSpec, tiny_model: Path) -> SystemUnderTest:
    return SystemUnderTest(
        uri=str(tiny_model),
        digest=digest_folder(tiny_model),
        prompt=tuned_prompt(spec.task),
        role="candidate",
        label="tiny",
    )


@pytest.fixture
def splits(spec: RetrainSpec) -> Callable[[int], SplitsRef]:
    def make(dev: int) -> SplitsRef:
        def write(folder: Path) -> dict[str, int]:
            write_rows(folder / "train.jsonl", rows(1))
            write_rows(folder / "dev.jsonl", rows(dev))
            return {}

        kept = Store(spec.execution.store).produce("curate", 1, {"dev": dev}, {}, write)
        return SplitsRef(**kept.reference(), train_rows=1, dev_rows=dev, removed={})

    return make


def ids(result: DevResult, spec: RetrainSpec) -> list[str]:
    return [outcome.id for outcome in dev_outcomes(result, spec.execution)]


def test_each_dev_row_is_asked_once_and_kept_with_its_scores(
    spec: RetrainSpec, system: SystemUnderTest, splits: Callable[[int], SplitsRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    dev = splits(12)
    seen: list[str] = []
    answer = EmbeddedEngine.answer

    def watched(engine: EmbeddedEngine, prompt: object, asked: Sequence[Row], *rest: object) -> object:
        seen.extend(row.id for row in asked)
        return answer(engine, prompt, asked, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(EmbeddedEngine, "answer", watched)
    result = ask_dev.fn(system, dev, spec)
    assert seen == [row.id for row in rows(12)]
    assert (result.part, result.items, result.system, result.reused) == (DevPart.ALL, 12, system, False)
    assert set(result.metrics) == {"exact_match", "valid_output", "macro_f1"}
    outcomes = dev_outcomes(result, spec.execution)
    assert [(one.id, one.target) for one in outcomes] == [(row.id, row.target) for row in rows(12)]
    right = [one.prediction == one.target for one in outcomes]
    assert [one.scores["exact_match"] for one in outcomes] == [float(one) for one in right]
    assert result.metrics["exact_match"] == sum(right) / 12
    assert result.metrics["valid_output"] == 1.0

    again = ask_dev.fn(system, dev, spec)
    assert again.reused
    assert again.model_copy(update={"reused": False}) == result
    assert len(seen) == 12, "what was asked is not asked again"


def test_parts_are_asked_apart_and_make_up_dev(
    spec: RetrainSpec, system: SystemUnderTest, splits: Callable[[int], SplitsRef]
) -> None:
    dev = splits(12)
    mined, held_out = (ask_dev.fn(system, dev, spec, part) for part in (DevPart.MINED, DevPart.HELD_OUT))
    for part, result in ((DevPart.MINED, mined), (DevPart.HELD_OUT, held_out)):
        assert ids(result, spec) == [row.id for row in rows_of_part(rows(12), part, PARTING)]
        assert result.items == len(ids(result, spec)) > 0
    assert sorted(ids(mined, spec) + ids(held_out, spec)) == sorted(row.id for row in rows(12))

    other = spec.model_copy(update={"preference": PARTING.model_copy(update={"seed": 4})})
    assert ids(ask_dev.fn(system, dev, other, DevPart.MINED), other) != ids(mined, spec)
    tuned_otherwise = spec.model_copy(update={"preference": PARTING.model_copy(update={"beta": 0.5})})
    assert ask_dev.fn(system, dev, tuned_otherwise, DevPart.MINED).reused


def test_a_part_without_rows_is_refused_with_what_to_turn(
    spec: RetrainSpec, system: SystemUnderTest, splits: Callable[[int], SplitsRef]
) -> None:
    parts = [part for part in (DevPart.MINED, DevPart.HELD_OUT) if not rows_of_part(rows(1), part, PARTING)]
    assert len(parts) == 1, "one row is in one part"
    with pytest.raises(EvaluationError, match=f"part: {parts[0].value.replace('_', ' ')}") as caught:
        ask_dev.fn(system, splits(1), spec, parts[0])
    assert "preference.mine_share" in caught.value.fix
    with pytest.raises(EvaluationError, match="part: all") as caught:
        ask_dev.fn(system, splits(0), spec)
    assert caught.value.where == "curate.dev_share"
    assert "mine_share" not in caught.value.fix
