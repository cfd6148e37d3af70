"""What of a model is trained: a LoRA adapter on chosen layers, or all of its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from transformers.pytorch_utils import Conv1D

from tasks.contracts.errors import TrainingError
from tasks.contracts.spec import TrainMethod

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from tasks.training.recipe import TrainPlan

_NAMED = 12  # so many layers are named in a refusal; a model has a handful of kinds


class Width(NamedTuple):
    """Features that a linear layer takes and gives."""

    takes: int
    gives: int


def adapt(model: PreTrainedModel, plan: TrainPlan) -> PreTrainedModel | PeftModel:
    """Make ready to train what the plan trains, in float32: a fresh adapter (qlora, lora), or all weights (full).

    A LoRA adapter adds (alpha / r) B A to each chosen weight (arXiv:2106.09685; with rslora alpha / sqrt(r),
    arXiv:2312.03732; with dora magnitudes are trained apart, arXiv:2402.09353). B begins at zero, A is drawn from
    `plan.seed` alone, so the same plan gives the same adapter, whatever was drawn before.

    One dtype from the first step on, fresh or resumed: a resumed adapter is loaded as float32, and bfloat16 is too
    coarse for the small updates at the end of a cosine schedule.

    Raises:
        TrainingError: as `choose_layers`, or a target is tied to the input embedding.
    """
    if plan.method is TrainMethod.FULL:
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
            parameter.data = parameter.data.float()
        return model
    output = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), None)
    layers = choose_layers(linear_layers(model), plan.lora_targets, plan.lora_rank, output)
    if output in layers and model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        raise TrainingError(
            f"The layer {output} is the input embedding too (its weights are tied), and a merged adapter would change "
            "both.",
            where="train.adapter.targets",
            fix=f"leave {output} out",
        )
    config = LoraConfig(
        r=plan.lora_rank,
        lora_alpha=int(plan.lora_alpha) if plan.lora_alpha.is_integer() else plan.lora_alpha,
        lora_dropout=plan.lora_dropout,
        target_modules=list(plan.lora_targets) or "all-linear",
        use_rslora=plan.rslora,
        use_dora=plan.dora,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):  # peft draws on the CPU; leaves the caller's random numbers as they were
        torch.manual_seed(plan.seed)
        adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def linear_layers(model: PreTrainedModel) -> dict[str, Width]:
    """The linear layers of a model, packed ones too, by their full names."""
    widths: dict[str, Width] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            widths[name] = Width(module.in_features, module.out_features)
        elif isinstance(module, Conv1D):  # GPT-2's, a linear layer that is written the other way round
            widths[name] = Width(*module.weight.shape)
    return widths


def choose_layers(
    widths: Mapping[str, Width], targets: Sequence[str], rank: int, output: str | None = None
) -> list[str]:
    """The full names of the layers that get an adapter.

    Args:
        widths: the linear layers there are.
        targets: as `AdapterSpec.targets`: each is the last part, or the last parts, of layers' names; none is all of
            them but the output layer.
        rank: rank of the adapter.
        output: the output layer, which is chosen only by its name.

    Raises:
        TrainingError: a target names no linear layer, there is none at all, or the rank is above the smaller side of
            a chosen layer (an adapter of that rank would have more numbers than it can express).
    """
    called = {target: [name for name in widths if f".{name}".endswith(f".{target}")] for target in targets}
    for target, names in called.items():
        if not names:
            raise TrainingError(
                f"No linear layer of this model is called {target!r}; there are {_kinds(widths)}.",
                where="train.adapter.targets",
                fix="name layers that are there, or leave `targets` empty for all linear ones",
            )
    wanted = {name for names in called.values() for name in names} if targets else widths.keys() - {output}
    chosen = [name for name in widths if name in wanted]
    if not chosen:
        raise TrainingError(
            "This model has no linear layer that an adapter could be put on.",
            where="base_model",
            fix="use a causal language model with linear layers, or train a tiny one whole (train.method: full)",
        )
    narrow = min(chosen, key=lambda name: min(widths[name]))
    if rank > min(widths[narrow]):
        raise TrainingError(
            f"The rank {rank} is above the width of a layer: {narrow} takes {widths[narrow].takes} features and gives "
            f"{widths[narrow].gives}.",
            where=f"train.lora_rank = {rank}",
            fix=f"lower it to {min(widths[narrow])} or less, or name wider layers in `train.adapter.targets`",
        )
    return chosen


def _kinds(widths: Mapping[str, Width]) -> str:
    """The last parts of the layers' names, shortly."""
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in widths))
    more = f" and {len(kinds) - _NAMED} more" if len(kinds) > _NAMED else ""
    return (", ".join(kinds[:_NAMED]) or "none") + more
