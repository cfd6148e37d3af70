"""Environments for peers, apart from the project's own: their pins do not fit beside it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def make_environment(venv: Path, wanted: Path) -> Path:
    """The Python of an environment with what the file `wanted` lists; made anew where that file is newer."""
    python, ready = venv / "bin" / "python", venv / ".ready"
    if not ready.exists() or ready.stat().st_mtime < wanted.stat().st_mtime:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "-r", str(wanted)], check=True)
        ready.touch()
    return python
