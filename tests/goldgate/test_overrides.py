"""`goldgate override`: a person's word in place of a verdict, kept wherever somebody will look for it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from goldgate import cli
from goldgate.config import load_spec
from goldgate.overrides import (
    answer,
    check_asks,
    check_same_candidate,
    force_promotion,
    open_run_folder,
    override_of,
    set_baseline,
)
from tasks.contracts.errors import GoldenSetError, LedgerError, ModelError, RegistryError, SpecError, StoreError
from tasks.contracts.prompt import base_prompt, tuned_prompt
from tasks.contracts.references import Approval
from tasks.contracts.spec import Policy, PromptKind, RetrainSpec
from tasks.data.golden import freeze
from tasks.data.steps import ingest_dataset
from tasks.gate.ledger import Ledger, ledger_url
from tasks.registry.champion import find_champion
from tasks.registry.versions import status
from tasks.store import Store
from tests.toys import LABELS, toy_rows, write_jsonl

WORD = override_of("Ada", "it has run in production since spring")


@pytest.fixture(scope="module", autouse=True)
def _nothing_from_outside() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        for variable in ("MLFLOW_TRACKING_URI", "GOLDGATE_LEDGER", "PREFECT_API_URL", "GOLDGATE_STORE"):
            patched.delenv(variable, raising=False)
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration over toy rows, with its golden set frozen. Freezing takes seconds, so it is done once."""
    folder = tmp_path_factory.mktemp("overrides")
    write_jsonl(folder / "rows.jsonl", toy_rows(120, seed=1))
    path = folder / "tickets.yaml"
    record = {
        "name": "tickets",
        "task": {"kind": "classify", "instruction": "Which team?", "labels": list(LABELS)},
        "data": {"source": "rows.jsonl"},
        "golden": {"path": "golden", "items": 40},
        "base_model": "unused",
        "execution": {"store": str(folder / "store")},
    }
    path.write_text(yaml.safe_dump(record))
    freeze(load_spec(path))
    return path


@pytest.fixture
def spec(config: Path, request: pytest.FixtureRequest) -> RetrainSpec:
    """The specification, under a name of the test's own."""
    name = request.node.name.replace("_", "-").split("[")[0][:60]
    return load_spec(config).model_copy(update={"name": name})


def decisions(spec: RetrainSpec) -> list[tuple[str, str, str, str | None]]:
    with Ledger.open(ledger_url(spec.execution)) as ledger:
        return [(one.kind.value, one.by, one.model, one.page) for one in ledger.decisions(spec.name)]


# -- a baseline -----------------------------------------------------------------------------------------------------


def test_a_baseline_is_registered_and_recorded_once(spec: RetrainSpec, tiny_model: Path, tmp_path: Path) -> None:
    first = set_baseline(spec, str(tiny_model), WORD)
    assert set_baseline(spec, str(tiny_model), WORD) == first
    page = json.loads((Path(spec.golden.path) / "golden.json").read_text())["digest"]
    assert decisions(spec) == [("first_baseline", "Ada", first.registered.digest, page)]
    champion = find_champion(spec.name, spec.execution)
    assert champion is not None
    assert champion.prompt == tuned_prompt(spec.task)

    other = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    settings = json.loads((other / "generation_config.json").read_text())
    (other / "generation_config.json").write_text(json.dumps(settings | {"temperature": 0.5, "do_sample": True}))
    (other / "modeling_own.py").write_text("import os")
    second = set_baseline(spec, str(other), WORD, PromptKind.BASE)
    assert (second.registered.version, second.registered.previous_version) == ("2", "1")
    assert [kind for kind, *_ in decisions(spec)] == ["first_baseline", "re_baseline"]
    champion = find_champion(spec.name, spec.execution)
    assert champion is not None
    assert champion.prompt == base_prompt(spec.task)
    store = Store(spec.execution.store)
    copied = [path.name for one in store.list("base_model") for path in store.files(one).rglob("*")]
    assert "modeling_own.py" not in copied  # code does not come along

    # Back to the first, by its name: asked as it was.
    third = set_baseline(spec, f"models:/{spec.name}/1", WORD)
    assert (third.registered.version, third.registered.digest) == ("3", first.registered.digest)
    champion = find_champion(spec.name, spec.execution)
    assert champion is not None
    assert champion.prompt == tuned_prompt(spec.task)


