"""What a run shows of itself, as Prefect tasks: the run folder, the artifacts of the run's page, the final state."""

from __future__ import annotations

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed

from tasks.contracts.references import (
    EvaluationRef,
    RawDatasetRef,
    RegisteredModelRef,
    RunResult,
    SplitsRef,
    TrainedModelRef,
    ValidDatasetRef,
    VerdictRef,
)
from tasks.contracts.spec import EvaluationSpec, RetrainSpec
from tasks.report.summary import evaluation_markdown, outcome_word, verdict_markdown
from tasks.runtime import open_store, say_done


@task(name="report", persist_result=False, cache_policy=NO_CACHE)
def write_run_folder(
    spec: RetrainSpec,
    raw: RawDatasetRef,
    valid: ValidDatasetRef,
    splits: SplitsRef,
    trained: TrainedModelRef,
    baseline: EvaluationRef,
    candidate: EvaluationRef,
    verdict: VerdictRef,
    registered: RegisteredModelRef | None,
) -> str:
    """Write `verdict.json` and `report.html` into a new folder of the store; return where it is."""
    from tasks.report.folder import Run, write_folder
    from tasks.report.links import find_links

    links = find_links(spec, valid, trained, candidate)
    run = Run(spec, raw, valid, splits, trained, baseline, candidate, verdict, registered, links)
    folder = write_folder(open_store(spec.execution), run)
    say_done("report", f"{folder}/report.html", reused=False)
    return folder


@task(name="publish verdict", persist_result=False, cache_policy=NO_CACHE)
def publish_verdict(
    spec: RetrainSpec,
    verdict: VerdictRef,
    registered: RegisteredModelRef | None,
    valid: ValidDatasetRef,
    folder: str,
) -> None:
    """Show the verdict, its table and the links on the page of the run."""
    from tasks.report.links import as_address, keep_in_mlflow, read_links

    links = {"Report": as_address(f"{folder}/report.html"), **read_links(folder)}
    links |= keep_in_mlflow(spec, verdict, valid, folder)
    text = verdict_markdown(verdict.verdict, registered, links)
    create_markdown_artifact(text, key=_key(spec, "verdict"), description=verdict.verdict.reasons[0])


@task(name="publish evaluation", persist_result=False, cache_policy=NO_CACHE)
def publish_evaluation(spec: EvaluationSpec | RetrainSpec, result: EvaluationRef) -> None:
    """Show the scores of one model on the page of the run."""
    create_markdown_artifact(
        evaluation_markdown(result), key=_key(spec, "evaluation"), description=f"{result.system.label} on {spec.name}"
    )


def named_state(
    spec: RetrainSpec, verdict: VerdictRef, registered: RegisteredModelRef | None, folder: str
) -> State[RunResult]:
    """The run's final state: completed, named for the verdict."""
    result = RunResult(
        name=spec.name,
        verdict=verdict.verdict,
        folder=folder,
        registered=registered,
    )
    return Completed(name=outcome_word(verdict.verdict.outcome), message=verdict.verdict.reasons[0], data=result)


def _key(spec: EvaluationSpec | RetrainSpec, what: str) -> str:
    """A key as Prefect takes it: lower-case letters, digits and dashes."""
    return f"{spec.name.replace('_', '-')}-{what}"
