"""A teacher that misbehaves in every way that servers do: what is said of it, what is paid, and when asking ends."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from tasks.contracts.errors import ServiceError, SpecError
from tasks.contracts.rows import Message
from tasks.contracts.synthesis import PriceSpec, SynthesisBudget, SynthesizeSpec
from tasks.data.synthesis.asker import Answer, Asker, Failed, Unasked
from tasks.data.synthesis.journal import Journal, Reply
from tasks.data.synthesis.purse import Purse
from tasks.data.synthesis.teacher import Ask, Clock, Teacher, api_root
from tests.data.synthesis.fake_teacher import COMPLETION_TOKENS, PROMPT_TOKENS, Body, FakeTeacher, Say, says

MakeSpec = Callable[..., SynthesizeSpec]
KEY = "sk-very-secret-key"
SCHEMA = {"type": "object"}


def question(number: int) -> Ask:
    return Ask((Message("user", f"question {number}"),), SCHEMA, 0.5)


QUESTIONS = [question(number) for number in range(6)]


class VirtualClock:
    """Time that passes only when somebody waits."""

    def __init__(self) -> None:
        self.time = 0.0
        self.waits: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.time += seconds
        await asyncio.sleep(0)

    @property
    def clock(self) -> Clock:
        return Clock(lambda: self.time, self.sleep)


class Asked:
    """One asking: its answers, or the error, and what it cost."""

    def __init__(self, spec: SynthesizeSpec, folder: Path, asks: list[Ask], key: str | None = None) -> None:
        self.virtual = VirtualClock()
        self.purse = Purse(spec.budget, spec.price)
        self.answers: list[Answer] = []
        self.error: ServiceError | None = None

        async def work() -> None:
            with Journal(folder, "run") as journal:
                async with Teacher(spec.teacher, key) as teacher:
                    self.asker = Asker(teacher, journal, self.purse, spec.teacher, self.virtual.clock)
                    self.answers = await self.asker.answers(asks)

        try:
            asyncio.run(work())
        except ServiceError as error:
            self.error = error

    @property
    def contents(self) -> list[str]:
        return [answer.content if isinstance(answer, Reply) else type(answer).__name__ for answer in self.answers]


def echo(body: Body) -> Say:
    return says(body["messages"][-1]["content"])


def in_turn(*replies: Say) -> Callable[[Body], Say]:
    """Each reply once, then echoes."""
    left, lock = list(replies), threading.Lock()

    def reply(body: Body) -> Say:
        with lock:
            return left.pop(0) if left else echo(body)

    return reply


def drip() -> Iterator[bytes]:
    """An answer that never ends, slowly."""
    while True:
        yield b" "
        time.sleep(0.02)


def flood() -> Iterator[bytes]:
    """An answer that never ends, fast."""
    while True:
        yield b"x" * 65_536


# -- what is sent -------------------------------------------------------------------------------------------------


def test_what_is_sent(teacher: FakeTeacher, make_spec: MakeSpec, tmp_path: Path) -> None:
    teacher.reply = echo
    asked = Asked(make_spec(), tmp_path, QUESTIONS[:1])
    assert asked.contents == ["question 0"]
    (body,) = teacher.asked
    seed = body.pop("seed")
    assert isinstance(seed, int)
    assert 0 <= seed < 2**31
    assert body == {
        "model": "big",
        "messages": [{"role": "user", "content": "question 0"}],
        "temperature": 0.5,
        "max_tokens": 64,
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}},
    }
    assert "Authorization" not in teacher.headers[0]


def test_a_server_that_knows_no_schemas_is_sent_none(teacher: FakeTeacher, make_spec: MakeSpec, tmp_path: Path) -> None:
    teacher.reply = echo
    Asked(make_spec(teacher={"structured": False}), tmp_path, QUESTIONS[:1])
    assert "response_format" not in teacher.asked[0]


def test_repetitions_of_a_question_are_requests_of_their_own(
    teacher: FakeTeacher, make_spec: MakeSpec, tmp_path: Path
) -> None:
    teacher.reply = echo
    Asked(make_spec(), tmp_path, [question(0)._replace(draw=draw) for draw in range(3)])
    assert len({body["seed"] for body in teacher.asked}) == 3


@pytest.mark.parametrize(
    ("url", "root"),
    [
        ("http://a:1", "http://a:1/v1"),
        ("http://a/v1/", "http://a/v1"),
        ("https://a/openai/v1beta", "https://a/openai/v1beta"),
        ("https://a/v1beta/openai", "https://a/v1beta/openai"),
    ],
)
def test_the_path_of_the_protocol_is_found(url: str, root: str) -> None:
    assert api_root(url) == root


def test_answers_come_in_order_and_no_more_at_once_than_allowed(
    teacher: FakeTeacher, make_spec: MakeSpec, tmp_path: Path
) -> None:
    other = threading.Event()

    def slow(body: Body) -> Say:
        if body["messages"][-1]["content"] == "question 0":
            other.wait(60.0)  # it is answered after one that was asked later
            time.sleep(0.15)
        else:
            other.set()
            time.sleep(0.02)
        return echo(body)

    teacher.reply = slow
    asked = Asked(make_spec(teacher={"concurrency": 3}), tmp_path, QUESTIONS)
    assert asked.contents == [f"question {number}" for number in range(6)]
    assert 2 <= teacher.most_at_once <= 3


def test_the_key_is_sent_and_kept_nowhere(teacher: FakeTeacher, make_spec: MakeSpec, tmp_path: Path) -> None:
    teacher.reply = in_turn(says(f"your key is {KEY}"), Say(f"no, {KEY}", 400))
    asked = Asked(make_spec(teacher={"concurrency": 1}), tmp_path, QUESTIONS[:2], key=KEY)
    assert [headers["Authorization"] for headers in teacher.headers] == [f"Bearer {KEY}"] * 2
    assert asked.contents == ["your key is ***", "Failed"]
    assert isinstance(asked.answers[1], Failed)
    assert asked.answers[1].reason == "it refuses the request (HTTP 400): no, ***"
    assert KEY not in "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())


def test_a_key_with_a_line_break_behind_it_is_sent_without(
    teacher: FakeTeacher, make_spec: MakeSpec, tmp_path: Path
) -> None:
    teacher.reply = echo
    Asked(make_spec(), tmp_path, QUESTIONS[:1], key=f"{KEY}\n")
    assert teacher.headers[0]["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("key", [f"{KEY}\nX-Other: 1", f"{KEY}…", f"{KEY}\x00"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(make_spec: MakeSpec, tmp_path: Path, key: str) -> None:
    with pytest.raises(SpecError, match="characters that no key has") as caught:
        Asked(make_spec(), tmp_path, QUESTIONS[:1], key=key)
    assert KEY not in str(caught.value)


# -- teachers that fail -------------------------------------------------------------------------------------------

SLOW = {"timeout_seconds": 1.0}
EMPTY = json.dumps({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}})


def hang(_: Body) -> Say:
    time.sleep(3.0)
    return says("late")


@pytest.mark.parametrize(
    ("reply", "settings", "reason", "fix", "attempts", "lost"),
    [
        (hang, SLOW, "no whole answer within 1 s", "timeout_seconds", 4, 4),
        (lambda _: Say("", stream=drip), SLOW, "no whole answer within 1 s", "timeout_seconds", 4, 4),
        (lambda _: Say("", stream=flood), {}, "an answer of more than 4 MB, cut off", "what runs at", 4, 4),
        (
            lambda _: Say("<html>Log in</html>", headers={"Content-Type": "text/html"}),
            {}, "a web page in place of JSON (HTTP 200)", "OpenAI-compatible API", 4, 0,
        ),
        (lambda _: Say("<!doctype html>"), {}, "a web page in place of JSON (HTTP 200)", "OpenAI-compatible API", 4, 0),
        (lambda _: Say("out of memory", 500), {}, "HTTP 500: out of memory", "server's log", 4, 0),
        (lambda _: Say('{"choices": [{"mess'), {}, 'an answer that is no JSON: {"choices": [{"mess', "runs at", 4, 4),
        (lambda _: Say("[" * 100_000), {}, "an answer that is no JSON: ", "runs at", 4, 4),
        (lambda _: Say(EMPTY), {}, f"an answer that holds no choice: {EMPTY}", "runs at", 4, 4),
        (lambda _: Say('{"error": "no"}'), {}, 'an answer that holds no choice: {"error": "no"}', "runs at", 4, 4),
        (lambda _: Say('{"choices": [{"message": {"content": [1]}}]}'), {}, "an answer that holds no text", "at", 4, 4),
        (lambda _: Say("too long", 400), {}, "it refuses the request (HTTP 400): too long", "teacher.structured", 1, 0),
    ],
    ids=[
        "times out", "streams for ever", "floods", "page by its type", "page by its text", "500", "malformed", "nested",
        "no choices", "error with 200", "content is no text", "refuses",
    ],
)  # fmt: skip
def test_a_failing_teacher_is_given_up_with_the_reason(
    teacher: FakeTeacher, make_spec: MakeSpec, tmp_path: Path, reply: Callable[[Body], Say], settings: dict[str, Any],
    reason: str, fix: str, attempts: int, lost: int,
) -> None:  # fmt: skip
    teacher.reply = reply
    asked = Asked(make_spec(teacher={"max_failures": 1, **settings}), tmp_path, QUESTIONS[:1])
    assert asked.error is not None
    assert asked.error.what.startswith(f"The teacher failed a request: {reason}")
    assert asked.error.where == f"{teacher.url}/v1"
    assert fix in asked.error.fix
    assert asked.error.fix.endswith("what was paid for is kept, and the same command goes on from it")
    assert len(teacher.asked) == attempts
    # Each of these may have been paid, and counts at its most.
    assert asked.purse.spent.requests == asked.purse.lost.requests == lost
    assert asked.purse.spent.completion_tokens == 64 * lost


def test_nobody_there(make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = make_spec(teacher={"url": "http://127.0.0.1:9", "max_failures": 1})
    asked = Asked(spec, tmp_path, QUESTIONS[:1])
    assert asked.error is not None
    assert "no connection" in asked.error.what
    assert asked.purse.spent.requests == 0


@pytest.mark.parametrize(
    ("status", "what", "fix"),
    [
        (401, "refuses access (HTTP 401)", "GOLDGATE_TEACHER_KEY (it is not set)"),
        (403, "refuses access (HTTP 403)", "GOLDGATE_TEACHER_KEY"),
        (402, "refuses access (HTTP 402)", "GOLDGATE_TEACHER_KEY"),
        (404, "does not know the path or the model 'big'", "teacher.model"),
        (302, "sends elsewhere (HTTP 302)", "teacher.url"),
    ],
)
def test_what_refuses_everything_ends_asking_at_once(
    teacher: FakeTeacher, make_spec: MakeSpec, tmp_path: Path, status: int, what: str, fix: str
) -> None:
    teacher.reply = lambda _: Say("no", status, {"Location": "http://127.0.0.1:9/"} if status == 302 else {})
    asked = Asked(make_spec(teacher={"concurrency": 1}), tmp_path, QUESTIONS)
    assert asked.error is not None
    assert what in asked.error.what
    assert fix in asked.error.fix
    assert len(teacher.asked) == 1


def test_a_busy_minute_is_waited_out_as_long_as_the_server_asks(
    teacher: FakeTeacher, make_spec: MakeSpec, tmp_path: Path
) -> None:
    teacher.reply = in_turn(*[Say("slow down", 429, {"Retry-After": "10"})] * 6)
    asked = Asked(make_spec(teacher={"concurrency": 1}), tmp_path, QUESTIONS[:2])
    assert asked.contents == ["question 0", "question 1"]
    assert 60 <= asked.virtual.time <= 66  # the minute, and a tenth of jitter at most
    assert all(wait >= 10 for wait in asked.virtual.waits)
    assert asked.asker.traffic.repeated == 6
    assert asked.purse.spent.requests == 2  # nothing of that was paid


def test_while_it_is_busy_nobody_asks(teacher: FakeTeacher, make_spec: MakeSpec, tmp_path: Path) -> None:
    teacher.reply = in_turn(Say("slow down", 503, {"Retry-After": "30"}))
    asked = Asked(make_spec(teacher={"concurrency": 1}), tmp_path, QUESTIONS)
    assert asked.contents == [f"question {number}" for number in range(6)]
    assert len(asked.virtual.waits) == 1


def test_a_date_says_how_long_to_wait(teacher: FakeTeacher, make_spec: MakeSpec, tmp_path: Path) -> None:
    teacher.reply = in_turn(Say("", 429, {"Retry-After": formatdate(time.time() + 40, usegmt=True)}))
    asked = Asked(make_spec(), tmp_path, QUESTIONS[:1])
    assert asked.contents == ["question 0"]
    assert 35 < asked.virtual.time < 45


def test_patience_ends(teacher: FakeTeacher, make_spec: MakeSpec, tmp_path: Path) -> None:
    teacher.reply = lambda _: Say("slow down", 429)
    spec = make_spec(teacher={"max_failures": 1, "patience_seconds": 100.0})
    asked = Asked(spec, tmp_path, QUESTIONS[:1])
    assert asked.error is not None
    assert "it is busy (HTTP 429): slow down" in asked.error.what
    assert "patience_seconds" in asked.error.fix
    assert 30 <= asked.virtual.time <= 100


def test_waits_grow_with_jitter(teacher: FakeTeacher, make_spec: MakeSpec, tmp_path: Path) -> None:
    teacher.reply = lambda _: Say("", 500)
    asked = Asked(make_spec(teacher={"max_failures": 9}), tmp_path, QUESTIONS[:2])
    assert [type(answer) for answer in asked.answers] == [Failed, Failed]
    for number, wait in enumerate(sorted(asked.virtual.waits)[::2]):
        assert 2**number / 2 <= wait <= 2**number
    assert len(set(asked.virtual.waits)) == 6  # two requests that failed together do not come again together


def test_one_bad_request_does_not_end_the_others(teacher: FakeTeacher, make_spec: MakeSpec, tmp_path: Path) -> None:
    teacher.reply = lambda body: Say("", 500) if body["messages"][-1]["content"] == "question 2" else echo(body)
    asked = Asked(make_spec(teacher={"max_failures": 2, "concurrency": 1}), tmp_path, QUESTIONS)
    assert asked.contents == ["question 0", "question 1", "Failed", "question 3", "question 4", "question 5"]


def test_an_answer_between_them_makes_failures_none_in_a_row(
    teacher: FakeTeacher, make_spec: MakeSpec, tmp_path: Path
) -> None:
    teacher.reply = lambda body: echo(body) if int(body["messages"][-1]["content"][-1]) % 2 else Say("", 422)
    asked = Asked(make_spec(teacher={"max_failures": 2, "concurrency": 1}), tmp_path, QUESTIONS)
    assert asked.contents == ["Failed", "question 1", "Failed", "question 3", "Failed", "question 5"]


def test_failures_in_a_row_end_asking_and_what_was_paid_is_kept(
    teacher: FakeTeacher, make_spec: MakeSpec, tmp_path: Path
) -> None:
    teacher.reply = lambda body: echo(body) if body["messages"][-1]["content"] <= "question 1" else Say("", 500)
    spec = make_spec(teacher={"max_failures": 3, "concurrency": 1})
    asked = Asked(spec, tmp_path, QUESTIONS)
    assert asked.error is not None
    assert asked.error.what.startswith("The teacher failed 3 requests one after the other: HTTP 500")
    assert len(teacher.asked) == 2 + 3 * 4  # question 5 was never asked

    teacher.asked.clear()
    teacher.reply = echo
    again = Asked(spec, tmp_path, QUESTIONS)
    assert again.contents == [f"question {number}" for number in range(6)]
    assert [body["messages"][-1]["content"] for body in teacher.asked] == [f"question {n}" for n in range(2, 6)]
    assert again.asker.traffic[:2] == (4, 2)


def test_what_is_under_way_is_waited_for_and_kept_when_another_request_ends_asking(
    teacher: FakeTeacher, make_spec: MakeSpec, tmp_path: Path
) -> None:
    def reply(body: Body) -> Say:
        if body["messages"][-1]["content"] == "question 1":
            return Say("", 401)
        time.sleep(0.2)
        return echo(body)

    teacher.reply = reply
    spec = make_spec(teacher={"concurrency": 2})
    assert Asked(spec, tmp_path, QUESTIONS[:3]).error is not None
    teacher.asked.clear()
    teacher.reply = echo
    Asked(spec, tmp_path, QUESTIONS[:1])
    assert teacher.asked == []


# -- costs --------------------------------------------------------------------------------------------------------

PRICE = PriceSpec(per_million_prompt=1.0, per_million_completion=10.0)
A_REPLY = (PROMPT_TOKENS * 1.0 + COMPLETION_TOKENS * 10.0) / 1e6  # 0.0003


def test_costs_are_what_the_server_counts(teacher: FakeTeacher, make_spec: MakeSpec, tmp_path: Path) -> None:
    teacher.reply = echo
    account = Asked(make_spec(price=PRICE), tmp_path, QUESTIONS).purse.account()
    assert account.requests == 6
    assert (account.prompt_tokens, account.completion_tokens) == (600, 120)
    assert account.money == pytest.approx(6 * A_REPLY)
    assert (account.lost_requests, account.not_counted_by_server) == (0, 0)


@pytest.mark.parametrize(
    "usage",
    [
        None,
        {},
        [1],
        {"prompt_tokens": "many", "completion_tokens": 3},
        {"prompt_tokens": -1, "completion_tokens": 3},
        {"prompt_tokens": True, "completion_tokens": 3},
    ],
    ids=str,
)
def test_an_answer_without_counts_costs_its_most(
    teacher: FakeTeacher, make_spec: MakeSpec, tmp_path: Path, usage: Any
) -> None:
    teacher.reply = lambda body: says("yes", usage=usage)
    asked = Asked(make_spec(), tmp_path, QUESTIONS[:1])
    account = asked.purse.account()
    assert asked.contents == ["yes"]
    assert account.not_counted_by_server == 1
    assert account.completion_tokens == 64
    assert account.prompt_tokens > len("question 0")


@pytest.mark.parametrize(
    ("budget", "word", "answered"),
    [
        ({"requests": 4}, "budget.requests is 4", 4),
        # A request can cost 100 + some hundred tokens, and does cost 120.
        ({"tokens": 1000}, "budget.tokens is 1,000", None),
        ({"money": 5 * A_REPLY}, "budget.money is 0.0015 USD", None),
    ],
)
@pytest.mark.parametrize("concurrency", [1, 8])
def test_a_budget_stops_asking_before_it_is_exceeded(
    teacher: FakeTeacher, make_spec: MakeSpec, tmp_path: Path, budget: dict[str, Any], word: str, answered: int | None,
    concurrency: int,
) -> None:  # fmt: skip
    teacher.reply = echo
    spec = make_spec(budget=SynthesisBudget(**budget), price=PRICE, teacher={"concurrency": concurrency})
    many = [question(number) for number in range(20)]
    asked = Asked(spec, tmp_path, many)
    assert asked.asker.stopped == word
    replies = [answer for answer in asked.answers if isinstance(answer, Reply)]
    assert 0 < len(replies) == len(teacher.asked) < 20
    assert asked.answers[len(replies) :] == [Unasked(word)] * (20 - len(replies))
    account = asked.purse.account()
    assert account.requests <= (spec.budget.requests or 10**9)
    assert account.prompt_tokens + account.completion_tokens <= (spec.budget.tokens or 10**9)
    assert (account.money or 0) <= (spec.budget.money or 10**9)
    if answered is not None:
        assert len(replies) == answered

    # Where it stops depends neither on how many are under way, nor on what the journal holds.
    for other in (1, 3, 8):
        settings = spec.model_copy(update={"teacher": spec.teacher.model_copy(update={"concurrency": other})})
        for folder in (tmp_path, tmp_path / f"fresh-{other}-{concurrency}"):
            folder.mkdir(exist_ok=True)
            assert Asked(settings, folder, many).contents == asked.contents


def test_losses_stay_within_the_budget_and_are_remembered(
    teacher: FakeTeacher, make_spec: MakeSpec, tmp_path: Path
) -> None:
    teacher.reply = lambda _: Say("{", 200)
    spec = make_spec(budget=SynthesisBudget(requests=6), teacher={"max_failures": 100, "concurrency": 1})
    asked = Asked(spec, tmp_path, QUESTIONS)
    assert len(teacher.asked) == 6
    assert asked.asker.stopped == "budget.requests is 6"
    assert asked.purse.account().lost_requests == 6

    teacher.reply = echo
    again = Asked(spec, tmp_path, QUESTIONS)
    assert len(teacher.asked) == 6  # what was lost is spent
    assert again.asker.stopped == "budget.requests is 6"
    more = spec.model_copy(update={"budget": SynthesisBudget(requests=8)})
    assert Asked(more, tmp_path, QUESTIONS).contents == ["question 0", "question 1", *["Unasked"] * 4]
