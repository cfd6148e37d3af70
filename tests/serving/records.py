"""Records that the tests of serving share."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from tasks.contracts.prompt import Decoding, Prompt
from tasks.contracts.serving import Intent, Phase, VersionRef


def version(number: int, name: str = "complaints", digest: str | None = None) -> VersionRef:
    """A registered version; another digest makes another engine."""
    return VersionRef(
        name=name, version=str(number), digest=digest or f"{number:x}" * 64, uri=f"models:/{name}/{number}",
        prompt=Prompt(system="Which product is it about?"),
        decoding=Decoding(max_new_tokens=8, choices=("card", "loan")),
    )  # fmt: skip


def rollout(to: VersionRef, phase: Phase = Phase.CHECKING, **changes: Any) -> Intent:
    """An intent of a rollout."""
    fields: dict[str, Any] = {
        "id": f"rollout-of-{to.version}", "name": to.name, "kind": "rollout", "to": to, "phase": phase, "by": "retrain",
        "why": "promoted", "at": datetime(2026, 1, 1, tzinfo=UTC), "holder": "flow-a",
    }  # fmt: skip
    return Intent(**{**fields, **changes})
