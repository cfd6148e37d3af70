"""Freezing a golden set once, and opening it only if nothing about it has changed."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks.contracts.errors import DataError, GoldenSetError, SpecError, StoreError
from tasks.contracts.rows import Message, Row, read_rows
from tasks.contracts.spec import MetricGuard, Policy, RetrainSpec, SuiteSpec
from tasks.data import golden as module
from tasks.data.golden import choose, freeze, open_golden, open_suite
from tasks.data.similar import NearDuplicates, profile_texts
from tasks.store import digest_file
from tests.data.toy_data import CHAT, CLASSIFY, EXTRACT, LABELS, read_lines, rows, sentence

MakeSpec = Callable[..., RetrainSpec]


def as_rows(records: list[dict[str, Any]]) -> list[Row]:
    return [
        Row(r["id"], n, (Message("user", r["text"]),), r["label"], r.get("group"))
        for n, r in enumerate(records, start=1)
    ]


@pytest.fixture
def frozen(make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch) -> RetrainSpec:
    """A spec whose golden set of 40 items is frozen; the suites have tests of their own."""
    skip_suites(monkeypatch)
    spec = make_spec(rows(200))
    freeze(spec)
    return spec


def skip_suites(monkeypatch: pytest.MonkeyPatch) -> None:
    def pass_on(raw: Path, task: Any, data: Any, valid: Path, keep: Any) -> None:
        (valid / "rows.jsonl").write_bytes((raw / "rows.jsonl").read_bytes())

    monkeypatch.setattr(module, "validate", pass_on)
    monkeypatch.setattr(module, "_check_suite", lambda items, spec: None)


def test_a_golden_set_is_frozen_and_opened(make_spec: MakeSpec) -> None:
    bad = [{"id": "bad", "text": "t", "label": "sales"}]
    spec = make_spec(rows(200) + bad)
    ref = freeze(spec)
    assert open_golden(spec) == ref
    folder = Path(ref.path)
    items = list(read_rows(folder / "items.jsonl"))
    assert (len(items), ref.items, ref.digest) == (40, 40, digest_file(folder / "items.jsonl"))
    assert Counter(item.target for item in items) == {"billing": 20, "support": 20}
    assert [item.line for item in items] == list(range(1, 41))
    manifest = json.loads((folder / "golden.json").read_text())
    assert manifest["digest"] == ref.digest
    assert manifest["items"] == 40
    assert manifest["strata"] == {"billing": 20, "support": 20}
    assert manifest["source_digest"] == digest_file(Path(spec.data.source))
    assert str(folder.parent) not in (folder / "golden.json").read_text()
    assert sorted(path.name for path in folder.iterdir()) == ["golden.json", "items.jsonl"]


def test_freezing_twice_refuses(frozen: RetrainSpec) -> None:
    before = (Path(frozen.golden.path) / "items.jsonl").read_bytes()
    with pytest.raises(GoldenSetError) as caught:
        freeze(frozen)
    assert caught.value.what.startswith("The golden set is frozen already")
    assert caught.value.where == f"{frozen.golden.path}/golden.json"
    assert (Path(frozen.golden.path) / "items.jsonl").read_bytes() == before


def test_a_freeze_that_was_cut_off_is_not_frozen(make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_suites(monkeypatch)
    spec = make_spec(rows(200))
    folder = Path(spec.golden.path)
    folder.mkdir()
    (folder / "items.jsonl").write_text("half")
    with pytest.raises(GoldenSetError, match="not frozen yet"):
        open_golden(spec)
    assert freeze(spec).digest == digest_file(folder / "items.jsonl")


def test_a_set_that_is_not_frozen_says_how_to(make_spec: MakeSpec) -> None:
    spec = make_spec(rows(20))
    with pytest.raises(GoldenSetError) as caught:
        open_golden(spec)
    assert caught.value.what == "The golden set is not frozen yet."
    assert "goldgate golden freeze CONFIG.yaml" in caught.value.fix


@pytest.mark.parametrize("change", ["flip", "append", "delete"])
def test_a_changed_byte_refuses(change: str, frozen: RetrainSpec) -> None:
    path = Path(frozen.golden.path) / "items.jsonl"
    data = path.read_bytes()
    expected = digest_file(path)
    changed = {"flip": data.replace(b"w", b"v", 1), "append": data + b"\n", "delete": data[:-1]}[change]
    path.write_bytes(changed)
    with pytest.raises(GoldenSetError) as caught:
        open_golden(frozen)
    assert caught.value.what == f"The golden set was changed: expected sha256 {expected}, found {digest_file(path)}."
    assert caught.value.where == str(path)
    assert "bring the file back" in caught.value.fix


def test_a_digest_of_the_spec_has_to_match(frozen: RetrainSpec) -> None:
    digest = open_golden(frozen).digest

    def with_digest(wanted: str) -> RetrainSpec:
        return frozen.model_copy(update={"golden": frozen.golden.model_copy(update={"digest": wanted})})

    assert open_golden(with_digest(digest)).digest == digest
    with pytest.raises(GoldenSetError, match=f"expected sha256 {'0' * 64}, found {digest}"):
        open_golden(with_digest("0" * 64))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "Expecting property name"),
        ("[]", "it lacks digest, items, name or task"),
        ('{"digest": "x"}', "it lacks digest, items, name or task"),
        ('{"digest": "x", "items": 1, "name": "n", "task": {"kind": "poem"}}', r"task\.kind: Input should be"),
    ],
)
def test_a_broken_manifest(content: str, why: str, frozen: RetrainSpec) -> None:
    (Path(frozen.golden.path) / "golden.json").write_text(content)
    with pytest.raises(GoldenSetError, match=f"manifest of the golden set cannot be read: {why}") as caught:
        open_golden(frozen)
    assert "\n" not in caught.value.what


# -- suites -------------------------------------------------------------------------------------------------------


@pytest.fixture
def suite(make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SuiteSpec:
    """A frozen set of 20 items of another task than the run's."""
    skip_suites(monkeypatch)
    records = [record | {"label": {"amount": n}} for n, record in enumerate(rows(60))]
    freeze(make_spec(records, EXTRACT, items=20, golden={"path": str(tmp_path / "prices")}))
    return SuiteSpec(name="arithmetic", path=str(tmp_path / "prices"))


