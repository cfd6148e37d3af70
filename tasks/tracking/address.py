"""Where MLflow is, whether it answers, and a client for it."""

from __future__ import annotations

import fcntl
import logging
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

import httpx

from tasks.contracts.errors import ServiceError
from tasks.contracts.spec import ExecutionSpec
from tasks.store import Store

if TYPE_CHECKING:
    from mlflow import MlflowClient

_SQLITE = "sqlite:///"
_DATABASES = ("postgresql", "mysql", "mssql")
_MLFLOW_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # read at import: a run on a company's data does not call home
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",  # the terminal belongs to the run's own progress
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "4",  # half a minute: long enough for a restart, and nobody waits four
}
_ANSWER_SECONDS = 8.0  # a server that starts cold on a busy machine needs a few; nobody waits longer for an error


def tracking_uri(execution: ExecutionSpec) -> str:
    """The tracking server or database of a run: the spec's, else MLFLOW_TRACKING_URI, else SQLite in the store.

    Raises:
        ServiceError: none is named and the store is remote, where SQLite cannot be kept.
    """
    named = execution.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if named:
        return named.rstrip("/")
    store = Store(execution.store)
    if not store.local:
        raise ServiceError(
            "The store is remote and no MLflow tracking server is named; a SQLite database cannot be kept there.",
            where=store.root,
            fix="set `execution.tracking_uri` or the environment's MLFLOW_TRACKING_URI to an MLflow server's address",
        )
    return f"{_SQLITE}{store.root}/mlflow.db"


def ensure_reachable(uri: str) -> None:
    """Check within ten seconds that MLflow can be used there, instead of MLflow's own minutes of retries.

    Raises:
        ServiceError: the server does not answer, or the SQLite file cannot be written.
    """
    if uri.startswith(("http://", "https://")):
        _ensure_answers(uri)
    elif uri.startswith(_SQLITE):
        _ensure_writable(uri)
    elif not uri.startswith(_DATABASES):
        raise ServiceError(
            "This is no address of an MLflow server or database.",
            where=without_password(uri),
            fix="set `execution.tracking_uri` or MLFLOW_TRACKING_URI to http(s)://… or sqlite:////absolute/path.db, "
            "or unset both to use SQLite in the store",
        )


def connect(execution: ExecutionSpec) -> MlflowClient:
    """A client of the run's tracking server and registry, checked to be reachable.

    Raises:
        ServiceError: as `ensure_reachable`.
    """
    uri = tracking_uri(execution)
    ensure_reachable(uri)
    for name, value in _MLFLOW_SETTINGS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    if uri.startswith(_SQLITE):
        _make_schema(uri)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def artifact_root(uri: str, execution: ExecutionSpec) -> str | None:
    """Where runs keep their files; None where the server decides. Beside a SQLite file, else in the store."""
    if uri.startswith(("http://", "https://")):
        return None
    if uri.startswith(_SQLITE):
        return (sqlite_path(uri).parent / "mlartifacts").as_uri()
    store = Store(execution.store)
    return f"{Path(store.root).as_uri() if store.local else store.root}/mlartifacts"


def sqlite_path(uri: str) -> Path:
    """The file of a `sqlite:///` address."""
    return Path(uri.removeprefix(_SQLITE).split("?")[0]).absolute()


def without_password(uri: str) -> str:
    """The address with user and password taken out, for messages, links and tags."""
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.rsplit("@", 1)[1]))


def _ensure_answers(uri: str) -> None:
    shown = without_password(uri)
    fix = (
        "start it (`goldgate up`), correct `execution.tracking_uri` or MLFLOW_TRACKING_URI, "
        "or unset both to use SQLite in the store"
    )
    try:
        answer = httpx.get(f"{uri}/health", timeout=_ANSWER_SECONDS)
    except httpx.HTTPError as error:
        raise ServiceError(f"The MLflow server does not answer: {error}", where=shown, fix=fix) from error
    except (httpx.InvalidURL, ValueError) as error:
        raise ServiceError(f"This is no address of a server: {error}", where=shown, fix=fix) from error
    if answer.status_code != httpx.codes.OK or answer.text.strip() != "OK":
        raise ServiceError(
            f"What answers there is no healthy MLflow server (HTTP {answer.status_code}).",
            where=f"{shown}/health",
            fix=fix,
        )


def _ensure_writable(uri: str) -> None:
    """Write the number that is there already: the one check that sees mount flags, quotas and damage alike."""
    path = sqlite_path(uri)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(path, timeout=_ANSWER_SECONDS)
        try:
            database.execute("BEGIN IMMEDIATE")
            (number,) = database.execute("PRAGMA user_version").fetchone()
            database.execute(f"PRAGMA user_version = {int(number)}")
            database.commit()
        finally:
            database.close()
    except (OSError, sqlite3.Error) as error:
        raise ServiceError(
            f"The MLflow database cannot be written: {error}",
            where=str(path),
            fix="free space or allow writing there, set `execution.store` to another place, "
            "or name an MLflow server in `execution.tracking_uri`",
        ) from error


@cache
def _make_schema(uri: str) -> None:
    """Create or check the tables once in each process, one process at a time: MLflow's own first start can race."""
    from mlflow import MlflowClient

    with _locked(sqlite_path(uri).with_suffix(".lock")), quiet("mlflow.store", "alembic"):
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_experiments(max_results=1)
        client.search_registered_models(max_results=1)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Hold back log lines below WARNING (a migration prints dozens)."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
