"""The ledger in SQLite: what a look is, what it costs, what stops it; and how it reads in a terminal."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console

from goldgate.ledger_view import plot_budget, print_ledger
from tasks.contracts.errors import LedgerError
from tasks.contracts.references import Look, Outcome, SelfTest
from tasks.contracts.spec import ExecutionSpec, LookPolicy, Policy
from tasks.gate.ledger import Decision, DecisionKind, Ledger, LookRequest, ledger_url

ROOT = Path(__file__).resolve().parents[2]
PAGE = "9" * 64
OTHER_PAGE = "8" * 64
SECRET = "onlyForThisTest42"
START = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


class Clock:
    """A minute later with each reading, unless it is set."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        now, self.now = self.now, self.now + timedelta(minutes=1)
        return now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(tmp_path: Path, clock: Clock) -> Iterator[Ledger]:
    with Ledger.open(str(tmp_path / "ledger.db"), clock=clock) as opened:
        yield opened


def request(candidate: str = "c1", **changes: str) -> LookRequest:
    plain = {
        "page": PAGE,
        "name": "tickets",
        "candidate": candidate,
        "baseline": "b1",
        "requirements": "r1",
        "answers": f"answers of {candidate}",
        "asked_by": "ann",
    }
    return LookRequest(**(plain | changes))


def judge(ledger: Ledger, asked: LookRequest, outcome: Outcome, policy: Policy | None = None) -> Look:
    look = ledger.take_look(asked, policy or Policy())
    ledger.record_verdict(look, asked, outcome, f"verdict on {asked.candidate}")
    return look


@contextmanager
def refused(*says: str) -> Iterator[None]:
    with pytest.raises(LedgerError) as error:
        yield
    assert all(part in str(error.value) for part in says), str(error.value)
    told = "".join(traceback.format_exception(error.value))
    assert SECRET not in told


# -- where it is ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "variable", "expected"),
    [
        (None, None, "sqlite:////store/ledger.db"),
        (None, "", "sqlite:////store/ledger.db"),
        (None, "/elsewhere/my ledger.db", "sqlite:////elsewhere/my ledger.db"),
        (None, "sqlite:////elsewhere/l.db", "sqlite:////elsewhere/l.db"),
        ("/named/l.db", "/elsewhere/l.db", "sqlite:////named/l.db"),
        ("sqlite:///near.db", None, f"sqlite:///{os.getcwd()}/near.db"),
        ("near.db", None, f"sqlite:///{os.getcwd()}/near.db"),
        ("postgresql://ann@db:5433/ledger", None, "postgresql://ann@db:5433/ledger"),
        (None, f"postgresql://ann:{SECRET}@db/ledger", f"postgresql://ann:{SECRET}@db/ledger"),
    ],
)
def test_where_the_ledger_is(
    monkeypatch: pytest.MonkeyPatch, named: str | None, variable: str | None, expected: str
) -> None:
    monkeypatch.delenv("GOLDGATE_LEDGER", raising=False)
    if variable is not None:
        monkeypatch.setenv("GOLDGATE_LEDGER", variable)
    assert ledger_url(ExecutionSpec(store="/store", ledger=named)) == expected


def test_a_store_that_is_a_file_uri_keeps_its_ledger_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOLDGATE_LEDGER", raising=False)
    assert ledger_url(ExecutionSpec(store="file:///store")) == "sqlite:////store/ledger.db"


