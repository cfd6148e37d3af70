"""`goldgate data`: what a run would make of rows, through the command line, with planted faults."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks.store import Store
from tests.data.toy_data import rows, write_lines
from tests.goldgate.shell import Call

EMAIL, KEY = "anna.berg@example.com", "AKIAIOSFODNN7EXAMPLE"
QUIET = ("--set", 'curate.suspects="off"', "--set", 'curate.poisoning="off"')  # a toy has no words to judge by
GO_ON = ("--set", "curate.accept_risks.few_rows=toy rows for a test")

MakeConfig = Callable[..., Path]


@pytest.fixture
def make_config(tmp_path: Path) -> MakeConfig:
    """Write rows and a configuration for them; keyword arguments are its further parts."""

    def make(records: Sequence[Mapping[str, Any]], **parts: Any) -> Path:
        write_lines(tmp_path / "tickets.jsonl", records)
        config = {
            "name": "tickets",
            "task": {"kind": "classify", "instruction": "Which team?", "labels": ["billing", "support"]},
            "data": {"source": "tickets.jsonl"},
            "golden": {"path": "golden", "items": 40},
            "base_model": "nowhere",
            "curate": {"suspects": "off", "poisoning": "off", "accept_risks": {"few_rows": "toy rows for a test"}},
        }
        (tmp_path / "tickets.yaml").write_text(yaml.safe_dump(config | parts))
        return tmp_path / "tickets.yaml"

    return make


def dirty(good: int = 200) -> list[dict[str, Any]]:
    """Good rows, 6 duplicates and 4 rows of an unknown label: one with an address, one with a key as its id."""
    clean = rows(good)
    faults: list[dict[str, Any]] = [{**clean[n], "id": f"dup{n}"} for n in range(6)]
    faults += [{"id": f"bad{n}", "text": f"nobody knows this one {n}", "label": "sales"} for n in range(2)]
    faults += [{"id": "private", "text": f"write to {EMAIL} at once", "label": f"sales {EMAIL}"}]
    faults += [{"id": KEY, "text": "my key is my name", "label": "sales"}]
    return clean + faults


def test_a_config_that_would_go_on(call: Call, make_config: MakeConfig) -> None:
    config = make_config(dirty())
    assert call("golden", "freeze", config).code == 0
    ended = call("data", "check", config)
    assert (ended.code, ended.err) == (0, "")
    assert "210 read → 144 train, 16 dev" in ended.out
    for part in ("Quarantined", "−4", "In the golden set", "Duplicate", "label 'sales' is none"):
        assert part in ended.out
    assert "No base model: the length of rows in tokens was not checked." in ended.out
    assert EMAIL not in ended.out
    page = Path(ended.out.strip().splitlines()[-1])
    assert page.name == "data_report.html"
    assert EMAIL not in page.read_text()

    # A later check, or run, finds all of it finished.
    again = call("data", "check", config)
    assert [line.split()[0] for line in again.out.splitlines() if " ingest " in line or " curate " in line] == [
        "reused", "reused",
    ]  # fmt: skip


def test_for_programs(call: Call, make_config: MakeConfig) -> None:
    config = make_config(dirty())
    ended = call("data", "check", config, "--json")
    assert ended.code == 0
    record = ended.json
    assert record["passed"] is True
    assert record["refusal"] is None
    assert record["said"] == [f"The golden set is not frozen yet ({config.parent}/golden); a run would stop at that."]
    assert record["report"]["about"]["not_looked_for"][0].startswith("No golden set")
    assert {one["code"]: one["rows"] for one in record["report"]["rejected"]} == {"label_unknown": 4}
    assert {one["code"]: one["rows"] for one in record["report"]["removed"]} == {"exact_duplicate": 6}
    assert record["report"]["train"] + record["report"]["dev"] == 200
    assert all(Path(path).is_file() for path in record["quarantine"].values())
    assert EMAIL not in ended.out


def test_a_refusal_of_the_validation_shows_what_was_found(call: Call, make_config: MakeConfig) -> None:
    config = make_config(dirty(), data={"source": "tickets.jsonl", "max_invalid_share": 0.01})
    ended = call("data", "check", config)
    assert ended.code == 1
    assert "Stopped. 4 of 210 rows are invalid (1.9%), the limit is 1.0%: 4 × label_unknown." in ended.err
    assert "210 read → 206 valid, 4 quarantined" in ended.out
    assert "label 'sales' is none of the task's labels" in ended.out
    page = Path(ended.out.strip().splitlines()[-1])
    assert "4 of 210 rows are invalid" in page.read_text()
    record = call("data", "check", config, "--json")
    assert record.code == 1
    assert record.json["refusal"]["what"].startswith("4 of 210 rows are invalid")
    assert Path(record.json["quarantine"]["validate"]).read_text().count("\n") == 4
    assert record.json["report"]["train"] is None

    shown = call("data", "show-rejected", config)
    assert shown.code == 0
    assert "Invalid: 4 rows" in shown.out
    assert "A run would stop: 4 of 210 rows are invalid" in shown.out


def test_a_guard_that_objects_shows_the_splits_there_would_be(call: Call, make_config: MakeConfig) -> None:
    config = make_config(dirty(), curate={"suspects": "off", "poisoning": "off"})
    ended = call("data", "check", config, "--json")
    assert ended.code == 1
    assert "Stopped. This run would likely disappoint: 180 training rows, fewer than 500." in ended.err
    record = ended.json
    assert record["refusal"]["where"] == "guard few_rows"
    assert (record["report"]["train"], record["report"]["dev"]) == (180, 20)
    assert record["report"]["risks"] == [
        ["few_rows", "180 training rows, fewer than 500", "not accepted: a run stops here"]
    ]
    quarantined = Path(record["quarantine"]["curate"]).read_text().splitlines()
    assert [json.loads(line)["checks"] for line in quarantined] == [["exact_duplicate"]] * 6
    shown = call("data", "show-rejected", config, "--reason", "exact_duplicate", "--limit", "2")
    assert "Duplicate  6" in shown.out
    assert shown.out.count("same text as") == 2


def test_a_label_without_rows_still_shows_the_validation(call: Call, make_config: MakeConfig) -> None:
    task = {"kind": "classify", "instruction": "Which?", "labels": ["billing", "support", "fraud"]}
    ended = call("data", "check", make_config(dirty(), task=task), "--json")
    assert ended.code == 1
    assert "The label 'fraud' has no training row." in ended.err
    assert (ended.json["report"]["valid"], ended.json["report"]["train"]) == (206, None)
    assert list(ended.json["quarantine"]) == ["validate"]


def test_labels_of_a_bare_source_are_inferred(call: Call, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "My tickets.jsonl", dirty()[:206])
    ended = call("data", "check", source, *QUIET, *GO_ON)
    assert ended.code == 0
    assert "Labels inferred from the data (2): billing, support." in ended.out
    assert "No golden set: whether rows overlap with it was not looked for." in ended.out
    assert "206 read → 180 train, 20 dev" in ended.out
    store = Store(str(tmp_path / "store"))
    assert [one.manifest.facts["name"] for one in store.list("curate")] == ["my-tickets"]


def test_many_answers_are_a_chat(call: Call, tmp_path: Path) -> None:
    records = [{"q": row["text"], "a": f"answer {row['text']}"} for row in rows(60)]
    source = write_lines(tmp_path / "chat.jsonl", records)
    ended = call("data", "check", source, "--text", "q", "--target", "a", *QUIET, *GO_ON, "--json")
    assert ended.code == 0, ended.err
    assert ended.json["said"] == [
        "Taken for chat: the first 60 answers have 60 different values (`--kind` says otherwise)."
    ]
    assert ended.json["report"]["about"]["kind"] == "chat"
    assert ended.json["report"]["classes"] == []


LABELS = [
    # answers, and whether they are labels
    (["a", "b"] * 5, True),
    (["a", "b"] * 4 + ["c"], False),  # three of nine
    ([f"l{n % 50}" for n in range(250)], True),
    ([f"l{n % 51}" for n in range(510)], False),
    ([1, 2] * 10, True),
]


@pytest.mark.parametrize(("answers", "labels"), LABELS, ids=["two", "too rare", "fifty", "fifty-one", "numbers"])
def test_what_counts_as_labels(tmp_path: Path, answers: list[Any], labels: bool) -> None:
    from goldgate.data_check import Columns, ask_about_source

    texts = rows(len(answers))
    records = [{"text": row["text"], "label": answer} for row, answer in zip(texts, answers, strict=True)]
    source = write_lines(tmp_path / "rows.jsonl", records)
    asked = ask_about_source(str(source), Columns(), [f"execution.store={tmp_path}/store"])
    assert asked.spec.task.kind.value == ("classify" if labels else "chat")
    if labels:
        assert asked.spec.task.labels == tuple(sorted({str(answer) for answer in answers}))


def test_one_answer_is_no_task(call: Call, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "rows.jsonl", rows(30, labels=["same"]))
    ended = call("data", "check", source)
    assert ended.code == 1
    assert "All answers are the same: 'same'." in ended.err
    assert "column 'label'" in ended.err


def test_a_label_with_a_space_behind_it_is_unknown(call: Call, tmp_path: Path) -> None:
    records = rows(60)
    records[7]["label"] = "billing "
    source = write_lines(tmp_path / "rows.jsonl", records)
    ended = call("data", "check", source, *QUIET, *GO_ON, "--json")
    assert ended.json["said"] == ["Labels inferred from the data (2): billing, support."]
    (reason,) = ended.json["report"]["rejected"]
    assert (reason["code"], reason["rows"], reason["examples"][0]["id"]) == ("label_unknown", 1, "r0007")


def test_a_golden_set_says_what_the_task_is(call: Call, make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(dirty())
    call("golden", "freeze", config)
    source = tmp_path / "tickets.jsonl"
    ended = call("data", "check", source, "--golden", tmp_path / "golden", *QUIET, *GO_ON, "--json")
    assert ended.code == 0, ended.err
    assert ended.json["said"] == ["The task is the one that the golden set was frozen for: tickets, classify."]
    codes = {one["code"]: one["rows"] for one in ended.json["report"]["removed"]}
    assert codes["golden_item"] == 40
    assert ended.json["report"]["golden_items"] == 40
    assert "No golden set" not in ended.out


def test_extracts_need_json_alone(call: Call, tmp_path: Path) -> None:
    records = [{"text": row["text"], "label": '{"n": 1}' if n else "no json"} for n, row in enumerate(rows(60))]
    ended = call(
        "data", "check", write_lines(tmp_path / "x.jsonl", records), "--kind", "extract", *QUIET, *GO_ON, "--json"
    )
    assert ended.code == 0, ended.err
    assert ended.json["said"] == ["No JSON Schema (`--set task.json_schema=…`): any JSON will do."]
    assert [one["rows"] for one in ended.json["report"]["rejected"]] == [1]


def test_rejected_rows_by_reason(call: Call, make_config: MakeConfig) -> None:
    config = make_config(dirty())
    ended = call("data", "show-rejected", config, "--limit", "9")
    assert ended.code == 0
    assert "Invalid: 4 rows" in ended.out
    assert "Curated away: 6 rows" in ended.out
    assert "line 207  bad0  label 'sales' is none of the task's labels" in ended.out
    assert "nobody knows this one 0 → sales" in ended.out
    assert "[AWS_KEY]" in ended.out
    for secret in (EMAIL, KEY):
        assert secret not in ended.out + ended.err

    one = call("data", "show-rejected", config, "--reason", "Label unknown", "--limit", "1", "--json")
    assert one.json["curate"]["reasons"] == []
    (reason,) = one.json["validate"]["reasons"]
    assert (reason["reason"], reason["rows"], len(reason["examples"])) == ("label_unknown", 4, 1)

    none = call("data", "show-rejected", config, "--reason", "typo")
    assert none.code == 1
    assert "No row was left out as 'typo'." in none.err
    assert "there are: exact_duplicate, label_unknown" in none.err


REFUSED = [
    (["data", "check", "{config}", "--text", "q"], "A configuration says itself where its rows have what."),
    (["data", "check", "{rows}", "--tokens"], "Without a configuration there is no base model."),
    (["data", "check", "{folder}/none.jsonl"], "none.jsonl"),
    (["data", "check", "{rows}", "--golden", "{folder}/nowhere"], "The golden set is not frozen yet."),
    (["data", "check", "{config}", "--golden", "{folder}/nowhere"], "The golden set is not frozen yet."),
    (["data", "check", "{rows}", "--target", "answer"], "No row has the column 'answer'"),
    (["data", "check", "{rows}", "--set", "curate.dev_share=7"], "curate.dev_share"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[" ".join(case[0][2:]) for case in REFUSED])
def test_refusals(call: Call, make_config: MakeConfig, tmp_path: Path, arguments: list[str], message: str) -> None:
    places = {"config": make_config(rows(20)), "rows": tmp_path / "tickets.jsonl", "folder": tmp_path}
    ended = call(*(argument.format(**places) for argument in arguments))
    assert ended.code == 1
    assert message in ended.err
    assert "Traceback" not in ended.err


def test_a_base_model_says_how_long_rows_are(call: Call, make_config: MakeConfig, tiny_model: Path) -> None:
    config = make_config(rows(40), base_model=str(tiny_model), train={"max_tokens": 16})
    without = call("data", "check", config, "--json")
    assert (without.code, without.json["passed"]) == (0, True)
    assert "No base model" in without.out

    ended = call("data", "check", config, "--tokens", "--json")
    assert ended.code == 1
    assert {one["code"]: one["rows"] for one in ended.json["report"]["rejected"]} == {"too_many_tokens": 40}
    assert "No base model" not in ended.out

    # It is in the store now, so nobody has to ask for it.
    shown = call("data", "show-rejected", config, "--reason", "too_many_tokens", "--limit", "1")
    assert (shown.code, shown.out.count("the limit is 16")) == (0, 1)


def test_a_store_that_is_named_is_used(call: Call, make_config: MakeConfig, tmp_path: Path) -> None:
    ended = call("data", "check", make_config(dirty()), "--store", tmp_path / "other", "--json")
    assert ended.json["page"].startswith(f"{tmp_path}/other/data_report/")
    assert not (tmp_path / "store" / "ingest").exists()


def test_what_is_new_since_the_last_check(call: Call, make_config: MakeConfig) -> None:
    clean = rows(200)
    call("data", "check", make_config(clean))
    config = make_config([{**clean[0], "label": "support"}, *clean[4:], {**rows(1, seed=5)[0], "id": "new"}])
    ended = call("data", "check", config)
    assert "New since the last data of this task: +1 −3, 1 relabelled." in ended.out
