"""Is a model what its certificate says, and does the certificate hold? One line a check."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from functools import partial
from pathlib import Path

import yaml
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape

import tasks.registry as registry_room
from tasks.contracts.confidence import TRUST
from tasks.contracts.errors import CertificateError, GoldgateError
from tasks.contracts.references import EvaluationSummary, Verdict
from tasks.contracts.spec import ExecutionSpec, Frozen
from tasks.gate.certificate import (
    CertificateFiles,
    check_evidence,
    check_files,
    check_golden,
    check_release,
    check_trust,
    check_verdict,
    find_certificate,
    find_contamination_report,
)
from tasks.gate.keys import open_trusted_key
from tasks.gate.statement import ADAPTER, MODEL, Statement, open_statement, read_hints
from tasks.registry.versions import (
    CERTIFICATE_DIGEST,
    LICENCE,
    LOOK,
    PROVENANCE,
    RELEASE,
    VERDICT,
    BaselineKind,
    ServedTask,
    VersionRelease,
)
from tasks.store import Store, digest_file, digest_folder
from tasks.store.digest import digest_files
from tasks.tracking import MERGED_DIGEST, RegisteredFiles, registered_files

_CODE = "served_model.py"
_LOADER = "mlflow.pyfunc.loaders.code_model"


class Finding(StrEnum):
    """What became of a check."""

    OK = "ok"
    FAILED = "failed"
    NOT_CHECKED = "not checked"


class Check(Frozen):
    """One thing that was looked at."""

    what: str
    finding: Finding
    detail: str


class Verification(Frozen):
    """All that was looked at. `holds`: nothing failed, and the signature and the verdict were both checked."""

    model: str
    holds: bool
    checks: tuple[Check, ...]


class _NotChecked(Exception):  # noqa: N818 - it is no error
    """Why a check cannot be made here."""


class _Checks:
    """Makes checks one after the other; a failed one does not stop the next."""

    def __init__(self) -> None:
        self.made: list[Check] = []

    def make(self, what: str, check: Callable[[], str]) -> bool:
        try:
            finding, detail = Finding.OK, check()
        except _NotChecked as reason:
            finding, detail = Finding.NOT_CHECKED, str(reason)
        except GoldgateError as error:
            finding, detail = Finding.FAILED, error.what + (f" ({error.where})" if error.where else "")
        self.made.append(Check(what=what, finding=finding, detail=detail))
        return finding is Finding.OK

    def result(self, model: str) -> Verification:
        found = {check.what: check.finding for check in self.made}
        proven = found.get("signature") is Finding.OK and found.get("verdict") is Finding.OK
        return Verification(model=model, holds=proven and Finding.FAILED not in found.values(), checks=tuple(self.made))


def verify(
    model: str, execution: ExecutionSpec, *, public_key: Path | None = None, golden: Path | None = None
) -> Verification:
    """Check a registered version, or a certificate by itself.

    Args:
        model: `models:/<name>@<alias>`, `models:/<name>/<version>`, or the folder of a certificate.
        execution: where store and registry are.
        public_key: PEM file of the key to trust; else GOLDGATE_PUBLIC_KEY, else the one beside the signing key.
        golden: folder of the golden set; else where it was when the certificate was made.

    Raises:
        ModelError: there is no such version.
        CertificateError: there is no certificate in the folder, or no key to check with.
        ServiceError: MLflow cannot be reached.
    """
    if not model.startswith("models:/"):
        files = find_certificate(Path(model))
        checks = _Checks()
        _check_certificate(checks, files, None, execution, public_key, golden)
        return checks.result(str(files.certificate.parent))
    registered = registered_files(model, execution, checked=False)
    shown = f"models:/{registered.name}/{registered.version}"
    checks = _Checks()
    if {"certificate", "evidence"} <= registered.artifacts.keys():
        files = CertificateFiles(registered.artifacts["certificate"], registered.artifacts["evidence"])
        _check_certificate(checks, files, registered, execution, public_key, golden)
    else:
        checks.made.append(_why_no_certificate(registered))
        checks.make("model", partial(_unsigned_digest, registered))
    return checks.result(shown)


def print_verification(console: Console, verification: Verification) -> None:
    """One line a check, and what follows."""
    say = partial(console.print, highlight=False, soft_wrap=True)
    say(f"[bold]{escape(verification.model)}[/]")
    marks = {
        Finding.OK: "[green]ok[/]         ",
        Finding.FAILED: "[bold red]FAILED[/]     ",
        Finding.NOT_CHECKED: "[yellow]not checked[/]",
    }
    for check in verification.checks:
        say(f"  {marks[check.finding]}  {check.what:<13} {escape(check.detail)}")
    failed = sum(check.finding is Finding.FAILED for check in verification.checks)
    if verification.holds:
        say("\nThe certificate holds.")
    elif failed:
        say(f"\n{failed} of {len(verification.checks)} checks failed. This model is not shown to be what it should be.")
    else:
        say("\nNothing failed, but signature and verdict were not both checked.")


def _check_certificate(
    checks: _Checks,
    files: CertificateFiles,
    registered: RegisteredFiles | None,
    execution: ExecutionSpec,
    public_key: Path | None,
    golden: Path | None,
) -> None:
    store = Store(execution.store)
    trusted = open_trusted_key(store, public_key)  # without one nothing can be said, so this stops the command
    statements: list[Statement] = []
    verdicts: list[Verdict] = []

    def signature() -> str:
        statements.append(open_statement(files.certificate, trusted.key))
        return f"by the key {trusted.key.keyid[:16]}…, trusted from {trusted.source}"

    if not checks.make("signature", signature):
        for what in ("model", "adapter", "evidence", "verdict", "release", "golden set"):
            detail = "what it should be is signed, and the signature does not hold"
            checks.made.append(Check(what=what, finding=Finding.NOT_CHECKED, detail=detail))
        return
    (statement,) = statements
    said = statement.predicate

    def evidence() -> str:
        check_evidence(statement, files.evidence)
        return f"{len(said.evidence)} files"

    def verdict() -> str:
        verdicts.append(check_verdict(statement, files.evidence))
        return f"{said.outcome.value.upper()}, computed again from {verdicts[0].n:,} items: the same"

    def release() -> str:
        check_release(said.release, said.outcome, said.policy, where=str(files.certificate))
        return VersionRelease.model_validate(said.release.model_dump()).sentence()

    def contamination() -> str:
        report = find_contamination_report(statement, files.evidence)
        if report is not None:
            return f"{report.name}, under the digest that the verdict names"
        named = said.digests.get("contamination")
        raise _NotChecked(f"not in the evidence; sha256 {named}" if named else "the verdict names no report")

    for subject in (MODEL, ADAPTER):
        if registered is not None or subject in said.files:
            checks.make(subject, partial(_subject, statement, subject, files, registered, store))
    checks.make("evidence", evidence)
    checks.make("verdict", verdict)
    checks.make("release", release)
    checks.make("golden set", partial(_golden, statement, files, golden))
    checks.make("contamination", contamination)
    if registered is not None:
        if verdicts:
            checks.make("prompt", partial(_prompt, registered, verdicts[0], files))
        checks.make("trust", partial(_trust, statement, registered))
        checks.make("code", partial(_code, registered))
        checks.make("registry", partial(_registry, statement, files, registered))


def _subject(
    statement: Statement, subject: str, files: CertificateFiles, registered: RegisteredFiles | None, store: Store
) -> str:
    """The files of model or adapter: those of the registered version, else those in the store, if they are there."""
    if registered is not None:
        if subject not in registered.artifacts:
            raise CertificateError(f"The version has no {subject}, and the certificate names one.", fix="use another")
        folder = registered.artifacts[subject]
    else:
        hint = read_hints(files.certificate).trained
        try:
            artefact = store.open(hint or "")
        except GoldgateError as error:
            raise _NotChecked("its files are not here; name a registered version to check them") from error
        folder = Path(artefact.uri, artefact.manifest.folder) if store.local else store.files(artefact)
        folder /= {MODEL: "merged", ADAPTER: "adapter"}[subject]
    check_files(statement, subject, folder)
    return f"{len(statement.predicate.files[subject])} files, sha256 {statement.digest_of(subject)}"


def _golden(statement: Statement, files: CertificateFiles, given: Path | None) -> str:
    folder = given
    if folder is None:
        hint = read_hints(files.certificate).golden_set
        if hint is None or not Path(hint).is_dir():
            at = f" (it was at {hint})" if hint else ""
            raise _NotChecked(f"its folder is not known here{at}; give --golden FOLDER")
        folder = Path(hint)
    check_golden(statement, folder)
    return f"{folder}, sha256 {statement.predicate.digests['golden_set']}"


def _prompt(registered: RegisteredFiles, verdict: Verdict, files: CertificateFiles) -> str:
    """Whether the version is asked as the candidate was when it was judged."""
    path = registered.artifacts["task"]
    try:
        served = ServedTask.model_validate_json(path.read_text(encoding="utf-8"))
        summary = (files.evidence / "candidate" / "summary.json").read_text(encoding="utf-8")
        decoding = EvaluationSummary.model_validate_json(summary).conditions.decoding
    except (OSError, ValueError) as error:
        raise CertificateError(f"How it is asked cannot be read: {error}", where=str(path), fix="restore it") from error
    if (served.prompt, served.decoding) != (verdict.candidate.prompt, decoding):
        raise CertificateError(
            "The version is asked in another way than the candidate was when it was judged.",
            where=str(path),
            fix="restore it from a copy",
        )
    return "asked as it was when it was judged"


def _trust(statement: Statement, registered: RegisteredFiles) -> str:
    """Whether what the gateway goes by when it flags an answer is what was signed."""
    path = registered.artifacts.get(TRUST)
    check_trust(statement, path, where=f"models:/{registered.name}/{registered.version}")
    if path is None:
        return "nothing was learnt of how far its answers are trusted, and nothing is there"
    return f"{path.name}, sha256 {statement.predicate.digests[TRUST]}"


def _code(registered: RegisteredFiles) -> str:
    """Whether `mlflow.pyfunc` would run the code of this Goldgate; it is not signed, and an older one is no fault."""
    path, expected = registered.root / _CODE, Path(registry_room.__file__).with_name(_CODE)
    try:
        flavor = yaml.safe_load((registered.root / "MLmodel").read_text(encoding="utf-8"))["flavors"]["python_function"]
        loaded = (flavor["loader_module"], Path(flavor["model_code_path"]).name, flavor.get("code"))
        same = digest_file(path) == digest_file(expected)
    except (OSError, KeyError, TypeError, yaml.YAMLError) as error:
        raise CertificateError(
            f"The code beside the model cannot be read: {error}", where=str(path), fix="restore it"
        ) from error
    if loaded != (_LOADER, _CODE, None):
        raise CertificateError(
            "Loading this version with mlflow.pyfunc would run other code than Goldgate's.",
            where=str(registered.root / "MLmodel"),
            fix="do not load it; serve the model's files by themselves",
        )
    if not same:
        raise _NotChecked(f"{path.name} is not that of this version of Goldgate, and it is not signed")
    return f"{path.name} is that of this version of Goldgate"


def _registry(statement: Statement, files: CertificateFiles, registered: RegisteredFiles) -> str:
    """Whether name and tags of the version say what is signed."""
    said, tags = statement.predicate, registered.tags
    digests = {f"evidence/{path}": digest for path, digest in said.evidence.items()}
    kept = digest_files(digests | {"certificate.json": digest_file(files.certificate)})
    expected = {
        MERGED_DIGEST: statement.digest_of(MODEL),
        VERDICT: said.outcome.value,
        RELEASE: said.release.model_dump_json(),
        LOOK: said.look.model_dump_json(),
        PROVENANCE: said.provenance,
        LICENCE: said.licence,
        CERTIFICATE_DIGEST: kept,
    }
    differing = [tag for tag, value in expected.items() if tags.get(tag) != value]
    if said.task != registered.name:
        differing.append(f"name (signed: {said.task})")
    verdict = registered.artifacts.get("verdict")
    if verdict is None or not verdict.is_file() or digest_file(verdict) != said.evidence.get("verdict.json"):
        differing.append("the verdict beside the model")
    if differing:
        raise CertificateError(
            f"The registry says something else than the certificate: {', '.join(differing)}.",
            where=f"models:/{registered.name}/{registered.version}",
            fix="find out who changed it; the certificate is what counts",
        )
    return "name and tags say the same"


def _why_no_certificate(registered: RegisteredFiles) -> Check:
    try:
        release = VersionRelease.model_validate_json(registered.tags.get(RELEASE, ""))
    except ValidationError:
        release = None
    if release is not None and isinstance(release.kind, BaselineKind):
        return Check(what="verdict", finding=Finding.FAILED, detail=f"There is no verdict: {release.sentence()}")
    detail = "There is none: this version was registered without one, so nothing can be shown of it."
    return Check(what="certificate", finding=Finding.FAILED, detail=detail)


def _unsigned_digest(registered: RegisteredFiles) -> str:
    """The only thing there is to compare without a certificate, which anyone who can write tags can change."""
    expected = registered.tags.get(MERGED_DIGEST)
    if expected is None:
        raise _NotChecked("the version has no tag that names its bytes")
    if digest_folder(registered.artifacts["model"]) != expected:
        raise CertificateError(
            "The files are not those that were registered.",
            where=str(registered.artifacts["model"]),
            fix="restore them",
        )
    return f"as registered (a tag, not signed): sha256 {expected}"
