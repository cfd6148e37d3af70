"""The registry's Prefect tasks."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.contracts.references import RegisteredModelRef, SystemUnderTest, TrainedModelRef, VerdictRef
from tasks.contracts.spec import RetrainSpec
from tasks.runtime import say_done


@task(name="find champion", persist_result=False, cache_policy=NO_CACHE)
def find_system_to_beat(trained: TrainedModelRef, spec: RetrainSpec) -> SystemUnderTest | None:
    """The champion that a candidate must beat; None when that is the base model."""
    from tasks.registry.champion import find_opponent

    opponent = find_opponent(spec.name, trained, spec.execution)
    say_done("find champion", opponent.label if opponent else f"no champion of {spec.name} to beat", reused=False)
    return opponent


@task(name="register", persist_result=False, cache_policy=NO_CACHE)
def register_champion(verdict: VerdictRef, trained: TrainedModelRef, spec: RetrainSpec) -> RegisteredModelRef:
    """Register the promoted candidate and make it champion."""
    from tasks.registry.register import register

    registered = register(verdict, trained, spec)
    previous = f", before it v{registered.previous_version}" if registered.previous_version else ""
    say_done("register", f"{registered.name} v{registered.version} is {registered.alias}{previous}", reused=False)
    return registered
