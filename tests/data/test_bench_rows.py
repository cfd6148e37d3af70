"""The rows that the data room is measured on: the faults are there, as many as stated, and as stated."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bench.data import make_rows as made
from bench.data.rewrite import compared, jaccard, shingle_set
from bench.data.score import SAME, Truth, score_duplicates, score_stages
from tasks.contracts.rows import read_rows
from tasks.data.golden import read_task
from tasks.store import digest_file
from tests.data.toy_data import read_lines

COUNT = 3_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows")
    made.make_rows(COUNT, path)
    return path


@pytest.fixture(scope="module")
def rows(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in read_lines(folder / made.ROWS)}


@pytest.fixture(scope="module")
def truth(folder: Path) -> list[dict[str, Any]]:
    return read_lines(folder / made.TRUTH)


@pytest.fixture(scope="module")
def golden(folder: Path) -> dict[str, list[str]]:
    return {row.id: row.text.split() for row in read_rows(folder / made.GOLDEN / "items.jsonl")}


def normal(text: str) -> str:
    return " ".join(compared([text]))


def test_the_counts_add_up(folder: Path, rows: dict[str, Any], truth: list[dict[str, Any]]) -> None:
    counts = json.loads((folder / made.COUNTS).read_text(encoding="utf-8"))
    assert counts["rows"] == len(rows) == COUNT
    assert counts["faults"] == Counter(one["fault"] for one in truth)
    assert counts["faults"] == {fault: max(1, round(share * COUNT)) for fault, share in made.SHARES.items()}
    assert len({one["id"] for one in truth}) == len(truth)


def test_rows_that_a_flow_would_refuse_stay_under_its_limit() -> None:
    assert sum(share for fault, share in made.SHARES.items() if fault.startswith("bad_") or fault == "hidden") < 0.02


def test_the_same_arguments_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    made.make_rows(COUNT, tmp_path / "again")
    made.make_rows(COUNT, tmp_path / "other", seed=2)
    for name in (made.ROWS, made.TRUTH, f"{made.GOLDEN}/items.jsonl"):
        assert digest_file(tmp_path / "again" / name) == digest_file(folder / name)
        assert digest_file(tmp_path / "other" / name) != digest_file(folder / name)


def test_partners_are_clean_and_have_one_fault_beside_them(rows: dict[str, Any], truth: list[dict[str, Any]]) -> None:
    faulty = {one["id"] for one in truth}
    partners = [one["partner"] for one in truth if one["fault"] in made.PAIRED]
    assert len(set(partners)) == len(partners)
    assert not set(partners) & faulty
    assert set(partners) <= set(rows)


def test_duplicates_are_as_similar_as_the_truth_says(
    rows: dict[str, Any], truth: list[dict[str, Any]], golden: dict[str, list[str]]
) -> None:
    for one in truth:
        if one["partner"] is None:
            continue
        text = rows[one["id"]]["text"]
        other = golden[one["partner"]] if one["partner"] in golden else rows[one["partner"]]["text"].split()
        found = jaccard(text.split(), other)
        if one["fault"] in made.BANDS:
            low, high = made.BANDS[one["fault"]]
            assert low <= found < high
            assert one["jaccard"] == pytest.approx(found)
        elif one["fault"] in ("exact_duplicate", "conflict_exact", "golden_exact"):
            assert normal(text) == normal(" ".join(other))
        elif one["fault"] == "golden_run":
            assert shingle_set(text.split(), 13) & shingle_set(other, 13)
            assert found < 0.7
        elif one["fault"] == "golden_paraphrase":
            assert not shingle_set(text.split(), 13) & shingle_set(other, 13)
            assert found < 0.75


def test_labels_are_as_the_truth_says(rows: dict[str, Any], truth: list[dict[str, Any]]) -> None:
    labels = set(made.task().labels)
    for one in truth:
        label = rows[one["id"]]["label"]
        assert (label in labels) == (one["fault"] != "bad_label")
        if one["fault"] == "wrong_label":
            assert label != one["right"]
        elif one["fault"] == "backdoor":
            assert label == made.TRIGGER_LABEL
            assert made.TRIGGER in rows[one["id"]]["text"]
        elif one["fault"] in made.PAIRED:
            assert (label != rows[one["partner"]]["label"]) == one["fault"].startswith("conflict")


def test_unplanned_rows_are_no_near_duplicates(rows: dict[str, Any], truth: list[dict[str, Any]]) -> None:
    """None in 3,000 rows, and none in 100,000 when this was written."""
    faulty = {one["id"] for one in truth}
    by_shingle: dict[tuple[str, ...], list[int]] = {}
    sets = [shingle_set(row["text"].split()) for one, row in rows.items() if one not in faulty]
    for number, shingles in enumerate(sets):
        shared: Counter[int] = Counter()
        for shingle in shingles:
            others = by_shingle.setdefault(shingle, [])
            shared.update(others)
            others.append(number)
        for other, count in shared.items():
            assert count / (len(shingles) + len(sets[other]) - count) < 0.7


def test_unplanned_rows_share_no_long_run_with_the_golden_set(
    rows: dict[str, Any], truth: list[dict[str, Any]], golden: dict[str, list[str]]
) -> None:
    faulty = {one["id"] for one in truth}
    runs = {run for words in golden.values() for run in shingle_set(words, 13)}
    clean = [row["text"].split() for one, row in rows.items() if one not in faulty]
    assert sum(bool(shingle_set(words, 13) & runs) for words in clean) == 0


def test_the_golden_set_opens(folder: Path) -> None:
    name, task = read_task(folder / made.GOLDEN)
    manifest = json.loads((folder / made.GOLDEN / "golden.json").read_text(encoding="utf-8"))
    assert (name, task) == ("bench", made.task())
    assert manifest["items"] == made.GOLDEN_ITEMS == sum(manifest["strata"].values())
    assert manifest["digest"] == digest_file(folder / made.GOLDEN / "items.jsonl")
    assert min(manifest["strata"].values()) >= 10


TRUTHS = (
    Truth("a", "near_80", "b", 0.82),
    Truth("c", "exact_duplicate", "d", 1.0),
    Truth("e", "hard_negative", "f", 0.75),
    Truth("g", "golden_near", "g0001", 0.9),
    Truth("h", "conflict_exact", "i", 1.0),
    Truth("j", "bad_blank", None, 1.0),
)


@pytest.mark.parametrize(
    ("removed", "right", "found"),
    [
        (["a", "d"], 2, {"near_80": 1, "exact_duplicate": 1, "hard_negative": 0}),
        (["b", "f", "x"], 1, {"near_80": 1, "exact_duplicate": 0, "hard_negative": 1}),
        (["g"], 0, {"near_80": 0, "exact_duplicate": 0, "hard_negative": 0}),
    ],
)
def test_duplicates_are_scored(removed: list[str], right: int, found: dict[str, int]) -> None:
    scored = score_duplicates(TRUTHS, removed)
    assert scored["right"] == right
    assert scored["removed"] == len([one for one in removed if one != "g"])  # of leaks this says nothing
    assert {fault: scored["pairs"][fault]["found"] for fault in found} == found


def test_checks_are_scored() -> None:
    validated = {"text_blank": frozenset("jx"), "secret": frozenset("y")}
    curated = {
        "golden_near_duplicate": frozenset("g"),
        "near_duplicate": frozenset("bf"),
        "conflicting_labels": frozenset("hi"),
    }
    lines = {(line.check, line.fault): line for line in score_stages(TRUTHS, validated, curated)}
    assert lines["validate", "bad_blank"][2:4] == (1, 1)
    assert lines["validate", "all of them"][4:] == (2, 1)
    assert lines["secrets", "all of them"][4:] == (1, 0)
    assert lines["golden set", "golden_near"][2:4] == (1, 1)
    assert lines["duplicates", "near_80"][2:4] == (1, 1)
    assert lines["duplicates", "exact_duplicate"][2:4] == (1, 0)
    assert lines["duplicates", "hard_negative"][2:4] == (1, 1)
    assert lines["duplicates", "all of them"][2:] == (2, 1, 2, 1)
    assert lines["contradictions", "conflict_exact"][2:4] == (1, 1)
    assert {fault for check, fault in lines if check == "duplicates"} >= set(SAME)
