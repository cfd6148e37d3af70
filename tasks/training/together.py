"""What the processes of one training agree on, and what each of them holds a part of. With one process: plain calls."""

from __future__ import annotations

import json
import os
import socket
import uuid
from collections.abc import Mapping, Sequence
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from tasks.contracts.errors import TrainingError
from tasks.store.digest import digest_file
from tasks.training.checkpoints import Checkpoint, find_checkpoint
from tasks.training.job import TrainJob
from tasks.training.recipe import TrainPlan

# A process that dies is noticed at once, by its closed connections; this is for a host that falls silent. Longer than
# anything that one process does alone while the others wait: reading rows, quantising the base, opening the MLflow run.
_PATIENCE = timedelta(minutes=10)
ChangesT = TypeVar("ChangesT")
_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")


def join(device: str) -> PartialState:
    """Meet the other processes that the distributed launcher started; alone, one process.

    Args:
        device: `cuda` or `cpu` (then by gloo).
    """
    return PartialState(cpu=device == "cpu", timeout=_PATIENCE)


def check_same(state: PartialState, job: TrainJob, plan: str) -> None:
    """Refuse processes that would not train the same thing: other rows, another base model, other versions.

    Each would take its own share of its own rows in its own order, and nothing would fail. All processes have to call
    this.

    Args:
        state: the process group.
        job: with the paths of this host.
        plan: as text.

    Raises:
        TrainingError: in all processes, naming the first host that differs; or FSDP has no folder that all hosts share.
    """
    if state.num_processes == 1:
        return
    facts = {
        "the plan": plan,
        "the training rows": digest_file(job.train_file),
        "the dev rows": digest_file(job.dev_file),
        "the base model": _sizes_and_config(job.model_folder),
        "the libraries": ", ".join(f"{name} {version(name)}" for name in _LIBRARIES),
    }
    difference = find_difference(gather_object([(socket.gethostname(), facts)]))
    if difference is not None:
        raise difference
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not _is_shared(state, job.scratch):
        raise TrainingError(
            "With FSDP, every process reads checkpoints, and the hosts have no scratch folder in common.",
            where=str(job.scratch),
            fix="give all hosts one `execution.store`, or train with deployments/accelerate/ddp.yaml",
        )


def find_difference(found: Sequence[tuple[str, Mapping[str, str]]]) -> TrainingError | None:
    """The refusal of processes that read different things; None when all read the same.

    Args:
        found: for each process the host's name and what it reads, by what that is.
    """
    first_host, first = found[0]
    for host, facts in found[1:]:
        for what, seen in facts.items():
            if seen != first[what]:
                small = max(len(seen), len(first[what])) < 200
                return TrainingError(
                    f"Host {host} differs from host {first_host} in {what}"
                    + (f": {seen} against {first[what]}." if small else "."),
                    where=host,
                    fix="give all hosts one store, or copy everything again; install the same versions everywhere",
                )
    return None


def most_careful(plans: Sequence[TrainPlan]) -> int:
    """Which of the plans that processes made for the memory of their devices fits all of them.

    Batches of different size would have the processes take different numbers of steps. The rows of a step are the same
    in all plans.

    Returns:
        The index of the one with the smallest batch; among those, of one that computes activations again, and of the
        first.
    """
    return min(range(len(plans)), key=lambda at: (plans[at].batch_size, not plans[at].speed.checkpointing))


def plan_together(state: PartialState, plan: TrainPlan, changes: ChangesT) -> tuple[TrainPlan, ChangesT]:
    """The plan that fits the device with the least memory, and what was changed for it. All processes call this.

    Args:
        state: the process group.
        plan: of this process.
        changes: to `plan`, as this process says them.
    """
    if state.num_processes == 1:
        return plan, changes
    found: list[tuple[TrainPlan, ChangesT]] = gather_object([(plan, changes)])
    return found[most_careful([one for one, _ in found])]


def find_together(state: PartialState, scratch: Path, plan: str) -> Checkpoint | None:
    """The checkpoint that all processes go on from; the first one looks for it (`find_checkpoint`).

    Processes that disagreed would wait for each other for ever. A host that does not see the checkpoint in its scratch
    folder is sent the files, through memory: adapter and optimiser state are some hundred megabytes at most. All
    processes have to call this.

    Args:
        state: the process group.
        scratch: this host's folder of the training.
        plan: as in `find_checkpoint`.
    """
    found = find_checkpoint(scratch, plan) if state.is_main_process else None
    if state.num_processes == 1:
        return found
    found = _of_first(found)
    if found is None:
        return None
    folder = scratch / found.folder.name
    there: Mapping[str, str] = _of_first(_digests(folder) if state.is_main_process else None)
    here = _digests(folder)
    missing = gather_object([[name for name, digest in there.items() if here.get(name) != digest]])
    wanted = sorted({name for names in missing for name in names})
    if wanted:
        files = _of_first({name: (folder / name).read_bytes() for name in wanted} if state.is_main_process else None)
        if state.is_local_main_process and not state.is_main_process:
            for name, content in files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
        state.wait_for_everyone()
    return found._replace(folder=folder)


def gather_trained(model: Any) -> dict[str, torch.Tensor]:
    """The trained parameters of a model by name, whole and on the CPU, though FSDP keeps a part in each process.

    All processes have to call this, since each hands on its part. Frozen parameters are left out: of an adapter on a
    large base, they are what does not fit one device.
    """
    from torch.distributed.tensor import DTensor

    return {
        name: (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().cpu()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _is_shared(state: PartialState, scratch: Path) -> bool:
    """Whether all processes see what the first one writes into its scratch folder."""
    name = _of_first(f"shared-{uuid.uuid4().hex}")
    if state.is_main_process:
        (scratch / name).touch()
    state.wait_for_everyone()
    seen = gather_object([(scratch / name).exists()])
    if state.is_main_process:
        (scratch / name).unlink()
    return all(seen)


def _of_first(value: Any) -> Any:
    """What the first process holds, in all of them."""
    return broadcast_object_list([value], from_process=0)[0]


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    return {path.relative_to(folder).as_posix(): digest_file(path) for path in files}


def _sizes_and_config(model_folder: Path) -> str:
    """Enough to tell two base models apart without reading gigabytes: sizes of all files, content of the small ones."""
    files = sorted(path for path in model_folder.iterdir() if path.is_file())
    return json.dumps(
        {path.name: path.stat().st_size if path.suffix == ".safetensors" else digest_file(path) for path in files}
    )
