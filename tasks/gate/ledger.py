"""The ledger: every look at a golden set, numbered, with the error level that it may spend.

A golden set is a page. Its first look opens the page with the budget (`alpha` and how it is shared), and no later look
changes it. A look is known by what was asked: this candidate against this baseline under these requirements. Asked
again it is the same look, with the number and level of then, and costs nothing; what was said first stands.

The ledger is a SQLite file beside the store, or a PostgreSQL database where several machines share one. Whoever writes
writes alone: a transaction that writes takes SQLite's write lock when it begins, or an advisory lock of PostgreSQL, so
numbers follow each other without a gap. A ledger that cannot be read or written is an error, never a verdict without
one.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Self

from pydantic import Field
from sqlalchemy import (
    Boolean,
    Column,
    Connection,
    Double,
    Engine,
    ForeignKey,
    ForeignKeyConstraint,
    Integer,
    MetaData,
    RowMapping,
    Select,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    func,
    insert,
    inspect,
    select,
    update,
)
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from tasks.contracts.errors import LedgerError
from tasks.contracts.references import Look, Outcome, SelfTest
from tasks.contracts.spec import ExecutionSpec, Frozen, LookPolicy, Policy
from tasks.gate.looks import budget_spent, look_level, why_spent

SCHEMA_VERSION = 1
LOCK_SECONDS = 30.0  # a transaction takes milliseconds: whoever holds the ledger for this long is stuck
_CONNECT_SECONDS = 10  # PostgreSQL; libpq alone would wait for minutes

_VARIABLE = "GOLDGATE_LEDGER"
_FIELD = "execution.ledger"
_DRIVERS = {"sqlite", "sqlite+pysqlite", "postgresql", "postgresql+psycopg2"}
_ADVISORY_LOCK = 0x60_1D_6A_7E_1E_D6  # any number that nobody else locks in the same database

_SETTINGS = ("alpha", "looks", "declared_looks", "ladder_step")  # of a policy: what a page keeps to

# No control characters: PostgreSQL keeps no NUL, and a terminal obeys the others.
Word = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")]


# -- records --------------------------------------------------------------------------------------------------------


class LookRequest(Frozen):
    """A question to the gate: is this candidate better than this baseline on this golden set?

    Attributes:
        page: sha256 of the golden set.
        name: the task.
        candidate: sha256 of the candidate.
        baseline: sha256 of the baseline.
        requirements: sha256 of what the policy asks (`requirements_digest`).
        answers: sha256 of the answers that the verdict will rest on (`answers_digest`).
        asked_by: the person or run that asks.
    """

    page: Word
    name: Word
    candidate: Word
    baseline: Word
    requirements: Word
    answers: Word
    asked_by: Word


class Repeat(Frozen):
    """A verdict on a look that had one already. The first stands; this one shows whether it came out the same."""

    at: datetime
    asked_by: str
    answers: str
    outcome: Outcome
    verdict: str


class LookRecord(Frozen):
    """A look as the ledger keeps it. Looks are ordered by number, never by time.

    Attributes:
        answers: the answers that the look was taken with.
        level: error level that it may spend.
        spent: what it and all looks before it have spent.
        promotions: how many looks before it promoted, as far as was recorded when it was taken.
        at: the clock of whoever asked, in UTC, as it was read.
        clock_went_back: `at` is before that of the look before.
        outcome: the first verdict; None where none was ever recorded (the process ended before).
        verdict: sha256 of that verdict.
        judged_at: when it was recorded.
        judged_answers: the answers that it rests on; others than `answers` if they were made again before it came.
        repeats: later verdicts on the same question.
    """

    page: str
    number: int
    name: str
    candidate: str
    baseline: str
    requirements: str
    answers: str
    asked_by: str
    level: float
    spent: float
    promotions: int
    at: datetime
    clock_went_back: bool
    outcome: Outcome | None
    verdict: str | None
    judged_at: datetime | None
    judged_answers: str | None
    repeats: tuple[Repeat, ...] = ()


class Page(Frozen):
    """A golden set and its budget.

    Attributes:
        page: sha256 of the golden set.
        name: the task of its first look.
        alpha: what all its looks together may spend.
        looks: how that is shared; with `declared_looks` (bonferroni) and `ladder_step` (ladder).
        taken: how many looks it has had.
        promotions: how many of them promoted.
        spent: what they have spent.
        why_spent: why there can be no further look; None while there can.
    """

    page: str
    name: str
    alpha: float
    looks: LookPolicy
    declared_looks: int | None
    ladder_step: float
    opened_at: datetime
    opened_by: str
    taken: int
    promotions: int
    spent: float
    why_spent: str | None


class DecisionKind(StrEnum):
    """What a person decided, beside or over a verdict."""

    FORCED_PROMOTION = "forced_promotion"  # promoted although the verdict was not PROMOTE
    FIRST_BASELINE = "first_baseline"  # made champion with nothing to compare it with
    RE_BASELINE = "re_baseline"  # the champion is taken as it is on another golden set
    APPROVED = "approved"
    DECLINED = "declined"


class Decision(Frozen):
    """A person's word, kept for whoever asks later.

    Attributes:
        name: the task.
        page: sha256 of the golden set, where one is concerned.
        model: sha256 of the model that it is about.
        outcome: what the verdict said, where there was one.
    """

    kind: DecisionKind
    name: str
    page: str | None
    model: str
    outcome: Outcome | None
    by: str
    reason: str
    at: datetime


# -- tables ---------------------------------------------------------------------------------------------------------

# Times are text, ISO 8601 in UTC: SQLite has no time with a zone, and text reads the same in both databases.
_metadata = MetaData()

_schema = Table(
    "ledger_schema",
    _metadata,
    Column("version", Integer, nullable=False),
    Column("checked_at", Text),  # see `Ledger.check`
)

_pages = Table(
    "ledger_pages",
    _metadata,
    Column("page", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("alpha", Double, nullable=False),
    Column("looks", Text, nullable=False),
    Column("declared_looks", Integer),
    Column("ladder_step", Double, nullable=False),
    Column("opened_at", Text, nullable=False),
    Column("opened_by", Text, nullable=False),
)

_looks = Table(
    "ledger_looks",
    _metadata,
    Column("page", Text, ForeignKey("ledger_pages.page"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("name", Text, nullable=False),
    Column("candidate", Text, nullable=False),
    Column("baseline", Text, nullable=False),
    Column("requirements", Text, nullable=False),
    Column("answers", Text, nullable=False),
    Column("asked_by", Text, nullable=False),
    Column("level", Double, nullable=False),
    Column("spent", Double, nullable=False),
    Column("promotions", Integer, nullable=False),
    Column("at", Text, nullable=False),
    Column("clock_went_back", Boolean, nullable=False),
    Column("outcome", Text),
    Column("verdict", Text),
    Column("judged_at", Text),
    Column("judged_answers", Text),
    UniqueConstraint("page", "candidate", "baseline", "requirements"),
)

_repeats = Table(
    "ledger_repeats",
    _metadata,
    Column("id", Integer, primary_key=True),
    Column("page", Text, nullable=False),
    Column("number", Integer, nullable=False),
    Column("at", Text, nullable=False),
    Column("asked_by", Text, nullable=False),
    Column("answers", Text, nullable=False),
    Column("outcome", Text, nullable=False),
    Column("verdict", Text, nullable=False),
    ForeignKeyConstraint(["page", "number"], ["ledger_looks.page", "ledger_looks.number"]),
)

_decisions = Table(
    "ledger_decisions",
    _metadata,
    Column("id", Integer, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("page", Text),  # no key of `ledger_pages`: a person may decide before the first look
    Column("model", Text, nullable=False),
    Column("outcome", Text),
    Column("by", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("at", Text, nullable=False),
)

_self_tests = Table(
    "ledger_self_tests",
    _metadata,
    Column("id", Integer, primary_key=True),
    Column("requirements", Text, nullable=False),
    Column("page", Text, nullable=False),  # no key of `ledger_pages`: a policy is tested before the first look
    Column("baseline", Text, nullable=False),
    Column("at", Text, nullable=False),
    Column("result", Text, nullable=False),
)


# -- where it is ----------------------------------------------------------------------------------------------------


def ledger_url(execution: ExecutionSpec) -> str:
    """The database of the ledger: `execution.ledger`, else GOLDGATE_LEDGER, else `ledger.db` in the store.

    What has no "://" is a SQLite file. The address may hold a password (from the environment): hand it to
    `Ledger.open`, and show nobody more than `Ledger.where`.

    Raises:
        LedgerError: none is named and the store is remote; the address is none of SQLite or PostgreSQL; or
            `execution.ledger` holds a password.
    """
    if execution.ledger:
        url = _parse(execution.ledger, _FIELD)
        if url.password is not None or any("password" in key for key in url.query):
            raise LedgerError(
                "The address of the ledger holds a password, and a configuration is no place for secrets.",
                where=f"{_FIELD}: {_shown(url)}",
                fix=f"leave the password out and set PGPASSWORD, or set the whole address in {_VARIABLE} instead",
            )
    elif named := os.environ.get(_VARIABLE):
        url = _parse(named, _VARIABLE)
    elif "://" in execution.store and not execution.store.startswith("file://"):
        raise LedgerError(
            "The store is remote and no ledger is named; a SQLite database cannot be kept there.",
            where=execution.store,
            fix=f"set {_VARIABLE} (or `{_FIELD}`, without a password) to postgresql://… or to a local file",
        )
    else:
        url = _parse(f"{execution.store.removeprefix('file://')}/ledger.db", "execution.store")
    return url.render_as_string(hide_password=False)


def _parse(address: str, source: str) -> URL:
    """An address as URL, a SQLite file with its absolute path. Says nothing of what it could not read: it may be a
    password.
    """
    expected = "a file, sqlite:////absolute/path.db, or postgresql://user@host:5432/database"
    if "://" not in address:
        url = URL.create("sqlite", database=address)
    else:
        try:
            url = make_url(address)
        except (ArgumentError, ValueError):
            raise LedgerError(
                "The address of the ledger cannot be read.",
                where=source,
                fix=f"give {expected}; in a password, write @ : / % as %40 %3A %2F %25",
            ) from None
    if url.drivername not in _DRIVERS:
        raise LedgerError(
            f"A ledger is kept in SQLite or PostgreSQL, not in {url.drivername}.", where=source, fix=f"give {expected}"
        )
    if url.get_backend_name() != "sqlite":
        return url
    if not url.database or url.database == ":memory:" or url.query or "?" in url.database:
        raise LedgerError(
            "A SQLite ledger needs a file, which has no ? in its name, and takes no options.",
            where=f"{source}: {address}",
            fix=f"give {expected}",
        )
    return url.set(database=os.path.abspath(url.database))


def _shown(url: URL) -> str:
    """The address for messages: without passwords, and for SQLite just the file."""
    if url.get_backend_name() == "sqlite":
        return str(url.database)
    return url.difference_update_query([key for key in url.query if "pass" in key]).render_as_string(hide_password=True)


# -- the ledger -----------------------------------------------------------------------------------------------------


def _utc_now() -> datetime:
    return datetime.now(UTC)


class Ledger:
    """An open ledger. Every call is a transaction of its own on a connection of its own, so it can be kept open."""

    def __init__(self, engine: Engine, where: str, lock_seconds: float, clock: Callable[[], datetime]) -> None:
        """Use `Ledger.open`."""
        self._engine = engine
        self._lock_milliseconds = str(max(1, round(1000 * lock_seconds)))
        self._clock = clock
        self._sqlite = engine.dialect.name == "sqlite"
        self.where = where

    @classmethod
    def open(
        cls,
        url: str,
        *,
        create: bool = True,
        lock_seconds: float | None = None,
        clock: Callable[[], datetime] = _utc_now,
    ) -> Self:
        """Open the ledger at an address, and make its tables if there are none.

        Args:
            url: as `ledger_url` gives it.
            create: make a ledger where there is none; else that is an error.
            lock_seconds: how long to wait for others who write; `LOCK_SECONDS` unless given.
            clock: the time with its zone.

        Raises:
            LedgerError: it cannot be reached, read or made, is no database, or was written by a newer Goldgate.
        """
        address = _parse(url, "the ledger's address")
        seconds = LOCK_SECONDS if lock_seconds is None else lock_seconds
        where = _shown(address)
        if address.get_backend_name() == "sqlite":
            _find_file(Path(where), create=create)
            # No isolation level: transactions begin where `_transaction` says, not where the driver thinks.
            settings: dict[str, Any] = {"connect_args": {"timeout": seconds, "isolation_level": None}}
        else:
            # READ COMMITTED, whatever the server prefers: each statement after the lock sees what others wrote before.
            settings = {"connect_args": {"connect_timeout": _CONNECT_SECONDS}, "isolation_level": "READ COMMITTED"}
        try:
            engine = create_engine(address, poolclass=NullPool, **settings)
        except ImportError as error:
            raise LedgerError(
                f"The driver for PostgreSQL is not installed: {error}",
                where=where,
                fix="pip install 'goldgate[postgres]', or keep the ledger in a local file",
            ) from error
        ledger = cls(engine, where, seconds, clock)
        ledger._make_tables(create=create)
        return ledger

    def close(self) -> None:
        """Let go of the database."""
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- looks ----------------------------------------------------------------------------------------------------

    def check(self, page: str, policy: Policy) -> None:
        """Whether a *new* look could be taken now; asked before any computing. Repeated looks work on a spent page.

        Raises:
            LedgerError: the ledger cannot be written, the page keeps to another budget, or its budget is spent.
        """
        with self._transaction(writes=True) as connection:
            # A write is the one check that sees rights, mount flags, quotas and damage alike. It has to change
            # something: SQLite leaves a row alone that would stay as it is.
            connection.execute(update(_schema).values(checked_at=self._now().isoformat()))
            opened = connection.execute(select(_pages).where(_pages.c.page == page)).mappings().one_or_none()
            if opened is not None:
                self._check_budget(opened, policy)
                self._check_left(page, policy, *_count(connection, page))

    def take_look(self, request: LookRequest, policy: Policy) -> Look:
        """Number a look and say which level it may spend, or find it again if the same was asked before.

        Take it before the verdict is computed, and let nobody see the verdict before `record_verdict`: what is shown
        but not recorded would not be counted.

        Raises:
            LedgerError: the ledger cannot be written, the page keeps to another budget, or its budget is spent.
        """
        with self._transaction(writes=True) as connection:
            now = self._now()
            opened = connection.execute(select(_pages).where(_pages.c.page == request.page)).mappings().one_or_none()
            if opened is None:
                page = {
                    "page": request.page,
                    "name": request.name,
                    **_settings_of(policy),
                    "opened_at": now.isoformat(),
                    "opened_by": request.asked_by,
                }
                connection.execute(insert(_pages).values(page))
            else:
                self._check_budget(opened, policy)
            known = connection.execute(_same_question(request)).mappings().one_or_none()
            if known is not None:
                return _look_again(known, request, policy)

            taken, promotions = _count(connection, request.page)
            self._check_left(request.page, policy, taken, promotions)
            last = connection.execute(
                select(_looks.c.at).where(_looks.c.page == request.page, _looks.c.number == taken)
            ).scalar_one_or_none()
            look = Look(
                page=request.page,
                number=taken + 1,
                level=look_level(policy, taken + 1, promotions),
                spent=budget_spent(policy, taken + 1),
                budget=policy.alpha,
                promotions=promotions,
            )
            connection.execute(
                insert(_looks).values(
                    **request.model_dump(),
                    number=look.number,
                    level=look.level,
                    spent=look.spent,
                    promotions=promotions,
                    at=now.isoformat(),
                    clock_went_back=last is not None and now < datetime.fromisoformat(last),
                )
            )
            return look

    def record_verdict(self, look: Look, request: LookRequest, outcome: Outcome, verdict_digest: str) -> Outcome:
        """Keep what was said at a look, before anybody is told.

        The first verdict of a look stands; a later one is kept beside it, with its answers.

        Returns:
            The outcome that stands.

        Raises:
            LedgerError: the ledger cannot be written, or holds no such look.
        """
        with self._transaction(writes=True) as connection:
            now = self._now().isoformat()
            known = connection.execute(_same_question(request)).mappings().one_or_none()
            if known is None or known["number"] != look.number:
                raise LedgerError(
                    f"The ledger holds no look {look.number} of candidate {request.candidate} at this golden set.",
                    where=f"{self.where}, page {request.page}",
                    fix="use the ledger that the look was taken in; if it was lost or put back to an earlier copy, "
                    "freeze a new golden set, since nobody knows what was spent of this one",
                )
            this_look = (_looks.c.page == request.page) & (_looks.c.number == look.number)
            if known["outcome"] is None:
                verdict = {
                    "outcome": outcome.value,
                    "verdict": verdict_digest,
                    "judged_at": now,
                    "judged_answers": request.answers,
                }
                connection.execute(update(_looks).where(this_look).values(verdict))
                return outcome
            repeat = {
                "page": request.page,
                "number": look.number,
                "at": now,
                "asked_by": request.asked_by,
                "answers": request.answers,
                "outcome": outcome.value,
                "verdict": verdict_digest,
            }
            connection.execute(insert(_repeats).values(repeat))
            return Outcome(known["outcome"])

    # -- people and tests -----------------------------------------------------------------------------------------

    def record_decision(
        self,
        kind: DecisionKind,
        *,
        name: str,
        page: str | None,
        model: str,
        outcome: Outcome | None,
        by: str,
        reason: str,
    ) -> Decision:
        """Keep what a person decided; `Decision` says what the arguments mean.

        Raises:
            LedgerError: the ledger cannot be written.
        """
        decision = Decision(
            kind=kind, name=name, page=page, model=model, outcome=outcome, by=by, reason=reason, at=self._now()
        )
        row = decision.model_dump(mode="json") | {"at": decision.at.isoformat()}
        with self._transaction(writes=True) as connection:
            connection.execute(insert(_decisions).values({key: _storable(value) for key, value in row.items()}))
        return decision

    def record_self_test(self, self_test: SelfTest, *, requirements: str, page: str, baseline: str) -> None:
        """Keep how these requirements did on this baseline against itself on this golden set.

        Raises:
            LedgerError: the ledger cannot be written.
        """
        row = {
            "requirements": requirements,
            "page": page,
            "baseline": baseline,
            "at": self._now().isoformat(),
            "result": self_test.model_dump_json(),
        }
        with self._transaction(writes=True) as connection:
            connection.execute(insert(_self_tests).values(row))

    def find_self_test(self, *, requirements: str, page: str, baseline: str) -> SelfTest | None:
        """The last self-test of these requirements on this baseline and golden set, or None.

        Raises:
            LedgerError: the ledger cannot be read.
        """
        asked = (
            select(_self_tests.c.result)
            .where(
                _self_tests.c.requirements == requirements,
                _self_tests.c.page == page,
                _self_tests.c.baseline == baseline,
            )
            .order_by(_self_tests.c.id.desc())
            .limit(1)
        )
        with self._transaction(writes=False) as connection:
            result = connection.execute(asked).scalar_one_or_none()
        return None if result is None else SelfTest.model_validate_json(result)

    # -- reading --------------------------------------------------------------------------------------------------

    def pages(self) -> tuple[Page, ...]:
        """All pages, in the order of their first look by the clock.

        Raises:
            LedgerError: the ledger cannot be read.
        """
        with self._transaction(writes=False) as connection:
            rows = connection.execute(select(_pages).order_by(_pages.c.opened_at, _pages.c.page)).mappings().all()
            counts = [_count(connection, row["page"]) for row in rows]
        pages = []
        for row, (taken, promotions) in zip(rows, counts, strict=True):
            policy = Policy(**{name: row[name] for name in _SETTINGS})
            pages.append(
                Page(
                    **row,
                    taken=taken,
                    promotions=promotions,
                    spent=budget_spent(policy, taken),
                    why_spent=why_spent(policy, taken + 1, promotions),
                )
            )
        return tuple(pages)

    def looks(self, page: str) -> tuple[LookRecord, ...]:
        """The looks at a golden set by number, each with what was said again later.

        Raises:
            LedgerError: the ledger cannot be read.
        """
        with self._transaction(writes=False) as connection:
            rows = connection.execute(select(_looks).where(_looks.c.page == page).order_by(_looks.c.number))
            looks = rows.mappings().all()
            again = connection.execute(select(_repeats).where(_repeats.c.page == page).order_by(_repeats.c.id))
            repeats: dict[int, list[Repeat]] = {}
            for row in again.mappings():
                repeat = Repeat(**{name: row[name] for name in Repeat.model_fields})
                repeats.setdefault(row["number"], []).append(repeat)
        return tuple(LookRecord(**row, repeats=tuple(repeats.get(row["number"], ()))) for row in looks)

    def find_look(self, *, page: str, candidate: str, baseline: str, requirements: str) -> LookRecord | None:
        """The look that asked this, or None: whether asking would be new, before anything is spent.

        Raises:
            LedgerError: the ledger cannot be read.
        """
        asked = (candidate, baseline, requirements)
        found = [look for look in self.looks(page) if (look.candidate, look.baseline, look.requirements) == asked]
        return found[0] if found else None

    def decisions(self, name: str | None = None) -> tuple[Decision, ...]:
        """What people decided, about one task or about all, in the order in which it was recorded.

        Raises:
            LedgerError: the ledger cannot be read.
        """
        asked = select(_decisions).order_by(_decisions.c.id)
        if name is not None:
            asked = asked.where(_decisions.c.name == name)
        with self._transaction(writes=False) as connection:
            rows = connection.execute(asked).mappings().all()
        return tuple(Decision(**{field: row[field] for field in Decision.model_fields}) for row in rows)

    # -- inside ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _transaction(self, *, writes: bool) -> Iterator[Connection]:
        """A transaction; one that writes has the ledger to itself from its first moment on."""
        try:
            with self._engine.begin() as connection:
                if self._sqlite:
                    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
                elif writes:
                    connection.execute(select(func.set_config("lock_timeout", self._lock_milliseconds, True)))
                    connection.execute(select(func.pg_advisory_xact_lock(_ADVISORY_LOCK)))
                yield connection
        except SQLAlchemyError as error:
            raise self._explain(error) from error

    def _make_tables(self, *, create: bool) -> None:
        with self._transaction(writes=False) as connection:
            version = _version(connection)
        if version is None:
            if not create:
                raise _no_ledger(self.where)
            with self._transaction(writes=True) as connection:
                version = _version(connection)  # another process may have been faster
                if version is None:
                    _metadata.create_all(connection, checkfirst=False)
                    connection.execute(insert(_schema).values(version=SCHEMA_VERSION))
                    version = SCHEMA_VERSION
        if version != SCHEMA_VERSION:
            raise LedgerError(
                f"The ledger has tables of version {version}, and this Goldgate knows version {SCHEMA_VERSION}.",
                where=self.where,
                fix="use the newer Goldgate that wrote it"
                if version > SCHEMA_VERSION
                else f"name another database in {_VARIABLE}",
            )

    def _now(self) -> datetime:
        now = self._clock()
        if now.tzinfo is None:
            raise ValueError("the ledger's clock gives a time without its zone")
        return now.astimezone(UTC)

    def _check_budget(self, opened: RowMapping, policy: Policy) -> None:
        asked = _settings_of(policy)
        kept = {name: opened[name] for name in _SETTINGS}
        differing = [name for name in _SETTINGS if kept[name] != asked[name]]
        if differing:

            def words(values: Mapping[str, Any]) -> str:
                return ", ".join(f"{name} {values[name]}" for name in differing)

            raise LedgerError(
                f"The first look at this golden set opened its page with {words(kept)}; now {words(asked)} is asked. "
                "Changing the budget midway would void what it promised.",
                where=f"{self.where}, page {opened['page']} of {opened['name']}, opened {opened['opened_at'][:10]} "
                f"by {opened['opened_by']}",
                fix=f"set {' and '.join(f'`policy.{name}`' for name in differing)} back, or start a new page: "
                "`goldgate golden freeze` with fresh rows into a new folder",
            )

    def _check_left(self, page: str, policy: Policy, taken: int, promotions: int) -> None:
        reason = why_spent(policy, taken + 1, promotions)
        if reason is not None:
            raise LedgerError(
                f"The error budget of this golden set is spent: {reason}.",
                where=f"{self.where}, page {page}",
                fix="freeze another one: `goldgate golden freeze` with fresh rows into a new folder; the champion is "
                "then evaluated again on it, and a new page starts",
            )

    def _explain(self, error: SQLAlchemyError) -> LedgerError:
        """What a database's error means for the ledger. Statements and their values stay out of it."""
        cause = error.orig if isinstance(error, DBAPIError) else None
        words = " ".join(str(cause or type(error).__name__).split())
        sqlite = getattr(cause, "sqlite_errorcode", None)
        primary = sqlite & 0xFF if sqlite is not None else None  # the extended codes have theirs in the upper bits
        postgres = getattr(cause, "pgcode", None)
        another = f"name another place in {_VARIABLE} or `{_FIELD}`"
        if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED) or postgres == "55P03":  # lock_not_available
            what = f"The ledger is locked by another program that does not let go: {words}"
            fix = "end that program (or its open transaction), and ask again; nothing was recorded"
        elif primary in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
            what = f"This file is no ledger, or is damaged: {words}"
            fix = f"put back a copy of the ledger, or {another}; a lost ledger means a new golden set, since nobody "
            fix += "knows what was spent of the old one"
        elif primary in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM) or postgres in (
            "25006",  # read_only_sql_transaction
            "42501",  # insufficient_privilege
        ):
            what = f"The ledger cannot be opened for writing: {words}"
            fix = f"allow writing there (file and folder, or the database's user), or {another}"
        elif primary in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR) or postgres == "53100":  # disk_full
            what = f"The ledger's disk refuses: {words}"
            fix = f"free space or mend the disk, or {another}"
        elif not self._sqlite and postgres is None:
            what = f"The ledger's database does not answer: {words}"
            fix = f"start PostgreSQL, or correct host, database, user and password in {_VARIABLE} (or PGPASSWORD)"
        else:
            what = f"The ledger refuses: {words}"
            fix = f"check that this database is a ledger of this Goldgate, or {another}"
        return LedgerError(what, where=self.where, fix=fix)


