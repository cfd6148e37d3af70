"""The gate's Prefect tasks: before the compute, the verdict, what a person says of it, and the signature."""

from __future__ import annotations

import getpass
import math
import socket
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Literal

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.context import FlowRunContext
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from pydantic import Field

from tasks.contracts.confidence import TrustRef
from tasks.contracts.references import (
    Approval,
    BaseModelRef,
    CertificateRef,
    EvaluationRef,
    GoldenSetRef,
    Release,
    ReleaseKind,
    SplitsRef,
    TrainedModelRef,
    VerdictRef,
)
from tasks.contracts.serving import Proof, VersionRef
from tasks.contracts.spec import ExecutionSpec, Override, RetrainSpec
from tasks.runtime import open_store, say_done


class ApprovalForm(RunInput):
    """May this candidate be promoted? The run goes on with the answer; no answer in time means no promotion."""

    decision: Literal["approve", "decline"] = Field(description="No default: somebody has to choose.")
    by: str = Field(min_length=1, max_length=200, description="Who decides this.")
    comment: str = Field(min_length=1, max_length=2000, description="Why; it goes into the certificate.")


@task(name="check gate", persist_result=False, cache_policy=NO_CACHE)
def check_gate(golden: GoldenSetRef, spec: RetrainSpec) -> None:
    """Refuse, before any compute is spent, what the gate would refuse at the end.

    That is a ledger that cannot be written, a spent error budget, a guard about a slice that the golden set does not
    have, and a signing key that cannot be read.
    """
    from tasks.gate.before import check_before

    say_done("gate", check_before(open_store(spec.execution), golden, spec), reused=False)


@task(name="check budget", persist_result=False, cache_policy=NO_CACHE)
def check_budget(golden: GoldenSetRef, splits: SplitsRef, base: BaseModelRef, spec: RetrainSpec) -> None:
    """Refuse to train a candidate that could get no verdict, because the golden set's error budget is spent."""
    from tasks.gate import before

    before.check_budget(open_store(spec.execution), golden, splits, base, spec)


@task(name="judge", persist_result=False, cache_policy=NO_CACHE)
def judge(
    baseline: EvaluationRef,
    candidate: EvaluationRef,
    baseline_suites: Mapping[str, EvaluationRef],
    candidate_suites: Mapping[str, EvaluationRef],
    splits: SplitsRef,
    trained: TrainedModelRef,
    golden: GoldenSetRef,
    spec: RetrainSpec,
) -> VerdictRef:
    """Give the verdict on a candidate, count the look, and keep it with the outcomes that it rests on."""
    from tasks.gate.keep import Evaluated, Trained, keep_verdict
    from tasks.gate.ledger import Ledger, ledger_url

    suites = {name: Evaluated(one, candidate_suites[name]) for name, one in baseline_suites.items()}
    with Ledger.open(ledger_url(spec.execution)) as ledger:
        kept = keep_verdict(
            open_store(spec.execution),
            Evaluated(baseline, candidate),
            suites,
            Trained(splits, trained),
            golden,
            spec.policy,
            ledger,
            name=spec.name,
            asked_by=asked_by(),
        )
    say_done("judge", f"{kept.verdict.outcome.value.upper()}: {kept.verdict.reasons[0]}", reused=kept.reused)
    return kept


def decide_release(
    verdict: VerdictRef, spec: RetrainSpec, override: Override | None, approval: Approval | None
) -> Release:
    """What follows from the verdict. Where the policy asks a person, the run suspends until there is an answer.

    Only a run of a deployment can suspend; one of the command line ends as awaiting approval, and `goldgate approve`
    goes on from there. A suspended run starts again from its beginning, finds everything done, and finds the answer in
    the ledger.
    """
    release = settle(verdict, spec, override, approval)
    if release.kind is ReleaseKind.AWAITING and _can_suspend():
        answer = suspend_flow_run(
            wait_for_input=ApprovalForm.with_initial_data(description=_question(verdict)),
            timeout=math.ceil(3600 * (spec.policy.approval_hours or 0.0)),
            key=f"approve-{verdict.verdict.candidate.digest[:12]}",
        )
        if answer is not None:
            said = Approval(
                approve=answer.decision == "approve",
                by=answer.by,
                comment=answer.comment,
                candidate=verdict.verdict.candidate.digest,
            )
            release = settle(verdict, spec, None, said)
    return release


@task(name="release", persist_result=False, cache_policy=NO_CACHE)
def settle(verdict: VerdictRef, spec: RetrainSpec, override: Override | None, approval: Approval | None) -> Release:
    """What follows from the verdict and from what people have said; what they say now is kept in the ledger."""
    from tasks.gate.ledger import Ledger, ledger_url
    from tasks.gate.release import record, release_of

    with Ledger.open(ledger_url(spec.execution)) as ledger:
        release = release_of(
            verdict.verdict,
            datetime.now(UTC),
            override=override,
            approval=approval,
            decided=ledger.decisions(spec.name),
        )
        release = record(ledger, release, verdict.verdict, spec.name)
    who = f" by {release.by}: {release.reason}" if release.by else ""
    say_done("release", f"{release.kind.value.replace('_', ' ')}{who}", reused=False)
    return release


@task(name="certify", persist_result=False, cache_policy=NO_CACHE)
def certify_promotion(
    verdict: VerdictRef,
    release: Release,
    trained: TrainedModelRef,
    golden: GoldenSetRef,
    trust: TrustRef | None,
    spec: RetrainSpec,
) -> CertificateRef:
    """Sign what the promotion rests on, and how far the answers are trusted where that was learnt."""
    from tasks.gate.certificate import certify
    from tasks.gate.keys import open_signing_key

    store = open_store(spec.execution)
    key = open_signing_key(store)
    certificate = certify(
        store, verdict, trained, release, spec.name, golden, key,
        provenance=spec.data.provenance, licence=spec.data.licence, trust=trust,
    )  # fmt: skip
    say_done("certify", f"signed with key {certificate.key_id[:12]}", reused=certificate.reused)
    return certificate


@task(name="check certificate", persist_result=False, cache_policy=NO_CACHE)
def check_certificate(version: VersionRef, execution: ExecutionSpec) -> Proof | None:
    """Check the certificate of a version that is to go live, with a key that is trusted here."""
    from tasks.gate.proof import prove

    proof = prove(version, execution)
    said = f"signed by the key {proof.key_id[:12]}, {proof.release}" if proof else "none: a person set this baseline"
    say_done("check certificate", f"{version.label}, {said}", reused=False)
    return proof


def asked_by() -> str:
    """Who or what asks for a verdict: the flow run, or the person at this machine."""
    context = FlowRunContext.get()
    run = context.flow_run if context is not None else None
    if run is not None and run.deployment_id is not None:
        return f"flow run {run.name} {run.id}"[:200]
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"[:200]


def _can_suspend() -> bool:
    context = FlowRunContext.get()
    return context is not None and context.flow_run is not None and context.flow_run.deployment_id is not None


def _question(verdict: VerdictRef) -> str:
    decided = verdict.verdict
    reasons = "\n".join(f"- {reason}" for reason in decided.reasons)
    return (
        f"**Promote {decided.candidate.label} over {decided.baseline.label}?**\n\nThe gate says "
        f"{decided.outcome.value.upper()}:\n\n{reasons}\n\nNo answer in time means no promotion."
    )
