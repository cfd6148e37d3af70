"""Logs of lm-evaluation-harness and inspect_ai: what becomes of them, and what is refused."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks.contracts.errors import EvaluationError
from tasks.contracts.spec import Expense
from tasks.gate.files import read_evaluation
from tasks.gate.harness_logs import read_harness_log

LOGS = Path(__file__).parent / "harness_logs"
LIST_METRIC = "it is no single number; its total is made of all items at once (item 0)"


def scores(name: str, metric: str) -> dict[str, dict[str, float]]:
    return {one.id: one.scores for one in read_evaluation(LOGS / name, metric).outcomes}


# lm-evaluation-harness


def test_lm_eval_choices() -> None:
    read = read_evaluation(LOGS / "samples_choice.jsonl", "acc")
    assert [one.scores for one in read.outcomes] == [
        {"acc": 1.0, "acc_norm": 1.0}, {"acc": 1.0, "acc_norm": 1.0}, {"acc": 0.0, "acc_norm": 1.0},
    ]  # fmt: skip
    last = read.outcomes[2]
    assert (last.id, last.target, last.prediction, last.group) == ("2", "2", "0", None)
    assert json.loads(last.text) == {"question": "What gallops?", "choices": ["dog", "cat", "horse"], "answer": 2}
    assert read.left_out == {"brier_score": LIST_METRIC}
    assert read.conditions is None
    assert read.expenses == set()


def test_lm_eval_one_filter() -> None:
    assert scores("samples_generate.jsonl", "exact_match") == {
        "0": {"exact_match": 1.0}, "1": {"exact_match": 0.0}, "2": {"exact_match": 0.0},
    }  # fmt: skip


def test_lm_eval_several_filters_are_scores_of_one_item() -> None:
    assert scores("samples_filters.jsonl", "exact_match/strict-match")["1"] == {
        "exact_match/strict-match": 0.0, "exact_match/flexible-extract": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize(("filter_", "prediction"), [("strict-match", "[invalid]"), ("flexible-extract", "dog")])
def test_lm_eval_prediction_is_that_of_the_metrics_filter(filter_: str, prediction: str) -> None:
    read = read_evaluation(LOGS / "samples_filters.jsonl", f"exact_match/{filter_}")
    assert read.outcomes[1].prediction == prediction


@pytest.mark.parametrize(
    ("name", "metric"),
    [
        ("choice", "acc"),
        ("choice", "acc_norm"),
        ("generate", "exact_match"),
        ("filters", "exact_match/strict-match"),
        ("filters", "exact_match/flexible-extract"),
    ],
)
def test_lm_eval_means_are_the_harnesss_own_totals(name: str, metric: str) -> None:
    totals = json.loads((LOGS / "results.json").read_text(encoding="utf-8"))["results"][name]
    read = [one[metric] for one in scores(f"samples_{name}.jsonl", metric).values()]
    plain, _, filter_ = metric.partition("/")
    assert sum(read) / len(read) == pytest.approx(totals[f"{plain},{filter_ or 'none'}"])


def lines(name: str = "samples_choice.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (LOGS / name).read_text(encoding="utf-8").splitlines()]


def older(line: dict[str, Any]) -> dict[str, Any]:
    """As 0.4.2 wrote it."""
    new = {"filter", "metrics", "doc_hash", "prompt_hash", "target_hash", "brier_score"}
    kept = {name: value for name, value in line.items() if name not in new}
    asked = [list(request.values()) for request in line["arguments"].values()]
    answers = [[float(likelihood), greedy == "True"] for likelihood, greedy in line["filtered_resps"]]
    return {**kept, "arguments": asked, "target": int(line["target"]), "filtered_resps": answers}


@pytest.mark.parametrize("indent", [None, 2])
def test_lm_eval_before_it_named_filters_and_metrics(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "pretrained__pets.jsonl"
    path.write_text(json.dumps([older(line) for line in lines()], indent=indent), encoding="utf-8")
    read, now = read_evaluation(path, "acc"), read_evaluation(LOGS / "samples_choice.jsonl", "acc")
    assert read.outcomes == now.outcomes
    assert read.items_digest == now.items_digest


def test_lm_eval_items_are_told_by_content_whatever_the_name(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_bytes((LOGS / "samples_choice.jsonl").read_bytes())
    assert len(read_evaluation(path, "acc").outcomes) == 3


Change = Callable[[list[dict[str, Any]]], Any]


@pytest.mark.parametrize(
    ("change", "metric", "says"),
    [
        (lambda log: log[1].update(acc=-3.5), "acc",
         ["acc cannot be judged: it is -3.5, which is not between 0 and 1 (item 1)"]),
        (lambda log: log[1].pop("acc"), "acc", ["acc cannot be judged: it is not there (item 1)"]),
        (lambda log: log[1].update(acc="high"), "acc", ["it is the text 'high' (item 1)"]),
        (lambda log: None, "brier_score", [f"brier_score cannot be judged: {LIST_METRIC}"]),
        (lambda log: None, "exact_match", ["it has acc, acc_norm; brier_score cannot be judged"]),
        (lambda log: [line.update(metrics=["bypass"], bypass=999) for line in log], "acc",
         ["no metric acc; it has none; bypass cannot be judged: it is 999"]),
        (lambda log: log.append(log[0]), "acc", ["item 0 is there twice", "x.jsonl:4", "x.jsonl:1"]),
        (lambda log: log.append({**log[0], "filter": None}) or log[0].update(filter=None), "acc",
         ["item 0 is there twice", "before 0.4.8"]),
        (lambda log: log.append({"id": "a", "score": 1}), "acc", ["doc_id: Field required", "x.jsonl:4"]),
        (lambda log: log[1].update(filtered_resps="a"), "acc", ["filtered_resps: Input should be a valid list"]),
    ],
)  # fmt: skip
def test_lm_eval_refusals(tmp_path: Path, change: Change, metric: str, says: list[str]) -> None:
    log = lines()
    change(log)
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in log), encoding="utf-8")
    with pytest.raises(EvaluationError) as refused:
        read_evaluation(path, metric)
    assert all(part in str(refused.value) for part in says), str(refused.value)


def test_lm_eval_line_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text((LOGS / "samples_choice.jsonl").read_text(encoding="utf-8")[:-30], encoding="utf-8")
    with pytest.raises(EvaluationError, match="it is no JSON object") as refused:
        read_evaluation(path, "acc")
    assert refused.value.where == f"{path}:3"


def test_lm_eval_texts_of_numpy_are_numbers(tmp_path: Path) -> None:
    log = lines()
    for line, value in zip(log, ["1.0", "0.25", "True"], strict=True):
        line["acc"] = value
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in log), encoding="utf-8")
    assert [one.scores["acc"] for one in read_evaluation(path, "acc").outcomes] == [1.0, 0.25, 1.0]


def test_lm_eval_choice_is_named_where_the_target_is(tmp_path: Path) -> None:
    log = lines()
    for line, target in zip(log, ["cat", "dog", "horse"], strict=True):
        line["target"] = target
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in log), encoding="utf-8")
    assert [one.prediction for one in read_evaluation(path, "acc").outcomes] == ["cat", "dog", "dog"]


def test_lm_eval_totals_are_no_items() -> None:
    with pytest.raises(EvaluationError, match="totals of lm-evaluation-harness") as refused:
        read_evaluation(LOGS / "results.json", "acc")
    assert "--log_samples" in refused.value.fix


# inspect_ai

EPOCHS = {
    "cat#1": {"match": 1.0, "manners/short": 1.0, "manners/polite": 0.75, "grade": 1.0},
    "2#1": {"match": 0.0, "manners/short": 0.0, "manners/polite": 0.25, "grade": 0.5},  # P
    "3#1": {"match": 0.0, "manners/short": 1.0, "manners/polite": 0.75, "grade": 0.0},  # N
    "cat#2": {"match": 1.0, "manners/short": 1.0, "manners/polite": 0.75, "grade": 1.0},
    "2#2": {"match": 0.0, "manners/short": 0.0, "manners/polite": 0.75, "grade": 0.0},  # I
    "3#2": {"match": 1.0, "manners/short": 1.0, "manners/polite": 0.75, "grade": 1.0},  # C
}


@pytest.mark.parametrize("name", ["two_epochs.eval", "chunked.eval"])
def test_inspect_epochs_are_items_of_one_group(name: str) -> None:
    read = read_evaluation(LOGS / name, "match")
    assert {one.id: one.scores for one in read.outcomes} == EPOCHS
    assert {one.id: one.group for one in read.outcomes} == {id_: id_.split("#")[0] for id_ in EPOCHS}
    assert read.left_out == {}


def test_inspect_one_epoch_keeps_the_ids_and_has_no_groups() -> None:
    read = read_evaluation(LOGS / "plain.json", "match")
    by_id = {one.id: one for one in read.outcomes}
    assert {id_: one.group for id_, one in by_id.items()} == {"cat": None, "2": None, "3": None}
    assert by_id["2"].scores == EPOCHS["2#1"]
    assert {id_: (one.text, one.target, one.prediction) for id_, one in by_id.items()} == {
        "cat": ("What says meow?", "cat", "cat"),
        "2": ("What barks?", '["dog", "hound"]', "maybe a dog please"),
        "3": ("What gallops?\na horse\na house", "horse", "horse"),
    }
    assert (by_id["2"].prompt_tokens, by_id["2"].output_tokens, by_id["2"].cost) == (12, 4, None)
    in_log = {str(sample["id"]): sample["working_time"] for sample in plain()["samples"]}
    assert {id_: one.latency_ms for id_, one in by_id.items()} == {id_: 1000 * s for id_, s in in_log.items()}


def test_inspect_means_are_the_harnesss_own_totals() -> None:
    totals = {
        score["name"] if score["name"] == score["scorer"] else f"{score['scorer']}/{score['name']}": metric["value"]
        for score in plain()["results"]["scores"]
        for name, metric in score["metrics"].items()
        if name in ("accuracy", "mean")
    }
    read = list(scores("plain.json", "match").values())
    assert {name: sum(one[name] for one in read) / len(read) for name in read[0]} == pytest.approx(totals)


def test_inspect_items_are_the_same_whatever_the_run() -> None:
    """Messages have ids of their own in each run, and `.json` and `.eval` have another order."""
    digests = {read_evaluation(LOGS / name, "match").items_digest for name in ("plain.json", "unscored.eval")}
    assert len(digests) == 1


def test_inspect_prediction_is_the_answer_that_the_metrics_scorer_saw() -> None:
    answers = {one.id: one.prediction for one in read_evaluation(LOGS / "plain.json", "grade").outcomes}
    assert answers == {"cat": "cat", "2": "may", "3": "hor"}


def test_inspect_metric_without_a_score_for_each_sample_is_left_out() -> None:
    read = read_evaluation(LOGS / "unscored.eval", "match")
    assert read.left_out == {"grade": "it was not scored (grader_failed) (item 2)"}
    assert {name for one in read.outcomes for name in one.scores} == {"match", "manners/short", "manners/polite"}


@pytest.mark.parametrize(
    ("name", "metric", "says"),
    [
        ("killed.eval", "match", ["did not finish, its status is started", "inspect eval-retry"]),
        ("failed.json", "match", ["did not finish, its status is error: RuntimeError('the pet ran away')"]),
        ("errored.eval", "match", ["1 of 3 samples ended in an error: RuntimeError('the pet ran away')",
                                   "errored.eval, sample 2, epoch 1", "items are never left out"]),
        ("unscored.eval", "grade", ["grade cannot be judged: it was not scored (grader_failed) (item 2)"]),
        ("plain.json", "exact_match", ["no metric exact_match; it has grade, manners/polite, manners/short, match"]),
        ("plain.json", "manner/short", ["such as manners/short"]),
    ],
)  # fmt: skip
def test_inspect_refusals(name: str, metric: str, says: list[str]) -> None:
    with pytest.raises(EvaluationError) as refused:
        read_evaluation(LOGS / name, metric)
    assert all(part in str(refused.value) for part in says), str(refused.value)


def plain() -> dict[str, Any]:
    log: dict[str, Any] = json.loads((LOGS / "plain.json").read_text(encoding="utf-8"))
    return log


def usage(cost: float | None) -> dict[str, Any]:
    return {"input_tokens": 5, "input_tokens_cache_read": 2, "input_tokens_cache_write": 1, "output_tokens": 3,
            "total_cost": cost}  # fmt: skip


Edit = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda log: log["samples"].pop(), ["speaks of 3 samples, and 2 are there"]),
        (lambda log: log.update(samples=[]), ["holds no samples", "--no-log-samples"]),
        (lambda log: log.pop("samples"), ["holds no samples"]),
        (lambda log: log.update(samples=3), ["holds no samples"]),
        (lambda log: log.update(status="cancelled"), ["its status is cancelled"]),
        (lambda log: log["samples"][0].update(scores={}), ["1 of 3 samples were not scored", "inspect score"]),
        (lambda log: log["samples"][0].update(invalidation={"reason": "x"}), ["were declared invalid", "sample 2"]),
        (lambda log: log["samples"][0].update(limit={"type": "operator", "limit": 1}), ["were stopped by hand"]),
        (lambda log: log["samples"][0].pop("target"), ["inspect_ai writes it: target: Field required", "sample 1"]),
        (lambda log: log["samples"].__setitem__(0, "x"), ["it is no JSON object"]),
        (lambda log: log["samples"][1].update(id="2"), ["The item 2 is there twice"]),
        (lambda log: log["samples"][0]["scores"]["match"].update(value="great"), ["it is the text 'great' (item 2)"]),
        (lambda log: log["samples"][0]["scores"]["match"].update(value=7), ["it is 7, which is not between 0 and 1"]),
        (lambda log: log["samples"][0]["scores"]["match"].update(value=[1, 0]), ["it is no single number"]),
        (lambda log: log["samples"][0]["scores"].pop("match"), ["match cannot be judged: it is not there (item 2)"]),
    ],
)  # fmt: skip
def test_inspect_logs_that_lack_something_are_refused(tmp_path: Path, change: Edit, says: list[str]) -> None:
    log = plain()
    change(log)
    path = tmp_path / "x.json"
    path.write_text(json.dumps(log, indent=2), encoding="utf-8")
    with pytest.raises(EvaluationError) as refused:
        read_evaluation(path, "match")
    assert all(part in str(refused.value) for part in says), str(refused.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda sample: sample.update(limit={"type": "token", "limit": 5}), {}),  # stopped by its budget, and scored
        (lambda sample: sample["scores"]["match"].update(value=True), {"scores": {"match": 1.0}}),
        (lambda sample: sample["scores"]["match"].update(value="yes"), {"scores": {"match": 1.0}}),
        (lambda sample: sample["scores"]["match"].update(value="0.5"), {"scores": {"match": 0.5}}),
        (lambda sample: sample.update(model_usage={"mockllm/model": usage(0.25), "grader": usage(9.0)}),
         {"prompt_tokens": 8, "output_tokens": 3, "cost": 0.25}),
        (lambda sample: sample.update(model_usage={"one": usage(0.25), "two": usage(0.5)}),
         {"prompt_tokens": 16, "output_tokens": 6, "cost": 0.75}),
        (lambda sample: sample.update(model_usage={"one": usage(0.25), "two": usage(None)}), {"cost": None}),
        (lambda sample: sample.update(working_time=None, total_time=2.5), {"latency_ms": 2500.0}),
        (lambda sample: sample.update(input="attachment://a", attachments={"a": "long"}), {"text": "long"}),
        (lambda sample: sample.update(input=[{"role": "system", "content": "Be short."},
                                             {"role": "user", "content": [{"type": "text", "text": "Hi", "id": "z"}]}]),
         {"text": "system: Be short.\nuser: Hi"}),
        (lambda sample: [score.pop("answer", None) for score in sample["scores"].values()],
         {"prediction": "maybe a dog please"}),
    ],
)  # fmt: skip
def test_inspect_samples(tmp_path: Path, change: Edit, expected: dict[str, Any]) -> None:
    log = plain()
    del log["samples"][1:]
    log["results"]["total_samples"] = 1
    change(log["samples"][0])
    path = tmp_path / "x.json"
    path.write_text(json.dumps(log), encoding="utf-8")
    (outcome,) = read_evaluation(path, "match").outcomes
    found = {**outcome.model_dump(), "scores": {"match": outcome.scores["match"]}}
    assert {name: found[name] for name in expected} == expected


def test_inspect_latency_that_some_samples_lack_is_left_out(tmp_path: Path) -> None:
    log = plain()
    log["samples"][0].update(working_time=None, total_time=None)
    path = tmp_path / "x.json"
    path.write_text(json.dumps(log), encoding="utf-8")
    read = read_evaluation(path, "match")
    assert read.left_out == {"latency_ms": "it is not there (item 2)"}
    assert read.expenses == {Expense.PROMPT_TOKENS, Expense.OUTPUT_TOKENS}
    assert {one.latency_ms for one in read.outcomes} == {0.0}


# zips


def test_inspect_zip_with_deflated_members(tmp_path: Path) -> None:
    """As inspect_ai wrote them before Zstandard."""
    path, log = tmp_path / "x.eval", plain()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("header.json", json.dumps({name: log[name] for name in ("status", "eval", "results")}))
        for sample in log["samples"]:
            archive.writestr(f"samples/{sample['id']}_epoch_1.json", json.dumps(sample))
        archive.writestr("summaries.json", "[]")
    assert read_evaluation(path, "match").outcomes == read_evaluation(LOGS / "plain.json", "match").outcomes


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: data[: len(data) // 2], "damaged zip"),
        (
            lambda data: data.replace(b"samples/cat_epoch_1.json", b"examples/cat_epoch1.json"),
            "speaks of 6 samples, and",
        ),
        (lambda data: data[:3000] + bytes(8) + data[3008:], "A part of the log cannot be read"),
    ],
)
def test_inspect_damaged_zips_are_refused(tmp_path: Path, damage: Callable[[bytes], bytes], says: str) -> None:
    path = tmp_path / "x.eval"
    path.write_bytes(damage((LOGS / "two_epochs.eval").read_bytes()))
    with pytest.raises(EvaluationError, match=says):
        read_evaluation(path, "match")


def test_inspect_json_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("\n".join((LOGS / "plain.json").read_text(encoding="utf-8").splitlines()[:40]), encoding="utf-8")
    with pytest.raises(EvaluationError, match="not JSON") as refused:
        read_evaluation(path, "match")
    assert refused.value.where == f"{path}:40"


def test_other_zips_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.eval"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "a")
    with pytest.raises(EvaluationError, match="a zip, and no log of inspect_ai"):
        read_evaluation(path, "match")


@pytest.mark.parametrize(
    "content",
    [
        b"id,score\na,1\n",
        b'{"id": "a", "score": 1, "status": "ok", "eval": 1}\n',
        b'{"id": "a", "doc_id": 1, "score": 1}\n',
        b"[1, 2]\n",
        b"[1,\n2",
        b"{\n",
        b"\xff\xfe",
        b"",
    ],
)
def test_what_is_no_log_is_left_to_others(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    assert read_harness_log(path, "match") is None
