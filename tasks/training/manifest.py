"""What made a model, in one file beside it (`training.json`): base, recipe, data, seed, libraries, device, time, energy
and cost. Nothing in it names a place of the machine that it was made on, and no secret reaches it.
"""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil

from tasks.contracts.guards import Finding
from tasks.contracts.prefer import PreferRequest
from tasks.contracts.spec import Frozen, Guard, PreferenceSpec, TrainSpec
from tasks.training.energy import Energy
from tasks.training.forecast import cost_of, price_of
from tasks.training.job import TrainJob, TrainResult, write_whole
from tasks.training.prefer import PreferJob, PreferOutcome
from tasks.training.recipe import TrainPlan
from tasks.training.selfcheck import SelfCheck

MANIFEST = "training.json"
# What a result can depend on, or its speed; one that is not installed is left out.
_LIBRARIES = (
    "goldgate", "torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "safetensors", "tokenizers",
    "datasets", "numpy", "liger-kernel", "unsloth",
)  # fmt: skip


class BaseFacts(Frozen):
    """The base model: where it is from (never a place of this machine) and the digest of its files."""

    source: str
    digest: str


class DataFacts(Frozen):
    """What was trained on: digest of the splits, and sha256 and rows of both files.

    Of a preference tuning, `train` is the file of pairs, and `dev` the dev rows that no pair was mined from.
    """

    splits_digest: str
    train_sha256: str
    train_rows: int
    dev_sha256: str
    dev_rows: int


class Hardware(Frozen):
    """What it was trained on.

    Attributes:
        device: its name in words, see `forecast.device_words`.
        devices: how many, each with a process of its own.
        memory_bytes: of the machine.
        system: operating system and processor architecture.
        cuda: version of CUDA that torch was built with; None without a GPU.
    """

    device: str
    devices: int
    memory_bytes: int
    system: str
    cuda: str | None


class SelfCheckFacts(Frozen):
    """What the self-check saw; losses in nats per answer token, None where it was skipped for the reason given."""

    first_loss: float | None
    last_loss: float | None
    steps: int
    learning_rate: float
    seconds: float
    skipped: str | None


class AcceptedRisk(Frozen):
    """What a guard found, and the reason that a person gave to go on."""

    guard: Guard
    found: str
    reason: str


class Cost(Frozen):
    """What the training took, by the price of an hour of one device, in the money that prices are in."""

    price_per_hour: float
    total: float


class TrainingManifest(Frozen):
    """What made a model.

    Attributes:
        schema_version: raised when a field changes its meaning or goes.
        stage: "train", or "prefer" for a preference tuning of what a training made.
        name: the task.
        fingerprint: of the training.
        recipe: of the training; a preference tuning keeps its adapter and base, and the rest is in `preference`.
        preference: of a preference tuning; None for a training.
        adapter_before: digest of the adapter that a preference tuning started from; None for a training.
        plan: every number of this stage.
        seed: of everything random.
        tokens: of the rows trained on, prompts and answers, no padding.
        tokens_computed: positions that forward passes worked out: padding added, shared prefixes once; None if it was
            not counted.
        seconds: wall time of training, over all processes that took part.
        cost: of these seconds; None where `execution.prices` has no price for the device.
        changes: what was changed of the recipe to fit into memory, in words.
        skews: for each way of merging, how far the merged model is from the adapter as trained; the chosen one first.
        accepted_risks: guards that objected and were overridden.
    """

    schema_version: Literal[1] = 1
    stage: Literal["train", "prefer"] = "train"
    name: str
    fingerprint: str
    base: BaseFacts
    data: DataFacts
    recipe: TrainSpec
    preference: PreferenceSpec | None = None
    adapter_before: str | None = None
    plan: TrainPlan
    seed: int
    python: str
    libraries: dict[str, str]
    hardware: Hardware
    steps: int
    best_step: int
    dev_loss: float
    stopped_early: bool
    resumed_from_step: int
    tokens: int
    tokens_computed: int | None
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    energy: Energy
    cost: Cost | None
    changes: tuple[str, ...] = ()
    skews: tuple[dict[str, str | float], ...] = ()
    self_check: SelfCheckFacts | None = None
    accepted_risks: tuple[AcceptedRisk, ...] = ()


class _Counted(NamedTuple):
    sha256: str
    rows: int


