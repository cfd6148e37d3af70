"""What the tests of the gate share: self-tests of a few histories, where it is not the self-test that is tested."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tasks.gate import selftest


@pytest.fixture(scope="package", autouse=True)
def _short_self_tests() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(selftest, "HISTORIES", 60)
        patched.setattr(selftest, "HISTORIES_DEAR", 10)
        yield