def _find_file(path: Path, *, create: bool) -> None:
    if not create:
        if not path.is_file():
            raise _no_ledger(str(path))
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LedgerError(
            f"The ledger's folder cannot be made: {error.strerror}",
            where=str(path.parent),
            fix=f"allow writing there, or name another place in {_VARIABLE} or `{_FIELD}`",
        ) from error


def _no_ledger(where: str) -> LedgerError:
    return LedgerError(
        "There is no ledger yet.",
        where=where,
        fix=f"the first verdict makes it; if there was one, name its place in {_VARIABLE} or `{_FIELD}`",
    )


def _version(connection: Connection) -> int | None:
    """Version of the tables; None if there are none."""
    if not inspect(connection).has_table(_schema.name):
        return None
    return int(connection.execute(select(func.max(_schema.c.version))).scalar_one() or 0)


def _count(connection: Connection, page: str) -> tuple[int, int]:
    """How many looks a page has had, and how many of them promoted."""
    promoted = func.count().filter(_looks.c.outcome == Outcome.PROMOTE.value)
    taken, promotions = connection.execute(select(func.count(), promoted).where(_looks.c.page == page)).one()
    return int(taken), int(promotions)


def _settings_of(policy: Policy) -> dict[str, Any]:
    settings = policy.model_dump(mode="json", include=set(_SETTINGS))
    return {name: settings[name] for name in _SETTINGS}


def _same_question(request: LookRequest) -> Select[Any]:
    return select(_looks).where(
        _looks.c.page == request.page,
        _looks.c.candidate == request.candidate,
        _looks.c.baseline == request.baseline,
        _looks.c.requirements == request.requirements,
    )


def _look_again(known: RowMapping, request: LookRequest, policy: Policy) -> Look:
    return Look(
        page=request.page,
        number=known["number"],
        level=known["level"],
        spent=known["spent"],
        budget=policy.alpha,
        promotions=known["promotions"],
        repeated=True,
        first_outcome=known["outcome"],
        same_answers=request.answers == (known["judged_answers"] or known["answers"]),
    )


def _storable(value: Any) -> Any:
    """Text without NUL, which PostgreSQL does not take; people's comments come from forms."""
    return value.replace("\0", "") if isinstance(value, str) else value
