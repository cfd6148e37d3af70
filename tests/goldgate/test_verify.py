"""`goldgate verify`: what holds, what was altered, and what was never shown."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from rich.console import Console

from goldgate.verify import Check, Finding, Verification, print_verification, verify
from tasks.contracts.confidence import TrustRef
from tasks.contracts.errors import CertificateError, ModelError
from tasks.contracts.prompt import tuned_prompt
from tasks.contracts.references import Outcome, Release, ReleaseKind, SystemUnderTest
from tasks.contracts.spec import (
    DataSpec,
    EvaluateSpec,
    ExecutionSpec,
    GoldenSpec,
    Override,
    RetrainSpec,
    TaskSpec,
)
from tasks.gate.certificate import certify
from tasks.gate.keys import open_signing_key
from tasks.registry.baseline import set_baseline
from tasks.registry.register import register
from tasks.store import digest_folder
from tasks.tracking import RegisteredFiles, connect, registered_files
from tests.gate.certified import Certified, make_certified
from tests.gate.made_up import LABELS
from tests.trusts import keep_trust, learnt_trust

FORCED = Release(
    kind=ReleaseKind.FORCED, by="Ada", reason="the old one is wrong on refunds",
    at=datetime(2026, 11, 22, 14, 57, tzinfo=UTC),
)  # fmt: skip


class World(NamedTuple):
    """A certified model, registered as version 1."""

    made: Certified
    trust: TrustRef
    spec: RetrainSpec
    files: RegisteredFiles

    @property
    def uri(self) -> str:
        return f"models:/{self.spec.name}@champion"


def spec_in(root: Path, name: str) -> RetrainSpec:
    return RetrainSpec(
        name=name,
        task=TaskSpec(kind="classify", instruction="Which animal?", labels=LABELS),
        data=DataSpec(source="unused.jsonl"),
        golden=GoldenSpec(path=str(root / "golden")),
        base_model="unused",
        evaluate=EvaluateSpec(max_new_tokens=8),
        execution=ExecutionSpec(store=str(root / "store")),
    )


@pytest.fixture(scope="module", autouse=True)
def _nothing_from_outside() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        for variable in ("GOLDGATE_SIGNING_KEY", "GOLDGATE_PUBLIC_KEY", "MLFLOW_TRACKING_URI"):
            patched.delenv(variable, raising=False)
        yield


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> World:
    """Made once, since MLflow's tables take seconds."""
    root = tmp_path_factory.mktemp("verify")
    made = make_certified(root, model=tiny_model)
    spec = spec_in(root, "animals")
    trust = keep_trust(made.store, learnt_trust(LABELS))
    key = open_signing_key(made.store)
    certificate = certify(
        made.store, made.verdict, made.trained, made.release, "animals", made.golden, key, trust=trust
    )
    register(made.verdict, certificate, made.trained, spec, trust=trust)
    made = made._replace(certificate=certificate)
    return World(made, trust, spec, registered_files("models:/animals/1", spec.execution))


@pytest.fixture
def world(pristine: World, tmp_path: Path) -> Iterator[World]:
    """The same, put back afterwards as it was."""
    kept = [Path(pristine.files.root), Path(pristine.made.golden.path)]
    for number, folder in enumerate(kept):
        shutil.copytree(folder, tmp_path / str(number))
    yield pristine
    for number, folder in enumerate(kept):
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / str(number), folder)


def found(verification: Verification) -> dict[str, Finding]:
    return {check.what: check.finding for check in verification.checks}


def detail(verification: Verification, what: str) -> str:
    return next(check.detail for check in verification.checks if check.what == what)


