"""What the registry says of its versions: tags that a person can read, and the same as data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from tasks.contracts.errors import RegistryError
from tasks.contracts.numbers import moment, place
from tasks.contracts.prompt import Decoding, Prompt
from tasks.contracts.references import (
    CertificateRef,
    Look,
    MetricComparison,
    Outcome,
    Release,
    ReleaseKind,
    TrainedModelRef,
    Verdict,
    VerdictRef,
)
from tasks.contracts.spec import DataSpec, ExecutionSpec, Frozen, TaskSpec
from tasks.tracking import MERGED_DIGEST, connect, sqlite_path, tracking_uri, without_password

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION = "champion"
PREVIOUS = "previous"
PROMOTED = "promoted"  # let in by its verdict, and waiting for its rollout
ADAPTER_DIGEST = "goldgate.adapter_digest"
VERDICT = "goldgate.verdict"
VERDICT_DIGEST = "goldgate.verdict_digest"
REASONS = "goldgate.reasons"
METRICS = "goldgate.metrics"
RUN_FINGERPRINT = "goldgate.fingerprint"
ROLLED_BACK = "goldgate.rolled_back"
ROLLOUT_REFUSED = "goldgate.rollout_refused"
RELEASE = "goldgate.release"
CERTIFICATE_DIGEST = "goldgate.certificate_digest"
KEY_ID = "goldgate.key_id"
LOOK = "goldgate.look"
PROVENANCE = "goldgate.data_provenance"
LICENCE = "goldgate.data_licence"
BASELINE_KEY = "goldgate.baseline_key"
_LONGEST_TAG = 100_000  # characters; MLflow refuses more
_LONGEST_PAGE = 5_000  # characters of a version's description that MLflow's tables hold
_LONGEST_ORIGIN = 500  # characters of it for where the data come from, and for their licence; all is in the tags


class ServedTask(Frozen):
    """How the registered model is asked: the file `task.json` beside its weights."""

    task: TaskSpec
    prompt: Prompt
    decoding: Decoding


class Rollback(Frozen):
    """That a version was taken back: when, why, and which version took its place."""

    reason: str
    to_version: str
    at: datetime


class Refusal(Frozen):
    """That a version was not brought into service: when, and why."""

    reasons: tuple[str, ...]
    at: datetime


class BaselineKind(StrEnum):
    """How a version without a verdict became champion: a person put it there."""

    FIRST_BASELINE = "first_baseline"  # there was no champion
    RE_BASELINE = "re_baseline"  # in place of another one


class VersionRelease(Frozen):
    """Why a version is in the registry: the `Release` of a promotion, or a baseline that a person set."""

    kind: ReleaseKind | BaselineKind
    by: str | None = None
    reason: str | None = None
    at: datetime | None = None

    def sentence(self) -> str:
        """In words: "forced by Ada on 22 November 2026, 14:57 UTC: the old one is wrong on refunds"."""
        if not self.by:
            return _RELEASES[self.kind]
        when = f" on {moment(self.at)}" if self.at else ""
        why = f": {_one_line(self.reason)}" if self.reason else ""
        return f"{_RELEASES[self.kind]} by {_one_line(self.by)}{when}{why}"


_RELEASES: dict[ReleaseKind | BaselineKind, str] = {
    ReleaseKind.BY_VERDICT: "promoted by its verdict",
    ReleaseKind.APPROVED: "promoted by its verdict, and approved",
    ReleaseKind.FORCED: "forced against its verdict",
    ReleaseKind.DECLINED: "declined",
    ReleaseKind.AWAITING: "awaiting approval",
    ReleaseKind.NOT_PROMOTED: "not promoted",
    BaselineKind.FIRST_BASELINE: "set as first baseline, without a verdict,",
    BaselineKind.RE_BASELINE: "set as new baseline, without a verdict,",
}


class VersionStatus(Frozen):
    """A version with what let it in.

    `outcome` is None for one without a verdict, `release` for one that Goldgate did not register.
    """

    version: str
    digest: str | None
    outcome: Outcome | None
    reasons: tuple[str, ...]
    metrics: tuple[MetricComparison, ...]
    registered: datetime
    rolled_back: Rollback | None
    release: VersionRelease | None = None
    look: Look | None = None
    certificate_digest: str | None = None
    key_id: str | None = None
    rollout_refused: Refusal | None = None

    def headline(self) -> str:
        """Why it is there, in a line; what a person did against or without a verdict comes first, in capitals."""
        first = self.reasons[0] if self.reasons else None
        if self.release is None:
            return first or "not registered by Goldgate"
        match self.release.kind:
            case BaselineKind.FIRST_BASELINE | BaselineKind.RE_BASELINE:
                return f"NO VERDICT: {_sentence(self.release)}"
            case ReleaseKind.FORCED:
                said = self.outcome.value.upper() if self.outcome else "unknown"
                return f"FORCED: {_sentence(self.release)} The verdict was {said}: {first}"
            case ReleaseKind.APPROVED:
                return f"{first} Approved by {_one_line(self.release.by or '')}."
            case _:
                return first or self.release.sentence()


class RegistryStatus(Frozen):
    """Which versions have the aliases, and how many there are."""

    name: str
    champion: VersionStatus | None
    previous: VersionStatus | None
    versions: int
    promoted: VersionStatus | None = None


def status(name: str, execution: ExecutionSpec) -> RegistryStatus:
    """The champion of a registered model, the version before it, and the one that waits; creates nothing.

    Raises:
        ServiceError: MLflow cannot be reached.
        RegistryError: MLflow refuses.
    """
    uri = tracking_uri(execution)
    if uri.startswith("sqlite:") and not sqlite_path(uri).exists():
        return RegistryStatus(name=name, champion=None, previous=None, versions=0)
    client = connect(execution)
    with registry_errors(execution):
        aliases = aliases_of(client, name)

        def at(alias: str) -> VersionStatus | None:
            return _status_of(client.get_model_version(name, aliases[alias])) if alias in aliases else None

        return RegistryStatus(
            name=name,
            champion=at(CHAMPION),
            previous=at(PREVIOUS),
            versions=len(versions_of(client, name)),
            promoted=at(PROMOTED),
        )


def registered_names(execution: ExecutionSpec) -> list[str]:
    """The names of all registered models, in order; creates nothing.

    Raises:
        ServiceError: MLflow cannot be reached.
        RegistryError: MLflow refuses.
    """
    uri = tracking_uri(execution)
    if uri.startswith("sqlite:") and not sqlite_path(uri).exists():
        return []
    client = connect(execution)
    with registry_errors(execution):
        return sorted(model.name for model in client.search_registered_models(max_results=1000))


def version_tags(
    verdict: VerdictRef, certificate: CertificateRef, trained: TrainedModelRef, data: DataSpec | None = None
) -> dict[str, str]:
    """The tags of a promoted version: digests, verdict with its reasons and numbers, release, look, certificate, and
    what is said of the data.
    """
    decided = verdict.verdict
    tags = {
        MERGED_DIGEST: trained.merged_digest,
        ADAPTER_DIGEST: trained.adapter_digest,
        RUN_FINGERPRINT: trained.fingerprint,
        VERDICT: decided.outcome.value,
        VERDICT_DIGEST: verdict.digest,
        REASONS: json.dumps(decided.reasons, ensure_ascii=False),
        RELEASE: certificate.release.model_dump_json(),
        CERTIFICATE_DIGEST: certificate.digest,
        KEY_ID: certificate.key_id,
        LOOK: decided.look.model_dump_json(),
        **{f"goldgate.digest.{name}": digest for name, digest in decided.digests.items()},
    }
    if not decided.withheld:
        tags[METRICS] = _as_tag(decided.metrics)
    return tags | _origin(data)


def baseline_tags(digest: str, release: VersionRelease, key: str) -> dict[str, str]:
    """The tags of a version that a person set as baseline: no verdict, and whose word it rests on."""
    return {MERGED_DIGEST: digest, RELEASE: release.model_dump_json(), BASELINE_KEY: key}


def describe(decided: Verdict, release: Release, data: DataSpec | None = None) -> str:
    """The version's page in a few lines of Markdown: the verdict, and where the data come from. That a person forced
    it comes before all else.
    """
    shown = VersionRelease.model_validate(release.model_dump())
    lines = []
    if release.kind is ReleaseKind.FORCED:
        lines += [f"**FORCED PROMOTION. The verdict was {decided.outcome.value.upper()}.** {_sentence(shown)}", ""]
    elif release.by:
        lines += [_sentence(shown), ""]
    lines += ["; ".join(decided.reasons), ""]
    last = f"Baseline: {decided.baseline.label}."
    for tag, text in _origin(data).items():
        last += f"\n\n{_ORIGIN_WORDS[tag]}: {_shortened(_one_line(text), _LONGEST_ORIGIN)}"
    rows = [] if decided.withheld else [_row(metric) for metric in decided.metrics]
    if rows:
        lines += ["| metric | baseline | candidate | difference | interval |", "|---|---|---|---|---|"]
    while rows and len("\n".join([*lines, *rows, "", _LEFT_OUT, last])) > _LONGEST_PAGE:
        rows.pop()
    left_out = [] if decided.withheld or len(rows) == len(decided.metrics) else [_LEFT_OUT]
    return "\n".join([*lines, *rows, "", *left_out, last])[:_LONGEST_PAGE]


def describe_baseline(release: VersionRelease) -> str:
    """The page of a version without a verdict."""
    return f"**NO VERDICT.** {_sentence(release)}\n\nNothing was compared, and there is no certificate."


def aliases_of(client: MlflowClient, name: str) -> dict[str, str]:
    """Alias -> version of a registered model; empty when there is no such model."""
    from mlflow.exceptions import MlflowException

    try:
        return {alias: str(version) for alias, version in client.get_registered_model(name).aliases.items()}
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return {}


def versions_of(client: MlflowClient, name: str) -> list[ModelVersion]:
    """All versions of a registered model, the newest first."""
    found: list[Any] = []
    token = None
    while True:
        page = client.search_model_versions(f"name='{name}'", max_results=200, page_token=token)
        found += page
        token = page.token
        if not token:
            return sorted(found, key=lambda version: int(version.version), reverse=True)


def rollback_of(version: ModelVersion) -> Rollback | None:
    """How a version was taken back; None when it was not."""
    text = version.tags.get(ROLLED_BACK)
    return Rollback.model_validate_json(text) if text else None


def refusal_of(version: ModelVersion) -> Refusal | None:
    """Why a version was not brought into service; None when that was never refused."""
    text = version.tags.get(ROLLOUT_REFUSED)
    return Refusal.model_validate_json(text) if text else None


def release_of(version: ModelVersion) -> VersionRelease | None:
    """Why a version was let in; None for one that Goldgate did not register, or before it kept releases."""
    text = version.tags.get(RELEASE)
    return VersionRelease.model_validate_json(text) if text else None


@contextmanager
def registry_errors(execution: ExecutionSpec) -> Iterator[None]:
    """Turn what MLflow refuses into an error that says where."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise RegistryError(
            f"MLflow refused: {error.message}",
            where=without_password(tracking_uri(execution)),
            fix="see the message; nothing was moved that is not said to be, and running again goes on from here",
        ) from error


