"""Candidates, verdicts and certificates, as the stages before would hand them on to the registry."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from securesystemslib.signer import CryptoSigner

from tasks.contracts.confidence import TrustRef
from tasks.contracts.prompt import Prompt, Shot
from tasks.contracts.references import (
    CertificateRef,
    Look,
    MetricComparison,
    Outcome,
    RegisteredModelRef,
    Release,
    ReleaseKind,
    SystemUnderTest,
    TrainedModelRef,
    Verdict,
    VerdictRef,
)
from tasks.contracts.spec import DataSpec, EvaluateSpec, ExecutionSpec, GoldenSpec, Policy, RetrainSpec, TaskSpec
from tasks.gate.keys import SigningKey
from tasks.gate.statement import Hints, Promotion, Statement, Subject, sign
from tasks.registry.register import register
from tasks.store import Store, digest_file, digest_folder

BY_VERDICT = Release(kind=ReleaseKind.BY_VERDICT)
FORCED = Release(
    kind=ReleaseKind.FORCED,
    by="Ada",
    reason="the old one is wrong on refunds",
    at=datetime(2026, 11, 22, 14, 57, tzinfo=UTC),
)
LABELS = ("card", "card_fraud", "loan")
PROMPT = Prompt(system="Which product?", shots=(Shot(user="my loan", assistant="loan"),))


@dataclass(frozen=True)
class Workshop:
    """Makes what `register` takes, below one store root."""

    execution: ExecutionSpec
    model: Path

    def spec(self, name: str, **task: Any) -> RetrainSpec:
        """The spec of a task; labels unless said otherwise."""
        given = {"kind": "classify", "instruction": "Which product?", "labels": LABELS} | task
        return RetrainSpec(
            name=name,
            task=TaskSpec(**given),
            data=DataSpec(source="unused.jsonl"),
            golden=GoldenSpec(path="unused"),
            base_model="unused",
            evaluate=EvaluateSpec(max_new_tokens=8),
            execution=self.execution,
        )

    def trained(self, marker: str) -> TrainedModelRef:
        """A candidate: the model, with a note that makes its digest its own."""

        def make(folder: Path) -> Mapping[str, Any]:
            shutil.copytree(self.model, folder / "merged")
            (folder / "merged" / "note.txt").write_text(marker)
            (folder / "adapter").mkdir()
            (folder / "adapter" / "adapter_model.safetensors").write_bytes(marker.encode())
            return {}

        store = Store(self.execution.store)
        made = store.produce("train", 1, {"marker": marker}, {}, make)
        folder = store.files(made)
        return TrainedModelRef(
            **made.reference(),
            adapter_digest=digest_folder(folder / "adapter"),
            merged_digest=digest_folder(folder / "merged"),
            steps=1,
            dev_loss=0.5,
            seconds=1.0,
            tokens_per_second=1.0,
            peak_memory_bytes=1,
        )

    def verdict(
        self,
        candidate: TrainedModelRef,
        baseline: TrainedModelRef | None = None,
        outcome: Outcome = Outcome.PROMOTE,
        opponent: SystemUnderTest | None = None,
    ) -> VerdictRef:
        """A verdict on a candidate, against another candidate or a base model."""
        against = baseline.merged_digest if baseline else "b" * 64
        decided = Verdict(
            outcome=outcome,
            reasons=("The candidate has 61 of 100 items right, the baseline 39.",),
            policy=Policy(),
            metrics=(
                MetricComparison(
                    metric="exact_match", baseline=0.39, candidate=0.61, difference=0.22,
                    low=0.1, high=0.34, baseline_low=0.3, baseline_high=0.48,
                    candidate_low=0.52, candidate_high=0.7, confidence=0.95, method="made up", n=100,
                ),
            ),
            requirements=(), p_value=0.001, wins=30, losses=8, ties=62, n=100, groups=100, smallest_effect=0.1,
            items_to_settle=None, self_test=None, withheld=False,
            look=Look(page="c" * 64, number=1, level=0.02, spent=0.02, budget=0.05),
            candidate=SystemUnderTest(
                uri=f"{candidate.uri}#merged", digest=candidate.merged_digest, prompt=PROMPT, role="candidate",
                label="candidate",
            ),
            baseline=opponent
            or SystemUnderTest(uri="x", digest=against, prompt=PROMPT, role="base_model", label="base model"),
            digests={"candidate": candidate.merged_digest, "baseline": against, "golden_set": "c" * 64},
        )  # fmt: skip

        def make(folder: Path) -> Mapping[str, Any]:
            (folder / "verdict.json").write_text(decided.model_dump_json())
            return {}

        inputs = {"candidate": candidate.merged_digest, "baseline": against, "opponent": decided.baseline.uri}
        made = Store(self.execution.store).produce("gate", 1, {"outcome": outcome.value}, inputs, make)
        return VerdictRef(**made.reference(), verdict=decided)

    def certificate(
        self,
        verdict: VerdictRef,
        trained: TrainedModelRef,
        release: Release = BY_VERDICT,
        model: str | None = None,
        trust: TrustRef | None = None,
        **said: str,
    ) -> CertificateRef:
        """A certificate as the gate would sign it, but that the made-up verdict is not computed again.

        `model` is the digest that it names, where that is not the candidate's; `said` is what it says of the data, and
        `trust` how far the answers are trusted.
        """
        store, decided = Store(self.execution.store), verdict.verdict

        def make(folder: Path) -> Mapping[str, Any]:
            evidence = folder / "evidence" / "verdict.json"
            evidence.parent.mkdir()
            shutil.copyfile(store.files(store.open(verdict.uri)) / "verdict.json", evidence)
            statement = Statement(
                subject=(Subject(name="model", digest={"sha256": model or trained.merged_digest}),),
                predicate=Promotion(
                    task="t", digests=decided.digests | learnt, files={}, code={}, policy=decided.policy,
                    requirements=decided.requirements, look=decided.look, self_test=None, outcome=decided.outcome,
                    reasons=decided.reasons, release=release, evidence={"verdict.json": digest_file(evidence)}, **said,
                ),
            )  # fmt: skip
            (folder / "certificate.json").write_text(sign(statement, _key(), Hints()))
            return {}

        learnt = {"trust": digest_file(store.files(store.open(trust.uri)) / "trust.json")} if trust is not None else {}
        config = {"release": release.model_dump(mode="json"), "model": model} | said | learnt
        made = store.produce("certificate", 1, config, {"verdict": verdict.digest}, make)
        return CertificateRef(**made.reference(), key_id=_key().key_id, release=release)

    def register(
        self,
        verdict: VerdictRef,
        trained: TrainedModelRef,
        spec: RetrainSpec,
        release: Release = BY_VERDICT,
    ) -> RegisteredModelRef:
        """Register with a certificate that says what is handed over."""
        return register(verdict, self.certificate(verdict, trained, release), trained, spec)


@cache
def _key() -> SigningKey:
    signer = CryptoSigner.generate_ed25519()
    return SigningKey(signer, signer.public_key.keyid)


_CHANGES = (
    "create_experiment",
    "create_run",
    "update_run",
    "log_batch",
    "create_logged_model",
    "log_model_artifacts",
    "finalize_logged_model",
    "create_registered_model",
    "create_model_version",
    "set_registered_model_alias",
    "delete_registered_model_alias",
    "set_model_version_tag",
    "delete_model_version_tag",
    "set_terminated",
)


class Killed(BaseException):
    """Stands for SIGKILL: after it, nothing more is written."""


class Killer:
    """Lets a number of changes to MLflow through, then none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, let_through: int) -> None:
        from mlflow import MlflowClient

        self.left = let_through
        self.calls: list[str] = []
        for change in _CHANGES:
            monkeypatch.setattr(MlflowClient, change, self._wrapped(change, getattr(MlflowClient, change)))

    def _wrapped(self, change: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.left == 0:
                raise Killed(change)
            self.left -= 1
            self.calls.append(change)
            return original(*args, **kwargs)

        return call
