"""From a certified promotion to a version in the registry that is champion, or waits to be, and the way back.

Each step leaves a state that the next call recognises: killed anywhere and called again, it ends the same.
"""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tasks.contracts.confidence import TRUST, TRUST_FILE, TrustRef
from tasks.contracts.errors import CertificateError, RegistryError
from tasks.contracts.prompt import decoding_for
from tasks.contracts.references import (
    CertificateRef,
    Outcome,
    RegisteredModelRef,
    Release,
    ReleaseKind,
    TrainedModelRef,
    Verdict,
    VerdictRef,
)
from tasks.contracts.spec import DataSpec, ExecutionSpec, RetrainSpec
from tasks.registry.add import TRUST_DIGEST, NewVersion, add_version, let_wait, move_aliases
from tasks.registry.versions import (
    CHAMPION,
    PREVIOUS,
    ROLLED_BACK,
    VERDICT_DIGEST,
    Rollback,
    ServedTask,
    aliases_of,
    describe,
    refusal_of,
    registry_errors,
    rollback_of,
    version_tags,
    versions_of,
)
from tasks.store import Store, digest_file, digest_folder
from tasks.tracking import MERGED_DIGEST, connect, registered_files

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


class _Files(NamedTuple):
    """What goes into the registered model, each checked."""

    merged: Path
    adapter: Path
    verdict: Path
    certificate: Path
    evidence: Path


def register(
    verdict: VerdictRef,
    certificate: CertificateRef,
    trained: TrainedModelRef,
    spec: RetrainSpec,
    *,
    waits: bool = False,
    trust: TrustRef | None = None,
) -> RegisteredModelRef:
    """Register the candidate that a certificate releases, and make it champion, or let it wait for its rollout.

    What the certificate says is compared with what is handed over; whose signature it bears is for those to check who
    use the model (`goldgate verify`), with a key that they trust.

    Args:
        verdict: must name the digest of `trained`, have been reached against today's champion, and say PROMOTE unless
            the certificate says that a person forced the promotion.
        certificate: must be about `trained` and `verdict`.
        trained: the candidate.
        spec: gives the registered model's name, the task, the length of answers, what is said of the data, and where
            the registry is.
        waits: it gets the alias `promoted`; `champion` moves when it is rolled out.
        trust: how far its answers are trusted; goes with the version. A version that was made before keeps what it has
            (`has_trust`), since its files never change.

    Raises:
        CertificateError: the certificate is about another model or another verdict, says something else of the data
            or of the trust, or releases nothing.
        RegistryError: the verdict does not cover this, the candidate was rolled back or its rollout refused before, or
            MLflow refuses. In all of these cases the alias `champion` has not moved.
        StoreError: a file of the candidate, of the verdict or of the certificate was changed.
        ServiceError: MLflow cannot be reached.
    """
    store = Store(spec.execution.store)
    trust_file = _trust_file(trust, store) if trust is not None else None
    files = _checked(verdict, certificate, trained, trust_file, store, spec.data)
    client = connect(spec.execution)
    with registry_errors(spec.execution):
        found = _check_registry(client, verdict, trained, spec.name)
        if found is None:
            new = NewVersion(
                served=ServedTask(
                    task=spec.task,
                    prompt=verdict.verdict.candidate.prompt,
                    decoding=decoding_for(spec.task, spec.evaluate.max_new_tokens),
                ),
                artifacts={
                    "model": files.merged,
                    "adapter": files.adapter,
                    "verdict": files.verdict,
                    "certificate": files.certificate,
                    "evidence": files.evidence,
                    **({TRUST: trust_file} if trust_file is not None else {}),
                },
                tags=version_tags(verdict, certificate, trained, spec.data)
                | ({TRUST_DIGEST: digest_file(trust_file)} if trust_file is not None else {}),
                description=describe(verdict.verdict, certificate.release, spec.data),
            )
            # The certificate, which names the trust, is part of the key: what a killed call has uploaded holds these
            # and no others.
            about = [trained.merged_digest, verdict.digest, certificate.digest]
            key = sha256(f"register {' '.join(about)}".encode()).hexdigest()
            title = f"register {trained.merged_digest[:8]}"
            found = add_version(spec.execution, spec.name, title, new, key=key)
            _check_registry(client, verdict, trained, spec.name)  # another may have been promoted during the upload
        version = str(found.version)
        if waits:
            alias, previous = let_wait(client, spec.name, version)
        else:
            alias, previous = CHAMPION, move_aliases(client, spec.name, version)
    return RegisteredModelRef(
        name=spec.name,
        version=version,
        alias=alias,
        digest=trained.merged_digest,
        previous_version=previous,
    )


