"""A verdict in the store: kept once, recomputable, with its looks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tasks.contracts.errors import NotComparableError, StoreError
from tasks.contracts.progress import Progress
from tasks.contracts.references import GoldenSetRef, Outcome, SplitsRef
from tasks.contracts.spec import DataSpec, ExecutionSpec, GoldenSpec, Policy, RetrainSpec, TaskKind, TaskSpec
from tasks.gate.keep import keep_verdict, verify_verdict
from tasks.gate.steps import judge
from tasks.runtime import display
from tasks.store import Store, digest_file
from tests.gate.made_up import CONDITIONS, LABELS, evaluation, sides

GOLDEN = GoldenSetRef(path="golden", digest="9" * 64, items=400)
SPLITS = SplitsRef(uri="x", step="curate", fingerprint="f", digest="5" * 64, train_rows=10, dev_rows=2, removed={})
BEFORE, AFTER = sides(30, 10, 100, 60)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def test_a_verdict_is_kept_with_its_evidence_and_can_be_recomputed(store: Store) -> None:
    baseline, candidate = evaluation(store, "champion", "b", BEFORE), evaluation(store, "candidate", "c", AFTER)
    kept = keep_verdict(store, baseline, candidate, SPLITS, GOLDEN, Policy())

    assert kept.verdict.outcome is Outcome.PROMOTE
    assert not kept.reused
    folder = store.files(store.open(kept.uri))
    assert verify_verdict(folder) == kept.verdict
    assert kept.verdict.digests == {
        "data": "5" * 64,
        "golden_set": "9" * 64,
        "candidate": "c",
        "baseline": "b",
        "candidate_outcomes": digest_file(folder / "candidate" / "items.jsonl"),
        "baseline_outcomes": digest_file(folder / "baseline" / "items.jsonl"),
    }
    assert [row.metric for row in kept.verdict.metrics] == ["exact_match", "macro_f1", "valid_output"]


def test_the_task_says_the_verdict(store: Store) -> None:
    baseline, candidate = evaluation(store, "champion", "b", BEFORE), evaluation(store, "candidate", "c", AFTER)
    spec = RetrainSpec(
        name="animals",
        task=TaskSpec(kind=TaskKind.CLASSIFY, instruction="Which animal?", labels=LABELS),
        data=DataSpec(source="x"),
        golden=GoldenSpec(path="golden"),
        base_model="x",
        policy=Policy(alpha=0.01),
        execution=ExecutionSpec(store=store.root),
    )
    said: list[tuple[str, str]] = []

    class Listener:
        def start(self, step: str) -> None:
            pass

        def update(self, step: str, progress: Progress) -> None:
            pass

        def finish(self, step: str, summary: str, *, reused: bool) -> None:
            said.append((step, summary))

    token = display.set(Listener())
    try:
        kept = judge.fn(baseline, candidate, SPLITS, GOLDEN, spec)
    finally:
        display.reset(token)
    assert kept.verdict.policy.alpha == 0.01
    assert said == [("judge", f"PROMOTE: {kept.verdict.reasons[0]}")]


def test_a_verdict_that_its_outcomes_do_not_give_is_found(store: Store, tmp_path: Path) -> None:
    import shutil

    baseline, candidate = evaluation(store, "champion", "b", BEFORE), evaluation(store, "candidate", "c", AFTER)
    kept = keep_verdict(store, baseline, candidate, SPLITS, GOLDEN, Policy())
    copy = tmp_path / "copy"
    shutil.copytree(store.files(store.open(kept.uri)), copy)
    verdict = json.loads((copy / "verdict.json").read_text())
    (copy / "verdict.json").write_text(json.dumps(verdict | {"wins": 31}))
    with pytest.raises(StoreError, match="wins differ"):
        verify_verdict(copy)


def test_the_same_question_is_answered_once_and_another_policy_is_another_question(store: Store) -> None:
    baseline, candidate = evaluation(store, "champion", "b", BEFORE), evaluation(store, "candidate", "c", AFTER)
    first = keep_verdict(store, baseline, candidate, SPLITS, GOLDEN, Policy())
    again = keep_verdict(store, baseline, candidate, SPLITS, GOLDEN, Policy())
    strict = keep_verdict(store, baseline, candidate, SPLITS, GOLDEN, Policy(min_improvement=0.3))

    assert again.reused
    assert again.verdict == first.verdict
    assert strict.fingerprint != first.fingerprint
    assert strict.verdict.outcome is Outcome.REJECT
    assert strict.verdict.looks == 1  # the same candidate, looked at once


def test_looks_count_the_candidates_of_one_golden_set(store: Store) -> None:
    baseline = evaluation(store, "champion", "b", BEFORE)
    other_golden = GOLDEN.model_copy(update={"digest": "8" * 64})
    elsewhere = CONDITIONS.model_copy(update={"golden_digest": "8" * 64})
    looks = [
        keep_verdict(store, baseline, evaluation(store, "candidate", digest, AFTER), SPLITS, GOLDEN, Policy())
        for digest in ("c1", "c2", "c1", "c3")
    ]
    fresh = keep_verdict(
        store,
        evaluation(store, "base_model", "b2", BEFORE, elsewhere),
        evaluation(store, "candidate", "c4", AFTER, elsewhere),
        SPLITS,
        other_golden,
        Policy(),
    )
    assert [kept.verdict.looks for kept in looks] == [1, 2, 1, 3]  # a reused verdict keeps the count it was given at
    assert [kept.reused for kept in looks] == [False, False, True, False]
    assert fresh.verdict.looks == 1


def test_an_evaluation_on_another_golden_set_is_refused(store: Store) -> None:
    baseline, candidate = evaluation(store, "champion", "b", BEFORE), evaluation(store, "candidate", "c", AFTER)
    with pytest.raises(NotComparableError, match="another golden set"):
        keep_verdict(store, baseline, candidate, SPLITS, GOLDEN.model_copy(update={"digest": "7" * 64}), Policy())
    assert not list(store.list("verdict"))


def test_a_changed_outcome_is_refused(store: Store) -> None:
    baseline, candidate = evaluation(store, "champion", "b", BEFORE), evaluation(store, "candidate", "c", AFTER)
    items = store.files(store.open(candidate.uri)) / "items.jsonl"
    items.write_text(items.read_text().replace('"exact_match":0.0', '"exact_match":1.0'))
    with pytest.raises(StoreError, match="was changed"):
        keep_verdict(store, baseline, candidate, SPLITS, GOLDEN, Policy())
    assert not list(store.list("verdict"))
