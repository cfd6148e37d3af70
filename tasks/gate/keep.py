"""A verdict as an artefact: kept with its evidence, so that anyone who doubts it can recompute it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tasks.contracts.errors import NotComparableError, StoreError
from tasks.contracts.references import (
    CONTAMINATION_FILE,
    EvaluationRef,
    EvaluationSummary,
    GoldenSetRef,
    Look,
    SelfTest,
    SplitsRef,
    TrainedModelRef,
    Verdict,
    VerdictRef,
)
from tasks.contracts.spec import Policy
from tasks.gate.decide import Side, give_verdict
from tasks.gate.files import read_evaluation
from tasks.gate.judge_files import settled, try_policy, uncounted
from tasks.gate.leakage import check_contamination, check_training_inputs
from tasks.gate.ledger import Ledger, LookRequest
from tasks.gate.looks import answers_digest, requirements_digest
from tasks.gate.selftest import check_armed
from tasks.store import Store, digest_bytes, digest_file

STEP = "verdict"
VERSION = 2
VERDICT_FILE = "verdict.json"
ITEMS_FILE = "items.jsonl"
SUMMARY_FILE = "summary.json"
SUITES = "suites"
SIDES = ("baseline", "candidate")


class Evaluated(NamedTuple):
    """Baseline and candidate on one set of items."""

    baseline: EvaluationRef
    candidate: EvaluationRef


class Trained(NamedTuple):
    """Where a candidate comes from: what it was trained on, and what training made."""

    splits: SplitsRef
    model: TrainedModelRef


def keep_verdict(
    store: Store,
    evaluated: Evaluated,
    suites: Mapping[str, Evaluated],
    trained: Trained,
    golden: GoldenSetRef,
    policy: Policy,
    ledger: Ledger,
    *,
    name: str,
    asked_by: str,
) -> VerdictRef:
    """Give the verdict on two evaluations, count the look, and keep it all.

    The artefact holds `verdict.json`, `baseline/` and `candidate/` as evaluated, `suites/<name>/` likewise, and the
    contamination report. The same evaluations under the same policy have one verdict: asked again, the kept one is
    handed out, and no new look is taken.

    Everything that can be refused is refused before a look is spent; the look is taken before the verdict is computed,
    and the verdict recorded before anybody is told.

    Raises:
        NotComparableError: the evaluations cannot be compared with each other, or are not those of this golden set.
        LeakageError: nothing shows that golden items are absent from the training data.
        SpecError: on the baseline against itself, the policy promotes more often than it promises.
        LedgerError: the ledger cannot be written, or the golden set's error budget is spent.
        StoreError: an evaluation was changed since it was made, or the store cannot be written.
    """
    for side, evaluation in zip(SIDES, evaluated, strict=True):
        if evaluation.conditions.golden_digest != golden.digest:
            raise NotComparableError(
                f"The {side} was evaluated on another golden set than the one of this run.",
                where=f"{side}: {evaluation.conditions.golden_digest}, run: {golden.digest}",
                fix="evaluate it on this golden set",
            )
    contamination = check_contamination(store, trained.splits, golden)
    check_training_inputs(store, trained.model, trained.splits)
    digests = {
        "data": trained.splits.digest,
        "golden_set": golden.digest,
        "candidate": evaluated.candidate.system.digest,
        "baseline": evaluated.baseline.system.digest,
    }
    evaluations = {f"{side}_evaluation": one.digest for side, one in zip(SIDES, evaluated, strict=True)} | {
        f"{suite}_{side}": one.digest for suite, pair in suites.items() for side, one in zip(SIDES, pair, strict=True)
    }
    request = _request(store, evaluated, suites, policy, name, asked_by)

    def make_with(look: Look, tested: SelfTest, folder: Path) -> Mapping[str, Any]:
        _copy_evidence(store, evaluated, suites, trained.splits, folder)
        verdict = _compute(folder, policy, look=look, digests=digests | {"contamination": contamination}, tested=tested)
        (folder / VERDICT_FILE).write_text(verdict.model_dump_json(indent=2) + "\n", encoding="utf-8")
        return {"outcome": verdict.outcome.value, "look": verdict.look.number}

    left = read_evaluation(store.files(store.open(evaluated.baseline.uri)), policy.metric)
    tested = try_policy(left, None, policy)
    check_armed(tested, policy)
    give_verdict(  # thrown away: all that can be refused is refused before a look is spent
        *_evaluated(store, evaluated, policy.metric),
        policy,
        look=uncounted(golden.digest, policy),
        digests={},
        suites={suite: _evaluated(store, pair, policy.metric) for suite, pair in suites.items()},
    )
    look = settled(ledger.take_look(request, policy))
    artefact = store.produce(
        STEP,
        VERSION,
        policy,
        digests | evaluations | {"contamination": contamination, "look": f"{look.number}"},
        lambda folder: make_with(look, tested, folder),
    )
    text = (store.files(artefact) / VERDICT_FILE).read_text(encoding="utf-8")
    verdict = Verdict.model_validate_json(text)
    if not artefact.reused or look.first_outcome is None:
        ledger.record_verdict(look, request, verdict.outcome, artefact.manifest.digest)
    return VerdictRef(**artefact.reference(), verdict=verdict)


def verify_verdict(folder: Path) -> Verdict:
    """Recompute a kept verdict from the outcomes beside it; `folder` is laid out as `keep_verdict` says.

    Raises:
        StoreError: what the outcomes give is not what the verdict says; names the fields that differ.
    """
    path = folder / VERDICT_FILE
    kept = Verdict.model_validate_json(path.read_text(encoding="utf-8"))
    tested = None
    if kept.self_test is not None:
        left = read_evaluation(folder / "baseline", kept.policy.metric)
        tested = try_policy(left, None, kept.policy, histories=kept.self_test.histories, looks=kept.self_test.looks)
    again = _compute(folder, kept.policy, look=kept.look, digests=kept.digests, tested=tested)
    said, found = kept.model_dump(), again.model_dump()
    differing = [name for name in Verdict.model_fields if not _same(said[name], found[name])]
    if differing:
        raise StoreError(
            f"The verdict is not what its outcomes give: {', '.join(differing)} differ.",
            where=str(path),
            fix="trust neither; delete the verdict and judge again",
        )
    return kept


def _same(one: Any, other: Any) -> bool:
    """Whether two parts of a verdict agree: numbers up to the last digits, in which processors differ."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-7, abs_tol=1e-9)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def _request(
    store: Store, evaluated: Evaluated, suites: Mapping[str, Evaluated], policy: Policy, name: str, asked_by: str
) -> LookRequest:
    baseline, candidate = _evaluated(store, evaluated, policy.metric)
    frozen = "".join(
        f" {suite} {pair.candidate.conditions.golden_digest}" for suite, pair in sorted(suites.items())
    )  # another suite under the same name is another question
    return LookRequest(
        page=evaluated.candidate.conditions.golden_digest,
        name=name,
        candidate=evaluated.candidate.system.digest,
        baseline=evaluated.baseline.system.digest,
        requirements=digest_bytes(f"{requirements_digest(policy)}{frozen}".encode()),
        answers=digest_bytes((answers_digest(baseline.outcomes) + answers_digest(candidate.outcomes)).encode()),
        asked_by=asked_by,
    )


