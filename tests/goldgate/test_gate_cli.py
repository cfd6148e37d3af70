"""`goldgate gate` and `goldgate ledger` as a check on a pull request calls them: files in, exit code out."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

from tasks.contracts.references import EvaluationSummary, SelfTest
from tests.gate.made_up import CONDITIONS, item, system, write_evaluation
from tests.goldgate.shell import Call, Ended, scores
from tests.toys import write_jsonl

LOGS = Path(__file__).parents[1] / "gate" / "harness_logs"
ROOT = Path(__file__).parents[2]
CAUGHT = SelfTest(
    histories=1000, looks=1, promotions=200, rejections=0, rate=0.2, low=0.17, high=0.24, alpha=0.05, noise="resampled"
)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def evaluated(folder: Path, digest: str, right: int) -> Path:
    """An evaluation folder of 100 items, as `goldgate evaluate` leaves it."""
    items = [item(number, number < right) for number in range(100)]
    summary = EvaluationSummary(
        system=system("other", digest * 64), conditions=CONDITIONS, items=len(items), metrics={}, latency_p50_ms=1,
        latency_p95_ms=2, prompt_tokens=1, output_tokens=1, seconds=1,
    )  # fmt: skip
    write_evaluation(folder, summary, items)
    return folder


# -- verdicts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("baseline", "candidate", "code", "word"),
    [(50, 80, 0, "PROMOTE"), (80, 50, 1, "REJECT"), (60, 61, 2, "INCONCLUSIVE")],
)
def test_gate_exits_with_its_verdict(
    call: Call, tmp_path: Path, policy: Path, baseline: int, candidate: int, code: int, word: str
) -> None:
    one, other = scores(tmp_path / "b.jsonl", baseline), scores(tmp_path / "c.jsonl", candidate)
    ended = call("gate", one, other, "--policy", policy)
    assert ended.code == code, ended.err
    assert ended.out.lstrip().startswith(f"{word}  ")
    for said in ("baseline   b\n", "candidate  c\n", "100", "No ledger was kept, so nobody counts", "Self-test: "):
        assert said in ended.out
    assert ended.err == ""


def test_the_default_command_has_a_name(call: Call, tmp_path: Path, policy: Path) -> None:
    one, other = scores(tmp_path / "b.jsonl", 50), scores(tmp_path / "c.jsonl", 80)
    assert call("gate", "judge", one, other, "--policy", policy) == call("gate", one, other, "--policy", policy)
    assert call("gate", "--policy", policy, one, other).code == 0, "options may come first"


def test_gate_prints_json(call: Call, tmp_path: Path, policy: Path) -> None:
    one, other = scores(tmp_path / "b.jsonl", 50), scores(tmp_path / "c.jsonl", 80)
    record = call("gate", one, other, "--policy", policy, "--json").json
    assert record["outcome"] == "promote"
    assert (record["wins"], record["losses"], record["n"]) == (30, 0, 100)
    assert record["look"]["number"] is None
    (requirement,) = record["requirements"]
    assert (requirement["status"], requirement["level"]) == ("shown", 0.05)
    assert requirement["low"] > 0
    assert record["self_test"]["histories"] >= 50


def test_not_worse_is_enough_where_that_is_asked(call: Call, tmp_path: Path) -> None:
    policy = write(tmp_path / "p.yaml", "{objective: non_inferior, margin: 0.1}")
    one, other = scores(tmp_path / "b.jsonl", 140, 200), scores(tmp_path / "c.jsonl", 141, 200)
    assert call("gate", one, other, "--policy", policy).code == 0
    assert call("gate", other, scores(tmp_path / "d.jsonl", 80, 200), "--policy", policy).code == 1


def test_slices_and_groups_of_the_files_count(call: Call, tmp_path: Path) -> None:
    policy = write(tmp_path / "p.yaml", 'guards: [{metric: exact_match, slice: "*", margin: 0.15}]')
    more = {n: {"slice": "refunds" if n % 2 else "orders", "group": f"customer-{n // 2}"} for n in range(200)}
    one, other = (scores(tmp_path / name, right, 200, more) for name, right in (("b.jsonl", 80), ("c.jsonl", 160)))
    record = call("gate", one, other, "--policy", policy, "--json").json
    assert record["outcome"] == "promote"
    assert (record["n"], record["groups"]) == (200, 100)
    assert [one["slice"] for one in record["requirements"]] == [None, "orders", "refunds"]
    shown = call("gate", one, other, "--policy", policy).out
    assert "200 items in 100 groups; each group counts as one draw." in shown
    assert "slice refunds" in shown


def test_a_configuration_serves_as_policy(call: Call, tmp_path: Path) -> None:
    one, other = scores(tmp_path / "b.jsonl", 50), scores(tmp_path / "c.jsonl", 80)
    ended = call("gate", one, other, "--policy", ROOT / "examples" / "complaints" / "complaints.yaml")
    assert ended.code in (0, 2), ended.err


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_tables_are_read_as_lines_are(call: Call, tmp_path: Path, policy: Path, suffix: str) -> None:
    import pandas as pd

    files = []
    for name, right in (("b", 50), ("c", 80)):
        frame = pd.read_json(scores(tmp_path / f"{name}.jsonl", right), lines=True)
        files.append(tmp_path / f"{name}.{suffix}")
        if suffix == "csv":
            frame.to_csv(files[-1], index=False)
        else:
            frame.to_parquet(files[-1])
    assert call("gate", *files, "--policy", policy).code == 0


# -- harnesses ------------------------------------------------------------------------------------------------------


def lm_eval_log(path: Path, right: int, items: int = 60) -> Path:
    """A log of lm-evaluation-harness like the real one beside it, with more items."""
    first = json.loads((LOGS / "samples_choice.jsonl").read_text().splitlines()[0])
    docs = [first["doc"] | {"question": f"What is number {n}?"} for n in range(items)]
    return write_jsonl(path, [first | {"doc_id": n, "doc": doc, "acc": float(n < right)} for n, doc in enumerate(docs)])


def test_logs_of_harnesses_are_taken_as_they_are(call: Call, tmp_path: Path) -> None:
    policy = write(tmp_path / "p.yaml", "metric: acc")
    one, other = lm_eval_log(tmp_path / "samples_b.jsonl", 20), lm_eval_log(tmp_path / "samples_c.jsonl", 50)
    ended = call("gate", one, other, "--policy", policy, "--json")
    assert ended.code == 0, ended.err
    assert (ended.json["wins"], ended.json["n"]) == (30, 60)
    assert {row["metric"] for row in ended.json["metrics"]} == {"acc", "acc_norm"}

    log = LOGS / "samples_choice.jsonl"
    assert call("gate", log, log, "--policy", policy).code == 2, "three items that do not differ settle nothing"
    ended = call("gate", LOGS / "results.json", log, "--policy", policy)
    assert ended.code == 3
    assert "samples_" in ended.err


def test_repeated_samples_of_inspect_are_one_group(call: Call, tmp_path: Path) -> None:
    policy = write(tmp_path / "p.yaml", "metric: match")
    log = LOGS / "two_epochs.eval"
    ended = call("gate", log, log, "--policy", policy, "--json")
    assert ended.code == 2, ended.err
    assert ended.json["groups"] * 2 == ended.json["n"]
    ended = call("gate", LOGS / "killed.eval", log, "--policy", policy)
    assert ended.code == 3
    assert "eval-retry" in ended.err


# -- suites ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def suite_policy(tmp_path: Path) -> Path:
    return write(tmp_path / "suite.yaml", "guards: [{suite: old, metric: exact_match, margin: 0.1}]")


@pytest.mark.parametrize(("kept", "code"), [(60, 0), (20, 1)])
def test_a_suite_can_stop_a_promotion(call: Call, tmp_path: Path, suite_policy: Path, kept: int, code: int) -> None:
    one, other = scores(tmp_path / "b.jsonl", 50), scores(tmp_path / "c.jsonl", 90)
    before, after = scores(tmp_path / "sb.jsonl", 60, 80), scores(tmp_path / "sc.jsonl", kept, 80)
    ended = call("gate", one, other, "--policy", suite_policy, "--suite", f"old={before},{after}")
    assert ended.code == code, ended.err
    assert "suite old" in ended.out


@pytest.mark.parametrize(
    "suites",
    [["old"], ["old=a.jsonl"], ["old=a.jsonl,"], ["=a.jsonl,b.jsonl"], ["old=,b.jsonl"], ["old=a,b", "old=c,d"]],
)
def test_a_suite_that_cannot_be_read_is_refused(
    call: Call, tmp_path: Path, suite_policy: Path, suites: list[str]
) -> None:
    one = scores(tmp_path / "b.jsonl", 50)
    options = [part for suite in suites for part in ("--suite", suite)]
    ended = call("gate", one, one, "--policy", suite_policy, *options)
    assert ended.code == 3
    assert "A suite must read name=BASELINE,CANDIDATE, each name once." in ended.err
    assert f"--suite {suites[-1]}" in ended.err


def test_a_suite_that_is_asked_about_must_be_given(call: Call, tmp_path: Path, suite_policy: Path) -> None:
    one, other = scores(tmp_path / "b.jsonl", 50), scores(tmp_path / "c.jsonl", 90)
    ledger = tmp_path / "ledger.db"
    ended = call("gate", one, other, "--policy", suite_policy, "--ledger", ledger)
    assert ended.code == 3
    assert "guards the suite 'old'" in ended.err
    assert looks(call, ledger) == [], "what is refused spends no look"


# -- refusals -------------------------------------------------------------------------------------------------------


def test_gate_refuses_results_that_cannot_be_compared(call: Call, tmp_path: Path, policy: Path) -> None:
    one, other = scores(tmp_path / "b.jsonl", 50), scores(tmp_path / "c.jsonl", 80, items=99)
    ended = call("gate", one, other, "--policy", policy)
    assert ended.code == 3
    assert "i99" in ended.err
    assert "to fix:" in ended.err


def test_gate_refuses_folders_that_were_made_under_other_conditions(call: Call, tmp_path: Path, policy: Path) -> None:
    one, other = evaluated(tmp_path / "one", "b", 50), evaluated(tmp_path / "other", "c", 80)
    assert call("gate", one, other, "--policy", policy).code == 0
    summary = other / "summary.json"
    summary.write_text(summary.read_text().replace("bfloat16", "float32"))
    ended = call("gate", one, other, "--policy", policy)
    assert ended.code == 3
    assert "engine" in ended.err


def test_what_cannot_be_read_is_named(call: Call, tmp_path: Path, policy: Path) -> None:
    one = scores(tmp_path / "b.jsonl", 50)
    for arguments, said in (
        (("gate", tmp_path / "none.jsonl", one, "--policy", policy), "none.jsonl"),
        (("gate", one, one, "--policy", tmp_path / "none.yaml"), "The policy file does not exist"),
        (("gate", one, one, "--policy", write(tmp_path / "a.yaml", "alhpa: 0.1")), "did you mean alpha?"),
        (("gate", one, one, "--policy", write(tmp_path / "m.yaml", "metric: acc\nalpha: 2")), "policy does not fit"),
        (("gate", one, write(tmp_path / "x.jsonl", "{"), "--policy", policy), "x.jsonl:1"),
    ):
        ended = call(*arguments)
        assert ended.code == 3, arguments
        assert said in ended.err
        assert "Traceback" not in ended.err


def test_a_call_that_cannot_be_read_has_no_verdicts_code(call: Call, tmp_path: Path, policy: Path) -> None:
    one = scores(tmp_path / "b.jsonl", 50)
    for arguments in (
        ("gate",),
        ("gate", one),
        ("gate", one, one),
        ("gate", one, one, "--polcy", policy),
        ("gate", "judge"),
        ("gate", "selftest"),
        ("gate", "selftest", one, "--policy", policy, "--looks", 0),
    ):
        assert call(*arguments).code == 3, arguments


def test_help_shows_how_to_use_it(call: Call) -> None:
    ended = call("gate", "--help")
    assert ended.code == 0
    text = " ".join(ended.out.replace("│", " ").split())
    for said in ("goldgate gate BASELINE CANDIDATE --policy FILE", "Exits 0 to promote, 1 to reject, 2 if inconclusive",
                 "3 on bad input", "goldgate gate judge --help", "selftest"):  # fmt: skip
        assert said in text
    options = call("gate", "judge", "--help")
    assert options.code == 0
    for said in ("--policy", "--suite", "--ledger", "GOLDGATE_LEDGER", "--json"):
        assert said in options.out


# -- the ledger -----------------------------------------------------------------------------------------------------


def looks(call: Call, ledger: Path) -> list[tuple[int, float, str]]:
    """Number, level and verdict of each look that a ledger has; none where nothing was ever asked."""
    ended = call("ledger", "show", "--ledger", ledger, "--json")
    if ended.code or not ended.json["pages"]:
        return []
    (page,) = ended.json["pages"]
    return [(one["number"], one["level"], one["outcome"]) for one in page["history"]]


def test_a_ledger_counts_looks_over_calls(call: Call, tmp_path: Path, policy: Path) -> None:
    ledger, one = tmp_path / "ledger.db", scores(tmp_path / "main.jsonl", 50)

    def judge(right: int) -> Ended:
        other = scores(tmp_path / f"branch-{right}.jsonl", right)
        return call("gate", one, other, "--policy", policy, "--ledger", ledger, "--json")

    first, second, again, third = judge(80), judge(51), judge(80), judge(20)
    assert [ended.code for ended in (first, second, again, third)] == [0, 2, 0, 1]
    taken = [ended.json["look"] for ended in (first, second, again, third)]
    assert [look["number"] for look in taken] == [1, 2, 1, 3]
    assert [look["level"] for look in taken] == pytest.approx([0.05 / 2, 0.05 / 6, 0.05 / 2, 0.05 / 12])
    assert [look["repeated"] for look in taken] == [False, False, True, False]
    assert [round(number) for number, *_ in looks(call, ledger)] == [1, 2, 3]
    assert [outcome for *_, outcome in looks(call, ledger)] == ["promote", "inconclusive", "reject"]

    shown = call("ledger", "show", "--ledger", ledger)
    assert shown.code == 0
    for said in ("main  golden set", "alpha 0.05, alpha_spending; 3 looks, 1 promoted", "asked again 1x, came out the "
                 "same", "Budget left after each look", "No decisions of people."):  # fmt: skip
        assert said in shown.out
    said = call("gate", one, tmp_path / "branch-51.jsonl", "--policy", policy, "--ledger", ledger).out
    assert "Repeated: this candidate was judged against this baseline before (look 2)" in said


def test_the_ledger_may_be_named_by_the_environment(
    call: Call, tmp_path: Path, policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, one = tmp_path / "ledger.db", scores(tmp_path / "b.jsonl", 50)
    monkeypatch.setenv("GOLDGATE_LEDGER", f"sqlite:///{ledger}")
    assert call("gate", one, scores(tmp_path / "c.jsonl", 80), "--policy", policy, "--json").json["look"]["number"] == 1
    assert call("ledger", "show").out.startswith(f"Ledger  {ledger}")


def test_other_answers_of_one_model_cannot_earn_a_promotion(call: Call, tmp_path: Path, policy: Path) -> None:
    """Evaluation folders say which model they are of; a bare file with other answers is another candidate."""
    main, ledger = evaluated(tmp_path / "main", "b", 60), tmp_path / "ledger.db"
    one, other = evaluated(tmp_path / "one", "c", 62), evaluated(tmp_path / "other", "c", 90)
    assert call("gate", main, other, "--policy", policy).code == 0, "alone it would do"
    assert call("gate", main, one, "--policy", policy, "--ledger", ledger).code == 2
    ended = call("gate", main, other, "--policy", policy, "--ledger", ledger)
    assert ended.code == 2
    assert "This candidate was judged before on this golden set, with other answers" in ended.out
    assert [number for number, *_ in looks(call, ledger)] == [1]


def test_a_spent_budget_is_refused_and_says_what_to_do(call: Call, tmp_path: Path) -> None:
    policy = write(tmp_path / "p.yaml", "{looks: bonferroni, declared_looks: 1}")
    ledger, one = tmp_path / "ledger.db", scores(tmp_path / "b.jsonl", 50)
    first = call("gate", one, scores(tmp_path / "c.jsonl", 80), "--policy", policy, "--ledger", ledger)
    assert first.code == 0
    ended = call("gate", one, scores(tmp_path / "d.jsonl", 81), "--policy", policy, "--ledger", ledger)
    assert ended.code == 3
    assert "error budget of this golden set is spent" in ended.err
    assert "goldgate golden freeze" in ended.err
    again = call("gate", one, tmp_path / "c.jsonl", "--policy", policy, "--ledger", ledger)
    assert again.code == 0, "what was said may be said again"
    assert "Spent: 1 look taken of 1 declared" in call("ledger", "show", "--ledger", ledger).out


def test_the_budget_cannot_be_changed_midway(call: Call, tmp_path: Path, policy: Path) -> None:
    ledger, one = tmp_path / "ledger.db", scores(tmp_path / "b.jsonl", 50)
    call("gate", one, scores(tmp_path / "c.jsonl", 51), "--policy", policy, "--ledger", ledger)
    larger = write(tmp_path / "larger.yaml", "alpha: 0.2")
    ended = call("gate", one, scores(tmp_path / "d.jsonl", 60), "--policy", larger, "--ledger", ledger)
    assert ended.code == 3
    assert "Changing the budget midway would void what it promised" in ended.err


def test_a_ladder_prints_a_verdict_and_no_number(call: Call, tmp_path: Path) -> None:
    policy = write(tmp_path / "p.yaml", "{looks: ladder, ladder_step: 0.1}")
    ledger, one = tmp_path / "ledger.db", scores(tmp_path / "b.jsonl", 50)
    worse = scores(tmp_path / "c.jsonl", 23)
    ended = call("gate", one, worse, "--policy", policy, "--ledger", ledger, "--json")
    assert ended.code == 2, "worse and not shown look the same"
    assert set(ended.json) == {"outcome", "reasons", "look", "withheld", "digests"}
    text = call("gate", one, worse, "--policy", policy, "--ledger", ledger).out
    assert "Numbers are withheld" in text
    better = call("gate", one, scores(tmp_path / "d.jsonl", 93), "--policy", policy, "--ledger", ledger)
    assert better.code == 0
    assert "Rung: 100.0 %" in better.out
    for number in ("23", "27", "93", "43"):
        assert f"{number}.0" not in text + better.out
    shown = call("ledger", "show", "--ledger", ledger)
    assert "not promoted" in shown.out
    assert "reject" not in shown.out
    assert "inconclusive" not in shown.out


def test_a_ledger_that_is_not_one_is_named(call: Call, tmp_path: Path, policy: Path) -> None:
    one, other = scores(tmp_path / "b.jsonl", 50), scores(tmp_path / "c.jsonl", 80)
    ended = call("gate", one, other, "--policy", policy, "--ledger", write(tmp_path / "x.db", "no database, " * 100))
    assert ended.code == 3
    assert "This file is no ledger, or is damaged" in ended.err
    ended = call("ledger", "show", "--ledger", tmp_path / "none.db")
    assert ended.code == 1
    assert "There is no ledger yet" in ended.err
    assert not (tmp_path / "none.db").exists(), "showing makes nothing"


def test_a_ledger_is_asked_for_one_golden_set(call: Call, tmp_path: Path, policy: Path) -> None:
    ledger = tmp_path / "ledger.db"
    for name, items in (("orders", 100), ("refunds", 90)):
        one, other = scores(tmp_path / f"{name}.jsonl", 50, items), scores(tmp_path / "c.jsonl", 80, items)
        assert call("gate", one, other, "--policy", policy, "--ledger", ledger).code == 0
    both = call("ledger", "show", "--ledger", ledger, "--json").json["pages"]
    assert [page["name"] for page in both] == ["orders", "refunds"]
    for wanted in ("refunds", both[1]["page"][:8]):
        (page,) = call("ledger", "show", wanted, "--ledger", ledger, "--json").json["pages"]
        assert page["name"] == "refunds"
        assert page["left"] == pytest.approx(0.025)
    ended = call("ledger", "show", "returns", "--ledger", ledger)
    assert ended.code == 1
    assert "name a task (orders, refunds)" in ended.err


# -- the self-test --------------------------------------------------------------------------------------------------


def test_a_policy_that_keeps_its_promise_may_be_armed(call: Call, tmp_path: Path, policy: Path) -> None:
    one = scores(tmp_path / "b.jsonl", 50)
    ended = call("gate", "selftest", one, "--policy", policy, "--histories", 200, "--looks", 3)
    assert ended.code == 0, ended.err
    assert "The gate judged 200 made-up histories of 3 candidates that are no better, promoted one in " in ended.out
    assert "The policy may be armed." in ended.out
    record = call("gate", "selftest", one, "--policy", policy, "--histories", 200, "--looks", 3, "--json").json
    assert (record["histories"], record["looks"], record["noise"], record["armed"]) == (200, 3, "resampled", True)
    assert record["low"] <= record["rate"] <= record["high"]


def test_two_evaluations_of_a_baseline_give_the_engines_noise(call: Call, tmp_path: Path, policy: Path) -> None:
    one, again = scores(tmp_path / "b.jsonl", 50), scores(tmp_path / "again.jsonl", 52)
    ended = call("gate", "selftest", one, again, "--policy", policy, "--histories", 200, "--json")
    assert ended.code == 0, ended.err
    assert ended.json["noise"] == "two evaluations"
    ended = call("gate", "selftest", one, scores(tmp_path / "c.jsonl", 52, 99), "--policy", policy)
    assert ended.code == 3
    assert "i99" in ended.err


def test_a_policy_that_is_caught_cannot_be_armed(
    call: Call, tmp_path: Path, policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = scores(tmp_path / "b.jsonl", 50), scores(tmp_path / "c.jsonl", 80)
    monkeypatch.setattr("tasks.gate.judge_files.self_test", lambda *_, **__: CAUGHT)
    ended = call("gate", "selftest", one, "--policy", policy)
    assert ended.code == 1
    assert "more than promised" in ended.out
    assert "The policy cannot be armed." in ended.out
    assert call("gate", "selftest", one, "--policy", policy, "--json").json["armed"] is False

    ledger = tmp_path / "ledger.db"
    ended = call("gate", one, other, "--policy", policy, "--ledger", ledger)
    assert ended.code == 3
    assert "This policy cannot be armed: it promoted 200 of 1,000 made-up histories" in ended.err
    assert looks(call, ledger) == []


def test_a_verdict_that_was_killed_keeps_its_look(
    call: Call, tmp_path: Path, policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.gate.ledger import Ledger

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    ledger, one = tmp_path / "ledger.db", scores(tmp_path / "b.jsonl", 50)
    other = scores(tmp_path / "c.jsonl", 80)
    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "record_verdict", killed)
        ended = call("gate", one, other, "--policy", policy, "--ledger", ledger)
    assert ended.code == 130
    assert "PROMOTE" not in ended.out, "what is not recorded is not said"
    with sqlite3.connect(ledger) as database:
        assert database.execute("select number, outcome from ledger_looks").fetchall() == [(1, None)]
    again = call("gate", one, other, "--policy", policy, "--ledger", ledger, "--json")
    assert (again.code, again.json["look"]["number"], again.json["look"]["repeated"]) == (0, 1, False)
