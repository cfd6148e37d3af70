"""What a guard found, and what becomes of it: the run stops, unless a person gave a reason to go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tasks.contracts.errors import GoldgateError
from tasks.contracts.spec import Guard


class Finding(NamedTuple):
    """What a guard found."""

    guard: Guard
    found: str
    fix: str


def settle(
    findings: Sequence[Finding],
    accept_risks: Mapping[Guard, str],
    refusal: type[GoldgateError],
    what: str = "This run would likely disappoint",
) -> list[Finding]:
    """The findings, each of which somebody gave a reason to go on with.

    Args:
        findings: what guards found.
        accept_risks: guards that are overridden, with reasons.
        refusal: the error to raise.
        what: what the error says before it names the finding.

    Raises:
        GoldgateError: of the type `refusal`; there is no reason to go on with a finding, the first such one is named.
    """
    for finding in findings:
        if finding.guard not in accept_risks:
            raise refusal(
                f"{what}: {finding.found}.",
                where=f"guard {finding.guard.value}",
                fix=f"{finding.fix}; or give a reason in `curate.accept_risks.{finding.guard.value}`",
            )
    return list(findings)
