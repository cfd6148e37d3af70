"""Freezing a golden set once, and opening it only if nothing about it has changed."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from goldgate.config import load_spec
from tasks.contracts.errors import DataError, GoldenSetError, SpecError, StoreError
from tasks.contracts.references import GoldenSetRef
from tasks.contracts.rows import Message, Row, read_rows, write_rows
from tasks.contracts.spec import MetricGuard, Policy, RetrainSpec, SuiteSpec
from tasks.data import golden as module
from tasks.data.duplicates import find_duplicate_rows
from tasks.data.golden import Draft, Planner, choose, draft_golden, freeze, open_golden, open_suite
from tasks.store import digest_file
from tests.data.toy_data import CHAT, CLASSIFY, EXTRACT, LABELS, read_lines, rows, sentence

MakeSpec = Callable[..., RetrainSpec]


def as_rows(records: list[dict[str, Any]]) -> list[Row]:
    return [
        Row(r["id"], n, (Message("user", r["text"]),), r["label"], r.get("group"))
        for n, r in enumerate(records, start=1)
    ]


def chosen_from(records: list[dict[str, Any]], spec: RetrainSpec) -> list[Row]:
    """The items that are chosen from rows, in a folder of the test's own."""
    folder = Path(spec.data.source).parent
    write_rows(folder / "valid.jsonl", as_rows(records))
    return choose(folder / "valid.jsonl", spec, folder).items


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


