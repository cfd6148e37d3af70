"""Texts that say the same in other words."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.contracts.errors import SpecError
from tasks.data import semantic
from tasks.data.semantic import SemanticPair, find_semantic_pairs, open_encoder

WORDS = 400
# Measured on the planted paraphrases below; a synonym's vector lies at a cosine of about 0.98 from its word's.
RECALL, PRECISION = 1.0, 1.0


@pytest.fixture(scope="module")
def static_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model2vec model of 400 words and as many synonyms: `w7` and `s7` mean nearly the same."""
    from model2vec import StaticModel
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"[UNK]": 0} | {f"w{n}": 1 + n for n in range(WORDS)} | {f"s{n}": 1 + WORDS + n for n in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    rng = np.random.default_rng(3)
    words = rng.normal(size=(WORDS, 64))
    synonyms = words + 0.2 * rng.normal(size=(WORDS, 64))
    vectors = np.concatenate([np.zeros((1, 64)), words, synonyms]).astype(np.float32)
    folder = tmp_path_factory.mktemp("static")
    StaticModel(vectors, tokenizer, {"model_type": "model2vec"}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of random weights, as sentence-transformers keeps one, that reads eight tokens at a time."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: n for n, word in enumerate([*specials, *(f"w{n}" for n in range(60))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    folder = tmp_path_factory.mktemp("encoder")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        BertModel(config).save_pretrained(folder)
    write_json(folder / "modules.json", [
        {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ])  # fmt: skip
    write_json(
        folder / "1_Pooling" / "config.json", {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    )
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 8})
    return folder


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def again(texts: Sequence[str]) -> Callable[[], Iterator[str]]:
    return lambda: iter(texts)


def planted(count: int = 300, pairs: int = 60, seed: int = 1) -> tuple[list[str], set[tuple[str, str]]]:
    """Texts of twelve words, and paraphrases of some: half of the words as synonyms, the halves of the text swapped."""
    draw = random.Random(seed)
    texts = [" ".join(f"w{draw.randrange(WORDS)}" for _ in range(12)) for _ in range(count)]
    same = set()
    for text in texts[:pairs]:
        words = [word.replace("w", "s") if at % 2 else word for at, word in enumerate(text.split())]
        same.add((text, " ".join(words[6:] + words[:6])))
    texts += [new for _, new in sorted(same)]
    draw.shuffle(texts)
    return texts, same


def as_texts(pairs: Sequence[SemanticPair], texts: Sequence[str]) -> set[frozenset[str]]:
    return {frozenset((texts[pair.one], texts[pair.other])) for pair in pairs}


def clusters(pairs: Sequence[SemanticPair], count: int) -> set[frozenset[int]]:
    found = {item: frozenset([item]) for item in range(count)}
    for pair in pairs:
        both = found[pair.one] | found[pair.other]
        for item in both:
            found[item] = both
    return {cluster for cluster in found.values() if len(cluster) > 1}


def test_planted_paraphrases_are_found_and_nothing_else(static_model: Path) -> None:
    texts, same = planted()
    found = as_texts(find_semantic_pairs(again(texts), str(static_model), 0.95, len(texts)), texts)
    right = found & {frozenset(pair) for pair in same}
    assert len(right) / len(same) >= RECALL
    assert len(right) / len(found) >= PRECISION


def test_the_threshold_decides(static_model: Path) -> None:
    texts, same = planted()
    pairs = find_semantic_pairs(again(texts), str(static_model), 0.9, len(texts))
    cosines = sorted(pair.cosine for pair in pairs)
    assert len(cosines) == len(same)
    between = (cosines[9] + cosines[10]) / 2
    fewer = find_semantic_pairs(again(texts), str(static_model), between, len(texts))
    assert fewer == [pair for pair in pairs if pair.cosine >= between]
    assert len(fewer) == len(same) - 10


def test_a_text_that_says_the_same_word_for_word_has_similarity_one(static_model: Path) -> None:
    pairs = find_semantic_pairs(again(["w1 w2 w3", "w9 w8", "w3 w1 w2"]), str(static_model), 1.0 - 1e-3, 3)
    assert [(pair.one, pair.other) for pair in pairs] == [(0, 2)]
    assert pairs[0].cosine == pytest.approx(1.0, abs=1e-3)


def test_the_order_of_the_texts_changes_nothing(static_model: Path) -> None:
    texts, _ = planted()
    first = find_semantic_pairs(again(texts), str(static_model), 0.95, len(texts))
    shuffled = texts[:]
    random.Random(9).shuffle(shuffled)
    second = find_semantic_pairs(again(shuffled), str(static_model), 0.95, len(texts))
    assert as_texts(first, texts) == as_texts(second, shuffled)
    assert sorted(pair.cosine for pair in first) == sorted(pair.cosine for pair in second)


def test_pairs_across_blocks_and_batches_are_found(static_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, _ = planted()
    whole = find_semantic_pairs(again(texts), str(static_model), 0.95, len(texts))
    for name, value in (("_BLOCK", 7), ("_BATCH", 5), ("_PAIRS", 3)):
        monkeypatch.setattr(semantic, name, value)
    assert find_semantic_pairs(again(texts), str(static_model), 0.95, len(texts)) == whole


@pytest.mark.parametrize("pairs_at_a_time", [3, 65_536])
def test_what_is_connected_is_connected_by_as_few_pairs_as_it_takes(
    static_model: Path, monkeypatch: pytest.MonkeyPatch, pairs_at_a_time: int
) -> None:
    """A hundred texts that all say the same, and one that says something else."""
    monkeypatch.setattr(semantic, "_PAIRS", pairs_at_a_time)
    draw = random.Random(4)
    words = [f"w{n}" for n in range(10)]
    texts = []
    for _ in range(100):
        draw.shuffle(words)
        texts.append(" ".join(words))
    texts = [*dict.fromkeys(texts), "w77 w78 w79"]
    pairs = find_semantic_pairs(again(texts), str(static_model), 0.99, len(texts))
    assert clusters(pairs, len(texts)) == {frozenset(range(len(texts) - 1))}
    assert len(pairs) == len(texts) - 2
    shuffled = texts[:]
    draw.shuffle(shuffled)
    again_found = find_semantic_pairs(again(shuffled), str(static_model), 0.99, len(texts))
    assert as_texts(again_found, shuffled) == as_texts(pairs, texts)


def test_chains_are_connected(static_model: Path) -> None:
    words = [f"w{n}" for n in range(30)]
    chain = [" ".join(words[at : at + 12]) for at in range(0, 12, 2)]  # each shares ten of twelve words with the next
    ends = find_semantic_pairs(again([chain[0], chain[-1]]), str(static_model), 0.7, 2)
    assert ends == []
    assert clusters(find_semantic_pairs(again(chain), str(static_model), 0.7, len(chain)), len(chain)) == {
        frozenset(range(len(chain)))
    }


def test_pairs_that_close_a_circle_are_left_out() -> None:
    forest = semantic._Forest(5)
    ones, others = np.array([2, 1, 0, 0, 1]), np.array([3, 2, 1, 3, 3])
    assert forest.join(ones, others, np.array([0.99, 0.98, 0.97, 0.96, 0.95])) == [
        (2, 3, 0.99),
        (1, 2, 0.98),
        (0, 1, 0.97),
    ]
    assert forest.apart(np.array([0, 3, 3]), np.array([3, 1, 4])).tolist() == [False, False, True]


def test_the_index_finds_what_comparing_all_pairs_finds(static_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recall of the index against all pairs: 1.0 of 600 planted pairs when this was written."""
    texts, same = planted(2_000, 600, seed=8)
    exact = find_semantic_pairs(again(texts), str(static_model), 0.95, len(texts))
    monkeypatch.setattr(semantic, "EXACT_ROWS", 0)
    approximate = find_semantic_pairs(again(texts), str(static_model), 0.95, len(texts))
    assert len(exact) == len(same)
    assert set(approximate) <= set(exact)
    assert len(approximate) >= 0.99 * len(exact)
    assert find_semantic_pairs(again(texts), str(static_model), 0.95, len(texts)) == approximate


@pytest.mark.parametrize("exact_rows", [0, 100])
def test_a_text_without_a_known_word_resembles_none(
    static_model: Path, monkeypatch: pytest.MonkeyPatch, exact_rows: int
) -> None:
    monkeypatch.setattr(semantic, "EXACT_ROWS", exact_rows)
    with np.errstate(all="raise"):
        assert find_semantic_pairs(again(["", "", "zzz", "zzz", "w1 w2"]), str(static_model), 0.6, 5) == []
        assert find_semantic_pairs(again([]), str(static_model), 0.6, 0) == []


def test_all_of_a_long_text_counts(static_model: Path) -> None:
    """Two texts alike in their first thousand words: model2vec alone would read 512 tokens."""
    start = " ".join(["w1"] * 600)
    texts = [f"{start} {' '.join(['w2'] * 2_000)}", f"{start} {' '.join(['w3'] * 2_000)}"]
    assert find_semantic_pairs(again(texts), str(static_model), 0.95, 2) == []


def test_the_announced_number_of_texts_is_checked(static_model: Path) -> None:
    with pytest.raises(ValueError, match="3 texts were announced, 2 came"):
        find_semantic_pairs(again(["w1", "w2"]), str(static_model), 0.9, 3)


def test_an_encoder_is_pooled_by_the_mean_over_windows(encoder_model: Path) -> None:
    """Eight tokens a window, [CLS] and [SEP] among them: nine words are two windows."""
    import torch
    from transformers import AutoModel

    encoder = open_encoder(encoder_model)
    model = AutoModel.from_pretrained(encoder_model, local_files_only=True).eval()
    ids = list(range(4, 13))
    windows = [[2, *ids[:6], 3], [2, *ids[6:], 3]]
    with torch.inference_mode():
        states = [model(input_ids=torch.tensor([window])).last_hidden_state[0] for window in windows]
    wanted = torch.cat(states).mean(dim=0).numpy()
    text = " ".join(f"w{one - 4}" for one in ids)
    alone = encoder.encode([text])[0]
    among = encoder.encode(["w1", text, "w2 w3 w4", ""])[1]
    assert encoder.kind == "encoder"
    for found in (alone, among):
        np.testing.assert_allclose(found / np.linalg.norm(found), wanted / np.linalg.norm(wanted), atol=1e-5)


def test_an_encoder_finds_repeated_words(encoder_model: Path) -> None:
    texts = ["w1 w2 w3 w4 w5", "w30 w31 w32 w33 w34", "w1 w2 w3 w4 w5 w5"]
    pairs = find_semantic_pairs(again(texts), str(encoder_model), 0.97, 3)
    assert [(pair.one, pair.other) for pair in pairs] == [(0, 2)]


def test_nothing_is_fetched(static_model: Path, encoder_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for folder in (static_model, encoder_model):
        assert open_encoder(folder).encode(["w1 w2"]).shape[0] == 1


def without(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).unlink()


def changed(name: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        old = json.loads((folder / name).read_text(encoding="utf-8"))
        write_json(folder / name, old | values)

    return change


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def dense(folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    write_json(folder / "modules.json", [*modules, {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}])


_BY_FIRST = changed("1_Pooling/config.json", pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (pickled, r"weights are pickles \(pytorch_model.bin\)"),
        (cut_short, "The weights cannot be read"),
        (lambda folder: without(folder, "model.safetensors"), "holds no model.safetensors"),
        (lambda folder: without(folder, "config.json"), "holds no config.json"),
        (lambda folder: without(folder, "tokenizer.json"), "holds no tokenizer.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json of the model cannot be read"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "The encoder cannot be read"),
        (changed("config.json", architectures=["LlamaForCausalLM"]), r"writes text \(LlamaForCausalLM\)"),
        (changed("config.json", auto_map={"AutoModel": "code.Model"}), "needs code of its own, which is not run"),
        (_BY_FIRST, "pools by cls_token, not by the mean"),
        (changed("1_Pooling/config.json", pooling_mode_max_tokens=True), "pools by mean_tokens, max_tokens"),
        (changed("1_Pooling/config.json", pooling_mode="lasttoken"), "pools by lasttoken"),
        (dense, "a layer 'Dense' behind its encoder"),
    ],
)
def test_a_folder_that_is_no_such_model_is_refused(
    encoder_model: Path, tmp_path: Path, spoil: Callable[[Path], None], what: str
) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(encoder_model, folder)
    spoil(folder)
    with pytest.raises(SpecError, match=what) as refused:
        open_encoder(folder)
    assert refused.value.where is not None
    assert refused.value.where.startswith(f"curate.semantic_model: {folder}")
    assert "model2vec" in refused.value.fix


def test_a_missing_folder_and_a_spoiled_static_model_are_refused(static_model: Path, tmp_path: Path) -> None:
    import shutil

    with pytest.raises(SpecError, match="There is no folder with a model"):
        open_encoder(tmp_path / "minishlab" / "potion-base-8M")
    folder = tmp_path / "static"
    shutil.copytree(static_model, folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(SpecError, match="The model2vec model cannot be read"):
        open_encoder(folder)


# Measured on 402 paraphrases among 2,008 real complaints: recall 0.66, precision at least 0.84 (the rest are real
# complaints that repeat each other).
MINILM_RECALL, MINILM_PRECISION = 0.6, 0.8


@pytest.mark.slow
def test_a_real_encoder_on_planted_paraphrases() -> None:
    from bench.data.semantics import plant
    from bench.data.static_model import PACKAGE, minilm_folder

    folder = minilm_folder()
    if folder is None:
        pytest.skip(f"needs {PACKAGE}")
    texts, same = plant()
    threshold = semantic.ADVISED_THRESHOLD["encoder"]
    pairs = find_semantic_pairs(again(texts), str(folder), threshold, len(texts))
    right = sum(same.get(pair.other) == pair.one for pair in pairs)
    assert right / len(same) >= MINILM_RECALL
    assert right / len(pairs) >= MINILM_PRECISION