def guarded(spec: RetrainSpec, suite: SuiteSpec, metric: str = "exact_match") -> RetrainSpec:
    guard = MetricGuard(metric=metric, suite=suite.name, margin=0.05)
    return spec.model_copy(update={"suites": (suite,), "policy": Policy(guards=(guard,))})


def test_a_suite_brings_its_own_task(suite: SuiteSpec, make_spec: MakeSpec) -> None:
    spec = guarded(make_spec(rows(60)), suite)
    assert spec.task == CLASSIFY
    opened = open_suite(suite, spec)
    assert (opened.name, opened.task) == ("arithmetic", EXTRACT)
    assert opened.frozen.path == suite.path
    assert (opened.frozen.items, opened.frozen.digest) == (20, digest_file(Path(suite.path) / "items.jsonl"))


def test_a_suite_is_checked_byte_by_byte(suite: SuiteSpec, make_spec: MakeSpec) -> None:
    spec = guarded(make_spec(rows(60)), suite)
    items = Path(suite.path) / "items.jsonl"
    digest = digest_file(items)
    assert open_suite(suite.model_copy(update={"digest": digest}), spec).frozen.digest == digest
    with pytest.raises(GoldenSetError, match=f"expected sha256 {'0' * 64}, found {digest}"):
        open_suite(suite.model_copy(update={"digest": "0" * 64}), spec)
    items.write_bytes(items.read_bytes().replace(b"w", b"v", 1))
    with pytest.raises(GoldenSetError, match=f"The golden set was changed: expected sha256 {digest}") as caught:
        open_suite(suite, spec)
    assert caught.value.where == str(items)


def test_a_suite_that_is_not_frozen_is_refused(make_spec: MakeSpec, tmp_path: Path) -> None:
    missing = SuiteSpec(name="general", path=str(tmp_path / "nowhere"))
    with pytest.raises(GoldenSetError, match="not frozen yet") as caught:
        open_suite(missing, guarded(make_spec(rows(60)), missing))
    assert caught.value.where == str(tmp_path / "nowhere")


def test_a_guard_asks_a_suite_for_what_its_task_has(suite: SuiteSpec, make_spec: MakeSpec) -> None:
    spec = make_spec(rows(60))
    assert open_suite(suite, guarded(spec, suite, "field:amount")).name == "arithmetic"
    with pytest.raises(SpecError) as caught:
        open_suite(suite, guarded(spec, suite, "macro_f1"))
    assert caught.value.what == (
        "policy.guards asks the suite arithmetic for macro_f1, and its task has exact_match, valid_output, "
        "field:amount, field_match."
    )
    other = guarded(spec, suite.model_copy(update={"name": "other"}), "macro_f1")  # is about another suite
    assert open_suite(suite, other).name == "arithmetic"


def test_missing_items(frozen: RetrainSpec) -> None:
    (Path(frozen.golden.path) / "items.jsonl").unlink()
    with pytest.raises(GoldenSetError, match="items of the golden set cannot be read: No such file"):
        open_golden(frozen)


@pytest.mark.parametrize(
    ("task", "what"),
    [
        (
            CLASSIFY.model_copy(update={"labels": (*LABELS, "sales")}),
            "The label 'sales' of the task is unknown to the golden set: no item has it.",
        ),
        (
            CLASSIFY.model_copy(update={"labels": ("billing", "sales")}),
            "The label 'sales' of the task is unknown to the golden set: no item has it.",
        ),
        (
            CLASSIFY.model_copy(update={"labels": ("billing",)}),
            "The golden set has the label 'support', which the task does not have.",
        ),
        (EXTRACT, "The golden set was frozen for a task of kind classify, this one is extract."),
        (CHAT, "The golden set was frozen for a task of kind classify, this one is chat."),
    ],
)
def test_a_task_that_does_not_fit(task: Any, what: str, frozen: RetrainSpec) -> None:
    with pytest.raises(GoldenSetError) as caught:
        open_golden(frozen.model_copy(update={"task": task}))
    assert caught.value.what == what


