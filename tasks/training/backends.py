"""Other libraries that can hold the model while it is trained, behind the same door. Light until one is used."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

from tasks.contracts.errors import TrainingError
from tasks.contracts.spec import BatchLayout, Kernels, TrainBackend, TrainMethod

if TYPE_CHECKING:
    from tasks.training.recipe import TrainPlan

_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # that Unsloth has kernels for


def check_backend(backend: TrainBackend, device: str) -> None:
    """Refuse a back end that cannot be had here, before anything starts. Imports none.

    Args:
        backend: `train.backend`.
        device: "cuda" or "cpu", of the machine that trains.

    Raises:
        TrainingError: it is not installed, or this machine has no device for it.
    """
    if backend is TrainBackend.TRANSFORMERS:
        return
    where, plain = f"train.backend = {backend}", "set it to transformers"
    if device != "cuda":
        raise TrainingError(
            "Unsloth trains on CUDA devices, and this machine has none.",
            where=where,
            fix=f"{plain}, or train on a machine with a GPU (execution.train_deployment)",
        )
    if importlib.util.find_spec("unsloth") is None:
        raise TrainingError(
            "Unsloth is not installed in the environment that trains.",
            where=where,
            fix=f"{plain}, or install unsloth in an environment of its own, since it pins torch and transformers",
        )


def load_with_unsloth(model_folder: Path, plan: TrainPlan) -> Any:
    """The model with a fresh adapter, held by Unsloth; it takes the place of `adapt(load_for_training(...))`.

    The adapter is that of the plan: ranks, alpha, dropout, targets, seed. Our own trainer and loss go on from there,
    since the model answers `logits_to_keep` with positions as transformers' models do. Written after Unsloth's
    documented calls; it has not been run by this project, whose tests have no GPU.

    Args:
        model_folder: safetensors, config and tokenizer.
        plan: methods qlora (packed) and lora, with padded batches and plain kernels: Unsloth brings its own.

    Raises:
        TrainingError: the plan has what Unsloth cannot do.
    """
    check_plan(plan)
    unsloth = importlib.import_module("unsloth")  # patches transformers when it is imported, so not before it is wanted
    torch = importlib.import_module("torch")
    model, _ = unsloth.FastLanguageModel.from_pretrained(
        model_name=str(model_folder),
        max_seq_length=plan.max_tokens,
        dtype=getattr(torch, plan.speed.compute_dtype),
        load_in_4bit=plan.method is TrainMethod.QLORA,
        trust_remote_code=False,
    )
    model = unsloth.FastLanguageModel.get_peft_model(
        model,
        r=plan.lora_rank,
        target_modules=list(plan.lora_targets or _LAYERS),
        lora_alpha=plan.lora_alpha,
        lora_dropout=plan.lora_dropout,
        bias="none",
        use_gradient_checkpointing="unsloth" if plan.speed.checkpointing else False,
        random_state=plan.seed,
        use_rslora=plan.rslora,
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    answer_positions(model.get_base_model())
    return model


def check_plan(plan: TrainPlan) -> None:
    """Refuse what Unsloth cannot do, each with the knob it is about.

    Raises:
        TrainingError: method full, DoRA, a base written out, or batches and kernels that are ours.
    """
    refused = {
        "train.method = full": plan.method is TrainMethod.FULL,
        "train.adapter.dora = true": plan.dora,
        "train.speed.base = dequantised": plan.method is TrainMethod.QLORA and plan.speed.base != "packed",
        f"train.speed.batches = {plan.speed.batches}": plan.speed.batches is not BatchLayout.PADDED,
        f"train.speed.kernels = {plan.speed.kernels}": plan.speed.kernels is not Kernels.PLAIN,
        "train.speed.compile = true": plan.speed.compile,
    }
    for where, is_set in refused.items():
        if is_set:
            raise TrainingError(
                "The back end unsloth cannot do this: it has its own way, or none.",
                where=where,
                fix="leave it out, or set `train.backend` to transformers",
            )


def answer_positions(model: Any) -> None:
    """Have a causal language model work out logits at given positions alone, whatever its own `forward` knows.

    Unsloth's takes the last so many positions; the loss asks for the answers'.

    Args:
        model: with a decoder in `model` and an output layer in `lm_head`; its `forward` is replaced.
    """
    outputs = importlib.import_module("transformers.modeling_outputs")

    def forward(self: Any, *, logits_to_keep: Any, **inputs: Any) -> Any:
        hidden = self.model(**inputs)[0]
        return outputs.CausalLMOutputWithPast(logits=self.lm_head(hidden[:, logits_to_keep]))

    model.forward = MethodType(forward, model)
