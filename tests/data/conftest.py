"""What the tests of this room share: specs over toy rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tasks.contracts.spec import CurateSpec, DataSpec, ExecutionSpec, GoldenSpec, RetrainSpec, TaskSpec, TrainSpec
from tests.data.toy_data import CLASSIFY, write_lines


@pytest.fixture
def make_spec(tmp_path: Path) -> Callable[..., RetrainSpec]:
    """Write rows to a file and return a spec over them; keyword arguments replace parts of the spec."""

    def make(records: Sequence[Any], task: TaskSpec = CLASSIFY, items: int = 40, **parts: Any) -> RetrainSpec:
        source = write_lines(tmp_path / "rows.jsonl", records)
        data = {"source": str(source)} | parts.pop("data", {})
        return RetrainSpec(
            name="toy",
            task=task,
            data=DataSpec(**data),
            golden=GoldenSpec(**({"path": str(tmp_path / "golden"), "items": items} | parts.pop("golden", {}))),
            base_model="somewhere",
            curate=CurateSpec(**parts.pop("curate", {})),
            train=TrainSpec(**parts.pop("train", {})),
            execution=ExecutionSpec(store=str(tmp_path / "store")),
            **parts,
        )

    return make
