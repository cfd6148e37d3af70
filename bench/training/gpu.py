"""QLoRA of an 8B model with random weights, Goldgate beside stock trl, on one CUDA device: one command.

On a bare CUDA machine, from a checkout:

    python3 -m venv .venv && .venv/bin/pip install torch -c constraints.txt \
        && .venv/bin/pip install -e . -c constraints.txt && .venv/bin/python -m bench.training.gpu

Without a CUDA device it runs a small model on the CPU, to show that it works, and says that the GPU row is missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bench.training.cases import ROOT, Case
from bench.training.clock import account
from bench.training.flops import llama_shape, peak_of, row_flops
from bench.training.runs import Run, StoppedError, count_tokens, train_goldgate, train_stock

Row = dict[str, Any]
HERE = Path(__file__).parent
WARM_UP = 3  # steps that do not count: the device's libraries look for their best kernels
SEED = 20_265
_ALPHABET = "abcdefghijklmnopqrstuvwxyz"


class Size(NamedTuple):
    """A model and its rows.

    Attributes:
        title: how tables call it.
        shape: arguments of `LlamaConfig`.
        sequence: tokens of a row, prompt and answer; every row has as many, so that nothing is padded.
        answer: tokens of the answer, its end token among them.
        rank: of the adapter.
        batch_size: rows of a step.
    """

    title: str
    shape: dict[str, Any]
    sequence: int
    answer: int
    rank: int
    batch_size: int


# The shape of Llama 3.1 8B (its config.json), for contexts of this bench.
LARGE = Size(
    title="8B, sequence 2,048",
    shape={
        "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    },
    sequence=2048, answer=512, rank=16, batch_size=4,
)  # fmt: skip
SMALL = Size(
    title="4 layers of 256, sequence 256",
    shape={
        "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    },
    sequence=256, answer=64, rank=16, batch_size=4,
)  # fmt: skip


def make_case(size: Size, steps: int, work: Path) -> Case:
    """The model, and rows of random letters, each of exactly `size.sequence` tokens."""
    from transformers import AutoTokenizer

    from bench.training.random_model import make_random_model
    from tasks.contracts.prompt import tuned_prompt
    from tasks.contracts.rows import Message, Row, write_rows
    from tasks.contracts.spec import TaskKind, TaskSpec, TrainSpec
    from tasks.training.examples import tokenize_row

    model = make_random_model(work / "model", size.shape, seed=SEED)
    tokenizer = AutoTokenizer.from_pretrained(model)
    task = TaskSpec(kind=TaskKind.CHAT, instruction="?")
    prompt = tuned_prompt(task)
    draw = random.Random(SEED)  # noqa: S311 - made-up rows, not a secret

    def letters(count: int) -> str:
        return "".join(draw.choices(_ALPHABET, k=count))

    around = len(tokenize_row(Row("", 1, (Message("user", ""),), ""), prompt, tokenizer, size.sequence).input_ids) - 1
    question = size.sequence - size.answer - around

    def rows(count: int, name: str) -> list[Row]:
        return [
            Row(f"{name}{at}", at + 1, (Message("user", letters(question)),), letters(size.answer - 1))
            for at in range(count)
        ]

    files = work / "rows"
    files.mkdir(parents=True, exist_ok=True)
    write_rows(files / "train.jsonl", rows(steps * size.batch_size, "r"))
    write_rows(files / "dev.jsonl", rows(2, "d"))
    recipe = TrainSpec(
        epochs=1, learning_rate=2e-4, lora_rank=size.rank, batch_size=size.batch_size, max_tokens=size.sequence,
        evaluations=1,
    )  # fmt: skip
    case = Case("gpu-bench", task, recipe, model, "random weights", files / "train.jsonl", files / "dev.jsonl")
    tokens, wanted = count_tokens(case), steps * size.batch_size * size.sequence
    assert tokens == wanted, f"rows have {tokens} tokens, not {wanted}"
    return case


def contestants(on_cuda: bool) -> dict[str, Callable[[Case, Path], Run]]:
    """Who trains, by name."""

    def stock(options: dict[str, Any]) -> Callable[[Case, Path], Run]:
        return lambda case, folder: train_stock(case, folder, seed=SEED, options=options)

    found = {
        "Goldgate": lambda case, folder: train_goldgate(case, folder, seed=SEED, end_after_steps=True),
        "stock, defaults": stock({}),
        "stock, no checkpointing": stock({"config": {"gradient_checkpointing": False}}),
    }
    if on_cuda and importlib.util.find_spec("liger_kernel"):
        found["stock, liger kernels"] = stock({"config": {"use_liger_kernel": True}})
    return found


def measure(size: Size, steps: int, repeats: int, work: Path, tflops: float | None, device: str) -> list[Row]:
    """Every contestant `repeats` times, one after the other in turn; one row for each of them."""
    case = make_case(size, steps, work)
    shape = llama_shape(
        hidden=size.shape["hidden_size"], intermediate=size.shape["intermediate_size"],
        layers=size.shape["num_hidden_layers"], heads=size.shape["num_attention_heads"],
        key_value_heads=size.shape["num_key_value_heads"], vocabulary=size.shape["vocab_size"], rank=size.rank,
    )  # fmt: skip
    flops_a_row = row_flops(shape, size.sequence, size.answer)
    who = contestants(device != "cpu")
    found: dict[str, list[Row]] = {name: [] for name in who}
    stopped: dict[str, str] = {}
    for turn in range(repeats):
        for name, train in who.items():
            if name in stopped:
                continue
            try:
                run = train(case, work / "run")
            except StoppedError as error:  # out of memory, for one: that is a result too
                stopped[name] = last_words(str(error))
                print(f"{name}: stopped: {stopped[name]}", file=sys.stderr)
                continue
            took = account(run.training.events, WARM_UP)
            rows = took.steps * size.batch_size
            one = {
                "tokens_per_second": rows * size.sequence / took.seconds,
                "peak_gb": took.peak_bytes / 1e9,
                "share": rows * flops_a_row / took.seconds / (tflops * 1e12) if tflops else None,
                "losses": [loss for _, loss in run.training.losses],
                "speed": run.speed,
            }
            found[name].append(one)
            print(f"turn {turn + 1}, {name}: {one['tokens_per_second']:,.0f} tokens/s", file=sys.stderr)
    about = {"device": device, "model": size.title, "batch_size": size.batch_size, "steps": steps, "peak": tflops}
    return [about | {"trainer": name} | summed_up(found[name], stopped.get(name)) for name in who]


def summed_up(runs: list[Row], stopped: str | None) -> Row:
    """The middle of several runs."""
    if stopped or not runs:
        return {"stopped": stopped}
    middle = sorted(runs, key=lambda one: one["tokens_per_second"])[len(runs) // 2]
    return middle | {
        "stopped": None,
        "tokens_per_second": statistics.median(one["tokens_per_second"] for one in runs),
        "slowest": min(one["tokens_per_second"] for one in runs),
        "fastest": max(one["tokens_per_second"] for one in runs),
        "peak_gb": max(one["peak_gb"] for one in runs),
    }


def last_words(said: str) -> str:
    """The line of a failed process that says most: the last one that is no traceback's frame."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if "OutOfMemoryError" in line or "Error:" in line]
    return (errors or lines or ["nothing was said"])[-1][:300]