@pytest.mark.parametrize(
    ("store", "named", "variable", "says"),
    [
        ("s3://bucket/store", None, None, ["remote", "s3://bucket/store", "GOLDGATE_LEDGER"]),
        ("/s", f"postgresql://ann:{SECRET}@db/l", None, ["password", "ann:***@db", "PGPASSWORD", "GOLDGATE_LEDGER"]),
        ("/s", f"postgresql://ann@db/l?password={SECRET}", None, ["password", "postgresql://ann@db/l", "PGPASSWORD"]),
        ("/s", None, f"postgresql://ann:a:{SECRET}@db:x/l", ["cannot be read", "GOLDGATE_LEDGER", "%40"]),
        ("/s", None, f"mysql://ann:{SECRET}@db/l", ["SQLite or PostgreSQL, not in mysql", "GOLDGATE_LEDGER"]),
        ("/s", None, "postgresql+asyncpg://db/l", ["not in postgresql+asyncpg", "GOLDGATE_LEDGER"]),
        ("/s", "sqlite://", None, ["needs a file", "execution.ledger"]),
        ("/s", "sqlite:///:memory:", None, ["needs a file", "execution.ledger"]),
        ("/s", "/what?/l.db", None, ["no ? in its name", "/what?/l.db"]),
    ],
)
def test_an_address_that_cannot_be_is_refused_without_its_password(
    monkeypatch: pytest.MonkeyPatch, store: str, named: str | None, variable: str | None, says: list[str]
) -> None:
    monkeypatch.delenv("GOLDGATE_LEDGER", raising=False)
    if variable is not None:
        monkeypatch.setenv("GOLDGATE_LEDGER", variable)
    with refused(*says):
        ledger_url(ExecutionSpec(store=store, ledger=named))


# -- looks ----------------------------------------------------------------------------------------------------------


def test_looks_are_numbered_and_each_may_spend_its_share(ledger: Ledger) -> None:
    looks = [judge(ledger, request(f"c{number}"), Outcome.REJECT) for number in (1, 2, 3)]
    assert looks == [
        Look(page=PAGE, number=1, level=0.025, spent=0.025, budget=0.05),
        Look(page=PAGE, number=2, level=0.05 / 6, spent=0.05 * 2 / 3, budget=0.05),
        Look(page=PAGE, number=3, level=0.05 / 12, spent=0.05 * 3 / 4, budget=0.05),
    ]
    assert judge(ledger, request(page=OTHER_PAGE), Outcome.REJECT).number == 1
    (page, other) = ledger.pages()
    assert (page.page, page.name, page.opened_by, page.opened_at) == (PAGE, "tickets", "ann", START)
    assert (page.taken, page.promotions, page.spent, page.why_spent) == (3, 0, looks[2].spent, None)
    assert (other.page, other.taken) == (OTHER_PAGE, 1)


def test_the_same_question_is_the_same_look_and_costs_nothing(ledger: Ledger) -> None:
    first = judge(ledger, request("c1"), Outcome.REJECT)
    judge(ledger, request("c2"), Outcome.PROMOTE)
    again = ledger.take_look(request("c1", asked_by="bob"), Policy())
    assert again == first.model_copy(update={"repeated": True, "first_outcome": Outcome.REJECT})
    other_answers = ledger.take_look(request("c1", answers="made again"), Policy())
    assert other_answers == again.model_copy(update={"same_answers": False})
    assert ledger.pages()[0].taken == 2


@pytest.mark.parametrize("change", [{"candidate": "c2"}, {"baseline": "b2"}, {"requirements": "r2"}])
def test_another_question_is_another_look(ledger: Ledger, change: dict[str, str]) -> None:
    judge(ledger, request(), Outcome.REJECT)
    look = ledger.take_look(request(**change), Policy())
    assert (look.number, look.repeated, look.first_outcome) == (2, False, None)


def test_the_first_verdict_stands_and_later_ones_are_kept_beside_it(ledger: Ledger) -> None:
    look = ledger.take_look(request(), Policy())
    assert ledger.record_verdict(look, request(), Outcome.REJECT, "v1") is Outcome.REJECT
    again = request(answers="made again", asked_by="bob")
    assert ledger.record_verdict(ledger.take_look(again, Policy()), again, Outcome.PROMOTE, "v2") is Outcome.REJECT
    (kept,) = ledger.looks(PAGE)
    assert (kept.outcome, kept.verdict, kept.judged_at) == (Outcome.REJECT, "v1", START + timedelta(minutes=1))
    assert [repeat.model_dump() for repeat in kept.repeats] == [
        {
            "at": START + timedelta(minutes=3),
            "asked_by": "bob",
            "answers": "made again",
            "outcome": Outcome.PROMOTE,
            "verdict": "v2",
        }
    ]
    assert ledger.take_look(request(), Policy()).first_outcome is Outcome.REJECT
    assert ledger.pages()[0].promotions == 0


