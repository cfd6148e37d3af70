"""What a merged model is: the trained weights, written as a plain model, and how far that is from the adapter."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tasks.contracts.errors import TrainingError
from tasks.contracts.spec import AdapterSpec, TrainMethod, TrainSpec
from tasks.store import digest_folder
from tasks.training.examples import Example
from tasks.training.recipe import SpeedPlan, TrainPlan, make_plan
from tasks.training.skew import Sample, draw_samples, measure_skew

DEV = [Example([1, *range(10 + row, 30 + 2 * row), 7, 8, 2], 3) for row in range(6)]
FILES = {
    "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json",
}  # fmt: skip


def plan_of(method: TrainMethod, base: str, dtype: str = "float32", **adapter: Any) -> TrainPlan:
    recipe = TrainSpec(method=method, lora_rank=4, adapter=AdapterSpec(**adapter))
    return make_plan(recipe, 8, 4, speed=SpeedPlan(base=base, compute_dtype=dtype))


def untie(tiny_model: Path, folder: Path) -> Path:
    """The tiny model with an output layer of its own."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(tiny_model, folder)
    torch.manual_seed(5)
    config = AutoConfig.from_pretrained(tiny_model, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def train(model_folder: Path, plan: TrainPlan, out: Path, *, spoil: bool = False) -> Any:
    """Stand in for a training: move what is trained, save it, and return the model as it was trained."""
    import torch

    from tasks.training.adapter import adapt
    from tasks.training.frozen_base import load_for_training

    model = adapt(load_for_training(model_folder, plan, "cpu"), plan)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.rand(parameter.shape, generator=draw))
            elif parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
            if spoil and parameter.requires_grad:
                parameter.view(-1)[0] = math.inf
    model.save_pretrained(out)
    return model.eval()


@pytest.mark.parametrize(
    ("method", "base", "dtype", "adapter", "tied", "onto"),
    [
        (TrainMethod.QLORA, "dequantised", "float32", {}, True, ["nf4", "base"]),
        (TrainMethod.QLORA, "dequantised", "bfloat16", {}, False, ["nf4", "base"]),
        (TrainMethod.QLORA, "packed", "bfloat16", {}, True, ["nf4", "base"]),
        (TrainMethod.QLORA, "dequantised", "float32", {"dora": True}, True, ["nf4", "base"]),
        (TrainMethod.QLORA, "dequantised", "float32", {"rslora": True, "alpha": 6.0}, False, ["nf4", "base"]),
        (TrainMethod.QLORA, "dequantised", "float32", {"dora": True, "rslora": True}, False, ["nf4", "base"]),
        (TrainMethod.QLORA, "dequantised", "float32", {"targets": ("q_proj", "lm_head")}, False, ["nf4", "base"]),
        (TrainMethod.LORA, "plain", "float32", {}, True, ["base"]),
        (TrainMethod.LORA, "plain", "bfloat16", {"dora": True}, False, ["base"]),
        (TrainMethod.FULL, "plain", "float32", {}, True, ["nothing"]),
        (TrainMethod.FULL, "plain", "float32", {}, False, ["nothing"]),
    ],
)
def test_merged_model_answers_as_it_was_trained(
    tiny_model: Path, tmp_path: Path, method: TrainMethod, base: str, dtype: str, adapter: dict[str, Any], tied: bool,
    onto: list[str],
) -> None:  # fmt: skip
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tasks.training.merge import merge_adapter

    model_folder = tiny_model if tied else untie(tiny_model, tmp_path / "untied")
    plan = plan_of(method, base, dtype, **adapter)
    trained = train(model_folder, plan, tmp_path / "adapter")
    skews = merge_adapter(model_folder, tmp_path / "adapter", tmp_path / "merged", plan, "cpu", DEV)

    assert [skew.onto for skew in skews] == onto
    assert skews[0].kl < 2e-3
    assert skews[0].same_top > 0.8
    if len(skews) == 2:
        assert skews[1].kl > 2 * skews[0].kl
    assert {file.name for file in (tmp_path / "merged").iterdir()} == FILES
    assert {file.name for file in tmp_path.iterdir()} - {"untied"} == {"adapter", "merged"}
    merged, report = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(report.values())
    assert merged.dtype == torch.bfloat16
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) == tied
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    ids = torch.tensor([DEV[3].input_ids])
    with torch.inference_mode():
        wanted, got = trained(ids).logits.float(), merged.float()(ids).logits
        untuned = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)(ids).logits
    assert (got - wanted).abs().max() < 0.1 * (wanted - untuned).abs().max()


