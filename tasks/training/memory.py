"""How much memory a training takes, how much there is, and the batch that fits. Torch is asked for nothing but the size
of a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from tasks.contracts.errors import ModelError, TrainingError
from tasks.contracts.spec import BatchLayout, Kernels, Switch, TrainMethod
from tasks.training.recipe import TrainPlan

HEADROOM = 0.9  # of what there is: an estimate is one
# NF4 in blocks of 64 weights, their scales in 8 bits with one float32 for 256 of them (arXiv:2305.14314, section 3).
_NF4_BYTES = 0.5 + (1 + 4 / 256) / 64
_FLOAT32 = 4
_ADAM_BYTES = 2 * _FLOAT32  # both moments
# Measured: resident set of the process with torch, transformers, peft, trl, datasets and MLflow imported, before a
# model is loaded. On CUDA: context and kernels, which no allocator counts.
_RUNTIME = {"cpu": 0.65e9, "cuda": 0.8e9}
_FEW_KEYS = 256  # as in `speed.attention`, which is not imported for a number since it brings torch
_LOST = 0.05  # of what is allocated: rounding up and fragmentation
# A CPU's heap (glibc's) gives freed blocks back late, and holds on to about as much as all layers keep. Measured on a
# 135M model, resident set at its highest: rows x tokens 4 x 60 1.97 GB (estimate 1.92), 16 x 120 6.72 (6.27), 4 x 300
# 4.85 (4.39), 16 x 120 with checkpointing 3.55 (4.05), all float32 and plain; 16 x 120 in bfloat16, fused, flat 3.54
# (3.93).
_HELD = 1.05
# Names that architectures give to the same number.
_NAMES = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head", "num_heads"),
    "vocabulary": ("vocab_size",),
}


class ModelShape(NamedTuple):
    """The sizes of a decoder that its memory depends on.

    Attributes:
        layers: decoder layers.
        hidden: width of the residual stream.
        intermediate: width of the MLP, of one expert where there are several.
        heads: query heads.
        kv_heads: key and value heads.
        head_width: width of a head.
        vocabulary: tokens.
        tied: whether input and output embeddings are one matrix.
        experts: MLPs in a layer.
        gated: whether the MLP has a gate (three matrices, not two).
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int
    tied: bool
    experts: int = 1
    gated: bool = True

    @property
    def embeddings(self) -> int:
        """Weights of the embeddings."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def linear(self) -> int:
        """Weights of the linear layers, all of them, which NF4 packs."""
        return self.layers * sum(rows * columns for _, rows, columns in self.matrices())

    @property
    def weights(self) -> int:
        """All weights; norms are two vectors a layer, and one at the end."""
        return self.embeddings + self.linear + (2 * self.layers + 1) * self.hidden

    def matrices(self) -> Iterator[tuple[str, int, int]]:
        """Name, outputs and inputs of each linear layer of a decoder layer."""
        queries, keys = self.heads * self.head_width, self.kv_heads * self.head_width
        yield "q_proj", queries, self.hidden
        yield "k_proj", keys, self.hidden
        yield "v_proj", keys, self.hidden
        yield "o_proj", self.hidden, queries
        for _ in range(self.experts):
            if self.gated:
                yield "gate_proj", self.intermediate, self.hidden
            yield "up_proj", self.intermediate, self.hidden
            yield "down_proj", self.hidden, self.intermediate


def read_shape(model_folder: Path) -> ModelShape:
    """The shape that a model's `config.json` tells of.

    Raises:
        ModelError: the file is missing, or does not say all that is needed.
    """
    path = model_folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"The base model's configuration cannot be read: {error}.",
            where="config.json of the base model",
            fix="use a folder that `save_pretrained` of transformers has written",
        ) from error
    config = config.get("text_config") or config  # a model that sees as well keeps its decoder's numbers there
    found: dict[str, int] = {}
    for field, names in _NAMES.items():
        value = next((config[name] for name in names if config.get(name)), None)
        if value is None:
            raise ModelError(
                f"The base model's configuration does not say its {names[0]}, so its memory cannot be estimated.",
                where="config.json of the base model",
                fix=f"add {names[0]}, or use a decoder that transformers knows",
            )
        found[field] = int(value)
    hidden, heads = found["hidden"], found["heads"]
    return ModelShape(
        layers=found["layers"],
        hidden=hidden,
        intermediate=int(config.get("intermediate_size") or config.get("n_inner") or 4 * hidden),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_width=int(config.get("head_dim") or hidden // heads),
        vocabulary=found["vocabulary"],
        tied=bool(config.get("tie_word_embeddings", False)),  # where nothing is said, the larger of the two
        experts=int(config.get("num_local_experts") or config.get("num_experts") or 1),
        gated="n_embd" not in config,
    )


class MemoryEstimate(NamedTuple):
    """Bytes that a training takes at its fullest.

    Attributes:
        base: weights that are not trained (of a full fine-tune none).
        trained: weights that are: an adapter's, or all.
        gradients: of the trained weights.
        optimizer: Adam's moments.
        activations: what the backward pass needs of the forward pass.
        logits: scores of the answers' tokens, their softmax and gradients.
        overhead: the process itself, and what allocators lose or hold back.
    """

    base: int
    trained: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    overhead: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)

    def sentence(self) -> str:
        """The estimate in one line."""
        parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in self._asdict().items() if size >= 5e6)
        return f"about {self.total / 1e9:.1f} GB of memory ({parts})"


def estimate_memory(
    shape: ModelShape, plan: TrainPlan, device: str, longest: int, answer: int | None = None
) -> MemoryEstimate:
    """What a training takes at its fullest: in the backward pass of the longest batch.

    Weights, gradients and Adam's moments are counted by their bytes (arXiv:1910.02054, section 3.1). Activations go by
    the way of arXiv:2205.05198, section 4: count what autograd keeps of each operation, here for a decoder with
    RMSNorm, gated MLP and attention that keeps no weights. Kept bytes for a token and layer, with h the width, q the
    queries' width (heads times their width), k the keys', i the MLP's, r the rank, c the bytes of the compute dtype:

    - c (4 h + 2 q + 2 k + 4 i + 7 r): inputs of both norms and what they give; query, key, value and what attention
      gives; the MLP's gate, its activation, up, and their product; what adapters have between their two matrices
    - plain kernels in bfloat16: 8 h + c (2 q + 2 k + 3 i) + 4 (5 h + q + i + 7 r), since norms keep float32, and each
      adapter makes a float32 copy of its input
    - full fine-tuning: c (6 h + 2 q + 2 k + 4 i), since weights of norms are trained, and there is no adapter
    - flat batches: c q more, and on a CPU, for rows of up to 256 tokens, the attention's weights, c times heads times
      `longest`

    A test holds that autograd keeps just that. With checkpointing c h for a token and layer stays, and one layer is
    there in full. Besides, gradients of one layer are around: c (2 h + 3 i) for a token. Logits are c + 4 + 4 + 4 bytes
    (as they come, in float32, log-softmax, gradient) for each answer token and entry of the vocabulary. Padding counts
    as tokens; flat batches have less. On a CPU comes what the heap holds back (`_HELD`), so that there checkpointing
    saves half of it at most.

    Args:
        shape: of the base model.
        plan: how it is trained.
        device: "cpu" or "cuda".
        longest: tokens of the longest row.
        answer: tokens of the longest answer; None takes all of `longest`.

    Returns:
        Bytes on the device (on a CPU: of the process), for one process.
    """
    compute = 2 if plan.speed.compute_dtype == "bfloat16" else _FLOAT32
    if plan.method is TrainMethod.FULL:
        base, trainable = 0, shape.weights
    elif plan.speed.base == "packed":
        largest = max(rows * columns for _, rows, columns in shape.matrices())  # dequantised where it is used
        base = int(_NF4_BYTES * shape.linear) + 2 * (shape.weights - shape.linear) + compute * largest
        trainable = _adapter_weights(shape, plan)
    else:
        base, trainable = compute * shape.weights, _adapter_weights(shape, plan)
    tokens = plan.batch_size * longest
    whole = tokens * _layer_bytes(shape, plan, device, compute, longest)
    kept = tokens * compute * shape.hidden * shape.layers + whole if plan.speed.checkpointing else whole * shape.layers
    activations = kept + tokens * compute * (2 * shape.hidden + 3 * shape.intermediate)
    answers = plan.batch_size * min(longest, answer or longest)
    logits = answers * shape.vocabulary * (12 if compute == _FLOAT32 else 14)
    trained, gradients, optimizer = _FLOAT32 * trainable, _FLOAT32 * trainable, _ADAM_BYTES * trainable
    allocated = base + trained + gradients + optimizer + activations + logits
    held = _HELD * whole * shape.layers if device == "cpu" else 0.0
    overhead = int(_RUNTIME[_kind(device)] + _LOST * allocated + held)
    return MemoryEstimate(base, trained, gradients, optimizer, activations, logits, overhead)


def _kind(device: str) -> str:
    return "cpu" if device == "cpu" else "cuda"


def _adapter_weights(shape: ModelShape, plan: TrainPlan) -> int:
    """Rank times (inputs + outputs) of each layer with an adapter; of all where none of the targets is a known name."""
    wanted = set(plan.lora_targets)
    matrices = list(shape.matrices())
    chosen = [matrix for matrix in matrices if matrix[0] in wanted] or matrices
    magnitudes = sum(rows for _, rows, _ in chosen) if plan.dora else 0
    return shape.layers * (plan.lora_rank * sum(rows + columns for _, rows, columns in chosen) + magnitudes)


def _layer_bytes(shape: ModelShape, plan: TrainPlan, device: str, compute: int, longest: int) -> int:
    """What autograd keeps of one layer for one token, see `estimate_memory`."""
    hidden, inner, rank = shape.hidden, shape.intermediate, plan.lora_rank
    queries, keys = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    attention = 2 * queries + 2 * keys
    if plan.method is TrainMethod.FULL:
        size = compute * (6 * hidden + attention + 4 * inner)
    elif plan.speed.kernels is Kernels.PLAIN and compute != _FLOAT32:
        copies = 5 * hidden + queries + inner + 7 * rank
        size = 2 * _FLOAT32 * hidden + compute * (attention + 3 * inner) + _FLOAT32 * copies
    else:
        size = compute * (4 * hidden + attention + 4 * inner + 7 * rank)
    if plan.speed.batches is not BatchLayout.PADDED:
        size += compute * queries
        if device == "cpu" and longest <= _FEW_KEYS:
            size += compute * shape.heads * longest
    return size


def device_memory(device: str) -> int:
    """Bytes that this process may come to use, what it uses already included.

    On CUDA, all of the device's. On a CPU, what the process has and what the system can still give, within the limits
    of its control groups (version 2 and 1).
    """
    if device != "cpu":
        import torch

        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    own = psutil.Process().memory_info().rss
    free = psutil.virtual_memory().available
    return own + min([free, *cgroup_free(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))])


def cgroup_free(mount: Path, membership: Path) -> list[int]:
    """What each limit on memory of this process' control groups, and of those around them, still leaves, in bytes.

    Args:
        mount: where control groups are mounted.
        membership: the file that names those of the process.
    """
    found: list[int] = []
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return found  # no control groups, no limits
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if not controllers:  # version 2
            root, limit, usage, cache = mount, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, usage = mount / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        folder = root / name.lstrip("/")
        # In a container the name may be one of the host, which is not mounted; its own limits are then at the root.
        for group in (folder, *folder.parents):
            if not group.is_relative_to(root):
                break
            left = _left(group / limit, group / usage, group / "memory.stat", cache)
            if left is not None:
                found.append(left)
    return found


def _left(limit: Path, usage: Path, stat: Path, cache: str) -> int | None:
    try:
        most = limit.read_text(encoding="utf-8").strip()
        used = int(usage.read_text(encoding="utf-8"))
    except OSError:
        return None
    if most == "max":
        return None
    try:  # file pages that are given up when memory is wanted
        lines = stat.read_text(encoding="utf-8").splitlines()
        used -= sum(int(value) for name, value in (line.split() for line in lines) if name == cache)
    except OSError:
        pass
    return max(0, int(most) - max(0, used))


def halved(plan: TrainPlan) -> TrainPlan:
    """The same training with at most half as many rows in a forward pass, and as many in an optimiser step.

    Raises:
        TrainingError: there is one row in a forward pass already.
    """
    rows = plan.batch_size * plan.gradient_accumulation
    if plan.batch_size == 1:
        raise TrainingError(
            "A forward pass takes one row, and no batch is smaller.",
            where="train.batch_size = 1",
            fix="set `train.speed.checkpointing` on, lower `data.max_characters`, or use a device with more memory",
        )
    size = max(number for number in range(1, plan.batch_size // 2 + 1) if rows % number == 0)
    return plan.model_copy(update={"batch_size": size, "gradient_accumulation": rows // size})


def fit_to_memory(
    plan: TrainPlan,
    shape: ModelShape,
    device: str,
    longest: int,
    available: int,
    *,
    answer: int | None = None,
    checkpointing: Switch = Switch.AUTO,
) -> tuple[TrainPlan, list[str]]:
    """The plan, changed as little as lets it fit: checkpointing first, then smaller batches, more to a step.

    Args:
        plan: as the recipe asks.
        shape: of the base model.
        device: "cpu" or "cuda".
        longest: tokens of the longest row.
        available: bytes that one process may use, see `device_memory`.
        answer: tokens of the longest answer; None takes all of `longest`.
        checkpointing: the recipe's wish; only `auto` lets it be turned on here.

    Returns:
        The plan, and what was changed in words, empty where it fits as it is.

    Raises:
        TrainingError: one row at a time, with checkpointing where that is allowed, does not fit.
    """
    limit = HEADROOM * available

    def needs(candidate: TrainPlan) -> int:
        return estimate_memory(shape, candidate, device, longest, answer).total

    fitted, changes, first = plan, [], needs(plan)
    if first <= limit:
        return plan, []
    if not plan.speed.checkpointing and checkpointing is Switch.AUTO:
        fitted = fitted.model_copy(update={"speed": fitted.speed.model_copy(update={"checkpointing": True})})
        changes.append("activations are computed again in the backward pass (train.speed.checkpointing)")
    while needs(fitted) > limit and fitted.batch_size > 1:
        fitted = halved(fitted)
    if needs(fitted) > limit:
        estimate = estimate_memory(shape, fitted, device, longest, answer)
        weights = estimate.base + estimate.trained + estimate.gradients + estimate.optimizer
        smaller = (
            "use method qlora or lora, or a smaller base model"
            if plan.method is TrainMethod.FULL
            else "use a smaller base model, `train.speed.base: packed`, or a lower rank"
        )
        advice = (
            smaller
            if weights + _RUNTIME[_kind(device)] > limit
            else "lower `data.max_characters` or `train.max_tokens`"
            + ("" if fitted.speed.checkpointing else ", set `train.speed.checkpointing` on")
        )
        raise TrainingError(
            f"This training does not fit into memory: one row of {longest:,} tokens at a time takes "
            f"{estimate.sentence()}, and {available / 1e9:.1f} GB are there, of which {HEADROOM:.0%} are used.",
            where=f"memory of the device ({device})",
            fix=f"{advice}, or use a device with more memory",
        )
    if fitted.batch_size != plan.batch_size:
        changes.append(
            f"batches of {fitted.batch_size} rows, {fitted.gradient_accumulation} to an optimiser step, in place of "
            f"{plan.batch_size} and {plan.gradient_accumulation}"
        )
    reason = f"as it was asked for it would take {first / 1e9:.1f} GB, and {available / 1e9:.1f} GB are there"
    return fitted, [f"{change}, since {reason}" for change in changes]
