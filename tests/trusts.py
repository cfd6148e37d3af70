"""What would be learnt of a model's confidence, made up."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.contracts.confidence import LearntTrust, ReviewThreshold, TrustRef
from tasks.store import Store

THRESHOLD = ReviewThreshold(
    target_accuracy=0.95, alpha=0.05, rows=300, at=0.9, coverage=0.8, coverage_low=0.75, coverage_high=0.84,
    accuracy=0.97, accuracy_low=0.951, curve=(), why="240 of 300 are above it.",
)  # fmt: skip


def learnt_trust(choices: tuple[str, ...], at: float | None = 0.9) -> LearntTrust:
    return LearntTrust(
        calibration=None, threshold=THRESHOLD.model_copy(update={"at": at}), rows=300, no_choice=0, choices=choices,
        dev="d" * 64, engine="embedded", why=("Not calibrated.", "240 of 300 are above it."),
    )  # fmt: skip


def keep_trust(store: Store, trust: LearntTrust) -> TrustRef:
    def make(folder: Path) -> Mapping[str, Any]:
        (folder / "trust.json").write_text(trust.model_dump_json())
        return {"calibrated": False, "at": trust.threshold.at, "reviewed": 1 - trust.threshold.coverage}

    made = store.produce("trust", 1, {"at": trust.threshold.at}, {}, make)
    return TrustRef(**made.reference(), **made.manifest.facts)
