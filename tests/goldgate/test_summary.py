"""A verdict and a result as a terminal shows them."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from goldgate.summary import print_result, print_verdict
from tasks.contracts.references import Outcome, RunResult
from tests.report.example import example_reports

REPORTS = example_reports()


def shown(name: str, width: int = 120, *, result: bool = True) -> str:
    """What is printed for an example, without trailing spaces."""
    data, text = REPORTS[name], io.StringIO()
    console = Console(file=text, width=width)
    if result:
        ended = RunResult(
            name=data.spec.name, verdict=data.verdict, release=data.release, folder=data.folder,
            registered=data.registered,
        )  # fmt: skip
        print_result(console, data.spec, ended, reused=[])
    else:
        print_verdict(console, data.verdict)
    return re.sub(r" +$", "", text.getvalue(), flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "outcome"), [("promote", "PROMOTE"), ("reject", "REJECT"), ("inconclusive", "INCONCLUSIVE")]
)
def test_the_verdict_comes_first_with_its_reasons(name: str, outcome: str) -> None:
    text, verdict = shown(name), REPORTS[name].verdict
    assert text.lstrip().startswith(f"{outcome}  {verdict.reasons[0]}\n  {verdict.reasons[1]}\n")
    assert text.rstrip().endswith(f"/report.html\n\n{REPORTS[name].folder}")


def test_what_was_registered_says_how_it_is_served() -> None:
    registered = REPORTS["promote"].registered
    assert registered is not None
    assert f"goldgate rollout CONFIG --version {registered.version}\n" in shown("promote")
    assert "serve it" not in shown("reject")


def test_slices_and_suites_are_marked_under_the_whole() -> None:
    lines = shown("promote").splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("Exact match (decides)"))
    assert "98.33 % interval" in lines[at - 1]
    names = [re.split(r"  +", line.strip())[0] for line in lines[at + 1 : at + 8]]
    assert names == [
        "Macro-F1", "Valid output", "slice branch", "slice letter", "slice phone", "slice web", "suite general",
    ]  # fmt: skip
    assert lines[at + 3].startswith("  slice branch ")


def test_requirements_are_listed_when_there_is_more_than_the_deciding_one() -> None:
    text = shown("promote")
    assert re.search(r"^Latency +below 1\.20 × the baseline +0\.19 × +0\.16 to 0\.22 × +< 0\.0001 +shown$", text, re.M)
    assert re.search(r"^Exact match, slice phone +loses less than 8\.0 points .* failed$", shown("reject"), re.M)
    assert "requirement " not in shown("approved")


def test_numbers_are_whole_in_a_narrow_terminal() -> None:
    text = shown("reject", width=80)
    phone = next(one for one in REPORTS["reject"].verdict.requirements if one.slice == "phone")
    assert f"−{abs(100 * phone.low):.1f} to −{abs(100 * phone.high):.1f}" in text
    assert "…" not in text


def test_looks_and_budget_are_one_line() -> None:
    text = shown("promote")
    assert "\nLook 2 at this golden set. 1 earlier look has promoted. Error budget: earlier looks spent 2.5 %, " in text
    assert "this one may spend 0.833 %; 1.67 % of 5 % are left.\nSelf-test: The gate judged 2,000 made-up" in text
    assert "Little is left: freeze a fresh golden set" in shown("reject")
    assert "\nRepeated: this candidate was judged against this baseline before (look 2)" in shown("repeated")
    assert "\nNo ledger was kept, so nobody counts" in shown("forced")


def test_groups_are_counted() -> None:
    assert "\n300 items in 120 groups; each group counts as one draw.\n" in shown("inconclusive")
    assert "groups" not in shown("approved")


def test_what_would_change_a_verdict_is_said_and_nothing_hints_at_an_override() -> None:
    for name in ("reject", "worse", "inconclusive"):
        text = shown(name)
        assert "\nWhat would change the verdict:\n" in text
        assert "The registry is untouched." in text
        assert not re.search("forc|overrid", text, re.I)
    assert "What would change" not in shown("promote")


def test_who_decided_stands_under_the_verdict() -> None:
    assert re.search(r"^Forced by Jonas Brandt, 22 November 2026, 14:57 UTC: The supplier", shown("forced"), re.M)
    assert "Registered: complaints version 4, alias champion, forced by Jonas Brandt" in shown("forced")
    assert re.search(r"^Approved by Anna Meier, .*: Read the 14 lost items", shown("approved"), re.M)
    assert "Declined by Anna Meier, 22 November 2026, 14:57 UTC: Not before May." in shown("declined")
    assert "The registry is untouched." in shown("declined")


def test_a_run_that_awaits_a_person_says_how_to_answer() -> None:
    text, folder = shown("awaiting"), REPORTS["awaiting"].folder
    assert "A person has to approve this promotion, and nobody has answered yet." in text
    assert f"  approve:   goldgate approve {folder} --by NAME --comment '…'\n" in text
    assert f"  decline:   goldgate approve {folder} --by NAME --comment '…' --decline\n" in text


@pytest.mark.parametrize("name", ["withheld", "withheld_reject"])
def test_the_ladder_lets_out_the_rung_of_a_promotion_alone(name: str) -> None:
    text = shown(name)
    promoted = REPORTS[name].verdict.outcome is Outcome.PROMOTE
    assert ("\nRung: 83.0 %\n" in text) is promoted
    assert "Numbers are withheld" in text
    kept = text.replace("Rung: 83.0 %", "").replace("a step of 1.0 points", "")
    assert re.findall(r"\d+\.\d+ %|[+−]\d|p [<=]|interval|What would", kept) == []


def test_a_verdict_on_files_needs_no_release() -> None:
    text = shown("promote", result=False)
    assert text.lstrip().startswith("PROMOTE  ")
    assert "Registered" not in text
