"""What a certificate says (an in-toto Statement v1), and the signed envelope around it (DSSE v1).

https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md
https://github.com/secure-systems-lab/dsse/blob/master/envelope.md
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import Error as SecureSystemsError
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import SSlibKey

from tasks.contracts.errors import CertificateError
from tasks.contracts.references import Look, Outcome, Release, Requirement, SelfTest
from tasks.contracts.spec import Frozen, Policy
from tasks.gate.keys import SigningKey
from tasks.store import digest_bytes

PAYLOAD_TYPE = "application/vnd.in-toto+json"
# A name, not an address: nobody can own a domain below .example (RFC 2606). A change that an older reader would
# misread raises the version.
PREDICATE_TYPE: Literal["https://goldgate.example/promotion/v1"] = "https://goldgate.example/promotion/v1"
MODEL = "model"
ADAPTER = "adapter"
_HINTS = "unsigned"  # a field of the envelope beside those of DSSE, whose readers ignore what they do not know
_DISTRUST = "trust nothing that this certificate says; bring it back from a copy, or run the flow again"


class Subject(Frozen):
    """What the statement is about: a folder of files, named by one digest."""

    name: str
    digest: dict[str, str]
    annotations: dict[str, str] = {
        "digested": 'sha256 of the JSON object {"<relative path>": "<sha256 of the file>", ...}, UTF-8, keys sorted, '
        "no white space"
    }


class Code(Frozen):
    """Which code did a step; "-dirty" behind the commit says that files differed from it."""

    git_commit: str | None
    libraries: dict[str, str]


def _unsaid(value: str | None) -> bool:
    return value is None


class Promotion(Frozen):
    """The predicate: why this model may run.

    Attributes:
        task: name of the task, which is that of the registered model.
        digests: sha256 of `data` (the splits), `golden_set`, `candidate`, `baseline`, `candidate_outcomes`,
            `baseline_outcomes`, `adapter`, `base_model`, `contamination` where a report was kept, and `trust` where it
            was learnt how far the model's answers are trusted.
        files: sha256 of each file of the subjects, by subject and path.
        code: by step, what trained the model and what judged it.
        outcome: what the gate said; PROMOTE unless a person forced the promotion.
        release: why the model goes into the registry, with the person's name and reason where one decided.
        evidence: sha256 of each file that lies beside this certificate, by path.
        provenance: where the data come from, in the words of whoever configured the run; None where nothing was said.
        licence: licence of the data, likewise.
    """

    task: str
    digests: dict[str, str]
    files: dict[str, dict[str, str]]
    code: dict[str, Code]
    policy: Policy
    requirements: tuple[Requirement, ...]
    look: Look
    self_test: SelfTest | None
    outcome: Outcome
    reasons: tuple[str, ...]
    release: Release
    evidence: dict[str, str]
    # Left out where nothing was said, so that a reader from before they existed can read such a certificate.
    provenance: str | None = Field(default=None, exclude_if=_unsaid)
    licence: str | None = Field(default=None, exclude_if=_unsaid)


class Statement(Frozen):
    """An in-toto Statement v1 about a promotion."""

    type_: Literal["https://in-toto.io/Statement/v1"] = Field(default="https://in-toto.io/Statement/v1", alias="_type")
    subject: tuple[Subject, ...]
    predicate_type: Literal["https://goldgate.example/promotion/v1"] = Field(
        default=PREDICATE_TYPE, alias="predicateType"
    )
    predicate: Promotion

    def digest_of(self, subject: str) -> str | None:
        """The sha256 of a subject; None when the statement is not about it."""
        return next((one.digest.get("sha256") for one in self.subject if one.name == subject), None)


class Hints(Frozen):
    """What is not signed and proves nothing: where things were, and what lets a message say which part was altered."""

    payload_sha256: str | None = None
    golden_set: str | None = None
    trained: str | None = None


def sign(statement: Statement, key: SigningKey, hints: Hints) -> str:
    """The signed envelope, as JSON."""
    payload = statement.model_dump_json(by_alias=True).encode()
    envelope = Envelope(payload, PAYLOAD_TYPE, {})
    envelope.sign(key.signer)
    own = hints.model_copy(update={"payload_sha256": digest_bytes(payload)})
    return json.dumps(envelope.to_dict() | {_HINTS: own.model_dump(mode="json")}, indent=2) + "\n"


def read_hints(path: Path) -> Hints:
    """The unsigned part of an envelope; empty when there is none that can be read."""
    try:
        return Hints.model_validate(json.loads(path.read_text(encoding="utf-8")).get(_HINTS, {}))
    except (OSError, ValueError, AttributeError):
        return Hints()


def open_statement(path: Path, key: SSlibKey) -> Statement:
    """The statement in an envelope, after its signature was checked with a key that the caller trusts.

    Raises:
        CertificateError: the file is no envelope, holds something else, is signed by another key, or was altered after
            it was signed; says which.
    """
    envelope = _read(path)
    if envelope.payload_type != PAYLOAD_TYPE:  # it is under the signature: another type with a good one is not ours
        raise CertificateError(
            f"The envelope holds {envelope.payload_type!r}, and a certificate is {PAYLOAD_TYPE!r}.",
            where=f"{path}: payloadType",
            fix=_DISTRUST,
        )
    if not envelope.signatures:
        raise CertificateError("The certificate is not signed.", where=f"{path}: signatures", fix=_DISTRUST)
    if key.keyid not in envelope.signatures:
        raise CertificateError(
            f"The certificate is signed by the key {', '.join(sorted(envelope.signatures))}, and the trusted key is "
            f"{key.keyid}.",
            where=f"{path}: signatures",
            fix="give the public key of whoever signed (--public-key), if you trust them; else do not use this model",
        )
    try:
        envelope.verify([key], 1)
    except VerificationError as error:
        hint = read_hints(path).payload_sha256
        if hint is not None and hint != digest_bytes(envelope.payload):
            what, where = "The payload was altered after it was signed.", "payload"
        else:
            what = (
                f"The signature is not one of the key {key.keyid} over this payload: it was altered, taken from "
                "another certificate, or made with another key under this one's name."
            )
            where = "signatures"
        raise CertificateError(what, where=f"{path}: {where}", fix=_DISTRUST) from error
    try:
        return Statement.model_validate_json(envelope.payload)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise CertificateError(
            "The signature holds, but what is signed cannot be read as a promotion: "
            f"{'.'.join(map(str, first['loc']))}: {first['msg']}",
            where=f"{path}: payload",
            fix="use the version of Goldgate that wrote it; this one reads " + PREDICATE_TYPE,
        ) from error


def _read(path: Path) -> Envelope:
    try:
        record: Any = json.loads(path.read_text(encoding="utf-8"))
        return Envelope.from_dict(record)
    except OSError as error:
        raise CertificateError(
            f"The certificate cannot be read: {error.strerror or error}",
            where=str(path),
            fix="give a model that Goldgate registered, or the folder of a certificate",
        ) from error
    # The library's parser says a missing or ill-typed field in whatever way Python does.
    except (ValueError, KeyError, TypeError, AttributeError, SecureSystemsError) as error:
        raise CertificateError(
            f"The certificate is no signed envelope: {type(error).__name__}: {error}", where=str(path), fix=_DISTRUST
        ) from error
