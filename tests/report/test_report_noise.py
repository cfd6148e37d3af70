"""The noise of a recipe, found among the searches of a store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tasks.contracts.references import TrainedModelRef
from tasks.contracts.spec import TrainSpec
from tasks.contracts.sweep import RetrainNoise, Spread
from tasks.report.noise import find_noise
from tasks.store import Store
from tests.report.example import example_trained


def noise(*matches: float) -> RetrainNoise:
    spread = Spread(values=matches, mean=0.6, deviation=0.018, deviation_low=0.01, deviation_high=0.1)
    return RetrainNoise(seeds=(17, 18, 19), dev_loss=spread, exact_match=spread, dev_items=65)


def searched(store: Store, recipe: TrainSpec, found: RetrainNoise | None, base: str = "b", number: int = 0) -> None:
    facts: dict[str, Any] = {
        "recipe": recipe.model_dump(mode="json"),
        "noise": found.model_dump(mode="json") if found is not None else None,
    }
    store.produce("sweep", 1, {"number": number}, {"base": base, "splits": "s"}, lambda _: facts)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture
def trained(store: Store) -> TrainedModelRef:
    made = store.produce("train", 1, {"recipe": TrainSpec(seed=40)}, {"base": "b", "splits": "newer"}, lambda _: {})
    return example_trained().model_copy(update=made.reference())


def test_the_newest_search_with_this_recipe_tells(store: Store, trained: TrainedModelRef) -> None:
    assert find_noise(store, trained) is None
    searched(store, TrainSpec(seed=17), noise(0.5, 0.6, 0.7), number=1)
    searched(store, TrainSpec(seed=17), noise(0.6, 0.6, 0.7), number=2)
    searched(store, TrainSpec(lora_rank=4), noise(0.1, 0.1, 0.2), number=3)
    searched(store, TrainSpec(seed=17), noise(0.2, 0.1, 0.2), base="another", number=4)
    searched(store, TrainSpec(seed=17), None, number=5)
    found = find_noise(store, trained)
    assert found == noise(0.6, 0.6, 0.7)
    assert found.sentence().startswith("A retrain with another seed moves dev exact match by about ±1.8 points")
    assert "lie about 2.5 points apart" in found.sentence()
