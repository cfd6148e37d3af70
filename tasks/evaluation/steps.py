"""The Prefect tasks of evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.contracts.prompt import Prompt, decoding_for
from tasks.contracts.references import (
    BaseModelRef,
    EvaluationRef,
    EvaluationSummary,
    GoldenSetRef,
    SplitsRef,
    SuiteRef,
    SystemUnderTest,
    TrainedModelRef,
)
from tasks.contracts.rows import read_rows
from tasks.contracts.spec import EvaluationSpec, GoldenSpec, PromptKind, RetrainSpec
from tasks.runtime import open_store, progress_of, say_done
from tasks.store import fingerprint

_PROMPT_VERSION = 1  # raise when the prompts that are tried, or the choice among them, change
_EVALUATE_VERSION = 1  # raise when an evaluation keeps something else; a changed score raises SCORER_VERSION


@task(name="choose baseline prompt", persist_result=False, cache_policy=NO_CACHE)
def choose_baseline_prompt(spec: RetrainSpec, base: BaseModelRef, splits: SplitsRef) -> SystemUnderTest:
    """The base model at its best honest prompt: what a candidate must beat before there is a champion."""
    from tasks.evaluation.baseline import best, prompts_to_try, score_prompts
    from tasks.evaluation.engines import engine_identity, open_engine
    from tasks.evaluation.score import SCORER_VERSION
    from tasks.evaluation.systems import base_system

    store = open_store(spec.execution)
    asked, decoding = spec.evaluate, decoding_for(spec.task, spec.evaluate.max_new_tokens)
    config = {
        "task": spec.task,
        "decoding": decoding,
        "shots": asked.baseline_shots,
        "dev_items": asked.baseline_dev_items,
        "metric": spec.policy.metric,
        "engine": engine_identity(asked),
        "scorer": SCORER_VERSION,
    }

    def make(folder: Path) -> dict[str, Any]:
        rows = store.files(store.open(splits.uri))
        prompts = prompts_to_try(spec.task, list(read_rows(rows / "train.jsonl")), asked.baseline_shots)
        dev = list(read_rows(rows / "dev.jsonl"))
        with open_engine(asked, f"{base.uri}#model", spec.execution) as engine:
            scored = score_prompts(
                engine, prompts, dev, asked.baseline_dev_items, spec.task, decoding, spec.policy.metric, listener
            )
        (folder / "prompt.json").write_text(best(scored).prompt.model_dump_json(indent=2), encoding="utf-8")
        return {"scores": {f"{len(one.prompt.shots)}-shot": one.score for one in scored}}

    with progress_of("baseline") as listener:
        artefact = store.produce(
            "baseline_prompt", _PROMPT_VERSION, config, {"base": base.digest, "splits": splits.digest}, make
        )
    prompt = Prompt.model_validate_json((store.files(artefact) / "prompt.json").read_text(encoding="utf-8"))
    system = base_system(base, prompt)
    scores = ", ".join(f"{name} {score:.3f}" for name, score in artefact.manifest.facts["scores"].items())
    say_done("baseline", f"{system.label} (on dev: {scores})", reused=artefact.reused)
    return system


@task(name="evaluate", persist_result=False, cache_policy=NO_CACHE)
def evaluate_system(
    system: SystemUnderTest, golden: GoldenSetRef, spec: EvaluationSpec, *, on: str = "", again: int = 0
) -> EvaluationRef:
    """Ask a model every golden item; the same model asked the same way is asked once.

    `on` names a suite in what is shown. `again` numbers a repetition that is wanted for its own sake, to see the
    engine's run-to-run noise.
    """
    from tasks.evaluation.engines import engine_identity
    from tasks.evaluation.keep import evaluate_and_keep
    from tasks.evaluation.score import SCORER_VERSION

    store = open_store(spec.execution)
    decoding = decoding_for(spec.task, spec.evaluate.max_new_tokens)
    config = {
        "task": spec.task,
        "prompt": system.prompt,
        "decoding": decoding,
        "engine": engine_identity(spec.evaluate),
        "scorer": SCORER_VERSION,
    }
    if again:
        config["again"] = again
    inputs = {"model": system.digest, "golden_set": golden.digest}
    key = fingerprint("evaluate", _EVALUATE_VERSION, config, inputs)
    step = f"ask {system.role.replace('_', ' ')}" + (f", {on}" if on else "")
    with progress_of(step) as listener:
        artefact = store.produce(
            "evaluate",
            _EVALUATE_VERSION,
            config,
            inputs,
            lambda folder: evaluate_and_keep(system, golden, spec, decoding, folder, listener, key=key),
        )
    kept = json.loads((store.files(artefact) / "summary.json").read_text(encoding="utf-8"))
    summary = EvaluationSummary.model_validate(kept).model_copy(update={"system": system})
    metrics = ", ".join(f"{name} {value:.3f}" for name, value in summary.metrics.items() if ":" not in name)
    shown = "scores withheld" if spec.withhold_scores else metrics
    say_done(step, f"{system.label}: {shown}", reused=artefact.reused)
    return EvaluationRef(
        **artefact.reference(),
        system=system,
        conditions=summary.conditions,
        items=summary.items,
        metrics=summary.metrics,
    )


def evaluate_on_suites(
    system: SystemUnderTest, suites: tuple[SuiteRef, ...], spec: RetrainSpec
) -> dict[str, EvaluationRef]:
    """Ask a model every item of each suite, through the base prompt of the suite's own task."""
    from tasks.evaluation.systems import for_suite

    results = {}
    for suite in suites:
        asked = spec.evaluation().model_copy(update={"task": suite.task, "golden": GoldenSpec(path=suite.frozen.path)})
        results[suite.name] = evaluate_system(for_suite(system, suite), suite.frozen, asked, on=suite.name)
    return results


def check_engine_is_there(spec: EvaluationSpec, model: str) -> None:
    """Refuse an engine that cannot be started, or not with this kind of model, before any compute is spent."""
    from tasks.evaluation.engines import check_engine

    check_engine(spec.evaluate, model)


def candidate_system(trained: TrainedModelRef, spec: RetrainSpec) -> SystemUnderTest:
    """What training made, as it will be asked."""
    from tasks.evaluation.systems import trained_system

    return trained_system(trained, spec.task)


def system_of(model: str, spec: EvaluationSpec, prompt: PromptKind) -> SystemUnderTest:
    """Any model by its URI."""
    from tasks.evaluation.systems import any_system

    return any_system(model, spec.task, spec.evaluate, spec.execution, prompt)