def has_trust(registered: RegisteredModelRef, trust: TrustRef, execution: ExecutionSpec) -> bool:
    """Whether this is the trust that a version was registered with.

    Raises:
        RegistryError: MLflow refuses.
        StoreError: the trust's file was changed.
        ServiceError: MLflow cannot be reached.
    """
    client = connect(execution)
    with registry_errors(execution):
        kept = client.get_model_version(registered.name, registered.version).tags.get(TRUST_DIGEST)
    return kept == digest_file(_trust_file(trust, Store(execution.store)))


def _trust_file(trust: TrustRef, store: Store) -> Path:
    return store.files(store.open(trust.uri)) / TRUST_FILE


def rollback(name: str, execution: ExecutionSpec, reason: str) -> RegisteredModelRef:
    """Make the previous version champion again; the champion becomes the previous one, tagged with the reason.

    Killed half-way and called again, it goes on where it was. A second call swaps back.

    Raises:
        RegistryError: there is no previous version, or its files were changed.
        ServiceError: MLflow cannot be reached.
    """
    client = connect(execution)
    with registry_errors(execution):
        aliases = aliases_of(client, name)
        champion, previous = aliases.get(CHAMPION), aliases.get(PREVIOUS)
        if champion is not None and champion == previous:
            taken_back = [
                (r.at, v) for v in versions_of(client, name) if (r := rollback_of(v)) and r.to_version == champion
            ]
            if taken_back:
                _, version = max(taken_back, key=lambda pair: pair[0])
                client.set_registered_model_alias(name, PREVIOUS, version.version)
                return _champion_ref(client, name)
        if champion is None or previous is None or champion == previous:
            raise RegistryError(
                f"{name!r} has no previous version to go back to.",
                where=f"models:/{name}@{PREVIOUS}",
                fix="see `goldgate status`; a first champion can only be taken out of service",
            )
    registered_files(f"models:/{name}/{previous}", execution)  # checks that the old one still is what it was
    with registry_errors(execution):
        mark = Rollback(reason=reason, to_version=previous, at=datetime.now(UTC))
        client.set_model_version_tag(name, champion, ROLLED_BACK, mark.model_dump_json())
        client.set_registered_model_alias(name, CHAMPION, previous)
        if ROLLED_BACK in client.get_model_version(name, previous).tags:  # a person wants it back
            client.delete_model_version_tag(name, previous, ROLLED_BACK)
        client.set_registered_model_alias(name, PREVIOUS, champion)
        return _champion_ref(client, name)


def _champion_ref(client: MlflowClient, name: str) -> RegisteredModelRef:
    aliases = aliases_of(client, name)
    digest = client.get_model_version(name, aliases[CHAMPION]).tags[MERGED_DIGEST]
    return RegisteredModelRef(
        name=name, version=aliases[CHAMPION], alias=CHAMPION, digest=digest, previous_version=aliases.get(PREVIOUS)
    )


def _checked(
    verdict: VerdictRef,
    certificate: CertificateRef,
    trained: TrainedModelRef,
    trust: Path | None,
    store: Store,
    data: DataSpec,
) -> _Files:
    """The files to register, after every check that needs no registry."""
    decided, release = verdict.verdict, certificate.release
    if decided.outcome is not Outcome.PROMOTE and release.kind is not ReleaseKind.FORCED:
        raise RegistryError(
            f"The verdict is {decided.outcome.value}; only a promotion is registered.",
            where=verdict.uri,
            fix="nothing: the registry stays as it is; train another candidate, or, to take this one all the same, "
            "`goldgate override promote RUN_FOLDER --by … --reason …`",
        )
    if not release.promoted:
        raise CertificateError(
            f"The certificate releases nothing: it is {release.kind.value}.",
            where=certificate.uri,
            fix="nothing: the registry stays as it is until a person approves the promotion",
        )
    named = decided.digests.get("candidate")
    if named != trained.merged_digest or decided.candidate.digest != trained.merged_digest:
        raise RegistryError(
            f"The verdict is about {named or 'no model'}, this model is {trained.merged_digest}.",
            where=verdict.uri,
            fix="run the flow again, so that this model gets a verdict of its own",
        )
    verdict_file = store.files(store.open(verdict.uri)) / "verdict.json"
    if Verdict.model_validate_json(verdict_file.read_text(encoding="utf-8")) != decided:
        raise RegistryError(
            "The verdict that was handed over is not the one that was kept.",
            where=str(verdict_file),
            fix="run the flow again from the gate",
        )
    certificate_file, evidence = _check_certificate(certificate, trained, verdict_file, trust, store, data)
    folder = store.files(store.open(trained.uri))
    for name, expected in (("merged", trained.merged_digest), ("adapter", trained.adapter_digest)):
        if digest_folder(folder / name) != expected:
            raise RegistryError(
                f"The files of {name}/ do not have the digest {expected} that the verdict was reached on.",
                where=str(folder / name),
                fix=f"delete {trained.uri} and run again; it will be trained anew",
            )
    return _Files(folder / "merged", folder / "adapter", verdict_file, certificate_file, evidence)


