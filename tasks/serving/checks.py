"""Does a new engine answer as the model did when it was evaluated? Some golden items, asked one at a time."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import orjson

from tasks.contracts.errors import GoldenSetError, ServiceError
from tasks.contracts.prompt import Decoding
from tasks.contracts.rows import Row, read_rows
from tasks.contracts.serving import CheckResult, ItemParity, Proof, RolloutSpec, VersionRef
from tasks.contracts.spec import GoldenSpec
from tasks.serving.client import Served
from tasks.serving.trust import sureness
from tasks.store import digest_file

_ITEMS = "items.jsonl"
_MANIFEST = "golden.json"
_FAILURES = 3  # questions without an answer, after which no more is asked: each can take minutes
_SHOWN = 20  # differences that are kept; the counts say how many there are
_LONGEST = 200  # characters of an answer that are kept
_SIDES = 0.1  # largest share of the items that may be on the other side of the threshold than when they were evaluated


class SmokeItem(NamedTuple):
    """A golden item to ask again.

    Attributes:
        row: the item.
        evaluated: what the model answered when it was evaluated; None where there is no certificate to say so.
        confidence: how sure it was then, as the model gives it; None where its engine did not say.
    """

    row: Row
    evaluated: str | None
    confidence: float | None = None


class _Evaluated(NamedTuple):
    """What the model answered when it was evaluated, and how sure it was."""

    answer: str
    confidence: float | None


class Reply(NamedTuple):
    """What came of asking an item: an answer, or why there was none."""

    item: SmokeItem
    served: Served | None
    failure: str | None = None


def draw_smoke_items(golden: GoldenSpec, proof: Proof | None, count: int) -> tuple[SmokeItem, ...]:
    """The golden items to ask: always the same ones of a set, in an order that the items' own has no part in.

    Args:
        golden: the set; its digest must be the one that the certificate names.
        proof: what the certificate says; None for a baseline that has none.
        count: how many; all of a smaller set.

    Raises:
        GoldenSetError: it cannot be read, was changed, is another one than the certificate is about, or the
            certificate's evidence lacks one of the items.
    """
    path = Path(golden.path, _ITEMS)
    try:
        found = digest_file(path)
        rows = list(read_rows(path))
        kept = None if golden.digest or proof else json.loads(path.with_name(_MANIFEST).read_text())["digest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GoldenSetError(
            f"The golden set cannot be read: {error}", where=str(path), fix="give the folder of the frozen golden set"
        ) from error
    for expected, who in (
        (proof.golden_digest if proof else None, "the certificate is about"),
        (golden.digest, "the configuration asks for"),
        (kept, "its folder says"),
    ):
        if expected is not None and found != expected:
            raise GoldenSetError(
                f"This is another golden set: its sha256 is {found}, {who} {expected}.",
                where=str(path),
                fix="set `golden.path` to the folder of the set that the version was judged on, unchanged",
            )
    drawn = sorted(rows, key=lambda row: sha256(f"{found} {row.id}".encode()).digest())[:count]
    if proof is None:
        return tuple(SmokeItem(row, None) for row in drawn)
    answers = _evaluated_answers(Path(proof.outcomes))
    missing = [row.id for row in drawn if row.id not in answers]
    if missing:
        raise GoldenSetError(
            f"The certificate's evidence has no outcome for {len(missing):,} of {len(drawn):,} golden items, the first "
            f"of them {missing[0]}.",
            where=proof.outcomes,
            fix="do not use this version; whoever signed must say how this came about",
        )
    return tuple(SmokeItem(row, *answers[row.id]) for row in drawn)


def ask_smoke_items(ask: Callable[[Row], Served], items: Sequence[SmokeItem]) -> tuple[Reply, ...]:
    """Ask each item, after one question that is thrown away: the first one of an engine takes longer.

    Ends early after three items without an answer.
    """
    replies: list[Reply] = []
    if items:
        _asked(ask, items[0])
    for item in items:
        replies.append(_asked(ask, item))
        if sum(reply.served is None for reply in replies) >= _FAILURES:
            break
    return tuple(replies)


def judge_replies(replies: Sequence[Reply], version: VersionRef, spec: RolloutSpec) -> CheckResult:
    """What the answers show: agreement with the evaluated ones, latency, and what speaks against going live.

    An answer agrees if its text is the evaluated one, white space around it apart. Without evaluated answers, one
    agrees if it is one of the choices, or not empty where there are none. The 95th percentile is that of the nearest
    rank. Of a version whose trust was learnt, it is also compared how sure the answers are, then and now.

    Raises:
        ValueError: nothing was asked.
    """
    if not replies:
        raise ValueError("no item was asked")
    compared = replies[0].item.evaluated is not None
    differing = [reply for reply in replies if not _agrees(reply, version.decoding)]
    same = len(replies) - len(differing)
    times = sorted(reply.served.latency_ms for reply in replies if reply.served is not None)
    p50, p95 = (_percentile(times, share) for share in (0.5, 0.95))
    sure = _compare_sureness(replies, version)
    return CheckResult(
        asked=len(replies),
        compared=compared,
        same=same,
        agreement=same / len(replies),
        needed=spec.settings.min_agreement,
        differences=tuple(_parity(reply) for reply in differing[:_SHOWN]),
        latency_p50_ms=p50,
        latency_p95_ms=p95,
        max_latency_ms=spec.settings.max_latency_ms,
        sure_compared=len(sure.differences),
        sure_median=statistics.median(sure.differences) if sure.differences else None,
        sure_largest=max(sure.differences, default=None),
        sides_changed=sure.sides_changed,
        problems=(*_problems(replies, same, p95, version, spec), *_problems_of_sureness(sure)),
    )


class _Sureness(NamedTuple):
    """How sure the same answers were when they were evaluated and are now.

    Attributes:
        differences: of each answer that has both numbers, without their sign.
        judged: answers that had a confidence when they were evaluated, and were given again.
        sides_changed: of these, those that are on the other side of the threshold now; one without a confidence is
            below it.
    """

    differences: tuple[float, ...] = ()
    judged: int = 0
    sides_changed: int = 0


def _compare_sureness(replies: Sequence[Reply], version: VersionRef) -> _Sureness:
    """Of answers that agree only: another answer is another confidence, and counts as a difference already."""
    if version.trust is None:
        return _Sureness()
    differences: list[float] = []
    judged = changed = 0
    for item, served, _ in replies:
        if served is None or served.review is None or item.confidence is None:
            continue
        if not _agrees_with(served, item.evaluated):
            continue
        judged += 1
        then, now = sureness(item.confidence, version.trust), served.confidence
        changed += then.flagged is not served.review
        if now is not None:
            differences.append(abs(now - (item.confidence if then.certainty is None else then.certainty)))
    return _Sureness(tuple(differences), judged, changed)


def _problems_of_sureness(sure: _Sureness) -> list[str]:
    allowed = max(1, int(_SIDES * sure.judged))  # one answer may lie right at the threshold
    if sure.sides_changed <= allowed:
        return []
    return [
        f"{sure.sides_changed:,} of {sure.judged:,} answers are on the other side of the threshold of review than when "
        f"they were evaluated; at most {allowed:,} may be. The threshold does not hold for this engine."
    ]


def sureness_rows(check: CheckResult) -> list[str]:
    """Rows for the table of a rollout's page: whether answers are as sure as when they were evaluated."""
    if check.sure_median is None or check.sure_largest is None:
        return []
    return [
        f"| Confidence, median difference to the evaluation | {check.sure_median:.4f}, at most "
        f"{check.sure_largest:.4f} ({check.sure_compared:,} answers) | |",
        f"| Answers on the other side of the threshold of review | {check.sides_changed:,} | "
        f"at most 1, or {_SIDES:.0%} |",
    ]


