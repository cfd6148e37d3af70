"""Candidates and verdicts, as the stages before would hand them on to the registry."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.contracts.prompt import Prompt, Shot
from tasks.contracts.references import (
    MetricComparison,
    Outcome,
    SystemUnderTest,
    TrainedModelRef,
    Verdict,
    VerdictRef,
)
from tasks.contracts.spec import DataSpec, EvaluateSpec, ExecutionSpec, GoldenSpec, Policy, RetrainSpec, TaskSpec
from tasks.store import Store, digest_folder

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
            p_value=0.001, wins=30, losses=8, ties=62, n=100, items_to_settle=None, looks=1,
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
