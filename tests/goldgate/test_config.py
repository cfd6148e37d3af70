"""Configurations: paths, overrides, and every way in which a file can be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from goldgate.config import load_spec
from goldgate.distill import load_distillation
from goldgate.sweep import load_sweep
from tasks.contracts.errors import SpecError

GOOD = """\
name: tickets
task:
  kind: classify
  instruction: Which team?
  labels: [billing, support]
data: {source: rows.jsonl}
golden: {path: golden}
base_model: base
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "tickets.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    spec = load_spec(written(tmp_path, GOOD))
    assert spec.data.source == str(tmp_path / "rows.jsonl")
    assert spec.golden.path == str(tmp_path / "golden")
    assert spec.base_model == str(tmp_path / "base")


def test_suites_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    paths = ["suites/a", "../b", "/c", "s3://bucket/d", "~/e"]
    suites = "".join(f"  - {{name: s{number}, path: {path!r}}}\n" for number, path in enumerate(paths))
    spec = load_spec(written(tmp_path, f"{GOOD}suites:\n{suites}"))
    assert [suite.path for suite in spec.suites] == [
        str(tmp_path / "suites/a"),
        str(tmp_path.parent / "b"),
        "/c",
        "s3://bucket/d",
        str(tmp_path / "home/e"),
    ]


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("hf:org/model", "hf:org/model"),
        ("gguf:pkg:package/file.gguf", "gguf:pkg:package/file.gguf"),
        ("gguf:file.gguf", "gguf:{folder}/file.gguf"),
        ("/models/base", "/models/base"),
    ],
)
def test_model_uris(tmp_path: Path, uri: str, expected: str) -> None:
    spec = load_spec(written(tmp_path, GOOD), [f"base_model={uri}"])
    assert spec.base_model == expected.format(folder=tmp_path)


def test_overrides_win_and_reach_nested_fields(tmp_path: Path) -> None:
    spec = load_spec(written(tmp_path, GOOD), ["train.epochs=0.5", "data.text_field=body", "task.labels=[a, b, c]"])
    assert spec.train.epochs == 0.5
    assert spec.data.text_field == "body"
    assert spec.task.labels == ("a", "b", "c")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs", "An override must read key.path=value."),
        ("train.epoch=2", "train.epoch: there is no such field"),
        ("train.epochs=-1", "train.epochs: Input should be greater than 0 (it is -1)"),
        ("name.x=1", "name has no fields of its own."),
        ("nme=1", "nme: there is no such field"),
        ("task.labels=[a, a]", "task: labels must differ from each other"),
        ("base_model=s3:x", "base_model: 's3:x' is no model URI"),
        ("curate.accept_risks={few_rows: short}", "curate.accept_risks.few_rows: String should have at least 10"),
        ("evaluate.engine=ollama", "evaluate.engine: String should match pattern"),
        ("policy.alpha=0", "policy.alpha: Input should be greater than 0 (it is 0)"),
        ("policy.guards=[{metric: exact_match}]", "policy.guards.0: a guard needs a margin or a floor"),
        ("policy.guards=[{margn: 0.1}]", "policy.guards.0.margn: there is no such field; did you mean margin?"),
        ("policy.looks=bonferroni", "policy: declared_looks goes with looks: bonferroni, and bonferroni needs it"),
        (
            "policy.guards=[{suite: general, margin: 0.1}]",
            "policy.guards asks about suites that are not in `suites`: general",
        ),
        ("suites=[{name: a, path: x}, {name: a, path: y}]", "two suites have the same name"),
        ("suites=[{name: A b, path: x}]", "suites.0.name: String should match pattern"),
    ],
)
def test_a_wrong_value_is_named(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(SpecError) as refused:
        load_spec(written(tmp_path, GOOD), [override])
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("text", "what", "where"),
    [
        ("name: [", "The configuration is not YAML", "tickets.yaml:"),
        ("- a\n- b\n", "must be a mapping", "tickets.yaml"),
        ("", "must be a mapping", "tickets.yaml"),
        ("name: tickets\n", "task: Field required", "tickets.yaml"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str, what: str, where: str) -> None:
    with pytest.raises(SpecError) as refused:
        load_spec(written(tmp_path, text))
    assert what in str(refused.value)
    assert where in (refused.value.where or "")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="does not exist") as refused:
        load_spec(tmp_path / "none.yaml")
    assert refused.value.where == str(tmp_path / "none.yaml")


def test_the_store_becomes_absolute_and_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GOLDGATE_STORE", raising=False)
    monkeypatch.chdir(tmp_path)
    assert load_spec(written(tmp_path, GOOD)).execution.store == str(tmp_path / ".goldgate")
    monkeypatch.setenv("GOLDGATE_STORE", str(tmp_path / "elsewhere"))
    assert load_spec(written(tmp_path, GOOD)).execution.store == str(tmp_path / "elsewhere")
    kept = load_spec(written(tmp_path, GOOD), ["execution.store=s3://bucket/x"])
    assert kept.execution.store == "s3://bucket/x"


@pytest.mark.parametrize("kind", ["distill", "sweep"])
def test_a_path_is_relative_to_the_file_that_says_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """`training_from`, and paths under `training`: those of the training's own file stay where that file is."""
    there, elsewhere = tmp_path / "there", tmp_path / "elsewhere"
    for folder in (there, elsewhere):
        folder.mkdir()
    monkeypatch.chdir(elsewhere)
    written(there, f"{GOOD}suites: [{{name: old, path: old}}]\n")
    changes = {"data": {"source": "mine.jsonl"}, "base_model": "gguf:mine.gguf"}
    asked: dict[str, object] = {"training_from": "there/tickets.yaml", "training": changes}
    if kind == "distill":
        asked |= {"teacher": {"url": "http://127.0.0.1:1/v1", "model": "big"}, "relabel": True}
    file = tmp_path / f"{kind}.yaml"
    file.write_text(yaml.safe_dump(asked))
    override = ["training.curate.semantic_model=words"]
    training = (load_distillation(file, override) if kind == "distill" else load_sweep(file, override)).training
    assert training.data.source == str(tmp_path / "mine.jsonl")
    assert training.base_model == f"gguf:{tmp_path}/mine.gguf"
    assert training.curate.semantic_model == str(tmp_path / "words")
    assert training.golden.path == str(there / "golden")
    assert [suite.path for suite in training.suites] == [str(there / "old")]


def test_a_search_may_hold_the_whole_of_its_training(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump({"training": yaml.safe_load(GOOD)}))
    assert load_sweep(file).training == load_spec(written(tmp_path, GOOD))
