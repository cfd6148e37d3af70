"""From what is wanted to rows: the funnel adds up, nothing is paid twice, and the golden set stays secret."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tasks.contracts.errors import DataError, ServiceError
from tasks.contracts.progress import Progress
from tasks.contracts.rows import Message, Row
from tasks.contracts.spec import DataSpec
from tasks.contracts.synthesis import PriceSpec, SynthesizeSpec
from tasks.data.synthesis.report import STEPS, report_markdown
from tasks.data.synthesis.write import QUARANTINE, REPORT, SYNTHETIC, Synthesized, write_examples
from tests.data.synthesis.fake_teacher import (
    Body,
    FakeTeacher,
    Say,
    good_teacher,
    is_vote,
    label_of,
    says,
    ticket,
)
from tests.data.toy_data import CHAT, EXTRACT, read_lines

MakeSpec = Callable[..., SynthesizeSpec]
GOLDEN = [Row(f"g{n}", n, (Message("user", ticket("billing", 90_000 + n, words=20)),), "billing") for n in range(1, 21)]
REAL = [
    Row(f"r{n}", n, (Message("user", ticket(label, 80_000 + n)),), label)
    for n in range(1, 31)
    for label in ("billing" if n % 3 else "support",)
]


@dataclass
class Written:
    """What a run left, read again."""

    made: Synthesized
    folder: Path

    @property
    def rows(self) -> list[dict[str, Any]]:
        return read_lines(self.folder / SYNTHETIC)

    @property
    def quarantine(self) -> list[dict[str, Any]]:
        return read_lines(self.folder / QUARANTINE)

    @property
    def report(self) -> dict[str, Any]:
        found = json.loads((self.folder / REPORT).read_text())
        assert isinstance(found, dict)
        return found

    @property
    def bytes(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(self.folder.iterdir())}

    def steps(self) -> dict[str, tuple[int, int, dict[str, int]]]:
        return {entry["step"]: (entry["in"], entry["out"], entry["rejected"]) for entry in self.report["funnel"]}


Write = Callable[..., Written]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write examples into a new folder; every call checks that the counts add up."""
    count = 0

    def run(spec: SynthesizeSpec, scratch: str = "scratch", real: list[Row] = REAL, **more: Any) -> Written:
        nonlocal count
        count += 1
        folder = tmp_path / f"out-{count}"
        folder.mkdir()
        (tmp_path / scratch).mkdir(exist_ok=True)
        made = write_examples(spec, lambda: iter(real), lambda: iter(GOLDEN), folder, tmp_path / scratch, **more)
        written = Written(made, folder)
        check_adds_up(written)
        return written

    return run


def check_adds_up(written: Written) -> None:
    report, steps = written.report, written.steps()
    assert len(written.rows) == written.made.rows == report["kept"]
    assert len(written.rows) + len(written.quarantine) == written.made.asked == report["asked"]
    assert list(steps) == list(STEPS)
    left = report["asked"]
    for step in STEPS:
        came, went, rejected = steps[step]
        assert came == left
        assert came - went == sum(rejected.values())
        assert rejected == Counter(one["reason"] for one in written.quarantine if one["step"] == step)
        left = went
    assert left == report["kept"]
    provenances = [one["provenance"]["request"] for one in (*written.rows, *written.quarantine)]
    assert len(set(provenances)) == len(provenances)


# -- the good case ------------------------------------------------------------------------------------------------


