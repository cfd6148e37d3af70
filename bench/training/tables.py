"""The tables and curves of README.md, from results.json."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.gate.__main__ import written
from bench.gate.tables import fill, table
from bench.training.compare import STOCK
from bench.training.flops import PEAKS
from bench.training.options import DEFAULT

Row = dict[str, Any]
HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
NOT_YET = "Not measured yet."
_PARTS = 5  # of a run, for the table of its losses
_SMOOTH = 8  # steps whose losses a point of a curve is the mean of
_COLOURS = ("#0b6e4f", "#c1121f", "#e09f3e", "#335c9e", "#7b2d8b")


def read_results() -> Row:
    """What was measured so far."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}


def write_results(results: Row) -> None:
    """Keep it."""
    RESULTS.write_text(written(results), encoding="utf-8")


def fill_readme(results: Row, readme: Path = HERE / "README.md") -> None:
    """Put tables into a README.md, and the curves beside it."""
    for task, picture in pictures(results).items():
        (readme.parent / f"{task}.svg").write_text(picture, encoding="utf-8")
    fill(readme, all_tables(results))


def all_tables(results: Row) -> dict[str, str]:
    """Every table by name; one that was not measured says so."""
    found = results.get("compare", [])
    return {
        "machine": machine(results),
        "compare": compared(found) if found else NOT_YET,
        "curves": curves(found) if found else NOT_YET,
        "options": options(results["options"]) if results.get("options") else NOT_YET,
        "gpu": gpu(results),
        "peaks": table(
            ["device", "dense bf16, TFLOP/s", "source"],
            [[peak.pattern.split(r"\b")[1], f"{peak.tflops:,g}", peak.source] for peak in PEAKS],
        ),
    }


def machine(results: Row) -> str:
    """What it ran on."""
    about = results.get("machine")
    if not about:
        return NOT_YET
    return ", ".join(f"{name} {value}" for name, value in about.items()) + "."


def compared(rows: Sequence[Row]) -> str:
    """Speed, memory and dev loss of each trainer; ratios are within a turn, so that drift of the machine cancels."""
    lines = []
    for task in _distinct(rows, "task"):
        of_task = [row for row in rows if row["task"] == task]
        stock = {row["seed"]: row for row in of_task if row["trainer"] == STOCK}
        for trainer in _distinct(of_task, "trainer"):
            own = [row for row in of_task if row["trainer"] == trainer]
            lines.append([
                task, trainer,
                _range([row["tokens_per_second"] for row in own], ",.0f"),
                _ratio(own, stock, "tokens_per_second"),
                f"{_middle(own, 'seconds'):,.0f}",
                f"{_middle(own, 'cpu_seconds'):,.0f}",
                f"{_middle(own, 'pause_seconds'):,.0f}",
                _range([row["peak_mb"] for row in own], ",.0f"),
                _ratio(own, stock, "peak_mb"),
                _mean_and_spread([row["dev_loss"] for row in own]),
            ])  # fmt: skip
    head = [
        "task", "trainer", "tokens/s", "× stock", "training, s", "processor, s", "looks, checkpoints, s",
        "peak memory, MB", "× stock", "dev loss",
    ]  # fmt: skip
    return table(head, lines)


def curves(rows: Sequence[Row]) -> str:
    """The pictures, and the mean training loss of each fifth of a run."""
    lines = []
    tasks = _distinct(rows, "task")
    for task in tasks:
        for trainer in _distinct(rows, "trainer"):
            own = [fifths(row["losses"]) for row in rows if (row["task"], row["trainer"]) == (task, trainer)]
            if own:
                columns = zip(*own, strict=True)
                lines.append([task, trainer, *(_mean_and_spread(list(one)) for one in columns)])
    head = ["task", "trainer", *(f"loss, fifth {number}" for number in range(1, _PARTS + 1))]
    images = " ".join(f"![training loss, {task}]({task}.svg)" for task in tasks)
    return f"{images}\n\n{table(head, lines)}"


def options(rows: Sequence[Row]) -> str:
    """Each option against the default of its turn."""
    lines = []
    for task in _distinct(rows, "task"):
        of_task = [row for row in rows if row["task"] == task]
        default = {row["seed"]: row for row in of_task if row["option"] == DEFAULT}
        for option in _distinct(of_task, "option"):
            own = [row for row in of_task if row["option"] == option]
            ran = [row for row in own if "tokens_per_second" in row]
            note = next((row.get("skipped") or row["stopped"] for row in own if row not in ran), "")
            if not ran:
                lines.append([task, option, *[""] * 6, _cell(note)])
                continue
            differences = [row["dev_loss"] - default[row["seed"]]["dev_loss"] for row in ran]
            lines.append([
                task, option,
                f"{_middle(ran, 'tokens_per_second'):,.0f}",
                _ratio(ran, default, "tokens_per_second"),
                f"{_middle(ran, 'process_seconds'):,.0f}",
                f"{_middle(ran, 'peak_mb'):,.0f}",
                _ratio(ran, default, "peak_mb"),
                "" if option == DEFAULT else f"{statistics.mean(differences):+.4f}",
                _cell(note),
            ])  # fmt: skip
    head = [
        "task", "option", "tokens/s", "× default", "whole process, s", "peak memory, MB", "× default",
        "dev loss, difference", "",
    ]  # fmt: skip
    return table(head, lines)


