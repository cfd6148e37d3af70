"""What is lacking, what a teacher is shown of it, and what it is never shown."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from tasks.contracts.errors import DataError
from tasks.contracts.rows import Message, Row
from tasks.contracts.spec import DataSpec, TaskKind
from tasks.contracts.synthesis import Fill, SynthesizeSpec
from tasks.data.synthesis.prompts import Wish, ask_again, ask_for_answer, ask_for_example
from tasks.data.synthesis.shots import Pool, build_pool, plan_fills, wishes
from tests.data.toy_data import CHAT, CLASSIFY, EXTRACT, sentence

MakeSpec = Callable[..., SynthesizeSpec]
DRAW = random.Random(999)


def row(number: int, target: str, slice_: str | None = None, text: str | None = None, **more: object) -> Row:
    shown = sentence(random.Random(number)) if text is None else text
    return Row(f"r{number:03d}", number, (Message("user", shown),), target, slice=slice_, **more)  # type: ignore[arg-type]


def rows() -> list[Row]:
    """30 billing (20 by phone, 10 by mail), 12 support (all by mail)."""
    return [row(n, "billing", "phone" if n < 20 else "mail") for n in range(30)] + [
        row(n, "support", "mail") for n in range(100, 112)
    ]


def pool_of(some: Sequence[Row], spec: SynthesizeSpec, golden: Sequence[Row] = (), **more: object) -> Pool:
    return build_pool(some, lambda: golden, spec, **more)  # type: ignore[arg-type]


def in_slices(make_spec: MakeSpec, **parts: object) -> SynthesizeSpec:
    return make_spec(data=DataSpec(source="rows.jsonl", slice_field="channel"), **parts)


def test_rows_are_counted_by_class_and_slice(make_spec: MakeSpec) -> None:
    counts = pool_of(rows(), make_spec()).counts
    assert counts["billing", None] == 30
    assert counts[None, "mail"] == 22
    assert counts["billing", "mail"] == 10
    assert counts["support", "phone"] == 0


def test_what_overlaps_the_golden_set_is_never_shown(make_spec: MakeSpec) -> None:
    words = sentence(DRAW, 40)
    golden = [
        row(0, "billing"),
        row(501, "billing", text=words),
        row(502, "billing", group="g"),
    ]
    leaks = [
        row(0, "billing"),  # the same item
        row(501, "billing", text="something else altogether"),  # its id
        row(601, "billing", text=words.upper()),  # its text
        row(602, "billing", text=f"{words} nearly"),
        row(603, "billing", text=f"{sentence(DRAW)} {' '.join(words.split()[:13])}"),  # a run of it
        row(604, "billing", group="g"),  # its group
        row(605, "billing", synthetic=True),
        row(606, "billing"),  # withheld
    ]
    honest = [row(n, "billing") for n in range(1, 9)]
    pool = pool_of([*leaks, *honest], make_spec(), golden, withheld={"r606"})
    assert {one.id for one in pool.rows["billing", None]} == {one.id for one in honest}
    assert pool.counts["billing", None] == len(honest) + 4  # the ones found by their text alone, and the withheld one


def test_the_pool_does_not_depend_on_the_order_of_rows(make_spec: MakeSpec) -> None:
    many = [row(n, "billing") for n in range(300)]
    shuffled = list(many)
    random.Random(3).shuffle(shuffled)
    one, other = pool_of(many, make_spec()), pool_of(shuffled, make_spec())
    assert one == other
    assert len(one.rows["billing", None]) == 64


def test_classes_and_slices_are_filled_up_and_asked_for_in_a_fixed_order(make_spec: MakeSpec) -> None:
    spec = in_slices(
        make_spec, fill=[{"label": "billing", "rows": 2}], fill_classes_to=25, fill_slices_to=21
    )  # fmt: skip
    assert plan_fills(pool_of(rows(), spec), spec) == [
        Fill(label="billing", rows=2),
        Fill(label="support", rows=13),
        Fill(slice="phone", rows=1),
    ]


@pytest.mark.parametrize(
    ("fill", "what"),
    [
        ({"label": "support", "slice": "phone", "rows": 1}, None),  # like others of the class
        ({"slice": "fax", "rows": 1}, "slice 'fax'"),
        ({"label": "billing", "slice": "mail", "looks_like": "support", "rows": 1}, None),
    ],
)
def test_there_must_be_real_rows_to_write_like(make_spec: MakeSpec, fill: dict[str, object], what: str | None) -> None:
    spec = in_slices(make_spec, fill=[fill])
    pool = pool_of(rows(), spec)
    if what is None:
        assert plan_fills(pool, spec) == [Fill(**fill)]  # type: ignore[arg-type]
        return
    with pytest.raises(DataError, match=f"no real row of {what}"):
        plan_fills(pool, spec)


def test_a_label_without_rows_is_refused(make_spec: MakeSpec) -> None:
    spec = make_spec(fill=[{"label": "billing", "rows": 1, "looks_like": "support"}])
    with pytest.raises(DataError, match="no real row of class 'support'"):
        plan_fills(pool_of(rows()[:30], spec), spec)


def test_each_example_is_asked_for_with_other_shots(make_spec: MakeSpec) -> None:
    pool = pool_of(rows(), make_spec())
    wanted = list(wishes(Fill(label="support", rows=5), pool, TaskKind.CLASSIFY, already=0, count=3))
    assert [wish.number for wish in wanted] == [1, 2, 3]
    shown = [shot.id for wish in wanted for shot in wish.shots]
    assert len(shown) == len(set(shown)) == 12
    more = list(wishes(Fill(label="support", rows=5), pool, TaskKind.CLASSIFY, already=3, count=1))
    assert more[0].number == 4


def test_a_slice_gets_its_classes_in_proportion(make_spec: MakeSpec) -> None:
    spec = in_slices(make_spec)
    wanted = list(wishes(Fill(slice="mail", rows=22), pool_of(rows(), spec), TaskKind.CLASSIFY, already=0, count=22))
    labels = [wish.label for wish in wanted]
    assert (labels.count("billing"), labels.count("support")) == (10, 12)
    assert all(shot.target == wish.label and shot.slice == "mail" for wish in wanted for shot in wish.shots)


# -- prompts ------------------------------------------------------------------------------------------------------


def test_a_hard_negative_shows_both_classes_and_says_which_is_right() -> None:
    wish = Wish("billing", None, "support", (row(1, "billing"),), (row(2, "support"),))
    system, user = ask_for_example(CLASSIFY, wish)
    assert "Which team? The answer is exactly one of: billing, support." in system.content
    assert f"Real examples whose answer is billing:\n1. {row(1, 'billing').text}" in user.content
    assert f"Real examples whose answer is support:\n1. {row(2, 'support').text}" in user.content
    assert "Write one new example whose answer is billing, but that at first sight looks like one whose" in user.content


def test_long_shots_are_cut() -> None:
    wish = Wish("billing", shots=(row(1, "billing", text="x" * 5000),))
    assert f"{'x' * 2000}…" in ask_for_example(CLASSIFY, wish)[1].content
    assert "x" * 2001 not in ask_for_example(CLASSIFY, wish)[1].content


def test_shots_of_other_tasks_show_their_answers() -> None:
    wish = Wish(slice="mail", shots=(row(1, '{"amount": 12}', "mail", "12 only"),))
    assert 'from the slice mail:\n1. 12 only\nAnswer: {"amount": 12}' in ask_for_example(EXTRACT, wish)[1].content


def test_the_check_does_not_say_what_the_answer_should_be() -> None:
    system, user = ask_for_answer(CLASSIFY, "My bill.", None)
    assert user == Message("user", "My bill.")
    assert system.content.startswith("Which team? The answer is exactly one of: billing, support.")
    assert ask_for_answer(CHAT, "Why?", "Because.")[1].content == "<document>\nBecause.\n</document>\n\nWhy?"


def test_a_second_try_goes_on_from_the_first() -> None:
    first = ask_for_example(CLASSIFY, Wish("billing"))
    again = ask_again(first, '{"text": "no"}', "it is too short")
    assert again[:2] == first
    assert [turn.role for turn in again] == ["system", "user", "assistant", "user"]
    assert again[-1].content.startswith("This example was refused: it is too short.")


def test_a_runaway_example_is_not_sent_back_whole() -> None:
    again = ask_again(ask_for_example(CLASSIFY, Wish("billing")), "x" * 100_000, "it is too long")
    assert again[2].content == f"{'x' * 8000}…"
