"""Answers rewritten by a teacher: what is let through, what is shown to it, and which files come of it."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from pydantic import ValidationError

from tasks.contracts.distill import DistillEffect, DistillSpec
from tasks.contracts.errors import DataError, ServiceError
from tasks.contracts.references import ContaminationReport, GoldenSetRef, MetricComparison
from tasks.contracts.rows import Message, Row, read_rows, write_rows
from tasks.contracts.spec import DataFormat, DataSpec, Guard, TaskSpec
from tasks.data.distill.filters import FILTERS, Judge, choose
from tasks.data.distill.prompts import ask_for_rewrite
from tasks.data.distill.rewrite import Distilled, rewrite_answers
from tasks.data.distill.source import settings_for
from tasks.data.distill.steps import effect_of
from tasks.data.ingest import ROWS, ingest
from tasks.data.synthesis.filters import Refusal
from tests.data.synthesis.fake_teacher import Body, FakeTeacher, Say, fake_teacher, says
from tests.data.toy_data import CHAT, CLASSIFY, EXTRACT, LABELS, read_lines, sentence

_RISK = "a toy set with few rows"


@pytest.fixture
def teacher(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTeacher]:
    monkeypatch.delenv("GOLDGATE_TEACHER_KEY", raising=False)
    with fake_teacher() as state:
        yield state


def training_of(task: TaskSpec, **parts: Any) -> dict[str, Any]:
    return {
        "name": "toy",
        "task": task,
        "data": {"source": "rows.jsonl", **parts},
        "golden": {"path": "golden"},
        "base_model": "base",
        "curate": {"accept_risks": {Guard.FEW_ROWS: _RISK, Guard.SMALL_CLASS: _RISK}},
    }


# -- filters ------------------------------------------------------------------------------------------------------


def row_of(text: str, target: str) -> Row:
    return Row("r1", 1, (Message("user", text),), target)


ASKED = row_of("How long is the trip of 12 km?", "its about 2 hours i think")
PRICE = row_of("12.50 only", '{"amount": 12.5}')
TICKET = row_of("My invoice", "billing")
NAMED = TaskSpec(
    kind=EXTRACT.kind,
    instruction="Who?",
    json_schema={"type": "object", "properties": {"who": {"type": "string"}, "ok": {"type": "boolean"}}},
)
PERSON = row_of("ada lovelace wrote it", '{"ok": true, "who": "ada lovelace"}')


@pytest.mark.parametrize(
    ("task", "row", "relabel", "content", "verdict"),
    [
        (CHAT, ASKED, False, {"answer": " About 2 hours. "}, "About 2 hours."),
        (CHAT, ASKED, False, "<think>hm</think> About two hours.", "About two hours."),
        (CHAT, ASKED, False, '```json\n{"answer": "About 2 hours."}\n```', "About 2 hours."),
        (CHAT, ASKED, False, {"answer": ASKED.target}, ASKED.target),
        (CHAT, ASKED, False, {"answer": "  "}, "schema: it holds no answer"),
        (CHAT, ASKED, False, {"other": "About 2 hours."}, "schema: it holds no answer"),
        (CHAT, ASKED, False, {"answer": "I'm sorry, but I can't help."}, "talk: the teacher declines"),
        (CHAT, ASKED, False, {"answer": "As an AI language model, 2 hours."}, "talk: the teacher declines"),
        (CHAT, ASKED, False, {"answer": "Here is the rewritten answer: 2 hours."}, "talk: the teacher declines"),
        (CHAT, ASKED, False, {"answer": "how long is the trip of  12 KM?"}, "echo: it repeats the input"),
        (CHAT, ASKED, False, {"answer": "long " * 60}, "too_long: it has 299 characters, more than 200"),
        (CHAT, ASKED, False, {"answer": "About 3 hours."}, "new_number: it says 3, a number that neither"),
        (CHAT, ASKED, False, {"answer": "About 2 hours for 12 km."}, "About 2 hours for 12 km."),
        (CHAT, ASKED, False, '{"answer": "\\ud83d"}', "schema: half a surrogate pair"),
        (CLASSIFY, TICKET, False, {"answer": "billing"}, "billing"),
        (CLASSIFY, TICKET, False, {"answer": "support"}, "label_changed: it says 'support', the row 'billing'"),
        (CLASSIFY, TICKET, True, {"answer": "support"}, "support"),
        (CLASSIFY, TICKET, True, {"answer": "sales"}, "schema: 'sales' is none of the labels"),
        (EXTRACT, PRICE, False, {"amount": 12.50}, '{"amount": 12.5}'),
        (EXTRACT, PRICE, False, {"amount": 12}, "value_changed: $.amount is 12, in the original 12.5"),
        (EXTRACT, PRICE, True, {"amount": 12}, "not_in_text: $.amount is 12, a number that the text does not have"),
        (EXTRACT, row_of("12 or 13", '{"amount": 12}'), True, {"amount": 13.0}, '{"amount": 13}'),
        (EXTRACT, PRICE, True, {"amount": "12"}, "schema: '12' is not of type 'number' (at $.amount)"),
        (EXTRACT, PRICE, True, "twelve", "schema: it holds no JSON object"),
        (NAMED, PERSON, False, {"who": "Ada  Lovelace", "ok": True}, '{"ok": true, "who": "Ada  Lovelace"}'),
        (NAMED, PERSON, False, {"who": "ada", "ok": True}, "value_changed: $.who is 'ada', in the original 'ada lov"),
        (NAMED, PERSON, False, {"who": "ada lovelace"}, "value_changed: $ has the fields who, the original ok, who"),
    ],
)  # fmt: skip
def test_what_is_let_through(task: TaskSpec, row: Row, relabel: bool, content: Any, verdict: str) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    found = Judge(task, relabel=relabel, max_growth=3.0).judge(row, text, "stop")
    said = f"{found.reason}: {found.detail}" if isinstance(found, Refusal) else found
    assert said == verdict or (isinstance(found, Refusal) and said.startswith(verdict))
    assert not isinstance(found, Refusal) or found.reason in FILTERS


def test_an_answer_that_was_cut_off_is_refused() -> None:
    found = Judge(CHAT, relabel=False, max_growth=3.0).judge(ASKED, "About 2", "length")
    assert found == Refusal("schema", "it was cut off at `teacher.max_tokens`", "")


def test_a_talkative_original_may_be_rewritten_in_its_own_manner() -> None:
    row = row_of("Can you hear?", "as an AI i cannot hear")
    assert Judge(CHAT, relabel=False, max_growth=3.0).judge(row, "As an AI, I cannot hear.", "stop") == (
        "As an AI, I cannot hear."
    )


def test_a_row_that_gets_too_long_for_the_training_is_refused() -> None:
    judge = Judge(CHAT, relabel=False, max_growth=3.0, too_many_tokens=lambda row, target: len(target) + 1000)
    found = judge.judge(ASKED, '{"answer": "Two."}', "stop")
    assert isinstance(found, Refusal)
    assert found[:2] == ("too_many_tokens", "with it the row has 1,004 tokens, more than `train.max_tokens`")


@pytest.mark.parametrize(
    ("task", "passed", "target", "agreeing"),
    [
        (CLASSIFY, ["support", "billing", "billing"], "billing", 2),
        (CLASSIFY, ["support", "billing"], "support", 1),
        (CHAT, ["blue sky today", "a red house by the sea", "a red house at the sea"], "a red house by the sea", 1),
    ],
)
def test_the_sample_that_most_agree_with_is_taken(
    task: TaskSpec, passed: list[str], target: str, agreeing: int
) -> None:
    assert choose(passed, task) == (target, agreeing)


def test_the_teacher_is_told_the_task_the_input_and_the_answer() -> None:
    system, user = ask_for_rewrite(CLASSIFY, TICKET, "Be careful.", relabel=True)
    assert "The task: Which team? The answer is exactly one of: billing, support." in system.content
    assert "How to rewrite: Be careful. Where the answer is wrong, correct it" in system.content
    assert user.content == "<input>\nMy invoice\n</input>\n\n<answer>\nbilling\n</answer>"
    assert "Do not change what it says." in ask_for_rewrite(CHAT, ASKED, "Be careful.", relabel=False)[0].content


# -- the specification --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        ({}, "so nothing could change; set relabel, or turn off keep_original_when_refused"),
        ({"relabel": True, "budget": {"money": 1.0}}, "budget.money needs `price`"),
        ({"relabel": True, "samples": 0}, "greater than or equal to 1"),
    ],
)
def test_what_a_specification_refuses(parts: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(problem)):
        DistillSpec.model_validate(
            {"teacher": {"url": "http://there", "model": "big"}, "training": training_of(CLASSIFY), **parts}
        )


def test_rows_can_be_left_out_where_the_teacher_gives_another_label() -> None:
    spec = DistillSpec.model_validate(
        {
            "teacher": {"url": "http://there", "model": "big"},
            "training": training_of(CLASSIFY),
            "keep_original_when_refused": False,
        }
    )
    assert not spec.relabel


@pytest.mark.parametrize(
    ("low", "high", "effect"),
    [
        (0.01, 0.2, DistillEffect.GAIN),
        (-0.2, -0.01, DistillEffect.LOSS),
        (0.0, 0.2, DistillEffect.NONE_SHOWN),
        (-0.2, 0.0, DistillEffect.NONE_SHOWN),
    ],
)
def test_an_effect_is_shown_by_the_whole_interval(low: float, high: float, effect: DistillEffect) -> None:
    one = MetricComparison(
        metric="exact_match", baseline=0.5, baseline_low=0.4, baseline_high=0.6, candidate=0.6, candidate_low=0.5,
        candidate_high=0.7, difference=0.1, low=low, high=high, confidence=0.95, method="any", n=100,
    )  # fmt: skip
    assert effect_of(one) is effect


# -- files --------------------------------------------------------------------------------------------------------


class World(NamedTuple):
    """Splits, the rows that they came from, a golden set, and what distills them."""

    splits: Path
    valid: Path
    golden: GoldenSetRef
    model: Path
    folder: Path

    def distill(self, spec: DistillSpec, name: str = "out", withheld: frozenset[str] = frozenset()) -> Distilled:
        out, scratch = self.folder / name, self.folder / "scratch"
        out.mkdir()
        scratch.mkdir(exist_ok=True)
        return rewrite_answers(spec, self.splits, self.valid, self.golden, self.model, out, scratch, withheld=withheld)

    def rows(self, name: str) -> list[Row]:
        return list(read_rows(self.folder / name))


def make_rows(prefix: str, count: int, seed: int) -> list[Row]:
    draw = random.Random(seed)
    return [
        Row(f"{prefix}{n}", n + 1, (Message("user", sentence(draw)),), LABELS[n % 2], group=f"{prefix}-{n // 2}")
        for n in range(count)
    ]


@pytest.fixture
def world(tmp_path: Path, tiny_model: Path) -> World:
    """Twenty training rows, of which the first stands there twice and counts more, six dev rows and four golden items;
    one valid row is in none of the splits.
    """
    train, dev, golden = make_rows("t", 20, 1), make_rows("d", 6, 2), make_rows("g", 4, 3)
    left = make_rows("l", 1, 4)
    splits, frozen = tmp_path / "splits", tmp_path / "golden"
    for folder in (splits, frozen):
        folder.mkdir()
    write_rows(tmp_path / "valid.jsonl", [*dev, *left, *train])
    weighed = Row(**{**as_fields(train[0]), "weight": 2.0})
    again = Row(**{**as_fields(weighed), "id": "t0#2"})
    write_rows(splits / "train.jsonl", [weighed, again, *train[1:]])
    (splits / "dev.jsonl").write_bytes(b"".join((row.to_json() + " \n").encode() for row in dev))  # bytes of its own
    write_rows(frozen / "items.jsonl", golden)
    reference = GoldenSetRef(path=str(frozen), digest="d" * 64, items=4)
    return World(splits, tmp_path / "valid.jsonl", reference, tiny_model, tmp_path)


def as_fields(row: Row) -> dict[str, Any]:
    return {name: getattr(row, name) for name in row.__dataclass_fields__}


@pytest.fixture
def make_spec(teacher: FakeTeacher) -> Callable[..., DistillSpec]:
    def make(**parts: Any) -> DistillSpec:
        asked = {"url": teacher.url, "model": "big", "max_tokens": 64} | parts.pop("teacher", {})
        training = training_of(CLASSIFY, group_field="team", weight_field="weight") | parts.pop("training", {})
        return DistillSpec.model_validate({"teacher": asked, "training": training, "relabel": True, **parts})

    return make


def shown(body: Body) -> str:
    found = re.search(r"<input>\n(.*)\n</input>", body["messages"][-1]["content"], re.DOTALL)
    assert found is not None
    return found.group(1)


def number_of(world: World, body: Body) -> int:
    """Which training row is asked about."""
    texts = {row.text: row.id for row in world.rows("splits/train.jsonl") if "#" not in row.id}
    return int(texts[shown(body)].removeprefix("t"))


def mixed(world: World) -> Callable[[Body], Say]:
    """Rows 0 to 4 get the other label, 5 and 6 none of the labels, 7 no JSON, all others their own."""

    def reply(body: Body) -> Say:
        number = number_of(world, body)
        if number == 7:
            return says("I do not know")
        own = LABELS[number % 2]
        answer = "sales" if number in (5, 6) else LABELS[(number + 1) % 2] if number < 5 else own
        return says({"answer": answer})

    return reply


def test_answers_stand_beside_their_originals_and_dev_stays_as_it_is(
    world: World, make_spec: Callable[..., DistillSpec], teacher: FakeTeacher
) -> None:
    teacher.reply = mixed(world)
    made = world.distill(make_spec(), withheld=frozenset({"t19"}))
    assert made[:5] == (21, 6, 5, 0, None)
    assert made.traffic == (19, 0, 0)

    before, after = world.rows("splits/train.jsonl"), world.rows("out/train.jsonl")
    changed = {"t0", "t0#2", "t1", "t2", "t3", "t4"}
    for old, new in zip(before, after, strict=True):
        other = LABELS[1 - LABELS.index(old.target)]
        assert as_fields(new) == as_fields(old) | ({"target": other} if old.id in changed else {})
    assert (world.folder / "out/dev.jsonl").read_bytes() == (world.splits / "dev.jsonl").read_bytes()

    originals = {line["id"]: line for line in read_lines(world.folder / "out/originals.jsonl")}
    assert list(originals) == [f"t{n}" for n in range(20)]
    assert originals["t1"] == {
        "id": "t1", "original": "support", "rewritten": "billing", "used": "rewritten", "reason": "rewritten",
    }  # fmt: skip
    assert originals["t5"] == {
        "id": "t5", "original": "support", "rewritten": None, "used": "original", "reason": "schema",
        "detail": "'sales' is none of the labels", "written": '{"answer": "sales"}',
    }  # fmt: skip
    assert originals["t19"]["reason"] == "withheld"
    report = json.loads((world.folder / "out/report.json").read_text())
    steps = {step["step"]: step["removed"] for step in report["funnel"] if step["removed"]}
    assert steps == {"withheld": 1, "schema": 3, "unchanged": 11}
    assert report["funnel"][-1]["left"] == report["rewritten"] == 5
    assert (report["rows"], report["refused"], report["left_out"]) == (20, 3, 0)
    assert report["costs"]["requests"] == 19


def test_the_teacher_sees_neither_dev_nor_golden_set_nor_what_is_withheld(
    world: World, make_spec: Callable[..., DistillSpec], teacher: FakeTeacher
) -> None:
    teacher.reply = mixed(world)
    world.distill(make_spec(), withheld=frozenset({"t3"}))
    asked = json.dumps(teacher.asked)
    train = {row.text for row in world.rows("splits/train.jsonl")}
    (withheld,) = (row.text for row in world.rows("splits/train.jsonl") if row.id == "t3")
    assert {shown(body) for body in teacher.asked} == train - {withheld}
    assert withheld not in asked
    for name in ("splits/dev.jsonl", "golden/items.jsonl"):
        assert not [row.text for row in world.rows(name) if row.text in asked]


def test_the_new_splits_are_looked_through_for_golden_items(
    world: World, make_spec: Callable[..., DistillSpec], teacher: FakeTeacher
) -> None:
    teacher.reply = mixed(world)
    world.distill(make_spec())

    def report_of(name: str) -> ContaminationReport:
        return ContaminationReport.model_validate_json((world.folder / name / "contamination.json").read_text())

    clean = report_of("out")
    assert (clean.rows, clean.golden_digest, clean.found) == (27, "d" * 64, {})
    planted = world.rows("golden/items.jsonl")[0]
    with (world.splits / "train.jsonl").open("a") as out:
        out.write(Row("t20", 30, planted.messages, "billing").to_json() + "\n")
    teacher.reply = lambda body: says({"answer": "billing"})
    world.distill(make_spec(), "planted")
    assert report_of("planted").found == {"golden_same_text": 1}


def test_refused_rows_can_be_left_out(
    world: World, make_spec: Callable[..., DistillSpec], teacher: FakeTeacher
) -> None:
    teacher.reply = mixed(world)
    made = world.distill(make_spec(relabel=False, keep_original_when_refused=False))
    left = [f"t{n}" for n in range(8, 20)]
    assert (made.train, made.rewritten, made.left_out) == (12, 0, 8)
    assert [row.id for row in world.rows("out/train.jsonl")] == left
    used = Counter(line["used"] for line in read_lines(world.folder / "out/originals.jsonl"))
    assert used == {"none": 8, "original": 12}
    assert {line["id"] for line in read_lines(world.folder / "out/source.jsonl")} == {
        *left,
        *(f"d{n}" for n in range(6)),
    }
    report = json.loads((world.folder / "out/report.json").read_text())
    assert report["accepted_risks"]["few_rows"] == {
        "found": "12 training rows, fewer than 500", "reason": _RISK
    }  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("sales", "answers to all 20 training rows were refused, so none is left"),
        ("billing", "The label 'support' has no training row"),
    ],
)
def test_what_is_left_must_be_enough_to_learn_from(
    world: World, make_spec: Callable[..., DistillSpec], teacher: FakeTeacher, answer: str, problem: str
) -> None:
    teacher.reply = lambda body: says({"answer": answer})
    with pytest.raises(DataError, match=problem):
        world.distill(make_spec(keep_original_when_refused=False))


def test_a_budget_that_ends_leaves_the_other_answers_as_they_are(
    world: World, make_spec: Callable[..., DistillSpec], teacher: FakeTeacher
) -> None:
    teacher.reply = mixed(world)
    made = world.distill(make_spec(budget={"requests": 3}, keep_original_when_refused=False))
    assert (made.rewritten, made.left_out, made.stopped) == (3, 0, "budget.requests is 3")
    assert len(teacher.asked) == 3
    originals = read_lines(world.folder / "out/originals.jsonl")
    assert Counter(line["reason"] for line in originals) == {"rewritten": 3, "budget": 17}
    assert originals[3]["detail"] == "not asked, since budget.requests is 3"
    assert [line["used"] for line in originals[3:]] == ["original"] * 17


def test_a_run_that_died_goes_on_and_pays_for_nothing_twice(
    world: World, make_spec: Callable[..., DistillSpec], teacher: FakeTeacher
) -> None:
    spec = make_spec(teacher={"concurrency": 1, "max_failures": 1})
    good = mixed(world)
    teacher.reply = lambda body: good(body) if len(teacher.asked) <= 9 else Say("out of memory", 418)
    with pytest.raises(ServiceError, match="The teacher failed a request"):
        world.distill(spec, "first")
    paid, teacher.asked, teacher.reply = teacher.asked[:9], [], good
    made = world.distill(spec, "second")
    assert made.traffic == (11, 9, 0)
    assert not [body for body in teacher.asked if body in paid]
    # The same answers give the same bytes, however often it was interrupted.
    assert world.distill(spec, "third").traffic == (0, 20, 0)
    for name in ("train.jsonl", "dev.jsonl", "originals.jsonl", "source.jsonl", "report.json", "contamination.json"):
        assert (world.folder / "second" / name).read_bytes() == (world.folder / "third" / name).read_bytes()


def test_of_several_samples_the_majority_is_taken(
    world: World, make_spec: Callable[..., DistillSpec], teacher: FakeTeacher
) -> None:
    drawn: Counter[int] = Counter()

    def reply(body: Body) -> Say:
        number = number_of(world, body)
        drawn[number] += 1
        own, other = LABELS[number % 2], LABELS[(number + 1) % 2]
        return says({"answer": ("sales", other, other)[drawn[number] - 1] if number < 3 else own})

    teacher.reply = reply
    made = world.distill(make_spec(samples=3, teacher={"concurrency": 1}))
    assert set(drawn.values()) == {3}
    assert made.rewritten == 3
    originals = read_lines(world.folder / "out/originals.jsonl")
    assert [(line["reason"], line["agreeing"]) for line in originals[:4]] == [("rewritten", 2)] * 3 + [("unchanged", 3)]


# -- the way to the gate ------------------------------------------------------------------------------------------


def test_the_rewritten_rows_are_a_source_under_the_same_ids(
    world: World, make_spec: Callable[..., DistillSpec], teacher: FakeTeacher
) -> None:
    teacher.reply = mixed(world)
    spec = make_spec()
    world.distill(spec)
    assert settings_for("out.jsonl", spec.training.data) == ("data.source=out.jsonl", "data.source_field=source")
    read = world.folder / "read"
    read.mkdir()
    source = str(world.folder / "out/source.jsonl")
    data = spec.training.data.model_copy(update={"source": source, "source_field": "source"})
    assert ingest(data, CLASSIFY.kind, read) == (26, 0)
    rows = {row.id: row for row in read_rows(read / ROWS)}
    valid = {row.id: row for row in world.rows("valid.jsonl")}
    assert rows.keys() == valid.keys() - {"l0"}
    for row_id, row in rows.items():
        old = valid[row_id]
        rewritten = row_id in {"t0", "t1", "t2", "t3", "t4"}
        assert row.target == (LABELS[1 - LABELS.index(old.target)] if rewritten else old.target)
        assert row.source == ("rewritten:big" if rewritten else None)
        assert (row.messages, row.group, row.weight) == (old.messages, old.group, 1.0)


@pytest.mark.parametrize(
    ("data", "settings"),
    [
        (DataSpec(source="x.jsonl"), ("data.source=o", "data.source_field=source")),
        (DataSpec(source="x.jsonl", source_field="origin"), ("data.source=o",)),
        (
            DataSpec(source="x.csv", format=DataFormat.CSV),
            ("data.source=o", "data.format=jsonl", "data.source_field=source"),
        ),
        (DataSpec(source="x.jsonl", text_field="source"), ("data.source=o",)),
    ],
)
def test_what_a_run_has_to_be_set_to(data: DataSpec, settings: tuple[str, ...]) -> None:
    assert settings_for("o", data) == settings


@pytest.mark.parametrize("columns", [{}, {"messages_field": "turns"}])
def test_conversations_and_json_come_back_as_they_were(
    tmp_path: Path,
    tiny_model: Path,
    make_spec: Callable[..., DistillSpec],
    teacher: FakeTeacher,
    columns: dict[str, str],
) -> None:
    turns = (Message("system", "Be short."), Message("user", "12 or 13?"))
    rows = [Row("a", 1, turns, '{"amount": 12}'), Row("b", 2, (Message("user", "7 or 8?"),), '{"amount": 7}')]
    (tmp_path / "splits").mkdir()
    (tmp_path / "golden").mkdir()
    write_rows(tmp_path / "valid.jsonl", rows)
    write_rows(tmp_path / "splits/train.jsonl", rows[:1])
    write_rows(tmp_path / "splits/dev.jsonl", rows[1:])
    write_rows(tmp_path / "golden/items.jsonl", [Row("g", 1, (Message("user", "1?"),), '{"amount": 1}')])
    golden = GoldenSetRef(path=str(tmp_path / "golden"), digest="d" * 64, items=1)
    world = World(tmp_path / "splits", tmp_path / "valid.jsonl", golden, tiny_model, tmp_path)
    teacher.reply = lambda body: says({"amount": 13.0})
    spec = make_spec(training=training_of(EXTRACT, target_field="json", **columns))
    assert world.distill(spec).rewritten == 1
    read = tmp_path / "read"
    read.mkdir()
    data = spec.training.data.model_copy(update={"source": str(tmp_path / "out/source.jsonl")})
    assert ingest(data, EXTRACT.kind, read) == (2, 0)
    back = {row.id: row for row in read_rows(read / ROWS)}
    assert {key: (row.messages, row.target) for key, row in back.items()} == {
        "a": (turns, '{"amount": 13}'),
        "b": (rows[1].messages, '{"amount": 7}'),
    }
