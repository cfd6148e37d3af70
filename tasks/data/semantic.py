"""Which texts say the same in other words: embeddings by a model on disk, and the pairs that lie close together.

Nothing is fetched and no code of the model is run: a model is a folder of safetensors weights, a tokenizer and a
configuration.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.contracts.errors import SpecError

# Up to so many rows every pair is compared (a minute on two cores); beyond, nearest neighbours are searched.
EXACT_ROWS = 200_000
# Cosine similarity from which two texts say the same, by kind of model, as measured on planted paraphrases
# (bench/data). all-MiniLM-L6-v2 finds 66 % of them at 0.85 and 38 % at 0.9, with 84 and 87 % of its pairs planted, the
# others mostly complaints of one template. A static model averages words: 36 % at 0.95, and what fills many texts alike
# (redactions, say) brings those together, so that two in three of its pairs there are wrong. Look before rows leave.
ADVISED_THRESHOLD = {"static": 0.95, "encoder": 0.85}
_FIELD = "curate.semantic_model"
_FIX = (
    "name the folder of a model2vec model (config.json, model.safetensors, tokenizer.json) or of a "
    "sentence-transformers encoder with mean pooling, or leave `curate.semantic_model` out"
)
_BATCH = 1_024  # texts that are embedded at a time
_BLOCK = 4_096  # rows that are compared with as many others at a time: 64 MB of float32
_PAIRS = 65_536  # pairs that are looked at closely at a time
_TOKENS = 8_192  # tokens, padding included, in one forward pass of an encoder
_ROUNDING = 1e-4  # what float32 products may be off; whoever comes so close is reckoned in float64
# The index: usearch's HNSW graph (arXiv:1603.09320) with vectors of int8, semhash's backend too.
_NEIGHBOURS = 32
_CONNECTIVITY = 16
_EXPANSION = 64
_QUANTISED = 0.02  # what a cosine of int8 vectors may be off


class SemanticPair(NamedTuple):
    """Two texts that say the same: positions, `one` below `other`, and the cosine similarity of their embeddings."""

    one: int
    other: int
    cosine: float


class Encoder(NamedTuple):
    """A model that turns texts into vectors.

    Attributes:
        kind: static (a vector a token, averaged) or encoder (a transformer, mean pooling).
        dimensions: of a vector.
        encode: texts to vectors, float32, shape [texts, dimensions]; not normalised.
    """

    kind: str
    dimensions: int
    encode: Callable[[Sequence[str]], NDArray[np.float32]]


def find_semantic_pairs(
    texts: Callable[[], Iterator[str]], model: str, threshold: float, count: int
) -> list[SemanticPair]:
    """Pairs with a cosine similarity of at least `threshold`, enough of them to connect all that are connected.

    Up to `EXACT_ROWS` texts no pair is missed. Beyond, an approximate index proposes each text's nearest neighbours and
    the exact similarity decides, so there are no false pairs, and few are missed (bench/data measures how many). Texts
    are taken in the order of their hashes, so their order in the source changes nothing; only an encoder's embeddings
    differ, by some 1e-6, with what else is in the batch. A text without a known word is similar to none.

    Memory is two bytes for each dimension of each text, and some 550 bytes a text for the index (256 dimensions).

    Args:
        texts: gives the texts, the same ones each time it is called; it is called twice.
        model: folder of the model (see `open_encoder`).
        threshold: in (0, 1].
        count: how many texts there are.

    Raises:
        SpecError: the folder holds no such model.
        ValueError: there are more or fewer texts than `count`.
    """
    encoder = open_encoder(Path(model))
    order = np.argsort(_hashes(texts, count), kind="stable")
    rank = np.empty(count, dtype=np.int64)
    rank[order] = np.arange(count)
    vectors = _embed(texts, encoder, rank)
    near = _exact_pairs(vectors, threshold) if count <= EXACT_ROWS else _approximate_pairs(vectors, threshold)
    forest = _Forest(count)
    found = []
    for ones, others in near:
        apart = forest.apart(ones, others)
        ones, others = ones[apart], others[apart]
        cosines = _cosines(vectors, ones, others)
        sure = cosines >= threshold
        for one, other, cosine in forest.join(ones[sure], others[sure], cosines[sure]):
            low, high = sorted((int(order[one]), int(order[other])))
            found.append(SemanticPair(low, high, min(1.0, cosine)))
    return sorted(found)


# -- models -------------------------------------------------------------------------------------------------------


def open_encoder(folder: Path) -> Encoder:
    """The model in a folder: model2vec (also as sentence-transformers keeps it), or a transformers encoder.

    An encoder's embedding is the mean over the tokens of its last layer; a text longer than the model takes is read in
    windows, and all their tokens count.

    Raises:
        SpecError: there is no such folder, weights that are no safetensors, no tokenizer, another pooling than the
            mean, layers behind the pooling, code of the model's own, or a model that writes text.
    """
    if not folder.is_dir():
        raise _refused("There is no folder with a model for semantic duplicates", folder)
    if (folder / "0_StaticEmbedding").is_dir():
        return _open_static(folder, folder / "0_StaticEmbedding")
    weights = folder / "model.safetensors"
    if not weights.is_file():
        pickles = sorted(path.name for path in folder.glob("*.bin")) + sorted(path.name for path in folder.glob("*.pt"))
        if pickles:
            raise _refused(f"The model's weights are pickles ({', '.join(pickles)}), which can run code", folder)
        if not list(folder.glob("model-*.safetensors")):
            raise _refused("The folder holds no model.safetensors", folder)
    names = _tensor_names(weights) if weights.is_file() else set()
    if names & {"embeddings", "embedding.weight"}:
        return _open_static(folder, folder)
    return _open_transformer(folder)


def _open_static(folder: Path, files: Path) -> Encoder:
    _need(files, "tokenizer.json", "model.safetensors")
    if not (folder / "config.json").is_file() and not (folder / "config_sentence_transformers.json").is_file():
        raise _refused("The folder holds no config.json", folder)
    try:
        from model2vec import StaticModel
    except ImportError as error:
        raise SpecError(
            "The package model2vec, which reads this model, is not installed.",
            where=f"{_FIELD}: {folder}",
            fix="pip install model2vec",
        ) from error
    try:
        model = StaticModel.from_pretrained(folder)
    # Whatever is wrong with the files: tokenizers and safetensors raise exceptions of their own, or a bare Exception.
    except Exception as error:
        raise _refused(f"The model2vec model cannot be read: {error}", folder) from error

    def encode(batch: Sequence[str]) -> NDArray[np.float32]:
        # The whole text counts: by default model2vec reads the first 512 tokens.
        found = model.encode(list(batch), max_length=None, use_multiprocessing=False)
        return np.asarray(found, dtype=np.float32)

    return Encoder("static", int(model.dim), encode)


def _open_transformer(folder: Path) -> Encoder:
    config = _read_json(folder, "config.json")
    _need(folder, "tokenizer.json")
    if "auto_map" in config:
        raise _refused("The model needs code of its own, which is not run", folder)
    for name in config.get("architectures") or []:
        if name.endswith(("ForCausalLM", "ForConditionalGeneration")):
            raise _refused(f"The model writes text ({name}); it does not embed it", folder)
    longest = _check_modules(folder)
    import torch
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model = AutoModel.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
        ).eval()
    # Whatever is wrong with the files: safetensors raises an exception of its own, tokenizers a bare Exception.
    except Exception as error:
        raise _refused(f"The encoder cannot be read: {error}", folder) from error
    positions = getattr(model.config, "max_position_embeddings", None) or 512
    window = min(longest or positions, positions, tokenizer.model_max_length)
    dimensions = int(model.config.hidden_size)

    def encode(batch: Sequence[str]) -> NDArray[np.float32]:
        read = tokenizer(
            list(batch), truncation=True, max_length=window, stride=0, return_overflowing_tokens=True,
            return_attention_mask=False, return_token_type_ids=False,
        )  # fmt: skip
        ids: list[list[int]] = read["input_ids"]
        owners = np.asarray(read["overflow_to_sample_mapping"])
        sums = np.zeros((len(batch), dimensions), dtype=np.float64)
        shortest_first = np.argsort([len(one) for one in ids], kind="stable")
        for chosen in _by_tokens(shortest_first, ids):
            padded, mask = _pad([ids[index] for index in chosen], tokenizer.pad_token_id or 0)
            with torch.inference_mode():
                states = model(input_ids=torch.from_numpy(padded), attention_mask=torch.from_numpy(mask))
            last = states.last_hidden_state.numpy() * mask[:, :, None]
            np.add.at(sums, owners[chosen], last.sum(axis=1, dtype=np.float64))
        return sums.astype(np.float32)  # the direction of a sum is that of the mean

    return Encoder("encoder", dimensions, encode)


def _check_modules(folder: Path) -> int | None:
    """What sentence-transformers says behind the encoder: mean pooling alone; returns its longest input in tokens."""
    if not (folder / "modules.json").is_file():
        return None
    for module in _read_json(folder, "modules.json"):
        kind = str(module.get("type", "")).rsplit(".", 1)[-1]
        if kind not in ("Transformer", "Pooling", "Normalize"):
            raise _refused(f"The model has a layer {kind!r} behind its encoder, which is not supported", folder)
        if kind == "Pooling":
            pooling = _read_json(folder, f"{module['path']}/config.json")
            modes = [name.removeprefix("pooling_mode_") for name, on in pooling.items() if on is True]
            modes = [name for name in modes if name.endswith(("token", "tokens"))]
            modes = [str(pooling["pooling_mode"])] if "pooling_mode" in pooling else modes  # as newer releases write it
            if modes not in (["mean_tokens"], ["mean"]):
                raise _refused(f"The model pools by {', '.join(modes) or 'nothing'}, not by the mean alone", folder)
    if (folder / "sentence_bert_config.json").is_file():
        longest = _read_json(folder, "sentence_bert_config.json").get("max_seq_length")
        return int(longest) if longest else None
    return None


def _by_tokens(order: NDArray[np.int64], ids: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Batches of windows, ascending in length, of at most `_TOKENS` tokens with their padding."""
    batch: list[int] = []
    for index in order.tolist():
        if batch and (len(batch) + 1) * len(ids[index]) > _TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _pad(ids: Sequence[Sequence[int]], pad: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token ids and their mask, shape [windows, tokens of the longest]."""
    lengths = np.array([len(one) for one in ids])
    mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
    padded = np.full(mask.shape, pad, dtype=np.int64)
    padded[mask.astype(bool)] = np.concatenate([np.asarray(one, dtype=np.int64) for one in ids])
    return padded, mask


def _tensor_names(weights: Path) -> set[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, framework="numpy") as file:
            return set(file.keys())
    except (OSError, SafetensorError) as error:
        raise _refused(f"The weights cannot be read: {error}", weights) from error


def _read_json(folder: Path, name: str) -> Any:
    _need(folder, name)
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _refused(f"{name} of the model cannot be read: {error}", folder / name) from error


def _need(folder: Path, *names: str) -> None:
    for name in names:
        if not (folder / name).is_file():
            raise _refused(f"The folder holds no {name}", folder)


def _refused(what: str, path: Path) -> SpecError:
    return SpecError(f"{what}.", where=f"{_FIELD}: {path}", fix=_FIX)


# -- vectors ------------------------------------------------------------------------------------------------------


def _hashes(texts: Callable[[], Iterator[str]], count: int) -> NDArray[np.uint64]:
    """64 bits of each text's blake2b, shape [count]."""

    def digests() -> Iterator[int]:
        for text in texts():
            digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            yield int.from_bytes(digest, "little")

    found = np.fromiter(digests(), dtype=np.uint64)
    if len(found) != count:
        raise ValueError(f"{count:,} texts were announced, {len(found):,} came")
    return found


def _embed(texts: Callable[[], Iterator[str]], encoder: Encoder, rank: NDArray[np.int64]) -> NDArray[np.float16]:
    """Unit vectors (zeros for a text without a known word) in the order of `rank`, shape [texts, dimensions]."""
    vectors = np.zeros((len(rank), encoder.dimensions), dtype=np.float16)
    stream = texts()
    start = 0
    while batch := list(islice(stream, _BATCH)):
        found = encoder.encode(batch)
        vectors[rank[start : start + len(batch)]] = _unit(found)
        start += len(batch)
    return vectors


def _unit(vectors: NDArray[Any]) -> NDArray[np.float32]:
    """Vectors of length 1, in float32; zeros stay zeros."""
    wide = vectors.astype(np.float32)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    lengths[lengths == 0] = 1
    return wide / lengths


def _cosines(vectors: NDArray[np.float16], ones: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.float64]:
    """Cosine similarity of pairs in float64, so that no block or batch changes it; 0 beside a vector of zeros."""
    found = np.zeros(len(ones))
    for start in range(0, len(ones), _BLOCK):
        part = slice(start, start + _BLOCK)
        one, other = (vectors[side[part]].astype(np.float64) for side in (ones, others))
        lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
        found[part] = np.einsum("ij,ij->i", one, other) / np.where(lengths == 0, 1, lengths)
    return found


# -- pairs --------------------------------------------------------------------------------------------------------

Candidates = Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]


