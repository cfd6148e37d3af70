"""Prefect tasks of training: thin, and light to import."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.contracts.references import BaseModelRef, TrainedModelRef, TrainRequest
from tasks.contracts.spec import RetrainSpec
from tasks.runtime import open_store, progress_of, say_done
from tasks.store import digest_folder, fingerprint

_BASE_VERSION = 1  # raise when conversion changes what it writes
_TRAIN_VERSION = 1  # raise when training changes what it makes of the same recipe


@task(name="fetch base model", persist_result=False, cache_policy=NO_CACHE)
def fetch_base_model(spec: RetrainSpec) -> BaseModelRef:
    """Find the base model and keep it as safetensors with tokenizer and chat template (`model/`)."""
    from tasks.training.base_model import convert, resolve

    source = resolve(spec.base_model)
    with progress_of("base model") as listener:
        artefact = open_store(spec.execution).produce(
            "base_model", _BASE_VERSION, {}, {"source": source.digest}, lambda out: convert(source, out, listener)
        )
    facts = artefact.manifest.facts
    say_done("base model", f"{facts['architecture']}, {facts['bytes'] / 1e6:,.0f} MB", reused=artefact.reused)
    return BaseModelRef(**artefact.reference(), source=spec.base_model)


@task(name="train adapter", persist_result=False, cache_policy=NO_CACHE)
def train_adapter(request: TrainRequest) -> TrainedModelRef:
    """Train a QLoRA adapter in a process of its own and merge it; goes on from the last checkpoint of a killed one."""
    from tasks.training.job import TrainJob, TrainResult
    from tasks.training.launch import run_training

    store = open_store(request.execution)
    config = {"task": request.task, "recipe": request.recipe}
    inputs = {"base": request.base.digest, "splits": request.splits.digest}
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
        artefact = store.produce("train", _TRAIN_VERSION, config, inputs, make)
    shutil.rmtree(store.scratch("train", recipe), ignore_errors=True)  # checkpoints of what is finished
    facts = dict(artefact.manifest.facts)
    digests = {name: facts.pop(name) for name in ("adapter_digest", "merged_digest")}
    result = TrainResult.model_validate(facts)
    say_done("train", result.sentence(), reused=artefact.reused)
    kept = {name: getattr(result, name) for name in TrainedModelRef.model_fields if name in TrainResult.model_fields}
    return TrainedModelRef(**artefact.reference(), **digests, **kept)
