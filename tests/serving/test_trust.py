"""What dev shows of a model's confidence, what it does not show, and what a gateway makes of it."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tasks.contracts.confidence import LearntTrust
from tasks.contracts.dev import DevPart, DevResult
from tasks.contracts.errors import EvaluationError
from tasks.contracts.prompt import Prompt
from tasks.contracts.references import ItemOutcome, SystemUnderTest
from tasks.contracts.serving import Trust
from tasks.contracts.spec import (
    ConfidenceSpec,
    DataSpec,
    ExecutionSpec,
    GoldenSpec,
    PreferenceSpec,
    RetrainSpec,
    RolloutSettings,
    TaskKind,
    TaskSpec,
)
from tasks.serving.trust import learn, sureness
from tasks.serving.trust_steps import has_trust, learn_trust, part_to_learn_from
from tasks.store import Store

LABELS = ("card", "loan")


def outcome(number: int, confidence: float | None, *, right: bool, prediction: str = "card") -> ItemOutcome:
    return ItemOutcome(
        id=f"d{number}", text="x", target="card" if right else "loan", prediction=prediction,
        scores={"exact_match": float(right), "valid_output": float(prediction in LABELS)}, latency_ms=1.0,
        prompt_tokens=9, output_tokens=1, confidence=confidence,
    )  # fmt: skip


def too_sure(count: int, seed: int = 1, *, twice: float = 2.0) -> list[ItemOutcome]:
    """Answers whose confidence is on the logit `twice` as far from a half as it should be."""
    draw, made = random.Random(seed), []
    for number in range(count):
        logit = draw.gauss(2.2, 1.6)
        right = draw.random() < 1 / (1 + math.exp(-logit))
        made.append(outcome(number, 1 / (1 + math.exp(-twice * logit)), right=right))
    return made


def learnt(outcomes: Iterable[ItemOutcome], **changes: Any) -> LearntTrust:
    spec = ConfidenceSpec(**({"target_accuracy": 0.9} | changes))
    return learn(list(outcomes), LABELS, spec, dev="d" * 64, engine="embedded")


def test_temperature_and_threshold_are_learnt_and_what_they_come_to_is_said() -> None:
    found = learnt(too_sure(1_500))
    assert found.calibration is not None
    assert found.calibration.temperature_low < 2.0 < found.calibration.temperature_high
    assert found.threshold.at is not None
    assert found.threshold.accuracy_low is not None
    assert found.threshold.accuracy_low >= 0.9
    assert (found.rows, found.no_choice, found.choices, found.dev, found.engine) == (
        1_500, 0, LABELS, "d" * 64, "embedded",
    )  # fmt: skip
    before = found.calibration.before
    assert found.why[0].startswith(
        f"On 1,500 dev rows the model is {100 * before.confidence:.1f} % sure on average and right on "
        f"{100 * before.accuracy:.1f} %, so it is too sure of itself; scaled by the temperature "
    )
    assert found.why[1] == found.threshold.why
    trust = Trust.of(found)
    assert (trust.temperature, trust.offset) == (found.calibration.temperature, found.calibration.offset)
    assert (trust.at, trust.target_accuracy) == (found.threshold.at, 0.9)
    assert trust.reviewed == pytest.approx(1 - found.threshold.coverage)
    assert trust.why == " ".join(found.why)


@pytest.mark.parametrize(
    ("outcomes", "said", "has_threshold"),
    [
        (too_sure(56), "56 dev rows are too few to learn from", False),
        ([outcome(n, 0.99, right=True) for n in range(400)], "Of 400 answers on dev 0 are wrong", True),
    ],
)
def test_what_dev_does_not_show_is_a_result_and_no_error(
    outcomes: list[ItemOutcome], said: str, has_threshold: bool
) -> None:
    found = learnt(outcomes)
    assert found.calibration is None
    assert found.why[0].startswith(f"Confidences are shown as the model gives them, not calibrated: {said}")
    assert (found.threshold.at is not None) is has_threshold
    trust = Trust.of(found)
    assert (trust.temperature, trust.offset) == (None, None)
    assert trust.reviewed == (0.0 if has_threshold else 1.0)
    assert sureness(0.995, trust) == (None, not has_threshold)


def test_an_engine_that_gives_no_confidences_has_every_answer_reviewed() -> None:
    found = learnt(outcome(n, None, right=True) for n in range(300))
    assert (found.calibration, found.threshold.at, found.threshold.curve) == (None, None, ())
    assert found.why == (
        "300 of 300 answers on dev have no confidence, since the engine (embedded) gives none.",
        "So no threshold can be chosen, and every answer goes to review. The engines `embedded` and `vllm` give "
        "confidences.",
    )
    assert Trust.of(found).reviewed == 1.0


def test_answers_that_are_no_choice_count_as_wrong_and_are_told() -> None:
    sure = [outcome(n, 0.999, right=True) for n in range(200)]
    cut = [outcome(1_000 + n, 0.999, right=False, prediction="ca") for n in range(40)]
    found = learnt([*sure, *cut])
    assert found.no_choice == 40
    assert found.why[-1] == (
        "40 of 240 answers were none of the choices; they count as wrong, and such answers are always reviewed."
    )
    assert found.threshold.rows == 240
    assert found.threshold.coverage == pytest.approx(200 / 240)


def test_rows_that_come_in_groups_are_told() -> None:
    alone = too_sure(300)
    grouped = [one.model_copy(update={"group": f"g{number // 3}"}) for number, one in enumerate(alone)]
    apart = [one.model_copy(update={"group": f"g{number}"}) for number, one in enumerate(alone)]
    assert learnt(grouped).why[-1] == (
        "The 300 dev rows come in 100 groups, and rows of a group are alike: what is shown is shown less surely than "
        "it says."
    )
    assert learnt(apart).why == learnt(alone).why == learnt(grouped).why[:-1]


def test_no_answers_at_all_are_an_error() -> None:
    with pytest.raises(EvaluationError, match="0 confidences for 0 answers"):
        learnt([])


def test_sureness_is_calibrated_and_held_against_the_threshold() -> None:
    trust = Trust(temperature=2.0, offset=0.5, at=0.8, target_accuracy=0.95, reviewed=0.2, why="made up")
    certainty = 1 / (1 + math.exp(-math.log(0.9 / 0.1) / 2.0 - 0.5))
    assert sureness(0.9, trust) == (pytest.approx(certainty), False)
    assert sureness(0.79, trust).flagged
    assert sureness(None, trust) == (None, True)
    with pytest.raises(EvaluationError, match=r"1\.5 is no probability"):
        sureness(1.5, trust)


# -- the step -------------------------------------------------------------------------------------------------------


def spec(folder: Path, **changes: Any) -> RetrainSpec:
    fields: dict[str, Any] = {
        "name": "tickets", "task": TaskSpec(kind=TaskKind.CLASSIFY, instruction="Which?", labels=LABELS),
        "data": DataSpec(source="unused"), "golden": GoldenSpec(path="unused"), "base_model": "unused",
        "rollout": RolloutSettings(confidence=ConfidenceSpec(target_accuracy=0.9)),
        "execution": ExecutionSpec(store=str(folder)),
    }  # fmt: skip
    return RetrainSpec(**(fields | changes))


def dev(store: Store, outcomes: list[ItemOutcome]) -> DevResult:
    def make(folder: Path) -> dict[str, Any]:
        (folder / "items.jsonl").write_text("".join(one.model_dump_json() + "\n" for one in outcomes))
        return {}

    made = store.produce("ask_dev", 1, {"engine": "embedded/transformers 5"}, {"model": "m" * 64}, make)
    system = SystemUnderTest(uri="m", digest="m" * 64, prompt=Prompt(system="Which?"), role="candidate", label="c")
    return DevResult(**made.reference(), system=system, part=DevPart.ALL, items=len(outcomes), metrics={})


def test_only_closed_answers_that_will_be_served_are_asked_for() -> None:
    asked = spec(Path("unused"))
    chat = TaskSpec(kind=TaskKind.CHAT, instruction="Talk.")
    assert has_trust(asked)
    assert not has_trust(asked.model_copy(update={"rollout": None}))
    assert not has_trust(asked.model_copy(update={"task": chat}))


def test_what_preferences_were_trained_on_is_not_learnt_from() -> None:
    asked = spec(Path("unused"))
    assert part_to_learn_from(asked) is DevPart.ALL
    assert part_to_learn_from(asked.model_copy(update={"preference": PreferenceSpec()})) is DevPart.HELD_OUT


def test_the_trust_is_kept_with_what_it_was_learnt_from_and_learnt_once(tmp_path: Path) -> None:
    asked, outcomes = spec(tmp_path), too_sure(600)
    store = Store(str(tmp_path))
    answers = dev(store, outcomes)
    trust = learn_trust.fn(answers, outcomes, asked)
    kept = LearntTrust.model_validate_json((store.files(store.open(trust.uri)) / "trust.json").read_text())
    assert kept == learn(
        outcomes, LABELS, ConfidenceSpec(target_accuracy=0.9), dev=answers.digest, engine="embedded/transformers 5"
    )
    assert (trust.calibrated, trust.at, trust.reused) == (True, kept.threshold.at, False)
    assert trust.reviewed == pytest.approx(1 - kept.threshold.coverage)
    again = learn_trust.fn(answers, outcomes, asked)
    assert (again.digest, again.reused) == (trust.digest, True)
    stricter = spec(tmp_path, rollout=RolloutSettings(confidence=ConfidenceSpec(target_accuracy=0.999)))
    other = learn_trust.fn(answers, outcomes, stricter)
    assert (other.at, other.reviewed, other.reused) == (None, 1.0, False)
    assert json.loads(store.open(other.uri).manifest.model_dump_json())["inputs"] == {"dev": answers.digest}
