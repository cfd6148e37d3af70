"""The ledger in a real PostgreSQL: the same rules, several machines' worth of processes, and what goes wrong there."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest

from tasks.contracts.errors import LedgerError
from tasks.contracts.references import Outcome, SelfTest
from tasks.contracts.spec import LookPolicy, Policy
from tasks.gate.ledger import DecisionKind, Ledger
from tests.docker.test_on_postgres import PASSWORD, Postgres, folder, postgres
from tests.gate.test_gate_ledger import PAGE, START, Clock, judge, request, shown, take_looks_in_processes

psycopg2 = pytest.importorskip("psycopg2", reason="a ledger in PostgreSQL needs the extra postgres")

pytestmark = pytest.mark.services

__all__ = ["folder", "postgres"]  # fixtures: a server that is started once for this file


@pytest.fixture
def url(postgres: Postgres, request: pytest.FixtureRequest) -> str:
    """An empty database of its own for each test."""
    name = f"ledger_{abs(hash(request.node.name))}"
    postgres.ask("postgres", f"CREATE DATABASE {name}")
    return f"postgresql://goldgate:{PASSWORD}@127.0.0.1:{postgres.port}/{name}"


@pytest.fixture
def ledger(url: str) -> Iterator[Ledger]:
    with Ledger.open(url, clock=Clock(), lock_seconds=0.3) as opened:
        yield opened


def refusal(error: pytest.ExceptionInfo[LedgerError]) -> str:
    assert PASSWORD not in str(error.value)
    return str(error.value)


def test_looks_verdicts_and_decisions_are_kept_as_in_sqlite(ledger: Ledger, url: str) -> None:
    first = judge(ledger, request("c1"), Outcome.PROMOTE)
    second = judge(ledger, request("c2"), Outcome.REJECT)
    assert (first.number, first.level, second.number, second.level) == (1, 0.025, 2, 0.05 / 6)
    with Ledger.open(url, create=False, clock=Clock()) as again:
        repeated = again.take_look(request("c1", answers="made again"), Policy())
        assert repeated == first.model_copy(
            update={"repeated": True, "first_outcome": Outcome.PROMOTE, "same_answers": False}
        )
        assert again.record_verdict(repeated, request("c1"), Outcome.REJECT, "v2") is Outcome.PROMOTE
        decision = again.record_decision(
            DecisionKind.DECLINED,
            name="tickets",
            page=PAGE,
            model="c1",
            outcome=Outcome.PROMOTE,
            by="ann",
            reason="no\0",
        )
        assert again.decisions() == (decision.model_copy(update={"reason": "no"}),)
        looks = again.looks(PAGE)
        assert [(look.number, look.outcome, len(look.repeats)) for look in looks] == [
            (1, Outcome.PROMOTE, 1), (2, Outcome.REJECT, 0),
        ]  # fmt: skip
        assert [look.at for look in looks] == [START, START + timedelta(minutes=2)]
        (page,) = again.pages()
        assert (page.taken, page.promotions, page.alpha) == (2, 1, 0.05)
        assert PASSWORD not in shown(again)
        assert "goldgate:***@127.0.0.1" in shown(again)


def test_the_last_self_test_is_found(ledger: Ledger) -> None:
    result = SelfTest(
        histories=9, looks=5, promotions=0, rejections=1, rate=0.0, low=0.0, high=0.4, alpha=0.05, noise="resampled"
    )
    where = {"requirements": "r1", "page": PAGE, "baseline": "b1"}
    ledger.record_self_test(result.model_copy(update={"histories": 8}), **where)
    ledger.record_self_test(result, **where)
    assert ledger.find_self_test(**where) == result


def test_a_budget_is_kept_and_spent(ledger: Ledger) -> None:
    policy = Policy(looks=LookPolicy.BONFERRONI, declared_looks=1)
    judge(ledger, request("c1"), Outcome.REJECT, policy)
    with pytest.raises(LedgerError) as error:
        ledger.take_look(request("c2"), policy)
    assert "1 look taken of 1 declared (bonferroni)" in refusal(error)
    with pytest.raises(LedgerError) as error:
        ledger.take_look(request("c1"), Policy())
    assert "looks bonferroni, declared_looks 1; now looks alpha_spending, declared_looks None" in refusal(error)
    assert ledger.take_look(request("c1"), policy).repeated


def test_processes_that_look_at_once_get_different_numbers(url: str) -> None:
    take_looks_in_processes(url, processes=8, looks=5)


def test_a_server_that_prefers_stricter_transactions_numbers_alike(url: str, postgres: Postgres) -> None:
    name = url.rsplit("/", 1)[1]
    postgres.ask("postgres", f"ALTER DATABASE {name} SET default_transaction_isolation = 'serializable'")
    take_looks_in_processes(url, processes=4, looks=3)


def test_a_ledger_that_somebody_holds_is_refused_in_time_and_can_be_read(ledger: Ledger, url: str) -> None:
    judge(ledger, request("c1"), Outcome.REJECT)
    holder = psycopg2.connect(url)
    try:
        holder.cursor().execute("LOCK TABLE ledger_looks IN EXCLUSIVE MODE")
        with pytest.raises(LedgerError) as error:
            ledger.take_look(request("c2"), Policy())
        assert "locked by another program" in refusal(error)
        assert len(ledger.looks(PAGE)) == 1
        holder.rollback()
        with Ledger.open(url, lock_seconds=0.3) as other, other._transaction(writes=True):
            with pytest.raises(LedgerError) as error:
                ledger.check(PAGE, Policy())
            assert "locked by another program" in refusal(error)
    finally:
        holder.close()
    assert ledger.take_look(request("c2"), Policy()).number == 2


def test_a_user_who_may_only_read_is_refused_and_can_read(ledger: Ledger, url: str, postgres: Postgres) -> None:
    judge(ledger, request("c1"), Outcome.REJECT)
    name = url.rsplit("/", 1)[1]
    postgres.ask(name, f"CREATE ROLE reader LOGIN PASSWORD '{PASSWORD}'; GRANT pg_read_all_data TO reader")
    as_reader = url.replace("goldgate:", "reader:")
    with Ledger.open(as_reader) as reader:
        for ask in (lambda: reader.check(PAGE, Policy()), lambda: reader.take_look(request("c2"), Policy())):
            with pytest.raises(LedgerError) as error:
                ask()
            assert "cannot be opened for writing: permission denied for table" in refusal(error)
        assert [look.candidate for look in reader.looks(PAGE)] == ["c1"]
    postgres.ask("postgres", f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    with pytest.raises(LedgerError) as error:
        ledger.check(PAGE, Policy())
    assert "read-only transaction" in refusal(error)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (f":{PASSWORD}@", ":wrongWord77@", 'password authentication failed for user "goldgate"'),
        ("/ledger_", "/nowhere_", "does not exist"),
    ],
)
def test_a_door_that_stays_shut_says_why(url: str, old: str, new: str, says: str) -> None:
    with pytest.raises(LedgerError) as error:
        Ledger.open(url.replace(old, new))
    assert says in refusal(error)
    assert "GOLDGATE_LEDGER" in str(error.value)
    assert "wrongWord77" not in str(error.value)


def test_a_newer_ledger_is_refused(ledger: Ledger, url: str, postgres: Postgres) -> None:
    postgres.ask(url.rsplit("/", 1)[1], "UPDATE ledger_schema SET version = 2")
    with pytest.raises(LedgerError) as error:
        Ledger.open(url)
    assert "tables of version 2" in refusal(error)
