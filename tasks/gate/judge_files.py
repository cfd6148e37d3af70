"""The gate alone: a verdict on two files of outcomes, whoever made them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tasks.contracts.errors import EvaluationError
from tasks.contracts.references import Look, Outcome, SelfTest, Verdict
from tasks.contracts.spec import Policy
from tasks.gate.comparable import check_outcomes
from tasks.gate.decide import Side, give_verdict
from tasks.gate.files import EvaluationFile, read_evaluation
from tasks.gate.ledger import Ledger, LookRequest
from tasks.gate.looks import answers_digest, requirements_digest
from tasks.gate.pairs import make_pairs
from tasks.gate.selftest import RESAMPLED, TWO_EVALUATIONS, check_armed, self_test
from tasks.store import digest_bytes


def judge_files(
    baseline: Path,
    candidate: Path,
    policy: Policy,
    *,
    suites: Mapping[str, tuple[Path, Path]] | None = None,
    ledger: Ledger | None = None,
    asked_by: str = "goldgate gate",
    name: str = "files",
) -> Verdict:
    """The verdict on two evaluations that lie in files or folders.

    Args:
        baseline: what runs today: an evaluation folder, JSONL, CSV, Parquet, or a log of a harness.
        candidate: what wants its place, on the same items.
        policy: what is asked of the candidate.
        suites: both files of each suite that the policy's guards ask about, by name.
        ledger: where the look is counted; with none, the verdict says that it counts as the only one.
        asked_by: who asks, for the ledger.
        name: what the task is called, for the ledger.

    Raises:
        EvaluationError: a file cannot be read; names file and line.
        NotComparableError: the two cannot be compared.
        LedgerError: the ledger cannot be written, or the error budget of these items is spent.
        SpecError: the policy promotes more often than it promises on these outcomes.
    """
    left, right = read_evaluation(baseline, policy.metric), read_evaluation(candidate, policy.metric)
    asked = {guard.suite: guard.metric for guard in policy.guards}  # a suite may be of a task with other metrics
    others = {
        suite: (read_evaluation(one, metric), read_evaluation(other, metric))
        for suite, (one, other) in (suites or {}).items()
        for metric in [asked.get(suite, policy.metric)]
    }
    check_outcomes(left.outcomes, right.outcomes)  # before a look is spent
    tested = try_policy(left, None, policy)
    check_armed(tested, policy)
    page = left.conditions.golden_digest if left.conditions is not None else left.items_digest
    digests = {
        "golden_set": page,
        "candidate": right.system.digest,
        "baseline": left.system.digest,
        "candidate_outcomes": right.digest,
        "baseline_outcomes": left.digest,
    }
    digests |= {
        f"{suite}_{side}_outcomes": file.digest
        for suite, files in others.items()
        for side, file in zip(("baseline", "candidate"), files, strict=True)
    }

    def verdict_at(look: Look) -> Verdict:
        return give_verdict(
            _side(left),
            _side(right),
            policy,
            look=look,
            digests=digests,
            suites={suite: (_side(one), _side(other)) for suite, (one, other) in others.items()},
            self_test=tested,
        )

    verdict = verdict_at(uncounted(page, policy))  # all that can be refused is refused before a look is spent
    if ledger is None:
        return verdict
    suite_pages = "".join(f"{suite} {one.items_digest}" for suite, (one, _) in sorted(others.items()))
    request = LookRequest(
        page=page,
        name=name,
        candidate=right.system.digest,
        baseline=left.system.digest,
        requirements=digest_bytes(f"{requirements_digest(policy)} {suite_pages}".encode()),
        answers=digest_bytes((answers_digest(left.outcomes) + answers_digest(right.outcomes)).encode()),
        asked_by=asked_by,
    )
    look = settled(ledger.take_look(request, policy))
    verdict = verdict_at(look)
    ledger.record_verdict(look, request, verdict.outcome, digest_bytes(verdict.model_dump_json().encode()))
    return verdict


def try_policy(
    baseline: EvaluationFile,
    again: EvaluationFile | None,
    policy: Policy,
    *,
    histories: int | None = None,
    looks: int = 1,
) -> SelfTest:
    """The self-test of a policy on a baseline, or on two evaluations of it."""
    left, right = check_outcomes(baseline.outcomes, (again or baseline).outcomes)
    labels = baseline.conditions.decoding.choices if baseline.conditions is not None else ()
    noise = RESAMPLED if again is None else TWO_EVALUATIONS
    return self_test(make_pairs(left, right, labels), policy, noise=noise, histories=histories, looks=looks)


def read_again(baseline: Path, again: Path, policy: Policy) -> tuple[EvaluationFile, EvaluationFile]:
    """Two evaluations of one model.

    Raises:
        EvaluationError: a file cannot be read, or the two are of different models.
    """
    left, right = read_evaluation(baseline, policy.metric), read_evaluation(again, policy.metric)
    if left.conditions is not None and right.conditions is not None and left.system.digest != right.system.digest:
        raise EvaluationError(
            "The two evaluations are of different models, and a self-test compares a model with itself.",
            where=f"{baseline}: {left.system.digest}, {again}: {right.system.digest}",
            fix="evaluate the same model twice (`goldgate evaluate MODEL GOLDEN --again 1`)",
        )
    return left, right


def uncounted(page: str, policy: Policy) -> Look:
    """A look that no ledger counts: the only one at these items, as far as anybody knows."""
    return Look(page=page, number=None, level=policy.alpha, spent=policy.alpha, budget=policy.alpha)


def settled(look: Look) -> Look:
    """A look that was taken and never got its verdict, because the process died, is taken as new."""
    if look.repeated and look.first_outcome is None:
        return look.model_copy(update={"repeated": False, "same_answers": True})
    return look


def outcome_code(outcome: Outcome) -> int:
    """The exit code of the command line: 0 promote, 1 reject, 2 inconclusive."""
    return {Outcome.PROMOTE: 0, Outcome.REJECT: 1, Outcome.INCONCLUSIVE: 2}[outcome]


def _side(file: EvaluationFile) -> Side:
    return Side(file.system, file.conditions, file.outcomes)
