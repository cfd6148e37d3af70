"""Outcomes and policies from files, and what is said about bad ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tasks.contracts.errors import EvaluationError, GoldgateError, NotComparableError, SpecError
from tasks.contracts.references import EvaluationSummary, Outcome
from tasks.contracts.spec import Metric, Policy
from tasks.gate.files import judge_files, read_evaluation, read_policy
from tests.gate.made_up import CONDITIONS, sides, system, write_evaluation

SCORES_BEFORE = [0, 0, 0, 0, 0, 0, 0, 1]
SCORES_AFTER = [1, 1, 1, 1, 1, 1, 0, 1]


def write(path: Path, scores: list[int]) -> Path:
    """The same scores as JSONL, CSV or Parquet, by the name's ending."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": f"i{at}", "score": score}) + "\n" for at, score in enumerate(scores)))
    elif path.suffix == ".csv":
        path.write_text("id,score\n" + "".join(f"i{at},{score}\n" for at, score in enumerate(scores)))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"id": [f"i{at}" for at in range(len(scores))], "score": scores}), path)
    return path


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_bare_files_are_judged_and_what_was_not_checked_is_said(tmp_path: Path, ending: str) -> None:
    verdict = judge_files(
        write(tmp_path / f"old.{ending}", SCORES_BEFORE), write(tmp_path / f"new.{ending}", SCORES_AFTER), Policy()
    )
    assert verdict.outcome is Outcome.PROMOTE
    assert (verdict.wins, verdict.losses, verdict.n) == (6, 0, 8)
    assert verdict.p_value == 1 / 64
    assert "taken on trust" in verdict.reasons[-1]
    assert (verdict.baseline.label, verdict.candidate.label) == ("old", "new")


def test_named_scores_are_read_beside_the_fields_of_an_outcome(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("id,text,target,prediction,exact_match,field:amount\n1,a,b,b,true,1\n2,a,b,c,false,0.5\n")
    first, second = read_evaluation(path, Metric.EXACT_MATCH).outcomes
    assert (first.prediction, first.scores) == ("b", {"exact_match": 1.0, "field:amount": 1.0})
    assert second.scores == {"exact_match": 0.0, "field:amount": 0.5}


def folder(path: Path, role: str, right: int, **conditions: object) -> Path:
    before, after = sides(30, 10, 100, 60)
    items = after if right else before
    summary = EvaluationSummary(
        system=system(role, role[0]), conditions=CONDITIONS.model_copy(update=conditions), items=len(items), metrics={},
        latency_p50_ms=1, latency_p95_ms=2, prompt_tokens=1, output_tokens=1, seconds=1,
    )  # fmt: skip
    write_evaluation(path, summary, items)
    return path


def test_evaluation_folders_are_judged_under_their_conditions(tmp_path: Path) -> None:
    old, new = folder(tmp_path / "old", "champion", 0), folder(tmp_path / "new", "candidate", 1)
    verdict = judge_files(old, new, Policy())
    assert verdict.outcome is Outcome.PROMOTE
    assert verdict.digests["golden_set"] == "9" * 64
    assert not any("on trust" in reason for reason in verdict.reasons)
    with pytest.raises(NotComparableError, match="engine"):
        judge_files(old, folder(tmp_path / "other", "candidate", 1, engine="vllm"), Policy())


def test_a_folder_with_lost_items_is_refused(tmp_path: Path) -> None:
    old = folder(tmp_path / "old", "champion", 0)
    lines = (old / "items.jsonl").read_text().splitlines(keepends=True)
    (old / "items.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(EvaluationError, match="speaks of 200 items, and 199 are there"):
        read_evaluation(old, Metric.EXACT_MATCH)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.jsonl", "", ["holds no outcomes", "x.jsonl"]),
        ("x.jsonl", '{"id": "a", "score": 1}\n{"id": "b", "score"\n', ["not JSON", "x.jsonl:2"]),
        ("x.jsonl", '{"id": "a", "score": 1}\n[1]\n', ["not a JSON object", "x.jsonl:2"]),
        (
            "x.jsonl",
            '{"id": "a", "score": 1}\n{"id": "a", "score": 0}\n',
            ["a is there twice", "x.jsonl:2", "x.jsonl:1"],
        ),
        ("x.jsonl", '{"id": "a", "score": NaN}\n', ["nan", "x.jsonl:1, score"]),
        ("x.jsonl", '{"id": "a", "score": 2}\n', ["2, and a score is", "x.jsonl:1, score"]),
        ("x.jsonl", '{"id": "a", "score": null}\n', ["None", "x.jsonl:1, score"]),
        ("x.jsonl", '{"id": "a"}\n', ["no scores", "x.jsonl:1"]),
        ("x.jsonl", '{"score": 1}\n', ["no id", "x.jsonl:1"]),
        ("x.jsonl", '{"id": "a", "score": 1, "prompt_tokens": "many"}\n', ["prompt_tokens", "x.jsonl:1"]),
        ("x.csv", "id,score\na,1\nb,high\n", ["'high'", "x.csv:3, score"]),
        ("x.csv", "id,score\na,1\nb\n", ["fewer cells", "x.csv:3"]),
        ("x.csv", "id,score\n", ["holds no outcomes", "x.csv"]),
        ("x.parquet", "no parquet", ["not Parquet", "x.parquet"]),
        ("x.txt", "a 1", ["cannot be read from a .txt file", "x.txt"]),
    ],
)
def test_bad_files_are_refused_with_their_place(tmp_path: Path, name: str, content: str, says: list[str]) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(EvaluationError) as refused:
        read_evaluation(path, Metric.EXACT_MATCH)
    assert all(part in str(refused.value) for part in says), str(refused.value)


def test_a_missing_file_and_wrong_encoding_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="nowhere"):
        read_evaluation(tmp_path / "nowhere.jsonl", Metric.EXACT_MATCH)
    latin = tmp_path / "latin.csv"
    latin.write_bytes("id,score\né,1\n".encode("latin-1"))
    with pytest.raises(EvaluationError, match="UTF-8"):
        read_evaluation(latin, Metric.EXACT_MATCH)


def test_items_of_one_side_alone_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotComparableError, match="i7"):
        judge_files(write(tmp_path / "a.csv", SCORES_BEFORE), write(tmp_path / "b.csv", SCORES_AFTER[:-1]), Policy())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("alpha: 0.01\n", Policy(alpha=0.01)),
        ("name: x\npolicy:\n  min_improvement: 0.02\n", Policy(min_improvement=0.02)),
        ("name: x\ntask:\n  kind: chat\n", Policy()),  # a configuration that leaves its policy at the defaults
        ("", Policy()),
        ('{"policy": {"metric": "valid_output"}}', Policy(metric=Metric.VALID_OUTPUT)),
    ],
)
def test_policy_files(tmp_path: Path, text: str, expected: Policy) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    assert read_policy(path) == expected


@pytest.mark.parametrize(
    ("text", "says"), [("alpha: 2", "alpha"), ("beta: 1", "beta"), ("a: [", "cannot be read"), ("- 1", "policy")]
)
def test_bad_policy_files(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=says):
        read_policy(path)


def test_every_refusal_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(GoldgateError) as refused:
        read_policy(tmp_path / "none.yaml")
    assert refused.value.fix
