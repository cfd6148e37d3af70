"""The gate as a command of its own, on anyone's files of outcomes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from tasks.contracts.errors import SpecError
from tasks.contracts.references import SelfTest, Verdict
from tasks.gate.files import read_evaluation, read_policy
from tasks.gate.judge_files import judge_files, read_again, try_policy
from tasks.gate.ledger import Ledger
from tasks.gate.selftest import may_be_armed
from tasks.gate.steps import asked_by
from tasks.report.words import self_test_sentence

_LET_OUT = {"outcome", "reasons", "look", "withheld", "digests"}  # what a ladder lets out


def judge(
    baseline: Path, candidate: Path, policy: Path, suites: Mapping[str, tuple[Path, Path]], ledger: str | None
) -> Verdict:
    """The verdict on two files; with a ledger, the look is counted.

    Raises:
        GoldgateError: as `judge_files`.
    """
    asked = read_policy(policy)
    if ledger is None:
        return judge_files(baseline, candidate, asked, suites=suites)
    with Ledger.open(ledger) as opened:
        return judge_files(
            baseline, candidate, asked, suites=suites, ledger=opened, asked_by=asked_by(), name=baseline.stem or "files"
        )


def suite_files(given: Sequence[str]) -> dict[str, tuple[Path, Path]]:
    """`name=BASELINE,CANDIDATE` for each suite.

    Raises:
        SpecError: one does not read so, or a name is given twice.
    """
    found: dict[str, tuple[Path, Path]] = {}
    for text in given:
        name, _, files = text.partition("=")
        baseline, comma, candidate = files.partition(",")
        if not (name and baseline and comma and candidate) or name in found:
            raise SpecError(
                "A suite must read name=BASELINE,CANDIDATE, each name once.",
                where=f"--suite {text}",
                fix="give both files of the suite",
            )
        found[name] = (Path(baseline), Path(candidate))
    return found


def print_json(verdict: Verdict) -> None:
    """The verdict as JSON; of one under a ladder, only what it lets out."""
    print(json.dumps(verdict.model_dump(mode="json", include=_LET_OUT if verdict.withheld else None), indent=2))


def selftest(
    baseline: Path, again: Path | None, policy: Path, histories: int | None, looks: int
) -> tuple[SelfTest, bool]:
    """Try a policy on a baseline, or on two evaluations of it; whether it may be armed.

    Raises:
        GoldgateError: a file or the policy cannot be used.
    """
    asked = read_policy(policy)
    if again is None:
        result = try_policy(read_evaluation(baseline, asked.metric), None, asked, histories=histories, looks=looks)
    else:
        result = try_policy(*read_again(baseline, again, asked), asked, histories=histories, looks=looks)
    return result, may_be_armed(result, asked)


def print_self_test(console: Console, result: SelfTest, *, armed: bool, as_json: bool) -> None:
    """The flip rates, and whether the policy may be armed."""
    if as_json:
        print(json.dumps({**result.model_dump(mode="json"), "armed": armed}, indent=2))
        return
    console.print(self_test_sentence(result), highlight=False, soft_wrap=True)
    console.print(
        f"Differences: {result.noise}. Rejected at least once, and never promoted: {result.rejections:,} of "
        f"{result.histories:,}.",
        highlight=False,
        soft_wrap=True,
    )
    says = "[green]The policy may be armed.[/]" if armed else "[bold red]The policy cannot be armed.[/]"
    console.print(says, highlight=False)
