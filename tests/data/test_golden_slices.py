"""Slices of a golden set: who is in them, that what is made stays with its original, and what is refused."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from goldgate.config import load_spec
from tasks.contracts.errors import DataError, GoldenSetError, SpecError
from tasks.contracts.references import ItemOutcome
from tasks.contracts.rows import Message, Row, read_rows, write_rows
from tasks.contracts.spec import GoldenSlice, GoldenSpec, RetrainSpec
from tasks.data.draw import draw, make_units, quotas
from tasks.data.golden import Draft, Planner, choose, freeze, open_golden
from tasks.data.golden_slices import (
    MIN_SLICE_ITEMS,
    TYPICAL,
    draw_positions,
    origin_problem,
    part_of,
    read_paraphrases,
    typical_of,
)
from tasks.data.similar import Banding, normalise
from tasks.data.table import NOTHING, build_table
from tests.data.toy_data import CHAT, CLASSIFY, EXTRACT

EXAMPLES = Path(__file__).parents[2] / "examples"
MakeSpec = Callable[..., RetrainSpec]
NOT_ASKED = Planner(lambda name: pytest.fail("slice_items says it"), lambda part: None)


def words(count: int, draw: random.Random) -> str:
    """Random words that can be mistyped; two texts have next to nothing in common."""
    return " ".join("".join(draw.choices("abcdefghijklmnoprstuvw", k=7)) for _ in range(count))


def toy_rows(count: int = 400, **changes: Callable[[int], Any]) -> list[Row]:
    """Rows of ten words, labels in turn; `changes` sets a field by the row's number."""
    draw = random.Random(3)
    found = []
    for number in range(count):
        fields: dict[str, Any] = {"target": ("billing", "support")[number % 2], "text": words(10, draw)}
        fields |= {name: change(number) for name, change in changes.items()}
        text = fields.pop("text")
        found.append(Row(f"r{number:04d}", number + 1, (Message("user", text),), **fields))
    return found


def draft_of(items: list[Row], spec: RetrainSpec, planner: Planner | None = None) -> Draft:
    folder = Path(spec.data.source).parent
    write_rows(folder / "valid.jsonl", items)
    return choose(folder / "valid.jsonl", spec, folder, planner)


def in_slice(draft: Draft, name: str) -> list[Row]:
    return [item for item in draft.items if item.slice == name]


@pytest.fixture
def spec_with(make_spec: MakeSpec) -> MakeSpec:
    """A spec of 60 typical items with slices of 20 each."""

    def make(*slices: str, task: Any = CLASSIFY, golden: dict[str, Any] | None = None, **parts: Any) -> RetrainSpec:
        asked = {"slices": slices, "slice_items": 20} | (golden or {})
        return make_spec([], task, items=60, golden=asked, **parts)

    return make


# -- drawn --------------------------------------------------------------------------------------------------------


def long_or_short(number: int) -> str:
    return words(5 if number % 10 == 0 else 40 if number % 10 == 1 else 10, random.Random(number))


