"""A certificate says what happened, and whatever is altered afterwards is found and named."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from securesystemslib.signer import CryptoSigner, SSlibKey

from tasks.contracts.errors import CertificateError
from tasks.contracts.references import Outcome, Release, ReleaseKind
from tasks.gate.certificate import (
    CertificateFiles,
    certify,
    check_files,
    check_golden,
    check_trust,
    find_contamination_report,
    verify_certificate,
)
from tasks.gate.keys import SigningKey, open_signing_key, open_trusted_key
from tasks.gate.statement import PREDICATE_TYPE, Hints, Statement, open_statement, sign
from tasks.store import Store, digest_file
from tests.gate.certified import Certified, make_certified, make_golden, make_trained, make_verdict, splits_for
from tests.trusts import keep_trust, learnt_trust

FORCED = Release(
    kind=ReleaseKind.FORCED, by="Ada", reason="the old one is wrong on refunds",
    at=datetime(2026, 11, 22, 14, 57, tzinfo=UTC),
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _no_keys_from_outside() -> Any:
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("GOLDGATE_SIGNING_KEY", raising=False)
        patched.delenv("GOLDGATE_PUBLIC_KEY", raising=False)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Certified:
    """A certified promotion; do not write into it."""
    return make_certified(tmp_path_factory.mktemp("certified"))


@pytest.fixture(scope="module")
def key(made: Certified) -> SSlibKey:
    return open_trusted_key(made.store).key


def envelope(folder: Path) -> Any:
    return json.loads((folder / "certificate.json").read_text())


def put(folder: Path, record: Any) -> None:
    (folder / "certificate.json").write_text(json.dumps(record))


def statement_of(record: Any) -> Any:
    return json.loads(base64.b64decode(record["payload"]))


def another_key() -> SigningKey:
    signer = CryptoSigner.generate_ed25519()
    return SigningKey(signer, signer.public_key.keyid)


# -- what it says ---------------------------------------------------------------------------------------------------


def test_a_promotion_is_certified_with_all_that_it_rests_on(made: Certified, key: SSlibKey) -> None:
    said = verify_certificate(made.folder, key)
    decided = made.verdict.verdict
    assert said.digest_of("model") == made.trained.merged_digest
    assert said.digest_of("adapter") == made.trained.adapter_digest
    predicate = said.predicate
    assert predicate.task == "animals"
    assert (predicate.outcome, predicate.reasons) == (Outcome.PROMOTE, decided.reasons)
    assert (predicate.requirements, predicate.policy, predicate.look) == (
        decided.requirements, decided.policy, decided.look,
    )  # fmt: skip
    assert predicate.digests.items() >= {
        **decided.digests, "adapter": made.trained.adapter_digest, "base_model": "7" * 64,
        "golden_set": made.golden.digest,
    }.items()  # fmt: skip
    assert predicate.release == Release(kind=ReleaseKind.BY_VERDICT)
    assert predicate.code["train"].libraries["pydantic"]
    assert predicate.code["gate"].git_commit == made.store.open(made.verdict.uri).manifest.git_commit
    assert predicate.evidence.keys() >= {
        "verdict.json", "baseline/items.jsonl", "baseline/summary.json", "candidate/items.jsonl",
        "candidate/summary.json",
    }  # fmt: skip
    assert predicate.evidence["candidate/items.jsonl"] == decided.digests["candidate_outcomes"]
    assert made.certificate.key_id == key.keyid


def test_it_is_an_in_toto_statement_in_a_dsse_envelope(made: Certified) -> None:
    record = envelope(made.folder)
    assert record["payloadType"] == "application/vnd.in-toto+json"
    assert [set(one) for one in record["signatures"]] == [{"keyid", "sig"}]
    payload = statement_of(record)
    assert payload["_type"] == "https://in-toto.io/Statement/v1"
    assert payload["predicateType"] == PREDICATE_TYPE
    assert {one["name"]: one["digest"] for one in payload["subject"]} == {
        "model": {"sha256": made.trained.merged_digest},
        "adapter": {"sha256": made.trained.adapter_digest},
    }


def test_a_signature_can_be_checked_without_goldgate(made: Certified) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    public = load_pem_public_key(Path(made.store.root, "keys", "gate.pub.pem").read_bytes())
    assert isinstance(public, Ed25519PublicKey)
    record = envelope(made.folder)
    kind, payload = record["payloadType"].encode(), base64.b64decode(record["payload"])
    signed = b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)
    public.verify(base64.b64decode(record["signatures"][0]["sig"]), signed)


def test_nothing_of_the_private_key_is_in_the_certificate(made: Certified) -> None:
    secret = Path(made.store.root, "keys", "gate.pem").read_text().splitlines()[1]
    kept = [path for path in Path(made.store.root).rglob("*") if path.is_file() and path.name != "gate.pem"]
    assert not [path for path in kept if secret.encode() in path.read_bytes()]
    assert secret not in made.certificate.model_dump_json()


def test_the_same_release_has_one_certificate(made: Certified) -> None:
    again = certify(
        made.store, made.verdict, made.trained, made.release, "animals", made.golden, open_signing_key(made.store)
    )
    assert again.reused
    assert again.model_copy(update={"reused": False}) == made.certificate


def test_forced_promotions_are_certified_as_such_and_keep_their_date(tmp_path: Path) -> None:
    made = make_certified(tmp_path, outcome=Outcome.REJECT, release=FORCED)
    said = verify_certificate(made.folder, open_trusted_key(made.store).key)
    assert (said.predicate.outcome, said.predicate.release) == (Outcome.REJECT, FORCED)
    later = FORCED.model_copy(update={"at": datetime(2027, 1, 1, tzinfo=UTC)})
    again = certify(made.store, made.verdict, made.trained, later, "animals", made.golden, open_signing_key(made.store))
    assert (again.reused, again.digest, again.release) == (True, made.certificate.digest, FORCED)
    other = FORCED.model_copy(update={"by": "Grace"})
    by_grace = certify(
        made.store, made.verdict, made.trained, other, "animals", made.golden, open_signing_key(made.store)
    )
    assert (by_grace.reused, by_grace.release.by) == (False, "Grace")


def test_an_approved_promotion_is_certified_as_such(tmp_path: Path) -> None:
    approved = FORCED.model_copy(update={"kind": ReleaseKind.APPROVED})
    made = make_certified(tmp_path, release=approved, approval_hours=4)
    assert verify_certificate(made.folder, open_trusted_key(made.store).key).predicate.release == approved


def test_the_contamination_report_goes_along(made: Certified, key: SSlibKey) -> None:
    said = verify_certificate(made.folder, key)
    found = find_contamination_report(said, made.folder / "evidence")
    assert found == made.folder / "evidence" / "contamination.json"
    assert digest_file(found) == said.predicate.digests["contamination"]


def test_what_is_said_of_the_data_is_signed(made: Certified, key: SSlibKey) -> None:
    asked = (made.store, made.verdict, made.trained, made.release, "animals", made.golden, open_signing_key(made.store))
    told = certify(*asked, provenance="CFPB, 2024", licence="CC0-1.0")
    assert not told.reused
    said = verify_certificate(made.store.files(made.store.open(told.uri)), key).predicate
    assert (said.provenance, said.licence) == ("CFPB, 2024", "CC0-1.0")
    assert certify(*asked, provenance="CFPB, 2024", licence="CC0-1.0").digest == told.digest
    assert not certify(*asked, provenance="CFPB, 2024").reused
    assert certify(*asked).digest == made.certificate.digest


def test_where_nothing_is_said_of_the_data_the_certificate_is_as_before(made: Certified, key: SSlibKey) -> None:
    predicate = statement_of(envelope(made.folder))["predicate"]
    assert not {"provenance", "licence"} & predicate.keys()  # readers from before these fields refuse unknown ones
    said = verify_certificate(made.folder, key).predicate
    assert (said.provenance, said.licence) == (None, None)


def test_how_far_the_answers_are_trusted_is_signed(made: Certified, key: SSlibKey, tmp_path: Path) -> None:
    asked = (made.store, made.verdict, made.trained, made.release, "animals", made.golden, open_signing_key(made.store))
    trust = keep_trust(made.store, learnt_trust(("cat", "dog")))
    told = certify(*asked, trust=trust)
    assert not told.reused
    statement = verify_certificate(made.store.files(made.store.open(told.uri)), key)
    kept = made.store.files(made.store.open(trust.uri)) / "trust.json"
    assert statement.predicate.digests["trust"] == digest_file(kept)
    check_trust(statement, kept, where="models:/animals/1")
    assert certify(*asked, trust=trust).digest == told.digest
    assert certify(*asked).digest == made.certificate.digest

    other = tmp_path / "trust.json"
    other.write_text(learnt_trust(("cat", "dog"), at=0.0).model_dump_json())  # trusts every answer
    with pytest.raises(CertificateError, match=f"sha256 is {digest_file(other)}, signed is {digest_file(kept)}"):
        check_trust(statement, other, where="models:/animals/1")
    with pytest.raises(CertificateError, match=r"sha256 is \(no file\), signed is") as gone:
        check_trust(statement, None, where="models:/animals/1")
    assert gone.value.where == "models:/animals/1"
    with pytest.raises(CertificateError, match="cannot be read: No such file"):
        check_trust(statement, tmp_path / "nowhere.json", where="models:/animals/1")
    without = verify_certificate(made.folder, key)
    check_trust(without, None, where="models:/animals/1")
    with pytest.raises(CertificateError, match=r"signed is \(none\)"):
        check_trust(without, other, where="models:/animals/1")


def test_another_key_signs_anew(made: Certified) -> None:
    other = another_key()
    again = certify(made.store, made.verdict, made.trained, made.release, "animals", made.golden, other)
    assert (again.reused, again.key_id) == (False, other.key_id)
    verify_certificate(made.store.files(made.store.open(again.uri)), other.public)


def test_a_remote_store_keeps_certificates_and_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    remote, local = Store(f"memory://{tmp_path.name}/store"), Store(str(tmp_path / "store"))
    golden = make_golden(tmp_path / "golden")
    trained = make_trained(remote, splits_for(remote, golden))
    verdict = make_verdict(remote, trained, golden)
    by_verdict = Release(kind=ReleaseKind.BY_VERDICT)
    key = open_signing_key(local)
    kept = certify(remote, verdict, trained, by_verdict, "animals", golden, key)
    assert certify(remote, verdict, trained, by_verdict, "animals", golden, key).reused
    verify_certificate(remote.files(remote.open(kept.uri)), key.public)
    assert not any("keys" in path for path in remote._fs.find(remote._path))


# -- what is not certified ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcome", "release", "policy", "said"),
    [
        (Outcome.PROMOTE, Release(kind=ReleaseKind.DECLINED), {}, "release is declined: nothing was promoted"),
        (Outcome.PROMOTE, Release(kind=ReleaseKind.AWAITING), {}, "release is awaiting: nothing was promoted"),
        (Outcome.REJECT, Release(kind=ReleaseKind.NOT_PROMOTED), {}, "not_promoted: nothing was promoted"),
        (Outcome.REJECT, Release(kind=ReleaseKind.BY_VERDICT), {}, "is by_verdict, and the verdict is reject"),
        (Outcome.REJECT, Release(kind=ReleaseKind.APPROVED, by="Ada", at=FORCED.at), {}, "and the verdict is reject"),
        (Outcome.PROMOTE, Release(kind=ReleaseKind.BY_VERDICT), {"approval_hours": 4}, "policy asks a person"),
        (Outcome.REJECT, Release(kind=ReleaseKind.FORCED), {}, "does not say by whom and when"),
    ],
)
def test_a_release_that_contradicts_the_verdict_is_refused(
    tmp_path: Path, outcome: Outcome, release: Release, policy: dict[str, Any], said: str
) -> None:
    with pytest.raises(CertificateError, match=said):
        make_certified(tmp_path, outcome=outcome, release=release, **policy)
    assert not list(Store(str(tmp_path / "store")).list("certificate"))


def test_a_verdict_on_another_model_or_golden_set_is_refused(made: Certified, tmp_path: Path) -> None:
    key = open_signing_key(made.store)
    other = made.trained.model_copy(update={"merged_digest": "d" * 64})
    with pytest.raises(CertificateError, match=rf"about the model {made.trained.merged_digest}, this one is d{{64}}"):
        certify(made.store, made.verdict, other, made.release, "animals", made.golden, key)
    elsewhere = made.golden.model_copy(update={"digest": "9" * 64})
    with pytest.raises(CertificateError, match=rf"golden set {made.golden.digest}, this one is 9{{64}}"):
        certify(made.store, made.verdict, made.trained, made.release, "animals", elsewhere, key)


def test_an_adapter_of_another_training_is_refused(made: Certified) -> None:
    other = made.trained.model_copy(update={"adapter_digest": "d" * 64, "digest": "e" * 64})
    with pytest.raises(CertificateError, match=f"adapter have the digest {made.trained.adapter_digest}"):
        certify(made.store, made.verdict, other, made.release, "animals", made.golden, open_signing_key(made.store))


def test_a_verdict_that_was_changed_on_the_way_is_not_signed(made: Certified, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    golden = make_golden(tmp_path / "golden")
    trained = make_trained(store, splits_for(store, golden))
    kept = make_verdict(store, trained, golden, Outcome.REJECT)
    forged = kept.model_copy(update={"verdict": kept.verdict.model_copy(update={"outcome": Outcome.PROMOTE})})
    with pytest.raises(CertificateError, match="not the one that was kept"):
        certify(store, forged, trained, made.release, "animals", golden, open_signing_key(store))
    assert not list(store.list("certificate"))


# -- what was altered -----------------------------------------------------------------------------------------------


def flip(path: Path, at: int = 5) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def alter_payload(folder: Path) -> None:
    record = envelope(folder)
    statement = statement_of(record)
    statement["predicate"]["release"]["kind"] = "approved"
    put(folder, record | {"payload": base64.b64encode(json.dumps(statement).encode()).decode()})


def alter_payload_and_hint(folder: Path) -> None:
    import hashlib

    alter_payload(folder)
    record = envelope(folder)
    record["unsigned"]["payload_sha256"] = hashlib.sha256(base64.b64decode(record["payload"])).hexdigest()
    put(folder, record)


def alter_signature(folder: Path) -> None:
    record = envelope(folder)
    signature = bytearray(base64.b64decode(record["signatures"][0]["sig"]))
    signature[3] ^= 1
    record["signatures"][0]["sig"] = base64.b64encode(signature).decode()
    put(folder, record)


def no_signature(folder: Path) -> None:
    put(folder, envelope(folder) | {"signatures": []})


def short_signature(folder: Path) -> None:
    record = envelope(folder)
    record["signatures"][0]["sig"] = "AAAA"
    put(folder, record)


def other_type(folder: Path) -> None:
    put(folder, envelope(folder) | {"payloadType": "application/json"})


def no_envelope(folder: Path) -> None:
    put(folder, [1, 2])


def signed_by_another(folder: Path) -> None:
    statement = Statement.model_validate(statement_of(envelope(folder)))
    (folder / "certificate.json").write_text(sign(statement, another_key(), Hints()))


def signed_by_another_under_this_name(folder: Path) -> None:
    name = envelope(folder)["signatures"][0]["keyid"]
    signed_by_another(folder)
    record = envelope(folder)
    record["signatures"][0]["keyid"] = name
    put(folder, record)


def outcome_line(folder: Path) -> None:
    path = folder / "evidence" / "candidate" / "items.jsonl"
    path.write_text(path.read_text().replace('"exact_match":0.0', '"exact_match":1.0', 1))


def verdict_field(folder: Path) -> None:
    path = folder / "evidence" / "verdict.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"wins": 31}))


def evidence_lost(folder: Path) -> None:
    (folder / "evidence" / "baseline" / "summary.json").unlink()


def evidence_added(folder: Path) -> None:
    (folder / "evidence" / "candidate" / "more.jsonl").write_text("")


@pytest.mark.parametrize(
    ("alter", "said", "where"),
    [
        (alter_payload, "payload was altered after it was signed", "certificate.json: payload"),
        (alter_payload_and_hint, "signature is not one of the key", "certificate.json: signatures"),
        (alter_signature, "signature is not one of the key .* it was altered", "certificate.json: signatures"),
        (short_signature, "signature is not one of the key", "certificate.json: signatures"),
        (no_signature, "is not signed", "certificate.json: signatures"),
        (other_type, "holds 'application/json', and a certificate is", "certificate.json: payloadType"),
        (no_envelope, "no signed envelope", "certificate.json"),
        (signed_by_another, "signed by the key [0-9a-f]{64}, and the trusted key is", "certificate.json: signatures"),
        (signed_by_another_under_this_name, "another key under this one's name", "certificate.json: signatures"),
        (outcome_line, "file of the evidence was altered", "evidence/candidate/items.jsonl"),
        (verdict_field, "file of the evidence was altered", "evidence/verdict.json"),
        (evidence_lost, "file of the evidence is missing", "evidence/baseline/summary.json"),
        (evidence_added, "file of the evidence was added", "evidence/candidate/more.jsonl"),
    ],
)
def test_whatever_is_altered_is_named(
    made: Certified, key: SSlibKey, tmp_path: Path, alter: Callable[[Path], None], said: str, where: str
) -> None:
    folder = made.copy(tmp_path / "copy")
    verify_certificate(folder, key)
    alter(folder)
    with pytest.raises(CertificateError, match=said) as refused:
        verify_certificate(folder, key)
    assert refused.value.where is not None
    assert refused.value.where.endswith(where)


def test_a_signature_of_another_certificate_does_not_fit(made: Certified, key: SSlibKey, tmp_path: Path) -> None:
    folder = made.copy(tmp_path / "copy")
    other = certify(
        made.store, made.verdict, made.trained, made.release, "plants", made.golden, open_signing_key(made.store)
    )
    stolen = envelope(made.store.files(made.store.open(other.uri)))["signatures"]
    put(folder, envelope(folder) | {"signatures": stolen})
    with pytest.raises(CertificateError, match="taken from another certificate"):
        verify_certificate(folder, key)


def test_another_trusted_key_is_not_satisfied(made: Certified, tmp_path: Path) -> None:
    with pytest.raises(CertificateError, match="and the trusted key is"):
        verify_certificate(made.folder, another_key().public)


def resign(made: Certified, folder: Path, change: Callable[[Any], None]) -> None:
    """Sign an altered statement with the real key: what somebody with the key could do."""
    statement = statement_of(envelope(folder))
    statement["predicate"]["evidence"] = {
        path.relative_to(folder / "evidence").as_posix(): digest_file(path)
        for path in (folder / "evidence").rglob("*") if path.is_file()
    }  # fmt: skip
    change(statement)
    signed = sign(Statement.model_validate(statement), open_signing_key(made.store), Hints())
    (folder / "certificate.json").write_text(signed)


def test_not_even_the_key_makes_a_verdict_that_the_outcomes_do_not_give(
    made: Certified, key: SSlibKey, tmp_path: Path
) -> None:
    folder = made.copy(tmp_path / "line")
    outcome_line(folder)
    resign(made, folder, lambda statement: None)
    with pytest.raises(CertificateError, match="not what its outcomes give"):
        verify_certificate(folder, key)

    folder = made.copy(tmp_path / "reasons")
    resign(made, folder, lambda statement: statement["predicate"].update(reasons=["It is perfect."]))
    with pytest.raises(CertificateError, match="another verdict than the certificate states: reasons differ"):
        verify_certificate(folder, key)

    folder = made.copy(tmp_path / "subject")
    resign(made, folder, lambda statement: statement["subject"][0].update(digest={"sha256": "d" * 64}))
    with pytest.raises(CertificateError, match="subject differ"):
        verify_certificate(folder, key)


def test_a_statement_of_another_kind_is_refused(made: Certified, key: SSlibKey, tmp_path: Path) -> None:
    from securesystemslib.dsse import Envelope

    signed = Envelope(b'{"_type": "https://in-toto.io/Statement/v1"}', "application/vnd.in-toto+json", {})
    signed.sign(open_signing_key(made.store).signer)
    folder = made.copy(tmp_path / "copy")
    put(folder, signed.to_dict())
    with pytest.raises(CertificateError, match="cannot be read as a promotion: subject: Field required"):
        open_statement(folder / "certificate.json", key)


def test_altered_files_of_the_model_are_named(made: Certified, key: SSlibKey, tmp_path: Path) -> None:
    said = verify_certificate(made.folder, key)
    merged = shutil.copytree(made.store.files(made.store.open(made.trained.uri)) / "merged", tmp_path / "merged")
    check_files(said, "model", merged)
    flip(merged / "model.safetensors")
    with pytest.raises(CertificateError, match="file of the model was altered") as refused:
        check_files(said, "model", merged)
    assert refused.value.where == str(merged / "model.safetensors")


def test_an_altered_golden_set_is_found(made: Certified, key: SSlibKey, tmp_path: Path) -> None:
    said = verify_certificate(made.folder, key)
    golden = shutil.copytree(made.golden.path, tmp_path / "golden")
    check_golden(said, golden)
    flip(golden / "items.jsonl")
    with pytest.raises(CertificateError, match="golden set is not the one of the verdict"):
        check_golden(said, golden)
    with pytest.raises(CertificateError, match="golden set cannot be read"):
        check_golden(said, tmp_path / "nowhere")


def test_certificate_and_evidence_may_lie_apart(made: Certified, key: SSlibKey, tmp_path: Path) -> None:
    file = shutil.copyfile(made.folder / "certificate.json", tmp_path / "some.json")
    evidence = shutil.copytree(made.folder / "evidence", tmp_path / "papers")
    verify_certificate(CertificateFiles(file, evidence), key)
    verify_certificate(Path(made.certificate.uri), key)  # the artefact as the store names it
    with pytest.raises(CertificateError, match="No certificate is there"):
        verify_certificate(tmp_path, key)