def test_a_look_whose_process_was_killed_is_found_again(tmp_path: Path) -> None:
    path = str(tmp_path / "ledger.db")
    with Ledger.open(path) as before:
        first = before.take_look(request(), Policy())
    with Ledger.open(path) as after:
        again = after.take_look(request(answers="made again"), Policy())
        assert again == first.model_copy(update={"repeated": True, "same_answers": False})
        assert again.first_outcome is None
        after.record_verdict(again, request(answers="made again"), Outcome.PROMOTE, "v1")
        (kept,) = after.looks(PAGE)
        assert (kept.answers, kept.judged_answers, kept.outcome) == ("answers of c1", "made again", Outcome.PROMOTE)
        # From now on the answers to compare with are those that the verdict rests on.
        assert after.take_look(request(answers="made again"), Policy()).same_answers
        assert not after.take_look(request(), Policy()).same_answers


def test_the_ladder_counts_the_promotions_before_a_look(ledger: Ledger) -> None:
    policy = Policy(looks=LookPolicy.LADDER, ladder_step=0.1)
    judge(ledger, request("c1"), Outcome.PROMOTE, policy)
    pending = ledger.take_look(request("c2"), policy)
    third = judge(ledger, request("c3"), Outcome.INCONCLUSIVE, policy)
    assert (pending.promotions, pending.level) == (1, pytest.approx(0.05 / 6 / 4 / 10))
    assert (third.promotions, third.level) == (1, pytest.approx(0.05 / 12 / 4 / (2 * 10)))
    ledger.record_verdict(pending, request("c2"), Outcome.PROMOTE, "late")
    assert ledger.take_look(request("c4"), policy).promotions == 2
    assert ledger.take_look(request("c3"), policy).level == third.level


def test_a_verdict_needs_its_look(ledger: Ledger) -> None:
    look = ledger.take_look(request("c1"), Policy())
    for asked, wrong in ((request("c2"), look), (request("c1"), look.model_copy(update={"number": 2}))):
        with refused(f"holds no look {wrong.number} of candidate {asked.candidate}", ledger.where, "new golden set"):
            ledger.record_verdict(wrong, asked, Outcome.PROMOTE, "v")
    assert ledger.looks(PAGE)[0].outcome is None


def test_a_question_is_found_before_anything_is_spent(ledger: Ledger) -> None:
    judge(ledger, request("c1"), Outcome.REJECT)
    found = ledger.find_look(page=PAGE, candidate="c1", baseline="b1", requirements="r1")
    assert found is not None
    assert (found.number, found.outcome) == (1, Outcome.REJECT)
    assert ledger.find_look(page=PAGE, candidate="c1", baseline="b1", requirements="r2") is None


@pytest.mark.parametrize("word", ["", "x" * 201, "ann\0", "ann\x1b[31m", "ann\n"])
def test_a_request_holds_plain_words(word: str) -> None:
    with pytest.raises(ValidationError, match="asked_by"):
        request(asked_by=word)


# -- the budget -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        (Policy(alpha=0.1), ["alpha 0.05; now alpha 0.1", "set `policy.alpha` back"]),
        (Policy(looks=LookPolicy.OFF), ["looks alpha_spending; now looks off", "set `policy.looks` back"]),
        (
            Policy(looks=LookPolicy.BONFERRONI, declared_looks=5),
            ["looks alpha_spending, declared_looks None; now looks bonferroni, declared_looks 5"],
        ),
        (Policy(ladder_step=0.5), ["ladder_step 0.01; now ladder_step 0.5"]),
    ],
)
def test_a_page_keeps_to_the_budget_it_was_opened_with(ledger: Ledger, policy: Policy, says: list[str]) -> None:
    look = judge(ledger, request("c1"), Outcome.REJECT)
    says = [*says, "void", PAGE, "tickets", "2026-03-01", "ann", "goldgate golden freeze"]
    for candidate in ("c1", "c2"):  # asked again or new
        with refused(*says):
            ledger.take_look(request(candidate), policy)
    with pytest.raises(LedgerError, match="void"):
        ledger.check(PAGE, policy)
    assert ledger.take_look(request("c1"), Policy(approval_hours=2, min_improvement=0.1)).number == look.number


