"""Splits without duplicates and leaks, the guards, and a funnel that adds up."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tasks.contracts.errors import DataError
from tasks.contracts.progress import Progress
from tasks.contracts.references import CONTAMINATION_FILE, ContaminationReport, GoldenSetRef
from tasks.contracts.rows import Message, Row, read_rows, write_rows
from tasks.contracts.spec import CurateSpec, Guard, TaskSpec
from tasks.data import curate as module
from tasks.data.curate import curate
from tasks.data.guards import NO_LONG_ROWS, LongRows
from tasks.data.similar import NGRAM_WORDS, Banding, Shingles, jaccard, normalise, sketch_texts
from tests.data.toy_data import CLASSIFY, EXTRACT, LABELS, read_lines, rows, sentence

FEW = {Guard.FEW_ROWS: "toy rows for a test"}


class Splits(NamedTuple):
    train: list[Row]
    dev: list[Row]
    removed: dict[str, tuple[str, str]]
    report: dict[str, Any]
    contamination: ContaminationReport
    bytes: dict[str, bytes]


def as_rows(records: Sequence[dict[str, Any]]) -> list[Row]:
    return [
        Row(r["id"], n, (Message("user", r["text"]),), r["label"], r.get("group"))
        for n, r in enumerate(records, start=1)
    ]


def run(
    folder: Path,
    records: Sequence[dict[str, Any]],
    golden: Sequence[dict[str, Any]] = (),
    *,
    task: TaskSpec = CLASSIFY,
    rate: float = 2e-4,
    listener: Any = lambda progress: None,
    long_rows: LongRows = NO_LONG_ROWS,
    **spec: Any,
) -> Splits:
    for name in ("valid", "golden", "out"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    write_rows(folder / "valid/rows.jsonl", as_rows(records))
    write_rows(folder / "golden/items.jsonl", as_rows(golden))
    ref = GoldenSetRef(path=str(folder / "golden"), digest="d" * 64, items=len(golden))
    curate_spec = CurateSpec(**({"accept_risks": FEW} | spec))
    curated = curate(folder / "valid", ref, task, curate_spec, rate, folder / "out", listener, long_rows)
    out = folder / "out"
    splits = Splits(
        list(read_rows(out / "train.jsonl")),
        list(read_rows(out / "dev.jsonl")),
        {entry["id"]: (entry["checks"][0], entry["reasons"][0]) for entry in read_lines(out / "quarantine.jsonl")},
        json.loads((out / "report.json").read_text()),
        ContaminationReport.model_validate_json((out / CONTAMINATION_FILE).read_text()),
        {path.name: path.read_bytes() for path in out.iterdir()},
    )
    assert (curated.train, curated.dev) == (len(splits.train), len(splits.dev))
    assert curated.removed == splits.report["removed"]
    distinct = splits.report["train"]["distinct_rows"]
    assert distinct + len(splits.dev) + sum(curated.removed.values()) == len(records)
    return splits


def ids(found: Sequence[Row]) -> set[str]:
    return {row.id for row in found}


def test_rows_become_train_and_dev_by_label(tmp_path: Path) -> None:
    records = rows(200)
    for record in records[:150]:
        record["label"] = "billing"
    splits = run(tmp_path, records, dev_share=0.1)
    strata = Counter(record["label"] for record in records)
    dev = Counter(row.target for row in splits.dev)
    assert sum(dev.values()) == 20
    assert dev == {label: pytest.approx(count / 10, abs=0.5) for label, count in strata.items()}
    assert ids(splits.train) | ids(splits.dev) == {record["id"] for record in records}
    assert not ids(splits.train) & ids(splits.dev)
    assert splits.removed == {}
    assert {row.id: row.line for row in splits.train}[splits.train[0].id] == int(splits.train[0].id[1:]) + 1


def planted() -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, tuple[str, str]]]:
    """Rows, golden items, and the planted rows with reason and detail."""
    draw = random.Random(8)
    records, golden = rows(100), rows(20, seed=2)
    for number, item in enumerate(golden):
        item["id"] = f"g{number}"
    golden[7]["group"] = "case 7"
    shared = golden[5]["text"].split()
    long_shared = " ".join(shared[2:15])
    less_shared = " ".join(shared[2:14])
    plants = {
        "g0": (dict(golden[0]), "golden_item", "is golden item g0"),
        "g1": ({"text": sentence(draw)}, "golden_same_id", "has the id of golden item g1, with another text"),
        "exact": ({"text": golden[2]["text"].upper() + " "}, "golden_same_text", "same text as golden item g2"),
        "near": (
            {"text": golden[3]["text"] + " w1"},
            "golden_near_duplicate",
            "Jaccard similarity 0.95 with golden item g3",
        ),
        "ngram": (
            {"text": f"{sentence(draw, 30)} {long_shared} {sentence(draw, 30)}"},
            "golden_ngram",
            "1 runs of 13 words in common, one with golden item g5",
        ),
        "group": (
            {"text": sentence(draw), "group": "case 7"},
            "golden_same_group",
            "in group 'case 7' with golden item g7",
        ),
    }
    for name, (fields, _, _) in plants.items():
        records.append({"label": "billing"} | fields | {"id": name})
    records.append(
        {"id": "fine", "label": "billing", "text": f"{sentence(draw, 30)} {less_shared} {sentence(draw, 30)}"}
    )
    return records, golden, {name: (reason, detail) for name, (_, reason, detail) in plants.items()}


def test_what_overlaps_the_golden_set_is_removed(tmp_path: Path) -> None:
    records, golden, expected = planted()
    splits = run(tmp_path, records, golden)
    assert splits.removed == expected
    assert "fine" in ids(splits.train) | ids(splits.dev)
    assert splits.report["golden"] == {"digest": "d" * 64, "items": 20, "strata": {"billing": 10, "support": 10}}


MEASURES = (
    "golden_item",
    "golden_same_id",
    "golden_same_text",
    "golden_same_group",
    "golden_near_duplicate",
    "golden_ngram",
)


def test_clean_splits_are_reported_clean(tmp_path: Path) -> None:
    records, golden, _ = planted()
    splits = run(tmp_path, records, golden, near_duplicate=0.7)
    assert splits.contamination == ContaminationReport(
        golden_digest="d" * 64,
        golden_items=20,
        rows=len(splits.train) + len(splits.dev),
        near_duplicate=0.7,
        ngram_words=13,
        measures=MEASURES,
        found={},
    )


def nothing_removed(table: Any, index: Any) -> list[Any]:
    """Stands for a first removal that overlooks everything."""
    return []


def test_a_leak_that_the_first_removal_overlooks_is_found_in_the_splits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, golden, expected = planted()
    monkeypatch.setattr(module, "_with_golden", nothing_removed)
    splits = run(tmp_path, records, golden)
    assert expected.keys() <= ids(splits.train) | ids(splits.dev)
    assert splits.contamination.found == dict.fromkeys(MEASURES, 1)
    assert splits.contamination.rows == len(records)


def test_both_splits_are_looked_through_and_nothing_else_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records, golden = rows(300), rows(300)[:60]
    monkeypatch.setattr(module, "_with_golden", nothing_removed)
    splits = run(tmp_path, records, golden, max_train_rows=100, dev_share=0.3)
    leaked = {item["id"] for item in golden}
    in_train, in_dev = (len(leaked & ids(split)) for split in (splits.train, splits.dev))
    assert min(in_train, in_dev) > 0
    assert in_train + in_dev < 60  # the others are over the limit, and training never sees them
    assert splits.contamination.found == {"golden_item": in_train + in_dev}
    assert splits.contamination.rows == len(splits.train) + len(splits.dev) < 300


def shingles_of(text: str) -> set[tuple[str, ...]]:
    words = normalise(text).split()
    return {tuple(words[at : at + 3]) for at in range(len(words) - 2)}


def similarity(one: str, other: str) -> float:
    """Jaccard similarity of word 3-shingles, worked out plainly."""
    first, second = shingles_of(one), shingles_of(other)
    return len(first & second) / len(first | second)


def shares_a_run(one: str, other: str) -> bool:
    """Whether two texts have a run of 13 words in common, worked out plainly."""
    runs = [
        {tuple(words[at : at + NGRAM_WORDS]) for at in range(len(words) - NGRAM_WORDS + 1)}
        for words in (normalise(one).split(), normalise(other).split())
    ]
    return bool(runs[0] & runs[1])


def edited(text: str, draw: random.Random, changes: int) -> str:
    """The text with so many of its words replaced."""
    words = text.split()
    for position in draw.sample(range(len(words)), changes):
        words[position] = f"other{draw.randrange(100_000)}"
    return " ".join(words)


def leak(measure: str, item: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """A row that is a golden item in the way of one measure, and as well as can be in no stronger way."""
    words = item["text"].split()
    match measure:
        case "golden_item":
            return {"id": item["id"], "text": item["text"]}
        case "golden_same_id":
            return {"id": item["id"], "text": sentence(draw, 60)}
        case "golden_same_text":
            dressed = "".join(draw.choice((sign.upper(), sign)) for sign in item["text"]).replace(" ", "\u00a0 \n", 5)
            return {"text": f"\t{dressed}  "}
        case "golden_same_group":
            return {"text": sentence(draw, 60), "group": item["group"]}
        case "golden_near_duplicate":
            return {"text": draw.choice((edited(item["text"], draw, 2), edited(item["text"], draw, 1) + " so it is"))}
        case "golden_ngram":
            start = draw.randrange(len(words) - NGRAM_WORDS)
            run_ = " ".join(words[start : start + NGRAM_WORDS])
            return {"text": f"{sentence(draw, draw.randrange(40))} {run_}, {sentence(draw, draw.randrange(30, 60))}"}
        case _:
            raise ValueError(measure)


@pytest.mark.parametrize("measure", MEASURES)
def test_every_planted_leak_is_found_and_nothing_else(measure: str, tmp_path: Path) -> None:
    draw = random.Random(measure)
    golden = [
        {"id": f"g{n}", "text": sentence(draw, 60), "label": LABELS[n % 2], "group": f"case {n}"} for n in range(150)
    ]
    leaks = [{"id": f"leak-{n}", "label": LABELS[n % 2]} | leak(measure, one, draw) for n, one in enumerate(golden)]
    if measure == "golden_near_duplicate":
        assert all(similarity(row["text"], item["text"]) >= 0.8 for row, item in zip(leaks, golden, strict=True))
    # Every fifth word replaced: plainly about the same, but under the threshold and without a long run in common.
    distant = []
    for number, item in enumerate(golden):
        words = item["text"].split()
        words[::5] = [f"else{draw.randrange(100_000)}" for _ in words[::5]]
        text = " ".join(words)
        assert similarity(text, item["text"]) < 0.8
        assert not shares_a_run(text, item["text"])
        distant.append({"id": f"far-{number}", "text": text, "label": LABELS[number % 2]})
    splits = run(tmp_path, [*rows(200), *leaks, *distant], golden)
    assert {name: reason for name, (reason, _) in splits.removed.items()} == {row["id"]: measure for row in leaks}
    assert splits.contamination.found == {}


def test_near_duplicates_are_found_right_up_to_the_threshold(tmp_path: Path) -> None:
    """Leaks of every similarity: those at or over the threshold are all found, those under it all stay."""
    draw = random.Random(21)
    golden = [{"id": f"g{n}", "text": sentence(draw, 60), "label": LABELS[n % 2]} for n in range(120)]
    near = [
        {"id": f"near-{n}", "text": edited(item["text"], draw, 1 + n % 12), "label": LABELS[n % 2]}
        for n, item in enumerate(golden)
    ]
    splits = run(tmp_path, [*rows(200), *near], golden)
    expected = {}
    for row, item in zip(near, golden, strict=True):
        if similarity(row["text"], item["text"]) >= 0.8:
            expected[row["id"]] = "golden_near_duplicate"
        elif shares_a_run(row["text"], item["text"]):
            expected[row["id"]] = "golden_ngram"
    assert {name: reason for name, (reason, _) in splits.removed.items()} == expected
    assert Counter(expected.values()) == {"golden_near_duplicate": 20, "golden_ngram": 82}  # and 18 stay


def test_short_texts_leak_by_equality_alone(tmp_path: Path) -> None:
    records = [{"id": f"p{n}", "text": f"${n}.00", "label": str(n)} for n in range(100)]
    golden = [
        {"id": "g0", "text": "$5.00", "label": "5"},
        {"id": "g1", "text": "€ 7.00", "label": "7"},
        {"id": "g2", "text": "$8,00", "label": "8"},
    ]
    splits = run(tmp_path, records, golden, task=EXTRACT)
    assert splits.removed == {"p5": ("golden_same_text", "same text as golden item g0")}
    assert len(splits.train) == 89


def test_filler_is_no_leak(tmp_path: Path) -> None:
    draw = random.Random(11)
    filler = "XXXX " * 30
    records = [*rows(100), {"id": "filler", "text": f"{sentence(draw)} {filler}", "label": "billing"}]
    golden = [{"id": "g", "text": f"{sentence(draw)} {filler}", "label": "billing"}]
    assert run(tmp_path, records, golden).removed == {}


def test_duplicates_and_contradictions_are_removed(tmp_path: Path) -> None:
    base = rows(100)
    records = [
        *base,
        base[0] | {"id": "exact", "text": base[0]["text"].upper()},
        base[1] | {"id": "near", "text": base[1]["text"] + " w1"},
        base[2] | {"id": "conflict", "label": "support"},
        base[3],  # the same row again, id and all
    ]
    splits = run(tmp_path, records)
    assert splits.report["removed"] == {"conflicting_labels": 2, "exact_duplicate": 2, "near_duplicate": 1}
    assert splits.removed["r0002"] == ("conflicting_labels", "'billing' here, 'support' in conflict")
    assert splits.removed["conflict"] == ("conflicting_labels", "'support' here, 'billing' in r0002")
    assert splits.removed["r0003"] == ("exact_duplicate", "same text as r0003")
    kept = ids(splits.train) | ids(splits.dev)
    assert len(kept & {"r0000", "exact"}) == 1
    assert len(kept & {"r0001", "near"}) == 1
    assert "r0003" in kept


def test_the_funnel_adds_up(tmp_path: Path) -> None:
    records, golden, _ = planted()
    records += [record | {"id": f"again-{record['id']}"} for record in records[:10]]
    funnel = run(tmp_path, records, golden, max_train_rows=60).report["funnel"]
    assert funnel[0] == {"step": "valid rows", "removed": 0, "left": len(records)}
    for before, after in pairwise(funnel):
        assert after["left"] == before["left"] - after["removed"]
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert funnel[-1]["left"] == report["train"]["rows"] + report["dev"]["rows"]
    assert {step["step"]: step["removed"] for step in funnel if step["removed"]} == report["removed"]
    assert report["train"]["rows"] == sum(report["train"]["strata"].values()) == 60


def test_the_order_of_rows_does_not_matter(tmp_path: Path) -> None:
    records, golden, _ = planted()
    records += [record | {"id": f"again-{record['id']}", "text": record["text"] + " w2"} for record in records[:30]]
    first = run(tmp_path / "one", records, golden, max_train_rows=70)
    shuffled = random.Random(6).sample(records, len(records))
    other = run(tmp_path / "other", shuffled, golden[::-1], max_train_rows=70)
    assert [row.id for row in other.train] == [row.id for row in first.train]
    assert [row.id for row in other.dev] == [row.id for row in first.dev]
    assert {name: reason for name, (reason, _) in other.removed.items()} == {
        name: reason for name, (reason, _) in first.removed.items()
    }


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    records, golden, _ = planted()
    assert run(tmp_path / "a", records, golden).bytes == run(tmp_path / "b", records, golden).bytes
    assert str(tmp_path).encode() not in b"".join(run(tmp_path / "a", records, golden).bytes.values())


@pytest.mark.parametrize("task", [CLASSIFY, EXTRACT])
def test_near_duplicates_never_straddle(task: TaskSpec, tmp_path: Path) -> None:
    draw = random.Random(3)
    records = []
    for family in range(60):
        text = sentence(draw, 40)
        for member in range(5):
            label = LABELS[family % 2] if task is CLASSIFY else str(member)
            records.append({"id": f"{family}-{member}", "text": f"{text} v{member}", "label": label})
    splits = run(tmp_path, records, task=task, dev_share=0.3)
    both = splits.train + splits.dev
    assert len(both) == (60 if task is CLASSIFY else 300)
    side = ["train"] * len(splits.train) + ["dev"] * len(splits.dev)
    shingles = Shingles.of(sketch_texts((row.text for row in both), Banding.for_threshold(0.8)))
    sets = [shingles.set_of(number) for number in range(len(both))]
    pairs = [(one, other) for one in range(len(both)) for other in range(one) if jaccard(sets[one], sets[other]) >= 0.8]
    assert bool(pairs) is (task is EXTRACT)
    assert all(side[one] == side[other] for one, other in pairs)
    assert len(splits.dev) == pytest.approx(0.3 * len(both), abs=5)


def test_groups_never_straddle(tmp_path: Path) -> None:
    records = [record | {"group": f"g{n // 7}"} for n, record in enumerate(rows(200))]
    splits = run(tmp_path, records, dev_share=0.2)
    groups = [{row.group for row in split} for split in (splits.train, splits.dev)]
    assert not groups[0] & groups[1]
    assert 30 <= len(splits.dev) <= 40
    with pytest.raises(DataError, match="No dev split can be made: the rows are in 1 groups"):
        run(tmp_path, [record | {"group": "all"} for record in rows(100)])


def test_a_limit_draws_by_label(tmp_path: Path) -> None:
    records = rows(400)
    for record in records[:340]:
        record["label"] = "billing"
    splits = run(tmp_path, records, max_train_rows=90, dev_share=0.1)
    assert len(splits.train) == 90
    assert len(splits.dev) == 10  # the share is one of the rows that are kept
    share = Counter(row["label"] for row in records)["support"] / 400
    assert Counter(row.target for row in splits.train)["support"] == pytest.approx(max(10, 90 * share), abs=1)
    assert {reason for reason, _ in splits.removed.values()} == {"over_max_train_rows"}
    assert len(splits.removed) == 300


@pytest.mark.parametrize(
    ("records", "what"),
    [
        (
            [{"id": f"r{n}", "text": "the same text", "label": "billing"} for n in range(50)],
            "All 50 rows outside the golden set are duplicates of each other or contradict each other "
            "(49 exact_duplicate).",
        ),
        (rows(1), "Of 1 rows 1 is left for training (none was removed)."),
        (
            [{"id": f"r{n}", "text": "the same text", "label": LABELS[n % 2]} for n in range(4)],
            "Of 4 rows 0 is left for training (4 conflicting_labels).",
        ),
    ],
)
def test_nothing_to_learn_from(records: list[dict[str, Any]], what: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        run(tmp_path, records)
    assert caught.value.what == what


def test_everything_in_the_golden_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Of 30 rows 0 is left for training \(30 golden_item\)"):
        run(tmp_path, rows(30), rows(30))


def test_a_label_without_training_row_is_refused_whatever_is_accepted(tmp_path: Path) -> None:
    accepted = dict.fromkeys(Guard, "toy rows for a test")
    with pytest.raises(DataError) as caught:
        run(tmp_path, [record | {"label": "billing"} for record in rows(60)], accept_risks=accepted)
    assert caught.value.what == "The label 'support' has no training row."
    assert caught.value.where == "task.labels"


@pytest.mark.parametrize(
    ("guard", "count", "small", "rate", "found"),
    [
        (Guard.FEW_ROWS, 540, 0, 2e-4, "486 training rows, fewer than 500"),
        (Guard.SMALL_CLASS, 600, 9, 2e-4, "labels with fewer than 10 training rows: support 8"),
        (
            Guard.LEARNING_RATE,
            600,
            0,
            2.1e-4,
            "a learning rate above 0.0002 with 540 training rows, fewer than 1,000",
        ),
    ],
)
def test_a_guard_stops_the_run_unless_a_reason_is_given(
    guard: Guard, count: int, small: int, rate: float, found: str, tmp_path: Path
) -> None:
    records = rows(count)
    if small:
        for number, record in enumerate(records):
            record["label"] = "support" if number < small else "billing"
    with pytest.raises(DataError) as caught:
        run(tmp_path, records, rate=rate, accept_risks={})
    assert caught.value.what == f"This run would likely disappoint: {found}."
    assert caught.value.where == f"guard {guard.value}"
    assert f"`curate.accept_risks.{guard.value}`" in caught.value.fix
    assert not (tmp_path / "out/train.jsonl").exists()

    others = {other: "this one is not the matter" for other in Guard if other is not guard}
    with pytest.raises(DataError):
        run(tmp_path, records, rate=rate, accept_risks=others)

    splits = run(tmp_path, records, rate=rate, accept_risks={guard: "we know what we do"})
    assert splits.report["accepted_risks"] == {guard.value: {"found": found, "reason": "we know what we do"}}


def test_too_many_rows_that_are_too_long_stop_the_run_unless_a_reason_is_given(tmp_path: Path) -> None:
    long_rows = LongRows(9, 569)
    found = "9 of 569 rows (1.6%) are longer in tokens than training takes, more than 1%, and are left out"
    with pytest.raises(DataError) as caught:
        run(tmp_path, rows(560), accept_risks={}, long_rows=long_rows)
    assert caught.value.what == f"This run would likely disappoint: {found}."
    assert caught.value.where == "guard long_rows"
    assert caught.value.fix.startswith("raise `train.max_tokens`")
    assert caught.value.fix.endswith("or give a reason in `curate.accept_risks.long_rows`")
    splits = run(
        tmp_path, rows(560), accept_risks={Guard.LONG_ROWS: "these are quoted mail threads"}, long_rows=long_rows
    )
    assert splits.report["accepted_risks"] == {"long_rows": {"found": found, "reason": "these are quoted mail threads"}}


@pytest.mark.parametrize(
    ("too_long", "of", "too_many"), [(0, 0, False), (0, 50, False), (1, 100, False), (1, 99, True), (11, 1000, True)]
)
def test_what_share_of_long_rows_is_too_many(too_long: int, of: int, too_many: bool) -> None:
    assert LongRows(too_long, of).too_many is too_many


def test_guards_are_silent_at_their_limits(tmp_path: Path) -> None:
    records = rows(1112)
    for number, record in enumerate(records):
        record["label"] = "support" if number < 11 else "billing"
    splits = run(tmp_path, records, rate=5e-4, accept_risks={})
    assert (len(splits.train), Counter(row.target for row in splits.train)["support"]) == (1001, 10)
    assert splits.report["accepted_risks"] == {}
    assert len(run(tmp_path, rows(556), accept_risks={}).train) == 500


def test_progress_is_told(tmp_path: Path) -> None:
    heard: list[Progress] = []
    run(tmp_path, rows(1200), listener=heard.append)
    assert [(progress.done, progress.total) for progress in heard] == [(1200, 1200), (1200, 1200)]
