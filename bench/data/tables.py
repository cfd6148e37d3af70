"""The tables of README.md, from results.json."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from bench.gate.tables import table

Row = dict[str, Any]


def all_tables(results: Row) -> dict[str, str]:
    """Every table by name; those that were measured."""
    made: dict[str, str] = {}
    if found := results.get("stages"):
        made["stages"] = stages(found)
        made["checks"] = checks(found)
    if found := results.get("peers"):
        made["peers"] = peers(found)
        made["bands"] = bands(found)
    if found := results.get("semantic"):
        made["semantic"] = semantic(found)
        made["index"] = index(found)
    return made


def stages(found: list[Row]) -> str:
    """Speed and memory of each stage by number of rows, and how the time grows."""
    lines = []
    for stage in dict.fromkeys(row["stage"] for row in found):
        before: Row | None = None
        for row in (row for row in found if row["stage"] == stage):
            lines.append([
                stage, f"{row['rows']:,}", f"{row['seconds']:,.1f}", f"{row['rows'] / row['seconds']:,.0f}",
                f"{row['peak_mb']:,.0f}", f"{row['processes']}", _exponent(before, row),
            ])  # fmt: skip
            before = row
    head = ["stage", "rows", "seconds", "rows/s", "peak memory, MB", "processes", "growth exponent"]
    return table(head, lines)


def checks(found: list[Row]) -> str:
    """Recall and precision of each check, largest number of rows."""
    largest = max((row for row in found if "checks" in row), key=lambda row: row["rows"], default=None)
    if largest is None:
        return ""
    lines = [
        [
            one["check"], one["fault"], f"{one['planted']:,}", f"{one['found']:,}",
            _share(one["found"], one["planted"]),
            "" if one["flagged"] is None else f"{one['flagged']:,}",
            "" if one["flagged"] is None else _share(one["right"], one["flagged"]),
        ]
        for one in largest["checks"]
    ]  # fmt: skip
    return table(["check", "planted fault", "planted", "found", "recall, %", "flagged", "precision, %"], lines)


def peers(found: list[Row]) -> str:
    """Time, memory, precision and recall of the tools on the same rows."""
    lines = [
        [
            row["tool"], row["options"], f"{row['rows']:,}", f"{row['seconds']:,.1f}",
            f"{row['rows'] / row['seconds']:,.0f}",
            f"{row['peak_mb']:,.0f}", f"{row['removed']:,}", _share(row["right"], row["removed"]), *_recalls(row),
        ]
        for row in found
    ]  # fmt: skip
    head = ["tool", "set-up", "rows", "seconds", "rows/s", "peak memory, MB", "taken out", "precision, %", "recall, %"]
    return table(head, lines)


def bands(found: list[Row]) -> str:
    """Share of the planted pairs that were taken for duplicates, by their true similarity."""
    largest: dict[tuple[str, str], Row] = {}
    for row in found:
        key = row["tool"], row["options"]
        if key not in largest or row["rows"] > largest[key]["rows"]:
            largest[key] = row
    lines = [
        [tool, options, f"{row['rows']:,}", *(_pair(row, fault) for fault in _BANDS)]
        for (tool, options), row in largest.items()
    ]
    return table(["tool", "set-up", "rows", *(f"{title}, %" for title in _BANDS.values())], lines)


def semantic(found: Row) -> str:
    """Precision and recall on planted paraphrases by model and threshold."""
    lines = [
        [
            row["model"], f"{row['threshold']:.2f}", f"{row['planted']:,}", f"{row['found']:,}",
            _share(row["found"], row["planted"]), f"{row['pairs']:,}", _share(row["right"], row["pairs"]),
        ]
        for row in found["thresholds"]
    ]  # fmt: skip
    return table(["model", "threshold", "planted", "found", "recall, %", "pairs", "precision, %"], lines)


def index(found: Row) -> str:
    """The approximate index beside the comparison of all pairs."""
    lines = [
        [
            f"{row['rows']:,}", f"{row['threshold']:.2f}", f"{row['exact_seconds']:,.1f}",
            f"{row['index_seconds']:,.1f}",
            f"{row['joined']:,}", f"{row['joined_too']:,}", _share(row["joined_too"], row["joined"]),
        ]
        for row in found["index"]
    ]  # fmt: skip
    head = ["rows", "threshold", "all pairs, s", "index, s", "links", "of them by the index", "recall, %"]
    return table(head, lines)


_SAME = ("exact_duplicate", "near_80", "near_85", "near_90")
_BANDS = {
    "hard_negative": "0.70 to 0.80 (should be none)",
    "near_80": "0.80 to 0.85",
    "near_85": "0.85 to 0.90",
    "near_90": "0.90 to 1",
    "exact_duplicate": "the same",
    "paraphrase": "other words",
}


def _recalls(row: Row) -> Iterable[str]:
    pairs = [row["pairs"][fault] for fault in _SAME]
    return [_share(sum(one["found"] for one in pairs), sum(one["planted"] for one in pairs))]


def _pair(row: Row, fault: str) -> str:
    one = row["pairs"][fault]
    return _share(one["found"], one["planted"])


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}" if whole else "—"


def _exponent(before: Row | None, row: Row) -> str:
    if before is None:
        return ""
    return f"{math.log(row['seconds'] / before['seconds']) / math.log(row['rows'] / before['rows']):.2f}"
