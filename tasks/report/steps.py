"""What a run shows of itself, as Prefect tasks: the run folder, the artifacts of the run's page, the final state."""

from __future__ import annotations

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed

from tasks.contracts.confidence import TrustRef
from tasks.contracts.references import (
    EvaluationRef,
    RawDatasetRef,
    RegisteredModelRef,
    Release,
    RunResult,
    SplitsRef,
    TrainedModelRef,
    ValidDatasetRef,
    VerdictRef,
)
from tasks.contracts.spec import EvaluationSpec, RetrainSpec
from tasks.report.summary import evaluation_markdown, verdict_markdown
from tasks.report.words import Placed, one_line, release_sentence, state_word
from tasks.runtime import open_store, say_done


def retrain_run_name() -> str:
    """The name of a run of `retrain`: its task, and why it was started where somebody says."""
    given = flow_run.parameters
    spec, reason = given.get("spec"), given.get("reason")
    name = spec.get("name") if isinstance(spec, dict) else getattr(spec, "name", None)
    return f"retrain {name}" + (f" ({reason})" if reason else "")


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
    release: Release,
    registered: RegisteredModelRef | None,
    champion_release: Placed | None = None,
    data_page: str | None = None,
    trust: TrustRef | None = None,
) -> str:
    """Write `verdict.json` and `report.html` into a new folder of the store; return where it is.

    `champion_release` is how the baseline came to be champion, where that is known; `data_page` is where the report on
    the data is; `trust` is what dev has shown of the candidate's confidence, where that was asked.
    """
    from tasks.report.folder import Run, write_folder
    from tasks.report.links import find_links

    links = find_links(spec, valid, trained, candidate, verdict, data_page)
    run = Run(
        spec, raw, valid, splits, trained, baseline, candidate, verdict, release, registered, links, champion_release,
        trust,
    )  # fmt: skip
    folder = write_folder(open_store(spec.execution), run)
    say_done("report", f"{folder}/report.html", reused=False)
    return folder


@task(name="publish verdict", persist_result=False, cache_policy=NO_CACHE)
def publish_verdict(
    spec: RetrainSpec,
    verdict: VerdictRef,
    release: Release,
    registered: RegisteredModelRef | None,
    valid: ValidDatasetRef,
    folder: str,
    champion_release: Placed | None = None,
    data_page: str | None = None,
    trust: TrustRef | None = None,
) -> None:
    """Show the verdict, its table, what its confidence is worth, and the links on the page of the run."""
    from tasks.report.folder import read_trust
    from tasks.report.links import as_address, keep_in_mlflow, read_links

    links = {"Report": as_address(f"{folder}/report.html"), **read_links(folder)}
    links |= keep_in_mlflow(spec, verdict, release, valid, folder, data_page)
    text = verdict_markdown(
        verdict.verdict, release, registered, links, folder=folder, champion_release=champion_release,
        trust=read_trust(open_store(spec.execution), trust),
    )  # fmt: skip
    create_markdown_artifact(text, key=_key(spec, "verdict"), description=verdict.verdict.reasons[0])


@task(name="publish evaluation", persist_result=False, cache_policy=NO_CACHE)
def publish_evaluation(spec: EvaluationSpec | RetrainSpec, result: EvaluationRef) -> None:
    """Show the scores of one model on the page of the run."""
    create_markdown_artifact(
        evaluation_markdown(result), key=_key(spec, "evaluation"), description=f"{result.system.label} on {spec.name}"
    )


def named_state(
    spec: RetrainSpec, verdict: VerdictRef, release: Release, registered: RegisteredModelRef | None, folder: str
) -> State[RunResult]:
    """The run's final state: completed, named for the verdict or for what a person said of it."""
    decided = verdict.verdict
    result = RunResult(name=spec.name, verdict=decided, release=release, folder=folder, registered=registered)
    person = release_sentence(release)
    if person and release.reason:
        person = f"{person}: {one_line(release.reason)}"
    message = f"{person}. The gate: {decided.reasons[0]}" if person else decided.reasons[0]
    return Completed(name=state_word(decided, release), message=message, data=result)


def _key(spec: EvaluationSpec | RetrainSpec, what: str) -> str:
    """A key as Prefect takes it: lower-case letters, digits and dashes."""
    return f"{spec.name.replace('_', '-')}-{what}"