@pytest.mark.parametrize(
    ("name", "changes", "fits"),
    [
        ("long", {"text": long_or_short}, lambda row: len(row.text.split()) == 40),
        ("short", {"text": long_or_short}, lambda row: len(row.text.split()) == 5),
        (
            "newest",
            {"time": lambda n: (datetime(2026, 1, 1, tzinfo=UTC) + timedelta(hours=n)).isoformat()},
            lambda row: int(row.id[1:]) >= 360,
        ),
        (
            "rare_class",
            {"target": lambda n: "support" if n % 10 == 0 else "billing"},
            lambda row: row.target == "support",
        ),
    ],
)
def test_a_slice_is_drawn_from_the_rows_that_fit(
    name: str, changes: dict[str, Any], fits: Callable[[Row], bool], spec_with: MakeSpec
) -> None:
    items = toy_rows(**changes)
    fitting = {row.id for row in items if fits(row)}
    assert len(fitting) == 40
    spec = spec_with(name, data={"time_field": "time"})
    draft = draft_of(items, spec)
    found = in_slice(draft, name)
    typical = {item.id for item in in_slice(draft, TYPICAL)}
    left = fitting - typical
    assert {item.id for item in found} <= left
    assert len(found) == min(20, len(left) // 2)  # the other half stays for training
    (part,) = [part for part in draft.parts if part.name == name]
    assert (part.available, part.wanted, part.items, part.groups) == (len(left) // 2, 20, len(found), len(found))
    assert draft.left == 400 - 60 - len(found)


def test_slices_change_nothing_about_the_typical_items(spec_with: MakeSpec) -> None:
    items = toy_rows(text=long_or_short)
    plain = draft_of(items, spec_with())
    assert {item.slice for item in plain.items} == {None}
    assert [part.name for part in plain.parts] == [None]
    sliced = draft_of(items, spec_with("adversarial", "short", "long", "typed_noise"))
    assert [item.id for item in in_slice(sliced, TYPICAL)] == [item.id for item in plain.items]
    names = [item.slice for item in sliced.items]
    assert list(dict.fromkeys(names)) == [TYPICAL, "long", "short", "typed_noise", "adversarial"]
    assert [item.line for item in sliced.items] == list(range(1, len(names) + 1))


def test_a_row_is_in_one_slice(spec_with: MakeSpec) -> None:
    items = toy_rows(text=long_or_short, target=lambda n: "support" if n % 10 == 1 else "billing")  # rare ones are long
    draft = draft_of(items, spec_with("long", "rare_class"))
    ids = Counter(item.id for item in draft.items)
    assert set(ids.values()) == {1}
    assert all(item.target == "support" for item in in_slice(draft, "rare_class"))
    assert {item.target for item in in_slice(draft, "long")} == {"support"}


def test_the_order_of_rows_does_not_matter(spec_with: MakeSpec) -> None:
    items = toy_rows(text=long_or_short)
    spec = spec_with("long", "short", "typed_noise", "adversarial")
    shuffled = random.Random(5).sample(items, len(items))
    assert draft_of(shuffled, spec) == draft_of(items, spec)


def test_a_drawn_slice_keeps_rows_of_one_group_together(spec_with: MakeSpec) -> None:
    items = toy_rows(
        text=lambda n: words(40 if n // 4 % 10 == 0 else 10, random.Random(n)), group=lambda n: f"g{n // 4}"
    )
    draft = draft_of(items, spec_with("long"))
    found = in_slice(draft, "long")
    assert set(Counter(item.group for item in found).values()) == {4}
    (part,) = [part for part in draft.parts if part.name == "long"]
    assert (part.items, part.groups, part.effective) == (len(found), len(found) // 4, len(found) // 4)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("long", {"text": lambda n: f"{n:04d} " + "word" * 9}),  # all of one length
        ("newest", {"time": lambda n: "2026-01-01T00:00:00+00:00"}),
        ("newest", {}),  # no row says its time
        ("rare_class", {}),  # two classes of one size
    ],
)
def test_a_slice_that_nothing_fits_is_empty_in_the_plan_and_refused_when_it_is_frozen(
    name: str, changes: dict[str, Any], spec_with: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = toy_rows(**changes)
    spec = spec_with(name, data={"time_field": "time"})
    draft = draft_of(items, spec)
    (part,) = [part for part in draft.parts if part.name == name]
    assert (part.available, part.items, part.effective) == (0, 0, 0)
    monkeypatch.setattr("tasks.data.golden.digest_source", lambda data: "d")
    monkeypatch.setattr("tasks.data.golden.draft_golden", lambda *arguments: draft)
    with pytest.raises(GoldenSetError) as caught:
        freeze(spec)
    assert caught.value.what == (
        f"The slice {name} would have 0 items: 0 can be had, 20 are wanted, and below {MIN_SLICE_ITEMS} it would say "
        "nothing."
    )
    assert caught.value.fix == f"add data that fit it, or take {name} out"
    assert not Path(spec.golden.path).exists()


# -- made ---------------------------------------------------------------------------------------------------------


def test_what_is_made_stays_with_its_original(spec_with: MakeSpec) -> None:
    draft = draft_of(toy_rows(), spec_with("typed_noise", "adversarial"))
    items = {item.id: item for item in draft.items}
    assert len(items) == 60 + 20 + 20
    families = set()
    for name, suffix in (("typed_noise", "noise"), ("adversarial", "adversarial")):
        made = in_slice(draft, name)
        assert len(made) == 20
        for item in made:
            original = items[item.id.removesuffix(f"~{suffix}")]
            assert original.slice == TYPICAL
            assert item.target == original.target
            assert item.group == original.group == f"item {original.id}"
            assert normalise(item.text) != normalise(original.text)
            assert origin_problem(item, items) is None
            families.add(original.id)
    alone = [item for item in in_slice(draft, TYPICAL) if item.id not in families]
    assert {item.group for item in alone} == {None}
    assert draft.left == 340  # nothing is taken from training that typical items have not taken already
    everything = draft.parts[0]
    assert (everything.items, everything.groups) == (100, 60)


def test_the_gate_counts_an_item_and_what_is_made_of_it_as_one(spec_with: MakeSpec) -> None:
    from tasks.gate.pairs import make_pairs

    draft = draft_of(toy_rows(), spec_with("typed_noise", "adversarial"))
    outcomes = [
        ItemOutcome(
            id=item.id, text=item.text, target=item.target, prediction="billing", scores={"exact_match": 1.0},
            latency_ms=1.0, prompt_tokens=1, output_tokens=1, group=item.group, slice=item.slice,
        )
        for item in draft.items
    ]  # fmt: skip
    pairs = make_pairs(outcomes, outcomes, ("billing", "support"))
    assert (pairs.n, pairs.group_count, pairs.grouped) == (100, 60, True)
    for name, size in ((TYPICAL, 60), ("typed_noise", 20), ("adversarial", 20)):
        part = pairs.of_slice(name)
        assert (part.n, part.grouped) == (size, False)


def test_a_group_of_the_data_is_kept(spec_with: MakeSpec) -> None:
    draft = draft_of(toy_rows(group=lambda n: f"g{n // 2}"), spec_with("typed_noise"))
    items = {item.id: item for item in draft.items}
    for item in in_slice(draft, "typed_noise"):
        assert item.group == items[item.id.removesuffix("~noise")].group
        assert item.group is not None
        assert item.group.startswith("g")


def test_what_is_quoted_to_lead_astray_comes_from_outside_and_only_once(spec_with: MakeSpec) -> None:
    items = toy_rows(text=lambda n: f"{words(9, random.Random(n))} end. {words(9, random.Random(-n - 1))}.")
    draft = draft_of(items, spec_with("adversarial", golden={"slice_items": 60}))
    golden = {item.id for item in draft.items}
    sentences = {row.text.split(".")[0]: row for row in items}
    quoted = [
        sentences[item.text.rpartition('matter: "')[2].rstrip('."')]
        for item in in_slice(draft, "adversarial")
        if "Somebody else wrote" in item.text
    ]
    assert len(quoted) > 5
    assert len({row.id for row in quoted}) == len(quoted)
    assert not golden & {row.id for row in quoted}


def test_the_last_turn_of_the_user_is_changed_and_no_other(spec_with: MakeSpec) -> None:
    turns = [
        Row(
            row.id, row.line,
            (Message("system", "Answer kindly always."), Message("user", f"question {row.text}"),
             Message("assistant", "certainly, tell more"), Message("user", row.text)),
            f"answer {row.id}",
        )
        for row in toy_rows()
    ]  # fmt: skip
    draft = draft_of(turns, spec_with("typed_noise", task=CHAT))
    items = {item.id: item for item in draft.items}
    for item in in_slice(draft, "typed_noise"):
        original = items[item.id.removesuffix("~noise")]
        assert item.messages[:3] == original.messages[:3]
        assert item.messages[3] != original.messages[3]
        assert item.target == original.target


def test_the_words_of_an_answer_are_not_mistyped(spec_with: MakeSpec) -> None:
    items = toy_rows(
        text=lambda n: f"pay exactly {n + 1000} Kronor for {words(6, random.Random(n))}",
        target=lambda n: json.dumps({"amount": n + 1000, "currency": "Kronor"}),
    )
    draft = draft_of(items, spec_with("typed_noise", task=EXTRACT))
    made = in_slice(draft, "typed_noise")
    assert len(made) == 20
    for item in made:
        answer = json.loads(item.target)
        assert f" {answer['amount']} " in item.text
        assert "Kronor" in item.text


def test_nothing_is_made_that_is_longer_than_the_data_may_be(spec_with: MakeSpec) -> None:
    items = toy_rows()
    length = max(len(row.text) for row in items)
    draft = draft_of(items, spec_with("adversarial", data={"max_characters": length + 3}))
    made = in_slice(draft, "adversarial")
    assert made
    assert all(item.text.isupper() and item.text.endswith("!!!") for item in made)


# -- paraphrases --------------------------------------------------------------------------------------------------


def paraphrased(draft: Draft, path: Path, count: int, **more: Any) -> Path:
    lines = [
        {"id": item.id, "text": f"In other words, {' '.join(reversed(item.text.split()))}"} | more
        for item in draft.items[:count]
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_paraphrases_come_from_a_file(spec_with: MakeSpec, tmp_path: Path) -> None:
    items = toy_rows()
    plain = draft_of(items, spec_with())
    path = paraphrased(plain, tmp_path / "said.jsonl", 30, synthetic=True)
    with path.open("a") as more:
        more.write('{"id": "not drawn", "text": "whatever"}\n')
    draft = draft_of(items, spec_with("paraphrase", golden={"paraphrases": str(path)}))
    made = in_slice(draft, "paraphrase")
    by_id = {item.id: item for item in draft.items}
    assert len(made) == 20
    for item in made:
        assert item.id.endswith("~paraphrase")
        assert item.text.startswith("In other words, ")
        assert item.synthetic  # the mark stays
        assert by_id[item.id.removesuffix("~paraphrase")].group == item.group
    (part,) = [part for part in draft.parts if part.name == "paraphrase"]
    assert (part.available, part.wanted) == (30, 20)
    assert draft.notes == ("1 of 31 paraphrases are not used: they are of no typical item",)


@pytest.mark.parametrize(
    ("content", "what", "line"),
    [
        ('{"id": "a", "text": "one"}\n{"id": "a", "text": "two"}\n', "it is the second one of the item 'a'", 2),
        ('{"id": "a", "text": "one"}\n\n', "Expecting value", 2),
        ('{"id": "a"}\n', "`id` and `text` have to be texts that are not blank", 1),
        ('{"id": "a", "text": " "}\n', "`id` and `text` have to be texts that are not blank", 1),
        ('{"id": 1, "text": "one"}\n', "`id` and `text` have to be texts that are not blank", 1),
        ('{"id": "a", "text": "b", "synthetic": 1}\n', "`synthetic` has to be true or false", 1),
        ('["a", "b"]\n', "it is no JSON object", 1),
        (b'{"id": "a", "text": "\xff"}\n', "'utf-8' codec can't decode", 1),
    ],
)
def test_a_file_of_paraphrases_that_cannot_be_used(content: str | bytes, what: str, line: int, tmp_path: Path) -> None:
    path = tmp_path / "said.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError) as caught:
        read_paraphrases(path)
    assert caught.value.what.startswith(f"A line is no paraphrase: {what}")
    assert caught.value.where == f"{path}:{line}"


def test_a_file_of_paraphrases_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="The paraphrases cannot be read: No such file"):
        read_paraphrases(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("  {}  ", "A paraphrase is a copy of its original."),
        ("{}" + " and more" * 3_000, "A paraphrase has "),
    ],
)
def test_a_paraphrase_that_says_nothing_new_or_too_much(
    text: str, what: str, spec_with: MakeSpec, tmp_path: Path
) -> None:
    items = toy_rows()
    first = draft_of(items, spec_with()).items[0]
    path = tmp_path / "said.jsonl"
    path.write_text(json.dumps({"id": first.id, "text": text.format(first.text.upper())}) + "\n")
    with pytest.raises(DataError) as caught:
        draft_of(items, spec_with("paraphrase", golden={"paraphrases": str(path)}))
    assert caught.value.what.startswith(what)
    assert caught.value.where == f"{path}, id {first.id}"


def test_secrets_in_paraphrases_are_masked_as_in_rows(spec_with: MakeSpec, tmp_path: Path) -> None:
    items = toy_rows()
    plain = draft_of(items, spec_with())
    path = tmp_path / "said.jsonl"
    lines = [{"id": item.id, "text": f"my key AKIAQ3EGRIFH7MZJ2TWB of {item.id}"} for item in plain.items]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    spec = spec_with("paraphrase", golden={"paraphrases": str(path)}, data={"secrets": "mask"})
    made = in_slice(draft_of(items, spec), "paraphrase")
    assert made
    assert not [item.text for item in made if "AKIA" in item.text]


# -- what is asked for ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slices", "parts", "what", "where"),
    [
        (("long",), {"data": {"slice_field": "s"}}, "The data name slices", "data.slice_field, golden.slices"),
        (("newest",), {}, "The slice newest needs the time of each row.", "golden.slices"),
        (("rare_class",), {"task": CHAT}, "The slice rare_class needs classes.", "golden.slices"),
        (("adversarial",), {"task": EXTRACT}, "The slice adversarial is for classify tasks", "golden.slices"),
        (
            ("adversarial",), {"data": {"languages": ("de",)}},
            "The templates of the slice adversarial are English, and the data are not.",
            "golden.slices, data.languages",
        ),
    ],
)  # fmt: skip
def test_slices_that_cannot_be_had_are_refused_before_anything_is_read(
    slices: tuple[str, ...], parts: dict[str, Any], what: str, where: str, spec_with: MakeSpec
) -> None:
    spec = spec_with(*slices, **parts)
    Path(spec.data.source).write_text("not read")
    with pytest.raises(SpecError) as caught:
        freeze(spec)
    assert caught.value.what.startswith(what)
    assert caught.value.where == where


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"slices": ["paraphrase"]}, "the slice paraphrase needs `golden.paraphrases`"),
        ({"paraphrases": "said.jsonl"}, "paraphrases are for the slice paraphrase"),
        ({"slices": ["long", "long"]}, "a slice is named twice"),
        ({"slices": ["funny"]}, "Input should be 'newest'"),
        ({"slice_items": 9}, "greater than or equal to 10"),
    ],
)
def test_what_a_golden_spec_does_not_take(given: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        GoldenSpec(path="golden", **given)


def test_the_planner_says_how_many_where_the_spec_does_not(spec_with: MakeSpec) -> None:
    items = toy_rows()
    asked = []

    def needed(name: str) -> int:
        asked.append(name)
        return {"typed_noise": 33, "adversarial": 4}[name]

    spec = spec_with("typed_noise", "adversarial", golden={"slice_items": None})
    draft = draft_of(items, spec, Planner(needed, lambda part: None))
    assert sorted(asked) == ["adversarial", "typed_noise"]
    assert len(in_slice(draft, "typed_noise")) == 33
    assert len(in_slice(draft, "adversarial")) == MIN_SLICE_ITEMS
    draft_of(items, spec_with("typed_noise"), NOT_ASKED)
    with pytest.raises(SpecError, match="Nothing says how many items the slice typed_noise should have") as caught:
        draft_of(items, spec)
    assert caught.value.where == "golden.slice_items"


# -- the parts by themselves ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "counted"),
    [
        ([], (0, 0, 0)),
        ([None, None, None], (3, 3, 3)),
        (["g", "g", "g", "g"], (4, 1, 1)),
        (["g", "g", None, None], (4, 3, 2)),  # 16 / (4 + 1 + 1)
    ],
)
def test_items_of_a_group_count_as_one_at_worst(groups: list[str | None], counted: tuple[int, int, int]) -> None:
    items = [Row(f"{n}", n, (Message("user", "t"),), "a", group) for n, group in enumerate(groups)]
    part = part_of("x", items, 7, None)
    assert (part.items, part.groups, part.effective) == counted
    assert (part.name, part.available, part.wanted) == ("x", 7, None)


