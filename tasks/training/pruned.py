"""Trainings that were given up at a look, kept so that whoever asked for them, now or later, learns of it.

A training on another worker and a search that goes on after a crash both find here what they would else train again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.contracts.errors import PrunedError, TrainingError
from tasks.contracts.references import TrainRequest
from tasks.contracts.sweep import PrunedRef
from tasks.runtime import open_store
from tasks.store import Artefact, fingerprint

_STEP = "pruned"
_VERSION = 1  # raise it with the version of the training: other dev losses are pruned at other looks


def find_pruned(request: TrainRequest) -> PrunedRef | None:
    """What is known of this very request, limits included, having been given up; None when it was not."""
    if not request.stop_above:
        return None
    config, inputs = _recipe(request)
    artefact = open_store(request.execution).find(_STEP, fingerprint(_STEP, _VERSION, config, inputs))
    return None if artefact is None else _reference(artefact)


def keep_pruned(request: TrainRequest, scratch: Path, error: PrunedError) -> PrunedRef:
    """Keep why and where a training was given up, from what its scratch folder says.

    Raises:
        TrainingError: the scratch folder does not know of any look.
    """
    from tasks.training.checkpoints import CURVES
    from tasks.training.job import read_progress

    losses, steps = read_looks(scratch / CURVES)
    progress = read_progress(scratch)
    if not losses or progress is None:
        raise TrainingError(
            "The training was given up, and nothing is left of its looks at the dev loss.",
            where=str(scratch),
            fix="run it again",
        )

    def make(out: Path) -> Mapping[str, Any]:
        shutil.copyfile(scratch / CURVES, out / CURVES)
        return {
            "reason": error.what,
            "dev_losses": losses,
            "steps": steps,
            "planned_steps": round(progress.total),
        }

    config, inputs = _recipe(request)
    return _reference(open_store(request.execution).produce(_STEP, _VERSION, config, inputs, make))


def as_error(pruned: PrunedRef) -> PrunedError:
    """The same as the training process said it."""
    return PrunedError(
        pruned.reason,
        where="stop_above",
        fix="nothing; to train it to its end all the same, train its recipe on its own",
    )


def read_looks(curves: Path) -> tuple[list[float], int]:
    """The dev loss at each look, and the step of the last one (0 when there was none)."""
    records = [json.loads(line) for line in curves.read_text(encoding="utf-8").splitlines()]
    looks = [record for record in records if "dev_loss" in record]
    return [look["dev_loss"] for look in looks], looks[-1]["step"] if looks else 0


def _recipe(request: TrainRequest) -> tuple[dict[str, Any], dict[str, str]]:
    return (
        {"task": request.task, "recipe": request.recipe, "stop_above": request.stop_above},
        {"base": request.base.digest, "splits": request.splits.digest},
    )


def _reference(artefact: Artefact) -> PrunedRef:
    return PrunedRef(**artefact.reference(), **artefact.manifest.facts)
