"""What the report says, and that it says it safely."""

from __future__ import annotations

import re
from html import unescape
from html.parser import HTMLParser

import pytest

from tasks.contracts.references import Outcome
from tasks.contracts.spec import Policy, TaskKind
from tasks.report.render import ReportData, render_report
from tests.report.example import example_report

LOADING = {"script", "img", "link", "iframe", "object", "embed", "audio", "video", "source", "base", "form"}


class Page(HTMLParser):
    """Tags, addresses that a tag names, and the text outside of the style sheet."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.addresses: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "path", "circle", "polyline"):
            self.open.append(tag)
        self.addresses += [(tag, value or "") for name, value in attrs if name in ("src", "href", "srcset", "action")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))


CASES = {
    "promote": example_report(registered=True),
    "reject": example_report(0.74, 0.62),
    "inconclusive": example_report(0.70, 0.72),
    "extract": example_report(0.35, 0.72, n=120, kind=TaskKind.EXTRACT, registered=True),
}


@pytest.fixture(scope="module")
def pages() -> dict[str, Page]:
    return {name: Page(render_report(data)) for name, data in CASES.items()}


@pytest.mark.parametrize("name", CASES)
def test_the_report_is_whole_and_loads_nothing(pages: dict[str, Page], name: str) -> None:
    page, html = pages[name], render_report(CASES[name])
    assert page.open == []
    assert not LOADING & set(page.tags)
    assert [tag for tag, _ in page.addresses] == ["a"] * len(CASES[name].links)
    assert "default-src 'none'" in html
    assert not re.search(r"url\(|@import", html)


@pytest.mark.parametrize(
    ("name", "outcome", "word"),
    [
        ("promote", Outcome.PROMOTE, "Promoted"),
        ("reject", Outcome.REJECT, "Rejected"),
        ("inconclusive", Outcome.INCONCLUSIVE, "Inconclusive"),
    ],
)
def test_the_verdict_stands_on_top_with_its_numbers(
    pages: dict[str, Page], name: str, outcome: Outcome, word: str
) -> None:
    data, text = CASES[name], pages[name].text
    assert data.verdict.outcome is outcome
    assert f'<body class="{outcome.value}">' in render_report(data)
    assert text.index(word) < text.index(data.verdict.reasons[0]) < text.index("Baseline against candidate")
    assert all(reason in text for reason in data.verdict.reasons)
    for row in data.verdict.metrics:
        for value in (row.baseline, row.candidate):
            assert f"{round(100 * value + 1e-9, 1):.1f} %" in text


def test_what_happens_next_is_said(pages: dict[str, Page]) -> None:
    assert "Registered as complaints version 4" in pages["promote"].text
    assert "Version 3 is kept as previous" in pages["promote"].text
    assert "Nothing was changed: the baseline (base model, few-shot) stays." in pages["reject"].text
    settle = CASES["inconclusive"].verdict.items_to_settle
    assert f"About {settle:,} items in all, where there are 400 now." in pages["inconclusive"].text


def test_every_changed_item_is_there_with_both_answers(pages: dict[str, Page]) -> None:
    data, text = CASES["promote"], pages["promote"].text
    pairs = list(zip(data.baseline_outcomes, data.candidate_outcomes, strict=True))
    changed = [(b, c) for b, c in pairs if b.scores["exact_match"] != c.scores["exact_match"]]
    assert len(changed) == data.verdict.wins + data.verdict.losses > 50
    for before, after in changed:
        assert (
            f"Item {before.id} Target {before.target} Baseline {before.prediction} Candidate {after.prediction} "
            in text
        )
        assert before.text in text
    same = next(b for b, c in pairs if b.scores["exact_match"] == c.scores["exact_match"])
    assert f"Item {same.id} " not in text


def test_classes_and_confusion_hold_the_counts(pages: dict[str, Page]) -> None:
    data, html = CASES["promote"], unescape(render_report(CASES["promote"]))
    for score in data.candidate.classes:
        assert f'<td>{score.label}</td><td class="num">{score.support}</td>' in html
        hits = sum(one.target == one.prediction == score.label for one in data.candidate_outcomes)
        assert f'title="{hits} of {score.support} {score.label} answered as {score.label}"' in html
    assert "By field" not in pages["promote"].text


def test_an_extract_task_shows_fields_in_place_of_classes(pages: dict[str, Page]) -> None:
    text = pages["extract"].text
    assert "By field" in text
    assert "Confusion" not in text
    amount = next(row for row in CASES["extract"].verdict.metrics if row.metric == "field:amount")
    assert f"amount {100 * amount.baseline:.1f} % {100 * amount.candidate:.1f} %" in text


def test_training_and_data_are_told(pages: dict[str, Page]) -> None:
    text = pages["promote"].text
    assert "best 0.312 at step 135" in text
    assert "Went on from step 90" in text
    assert "Peak memory 2.4 GB" in text
    assert (
        "Rows read 6,143 Quarantined −14 Exact duplicate −31 Near duplicate −402 Golden overlap −57 Not drawn −4,306"
        in text
    )
    assert "Text too long 9 Unknown label 5" in text
    assert "the text has 20,417 characters" in text


def test_every_digest_is_there(pages: dict[str, Page]) -> None:
    for digest in CASES["promote"].verdict.digests.values():
        assert f"sha256 {digest}" in pages["promote"].text


def planted(payload: str) -> ReportData:
    """A report in which every text that data can set is the payload."""
    data = example_report()
    spec = data.spec.model_copy(update={"task": data.spec.task.model_copy(update={"instruction": payload})})
    verdict = data.verdict.model_copy(
        update={
            "outcome": Outcome.REJECT,  # it names the baseline
            "candidate": data.verdict.candidate.model_copy(update={"label": payload}),
            "baseline": data.verdict.baseline.model_copy(update={"label": payload}),
            "reasons": (payload,) * 3,
        }
    )
    change = {"text": payload, "prediction": payload}
    return ReportData(
        **{
            **vars(data),
            "spec": spec,
            "verdict": verdict,
            "candidate_outcomes": [one.model_copy(update=change) for one in data.candidate_outcomes],
            "baseline_outcomes": [one.model_copy(update=change) for one in data.baseline_outcomes],
            "funnel": data.funnel._replace(
                quarantine=[data.funnel.quarantine[0]._replace(reasons=[payload], id=payload)],
                quarantine_reasons={payload: 1},
                removed={payload: 2},
            ),
            "links": {payload: "javascript:alert(1)"},
        }
    )


@pytest.mark.parametrize(
    "payload", ["<script>alert(1)</script>", "`<img src=x onerror=alert(1)>`", '"><svg onload=alert(1)>']
)
def test_text_from_data_is_never_markup(payload: str) -> None:
    page = Page(render_report(planted(payload)))
    assert page.open == []
    assert not LOADING & set(page.tags)
    assert page.addresses == []
    assert page.tags.count("svg") == Page(render_report(example_report())).tags.count("svg")
    assert payload.strip("`") in page.text


def test_long_texts_are_folded_and_whole() -> None:
    data = example_report(texts=["word " * 400] * 400)
    html = render_report(data)
    assert html.count("whole text") == data.verdict.wins + data.verdict.losses
    assert ("word " * 400).strip() in html


def test_the_margin_is_drawn_where_the_policy_sets_one() -> None:
    assert 'class="margin"' in render_report(example_report(policy=Policy(min_improvement=0.02)))
    assert 'class="margin"' not in render_report(example_report())