def _exact_pairs(vectors: NDArray[np.float16], threshold: float) -> Candidates:
    """All pairs that may reach the threshold, block by block."""
    for start in range(0, len(vectors), _BLOCK):
        block = _unit(vectors[start : start + _BLOCK])
        for beside in range(start, len(vectors), _BLOCK):
            products = block @ _unit(vectors[beside : beside + _BLOCK]).T
            near = np.flatnonzero(products >= threshold - _ROUNDING)
            for part in range(0, len(near), _PAIRS):
                ones, others = np.divmod(near[part : part + _PAIRS], products.shape[1])
                ones, others = ones + start, others + beside
                below = ones < others
                yield ones[below], others[below]


def _approximate_pairs(vectors: NDArray[np.float16], threshold: float) -> Candidates:
    """Each row's nearest neighbours that may reach the threshold, by an index of the rows."""
    try:
        from usearch.index import Index
    except ImportError as error:
        raise SpecError(
            f"More than {EXACT_ROWS:,} rows need the package usearch to find semantic duplicates; it is not installed.",
            where=_FIELD,
            fix="pip install usearch",
        ) from error
    index = Index(
        ndim=vectors.shape[1],
        metric="cos",
        dtype="i8",
        connectivity=_CONNECTIVITY,
        expansion_add=_EXPANSION,
        expansion_search=_EXPANSION,
    )
    known = np.flatnonzero(vectors.any(axis=1))
    for start in range(0, len(known), _BLOCK):
        keys = known[start : start + _BLOCK]
        index.add(keys, vectors[keys].astype(np.float32), threads=1)  # with more, the graph would hang on their timing
    for start in range(0, len(known), _BLOCK):
        keys = known[start : start + _BLOCK]
        found = index.search(vectors[keys].astype(np.float32), _NEIGHBOURS)
        neighbours = np.atleast_2d(found.keys).astype(np.int64)
        near = np.atleast_2d(found.distances) <= 1 - threshold + _QUANTISED
        rows, columns = np.nonzero(near)
        ones, others = keys[rows], neighbours[rows, columns]
        apart = ones != others
        yield np.minimum(ones, others)[apart], np.maximum(ones, others)[apart]