def write_manifest(
    out: Path,
    job: TrainJob | PreferJob,
    plan: TrainPlan,
    result: TrainResult | PreferOutcome,
    device_words: str,
    energy: Energy,
    *,
    devices: int = 1,
    tokens_computed: int | None = None,
    changes: Sequence[str] = (),
    skews: Sequence[Any] = (),
    self_check: SelfCheck | None = None,
    findings: Sequence[Finding] = (),
) -> TrainingManifest:
    """Write `training.json` into a folder, and return what it says.

    Args:
        out: folder of what training made.
        job: what was asked for.
        plan: every number of it.
        result: what came of it.
        device_words: see `forecast.device_words`.
        energy: see `energy.EnergyMeter`.
        devices: how many took part.
        tokens_computed: positions that forward passes worked out, if they were counted.
        changes: what `memory.fit_to_memory` changed.
        skews: of the merges that were tried (NamedTuples), the chosen one first.
        self_check: None where none was made, in a run that was resumed for instance.
        findings: guards that were overridden.

    Raises:
        KeyError: a finding has no reason in the request's `accept_risks`, so it should have stopped the run.
    """
    request = job.request
    tuning = request if isinstance(request, PreferRequest) else None
    reasons = {} if isinstance(request, PreferRequest) else request.accept_risks
    train, dev = (_count(file) for file in _files_of(job))
    price = price_of(request.execution.prices, device_words)
    manifest = TrainingManifest(
        stage="train" if tuning is None else "prefer",
        name=request.name,
        fingerprint=job.fingerprint,
        base=BaseFacts(source=without_place(request.base.source), digest=request.base.digest),
        data=DataFacts(
            splits_digest=request.splits.digest,
            train_sha256=train.sha256,
            train_rows=train.rows,
            dev_sha256=dev.sha256,
            dev_rows=dev.rows,
        ),
        recipe=request.recipe,
        preference=None if tuning is None else tuning.preference,
        adapter_before=None if tuning is None else tuning.trained.adapter_digest,
        plan=plan,
        seed=plan.seed,
        python=platform.python_version(),
        libraries=library_versions(_LIBRARIES),
        hardware=Hardware(
            device=device_words,
            devices=devices,
            memory_bytes=psutil.virtual_memory().total,
            system=f"{platform.system()} {platform.machine()}",
            cuda=_cuda_version() if result.device != "cpu" else None,
        ),
        steps=result.steps,
        best_step=result.best_step if isinstance(result, TrainResult) else result.steps,  # tuning keeps its last step
        dev_loss=result.dev_loss,
        stopped_early=isinstance(result, TrainResult) and result.stopped_early,
        resumed_from_step=result.resumed_from_step,
        tokens=result.tokens,
        tokens_computed=tokens_computed,
        seconds=result.seconds,
        tokens_per_second=result.tokens_per_second,
        peak_memory_bytes=result.peak_memory_bytes,
        energy=energy,
        cost=None
        if price is None
        else Cost(price_per_hour=price, total=float(f"{cost_of(result.seconds, price, devices):.6g}")),
        changes=tuple(changes),
        skews=tuple(dict(skew._asdict()) for skew in skews),
        self_check=None if self_check is None else _facts_of(self_check),
        accepted_risks=tuple(
            AcceptedRisk(guard=one.guard, found=one.found, reason=reasons[one.guard]) for one in findings
        ),
    )
    write_whole(out / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
    return manifest


def without_place(source: str) -> str:
    """A model's URI without the folders of this machine: of a local path its last part alone.

    A repository (`hf:`), a file of an installed package (`gguf:pkg:`) and a registered model (`models:/`) are named the
    same everywhere.
    """
    scheme, colon, rest = source.partition(":")
    if colon and re.fullmatch(r"hf|models|openai", scheme):
        return source
    if colon and scheme == "gguf":
        return source if rest.startswith("pkg:") else f"gguf:{Path(rest).name}"
    return Path(source).name


def library_versions(names: Sequence[str]) -> dict[str, str]:
    """The versions of those of these distributions that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _files_of(job: TrainJob | PreferJob) -> tuple[Path, Path]:
    """What is learned from, and what the dev loss is taken on."""
    if isinstance(job, PreferJob):
        return job.pairs_file, job.held_out_file
    return job.train_file, job.dev_file


def _count(path: Path) -> _Counted:
    digest, rows = hashlib.sha256(), 0
    with path.open("rb") as lines:
        for line in lines:
            digest.update(line)
            rows += 1
    return _Counted(digest.hexdigest(), rows)


def _cuda_version() -> str | None:
    import torch

    return torch.version.cuda


def _facts_of(check: SelfCheck) -> SelfCheckFacts:
    took_place = check.skipped is None

    def finite(value: float) -> float | None:  # JSON has no NaN
        return value if took_place and value == value and abs(value) != float("inf") else None

    return SelfCheckFacts(
        first_loss=finite(check.first_loss),
        last_loss=finite(check.last_loss),
        steps=check.steps,
        learning_rate=check.rate,
        seconds=round(check.seconds, 2),
        skipped=check.skipped,
    )


def read_manifest(folder: Path) -> TrainingManifest:
    """What `write_manifest` wrote into a folder."""
    return TrainingManifest.model_validate_json((folder / MANIFEST).read_text(encoding="utf-8"))


def facts_to_log(manifest: TrainingManifest) -> Mapping[str, float]:
    """What of a manifest a tracker can plot: energy and cost, where there are numbers."""
    numbers = {
        "energy_joules": manifest.energy.joules,
        "cost": None if manifest.cost is None else manifest.cost.total,
    }
    return {name: value for name, value in numbers.items() if value is not None}
