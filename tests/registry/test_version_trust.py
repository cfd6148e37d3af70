"""What is known of a version's confidence goes with it, and is read back as it was or not at all."""

from __future__ import annotations

import logging

import pytest

from tasks.contracts.confidence import LearntTrust, TrustRef
from tasks.contracts.errors import CertificateError, RegistryError
from tasks.contracts.references import RegisteredModelRef
from tasks.contracts.serving import Trust
from tasks.contracts.spec import RolloutSettings
from tasks.registry import steps
from tasks.registry.register import has_trust, register
from tasks.registry.serving_aliases import resolve_version
from tasks.store import Store, digest_file
from tasks.tracking import connect, registered_files
from tests.registry.workshop import LABELS, Killed, Killer, Workshop
from tests.trusts import keep_trust, learnt_trust


def promote(workshop: Workshop, name: str, trust: TrustRef | None) -> RegisteredModelRef:
    trained = workshop.trained("one")
    verdict = workshop.verdict(trained)
    certificate = workshop.certificate(verdict, trained, trust=trust)
    return register(verdict, certificate, trained, workshop.spec(name), waits=True, trust=trust)


def test_trust_goes_with_the_version_and_is_read_when_it_is_resolved(workshop: Workshop, name: str) -> None:
    trust = keep_trust(Store(workshop.execution.store), learnt_trust(LABELS))
    registered = promote(workshop, name, trust)
    files = registered_files(f"models:/{name}/1", workshop.execution)
    assert LearntTrust.model_validate_json(files.artifacts["trust"].read_text()) == learnt_trust(LABELS)
    assert files.tags["goldgate.trust_digest"] == digest_file(files.artifacts["trust"])
    found = resolve_version(name, None, workshop.execution).trust
    assert found == Trust.of(learnt_trust(LABELS))
    assert (found.temperature, found.at, found.target_accuracy) == (None, 0.9, 0.95)
    assert found.why == "Not calibrated. 240 of 300 are above it."
    assert has_trust(registered, trust, workshop.execution)
    assert promote(workshop, name, trust) == registered  # the same run again


def test_a_version_without_trust_has_none(workshop: Workshop, name: str) -> None:
    registered = promote(workshop, name, None)
    assert resolve_version(name, None, workshop.execution).trust is None
    assert not has_trust(
        registered, keep_trust(Store(workshop.execution.store), learnt_trust(LABELS)), workshop.execution
    )


def test_a_trust_that_was_changed_or_taken_away_is_refused(workshop: Workshop, name: str) -> None:
    promote(workshop, name, keep_trust(Store(workshop.execution.store), learnt_trust(LABELS)))
    path = registered_files(f"models:/{name}/1", workshop.execution).artifacts["trust"]
    whole = path.read_text()
    path.write_text(learnt_trust(LABELS, at=0.0).model_dump_json())  # trusts every answer
    with pytest.raises(RegistryError, match=r"how far its answers are trusted: its sha256 is not the one"):
        resolve_version(name, None, workshop.execution)
    path.unlink()
    with pytest.raises(RegistryError, match="how far its answers are trusted"):
        resolve_version(name, None, workshop.execution)
    path.write_text(whole)
    connect(workshop.execution).delete_model_version_tag(name, "1", "goldgate.trust_digest")
    with pytest.raises(RegistryError, match=r"how far its answers are trusted: its sha256 is not the one"):
        resolve_version(name, None, workshop.execution)


def test_a_trust_that_the_certificate_does_not_name_is_not_registered(workshop: Workshop, name: str) -> None:
    trained = workshop.trained("one")
    verdict = workshop.verdict(trained)
    store = Store(workshop.execution.store)
    one, other = keep_trust(store, learnt_trust(LABELS)), keep_trust(store, learnt_trust(LABELS, at=0.0))
    for signed, given in ((None, one), (one, None), (one, other)):
        certificate = workshop.certificate(verdict, trained, trust=signed)
        with pytest.raises(CertificateError, match="something else of how far the answers are trusted"):
            register(verdict, certificate, trained, workshop.spec(name), waits=True, trust=given)
    assert not connect(workshop.execution).search_model_versions(f"name='{name}'")


def test_a_version_that_was_made_before_keeps_what_it_has_and_that_is_said(
    workshop: Workshop, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(steps, "say_done", lambda step, summary, *, reused: said.append(summary))
    spec = workshop.spec(name).model_copy(update={"rollout": RolloutSettings()})
    trained = workshop.trained("one")
    verdict = workshop.verdict(trained)
    first, other = (
        keep_trust(Store(workshop.execution.store), learnt_trust(LABELS)),
        keep_trust(Store(workshop.execution.store), learnt_trust(LABELS, at=0.95)),
    )
    for trust in (first, first, other):
        certificate = workshop.certificate(verdict, trained, trust=trust)
        steps.register_champion.fn(verdict, certificate, trained, spec, trust)
    kept = "; it was registered before, and keeps what was known of its confidence then, or that nothing was"
    assert said == [f"{name} v1 is promoted"] * 2 + [f"{name} v1 is promoted{kept}"]
    found = resolve_version(name, None, workshop.execution).trust
    assert found is not None
    assert found.at == 0.9


def test_killed_while_it_is_uploaded_it_ends_with_the_trust_that_it_is_called_with(
    workshop: Workshop, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    old, new = (
        keep_trust(Store(workshop.execution.store), learnt_trust(LABELS)),
        keep_trust(Store(workshop.execution.store), learnt_trust(LABELS, at=0.95)),
    )
    with monkeypatch.context() as patched:
        killer = Killer(patched, 10**6)
        promote(workshop, f"counted-{name}"[:60], old)
        killer.left = killer.calls.index("create_model_version")
        with pytest.raises(Killed):
            promote(workshop, name, old)
    promote(workshop, name, new)  # dev was asked with another target since then
    found = resolve_version(name, None, workshop.execution).trust
    assert found is not None
    assert found.at == 0.95
