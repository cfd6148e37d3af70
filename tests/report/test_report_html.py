"""What the report says, and that it says it safely."""

from __future__ import annotations

import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser

import pytest

from tasks.contracts.numbers import percent, points
from tasks.contracts.references import Outcome, Status
from tasks.report.render import ReportData, render_report
from tests.report.example import APPROVED, FORCED, example_report, example_reports

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


CASES = example_reports()


@pytest.fixture(scope="module")
def pages() -> dict[str, Page]:
    return {name: Page(render_report(data)) for name, data in CASES.items()}


@pytest.mark.parametrize("name", CASES)
def test_the_report_is_whole_and_loads_nothing(pages: dict[str, Page], name: str) -> None:
    page, html = pages[name], render_report(CASES[name])
    assert page.open == []
    assert not LOADING & set(page.tags)
    assert page.addresses == []
    assert "default-src 'none'" in html
    assert not re.search(r"url\(|@import", html)


@pytest.mark.parametrize(
    ("name", "outcome", "state", "word"),
    [
        ("promote", Outcome.PROMOTE, "promote", "Promoted"),
        ("approved", Outcome.PROMOTE, "promote", "Promoted"),
        ("reject", Outcome.REJECT, "reject", "Rejected"),
        ("inconclusive", Outcome.INCONCLUSIVE, "inconclusive", "Inconclusive"),
        ("awaiting", Outcome.PROMOTE, "awaiting", "Awaiting approval"),
        ("declined", Outcome.PROMOTE, "declined", "Declined"),
        ("forced", Outcome.INCONCLUSIVE, "forced", "Forced promotion"),
    ],
)
def test_the_verdict_stands_on_top_with_its_numbers(
    pages: dict[str, Page], name: str, outcome: Outcome, state: str, word: str
) -> None:
    data, text = CASES[name], pages[name].text
    assert data.verdict.outcome is outcome
    html = render_report(data)
    assert f'<body class="{state}">' in html
    assert f"<h1>{word}</h1>" in html
    assert text.index(word) < text.index(data.verdict.reasons[0]) < text.index("Requirements and metrics")
    assert all(reason in text for reason in data.verdict.reasons)
    overruled = state in ("awaiting", "declined", "forced")
    assert (f"The gate’s verdict: {outcome.value.capitalize()}" in text) is overruled
    for row in data.verdict.metrics:
        for value in (percent(row.baseline), percent(row.candidate)):
            assert value in text


def test_what_happens_next_is_said(pages: dict[str, Page]) -> None:
    assert "Registered as complaints version 4" in pages["promote"].text
    assert "Version 3 is kept as previous" in pages["promote"].text
    assert "Nothing was changed: the baseline (base model, few-shot) stays." in pages["reject"].text
    assert f"goldgate approve {CASES['awaiting'].folder} --by NAME" in pages["awaiting"].text
    settle = CASES["inconclusive"].verdict.items_to_settle
    assert f"About {settle:,} items in all would settle it, where there are 300 now." in pages["inconclusive"].text


def test_a_person_who_decided_is_in_plain_sight(pages: dict[str, Page]) -> None:
    for name, release, did in (("approved", APPROVED, "Approved"), ("forced", FORCED, "Forced")):
        text = pages[name].text
        assert release.reason is not None
        at = text.index(f"{did} by {release.by}, 22 November 2026, 14:57 UTC.")
        assert at < text.index(release.reason) < text.index("What happens next")
    assert "Declined by Anna Meier" in pages["declined"].text
    assert "nobody has answered yet" in pages["awaiting"].text
    assert 'class="person"' not in render_report(CASES["promote"])


def test_a_champion_by_override_is_announced_first(pages: dict[str, Page]) -> None:
    text = pages["beats_forced"].text
    at = text.index(
        "The baseline is champion by override: forced against its verdict by Jonas Brandt, 22 November 2026"
    )
    assert at < text.index(str(FORCED.reason)) < text.index("Promoted", text.index("Goldgate report"))
    assert 'id="champion"' not in render_report(CASES["promote"])
    approved = Page(render_report(example_report(champion_release=APPROVED))).text
    assert f"is champion: approved by Anna Meier, 22 November 2026, 14:57 UTC: {APPROVED.reason}" in approved


@pytest.mark.parametrize("name", ["promote", "reject", "cheaper"])
def test_every_requirement_is_there_with_its_limit_and_status(pages: dict[str, Page], name: str) -> None:
    html, verdict = render_report(CASES[name]), CASES[name].verdict
    for status in Status:
        number = sum(one.status is status for one in verdict.requirements)
        # in the list on top, in the plot, and in the table of levels
        assert html.count(f'<span class="status is-{status.value}">') == 3 * number
    shown = sum(one.status is Status.SHOWN for one in verdict.requirements)
    assert f"{shown} of {len(verdict.requirements)} requirements shown" in pages[name].text
    assert html.count('<i class="limit"') == len(verdict.requirements) + 1  # and once on top


def test_levels_are_told_once_for_all(pages: dict[str, Page]) -> None:
    text = pages["promote"].text
    assert "The end of an interval that shows a requirement is at 0.833 %" in text
    assert "The end that fails it is at 0.208 to 0.833 %: one failed guard is enough to reject" in text
    assert "Each end of the interval is at a one-sided error level of 2.5 %." in pages["approved"].text
    assert "normal interval" in text


def test_a_single_requirement_needs_no_list() -> None:
    assert 'id="checklist"' not in render_report(CASES["approved"])
    assert 'id="checklist"' in render_report(CASES["promote"])


