"""What the registry says of its versions: tags that a person can read, and the same as data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from tasks.contracts.errors import RegistryError
from tasks.contracts.prompt import Decoding, Prompt
from tasks.contracts.references import MetricComparison, Outcome, TrainedModelRef, Verdict, VerdictRef
from tasks.contracts.spec import ExecutionSpec, Frozen, TaskSpec
from tasks.tracking import MERGED_DIGEST, connect, sqlite_path, tracking_uri, without_password

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION = "champion"
PREVIOUS = "previous"
ADAPTER_DIGEST = "goldgate.adapter_digest"
VERDICT = "goldgate.verdict"
VERDICT_DIGEST = "goldgate.verdict_digest"
REASONS = "goldgate.reasons"
METRICS = "goldgate.metrics"
RUN_FINGERPRINT = "goldgate.fingerprint"
ROLLED_BACK = "goldgate.rolled_back"


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


class VersionStatus(Frozen):
    """A version with the verdict that let it in. `outcome` is None for one that Goldgate did not register."""

    version: str
    digest: str | None
    outcome: Outcome | None
    reasons: tuple[str, ...]
    metrics: tuple[MetricComparison, ...]
    registered: datetime
    rolled_back: Rollback | None


class RegistryStatus(Frozen):
    """Which versions have the aliases, and how many there are."""

    name: str
    champion: VersionStatus | None
    previous: VersionStatus | None
    versions: int


def status(name: str, execution: ExecutionSpec) -> RegistryStatus:
    """The champion of a registered model and the version before it; creates nothing.

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
            name=name, champion=at(CHAMPION), previous=at(PREVIOUS), versions=len(versions_of(client, name))
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


def version_tags(verdict: VerdictRef, trained: TrainedModelRef) -> dict[str, str]:
    """The tags of a new version: digests, verdict with its reasons and numbers, and the recipe it came from."""
    decided = verdict.verdict
    return {
        MERGED_DIGEST: trained.merged_digest,
        ADAPTER_DIGEST: trained.adapter_digest,
        RUN_FINGERPRINT: trained.fingerprint,
        VERDICT: decided.outcome.value,
        VERDICT_DIGEST: verdict.digest,
        REASONS: json.dumps(decided.reasons, ensure_ascii=False),
        METRICS: json.dumps([metric.model_dump(mode="json") for metric in decided.metrics]),
        **{f"goldgate.digest.{name}": digest for name, digest in decided.digests.items()},
    }


def describe(decided: Verdict) -> str:
    """The version's page in a few lines of Markdown."""
    lines = [
        "; ".join(decided.reasons),
        "",
        "| metric | baseline | candidate | difference | interval |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {m.metric} | {m.baseline:.3f} | {m.candidate:.3f} | {m.difference:+.3f} "
        f"| {m.low:+.3f} to {m.high:+.3f} ({m.confidence:.0%}, n = {m.n}) |"
        for m in decided.metrics
    ]
    return "\n".join([*lines, "", f"Baseline: {decided.baseline.label}."])


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
    )