def test_rows_come_in_the_columns_of_the_data(teacher: FakeTeacher, make_spec: MakeSpec, write: Write) -> None:
    data = DataSpec(
        source="rows.jsonl", text_field="body", target_field="team", id_field="key", slice_field="channel",
        source_field="origin",
    )  # fmt: skip
    real = [Row(f"r{n}", n, (Message("user", ticket("support", n)),), "support", slice="mail") for n in range(9)]
    spec = make_spec(data=data, fill=[{"label": "support", "slice": "mail", "rows": 1}])
    (row,) = write(spec, real=real).rows
    assert label_of(row["body"]) == "support"
    provenance = row.pop("provenance")
    assert row.pop("key").startswith("syn-")
    assert row == {
        "body": row["body"], "team": "support", "channel": "mail", "origin": "synthetic:big",
        "synthetic": True, "source": "synthetic:big",
    }  # fmt: skip
    assert provenance["label"] == "support"
    assert provenance["slice"] == "mail"
    assert provenance["round"] == 1
    assert len(provenance["shots"]) == 4
    assert len(provenance["request"]) == 16


def test_rows_as_chat_messages(teacher: FakeTeacher, make_spec: MakeSpec, write: Write) -> None:
    data = DataSpec(source="rows.jsonl", messages_field="turns")
    (row,) = write(make_spec(data=data, fill=[{"label": "support", "rows": 1}])).rows
    assert [turn["role"] for turn in row["turns"]] == ["user", "assistant"]
    assert row["turns"][1]["content"] == "support"


def test_what_is_wanted_is_asked_for_and_no_more(teacher: FakeTeacher, make_spec: MakeSpec, write: Write) -> None:
    heard: list[Progress] = []
    spec = make_spec(fill_classes_to=24, price=PriceSpec(per_million_prompt=1, per_million_completion=10))
    written = write(spec, listener=heard.append)
    # There are 20 and 10 real rows, and the fill of the spec is part of what billing lacks.
    assert Counter(row["label"] for row in written.rows) == {"billing": 4, "support": 14}
    assert len({row["id"] for row in written.rows}) == 18
    assert written.made.asked == 18
    assert written.report["fills"] == [
        {"label": "billing", "wanted": 3, "asked": 3, "kept": 3},
        {"label": "billing", "wanted": 1, "asked": 1, "kept": 1},
        {"label": "support", "wanted": 14, "asked": 14, "kept": 14},
    ]
    # Two votes agree at once, so the third is not asked for.
    assert len(teacher.asked) == 18 * 3
    assert written.report["costs"]["money"] == pytest.approx(18 * 3 * 0.0003)
    assert written.report["money_per_row"] == pytest.approx(3 * 0.0003)
    assert heard[-1].done == heard[-1].total == 18
    assert heard[-1].note == "18 asked, 6,480 tokens, 0.02 USD"


def test_grounding_of_labels_is_skipped_and_said_to_be(teacher: FakeTeacher, make_spec: MakeSpec, write: Write) -> None:
    grounding = write(make_spec()).report["funnel"][3]
    assert grounding["skipped"] == "the answer to a classify example is a label, which stands in no text"
    assert grounding["in"] == grounding["out"] == 3


# -- what is refused ----------------------------------------------------------------------------------------------


@dataclass
class Script:
    """A teacher with known faults: what it writes for the n-th example of each kind."""

    faults: dict[int, Callable[[Body], Any]]

    def __call__(self, body: Body) -> Say:
        if is_vote(body):
            text = body["messages"][-1]["content"]
            if "undecided" in text:
                return says({"answer": ("billing", "support")[body["seed"] % 2]})
            return says({"answer": label_of(text)})
        number = int(body["messages"][1]["content"].rsplit("This is number ", 1)[1].split(":")[0])
        fault = self.faults.get(number)
        return good_teacher(body) if fault is None else says(fault(body))