def test_a_record_that_a_killed_call_did_not_write_is_made_up_for(
    spec: RetrainSpec, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "record_decision", killed)
        with pytest.raises(KeyboardInterrupt):
            set_baseline(spec, str(tiny_model), WORD)
    assert decisions(spec) == []
    set_baseline(spec, str(tiny_model), WORD)
    assert [kind for kind, *_ in decisions(spec)] == ["first_baseline"]


def test_what_cannot_be_recorded_is_not_done(spec: RetrainSpec, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    nowhere = spec.model_copy(
        update={"execution": spec.execution.model_copy(update={"ledger": str(tmp_path / "file" / "ledger.db")})}
    )
    with pytest.raises(LedgerError):
        set_baseline(nowhere, str(tiny_model), WORD)
    assert status(spec.name, spec.execution).versions == 0


def test_what_is_no_model_here_is_refused(spec: RetrainSpec, tmp_path: Path) -> None:
    for model, said in (("openai:gpt", "behind a server"), (str(tmp_path / "none"), "No transformers model is there")):
        evaluated = spec.model_copy(
            update={"evaluate": spec.evaluate.model_copy(update={"engine": "http://127.0.0.1:9/v1"})}
        )
        with pytest.raises(ModelError, match=said):
            set_baseline(evaluated, model, WORD)
    assert decisions(spec) == []


def test_a_golden_set_must_be_there(spec: RetrainSpec, tiny_model: Path, tmp_path: Path) -> None:
    bare = spec.model_copy(update={"golden": spec.golden.model_copy(update={"path": str(tmp_path)})})
    with pytest.raises(GoldenSetError, match="not frozen yet"):
        set_baseline(bare, str(tiny_model), WORD)


def test_a_word_without_a_reason_is_none() -> None:
    with pytest.raises(SpecError, match="reason: String should have at least 10 characters"):
        override_of("Ada", "because")
    with pytest.raises(SpecError, match="by: "):
        override_of("", "it has run in production since spring")


# -- a promotion ----------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(spec: RetrainSpec, tmp_path: Path) -> Path:
    """A run folder, and in the store what the run has read and made."""

    def make(folder: Path) -> Mapping[str, Any]:
        (folder / "merged.txt").write_text(spec.name)
        return {"merged_digest": "d" * 64}

    raw = ingest_dataset.fn(spec)
    Store(spec.execution.store).produce("train", 1, {"name": spec.name}, {}, make)
    record = {
        "name": spec.name,
        "verdict": "reject",
        "candidate": {"digest": "d" * 64, "label": "candidate dddddddd"},
        "registered": None,
        "digests": {"raw_data": raw.digest},
        "spec": spec.model_dump(mode="json"),
    }
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "verdict.json").write_text(json.dumps(record))
    return folder


def change(folder: Path, **fields: Any) -> None:
    path = folder / "verdict.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_run_folder_says_what_it_ran(finished: Path, spec: RetrainSpec) -> None:
    run = open_run_folder(str(finished) + "/")
    assert (run.spec, run.candidate, run.verdict) == (spec, "d" * 64, "reject")
    check_same_candidate(run)


