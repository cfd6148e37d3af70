"""What goes into the training process and what comes out of it, as files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tasks.contracts.progress import Progress
from tasks.contracts.references import TrainRequest
from tasks.contracts.spec import Frozen

RESULT = "result.json"
ERROR = "error.json"
PROGRESS = "progress.json"
SUMMARY = "summary.json"
CANNOT_WRITE = 74  # exit code (EX_IOERR) of a worker that cannot even write `error.json`
OUT_OF_MEMORY_FIX = (
    "halve `train.batch_size` and double `train.gradient_accumulation` (the same training with less memory), "
    "lower `data.max_characters`, or free memory; the next run goes on from the last checkpoint"
)


class TrainJob(Frozen):
    """The spec file of a training process: everything it needs, as local paths.

    Attributes:
        request: what is to be trained.
        fingerprint: of the training; the key of its MLflow run.
        model_folder: the base model (safetensors, tokenizer, chat template).
        train_file: training rows (`tasks.contracts.rows`).
        dev_file: dev rows.
        scratch: folder for checkpoints, progress and log; outlives a killed process.
        out: folder for what is made: `adapter/`, `merged/`, `curves.jsonl`, `summary.json`.
        halve_batches: how often the batch is halved, since the whole one did not fit into memory.
    """

    request: TrainRequest
    fingerprint: str
    model_folder: Path
    train_file: Path
    dev_file: Path
    scratch: Path
    out: Path
    halve_batches: int = 0


class TrainResult(Frozen):
    """What a training process says of its work; units as in `TrainedModelRef`."""

    steps: int
    planned_steps: int
    best_step: int
    dev_loss: float
    seconds: float
    tokens: int
    tokens_per_second: float
    peak_memory_bytes: int
    resumed_from_step: int
    trainable_parameters: int
    device: str
    compute_dtype: str
    stopped_early: bool
    mlflow_run_id: str
    mlflow_url: str | None
    halve_batches: int = 0

    def sentence(self) -> str:
        """The result in one line."""
        parts = [
            f"{self.steps} steps" + (f" of {self.planned_steps}, stopped early" if self.stopped_early else ""),
            f"dev loss {self.dev_loss:.4f} (best at step {self.best_step})",
            f"{self.seconds:,.0f} s",
            f"{self.tokens_per_second:,.0f} tokens/s ({self.device}, {self.compute_dtype})",
            f"peak memory {self.peak_memory_bytes / 1e9:.1f} GB",
        ]
        if self.resumed_from_step:
            parts.append(f"went on from step {self.resumed_from_step}")
        if self.halve_batches:
            parts.append("with half the batch, after running out of memory")
        return ", ".join(parts)


class Preempted(KeyboardInterrupt):
    """Training was told to stop, and did so after a step whose checkpoint it kept. An interrupt, not a failure."""

    def __init__(self, step: int) -> None:
        super().__init__(f"told to stop; did so after step {step}, whose checkpoint is kept")
        self.step = step


def write_whole(path: Path, text: str, *, flush: bool = False) -> None:
    """Write a file so that a reader sees all of it or none; with `flush`, also after a power cut."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with part.open("w", encoding="utf-8") as out:
        out.write(text)
        if flush:
            out.flush()
            os.fsync(out.fileno())
    part.replace(path)


def write_progress(scratch: Path, progress: Progress) -> None:
    """Leave word of how far the training is."""
    write_whole(scratch / PROGRESS, json.dumps(progress._asdict()))


def read_progress(scratch: Path) -> Progress | None:
    """How far the training is; None before its first word."""
    try:
        return Progress(**json.loads((scratch / PROGRESS).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Add one line of JSON to a file."""
    with path.open("a", encoding="utf-8") as out:
        out.write(json.dumps(record) + "\n")
