"""Prefect's server for tests of flows, with nothing set from outside that a flow would go by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.testing.utilities import prefect_test_harness

_FROM_OUTSIDE = (
    "MLFLOW_TRACKING_URI",
    "GOLDGATE_ADMIN_KEY",
    "GOLDGATE_GATEWAY",
    "GOLDGATE_LEDGER",
    "GOLDGATE_LOG_DB",
    "GOLDGATE_PUBLIC_KEY",
    "GOLDGATE_SIGNING_KEY",
    "GOLDGATE_TEACHER_KEY",
    "GOLDGATE_VENDOR_KEY",
)


@contextmanager
def prefect_server() -> Iterator[pytest.MonkeyPatch]:
    """A server of the test's own until the block ends; yields what the block may change until then as well."""
    with pytest.MonkeyPatch.context() as patched:
        for variable in _FROM_OUTSIDE:
            patched.delenv(variable, raising=False)
        with (
            prefect_test_harness(server_startup_timeout=120),
            temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}),  # a run waits a second for that thread
        ):
            yield patched
