"""A promotion's certificate: a signed statement of what was promoted and why, beside all that it rests on.

A certificate is checked by whoever doubts it, long after and elsewhere: the signature with a public key that they
trust, the model's files and the evidence against the signed digests, and the verdict by computing it again.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError
from securesystemslib.signer import SSlibKey

from tasks.contracts.confidence import TRUST, TRUST_FILE, TrustRef
from tasks.contracts.errors import CertificateError, GoldgateError
from tasks.contracts.references import (
    CertificateRef,
    GoldenSetRef,
    Outcome,
    Release,
    ReleaseKind,
    TrainedModelRef,
    Verdict,
    VerdictRef,
)
from tasks.contracts.spec import Policy
from tasks.gate.keep import verify_verdict
from tasks.gate.keys import SigningKey
from tasks.gate.statement import ADAPTER, MODEL, Code, Hints, Promotion, Statement, Subject, open_statement, sign
from tasks.store import Manifest, Store, digest_file
from tasks.store.digest import digest_files

STEP = "certificate"
VERSION = 1
CERTIFICATE_FILE = "certificate.json"
EVIDENCE = "evidence"
GOLDEN_ITEMS = "items.jsonl"
_VERDICT_FILE = "verdict.json"
_FOLDERS = {MODEL: "merged", ADAPTER: "adapter"}
_SAME = ("outcome", "reasons", "policy", "requirements", "look", "self_test")  # fields of verdict and statement alike


class CertificateFiles(NamedTuple):
    """A certificate and the folder of its evidence, wherever the two lie."""

    certificate: Path
    evidence: Path


# -- making ---------------------------------------------------------------------------------------------------------


def certify(
    store: Store,
    verdict: VerdictRef,
    trained: TrainedModelRef,
    release: Release,
    name: str,
    golden: GoldenSetRef,
    key: SigningKey,
    *,
    provenance: str | None = None,
    licence: str | None = None,
    trust: TrustRef | None = None,
) -> CertificateRef:
    """Sign what a release rests on, and keep it: `certificate.json`, and `evidence/` with all files of the verdict.

    The verdict is computed again before anything is signed. The same verdict, released for the same reason by the same
    person, said to be of the same data and signed by the same key, has one certificate: asked again, the kept one is
    handed out with its date. `provenance` and `licence` are what the run's configuration says of the data, `trust` how
    far the model's answers are trusted: not what the verdict rests on, but what must not change without a word.

    Raises:
        CertificateError: the release promotes nothing or contradicts the verdict, or the verdict is about another model
            or golden set.
        StoreError: an artefact was changed, the verdict is not what its outcomes give, or the store cannot be written.
    """
    decided = verdict.verdict
    _check_named(verdict, trained, golden)
    check_release(release, decided.outcome, decided.policy, where=verdict.uri)

    def make(folder: Path) -> Mapping[str, Any]:
        judged, made = store.open(verdict.uri), store.open(trained.uri)
        evidence = folder / EVIDENCE
        shutil.copytree(store.files(judged), evidence)
        if verify_verdict(evidence) != decided:
            raise CertificateError(
                "The verdict that was handed over is not the one that was kept.",
                where=verdict.uri,
                fix="run the flow again from the gate",
            )
        statement = _statement(name, decided, release, judged.manifest, made.manifest, _digests(evidence), learnt, said)
        _check_trained(statement, trained)
        hints = Hints(golden_set=golden.path, trained=trained.uri)
        (folder / CERTIFICATE_FILE).write_text(sign(statement, key, hints), encoding="utf-8")
        open_statement(folder / CERTIFICATE_FILE, key.public)  # no certificate leaves that would not be accepted
        return {"key_id": key.key_id, "release": release.model_dump(mode="json")}

    said = {field: text for field, text in (("provenance", provenance), ("licence", licence)) if text is not None}
    learnt = {TRUST: store.open(trust.uri).manifest.files[TRUST_FILE].sha256} if trust is not None else {}
    who = release.model_dump(mode="json", exclude={"at"})  # the moment of a second attempt is no new decision
    artefact = store.produce(
        STEP,
        VERSION,
        {"name": name, "release": who, "key": key.key_id} | ({"data": said} if said else {}),
        {"verdict": verdict.digest, "trained": trained.digest, "golden_set": golden.digest} | learnt,
        make,
    )
    kept = open_statement(store.files(artefact) / CERTIFICATE_FILE, key.public)
    return CertificateRef(**artefact.reference(), key_id=key.key_id, release=kept.predicate.release)


def _check_named(verdict: VerdictRef, trained: TrainedModelRef, golden: GoldenSetRef) -> None:
    """Whether the verdict is about this model and this golden set."""
    for what, named, given in (
        ("model", verdict.verdict.digests.get("candidate"), trained.merged_digest),
        ("golden set", verdict.verdict.digests.get("golden_set"), golden.digest),
    ):
        if named != given:
            raise CertificateError(
                f"The verdict is about the {what} {named or '(none)'}, this one is {given}.",
                where=verdict.uri,
                fix="run the flow again, so that this one gets a verdict of its own",
            )


def check_release(release: Release, outcome: Outcome, policy: Policy, *, where: str) -> None:
    """Refuse a release that promotes nothing, or that the verdict does not allow.

    Raises:
        CertificateError: says which of the two, or that a person's word is missing.
    """
    kind = release.kind
    if not release.promoted:
        problem = f"The release is {kind.value}: nothing was promoted, so there is nothing to certify."
    elif kind is not ReleaseKind.FORCED and outcome is not Outcome.PROMOTE:
        problem = f"The release is {kind.value}, and the verdict is {outcome.value}."
    elif kind is ReleaseKind.BY_VERDICT and policy.approval_hours is not None:
        problem = "The policy asks a person, and the release names none."
    elif kind is not ReleaseKind.BY_VERDICT and not (release.by and release.at):
        problem = f"The release is {kind.value}, and does not say by whom and when."
    else:
        return
    raise CertificateError(
        problem, where=where, fix="promote on a verdict that says so, or force it with a name and a reason"
    )


def _statement(
    name: str,
    verdict: Verdict,
    release: Release,
    judged: Manifest,
    made: Manifest,
    evidence: dict[str, str],
    learnt: Mapping[str, str],
    said: Mapping[str, str],
) -> Statement:
    files = {
        subject: {
            path.removeprefix(f"{folder}/"): entry.sha256
            for path, entry in made.files.items()
            if path.startswith(f"{folder}/")
        }
        for subject, folder in _FOLDERS.items()
    }
    files = {subject: entries for subject, entries in files.items() if entries}
    own = {"adapter": digest_files(files[ADAPTER])} if ADAPTER in files else {}
    if "base" in made.inputs:
        own["base_model"] = made.inputs["base"]
    return Statement(
        subject=tuple(
            Subject(name=subject, digest={"sha256": digest_files(entries)}) for subject, entries in files.items()
        ),
        predicate=Promotion(
            task=name,
            digests={**verdict.digests, **own, **learnt},
            files=files,
            code={
                step: Code(git_commit=manifest.git_commit, libraries=manifest.libraries)
                for step, manifest in (("train", made), ("gate", judged))
            },
            release=release,
            evidence=evidence,
            **said,
            **{field: getattr(verdict, field) for field in _SAME},
        ),
    )


def _check_trained(statement: Statement, trained: TrainedModelRef) -> None:
    for subject, expected in ((MODEL, trained.merged_digest), (ADAPTER, trained.adapter_digest)):
        found = statement.digest_of(subject)
        if found != expected:
            raise CertificateError(
                f"The files of the {subject} have the digest {found or '(none)'}, and {expected} was handed over.",
                where=trained.uri,
                fix=f"delete {trained.uri} and run again; it will be trained anew",
            )


# -- checking -------------------------------------------------------------------------------------------------------


def find_certificate(folder: Path) -> CertificateFiles:
    """The certificate in a folder: one that holds `certificate.json`, or an artefact of the store.

    Raises:
        CertificateError: there is none.
    """
    home = folder
    if not (home / CERTIFICATE_FILE).is_file() and (folder / "manifest.json").is_file():
        try:
            home = folder / Manifest.model_validate_json((folder / "manifest.json").read_bytes()).folder
        except (OSError, ValidationError) as error:
            raise CertificateError(
                "The manifest beside the certificate cannot be read.",
                where=str(folder / "manifest.json"),
                fix="give the folder that holds certificate.json",
            ) from error
    if not (home / CERTIFICATE_FILE).is_file():
        raise CertificateError(
            "No certificate is there.",
            where=str(home / CERTIFICATE_FILE),
            fix="give models:/<name>@<alias>, models:/<name>/<version>, or the folder of a certificate",
        )
    return CertificateFiles(home / CERTIFICATE_FILE, home / EVIDENCE)


def verify_certificate(files: CertificateFiles | Path, public_key: SSlibKey) -> Statement:
    """Check a certificate with its evidence, and return what it says. The model's own files: `check_files`.

    Args:
        files: certificate and evidence, or the folder that holds both.
        public_key: a key that the caller trusts (see `tasks.gate.keys`); never one that came with the certificate.

    Raises:
        CertificateError: it is not signed by this key, was altered, its evidence was altered, or the outcomes do not
            give the verdict that it states; says which, and where.
    """
    found = find_certificate(files) if isinstance(files, Path) else files
    statement = open_statement(found.certificate, public_key)
    check_evidence(statement, found.evidence)
    check_verdict(statement, found.evidence)
    check_release(
        statement.predicate.release, statement.predicate.outcome, statement.predicate.policy,
        where=str(found.certificate),
    )  # fmt: skip
    return statement


def check_evidence(statement: Statement, evidence: Path) -> None:
    """Compare every file of the evidence with its signed digest.

    Raises:
        CertificateError: a file is missing, was added or was altered; names the first.
    """
    _compare(statement.predicate.evidence, evidence, "the evidence")


def check_verdict(statement: Statement, evidence: Path) -> Verdict:
    """Compute the verdict again from the outcomes in the evidence, and compare it with what is signed.

    Raises:
        CertificateError: the outcomes do not give the kept verdict, or the kept verdict is not the signed one; names
            what differs.
    """
    where = str(evidence / _VERDICT_FILE)
    fix = "do not use this model; whoever signed must say how this came about"
    try:
        verdict = verify_verdict(evidence)
    except GoldgateError as error:
        raise CertificateError(error.what, where=error.where or where, fix=fix) from error
    except (OSError, ValueError) as error:  # a line that is no JSON, a field that is missing
        raise CertificateError(f"The verdict cannot be computed again: {error}", where=where, fix=fix) from error
    signed = statement.predicate
    differing = [name for name in _SAME if getattr(verdict, name) != getattr(signed, name)]
    differing += [f"digests.{name}" for name, digest in verdict.digests.items() if signed.digests.get(name) != digest]
    if verdict.digests.get("candidate") != statement.digest_of(MODEL):
        differing.append("subject")
    if differing:
        raise CertificateError(
            f"The outcomes give another verdict than the certificate states: {', '.join(differing)} differ.",
            where=where,
            fix=fix,
        )
    return verdict


def check_files(statement: Statement, subject: str, folder: Path) -> None:
    """Compare every file of the model or its adapter (`subject`) with its signed digest.

    Raises:
        CertificateError: a file is missing, was added or was altered, or the statement is not about this subject.
    """
    entries = statement.predicate.files.get(subject)
    if entries is None or statement.digest_of(subject) != digest_files(entries):
        raise CertificateError(
            f"The certificate names no files of the {subject} that have its digest.",
            where=str(folder),
            fix="do not use this model; whoever signed must say how this came about",
        )
    _compare(entries, folder, f"the {subject}")


def check_golden(statement: Statement, folder: Path) -> None:
    """Compare the items of a golden set with the signed digest.

    Raises:
        CertificateError: they were altered, or are not there.
    """
    path, expected = folder / GOLDEN_ITEMS, statement.predicate.digests.get("golden_set")
    try:
        found = digest_file(path)
    except OSError as error:
        raise CertificateError(
            f"The golden set cannot be read: {error.strerror or error}",
            where=str(path),
            fix="give the folder of the frozen golden set (--golden)",
        ) from error
    if found != expected:
        raise CertificateError(
            f"The golden set is not the one of the verdict: its sha256 is {found}, signed is {expected}.",
            where=str(path),
            fix="bring it back from version control or a backup, or give the folder of the right one (--golden)",
        )


def check_trust(statement: Statement, path: Path | None, *, where: str) -> None:
    """Compare the file that says how far a version's answers are trusted with its signed digest.

    Args:
        statement: what is signed.
        path: the file; None where the version has none.
        where: the version.

    Raises:
        CertificateError: it was altered, added or taken away, or cannot be read.
    """
    signed = statement.predicate.digests.get(TRUST)
    try:
        found = digest_file(path) if path is not None else None
    except OSError as error:
        raise CertificateError(
            f"How far its answers are trusted cannot be read: {error.strerror or error}",
            where=str(path),
            fix=f"restore {TRUST_FILE} from a copy",
        ) from error
    if found != signed:
        raise CertificateError(
            f"What says how far its answers are trusted is not what was signed: its sha256 is {found or '(no file)'}, "
            f"signed is {signed or '(none)'}.",
            where=str(path or where),
            fix=f"restore {TRUST_FILE} from a copy, or train and judge again",
        )


def find_contamination_report(statement: Statement, evidence: Path) -> Path | None:
    """The file of the evidence that is the contamination report; None when it is not there, or none was made."""
    named = statement.predicate.digests.get("contamination")
    found = next((path for path, digest in statement.predicate.evidence.items() if digest == named), None)
    return None if found is None else evidence / found


def _digests(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): digest_file(path) for path in folder.rglob("*") if path.is_file()}


def _compare(expected: Mapping[str, str], folder: Path, what: str) -> None:
    fix = "do not use this model; bring the files back from a copy, or train and judge again"
    try:
        found = _digests(folder)
    except OSError as error:
        raise CertificateError(
            f"A file of {what} cannot be read: {error.strerror or error}", where=str(error.filename or folder), fix=fix
        ) from error
    for names, problem in (
        (expected.keys() - found.keys(), "is missing"),
        (found.keys() - expected.keys(), "was added"),
        ({name for name in expected.keys() & found.keys() if expected[name] != found[name]}, "was altered"),
    ):
        if names:
            first, *others = sorted(names)
            more = f" ({len(others)} more like it)" if others else ""
            raise CertificateError(f"A file of {what} {problem}{more}.", where=str(folder / first), fix=fix)