def _check_certificate(
    certificate: CertificateRef,
    trained: TrainedModelRef,
    verdict_file: Path,
    trust: Path | None,
    store: Store,
    data: DataSpec,
) -> tuple[Path, Path]:
    """The certificate's file and its evidence, if it is about this model, verdict, release, trust and these data."""
    artefact = store.open(certificate.uri)
    folder = store.files(artefact)
    path, evidence = folder / "certificate.json", folder / "evidence"
    try:
        statement = json.loads(base64.b64decode(json.loads(path.read_text(encoding="utf-8"))["payload"]))
        digests = {one["name"]: one["digest"]["sha256"] for one in statement["subject"]}
        release = Release.model_validate(statement["predicate"]["release"])
        origin = (statement["predicate"].get("provenance"), statement["predicate"].get("licence"))
        signed_trust = statement["predicate"]["digests"].get(TRUST)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CertificateError(
            f"The certificate cannot be read: {error}",
            where=str(path),
            fix=f"delete {certificate.uri} and run again; it will be made anew",
        ) from error
    if digests.get("model") != trained.merged_digest:
        problem = f"The certificate is about {digests.get('model', 'no model')}, this model is {trained.merged_digest}."
    elif digest_file(evidence / "verdict.json") != digest_file(verdict_file):
        problem = "The certificate is about another verdict on this model."
    elif release != certificate.release or artefact.manifest.digest != certificate.digest:
        problem = "The certificate that was handed over is not the one that was kept."
    elif origin != (data.provenance, data.licence):
        problem = "The certificate says something else of the data's provenance or licence than the configuration."
    elif signed_trust != (digest_file(trust) if trust is not None else None):
        problem = "The certificate says something else of how far the answers are trusted than what was learnt."
    else:
        return path, evidence
    raise CertificateError(
        problem, where=str(path), fix="run the flow again, so that this verdict gets its certificate"
    )


def _check_registry(
    client: MlflowClient, verdict: VerdictRef, trained: TrainedModelRef, name: str
) -> ModelVersion | None:
    """The version that an earlier call made of the same model and verdict, or None, if it may become champion."""
    versions = versions_of(client, name)
    same_model = [version for version in versions if version.tags.get(MERGED_DIGEST) == trained.merged_digest]
    for version in same_model:
        taken_back = rollback_of(version)
        if taken_back is not None:
            raise RegistryError(
                f"This model was version {version.version} and was rolled back: {taken_back.reason}",
                where=f"models:/{name}/{version.version}",
                fix="train another candidate; to take this one back after all, "
                f"call `goldgate rollback {name} --reason …` again",
            )
        refused = refusal_of(version)
        if refused is not None:
            raise RegistryError(
                f"This model is version {version.version}, and its rollout was refused: {' '.join(refused.reasons)}",
                where=f"models:/{name}/{version.version}",
                fix="train another candidate; to try this one again, "
                f"`goldgate rollout CONFIG --version {version.version}`",
            )
    found = next((version for version in same_model if version.tags.get(VERDICT_DIGEST) == verdict.digest), None)
    number = aliases_of(client, name).get(CHAMPION)
    if number is not None and (found is None or str(found.version) != number):
        champion = client.get_model_version(name, number)
        if champion.tags.get(MERGED_DIGEST) != verdict.verdict.digests.get("baseline"):
            raise RegistryError(
                f"The verdict was reached against {verdict.verdict.baseline.label}; version {number} is champion now.",
                where=f"models:/{name}@{CHAMPION}",
                fix="run again: the candidate is then compared with today's champion",
            )
    return found
