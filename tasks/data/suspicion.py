"""Rows that are probably labelled wrong, or that look planted: found by what the other rows say, handled by policy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.contracts.errors import DataError
from tasks.contracts.spec import CurateSpec, PoisonPolicy, SuspectPolicy, TaskKind, TaskSpec
from tasks.data.duplicates import Removed
from tasks.data.out_of_fold import predict_out_of_fold, read_words
from tasks.data.poisoning import Poisoning, find_poisoning
from tasks.data.rejected import Veil
from tasks.data.suspects import Suspects, find_suspects, weigh_down
from tasks.data.table import RowReader, RowTable

PLANTED = "planted"
SUSPECT = "suspect_label"
_SHOWN = 50  # suspects that the report shows
_SAID = 5  # findings and rows that a message names


class Suspicion(NamedTuple):
    """What was found.

    Attributes:
        removed: rows that leave.
        factors: of the weight of every row of the table, shape [n].
        suspects: for the report; None where nothing was looked for.
        poisoning: likewise.
    """

    removed: list[Removed]
    factors: NDArray[np.float64]
    suspects: dict[str, Any] | None
    poisoning: dict[str, Any] | None


def look_for_suspicion(
    reader: RowReader, table: RowTable, kept: NDArray[np.int64], task: TaskSpec, spec: CurateSpec
) -> Suspicion:
    """Look through the rows that are kept so far, in tasks with labels.

    Args:
        reader: opens the rows.
        table: all rows.
        kept: positions of the rows that are left.
        task: its kind decides whether anything is looked for.
        spec: what is done about what is found.

    Raises:
        DataError: rows look planted, and the policy is to stop.
    """
    factors = np.ones(len(table), dtype=np.float64)
    nothing = Suspicion([], factors, None, None)
    wanted = spec.suspects is not SuspectPolicy.OFF or spec.poisoning is not PoisonPolicy.OFF
    if task.kind is not TaskKind.CLASSIFY or not wanted or not len(kept):
        return nothing

    def texts() -> Iterator[str]:
        return reader.texts(kept)

    labels, names = table.strata[kept], table.stratum_names
    removed: list[Removed] = []
    suspects = poisoning = None
    planted: frozenset[int] = frozenset()
    with read_words(texts) as words:
        beliefs = predict_out_of_fold(words, labels, len(names), table.groups[kept])
        if spec.poisoning is not PoisonPolicy.OFF:
            traces = find_poisoning(texts, words, beliefs, labels, names, table.sources[kept], table.source_names)
            poisoning = _traces(traces, spec, table, kept)
            _check_stop(traces, spec)
            if spec.poisoning is PoisonPolicy.QUARANTINE:
                planted = frozenset(traces.reasons)
                removed += [Removed(int(kept[at]), PLANTED, why) for at, why in traces.reasons.items()]
        if spec.suspects is not SuspectPolicy.OFF:
            found = find_suspects(beliefs, labels, names)
            found = found._replace(found=[one for one in found.found if one.position not in planted])
            suspects = _described(found, spec, table, reader, kept)
            if spec.suspects in (SuspectPolicy.DROP, SuspectPolicy.REVIEW):
                removed += _left(found, spec.suspects, table, kept)
            if spec.suspects is SuspectPolicy.DOWN_WEIGHT:
                factors[kept] = weigh_down(found.found, len(kept))
    return Suspicion(removed, factors, suspects, poisoning)


def _check_stop(traces: Poisoning, spec: CurateSpec) -> None:
    if spec.poisoning is PoisonPolicy.STOP and traces.reasons:
        said = [trigger.describe() for trigger in traces.triggers]
        said += [f"source {finding.source!r}: {finding.what}" for finding in traces.sources if len(finding.positions)]
        raise DataError(
            f"{len(traces.reasons):,} rows look planted, and `curate.poisoning` is stop: {'; '.join(said[:_SAID])}.",
            where="data.source",
            fix="find out where these rows come from; `curate.poisoning: quarantine` leaves them out instead",
        )


def _traces(traces: Poisoning, spec: CurateSpec, table: RowTable, kept: NDArray[np.int64]) -> dict[str, Any]:
    return {
        "policy": spec.poisoning.value,
        "phrases": traces.phrases,
        "rows": len(traces.reasons),
        "note": traces.refusal,
        "triggers": [
            {
                "phrase": one.phrase,
                "label": one.label,
                "rows": one.rows,
                "of_label": one.of_label,
                "expected": round(one.expected, 1),
                "p_value": float(f"{one.p_value:.1e}"),
                "ids": [table.ids[int(kept[at])] for at in one.positions[:_SAID].tolist()],
            }
            for one in traces.triggers
        ],
        "sources": [
            {"source": one.source, "kind": one.kind, "rows": one.rows, "what": one.what} for one in traces.sources
        ],
    }


def _left(found: Suspects, policy: SuspectPolicy, table: RowTable, kept: NDArray[np.int64]) -> list[Removed]:
    names = table.stratum_names
    after = ", for a person to look at" if policy is SuspectPolicy.REVIEW else ""
    return [
        Removed(
            int(kept[one.position]),
            SUSPECT,
            f"labelled {names[one.given]!r} ({one.p_given:.2f}), and its text says {names[one.suggested]!r} "
            f"({one.p_suggested:.2f}){after}",
        )
        for one in found.found
    ]


def _described(
    found: Suspects, spec: CurateSpec, table: RowTable, reader: RowReader, kept: NDArray[np.int64]
) -> dict[str, Any]:
    names = table.stratum_names
    shown = []
    veil = Veil()  # a report goes to more people than the data
    for one in found.found[:_SHOWN]:
        row = reader.row(int(kept[one.position]))
        shown.append(
            {
                "id": row.id,
                "line": row.line,
                "given": names[one.given],
                "suggested": names[one.suggested],
                "p_given": round(one.p_given, 3),
                "p_suggested": round(one.p_suggested, 3),
                "text": veil.cover(row.text),
            }
        )
    return {
        "policy": spec.suspects.value,
        "checked": found.judged,
        "count": len(found.found),
        "note": found.refusal,
        "unjudged": found.unjudged,
        "top": shown,
    }
