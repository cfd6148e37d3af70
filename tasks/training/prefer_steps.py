"""Prefect tasks of preference tuning: thin, and light to import."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.contracts.dev import DevPart, DevResult, rows_of_part
from tasks.contracts.errors import SpecError, TrainingError
from tasks.contracts.prefer import PairsRef, PreferRequest
from tasks.contracts.references import ItemOutcome, SplitsRef, TrainedModelRef
from tasks.contracts.rows import read_rows, write_rows
from tasks.contracts.spec import PreferenceSpec, RetrainSpec, TrainMethod
from tasks.runtime import open_store, progress_of, say_done
from tasks.store import Artefact, digest_folder, fingerprint
from tasks.training.kept import not_in_the_store, trained_reference

if TYPE_CHECKING:
    from tasks.training.prefer import PreferOutcome

_MINE_VERSION = 1  # raise when other pairs are made of the same answers
_PREFER_VERSION = 2  # raise when tuning changes what it makes of the same pairs


def check_can_prefer(spec: RetrainSpec) -> None:
    """Refuse, before any compute is spent, a recipe whose result cannot be tuned further.

    Raises:
        SpecError: the training makes no adapter.
    """
    if spec.train.method is TrainMethod.FULL:
        raise SpecError(
            "Preference tuning goes on with the adapter of the training, and method full makes none.",
            where="train.method",
            fix="set it to qlora or lora, or leave out `preference`",
        )


@task(name="mine pairs", persist_result=False, cache_policy=NO_CACHE)
def mine_pairs(answers: DevResult, splits: SplitsRef, spec: RetrainSpec) -> PairsRef:
    """Make pairs of what a tuned model got wrong in the mined part of dev: chosen the target, rejected its answer.

    Raises:
        TrainingError: the answers are those to another part of dev.
    """
    from tasks.training.prefer import PAIRS, is_wrong, mine, too_few_words, write_pairs

    if answers.part is not DevPart.MINED:
        raise TrainingError(
            f"Pairs are mined from the mined part of dev alone; these answers are to the part {answers.part.value}.",
            where=answers.uri,
            fix="ask the part `mined`",
        )
    store, parting = open_store(spec.execution), spec.preference or PreferenceSpec()
    config = {
        "task": spec.task,
        "seed": parting.seed,
        "mine_share": parting.mine_share,
        "max_new_tokens": spec.evaluate.max_new_tokens,
    }

    def make(out: Path) -> Mapping[str, Any]:
        dev = read_rows(store.files(store.open(splits.uri)) / "dev.jsonl")
        rows = rows_of_part(dev, DevPart.MINED, parting)
        kept = store.files(store.open(answers.uri)) / "items.jsonl"
        outcomes = [ItemOutcome.model_validate_json(line) for line in kept.read_text(encoding="utf-8").splitlines()]
        pairs = mine(rows, outcomes, spec.task, spec.evaluate.max_new_tokens)
        write_pairs(out / PAIRS, pairs)
        return {"asked": len(rows), "wrong": sum(map(is_wrong, outcomes)), "pairs": len(pairs)}

    inputs = {"answers": answers.digest, "splits": splits.digest}
    artefact = store.produce("mine_pairs", _MINE_VERSION, config, inputs, make)
    asked, wrong, pairs = (artefact.manifest.facts[name] for name in ("asked", "wrong", "pairs"))
    too_few = too_few_words(pairs, wrong, asked, parting.min_pairs)
    say_done("pairs", too_few or f"{pairs:,} pairs from {wrong:,} wrong of {asked:,}", reused=artefact.reused)
    return PairsRef(**artefact.reference(), asked=asked, wrong=wrong, pairs=pairs, too_few=too_few)


@task(name="prefer", persist_result=False, cache_policy=NO_CACHE)
def tune_preferences(request: PreferRequest) -> TrainedModelRef:
    """Tune the adapter on the pairs (DPO) in a process of its own and merge it; an interrupted tuning starts anew.

    Raises:
        GoldgateError: as `tasks.training.prefer_launch.run_preference`.
    """
    from tasks.training.prefer import PAIRS, PreferJob
    from tasks.training.prefer_launch import run_preference

    store = open_store(request.execution)
    config, inputs = _recipe(request)
    recipe = fingerprint("prefer", _PREFER_VERSION, config, inputs)

    def make(out: Path) -> Mapping[str, Any]:
        attempt = Path(tempfile.mkdtemp(prefix="attempt-", dir=store.scratch("prefer", recipe)))
        dev = read_rows(store.files(store.open(request.splits.uri)) / "dev.jsonl")
        write_rows(attempt / "held_out.jsonl", rows_of_part(dev, DevPart.HELD_OUT, request.preference))
        job = PreferJob(
            request=request,
            fingerprint=recipe,
            model_folder=store.files(store.open(request.base.uri)) / "model",
            adapter_folder=store.files(store.open(request.trained.uri)) / "adapter",
            pairs_file=store.files(store.open(request.pairs.uri)) / PAIRS,
            held_out_file=attempt / "held_out.jsonl",
            scratch=attempt,
            out=out,
        )
        result = run_preference(job, listener)
        shutil.rmtree(attempt, ignore_errors=True)
        digests = {f"{part}_digest": digest_folder(out / part) for part in ("adapter", "merged")}
        return result.model_dump() | digests

    with progress_of("prefer") as listener:
        artefact = store.produce("prefer", _PREFER_VERSION, config, inputs, make)
    say_done("prefer", _outcome(artefact).sentence(), reused=artefact.reused)
    return trained_reference(artefact)


def find_tuned(request: PreferRequest) -> TrainedModelRef | None:
    """What was made of this request before; None when it has to be tuned."""
    return _kept(request, reused=True)


def fetch_tuned(request: PreferRequest) -> TrainedModelRef:
    """What another worker has just made of this request, found in the store that both share.

    Raises:
        TrainingError: it is not there.
    """
    tuned = _kept(request, reused=False)
    if tuned is None:
        raise not_in_the_store("The preference tuning", request.execution)
    return tuned


def _kept(request: PreferRequest, *, reused: bool) -> TrainedModelRef | None:
    config, inputs = _recipe(request)
    artefact = open_store(request.execution).find("prefer", fingerprint("prefer", _PREFER_VERSION, config, inputs))
    if artefact is None:
        return None
    say_done("prefer", _outcome(artefact).sentence(), reused=reused)
    return trained_reference(artefact).model_copy(update={"reused": reused})


def _recipe(request: PreferRequest) -> tuple[dict[str, Any], dict[str, str]]:
    """What the tuned model depends on: configuration, and digests of what is read."""
    return (
        {"task": request.task, "recipe": request.recipe, "preference": request.preference},
        {
            "base": request.base.digest,
            "splits": request.splits.digest,
            "trained": request.trained.digest,
            "pairs": request.pairs.digest,
        },
    )


def _outcome(artefact: Artefact) -> PreferOutcome:
    from tasks.training.prefer import PreferOutcome

    facts = artefact.manifest.facts
    return PreferOutcome.model_validate({name: facts[name] for name in PreferOutcome.model_fields})
