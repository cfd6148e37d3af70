"""A candidate that was tuned on pairs: what these were made of is followed to the splits that were checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tasks.contracts.errors import LeakageError
from tasks.contracts.references import SplitsRef, TrainedModelRef
from tasks.gate.leakage import check_training_inputs
from tasks.store import Artefact, Store

CHECKED = "5" * 64  # digest of the splits that were checked for golden items


def splits() -> SplitsRef:
    return SplitsRef(
        uri="unused", step="curate", fingerprint="f" * 64, digest=CHECKED, train_rows=1, dev_rows=1, removed={}
    )


def made(store: Store, step: str, inputs: dict[str, str]) -> Artefact:
    def make(folder: Path) -> dict[str, Any]:
        (folder / "file").write_text(f"{step} {sorted(inputs.items())}")
        return {}

    return store.produce(step, 1, {}, inputs, make)


def tuned(store: Store, changes: dict[str, dict[str, str]]) -> TrainedModelRef:
    """A tuned model with its training, answers and pairs; `changes` are to the inputs of a step."""

    def inputs(step: str, **usual: str) -> dict[str, str]:
        return usual | changes.get(step, {})

    training = made(store, "train", inputs("train", base="b" * 64, splits=CHECKED))
    answers = made(store, "ask_dev", inputs("ask_dev", model="m" * 64, splits=CHECKED))
    pairs = made(store, "mine_pairs", inputs("mine_pairs", answers=answers.manifest.digest, splits=CHECKED))
    digests = {"trained": training.manifest.digest, "pairs": pairs.manifest.digest}
    last = made(store, "prefer", inputs("prefer", base="b" * 64, splits=CHECKED, **digests))
    return TrainedModelRef(
        **last.reference(), adapter_digest="a" * 64, merged_digest="m" * 64, steps=1, dev_loss=1.0, seconds=1.0,
        tokens_per_second=1.0, peak_memory_bytes=1,
    )  # fmt: skip


def test_pairs_from_the_checked_splits_are_let_through(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    check_training_inputs(store, tuned(store, {}), splits())


@pytest.mark.parametrize("step", ["train", "ask_dev", "mine_pairs", "prefer"])
def test_other_splits_anywhere_on_the_way_are_refused(tmp_path: Path, step: str) -> None:
    store = Store(str(tmp_path))
    with pytest.raises(LeakageError, match="other splits than those that were checked") as caught:
        check_training_inputs(store, tuned(store, {step: {"splits": "6" * 64}}), splits())
    assert f"/{step}/" in str(caught.value.where)


@pytest.mark.parametrize("step", ["train", "ask_dev", "mine_pairs", "prefer"])
def test_a_golden_set_or_anything_else_that_was_read_is_refused(tmp_path: Path, step: str) -> None:
    store = Store(str(tmp_path))
    with pytest.raises(LeakageError, match="not checked for golden items: golden_set"):
        check_training_inputs(store, tuned(store, {step: {"golden_set": "9" * 64}}), splits())


@pytest.mark.parametrize(
    ("change", "step"),
    [
        ({"prefer": {"trained": "0" * 64}}, "train"),
        ({"prefer": {"pairs": "0" * 64}}, "mine_pairs"),
        ({"mine_pairs": {"answers": "0" * 64}}, "ask_dev"),
    ],
)
def test_what_is_no_longer_there_to_be_looked_at_is_refused(
    tmp_path: Path, change: dict[str, dict[str, str]], step: str
) -> None:
    store = Store(str(tmp_path))
    with pytest.raises(LeakageError, match=f"input of the step {step} was made of"):
        check_training_inputs(store, tuned(store, change), splits())
