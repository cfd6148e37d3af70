"""How much chance moves a recipe, where a search has measured it: differences in a report are held against it."""

from __future__ import annotations

from typing import Any

from tasks.contracts.references import TrainedModelRef
from tasks.contracts.sweep import RetrainNoise
from tasks.store import Store


def find_noise(store: Store, trained: TrainedModelRef) -> RetrainNoise | None:
    """What the newest search found of this recipe on this base model, whatever the seed; None where none did.

    The data may have changed since: noise is of the recipe, and no search repeats itself for a few new rows.
    """
    made = store.open(trained.uri).manifest
    found = [
        one.manifest
        for one in store.list("sweep")
        if one.manifest.facts.get("noise") is not None
        and one.manifest.inputs.get("base") == made.inputs.get("base")
        and _without_seed(one.manifest.facts["recipe"]) == _without_seed(made.config["recipe"])
    ]
    if not found:
        return None
    return RetrainNoise.model_validate(max(found, key=lambda one: one.created).facts["noise"])


def _without_seed(recipe: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in recipe.items() if name != "seed"}
