"""The data report as a page: one HTML file that holds all it shows and loads nothing; and the same as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tasks.contracts.numbers import percent
from tasks.data.changes import Changes
from tasks.data.rejected import say_code
from tasks.data.report import ClassRow, DataReport

HTML = "data_report.html"
JSON = "data.json"
_PAGE_ROWS = 60  # lines of a table on the page; the JSON has all of them
_STAGES = ClassRow._fields[1:]


def write_report(folder: Path, report: DataReport) -> Path:
    """Write `data_report.html` and `data.json` into a folder; return the page."""
    (folder / JSON).write_text(json.dumps(report.record(), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    (folder / HTML).write_text(render(report), encoding="utf-8", errors="backslashreplace")
    return folder / HTML


def render(report: DataReport) -> str:
    """The page. All text from data is escaped; nothing is loaded from anywhere."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(said=say_code, share=_share, width=_width, number=_number)
    shown = [step for step in report.steps[1:] if step.removed]
    return environment.get_template("data_report.html.j2").render(
        report=report,
        about=report.about,
        steps=shown,
        most=max((one.rows for one in (*report.rejected, *report.removed)), default=1),
        most_told=max((one.rows for one in report.told), default=1),
        not_found=[step.code for step in report.steps[1:] if not step.removed],
        classes=report.classes[:_PAGE_ROWS],
        class_shares=_shares(report.classes),
        stages=[stage for stage in _STAGES if any(getattr(one, stage) is not None for one in report.classes)],
        stage_at={stage: number for number, stage in enumerate(_STAGES, start=1)},
        tallest={one: max(count for _, count in one.histogram) or 1 for one in report.lengths},
        places=_places(report.changes),
        state="stopped" if report.about.refusal else "parted" if report.quarantined or report.told else "passed",
        page_rows=_PAGE_ROWS,
    )


def read_record(folder: Path) -> dict[str, Any]:
    """The report as `write_report` wrote it into a folder, as plain JSON."""
    return dict(json.loads((folder / JSON).read_text(encoding="utf-8")))


def report_markdown(record: Mapping[str, Any], page: str) -> str:
    """The way of the rows as a table, what is new, and where the page is."""
    lines = [f"**{record['funnel']}**", "", "| step | rows | left |", "|---|---:|---:|"]
    for step in record["steps"]:
        removed = f"−{step['removed']:,}" if step["removed"] else ""
        if removed or step["code"] == "read":
            lines.append(f"| {say_code(step['code'])} | {removed} | {step['left']:,} |")
    if record["since_last"] is not None:
        lines += ["", f"New since the last data of this task: {record['since_last']}."]
    lines += ["", *(f"- {said}" for said in record["about"]["not_looked_for"])]
    return "\n".join([*lines, "", f"Data report: `{page}`", ""])


def _shares(classes: Sequence[ClassRow]) -> dict[str, int]:
    """The rows of all classes at each stage."""
    return {stage: sum(getattr(one, stage) or 0 for one in classes) for stage in _STAGES}


def _places(changes: Changes | None) -> list[tuple[str, int, int]]:
    """Where rows went then and today; train and dev first, then what has most rows."""
    if changes is None:
        return []
    order = {"train": 0, "dev": 1}
    ranked = sorted(changes.outcomes.items(), key=lambda item: (order.get(item[0], 2), -max(item[1]), item[0]))
    return [(name, *counts) for name, counts in ranked]


def _share(part: float, whole: float) -> str:
    return percent(part / whole) if whole else percent(0.0)


def _width(part: float, whole: float) -> str:
    return f"{100 * part / whole:.3f}%" if whole else "0%"


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"
