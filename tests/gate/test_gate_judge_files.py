"""The gate alone: a verdict on two files, with or without a ledger."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tasks.contracts.errors import EvaluationError, LedgerError, NotComparableError, SpecError
from tasks.contracts.references import EvaluationSummary, ItemOutcome, Look, Outcome
from tasks.contracts.spec import MACRO_F1, LookPolicy, MetricGuard, Policy
from tasks.gate import judge_files as module
from tasks.gate.files import items_digest, read_evaluation
from tasks.gate.judge_files import judge_files, outcome_code, read_again, settled, try_policy
from tasks.gate.ledger import Ledger
from tests.gate.made_up import CONDITIONS, sides, system, with_column, write_evaluation


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(str(tmp_path / "ledger.db")) as opened:
        yield opened


def bare(path: Path, outcomes: Sequence[ItemOutcome], **columns: Sequence[Any]) -> Path:
    """A file of ids and scores, with what else is given item by item."""
    lines = [
        json.dumps(
            {"id": one.id, "score": one.scores["exact_match"]}
            | {name: values[number] for name, values in columns.items()}
        )
        for number, one in enumerate(outcomes)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def folder(path: Path, role: str, digest: str, outcomes: list[ItemOutcome]) -> Path:
    """An evaluation as `goldgate evaluate` writes it."""
    summary = EvaluationSummary(
        system=system(role, digest), conditions=CONDITIONS, items=len(outcomes), metrics={}, latency_p50_ms=1,
        latency_p95_ms=2, prompt_tokens=1, output_tokens=1, seconds=1,
    )  # fmt: skip
    path.mkdir()
    write_evaluation(path, summary, outcomes)
    return path


BEFORE, AFTER = sides(40, 10, 100, 50)


# -- without a ledger -----------------------------------------------------------------------------------------------


def test_two_files_have_a_verdict_that_says_what_it_takes_on_trust(tmp_path: Path) -> None:
    old, new = bare(tmp_path / "old.jsonl", BEFORE), bare(tmp_path / "new.jsonl", AFTER)
    verdict = judge_files(old, new, Policy())
    assert verdict.outcome is Outcome.PROMOTE
    assert (verdict.wins, verdict.losses, verdict.n) == (40, 10, 200)
    read = read_evaluation(old, "exact_match")
    assert verdict.look == Look(page=read.items_digest, number=None, level=0.05, spent=0.05, budget=0.05)
    assert verdict.digests == {
        "golden_set": items_digest(read.outcomes),
        "candidate": read_evaluation(new, "exact_match").digest,
        "baseline": read.digest,
        "candidate_outcomes": read_evaluation(new, "exact_match").digest,
        "baseline_outcomes": read.digest,
    }
    assert verdict.self_test is not None
    assert verdict.reasons[-2].startswith("No ledger was kept")
    assert "taken on trust" in verdict.reasons[-1]
    assert judge_files(old, new, Policy()) == verdict


def test_two_folders_are_checked_for_their_conditions(tmp_path: Path) -> None:
    old, new = folder(tmp_path / "old", "champion", "b", BEFORE), folder(tmp_path / "new", "candidate", "c", AFTER)
    verdict = judge_files(old, new, Policy(metric=MACRO_F1))
    assert (verdict.outcome, verdict.look.page, verdict.digests["candidate"]) == (Outcome.PROMOTE, "9" * 64, "c")
    assert not any("taken on trust" in reason for reason in verdict.reasons)
    summary = json.loads((new / "summary.json").read_text())
    summary["conditions"]["engine"] = "vllm"
    (new / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(NotComparableError, match=r"different conditions \(engine\)"):
        judge_files(old, new, Policy())


def test_groups_of_a_file_count(tmp_path: Path) -> None:
    # Four items each way, in groups of five that go together: eight conversations, of which four are won.
    before, after = sides(20, 0, 100, 80)
    alone = judge_files(bare(tmp_path / "a.jsonl", before), bare(tmp_path / "b.jsonl", after), Policy())
    assert alone.outcome is Outcome.PROMOTE
    group = [f"g{number // 5}" for number in range(200)]
    together = judge_files(
        bare(tmp_path / "c.jsonl", before, group=group), bare(tmp_path / "d.jsonl", after, group=group), Policy()
    )
    assert (together.outcome, together.groups) == (Outcome.INCONCLUSIVE, 40)
    assert together.p_value >= 1 / 16


def test_a_suite_may_have_metrics_of_its_own(tmp_path: Path) -> None:
    old, new = bare(tmp_path / "old.jsonl", BEFORE), bare(tmp_path / "new.jsonl", AFTER)
    polite = [tmp_path / "polite-old.jsonl", tmp_path / "polite-new.jsonl"]
    for path, score in zip(polite, (0.9, 0.5), strict=True):
        path.write_text("".join(json.dumps({"id": f"p{n}", "polite": score}) + "\n" for n in range(80)))
    policy = Policy(guards=(MetricGuard(suite="tone", metric="polite", margin=0.1),))
    verdict = judge_files(old, new, policy, suites={"tone": (polite[0], polite[1])})
    assert verdict.outcome is Outcome.REJECT
    assert verdict.digests.keys() >= {"tone_baseline_outcomes", "tone_candidate_outcomes"}
    with pytest.raises(NotComparableError, match="suite 'tone'"):
        judge_files(old, new, policy)


@pytest.mark.parametrize(("outcome", "code"), [(Outcome.PROMOTE, 0), (Outcome.REJECT, 1), (Outcome.INCONCLUSIVE, 2)])
def test_every_outcome_has_an_exit_code(outcome: Outcome, code: int) -> None:
    assert outcome_code(outcome) == code


# -- with one -------------------------------------------------------------------------------------------------------


def test_looks_are_counted_and_asking_again_is_no_new_one(tmp_path: Path, ledger: Ledger) -> None:
    old, new = folder(tmp_path / "old", "champion", "b", BEFORE), folder(tmp_path / "new", "candidate", "c", AFTER)
    other = folder(tmp_path / "other", "candidate", "d", AFTER)
    verdicts = [judge_files(old, one, Policy(), ledger=ledger, name="animals") for one in (new, other, new)]
    assert [one.look.number for one in verdicts] == [1, 2, 1]
    assert [one.look.level for one in verdicts] == pytest.approx([0.025, 0.05 / 6, 0.025])
    assert verdicts[2].reasons[-1] == "It was judged before, as look 1: judging it again is no new look."
    assert [(one.outcome, one.name, len(one.repeats)) for one in ledger.looks("9" * 64)] == [
        (Outcome.PROMOTE, "animals", 1), (Outcome.PROMOTE, "animals", 0),
    ]  # fmt: skip


@pytest.mark.parametrize("which", ["candidate", "baseline"])
def test_other_answers_of_either_model_cannot_promote_what_was_not_promoted(
    tmp_path: Path, ledger: Ledger, which: str
) -> None:
    before, after = sides(12, 10, 100, 78)
    old, new = folder(tmp_path / "old", "champion", "b", before), folder(tmp_path / "new", "candidate", "c", after)
    assert judge_files(old, new, Policy(), ledger=ledger).outcome is Outcome.INCONCLUSIVE
    if which == "candidate":
        new = folder(tmp_path / "lucky", "candidate", "c", sides(0, 0, 190, 10)[1])
    else:
        old = folder(tmp_path / "lucky", "champion", "b", sides(0, 0, 20, 180)[0])
    again = judge_files(old, new, Policy(), ledger=ledger)
    assert again.outcome is Outcome.INCONCLUSIVE
    assert (again.look.number, again.look.same_answers) == (1, False)
    assert "with other answers, and the verdict was INCONCLUSIVE" in again.reasons[0]


def test_the_same_answers_on_a_quicker_day_cannot_promote_either(tmp_path: Path, ledger: Ledger) -> None:
    policy = Policy(max_latency_ratio=1.0)
    slow, quick = [10.0, 12.0] * 100, [7.0, 8.0] * 100
    old = folder(tmp_path / "old", "champion", "b", BEFORE)
    new = folder(tmp_path / "new", "candidate", "c", with_column(AFTER, latency_ms=slow))
    assert judge_files(old, new, policy, ledger=ledger).outcome is Outcome.REJECT
    new = folder(tmp_path / "again", "candidate", "c", with_column(AFTER, latency_ms=quick))
    again = judge_files(old, new, policy, ledger=ledger)
    assert (again.outcome, again.look.same_answers) == (Outcome.INCONCLUSIVE, True)
    assert "in another time or at another cost, and the verdict was REJECT" in again.reasons[0]


@pytest.mark.parametrize(
    ("policy", "candidate", "error"),
    [
        (Policy(), AFTER[1:], NotComparableError),
        (Policy(guards=(MetricGuard(slice="phone", margin=0.1),)), AFTER, NotComparableError),
        (Policy(guards=(MetricGuard(suite="sums", margin=0.1),)), AFTER, NotComparableError),
        (Policy(max_cost_ratio=1.0), AFTER, NotComparableError),
        (Policy(metric="polite"), AFTER, (EvaluationError, NotComparableError)),
    ],
)
def test_what_is_refused_spends_no_look(
    tmp_path: Path, ledger: Ledger, policy: Policy, candidate: list[ItemOutcome], error: type[Exception]
) -> None:
    old, new = folder(tmp_path / "old", "champion", "b", BEFORE), folder(tmp_path / "new", "candidate", "c", candidate)
    with pytest.raises(error):
        judge_files(old, new, policy, ledger=ledger)
    assert ledger.pages() == ()


def test_a_policy_that_cannot_be_armed_spends_no_look(
    tmp_path: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise SpecError("This policy cannot be armed.", fix="mend it")

    old, new = folder(tmp_path / "old", "champion", "b", BEFORE), folder(tmp_path / "new", "candidate", "c", AFTER)
    monkeypatch.setattr(module, "check_armed", refuse)
    with pytest.raises(SpecError, match="cannot be armed"):
        judge_files(old, new, Policy(), ledger=ledger)
    assert ledger.pages() == ()


def test_a_spent_budget_gives_no_verdict(tmp_path: Path, ledger: Ledger) -> None:
    once = Policy(looks=LookPolicy.BONFERRONI, declared_looks=1)
    old = folder(tmp_path / "old", "champion", "b", BEFORE)
    judge_files(old, folder(tmp_path / "new", "candidate", "c", AFTER), once, ledger=ledger)
    with pytest.raises(LedgerError, match="1 look taken of 1 declared"):
        judge_files(old, folder(tmp_path / "other", "candidate", "d", AFTER), once, ledger=ledger)


def test_a_look_that_never_got_its_verdict_is_taken_as_new() -> None:
    taken = Look(page="p", number=2, level=0.01, spent=0.03, budget=0.05, repeated=True, same_answers=False)
    assert settled(taken) == taken.model_copy(update={"repeated": False, "same_answers": True})
    judged = taken.model_copy(update={"first_outcome": Outcome.REJECT})
    assert settled(judged) == judged


# -- a self-test on files -------------------------------------------------------------------------------------------


def test_a_self_test_takes_two_evaluations_of_one_model(tmp_path: Path) -> None:
    first, second = sides(10, 10, 100, 80)
    once, twice = folder(tmp_path / "once", "champion", "b", first), folder(tmp_path / "twice", "champion", "b", second)
    left, right = read_again(once, twice, Policy())
    assert try_policy(left, right, Policy(), histories=50).noise == "two evaluations"
    assert try_policy(left, None, Policy(), histories=50).noise == "resampled"
    other = folder(tmp_path / "other", "candidate", "c", second)
    with pytest.raises(EvaluationError, match="two evaluations are of different models"):
        read_again(once, other, Policy())
    read_again(bare(tmp_path / "a.jsonl", first), bare(tmp_path / "b.jsonl", second), Policy())  # who knows