def test_a_spent_page_takes_no_new_look_but_repeats_old_ones(ledger: Ledger) -> None:
    policy = Policy(looks=LookPolicy.BONFERRONI, declared_looks=2)
    ledger.check(PAGE, policy)
    judge(ledger, request("c1"), Outcome.REJECT, policy)
    ledger.check(PAGE, policy)
    judge(ledger, request("c2"), Outcome.REJECT, policy)
    for ask in (lambda: ledger.take_look(request("c3"), policy), lambda: ledger.check(PAGE, policy)):
        with refused("2 looks taken of 2 declared (bonferroni)", PAGE, "golden freeze", "champion", "new folder"):
            ask()
    assert ledger.take_look(request("c1"), policy).repeated
    assert ledger.pages()[0].why_spent == "2 looks taken of 2 declared (bonferroni)"
    ledger.check(OTHER_PAGE, policy)
    assert [page.page for page in ledger.pages()] == [PAGE]  # checking opens no page


def test_alpha_spending_ends_after_99_looks(ledger: Ledger) -> None:
    for number in range(99):
        ledger.take_look(request(f"c{number}"), Policy())
    with pytest.raises(LedgerError, match=r"99 looks have been taken \(alpha_spending\), which leaves 1\.0 %"):
        ledger.take_look(request("c99"), Policy())


def test_off_never_ends(ledger: Ledger) -> None:
    policy = Policy(looks=LookPolicy.OFF)
    looks = [ledger.take_look(request(f"c{number}"), policy) for number in range(110)]
    assert {look.level for look in looks} == {0.05}
    assert looks[-1].spent == pytest.approx(5.5)


# -- the clock ------------------------------------------------------------------------------------------------------


def test_looks_keep_their_order_when_the_clock_jumps_back(ledger: Ledger, clock: Clock) -> None:
    readings = [START, START - timedelta(days=2), START - timedelta(days=1), START]
    for number, reading in enumerate(readings, start=1):
        clock.now = reading
        ledger.take_look(request(f"c{number}"), Policy())
    looks = ledger.looks(PAGE)
    assert [look.number for look in looks] == [1, 2, 3, 4]
    assert [look.candidate for look in looks] == ["c1", "c2", "c3", "c4"]
    assert [look.at for look in looks] == readings
    assert [look.clock_went_back for look in looks] == [False, True, False, False]


def test_times_are_utc(tmp_path: Path) -> None:
    summer = timezone(timedelta(hours=2))
    with Ledger.open(str(tmp_path / "l.db"), clock=lambda: datetime(2026, 7, 1, 1, 30, tzinfo=summer)) as ledger:
        ledger.take_look(request(), Policy())
        at = ledger.looks(PAGE)[0].at
    assert at.isoformat() == "2026-06-30T23:30:00+00:00"
    with (
        Ledger.open(str(tmp_path / "l.db"), clock=lambda: datetime(2026, 7, 1)) as ledger,
        pytest.raises(ValueError, match="without its zone"),
    ):
        ledger.take_look(request("c2"), Policy())


# -- people and tests -----------------------------------------------------------------------------------------------