def test_every_filter_counts_what_it_refuses(teacher: FakeTeacher, make_spec: MakeSpec, write: Write) -> None:
    first_golden = GOLDEN[0].text
    teacher.reply = Script(
        {
            1: lambda _: "I would rather not.",
            2: lambda _: {"text": 12},
            3: lambda body: {"text": ticket("support", body["seed"])},  # not what was asked for
            4: lambda body: {"text": f"nothing in it tells {body['seed']} x y z", "more": 1},
            5: lambda _: {"text": first_golden},
            6: lambda _: {"text": f"{first_golden} refund"},
            7: lambda _: {"text": REAL[0].text.upper()},
            8: lambda _: {"text": f"{ticket('billing', 4)}"},
            9: lambda _: {"text": f"{ticket('billing', 4)} again"},
        }
    )
    written = write(make_spec(fill=[{"label": "billing", "rows": 12}], refine=False, rounds=1))
    assert written.steps() == {
        "answer": (12, 12, {}),
        "schema": (12, 9, {"schema": 3}),
        "self_consistency": (9, 8, {"inconsistent": 1}),
        "grounding": (8, 8, {}),
        "duplicates": (
            8, 4, {"exact_duplicate": 1, "golden_near_duplicate": 1, "golden_same_text": 1, "near_duplicate": 1},
        ),
    }  # fmt: skip
    assert [entry["survival"] for entry in written.report["funnel"]] == [1.0, 0.75, 0.8889, 1.0, 0.5]
    assert written.quarantine[0]["written"] == "I would rather not."
    assert written.quarantine[0]["text"] is None
    inconsistent = next(one for one in written.quarantine if one["reason"] == "inconsistent")
    assert (label_of(inconsistent["text"]), inconsistent["target"]) == ("support", "billing")


def test_a_request_that_brings_nothing_is_counted_and_the_others_go_on(
    teacher: FakeTeacher, make_spec: MakeSpec, write: Write
) -> None:
    teacher.reply = lambda body: (
        Say("context length", 400)
        if not is_vote(body) and "number 2:" in body["messages"][1]["content"]
        else good_teacher(body)
    )
    written = write(make_spec(rounds=1))
    assert written.steps()["answer"] == (3, 2, {"no_answer": 1})
    assert written.quarantine[0]["detail"] == "it refuses the request (HTTP 400): context length"


def test_the_third_vote_is_asked_for_where_it_decides(teacher: FakeTeacher, make_spec: MakeSpec, write: Write) -> None:
    votes: Counter[str] = Counter()

    def reply(body: Body) -> Say:
        if not is_vote(body):
            return good_teacher(body)
        text = body["messages"][-1]["content"]
        votes[text] += 1
        return says({"answer": "support" if votes[text] == 1 else "billing"})

    teacher.reply = reply
    written = write(make_spec(teacher={"concurrency": 1}))
    assert len(written.rows) == 3
    assert set(votes.values()) == {3}


# -- second tries and rounds --------------------------------------------------------------------------------------


def test_a_refused_example_is_tried_once_more_with_the_reason(
    teacher: FakeTeacher, make_spec: MakeSpec, write: Write
) -> None:
    def reply(body: Body) -> Say:
        if is_vote(body) or len(body["messages"]) > 2:
            return good_teacher(body)
        return says({"text": GOLDEN[0].text})

    teacher.reply = reply
    written = write(make_spec(rounds=1))
    assert written.report["refinement"] == {"asked": 3, "kept": 3}
    assert written.steps()["duplicates"] == (6, 3, {"golden_same_text": 3})
    assert all(row["provenance"]["refined"] for row in written.rows)
    again = [body for body in teacher.written if len(body["messages"]) > 2]
    assert {body["messages"][-1]["content"] for body in again} == {
        "This example was refused: there is one like it already, so say something else. Write another one that avoids "
        "this, in the same form."
    }


def test_a_second_try_passes_the_same_filters_and_there_is_no_third(
    teacher: FakeTeacher, make_spec: MakeSpec, write: Write
) -> None:
    teacher.reply = lambda body: good_teacher(body) if is_vote(body) else says({"text": REAL[0].text})
    written = write(make_spec(rounds=1))
    assert written.rows == []
    assert written.report["refinement"] == {"asked": 3, "kept": 0}
    assert written.steps()["duplicates"] == (6, 0, {"exact_duplicate": 6})
    assert len(teacher.written) == 6


