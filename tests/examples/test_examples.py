"""What the README and the examples tell people to write is what the program takes."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from goldgate.cli import app
from goldgate.config import load_spec
from tasks.contracts.references import Outcome
from tasks.contracts.spec import Objective, Policy, RetrainSpec
from tasks.data.golden import open_golden
from tasks.gate.before import check_before
from tasks.store import Store
from tests.toys import write_jsonl

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = ("complaints", "prices")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^[ ]*```{language}\n(.*?)^[ ]*```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_passes_all_that_is_checked_before_compute(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("GOLDGATE_LEDGER", "GOLDGATE_SIGNING_KEY"):
        monkeypatch.delenv(variable, raising=False)
    spec = load_spec(ROOT / "examples" / name / f"{name}.yaml", [f"execution.store={tmp_path}"])
    golden = open_golden(spec.evaluation())
    assert golden.items == spec.golden.items
    said = check_before(Store(spec.execution.store), golden, spec)
    assert said == "a new candidate is look 1 at this golden set, at 2.5 % (alpha spending)"


def test_shuffled_complaints_keep_their_texts_and_lose_their_labels(tmp_path: Path) -> None:
    folder = ROOT / "examples" / "complaints"
    shuffle = runpy.run_path(str(folder / "shuffle_labels.py"))["shuffle_labels"]
    outs = [tmp_path / "one" / "out.jsonl", tmp_path / "two.jsonl"]
    counts = [shuffle(folder / "complaints.jsonl", out) for out in outs]
    assert outs[0].read_bytes() == outs[1].read_bytes(), "always the same"
    before, after = (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in (folder / "complaints.jsonl", outs[0])
    )
    assert counts == [len(before)] * 2
    assert [row | {"label": ""} for row in before] == [row | {"label": ""} for row in after]
    assert sorted(row["label"] for row in before) == sorted(row["label"] for row in after)
    same = sum(one["label"] == other["label"] for one, other in zip(before, after, strict=True))
    assert same / len(before) < 0.5


def test_every_configuration_of_the_readme_is_valid() -> None:
    found = [yaml.safe_load(block) for block in blocks("yaml")]
    specs = [record for record in found if "task" in record]
    policies = [record.get("policy", record) for record in found if "task" not in record]
    assert len(specs) == 1
    assert len(policies) == 2
    for record in specs:
        RetrainSpec.model_validate(record)
    for record in policies:
        policy = Policy.model_validate(record)
        assert policy.guards
        assert policy.objective is Objective.SUPERIOR


def test_every_command_of_the_readme_is_there() -> None:
    """The first words of each `goldgate …` are a command, and each option behind it is one of its options."""
    command = get_command(app)
    calls = re.findall(r"^\s*goldgate ([^#\n]+)", README, re.MULTILINE) + re.findall(r"`goldgate ([^`]+)`", README)
    assert len(calls) > 10
    for call in calls:
        words, at, named = call.split(), command, []
        while words and hasattr(at, "commands") and words[0] in at.commands:
            named.append(words[0])
            at = at.commands[words.pop(0)]
        if named == ["gate"]:
            at = at.commands["judge"]
        assert named, call
        assert not hasattr(at, "commands") or not words, call
        options = {option for parameter in at.params for option in parameter.opts}
        for word in words:
            assert not word.startswith("--") or word in options, f"{call}: {word}"


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On files like those that the README shows."""
    shown = [json.loads(line) for line in README.splitlines() if line.startswith('{"id"')]
    assert [row.keys() for row in shown] == [{"id", "score", "group", "slice"}] * 2
    rows = [shown[n % 2] | {"id": f"ticket-{n:03d}", "group": f"customer-{n // 2}"} for n in range(120)]
    (tmp_path / "evals").mkdir()
    write_jsonl(tmp_path / "evals" / "main.jsonl", [row | {"score": int(n % 3 == 0)} for n, row in enumerate(rows)])
    write_jsonl(tmp_path / "candidate.jsonl", [row | {"score": int(n % 3 < 2)} for n, row in enumerate(rows)])
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    names: dict[str, object] = {}
    exec(code, names)
    verdict = names["verdict"]
    assert getattr(verdict, "outcome", None) is Outcome.PROMOTE
    assert getattr(verdict, "groups", None) == 60
