"""The peers' environment, and how this one calls it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
VENV = HERE.parents[1] / "build" / "bench-peers"


def make_environment() -> Path:
    """The peers' Python, in an environment made anew where `peers.txt` is newer."""
    python, wanted, ready = VENV / "bin" / "python", HERE / "peers.txt", VENV / ".ready"
    if not ready.exists() or ready.stat().st_mtime < wanted.stat().st_mtime:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "-r", str(wanted)], check=True)
        ready.touch()
    return python


def ask_peers(what: str, arrays: dict[str, np.ndarray], jobs: list[dict[str, Any]], *rest: str) -> Any:
    """What `peers.py` answers."""
    with tempfile.TemporaryDirectory() as folder:
        data, wanted, out = (Path(folder) / name for name in ("data.npz", "jobs.json", "out.json"))
        np.savez(data, **arrays)  # type: ignore[arg-type]
        wanted.write_text(json.dumps(jobs), encoding="utf-8")
        command = [make_environment(), HERE / "peers.py", what, data, wanted, out, *rest]
        subprocess.run([str(part) for part in command], check=True)
        return json.loads(out.read_text(encoding="utf-8"))