def test_what_is_no_run_folder_is_named(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot be read: No such file"):
        open_run_folder(str(tmp_path / "none"))
    change(finished, registered={"version": "4"})
    with pytest.raises(RegistryError, match="has registered its candidate already: version 4"):
        open_run_folder(str(finished))
    change(finished, registered=None, spec={"name": "Bad Name"})
    with pytest.raises(SpecError, match=r"spec\.name"):
        open_run_folder(str(finished))
    record = json.loads((finished / "verdict.json").read_text())
    del record["spec"]
    (finished / "verdict.json").write_text(json.dumps(record))
    with pytest.raises(SpecError, match="lacks 'spec'; a run of an older version"):
        open_run_folder(str(finished))
    (finished / "verdict.json").write_text("{")
    with pytest.raises(SpecError, match="record of the run cannot be read"):
        open_run_folder(str(finished))


def test_another_candidate_than_the_one_meant_is_not_promoted(finished: Path, spec: RetrainSpec) -> None:
    change(finished, candidate={"digest": "e" * 64, "label": "x"})
    with pytest.raises(RegistryError, match="candidate eeeeeeee is no longer in the store"):
        check_same_candidate(open_run_folder(str(finished)))


def test_data_that_has_changed_would_make_another_candidate(
    finished: Path, spec: RetrainSpec, config: Path, tmp_path: Path
) -> None:
    other = write_jsonl(tmp_path / "rows.jsonl", toy_rows(121, seed=1))
    changed = spec.model_copy(update={"data": spec.data.model_copy(update={"source": str(other)})})
    change(finished, spec=changed.model_dump(mode="json"))
    with pytest.raises(RegistryError, match="data is not what it was in this run"):
        check_same_candidate(open_run_folder(str(finished)))


def test_a_changed_candidate_is_not_promoted(finished: Path, spec: RetrainSpec) -> None:
    store = Store(spec.execution.store)
    (trained,) = [one for one in store.list("train") if one.manifest.config == {"name": spec.name}]
    others = [one for one in store.list("train") if one.uri != trained.uri]
    for one in others:
        shutil.rmtree(one.uri)
    (store.files(trained) / "merged.txt").write_text("changed")
    with pytest.raises(StoreError, match="was changed"):
        check_same_candidate(open_run_folder(str(finished)))


def test_the_flow_runs_with_the_persons_word(
    finished: Path, spec: RetrainSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    import flows.retrain

    asked: dict[str, Any] = {}

    class Ended:
        def result(self) -> str:
            return "no result"

    def retrain(given: RetrainSpec, **options: Any) -> Ended:
        asked.update(options, spec=given)
        return Ended()

    monkeypatch.setattr(flows.retrain, "retrain", retrain)
    run = open_run_folder(str(finished))
    with pytest.raises(TypeError, match="not a RunResult"):
        force_promotion(run, WORD)
    meant = WORD.model_copy(update={"candidate": "d" * 64})  # the flow refuses any other
    assert asked == {"spec": spec, "override": meant, "approval": None, "return_state": True}

    with pytest.raises(TypeError, match="not a RunResult"):
        answer(run, approve=False, by="Ada", comment="not before May")
    said = Approval(approve=False, by="Ada", comment="not before May", candidate="d" * 64)
    assert asked == {"spec": spec, "override": None, "approval": said, "return_state": True}
    with pytest.raises(SpecError, match="comment: String should have at least 1 character"):
        answer(run, approve=True, by="Ada", comment="")


def test_only_a_promotion_that_waits_can_be_approved(finished: Path, spec: RetrainSpec) -> None:
    with pytest.raises(SpecError, match="nothing to approve: the verdict on candidate dddddddd is REJECT"):
        check_asks(open_run_folder(str(finished)))
    change(finished, verdict="promote")
    with pytest.raises(SpecError, match="this run's policy asks nobody"):
        check_asks(open_run_folder(str(finished)))
    asking = spec.model_copy(update={"policy": Policy(approval_hours=1)})
    change(finished, spec=asking.model_dump(mode="json"))
    check_asks(open_run_folder(str(finished)))


# -- the commands ---------------------------------------------------------------------------------------------------


def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["goldgate", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_the_commands_say_what_they_did(
    config: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = load_spec(config).execution.store
    code, out, err = call(
        monkeypatch, capsys, "override", "baseline", config, tiny_model, "--by", "Ada", "--reason", WORD.reason,
        "--set", "name=spoken",
    )  # fmt: skip
    assert code == 0, err
    assert "spoken: version 1 is champion, set as first baseline, without a verdict, by Ada on" in out

    code, out, err = call(monkeypatch, capsys, "status", "--store", store)
    assert code == 0, err
    assert "NO VERDICT: Set as first baseline, without a verdict, by Ada on" in out

    code, out, err = call(monkeypatch, capsys, "verify", "models:/spoken@champion", "--store", store)
    assert code == 1
    assert "FAILED" in out
    assert "There is no verdict" in out
    code, out, err = call(monkeypatch, capsys, "verify", "models:/spoken@champion", "--store", store, "--json")
    assert code == 1
    assert json.loads(out)["holds"] is False

    code, out, err = call(
        monkeypatch, capsys, "override", "baseline", config, tiny_model, "--by", "Ada", "--reason", "so"
    )
    assert code == 1
    assert "reason: String should have at least 10 characters" in err
    code, out, err = call(monkeypatch, capsys, "override", "promote", store, "--by", "Ada", "--reason", WORD.reason)
    assert code == 1
    assert "to fix: give the folder that `goldgate run` printed last" in err
