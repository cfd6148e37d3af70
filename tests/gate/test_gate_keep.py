"""A verdict in the store: kept once, counted once, recomputable, and refused where anything is missing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tasks.contracts.errors import LeakageError, LedgerError, NotComparableError, SpecError, StoreError
from tasks.contracts.progress import Progress
from tasks.contracts.references import GoldenSetRef, ItemOutcome, Outcome, VerdictRef
from tasks.contracts.spec import (
    DataSpec,
    ExecutionSpec,
    GoldenSpec,
    LookPolicy,
    MetricGuard,
    Policy,
    RetrainSpec,
    TaskKind,
    TaskSpec,
)
from tasks.gate import keep
from tasks.gate.keep import Evaluated, Trained, keep_verdict, verify_verdict
from tasks.gate.ledger import Ledger
from tasks.gate.steps import judge
from tasks.runtime import display
from tasks.store import Store, digest_file
from tests.gate.made_up import CONDITIONS, LABELS, evaluation, item, sides
from tests.gate.world import CLEAN, make_splits, make_trained

GOLDEN = GoldenSetRef(path="golden", digest="9" * 64, items=200)
BEFORE, AFTER = sides(30, 10, 100, 60)
WORSE = [item(number, one.scores["exact_match"] == 1.0 and not 50 <= number < 80) for number, one in enumerate(BEFORE)]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(str(tmp_path / "ledger.db")) as opened:
        yield opened


Judge = Callable[..., VerdictRef]


@pytest.fixture
def ask(store: Store, ledger: Ledger) -> Judge:
    """Judge a candidate with these answers."""

    def keep_it(
        answers: list[ItemOutcome] = AFTER, candidate: str = "c" * 64, policy: Policy | None = None, **changes: Any
    ) -> VerdictRef:
        splits = changes.get("splits") or make_splits(store)
        trained = changes.get("trained") or make_trained(store, splits)
        evaluated = Evaluated(
            evaluation(store, "champion", "b" * 64, changes.get("before", BEFORE)),
            evaluation(store, "candidate", candidate, answers, changes.get("conditions", CONDITIONS)),
        )
        return keep_verdict(
            store,
            evaluated,
            changes.get("suites", {}),
            Trained(splits, trained),
            changes.get("golden", GOLDEN),
            policy or Policy(),
            changes.get("ledger", ledger),
            name="animals",
            asked_by="a test",
        )

    return keep_it


def test_a_verdict_is_kept_with_its_evidence_and_can_be_recomputed(store: Store, ask: Judge) -> None:
    kept = ask()

    assert kept.verdict.outcome is Outcome.PROMOTE
    assert not kept.reused
    folder = store.files(store.open(kept.uri))
    assert verify_verdict(folder) == kept.verdict
    assert kept.verdict.digests == {
        "data": make_splits(store).digest,
        "golden_set": "9" * 64,
        "candidate": "c" * 64,
        "baseline": "b" * 64,
        "candidate_outcomes": digest_file(folder / "candidate" / "items.jsonl"),
        "baseline_outcomes": digest_file(folder / "baseline" / "items.jsonl"),
        "contamination": digest_file(folder / "contamination.json"),
    }
    assert [row.metric for row in kept.verdict.metrics] == ["exact_match", "macro_f1", "valid_output"]
    assert kept.verdict.self_test is not None
    assert kept.verdict.self_test.low <= 0.05


def test_the_task_says_the_verdict(store: Store) -> None:
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

    splits = make_splits(store)
    token = display.set(Listener())
    try:
        kept = judge.fn(
            evaluation(store, "champion", "b" * 64, BEFORE),
            evaluation(store, "candidate", "c" * 64, AFTER),
            {},
            {},
            splits,
            make_trained(store, splits),
            GOLDEN,
            spec,
        )
    finally:
        display.reset(token)
    assert kept.verdict.policy.alpha == 0.01
    assert kept.verdict.look.level == pytest.approx(0.005)
    assert said == [("judge", f"PROMOTE: {kept.verdict.reasons[0]}")]


@pytest.mark.parametrize("field", ["wins", "outcome", "p_value"])
def test_a_verdict_that_its_outcomes_do_not_give_is_found(store: Store, ask: Judge, tmp_path: Path, field: str) -> None:
    copy = shutil.copytree(store.files(store.open(ask().uri)), tmp_path / "copy")
    verdict = json.loads((copy / "verdict.json").read_text())
    other = {"wins": 31, "outcome": "reject", "p_value": 0.5}[field]
    (copy / "verdict.json").write_text(json.dumps(verdict | {field: other}))
    with pytest.raises(StoreError, match=f"{field} differ"):
        verify_verdict(copy)


def test_an_altered_outcome_is_found(store: Store, ask: Judge, tmp_path: Path) -> None:
    copy = shutil.copytree(store.files(store.open(ask().uri)), tmp_path / "copy")
    items = copy / "candidate" / "items.jsonl"
    lines = items.read_text().splitlines()
    lines[35] = lines[35].replace('"exact_match":0.0', '"exact_match":1.0')
    items.write_text("\n".join(lines) + "\n")
    with pytest.raises(StoreError, match=r"requirements.*digests differ"):
        verify_verdict(copy)


def test_the_same_question_is_answered_once_and_another_policy_is_another_look(ask: Judge) -> None:
    first, again, strict = ask(), ask(), ask(policy=Policy(min_improvement=0.3))

    assert again.reused
    assert again.verdict == first.verdict
    assert first.verdict.look.number == 1
    assert strict.verdict.outcome is Outcome.REJECT
    assert strict.verdict.look.number == 2


def test_looks_count_the_candidates_of_one_golden_set_and_spend_its_budget(store: Store, ask: Judge) -> None:
    looks = [ask(candidate=digit * 64) for digit in ("1", "2", "1", "3")]
    page = CLEAN.model_copy(update={"golden_digest": "8" * 64})
    elsewhere = CONDITIONS.model_copy(update={"golden_digest": "8" * 64})
    splits = make_splits(store, page)
    with Ledger.open(f"{store.root}/other.db") as ledger:
        fresh = keep_verdict(
            store,
            Evaluated(
                evaluation(store, "base_model", "d" * 64, BEFORE, elsewhere),
                evaluation(store, "candidate", "4" * 64, AFTER, elsewhere),
            ),
            {},
            Trained(splits, make_trained(store, splits)),
            GOLDEN.model_copy(update={"digest": "8" * 64}),
            Policy(),
            ledger,
            name="animals",
            asked_by="a test",
        )
    assert [kept.verdict.look.number for kept in looks] == [1, 2, 1, 3]
    assert [kept.verdict.look.level for kept in looks] == pytest.approx([0.05 / 2, 0.05 / 6, 0.05 / 2, 0.05 / 12])
    assert [kept.reused for kept in looks] == [False, False, True, False]
    assert fresh.verdict.look.number == 1


def test_other_answers_of_a_candidate_that_was_not_promoted_do_not_promote_it(ask: Judge, ledger: Ledger) -> None:
    first = ask(WORSE)
    lucky = ask(AFTER)

    assert first.verdict.outcome is Outcome.REJECT
    assert lucky.verdict.outcome is Outcome.INCONCLUSIVE
    assert "judged before on this golden set, with other answers" in lucky.verdict.reasons[0]
    assert lucky.verdict.look.number == 1
    assert len(ledger.looks("9" * 64)) == 1


def test_other_answers_of_the_baseline_do_not_promote_it_either(ask: Judge, ledger: Ledger) -> None:
    assert ask(BEFORE).verdict.outcome is Outcome.INCONCLUSIVE
    again = ask(BEFORE, before=WORSE)
    assert again.verdict.outcome is Outcome.INCONCLUSIVE
    assert (again.verdict.wins, again.verdict.look.number, again.verdict.look.same_answers) == (30, 1, False)
    assert [one.outcome for one in ledger.looks("9" * 64)[0].repeats] == [Outcome.INCONCLUSIVE]


def test_a_run_killed_between_look_and_verdict_takes_the_same_look_again(
    ask: Judge, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(keep, "_copy_evidence", killed)
        with pytest.raises(KeyboardInterrupt):
            ask()
    assert [look.outcome for look in ledger.looks("9" * 64)] == [None]

    kept = ask()
    assert (kept.verdict.look.number, kept.verdict.look.repeated) == (1, False)
    assert [look.outcome for look in ledger.looks("9" * 64)] == [Outcome.PROMOTE]


def test_two_runs_at_the_same_time_get_two_looks(ask: Judge, store: Store) -> None:
    splits = make_splits(store)
    trained = make_trained(store, splits)
    for digit in "123456":
        evaluation(store, "candidate", digit * 64, AFTER)
    evaluation(store, "champion", "b" * 64, BEFORE)
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda digit: ask(candidate=digit * 64, splits=splits, trained=trained), "123456"))
    assert sorted(kept.verdict.look.number or 0 for kept in found) == [1, 2, 3, 4, 5, 6]


def test_a_spent_golden_set_gives_no_verdict(store: Store, ask: Judge) -> None:
    once = Policy(looks=LookPolicy.BONFERRONI, declared_looks=1)
    ask(candidate="1" * 64, policy=once)
    with pytest.raises(LedgerError, match="golden freeze"):
        ask(candidate="2" * 64, policy=once)
    assert len(list(store.list("verdict"))) == 1


def test_without_a_ledger_there_is_no_verdict(store: Store, ask: Judge, tmp_path: Path) -> None:
    with Ledger.open(str(tmp_path / "gone.db")) as ledger:
        (tmp_path / "gone.db").write_bytes(b"no database, and longer than a header is " * 30)
        with pytest.raises(LedgerError):
            ask(ledger=ledger)
    assert not list(store.list("verdict"))


def test_a_suite_is_kept_and_judged(store: Store, ask: Judge) -> None:
    elsewhere = CONDITIONS.model_copy(update={"golden_digest": "6" * 64})
    before, after = sides(0, 40, 100, 60)
    suites = {
        "forgetting": Evaluated(
            evaluation(store, "champion", "e" * 64, before, elsewhere),
            evaluation(store, "candidate", "f" * 64, after, elsewhere),
        )
    }
    policy = Policy(guards=(MetricGuard(suite="forgetting", margin=0.05),))
    kept = ask(policy=policy, suites=suites)

    assert kept.verdict.outcome is Outcome.REJECT
    assert "suite forgetting" in kept.verdict.reasons[0]
    folder = store.files(store.open(kept.uri))
    assert (folder / "suites" / "forgetting" / "candidate" / "items.jsonl").is_file()
    assert verify_verdict(folder) == kept.verdict


def test_an_evaluation_on_another_golden_set_is_refused(store: Store, ask: Judge, ledger: Ledger) -> None:
    with pytest.raises(NotComparableError, match="another golden set"):
        ask(golden=GOLDEN.model_copy(update={"digest": "7" * 64}))
    assert not list(store.list("verdict"))
    assert not ledger.pages()


def test_a_changed_outcome_is_refused(store: Store, ask: Judge) -> None:
    candidate = evaluation(store, "candidate", "c" * 64, AFTER)
    items = store.files(store.open(candidate.uri)) / "items.jsonl"
    items.write_text(items.read_text().replace('"exact_match":0.0', '"exact_match":1.0'))
    with pytest.raises(StoreError, match="was changed"):
        ask()
    assert not list(store.list("verdict"))


def test_a_policy_that_fails_its_self_test_spends_no_look(
    ask: Judge, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise SpecError("This policy cannot be armed.", fix="mend it")

    monkeypatch.setattr(keep, "check_armed", refuse)
    with pytest.raises(SpecError, match="cannot be armed"):
        ask()
    assert not ledger.pages()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"conditions": CONDITIONS.model_copy(update={"engine": "vllm"})}, "different conditions"),
        ({"answers": AFTER[1:]}, "do not hold the same items"),
        ({"policy": Policy(guards=(MetricGuard(slice="phone", margin=0.1),))}, "guards the slice 'phone'"),
        ({"policy": Policy(guards=(MetricGuard(suite="sums", margin=0.1),))}, "suite 'sums'"),
        ({"policy": Policy(max_cost_ratio=1.0)}, "says its cost"),
    ],
)
def test_what_cannot_be_compared_spends_no_look(
    store: Store, ask: Judge, ledger: Ledger, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(NotComparableError, match=says):
        ask(**changes)
    assert not ledger.pages()
    assert not list(store.list("verdict"))


@pytest.mark.parametrize(("by", "holds"), [(1e-13, True), (1e-5, False)])
def test_the_last_digits_of_another_processor_are_no_alteration(
    store: Store, ask: Judge, tmp_path: Path, by: float, holds: bool
) -> None:
    copy = shutil.copytree(store.files(store.open(ask().uri)), tmp_path / "copy")
    verdict = json.loads((copy / "verdict.json").read_text())
    verdict["metrics"][1]["low"] += by
    (copy / "verdict.json").write_text(json.dumps(verdict))
    if holds:
        verify_verdict(copy)
    else:
        with pytest.raises(StoreError, match="metrics differ"):
            verify_verdict(copy)


# -- leakage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("report", "says"),
    [
        (None, "Nothing says whether golden items are in the training data"),
        ("no json", "cannot be read"),
        (CLEAN.model_copy(update={"golden_digest": "1" * 64}), "checked against another golden set"),
        (CLEAN.model_copy(update={"rows": 11}), "11 rows were checked against the golden set, and the splits hold 12"),
        (
            CLEAN.model_copy(update={"found": {"golden_ngram": 2}}),
            "Golden items are in the training data: 2 golden_ngram",
        ),
    ],
)
def test_without_a_clean_contamination_report_there_is_no_verdict(
    store: Store, ask: Judge, ledger: Ledger, report: Any, says: str
) -> None:
    with pytest.raises(LeakageError, match=says):
        ask(splits=make_splits(store, report))
    assert not list(store.list("verdict"))
    assert not ledger.pages()


def test_a_candidate_trained_on_anything_else_gets_no_verdict(store: Store, ask: Judge, ledger: Ledger) -> None:
    splits = make_splits(store)
    with pytest.raises(LeakageError, match="not checked for golden items: pairs"):
        ask(splits=splits, trained=make_trained(store, splits, pairs="3" * 64))
    other = make_splits(store, CLEAN.model_copy(update={"near_duplicate": 0.7}))
    with pytest.raises(LeakageError, match="other splits than those that were checked"):
        ask(splits=splits, trained=make_trained(store, other))
    assert not ledger.pages()