def gpu(results: Row) -> str:
    """The 8B model on a CUDA device, where there was one, and the small model."""
    rows = [*results.get("gpu", []), *results.get("gpu_small", [])]
    missing = "" if results.get("gpu") else "The GPU row is missing: no CUDA device was at hand. "
    if not rows:
        return missing + NOT_YET
    lines = []
    for device in _distinct(rows, "device"):
        own = [row for row in rows if row["device"] == device]
        stock = next((row for row in own if row["trainer"] == STOCK and not row["stopped"]), None)
        for row in own:
            about = [row["device"], row["model"], row["trainer"]]
            if row["stopped"]:
                lines.append([*about, *[""] * 6, _cell(row["stopped"])])
                continue
            lines.append([
                *about,
                f"{row['tokens_per_second']:,.0f} ({row['slowest']:,.0f} to {row['fastest']:,.0f})",
                f"{row['tokens_per_second'] / stock['tokens_per_second']:.2f}" if stock else "",
                f"{row['peak_gb']:.2f}",
                f"{row['peak_gb'] / stock['peak_gb']:.2f}" if stock else "",
                "" if row["share"] is None else f"{100 * row['share']:.1f}",
                f"{statistics.mean(row['losses'][-max(1, len(row['losses']) // 4) :]):.4f}",
                "",
            ])  # fmt: skip
    head = [
        "device", "model", "trainer", "tokens/s", "× stock", "peak memory, GB", "× stock", "share of bf16 peak, %",
        "loss, last quarter", "",
    ]  # fmt: skip
    return f"{missing}\n\n{table(head, lines)}".strip()


def fifths(losses: Sequence[float]) -> list[float]:
    """The mean of each fifth of a run's losses.

    Raises:
        ValueError: there are fewer than five.
    """
    if len(losses) < _PARTS:
        raise ValueError(f"a curve needs at least {_PARTS} losses, this one has {len(losses)}")
    cuts = [round(len(losses) * part / _PARTS) for part in range(_PARTS + 1)]
    return [statistics.mean(losses[start:end]) for start, end in pairwise(cuts)]


def pictures(results: Row) -> dict[str, str]:
    """For each task an SVG of the training losses, smoothed, the mean over the seeds."""
    rows = results.get("compare", [])
    made = {}
    for task in _distinct(rows, "task"):
        lines = {}
        for trainer in _distinct(rows, "trainer"):
            own = [row["losses"] for row in rows if (row["task"], row["trainer"]) == (task, trainer)]
            if own:
                lines[trainer] = smoothed([statistics.mean(at) for at in zip(*own, strict=True)])
        made[task] = draw(f"{task}: training loss, nats per answer token, by step", lines)
    return made


def smoothed(losses: Sequence[float]) -> list[float]:
    """The mean of each loss and the ones just before it."""
    return [statistics.mean(losses[max(0, at - _SMOOTH + 1) : at + 1]) for at in range(len(losses))]


def draw(title: str, lines: dict[str, list[float]]) -> str:
    """A line each, as SVG."""
    width, height, left, top = 720, 360, 48, 32
    highest = max(max(line) for line in lines.values()) or 1.0
    longest = max(2, *(len(line) for line in lines.values()))
    across, down = width - left - 16, height - top - 28
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12"><rect width="{width}" height="{height}" fill="white"/>'
        f'<text x="{left}" y="18" font-size="14">{title}</text>'
    ]
    for tick in range(5):
        y = top + down * tick / 4
        parts.append(
            f'<line x1="{left}" x2="{left + across}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
            f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{highest * (1 - tick / 4):.2f}</text>'
        )
    parts.append(f'<text x="{left + across}" y="{height - 8}" text-anchor="end">step {longest}</text>')
    for number, (name, line) in enumerate(lines.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        points = " ".join(
            f"{left + across * at / (longest - 1):.1f},{top + down * (1 - loss / highest):.1f}"
            for at, loss in enumerate(line)
        )
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.8" points="{points}"/>')
        y = top + 16 + 18 * number
        parts.append(f'<text x="{left + across - 4}" y="{y}" text-anchor="end" fill="{colour}">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _distinct(rows: Sequence[Row], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def _middle(rows: Sequence[Row], key: str) -> float:
    return float(statistics.median(row[key] for row in rows))


def _range(values: Sequence[float], form: str) -> str:
    middle = format(statistics.median(values), form)
    return middle if len(values) == 1 else f"{middle} ({format(min(values), form)} to {format(max(values), form)})"


def _ratio(rows: Sequence[Row], others: dict[int, Row], key: str) -> str:
    ratios = [row[key] / others[row["seed"]][key] for row in rows if row["seed"] in others]
    return f"{statistics.median(ratios):.2f}" if ratios else ""


def _mean_and_spread(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.4f}"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")[:160]