def test_what_people_decide_is_kept_in_order(ledger: Ledger) -> None:
    forced = ledger.record_decision(
        DecisionKind.FORCED_PROMOTION, name="tickets", page=PAGE, model="c1", outcome=Outcome.REJECT, by="ann",
        reason="The old one is switched off tomorrow.",
    )  # fmt: skip
    first = ledger.record_decision(
        DecisionKind.FIRST_BASELINE, name="prices", page=None, model="b1", outcome=None, by="bob\0", reason=""
    )
    assert ledger.decisions() == (forced, first.model_copy(update={"by": "bob"}))
    assert ledger.decisions("prices") == ledger.decisions()[1:]
    assert forced == Decision(
        kind=DecisionKind.FORCED_PROMOTION, name="tickets", page=PAGE, model="c1", outcome=Outcome.REJECT, by="ann",
        reason="The old one is switched off tomorrow.", at=START,
    )  # fmt: skip


def test_the_last_self_test_of_a_policy_is_found(ledger: Ledger) -> None:
    result = SelfTest(
        histories=200, looks=5, promotions=3, rejections=20, rate=0.015, low=0.002, high=0.05, alpha=0.05,
        noise="resampled",
    )  # fmt: skip
    where = {"requirements": "r1", "page": PAGE, "baseline": "b1"}
    assert ledger.find_self_test(**where) is None
    ledger.record_self_test(result.model_copy(update={"promotions": 9}), **where)
    ledger.record_self_test(result, **where)
    assert ledger.find_self_test(**where) == result
    for name in where:
        assert ledger.find_self_test(**(where | {name: "other"})) is None


# -- several at a time ----------------------------------------------------------------------------------------------

_PROCESS = """
import os, sys
from tasks.contracts.spec import ExecutionSpec, Policy
from tasks.gate.ledger import Ledger, LookRequest, ledger_url

worker, looks = sys.argv[1], int(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
with Ledger.open(ledger_url(ExecutionSpec())) as ledger:
    for candidate in ["shared", *(f"{worker}-{number}" for number in range(looks))]:
        look = ledger.take_look(
            LookRequest(page="9" * 64, name="tickets", candidate=candidate, baseline="b", requirements="r", answers="a",
                        asked_by=f"worker {worker}"),
            Policy(),
        )
        print(candidate, look.number, look.level, int(look.repeated), flush=True)
"""


def take_looks_in_processes(url: str, *, processes: int, looks: int) -> None:
    """Several processes make a ledger and take looks at once; each asks one question that all ask, and its own."""
    command = [sys.executable, "-c", _PROCESS]
    environment = os.environ | {"GOLDGATE_LEDGER": url, "PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen(
            [*command, str(worker), str(looks)], env=environment, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for worker in range(processes)
    ]  # fmt: skip
    for process in running:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in running:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = []
    for process in running:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        answers += [line.split() for line in out.splitlines()]
    new = [(int(number), float(level)) for _, number, level, repeated in answers if repeated == "0"]
    assert sorted(number for number, _ in new) == list(range(1, processes * looks + 2))
    assert all(level == pytest.approx(0.05 / (number * (number + 1))) for number, level in new)
    shared = [(number, repeated) for candidate, number, _, repeated in answers if candidate == "shared"]
    assert len({number for number, _ in shared}) == 1
    assert sorted(repeated for _, repeated in shared) == ["0"] + ["1"] * (processes - 1)
    with Ledger.open(url, create=False) as ledger:
        assert [look.number for look in ledger.looks(PAGE)] == list(range(1, processes * looks + 2))
        assert not any(look.clock_went_back for look in ledger.looks(PAGE))


def test_processes_that_look_at_once_get_different_numbers(tmp_path: Path) -> None:
    take_looks_in_processes(str(tmp_path / "new" / "ledger.db"), processes=8, looks=5)


# -- what goes wrong ------------------------------------------------------------------------------------------------


def test_a_ledger_that_somebody_holds_is_refused_in_time_and_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    with Ledger.open(str(path), lock_seconds=0.2) as ledger:
        judge(ledger, request("c1"), Outcome.REJECT)
        with closing(sqlite3.connect(path, isolation_level=None)) as holder:
            holder.execute("BEGIN IMMEDIATE")
            with refused("locked by another program", str(path), "nothing was recorded"):
                ledger.take_look(request("c2"), Policy())
            with refused("locked by another program", str(path)):
                ledger.check(PAGE, Policy())
            assert len(ledger.looks(PAGE)) == 1
            holder.execute("ROLLBACK")
        assert ledger.take_look(request("c2"), Policy()).number == 2


