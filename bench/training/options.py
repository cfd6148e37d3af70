"""The options of `train.speed`, each alone against the default."""

from __future__ import annotations

from typing import Any, NamedTuple

from tasks.contracts.spec import BaseWeights, BatchLayout, ComputeType, Kernels, SpeedSpec, Switch

DEFAULT = "default"


class Option(NamedTuple):
    """A setting of one field of `SpeedSpec`, all others as they are by default.

    Attributes:
        field: of `SpeedSpec`.
        value: what it is set to.
        needs_cuda: it does not exist on a CPU.
    """

    field: str
    value: Any
    needs_cuda: bool = False

    @property
    def name(self) -> str:
        """How tables call it."""
        return f"{self.field}: {self.value if isinstance(self.value, str) else str(self.value).lower()}"

    def spec(self) -> SpeedSpec:
        """The speed spec that has it."""
        return SpeedSpec.model_validate({self.field: self.value})


OPTIONS = (
    Option("base", BaseWeights.PACKED.value),
    Option("base", BaseWeights.DEQUANTISED.value),
    Option("compute", ComputeType.FLOAT32.value),
    Option("compute", ComputeType.BFLOAT16.value),
    Option("batches", BatchLayout.PADDED.value),
    Option("batches", BatchLayout.FLAT.value),
    Option("batches", BatchLayout.SHARED_PREFIX.value),
    Option("kernels", Kernels.PLAIN.value),
    Option("kernels", Kernels.FUSED.value),
    Option("kernels", Kernels.LIGER.value, needs_cuda=True),
    Option("checkpointing", Switch.ON.value),
    Option("checkpointing", Switch.OFF.value),
    Option("compile", True),
)
# The names that a plan has for what a spec asks.
_PLANNED = {"compute": "compute_dtype"}


def is_default(option: Option, plan: dict[str, Any]) -> bool:
    """Whether an option is what the default has come to, by its plan (`SpeedPlan` as JSON).

    Raises:
        KeyError: the plan knows no such field.
    """
    planned = plan[_PLANNED.get(option.field, option.field)]
    wanted = option.value
    if option.field == "checkpointing":
        wanted = option.value == Switch.ON.value
    return bool(planned == wanted)