_ORIGIN_WORDS = {PROVENANCE: "Provenance of the data", LICENCE: "Licence of the data"}


def _origin(data: DataSpec | None) -> dict[str, str]:
    """What is said of where the data come from, by tag."""
    said = {PROVENANCE: data.provenance, LICENCE: data.licence} if data is not None else {}
    return {tag: text for tag, text in said.items() if text is not None}


def _shortened(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


_LEFT_OUT = "The rows that do not fit here are in the report and in the certificate's evidence."


def _one_line(text: str) -> str:
    """What a person wrote, without line breaks and control characters: it is shown in terminals and tables."""
    return " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())


def _sentence(release: VersionRelease) -> str:
    text = release.sentence()
    return text[0].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def _row(m: MetricComparison) -> str:
    where = place(m.slice, m.suite)
    name = f"{m.metric}, {where}".replace("|", "\\|") if where else m.metric
    return (
        f"| {name} | {m.baseline:.3f} | {m.candidate:.3f} | {m.difference:+.3f} "
        f"| {m.low:+.3f} to {m.high:+.3f} ({m.confidence:.0%}, n = {m.n}) |"
    )


def _as_tag(metrics: tuple[MetricComparison, ...]) -> str:
    """As many rows as a tag holds; those of the whole set come first."""
    rows = [metric.model_dump(mode="json") for metric in metrics]
    while len(text := json.dumps(rows)) > _LONGEST_TAG:
        rows.pop()
    return text


def _status_of(version: ModelVersion) -> VersionStatus:
    tags = version.tags
    return VersionStatus(
        version=str(version.version),
        digest=tags.get(MERGED_DIGEST),
        outcome=Outcome(tags[VERDICT]) if VERDICT in tags else None,
        reasons=tuple(json.loads(tags.get(REASONS, "[]"))),
        metrics=tuple(MetricComparison.model_validate(metric) for metric in json.loads(tags.get(METRICS, "[]"))),
        registered=datetime.fromtimestamp(version.creation_timestamp / 1000, UTC),
        rolled_back=rollback_of(version),
        release=release_of(version),
        look=Look.model_validate_json(tags[LOOK]) if LOOK in tags else None,
        certificate_digest=tags.get(CERTIFICATE_DIGEST),
        key_id=tags.get(KEY_ID),
        rollout_refused=refusal_of(version),
    )
