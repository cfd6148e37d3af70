"""The registry's Prefect tasks."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.contracts.confidence import TrustRef
from tasks.contracts.references import (
    CertificateRef,
    RegisteredModelRef,
    Release,
    ReleaseKind,
    SystemUnderTest,
    TrainedModelRef,
    VerdictRef,
)
from tasks.contracts.serving import Aliases, Intent, RolloutSpec, VersionRef
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


@task(name="resolve version", persist_result=False, cache_policy=NO_CACHE)
def resolve(spec: RolloutSpec) -> VersionRef:
    """The version that is to go live; from here on nobody asks an alias which one it is."""
    from tasks.registry.serving_aliases import resolve_version

    version = resolve_version(spec.name, spec.version, spec.execution)
    say_done("resolve version", f"{version.label}, sha256 {version.digest[:12]}", reused=False)
    return version


@task(name="move aliases", persist_result=False, cache_policy=NO_CACHE)
def move_champion(intent: Intent, spec: RolloutSpec) -> None:
    """Have the alias `champion` name the version that traffic goes to."""
    from tasks.registry.serving_aliases import move_champion as move

    move(intent, spec.execution)
    say_done("move aliases", f"champion is version {intent.to.version}", reused=False)


@task(name="restore aliases", persist_result=False, cache_policy=NO_CACHE)
def restore_aliases(intent: Intent, spec: RolloutSpec) -> None:
    """Put the aliases back as they were before a rollout."""
    from tasks.registry.serving_aliases import restore_aliases as restore

    restore(intent, spec.execution)
    say_done("restore aliases", f"champion is version {intent.aliases.champion}", reused=False)


@task(name="refuse version", persist_result=False, cache_policy=NO_CACHE)
def refuse_version(intent: Intent, spec: RolloutSpec) -> None:
    """Tag a version with why it did not go live."""
    from tasks.registry.serving_aliases import refuse_version as refuse

    refuse(intent, spec.execution)
    say_done("refuse version", intent.to.label, reused=False)


def read_aliases(name: str, spec: RolloutSpec) -> Aliases:
    """Which versions the aliases name."""
    from tasks.registry.serving_aliases import read_aliases as read

    return read(name, spec.execution)


@task(name="register", persist_result=False, cache_policy=NO_CACHE)
def register_champion(
    verdict: VerdictRef,
    certificate: CertificateRef,
    trained: TrainedModelRef,
    spec: RetrainSpec,
    trust: TrustRef | None = None,
) -> RegisteredModelRef:
    """Register the certified candidate and make it champion, or let it wait for its rollout."""
    from tasks.registry.register import has_trust, register

    registered = register(verdict, certificate, trained, spec, waits=spec.rollout is not None, trust=trust)
    previous = f", before it v{registered.previous_version}" if registered.previous_version else ""
    forced = f", FORCED by {certificate.release.by}" if certificate.release.kind is ReleaseKind.FORCED else ""
    said = f"{registered.name} v{registered.version} is {registered.alias}{forced}{previous}"
    if trust is not None and not has_trust(registered, trust, spec.execution):
        said += "; it was registered before, and keeps what was known of its confidence then, or that nothing was"
    say_done("register", said, reused=False)
    return registered
