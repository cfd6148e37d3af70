"""Write the complaints with their labels dealt out at random: what a broken labelling job looks like.

Usage: python examples/complaints/shuffle_labels.py OUT.jsonl

The golden set stays as it is, so a model that is trained on these rows has to be rejected.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

SEED = 1


def shuffle_labels(source: Path, out: Path) -> int:
    """Write the rows of `source` to `out`, texts in place and labels shuffled; return how many rows."""
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    labels = [row["label"] for row in rows]
    random.Random(SEED).shuffle(labels)
    shuffled = [row | {"label": label} for row, label in zip(rows, labels, strict=True)]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in shuffled), encoding="utf-8")
    return len(rows)


if __name__ == "__main__":
    count = shuffle_labels(Path(__file__).with_name("complaints.jsonl"), Path(sys.argv[1]))
    print(f"{count} rows written to {sys.argv[1]}")