@pytest.mark.parametrize(
    ("adapter", "scale"), [({}, 2.0), ({"alpha": 6.0}, 1.5), ({"alpha": 6.0, "rslora": True}, 3.0)]
)
@pytest.mark.parametrize("onto", ["nf4", "base"])
def test_weights_are_summed_in_float32_and_rounded_once(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: dict[str, Any], scale: float, onto: str
) -> None:
    """W + s B A, by hand; onto whichever base is said to be nearer."""
    import torch
    from safetensors.torch import load_file

    from tasks.training import merge
    from tasks.training.frozen_base import load_dequantised, load_plain

    def prefer(*arguments: Any) -> Any:
        skew = measure_skew(*arguments)
        return skew._replace(kl=0.0) if skew.onto == onto else skew

    monkeypatch.setattr(merge, "measure_skew", prefer)
    plan = plan_of(TrainMethod.QLORA, "dequantised", **adapter)
    train(tiny_model, plan, tmp_path / "adapter")
    skews = merge.merge_adapter(tiny_model, tmp_path / "adapter", tmp_path / "merged", plan, "cpu", DEV)
    assert skews[0].onto == onto
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    adapters = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    base = load_dequantised(tiny_model, "cpu") if onto == "nf4" else load_plain(tiny_model, "cpu", torch.float32)
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        b, a = (adapters[f"base_model.model.{name}.lora_{part}.weight"] for part in "BA")
        summed = base.get_submodule(name).weight + scale * (b @ a)
        assert torch.equal(merged[f"{name}.weight"], summed.to(torch.bfloat16))
    embeddings = base.get_input_embeddings().weight.to(torch.bfloat16)
    assert torch.equal(merged["model.embed_tokens.weight"], embeddings)


def test_same_bytes_wherever_base_and_adapter_lay(tiny_model: Path, tmp_path: Path) -> None:
    from tasks.training.merge import merge_adapter

    plan = plan_of(TrainMethod.QLORA, "dequantised", "bfloat16", targets=("up_proj",))
    train(tiny_model, plan, tmp_path / "adapter")
    elsewhere = shutil.copytree(tiny_model, tmp_path / "elsewhere" / "base")
    shutil.copytree(tmp_path / "adapter", tmp_path / "elsewhere" / "adapter")
    left_over = tmp_path / "second.part"  # by a killed process
    left_over.mkdir()
    (left_over / "model-00009-of-00009.safetensors").write_bytes(b"half")
    shutil.copytree(left_over, tmp_path / "second")
    first = merge_adapter(tiny_model, tmp_path / "adapter", tmp_path / "first", plan, "cpu", DEV)
    second = merge_adapter(elsewhere, tmp_path / "elsewhere" / "adapter", tmp_path / "second", plan, "cpu", DEV)
    assert first == second
    assert digest_folder(tmp_path / "first") == digest_folder(tmp_path / "second")
    assert not left_over.exists()


def merge_at_length(model_folder: Path, adapter: Path, out: Path, plan: TrainPlan) -> list[Any]:
    """Each merged model made from the files alone, written, read again and measured; the nearest one stays."""
    import torch
    from peft import PeftModel

    from tasks.training import merge
    from tasks.training.frozen_base import load_dequantised, load_for_training, load_plain
    from tasks.training.skew import answer_log_probs

    compute = getattr(torch, plan.speed.compute_dtype)
    as_trained = PeftModel.from_pretrained(load_for_training(model_folder, plan, "cpu"), adapter)
    samples = draw_samples(DEV, 64, len(as_trained.get_output_embeddings().weight))
    trained = list(answer_log_probs(as_trained, samples, "cpu"))
    skews = []
    for onto in ("nf4", "base"):
        nf4 = onto == "nf4"
        base = load_dequantised(model_folder, "cpu", torch.bfloat16) if nf4 else load_plain(model_folder, "cpu", "auto")
        merged = merge._rounded(merge._merged(PeftModel.from_pretrained(base, adapter)))
        merge._write(merged, model_folder, out / onto, "4GB", trust_code=False)
        skews.append(measure_skew(trained, load_plain(out / onto, "cpu", compute), samples, "cpu", onto))
    return sorted(skews, key=lambda skew: skew.kl)