def _problems(replies: Sequence[Reply], same: int, p95: float, version: VersionRef, spec: RolloutSpec) -> list[str]:
    found = []
    failures = [reply.failure for reply in replies if reply.failure is not None]
    if failures:
        found.append(f"{len(failures):,} of {len(replies):,} questions got no answer, the first: {failures[0]}")
    others = [reply.served.label for reply in replies if reply.served and reply.served.label != version.label]
    if others:
        found.append(f"{others[0]} answered {len(others):,} questions that were put to {version.label}.")
    if same < spec.settings.min_agreement * len(replies):
        how = (
            "as they were when it was evaluated" if replies[0].item.evaluated is not None else "in a form that is valid"
        )
        found.append(
            f"{same:,} of {len(replies):,} items were answered {how} ({same / len(replies):.1%}); "
            f"{spec.settings.min_agreement:.1%} are needed."
        )
    most = spec.settings.max_latency_ms
    if most is not None and p95 > most:
        found.append(f"The 95th percentile of the latency is {p95:,.0f} ms; at most {most:,.0f} ms are allowed.")
    return found


def _asked(ask: Callable[[Row], Served], item: SmokeItem) -> Reply:
    try:
        return Reply(item, ask(item.row))
    except ServiceError as error:
        return Reply(item, None, error.what)


def _agrees(reply: Reply, decoding: Decoding) -> bool:
    if reply.served is None:
        return False
    answer = reply.served.text.strip()
    if reply.item.evaluated is not None:
        return _agrees_with(reply.served, reply.item.evaluated)
    return answer in decoding.choices if decoding.choices else bool(answer)


def _agrees_with(served: Served, evaluated: str | None) -> bool:
    return evaluated is not None and served.text.strip() == evaluated.strip()


def _parity(reply: Reply) -> ItemParity:
    served = reply.served.text if reply.served is not None else f"(no answer: {reply.failure})"
    return ItemParity(id=reply.item.row.id, evaluated=_cut(reply.item.evaluated or ""), served=_cut(served))


def _evaluated_answers(path: Path) -> dict[str, _Evaluated]:
    try:
        with path.open("rb") as lines:
            records = [orjson.loads(line) for line in lines]
        return {record["id"]: _Evaluated(record["prediction"], record.get("confidence")) for record in records}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise GoldenSetError(
            f"The evaluated answers cannot be read: {error!r}",
            where=str(path),
            fix="restore the version's evidence from a copy",
        ) from error


def _percentile(ascending: Sequence[float], share: float) -> float:
    """By the nearest rank; 0 of nothing."""
    return ascending[math.ceil(share * len(ascending)) - 1] if ascending else 0.0


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
