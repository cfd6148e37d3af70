"""The page of the Data Docs: it holds the whole result itself, and loads nothing."""

from __future__ import annotations

import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tasks.data.docs import MAX_ROWS, MAX_VALUES, write_page
from tests.data.test_validate import check
from tests.data.toy_data import rows


class Page(HTMLParser):
    """Tags, addresses that a tag names, and the text outside of the style sheet."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.words: list[str] = []
        self._tag = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._tag = tag
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]

    def handle_endtag(self, tag: str) -> None:
        self._tag = ""

    def handle_data(self, data: str) -> None:
        if self._tag != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def result_of(*outcomes: dict[str, Any]) -> dict[str, Any]:
    """A result of Great Expectations, as far as the page reads it."""
    return {
        "suite_name": "training_rows",
        "results": [
            {
                "success": not outcome.get("unexpected_list"),
                "unexpected_values": {"counts": Counter(outcome.get("unexpected_list", ())).most_common()},
                "expectation_config": {
                    "type": "expect_column_values_to_be_in_set",
                    "kwargs": {"batch_id": "b", "column": "target", "value_set": ["a", "b"]},
                    "meta": {"code": "label_unknown", "reason": "unknown"},
                    "notes": "Each label is one of the task's.",
                },
                "result": {"element_count": 100, "missing_count": 0, "unexpected_count": 0}
                | {name: value for name, value in outcome.items() if name != "unexpected_list"},
            }
            for outcome in outcomes
        ],
        "meta": {"great_expectations_version": "1.2.3", "validation_time": "2026-11-22T14:57:01.5+00:00"},
    }


def written(folder: Path, result: dict[str, Any], refused: list[dict[str, Any]], *, good: int = 98) -> Page:
    quarantine = folder / "quarantine.jsonl"
    quarantine.write_text("".join(json.dumps(record) + "\n" for record in refused))
    (folder / "docs/validations").mkdir(parents=True)
    (folder / "docs/validations/rows.html").write_text("<p>")
    write_page(folder / "docs", result, quarantine, rows=good, quarantined=len(refused), limit=0.02)
    return Page((folder / "docs/index.html").read_text(encoding="utf-8"))


def refusal(line: int, **more: Any) -> dict[str, Any]:
    return {"line": line, "id": f"r{line}", "reasons": ["label 'c' is none"], "record": {"text": "a secret"}} | more


def test_the_page_holds_the_result_of_a_real_validation(tmp_path: Path) -> None:
    check(tmp_path, [*rows(8), {"id": "x", "text": "secret text", "label": "sales"}, {"id": "y", "text": None}])
    docs = tmp_path / "valid/data_docs"
    page, html = Page((docs / "index.html").read_text()), (docs / "index.html").read_text()
    assert page.addresses == []
    assert not page.tags & {"a", "script", "link", "img", "iframe", "form", "base"}
    assert "default-src 'none'" in html
    assert not re.search(r"url\(|@import|https?:", html)
    for said in (
        "training_rows",
        "10 rows checked",
        "8 valid",
        "2 quarantined",
        "12 of 14 expectations met by every row",
        "Each label is one of task.labels. expect_column_values_to_be_in_set(column='target', "
        "value_set=['billing', 'support']) 9 1 11.1 % sales",
        "Every row has an id. expect_column_values_to_not_be_null(column='id') 10 0 0.0 %",
        "9 x label 'sales' is none of the task's labels",
        "10 y text is null; label is missing",
    ):
        assert said in page.text, said
    assert "secret text" not in html
    pages = sorted(path.relative_to(docs).as_posix() for path in docs.rglob("*") if path.is_file())
    assert [path.split("/")[0] for path in pages] == ["expectations", "index.html", "validations"]
    for path in pages:
        assert path == "index.html" or path in page.text


def test_what_failed_comes_first_with_its_most_frequent_values(tmp_path: Path) -> None:
    values = [f"v{n}" for n in range(MAX_VALUES + 3)] + ["often"] * 5
    failed = {"unexpected_list": values, "unexpected_count": len(values), "missing_count": 10}
    text = written(tmp_path, result_of({}, failed), [refusal(7)]).text
    assert text.index("✕ failed") < text.index("often × 5") < text.index("v0") < text.index("✓ met")
    assert "and 4 other values" in text
    assert " 90 18 20.0 % often" in text


def test_only_some_refused_rows_are_listed_and_the_page_says_so(tmp_path: Path) -> None:
    refused = [refusal(n) for n in range(1, MAX_ROWS + 11)]
    text = written(tmp_path, result_of({"unexpected_list": ["c"], "unexpected_count": 1}), refused).text
    assert f"The first {MAX_ROWS} of {MAX_ROWS + 10} quarantined rows" in text
    assert f"r{MAX_ROWS} label" in text
    assert f"r{MAX_ROWS + 1} label" not in text


@pytest.mark.parametrize(
    ("bad", "good", "word"),
    [
        (0, 100, "Passed"),
        (1, 99, "Passed, with rows quarantined"),
        (3, 97, "Stopped the run"),
        (1, 0, "Stopped the run"),
    ],
)
def test_the_page_says_what_came_of_it(tmp_path: Path, bad: int, good: int, word: str) -> None:
    outcome = {"unexpected_list": ["c"] * bad, "unexpected_count": bad}
    page = written(tmp_path, result_of(outcome), [refusal(n) for n in range(bad)], good=good)
    assert word in page.words  # the heading, whole
    assert "limit 2.0 %" in page.text
    assert ("quarantined rows" in page.text) is (bad > 0)


@pytest.mark.parametrize("payload", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>'])
def test_text_from_data_is_never_markup(tmp_path: Path, payload: str) -> None:
    outcome = {"unexpected_list": [payload], "unexpected_count": 1}
    page = written(tmp_path, result_of(outcome), [refusal(3, id=payload, reasons=[payload])])
    assert page.tags.isdisjoint({"script", "img"})
    assert page.text.count(payload) == 3


def test_a_long_value_is_cut_and_a_damaged_one_can_be_written(tmp_path: Path) -> None:
    outcome = {"unexpected_list": ["x" * 10_000, "\ud800 lone"], "unexpected_count": 2}
    page = written(tmp_path, result_of(outcome), [refusal(1, id=None, reasons=["\ud800"])])
    assert "x" * 200 + "…" in page.text
    assert "x" * 201 not in page.text
    assert "lone" in page.text