def item(key: str, slice_: str | None, target: str = "a", group: str | None = "g") -> Row:
    return Row(key, 1, (Message("user", key),), target, group, slice_)


@pytest.mark.parametrize(
    ("made", "problem"),
    [
        (item("r~noise", "typed_noise"), None),
        (item("r", "typical"), None),
        (item("q~noise", "phone"), None),  # a slice of the data, and an id like any other
        (item("q~noise", "typed_noise"), "is made from an item that is not in the set"),
        (item("r~noise", "typed_noise", target="b"), "is made from r, which has another answer"),
        (item("r~noise", "typed_noise", group="h"), "is made from r, and is not in its group"),
        (item("r~noise", "typed_noise", group=None), "is made from r, and is not in its group"),
    ],
)
def test_what_can_be_wrong_between_an_item_and_its_original(made: Row, problem: str | None) -> None:
    assert origin_problem(made, {"r": item("r", "typical")}) == problem


def test_which_items_stand_for_the_data_as_they_come() -> None:
    plain, typical, long, phone = item("a", None), item("b", "typical"), item("c", "long"), item("d", "phone")
    assert typical_of([plain, phone]) == [plain, phone]
    assert typical_of([typical, long]) == [typical]
    assert typical_of([typical, phone]) == [typical, phone]  # the data happen to call a slice so
    assert typical_of([]) == []