def main() -> None:
    """Measure, and write the rows into results.json and README.md."""
    import torch

    from bench.training.tables import all_tables, fill_readme, read_results, write_results

    on_cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m bench.training.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=16 if on_cuda else 8, help=f"the first {WARM_UP} do not count")
    parser.add_argument("--repeats", type=int, default=2 if on_cuda else 1)
    parser.add_argument("--batch-size", type=int, default=None, help="rows of a step")
    parser.add_argument("--peak-tflops", type=float, default=None, help="dense bf16 peak of a device not known here")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "bench-training-gpu", help="17 GB for the 8B model"
    )
    parser.add_argument("--no-keep", action="store_true", help="leave results.json and README.md as they are")
    asked = parser.parse_args()
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0" if on_cuda else "")  # one device for all
    device = torch.cuda.get_device_name(0) if on_cuda else "cpu"
    peak = peak_of(device)
    tflops = asked.peak_tflops or (peak.tflops if peak else None)
    if on_cuda and tflops is None:
        print(f"The bf16 peak of {device} is not known here: give --peak-tflops.", file=sys.stderr)
    if not on_cuda:
        print("No CUDA device: this is a small model on the CPU, and the GPU row is missing.", file=sys.stderr)
    size = LARGE if on_cuda else SMALL
    if asked.batch_size:
        size = size._replace(batch_size=asked.batch_size)
    asked.work.mkdir(parents=True, exist_ok=True)
    rows = measure(size, asked.steps, asked.repeats, asked.work, tflops, device)
    results = {"gpu" if on_cuda else "gpu_small": rows}
    print(all_tables(results)["gpu"])
    if not asked.no_keep:
        results = read_results() | results
        write_results(results)
        fill_readme(results)
    if rows[0]["stopped"]:
        sys.exit(f"Goldgate itself did not train: {rows[0]['stopped']}")


if __name__ == "__main__":
    main()
