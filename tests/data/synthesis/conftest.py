"""What the tests of synthesis share: a teacher behind HTTP, and specs that ask it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.contracts.spec import DataSpec, ExecutionSpec, GoldenSpec
from tasks.contracts.synthesis import SynthesizeSpec
from tests.data.synthesis.fake_teacher import FakeTeacher, fake_teacher
from tests.data.toy_data import CLASSIFY


@pytest.fixture
def teacher() -> Iterator[FakeTeacher]:
    with fake_teacher() as state:
        yield state


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOLDGATE_TEACHER_KEY", raising=False)


@pytest.fixture
def make_spec(teacher: FakeTeacher, tmp_path: Path) -> Callable[..., SynthesizeSpec]:
    """A spec that asks the fake teacher; keyword arguments replace parts of it."""

    def make(**parts: Any) -> SynthesizeSpec:
        return SynthesizeSpec.model_validate(
            {
                "name": "toy",
                "task": CLASSIFY,
                "data": DataSpec(source=str(tmp_path / "rows.jsonl")),
                "golden": GoldenSpec(path=str(tmp_path / "golden")),
                "execution": ExecutionSpec(store=str(tmp_path / "store")),
                "teacher": {"url": teacher.url, "model": "big", "max_tokens": 64} | parts.pop("teacher", {}),
                **({} if "documents" in parts or "fill" in parts else {"fill": [{"label": "billing", "rows": 3}]}),
                **parts,
            }
        )

    return make