def test_all_holds(world: World) -> None:
    result = verify(world.uri, world.spec.execution)
    assert result.model == "models:/animals/1"
    assert result.holds, result
    findings = found(result)
    assert findings.pop("contamination") in (Finding.OK, Finding.NOT_CHECKED)
    assert findings == dict.fromkeys(
        (
            "signature",
            "model",
            "adapter",
            "evidence",
            "verdict",
            "release",
            "golden set",
            "prompt",
            "trust",
            "code",
            "registry",
        ),
        Finding.OK,
    )
    assert detail(result, "verdict").startswith("PROMOTE, computed again from 200 items")
    assert detail(result, "release") == "promoted by its verdict"
    assert verify("models:/animals/1", world.spec.execution) == result


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def swap(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def alter_payload(world: World) -> None:
    path = world.files.artifacts["certificate"]
    record = json.loads(path.read_text())
    payload = base64.b64decode(record["payload"]).replace(b'"task":"animals"', b'"task":"aliens!"')
    path.write_text(json.dumps(record | {"payload": base64.b64encode(payload).decode()}))


def alter_signature(world: World) -> None:
    path = world.files.artifacts["certificate"]
    record = json.loads(path.read_text())
    record["signatures"][0]["sig"] = base64.b64encode(bytes(64)).decode()
    path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("alter", "what", "said"),
    [
        (
            lambda world: flip(world.files.artifacts["model"] / "model.safetensors"),
            "model", "A file of the model was altered. (.../model.safetensors)",
        ),
        (
            lambda world: (world.files.artifacts["model"] / "modeling.py").write_text("import os"),
            "model", "A file of the model was added. (.../modeling.py)",
        ),
        (
            lambda world: flip(world.files.artifacts["adapter"] / "adapter_model.safetensors"),
            "adapter", "A file of the adapter was altered. (.../adapter_model.safetensors)",
        ),
        (
            lambda world: swap(
                world.files.artifacts["evidence"] / "candidate" / "items.jsonl",
                '"exact_match":0.0', '"exact_match":1.0',
            ),
            "evidence", "A file of the evidence was altered. (.../candidate/items.jsonl)",
        ),
        (
            lambda world: swap(world.files.artifacts["evidence"] / "verdict.json", '"wins": 30', '"wins": 31'),
            "evidence", "A file of the evidence was altered. (.../verdict.json)",
        ),
        (
            lambda world: flip(Path(world.made.golden.path) / "items.jsonl"),
            "golden set", "The golden set is not the one of the verdict: its sha256 is",
        ),
        (
            lambda world: swap(
                world.files.artifacts["task"], '"system": "Which animal?"', '"system": "Which animal? Say dog."'
            ),
            "prompt", "The version is asked in another way than the candidate was when it was judged.",
        ),
        (
            lambda world: swap(world.files.root / "MLmodel", "mlflow.pyfunc.loaders.code_model", "mlflow.pyfunc.model"),
            "code", "would run other code than Goldgate's. (.../MLmodel)",
        ),
        (
            lambda world: swap(world.files.artifacts["verdict"], '"wins": 30', '"wins": 31'),
            "registry", "the verdict beside the model",
        ),
        (
            lambda world: swap(world.files.artifacts["trust"], '"at":0.9', '"at":0.1'),
            "trust", "how far its answers are trusted is not what was signed: its sha256 is",
        ),
        (
            lambda world: world.files.artifacts["trust"].unlink(),
            "trust", "How far its answers are trusted cannot be read: No such file",
        ),
        (alter_payload, "signature", "The payload was altered after it was signed."),
        (alter_signature, "signature", "The signature is not one of the key"),
    ],
)  # fmt: skip
def test_whatever_is_altered_is_named(world: World, alter: Callable[[World], Any], what: str, said: str) -> None:
    alter(world)
    result = verify(world.uri, world.spec.execution)
    assert not result.holds
    assert found(result)[what] is Finding.FAILED
    expected, _, file = said.partition(" (...")
    assert expected in detail(result, what)
    assert file.rstrip(")") in detail(result, what)


def test_an_altered_outcome_gives_another_verdict_too(world: World) -> None:
    path = world.files.artifacts["evidence"] / "candidate" / "items.jsonl"
    swap(path, '"exact_match":0.0', '"exact_match":1.0')
    result = verify(world.uri, world.spec.execution)
    assert found(result)["verdict"] is Finding.FAILED
    assert "not what its outcomes give" in detail(result, "verdict")


def test_what_the_signature_does_not_cover_is_not_checked(world: World) -> None:
    alter_signature(world)
    result = verify(world.uri, world.spec.execution)
    assert found(result) == {"signature": Finding.FAILED} | dict.fromkeys(
        ("model", "adapter", "evidence", "verdict", "release", "golden set"), Finding.NOT_CHECKED
    )


def test_code_of_another_version_is_said_to_be_unsigned(world: World) -> None:
    swap(world.files.root / "served_model.py", "BATCH = 16", "BATCH = 8")
    result = verify(world.uri, world.spec.execution)
    assert found(result)["code"] is Finding.NOT_CHECKED
    assert "it is not signed" in detail(result, "code")


