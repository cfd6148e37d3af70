"""Which golden items are asked, what counts as answered as evaluated, and what keeps a version from going live."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest

from tasks.contracts.errors import GoldenSetError, ServiceError
from tasks.contracts.prompt import Decoding
from tasks.contracts.rows import Message, Row, write_rows
from tasks.contracts.serving import Proof, RolloutSpec, Trust
from tasks.contracts.spec import GoldenSpec
from tasks.serving.checks import (
    Reply,
    SmokeItem,
    ask_smoke_items,
    draw_smoke_items,
    judge_replies,
    sureness_rows,
)
from tasks.serving.client import Served
from tasks.serving.confidence import scaled
from tasks.store import digest_file
from tests.serving.records import version

SEVEN = version(7)


def row(number: int) -> Row:
    return Row(id=f"i{number}", line=number, messages=(Message("user", f"text {number}"),), target="card")


def golden(folder: Path, count: int = 40) -> GoldenSpec:
    folder.mkdir(exist_ok=True)
    write_rows(folder / "items.jsonl", [row(number) for number in range(count)])
    (folder / "golden.json").write_text(json.dumps({"digest": digest_file(folder / "items.jsonl")}))
    return GoldenSpec(path=str(folder))


def proof(spec: GoldenSpec, folder: Path, leave_out: str = "", **changes: str) -> Proof:
    outcomes = folder / "outcomes.jsonl"
    lines = [{"id": f"i{number}", "prediction": f"answer {number}"} for number in range(40)]
    outcomes.write_text("".join(json.dumps(line) + "\n" for line in lines if line["id"] != leave_out))
    said = {
        "key_id": "k", "trusted": "t", "golden_digest": digest_file(Path(spec.path, "items.jsonl")),
        "outcomes": str(outcomes), "release": "by verdict",
    }  # fmt: skip
    return Proof(**(said | changes))


def spec(**changes: object) -> RolloutSpec:
    return RolloutSpec.model_validate(
        {"name": "complaints", "golden": {"path": "unused"}, "settings": {"min_agreement": 0.9} | changes}
    )


def items(*evaluated: str | None) -> tuple[SmokeItem, ...]:
    return tuple(SmokeItem(row(number), answer) for number, answer in enumerate(evaluated))


def saying(*texts: str | Exception, label: str = "complaints@7", latency: float = 10.0) -> Callable[[Row], Served]:
    """An engine that says so in turn; the first one is said twice, since the first question is thrown away."""
    left = [texts[0], *texts]

    def ask(item: Row) -> Served:
        said = left.pop(0)
        if isinstance(said, Exception):
            raise said
        return Served(said, label, latency)

    return ask


def test_the_same_items_are_drawn_and_not_the_first_ones(tmp_path: Path) -> None:
    asked = golden(tmp_path / "golden")
    drawn = draw_smoke_items(asked, proof(asked, tmp_path), 10)
    assert [item.row.id for item in drawn] == [item.row.id for item in draw_smoke_items(asked, None, 10)]
    assert [item.row.id for item in drawn] != [f"i{number}" for number in range(10)]
    assert len({item.row.id for item in drawn}) == 10
    assert all(item.evaluated == f"answer {item.row.id[1:]}" for item in drawn)
    assert draw_smoke_items(asked, None, 20)[:10] == draw_smoke_items(asked, None, 10)
    assert len(draw_smoke_items(asked, None, 2000)) == 40
    assert draw_smoke_items(asked, None, 1)[0].evaluated is None


def test_another_golden_set_is_refused(tmp_path: Path) -> None:
    asked = golden(tmp_path / "golden")
    with pytest.raises(
        GoldenSetError, match=r"another golden set: its sha256 is \w{64}, the certificate is about a{64}"
    ):
        draw_smoke_items(asked, proof(asked, tmp_path, golden_digest="a" * 64), 3)
    with pytest.raises(GoldenSetError, match=r"the configuration asks for b{64}"):
        draw_smoke_items(asked.model_copy(update={"digest": "b" * 64}), proof(asked, tmp_path), 3)
    (tmp_path / "golden" / "golden.json").write_text(json.dumps({"digest": "c" * 64}))
    with pytest.raises(GoldenSetError, match=r"its folder says c{64}"):
        draw_smoke_items(asked, None, 3)
    with pytest.raises(GoldenSetError, match="cannot be read"):
        draw_smoke_items(GoldenSpec(path=str(tmp_path / "nowhere")), None, 3)


def test_evidence_that_lacks_an_item_is_an_error(tmp_path: Path) -> None:
    asked = golden(tmp_path / "golden")
    first = draw_smoke_items(asked, None, 1)[0].row.id
    with pytest.raises(GoldenSetError, match=f"no outcome for 1 of 5 golden items, the first of them {first}"):
        draw_smoke_items(asked, proof(asked, tmp_path, leave_out=first), 5)
    with pytest.raises(GoldenSetError, match="evaluated answers cannot be read"):
        draw_smoke_items(asked, proof(asked, tmp_path, outcomes=str(tmp_path / "none")), 5)


def test_all_as_evaluated_may_go_live() -> None:
    replies = ask_smoke_items(saying("card", "loan", " card\n"), items("card", "loan", "card"))
    check = judge_replies(replies, SEVEN, spec(max_latency_ms=50.0))
    assert (check.asked, check.same, check.agreement, check.compared) == (3, 3, 1.0, True)
    assert (check.latency_p50_ms, check.latency_p95_ms, check.problems, check.differences) == (10.0, 10.0, (), ())


def test_one_that_differs_is_shown_and_counts() -> None:
    replies = ask_smoke_items(saying("card", "loan", "loan"), items("card", "loan", "card"))
    check = judge_replies(replies, SEVEN, spec())
    assert [tuple(one.model_dump().values()) for one in check.differences] == [("i2", "card", "loan")]
    assert check.problems == (
        "2 of 3 items were answered as they were when it was evaluated (66.7%); 90.0% are needed.",
    )
    assert judge_replies(replies, SEVEN, spec(min_agreement=2 / 3)).problems == ()


def test_latency_is_the_95th_percentile_and_leaves_the_first_question_out() -> None:
    times = [9_999.0, *[float(n) for n in range(1, 21)]]

    def ask(item: Row) -> Served:
        return Served("card", SEVEN.label, times.pop(0))

    replies = ask_smoke_items(ask, items(*["card"] * 20))
    check = judge_replies(replies, SEVEN, spec(max_latency_ms=19.0))
    assert (check.latency_p50_ms, check.latency_p95_ms, check.problems) == (10.0, 19.0, ())
    slow = judge_replies(replies, SEVEN, spec(max_latency_ms=18.0))
    assert slow.problems == ("The 95th percentile of the latency is 19 ms; at most 18 ms are allowed.",)


def test_an_engine_without_answers_is_not_asked_for_hours() -> None:
    failure = ServiceError("HTTP 500: out of memory", fix="-")
    replies = ask_smoke_items(saying(*[failure] * 10), items(*["card"] * 10))
    assert len(replies) == 3
    check = judge_replies(replies, SEVEN, spec())
    assert check.problems[0] == "3 of 3 questions got no answer, the first: HTTP 500: out of memory"
    assert check.differences[0].served == "(no answer: HTTP 500: out of memory)"


def test_one_question_without_an_answer_is_enough_to_refuse() -> None:
    answers: list[str | Exception] = ["card"] * 40
    answers[7] = ServiceError("HTTP 502: it is gone", fix="-")
    replies = ask_smoke_items(saying(*answers), items(*["card"] * 40))
    check = judge_replies(replies, SEVEN, spec())
    assert (check.same, check.agreement) == (39, 0.975)
    assert check.problems == ("1 of 40 questions got no answer, the first: HTTP 502: it is gone",)


def test_an_answer_of_another_version_is_seen() -> None:
    replies = ask_smoke_items(saying("card", label="complaints@6"), items("card"))
    assert judge_replies(replies, SEVEN, spec()).problems == (
        "complaints@6 answered 1 questions that were put to complaints@7.",
    )


@pytest.mark.parametrize(
    ("choices", "answers", "same"),
    [(("card", "loan"), ("card", "dog", "loan"), 2), ((), ("anything", " ", "{}"), 2)],
)
def test_without_a_certificate_only_the_form_is_checked(
    choices: tuple[str, ...], answers: tuple[str, ...], same: int
) -> None:
    asked = SEVEN.model_copy(update={"decoding": Decoding(max_new_tokens=8, choices=choices)})
    check = judge_replies(ask_smoke_items(saying(*answers), items(None, None, None)), asked, spec())
    assert (check.compared, check.same) == (False, same)
    assert check.problems == ("2 of 3 items were answered in a form that is valid (66.7%); 90.0% are needed.",)


def test_nothing_asked_is_no_pass() -> None:
    with pytest.raises(ValueError, match="no item was asked"):
        judge_replies((), SEVEN, spec())


# -- how sure the answers are ---------------------------------------------------------------------------------------


class Sure(NamedTuple):
    """An answer, and what the gateway says of it."""

    text: str
    label: str
    latency_ms: float
    confidence: float | None
    review: bool | None


TRUST = Trust(temperature=2.0, offset=0.0, at=0.8, target_accuracy=0.95, reviewed=0.2, why="made up")
TRUSTED = SEVEN.model_copy(update={"trust": TRUST})


def replies(*pairs: tuple[float | None, float | None, bool | None], text: str = "card") -> list[Reply]:
    """Answers as evaluated: confidence then, the one that the gateway says now (scaled), and whether it flags it."""
    return [
        Reply(
            SmokeItem(row(number), "card", then),
            cast(Served, cast(Any, Sure(text, SEVEN.label, 10.0, now if now is None else scaled(now, 2.0, 0.0), flag))),
        )
        for number, (then, now, flag) in enumerate(pairs)
    ]


def test_the_evaluations_confidences_come_with_its_answers(tmp_path: Path) -> None:
    asked = golden(tmp_path / "golden")
    said = proof(asked, tmp_path)
    lines = [{"id": f"i{n}", "prediction": "card", "confidence": n / 40 if n % 2 else None} for n in range(40)]
    Path(said.outcomes).write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawn = draw_smoke_items(asked, said, 40)
    assert all(item.confidence == (int(item.row.id[1:]) / 40 if int(item.row.id[1:]) % 2 else None) for item in drawn)


def test_the_same_confidences_are_no_problem() -> None:
    check = judge_replies(replies(*[(0.9, 0.9, False)] * 5, *[(0.5, 0.5, True)] * 5), TRUSTED, spec())
    assert (check.sure_compared, check.sides_changed, check.problems) == (10, 0, ())
    assert (check.sure_median, check.sure_largest) == (pytest.approx(0.0), pytest.approx(0.0))
    assert sureness_rows(check) == [
        "| Confidence, median difference to the evaluation | 0.0000, at most 0.0000 (10 answers) | |",
        "| Answers on the other side of the threshold of review | 0 | at most 1, or 10% |",
    ]


@pytest.mark.parametrize(
    ("changed", "problems"),
    [
        ([(0.79, 0.81, False)], 0),
        ([(0.79, 0.81, False)] * 2, 0),
        (
            [(0.79, 0.81, False), (0.81, 0.79, True), (0.81, None, True)],
            1,
        ),
    ],
)
def test_more_than_a_tenth_on_the_other_side_of_the_threshold_is_refused(
    changed: Sequence[tuple[float | None, float | None, bool | None]], problems: int
) -> None:
    same = [(0.9, 0.9, False)] * (20 - len(changed))
    check = judge_replies(replies(*same, *changed), TRUSTED, spec())
    assert check.sides_changed == len(changed)
    assert len(check.problems) == problems
    assert check.same == 20
    assert check.sure_compared == 20 - sum(now is None for _, now, _ in changed)
    step = scaled(0.81, 2.0, 0.0) - scaled(0.79, 2.0, 0.0)
    assert check.sure_largest == pytest.approx(step)
    assert check.sure_median == pytest.approx(0.0)
    if problems:
        assert check.problems == (
            "3 of 20 answers are on the other side of the threshold of review than when they were evaluated; at most "
            "2 may be. The threshold does not hold for this engine.",
        )


def test_without_calibration_the_models_own_confidences_are_compared() -> None:
    raw = SEVEN.model_copy(update={"trust": TRUST.model_copy(update={"temperature": None, "offset": None})})
    told = [Reply(SmokeItem(row(0), "card", 0.9), cast(Served, cast(Any, Sure("card", SEVEN.label, 1.0, 0.85, False))))]
    assert judge_replies(told, raw, spec()).sure_largest == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("trust", "pairs", "text"),
    [
        (None, (0.9, 0.2, True), "card"),  # nothing was learnt
        (TRUST, (None, 0.2, True), "card"),  # the evaluation's engine said nothing
        (TRUST, (0.9, 0.2, None), "card"),  # the gateway says nothing
        (TRUST, (0.9, 0.2, True), "loan"),  # another answer, which counts as a difference already
    ],
)
def test_what_cannot_be_compared_is_not(
    trust: Trust | None, pairs: tuple[float | None, float | None, bool | None], text: str
) -> None:
    asked = SEVEN.model_copy(update={"trust": trust})
    check = judge_replies(replies(pairs, text=text), asked, spec(min_agreement=0.01))
    assert (check.sure_compared, check.sure_median, check.sure_largest, check.sides_changed) == (0, None, None, 0)
    assert sureness_rows(check) == []
    assert not [problem for problem in check.problems if "threshold" in problem]


def test_an_answer_that_was_evaluated_as_sure_and_has_no_confidence_now_is_on_the_other_side() -> None:
    check = judge_replies(replies((0.9, None, True), (0.8, None, True), (0.5, None, True)), TRUSTED, spec())
    assert (check.sides_changed, check.sure_compared) == (2, 0)
    assert math.isclose(check.agreement, 1.0)
    assert check.problems[0].startswith("2 of 3 answers are on the other side")


def test_a_single_answer_may_be_on_the_other_side_however_few_there_are() -> None:
    check = judge_replies(replies((0.9, None, True), (0.5, None, True)), TRUSTED, spec())
    assert (check.sides_changed, check.problems) == (1, ())
