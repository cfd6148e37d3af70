"""What the gate's artefacts rest on, in a real store: splits with their contamination report, and a trained model."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.contracts.references import CONTAMINATION_FILE, ContaminationReport, SplitsRef, TrainedModelRef
from tasks.store import Store, digest_folder

CLEAN = ContaminationReport(
    golden_digest="9" * 64,
    golden_items=200,
    rows=12,
    near_duplicate=0.8,
    ngram_words=13,
    measures=("golden_item", "golden_ngram"),
    found={},
)


def make_splits(store: Store, report: ContaminationReport | str | None = CLEAN) -> SplitsRef:
    """Curated splits as the data room keeps them; `report` None leaves the contamination report out."""

    def make(folder: Path) -> Mapping[str, Any]:
        (folder / "train.jsonl").write_text("{}\n" * 10)
        (folder / "dev.jsonl").write_text("{}\n" * 2)
        if report is not None:
            text = report if isinstance(report, str) else report.model_dump_json()
            (folder / CONTAMINATION_FILE).write_text(text)
        return {}

    made = store.produce("curate", 1, {"report": str(report)}, {"rows": "4" * 64}, make)
    return SplitsRef(**made.reference(), train_rows=10, dev_rows=2, removed={})


def make_trained(
    store: Store, splits: SplitsRef, model: Path | None = None, *, seed: int = 0, **inputs: str
) -> TrainedModelRef:
    """A candidate as training keeps it: `merged/` (of a real model, if one is given) and `adapter/`."""

    def make(folder: Path) -> Mapping[str, Any]:
        if model is not None:
            shutil.copytree(model, folder / "merged")
        else:
            (folder / "merged").mkdir()
            (folder / "merged" / "config.json").write_text("{}")
            (folder / "merged" / "model.safetensors").write_bytes(bytes(range(256)) + bytes([seed]))
        (folder / "adapter").mkdir()
        (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"adapter")
        return {}

    read = {"base": "7" * 64, "splits": splits.digest} | inputs
    made = store.produce("train", 1, {"real": model is not None, "seed": seed}, read, make)
    folder = store.files(made)
    return TrainedModelRef(
        **made.reference(), adapter_digest=digest_folder(folder / "adapter"),
        merged_digest=digest_folder(folder / "merged"), steps=1, dev_loss=0.5, seconds=1.0, tokens_per_second=1.0,
        peak_memory_bytes=1,
    )  # fmt: skip