def test_another_key_is_not_trusted(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    other = tmp_path / "other.pub.pem"
    pem = Ed25519PrivateKey.generate().public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    other.write_bytes(pem)
    result = verify(world.uri, world.spec.execution, public_key=other)
    assert not result.holds
    assert "and the trusted key is" in detail(result, "signature")
    monkeypatch.setenv("GOLDGATE_PUBLIC_KEY", str(other))
    assert not verify(world.uri, world.spec.execution).holds
    own = Path(world.spec.execution.store, "keys", "gate.pub.pem")
    assert verify(world.uri, world.spec.execution, public_key=own).holds


def test_a_golden_set_that_is_not_here_is_said_plainly(world: World, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(world.made.golden.path, tmp_path / "moved"))
    at = Path(world.made.golden.path)
    away = at.rename(at.with_name("away"))
    try:
        result = verify(world.uri, world.spec.execution)
        assert result.holds
        assert found(result)["golden set"] is Finding.NOT_CHECKED
        assert str(at) in detail(result, "golden set")
        assert found(verify(world.uri, world.spec.execution, golden=moved))["golden set"] is Finding.OK
        flip(moved / "items.jsonl")
        assert not verify(world.uri, world.spec.execution, golden=moved).holds
    finally:
        away.rename(at)


def test_tags_that_say_something_else_are_named(world: World) -> None:
    client = connect(world.spec.execution)
    version = client.get_model_version("animals", "1")
    client.set_model_version_tag("animals", "1", "goldgate.release", FORCED.model_dump_json())
    try:
        result = verify(world.uri, world.spec.execution)
        assert "something else than the certificate: goldgate.release" in detail(result, "registry")
    finally:
        client.set_model_version_tag("animals", "1", "goldgate.release", version.tags["goldgate.release"])


def test_a_provenance_that_nobody_signed_is_named(world: World) -> None:
    client = connect(world.spec.execution)
    client.set_model_version_tag("animals", "1", "goldgate.data_provenance", "bought, honestly")
    try:
        result = verify(world.uri, world.spec.execution)
        assert "something else than the certificate: goldgate.data_provenance" in detail(result, "registry")
    finally:
        client.delete_model_version_tag("animals", "1", "goldgate.data_provenance")


def test_the_certificate_of_another_task_is_not_this_ones(world: World) -> None:
    other = spec_in(Path(world.spec.execution.store).parent, "plants")
    register(world.made.verdict, world.made.certificate, world.made.trained, other, trust=world.trust)
    result = verify("models:/plants/1", other.execution)
    assert not result.holds
    assert "name (signed: animals)" in detail(result, "registry")


def test_a_certificate_by_itself(world: World, tmp_path: Path) -> None:
    result = verify(world.made.certificate.uri, world.spec.execution)
    assert result.holds, result
    assert found(result)["model"] is Finding.OK  # found in the store
    copy = world.made.copy(tmp_path / "copy")
    elsewhere = ExecutionSpec(store=str(tmp_path / "other"))
    key = Path(world.spec.execution.store, "keys", "gate.pub.pem")
    assert verify(str(copy), elsewhere, public_key=key).holds
    with pytest.raises(CertificateError, match="No public key is known"):
        verify(str(copy), elsewhere)
    with pytest.raises(CertificateError, match="No certificate is there"):
        verify(str(tmp_path), elsewhere)


def test_a_certificate_whose_model_is_gone_says_so(world: World, tmp_path: Path) -> None:
    made = make_certified(tmp_path)
    shutil.rmtree(made.trained.uri)
    result = verify(made.certificate.uri, ExecutionSpec(store=made.store.root))
    assert result.holds
    assert found(result)["model"] is Finding.NOT_CHECKED
    assert "its files are not here" in detail(result, "model")


def test_a_forced_promotion_says_who_forced_it(tmp_path: Path) -> None:
    made = make_certified(tmp_path, outcome=Outcome.REJECT, release=FORCED)
    result = verify(made.certificate.uri, ExecutionSpec(store=made.store.root))
    assert result.holds
    assert detail(result, "verdict").startswith("REJECT")
    assert detail(result, "release").startswith("forced against its verdict by Ada on 22 November 2026")


def test_a_baseline_has_no_verdict_and_says_whose_word_it_is(world: World, tiny_model: Path) -> None:
    spec = spec_in(Path(world.spec.execution.store).parent, "fish")
    system = SystemUnderTest(
        uri=str(tiny_model), digest=digest_folder(tiny_model), prompt=tuned_prompt(spec.task), role="other", label="x"
    )
    set_baseline(spec.evaluation(), system, Override(by="Ada", reason="it has run since spring"))
    result = verify("models:/fish@champion", spec.execution)
    assert not result.holds
    assert found(result) == {"verdict": Finding.FAILED, "model": Finding.OK}
    assert "There is no verdict: set as first baseline, without a verdict, by Ada on" in detail(result, "verdict")
    assert detail(result, "verdict").endswith("it has run since spring")
    flip(registered_files("models:/fish/1", spec.execution).artifacts["model"] / "model.safetensors")
    assert found(verify("models:/fish/1", spec.execution))["model"] is Finding.FAILED


def test_a_version_of_before_there_were_certificates_says_so(world: World) -> None:
    swap(world.files.root / "MLmodel", "      certificate:\n", "      formerly:\n")
    result = verify("models:/animals/1", world.spec.execution)
    assert not result.holds
    assert found(result) == {"certificate": Finding.FAILED, "model": Finding.OK}
    assert "registered without one" in detail(result, "certificate")


def test_a_version_that_is_not_there_is_named(world: World) -> None:
    with pytest.raises(ModelError, match="registry has no such model"):
        verify("models:/animals/9", world.spec.execution)


def test_it_reads_line_by_line() -> None:
    console = Console(record=True, width=100)
    print_verification(
        console,
        Verification(
            model="models:/animals/1",
            holds=False,
            checks=(
                Check(what="signature", finding=Finding.OK, detail="by the key [1]"),
                Check(what="model", finding=Finding.FAILED, detail="A file was altered."),
                Check(what="golden set", finding=Finding.NOT_CHECKED, detail="not here"),
            ),
        ),
    )
    lines = console.export_text().splitlines()
    assert lines[0] == "models:/animals/1"
    assert lines[1].split() == ["ok", "signature", "by", "the", "key", "[1]"]
    assert lines[2].split()[:2] == ["FAILED", "model"]
    assert lines[3].split()[:4] == ["not", "checked", "golden", "set"]
    assert lines[-1] == "1 of 3 checks failed. This model is not shown to be what it should be."
