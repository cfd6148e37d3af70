"""The page of the Data Docs that people open: one HTML file that holds the whole result and loads nothing.

Great Expectations' own pages lie beside it. Those load style sheets and scripts from the web, and their index shows
nothing without them; and where a page is shown in a sandboxed frame, as MLflow does, no link leads from one to another.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

INDEX = "index.html"
MAX_ROWS = 50  # refused rows that are shown; all of them are in the quarantine file
MAX_VALUES = 10  # values that are shown of each expectation, the most frequent ones
_LONG = 200  # characters of a value


class Finding(NamedTuple):
    """An expectation and what was found.

    Attributes:
        says: the expectation in words.
        call: the same as Great Expectations names it.
        checked: rows that have the fact that it is about.
        failed: rows among them that do not meet it; None for an expectation about the rows as a whole.
        observed: values that do not meet it with how often they came up; of an expectation about the whole, its value.
        other_values: how many more values there are.
    """

    met: bool
    says: str
    call: str
    checked: int
    failed: int | None
    observed: list[tuple[str, int]]
    other_values: int


def write_page(
    folder: Path, result: Mapping[str, Any], quarantine: Path, *, rows: int, quarantined: int, limit: float
) -> None:
    """Write `index.html` into the folder of a Data Docs site.

    Args:
        folder: the site; the other pages in it are listed.
        result: Great Expectations' result of the validation, as plain JSON.
        quarantine: the quarantine file; line, id and reasons of its first rows are shown, and not their texts.
        rows: how many rows are valid.
        quarantined: how many are not.
        limit: the share of quarantined rows above which a run stops.
    """
    findings = sorted((_finding(outcome) for outcome in result["results"]), key=lambda one: one.met)
    total = rows + quarantined
    with quarantine.open(encoding="utf-8") as lines:
        refused = [json.loads(line) for line in islice(lines, MAX_ROWS)]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["share"] = _share
    html = environment.get_template("data_docs.html.j2").render(
        suite=result["suite_name"],
        meta=result["meta"],
        findings=findings,
        met=sum(one.met for one in findings),
        total=total,
        rows=rows,
        quarantined=quarantined,
        limit=limit,
        state="stopped" if quarantined > limit * total or not rows else "parted" if quarantined else "passed",
        refused=refused,
        pages=sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.html") if path.name != INDEX),
    )
    (folder / INDEX).write_text(html, encoding="utf-8", errors="backslashreplace")


def _finding(outcome: Mapping[str, Any]) -> Finding:
    config, found = outcome["expectation_config"], outcome["result"]
    arguments = [f"{name}={value!r}" for name, value in config["kwargs"].items() if name != "batch_id"]
    values: Counter[str] = Counter()
    for value, count in outcome.get("unexpected_values", {}).get("counts", ()):
        values[_value(value)] += count
    observed = values.most_common(MAX_VALUES)
    if "observed_value" in found:
        observed = [(_value(found["observed_value"]), 1)]
    return Finding(
        met=outcome["success"],
        says=(config.get("notes") or config["meta"]["reason"]).replace("`", ""),
        call=_cut(f"{config['type']}({', '.join(arguments)})"),
        checked=found.get("element_count", 0) - (found.get("missing_count") or 0),
        failed=found.get("unexpected_count"),
        observed=observed,
        other_values=max(0, len(values) - MAX_VALUES),
    )


def _value(value: Any) -> str:
    return _cut(f"{value:g}" if isinstance(value, float) else str(value))


def _cut(text: str) -> str:
    return f"{text[:_LONG]}…" if len(text) > _LONG else text


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "0.0 %"