@pytest.mark.parametrize(("count", "minimum"), [(1, 1), (30, 1), (31, 20), (90, 10), (200, 10), (1000, 10)])
def test_drawing_a_few_of_many_takes_what_drawing_takes(count: int, minimum: int, tmp_path: Path) -> None:
    draw_group = random.Random(8)
    items = toy_rows(200, group=lambda n: draw_group.choice([None, None, "a", "b", "c", "d", "e", "f"]))
    items += [
        Row(f"rare{n}", n, (Message("user", f"rare {n}"),), "sales", f"pair{n // 2}") for n in range(12)
    ]  # a stratum of small groups
    write_rows(tmp_path / "rows.jsonl", items)
    table = build_table(tmp_path / "rows.jsonl", CLASSIFY, Banding.for_threshold(0.8), None, tmp_path)
    at = np.arange(0, len(table), 1)
    members: dict[Any, list[int]] = {}
    for position in at.tolist():
        group = int(table.groups[position])
        members.setdefault(("alone", position) if group == NOTHING else group, []).append(position)
    strata = [table.stratum_names[code] for code in table.strata.tolist()]
    hashes = [table.content_hash(position) for position in at.tolist()]
    taken, _ = draw(make_units(list(members.values()), hashes, strata), quotas(Counter(strata), count, minimum))
    assert draw_positions(table, at, table.content_hash, count, minimum) == [
        position for unit in taken for position in unit.members
    ]
    assert draw_positions(table, at[:0], table.content_hash, count, minimum) == []