@pytest.mark.parametrize(
    ("base", "dtype", "adapter", "tied"),
    [
        ("dequantised", "float32", {}, True),
        ("dequantised", "float32", {"dora": True}, False),
        ("dequantised", "bfloat16", {}, False),
        ("dequantised", "bfloat16", {"targets": ("up_proj",)}, True),
        ("packed", "bfloat16", {}, True),
    ],
)
@pytest.mark.parametrize("from_training", [True, False], ids=["base from training", "base from its files"])
def test_nothing_that_is_saved_on_the_way_changes_a_byte_or_a_number(
    tiny_model: Path, tmp_path: Path, base: str, dtype: str, adapter: dict[str, Any], tied: bool, from_training: bool
) -> None:
    from tasks.training.frozen_base import written_out_weights
    from tasks.training.merge import merge_adapter

    model_folder = tiny_model if tied else untie(tiny_model, tmp_path / "untied")
    plan = plan_of(TrainMethod.QLORA, base, dtype, **adapter)
    written_out = written_out_weights(train(model_folder, plan, tmp_path / "adapter"), plan, "cpu")
    assert (written_out is None) == (base == "packed")
    skews = merge_adapter(
        model_folder, tmp_path / "adapter", tmp_path / "merged", plan, "cpu", DEV,
        written_out=written_out if from_training else None,
    )  # fmt: skip
    assert skews == merge_at_length(model_folder, tmp_path / "adapter", tmp_path / "long", plan)
    assert digest_folder(tmp_path / "merged") == digest_folder(tmp_path / "long" / skews[0].onto)
    assert not (from_training and written_out), "what the model was given is held by nothing else"


@pytest.mark.parametrize("onto", ["nf4", "base"])
def test_the_base_is_not_quantised_again_and_a_model_that_loses_is_not_written(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, onto: str
) -> None:
    import bitsandbytes

    from tasks.training import merge
    from tasks.training.frozen_base import written_out_weights

    quantised: list[int] = []
    written: list[str] = []
    quantise, write = bitsandbytes.functional.quantize_4bit, merge._write

    def counted(weight: Any, **options: Any) -> Any:
        quantised.append(weight.numel())
        return quantise(weight, **options)

    def watched(*arguments: Any, **options: Any) -> None:
        written.append(arguments[2].name)
        write(*arguments, **options)

    def nearest(*arguments: Any) -> Any:
        skew = measure_skew(*arguments)
        return skew._replace(kl=0.0) if skew.onto == onto else skew

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", counted)
    monkeypatch.setattr(merge, "_write", watched)
    monkeypatch.setattr(merge, "measure_skew", nearest)
    plan = plan_of(TrainMethod.QLORA, "dequantised")
    written_out = written_out_weights(train(tiny_model, plan, tmp_path / "adapter"), plan, "cpu")
    assert len(quantised) == 14, "seven layers in each of two blocks, for training"
    merge.merge_adapter(
        tiny_model, tmp_path / "adapter", tmp_path / "merged", plan, "cpu", DEV, written_out=written_out
    )
    assert len(quantised) == 14
    assert len(written) == (1 if onto == "nf4" else 2)


def test_a_base_that_lacks_a_layer_is_a_defect(tiny_model: Path, tmp_path: Path) -> None:
    from tasks.training.frozen_base import load_dequantised, written_out_weights

    plan = plan_of(TrainMethod.QLORA, "dequantised")
    written_out = written_out_weights(train(tiny_model, plan, tmp_path / "adapter"), plan, "cpu")
    assert written_out is not None
    del written_out["model.layers.1.mlp.down_proj.weight"]
    with pytest.raises(KeyError, match=r"layers\.1\.mlp\.down_proj"):
        load_dequantised(tiny_model, "cpu", written_out=written_out)


