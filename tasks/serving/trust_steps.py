"""The Prefect task that learns how far a model's answers are trusted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.contracts.confidence import TRUST_FILE, LearntTrust, TrustRef
from tasks.contracts.dev import DevPart, DevResult
from tasks.contracts.prompt import decoding_for
from tasks.contracts.references import ItemOutcome
from tasks.contracts.spec import RetrainSpec
from tasks.runtime import open_store, say, say_done

_TRUST_VERSION = 1  # raise when what is learnt changes


def has_trust(spec: RetrainSpec) -> bool:
    """Whether answers will have a confidence: the task has a closed answer, and a rollout will have it served."""
    return spec.rollout is not None and bool(decoding_for(spec.task, spec.evaluate.max_new_tokens).choices)


def part_to_learn_from(spec: RetrainSpec) -> DevPart:
    """All of dev, but where preferences were tuned only the part whose answers were not trained on."""
    return DevPart.ALL if spec.preference is None else DevPart.HELD_OUT


@task(name="learn trust", persist_result=False, cache_policy=NO_CACHE)
def learn_trust(dev: DevResult, outcomes: Sequence[ItemOutcome], spec: RetrainSpec) -> TrustRef:
    """Learn from a model's answers to dev rows what its confidence is worth, and from where on nobody needs to look.

    Args:
        dev: the answers.
        outcomes: the same, read.
        spec: has a rollout, which says what accuracy is wanted.

    Raises:
        EvaluationError: there are no answers, or a confidence is no probability.
    """
    from tasks.serving.trust import learn

    store = open_store(spec.execution)
    choices = decoding_for(spec.task, spec.evaluate.max_new_tokens).choices
    wanted = spec.rollout.confidence if spec.rollout is not None else None
    if wanted is None:
        raise ValueError("a trust is learnt for a rollout only")
    engine = str(store.open(dev.uri).manifest.config["engine"])

    def make(folder: Path) -> dict[str, Any]:
        learnt = learn(outcomes, choices, wanted, dev=dev.digest, engine=engine)
        (folder / TRUST_FILE).write_text(learnt.model_dump_json(indent=2), encoding="utf-8")
        return {
            "calibrated": learnt.calibration is not None,
            "at": learnt.threshold.at,
            "reviewed": 1 - learnt.threshold.coverage,
        }

    config = {"confidence": wanted, "choices": choices}
    artefact = store.produce("trust", _TRUST_VERSION, config, {"dev": dev.digest}, make)
    trust = TrustRef(**artefact.reference(), **artefact.manifest.facts)
    path = store.files(artefact) / TRUST_FILE
    for sentence in LearntTrust.model_validate_json(path.read_text(encoding="utf-8")).why:
        say("learn trust", sentence)
    scaling = "calibrated" if trust.calibrated else "not calibrated"
    said = "every answer goes to review" if trust.at is None else f"{trust.reviewed:.1%} of the answers go to review"
    say_done("learn trust", f"{scaling}; {said}", reused=trust.reused)
    return trust
