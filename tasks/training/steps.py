"""Prefect tasks of training: thin, and light to import."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.contracts.errors import PrunedError
from tasks.contracts.references import BaseModelRef, TrainedModelRef, TrainRequest
from tasks.contracts.spec import RetrainSpec, TrainSpec
from tasks.contracts.sweep import PrunedRef
from tasks.runtime import open_store, progress_of, say_done
from tasks.store import Artefact, digest_folder, fingerprint
from tasks.training.kept import not_in_the_store, trained_reference
from tasks.training.pruned import keep_pruned

if TYPE_CHECKING:
    from tasks.training.job import TrainResult

_BASE_VERSION = 2  # raise when conversion changes what it writes
_TRAIN_VERSION = 2  # raise when training changes what it makes of the same recipe


@task(name="fetch base model", persist_result=False, cache_policy=NO_CACHE)
def fetch_base_model(spec: RetrainSpec) -> BaseModelRef:
    """Find the base model and keep it as safetensors with tokenizer and chat template (`model/`)."""
    from tasks.training.base_model import convert, resolve

    source = resolve(spec.base_model)
    trust_code = spec.train.trust_remote_code_of == source.digest
    config = {"trust_code": True} if trust_code else {}
    with progress_of("base model") as listener:
        artefact = open_store(spec.execution).produce(
            "base_model",
            _BASE_VERSION,
            config,
            {"source": source.digest},
            lambda out: convert(source, out, listener, trust_code=trust_code),
        )
    facts = artefact.manifest.facts
    say_done("base model", f"{facts['architecture']}, {facts['bytes'] / 1e6:,.0f} MB", reused=artefact.reused)
    return BaseModelRef(**artefact.reference(), source=spec.base_model)


@task(name="train adapter", persist_result=False, cache_policy=NO_CACHE)
def train_adapter(request: TrainRequest) -> TrainedModelRef | PrunedRef:
    """Train a QLoRA adapter in a process of its own and merge it; goes on from the last checkpoint of a killed one.

    Hands on a `PrunedRef` when the training was given up, as `stop_above` asks.
    """
    from tasks.training.job import TrainJob
    from tasks.training.launch import run_training

    _check_backend(request.recipe)
    store = open_store(request.execution)
    config, inputs = _recipe(request)
    recipe = fingerprint("train", _TRAIN_VERSION, config, inputs)

    def make(out: Path) -> Mapping[str, Any]:
        splits = store.files(store.open(request.splits.uri))
        job = TrainJob(
            request=request,
            fingerprint=recipe,
            model_folder=store.files(store.open(request.base.uri)) / "model",
            train_file=splits / "train.jsonl",
            dev_file=splits / "dev.jsonl",
            scratch=store.scratch("train", recipe),
            out=out,
        )
        result = run_training(job, listener)
        digests = {f"{part}_digest": digest_folder(out / part) for part in ("adapter", "merged")}
        return result.model_dump() | digests

    with progress_of("train") as listener:
        try:
            artefact = store.produce("train", _TRAIN_VERSION, config, inputs, make)
        except PrunedError as error:
            pruned = keep_pruned(request, store.scratch("train", recipe), error)
            shutil.rmtree(store.scratch("train", recipe), ignore_errors=True)
            say_done("train", pruned.reason, reused=False)
            return pruned
    shutil.rmtree(store.scratch("train", recipe), ignore_errors=True)  # checkpoints of what is finished
    reference = trained_reference(artefact)
    say_done("train", _result(artefact).sentence(), reused=artefact.reused)
    return reference


def check_training_device(spec: RetrainSpec) -> None:
    """Refuse a back end that this machine cannot have, if it is this machine that trains."""
    if spec.execution.train_deployment is None:
        _check_backend(spec.train)


def _check_backend(recipe: TrainSpec) -> None:
    from tasks.training.backends import check_backend
    from tasks.training.launcher import find_devices

    check_backend(recipe.backend, "cuda" if find_devices(os.environ).cuda else "cpu")


def find_trained(request: TrainRequest) -> TrainedModelRef | None:
    """What was made of this request before; None when it has to be trained."""
    return _kept(request, reused=True)


def fetch_trained(request: TrainRequest) -> TrainedModelRef:
    """What another worker has just made of this request, found in the store that both share.

    Raises:
        TrainingError: it is not there.
    """
    trained = _kept(request, reused=False)
    if trained is None:
        raise not_in_the_store("The training run", request.execution)
    return trained


def _kept(request: TrainRequest, *, reused: bool) -> TrainedModelRef | None:
    config, inputs = _recipe(request)
    artefact = open_store(request.execution).find("train", fingerprint("train", _TRAIN_VERSION, config, inputs))
    if artefact is None:
        return None
    say_done("train", _result(artefact).sentence(), reused=reused)
    return trained_reference(artefact).model_copy(update={"reused": reused})


def _recipe(request: TrainRequest) -> tuple[dict[str, Any], dict[str, str]]:
    """What the trained model depends on: configuration, and digests of what is read."""
    return (
        {"task": request.task, "recipe": request.recipe},
        {"base": request.base.digest, "splits": request.splits.digest},
    )


def _result(artefact: Artefact) -> TrainResult:
    from tasks.training.job import TrainResult

    facts = artefact.manifest.facts
    return TrainResult.model_validate({name: facts[name] for name in TrainResult.model_fields if name in facts})
