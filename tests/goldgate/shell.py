"""The program as a shell calls it, and files of outcomes for it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from goldgate import cli
from tests.toys import write_jsonl


class Ended(NamedTuple):
    """How a call ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What was printed, read as JSON."""
        return json.loads(self.out)


class Call:
    """Calls the program as a shell would, in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: object) -> Ended:
        self._monkeypatch.setattr(sys, "argv", ["goldgate", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = self._capsys.readouterr()
        return Ended(int(ended.value.code or 0), out, err)


def scores(path: Path, right: int, items: int = 100, more: Mapping[int, Mapping[str, Any]] | None = None) -> Path:
    """A file whose first `right` items are right; `more` holds further fields by the item's number."""
    rows = [{"id": f"i{n}", "score": int(n < right), **(more or {}).get(n, {})} for n in range(items)]
    return write_jsonl(path, rows)
