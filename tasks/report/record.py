"""What `verdict.json` of a run folder holds: plain JSON for other programs to read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from tasks.contracts.references import (
    MetricComparison,
    RawDatasetRef,
    RegisteredModelRef,
    Release,
    SystemUnderTest,
    VerdictRef,
)
from tasks.contracts.spec import RetrainSpec
from tasks.report.words import Placed
from tasks.tracking import without_password


def verdict_record(
    spec: RetrainSpec,
    created: datetime,
    kept: VerdictRef,
    raw: RawDatasetRef,
    release: Release,
    registered: RegisteredModelRef | None,
    links: Mapping[str, str],
    champion_release: Placed | None = None,
) -> dict[str, Any]:
    """The record of a run.

    `metrics` are those of the whole golden set, by name; `slices` and `suites` hold the same by name of slice or suite.
    `digests` adds to those of the verdict `raw_data` (the rows as read) and `artefact` (the candidate's model);
    `evidence` is where the outcomes of both models are kept. Where numbers are withheld, what would tell something
    about the items is empty or null. Addresses in `spec` are without passwords.
    """
    verdict = kept.verdict
    shown = not verdict.withheld
    metrics = verdict.metrics if shown else ()
    test = verdict.self_test if shown else None
    return {
        "name": spec.name,
        "created": created.isoformat(timespec="seconds"),
        "verdict": verdict.outcome.value,
        "reasons": list(verdict.reasons),
        "release": release.model_dump(mode="json"),
        "champion_release": _placed(champion_release) if champion_release else None,
        "withheld": verdict.withheld,
        "requirements": [one.model_dump(mode="json") for one in verdict.requirements] if shown else [],
        "metrics": _metrics(row for row in metrics if row.slice is None and row.suite is None),
        "slices": {
            name: _metrics(row for row in metrics if row.slice == name)
            for name in dict.fromkeys(row.slice for row in metrics if row.slice is not None)
        },
        "suites": {
            name: _metrics(row for row in metrics if row.suite == name)
            for name in dict.fromkeys(row.suite for row in metrics if row.suite is not None)
        },
        "policy": verdict.policy.model_dump(mode="json"),
        "p_value": verdict.p_value if shown else None,
        "wins": verdict.wins if shown else None,
        "losses": verdict.losses if shown else None,
        "ties": verdict.ties if shown else None,
        "n": verdict.n,
        "groups": verdict.groups,
        "smallest_effect": verdict.smallest_effect if shown else None,
        "items_to_settle": verdict.items_to_settle if shown else None,
        "look": verdict.look.model_dump(mode="json"),
        "looks": verdict.look.number,
        "self_test": test.model_dump(mode="json") if test else None,
        "digests": {**verdict.digests, "raw_data": raw.digest, "artefact": verdict.candidate.digest},
        "candidate": _model(verdict.candidate),
        "baseline": _model(verdict.baseline),
        "registered": registered.model_dump(mode="json") if registered else None,
        "evidence": kept.uri,
        "links": dict(links),
        "spec": _without_passwords(spec.model_dump(mode="json")),
    }


def _metrics(rows: Iterable[MetricComparison]) -> dict[str, Any]:
    return {
        row.metric: {
            "baseline": row.baseline,
            "baseline_interval": [row.baseline_low, row.baseline_high],
            "candidate": row.candidate,
            "candidate_interval": [row.candidate_low, row.candidate_high],
            "difference": row.difference,
            "interval": [row.low, row.high],
            "confidence": row.confidence,
            "method": row.method,
            "n": row.n,
        }
        for row in rows
    }


def _placed(release: Placed) -> dict[str, str | None]:
    at = release.at.isoformat() if release.at else None
    return {"kind": release.kind.value, "by": release.by, "reason": release.reason, "at": at}


def _model(system: SystemUnderTest) -> dict[str, str]:
    return {"label": system.label, "role": system.role, "uri": system.uri, "digest": system.digest}


def _without_passwords(value: Any) -> Any:
    """The same JSON with user and password taken out of every address: servers, databases and stores can hold them."""
    if isinstance(value, dict):
        return {name: _without_passwords(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_passwords(inner) for inner in value]
    if isinstance(value, str) and "://" in value and "@" in value and len(value.split()) == 1:
        try:
            return without_password(value)
        except ValueError:  # not readable as an address, so nobody can say what in it is a password
            return "(left out)"
    return value
