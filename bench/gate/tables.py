"""The tables of README.md, from results.json."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.gate.calibrate import ALPHA, LOOKS, POLICIES

Row = dict[str, Any]
_MARK = " ✗"  # behind a rate whose interval lies above alpha as a whole


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown, numbers to the right."""
    lines = [list(head), ["---", *["---:"] * (len(head) - 1)], *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(row: Row, alpha: float | None = ALPHA) -> str:
    """A rate with its Monte-Carlo standard error, marked where its whole interval lies above alpha."""
    mark = _MARK if alpha is not None and row["low"] > alpha else ""
    return f"{100 * row['rate']:.2f} ± {100 * row['error']:.2f}{mark}"


def short(row: Row) -> str:
    """A rate with its standard error, one digit each."""
    return f"{100 * row['rate']:.1f} ± {100 * row['error']:.1f}"


def policies(rows: list[Row]) -> str:
    """Per policy and number of looks: all histories together, and the worst cell."""
    lines = []
    for kind, what in (("alike", "sides alike"), ("lopsided", "lopsided")):
        for policy in POLICIES:
            for looks in LOOKS if policy != "off" else LOOKS[:1]:
                chosen = [row for row in rows if _is(row, policy, looks) and _lopsided(row) == (kind == "lopsided")]
                if not chosen:
                    continue
                hits, trials = (sum(row[key] for row in chosen) for key in ("hits", "trials"))
                worst = max(chosen, key=lambda row: row["low"])
                above = sum(row["low"] > ALPHA for row in chosen)
                lines.append([
                    what, policy, f"{looks}", f"{len(chosen)}", f"{trials:,}", f"{100 * hits / trials:.2f}",
                    percent(worst), f"{100 * worst['low']:.2f} to {100 * worst['high']:.2f}", f"{above}",
                ])  # fmt: skip
    head = [
        "nulls",
        "policy",
        "looks",
        "cells",
        "histories",
        "mean, %",
        "worst cell, %",
        "its 95 % interval",
        "cells ✗",
    ]
    return table(head, lines)


def counted(rows: list[Row]) -> str:
    """Lowest and highest rate over accuracies, discordances and recipes, by size and limit."""
    lines = []
    sizes = sorted({row["n"] for row in rows if row["kind"] == "counted"})
    for limit in (0.0, 0.02, -0.02):
        for n in sizes:
            line = [f"{100 * limit:+.0f} points" if limit else "better at all", f"{n:,}"]
            for policy, looks in _COLUMNS:
                chosen = [
                    row for row in rows
                    if row["kind"] == "counted" and row["n"] == n and row["limit"] == limit and _is(row, policy, looks)
                ]  # fmt: skip
                rates = [row["rate"] for row in chosen]
                mark = _MARK if any(row["low"] > ALPHA for row in chosen) else ""
                line.append(f"{100 * min(rates):.2f} to {100 * max(rates):.2f}{mark}" if rates else "—")
            lines.append(line)
    return table(["limit", "items", *_titles()], lines)


def arrays(rows: list[Row], lopsided: bool) -> str:
    """Every cell that is judged on arrays: groups, graded scores, macro-F1, expenses."""
    cells: dict[tuple[str, int, float], list[Row]] = {}
    for row in rows:
        if row["kind"] in ("summed", "classes", "cheaper") and _lopsided(row) == lopsided:
            cells.setdefault((row["name"], row["n"], row["limit"]), []).append(row)
    lines = []
    for (name, n, limit), found in cells.items():
        shown = f" ({100 * limit:+.0f} points)" if limit and found[0]["kind"] == "summed" else ""
        most = max(row["looks"] for row in found)
        line = [f"{name}{shown}", f"{n:,}", f"{most}", f"{found[0]['trials']:,}"]
        for policy, looks in _COLUMNS:
            chosen = [row for row in found if _is(row, policy, min(looks, most))]
            line.append(percent(chosen[0]) if chosen else "—")
        lines.append(line)
    return table(["candidates", "items", "looks", "histories", *_titles(most=True)], lines)


def naive(rows: list[Row]) -> str:
    """A gate that compares two accuracies, on the same histories."""
    lines = []
    for policy, name in (("naive >", "higher than the baseline's"), ("naive >=", "at least as high")):
        for shared, who in ((0.0, "each of its own"), (0.8, "of one recipe")):
            line = [name, who]
            for looks in LOOKS:
                chosen = [
                    row["rate"] for row in rows
                    if row["policy"] == policy and row["looks"] == looks and row["shared"] == shared
                    and row["limit"] == 0
                ]  # fmt: skip
                line.append(
                    f"{100 * sum(chosen) / len(chosen):.1f} ({100 * min(chosen):.1f} to {100 * max(chosen):.1f})"
                )
            lines.append(line)
    return table(["promotes if the accuracy is", "candidates", *(f"{looks} looks, %" for looks in LOOKS)], lines)


def attacks(rows: list[Row]) -> str:
    """Somebody who tunes against the verdicts."""
    lines = [
        [_SEES[row["sees"]], row["policy"], f"{row['looks']}", f"{row['trials']:,}", percent(row)]
        for row in rows
        if row["kind"] == "attack"
    ]
    return table(["a verdict lets out", "policy", "looks", "histories", "promoted, %"], lines)


def power(rows: list[Row], family: str) -> str:
    """One row a scenario, one column a gate."""
    chosen = [row for row in rows if row["family"] == family]
    gates = list(dict.fromkeys(row["gate"] for row in chosen))
    lines = []
    for scenario in dict.fromkeys(row["scenario"] for row in chosen):
        found = {row["gate"]: row for row in chosen if row["scenario"] == scenario}
        one = next(iter(found.values()))
        truth = f"{100 * one['truth']:+.0f}" if one["truth"] else "0"
        null = one["truth"] <= one["limit"]
        line = [one["name"], f"{one['n']:,}", f"{truth} (false)" if null else truth, f"{one['trials']:,}"]
        for gate in gates:
            row = found.get(gate)
            line.append("—" if row is None else short(row) + (_MARK if null and row["low"] > ALPHA else ""))
        lines.append(line)
    return table(["data", "items", "true points", "data sets", *(f"{gate}, %" for gate in gates)], lines)


def ten_looks(rows: list[Row]) -> str:
    """Any of ten candidates let through."""
    return table(
        ["gate", "histories", "any let through, %"], ([r["gate"], f"{r['trials']:,}", percent(r)] for r in rows)
    )


def macro_f1(rows: list[Row]) -> str:
    """Goldgate's power on macro-F1."""
    lines = ([f"{r['n']:,}", f"{100 * r['truth']:+.1f}", f"{r['trials']:,}", short(r)] for r in rows)
    return table(["items", "true points of macro-F1", "data sets", "Goldgate, %"], lines)


def times(rows: list[Row]) -> str:
    """Milliseconds, and how they compare."""
    lines = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        found = {row["gate"]: 1000 * row["seconds"] for row in rows if row["kind"] == kind}
        ours = found["Goldgate"]
        lines.append(
            [kind, f"{ours:.1f}"] + [f"{found[gate]:.1f} ({found[gate] / ours:.2f} of ours)" for gate in _PEERS]
        )
    return table(["data", "Goldgate, ms", *(f"{gate}, ms" for gate in _PEERS)], lines)


def speed(rows: list[Row]) -> str:
    """Seconds and memory of the large decision."""
    lines = [
        [row["gate"], row["what"], f"{row['decide']:.2f}", f"{row['processor']:.2f}",
         f"{row['decide'] + row['imports']:.2f}", f"{row['peak_mb']:.0f}"]
        for row in rows
    ]  # fmt: skip
    head = ["gate", "decision", "seconds", "of it processor", "seconds with imports", "peak memory, MB"]
    return table(head, lines)


def all_tables(results: Row) -> dict[str, str]:
    """Every table by name; those that were measured."""
    made: dict[str, str] = {}
    if rows := results.get("calibrate"):
        made |= {
            "policies": policies(rows), "counted": counted(rows), "alike": arrays(rows, lopsided=False),
            "lopsided": arrays(rows, lopsided=True), "naive": naive(rows), "attacks": attacks(rows),
        }  # fmt: skip
    if found := results.get("power"):
        for family in dict.fromkeys(row["family"] for row in found["scenarios"]):
            made["power " + family] = power(found["scenarios"], family)
        made |= {
            "ten looks": ten_looks(found["ten_looks"]), "macro-f1": macro_f1(found["macro_f1"]),
            "times": times(found["times"]),
        }  # fmt: skip
    if rows := results.get("speed"):
        made["speed"] = speed(rows)
    return made


def fill(readme: Path, made: dict[str, str]) -> None:
    """Put tables between their markers."""
    text = readme.read_text(encoding="utf-8")
    for name, body in made.items():
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        pattern = re.escape(start) + ".*?" + re.escape(end)
        assert re.search(pattern, text, re.DOTALL), f"README.md has no place for the table {name!r}"
        text = re.sub(pattern, lambda _, b=body, s=start, e=end: f"{s}\n{b}\n{e}", text, flags=re.DOTALL)
    readme.write_text(text, encoding="utf-8")


_PEERS = ("evalsig", "statgate")
_SEES = {
    "accuracy": "the candidate's accuracy",
    "ladder": "promoted or not (the ladder)",
    "items": "which items were right",
}
_COLUMNS = (("alpha_spending", 1), ("alpha_spending", 52), ("bonferroni", 52), ("ladder", 52), ("off", 1))


def _titles(most: bool = False) -> list[str]:
    return [
        f"{policy}, {'all looks' if most and looks > 1 else f'{looks} look' + 's' * (looks > 1)}, %"
        for policy, looks in _COLUMNS
    ]


def _is(row: Row, policy: str, looks: int) -> bool:
    return bool(row["kind"] != "attack" and row["policy"] == policy and row["looks"] == looks)


def _lopsided(row: Row) -> bool:
    return bool(row.get("lopsided", False))
