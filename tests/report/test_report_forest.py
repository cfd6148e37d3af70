"""The forest plot: what stands where, and on which scale."""

from __future__ import annotations

from typing import Any

import pytest

from tasks.contracts.references import Ask, MetricComparison, Status, Verdict
from tasks.report.forest import MAX_ROWS, ForestRow, alone, forest
from tests.report.example import example_reports

REPORTS = example_reports()


def groups_of(verdict: Verdict) -> dict[str, list[ForestRow]]:
    return {group.title: group.rows for group in forest(verdict).groups}


def test_requirements_come_first_and_what_is_not_asked_stays_for_information() -> None:
    groups = groups_of(REPORTS["promote"].verdict)
    named = {title: [(row.name, row.where) for row in rows] for title, rows in groups.items()}
    assert named == {
        "What decides": [("Exact match", "")],
        "Guards": [
            ("Exact match", "slice phone"), ("Valid output", ""), ("Exact match", "suite general"), ("Latency", ""),
        ],
        "Slices (for information)": [
            ("Exact match", "slice branch"), ("Exact match", "slice letter"), ("Exact match", "slice web"),
        ],
        "Other metrics (for information)": [("Macro-F1", ""), ("Valid output", "")],  # its floor says nothing of a loss
    }  # fmt: skip


def test_a_suite_that_nothing_is_asked_of_is_for_information() -> None:
    verdict = REPORTS["promote"].verdict
    kept = tuple(one for one in verdict.requirements if one.suite is None)
    groups = groups_of(verdict.model_copy(update={"requirements": kept}))
    assert [(row.where, row.asked, row.status) for row in groups["Suites (for information)"]] == [
        ("suite general", "", "")
    ]


def test_status_is_told_in_words_and_rows_hold_their_numbers() -> None:
    verdict = REPORTS["reject"].verdict
    rows = groups_of(verdict)["Guards"]
    assert {row.where: row.word for row in rows if row.where.startswith("slice")} == {
        "slice branch": "open", "slice letter": "shown", "slice phone": "failed", "slice web": "shown",
    }  # fmt: skip
    phone = next(row for row in rows if row.where == "slice phone")
    values = next(row for row in verdict.metrics if row.slice == "phone")
    assert phone.baseline == f"{100 * values.baseline:.1f} %"
    assert phone.asked == "loses less than 8.0 points"
    assert phone.size == f"{values.n} items"
    assert phone.status == "failed"


def test_groups_are_counted() -> None:
    verdict = REPORTS["inconclusive"].verdict
    groups = groups_of(verdict)
    assert groups["What decides"][0].size == "300 items in 120 groups"
    assert groups["Other metrics (for information)"][0].size == "300 items in 120 groups"


def test_marks_lie_on_the_common_scale() -> None:
    found = forest(REPORTS["promote"].verdict)
    ticks = {tick.text: tick.at for tick in found.ticks}
    row = next(row for group in found.groups for row in group.rows if row.where == "slice phone")
    assert row.mark.origin == ticks["0"]
    assert row.mark.limit is not None
    assert row.mark.limit < ticks["0"] < row.mark.left < row.mark.dot < row.mark.left + row.mark.width
    points = (ticks["+20"] - ticks["0"]) / 20
    assert row.mark.limit == pytest.approx(ticks["0"] - 5 * points, abs=0.01)
    assert not row.mark.own


def test_floors_and_ratios_have_a_scale_of_their_own() -> None:
    rows = {row.name: row for row in groups_of(REPORTS["promote"].verdict)["Guards"] if not row.where}
    floor, ratio = rows["Valid output"].mark, rows["Latency"].mark
    assert [tick.text for tick in floor.ticks] == ["90 %", "95 %", "100 %"]
    assert (floor.limit, floor.origin, floor.dot, floor.own) == (0.0, None, 100.0, True)
    assert [tick.text for tick in ratio.ticks] == ["0.00 ×", "1.00 ×", "2.00 ×"]
    assert (ratio.limit, ratio.origin, ratio.own) == (60.0, 50.0, True)
    assert rows["Latency"].found == "0.19 ×"


def test_an_endless_ratio_is_cut_at_the_end_of_its_scale() -> None:
    verdict = REPORTS["cheaper"].verdict
    saving = next(one for one in verdict.requirements if one.ask is Ask.RATIO)
    endless = saving.model_copy(update={"high": float("inf"), "status": Status.OPEN})
    mark = alone(endless)
    assert mark.cut_high
    assert mark.left + mark.width == 100


def slice_row(name: str, difference: float, half: float) -> MetricComparison:
    plain: dict[str, Any] = {f"{side}{end}": 0.5 for side in ("baseline", "candidate") for end in ("", "_low", "_high")}
    return MetricComparison(
        metric="exact_match", slice=name, difference=difference, low=difference - half, high=difference + half,
        confidence=0.9, method="exact", n=5, **plain,
    )  # fmt: skip


def test_a_wide_slice_is_cut_and_does_not_press_the_rest_together() -> None:
    verdict = REPORTS["approved"].verdict
    wide = slice_row("tiny", -0.2, 0.75)
    found = forest(verdict.model_copy(update={"metrics": (*verdict.metrics, wide)}))
    tiny = next(row for group in found.groups for row in group.rows if row.where == "slice tiny")
    assert tiny.mark.cut_low
    assert (tiny.mark.left, tiny.word) == (0.0, "not told apart")
    assert tiny.interval == "−95.0 to +55.0"
    assert found.groups[0].rows[0].mark.width > 12
    plain = forest(verdict).groups[0].rows[0]
    assert not plain.mark.cut_low
    assert not plain.mark.cut_high


@pytest.mark.parametrize(
    ("difference", "word"), [(0.3, "above 0"), (-0.3, "below 0"), (0.05, "not told apart"), (0.1, "not told apart")]
)
def test_what_is_for_information_says_where_its_interval_lies(difference: float, word: str) -> None:
    verdict = REPORTS["approved"].verdict
    row = slice_row("x", difference, 0.1)
    told = groups_of(verdict.model_copy(update={"metrics": (*verdict.metrics, row)}))["Slices (for information)"]
    assert [one.word for one in told] == [word]


def test_of_many_slices_the_lowest_are_shown_and_the_others_counted() -> None:
    verdict = REPORTS["approved"].verdict
    many = tuple(slice_row(f"s{number:03d}", number / 1000, 0.1) for number in reversed(range(100)))
    group = next(
        one
        for one in forest(verdict.model_copy(update={"metrics": (*verdict.metrics, *many)})).groups
        if one.title.startswith("Slices")
    )
    assert group.left_out == 100 - MAX_ROWS
    assert {row.where for row in group.rows} == {f"slice s{number:03d}" for number in range(MAX_ROWS)}


def test_fields_are_left_to_their_own_table_unless_one_decides() -> None:
    told = groups_of(REPORTS["extract"].verdict)["Other metrics (for information)"]
    assert [row.name for row in told] == ["Field match", "Schema valid", "Valid output"]
