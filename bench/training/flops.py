"""How many operations a training step needs, and how many a chip can do at most."""

from __future__ import annotations

import re
from typing import NamedTuple


class Peak(NamedTuple):
    """What a chip can do at most.

    Attributes:
        pattern: regular expression that its CUDA name matches, in any case.
        tflops: 10^12 dense bfloat16 operations a second, sums in float32, no sparsity.
        source: where that number stands.
    """

    pattern: str
    tflops: float
    source: str


# The first that matches counts. Data sheets of newer chips give twice the number, "with sparsity".
PEAKS = (
    Peak(r"\bB200\b", 2250.0, "NVIDIA Blackwell architecture technical brief"),
    Peak(r"\bH200 NVL\b", 835.5, "NVIDIA H200 data sheet (1,671 with sparsity)"),
    Peak(r"\bH200\b", 989.5, "NVIDIA H200 data sheet (1,979 with sparsity)"),
    Peak(r"\bH100 PCIe\b", 756.5, "NVIDIA H100 data sheet (1,513 with sparsity)"),
    Peak(r"\bH100 NVL\b", 835.5, "NVIDIA H100 NVL data sheet (1,671 with sparsity)"),
    Peak(r"\bH100\b", 989.5, "NVIDIA H100 data sheet, SXM5 (1,979 with sparsity)"),
    Peak(r"\bA100\b", 312.0, "NVIDIA A100 data sheet"),
    Peak(r"\bL40S\b", 362.05, "NVIDIA L40S data sheet"),
    Peak(r"\bL4\b", 121.0, "NVIDIA L4 data sheet (242 with sparsity)"),
    Peak(r"\bA40\b", 149.7, "NVIDIA A40 data sheet"),
    Peak(r"\bA10\b", 125.0, "NVIDIA A10 data sheet"),
    Peak(r"\bRTX 5090\b(?! D)", 209.5, "NVIDIA RTX Blackwell GPU architecture whitepaper"),
    Peak(r"\bRTX 4090\b(?! D)", 165.2, "NVIDIA Ada GPU architecture whitepaper"),
    Peak(r"\bRTX 3090\b(?! Ti)", 71.0, "NVIDIA Ampere GA102 GPU architecture whitepaper"),
)


def peak_of(device: str) -> Peak | None:
    """The peak of a device by the name that CUDA gives it; None if it is not known, or a slice of a chip (MIG)."""
    if re.search(r"\bMIG\b", device):
        return None
    return next((peak for peak in PEAKS if re.search(peak.pattern, device, re.IGNORECASE)), None)


class Shape(NamedTuple):
    """What of a Llama-shaped model takes part in matrix products.

    Attributes:
        layers: how many.
        width: of the attention's heads together.
        frozen: weights of the layers' linear maps, without norms.
        head: weights of the output map.
        adapters: trained weights.
    """

    layers: int
    width: int
    frozen: int
    head: int
    adapters: int


def llama_shape(
    *, hidden: int, intermediate: int, layers: int, heads: int, key_value_heads: int, vocabulary: int, rank: int
) -> Shape:
    """The shape of a Llama with LoRA of a rank on all linear layers but the output."""
    narrow = hidden * key_value_heads // heads
    maps = [(hidden, hidden), (hidden, narrow), (hidden, narrow), (hidden, hidden)]  # q, k, v, o
    maps += [(hidden, intermediate), (hidden, intermediate), (intermediate, hidden)]  # gate, up, down
    return Shape(
        layers=layers,
        width=hidden,
        frozen=layers * sum(into * out for into, out in maps),
        head=hidden * vocabulary,
        adapters=layers * sum(rank * (into + out) for into, out in maps),
    )


def row_flops(shape: Shape, tokens: int, answer_tokens: int) -> float:
    """Operations that one row needs, forward and backward; a multiplication and an addition are two.

    A weight costs 2 operations a token forward. Backward it costs 2 for the gradient of its input and, only if it is
    trained, 2 for its own: 6 N for trained weights (arXiv:2001.08361, table 1), 4 N for frozen ones. Dividing a QLoRA
    step by 6 N would make it look half as fast again as it is. The output map counts on the answer's tokens alone, the
    only ones with a loss. Attention has no weights: scores and their product with the values are
    2 * 2 * tokens^2 * width, half of which is masked, and backward costs twice as much as forward, so
    6 * tokens^2 * width a layer. Recomputing activations is not counted: it is no work that the model asks for
    (model FLOPs utilisation, arXiv:2204.02311, appendix B). Nor is dequantising.
    """
    linear = tokens * (4 * shape.frozen + 6 * shape.adapters) + answer_tokens * 4 * shape.head
    return float(linear + 6 * shape.layers * shape.width * tokens**2)
