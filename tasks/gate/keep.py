"""A verdict as an artefact: kept with its evidence, so that anyone who doubts it can recompute it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.contracts.errors import NotComparableError, StoreError
from tasks.contracts.references import EvaluationRef, EvaluationSummary, GoldenSetRef, SplitsRef, Verdict, VerdictRef
from tasks.contracts.spec import Policy
from tasks.gate.decide import Side, give_verdict
from tasks.gate.files import read_evaluation
from tasks.store import Store, digest_file

STEP = "verdict"
VERSION = 1
VERDICT_FILE = "verdict.json"
ITEMS_FILE = "items.jsonl"
SUMMARY_FILE = "summary.json"


def keep_verdict(
    store: Store,
    baseline: EvaluationRef,
    candidate: EvaluationRef,
    splits: SplitsRef,
    golden: GoldenSetRef,
    policy: Policy,
) -> VerdictRef:
    """Give the verdict on two evaluations and keep it: `verdict.json`, and `baseline/` and `candidate/` as evaluated.

    The same evaluations under the same policy have one verdict: asked again, the kept one is handed out, with the
    number of looks that it was given at. A look is a fact of its moment, so it is no part of the recipe.

    Raises:
        NotComparableError: the evaluations cannot be compared with each other, or are not those of this golden set.
        StoreError: an evaluation was changed since it was made, or the store cannot be written.
    """
    for name, evaluation in (("baseline", baseline), ("candidate", candidate)):
        if evaluation.conditions.golden_digest != golden.digest:
            raise NotComparableError(
                f"The {name} was evaluated on another golden set than the one of this run.",
                where=f"{name}: {evaluation.conditions.golden_digest}, run: {golden.digest}",
                fix="evaluate it on this golden set",
            )

    def make(folder: Path) -> Mapping[str, Any]:
        for name, evaluation in (("baseline", baseline), ("candidate", candidate)):
            source = store.files(store.open(evaluation.uri))
            (folder / name).mkdir()
            shutil.copyfile(source / ITEMS_FILE, folder / name / ITEMS_FILE)
            # An evaluation is reused when the same model comes back in another role (a candidate that became champion).
            summary = EvaluationSummary.model_validate_json((source / SUMMARY_FILE).read_text(encoding="utf-8"))
            as_asked = summary.model_copy(update={"system": evaluation.system})
            (folder / name / SUMMARY_FILE).write_text(as_asked.model_dump_json(indent=2), encoding="utf-8")
        verdict = _recompute(
            folder,
            policy,
            looks=count_looks(store, golden.digest, candidate.system.digest),
            digests={
                "data": splits.digest,
                "golden_set": golden.digest,
                "candidate": candidate.system.digest,
                "baseline": baseline.system.digest,
            },
        )
        (folder / VERDICT_FILE).write_text(verdict.model_dump_json(indent=2) + "\n", encoding="utf-8")
        return {"outcome": verdict.outcome.value, "looks": verdict.looks}

    artefact = store.produce(
        STEP,
        VERSION,
        policy,
        {
            "data": splits.digest,
            "golden_set": golden.digest,
            "candidate": candidate.system.digest,
            "baseline": baseline.system.digest,
            "candidate_evaluation": candidate.digest,
            "baseline_evaluation": baseline.digest,
        },
        make,
    )
    text = (store.files(artefact) / VERDICT_FILE).read_text(encoding="utf-8")
    return VerdictRef(**artefact.reference(), verdict=Verdict.model_validate_json(text))


def count_looks(store: Store, golden_digest: str, candidate_digest: str) -> int:
    """How many different candidates this golden set has judged in this store, `candidate_digest` included."""
    judged = {
        artefact.manifest.inputs["candidate"]
        for artefact in store.list(STEP)
        if artefact.manifest.inputs["golden_set"] == golden_digest
    }
    return len(judged | {candidate_digest})


def verify_verdict(folder: Path) -> Verdict:
    """Recompute a kept verdict from the outcomes beside it; `folder` holds `verdict.json`, `baseline/`, `candidate/`.

    Raises:
        StoreError: what the outcomes give is not what the verdict says; names the fields that differ.
    """
    path = folder / VERDICT_FILE
    kept = Verdict.model_validate_json(path.read_text(encoding="utf-8"))
    again = _recompute(folder, kept.policy, looks=kept.looks, digests=kept.digests)
    differing = [name for name in Verdict.model_fields if getattr(kept, name) != getattr(again, name)]
    if differing:
        raise StoreError(
            f"The verdict is not what its outcomes give: {', '.join(differing)} differ.",
            where=str(path),
            fix="trust neither; delete the verdict and judge again",
        )
    return kept


def _recompute(folder: Path, policy: Policy, *, looks: int, digests: Mapping[str, str]) -> Verdict:
    """The verdict on the outcomes in a folder; the digests of the two outcome files are taken from the files."""
    sides = {
        name: Side(evaluation.system, evaluation.conditions, evaluation.outcomes)
        for name in ("baseline", "candidate")
        for evaluation in (read_evaluation(folder / name, policy.metric),)
    }
    outcome_digests = {f"{name}_outcomes": digest_file(folder / name / ITEMS_FILE) for name in sides}
    return give_verdict(
        sides["baseline"], sides["candidate"], policy, looks=looks, digests={**digests, **outcome_digests}
    )
