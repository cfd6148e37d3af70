"""A trained model, a frozen golden set, a real verdict on both, and its certificate."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from tasks.contracts.references import (
    CertificateRef,
    GoldenSetRef,
    Outcome,
    Release,
    ReleaseKind,
    SplitsRef,
    TrainedModelRef,
    VerdictRef,
)
from tasks.contracts.spec import ExecutionSpec, LookPolicy, Policy
from tasks.gate.certificate import certify
from tasks.gate.keep import Evaluated, Trained, keep_verdict
from tasks.gate.keys import open_signing_key
from tasks.gate.ledger import Ledger
from tasks.store import Store, digest_file
from tests.gate.made_up import CONDITIONS, evaluation, sides
from tests.gate.world import CLEAN, make_splits, make_trained

BY_VERDICT = Release(kind=ReleaseKind.BY_VERDICT)
BETTER, WORSE = sides(30, 10, 100, 60), sides(10, 30, 100, 60)


class Certified(NamedTuple):
    """Everything that a certificate is about."""

    store: Store
    trained: TrainedModelRef
    golden: GoldenSetRef
    verdict: VerdictRef
    release: Release
    certificate: CertificateRef

    @property
    def folder(self) -> Path:
        """Where `certificate.json` and `evidence/` are."""
        return self.store.files(self.store.open(self.certificate.uri))

    def copy(self, to: Path) -> Path:
        """A copy of certificate and evidence, to be altered."""
        return shutil.copytree(self.folder, to)


def make_golden(folder: Path) -> GoldenSetRef:
    """A golden set's items, as far as a certificate is concerned."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"id": f"i{number:04d}", "text": f"animal {number}"}) for number in range(200)]
    (folder / "items.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return GoldenSetRef(path=str(folder), digest=digest_file(folder / "items.jsonl"), items=len(lines))


def splits_for(store: Store, golden: GoldenSetRef) -> SplitsRef:
    """Splits that were found to hold nothing of a golden set."""
    return make_splits(store, CLEAN.model_copy(update={"golden_digest": golden.digest}))


def make_verdict(
    store: Store, trained: TrainedModelRef, golden: GoldenSetRef, outcome: Outcome = Outcome.PROMOTE, **policy: Any
) -> VerdictRef:
    """A verdict that the gate gave on made-up outcomes."""
    conditions = CONDITIONS.model_copy(update={"golden_digest": golden.digest})
    before, after = BETTER if outcome is Outcome.PROMOTE else WORSE
    with Ledger.open(str(Path(golden.path).parent / "ledger.db")) as ledger:
        kept = keep_verdict(
            store,
            Evaluated(
                evaluation(store, "base_model", "b" * 64, before, conditions),
                evaluation(store, "candidate", trained.merged_digest, after, conditions),
            ),
            {},
            Trained(splits_for(store, golden), trained),
            golden,
            Policy(**({"looks": LookPolicy.OFF} | policy)),
            ledger,
            name="animals",
            asked_by="a test",
        )
    assert kept.verdict.outcome is outcome
    return kept


def make_certified(
    root: Path,
    *,
    outcome: Outcome = Outcome.PROMOTE,
    release: Release = BY_VERDICT,
    model: Path | None = None,
    **policy: Any,
) -> Certified:
    """All of it, below one folder."""
    store = Store(ExecutionSpec(store=str(root / "store")).store)
    golden = make_golden(root / "golden")
    trained = make_trained(store, splits_for(store, golden), model)
    verdict = make_verdict(store, trained, golden, outcome, **policy)
    certificate = certify(store, verdict, trained, release, "animals", golden, open_signing_key(store))
    return Certified(store, trained, golden, verdict, release, certificate)
