"""`goldgate rollout` and `goldgate rollback` as people type them, against a real gateway with fake engines."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from goldgate import services
from tasks.contracts.spec import RolloutSettings
from tasks.gate import selftest
from tasks.serving.client import GatewayClient, gateway_of
from tests.serving.fake_engine import Behaviour, FakeCommand
from tests.serving.gateway_process import running_gateway
from tests.serving.promoted import ANSWERS, OTHERWISE, Shop

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class Called:
    """How a command ended, and what it said."""

    def __init__(self, status: int, said: str) -> None:
        self.status, self.said = status, said


def call(*arguments: str) -> Called:
    done = subprocess.run(
        [sys.executable, "-m", "goldgate", *arguments], cwd=services.PROJECT, capture_output=True, text=True,
        env=os.environ | {"COLUMNS": "200", "PYTHONPATH": str(services.PROJECT)}, check=False,
    )  # fmt: skip
    return Called(done.returncode, done.stdout + done.stderr)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Shop]:
    with pytest.MonkeyPatch.context() as patched:
        for variable in ("MLFLOW_TRACKING_URI", "GOLDGATE_LEDGER", "GOLDGATE_SIGNING_KEY", "GOLDGATE_PUBLIC_KEY",
                         "GOLDGATE_GATEWAY", "GOLDGATE_ADMIN_KEY", "GOLDGATE_STORE", "PREFECT_API_URL"):  # fmt: skip
            patched.delenv(variable, raising=False)
        patched.setattr(selftest, "HISTORIES", 60)
        yield Shop(tmp_path_factory.mktemp("shop"), tiny_model)


@pytest.fixture(scope="module")
def fakes(shop: Shop) -> FakeCommand:
    return FakeCommand(shop.root / "fakes", Behaviour(answers=ANSWERS))


@pytest.fixture(scope="module")
def gateway(shop: Shop, fakes: FakeCommand) -> Iterator[GatewayClient]:
    with running_gateway(Path(shop.execution.store), fakes), gateway_of(shop.execution) as client:
        yield client


def config(shop: Shop, name: str) -> str:
    spec = shop.spec(name).model_copy(update={"rollout": RolloutSettings(smoke_items=5)})
    path = shop.root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    return str(path)


def test_out_and_back(shop: Shop, gateway: GatewayClient, fakes: FakeCommand) -> None:
    store = ["--store", shop.execution.store]
    file = config(shop, "animals")
    shop.promote("animals", "one")
    assert "promoted  version 1" in call("status", *store).said
    first = call("rollout", file)
    assert (first.status, "animals@1 answers" in first.said) == (0, True), first.said
    assert "Traceback" not in first.said
    shop.promote("animals", "two")
    second = call("rollout", file)
    assert (second.status, "animals@1 is kept warm to go back to" in second.said) == (0, True), second.said

    back = call("rollback", "animals", "--reason", "wrong on refunds", "--by", "Ada", *store)
    assert back.status == 0, back.said
    seconds = re.search(r"animals: animals@1 answers again, after ([\d.]+) s\.", back.said)
    assert seconds is not None, back.said
    print(f"rolled back in {seconds[1]} s")
    assert "animals: version 1 is champion again." in back.said
    assert shop.aliases("animals") == {"champion": "1", "previous": "2"}
    body = {"model": "animals", "messages": [{"role": "user", "content": "animal 3"}]}
    answer = httpx.post(f"{gateway.url}/v1/chat/completions", json=body, timeout=30.0)
    assert answer.headers["x-goldgate-version"] == "animals@1"

    shown = call("rollout", "--show", "animals", *store)
    assert re.search(r"animals: animals@1 answers, animals@2 is kept warm \(revision 3", shown.said), shown.said
    assert "rollback to animals@1 done, Ada (wrong on refunds)" in shown.said
    assert "No change was left open." in call("rollout", "--recover", "animals", *store).said

    fakes.behave("animals@2", Behaviour(answers=OTHERWISE))
    refused = call("rollout", file, "--version", "2")
    assert refused.status == 3, refused.said
    assert "animals@2 was refused, and animals@1 goes on answering: 0 of 5 items" in refused.said
    nothing = call("rollout", file)
    assert (nothing.status, "No version of 'animals' waits for its rollout." in nothing.said) == (1, True)


def test_without_a_gateway_only_the_registry_moves(shop: Shop, tmp_path: Path, tiny_model: Path) -> None:
    alone = Shop(tmp_path, tiny_model)
    for note in ("one", "two"):
        alone.promote("birds", note, waits=False)
    back = call("rollback", "birds", "--reason", "wrong on refunds", "--store", alone.execution.store)
    assert (back.status, "birds: version 1 is champion again." in back.said) == (0, True), back.said
    out = call("rollout", config(alone, "birds"), "--version", "2")
    assert out.status == 1
    assert "No gateway is known, so nothing can be rolled out." in out.said


@pytest.mark.parametrize("arguments", [[], ["--show", "a", "--recover", "a"]])
def test_it_must_be_said_what_to_do(arguments: list[str]) -> None:
    called = call("rollout", *arguments)
    assert (called.status, "Say what to do" in called.said) == (1, True)
