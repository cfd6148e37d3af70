"""Outcomes and policies from files, and what is said about bad ones."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from goldgate.config import load_spec
from tasks.contracts.errors import EvaluationError, SpecError
from tasks.contracts.references import EvaluationSummary, ItemOutcome
from tasks.contracts.spec import Expense, LookPolicy, MetricGuard, Objective, Policy
from tasks.gate.files import items_digest, read_evaluation, read_policy
from tests.gate.made_up import CONDITIONS, item, sides, system, write_evaluation

METRIC = "exact_match"
ROWS: list[dict[str, Any]] = [
    {"id": "a", "score": 1, "group": "g", "slice": "short", "latency_ms": 12.5, "cost": 0.25, "prompt_tokens": 7,
     "output_tokens": 2, "text": "What says meow?", "target": "cat", "prediction": "cat"},
    {"id": "b", "score": 0, "group": None, "slice": None, "latency_ms": 10, "cost": 0, "prompt_tokens": 6,
     "output_tokens": 1, "text": "What barks?", "target": "dog", "prediction": ""},
]  # fmt: skip


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The same rows as JSONL, CSV or Parquet, by the name's ending."""
    if path.suffix == ".csv":
        lines = [",".join(rows[0])] + [",".join("" if v is None else str(v) for v in row.values()) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def refusal(path: Path, metric: str = METRIC) -> str:
    with pytest.raises(EvaluationError) as refused:
        read_evaluation(path, metric)
    return str(refused.value)


@pytest.mark.parametrize("ending", ["jsonl", "ndjson", "csv", "parquet"])
def test_one_content_reads_the_same_from_each_format(tmp_path: Path, ending: str) -> None:
    read = read_evaluation(write(tmp_path / f"old.{ending}", ROWS), METRIC)
    assert read.outcomes == [
        ItemOutcome(id="a", text="What says meow?", target="cat", prediction="cat", scores={METRIC: 1.0},
                    latency_ms=12.5, prompt_tokens=7, output_tokens=2, cost=0.25, group="g", slice="short"),
        ItemOutcome(id="b", text="What barks?", target="dog", prediction="", scores={METRIC: 0.0},
                    latency_ms=10.0, prompt_tokens=6, output_tokens=1, cost=0.0),
    ]  # fmt: skip
    assert (read.system.label, read.conditions, read.left_out) == ("old", None, {})
    assert read.system.digest == read.digest
    assert read.expenses == set(Expense)
    assert read.items_digest == items_digest(read.outcomes)


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_id_and_score_are_enough(tmp_path: Path, ending: str) -> None:
    read = read_evaluation(write(tmp_path / f"x.{ending}", [{"id": 7, "score": 1}]), "my_metric")
    assert read.expenses == set()
    (outcome,) = read.outcomes
    assert (outcome.id, outcome.scores, outcome.group, outcome.cost) == ("7", {"my_metric": 1.0}, None, None)


def test_named_scores_are_read_beside_the_fields_of_an_outcome(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("id, text,target,prediction,exact_match,field:amount\n1,a,b,b,true,1\n2,a,b,c,false,0.5\n")
    first, second = read_evaluation(path, METRIC).outcomes
    assert (first.text, first.prediction, first.scores) == ("a", "b", {METRIC: 1.0, "field:amount": 1.0})
    assert second.scores == {METRIC: 0.0, "field:amount": 0.5}


def test_score_stands_beside_named_scores(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"id": "a", "score": 1, "polite": 0.5}])
    assert read_evaluation(path, "helpful").outcomes[0].scores == {"helpful": 1.0, "polite": 0.5}


@pytest.mark.parametrize(
    ("value", "text"),
    [("x", "x"), (29, "29"), (29.0, "29"), (0.5, "0.5"), (True, "true"), ({"b": 1, "a": [2]}, '{"a": [2], "b": 1}')],
)
def test_cells_that_are_no_texts_become_texts(tmp_path: Path, value: Any, text: str) -> None:
    (outcome,) = read_evaluation(
        write(tmp_path / "x.jsonl", [{"id": "a", "score": 1, "target": value}]), METRIC
    ).outcomes
    assert outcome.target == text


