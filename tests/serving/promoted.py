"""Versions that a gate has promoted: trained, judged, certified and registered, each for real but for its model's size.

Every version of a name has the model of the same two layers, told apart by a note in its configuration, and the same
made-up outcomes: 130 of 200 items right, the champion's 110.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

from tasks.contracts.confidence import LearntTrust
from tasks.contracts.references import GoldenSetRef, RegisteredModelRef, Release, ReleaseKind, TrainedModelRef
from tasks.contracts.rows import Message, Row, write_rows
from tasks.contracts.serving import RolloutSpec
from tasks.contracts.spec import (
    DataSpec,
    EvaluateSpec,
    ExecutionSpec,
    GoldenSpec,
    LookPolicy,
    Override,
    Policy,
    RetrainSpec,
    RolloutSettings,
    TaskSpec,
)
from tasks.gate.certificate import certify
from tasks.gate.keep import Evaluated, Trained, keep_verdict
from tasks.gate.keys import SigningKey, open_signing_key
from tasks.gate.ledger import Ledger, ledger_url
from tasks.registry.register import register
from tasks.registry.serving_aliases import read_aliases
from tasks.store import Store, digest_file
from tasks.tracking import MERGED_DIGEST, connect
from tests.gate.certified import BETTER, splits_for
from tests.gate.made_up import CONDITIONS, LABELS, evaluation
from tests.gate.world import make_trained
from tests.trusts import keep_trust

ANSWERS = {one.text: one.prediction for one in BETTER[1]}  # what a promoted version answers, by text
OTHERWISE = {text: LABELS[1 - LABELS.index(answer)] for text, answer in ANSWERS.items()}


@dataclass(frozen=True)
class Shop:
    """Promotes versions, below one folder.

    Attributes:
        root: of store, golden set and models.
        model: a tiny model.
    """

    root: Path
    model: Path

    @property
    def execution(self) -> ExecutionSpec:
        return ExecutionSpec(store=str(self.root / "store"), ledger=str(self.root / "ledger.db"))

    @property
    def golden(self) -> GoldenSetRef:
        path = self.root / "golden" / "items.jsonl"
        if not path.exists():
            path.parent.mkdir(parents=True)
            rows = [
                Row(id=one.id, line=number, messages=(Message("user", one.text),), target=one.target)
                for number, one in enumerate(BETTER[1])
            ]
            write_rows(path, rows)
            path.with_name("golden.json").write_text(json.dumps({"digest": digest_file(path)}))
        return GoldenSetRef(path=str(path.parent), digest=digest_file(path), items=len(BETTER[1]))

    def spec(self, name: str) -> RetrainSpec:
        return RetrainSpec(
            name=name,
            task=TaskSpec(kind="classify", instruction="Which animal?", labels=LABELS),
            data=DataSpec(source="unused.jsonl"),
            golden=GoldenSpec(path=self.golden.path),
            base_model="unused",
            evaluate=EvaluateSpec(max_new_tokens=8),
            execution=self.execution,
        )

    def rollout(self, name: str, **changes: Any) -> RolloutSpec:
        """A rollout that asks few items."""
        version = changes.pop("version", None)
        settings = RolloutSettings(**({"smoke_items": 6, "drain_seconds": 0.5} | changes))
        return RolloutSpec.of(self.spec(name).model_copy(update={"rollout": settings}), version)

    def promote(
        self,
        name: str,
        note: str,
        *,
        waits: bool = True,
        key: SigningKey | None = None,
        learnt: LearntTrust | None = None,
    ) -> RegisteredModelRef:
        """A version that beats today's champion, if there is one; it waits for its rollout."""
        store, trained = Store(self.execution.store), self._trained(note)
        champion = read_aliases(name, self.execution).champion
        beaten = "b" * 64
        if champion is not None:
            beaten = connect(self.execution).get_model_version(name, champion).tags[MERGED_DIGEST]
        conditions = CONDITIONS.model_copy(update={"golden_digest": self.golden.digest})
        with Ledger.open(ledger_url(self.execution)) as ledger:
            verdict = keep_verdict(
                store,
                Evaluated(
                    evaluation(store, "champion" if champion else "base_model", beaten, BETTER[0], conditions),
                    evaluation(store, "candidate", trained.merged_digest, BETTER[1], conditions),
                ),
                {},
                Trained(splits_for(store, self.golden), trained),
                self.golden,
                Policy(looks=LookPolicy.OFF),
                ledger,
                name=name,
                asked_by="a test",
            )
        release = Release(kind=ReleaseKind.BY_VERDICT)
        key, trust = key or open_signing_key(store), keep_trust(store, learnt) if learnt is not None else None
        certificate = certify(store, verdict, trained, release, name, self.golden, key, trust=trust)
        return register(verdict, certificate, trained, self.spec(name), waits=waits, trust=trust)

    def set_baseline(self, name: str, note: str) -> RegisteredModelRef:
        """A champion on a person's word."""
        from goldgate.overrides import set_baseline

        override = Override(by="Ada", reason="it has run for years")
        spec = self.spec(name)
        manifest = {"name": name, "task": spec.task.model_dump(mode="json"), "digest": self.golden.digest}
        manifest |= {"items": self.golden.items}
        Path(self.golden.path, "golden.json").write_text(json.dumps(manifest))
        return set_baseline(spec, str(self._model(note)), override).registered

    def aliases(self, name: str) -> dict[str, str]:
        return {alias: version for alias, version in read_aliases(name, self.execution).model_dump().items() if version}

    def tags(self, name: str, version: str) -> dict[str, str]:
        return dict(connect(self.execution).get_model_version(name, version).tags)

    def _trained(self, note: str) -> TrainedModelRef:
        store = Store(self.execution.store)
        return make_trained(store, splits_for(store, self.golden), self._model(note), seed=crc32(note.encode()))

    def _model(self, note: str) -> Path:
        folder = self.root / "models" / note
        if not folder.exists():
            shutil.copytree(self.model, folder)
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"note": note}))
        return folder