def test_groups_are_counted_with_their_items(pages: dict[str, Page]) -> None:
    assert "item by item, on 300 items in 120 groups." in pages["inconclusive"].text
    assert "Part of group g" in pages["inconclusive"].text


def test_the_error_budget_is_drawn(pages: dict[str, Page]) -> None:
    html, text = render_report(CASES["promote"]), pages["promote"].text
    assert '<i class="earlier" style="width:50.0%"></i><i class="this" style="width:16.667%"></i>' in html
    assert "Error budget 5 % earlier looks 2.5 % this look 0.833 % left 1.67 %" in text
    assert "Look 2 at this golden set. 1 earlier look has promoted." in text
    assert "freeze a fresh golden set" not in text
    assert "freeze a fresh golden set" in pages["reject"].text


def test_a_repeated_look_is_called_so_on_top(pages: dict[str, Page]) -> None:
    text = pages["repeated"].text
    assert text.index("so this is no new look.") < text.index("What happens next")
    assert "this look nothing new" in text
    assert 'class="this"' not in render_report(CASES["repeated"])


def test_no_ledger_no_budget(pages: dict[str, Page]) -> None:
    for name in ("forced", "off"):
        assert 'class="spent"' not in render_report(CASES[name])
    assert "No ledger was kept" in pages["forced"].text


def test_the_self_test_is_one_line(pages: dict[str, Page]) -> None:
    assert (
        "Self-test. The gate judged 2,000 made-up candidates that are no better, promoted 61 (3.05 %, 99 % interval "
        "2.15 to 4.25 %), promise 5 %." in pages["promote"].text
    )
    assert "Self-test" not in pages["approved"].text


def test_what_chance_moves_is_told_where_a_search_has_measured_it() -> None:
    noise = "A retrain with another seed moves dev exact match by about ±6.4 points."
    data = example_report()
    assert noise in Page(render_report(replace(data, retrain_noise=noise))).text
    assert 'id="retrain-noise"' not in render_report(data)
    assert noise not in render_report(replace(CASES["withheld"], retrain_noise=noise))


# -- the ladder ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["withheld", "withheld_reject"])
def test_a_verdict_that_withholds_its_numbers_shows_none(pages: dict[str, Page], name: str) -> None:
    data, text, html = CASES[name], pages[name].text, render_report(CASES[name])
    verdict = data.verdict
    assert "Numbers are withheld" in text
    assert ("83.0 % its rung on the ladder" in text) is (name == "withheld")
    for section in ("metrics", "items", "classes", "levels", "checklist", "lost", "gained"):
        assert f'id="{section}"' not in html
    for mark in ("plot", "matrix", "dumbbell", "spent", "values"):
        assert f'class="{mark}' not in html
    secret = [
        points(verdict.requirements[0].estimate),
        points(verdict.requirements[0].low),
        "wins against",
        "Self-test",
    ]
    secret += [percent(value) for row in verdict.metrics for value in (row.baseline, row.candidate) if 0 < value < 1]
    assert [one for one in secret if one in text] == []
    assert not any(item.text in html for item in data.candidate_outcomes)
    assert f"Outcomes of both models {data.evidence}" in text
    assert "Look " in text


# -- items, classes, training, data -------------------------------------------------------------------------------


def test_every_changed_item_is_there_with_both_answers(pages: dict[str, Page]) -> None:
    data, text = CASES["approved"], pages["approved"].text
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


def test_graded_scores_are_shown_beside_the_answers(pages: dict[str, Page]) -> None:
    text = pages["graded"].text
    assert "Counted by field match." in text
    assert "Lost, score lower in the candidate:" in text
    assert re.search(r"Baseline \{.*?\} scores (0\.50|1\.00) Candidate \{.*?\} scores 0\.[05]0", text)


def test_macro_f1_tells_how_items_are_counted(pages: dict[str, Page]) -> None:
    assert "Counted by exact match, since macro-F1 has no score of a single item." in pages["macro_f1"].text


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


def test_addresses_are_text_to_copy(pages: dict[str, Page]) -> None:
    """In the sandboxed frame in which MLflow shows a report, no link opens anything."""
    text = pages["promote"].text
    assert "MLflow run http://127.0.0.1:5000/#/experiments/1/runs/4f2a" in text
    assert "Data Docs /home/anna/complaints/.goldgate/docs/index.html" in text
    spaced = Page(render_report(replace(CASES["promote"], links={"Data Docs": "file:///a%20b/index.html"})))
    assert "Data Docs /a b/index.html" in spaced.text
    assert 'id="elsewhere"' not in render_report(replace(CASES["promote"], links={}))


def planted(payload: str) -> ReportData:
    """A report in which every text that data can set is the payload."""
    data = example_report()
    spec = data.spec.model_copy(update={"task": data.spec.task.model_copy(update={"instruction": payload})})
    verdict = data.verdict.model_copy(
        update={
            "outcome": Outcome.REJECT,
            "candidate": data.verdict.candidate.model_copy(update={"label": payload}),
            "baseline": data.verdict.baseline.model_copy(update={"label": payload}),
            "reasons": (payload,) * 3,
        }
    )
    verdict = verdict.model_copy(
        update={
            "metrics": tuple(row.model_copy(update={"slice": payload}) for row in verdict.metrics),
            "requirements": tuple(
                one.model_copy(update={"slice": payload, "method": payload}) for one in verdict.requirements
            ),
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
            "release": FORCED.model_copy(update={"by": payload, "reason": payload}),
            "champion_release": FORCED.model_copy(update={"by": payload, "reason": payload}),
            "folder": payload,
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
