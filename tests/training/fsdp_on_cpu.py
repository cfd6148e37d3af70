"""The training process with FSDP on a CPU: `python -m tests.training.fsdp_on_cpu SPEC.json`, behind accelerate launch.

torch shards on a CPU too (gloo), but accelerate 1.15 looks for FSDP only where the devices are not CPUs, and takes DDP
in its place. This says that they are not, so that the way through FSDP can be tested without a GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType

from tasks.training.worker import main

_plain = PartialState.__init__


def _init(self: PartialState, *arguments: Any, **named: Any) -> None:
    _plain(self, *arguments, **named)
    if self.distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


PartialState.__init__ = _init  # type: ignore[method-assign]

if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
