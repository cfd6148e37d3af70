"""What follows from a verdict and from what people say of it, by tables; and how their words are kept."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tasks.contracts.errors import SpecError
from tasks.contracts.references import Approval, Look, Outcome, Release, ReleaseKind, Verdict
from tasks.contracts.spec import Override, Policy
from tasks.gate.ledger import Decision, DecisionKind, Ledger
from tasks.gate.release import record, release_of
from tests.gate.made_up import system

NOW = datetime(2026, 11, 22, 14, 57, tzinfo=UTC)
CANDIDATE = "c" * 64
WORD = Override(by="Ada", reason="hotfix, read by hand")


def verdict(outcome: Outcome = Outcome.PROMOTE, approval_hours: float | None = 24) -> Verdict:
    return Verdict(
        outcome=outcome, reasons=("It is so.",), policy=Policy(approval_hours=approval_hours), requirements=(),
        metrics=(), p_value=0.01, wins=1, losses=0, ties=0, n=1, groups=1, smallest_effect=None, items_to_settle=None,
        look=Look(page="9" * 64, number=1, level=0.05, spent=0.05, budget=0.05), self_test=None, withheld=False,
        candidate=system("candidate", CANDIDATE), baseline=system("champion", "b" * 64), digests={},
    )  # fmt: skip


def approval(approve: bool = True, comment: str = "read it") -> Approval:
    return Approval(approve=approve, by="Grace", comment=comment, candidate=CANDIDATE)


def said(kind: DecisionKind, model: str = CANDIDATE) -> Decision:
    return Decision(
        kind=kind, name="animals", page="9" * 64, model=model, outcome=Outcome.PROMOTE, by="Jonas", reason="before",
        at=NOW,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "override", "answer", "decided", "kind", "by"),
    [
        (verdict(approval_hours=None), None, None, (), "by_verdict", None),
        (verdict(), None, None, (), "awaiting", None),
        (verdict(), None, approval(), (), "approved", "Grace"),
        (verdict(), None, approval(False), (), "declined", "Grace"),
        (verdict(), None, None, (DecisionKind.APPROVED,), "approved", "Jonas"),
        (verdict(), None, None, (DecisionKind.APPROVED, DecisionKind.DECLINED), "declined", "Jonas"),
        (verdict(), None, approval(), (DecisionKind.DECLINED,), "approved", "Grace"),  # a person may think again
        (verdict(), None, None, (DecisionKind.FORCED_PROMOTION,), "awaiting", None),
        (verdict(approval_hours=None), None, None, (DecisionKind.DECLINED,), "by_verdict", None),  # nobody is asked now
        (verdict(Outcome.REJECT), None, None, (), "not_promoted", None),
        (verdict(Outcome.INCONCLUSIVE), None, approval(), (DecisionKind.APPROVED,), "not_promoted", None),
        (verdict(Outcome.REJECT), WORD, None, (), "forced", "Ada"),
        (verdict(Outcome.INCONCLUSIVE, None), WORD, None, (), "forced", "Ada"),
        (verdict(), WORD, None, (DecisionKind.DECLINED,), "forced", "Ada"),
    ],
)
def test_what_follows(
    given: Verdict,
    override: Override | None,
    answer: Approval | None,
    decided: tuple[DecisionKind, ...],
    kind: str,
    by: str | None,
) -> None:
    others = [said(DecisionKind.APPROVED, model="a" * 64)]  # about another candidate
    found = release_of(given, NOW, override=override, approval=answer, decided=[*map(said, decided), *others])
    assert (found.kind.value, found.by) == (kind, by)
    assert (found.at is None) == (by is None)
    assert found.promoted == (kind in ("by_verdict", "approved", "forced"))


def test_a_word_about_another_candidate_is_refused() -> None:
    other = WORD.model_copy(update={"candidate": "a" * 64})
    with pytest.raises(
        SpecError, match="candidate is cccccccccccc, and the person decided about aaaaaaaaaaaa"
    ) as caught:
        release_of(verdict(Outcome.REJECT), NOW, override=other)
    assert caught.value.where == "override.candidate"
    with pytest.raises(SpecError, match="decided about aaaaaaaaaaaa") as caught:
        release_of(verdict(), NOW, approval=approval().model_copy(update={"candidate": "a" * 64}))
    assert caught.value.where == "approval.candidate"


def test_a_verdict_that_promotes_by_itself_needs_no_override() -> None:
    with pytest.raises(SpecError, match="nothing to override"):
        release_of(verdict(approval_hours=None), NOW, override=WORD)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """A ledger whose clock goes on by a minute at each look at it."""
    times = (NOW + timedelta(minutes=minute) for minute in range(1000))
    with Ledger.open(str(tmp_path / "ledger.db"), clock=lambda: next(times)) as opened:
        yield opened


def keep(ledger: Ledger, release: Release, name: str = "animals") -> Release:
    return record(ledger, release, verdict(Outcome.REJECT), name)


def test_a_word_is_kept_once_and_has_one_time(ledger: Ledger) -> None:
    forced = Release(kind=ReleaseKind.FORCED, by="Ada", reason=WORD.reason, at=NOW - timedelta(days=1))
    first = keep(ledger, forced)
    again = keep(ledger, forced.model_copy(update={"at": NOW + timedelta(days=1)}))
    (kept,) = ledger.decisions("animals")
    assert first == again, "so that the same promotion has the same certificate"
    assert first.at == kept.at
    assert (kept.kind, kept.model, kept.outcome, kept.page) == (
        DecisionKind.FORCED_PROMOTION, CANDIDATE, Outcome.REJECT, "9" * 64,
    )  # fmt: skip
    assert keep(ledger, forced, name="plants").at != first.at, "another task is another decision"


def test_saying_the_same_again_later_counts(ledger: Ledger) -> None:
    """Declined, approved, declined in the same words: the last word is the last one."""
    for approve in (False, True, False):
        answer = approval(approve, comment="fine" if approve else "not before May")
        keep(ledger, release_of(verdict(), NOW, approval=answer, decided=ledger.decisions("animals")))
    assert [one.kind.value for one in ledger.decisions("animals")] == ["declined", "approved", "declined"]
    assert release_of(verdict(), NOW, decided=ledger.decisions("animals")).kind is ReleaseKind.DECLINED


@pytest.mark.parametrize("kind", [ReleaseKind.BY_VERDICT, ReleaseKind.AWAITING, ReleaseKind.NOT_PROMOTED])
def test_where_no_person_has_spoken_nothing_is_kept(ledger: Ledger, kind: ReleaseKind) -> None:
    assert keep(ledger, Release(kind=kind)) == Release(kind=kind)
    assert ledger.decisions() == ()