def test_a_number_of_pandas_is_the_id_that_csv_has(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", [{"id": 1.0, "score": 1.0, "group": float("nan")}])
    (outcome,) = read_evaluation(path, METRIC).outcomes
    assert (outcome.id, outcome.group) == ("1", None)


# Macro-F1


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_macro_f1_needs_targets_and_predictions_alone(tmp_path: Path, ending: str) -> None:
    rows = [{"id": "a", "target": "cat", "prediction": " cat"}, {"id": "b", "target": "dog", "prediction": ""}]
    read = read_evaluation(write(tmp_path / f"x.{ending}", rows), "macro_f1")
    assert [one.scores for one in read.outcomes] == [{"exact_match": 1.0}, {"exact_match": 0.0}]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (
            {"id": "a", "prediction": "cat"},
            ["this item has no target", "x.jsonl:1, target", "`target` and `prediction`"],
        ),
        ({"id": "a", "target": "cat"}, ["this item has no prediction", "x.jsonl:1, prediction"]),
        ({"id": "a", "target": "cat", "prediction": None}, ["this item has no prediction"]),
        ({"id": "a", "target": "cat", "prediction": "cat", "score": 1}, ["no score of an item", "x.jsonl:1, score"]),
        ({"id": "a", "target": "cat", "prediction": "cat", "macro_f1": 1}, ["no score of an item", ":1, macro_f1"]),
    ],
)
def test_macro_f1_refusals(tmp_path: Path, row: dict[str, Any], says: list[str]) -> None:
    said = refusal(write(tmp_path / "x.jsonl", [row]), "macro_f1")
    assert all(part in said for part in says), said


# Refusals