def test_what_is_missing_is_asked_for_again_with_other_numbers(
    teacher: FakeTeacher, make_spec: MakeSpec, write: Write
) -> None:
    teacher.reply = Script({1: lambda _: "no", 3: lambda _: "no", 4: lambda _: "no"})
    written = write(make_spec(rounds=3, refine=False))
    assert written.report["fills"] == [{"label": "billing", "wanted": 3, "asked": 6, "kept": 3}]
    assert [row["provenance"]["round"] for row in written.rows] == [1, 2, 3]
    assert written.steps()["schema"] == (6, 3, {"schema": 3})


def test_a_later_round_does_not_repeat_an_earlier_one(teacher: FakeTeacher, make_spec: MakeSpec, write: Write) -> None:
    """Number 1 is kept; 2 and 3 are unusable; what is then asked for in their place repeats 1, wholly and nearly."""
    teacher.reply = Script(
        {
            1: lambda _: {"text": ticket("billing", 1)},
            2: lambda _: "no",
            3: lambda _: "no",
            4: lambda _: {"text": ticket("billing", 1).upper()},
            5: lambda _: {"text": f"{ticket('billing', 1)} again"},
        }
    )
    written = write(make_spec(rounds=2, refine=False))
    assert len(written.rows) == 1
    assert [(one["reason"], one["detail"]) for one in written.quarantine[2:]] == [
        ("exact_duplicate", "same text as example 1"),
        ("near_duplicate", "nearly the same text as example 1"),
    ]


def test_rounds_end(teacher: FakeTeacher, make_spec: MakeSpec, write: Write) -> None:
    teacher.reply = lambda body: says("no")
    written = write(make_spec(rounds=2, refine=False))
    assert written.made == Synthesized(0, 6, None, written.made.traffic)
    assert written.report["survival"] == 0.0
    assert written.report["money_per_row"] is None


# -- documents ----------------------------------------------------------------------------------------------------

BRIDGE = "The Tower Bridge was opened in 1894.\n\nIt is 244 metres long and cost 1,184,000 pounds."


def documents(tmp_path: Path) -> dict[str, Any]:
    folder = tmp_path / "documents"
    folder.mkdir()
    (folder / "bridge.txt").write_text(BRIDGE)
    return {"path": str(folder), "per_document": 4}


def number_of(body: Body) -> int:
    return int(body["messages"][1]["content"].split("This is number ")[1].split(" ")[0])


def test_answers_are_grounded_in_documents(
    teacher: FakeTeacher, make_spec: MakeSpec, write: Write, tmp_path: Path
) -> None:
    written = [
        {"text": "When was it opened?", "answer": "It was opened in 1894.", "quote": "was opened in 1894"},
        {"text": "How long is it?", "answer": "It is 245 metres long.", "quote": "244 metres long"},
        {"text": "Who built it?", "answer": "Horace Jones did.", "quote": "built by Horace Jones"},
        {"text": "What did it cost?", "answer": "It cost 1184000 pounds.", "quote": "cost 1,184,000 pounds"},
    ]
    answers = {example["text"]: example["answer"] for example in written}

    def reply(body: Body) -> Say:
        if is_vote(body):
            shown = body["messages"][-1]["content"]
            assert BRIDGE in shown
            return says({"answer": answers[shown.rsplit("\n\n", 1)[1]]})
        return says(written[number_of(body) - 1])

    teacher.reply = reply
    spec = make_spec(
        task=CHAT, documents=documents(tmp_path), data=DataSpec(source="x", group_field="doc"), refine=False
    )
    found = write(spec)
    assert found.steps()["grounding"] == (4, 2, {"not_in_document": 2})
    assert [one["detail"] for one in found.quarantine] == [
        "it says 245, a number that the document does not have",
        "its quote does not stand in the document",
    ]
    assert [row["text"] for row in found.rows] == [f"{BRIDGE}\n\n{written[n]['text']}" for n in (0, 3)]
    assert {row["doc"] for row in found.rows} == {"bridge.txt"}
    assert found.rows[0]["provenance"]["quote"] == "was opened in 1894"
    assert found.report["documents"] == {"asked": 4, "kept": 2}

    by_heart = spec.model_copy(update={"documents": spec.documents.model_copy(update={"in_input": False})})  # type: ignore[union-attr]
    assert [row["text"] for row in write(by_heart).rows] == [written[n]["text"] for n in (0, 3)]