def test_weights_are_sharded(tiny_model: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from tasks.training.merge import merge_adapter

    plan = plan_of(TrainMethod.LORA, "plain")
    train(tiny_model, plan, tmp_path / "adapter")
    for name, size in (("whole", "4GB"), ("parts", "60KB")):
        merge_adapter(tiny_model, tmp_path / "adapter", tmp_path / name, plan, "cpu", DEV, shard_size=size)
    shards = sorted(file.name for file in (tmp_path / "parts").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    whole, parts = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("whole", "parts"))
    assert all(torch.equal(whole.state_dict()[name], tensor) for name, tensor in parts.state_dict().items())


@pytest.mark.parametrize(
    ("method", "base"), [(TrainMethod.QLORA, "dequantised"), (TrainMethod.LORA, "plain"), (TrainMethod.FULL, "plain")]
)
def test_weights_that_are_not_finite_are_refused_and_nothing_is_left(
    tiny_model: Path, tmp_path: Path, method: TrainMethod, base: str
) -> None:
    from tasks.training.merge import merge_adapter

    plan = plan_of(method, base)
    train(tiny_model, plan, tmp_path / "adapter", spoil=True)
    with pytest.raises(TrainingError, match=r"trained weights of model\.\S+ are not finite") as refusal:
        merge_adapter(tiny_model, tmp_path / "adapter", tmp_path / "merged", plan, "cpu", DEV)
    assert "train.learning_rate" in refusal.value.fix
    assert [folder.name for folder in tmp_path.iterdir()] == ["adapter"]


def test_trusted_code_is_handed_on_with_the_merged_model(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    from transformers import dynamic_module_utils

    from tasks.training.frozen_base import load_plain
    from tasks.training.merge import merge_adapter
    from tests.training.test_base_model import with_own_code

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])  # to which transformers adds that folder
    plan = plan_of(TrainMethod.LORA, "plain")
    train(tiny_model, plan, tmp_path / "adapter")
    coded = with_own_code(shutil.copytree(tiny_model, tmp_path / "coded"))
    merged = tmp_path / "merged"
    merge_adapter(coded, tmp_path / "adapter", merged, plan, "cpu", DEV, trust_code=True)
    assert (merged / "own_code.py").read_bytes() == (coded / "own_code.py").read_bytes()
    assert type(load_plain(merged, "cpu", "auto", trust_code=True)).__name__ == "OwnModel"


@pytest.mark.parametrize(
    ("device", "free", "chosen"), [("cpu", 0, "cpu"), ("cuda", 10**9, "cuda"), ("cuda", 10**5, "cpu")]
)
def test_merging_moves_to_the_cpu_when_the_gpu_has_no_room(
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    device: str,
    free: int,
    chosen: str,
) -> None:
    import torch

    from tasks.training.merge import _roomy_device

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 10**9))
    with caplog.at_level("WARNING"):
        assert _roomy_device(tiny_model, device) == chosen
    assert ("merging on the CPU" in caplog.text) == (device != chosen)


