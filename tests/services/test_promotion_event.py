"""A promotion's event starts its rollout through real servers and a worker, and the new version answers requests."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import yaml
from prefect.settings import PREFECT_API_URL, temporary_settings
from rich.console import Console

from goldgate import services
from tasks.contracts.spec import RolloutSettings
from tasks.gate import selftest
from tasks.serving.client import GatewayClient, gateway_of
from tasks.serving.steps import announce_promotion
from tests.services.test_vanished_worker import free_port
from tests.serving.fake_engine import Behaviour, FakeCommand
from tests.serving.gateway_process import running_gateway
from tests.serving.promoted import ANSWERS, OTHERWISE, Shop

pytestmark = [pytest.mark.services, pytest.mark.timeout(600)]

_RUN_SECONDS = 180.0


class World(NamedTuple):
    """Servers and a worker, a gateway with fake engines, and who promotes."""

    api: httpx.Client
    gateway: GatewayClient
    shop: Shop
    fakes: FakeCommand

    def runs(self) -> list[dict[str, Any]]:
        """Runs of the deployment, oldest first."""
        for _ in range(20):
            answer = self.api.post("/flow_runs/filter", json={"sort": "EXPECTED_START_TIME_ASC"})
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:  # SQLite is busy
                found: list[dict[str, Any]] = answer.raise_for_status().json()
                return found
            time.sleep(1.0)
        raise AssertionError(answer.text)

    def ended(self, count: int) -> list[str]:
        """The states of so many runs, once all have ended."""
        until = time.monotonic() + _RUN_SECONDS
        while True:
            runs = self.runs()
            if len(runs) >= count and all(run["end_time"] for run in runs):
                return [run["state_name"] for run in runs]
            assert time.monotonic() < until, [(run["name"], run["state_name"]) for run in runs]
            time.sleep(1.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[World]:
    shop = Shop(tmp_path_factory.mktemp("event"), tiny_model)
    store = Path(shop.execution.store)
    ours = yaml.safe_load((services.DEPLOYMENTS / "prefect.yaml").read_text())
    ours["deployments"] = [one for one in ours["deployments"] if one["entrypoint"] == "flows.rollout.rollout"]
    (shop.root / "prefect.yaml").write_text(yaml.safe_dump(ours))
    console = Console(file=io.StringIO(), width=400)
    with pytest.MonkeyPatch.context() as patched:
        for variable in ("MLFLOW_TRACKING_URI", "GOLDGATE_SIGNING_KEY", "GOLDGATE_PUBLIC_KEY", "GOLDGATE_GATEWAY",
                         "GOLDGATE_ADMIN_KEY"):  # fmt: skip
            patched.delenv(variable, raising=False)
        patched.setattr(selftest, "HISTORIES", 60)
        running = services.up(
            store, console, prefect_port=free_port(), mlflow_port=free_port(), prefect_file=shop.root / "prefect.yaml"
        )
        try:
            for name, value in services.client_environment(shop.execution).items():
                patched.setenv(name, value)
            fakes = FakeCommand(shop.root / "fakes", Behaviour(answers=ANSWERS))
            api = f"{running.prefect_url}/api"
            with (
                running_gateway(store, fakes),
                gateway_of(shop.execution) as gateway,
                httpx.Client(base_url=api, timeout=60.0, trust_env=False) as client,
                temporary_settings({PREFECT_API_URL: api}),
            ):
                yield World(client, gateway, shop, fakes)
        finally:
            services.down(store, console)


def promote(world: World, note: str) -> None:
    """What the end of `retrain` does."""
    registered = world.shop.promote("animals", note)
    settings = RolloutSettings(smoke_items=5, drain_seconds=0.5)
    announce_promotion.fn(registered, world.shop.spec("animals").model_copy(update={"rollout": settings}))


def test_a_promotion_is_rolled_out_by_its_event(world: World) -> None:
    promote(world, "one")
    assert world.ended(1) == ["Rolled out"]
    promote(world, "two")
    assert world.ended(2) == ["Rolled out"] * 2
    body = {"model": "animals", "messages": [{"role": "user", "content": "animal 3"}]}
    answer = httpx.post(f"{world.gateway.url}/v1/chat/completions", json=body, timeout=30.0)
    assert answer.headers["x-goldgate-version"] == "animals@2"
    assert world.shop.aliases("animals") == {"champion": "2", "previous": "1"}


def test_one_that_is_no_good_is_refused_and_the_old_one_stays(world: World) -> None:
    world.fakes.behave("animals@3", Behaviour(answers=OTHERWISE))
    promote(world, "three")
    assert world.ended(3)[-1] == "Refused"
    traffic = world.gateway.traffic("animals")
    assert traffic is not None
    assert traffic.live.version == "2"
    assert world.shop.aliases("animals") == {"champion": "2", "previous": "1"}
