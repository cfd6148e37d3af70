"""The Prefect task that asks dev rows."""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.contracts.dev import DevPart, DevResult
from tasks.contracts.prompt import decoding_for
from tasks.contracts.references import ItemOutcome, SplitsRef, SystemUnderTest
from tasks.contracts.spec import ExecutionSpec, PreferenceSpec, RetrainSpec
from tasks.runtime import open_store, progress_of, say_done

_DEV_VERSION = 1  # raise when what is kept changes; a changed score raises SCORER_VERSION


@task(name="ask dev", persist_result=False, cache_policy=NO_CACHE)
def ask_dev(system: SystemUnderTest, splits: SplitsRef, spec: RetrainSpec, part: DevPart = DevPart.ALL) -> DevResult:
    """Ask a model the dev rows of the splits; the same model asked the same way is asked once.

    Reads the splits and nothing else: the golden set is not opened, and no look at it is spent. `part` parts dev by
    `spec.preference` (its defaults where there is none).

    Raises:
        EvaluationError, ServiceError, ModelError: as `tasks.evaluation.dev.ask_and_keep`.
    """
    from tasks.evaluation.dev import ask_and_keep
    from tasks.evaluation.engines import engine_identity
    from tasks.evaluation.score import SCORER_VERSION

    store = open_store(spec.execution)
    decoding = decoding_for(spec.task, spec.evaluate.max_new_tokens)
    config: dict[str, Any] = {
        "task": spec.task,
        "prompt": system.prompt,
        "decoding": decoding,
        "engine": engine_identity(spec.evaluate),
        "scorer": SCORER_VERSION,
        "part": part,
    }
    if part is not DevPart.ALL:
        parting = spec.preference or PreferenceSpec()
        config |= {"seed": parting.seed, "mine_share": parting.mine_share}
    step = "ask dev" if part is DevPart.ALL else f"ask dev ({part.value.replace('_', ' ')})"
    with progress_of(step) as listener:
        artefact = store.produce(
            "ask_dev",
            _DEV_VERSION,
            config,
            {"model": system.digest, "splits": splits.digest},
            lambda folder: ask_and_keep(
                system, store.files(store.open(splits.uri)) / "dev.jsonl", part, spec, decoding, folder, listener
            ),
        )
    facts = artefact.manifest.facts
    metrics = ", ".join(f"{name} {value:.3f}" for name, value in facts["metrics"].items() if ":" not in name)
    say_done(step, f"{system.label}: {metrics} on {facts['items']:,} rows", reused=artefact.reused)
    return DevResult(**artefact.reference(), system=system, part=part, items=facts["items"], metrics=facts["metrics"])


def dev_outcomes(result: DevResult, execution: ExecutionSpec) -> list[ItemOutcome]:
    """Each answer of a result with its scores, in the order of the dev rows."""
    from tasks.evaluation.dev import read_outcomes

    store = open_store(execution)
    return read_outcomes(store.files(store.open(result.uri)))
