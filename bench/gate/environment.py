"""The peers' environment, and how this one calls it."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bench.venv import make_environment

HERE = Path(__file__).parent
VENV = HERE.parents[1] / "build" / "bench-peers"


def peers_python() -> Path:
    """The peers' Python, in an environment made anew where `peers.txt` is newer."""
    return make_environment(VENV, HERE / "peers.txt")


def ask_peers(what: str, arrays: dict[str, np.ndarray], jobs: list[dict[str, Any]], *rest: str) -> Any:
    """What `peers.py` answers."""
    with tempfile.TemporaryDirectory() as folder:
        data, wanted, out = (Path(folder) / name for name in ("data.npz", "jobs.json", "out.json"))
        np.savez(data, **arrays)  # type: ignore[arg-type]
        wanted.write_text(json.dumps(jobs), encoding="utf-8")
        command = [peers_python(), HERE / "peers.py", what, data, wanted, out, *rest]
        subprocess.run([str(part) for part in command], check=True)
        return json.loads(out.read_text(encoding="utf-8"))
