"""Where base models come from, and which are refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks.contracts.errors import ModelError
from tasks.contracts.progress import Progress, ignore_progress
from tasks.store import digest_folder
from tasks.training.base_model import (
    carries_code,
    check_answers_writable,
    check_instruction_rendered,
    check_weights,
    convert,
    resolve,
)
from tests.tiny import CHATML


def test_folder_is_named_by_its_bytes_and_copied_whole(tiny_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(tiny_model, copy)
    source, other = resolve(str(tiny_model)), resolve(str(copy))
    assert source.digest == other.digest == digest_folder(tiny_model)
    (copy / "evil.py").write_text("raise SystemExit")
    (copy / "pytorch_model.bin").write_bytes(b"pickle")
    heard: list[Progress] = []
    facts = convert(resolve(str(copy)), tmp_path / "out", heard.append)
    made = {file.name for file in (tmp_path / "out" / "model").iterdir()}
    assert made == {file.name for file in tiny_model.iterdir()}
    assert facts["architecture"] == "LlamaForCausalLM"
    assert facts["context_tokens"] == 512
    assert heard[-1][:2] == (3, 3)


def test_changed_byte_changes_the_digest(tiny_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    assert resolve(str(copy)).digest != resolve(str(tiny_model)).digest


@pytest.mark.parametrize(
    ("uri", "what", "fix"),
    [
        ("nowhere", "no such folder", "base_model"),
        ("gguf:nowhere.gguf", "no such file", "base_model"),
        ("gguf:pkg:not_installed_pkg/a.gguf", "package not_installed_pkg is not installed", "pip install"),
        ("gguf:pkg:json/missing.gguf", "no such file", "base_model"),
        ("gguf:pkg:json/../x.gguf", "no file of a package", "import name"),
        ("gguf:pkg:json", "no file of a package", "import name"),
        ("openai:some-model", "cannot be trained", "hf:<repo>"),
        ("models:/a@champion", "cannot be trained", "hf:<repo>"),
        ("s3:bucket/model", "cannot be trained", "hf:<repo>"),
        ("hf:nobody/nothing", "cannot be found on the hub", "local folder"),
    ],
)
def test_refused_before_anything_is_loaded(uri: str, what: str, fix: str) -> None:
    with pytest.raises(ModelError) as refusal:
        resolve(uri)
    assert what in refusal.value.what
    assert fix in refusal.value.fix


def test_package_is_found_without_running_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "weights_in_a_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    source = resolve("gguf:pkg:weights_in_a_package/m.gguf")
    assert source.location == str(package / "m.gguf")
    assert "weights_in_a_package" not in sys.modules


def test_no_gguf_inside_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"not a model")
    with pytest.raises(ModelError, match="GGUF file cannot be read"):
        convert(resolve(f"gguf:{tmp_path / 'm.gguf'}"), tmp_path / "out", ignore_progress)


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ((), "no config.json"),
        (("config.json",), "no weights"),
        (("config.json", "pytorch_model.bin"), "weights are pickled (pytorch_model.bin)"),
        (("config.json", "model.pt"), "weights are pickled (model.pt)"),
    ],
)
def test_folder_without_safe_weights_is_refused(tmp_path: Path, files: tuple[str, ...], what: str) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(ModelError) as refusal:
        resolve(str(tmp_path))
    assert what in refusal.value.what


def test_model_without_chat_template_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model, bare)
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template") as refusal:
        convert(resolve(str(bare)), tmp_path / "out", ignore_progress)
    assert "instruction-tuned" in refusal.value.fix


def test_model_that_needs_its_own_code_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    coded = tmp_path / "coded"
    shutil.copytree(tiny_model, coded)
    config = json.loads((coded / "config.json").read_text())
    config |= {"model_type": "its_own", "auto_map": {"AutoConfig": "code.Config"}}
    (coded / "config.json").write_text(json.dumps(config))
    source = resolve(str(coded))
    with pytest.raises(ModelError, match="without the model's own code") as refusal:
        convert(source, tmp_path / "out", ignore_progress)
    assert refusal.value.fix.endswith(f"set `train.trust_remote_code_of` to {source.digest}")


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "its_own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def with_own_code(folder: Path, place: str = "own_code") -> Path:
    """Make a copy of the tiny model one that only its own code can load."""
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "its_own",
        "auto_map": {"AutoConfig": f"{place}.OwnConfig", "AutoModelForCausalLM": f"{place}.OwnModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own_code.py").write_text(OWN_CODE)
    return folder


def test_trusted_code_is_run_and_handed_on(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import dynamic_module_utils

    from tasks.training.frozen_base import load_plain

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])  # to which transformers adds that folder
    coded = with_own_code(shutil.copytree(tiny_model, tmp_path / "coded"))
    source = resolve(str(coded))
    with pytest.raises(ModelError, match="without the model's own code"):
        convert(source, tmp_path / "untrusted", ignore_progress)
    facts = convert(source, tmp_path / "out", ignore_progress, trust_code=True)
    model = tmp_path / "out" / "model"
    assert (facts["runs_its_own_code"], facts["unused_tensors"]) == (True, 0)
    assert carries_code(model)
    assert not carries_code(tiny_model)
    assert type(load_plain(model, "cpu", "auto", trust_code=True)).__name__ == "OwnModel"


def test_trusted_code_must_be_the_models_own(tiny_model: Path, tmp_path: Path) -> None:
    coded = with_own_code(shutil.copytree(tiny_model, tmp_path / "coded"), place="somebody/else--own_code")
    with pytest.raises(ModelError, match=r"code that is not its own \(somebody/else--own_code\.OwnConfig\)"):
        convert(resolve(str(coded)), tmp_path / "out", ignore_progress, trust_code=True)


def test_code_of_a_model_that_transformers_knows_stays_behind(tiny_model: Path, tmp_path: Path) -> None:
    coded = shutil.copytree(tiny_model, tmp_path / "coded")
    config = json.loads((coded / "config.json").read_text()) | {"auto_map": {"AutoModelForCausalLM": "own_code.Own"}}
    (coded / "config.json").write_text(json.dumps(config))
    (coded / "own_code.py").write_text("raise SystemExit")
    facts = convert(resolve(str(coded)), tmp_path / "out", ignore_progress)
    assert facts["runs_its_own_code"] is False


Tensors = dict[str, Any]


def without(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.pop(name)


def narrowed(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: tensors[name][:7].clone()})


def spoiled(name: str, value: float) -> Callable[[Tensors], None]:
    return lambda tensors: tensors[name].view(-1)[3:4].fill_(value)


def rewrite_weights(folder: Path, change: Callable[[Tensors], object]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (
            without("model.layers.1.mlp.up_proj.weight"),
            "1 tensors of the model are missing, and would be made up at random: model.layers.1.mlp.up_proj.weight.",
        ),
        (
            lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers.1." in name],
            "9 tensors of the model are missing, and would be made up at random: "
            "model.layers.1.input_layernorm.weight, model.layers.1.mlp.down_proj.weight, "
            "model.layers.1.mlp.gate_proj.weight, model.layers.1.mlp.up_proj.weight, "
            "model.layers.1.post_attention_layernorm.weight and 4 more.",
        ),
        (
            without("model.embed_tokens.weight"),  # tied: the output layer cannot stand in for it
            "model.embed_tokens.weight",
        ),
        (
            narrowed("model.norm.weight"),
            "1 tensors of the model have another shape than config.json says: model.norm.weight.",
        ),
        (spoiled("model.norm.weight", float("nan")), "The tensor model.norm.weight holds numbers that are not finite"),
        (
            spoiled("model.layers.0.self_attn.q_proj.weight", float("-inf")),
            "The tensor model.layers.0.self_attn.q_proj.weight holds numbers that are not finite",
        ),
    ],
)
def test_weights_that_are_not_all_there_are_refused(
    tiny_model: Path, tmp_path: Path, change: Callable[[Tensors], object], what: str
) -> None:
    broken = shutil.copytree(tiny_model, tmp_path / "broken")
    rewrite_weights(broken, change)
    with pytest.raises(ModelError) as refusal:
        convert(resolve(str(broken)), tmp_path / "out", ignore_progress)
    assert what in refusal.value.what
    assert str(broken) in str(refusal.value.where)


def test_tied_weights_are_none_that_are_missing(tiny_model: Path, tmp_path: Path) -> None:
    """The output layer is in no file: it is the input embedding. Untied, it has to be there."""
    from safetensors import safe_open

    with safe_open(tiny_model / "model.safetensors", "pt") as weights:
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118 - no mapping
    assert convert(resolve(str(tiny_model)), tmp_path / "out", ignore_progress)["unused_tensors"] == 0
    untied = shutil.copytree(tiny_model, tmp_path / "untied")
    config = json.loads((untied / "config.json").read_text()) | {"tie_word_embeddings": False}
    (untied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"1 tensors of the model are missing.*: lm_head.weight"):
        check_weights(untied, "here")


def test_tensors_without_a_place_are_counted(tiny_model: Path, tmp_path: Path) -> None:
    more = shutil.copytree(tiny_model, tmp_path / "more")
    rewrite_weights(more, lambda tensors: tensors.update({"extra.weight": tensors["model.norm.weight"].clone()}))
    assert check_weights(more, "here") == 1


def test_missing_shard_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    sharded = shutil.copytree(tiny_model, tmp_path / "sharded")
    (sharded / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(sharded, max_shard_size="100KB")
    shards = sorted(sharded.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert check_weights(sharded, "here") == 0
    shards[-1].unlink()
    with pytest.raises(ModelError, match="cannot build this model") as refusal:
        check_weights(sharded, "here")
    assert "all its *.safetensors files are there" in refusal.value.fix


def test_quantised_weights_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    packed = shutil.copytree(tiny_model, tmp_path / "packed")
    config = json.loads((packed / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"quantised already \(gptq\)"):
        convert(resolve(str(packed)), tmp_path / "out", ignore_progress)


NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
DROPS_SYSTEM = "{% for message in messages if message['role'] != 'system' %}{{ message['content'] }}{% endfor %}"


class Templated:
    """A tokenizer with another chat template."""

    def __init__(self, tiny_model: Path, template: str) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        self.tokenizer.chat_template = template

    def apply_chat_template(self, *args: Any, **options: Any) -> Any:
        return self.tokenizer.apply_chat_template(*args, **options)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (CHATML, None),
        (NO_SYSTEM + CHATML, "it says 'System role not supported'"),
        (DROPS_SYSTEM, "it leaves out the system message"),
    ],
)
def test_template_must_render_the_instruction(tiny_model: Path, template: str, reason: str | None) -> None:
    tokenizer = Templated(tiny_model, template)
    if reason is None:
        check_instruction_rendered(tokenizer, "here")
        return
    with pytest.raises(ModelError) as refusal:
        check_instruction_rendered(tokenizer, "here")
    assert reason in refusal.value.what
    assert "chat_template.jinja" in refusal.value.fix


def test_model_whose_template_drops_the_instruction_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    silent = shutil.copytree(tiny_model, tmp_path / "silent")
    (silent / "chat_template.jinja").write_text(DROPS_SYSTEM)
    with pytest.raises(ModelError, match="leaves out the system message"):
        convert(resolve(str(silent)), tmp_path / "out", ignore_progress)


def word_tokenizer(**options: Any) -> Any:
    """A tokenizer that knows a few whole words, in lower case."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "<end>": 1, "yes": 2, "no": 3, "_": 4, "-": 5}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split("_", "isolated")
    words.decoder = decoders.Fuse()
    if options.get("lower"):
        words.normalizer = normalizers.Lowercase()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<end>")


@pytest.mark.parametrize(
    ("lower", "answer", "reason"),
    [
        (False, "yes_no", None),
        (False, "", None),
        (False, "yes_perhaps", "the vocabulary lacks a part of it"),
        (False, "yes<end>no", "it holds the special token <end>"),
        (True, "Yes", "the tokenizer would make it 'yes'"),
    ],
)
def test_answer_that_cannot_be_written_is_refused(lower: bool, answer: str, reason: str | None) -> None:
    texts = [("r1", "yes"), ("r2", "yes"), ("r3", answer), ("r4", answer)]
    if reason is None:
        check_answers_writable(word_tokenizer(lower=lower), texts)
        return
    with pytest.raises(ModelError) as refusal:
        check_answers_writable(word_tokenizer(lower=lower), texts)
    assert refusal.value.what == f"The base model cannot write the answer {answer!r}: {reason}."
    assert refusal.value.where == "row r3"


def test_bytes_can_write_any_answer(tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    check_answers_writable(tokenizer, ((str(n), f"{n} €, Ünïcode\n\t 漢字 🙂 ") for n in range(3000)))
