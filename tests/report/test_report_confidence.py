"""What the report says of the candidate's confidence: figures at the right places, and words that promise no more."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from tasks.contracts.confidence import TRUST_FILE, LearntTrust, TrustRef
from tasks.contracts.errors import StoreError
from tasks.contracts.numbers import percent
from tasks.contracts.spec import ConfidenceSpec
from tasks.report.confidence import confidence_lines, confidence_view, headline
from tasks.report.folder import read_trust
from tasks.report.render import render_report
from tasks.report.summary import verdict_markdown
from tasks.serving.trust import learn
from tasks.store import Store
from tests.report.example import LABELS, example_reports, outcome
from tests.report.test_report_html import Page

PROMOTED = example_reports()["promote"]


@cache
def learnt(rows: int, target: float = 0.9, *, silent: bool = False) -> LearntTrust:
    """Of a model whose confidences are on the logit twice as far from a half as they should be."""
    draw, made = random.Random(1), []
    for number in range(rows):
        logit = draw.gauss(2.2, 1.6)
        right = draw.random() < 1 / (1 + math.exp(-logit))
        confidence = None if silent else 1 / (1 + math.exp(-2 * logit))
        made.append(outcome(number, "card", "card" if right else "loan", "x", confidence=confidence))
    return learn(made, tuple(LABELS), ConfidenceSpec(target_accuracy=target), dev="d" * 64, engine="openai")


def page(trust: LearntTrust | None) -> Page:
    return Page(render_report(replace(PROMOTED, trust=trust)))


def test_the_section_says_what_goes_to_review_and_on_what_it_rests() -> None:
    found = learnt(600)
    threshold, calibration = found.threshold, found.calibration
    assert threshold.at is not None
    assert calibration is not None
    text = page(found).text
    expected, fewest, most = threshold.reviews_per_thousand
    assert f"Of 1,000 requests about {expected:.0f} go to review (95 % interval {fewest:.0f} to {most:.0f})." in text
    assert f"at least {threshold.at:.6g} sure of need no review: that is {percent(threshold.coverage)} of them" in text
    assert "Learnt on 600 dev rows; the golden set has no part in it." in text
    low, high = calibration.temperature_low, calibration.temperature_high
    assert f"{calibration.temperature:.2f} temperature (95 % interval {low:.2f} to {high:.2f})" in text
    trusted = next(point for point in threshold.curve if point.at == threshold.at)
    assert f"Of 600 dev rows {trusted.rows} are above the threshold, and {trusted.right} of these are right" in text
    assert "with a chance of error of 5 %" in text
    assert "This holds for requests like the dev rows" in text
    for side in (calibration.before, calibration.after):
        assert percent(side.ece) in text
        assert percent(side.ece_by_chance) in text
    assert f"Calibration error (ECE) {percent(calibration.before.ece)} {percent(calibration.after.ece)}" in text


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (learnt(56), "not calibrated: 56 dev rows are too few to learn from"),
        (learnt(300, 0.999), "An accuracy of 0.999 cannot be"),
        (learnt(200, silent=True), "have no confidence, since the engine (openai) gives none"),
    ],
)
def test_without_a_threshold_it_says_that_every_answer_is_reviewed_and_why(found: LearntTrust, says: str) -> None:
    text = page(found).text
    assert "Every answer goes to review." in text
    assert "1,000 of 1,000 requests go to review" in text
    assert says in text
    assert "This holds for requests like" not in text  # nothing was promised
    assert headline(found.threshold) == "Every answer goes to review."


def test_a_run_whose_confidence_was_not_asked_for_has_no_section() -> None:
    assert 'id="confidence"' not in render_report(PROMOTED)
    assert 'id="confidence"' in render_report(replace(PROMOTED, trust=learnt(56)))


def test_the_section_is_whole_and_loads_nothing() -> None:
    for found in (learnt(600), learnt(56), learnt(300, 0.999), learnt(200, silent=True)):
        shown = page(found)
        assert shown.open == []
        assert shown.addresses == []


def test_marks_are_where_confidence_and_accuracy_are() -> None:
    found = learnt(600)
    assert found.calibration is not None
    view = confidence_view(found)
    for diagram, side in zip(view.diagrams, (found.calibration.before, found.calibration.after), strict=True):
        assert len(diagram.marks) == len(side.bins)
        first, last = diagram.x_ticks[0].text, diagram.x_ticks[-1].text
        assert (first, last) == ("0 %", "100 %")  # a bin of unsure answers is there, so the whole scale is
        for mark, one in zip(diagram.marks, side.bins, strict=True):
            assert mark.left == pytest.approx(100 * one.confidence, abs=0.01)
            assert mark.at == pytest.approx(100 - 100 * one.accuracy, abs=0.01)
            assert mark.top == pytest.approx(100 - 100 * one.accuracy_high, abs=0.01)
            assert mark.top + mark.height == pytest.approx(100 - 100 * one.accuracy_low, abs=0.01)
    assert view.diagrams[0].y_ticks[0] == (100.0, "0 %")
    assert [diagram.name for diagram in view.diagrams] == ["As the model gives it", "Calibrated"]


def test_the_curve_goes_by_coverage_and_stands_on_answers_enough() -> None:
    found = learnt(600)
    coverage = confidence_view(found).coverage
    assert coverage is not None
    assert coverage.chosen is not None
    places = [tuple(map(float, place.split(","))) for place in coverage.line.split()]
    assert [left for left, _ in places] == sorted(left for left, _ in places)
    assert places[0][0] >= 100 * 20 / 600
    assert places[-1][0] == 100.0  # trusting every answer
    assert coverage.chosen.left == pytest.approx(100 * found.threshold.coverage, abs=0.01)
    assert coverage.chosen.at < coverage.target < 100.0  # above the target, with y downwards
    assert coverage.chosen.top + coverage.chosen.height <= coverage.target + 0.01, "the shown accuracy reaches it too"


def test_nothing_is_drawn_where_nothing_is_known() -> None:
    assert confidence_view(learnt(200, silent=True))[3:] == ([], [], None)
    few = confidence_view(learnt(56))
    assert (few.diagrams, few.measures) == ([], [])
    assert few.coverage is not None
    assert few.coverage.chosen is None
    assert few.facts[1][1] == "more dev rows would show a threshold"


def test_the_page_of_the_run_says_it_in_short() -> None:
    found = learnt(600)
    text = verdict_markdown(PROMOTED.verdict, PROMOTED.release, PROMOTED.registered, trust=found)
    assert "\n".join(confidence_lines(found)) in text
    assert f"**Confidence.** {headline(found.threshold)} On 600 dev rows the model is " in text
    assert "**Confidence.**" not in verdict_markdown(PROMOTED.verdict, PROMOTED.release, PROMOTED.registered)


def test_the_trust_is_read_from_the_store_unchanged(tmp_path: Path) -> None:
    store, found = Store(str(tmp_path)), learnt(56)

    def make(folder: Path) -> dict[str, object]:
        (folder / TRUST_FILE).write_text(found.model_dump_json())
        return {}

    made = store.produce("trust", 1, {}, {}, make)
    trust = TrustRef(**made.reference(), calibrated=False, at=None, reviewed=1.0)
    assert read_trust(store, trust) == found
    assert read_trust(store, None) is None
    (store.files(made) / TRUST_FILE).write_text("{}")
    with pytest.raises(StoreError, match="was changed"):
        read_trust(store, trust)