GOOD = '{"id": "a", "score": 1}\n'


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.jsonl", "", ["holds no outcomes", "x.jsonl"]),
        ("x.jsonl", "\n\n", ["holds no outcomes", "x.jsonl"]),
        ("x.jsonl", GOOD + '{"id": "b", "score"\n', ["not JSON", "x.jsonl:2"]),
        ("x.jsonl", GOOD + "[1]\n", ["not a JSON object", "x.jsonl:2"]),
        ("x.jsonl", GOOD + "\n" + '{"id": "a", "score": 0}\n', ["a is there twice", "x.jsonl:3", "x.jsonl:1"]),
        ("x.jsonl", '{"id": 1, "score": 1}\n{"id": "1", "score": 0}\n', ["1 is there twice"]),
        ("x.jsonl", '{"id": "a", "score": NaN}\n', ["The score is nan", "x.jsonl:1, score", "write 1 for right"]),
        ("x.jsonl", '{"id": "a", "score": Infinity}\n', ["The score is inf", "x.jsonl:1, score"]),
        ("x.jsonl", '{"id": "a", "score": 2}\n', ["2, and a score is a number from 0 to 1", "x.jsonl:1, score"]),
        ("x.jsonl", '{"id": "a", "score": -0.1}\n', ["-0.1, and a score is", "x.jsonl:1, score"]),
        ("x.jsonl", '{"id": "a", "score": null}\n', ["None", "x.jsonl:1, score"]),
        ("x.jsonl", '{"id": "a", "score": 1, "latency": 80}\n', [":1, latency", "if it is no score but latency_ms"]),
        ("x.jsonl", '{"id": "a", "score": 1, "model": "x"}\n', [":1, model", "leave out columns that are no scores"]),
        ("x.jsonl", '{"id": "a"}\n', ["no scores", "x.jsonl:1", "the column `score`"]),
        ("x.jsonl", '{"id": "a", "scores": 1}\n', ["no scores", "x.jsonl:1"]),
        ("x.jsonl", '{"id": "a", "scores": {"exact_match": 1}, "polite": 1}\n', ["`scores`, and polite beside it"]),
        ("x.jsonl", '{"id": "a", "score": 1, "exact_match": 1}\n', ["taken as exact_match, and exact_match beside it"]),
        ("x.jsonl", '{"id": "a", "polite": 1}\n', ["no metric exact_match; it has polite", "`metric`"]),
        ("x.jsonl", '{"id": "a", "exactmatch": 1}\n', ["such as exactmatch"]),
        ("x.jsonl", GOOD + '{"id": "b", "score": 1, "polite": 1}\n', ["the same scores: polite", "x.jsonl:2, and"]),
        ("x.jsonl", '{"score": 1}\n', ["no id", "x.jsonl:1, id"]),
        ("x.jsonl", '{"id": "", "score": 1}\n', ["no id", "x.jsonl:1, id"]),
        ("x.jsonl", '{"id": "a", "score": 1, "prompt_tokens": "many"}\n', ["prompt_tokens is 'many'", "x.jsonl:1"]),
        ("x.jsonl", '{"id": "a", "score": 1, "output_tokens": 1.5}\n', ["1.5, and it is a whole number"]),
        ("x.jsonl", '{"id": "a", "score": 1, "latency_ms": -1}\n', ["latency_ms is -1", ":1, latency_ms"]),
        ("x.jsonl", '{"id": "a", "score": 1, "latency_ms": NaN}\n', ["latency_ms is nan", ":1, latency_ms"]),
        ("x.jsonl", '{"id": "a", "score": 1, "cost": Infinity}\n', ["cost is inf", ":1, cost"]),
        ("x.jsonl", '{"id": "a", "score": 1, "cost": [1]}\n', ["cost is [1]"]),
        ("x.jsonl", '{"id": "a", "score": 1, "confidence": 2}\n', ["confidence is 2, and it is a number from 0 to 1"]),
        ("x.jsonl", '{"id": "a", "score": 1, "cost": 1}\n{"id": "b", "score": 1}\n',
         ["Some items have cost", "x.jsonl:2, cost", "for every item"]),
        ("x.csv", "id,score,latency_ms\na,1,\nb,1,9\n", ["Some items have latency_ms", "x.csv:3, latency_ms"]),
        ("x.csv", "id,score\na,1\nb,high\n", ["'high'", "x.csv:3, score"]),
        ("x.csv", "id,score\na,1\nb,\n", ["The score is ''", "x.csv:3, score"]),
        ("x.csv", "id,score\na,1\nb\n", ["fewer cells", "x.csv:3"]),
        ("x.csv", "id,score\na,1,2\n", ["more or fewer cells", "x.csv:2"]),
        ("x.csv", "id,score\n", ["holds no outcomes", "x.csv"]),
        ("x.csv", "", ["holds no outcomes", "x.csv"]),
        ("x.csv", "name,score\na,1\n", ["no column `id`; it has name, score", "x.csv:1"]),
        ("x.csv", "id;score\na;1\n", ["no column `id`", "x.csv:1", "separate the cells by commas"]),
        ("x.csv", "id,score,score\na,1,0\n", ["score is there twice", "x.csv:1"]),
        ("x.csv", "id,score,text\na,1," + "x" * 200_000 + "\n", ["cannot be read", "x.csv:", "JSON Lines"]),
        ("x.parquet", "no parquet", ["not Parquet", "x.parquet"]),
        ("x.txt", "a 1", ["cannot be read from a .txt file", "x.txt", "columns `id` and `score`"]),
        ("x", "a 1", ["cannot be read from a nameless file"]),
        ("x.json", '[{"id": "a", "score": 1}]', ["a .json file that is no log of inspect_ai"]),
    ],
)  # fmt: skip
def test_bad_files_are_refused_with_their_place(tmp_path: Path, name: str, content: str, says: list[str]) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    said = refusal(path)
    assert all(part in said for part in says), said


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"id": "a", "score": 1.0}, {"id": "a", "score": 1.0}], ["a is there twice", "x.parquet, row 2", "row 1"]),
        ([{"id": "a", "score": 1.0}, {"id": "b", "score": float("nan")}], ["nan", "x.parquet, row 2, score"]),
        ([{"id": "a", "score": 1.0}, {"id": "b", "score": None}], ["None", "x.parquet, row 2, score"]),
        ([{"item": "a", "score": 1.0}], ["no column `id`; it has item, score", "index of pandas"]),
    ],
)
def test_bad_parquet_files_are_refused_with_their_row(
    tmp_path: Path, rows: list[dict[str, Any]], says: list[str]
) -> None:
    said = refusal(write(tmp_path / "x.parquet", rows))
    assert all(part in said for part in says), said


