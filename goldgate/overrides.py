"""What a person may decide without a verdict, or against one: a baseline without a comparison, a forced promotion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fsspec

from goldgate.config import parse
from tasks.contracts.errors import RegistryError, SpecError
from tasks.contracts.prompt import Prompt
from tasks.contracts.references import Approval, Outcome, RunResult
from tasks.contracts.spec import EvaluationSpec, Frozen, Override, PromptKind, RetrainSpec
from tasks.registry.baseline import SetBaseline
from tasks.store import Store


class FinishedRun(Frozen):
    """What a run folder says of its run: how it was asked for, and which candidate it made.

    Attributes:
        spec: the whole specification of the run.
        candidate: sha256 of the candidate.
        label: how people call the candidate.
        verdict: what the gate said.
        raw_data: sha256 of the rows that the run read.
    """

    spec: RetrainSpec
    candidate: str
    label: str
    verdict: str
    raw_data: str


def override_of(by: str, reason: str) -> Override:
    """A person's word, from the command line.

    Raises:
        SpecError: the name is empty, or the reason too short to be one.
    """
    return parse(Override, {"by": by, "reason": reason}, where="goldgate override")


# -- a baseline -----------------------------------------------------------------------------------------------------


def set_baseline(spec: RetrainSpec, model: str, override: Override, prompt: PromptKind | None = None) -> SetBaseline:
    """Make a model champion without a verdict: the first baseline, or a new one in place of today's. Recorded once.

    Args:
        spec: the task, and where registry, store and ledger are.
        model: a folder, `hf:<repo>`, `gguf:<file>`, `<artefact>#<subfolder>`, or `models:/…`.
        override: whose word this is, and why.
        prompt: how it is asked; None asks a registered model as it is registered, a base model (hf:, gguf:) with the
            answers spelled out, and any other with the bare instruction.

    Raises:
        GoldenSetError: there is no golden set whose page of the ledger this could be written on.
        LedgerError: the ledger cannot be read or written; the registry is untouched if that shows before.
        ModelError: no model is there, or its weights are no safetensors.
        RegistryError: it is champion already, or MLflow refuses.
    """
    from tasks.data.golden import open_golden
    from tasks.evaluation.systems import any_system
    from tasks.gate.ledger import DecisionKind, Ledger, ledger_url
    from tasks.registry.baseline import set_baseline as set_in_registry

    asked = spec.evaluation()
    page = open_golden(asked).digest
    with Ledger.open(ledger_url(spec.execution)) as ledger:  # first: what cannot be recorded is not done
        known = ledger.decisions(spec.name)
        kind = prompt or (PromptKind.BASE if model.startswith(("hf:", "gguf:")) else PromptKind.TUNED)
        system = any_system(_uri_of(model, spec), spec.task, spec.evaluate, spec.execution, kind)
        if prompt is None and model.startswith("models:/"):
            system = system.model_copy(update={"prompt": _registered_prompt(model, asked)})
        result = set_in_registry(asked, system, override)
        decision: dict[str, Any] = {
            "kind": DecisionKind(result.release.kind.value),
            "name": spec.name,
            "page": page,
            "model": result.registered.digest,
            "outcome": None,
            "by": override.by,
            "reason": override.reason,
        }
        # A call that goes on after a killed one, or is given twice, is one decision.
        since = [one for one in known if result.release.at is None or one.at >= result.release.at]
        if not any(decision.items() <= dict(one).items() for one in since):
            ledger.record_decision(**decision)
    return result


def _uri_of(model: str, spec: RetrainSpec) -> str:
    """Where the model's files are; a base model and a folder are first copied into the store, without code."""
    from tasks.training.steps import fetch_base_model

    folder = Path(model).expanduser()
    if not model.startswith(("hf:", "gguf:")) and not folder.is_dir():
        return model
    source = str(folder.absolute()) if folder.is_dir() else model
    base = fetch_base_model.fn(spec.model_copy(update={"base_model": source}))
    return f"{base.uri}#model"


def _registered_prompt(model: str, asked: EvaluationSpec) -> Prompt:
    from tasks.registry.versions import ServedTask
    from tasks.tracking import registered_files

    path = registered_files(model, asked.execution).artifacts["task"]
    try:
        served = ServedTask.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RegistryError(
            f"The registered model does not say how it is asked: {error}",
            where=str(path),
            fix="say it yourself: --prompt base or --prompt tuned",
        ) from error
    return served.prompt


# -- a promotion ----------------------------------------------------------------------------------------------------