class _Forest:
    """Which rows are connected, and which pairs connected them."""

    def __init__(self, count: int) -> None:
        self._cluster = np.arange(count, dtype=np.int32)  # of each row, by the number of its smallest member

    def apart(self, ones: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether the rows of each pair are not connected yet."""
        return self._cluster[ones] != self._cluster[others]

    def join(
        self, ones: NDArray[np.int64], others: NDArray[np.int64], cosines: NDArray[np.float64]
    ) -> list[tuple[int, int, float]]:
        """Connect pairs; returns those that connect what was apart, the most similar of a batch first."""
        low, high = self._cluster[ones].astype(np.int64), self._cluster[others].astype(np.int64)
        apart = np.flatnonzero(low != high)
        apart = apart[np.lexsort((others[apart], ones[apart], -cosines[apart]))]
        keys = np.minimum(low, high)[apart] * len(self._cluster) + np.maximum(low, high)[apart]
        apart = apart[np.sort(np.unique(keys, return_index=True)[1])]
        moved: dict[int, int] = {}

        def root(cluster: int) -> int:
            while cluster in moved:
                cluster = moved[cluster]
            return cluster

        joined = []
        for at in apart.tolist():
            first, last = sorted((root(int(low[at])), root(int(high[at]))))
            if first != last:
                moved[last] = first
                joined.append((int(ones[at]), int(others[at]), float(cosines[at])))
        if moved:
            lookup = np.arange(len(self._cluster), dtype=np.int32)
            for cluster in moved:
                lookup[cluster] = root(cluster)
            self._cluster = lookup[self._cluster]
        return joined