@contextmanager
def no_rights() -> Iterator[Path]:
    """A folder that everybody may enter, and a process that is not root while in it."""
    folder = Path(tempfile.mkdtemp(prefix="goldgate-ledger-"))
    folder.chmod(0o755)
    root = os.geteuid() == 0
    try:
        yield folder
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)
        shutil.rmtree(folder)


@pytest.mark.parametrize("read_only", ["file", "folder"])
def test_a_ledger_that_cannot_be_written_is_refused_and_can_be_read(read_only: str) -> None:
    with no_rights() as folder:
        path = folder / "ledger.db"
        with Ledger.open(str(path)) as ledger:
            judge(ledger, request("c1"), Outcome.REJECT)
        path.chmod(0o444 if read_only == "file" else 0o666)
        folder.chmod(0o555)
        if os.geteuid() == 0:
            os.seteuid(65534)  # nobody: root may write anything
        with Ledger.open(str(path)) as ledger:
            for ask in (
                lambda: ledger.check(PAGE, Policy()),
                lambda: ledger.take_look(request("c2"), Policy()),
                lambda: ledger.record_decision(
                    DecisionKind.APPROVED, name="t", page=None, model="m", outcome=None, by="ann", reason="fine"
                ),
            ):
                with refused("cannot be opened for writing", str(path), "allow writing there", "GOLDGATE_LEDGER"):
                    ask()
            assert [look.number for look in ledger.looks(PAGE)] == [1]
        with refused("folder cannot be made", str(folder / "new")):
            Ledger.open(str(folder / "new" / "ledger.db"))
        with refused("cannot be opened for writing", str(folder / "other.db")):
            Ledger.open(str(folder / "other.db"))


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    path.write_text("not a database, but somebody's notes\n" * 100)
    before = path.read_bytes()
    with refused("no ledger, or is damaged", str(path), "put back a copy", "new golden set"):
        Ledger.open(str(path))
    assert path.read_bytes() == before


def test_a_ledger_whose_tables_are_gone_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    with Ledger.open(str(path)) as ledger:
        with closing(sqlite3.connect(path, isolation_level=None)) as database:
            database.execute("DROP TABLE ledger_looks")
        with refused("refuses: no such table: ledger_looks", str(path)):
            ledger.take_look(request(), Policy())
        assert ledger.pages() == ()  # the page that was opened on the way is not there


@pytest.mark.parametrize(("version", "says"), [(2, "use the newer Goldgate"), (0, "name another database")])
def test_tables_of_another_version_are_refused(tmp_path: Path, version: int, says: str) -> None:
    path = tmp_path / "ledger.db"
    Ledger.open(str(path)).close()
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("UPDATE ledger_schema SET version = ?", [version])
    with refused(f"tables of version {version}, and this Goldgate knows version 1", str(path), says):
        Ledger.open(str(path))


