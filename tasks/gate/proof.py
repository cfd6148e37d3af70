"""What a registered version's certificate proves to somebody who is about to serve it."""

from __future__ import annotations

from tasks.contracts.confidence import TRUST
from tasks.contracts.errors import CertificateError
from tasks.contracts.numbers import moment
from tasks.contracts.references import EvaluationSummary, Release
from tasks.contracts.serving import Proof, VersionRef
from tasks.contracts.spec import ExecutionSpec
from tasks.gate.certificate import CertificateFiles, check_files, check_trust, verify_certificate
from tasks.gate.keep import ITEMS_FILE, SUMMARY_FILE
from tasks.gate.keys import open_trusted_key
from tasks.gate.ledger import DecisionKind, Ledger, ledger_url
from tasks.gate.statement import MODEL
from tasks.store import Store, digest_folder
from tasks.tracking import registered_files

_BASELINES = (DecisionKind.FIRST_BASELINE, DecisionKind.RE_BASELINE)


def prove(version: VersionRef, execution: ExecutionSpec) -> Proof | None:
    """Check the certificate of a version with the key that is trusted here, and every file that it names.

    The signature, the model's files, the evidence, how far its answers are trusted, and the verdict, which is computed
    again; then that the version is of the task, has the bytes, and is asked in the way that the certificate says.

    Returns:
        What it says; None for a baseline that a person set, for whom the ledger has that person's word.

    Raises:
        CertificateError: it is signed by another key, was altered, or is about something else; or there is none and
            the ledger knows of no baseline with this digest.
        LedgerError: the ledger cannot be read.
        ModelError, RegistryError, ServiceError: as `registered_files`.
    """
    files = registered_files(version.uri, execution, checked=False)
    if not version.certified:
        if TRUST in files.artifacts:
            raise CertificateError(
                "This version has no certificate, and says how far its answers are trusted: nobody has signed that.",
                where=str(files.artifacts[TRUST]),
                fix="find out who changed the registry, and restore the version from a copy",
            )
        _check_word(version, digest_folder(files.artifacts["model"]), execution)
        return None
    trusted = open_trusted_key(Store(execution.store))
    found = CertificateFiles(files.artifacts["certificate"], files.artifacts["evidence"])
    statement = verify_certificate(found, trusted.key)
    said = statement.predicate
    check_files(statement, MODEL, files.artifacts["model"])
    check_trust(statement, files.artifacts.get(TRUST), where=version.uri)
    candidate = found.evidence / "candidate"
    summary = EvaluationSummary.model_validate_json((candidate / SUMMARY_FILE).read_text(encoding="utf-8"))
    for what, signed, claimed in (
        ("digest", statement.digest_of(MODEL), version.digest),
        ("task", said.task, version.name),
        ("prompt", summary.system.prompt, version.prompt),
        ("decoding", summary.conditions.decoding, version.decoding),
    ):
        if signed != claimed:
            raise CertificateError(
                f"The registry says another {what} than the certificate: {_short(claimed)}; signed: {_short(signed)}.",
                where=version.uri,
                fix="find out who changed the registry (`goldgate verify`); the certificate is what counts",
            )
    return Proof(
        key_id=trusted.key.keyid,
        trusted=trusted.source,
        golden_digest=said.digests["golden_set"],
        outcomes=str(candidate / ITEMS_FILE),
        release=_release(said.release),
    )


def _check_word(version: VersionRef, digest: str, execution: ExecutionSpec) -> None:
    """A baseline has no certificate, but a person has said in the ledger which bytes it is."""
    if digest != version.digest:
        raise CertificateError(
            f"The files are not those that were registered: their digest is {digest}, {version.digest} was registered.",
            where=version.uri,
            fix="restore them from a copy",
        )
    with Ledger.open(ledger_url(execution)) as ledger:
        decided = ledger.decisions(version.name)
    if not any(one.kind in _BASELINES and one.model == digest for one in decided):
        raise CertificateError(
            "This version has no certificate, and nobody has set a baseline with its digest.",
            where=version.uri,
            fix="promote it through the gate, or set it as baseline (`goldgate override baseline`), with your name",
        )


def _release(release: Release) -> str:
    kind = release.kind.value.replace("_", " ")
    if not release.by:
        return kind
    return f"{kind}, {release.by}{f', {moment(release.at)}' if release.at else ''}"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 100 else f"{text[:99]}…"