def test_values_are_taken_from_passages(
    teacher: FakeTeacher, make_spec: MakeSpec, write: Write, tmp_path: Path
) -> None:
    written = [
        {"text": "it is 244 metres long", "answer": {"amount": 244}},
        {"text": "It is 245 metres long", "answer": {"amount": 245}},  # no passage
        {"text": "was opened in 1894", "answer": {"amount": 1895}},  # not in the passage
        {"text": "cost 1,184,000 pounds", "answer": {"amount": 1184000.0}},
    ]
    answers = {str(example["text"]): example["answer"] for example in written}
    teacher.reply = lambda body: (
        says(answers[body["messages"][-1]["content"]]) if is_vote(body) else says(written[number_of(body) - 1])
    )
    found = write(make_spec(task=EXTRACT, documents=documents(tmp_path), refine=False))
    assert found.steps()["grounding"] == (4, 2, {"not_in_document": 1, "not_in_text": 1})
    assert [row["label"] for row in found.rows] == [{"amount": 244}, {"amount": 1184000}]


def test_no_documents_are_an_error_before_anything_is_asked(
    teacher: FakeTeacher, make_spec: MakeSpec, write: Write, tmp_path: Path
) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="folder of documents is empty"):
        write(make_spec(task=CHAT, documents={"path": str(tmp_path / "none")}))
    assert teacher.asked == []


# -- secrets ------------------------------------------------------------------------------------------------------


def test_the_teacher_never_sees_the_golden_set(teacher: FakeTeacher, make_spec: MakeSpec, write: Write) -> None:
    """Even where the real rows hold it, and where an example is refused since it is too near to it."""
    teacher.reply = lambda body: (
        says({"text": f"{GOLDEN[body['seed'] % 20].text} refund"})
        if not is_vote(body) and len(body["messages"]) == 2
        else good_teacher(body)
    )
    real = [*GOLDEN, *(Row(f"x{n}", n, item.messages, "billing") for n, item in enumerate(GOLDEN)), *REAL]
    written = write(make_spec(fill=[{"label": "billing", "rows": 30}]), real=real)
    assert written.steps()["duplicates"][2]["golden_near_duplicate"] > 0
    told = [
        turn["content"]
        for body in teacher.written
        for turn in body["messages"]
        if turn["role"] != "assistant"  # what it wrote itself
    ]
    assert not [text for text in told for item in GOLDEN if item.text in text or item.id in text.split()]


def test_withheld_rows_are_not_shown(teacher: FakeTeacher, make_spec: MakeSpec, write: Write) -> None:
    withheld = {row.id for row in REAL[:15]}
    write(make_spec(fill=[{"label": "billing", "rows": 20}]), withheld=withheld)
    shown = "\n".join(body["messages"][1]["content"] for body in teacher.written)
    assert not [row.id for row in REAL[:15] if row.text in shown]
    assert [row.id for row in REAL[15:] if row.text in shown]


# -- the same again -----------------------------------------------------------------------------------------------


