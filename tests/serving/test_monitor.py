"""The monitor's windows: which requests are compared, whose answers count, and when there is too little."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from tasks.contracts.errors import StoreError
from tasks.contracts.monitor import MonitorResult, MonitorSpec
from tasks.contracts.observe import DriftSpec, RetrainPermit
from tasks.contracts.review import Review, Reviewed, ReviewItem, ReviewSpec
from tasks.contracts.serving import LogSpec
from tasks.contracts.spec import DataSpec, GoldenSpec, RetrainSpec, TaskSpec
from tasks.serving.drift import compare_windows
from tasks.serving.monitor.windows import NO_CHOICE, ParquetLog, Windows, input_of, read_windows
from tasks.serving.monitor.words import detail_lines, headline, monitor_markdown, state_name
from tasks.serving.request_log import COLUMNS, ParquetSink, RequestLog, read_log
from tasks.serving.review.rows import write_reviews
from tests.serving.fake_engine import Behaviour, FakeCommand
from tests.serving.requests_made import last_day, request, requests, steady, write_log
from tests.serving.running import Running
from tests.serving.test_gateway import play

NOW = datetime(2026, 3, 20, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
FEW = DriftSpec(min_rows=50)
LABELS = ("card", "loan", "money_transfer")


def training(labels: tuple[str, ...] = LABELS, name: str = "complaints") -> RetrainSpec:
    task = (
        TaskSpec(kind="classify", instruction="Which?", labels=labels)
        if labels
        else TaskSpec(kind="chat", instruction="Say")
    )
    return RetrainSpec(
        name=name, task=task, data=DataSpec(source="rows.jsonl"), golden=GoldenSpec(path="golden"), base_model="base"
    )


def spec(**changes: Any) -> MonitorSpec:
    return MonitorSpec(**({"name": "complaints", "retrain": training()} | changes))


def look(folder: Path, now: datetime = NOW, **changes: Any) -> Windows:
    seen = read_windows(ParquetLog(folder), spec(**changes), now)
    assert seen.windows is not None, seen.why_not
    return seen.windows


def why_not(folder: Path, now: datetime = NOW, **changes: Any) -> str:
    seen = read_windows(ParquetLog(folder), spec(**changes), now)
    assert seen.windows is None
    return seen.why_not


# -- which requests ---------------------------------------------------------------------------------------------------


def test_the_first_week_of_the_live_version_is_compared_with_the_last_day(tmp_path: Path) -> None:
    write_log(tmp_path, steady(NOW), last_day(NOW, drifted=False))
    found = look(tmp_path)
    began = NOW - 264 * HOUR
    assert (found.reference_facts.start, found.reference_facts.end) == (began, began + 168 * HOUR)
    assert (found.current_facts.start, found.current_facts.end) == (NOW - 24 * HOUR, NOW)
    assert (found.reference_facts.requests, found.current_facts.requests) == (1680, 240)
    assert found.reference_facts.versions == {"complaints@7": 1680}
    assert (len(found.reference.texts), len(found.current.texts)) == (1680, 240)
    assert sorted(set(found.current.texts)) == [
        "a fee on my card", "my card was lost abroad", "my loan is denied", "the loan has a wrong rate",
    ]  # fmt: skip
    assert found.current.answers.count("card") == 120
    assert found.current.confidences == [0.9] * 240
    assert found.notes == {"disagreement": "no file of reviews is named"}


def test_only_answered_requests_by_the_bare_name_count(tmp_path: Path) -> None:
    others = [
        request(1, NOW - HOUR, "of another task", name="prices", version="prices@2"),
        request(2, NOW - HOUR, "of a tester", name="complaints@7"),
        request(3, NOW - HOUR, "refused", status=429, version=""),
        request(4, NOW - HOUR, "failed", status=502),
        request(5, NOW - HOUR, "says nothing", request="{}"),
        request(6, NOW + HOUR, "from a clock that is ahead"),
        request(7, NOW - 24 * HOUR, "the first of the window"),
        request(8, NOW, "the last of the window"),
    ]
    write_log(tmp_path, steady(NOW), others)
    found = look(tmp_path)
    assert sorted(found.current.texts) == ["the first of the window", "the last of the window"]
    assert (found.current_facts.requests, found.current_facts.rows) == (3, 2)  # one has no text


def test_a_canary_asks_like_all_and_its_answers_are_its_own(tmp_path: Path) -> None:
    canary = [
        request(1, NOW - HOUR, "for the canary", version="complaints@8", canary=True, answer="loan", confidence=0.2),
        request(2, NOW, "which failed", canary=True, answer="card", confidence=0.7),  # so the live one answered
    ]
    write_log(tmp_path, steady(NOW), canary)
    found = look(tmp_path)
    assert sorted(found.current.texts) == ["for the canary", "which failed"]
    assert (found.current.answers, found.current.confidences) == (["card"], [0.7])
    assert found.current_facts.versions == {"complaints@7": 1, "complaints@8": 1}
    assert found.reference_facts.start == NOW - 264 * HOUR  # the canary has answered last, and is not live by that


def test_a_young_version_is_compared_with_what_there_is_of_it(tmp_path: Path) -> None:
    write_log(tmp_path, steady(NOW), last_day(NOW, drifted=True, version="complaints@8"))
    since = NOW - 24 * HOUR
    assert why_not(tmp_path, hours=12.1) == (
        "complaints@8 answers since 2026-03-19 12:00 UTC, as far as the log goes; the last 12.1 hours are compared "
        "with as many before at least. A first comparison can be made from 2026-03-20 12:12 UTC on."
    )
    for hours in (12.0, 6.0):  # not with those of the version before, which were about other things
        found = look(tmp_path, hours=hours)
        assert (found.reference_facts.start, found.reference_facts.end) == (since, NOW - hours * HOUR)
        assert found.reference_facts.versions == {"complaints@8": 240 - 10 * hours}
        assert len(found.reference.answers) == len(found.reference.texts) == 240 - 10 * hours
        assert not compare_windows(found.reference, found.current, DriftSpec(min_rows=60)).drifted
    assert look(tmp_path, hours=6.0, reference_hours=8.0).reference_facts.end == since + 8 * HOUR


def test_a_version_that_came_back_has_the_reference_it_had(tmp_path: Path) -> None:
    eight = requests(50, NOW - 30 * HOUR, NOW - 20 * HOUR, texts=["a"], answers=["card"], version="complaints@8")
    write_log(tmp_path, steady(NOW), eight, [request(1, NOW - HOUR)])
    assert look(tmp_path).reference_facts.start == NOW - 264 * HOUR


def test_of_many_requests_some_are_drawn_and_always_the_same(tmp_path: Path) -> None:
    many = requests(900, NOW - 23 * HOUR, NOW, texts=[f"text {n}" for n in range(900)], answers=["card"])
    write_log(tmp_path / "one", steady(NOW), many)
    write_log(tmp_path / "other", steady(NOW)[::-1], many[500:], many[:500])
    found = look(tmp_path / "one", most_rows=100, drift=FEW)
    assert (found.current_facts.requests, found.current_facts.rows, len(found.current.texts)) == (900, 100, 100)
    assert (found.reference_facts.requests, found.reference_facts.rows) == (1680, 100)
    assert found.current.texts == look(tmp_path / "other", most_rows=100, drift=FEW).current.texts
    drawn = [int(text.removeprefix("text ")) for text in found.current.texts]
    assert 350 < sum(drawn) / 100 < 550  # from the whole day
    more = look(tmp_path / "one", most_rows=200, drift=FEW).current.texts
    assert set(found.current.texts) < set(more)


def test_what_a_gateway_writes_is_what_is_read(tmp_path: Path) -> None:
    sink = ParquetSink(tmp_path / "log")
    log = RequestLog(sink, LogSpec(mask=False), mask=None, dropped=lambda reason, number: None, flush_seconds=0.05)

    async def scene(running: Running, fakes: FakeCommand) -> None:
        for text, model, more in (
            ("my card is lost", "complaints", {}),
            ("the rate of my loan", "complaints", {"stream": True}),
            ("a tester's", "complaints@7", {}),
            ("of another", "prices", {}),
        ):
            await running.ask(text, model, **more)

    answers = {"my card is lost": "card", "the rate of my loan": "loan"}
    play(tmp_path, scene, Behaviour(answers=answers), log=log, fill_in=True)
    log.close()
    found = look(tmp_path / "log", datetime.now(UTC) + 3 * HOUR, hours=1.0)
    assert found.reference_facts.versions == {"complaints@7": 2}
    assert sorted(found.reference.texts) == ["my card is lost", "the rate of my loan"]  # without the instruction
    assert sorted(found.reference.answers) == ["card", "loan"]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"messages": [{"role": "user", "content": "one"}]}, "one"),
        ({"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]}, "one"),
        ({"messages": [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}]}, "two"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]}, "a"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None),
        ({"messages": [{"role": "user", "content": None}]}, None),
        ({"messages": [{"role": "system", "content": "be kind"}]}, None),
        ({"messages": ["one"]}, None),
        ({"messages": []}, None),
        ({"prompt": "finish this"}, "finish this"),
        ({"prompt": [1, 2]}, None),
        ({}, None),
        ([], None),
    ],
    ids=str,
)
def test_the_input_of_a_request(body: Any, text: str | None) -> None:
    assert input_of(json.dumps(body)) == text


def test_a_request_that_is_no_json_has_no_input() -> None:
    assert input_of("{") is None


@pytest.mark.parametrize(
    ("retrain", "said"),
    [
        (training(), ["card", NO_CHOICE, NO_CHOICE, "loan"]),
        (training(labels=()), []),
        (None, ["card", NO_CHOICE, "loan"]),  # by there being a confidence, or a flag
    ],
    ids=["labels", "open", "not known"],
)
def test_which_answers_are_classes(tmp_path: Path, retrain: RetrainSpec | None, said: list[str]) -> None:
    day = [
        request(1, NOW - 4 * HOUR, answer=" card\n", confidence=0.9),
        request(2, NOW - 3 * HOUR, answer="Dear Ann, yo", flagged=True),
        request(3, NOW - 2 * HOUR, answer="who knows"),
        request(4, NOW - 1 * HOUR, answer="loan", confidence=0.4),
    ]
    plain = [row | {"confidence": None} for row in steady(NOW)]
    write_log(tmp_path, plain, day)
    found = look(tmp_path, retrain=retrain)
    assert sorted(found.current.answers) == sorted(said)
    assert ("classes" in found.notes) == (retrain is not None and not retrain.task.labels)


def test_what_nobody_says_is_not_tested(tmp_path: Path) -> None:
    plain = [row | {"confidence": None} for row in (*steady(NOW), *last_day(NOW, drifted=False))]
    write_log(tmp_path, plain)
    assert look(tmp_path, retrain=None).notes == {
        "classes": "nothing says which answers there are: name the training",
        "confidence": "no answer has a confidence",
        "disagreement": "no file of reviews is named",
    }


def test_files_of_an_earlier_gateway_lack_columns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    new = ("canary", "confidence", "certainty", "flagged")
    for number, rows in enumerate((steady(NOW), last_day(NOW, drifted=False))):
        home = tmp_path / f"day={rows[0]['at'].date()}"
        home.mkdir()
        old = [{name: value for name, value in row.items() if name not in new} for row in rows]
        pq.write_table(pa.Table.from_pylist(old), home / f"{number}.parquet")
    caplog.set_level(logging.WARNING)
    # All of the first ten days stand in one folder here, so look from there on.
    first = next(read_log(tmp_path, columns=("id", "confidence", "answer")))
    assert (set(first), first["confidence"], first["answer"]) == ({"id", "confidence", "answer"}, None, "card")
    assert set(next(read_log(tmp_path))) == set(COLUMNS)
    found = look(tmp_path)
    assert (len(found.current.texts), found.current.answers.count("card")) == (240, 120)
    assert found.notes["confidence"] == "no answer has a confidence"
    assert caplog.text == ""


# -- too little -------------------------------------------------------------------------------------------------------


def test_there_is_no_log(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="There is no request log") as refused:
        read_windows(ParquetLog(tmp_path / "request_log"), spec(), NOW)
    assert "goldgate serve" in refused.value.fix


def test_nobody_has_asked_yet(tmp_path: Path) -> None:
    write_log(tmp_path, [request(1, NOW - HOUR, name="prices"), request(2, NOW - HOUR, status=500)])
    assert why_not(tmp_path) == "No request for complaints has been answered, as far as the log goes."


def test_a_log_that_is_too_young_says_when_it_is_not(tmp_path: Path) -> None:
    write_log(tmp_path, last_day(NOW, drifted=False))
    assert why_not(tmp_path).endswith("A first comparison can be made from 2026-03-21 12:00 UTC on.")
    later = look(tmp_path, NOW + 24 * HOUR)
    assert (later.reference_facts.start, later.reference_facts.end) == (NOW - 24 * HOUR, NOW)
    assert (later.reference_facts.rows, later.current_facts.rows) == (240, 0)


# -- reviews ----------------------------------------------------------------------------------------------------------


def review(at: datetime, said: str | None = "card", **changes: Any) -> Review:
    """An answer "card" that one person has looked at; None for passed over."""
    item: dict[str, Any] = {
        "id": f"r{at.timestamp()}", "name": "complaints", "version": "complaints@7", "at": at, "reason": "sampled",
        "messages": ({"role": "user", "content": f"my card, at {at}"},), "answer": "card", "choices": LABELS,
    }  # fmt: skip
    item |= changes
    word = Reviewed(item=item["id"], annotator="ann", answer=said, at=at)
    return Review(item=ReviewItem(**item), said=(word,))


def keep(reviews: list[Review], folder: Path) -> str:
    """The file as `goldgate review` writes it."""
    asked = training()
    write_reviews(
        reviews,
        ReviewSpec(
            name="complaints", rows=str(folder / "rows.jsonl"), golden_candidates=str(folder / "candidates.jsonl"),
            data=asked.data, task=asked.task,
        ),
    )  # fmt: skip
    return str(folder / "reviews.jsonl")


def test_drawn_reviews_of_the_live_version_count(tmp_path: Path) -> None:
    began = NOW - 264 * HOUR
    reviews = [
        review(began),
        review(began + HOUR, "loan"),
        review(began + 2 * HOUR, "card "),
        review(began + 200 * HOUR, "loan"),  # between the windows
        review(NOW - HOUR, "loan"),
        review(NOW - 2 * HOUR, "a category that there is not"),
        review(NOW - 3 * HOUR, "loan", reason="flagged"),
        review(NOW - 4 * HOUR, "loan", reason="disagreed"),
        review(NOW - 5 * HOUR, "loan", version="complaints@8"),
        review(NOW - 6 * HOUR, "loan", name="complaints@7"),  # a tester's
        review(NOW - 7 * HOUR, None),
    ]
    path = keep(reviews, tmp_path)
    write_log(tmp_path / "log", steady(NOW), last_day(NOW, drifted=False))
    found = look(tmp_path / "log", reviews=path)
    assert (found.reference.reviewed, found.reference.corrected) == (3, 1)
    assert (found.current.reviewed, found.current.corrected) == (2, 2)
    assert found.notes == {}


def test_a_rise_of_corrections_is_drift(tmp_path: Path) -> None:
    then = [review(NOW - 264 * HOUR + n * HOUR, "card" if n % 20 else "loan") for n in range(100)]
    now = [review(NOW - n * HOUR / 10, "card" if n % 3 else "loan") for n in range(100)]
    write_log(tmp_path / "log", steady(NOW), last_day(NOW, drifted=False))
    found = look(tmp_path / "log", reviews=keep(then + now, tmp_path))
    report = compare_windows(found.reference, found.current, DriftSpec())
    assert report.reason == "drift: disagreement (0.29, limit 0.05)"


def test_reviews_that_are_not_there_yet_are_said(tmp_path: Path) -> None:
    write_log(tmp_path, steady(NOW), last_day(NOW, drifted=False))
    found = look(tmp_path, reviews=str(tmp_path / "reviews.jsonl"))
    assert (
        found.notes["disagreement"] == f"nobody has reviewed an answer yet: {tmp_path / 'reviews.jsonl'} is not there"
    )


def test_what_is_no_record_of_reviews_is_refused(tmp_path: Path) -> None:
    path = Path(keep([review(NOW)], tmp_path))
    path.write_text(path.read_text() + '{"item": "r1"}\n')
    write_log(tmp_path / "log", steady(NOW), last_day(NOW, drifted=False))
    with pytest.raises(StoreError, match="A line is no record of a review") as refused:
        look(tmp_path / "log", reviews=str(path))
    assert refused.value.where == f"{path}:2"


# -- specification and words ------------------------------------------------------------------------------------------


def test_what_drift_starts_trains_what_is_watched() -> None:
    with pytest.raises(ValidationError, match="`retrain` is about 'prices', and what is watched is 'complaints'"):
        spec(retrain=training(name="prices"))


def test_as_many_are_drawn_as_are_needed() -> None:
    with pytest.raises(ValidationError, match=r"`most_rows` \(150\) is below `drift.min_rows` \(200\)"):
        spec(most_rows=150)


def result(drifted: bool, tmp_path: Path, **changes: Any) -> MonitorResult:
    write_log(tmp_path, steady(NOW), last_day(NOW, drifted=drifted))
    found = look(tmp_path)
    report = compare_windows(found.reference, found.current, DriftSpec())
    report = report.model_copy(update={"left_out": dict(found.notes)})
    return MonitorResult(
        name="complaints", report=report, reference=found.reference_facts, current=found.current_facts, **changes
    )


@pytest.mark.parametrize(
    ("changes", "state", "end"),
    [
        ({"started": True, "permit": RetrainPermit(allowed=True, next_at=None, why="-")}, "Drifted, retrain started",
         "A retrain was started."),
        ({"permit": RetrainPermit(allowed=False, next_at=NOW, why="Later.")}, "Drifted, too soon",
         "No retrain was started. Later."),
        ({"permit": RetrainPermit(allowed=False, next_at=None, why="No server.")}, "Drifted",
         "No retrain was started. No server."),
        ({}, "Drifted", "Nothing was started, since this look only reports."),
    ],
)  # fmt: skip
def test_what_came_of_drift_in_words(tmp_path: Path, changes: dict[str, Any], state: str, end: str) -> None:
    shown = result(True, tmp_path, **changes)
    assert state_name(shown) == state
    assert shown.report is not None
    assert headline(shown) == f"complaints: {shown.report.reason}. {end}"
    assert shown.report.reason.startswith("drift: classes (")
    page = monitor_markdown(shown, "/v2/deployments/deployment/1")
    assert f"# {state}\n" in page
    assert "| classes | 1,680 | 240 | 8.75 | 0.1 |" in page
    assert "crypto (0 % to 67 % of requests)" in page
    assert "Now: 2026-03-19 12:00 to 2026-03-20 12:00 UTC, 240 requests; answered by complaints@7 (240)" in page
    assert ("[Runs of retrain/complaints](/v2/deployments/deployment/1)" in page) == shown.started
    assert ("Prefect has no deployment `retrain/complaints`" in monitor_markdown(shown, None)) == shown.started


def test_no_drift_and_too_little_in_words(tmp_path: Path) -> None:
    shown = result(False, tmp_path)
    assert (state_name(shown), headline(shown)) == ("No drift", "complaints: no drift in 4 tests.")
    assert "disagreement not tested: no file of reviews is named" in detail_lines(shown)
    nothing = MonitorResult(name="complaints", report=None, reference=None, current=None, why_not="The log is young.")
    assert (state_name(nothing), headline(nothing)) == ("Not enough to compare", "complaints: The log is young.")
    assert monitor_markdown(nothing, None) == "# Not enough to compare\n\n**complaints: The log is young.**\n"


def test_a_page_shows_words_of_requests_as_they_are(tmp_path: Path) -> None:
    told = result(False, tmp_path)
    assert told.report is not None
    odd = told.report.tests[0].model_copy(update={"words": "now: <script> | [x](y)\n# z"})
    page = monitor_markdown(told.model_copy(update={"report": told.report.model_copy(update={"tests": (odd,)})}), None)
    assert r"now: \<script\> \| \[x\](y) \# z" in page