def test_reading_makes_no_ledger(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "ledger.db"
    with refused("no ledger yet", str(path), "GOLDGATE_LEDGER"):
        Ledger.open(str(path), create=False)
    assert not path.parent.exists()
    (tmp_path / "empty.db").touch()
    with refused("no ledger yet", "empty.db"):
        Ledger.open(str(tmp_path / "empty.db"), create=False)


def test_a_postgres_that_does_not_answer_is_refused_without_the_password() -> None:
    pytest.importorskip("psycopg2")
    with socket.socket() as bound:  # bound, not listening: nobody answers there
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        with refused("does not answer", f"postgresql://ann:***@127.0.0.1:{port}/ledger", "start PostgreSQL"):
            Ledger.open(f"postgresql://ann:{SECRET}@127.0.0.1:{port}/ledger?connect_timeout=5")


def test_postgres_without_its_driver_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    with refused("not installed", "ann:***@db", "pip install 'goldgate[postgres]'"):
        Ledger.open(f"postgresql://ann:{SECRET}@db/ledger?sslpassword={SECRET}")


# -- how it reads ---------------------------------------------------------------------------------------------------


def shown(ledger: Ledger, wanted: str | None = None, *, as_json: bool = False) -> str:
    out = io.StringIO()
    print_ledger(Console(file=out, width=80), ledger, wanted, as_json=as_json)
    return out.getvalue()


def lines_of(text: str) -> list[str]:
    return [re.sub(r"\s+", " ", line).strip() for line in text.splitlines()]


def test_a_page_reads_as_its_history(ledger: Ledger, clock: Clock) -> None:
    judge(ledger, request("1" * 64, asked_by="deployment retrain/tickets [weekly]"), Outcome.PROMOTE)
    clock.now = START - timedelta(days=1)
    judge(ledger, request("2" * 64, baseline="1" * 64), Outcome.REJECT)
    judge(ledger, request("2" * 64, baseline="1" * 64, answers="made again"), Outcome.INCONCLUSIVE)
    ledger.take_look(request("3" * 64), Policy())
    lines = lines_of(shown(ledger))
    assert lines[2:8] == [
        f"tickets golden set {PAGE}",
        "opened 2026-03-01 by deployment retrain/tickets [weekly]: alpha 0.05, alpha_spending; 3 looks, 1 promoted",
        "look time (UTC) asked by candidate baseline verdict level left",
        "1 2026-03-01 12:00 deployment retrain/tickets [weekly] 11111111 b1 promote 0.025 50.0 %",
        "2 2026-02-28 12:00 ann 22222222 11111111 reject 0.0083 33.3 % clock went back; asked again 1x, came out "
        "inconclusive, by other answers",
        "3 2026-02-28 12:04 ann 33333333 b1 none recorded 0.0042 25.0 %",
    ]
    assert lines[-1] == "No decisions of people."


def test_decisions_are_in_plain_sight_and_nothing_but_text(ledger: Ledger) -> None:
    judge(ledger, request(), Outcome.REJECT)
    ledger.record_decision(
        DecisionKind.FORCED_PROMOTION, name="tickets", page=PAGE, model="c" * 64, outcome=Outcome.REJECT, by="ann",
        reason="No [bold]time[/]:\nthe old one \x1b[31mends today.",
    )  # fmt: skip
    text = shown(ledger)
    assert lines_of(text)[-3:] == [
        "Decisions of people",
        "2026-03-01 12:02 forced promotion tickets, model cccccccc, verdict reject, golden set 99999999",
        "ann: No [bold]time[/]: the old one [31mends today.",
    ]
    assert "\x1b" not in text


def test_what_is_wanted_is_shown_alone(ledger: Ledger) -> None:
    judge(ledger, request(), Outcome.REJECT)
    judge(ledger, request(page=OTHER_PAGE, name="prices"), Outcome.REJECT)
    for name in ("tickets", "prices"):
        ledger.record_decision(
            DecisionKind.APPROVED, name=name, page=None, model="m", outcome=Outcome.PROMOTE, by="ann", reason=""
        )
    for wanted in ("prices", "8888"):
        text = shown(ledger, wanted)
        assert OTHER_PAGE in text
        assert PAGE not in text
        assert "tickets" not in text
    assert "approved" in shown(ledger, "prices")
    with refused("nothing about chat", ledger.where, "prices, tickets"):
        shown(ledger, "chat")
    with refused("nothing about 888"):  # too short to name a page
        shown(ledger, "888")


def test_an_empty_ledger_says_so(ledger: Ledger) -> None:
    assert "No looks yet." in shown(ledger)


def test_a_ladder_lets_nothing_out_but_promotions(ledger: Ledger) -> None:
    policy = Policy(looks=LookPolicy.LADDER)
    for candidate, outcome in (("c1", Outcome.REJECT), ("c2", Outcome.PROMOTE), ("c3", Outcome.INCONCLUSIVE)):
        judge(ledger, request(candidate), outcome, policy)
    judge(ledger, request("c1", answers="made again"), Outcome.INCONCLUSIVE, policy)
    ledger.record_decision(
        DecisionKind.FORCED_PROMOTION, name="tickets", page=PAGE, model="c1", outcome=Outcome.REJECT, by="ann",
        reason="It is what we have.",
    )  # fmt: skip
    text = shown(ledger)
    assert [line.split(" b1 ")[1] for line in lines_of(text) if " b1 " in line] == [
        "not promoted 0.013 50.0 % asked again 1x, by other answers",
        "promote 0.0042 33.3 %",
        "not promoted 5.2e-06 25.0 %",
    ]
    assert "verdict not promoted" in text
    record = shown(ledger, as_json=True)
    for hidden in ("reject", "inconclusive"):
        assert hidden not in text
        assert hidden not in record
    history = json.loads(record)["pages"][0]["history"]
    assert [look["outcome"] for look in history] == ["not promoted", "promote", "not promoted"]
    assert history[0]["repeats"][0]["outcome"] is None


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        (Policy(looks=LookPolicy.BONFERRONI, declared_looks=2), "Spent: 2 looks taken of 2 declared (bonferroni)."),
        (Policy(looks=LookPolicy.OFF), "all looks together promote falsely with a chance of up to 10.0 %"),
    ],
)
def test_a_page_says_how_its_budget_stands(ledger: Ledger, policy: Policy, says: str) -> None:
    for candidate in ("c1", "c2"):
        judge(ledger, request(candidate), Outcome.REJECT, policy)
    assert says in shown(ledger)


