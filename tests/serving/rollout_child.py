"""A rollout, a rollback or a recovery in a process of its own that kills itself: `python -m … WHAT SPEC COUNT JOURNAL`.

COUNT changes are made at the gateway and in the registry, then it sends itself SIGKILL; what was made stands in
JOURNAL. A COUNT of -1 lets all be made.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks.contracts.serving import RolloutSpec

AT_THE_GATEWAY = ("begin", "write", "take", "start_engine", "end_engine", "move_traffic", "roll_back", "begin_canary",
                  "end_canary")  # fmt: skip
IN_THE_REGISTRY = ("set_registered_model_alias", "delete_registered_model_alias", "set_model_version_tag",
                   "delete_model_version_tag")  # fmt: skip
LEASE_SECONDS = float(os.environ.get("ROLLOUT_CHILD_LEASE", "3.0"))  # short: whoever comes next waits for it


class Executioner:
    """Counts changes, and ends the process when its time has come."""

    def __init__(self, count: int, journal: Path) -> None:
        self.left, self.journal = count, journal

    def watch(self, kind: type[Any], names: tuple[str, ...]) -> None:
        for name in names:
            setattr(kind, name, self._watched(name, getattr(kind, name)))

    def _watched(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def change(*args: Any, **kwargs: Any) -> Any:
            detail = getattr(args[1], "phase", "") if len(args) > 1 and "canary" not in name else ""
            result = original(*args, **kwargs)
            with self.journal.open("a") as out:
                out.write(f"{name} {detail}".strip() + "\n")
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return change


def main(what: str, spec_file: str, count: str, journal: str) -> None:
    """Do it."""
    from mlflow import MlflowClient

    from tasks.serving import client

    client.LEASE_SECONDS = LEASE_SECONDS
    executioner = Executioner(int(count), Path(journal))
    executioner.watch(client.GatewayClient, AT_THE_GATEWAY)
    executioner.watch(MlflowClient, IN_THE_REGISTRY)
    spec = RolloutSpec.model_validate_json(Path(spec_file).read_text())
    if what == "rollout":
        from flows.rollout import rollout

        state = rollout(spec, wait_seconds=30.0, return_state=True)
        state.result()
        print(f"ended: {state.name}")
        return
    from rich.console import Console

    from goldgate.rollout import recover_name, roll_back_at

    if what == "rollback":
        roll_back_at(Console(), client.gateway_of(spec.execution), spec.execution, spec.name, "it is wrong", "Ada")
    else:
        recover_name(Console(), spec.execution, spec.name, 30.0)


if __name__ == "__main__":
    main(*sys.argv[1:])
