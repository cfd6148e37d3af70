"""The bench of training: its clock, what it counts, what it compares, and that it runs."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.training import flops, gpu, tables
from bench.training.cases import TASKS, Case
from bench.training.clock import BEGIN, PAUSE, STEP, Event, account, read_clock
from bench.training.compare import OURS, STOCK, TRAINERS, compare, what_it_took
from bench.training.options import DEFAULT, OPTIONS, Option, is_default
from bench.training.runs import ROOT, Run, StoppedError, count_tokens, environment, make_job, steps_of, train_stock
from tasks.contracts.rows import Message, Row, read_rows, write_rows
from tasks.contracts.spec import Guard, SpeedSpec, TaskKind, TaskSpec, TrainSpec
from tasks.training.recipe import SpeedPlan, make_plan, order_rows

TASK = TaskSpec(kind=TaskKind.CLASSIFY, instruction="Which fruit?", labels=("red apple", "pear"))


def tiny_case(folder: Path, model: Path, rows: int = 24) -> Case:
    """Rows of different lengths whose answer is in the text."""
    made = [
        Row(
            f"r{at}", at + 1, (Message("user", ("crimson round" if at % 2 else "long green") + " fruit" * (at % 5)),),
            TASK.labels[(at + 1) % 2],
        )
        for at in range(rows)
    ]  # fmt: skip
    write_rows(folder / "train.jsonl", made)
    write_rows(folder / "dev.jsonl", made[:6])
    recipe = TrainSpec(epochs=1, learning_rate=1e-2, lora_rank=4, batch_size=4, evaluations=1)
    return Case("fruit", TASK, recipe, model, "tiny", folder / "train.jsonl", folder / "dev.jsonl")


# --- the clock


def events(*what: tuple[str, float, float, int]) -> list[Event]:
    return [Event(*one) for one in what]


def test_clock_leaves_out_looks_and_checkpoints_between_steps() -> None:
    seen = events(
        (BEGIN, 100.0, 10.0, 50),
        (STEP, 103.0, 14.0, 70),  # the first one, 3 s
        (STEP, 104.0, 16.0, 71),  # 1 s
        (PAUSE, 109.0, 20.0, 90),  # a look, 5 s
        (PAUSE, 111.0, 21.0, 90),  # a checkpoint, 2 s
        (STEP, 112.5, 23.0, 95),  # 1.5 s, the wait for its batch among them
        (PAUSE, 130.0, 40.0, 200),  # the look at the end
    )
    took = account(seen)
    assert took.steps == 3
    assert took.seconds == pytest.approx(3 + 1 + 1.5)
    assert took.cpu_seconds == pytest.approx(4 + 2 + 2)
    assert took.pause_seconds == pytest.approx(7)  # the one after the last step holds up nothing
    assert took.first_seconds == pytest.approx(3)
    assert took.peak_bytes == 95  # after the last step, before the last look


def test_clock_counts_after_the_warm_up() -> None:
    seen = events((BEGIN, 0, 0, 1), (STEP, 9, 9, 2), (PAUSE, 20, 20, 2), (STEP, 21, 22, 3), (STEP, 23, 26, 4))
    took = account(seen, warm_up=1)
    assert (took.steps, took.seconds, took.cpu_seconds, took.pause_seconds) == (2, 3, 6, 11)
    assert took.first_seconds == 9
    with pytest.raises(ValueError, match="a training of 3 steps has none after 3 to warm up"):
        account(seen, warm_up=3)


def test_clock_file_is_read_for_its_longest_training(tmp_path: Path) -> None:
    file = tmp_path / "clock.json"
    assert read_clock(file) is None
    check = {"events": [[BEGIN, 0, 0, 1], [STEP, 1, 1, 1]], "losses": [[1, 9.0]]}
    real = {"events": [[BEGIN, 5, 5, 1], [STEP, 6, 6, 1], [STEP, 7, 7, 1]], "losses": [[1, 3.0], [2, 2.0]]}
    file.write_text(json.dumps([real, check]))
    found = read_clock(file)
    assert found is not None
    assert (found.steps, found.losses) == (2, [(1, 3.0), (2, 2.0)])


# --- operations and peaks


def test_operations_of_a_row_by_hand() -> None:
    shape = flops.llama_shape(hidden=4, intermediate=8, layers=2, heads=2, key_value_heads=1, vocabulary=10, rank=1)
    maps = 2 * (4 * 4) + 2 * (4 * 2) + 3 * (4 * 8)  # q and o, k and v, the three of the MLP
    assert shape.frozen == 2 * maps
    assert shape.head == 40
    assert shape.adapters == 2 * (2 * (4 + 4) + 2 * (4 + 2) + 3 * (4 + 8))
    plain = 5 * (4 * shape.frozen + 6 * shape.adapters) + 3 * 4 * 40
    attention = 2 * 6 * 4 * 5**2
    assert flops.row_flops(shape, tokens=5, answer_tokens=3) == plain + attention


def test_shape_of_the_large_model_is_that_of_8b() -> None:
    config = gpu.LARGE.shape
    shape = flops.llama_shape(
        hidden=config["hidden_size"], intermediate=config["intermediate_size"], layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"], key_value_heads=config["num_key_value_heads"],
        vocabulary=config["vocab_size"], rank=16,
    )  # fmt: skip
    norms = (2 * 32 + 1) * 4096
    assert shape.frozen + 2 * shape.head + norms == 8_030_261_248  # Llama 3.1 8B
    assert shape.adapters == 41_943_040
    frozen_share = flops.row_flops(shape, 2048, 2048) / (6 * (shape.frozen + shape.head) * 2048)
    assert 0.66 < frozen_share < 0.72  # 4 N of 6 N, and a little for attention and adapters


@pytest.mark.parametrize(
    ("device", "tflops"),
    [
        ("NVIDIA H200", 989.5),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L4", 121.0),
        ("NVIDIA A40", 149.7),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA L40", None),
        ("Tesla V100-SXM2-16GB", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("cpu", None),
    ],
)
def test_peak_goes_by_the_name_of_the_device(device: str, tflops: float | None) -> None:
    peak = flops.peak_of(device)
    assert (peak.tflops if peak else None) == tflops


# --- options


def test_every_option_of_the_spec_is_tried() -> None:
    tried = {(option.field, option.value) for option in OPTIONS}
    for name, field in SpeedSpec.model_fields.items():
        values = [True] if field.annotation is bool else [one.value for one in field.annotation]  # type: ignore[union-attr]
        for value in values:
            assert value == "auto" or (name, value) in tried, f"{name}: {value} is not measured"


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_options_can_be_told_from_the_default_by_its_plan(option: Option) -> None:
    plan = SpeedPlan().model_dump(mode="json")
    changed = option.spec().model_dump(mode="json", exclude_defaults=True)
    assert changed == {option.field: option.value}
    plain = {"base: dequantised", "compute: float32", "batches: padded", "kernels: plain", "checkpointing: off"}
    assert is_default(option, plan) == (option.name in plain)


def test_stock_trainers_differ_from_ours_and_from_each_other() -> None:
    assert next(iter(TRAINERS)) == OURS
    assert STOCK in TRAINERS
    assert TRAINERS[STOCK] is not TRAINERS[OURS]
    by_hand = [trainer.keywords["config"] for name, trainer in TRAINERS.items() if "by hand" in name]  # type: ignore[attr-defined]
    assert all(not one["bf16"] and not one["gradient_checkpointing"] for one in by_hand)
    assert len({json.dumps(one, sort_keys=True) for one in by_hand}) == len(by_hand) == 2


# --- jobs and environments


def test_job_is_what_the_worker_reads_and_accepts_every_guard(tmp_path: Path) -> None:
    case = tiny_case(tmp_path, tmp_path)
    job = make_job(case, case.recipe, tmp_path / "run")
    assert type(job).model_validate_json(job.model_dump_json()) == job
    assert set(job.request.accept_risks) == set(Guard)
    assert (job.request.splits.train_rows, job.request.splits.dev_rows) == (24, 6)
    assert steps_of(case) == 6
    assert job.out.is_dir()


def test_threads_are_those_of_the_caller_not_of_the_gate_bench() -> None:
    said = "from bench.training import tables, runs; print(runs.environment()['OMP_NUM_THREADS'])"
    for asked, wanted in (("3", "3"), ("", None)):
        env = {**environment(), "OMP_NUM_THREADS": asked}
        got = subprocess.run(
            [sys.executable, "-c", said], env=env, cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout.strip()
        assert got == (wanted or f"{len(os.sched_getaffinity(0))}")


def test_failed_training_says_why(tmp_path: Path) -> None:
    with pytest.raises(StoppedError) as stopped:
        train_stock(tiny_case(tmp_path, tmp_path / "nowhere"), tmp_path / "run", seed=1, options={})
    assert "bench.training.stock ended with 1" in str(stopped.value)
    assert "nowhere" in str(stopped.value)


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("frame\ntorch.OutOfMemoryError: no memory\n  more", "torch.OutOfMemoryError: no memory"),
        ("x ended with -9:\n", "x ended with -9:"),
        ("", "nothing was said"),
    ],
)  # fmt: skip
def test_last_words_are_the_error(said: str, kept: str) -> None:
    assert gpu.last_words(said) == kept


# --- tables


def compared(trainer: str, seed: int, rate: float, loss: float, peak: float = 1000.0) -> dict[str, Any]:
    return {
        "task": "prices", "trainer": trainer, "seed": seed, "tokens_per_second": rate, "seconds": 10.0,
        "cpu_seconds": 20.0, "pause_seconds": 3.0, "peak_mb": peak, "dev_loss": loss,
        "losses": [5.0, 4.0, 3.0, 2.0, 1.0],
    }  # fmt: skip


def test_ratios_are_within_a_turn() -> None:
    # The machine was twice as slow in the second turn: the ratio is 3 in both.
    rows = [
        compared(OURS, 17, 600.0, 0.50, 800.0), compared(STOCK, 17, 200.0, 0.52),
        compared(OURS, 18, 300.0, 0.54, 800.0), compared(STOCK, 18, 100.0, 0.52),
    ]  # fmt: skip
    ours, stock = tables.compared(rows).splitlines()[2:]
    cells = [cell.strip() for cell in ours.strip("|").split("|")]
    assert cells[:4] == ["prices", "Goldgate", "450 (300 to 600)", "3.00"]
    assert cells[7:] == ["800 (800 to 800)", "0.80", "0.5200 ± 0.0283"]
    assert "| 1.00 |" in stock


def test_options_table_says_what_was_not_run_and_why() -> None:
    ran = {"tokens_per_second": 100.0, "peak_mb": 500.0, "process_seconds": 20.0, "dev_loss": 0.5}
    rows = [
        {"task": "prices", "option": DEFAULT, "seed": 1} | ran,
        {"task": "prices", "option": "compile: true", "seed": 1}
        | ran | {"tokens_per_second": 50.0, "process_seconds": 60.0, "dev_loss": 0.49},
        {"task": "prices", "option": "batches: flat", "seed": 1, "skipped": "is the default here"},
        {"task": "prices", "option": "kernels: liger", "seed": 1, "stopped": "no\n such | device"},
    ]  # fmt: skip
    assert tables.options(rows).splitlines()[2:] == [
        "| prices | default | 100 | 1.00 | 20 | 500 | 1.00 |  |  |",
        "| prices | compile: true | 50 | 0.50 | 60 | 500 | 1.00 | -0.0100 |  |",
        "| prices | batches: flat |  |  |  |  |  |  | is the default here |",
        "| prices | kernels: liger |  |  |  |  |  |  | no such / device |",
    ]


def test_gpu_table_says_when_the_gpu_is_missing() -> None:
    row = {
        "device": "cpu", "model": "small", "trainer": OURS, "stopped": None, "tokens_per_second": 20.0,
        "slowest": 19.0, "fastest": 21.0, "peak_gb": 1.0, "share": None, "losses": [4.0, 3.0, 2.0, 1.0],
    }  # fmt: skip
    stock = row | {"trainer": STOCK, "tokens_per_second": 10.0, "peak_gb": 2.0}
    text = tables.gpu({"gpu_small": [row, stock]})
    assert text.startswith("The GPU row is missing")
    assert "| cpu | small | Goldgate | 20 (19 to 21) | 2.00 | 1.00 | 0.50 |  | 1.0000 |  |" in text
    there = tables.gpu({"gpu": [stock | {"device": "NVIDIA H200", "share": 0.412}, row | {"stopped": "out of memory"}]})
    assert "missing" not in there
    assert "| 41.2 |" in there
    assert "out of memory" in there
    assert tables.gpu({}) == f"The GPU row is missing: no CUDA device was at hand. {tables.NOT_YET}"


def test_fifths_and_curves() -> None:
    assert tables.fifths([1.0, 3.0, 5.0, 7.0, 2.0, 4.0, 6.0, 8.0, 1.0, 1.0]) == [2, 6, 3, 7, 1]
    with pytest.raises(ValueError, match="at least 5 losses, this one has 4"):
        tables.fifths([1.0] * 4)
    picture = tables.pictures({"compare": [compared(OURS, 17, 1.0, 1.0), compared(STOCK, 17, 1.0, 1.0)]})["prices"]
    assert picture.count("<polyline") == 2
    assert 'points="48.0,32.0 ' in picture  # the highest loss, at the first step


def test_readme_has_a_place_for_every_table_and_no_number_before_it_was_measured(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text((tables.HERE / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    tables.fill_readme({}, readme)
    text = readme.read_text(encoding="utf-8")
    for name in ("machine", "compare", "curves", "options"):
        assert f"<!-- {name} -->\n{tables.NOT_YET}\n<!-- end of {name} -->" in text
    assert all(f"examples/{task}" in text for task in TASKS)


# --- the model of the GPU part


def test_random_model_is_whole_in_shards_and_a_letter_is_a_token(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from bench.training.random_model import make_random_model

    shape = {
        "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    }  # fmt: skip
    folder = make_random_model(tmp_path / "model", shape, seed=3, shard_bytes=40_000)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 3
    model, said = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    assert model.lm_head.weight.float().std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(model.model.norm.weight, torch.ones(64, dtype=torch.bfloat16))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer("letters")["input_ids"]) == 7
    written = shards[0].stat().st_mtime_ns
    make_random_model(folder, shape, seed=3, shard_bytes=40_000)
    assert shards[0].stat().st_mtime_ns == written  # it was there
    make_random_model(folder, shape, seed=4, shard_bytes=40_000)
    assert shards[0].stat().st_mtime_ns != written


def test_rows_of_the_gpu_part_have_exactly_the_tokens_asked_for(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from tasks.contracts.prompt import tuned_prompt
    from tasks.training.examples import tokenize_file

    shape = gpu.SMALL.shape | {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    size = gpu.SMALL._replace(shape=shape, sequence=96, answer=32, batch_size=2)
    case = gpu.make_case(size, 3, tmp_path)
    rows = tokenize_file(case.train, tuned_prompt(case.task), AutoTokenizer.from_pretrained(case.model), 96)
    assert [(len(row.input_ids), row.answer_tokens) for row in rows] == [(96, 32)] * 6
    assert count_tokens(case) == 6 * 96
    assert steps_of(case) == 3


# --- the whole


def in_our_order(case: Case, folder: Path, seed: int) -> Case:
    """The same case with its rows in the order in which Goldgate trains on them."""
    from transformers import AutoTokenizer

    from tasks.contracts.prompt import tuned_prompt
    from tasks.training.examples import tokenize_file

    rows = list(read_rows(case.train))
    tokens = tokenize_file(case.train, tuned_prompt(case.task), AutoTokenizer.from_pretrained(case.model), 512)
    plan = make_plan(case.recipe.model_copy(update={"seed": seed}), len(rows), 6)
    write_rows(folder / "ordered.jsonl", [rows[at] for at in order_rows([len(row.input_ids) for row in tokens], plan)])
    return case._replace(train=folder / "ordered.jsonl")


def test_both_trainers_learn_the_same_from_the_same_tokens(tiny_model: Path, tmp_path: Path) -> None:
    case = tiny_case(tmp_path, tiny_model, rows=48)
    ordered = in_our_order(case, tmp_path, 17)

    def stock_in_our_order(_: Case, folder: Path, seed: int) -> Run:
        return train_stock(ordered, folder, seed=seed, options={"config": {"train_sampling_strategy": "sequential"}})

    rows = compare(case, [17], tmp_path, {OURS: TRAINERS[OURS], STOCK: stock_in_our_order})
    ours, stock = rows
    assert (ours["trainer"], stock["trainer"]) == (OURS, STOCK)
    assert ours["tokens"] == stock["tokens"] == count_tokens(case)
    assert ours["steps"] == stock["steps"] == 12
    # The first two steps are taken on the untrained model (the rate starts at zero), and no seed ties the first
    # weights of one trainer's adapter to those of the other's.
    assert ours["losses"][:2] == pytest.approx(stock["losses"][:2], abs=0.01)
    assert ours["losses"] == pytest.approx(stock["losses"], abs=0.03)
    start = math.log(512)  # what a model that knows nothing loses on one of 512 tokens
    for row in rows:
        assert 1.0 < row["dev_loss"] < start - 0.5, rows
        assert 0 < row["seconds"] < row["process_seconds"]
        assert row["cpu_seconds"] > 0
        assert 300 < row["peak_mb"] < 4000
    assert ours["dev_loss"] == pytest.approx(stock["dev_loss"], abs=0.03)


@pytest.mark.slow
def test_stock_trainer_without_padding_keeps_rows_apart(tiny_model: Path, tmp_path: Path) -> None:
    # If rows that lie one after the other saw each other, the losses of this model would differ by 0.013.
    case = tiny_case(tmp_path, tiny_model, rows=8)
    padded = TRAINERS[STOCK](case, tmp_path / "padded", 17)
    flat = TRAINERS["stock, by hand: no padding"](case, tmp_path / "flat", 17)
    assert what_it_took(flat, 1)["losses"] == pytest.approx(what_it_took(padded, 1)["losses"], abs=0.003)


@pytest.mark.slow
def test_gpu_part_runs_small_without_a_gpu(tmp_path: Path) -> None:
    size = gpu.SMALL._replace(sequence=96, answer=32)
    rows = gpu.measure(size, 5, 1, tmp_path, None, "cpu")
    assert [row["trainer"] for row in rows] == ["Goldgate", "stock, defaults", "stock, no checkpointing"]
    assert [row["stopped"] for row in rows] == [None] * 3
    first = [row["losses"][0] for row in rows]
    assert first == pytest.approx([math.log(2048)] * 3, abs=0.4)
    assert all(row["share"] is None and row["tokens_per_second"] > 0 for row in rows)