def test_the_same_specification_gives_the_same_bytes(teacher: FakeTeacher, make_spec: MakeSpec, write: Write) -> None:
    def reply(body: Body) -> Say:
        time.sleep((body["seed"] % 7) / 500)  # answers overtake each other
        return Script({number: lambda _: "no" for number in range(1, 40, 5)})(body)

    teacher.reply = reply
    spec = make_spec(fill=[{"label": "billing", "rows": 40}, {"label": "support", "rows": 5}])
    first = write(spec, scratch="one", real=REAL)
    again = write(spec, scratch="two", real=list(reversed(REAL)))
    one_by_one = spec.model_copy(update={"teacher": spec.teacher.model_copy(update={"concurrency": 1})})
    other = write(one_by_one, scratch="three")
    assert first.bytes == again.bytes == other.bytes
    asked = len(teacher.asked)
    assert write(spec, scratch="one").bytes == first.bytes
    assert len(teacher.asked) == asked  # all of it came from the journal


def test_more_rows_are_asked_for_and_the_others_come_from_the_journal(
    teacher: FakeTeacher, make_spec: MakeSpec, write: Write
) -> None:
    first = write(make_spec(fill=[{"label": "billing", "rows": 5}]))
    teacher.asked.clear()
    more = write(make_spec(fill=[{"label": "billing", "rows": 8}]))
    assert more.rows[:5] == first.rows
    assert len(teacher.written) == 3
    assert more.made.traffic[:2] == (9, 15)


@pytest.mark.parametrize("budget", [{"requests": 40}, {"tokens": 20_000}, {"money": 0.02}])
def test_a_budget_ends_with_finished_examples(
    teacher: FakeTeacher, make_spec: MakeSpec, write: Write, budget: dict[str, Any]
) -> None:
    price = PriceSpec(per_million_prompt=1, per_million_completion=10)
    spec = make_spec(fill=[{"label": "billing", "rows": 500}], budget=budget, price=price)
    written = write(spec)
    ((name, limit),) = budget.items()
    assert written.made.stopped is not None
    assert written.made.stopped.startswith(f"budget.{name} is ")
    costs = written.report["costs"]
    spent = {"tokens": costs["prompt_tokens"] + costs["completion_tokens"]} | costs
    assert 0.5 * limit < spent[name] <= limit
    assert costs["requests"] == len(teacher.asked)
    # One example at most was paid for and could not be checked.
    assert len(written.rows) >= 5
    assert len(written.quarantine) <= 1
    assert "**Stopped early**: budget." in report_markdown(written.report, "here")

    more = spec.model_copy(update={"budget": spec.budget.model_copy(update={name: 2 * limit})})
    asked = len(teacher.asked)
    again = write(more)
    assert again.rows[: len(written.rows)] == written.rows
    assert len(again.rows) > 1.5 * len(written.rows)
    assert again.made.traffic.reused == asked
    assert teacher.repeated == []


def test_a_teacher_that_dies_keeps_what_was_paid(teacher: FakeTeacher, make_spec: MakeSpec, write: Write) -> None:
    spec = make_spec(
        fill=[{"label": "billing", "rows": 10}], teacher={"concurrency": 1, "max_failures": 1, "timeout_seconds": 5}
    )
    teacher.reply = lambda body: good_teacher(body) if len(teacher.asked) <= 14 else Say("no such luck", 422)
    with pytest.raises(ServiceError, match="it refuses the request") as caught:
        write(spec)
    assert "what was paid for is kept" in caught.value.fix
    paid = [json.dumps(body) for body in teacher.asked[:14]]
    teacher.reply = good_teacher
    teacher.asked.clear()
    assert len(write(spec).rows) == 10
    assert not set(paid) & {json.dumps(body) for body in teacher.asked}
    assert len(teacher.asked) == 30 - 14


# -- kill -9 ------------------------------------------------------------------------------------------------------

_PROGRAM = """
import os, signal, sys
from pathlib import Path
from tasks.contracts.synthesis import SynthesizeSpec
from tasks.data.synthesis import journal, write
from tests.data.synthesis.test_write import GOLDEN, REAL

spec = SynthesizeSpec.model_validate_json(Path(sys.argv[1]).read_text())
folder, scratch, after = Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
keep, kept = journal.Journal.keep, 0

def keep_and_die(self, *args):
    global kept
    keep(self, *args)
    kept += 1
    if kept == after:
        os.kill(os.getpid(), signal.SIGKILL)

journal.Journal.keep = keep_and_die
write.write_examples(spec, lambda: iter(REAL), lambda: iter(GOLDEN), folder, scratch)
"""


