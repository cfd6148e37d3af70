"""Who becomes champion, what is refused, and that being killed anywhere changes nothing of the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.contracts.errors import CertificateError, RegistryError, StoreError
from tasks.contracts.references import Outcome, RegisteredModelRef, Release, ReleaseKind, SystemUnderTest
from tasks.contracts.spec import ExecutionSpec
from tasks.registry import register as register_module
from tasks.registry.champion import find_champion, find_opponent, find_release
from tasks.registry.register import register, rollback
from tasks.registry.versions import aliases_of, describe, registered_names, status, version_tags
from tasks.store import Store, digest_folder
from tasks.tracking import connect, model_folder, registered_files
from tests.registry.workshop import BY_VERDICT, FORCED, PROMPT, Killed, Killer, Workshop


def test_first_champion_then_the_next(workshop: Workshop, name: str) -> None:
    spec = workshop.spec(name)
    assert find_champion(name, workshop.execution) is None
    one, two = workshop.trained("one"), workshop.trained("two")

    first = workshop.register(workshop.verdict(one), one, spec)
    assert first == RegisteredModelRef(
        name=name, version="1", alias="champion", digest=one.merged_digest, previous_version=None
    )
    champion = find_champion(name, workshop.execution)
    assert champion is not None
    assert champion.uri == f"models:/{name}/1"
    assert champion.digest == one.merged_digest
    assert (champion.prompt, champion.role, champion.label) == (PROMPT, "champion", "champion v1")

    second = workshop.register(workshop.verdict(two, one), two, spec)
    assert (second.version, second.previous_version) == ("2", "1")
    assert aliases_of(connect(workshop.execution), name) == {"champion": "2", "previous": "1"}


def test_a_champion_run_again_meets_its_old_opponent(workshop: Workshop, name: str) -> None:
    one, two = workshop.trained("one"), workshop.trained("two")
    assert find_opponent(name, one, workshop.execution) == (None, None)
    workshop.register(workshop.verdict(one), one, workshop.spec(name))
    # It was promoted against the base model.
    assert find_opponent(name, one, workshop.execution) == (None, "champion v1")
    opponent = find_opponent(name, two, workshop.execution)
    assert opponent.system is not None
    assert (opponent.system.uri, opponent.candidate_is) == (f"models:/{name}/1", None)
    promoted = workshop.verdict(two, one, opponent=opponent.system)
    workshop.register(promoted, two, workshop.spec(name))
    assert find_opponent(name, two, workshop.execution) == (opponent.system, "champion v2")


def test_tags_say_what_was_decided(workshop: Workshop, name: str) -> None:
    one = workshop.trained("one")
    verdict = workshop.verdict(one)
    workshop.register(verdict, one, workshop.spec(name))
    version = connect(workshop.execution).get_model_version_by_alias(name, "champion")
    assert version.tags["goldgate.merged_digest"] == one.merged_digest
    assert version.tags["goldgate.adapter_digest"] == one.adapter_digest
    assert version.tags["goldgate.fingerprint"] == one.fingerprint
    assert version.tags["goldgate.digest.golden_set"] == "c" * 64
    assert version.tags["goldgate.verdict"] == "promote"
    assert json.loads(version.tags["goldgate.reasons"]) == list(verdict.verdict.reasons)
    assert "| exact_match | 0.390 | 0.610 | +0.220 | +0.100 to +0.340 (95%, n = 100) |" in version.description
    seen = status(name, workshop.execution)
    assert seen.champion is not None
    assert seen.champion.metrics == verdict.verdict.metrics
    assert (seen.champion.version, seen.previous, seen.versions) == ("1", None, 1)
    assert name in registered_names(workshop.execution)


def test_registered_files_are_the_evaluated_bytes(workshop: Workshop, name: str) -> None:
    one = workshop.trained("one")
    workshop.register(workshop.verdict(one), one, workshop.spec(name))
    for uri in (f"models:/{name}/1", f"models:/{name}@champion", f"{one.uri}#merged"):
        assert digest_folder(model_folder(uri, workshop.execution)) == one.merged_digest
    files = registered_files(f"models:/{name}/1", workshop.execution)
    assert digest_folder(files.artifacts["adapter"]) == one.adapter_digest
    requirements = (files.root / "requirements.txt").read_text().split()
    assert {line.split("==")[0] for line in requirements} >= {"mlflow", "torch", "transformers"}
    assert all("==" in line for line in requirements)
    assert not any("goldgate" in line for line in requirements)


def test_registering_twice_adds_nothing(workshop: Workshop, name: str) -> None:
    one = workshop.trained("one")
    verdict = workshop.verdict(one)
    first = workshop.register(verdict, one, workshop.spec(name))
    assert workshop.register(verdict, one, workshop.spec(name)) == first
    assert status(name, workshop.execution).versions == 1


def test_a_certificate_of_another_model_is_refused(workshop: Workshop, name: str) -> None:
    one = workshop.trained("one")
    verdict = workshop.verdict(one)
    other = workshop.certificate(verdict, one, model="e" * 64)
    with pytest.raises(CertificateError, match=rf"certificate is about e{{64}}, this model is {one.merged_digest}"):
        register(verdict, other, one, workshop.spec(name))
    assert status(name, workshop.execution).versions == 0


def test_a_certificate_of_another_verdict_is_refused(workshop: Workshop, name: str) -> None:
    one, two = workshop.trained("one"), workshop.trained("two")
    against_base, against_two = workshop.verdict(one), workshop.verdict(one, two)
    with pytest.raises(CertificateError, match="about another verdict on this model"):
        register(against_base, workshop.certificate(against_two, one), one, workshop.spec(name))
    assert status(name, workshop.execution).versions == 0


def test_a_release_that_the_certificate_does_not_state_is_refused(workshop: Workshop, name: str) -> None:
    one = workshop.trained("one")
    rejected = workshop.verdict(one, outcome=Outcome.REJECT)
    plain = workshop.certificate(rejected, one)  # no gate would sign this
    with pytest.raises(CertificateError, match="not the one that was kept"):
        register(rejected, plain.model_copy(update={"release": FORCED}), one, workshop.spec(name))
    assert status(name, workshop.execution).versions == 0


@pytest.mark.parametrize("kind", [ReleaseKind.DECLINED, ReleaseKind.AWAITING])
def test_what_a_person_did_not_approve_is_refused(workshop: Workshop, name: str, kind: ReleaseKind) -> None:
    one = workshop.trained("one")
    verdict = workshop.verdict(one)
    with pytest.raises(CertificateError, match=f"releases nothing: it is {kind.value}"):
        workshop.register(verdict, one, workshop.spec(name), Release(kind=kind))
    assert status(name, workshop.execution).versions == 0


@pytest.mark.parametrize("outcome", [Outcome.REJECT, Outcome.INCONCLUSIVE])
def test_a_forced_promotion_is_registered_and_says_so(workshop: Workshop, name: str, outcome: Outcome) -> None:
    one, two = workshop.trained("one"), workshop.trained("two")
    spec = workshop.spec(name)
    workshop.register(workshop.verdict(one), one, spec)
    verdict = workshop.verdict(two, one, outcome=outcome)
    registered = workshop.register(verdict, two, spec, FORCED)
    assert (registered.version, registered.previous_version) == ("2", "1")
    version = connect(workshop.execution).get_model_version(name, "2")
    assert json.loads(version.tags["goldgate.release"]) == FORCED.model_dump(mode="json")
    assert version.tags["goldgate.verdict"] == outcome.value
    said = f"FORCED PROMOTION. The verdict was {outcome.value.upper()}.** Forced against its verdict by Ada on 22 Nov"
    assert said in version.description.splitlines()[0]
    seen = status(name, workshop.execution).champion
    assert seen is not None
    assert seen.headline().startswith(
        "FORCED: Forced against its verdict by Ada on 22 November 2026, 14:57 UTC: the old"
    )
    assert f"The verdict was {outcome.value.upper()}: The candidate has 61" in seen.headline()

    # The same run without the person's word changes nothing, and with it again neither.
    with pytest.raises(RegistryError, match="only a promotion is registered"):
        workshop.register(verdict, two, spec)
    assert workshop.register(verdict, two, spec, FORCED) == registered
    opponent = find_opponent(name, two, workshop.execution)
    assert opponent.system is None  # the made-up verdict was reached against a system that was no champion


def test_an_approved_promotion_names_who_approved(workshop: Workshop, name: str) -> None:
    one = workshop.trained("one")
    approved = FORCED.model_copy(update={"kind": ReleaseKind.APPROVED, "reason": "looks\nright \x1b[31m to me"})
    workshop.register(workshop.verdict(one), one, workshop.spec(name), approved)
    seen = status(name, workshop.execution).champion
    assert seen is not None
    assert seen.release is not None
    assert seen.release.sentence().endswith("approved by Ada on 22 November 2026, 14:57 UTC: looks right [31m to me")
    assert seen.headline().endswith("Approved by Ada.")


def test_certificate_look_and_key_are_with_the_version(workshop: Workshop, name: str) -> None:
    one = workshop.trained("one")
    verdict = workshop.verdict(one)
    certificate = workshop.certificate(verdict, one)
    register(verdict, certificate, one, workshop.spec(name))
    files = registered_files(f"models:/{name}@champion", workshop.execution)
    kept = Store(workshop.execution.store)
    source = kept.files(kept.open(certificate.uri))
    assert files.artifacts["certificate"].read_bytes() == (source / "certificate.json").read_bytes()
    assert digest_folder(files.artifacts["evidence"]) == digest_folder(source / "evidence")
    assert files.tags["goldgate.certificate_digest"] == certificate.digest
    assert files.tags["goldgate.key_id"] == certificate.key_id
    seen = status(name, workshop.execution).champion
    assert seen is not None
    assert seen.look == verdict.verdict.look
    assert (
        find_release(
            SystemUnderTest(
                uri=f"models:/{name}/1", digest=one.merged_digest, prompt=PROMPT, role="champion", label="champion v1"
            ),
            workshop.execution,
        )
        == seen.release
    )


def test_a_long_verdict_fits_into_page_and_tags(workshop: Workshop, name: str) -> None:
    one = workshop.trained("one")
    plain = workshop.verdict(one).verdict
    (row,) = plain.metrics
    many = tuple(row.model_copy(update={"slice": f"part {number}"}) for number in range(400))
    decided = plain.model_copy(update={"metrics": (row, *many)})
    page = describe(decided, FORCED)
    assert len(page) <= 5000
    assert "| exact_match | 0.390" in page
    assert "rows that do not fit here" in page
    assert page.endswith("Baseline: base model.")
    tags = version_tags(
        workshop.verdict(one).model_copy(update={"verdict": decided}),
        workshop.certificate(workshop.verdict(one), one), one,
    )  # fmt: skip
    assert max(map(len, tags.values())) <= 100_000
    assert json.loads(tags["goldgate.metrics"])[0]["slice"] is None


def test_numbers_that_are_withheld_are_not_told(workshop: Workshop, name: str) -> None:
    one = workshop.trained("one")
    verdict = workshop.verdict(one)
    silent = verdict.model_copy(update={"verdict": verdict.verdict.model_copy(update={"withheld": True})})
    assert "goldgate.metrics" not in version_tags(silent, workshop.certificate(verdict, one), one)
    assert "exact_match" not in describe(silent.verdict, BY_VERDICT)


ORIGIN = {"provenance": "CFPB,\n2024 | in part", "licence": "CC0-1.0"}


def test_the_models_page_says_where_the_data_come_from(workshop: Workshop, name: str) -> None:
    one, spec = workshop.trained("one"), workshop.spec(name)
    verdict = workshop.verdict(one)
    told = spec.model_copy(update={"data": spec.data.model_copy(update=ORIGIN)})
    register(verdict, workshop.certificate(verdict, one, **ORIGIN), one, told)
    version = connect(workshop.execution).get_model_version_by_alias(name, "champion")
    assert version.tags["goldgate.data_provenance"] == ORIGIN["provenance"]
    assert version.tags["goldgate.data_licence"] == "CC0-1.0"
    assert version.description.endswith(
        "Baseline: base model.\n\nProvenance of the data: CFPB, 2024 | in part\n\nLicence of the data: CC0-1.0"
    )


@pytest.mark.parametrize("said", [{}, ORIGIN, {"provenance": ORIGIN["provenance"]}])
def test_a_certificate_that_says_something_else_of_the_data_is_refused(
    said: dict[str, str], workshop: Workshop, name: str
) -> None:
    one, spec = workshop.trained("one"), workshop.spec(name)
    verdict = workshop.verdict(one)
    other = {"provenance": "elsewhere"} if said else ORIGIN
    asked = spec.model_copy(update={"data": spec.data.model_copy(update=other)})
    with pytest.raises(CertificateError, match="something else of the data's provenance or licence"):
        register(verdict, workshop.certificate(verdict, one, **said), one, asked)
    assert aliases_of(connect(workshop.execution), name) == {}


def test_where_the_data_come_from_is_cut_on_the_page_and_whole_in_the_tags(workshop: Workshop, name: str) -> None:
    one = workshop.trained("one")
    verdict = workshop.verdict(one)
    data = workshop.spec(name).data.model_copy(update={"provenance": "p" * 9_000})
    page = describe(verdict.verdict, BY_VERDICT, data)
    assert "| exact_match |" in page
    assert page.endswith(f"Provenance of the data: {'p' * 499}…")
    tags = version_tags(verdict, workshop.certificate(verdict, one), one, data)
    assert tags["goldgate.data_provenance"] == "p" * 9_000
    assert "goldgate.data_licence" not in tags


@pytest.mark.parametrize("outcome", [Outcome.REJECT, Outcome.INCONCLUSIVE])
def test_only_a_promotion_is_registered(workshop: Workshop, name: str, outcome: Outcome) -> None:
    one = workshop.trained("one")
    with pytest.raises(RegistryError, match=f"verdict is {outcome.value}; only a promotion"):
        workshop.register(workshop.verdict(one, outcome=outcome), one, workshop.spec(name))
    assert status(name, workshop.execution).versions == 0


def test_verdict_on_another_model_is_refused(workshop: Workshop, name: str) -> None:
    one, two = workshop.trained("one"), workshop.trained("two")
    with pytest.raises(RegistryError, match=f"verdict is about {one.merged_digest}, this model is {two.merged_digest}"):
        workshop.register(workshop.verdict(one), two, workshop.spec(name))
    assert status(name, workshop.execution).versions == 0


def test_forged_verdict_is_refused(workshop: Workshop, name: str) -> None:
    one = workshop.trained("one")
    rejected = workshop.verdict(one, outcome=Outcome.REJECT)
    forged = rejected.model_copy(update={"verdict": rejected.verdict.model_copy(update={"outcome": Outcome.PROMOTE})})
    with pytest.raises(RegistryError, match="not the one that was kept"):
        workshop.register(forged, one, workshop.spec(name))


def test_digest_that_the_bytes_do_not_have_is_refused(workshop: Workshop, name: str) -> None:
    one = workshop.trained("one").model_copy(update={"merged_digest": "d" * 64})
    with pytest.raises(RegistryError, match=r"files of merged/ do not have the digest d{64}"):
        workshop.register(workshop.verdict(one), one, workshop.spec(name))


def test_changed_candidate_is_refused(workshop: Workshop, name: str) -> None:
    changed = workshop.trained("changed")
    verdict = workshop.verdict(changed)
    store = Store(workshop.execution.store)
    (store.files(store.open(changed.uri)) / "merged" / "note.txt").write_text("chanGed")
    with pytest.raises(StoreError, match=r"note\.txt"):
        workshop.register(verdict, changed, workshop.spec(name))
    assert status(name, workshop.execution).versions == 0


def test_verdict_against_yesterdays_champion_is_refused(workshop: Workshop, name: str) -> None:
    one, two, three = (workshop.trained(marker) for marker in ("one", "two", "three"))
    spec = workshop.spec(name)
    workshop.register(workshop.verdict(one), one, spec)
    workshop.register(workshop.verdict(two, one), two, spec)
    with pytest.raises(RegistryError, match="version 2 is champion now"):
        workshop.register(workshop.verdict(three, one), three, spec)
    with pytest.raises(RegistryError, match="version 2 is champion now"):  # nor does an old promotion come back
        workshop.register(workshop.verdict(one), one, spec)
    assert aliases_of(connect(workshop.execution), name) == {"champion": "2", "previous": "1"}


def test_who_was_promoted_during_the_upload_is_not_replaced_unseen(
    workshop: Workshop, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, three = (workshop.trained(marker) for marker in ("one", "two", "three"))
    spec = workshop.spec(name)
    workshop.register(workshop.verdict(one), one, spec)
    ours, theirs = workshop.verdict(two, one), workshop.verdict(three, one)  # both were compared with version 1
    upload = register_module.add_version

    def add_while_another_is_promoted(*args: Any, **kwargs: Any) -> Any:
        made = upload(*args, **kwargs)
        monkeypatch.setattr(register_module, "add_version", upload)
        workshop.register(theirs, three, spec)
        return made

    monkeypatch.setattr(register_module, "add_version", add_while_another_is_promoted)
    refusals = []
    for waits in (False, False, True):  # called again, and for a rollout: in the same words
        with pytest.raises(RegistryError, match="version 3 is champion now") as refused:
            register(ours, workshop.certificate(ours, two), two, spec, waits=waits)
        refusals.append(str(refused.value))
        assert aliases_of(connect(workshop.execution), name) == {"champion": "3", "previous": "1"}
    assert len(set(refusals)) == 1
    assert status(name, workshop.execution).versions == 3, "uploaded once, and it stays without an alias"
    assert workshop.register(workshop.verdict(two, three), two, spec).previous_version == "3", "compared with that one"


def test_champion_with_changed_bytes_is_refused(workshop: Workshop, name: str) -> None:
    one = workshop.trained("one")
    workshop.register(workshop.verdict(one), one, workshop.spec(name))
    folder = model_folder(f"models:/{name}/1", workshop.execution)
    (folder / "note.txt").write_text("oNe")
    with pytest.raises(RegistryError, match=rf"files of models:/{name}/1 are not those that were registered"):
        find_champion(name, workshop.execution)


def test_champion_of_unknown_origin_is_refused(workshop: Workshop, name: str) -> None:
    one = workshop.trained("one")
    workshop.register(workshop.verdict(one), one, workshop.spec(name))
    connect(workshop.execution).delete_model_version_tag(name, "1", "goldgate.merged_digest")
    with pytest.raises(RegistryError, match=r"has no tag goldgate\.merged_digest"):
        find_champion(name, workshop.execution)


def test_rollback_swaps_and_keeps_the_reason(workshop: Workshop, name: str) -> None:
    one, two = workshop.trained("one"), workshop.trained("two")
    spec = workshop.spec(name)
    workshop.register(workshop.verdict(one), one, spec)
    with pytest.raises(RegistryError, match="no previous version to go back to"):
        rollback(name, workshop.execution, "too slow")
    promoted = workshop.verdict(two, one)
    workshop.register(promoted, two, spec)

    back = rollback(name, workshop.execution, "wrong on refunds")
    assert (back.version, back.previous_version, back.digest) == ("1", "2", one.merged_digest)
    after = status(name, workshop.execution)
    assert after.champion is not None
    assert after.previous is not None
    assert (after.champion.version, after.previous.version) == ("1", "2")
    assert after.previous.rolled_back is not None
    assert (after.previous.rolled_back.reason, after.previous.rolled_back.to_version) == ("wrong on refunds", "1")

    with pytest.raises(RegistryError, match="was version 2 and was rolled back: wrong on refunds"):
        workshop.register(promoted, two, spec)  # a scheduled run must not undo what a person did

    assert rollback(name, workshop.execution, "it was the data").version == "2"
    again = status(name, workshop.execution)
    assert again.champion is not None
    assert (again.champion.version, again.champion.rolled_back) == ("2", None)


def test_rollback_to_changed_bytes_is_refused(workshop: Workshop, name: str) -> None:
    one, two = workshop.trained("one"), workshop.trained("two")
    workshop.register(workshop.verdict(one), one, workshop.spec(name))
    workshop.register(workshop.verdict(two, one), two, workshop.spec(name))
    (model_folder(f"models:/{name}/1", workshop.execution) / "note.txt").unlink()
    with pytest.raises(RegistryError, match="not those that were registered"):
        rollback(name, workshop.execution, "wrong on refunds")
    assert aliases_of(connect(workshop.execution), name) == {"champion": "2", "previous": "1"}


def test_killed_anywhere_while_registering(workshop: Workshop) -> None:
    one, two = workshop.trained("one"), workshop.trained("two")
    first, second = workshop.verdict(one), workshop.verdict(two, one)
    with pytest.MonkeyPatch.context() as patched:
        workshop.register(first, one, workshop.spec("whole"))
        counted = Killer(patched, -1)
        workshop.register(second, two, workshop.spec("whole"))
    assert counted.calls.count("set_registered_model_alias") == 2
    for done in range(len(counted.calls)):
        spec = workshop.spec(f"killed-{done}")
        workshop.register(first, one, spec)
        with pytest.MonkeyPatch.context() as patched:
            Killer(patched, done)
            with pytest.raises(Killed):
                workshop.register(second, two, spec)
        aliases = aliases_of(connect(workshop.execution), spec.name)
        moved = counted.calls[:done].count("set_registered_model_alias") == 2
        assert aliases["champion"] == ("2" if moved else "1"), f"killed before {counted.calls[done]}"
        assert find_champion(spec.name, workshop.execution) is not None

        result = workshop.register(second, two, spec)
        assert (result.version, result.previous_version) == ("2", "1"), f"killed before {counted.calls[done]}"
        after = status(spec.name, workshop.execution)
        assert after.versions == 2, f"killed before {counted.calls[done]}"
        assert aliases_of(connect(workshop.execution), spec.name) == {"champion": "2", "previous": "1"}
        assert digest_folder(model_folder(f"models:/{spec.name}@champion", workshop.execution)) == two.merged_digest


def test_killed_during_the_upload(workshop: Workshop, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    one = workshop.trained("one")
    upload = MlflowClient.log_model_artifacts

    def half(client: Any, model_id: str, local_dir: str) -> None:
        (Path(local_dir) / "MLmodel").unlink()
        weights = next(Path(local_dir).rglob("*.safetensors"))
        weights.write_bytes(weights.read_bytes()[:100])
        upload(client, model_id, local_dir)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, "log_model_artifacts", half)
        with pytest.raises(Killed):
            workshop.register(workshop.verdict(one), one, workshop.spec(name))
    assert find_champion(name, workshop.execution) is None
    workshop.register(workshop.verdict(one), one, workshop.spec(name))
    champion = find_champion(name, workshop.execution)
    assert champion is not None
    assert champion.digest == one.merged_digest


def test_killed_anywhere_while_rolling_back(workshop: Workshop) -> None:
    one, two = workshop.trained("one"), workshop.trained("two")
    for done in range(4):
        spec = workshop.spec(f"back-{done}")
        workshop.register(workshop.verdict(one), one, spec)
        workshop.register(workshop.verdict(two, one), two, spec)
        with pytest.MonkeyPatch.context() as patched:
            killer = Killer(patched, done)
            if done == 3:
                rollback(spec.name, workshop.execution, "bad")
                assert killer.calls == ["set_model_version_tag", *2 * ["set_registered_model_alias"]]
                continue
            with pytest.raises(Killed):
                rollback(spec.name, workshop.execution, "bad")
        rollback(spec.name, workshop.execution, "bad")
        after = status(spec.name, workshop.execution)
        assert after.champion is not None
        assert after.previous is not None
        assert (after.champion.version, after.previous.version) == ("1", "2"), f"killed after {done} changes"
        assert after.previous.rolled_back is not None


def test_status_creates_nothing(tmp_path: Path) -> None:
    execution = ExecutionSpec(store=str(tmp_path / "store"))
    assert status("complaints", execution).champion is None
    assert registered_names(execution) == []
    assert not (tmp_path / "store").exists()


def test_nothing_is_written_into_the_working_directory(
    workshop: Workshop, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one = workshop.trained("one")
    workshop.register(workshop.verdict(one), one, workshop.spec(name))
    assert list(tmp_path.iterdir()) == []
    assert [path for path in Path(workshop.execution.store, "scratch").rglob("*") if path.is_file()] == []


def test_who_is_to_be_beaten_is_said(workshop: Workshop, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks.registry.steps import find_system_to_beat

    said: list[str] = []
    monkeypatch.setattr("tasks.registry.steps.say_done", lambda step, summary, *, reused: said.append(summary))
    one, two = workshop.trained("one"), workshop.trained("two")
    spec = workshop.spec(name)
    find_system_to_beat.fn(one, spec)
    workshop.register(workshop.verdict(one), one, spec)
    find_system_to_beat.fn(one, spec)
    champion = find_system_to_beat.fn(two, spec)
    workshop.register(workshop.verdict(two, one, opponent=champion), two, spec)
    find_system_to_beat.fn(two, spec)
    assert said == [
        f"no champion of {name} to beat",
        "the candidate is champion v1 already; compared with what it was promoted against",
        "champion v1",
        "the candidate is champion v2 already; compared with what it was promoted against, champion v1",
    ]


def test_prefect_tasks_hand_on_references(workshop: Workshop, name: str) -> None:
    from tasks.registry.steps import find_system_to_beat, register_champion, release_of_baseline

    one, two = workshop.trained("one"), workshop.trained("two")
    spec = workshop.spec(name)
    assert find_system_to_beat.fn(one, spec) is None
    verdict = workshop.verdict(one)
    assert register_champion.fn(verdict, workshop.certificate(verdict, one), one, spec).version == "1"
    opponent = find_system_to_beat.fn(two, spec)
    assert opponent is not None
    assert opponent.label == "champion v1"
    assert release_of_baseline(opponent, spec) == BY_VERDICT
    assert release_of_baseline(opponent.model_copy(update={"uri": "/models/base"}), spec) is None
