"""What follows from a verdict: promoted by it alone, or after a person was asked, or on a person's word. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from tasks.contracts.errors import SpecError
from tasks.contracts.references import Approval, Outcome, Release, ReleaseKind, Verdict
from tasks.contracts.spec import Override
from tasks.gate.ledger import Decision, DecisionKind, Ledger

_ANSWERS = {DecisionKind.APPROVED: ReleaseKind.APPROVED, DecisionKind.DECLINED: ReleaseKind.DECLINED}


def release_of(
    verdict: Verdict,
    now: datetime,
    *,
    override: Override | None = None,
    approval: Approval | None = None,
    decided: Sequence[Decision] = (),
) -> Release:
    """What follows from a verdict and from what people have said so far.

    Args:
        verdict: the verdict.
        now: the time of an answer that comes with this call.
        override: a person's word against the verdict.
        approval: a person's answer to whether the candidate may be promoted.
        decided: what the ledger knows of earlier answers; the last one about this candidate stands.

    Raises:
        SpecError: the person means another candidate, or overrides a verdict that says PROMOTE already.
    """
    candidate = verdict.candidate.digest
    if override is not None:
        _check_candidate(override.candidate, candidate, "override.candidate")
        if verdict.outcome is Outcome.PROMOTE and verdict.policy.approval_hours is None:
            raise SpecError(
                "There is nothing to override: the verdict is PROMOTE.",
                where="override",
                fix="run without the override",
            )
        return Release(kind=ReleaseKind.FORCED, by=override.by, reason=override.reason, at=now)
    if verdict.outcome is not Outcome.PROMOTE:
        return Release(kind=ReleaseKind.NOT_PROMOTED)
    if verdict.policy.approval_hours is None:
        return Release(kind=ReleaseKind.BY_VERDICT)
    if approval is not None:
        _check_candidate(approval.candidate, candidate, "approval.candidate")
        kind = ReleaseKind.APPROVED if approval.approve else ReleaseKind.DECLINED
        return Release(kind=kind, by=approval.by, reason=approval.comment, at=now)
    answers = [one for one in decided if one.model == candidate and one.kind in _ANSWERS]
    if answers:
        last = answers[-1]
        return Release(kind=_ANSWERS[last.kind], by=last.by, reason=last.reason, at=last.at)
    return Release(kind=ReleaseKind.AWAITING)


def _check_candidate(meant: str | None, candidate: str, where: str) -> None:
    if meant is not None and meant != candidate:
        raise SpecError(
            f"This run's candidate is {candidate[:12]}, and the person decided about {meant[:12]}.",
            where=where,
            fix="look at this run's report, and decide about it anew",
        )


def record(ledger: Ledger, release: Release, verdict: Verdict, name: str) -> Release:
    """Keep a person's word in the ledger; said again with nothing said in between, it is kept once.

    Returns:
        The release under the time that the ledger has for it, so that whoever asks later finds the same one.

    Raises:
        LedgerError: the ledger cannot be written.
    """
    kinds = {
        ReleaseKind.APPROVED: DecisionKind.APPROVED,
        ReleaseKind.DECLINED: DecisionKind.DECLINED,
        ReleaseKind.FORCED: DecisionKind.FORCED_PROMOTION,
    }
    kind = kinds.get(release.kind)
    if kind is None or release.by is None or release.reason is None:
        return release
    candidate = verdict.candidate.digest
    said = [one for one in ledger.decisions(name) if one.model == candidate and one.kind in kinds.values()]
    if said and (said[-1].kind, said[-1].by, said[-1].reason) == (kind, release.by, release.reason):
        return release.model_copy(update={"at": said[-1].at})
    decision = ledger.record_decision(
        kind,
        name=name,
        page=verdict.look.page,
        model=candidate,
        outcome=verdict.outcome,
        by=release.by,
        reason=release.reason,
    )
    return release.model_copy(update={"at": decision.at})
