"""The peers' environment, and the files that they are given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.data.make_rows import MAX_CHARACTERS, ROWS
from bench.data.watch import Watched, watch
from bench.venv import make_environment

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build"
VENV = BUILD / "bench-data-peers"
_PARTS = 2


def peers_python() -> Path:
    """The peers' Python, in an environment made anew where `peers.txt` is newer."""
    return make_environment(VENV, HERE / "peers.txt")


def make_parts(folder: Path) -> Path:
    """The usable rows as two files of {id, text}, one for each process of a peer."""
    parts = folder / "parts"
    parts.mkdir(exist_ok=True)
    files = [(parts / f"{number}.jsonl").open("w", encoding="utf-8") for number in range(_PARTS)]
    with (folder / ROWS).open("rb") as lines:
        for number, line in enumerate(lines):
            row = json.loads(line)
            text = row["text"]
            if isinstance(text, str) and text.strip() and len(text) <= MAX_CHARACTERS:
                written = json.dumps({"id": row["id"], "text": text}, ensure_ascii=False)
                files[number % _PARTS].write(written + "\n")
    for file in files:
        file.close()
    return parts


def ask_peer(tool: str, parts: Path, beside: Path, options: dict[str, Any]) -> tuple[dict[str, Any], Watched]:
    """What a peer took out, and what that took."""
    out = parts.parent / f"{tool}.json"
    command = [peers_python(), HERE / "peers.py", tool, parts, beside, out, json.dumps(options)]
    watched = watch([str(part) for part in command])
    return json.loads(out.read_text(encoding="utf-8")), watched
