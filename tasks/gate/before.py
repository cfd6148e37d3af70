"""What can be refused before any compute is spent."""

from __future__ import annotations

import json
from pathlib import Path

from tasks.contracts.errors import SpecError
from tasks.contracts.numbers import level
from tasks.contracts.references import BaseModelRef, GoldenSetRef, SplitsRef
from tasks.contracts.rows import read_rows
from tasks.contracts.spec import EVERY_SLICE, RetrainSpec
from tasks.gate.keys import open_signing_key
from tasks.gate.ledger import Ledger, ledger_url
from tasks.gate.looks import look_level
from tasks.store import Manifest, Store, canonical

_ITEMS = "items.jsonl"


def check_before(store: Store, golden: GoldenSetRef, spec: RetrainSpec) -> str:
    """Check ledger, budget, signing key and guarded slices; say what the next look may spend.

    A spent budget stops no candidate that has had its look: its verdict stands, and a person may still be asked about
    it. Which candidate a run makes is known once its data is curated, so `check_budget` looks again then.

    Raises:
        LedgerError: the ledger cannot be written, was opened with another budget, or the budget is spent.
        CertificateError: there is no signing key, and none can be made.
        SpecError: a guard is about a slice that no golden item is in.
    """
    _check_slices(golden, spec)
    open_signing_key(store)
    with Ledger.open(ledger_url(spec.execution)) as ledger:
        page = next((page for page in ledger.pages() if page.page == golden.digest), None)
        if page is not None and page.why_spent is not None and _trained_and_judged(store, golden, ledger):
            return f"the error budget is spent ({page.why_spent}), and no new candidate is judged"
        ledger.check(golden.digest, spec.policy)
    number, promotions = (page.taken + 1, page.promotions) if page is not None else (1, 0)
    spends = level(look_level(spec.policy, number, promotions))
    how = spec.policy.looks.value.replace("_", " ")
    return f"a new candidate is look {number} at this golden set, at {spends} ({how})"


def check_budget(store: Store, golden: GoldenSetRef, splits: SplitsRef, base: BaseModelRef, spec: RetrainSpec) -> None:
    """Refuse, before it is trained, a candidate that could get no verdict; one that has had its look is not refused.

    Raises:
        LedgerError: the ledger cannot be written, was opened with another budget, or the budget is spent.
    """
    asked = {"task": spec.task, "recipe": spec.train}
    if spec.preference is not None:
        asked["preference"] = spec.preference
    recipe = json.loads(canonical(asked))
    made_of = {"base": base.digest, "splits": splits.digest}
    with Ledger.open(ledger_url(spec.execution)) as ledger:
        known = _trained_and_judged(store, golden, ledger)
        if not any(one.config == recipe and made_of.items() <= one.inputs.items() for one in known):
            ledger.check(golden.digest, spec.policy)


def _trained_and_judged(store: Store, golden: GoldenSetRef, ledger: Ledger) -> list[Manifest]:
    """The trainings that are in the store and whose candidate has had a look at the golden set."""
    judged = {look.candidate for look in ledger.looks(golden.digest)}
    return [
        one.manifest
        for step in ("train", "prefer")
        for one in store.list(step)
        if one.manifest.facts.get("merged_digest") in judged
    ]


def _check_slices(golden: GoldenSetRef, spec: RetrainSpec) -> None:
    wanted = {
        guard.slice: number
        for number, guard in enumerate(spec.policy.guards)
        if guard.slice is not None and guard.suite is None
    }
    if not wanted:
        return
    names = {row.slice for row in read_rows(Path(golden.path) / _ITEMS) if row.slice is not None}
    for name, number in wanted.items():
        if (name == EVERY_SLICE and not names) or (name != EVERY_SLICE and name not in names):
            raise SpecError(
                f"The policy guards the slice {name!r}, and no golden item is in it.",
                where=f"policy.guards.{number}.slice",
                fix=f"name one of {', '.join(sorted(names))}"
                if names
                else "freeze a golden set with `data.slice_field`",
            )