def test_who_freezes_while_another_does_does_not_replace_what_that_one_froze(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_suites(monkeypatch)
    ours, theirs = make_spec(rows(200)), make_spec(rows(200), items=20)
    assert ours.golden.path == theirs.golden.path
    frozen: list[GoldenSetRef] = []
    with pytest.raises(GoldenSetError, match="frozen already") as caught:
        freeze(ours, show=lambda _: frozen.append(freeze(theirs)))
    assert caught.value.where == f"{ours.golden.path}/golden.json"
    assert [ref.items for ref in frozen] == [20]
    assert open_golden(theirs) == frozen[0]
    assert sorted(path.name for path in Path(ours.golden.path).iterdir()) == ["golden.json", "items.jsonl"]


def test_two_who_have_looked_write_one_after_the_other(make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_suites(monkeypatch)
    specs = [make_spec(rows(200), items=items) for items in (20, 40)]
    write, both, inside, most = module.write_rows, threading.Barrier(2), [], []

    def write_slowly(path: Path, items: Any) -> None:
        if path.name != "items.jsonl" or path.parent != Path(specs[0].golden.path):
            write(path, items)
            return
        inside.append(path)
        most.append(len(inside))
        time.sleep(0.3)
        write(path, items)
        inside.pop()

    def try_to_freeze(spec: RetrainSpec) -> int | str:
        try:
            return freeze(spec, show=lambda _: both.wait(60) and None).items
        except GoldenSetError as refusal:
            return refusal.what

    monkeypatch.setattr(module, "write_rows", write_slowly)
    with ThreadPoolExecutor(2) as pool:
        ended = list(pool.map(try_to_freeze, specs))
    (refused,) = [end for end in ended if isinstance(end, str)]
    (items,) = [end for end in ended if isinstance(end, int)]
    assert refused.startswith("The golden set is frozen already")
    assert most == [1]
    assert open_golden(specs[0]).items == items


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
    chosen = chosen_from(records, make_spec(records, items=60))
    assert Counter(row.target for row in chosen) == {"billing": 50, "support": 10}


def test_no_two_items_are_near_duplicates_or_contradict_each_other(make_spec: MakeSpec) -> None:
    records = rows(60)
    records += [record | {"id": f"near-{record['id']}", "text": record["text"] + " more"} for record in records[:20]]
    contradicted = [
        record | {"id": f"not-{record['id']}", "label": LABELS[n % 2 - 1]} for n, record in enumerate(rows(60))
    ][20:30]
    chosen = chosen_from(records + contradicted, make_spec(records, items=50))
    assert len(chosen) == 50
    assert find_duplicate_rows(chosen, CLASSIFY, 0.8).removed == []
    gone = {record["text"] for record in contradicted}
    assert not gone & {row.text for row in chosen}
    with pytest.raises(GoldenSetError) as caught:
        chosen_from(records + contradicted, make_spec(records, items=90))
    assert caught.value.what == (
        "90 golden items are wanted, but only 50 can be had: 90 valid rows, 50 without duplicates and contradictions, "
        "in 50 groups that stay whole."
    )
    assert caught.value.fix == "set `golden.items` to 50 or less, or add data"


def test_groups_stay_whole(make_spec: MakeSpec) -> None:
    records = [record | {"group": f"g{n // 3}"} for n, record in enumerate(rows(150))]
    chosen = chosen_from(records, make_spec(records, items=40))
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
    chosen = chosen_from(records, make_spec(rows(20), EXTRACT, items=21))
    assert sum(row.text.startswith(text) for row in chosen) == 1


@pytest.mark.parametrize("example", ["complaints", "prices"])
def test_the_frozen_sets_of_the_examples_are_drawn_again(example: str, tmp_path: Path) -> None:
    folder = Path(__file__).parents[2] / "examples" / example
    spec = load_spec(folder / f"{example}.yaml", [f"golden.path={tmp_path / 'again'}"])
    assert freeze(spec).digest == json.loads((folder / "golden" / "golden.json").read_text())["digest"]
    assert open_golden(load_spec(folder / f"{example}.yaml").evaluation()).items == spec.golden.items


def test_nothing_that_a_model_wrote_is_a_golden_item(make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_suites(monkeypatch)
    records = [record | {"synthetic": n % 2 == 0} for n, record in enumerate(rows(120))]
    spec = make_spec(records, items=20)
    draft = draft_golden(spec)
    assert draft.synthetic == 60
    assert {item.id for item in draft.items} <= {record["id"] for record in records if not record["synthetic"]}
    assert (draft.parts[0].available, draft.left) == (60, 40)
    freeze(spec)
    assert json.loads((Path(spec.golden.path) / "golden.json").read_text())["synthetic_left_out"] == 60


def test_items_keep_what_is_known_of_them_and_not_where_they_were_kept(make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = make_spec(rows(60), items=20)
    told = [
        replace(row, label="c", source=f"part{n}", time="2026-01-02T00:00:00Z", weight=2.0)
        for n, row in enumerate(as_rows(rows(60)))
    ]
    write_rows(tmp_path / "valid.jsonl", told)
    items = choose(tmp_path / "valid.jsonl", spec, tmp_path).items
    assert {(item.label, item.source, item.time, item.weight) for item in items} == {
        ("c", None, "2026-01-02T00:00:00Z", 1.0)
    }


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({}, {}),
        ({"provenance": "CFPB, 2024"}, {"provenance": "CFPB, 2024"}),
        ({"provenance": "CFPB", "licence": "CC0-1.0"}, {"provenance": "CFPB", "licence": "CC0-1.0"}),
    ],
)
def test_provenance_and_licence_are_kept_where_they_are_said(
    data: dict[str, str], said: dict[str, str], make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_suites(monkeypatch)
    spec = make_spec(rows(60), items=20, data=data)
    freeze(spec)
    manifest = json.loads((Path(spec.golden.path) / "golden.json").read_text())
    assert {name: manifest[name] for name in ("provenance", "licence") if name in manifest} == said
    assert open_golden(spec.evaluation()).items == 20


def test_a_manifest_says_what_its_parts_show(make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_suites(monkeypatch)
    spec = make_spec(rows(60), items=20)
    shown: list[Draft] = []
    freeze(spec, planner=Planner(lambda name: 10, lambda part: part.items / 1000), show=shown.append)
    manifest = json.loads((Path(spec.golden.path) / "golden.json").read_text())
    assert manifest["parts"] == [
        {"name": None, "available": 60, "wanted": 20, "items": 20, "groups": 20, "effective": 20,
         "smallest_effect": 0.02}
    ]  # fmt: skip
    assert manifest["discordance"] == spec.golden.discordance
    assert [part._asdict() for part in shown[0].parts] == [
        {name: value for name, value in part.items() if name != "smallest_effect"} for part in manifest["parts"]
    ]


def test_slices_that_the_data_name_are_counted(make_spec: MakeSpec) -> None:
    records = [record | {"slice": "phone" if n % 3 else None} for n, record in enumerate(rows(60))]
    spec = make_spec(records, items=20, data={"slice_field": "slice"})
    draft = draft_golden(spec)
    everything, phone = draft.parts
    assert (everything.name, everything.items, everything.available) == (None, 20, 60)
    assert (phone.name, phone.available, phone.wanted) == ("phone", 40, None)
    assert phone.items == sum(item.slice == "phone" for item in draft.items) > 0