def test_a_missing_file_and_wrong_encoding_are_refused(tmp_path: Path) -> None:
    said = refusal(tmp_path / "nowhere.jsonl")
    assert "No such file" in said
    assert "nowhere.jsonl" in said
    latin = tmp_path / "latin.csv"
    latin.write_bytes("id,score\né,1\n".encode("latin-1"))
    assert "not UTF-8: invalid continuation byte at byte 9" in refusal(latin)


# Evaluation folders


def folder(path: Path, **conditions: object) -> Path:
    _, items = sides(30, 10, 100, 60)
    summary = EvaluationSummary(
        system=system("candidate", "c"), conditions=CONDITIONS.model_copy(update=conditions), items=len(items),
        metrics={}, latency_p50_ms=1, latency_p95_ms=2, prompt_tokens=1, output_tokens=1, seconds=1,
    )  # fmt: skip
    write_evaluation(path, summary, items)
    return path


def test_evaluation_folders_are_read_with_their_conditions(tmp_path: Path) -> None:
    read = read_evaluation(folder(tmp_path / "new"), METRIC)
    assert read.conditions == CONDITIONS
    assert read.system == system("candidate", "c")
    assert read.outcomes == sides(30, 10, 100, 60)[1]
    assert read.items_digest == items_digest(sides(30, 10, 100, 60)[0])
    assert read.expenses == {Expense.LATENCY, Expense.PROMPT_TOKENS, Expense.OUTPUT_TOKENS}


def test_a_folder_with_lost_items_is_refused(tmp_path: Path) -> None:
    path = folder(tmp_path / "old")
    lines = (path / "items.jsonl").read_text().splitlines(keepends=True)
    (path / "items.jsonl").write_text("".join(lines[:-1]))
    assert "speaks of 200 items, and 199 are there" in refusal(path)


def test_a_folder_of_a_harness_names_the_files_in_it(tmp_path: Path) -> None:
    (tmp_path / "samples_pets.jsonl").write_text("")
    (tmp_path / "a.eval").write_text("")
    assert "one of the files in this one: a.eval, samples_pets.jsonl" in refusal(tmp_path)


# The digest of items


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"prediction": "x", "scores": {"m": 0.0}, "latency_ms": 1.0, "cost": 2.0}, True),
        ({"id": "other"}, False),
        ({"text": "other"}, False),
        ({"target": "other"}, False),
        ({"group": "other"}, False),
        ({"slice": "other"}, False),
    ],
)
def test_the_digest_of_items_is_about_what_was_asked_alone(changes: dict[str, Any], same: bool) -> None:
    items = [item(1, True), item(2, True)]
    changed = [items[1], items[0].model_copy(update=changes)]  # the order does not count
    assert (items_digest(changed) == items_digest(items)) is same


# Policies