@pytest.mark.parametrize(
    ("rows", "at_most", "vocabulary", "samples"),
    [
        # All of a few rows: up to the position before the last token, which predicts it.
        ([([1, 2, 3, 4, 5], 2), ([6, 7], 1)], 64, 100, [([1, 2, 3, 4], [2, 3]), ([6], [0])]),
        # Two of four rows, evenly.
        ([([row, 9], 1) for row in range(4)], 2, 100, [([0], [0]), ([2], [0])]),
        # About 4,096 tokens: ten of twenty rows of 400; but eight rows at least.
        ([([row] * 399 + [9], 1) for row in range(20)], 64, 100, [([row] * 399, [398]) for row in range(0, 20, 2)]),
        ([([row] * 999 + [9], 1) for row in range(16)], 64, 100, [([row] * 999, [998]) for row in range(0, 16, 2)]),
        ([([row] * 999 + [9], 1) for row in range(16)], 4, 100, [([row] * 999, [998]) for row in range(0, 16, 4)]),
        # 128 positions of which 64 can be held: every other one.
        ([(list(range(129)), 128)], 64, 10**7, [(list(range(127)), list(range(0, 128, 2)))]),
        # A row that none of the positions falls into is not asked.
        ([(list(range(66)), 65), ([1, 2], 1)], 64, 10**7, [(list(range(65)), [at * 66 // 64 for at in range(64)])]),
    ],
)
def test_samples_are_spread_evenly(
    rows: list[tuple[list[int], int]], at_most: int, vocabulary: int, samples: list[tuple[list[int], list[int]]]
) -> None:
    drawn = draw_samples([Example(*row) for row in rows], at_most, vocabulary)
    assert drawn == [Sample(*sample) for sample in samples]


def test_no_dev_rows_is_an_error() -> None:
    with pytest.raises(TrainingError, match="no dev rows"):
        draw_samples([], 64, 100)


class Fixed:
    """A model over three words that gives the same logits everywhere, and knows no `logits_to_keep`."""

    def __init__(self, *logits: float) -> None:
        self.logits = logits

    def eval(self) -> Fixed:
        return self

    def forward(self, input_ids: Any, use_cache: bool) -> Any:
        import torch

        return SimpleNamespace(logits=torch.tensor(self.logits).expand(*input_ids.shape, len(self.logits)))

    __call__ = forward


@pytest.mark.parametrize(
    ("trained", "merged", "kl", "same_top"),
    [
        ((1.0, 2.0, 3.0), (1.0, 2.0, 3.0), 0.0, 1.0),
        ((1.0, 2.0, 3.0), (5.0, 6.0, 7.0), 0.0, 1.0),  # the same probabilities
        (  # 1/2, 1/4, 1/4 against 1/4, 1/2, 1/4: 1/2 ln 2 - 1/4 ln 2
            (math.log(2), 0.0, 0.0), (0.0, math.log(2), 0.0), math.log(2) / 4, 0.0,
        ),
        ((0.0, 0.0, -math.inf), (0.0, 0.0, 0.0), math.log(3 / 2), 1.0),  # a word that the trained one rules out
        ((0.0, 0.0, 0.0), (0.0, 0.0, -math.inf), math.inf, 1.0),  # and one that the merged one rules out
    ],
)  # fmt: skip
def test_divergence_is_nats_per_answer_token(
    trained: tuple[float, ...], merged: tuple[float, ...], kl: float, same_top: float
) -> None:
    from tasks.training.skew import answer_log_probs

    samples = [Sample([4, 5, 6, 7], [2, 3]), Sample([8], [0])]
    log_probs = list(answer_log_probs(Fixed(*trained), samples, "cpu"))
    assert [tuple(part.shape) for part in log_probs] == [(2, 3), (1, 3)]
    skew = measure_skew(log_probs, Fixed(*merged), samples, "cpu", "nf4")
    assert skew.kl == pytest.approx(kl, abs=1e-6)
    assert (skew.same_top, skew.onto) == (same_top, "nf4")


def test_divergence_that_is_no_number_is_refused() -> None:
    from tasks.training.skew import answer_log_probs

    samples = [Sample([4], [0])]
    log_probs = list(answer_log_probs(Fixed(1.0, 2.0), samples, "cpu"))
    with pytest.raises(TrainingError, match=r"no probabilities \(NaN\)") as refusal:
        measure_skew(log_probs, Fixed(math.nan, 1.0), samples, "cpu", "nf4")
    assert refusal.value.where == "merged onto nf4"


@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_vllm_loads_a_merged_model_and_answers_as_transformers(tiny_model: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tasks.contracts.progress import ignore_progress
    from tasks.contracts.prompt import Decoding, Prompt
    from tasks.contracts.rows import Message, Row
    from tasks.evaluation.engines.embedded import EmbeddedEngine
    from tasks.evaluation.engines.vllm import VllmEngine
    from tasks.training.merge import merge_adapter

    base = shutil.copytree(tiny_model, tmp_path / "base")  # with heads of 32: vLLM on CPU has no attention for 16
    config = AutoConfig.from_pretrained(tiny_model, num_attention_heads=2, num_key_value_heads=1, head_dim=32)
    torch.manual_seed(7)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(base)
    plan = plan_of(TrainMethod.QLORA, "dequantised", dora=True, rslora=True)
    train(base, plan, tmp_path / "adapter")
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged", plan, "cpu", DEV, shard_size="60KB")
    rows = [Row(f"r{n}", n, (Message("user", text),), "card") for n, text in enumerate(("They call me.", "Fee."))]
    prompt, decoding = Prompt(system="Answer with one label."), Decoding(max_new_tokens=6)
    inside = EmbeddedEngine(tmp_path / "merged", batch_size=2, dtype="float32")
    ours = inside.answer(prompt, rows, decoding, ignore_progress)
    server = VllmEngine(tmp_path / "merged", batch_size=2, dtype="float32")
    try:
        theirs = server.answer(prompt, rows, decoding, ignore_progress)
    finally:
        server.close()
    assert [answer.prediction for answer in theirs] == [answer.prediction for answer in ours]
