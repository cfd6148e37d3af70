"""A trained model that the store has, whichever stage of the training made it."""

from __future__ import annotations

from tasks.contracts.errors import TrainingError
from tasks.contracts.references import TrainedModelRef
from tasks.contracts.spec import ExecutionSpec
from tasks.store import Artefact


def trained_reference(artefact: Artefact) -> TrainedModelRef:
    """The reference to a trained model, with what its manifest says of it."""
    facts = artefact.manifest.facts
    own = TrainedModelRef.model_fields.keys() & facts.keys()
    return TrainedModelRef(**artefact.reference(), **{name: facts[name] for name in own})


def not_in_the_store(ended: str, execution: ExecutionSpec) -> TrainingError:
    """Why there is no model of a run that ended well on another worker; `ended` names that run in words."""
    return TrainingError(
        f"{ended} has ended well, but its model is not in the store of this run.",
        where=execution.store,
        fix="give all workers one `execution.store` that all can reach, and the same version of Goldgate",
    )