CONFIG = "name: x\nbase_model: b\ndata: {source: rows.jsonl}\ngolden: {path: golden}\n"
CONFIG += "task: {kind: classify, instruction: Which one, labels: [a, b]}\n"
FULL = Policy(
    metric="field:amount",
    objective=Objective.NON_INFERIOR_AND_CHEAPER,
    guards=(MetricGuard(metric="exact_match", slice="*", margin=0.02), MetricGuard(suite="chat", floor=0.5)),
    looks=LookPolicy.BONFERRONI,
    declared_looks=5,
    alpha=1e-05,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("alpha: 0.01\n", Policy(alpha=0.01)),
        ("name: x\npolicy:\n  min_improvement: 0.02\n", Policy(min_improvement=0.02)),
        (CONFIG, Policy()),  # a configuration that leaves its policy at the defaults
        (CONFIG + "policy:\n", Policy()),
        ("", Policy()),
        ("# only a comment\n", Policy()),
        ('{"policy": {"metric": "valid_output"}}', Policy(metric="valid_output")),
        (FULL.model_dump_json(indent=2), FULL),
        # a verdict.json, whose other fields are not looked at
        (json.dumps({"outcome": "promote", "looks": 3, "policy": FULL.model_dump(mode="json"), "n": 4}), FULL),
    ],
)
def test_policy_files(tmp_path: Path, text: str, expected: Policy) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    assert read_policy(path) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("alpha: 2", ["The policy does not fit", "alpha: Input should be less than or equal to 0.5 (it is 2)"]),
        ("alpha: .nan", ["alpha: Input should be"]),
        ("margin: 1.5", ["margin: Input should be less than 1 (it is 1.5)"]),
        ("min_improvement: -0.1", ["min_improvement: Input should be greater than or equal to 0 (it is -0.1)"]),
        ("alpha: five\nmargin: 0", ["alpha: Input should be a valid number", "(it is 'five')", "margin: Input should"]),
        ("looks: never", ["looks: Input should be 'alpha_spending', 'bonferroni', 'ladder' or 'off' (it is 'never')"]),
        ("alhpa: 0.1", ["alhpa: there is no such field; did you mean alpha?"]),
        ("zeta: 1", ["zeta: there is no such field; there are metric, alpha, min_improvement"]),
        ("guards: [{metric: m, margn: 0.1}]", ["guards.0.margn: there is no such field; did you mean margin?"]),
        ("guards: [{metric: m}]", ["guards.0: a guard needs a margin or a floor"]),
        ("looks: bonferroni", ["(the whole): declared_looks goes with looks: bonferroni"]),
        ("objective: non_inferior_and_cheaper\nmin_improvement: 0.1", ["min_improvement is for the objective"]),
        ("a: [", ["The policy is not YAML", "policy.yaml:"]),
        ("- alpha: 1", ["must be a mapping of names to values, and this is a list", "policy.yaml"]),
        ("alpha 0.1", ["and this is a text"]),
        ("policy: [1]", ["and this is a list", "policy.yaml: policy"]),
        ("policy: {alpha: 2}", ["alpha: Input should be", "policy.yaml: policy"]),
        (CONFIG + "polcy: {alpha: 0.1}\n", ["polcy: there is no such field; did you mean policy?"]),
        ("policy: {metric: m}\nalpha: 0.1\n", ["alpha: it belongs into `policy`"]),
        ('{"policy": {"alpha": 2}, "outcome": "promote"}', ["alpha: Input should be", "policy.yaml: policy"]),
    ],
)  # fmt: skip
def test_bad_policy_files(tmp_path: Path, text: str, says: list[str]) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(SpecError) as refused:
        read_policy(path)
    said = str(refused.value)
    assert all(part in said for part in says), said
    assert "pydantic" not in said


@pytest.mark.parametrize("policy", ["{alpha: 2}", "{alhpa: 0.1}", "{guards: [{metric: m}]}"])
def test_a_configuration_and_a_policy_are_refused_in_the_same_words(tmp_path: Path, policy: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(CONFIG + f"policy: {policy}\n")
    with pytest.raises(SpecError) as of_policy:
        read_policy(path)
    with pytest.raises(SpecError) as of_configuration:
        load_spec(path)
    (line,) = of_policy.value.what.splitlines()[1:]
    assert of_configuration.value.what.splitlines()[1:] == [line.replace("- ", "- policy.")]


def test_a_policy_that_is_not_there_or_may_not_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="The policy file does not exist") as refused:
        read_policy(tmp_path / "none.yaml")
    assert refused.value.fix == "check the path"
    with pytest.raises(SpecError, match="The policy cannot be read") as refused:
        read_policy(tmp_path)
    assert refused.value.where == os.fspath(tmp_path)
