"""A champion that a person sets without a verdict."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tasks.contracts.errors import ModelError, RegistryError
from tasks.contracts.prompt import base_prompt, tuned_prompt
from tasks.contracts.references import SystemUnderTest, TrainedModelRef
from tasks.contracts.spec import Override
from tasks.registry.baseline import set_baseline
from tasks.registry.champion import find_champion, find_opponent, find_release
from tasks.registry.register import rollback
from tasks.registry.steps import find_system_to_beat
from tasks.registry.versions import BaselineKind, aliases_of, status
from tasks.store import digest_folder
from tasks.tracking import connect, model_folder, registered_files
from tests.registry.workshop import Killed, Killer, Workshop

WORD = Override(by="Ada", reason="it has run in production since spring")


def system(workshop: Workshop, model: str | TrainedModelRef, name: str) -> SystemUnderTest:
    """A model as it will be asked, by folder, artefact or name."""
    uri = model if isinstance(model, str) else f"{model.uri}#merged"
    return SystemUnderTest(
        uri=uri, digest=digest_folder(model_folder(uri, workshop.execution)),
        prompt=tuned_prompt(workshop.spec(name).task), role="other", label=uri,
    )  # fmt: skip


def test_first_baseline_then_another_then_back(workshop: Workshop, name: str) -> None:
    asked = workshop.spec(name).evaluation()
    first = set_baseline(asked, system(workshop, str(workshop.model), name), WORD)
    assert (first.registered.version, first.registered.alias, first.registered.previous_version) == (
        "1", "champion", None,
    )  # fmt: skip
    assert first.registered.digest == digest_folder(workshop.model)
    assert (first.release.kind, first.release.by, first.release.reason) == (
        BaselineKind.FIRST_BASELINE, "Ada", WORD.reason,
    )  # fmt: skip
    version = connect(workshop.execution).get_model_version(name, "1")
    assert json.loads(version.tags["goldgate.release"])["kind"] == "first_baseline"
    assert "goldgate.verdict" not in version.tags
    assert version.description.startswith("**NO VERDICT.** Set as first baseline, without a verdict, by Ada on ")

    one = workshop.trained("one")
    second = set_baseline(asked, system(workshop, one, name), WORD)
    assert (second.registered.version, second.registered.previous_version) == ("2", "1")
    assert second.release.kind is BaselineKind.RE_BASELINE
    champion = find_champion(name, workshop.execution)
    assert champion is not None
    assert (champion.digest, champion.prompt) == (one.merged_digest, tuned_prompt(asked.task))
    assert find_release(champion, workshop.execution) == second.release
    seen = status(name, workshop.execution).champion
    assert seen is not None
    assert seen.outcome is None
    assert seen.headline().startswith("NO VERDICT: Set as new baseline, without a verdict, by Ada on ")
    assert seen.headline().endswith(f": {WORD.reason}.")
    assert sorted(registered_files(f"models:/{name}/2", workshop.execution).artifacts) == ["model", "task"]

    assert rollback(name, workshop.execution, "the old one was better").version == "1"
    back = find_champion(name, workshop.execution)
    assert back is not None
    assert back.digest == first.registered.digest


def test_a_candidate_is_compared_with_a_baseline_and_may_replace_it(workshop: Workshop, name: str) -> None:
    one, two = workshop.trained("one"), workshop.trained("two")
    spec = workshop.spec(name)
    set_baseline(spec.evaluation(), system(workshop, one, name), WORD)
    opponent = find_opponent(name, two, workshop.execution).system
    assert opponent is not None
    assert (opponent.digest, opponent.role) == (one.merged_digest, "champion")
    registered = workshop.register(workshop.verdict(two, one, opponent=opponent), two, spec)
    assert (registered.version, registered.previous_version) == ("2", "1")


def test_a_baseline_trained_again_meets_itself(workshop: Workshop, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("tasks.registry.steps.say_done", lambda step, summary, *, reused: said.append(summary))
    one = workshop.trained("one")
    set_baseline(workshop.spec(name).evaluation(), system(workshop, one, name), WORD)
    opponent, candidate_is = find_opponent(name, one, workshop.execution)
    assert opponent is not None
    assert (opponent.digest, opponent.uri) == (one.merged_digest, f"models:/{name}/1")
    assert candidate_is == "champion v1"
    assert find_system_to_beat.fn(one, workshop.spec(name)) == opponent
    assert said == ["the candidate is champion v1 already, set without a verdict; compared with itself"]


def test_a_baseline_from_the_registry(workshop: Workshop, name: str) -> None:
    one, two = workshop.trained("one"), workshop.trained("two")
    spec = workshop.spec(name)
    workshop.register(workshop.verdict(one), one, spec)
    workshop.register(workshop.verdict(two, one), two, spec)
    again = set_baseline(spec.evaluation(), system(workshop, f"models:/{name}/1", name), WORD)
    assert (again.registered.version, again.registered.previous_version) == ("3", "2")
    assert again.registered.digest == one.merged_digest


def test_todays_champion_keeps_its_verdict(workshop: Workshop, name: str) -> None:
    one = workshop.trained("one")
    spec = workshop.spec(name)
    verdict = workshop.verdict(one)
    workshop.register(verdict, one, spec)
    same = system(workshop, one, name).model_copy(update={"prompt": verdict.verdict.candidate.prompt})
    with pytest.raises(RegistryError, match="champion already: version 1, asked in the same way"):
        set_baseline(spec.evaluation(), same, WORD)
    asked_otherwise = same.model_copy(update={"prompt": base_prompt(spec.task)})
    assert set_baseline(spec.evaluation(), asked_otherwise, WORD).registered.version == "2"


def test_a_champion_that_was_damaged_can_be_set_anew(workshop: Workshop, name: str) -> None:
    one = workshop.trained("one")
    spec = workshop.spec(name)
    set_baseline(spec.evaluation(), system(workshop, one, name), WORD)
    (model_folder(f"models:/{name}/1", workshop.execution) / "note.txt").write_text("oNe")
    other = Override(by="Ada", reason="the disk lost a byte of it")
    assert set_baseline(spec.evaluation(), system(workshop, one, name), other).registered.version == "2"


def test_the_same_word_twice_is_one_version_and_later_another(workshop: Workshop, name: str) -> None:
    one, two = workshop.trained("one"), workshop.trained("two")
    asked = workshop.spec(name).evaluation()
    first = set_baseline(asked, system(workshop, one, name), WORD)
    assert set_baseline(asked, system(workshop, one, name), WORD) == first
    set_baseline(asked, system(workshop, two, name), WORD)
    third = set_baseline(asked, system(workshop, one, name), WORD)
    assert (third.registered.version, third.registered.previous_version) == ("3", "2")
    assert third.release.kind is BaselineKind.RE_BASELINE
    rollback(name, workshop.execution, "wrong on refunds")
    assert set_baseline(asked, system(workshop, one, name), WORD).registered.version == "4"


def test_weights_that_can_run_code_are_refused(workshop: Workshop, name: str, tmp_path: Path) -> None:
    folder = shutil.copytree(workshop.model, tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        set_baseline(workshop.spec(name).evaluation(), system(workshop, str(folder), name), WORD)
    assert status(name, workshop.execution).versions == 0


def test_files_that_change_meanwhile_are_refused(workshop: Workshop, name: str, tmp_path: Path) -> None:
    folder = shutil.copytree(workshop.model, tmp_path / "changing")
    asked = system(workshop, str(folder), name)
    (folder / "note.txt").write_text("new")
    with pytest.raises(RegistryError, match=f"{asked.digest} was handed over"):
        set_baseline(workshop.spec(name).evaluation(), asked, WORD)


def test_killed_anywhere_while_setting_a_baseline(workshop: Workshop) -> None:
    one, two = workshop.trained("one"), workshop.trained("two")

    def set_(name: str, model: TrainedModelRef) -> str:
        asked = workshop.spec(name).evaluation()
        return set_baseline(asked, system(workshop, model, name), WORD).registered.version

    with pytest.MonkeyPatch.context() as patched:
        set_("base-whole", one)
        counted = Killer(patched, -1)
        set_("base-whole", two)
    assert counted.calls.count("set_registered_model_alias") == 2
    for done in range(len(counted.calls)):
        name = f"base-killed-{done}"
        set_(name, one)
        with pytest.MonkeyPatch.context() as patched:
            Killer(patched, done)
            with pytest.raises(Killed):
                set_(name, two)
        assert find_champion(name, workshop.execution) is not None
        assert set_(name, two) == "2", f"killed before {counted.calls[done]}"
        after = status(name, workshop.execution)
        assert after.versions == 2, f"killed before {counted.calls[done]}"
        assert after.champion is not None
        assert after.champion.release is not None
        assert after.champion.release.kind is BaselineKind.RE_BASELINE
        assert aliases_of(connect(workshop.execution), name) == {"champion": "2", "previous": "1"}
        assert digest_folder(model_folder(f"models:/{name}@champion", workshop.execution)) == two.merged_digest
