"""The data report: its counts add up whatever is wrong with the rows, and it shows what was planted, but no secret."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.contracts.errors import DataError
from tasks.contracts.references import CONTAMINATION_FILE, ContaminationReport
from tasks.contracts.spec import CurateSpec, DataSpec, GoldenSpec, Guard, RetrainSpec
from tasks.data.changes import Changes, Move
from tasks.data.curate import curate
from tasks.data.golden import freeze
from tasks.data.ingest import ingest
from tasks.data.private import _KINDS
from tasks.data.rejected import Veil, read_rejected, say_code
from tasks.data.report import About, ClassRow, DataReport, _one, about_data, gather
from tasks.data.report_page import read_record, render, report_markdown, write_report
from tasks.data.steps import curate_dataset, ingest_dataset, open_golden_set, report_data, validate_dataset
from tasks.data.validate import validate
from tests.data.test_docs import Page
from tests.data.toy_data import CLASSIFY, rows, sentence, write_lines

MakeSpec = Callable[..., RetrainSpec]
RISKS = dict.fromkeys(Guard, "toy rows for a test")
EMAIL, KEY = "anna.berg@example.com", "AKIAIOSFODNN7EXAMPLE"
LOADING = {"script", "img", "link", "iframe", "object", "embed", "audio", "video", "source", "base", "form", "a"}


def spec_over(source: Path, **curated: Any) -> RetrainSpec:
    return RetrainSpec(
        name="toy",
        task=CLASSIFY,
        data=DataSpec(source=str(source), max_invalid_share=1.0),
        golden=GoldenSpec(path="none"),
        base_model="none",
        curate=CurateSpec(**({"accept_risks": RISKS, "suspects": "off", "poisoning": "off"} | curated)),
    )


def made(folder: Path, records: Sequence[Mapping[str, Any]], **curated: Any) -> DataReport:
    """The report of records that go through every stage."""
    spec = spec_over(write_lines(folder / "rows.jsonl", records), **curated)
    if any("from" in record for record in records):
        spec = spec.model_copy(update={"data": spec.data.model_copy(update={"source_field": "from"})})
    raw, judged, split = (folder / name for name in ("raw", "judged", "split"))
    for part in (raw, judged, split):
        part.mkdir()
    read = sum(ingest(spec.data, spec.task.kind, raw))
    counts = validate(raw, spec.task, spec.data, judged, lambda: folder, poisoning=spec.curate.poisoning)
    curate(judged, None, spec.task, spec.curate, 1e-4, split)
    return gather(about_data(spec, read, tokens=False, golden=False), judged, split, masked=counts.masked)


def planted(draw: random.Random) -> list[dict[str, Any]]:
    """120 good rows, and faults of which the tests know how many there are."""
    good = [row | {"from": ("web", "phone")[number % 3 == 0]} for number, row in enumerate(rows(120))]
    faults: list[dict[str, Any]] = [{**good[n], "id": f"dup{n}"} for n in range(6)]
    faults += [{**good[n], "id": f"con{n}", "label": "support"} for n in (10, 12)]  # these are billing
    faults += [{"id": f"bad{n}", "text": f"{KEY} {sentence(draw)}", "label": "sales"} for n in range(2)]
    faults += [{"id": f"unk{n}", "text": sentence(draw), "label": "sales"} for n in range(5)]
    faults += [{"id": f"nul{n}", "text": None, "label": "billing"} for n in range(4)]
    faults += [{"id": f"pii{n}", "text": f"write to {EMAIL} {sentence(draw)}", "label": "billing"} for n in range(3)]
    faults += [{"id": f"key{n}", "text": f"{KEY} {sentence(draw)}", "label": "support"} for n in range(2)]
    return good + faults


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> DataReport:
    return made(tmp_path_factory.mktemp("planted"), planted(random.Random(7)))


def test_the_counts_are_those_that_were_planted(report: DataReport) -> None:
    assert {reason.code: reason.rows for reason in report.rejected} == {"label_unknown": 7, "text is null": 4}
    assert {reason.code: reason.rows for reason in report.removed} == {"exact_duplicate": 6, "conflicting_labels": 4}
    assert {reason.code: reason.rows for reason in report.told} == {"personal_data": 3, "secret": 2}
    assert {kind.name: kind.rows for kind in report.private} == {"e-mail address": 3, "AWS key": 2}
    assert (report.about.read, report.valid, report.quarantined) == (144, 133, 11)
    assert report.train is not None
    assert report.dev is not None
    assert report.train + report.dev == 133 - 6 - 4
    assert report.sum_of_rows() == f"144 read = 21 rejected + {report.train} train + {report.dev} dev"
    assert report.funnel() == f"144 read → {report.train} train, {report.dev} dev"


def test_reasons_have_their_first_rows(report: DataReport) -> None:
    unknown = report.rejected[0]
    assert [one.id for one in unknown.examples] == ["bad0", "bad1", "unk0"]
    assert {one.why for one in unknown.examples} == {"label 'sales' is none of the task's labels"}
    assert unknown.examples[0].target == "sales"
    null = report.rejected[1].examples[0]
    assert (null.line, null.target) == (136, None)
    assert null.text.startswith('{"id": "nul0", "text": null')


def test_classes_sources_and_clusters(report: DataReport) -> None:
    assert [one.name for one in report.classes] == ["support", "billing"]
    support, billing = report.classes
    assert (billing.valid, support.valid, billing.golden) == (66, 67, None)
    assert (billing.kept, support.kept) == (61, 62)
    assert {one.name: one.rows for one in report.sources} == {"web": 79, "phone": 39}
    assert (report.clusters, report.clustered_rows) == (8, 16)
    assert report.largest[0].text.startswith("w")
    assert {spread.split for spread in report.lengths} == {"train", "dev"}
    assert all(sum(count for _, count in one.histogram) in (report.train, report.dev) for one in report.lengths)


def test_what_was_not_looked_for_is_said(report: DataReport) -> None:
    said = " ".join(report.about.not_looked_for)
    for part in ("No golden set", "No base model", "curate.suspects", "curate.poisoning"):
        assert part in said
    codes = {step.code for step in report.steps}
    assert "exact_duplicate" in codes
    assert not [code for code in codes if code.startswith(("golden", "semantic", "suspect", "planted"))]
    assert "golden" not in render(report).split("</style>")[1].replace("No golden set", "")


def test_nothing_private_is_on_the_page(report: DataReport, tmp_path: Path) -> None:
    write_report(tmp_path, report)
    for name in ("data_report.html", "data.json"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert "[AWS_KEY]" in text
        assert KEY not in text
        assert EMAIL not in text
    assert read_record(tmp_path)["rejected"][0]["rows"] == 7


@pytest.mark.parametrize("policy", ["report", "mask", "quarantine", "off"])
def test_private_data_are_masked_whatever_the_policy(tmp_path: Path, policy: str) -> None:
    texts = [f"write to {EMAIL}, {KEY} {number}" for number in range(3)]
    entries = [
        {"line": n, "id": EMAIL, "checks": ["secret"], "reasons": [f"because of {KEY}"], "record": record}
        for n, record in enumerate(
            [
                {"id": "a", "line": 1, "messages": [{"role": "user", "content": texts[0]}], "target": EMAIL,
                 "group": None, "slice": None},
                {"note": texts[1], policy: {"deep": [EMAIL]}},
                texts[2],
            ],
            start=1,
        )
    ]  # fmt: skip
    found = read_rejected(write_lines(tmp_path / "quarantine.jsonl", entries), Veil())
    assert found.reasons == {"secret": 3}
    shown = json.dumps([one._asdict() for one in found.examples["secret"]])
    assert shown.count("[EMAIL]") >= 7
    assert EMAIL not in shown
    assert KEY not in shown


def test_a_cut_hides_no_half_of_a_secret() -> None:
    veil = Veil()
    for at in range(170, 200):
        shown = veil.cover(f"{'x' * at} {EMAIL} and more text behind it")
        assert len(shown) <= 200
        assert "anna" not in shown


def test_characters_that_nobody_sees_are_written_out() -> None:
    assert Veil().cover("a\u202eb\x1b[31mc\u200bd\te") == "a\\u202eb\\u001b[31mc\\u200bd e"


def test_the_page_loads_nothing_and_runs_nothing(tmp_path: Path) -> None:
    evil = "</p><script>alert(1)</script><img src=https://e.example/x onerror=1>"
    records = rows(60) + [{"id": evil[:40], "text": f"{evil} {n}", "label": f"{evil}"} for n in range(3)]
    html = render(made(tmp_path, records))
    page = Page(html)
    assert not page.tags & LOADING
    assert page.addresses == []
    assert "default-src 'none'" in html
    assert "<script>alert(1)" in page.text  # as text
    assert len(re.findall("url\\(|@import", html)) == 0


FAULTS: dict[str, Callable[[random.Random, int, list[dict[str, Any]]], dict[str, Any]]] = {
    "exact_duplicate": lambda draw, n, good: {**good[n], "id": f"dup{n}"},
    "near_duplicate": lambda draw, n, good: {**good[n], "id": f"near{n}", "text": good[n]["text"] + " more"},
    "conflicting_labels": lambda draw, n, good: {**good[n], "id": f"con{n}", "label": "support"},
    "label_unknown": lambda draw, n, good: {"id": f"unk{n}", "text": sentence(draw), "label": "sales"},
    "text is null": lambda draw, n, good: {"id": f"nul{n}", "text": None, "label": "billing"},
    "text_blank": lambda draw, n, good: {"id": f"bl{n}", "text": "  ", "label": "billing"},
    "text_damaged": lambda draw, n, good: {"id": f"dm{n}", "text": sentence(draw) + " \ufffd", "label": "billing"},
    "personal_data": lambda draw, n, good: {"id": f"p{n}", "text": f"{EMAIL} {sentence(draw)}", "label": "billing"},
}


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    st.dictionaries(st.sampled_from(sorted(FAULTS)), st.integers(0, 6)),
    st.randoms(use_true_random=False),
    st.sampled_from([None, 10, 30]),
    st.sampled_from(["none", "oversample", "weight"]),
)
def test_the_counts_add_up_whatever_is_wrong(
    tmp_path_factory: pytest.TempPathFactory,
    faults: dict[str, int],
    draw: random.Random,
    limit: int | None,
    balance: str,
) -> None:
    good = rows(60)
    records = [*good, *(FAULTS[kind](draw, n * 2, good) for kind, count in faults.items() for n in range(count))]
    draw.shuffle(records)
    report = made(tmp_path_factory.mktemp("mix"), records, max_train_rows=limit, balance=balance)
    assert report.train is not None
    assert report.dev is not None
    assert report.about.read == len(records)
    taken = sum(step.removed for step in report.steps)
    assert report.about.read == taken + report.train + report.dev
    assert sum(reason.rows for reason in report.removed) == report.valid - report.train - report.dev
    assert report.train_lines is not None
    assert report.train_lines >= report.train
    found = {reason.code: reason.rows for reason in report.rejected}
    for kind in ("label_unknown", "text is null", "text_blank", "text_damaged"):
        assert found.get(kind, 0) == faults.get(kind, 0)
    assert {one.code: one.rows for one in report.told}.get("personal_data", 0) == faults.get("personal_data", 0)
    page = Page(render(report))
    assert f"{report.sum_of_rows()}." in page.text


def broken(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "split/report.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


BREAKS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "a step": (lambda record: record["funnel"][5].update(left=3), "rows are left, not"),
    "the start": (lambda record: record["funnel"][0].update(left=3), "the curation took over 3 rows, and 64 were"),
    "the end": (lambda record: record["dev"].update(rows=99), "train and dev have"),
    "a class": (lambda record: record["classes"]["train"].update(billing=1), "the classes of train have"),
    "a file": (lambda record: record["train"].update(rows=1), r"train.jsonl has \d+ lines, not 1"),
    "a reason": (
        lambda record: (record["funnel"][-3].update(removed=1), record["funnel"][-2].update(removed=-1)),
        "the funnel removed",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_counts_that_do_not_add_up_are_refused(tmp_path: Path, name: str) -> None:
    change, message = BREAKS[name]
    good = rows(60)
    made(tmp_path, [*good, *({**good[n], "id": f"dup{n}"} for n in range(4))])
    broken(tmp_path, change)
    about = about_data(spec_over(tmp_path / "rows.jsonl"), 64, tokens=False, golden=False)
    with pytest.raises(DataError, match=message) as caught:
        gather(about, tmp_path / "judged", tmp_path / "split")
    assert caught.value.where == str(tmp_path / "split")


def test_more_quarantined_than_read_is_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "quarantine.jsonl", [{"line": 1, "id": "a", "checks": ["x"], "reasons": ["x"]}] * 2)
    with pytest.raises(DataError, match="2 rows are quarantined, and 1 were read"):
        gather(about_data(spec_over(tmp_path), 1, tokens=False, golden=False), tmp_path, None)


def test_every_optional_part_is_shown(report: DataReport, tmp_path: Path) -> None:
    """What only some tasks have, written into the record of a curation by hand."""
    made(tmp_path, planted(random.Random(7)), balance="oversample")

    def fill(record: dict[str, Any]) -> None:
        record["golden"] = {"digest": "0" * 64, "items": 40, "strata": {"billing": 10, "support": 30}}
        record["classes"]["golden"] = {"billing": 10, "support": 30}
        record["label_drift"] = 0.25
        record["suspects"] = {
            "policy": "report", "checked": 121, "count": 40, "note": None,
            "top": [
                {"id": f"s{n}", "line": n, "given": "billing", "suggested": "support", "p_given": 0.02,
                 "p_suggested": 0.97, "text": f"ask {EMAIL}"}
                for n in range(30)
            ],
        }  # fmt: skip
        record["poisoning"] = {
            "policy": "report",
            "triggers": [{"phrase": "cf mn bb", "label": "billing", "rows": 20, "of_label": 20, "expected": 10.0,
                          "p_value": 1e-6, "ids": ["a"]}],
            "sources": [{"source": "web", "rows": 12, "what": "nine of ten labels are billing"}],
        }  # fmt: skip
        record["semantic"] = {"threshold": 0.95, "pairs": 3}
        record["synthetic"] = {"rows": 12, "share": 0.1}
        record["accepted_risks"] = {"few_rows": {"found": "few", "reason": "a toy"}}

    broken(tmp_path, fill)
    contamination = ContaminationReport(
        golden_digest="0" * 64, golden_items=40, rows=123, near_duplicate=0.8, ngram_words=13, measures=(), found={}
    )
    (tmp_path / "split" / CONTAMINATION_FILE).write_text(contamination.model_dump_json())
    changes = Changes(
        100, 133, 90, 1, 2, 40, 7, (Move("dev", "train", 3),), {"train": (80, 100), "dev": (20, 21), "x": (0, 10)}
    )
    about = about_data(spec_over(tmp_path / "rows.jsonl"), 144, tokens=True, golden=True)
    full = gather(about, tmp_path / "judged", tmp_path / "split", changes=changes, since="1 May 2026, 10:00 UTC")
    text = Page(render(full)).text
    for part in (
        "Against the last other data of this task, of 1 May 2026, 10:00 UTC: 100 valid rows then, 133 today",
        "+40", "−7", "Distance of the two mixes: 0.25 of 1 (total variation), limit 0.2", "cf mn bb",
        "nine of ten labels are billing", "ask [EMAIL]", "40 rows: labelled as on the left", "12 more",
        "A model wrote 12 of the", "searched for the 40 golden items once more: none is there",
        "3 pairs of texts say the same in other words (cosine similarity from 0.95)",
        "Guard", "a toy", "Rows of small classes are repeated",
    ):  # fmt: skip
        assert part in text, part
    assert full.record()["since_last"] == "+40 −7, 2 relabelled, 1 rewritten"
    assert full.record()["changes"]["moved"] == [{"before": "dev", "now": "train", "rows": 3}]
    assert report.record()["since_last"] is None


def test_many_classes_are_cut_on_the_page_and_not_in_the_record(report: DataReport) -> None:
    classes = tuple(ClassRow(f"class {n}", 90 - n, None, 80 - n, 1, None) for n in range(77))
    many = replace(report, classes=classes)
    text = Page(render(many)).text
    assert "The 60 largest; all 77 are in data.json" in text
    assert ("class 59 " in text, "class 60 " in text) == (True, False)
    assert f"All 77 {sum(one.valid or 0 for one in classes):,}" in text  # the sums are over all
    assert len(many.record()["classes"]) == 77


def test_kinds_of_private_data_have_one_name() -> None:
    for kind in _KINDS.values():
        assert _one("2", kind.several) == kind.one
        assert _one("1", kind.one) == kind.one


def test_codes_in_words() -> None:
    assert say_code("golden_item") == "In the golden set"
    assert say_code("text is null") == "Text is null"
    assert say_code("label_unknown") == "Label unknown"


def test_an_address_shows_no_password() -> None:
    about = About("toy", "https://ann:s3cr3tw0rd@data.example/rows.jsonl", "chat", 1, 0.02, 0.2)
    assert "s3cr3tw0rd" not in Veil().cover(about.source)


# -- the task -----------------------------------------------------------------------------------------------------


def test_the_task_compares_with_the_last_other_data(make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("tasks.data.steps.say_done", lambda step, summary, *, reused: said.append(f"{step}: {summary}"))
    quiet = {"curate": {"accept_risks": RISKS, "suspects": "off", "poisoning": "off"}}

    def run(records: Sequence[Any], **parts: Any) -> str:
        spec = make_spec(records, items=20, **quiet, **parts)
        if not Path(spec.golden.path).exists():
            freeze(spec)
        golden = open_golden_set.fn(spec.evaluation())
        raw = ingest_dataset.fn(spec)
        valid = validate_dataset.fn(raw, None, spec)
        splits = curate_dataset.fn(valid, golden, spec)
        return report_data.fn(raw, valid, splits, spec)

    good = rows(160)
    first = run(good)
    assert Path(first).is_file()
    assert said[-1] == "data report: 160 read → 126 train, 14 dev; no earlier data"
    assert run(good) == first

    other = {**good[0], "label": "support"}
    fresh = [{**row, "id": f"n{row['id']}"} for row in rows(10, seed=9)]
    second = run([other, *good[5:], *fresh])
    record = read_record(Path(second).parent)
    assert (record["changes"]["new"], record["changes"]["gone"], record["changes"]["relabelled"]) == (10, 4, 1)
    assert said[-1].endswith("; new since last data: +10 −4, 1 relabelled")
    text = report_markdown(record, second)
    assert "| Read |  | 166 |" in text
    assert "| In the golden set | −" in text
    assert "New since the last data of this task: +10 −4, 1 relabelled." in text
    assert second in text

    back = read_record(Path(run(good)).parent)
    assert (back["changes"]["new"], back["changes"]["gone"], back["changes"]["relabelled"]) == (4, 10, 1)