def _evaluated(store: Store, pair: Evaluated, metric: str) -> tuple[Side, Side]:
    """Both sides as the store holds them."""
    baseline, candidate = (
        Side(evaluation.system, evaluation.conditions, read_evaluation(folder, metric).outcomes)
        for evaluation in pair
        for folder in [store.files(store.open(evaluation.uri))]
    )
    return baseline, candidate


def _copy_evidence(
    store: Store, evaluated: Evaluated, suites: Mapping[str, Evaluated], splits: SplitsRef, folder: Path
) -> None:
    sets = {folder: evaluated} | {folder / SUITES / suite: pair for suite, pair in suites.items()}
    for home, pair in sets.items():
        for side, evaluation in zip(SIDES, pair, strict=True):
            source = store.files(store.open(evaluation.uri))
            (home / side).mkdir(parents=True)
            shutil.copyfile(source / ITEMS_FILE, home / side / ITEMS_FILE)
            # An evaluation is reused when the same model comes back in another role (a candidate that became champion).
            summary = EvaluationSummary.model_validate_json((source / SUMMARY_FILE).read_text(encoding="utf-8"))
            as_asked = summary.model_copy(update={"system": evaluation.system})
            (home / side / SUMMARY_FILE).write_text(as_asked.model_dump_json(indent=2), encoding="utf-8")
    shutil.copyfile(store.files(store.open(splits.uri)) / CONTAMINATION_FILE, folder / CONTAMINATION_FILE)


def _compute(
    folder: Path, policy: Policy, *, look: Look, digests: Mapping[str, str], tested: SelfTest | None
) -> Verdict:
    """The verdict on the outcomes in a folder; the digests of the outcome files are taken from the files."""
    sides = _sides(folder, policy.metric)
    files: dict[str, str] = {}
    suites = {}
    for home in sorted((folder / SUITES).iterdir()) if (folder / SUITES).is_dir() else []:
        suites[home.name] = _sides(home, policy.metric)
        files |= {f"{home.name}_{side}_outcomes": digest_file(home / side / ITEMS_FILE) for side in SIDES}
    files |= {f"{side}_outcomes": digest_file(folder / side / ITEMS_FILE) for side in SIDES}
    if (folder / CONTAMINATION_FILE).is_file():
        files["contamination"] = digest_file(folder / CONTAMINATION_FILE)
    return give_verdict(*sides, policy, look=look, digests={**digests, **files}, suites=suites, self_test=tested)


def _sides(folder: Path, metric: str) -> tuple[Side, Side]:
    baseline, candidate = (read_evaluation(folder / side, metric) for side in SIDES)
    return (
        Side(baseline.system, baseline.conditions, baseline.outcomes),
        Side(candidate.system, candidate.conditions, candidate.outcomes),
    )