def test_the_instruction_and_the_order_of_labels_may_change(frozen: RetrainSpec) -> None:
    task = CLASSIFY.model_copy(update={"instruction": "Who?", "labels": LABELS[::-1]})
    assert open_golden(frozen.model_copy(update={"task": task})).items == 40


def test_a_schema_that_items_no_longer_fit(make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_suites(monkeypatch)
    records = [record | {"label": {"amount": n}} for n, record in enumerate(rows(60))]
    spec = make_spec(records, EXTRACT, items=20)
    freeze(spec)
    assert open_golden(spec).items == 20
    task = EXTRACT.model_copy(update={"json_schema": {"type": "object", "required": ["currency"]}})
    with pytest.raises(GoldenSetError, match="'currency' is a required property") as caught:
        open_golden(spec.model_copy(update={"task": task}))
    assert caught.value.where is not None
    assert "items.jsonl:1 " in caught.value.where


def test_the_order_of_rows_does_not_matter(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    skip_suites(monkeypatch)
    records = rows(150)
    spec = make_spec(records)
    first = freeze(spec)
    again = make_spec(random.Random(4).sample(records, 150), golden={"path": str(tmp_path / "again")})
    assert freeze(again).digest == first.digest


def test_small_classes_get_their_items(make_spec: MakeSpec) -> None:
    records = rows(300)
    for record in records:
        record["label"] = "billing"
    for record in records[:24]:
        record["label"] = "support"
    chosen = choose(as_rows(records), make_spec(records, items=60))
    assert Counter(row.target for row in chosen) == {"billing": 50, "support": 10}


def test_no_two_items_are_near_duplicates_or_contradict_each_other(make_spec: MakeSpec) -> None:
    records = rows(60)
    records += [record | {"id": f"near-{record['id']}", "text": record["text"] + " more"} for record in records[:20]]
    contradicted = [
        record | {"id": f"not-{record['id']}", "label": LABELS[n % 2 - 1]} for n, record in enumerate(rows(60))
    ][20:30]
    chosen = choose(as_rows(records + contradicted), make_spec(records, items=50))
    assert len(chosen) == 50
    assert list(NearDuplicates(list(profile_texts(row.text for row in chosen)), 0.8).pairs()) == []
    gone = {record["text"] for record in contradicted}
    assert not gone & {row.text for row in chosen}
    with pytest.raises(GoldenSetError) as caught:
        choose(as_rows(records + contradicted), make_spec(records, items=90))
    assert caught.value.what == (
        "90 golden items are wanted, but only 50 can be had: 90 valid rows, 50 without duplicates and contradictions, "
        "in 50 groups that stay whole."
    )
    assert caught.value.fix == "set `golden.items` to 50 or less, or add data"


def test_groups_stay_whole(make_spec: MakeSpec) -> None:
    records = [record | {"group": f"g{n // 3}"} for n, record in enumerate(rows(150))]
    chosen = choose(as_rows(records), make_spec(records, items=40))
    sizes = Counter(row.group for row in chosen)
    assert set(sizes.values()) == {3}
    assert 36 <= len(chosen) <= 40


def test_the_chosen_items_have_to_meet_the_golden_suite(make_spec: MakeSpec) -> None:
    records = [record | {"label": "billing"} for record in rows(30)]
    with pytest.raises(GoldenSetError) as caught:
        freeze(make_spec(records, items=20))
    assert caught.value.what == "The chosen items are not fit for a golden set: no item has the label 'support'."
    assert not Path(make_spec(records).golden.path).exists()


def test_bad_rows_stop_a_freeze_and_stay_to_be_read(make_spec: MakeSpec, tmp_path: Path) -> None:
    records = [*rows(10), {"id": "bad", "text": None, "label": "billing"}]
    with pytest.raises(DataError, match="1 of 11 rows are invalid"):
        freeze(make_spec(records, items=4))
    (quarantine,) = (tmp_path / "store/scratch").glob("freeze-*/quarantine.jsonl")
    assert [entry["id"] for entry in read_lines(quarantine)] == ["bad"]


def test_a_folder_that_cannot_be_written(make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    skip_suites(monkeypatch)
    (tmp_path / "file").touch()
    spec = make_spec(rows(60), items=20, golden={"path": str(tmp_path / "file" / "golden")})
    with pytest.raises(StoreError, match="The golden set cannot be written"):
        freeze(spec)


def test_texts_alike_with_different_answers_give_one_item(make_spec: MakeSpec) -> None:
    text = sentence(random.Random(11), 40)
    records = rows(20) + [{"id": f"x{n}", "text": f"{text} v{n}", "label": str(n)} for n in range(5)]
    chosen = choose(as_rows(records), make_spec(rows(20), EXTRACT, items=21))
    assert sum(row.text.startswith(text) for row in chosen) == 1
