"""Quotas and draws by stratum."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from tasks.contracts.rows import Message, Row
from tasks.data.draw import content_hash, draw, make_units, quotas, stratum
from tests.data.toy_data import CHAT, CLASSIFY


@pytest.mark.parametrize(
    ("counts", "total", "minimum", "expected"),
    [
        ({"a": 60, "b": 40}, 10, 0, {"a": 6, "b": 4}),
        ({"a": 1, "b": 1, "c": 1}, 2, 0, {"a": 1, "b": 1, "c": 0}),
        ({"a": 900, "b": 80, "c": 20}, 100, 10, {"a": 80, "b": 10, "c": 10}),
        ({"a": 900, "b": 80, "c": 12}, 100, 10, {"a": 84, "b": 10, "c": 6}),  # no more than half of c
        ({"a": 5, "b": 5}, 100, 10, {"a": 5, "b": 5}),  # there is no more
        ({"a": 100, "b": 100}, 4, 10, {"a": 2, "b": 2}),  # not enough for the minimum
        ({"a": 99, "b": 1}, 10, 1, {"a": 10, "b": 0}),
        ({"": 7}, 3, 10, {"": 3}),
        ({"a": 3}, 0, 10, {"a": 0}),
    ],
)
def test_quotas(counts: dict[str, int], total: int, minimum: int, expected: dict[str, int]) -> None:
    assert quotas(counts, total, minimum) == expected


def test_quotas_always_add_up() -> None:
    random_ = random.Random(2)
    for _ in range(300):
        counts = {str(n): random_.randrange(1, 200) for n in range(random_.randrange(1, 9))}
        total = random_.randrange(0, 400)
        found = quotas(counts, total, random_.randrange(0, 20))
        assert sum(found.values()) == min(total, sum(counts.values()))
        assert all(0 <= found[name] <= counts[name] for name in counts)


def test_units_stay_whole_and_quotas_hold() -> None:
    members = [[0, 1, 2], [3], [4, 5], [6], [7], [8, 9]]
    units = make_units(members, [f"h{n}" for n in range(10)], ["a", "a", "b", "a", "b", "b", "b", "a", "a", "b"])
    taken, left = draw(units, {"a": 2, "b": 2})
    assert sorted(unit.members for unit in taken + left) == [(0, 1, 2), (3,), (4, 5), (6,), (7,), (8, 9)]
    count = sum((unit.strata for unit in taken), Counter[str]())
    assert count["a"] <= 2
    assert count["b"] <= 2
    for unit in left:
        assert any(count[name] + number > 2 for name, number in unit.strata.items())


def test_units_come_in_the_order_of_their_content() -> None:
    hashes, strata = [f"h{n}" for n in range(6)], ["a"] * 6
    one = make_units([[0, 1], [2], [3], [4, 5]], hashes, strata)
    other = make_units([[5, 4], [3], [1, 0], [2]], hashes, strata)
    assert [unit.members for unit in one] == [unit.members for unit in other]


def test_the_content_is_all_but_id_and_line() -> None:
    row = Row("a", 1, (Message("user", "t"),), "x", "g", "s")
    assert content_hash(row) == content_hash(Row("b", 2, (Message("user", "t"),), "x", "g", "s"))
    for other in (
        Row("a", 1, (Message("user", "u"),), "x", "g", "s"),
        Row("a", 1, (Message("system", "t"),), "x", "g", "s"),
        Row("a", 1, (Message("user", "t"),), "y", "g", "s"),
        Row("a", 1, (Message("user", "t"),), "x", None, "s"),
        Row("a", 1, (Message("user", "t"),), "x", "g", None),
    ):
        assert content_hash(other) != content_hash(row)


def test_rows_are_drawn_by_label_or_slice() -> None:
    row = Row("a", 1, (Message("user", "t"),), "billing", None, "web")
    assert (stratum(row, CLASSIFY), stratum(row, CHAT)) == ("billing", "web")
    assert stratum(Row("a", 1, (Message("user", "t"),), "x"), CHAT) == ""