def start(spec: SynthesizeSpec, tmp_path: Path, after: int) -> subprocess.Popen[bytes]:
    (tmp_path / "spec.json").write_text(spec.model_dump_json())
    for name in ("killed", "scratch"):
        (tmp_path / name).mkdir(exist_ok=True)
    command = [sys.executable, "-c", _PROGRAM, "spec.json", "killed", "scratch", str(after)]
    path = os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path})


def test_a_run_killed_between_requests_asks_nothing_twice(
    teacher: FakeTeacher, make_spec: MakeSpec, write: Write, tmp_path: Path
) -> None:
    spec = make_spec(fill=[{"label": "billing", "rows": 6}], teacher={"concurrency": 1})
    for after in (4, 5):  # in the middle of writing, and in the middle of the votes
        assert start(spec, tmp_path, after).wait(timeout=60) == -signal.SIGKILL
    assert len(teacher.asked) == 9
    assert not list((tmp_path / "killed").iterdir())
    resumed = write(spec)
    assert len(resumed.rows) == 6
    assert len(teacher.asked) == 6 * 3
    assert teacher.repeated == []
    assert resumed.bytes == write(spec, scratch="never interrupted").bytes


def test_a_run_killed_at_any_time_asks_again_only_what_was_under_way(
    teacher: FakeTeacher, make_spec: MakeSpec, write: Write, tmp_path: Path
) -> None:
    def slowly(body: Body) -> Say:
        time.sleep(0.02)
        return good_teacher(body)

    teacher.reply = slowly
    spec = make_spec(fill=[{"label": "billing", "rows": 30}], teacher={"concurrency": 4})
    process = start(spec, tmp_path, after=10**9)
    deadline = time.monotonic() + 60
    while len(teacher.asked) < 37 and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.wait(timeout=30)
    journal = (tmp_path / "scratch/answers.jsonl").read_text().count("\n")
    assert 0 < journal < 90
    write(spec)
    assert len(teacher.repeated) <= 4
    assert len(teacher.asked) <= 90 + 4


def test_the_report_reads_well(teacher: FakeTeacher, make_spec: MakeSpec, write: Write) -> None:
    price = PriceSpec(per_million_prompt=1, per_million_completion=10)
    teacher.reply = Script({1: lambda _: "no"})
    text = report_markdown(write(make_spec(price=price, rounds=1)).report, "/store/synthetic.jsonl")
    assert "# 2 rows written by `big`" in text
    assert "| schema | 4 | 2 | 50.0 % | 2 schema |" in text
    assert "| grounding | 2 | 2 | 100.0 % | skipped: the answer to a classify example is a label" in text
    assert "Told why and asked again: 1, of which 0 were kept." in text
    assert "**Costs**: 8 requests, 800 prompt and 160 completion tokens, 0.0024 USD (0.0012 a row kept)." in text
    assert "| billing |  |  | 3 | 4 | 2 |" in text


def test_a_label_that_markdown_would_read_is_written_as_it_is() -> None:
    fill = {"label": "a|b", "wanted": 1, "asked": 1, "kept": 0}
    report = {
        "kept": 0, "asked": 1, "teacher": {"model": "m`x"}, "stopped": None, "funnel": [], "fills": [fill],
        "refinement": {"asked": 0, "kept": 0}, "money_per_row": None,
        "costs": {"requests": 1, "prompt_tokens": 1, "completion_tokens": 1, "money": None, "lost_requests": 0},
    }  # fmt: skip
    text = report_markdown(report, "p")
    assert "| a\\|b |" in text
    assert "`mx`" in text