# -- real complaints ------------------------------------------------------------------------------------------------


def test_slices_of_the_complaints_are_frozen_and_opened(tmp_path: Path) -> None:
    slices = ["rare_class", "long", "short", "typed_noise", "adversarial"]
    spec = load_spec(
        EXAMPLES / "complaints" / "complaints.yaml",
        [f"golden.path={tmp_path / 'golden'}", f"golden.slices={json.dumps(slices)}", "golden.slice_items=50"],
    )
    ref = freeze(spec, planner=NOT_ASKED)
    assert open_golden(spec.evaluation()) == ref
    items = list(read_rows(Path(ref.path) / "items.jsonl"))
    assert Counter(one.slice for one in items) == {TYPICAL: 300} | dict.fromkeys(slices, 50)
    frozen = list(read_rows(EXAMPLES / "complaints" / "golden" / "items.jsonl"))
    assert [(one.id, one.messages, one.target) for one in typical_of(items)] == [
        (one.id, one.messages, one.target) for one in frozen
    ]
    lengths = {name: [len(one.text) for one in items if one.slice == name] for name in (TYPICAL, "long", "short")}
    assert min(lengths["long"]) > sorted(lengths[TYPICAL])[240]
    assert max(lengths["short"]) < sorted(lengths[TYPICAL])[60]
    assert "credit_reporting" not in {one.target for one in items if one.slice == "rare_class"}
    manifest = json.loads((Path(ref.path) / "golden.json").read_text())
    assert [part["name"] for part in manifest["parts"]] == [None, TYPICAL, *slices]
    assert manifest["items"] == 550


def test_every_slice_has_a_place_in_the_order() -> None:
    assert [name.value for name in GoldenSlice] == [
        "newest", "rare_class", "long", "short", "typed_noise", "paraphrase", "adversarial",
    ]  # fmt: skip