def open_run_folder(folder: str) -> FinishedRun:
    """What a finished run's `verdict.json` says, if its candidate may still be promoted by force.

    Raises:
        SpecError: there is no run folder, or it does not hold the run's specification.
        RegistryError: the run has registered its candidate already.
    """
    path = f"{folder.rstrip('/')}/verdict.json"
    fix = "give the folder that `goldgate run` printed last"
    try:
        with fsspec.open(path, "r", encoding="utf-8") as file:
            record = json.load(file)
        registered = record["registered"]
        found = {
            "spec": record["spec"],
            "candidate": record["candidate"]["digest"],
            "label": record["candidate"]["label"],
            "verdict": record["verdict"],
            "raw_data": record["digests"]["raw_data"],
        }
    except OSError as error:
        raise SpecError(f"The run folder cannot be read: {error.strerror or error}", where=path, fix=fix) from error
    except (ValueError, ImportError) as error:
        raise SpecError(f"The record of the run cannot be read: {error}", where=path, fix=fix) from error
    except (KeyError, TypeError) as error:
        raise SpecError(
            f"The record of the run lacks {error}; a run of an older version does not keep its specification.",
            where=path,
            fix="run again with today's version, then give the new folder",
        ) from error
    if registered is not None:
        raise RegistryError(
            f"This run has registered its candidate already: version {registered.get('version')}.",
            where=path,
            fix=f"nothing; to make it champion again, `goldgate rollback {record['name']} --reason …`",
        )
    return parse(FinishedRun, found, where=path)


def check_same_candidate(run: FinishedRun) -> None:
    """Refuse if a second run would make another candidate than the one that the person means.

    Raises:
        RegistryError: the candidate is no longer in the store, or data or golden set have changed since.
        StoreError: its files were changed.
    """
    from tasks.data.golden import open_golden
    from tasks.data.ingest import digest_source

    store = Store(run.spec.execution.store)
    fix = "run again (`goldgate run`), look at the new verdict, and decide on that"
    trained = next(
        (
            one
            for step in ("train", "prefer")
            for one in store.list(step)
            if one.manifest.facts.get("merged_digest") == run.candidate
        ),
        None,
    )
    if trained is None:
        raise RegistryError(
            f"The candidate {run.candidate[:8]} is no longer in the store; another would be trained in its place.",
            where=f"{store.root}/train",
            fix=fix,
        )
    store.files(trained)  # checks every byte
    raw = next((one for one in store.list("ingest") if one.manifest.digest == run.raw_data), None)
    if raw is None or raw.manifest.inputs.get("source") != digest_source(run.spec.data):
        raise RegistryError(
            "The data is not what it was in this run, so another candidate would be trained.",
            where=run.spec.data.source,
            fix=fix,
        )
    open_golden(run.spec.evaluation())


def check_asks(run: FinishedRun) -> None:
    """Refuse an answer to a run that asks nobody.

    Raises:
        SpecError: its verdict promotes nothing, or its policy needs no approval.
    """
    if run.verdict != Outcome.PROMOTE.value:
        raise SpecError(
            f"There is nothing to approve: the verdict on {run.label} is {run.verdict.upper()}.",
            where="verdict.json: verdict",
            fix="train a better candidate; a promotion against the verdict is `goldgate override promote`",
        )
    if run.spec.policy.approval_hours is None:
        raise SpecError(
            "There is nothing to approve: this run's policy asks nobody.",
            where="verdict.json: spec.policy.approval_hours",
            fix="run again (`goldgate run`); the verdict alone promotes",
        )


def force_promotion(run: FinishedRun, override: Override) -> RunResult:
    """Promote the candidate of a finished run against its verdict: the same flow again, with a person's word.

    What is finished is reused; certificate, registry, ledger and report all say that it was forced, and by whom.

    Raises:
        GoldgateError: as the flow.
    """
    return _run_again(run, override=override.model_copy(update={"candidate": run.candidate}))


def answer(run: FinishedRun, *, approve: bool, by: str, comment: str) -> RunResult:
    """Answer a run that waits for a person: the same flow again, with that person's answer.

    Raises:
        SpecError: name or comment is empty.
        GoldgateError: as the flow.
    """
    said = {"approve": approve, "by": by, "comment": comment, "candidate": run.candidate}
    return _run_again(run, approval=parse(Approval, said, where="goldgate approve"))


def _run_again(run: FinishedRun, *, override: Override | None = None, approval: Approval | None = None) -> RunResult:
    """The flow refuses, before it registers anything, if it makes another candidate than the one that is meant."""
    from flows.retrain import retrain

    state = retrain(run.spec, override=override, approval=approval, return_state=True)
    result = state.result()
    if not isinstance(result, RunResult):
        raise TypeError(f"the flow handed back a {type(result).__name__}, not a RunResult")
    return result