def test_json_holds_everything(ledger: Ledger) -> None:
    judge(ledger, request("c1"), Outcome.PROMOTE)
    judge(ledger, request("c1", answers="made again"), Outcome.REJECT)
    ledger.record_decision(
        DecisionKind.APPROVED, name="tickets", page=PAGE, model="c1", outcome=Outcome.PROMOTE, by="ann", reason="good"
    )
    record: dict[str, Any] = json.loads(shown(ledger, as_json=True))
    (page,) = record["pages"]
    assert (page["page"], page["alpha"], page["looks"], page["taken"], page["left"]) == (
        PAGE, 0.05, "alpha_spending", 1, 0.025,
    )  # fmt: skip
    (look,) = page["history"]
    assert (look["number"], look["outcome"], look["asked_by"], look["at"]) == (
        1, "promote", "ann", "2026-03-01T12:00:00Z",
    )  # fmt: skip
    assert [repeat["outcome"] for repeat in look["repeats"]] == ["reject"]
    assert record["decisions"] == [
        {
            "kind": "approved", "name": "tickets", "page": PAGE, "model": "c1", "outcome": "promote", "by": "ann",
            "reason": "good", "at": "2026-03-01T12:04:00Z",
        }
    ]  # fmt: skip


def test_the_plot_shows_each_look() -> None:
    assert plot_budget([1.0, 0.5, 1 / 3, 0.25]) == [
        "100 % │███",
        "      │███",
        "      │███",
        " 50 % │███ ███",
        "      │███ ███ ███ ▄▄▄",
        "      │███ ███ ███ ███",
        "  0 % └───────────────",
        "       0             3 looks",
    ]


@pytest.mark.parametrize("looks", [0, 1, 2, 12, 13, 26, 51, 52, 99, 500])
def test_the_plot_is_at_most_60_wide_and_ends_at_the_last_look(looks: int) -> None:
    left: Sequence[float] = [1 / (number + 1) for number in range(looks)] + [0.001]
    *plot, axis, labels = plot_budget(left)
    assert all(len(line) <= 60 for line in plot)
    assert len(axis) <= 60
    assert labels.endswith(f"{looks} looks")
    # The last column ends where the axis ends; the little that is left is not shown as nothing.
    assert plot[-1][-1] == "▁"
    assert len(plot[-1]) == len(axis)
