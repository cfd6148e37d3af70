"""What was found of what was planted, and what was planted of what was found."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.data.make_rows import TRUTH

# Files of a stage that hold rows, not findings.
_ROWS = frozenset({"rows.jsonl", "train.jsonl", "dev.jsonl", "unreadable.jsonl"})
SAME = ("exact_duplicate", "near_80", "near_85", "near_90")
CONFLICTS = ("conflict_exact", "conflict_near")
GOLDEN = ("golden_exact", "golden_near", "golden_run", "golden_paraphrase")
_NOTES = ("secret", "personal", "language")  # checks whose rows stay
BAD = ("bad_blank", "bad_label", "bad_encoding", "bad_type", "bad_length")


class Truth(NamedTuple):
    """A planted row."""

    id: str
    fault: str
    partner: str | None
    jaccard: float


class Scored(NamedTuple):
    """How well one check finds one fault.

    Attributes:
        check: what looked.
        fault: what was planted.
        planted: how many of it.
        found: how many of them were found.
        flagged: how many rows the check named in all; None where that says nothing of this fault alone.
        right: how many of those have a fault that the check is for.
    """

    check: str
    fault: str
    planted: int
    found: int
    flagged: int | None
    right: int | None


Ids = frozenset[str]
Flagged = dict[str, Ids]  # by the check that named them


def read_truth(folder: Path) -> list[Truth]:
    """The planted rows."""
    with (folder / TRUTH).open("rb") as lines:
        found = (json.loads(line) for line in lines)
        return [Truth(one["id"], one["fault"], one["partner"], one.get("jaccard", 1.0)) for one in found]


def read_flagged(stage: Path) -> Flagged:
    """What the findings of a stage's folder name: the lines of its `quarantine.jsonl`, `notes.jsonl` and the like."""
    ids: dict[str, set[str]] = defaultdict(set)
    for path in sorted(stage.glob("*.jsonl")):
        if path.name in _ROWS:
            continue
        for entry in _lines(path):
            checks = entry.get("checks") or [entry.get("reason") or path.stem]
            for check in checks:
                ids[check].add(entry["id"])
    return {check: frozenset(found) for check, found in ids.items()}


def score_stages(truth: Iterable[Truth], validated: Flagged, curated: Flagged) -> list[Scored]:
    """Each check against what was planted for it.

    A pair of duplicates is found if one of its rows is taken out as such; two that contradict each other, if both are.
    `hard_negative` and `paraphrase` count the pairs that were taken for near-duplicates: the first should be none, the
    second are those that share too little to be found by their words. So it is with `golden_paraphrase`.
    """
    planted: dict[str, list[Truth]] = defaultdict(list)
    for one in truth:
        planted[one.fault].append(one)

    def ids(*faults: str) -> frozenset[str]:
        """The rows of these faults, and their partners among the rows."""
        found = [one for fault in faults for one in planted[fault]]
        partners = {one.partner for one in found if one.partner is not None and one.fault not in GOLDEN}
        return frozenset({one.id for one in found} | partners)

    def check(
        name: str, faults: Sequence[str], named: Ids, right: Ids, hit: Callable[[Truth, Ids], bool]
    ) -> list[Scored]:
        lines = [_count(name, fault, planted[fault], named, hit) for fault in faults]
        both = sum(line.planted for line in lines), sum(line.found for line in lines)
        return [*lines, Scored(name, "all of them", *both, len(named), len(named & right))]

    same = frozenset(one for kind in ("exact", "near", "semantic") for one in curated.get(f"{kind}_duplicate", ()))
    leaks = _named(curated, "golden")
    return [
        *check("validate", BAD, _but(validated, *_NOTES), ids(*BAD, "hidden"), _own),
        *check("hidden characters", ("hidden",), _named(validated, "hidden"), ids("hidden"), _own),
        *check("secrets", ("secret",), _named(validated, "secret"), ids("secret"), _own),
        *check("personal data", ("personal",), _named(validated, "personal"), ids("personal"), _own),
        *check("golden set", GOLDEN[:3], leaks, ids(*GOLDEN), _own),
        _count("golden set", GOLDEN[3], planted[GOLDEN[3]], leaks, _own),
        *check("duplicates", SAME, same, ids(*SAME, *CONFLICTS), _either),
        _count("duplicates", "hard_negative", planted["hard_negative"], same, _either),
        _count("duplicates", "paraphrase", planted["paraphrase"], same, _either),
        *check("contradictions", CONFLICTS, _named(curated, "conflicting"), ids(*CONFLICTS), _both),
        *check("wrong labels", ("wrong_label",), _named(curated, "suspect"), ids("wrong_label", *CONFLICTS), _own),
        *check("poisoning", ("backdoor",), _named(curated, "planted"), ids("backdoor"), _own),
    ]


def score_duplicates(truth: Iterable[Truth], removed: Collection[str]) -> dict[str, Any]:
    """Pairs found by band, and of the rows taken out how many belong to a pair of at least 0.8.

    Rows planted as leaks of the golden set are left out: several of one item are duplicates of each other.
    """
    out = frozenset(removed)
    by_fault: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    right: set[str] = set()
    ignored: set[str] = set()
    for one in truth:
        if one.fault in GOLDEN:
            ignored.add(one.id)
        elif one.partner is not None:
            by_fault[one.fault][0] += 1
            by_fault[one.fault][1] += one.id in out or one.partner in out
            if one.fault in (*SAME, *CONFLICTS):
                right |= {one.id, one.partner}
    judged = out - ignored
    return {
        "removed": len(judged),
        "right": len(judged & right),
        "pairs": {fault: {"planted": planted, "found": found} for fault, (planted, found) in sorted(by_fault.items())},
    }


def _count(name: str, fault: str, planted: Sequence[Truth], named: Ids, hit: Callable[[Truth, Ids], bool]) -> Scored:
    return Scored(name, fault, len(planted), sum(hit(one, named) for one in planted), None, None)


def _own(one: Truth, named: Ids) -> bool:
    return one.id in named


def _either(one: Truth, named: Ids) -> bool:
    return one.id in named or one.partner in named


def _both(one: Truth, named: Ids) -> bool:
    return one.id in named and one.partner in named


def _named(flagged: Flagged, *words: str) -> Ids:
    """The rows that checks with one of these words in their names have named."""
    chosen = (ids for check, ids in flagged.items() if any(word in check for word in words))
    return frozenset(one for ids in chosen for one in ids)


def _but(flagged: Flagged, *words: str) -> Ids:
    """The rows that the other checks have named."""
    chosen = (ids for check, ids in flagged.items() if not any(word in check for word in words))
    return frozenset(one for ids in chosen for one in ids)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as lines:
        for line in lines:
            yield json.loads(line)
