"""The registry's Prefect tasks."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.contracts.references import (
    CertificateRef,
    RegisteredModelRef,
    Release,
    ReleaseKind,
    SystemUnderTest,
    TrainedModelRef,
    VerdictRef,
)
from tasks.contracts.spec import RetrainSpec
from tasks.runtime import say_done


@task(name="find champion", persist_result=False, cache_policy=NO_CACHE)
def find_system_to_beat(trained: TrainedModelRef, spec: RetrainSpec) -> SystemUnderTest | None:
    """The champion that a candidate must beat; None when that is the base model."""
    from tasks.registry.champion import find_opponent

    opponent, candidate_is = find_opponent(spec.name, trained, spec.execution)
    if candidate_is is None:
        said = opponent.label if opponent else f"no champion of {spec.name} to beat"
    elif opponent is not None and opponent.digest == trained.merged_digest:
        said = f"the candidate is {candidate_is} already, set without a verdict; compared with itself"
    else:
        against = f", {opponent.label}" if opponent else ""
        said = f"the candidate is {candidate_is} already; compared with what it was promoted against{against}"
    say_done("find champion", said, reused=False)
    return opponent


def release_of_baseline(baseline: SystemUnderTest, spec: RetrainSpec) -> Release | None:
    """How the baseline came to be champion; None where it is no champion, or a person set it without a verdict."""
    from tasks.registry.champion import find_release

    found = find_release(baseline, spec.execution)
    return Release.model_validate(found.model_dump()) if found and isinstance(found.kind, ReleaseKind) else None


@task(name="register", persist_result=False, cache_policy=NO_CACHE)
def register_champion(
    verdict: VerdictRef, certificate: CertificateRef, trained: TrainedModelRef, spec: RetrainSpec
) -> RegisteredModelRef:
    """Register the certified candidate and make it champion."""
    from tasks.registry.register import register

    registered = register(verdict, certificate, trained, spec)
    previous = f", before it v{registered.previous_version}" if registered.previous_version else ""
    forced = f", FORCED by {certificate.release.by}" if certificate.release.kind is ReleaseKind.FORCED else ""
    say_done(
        "register", f"{registered.name} v{registered.version} is {registered.alias}{forced}{previous}", reused=False
    )
    return registered
