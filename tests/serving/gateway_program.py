"""A gateway in a process of its own, with fake engines: `python -m … SPEC_JSON FAKES_FOLDER MODELS`.

MODELS is "none" for engines that need no files, "registry" for files as `goldgate serve` gets them.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from tasks.contracts.serving import EngineSpec, GatewaySpec, VersionRef
from tasks.serving.gateway.server import run_gateway, serving_folder
from tasks.serving.host import EngineHost
from tests.serving.fake_engine import FakeCommand
from tests.serving.gateway_process import PACE


def no_model(version: VersionRef, spec: EngineSpec) -> Path:
    """In place of a copy of the registered files."""
    return Path("/model")


def main(text: str, fakes: str, models: str) -> None:
    """Serve until SIGTERM."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
    spec, command = GatewaySpec.model_validate_json(text), FakeCommand(Path(fakes))
    host = None
    if models == "none":
        folder = serving_folder(spec.execution)
        folder.mkdir(parents=True, exist_ok=True)
        host = EngineHost(folder, spec.execution, command, prepare=no_model, pace=PACE)
    run_gateway(
        spec, command, mask=lambda text: text.replace("ann", "[NAME]"), announce=print, pace=PACE, host=host
    )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
