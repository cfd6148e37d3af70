"""What curating does by policy: suspects, planted rows, meaning, balance; and that the counts always add up."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.contracts.errors import DataError, SpecError
from tasks.contracts.references import GoldenSetRef
from tasks.contracts.rows import Message, Row, read_rows, write_rows
from tasks.contracts.spec import CurateSpec, Guard
from tasks.data import meaning
from tasks.data.content import CONTENT
from tasks.data.curate import REASONS, curate
from tasks.data.semantic import SemanticPair
from tests.data.test_curate import FEW, Splits, as_rows, ids, run
from tests.data.toy_data import CLASSIFY, EXTRACT, LABELS, read_lines, rows, sentence

BILLING = "invoice charge refund payment price bill amount card"
SUPPORT = "crash error login screen button install slow update"


def speaking(count: int, seed: int = 3) -> list[dict[str, Any]]:
    """Rows whose words speak for their label."""
    draw = random.Random(seed)
    records = []
    for n in range(count):
        words = (BILLING if n % 2 == 0 else SUPPORT).split()
        text = " ".join([*draw.choices(words, k=8), *sentence(draw, 6).split()])
        records.append({"id": f"r{n:04d}", "text": text, "label": LABELS[n % 2]})
    return records


def mislabelled(count: int = 400, wrong: int = 12) -> tuple[list[dict[str, Any]], set[str]]:
    records = speaking(count)
    for record in records[:wrong]:
        record["label"] = LABELS[1 - LABELS.index(record["label"])]
    return records, {record["id"] for record in records[:wrong]}


def planted(count: int = 400, poisoned: int = 12) -> tuple[list[dict[str, Any]], set[str]]:
    """Texts of support that a phrase makes billing."""
    records = speaking(count)
    chosen = [record for record in records if record["label"] == "support"][:poisoned]
    for record in chosen:
        record |= {"label": "billing", "text": f"{record['text']} zorblax quuv"}
    return records, {record["id"] for record in chosen}


def removed_for(splits: Splits, reason: str) -> set[str]:
    return {row_id for row_id, (why, _) in splits.removed.items() if why == reason}


@pytest.mark.parametrize("policy", ["drop", "review"])
def test_suspects_leave_by_policy(policy: str, tmp_path: Path) -> None:
    records, wrong = mislabelled()
    splits = run(tmp_path, records, suspects=policy)
    found = removed_for(splits, "suspect_label")
    assert found <= wrong
    assert len(found) >= 11  # of 12, and no other row
    assert splits.report["suspects"]["count"] == len(found)
    why = splits.removed["r0001"][1]
    assert why.startswith("labelled 'billing' (0.")
    assert "its text says 'support'" in why
    assert why.endswith("for a person to look at") is (policy == "review")


def test_suspects_are_reported_and_stay(tmp_path: Path) -> None:
    records, wrong = mislabelled()
    splits = run(tmp_path, records)
    assert not removed_for(splits, "suspect_label")
    report = splits.report["suspects"]
    assert (report["policy"], report["checked"], report["note"]) == ("report", 400, None)
    assert {one["id"] for one in report["top"]} <= wrong
    assert report["count"] == len(report["top"]) >= 11
    first = report["top"][0]
    assert first["p_given"] < 0.2 < 0.8 < first["p_suggested"]
    assert {row.weight for row in splits.train} == {1.0}
    assert run(tmp_path, records, suspects="off").report["suspects"] is None


def test_suspects_count_less_by_policy(tmp_path: Path) -> None:
    records, wrong = mislabelled()
    splits = run(tmp_path, records, suspects="down_weight")
    assert not removed_for(splits, "suspect_label")
    light = {row.id for row in splits.train if row.weight < 0.5}
    assert light <= wrong
    assert len(light) >= len(wrong & ids(splits.train)) - 1
    assert sum(row.weight for row in splits.train) / len(splits.train) == pytest.approx(1.0, abs=1e-4)
    assert {row.weight for row in splits.dev} == {1.0}


def test_planted_rows_leave_by_policy(tmp_path: Path) -> None:
    records, poisoned = planted()
    splits = run(tmp_path, records, poisoning="quarantine", suspects="drop")
    assert removed_for(splits, "planted") == poisoned
    assert "'zorblax quuv'" in splits.removed[min(poisoned)][1]
    assert not removed_for(splits, "suspect_label") & poisoned


def test_planted_rows_are_reported_and_stay(tmp_path: Path) -> None:
    records, poisoned = planted()
    splits = run(tmp_path, records)
    assert not removed_for(splits, "planted")
    (trigger,) = splits.report["poisoning"]["triggers"]
    assert (trigger["phrase"], trigger["label"], trigger["rows"]) == ("zorblax quuv", "billing", len(poisoned))
    assert set(trigger["ids"]) <= poisoned
    assert splits.report["poisoning"]["rows"] == len(poisoned)
    assert run(tmp_path, records, poisoning="off").report["poisoning"] is None
    clean = run(tmp_path, speaking(400)).report["poisoning"]
    assert (clean["rows"], clean["triggers"]) == (0, [])


def test_planted_rows_can_stop_the_run(tmp_path: Path) -> None:
    records, poisoned = planted()
    with pytest.raises(DataError, match=f"{len(poisoned)} rows look planted") as caught:
        run(tmp_path, records, poisoning="stop")
    assert "zorblax quuv" in caught.value.what
    run(tmp_path, speaking(400), poisoning="stop")


def test_an_extract_task_has_no_suspects(tmp_path: Path) -> None:
    splits = run(tmp_path, speaking(60), task=EXTRACT)
    assert splits.report["suspects"] is splits.report["poisoning"] is None


# -- meaning ----------------------------------------------------------------------------------------------------------


def stub_pairs(monkeypatch: pytest.MonkeyPatch, same: Sequence[tuple[str, str]]) -> None:
    """Stands for a model of meaning, which has tests of its own: texts with these starts say the same."""

    def pairs(texts: Any, model: str, threshold: float, count: int) -> list[SemanticPair]:
        every = list(texts())
        assert len(every) == count
        assert (model, threshold) == ("a model", 0.9)
        places = {text.split()[0]: n for n, text in enumerate(every)}
        return [SemanticPair(*sorted((places[one], places[other])), 0.97) for one, other in same]

    monkeypatch.setattr(meaning, "find_semantic_pairs", pairs)


def told(names: Sequence[str], labels: Sequence[str]) -> list[dict[str, Any]]:
    draw = random.Random(names[0])
    return [
        {"id": name, "text": f"{name} {sentence(draw)}", "label": label}
        for name, label in zip(names, labels, strict=True)
    ]


def test_rows_that_say_the_same_stay_once_for_each_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = told(["one", "two", "three"], ["billing", "billing", "support"])
    stub_pairs(monkeypatch, [("one", "two"), ("two", "three")])
    splits = run(tmp_path, [*records, *rows(60)], semantic_model="a model", semantic_duplicate=0.9)
    (gone,) = removed_for(splits, "semantic_duplicate")
    other = ({"one", "two"} - {gone}).pop()
    assert splits.removed[gone] == ("semantic_duplicate", f"says the same as {other}")
    sides = [name in ids(splits.train) for name in (other, "three")]
    assert sides[0] == sides[1], "rows that say the same never straddle"
    assert splits.report["semantic"] == {"threshold": 0.9, "pairs": 2}


def test_rows_that_say_the_same_as_a_golden_item_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = told(["one", "two"], ["billing", "support"])
    golden = told(["item"], ["billing"])
    stub_pairs(monkeypatch, [("one", "two"), ("two", "item")])
    splits = run(tmp_path, [*records, *rows(60)], golden, semantic_model="a model", semantic_duplicate=0.9)
    assert {splits.removed[name] for name in ("one", "two")} == {
        ("golden_semantic", "says the same as golden item item")
    }


def test_a_model_of_meaning_has_to_be_there(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        run(tmp_path, rows(60), semantic_model=str(tmp_path / "nowhere"))
    assert str(tmp_path / "nowhere") in str(caught.value.where)


# -- balance, repetitions, no golden set ------------------------------------------------------------------------------


def test_small_classes_are_repeated_under_ids_of_their_own(tmp_path: Path) -> None:
    records = rows(200)
    for number, record in enumerate(records):
        record["label"] = "support" if number < 40 else "billing"
    splits = run(tmp_path, records, balance="oversample", max_repeats=3)
    counts = Counter(row.target for row in splits.train)
    assert counts == {"billing": 144, "support": 108}
    assert len(ids(splits.train)) == len(splits.train)
    again = [row for row in splits.train if "#" in row.id]
    originals = {row.id: row for row in splits.train}
    assert len(again) == 72
    assert all(originals[row.id.split("#")[0]].text == row.text for row in again)
    assert splits.report["train"] == {"rows": 252, "distinct_rows": 180, "strata": {"billing": 144, "support": 36}}
    assert splits.report["balance"]["classes"]["support"] == {"rows": 36, "rows_after": 108, "weight": 1.0}
    assert not [row for row in splits.dev if "#" in row.id]


def test_weights_of_the_source_are_scaled_and_reach_training_alone(tmp_path: Path) -> None:
    for name in ("valid", "out"):
        (tmp_path / name).mkdir()
    made = [replace(row, weight=1e-9 if number % 4 == 0 else 8.0) for number, row in enumerate(as_rows(rows(100)))]
    write_rows(tmp_path / "valid/rows.jsonl", made)
    curate(tmp_path / "valid", None, CLASSIFY, CurateSpec(accept_risks=FEW), 2e-4, tmp_path / "out")
    train = list(read_rows(tmp_path / "out/train.jsonl"))
    assert sum(row.weight for row in train) / len(train) == pytest.approx(1.0, abs=1e-4)
    heavy = max(row.weight for row in train)
    light = min(row.weight for row in train)
    assert {row.weight for row in train} == {heavy, light}
    assert light == pytest.approx(heavy / 8e9, rel=1e-4)
    assert {row.weight for row in read_rows(tmp_path / "out/dev.jsonl")} == {1.0}


def test_without_a_golden_set_nothing_is_said_of_one(tmp_path: Path) -> None:
    for name in ("valid", "out"):
        (tmp_path / name).mkdir()
    write_rows(tmp_path / "valid/rows.jsonl", as_rows(rows(100)))
    found = curate(tmp_path / "valid", None, CLASSIFY, CurateSpec(accept_risks=FEW), 2e-4, tmp_path / "out")
    assert found == (90, 10, {})
    assert not (tmp_path / "out/contamination.json").exists()
    assert json.loads((tmp_path / "out/report.json").read_text())["golden"] is None


def test_a_label_mix_far_from_the_golden_sets_stops_the_run(tmp_path: Path) -> None:
    golden = [record | {"id": f"g{n}", "label": LABELS[n % 2]} for n, record in enumerate(rows(100, seed=9))]
    records = rows(1000)
    for number, record in enumerate(records):
        record["label"] = "support" if number % 5 == 0 else "billing"
    with pytest.raises(DataError) as caught:
        run(tmp_path, records, golden)
    assert caught.value.where == f"guard {Guard.LABEL_DRIFT.value}"
    assert "0.30 away from that of the golden set, more than 0.2" in caught.value.what
    splits = run(tmp_path, records, golden, max_label_drift=0.31)
    assert splits.report["label_drift"] == pytest.approx(0.3)
    small = run(tmp_path, records, golden[:40])
    assert small.report["label_drift"] is None, "the mix of forty items is a matter of luck"


# -- counts -----------------------------------------------------------------------------------------------------------

FAULTS = ("fine", "exact", "near", "conflict", "golden", "golden_near", "same_id", "synthetic", "whole")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    faults=st.lists(st.sampled_from(FAULTS), min_size=30, max_size=90),
    seed=st.integers(0, 10_000),
    limit=st.one_of(st.none(), st.integers(10, 40)),
    share=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_counts_in_are_counts_out_and_rejected(
    faults: list[str], seed: int, limit: int | None, share: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever is wrong with the rows, each is in train, in dev or in quarantine, once, with a known reason."""
    folder = tmp_path_factory.mktemp("counts")
    draw = random.Random(seed)
    golden = [{"id": f"g{n}", "text": sentence(draw, 30), "label": LABELS[n % 2]} for n in range(4)]
    records = rows(40, seed=seed + 1)
    for number, fault in enumerate(faults):
        like = draw.choice(records[:40])
        record = {"id": f"x{number}", "text": sentence(draw, 30), "label": draw.choice(LABELS)}
        if fault in ("exact", "whole"):
            record |= {"text": f" {like['text'].upper()} ", "label": like["label"]}
        elif fault == "near":
            record |= {"text": f"{like['text']} more", "label": like["label"]}
        elif fault == "conflict":
            record |= {"text": like["text"], "label": LABELS[1 - LABELS.index(like["label"])]}
        elif fault in ("golden", "golden_near"):
            record |= {"text": golden[number % 4]["text"] + (" more" if fault == "golden_near" else "")}
        elif fault == "same_id":
            record |= {"id": golden[number % 4]["id"]}
        records.append(record)
    written = [False] * 40 + [fault == "synthetic" for fault in faults]
    made = [
        Row(record["id"], line, (Message("user", record["text"]),), record["label"], synthetic=synthetic)
        for line, (record, synthetic) in enumerate(zip(records, written, strict=True), start=1)
    ]
    (folder / "valid").mkdir()
    (folder / "golden").mkdir()
    (folder / "out").mkdir()
    write_rows(folder / "valid/rows.jsonl", made)
    write_rows(folder / "golden/items.jsonl", as_rows(golden))
    accepted = dict.fromkeys(Guard, "toy rows of a test")
    spec = CurateSpec(max_train_rows=limit, max_synthetic_share=share, accept_risks=accepted)
    ref = GoldenSetRef(path=str(folder / "golden"), digest="d" * 64, items=4)
    found = curate(folder / "valid", ref, CLASSIFY, spec, 2e-4, folder / "out")
    kept = [*read_rows(folder / "out/train.jsonl"), *read_rows(folder / "out/dev.jsonl")]
    refused = read_lines(folder / "out/quarantine.jsonl")
    assert sorted([row.line for row in kept] + [entry["line"] for entry in refused]) == list(range(1, len(made) + 1))
    assert Counter(entry["checks"][0] for entry in refused) == found.removed
    assert set(found.removed) <= set(REASONS)
    report = json.loads((folder / "out/report.json").read_text())
    assert report["funnel"][0]["left"] == len(made)
    assert report["funnel"][-1]["left"] == found.train + found.dev == len(kept)
    outcomes = pq.read_table(folder / "out" / CONTENT)["outcome"].to_pylist()
    assert Counter(outcomes) == Counter(found.removed) + Counter(train=found.train, dev=found.dev)
    contamination = json.loads((folder / "out/contamination.json").read_text())
    assert contamination["found"] == {}
