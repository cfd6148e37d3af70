"""The report on a shadow as a flow, and `goldgate shadow` against a real gateway, a real registry and fake engines."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
from prefect.client.orchestration import get_client
from rich.console import Console
from typer.testing import CliRunner

from flows.rollout import rollout
from flows.shadow_report import shadow_report
from goldgate.shadow import begin_shadow, end_shadow, show_shadow
from goldgate.shadow import shadow as command
from tasks.contracts.errors import ServiceError, SpecError
from tasks.contracts.observe import ShadowDecision, ShadowReportSpec, ShadowSpec
from tasks.contracts.review import Review, ReviewItem, ReviewOutcome, ReviewReason, ReviewRecord
from tasks.contracts.serving import EngineSpec, EngineState, Shadow, Vendor
from tasks.contracts.spec import ExecutionSpec
from tasks.gate import selftest
from tasks.serving.client import ConflictError, GatewayClient, gateway_of
from tasks.serving.request_log import ParquetSink
from tasks.serving.review.rows import read_records
from tasks.serving.shadow_pairs import RECORD_FILE, Pair, ShadowRecord, pair_row, pair_schema
from tests.prefect_server import prefect_server
from tests.serving.fake_engine import Behaviour, FakeCommand
from tests.serving.gateway_process import running_gateway
from tests.serving.promoted import ANSWERS, OTHERWISE, Shop
from tests.serving.records import version

pytestmark = pytest.mark.timeout(300)  # whoever comes first starts the servers
START = datetime(2026, 3, 1, 12, tzinfo=UTC)


@pytest.fixture(scope="module", autouse=True)
def _server() -> Iterator[None]:
    with prefect_server() as patched:
        patched.setattr(selftest, "HISTORIES", 60)
        patched.setattr(selftest, "HISTORIES_DEAR", 10)
        yield


# -- the report -------------------------------------------------------------------------------------------------------


def compared(store: Path, *, alike: int, wins: int, losses: int, unreviewed: int = 0, failed: int = 0) -> Path:
    """A comparison as a gateway leaves it, and what people said of it; returns the file of the reviews."""
    home = store / "serving" / "shadow" / "first"
    home.mkdir(parents=True)
    spec = ShadowSpec(share=0.5, margin=0.05)
    shadow = Shadow(id="first", version=version(8), spec=spec, since=START)
    record = ShadowRecord(name="complaints", shadow=shadow, closed=True, tools=False)
    (home / RECORD_FILE).write_text(record.model_dump_json())
    kinds = ["alike"] * alike + ["win"] * wins + ["loss"] * losses + ["open"] * unreviewed + ["failed"] * failed
    pairs, reviews = [], []
    for number, kind in enumerate(kinds):
        at = START + timedelta(minutes=number)
        pairs.append(
            Pair(
                at=at.timestamp(), id=f"r{number}", key=f"k{number}", name="complaints", live="complaints@7",
                shadow="complaints@8", agrees=None if kind == "failed" else kind == "alike", live_answer="card",
                shadow_answer="" if kind == "failed" else "card" if kind == "alike" else "loan",
                live_ms=20.0 + number % 5, shadow_ms=None if kind == "failed" else 10.0 + number % 5,
                error="HTTP 500" if kind == "failed" else "",
            )
        )  # fmt: skip
        if kind in ("win", "loss"):
            reviews.append(said(f"r{number}", at, "loan" if kind == "win" else "card").model_dump_json())
    ParquetSink(home, pair_schema).write([pair_row(one, None) for one in pairs])
    path = store / "reviews.jsonl"
    path.write_text("\n".join(reviews) + "\n" if reviews else "")
    return path


def said(item: str, at: datetime, right: str) -> ReviewRecord:
    asked = ReviewItem(
        id=item, name="complaints", version="complaints@7", at=at, reason=ReviewReason.DISAGREED,
        messages=({"role": "user", "content": "x"},), answer="card", other="loan", choices=("card", "loan"),
    )  # fmt: skip
    fields: dict[str, Any] = {
        "item": item, "name": "complaints", "version": "complaints@7", "at": at, "reviewed_at": at,
        "reason": ReviewReason.DISAGREED, "answer": "card", "right": right, "correct": right == "card",
        "agreement": 1.0, "annotators": ("ann",), "outcome": ReviewOutcome.ROW,
    }  # fmt: skip
    return ReviewRecord(**fields, review=Review(item=asked))


def page(name: str) -> str:
    with get_client(sync_client=True) as client:
        return str(client.request("GET", f"/artifacts/{name}-shadow/latest").json()["data"])


def test_a_shadow_that_people_prefer_is_found_better(tmp_path: Path) -> None:
    reviews = compared(tmp_path, alike=600, wins=150, losses=20, unreviewed=10, failed=5)
    result = shadow_report(
        ShadowReportSpec(name="complaints", reviews=str(reviews), execution=ExecutionSpec(store=str(tmp_path)))
    )
    report = result.report
    assert (result.live, result.shadow, result.margin, result.errors) == (
        "complaints@7", "complaints@8", 0.05, {"HTTP 500": 5},
    )  # fmt: skip
    assert (report.pairs, report.failed, report.agreed) == (785, 5, 600)
    assert (report.wins, report.losses, report.ties) == (150, 20, 0)
    assert report.decision is ShadowDecision.SHADOW
    assert report.difference == pytest.approx(180 / 780 * 130 / 170)
    assert report.latency is not None
    assert report.latency.difference == pytest.approx(-10.0)
    text = page("complaints")
    assert text.startswith("# complaints@8 beside complaints@7\n\n**The shadow is better: ")
    assert "| Answered alike | 76.9% (" in text
    assert "| Reviewed disagreements | 170 of 180 |" in text
    assert (
        "| Of these the shadow alone is right | 150, the live version alone in 20, both or neither in 0: 88.2% ("
        in text
    )
    assert "| HTTP 500 | 5 |" in text
    assert "| When it can be decided | now |" in text


def test_without_reviews_it_says_that_nothing_is_known_of_who_is_right(tmp_path: Path) -> None:
    compared(tmp_path, alike=80, wins=10, losses=10)
    result = shadow_report(ShadowReportSpec(name="complaints", execution=ExecutionSpec(store=str(tmp_path))))
    report = result.report
    assert (report.decision, report.difference, report.wins) == (ShadowDecision.OPEN, None, 0)
    assert report.pairs_more is not None
    assert report.reviews_more is not None
    assert report.days is None  # there is no rate of reviews
    text = page("complaints")
    assert "Nobody has reviewed a disagreement, so nothing is known of who is right." in text
    assert f"| When it can be decided | after {report.pairs_more:,} more requests and {report.reviews_more:,}" in text


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    here = ExecutionSpec(store=str(tmp_path))
    with pytest.raises(SpecError, match="complaints has had no shadow here"):
        shadow_report(ShadowReportSpec(name="complaints", execution=here))
    compared(tmp_path, alike=1, wins=0, losses=0)
    with pytest.raises(SpecError, match="There are no reviews there"):
        shadow_report(ShadowReportSpec(name="complaints", reviews=str(tmp_path / "none.jsonl"), execution=here))
    with pytest.raises(SpecError, match="The store is remote"):
        shadow_report(ShadowReportSpec(name="complaints", execution=ExecutionSpec(store="memory://store")))


def test_the_command_prints_the_report(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(command)
    reviews = compared(tmp_path, alike=60, wins=3, losses=1, unreviewed=2)
    assert len(read_records(reviews)) == 4
    given = ["complaints", "--report", "--reviews", str(reviews), "--store", str(tmp_path)]
    shown = CliRunner().invoke(app, [*given, "--json"])
    assert shown.exit_code == 0, shown.output
    record = json.loads(shown.stdout)
    assert (record["report"]["wins"], record["report"]["losses"], record["id"]) == (3, 1, "first")
    printed = CliRunner().invoke(app, given).output
    assert "complaints@8 beside complaints@7" in printed
    assert "Reviewed disagreements: 4 of 6" in printed
    for wrong in ([], ["--end", "--show"], ["--model", "m"], ["--version", "2", "--model", "m"]):
        refused = CliRunner().invoke(app, ["complaints", *wrong, "--store", str(tmp_path)])
        assert isinstance(refused.exception, SpecError)
        assert refused.exception.what.startswith("Say what to do: ")


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Shop:
    return Shop(tmp_path_factory.mktemp("shop"), tiny_model)


@pytest.fixture(scope="module")
def fakes(shop: Shop) -> FakeCommand:
    return FakeCommand(shop.root / "fakes", Behaviour(answers=ANSWERS))


@pytest.fixture(scope="module")
def gateway(shop: Shop, fakes: FakeCommand) -> Iterator[GatewayClient]:
    with running_gateway(Path(shop.execution.store), fakes), gateway_of(shop.execution) as client:
        yield client


def counted(gateway: GatewayClient, outcome: str) -> float:
    text = httpx.get(f"{gateway.url}/metrics").text
    name = f'goldgate_shadow_requests_total{{name="voles",outcome="{outcome}"}}'
    return next((float(one.rsplit(" ", 1)[1]) for one in text.splitlines() if one.startswith(name)), 0.0)


def ask(gateway: GatewayClient) -> httpx.Response:
    body = {"model": "voles", "messages": [{"role": "user", "content": "animal 3"}]}
    return httpx.post(f"{gateway.url}/v1/chat/completions", json=body, timeout=30.0)


@pytest.mark.slow
def test_a_version_answers_unseen_until_it_is_ended(shop: Shop, gateway: GatewayClient, fakes: FakeCommand) -> None:
    console = Console(record=True, width=200)
    spec, engine = ShadowSpec(share=1.0), EngineSpec()
    with pytest.raises(SpecError, match="Nothing is in service as voles"):
        begin_shadow(console, gateway, shop.execution, "voles", "1", None, spec, engine)
    shop.promote("voles", "one")
    rollout(shop.rollout("voles"), wait_seconds=0.0)
    with pytest.raises(ConflictError, match="voles@1 is what answers"):
        begin_shadow(console, gateway, shop.execution, "voles", "1", None, spec, engine)
    shop.promote("voles", "two")
    fakes.behave("voles@2", Behaviour(answers=OTHERWISE))
    begun = begin_shadow(console, gateway, shop.execution, "voles", "2", None, spec, engine)
    assert begun.version is not None
    status = gateway.engine(begun.version.engine)
    assert status is not None
    assert status.state is EngineState.READY
    assert ask(gateway).headers["x-goldgate-version"] == "voles@1"
    until = time.monotonic() + 20.0
    while counted(gateway, "disagreed") < 1.0 and time.monotonic() < until:
        time.sleep(0.05)
    assert (counted(gateway, "disagreed"), counted(gateway, "agreed")) == (1.0, 0.0)
    show_shadow(console, gateway, "voles")
    shown = console.export_text(clear=False)
    assert "voles: voles@2 answers 100.0% of the requests unseen" in shown
    assert "its engine is ready" in shown

    # The rollout of the same version finds its engine running; once it answers, it is a shadow no more.
    fakes.behave("voles@2", Behaviour(answers=ANSWERS))
    rollout(shop.rollout("voles"), wait_seconds=0.0)
    traffic = gateway.traffic("voles")
    assert traffic is not None
    assert (traffic.live.version, traffic.shadow) == ("2", None)

    # And the version before, which is kept warm anyway.
    begin_shadow(console, gateway, shop.execution, "voles", "1", None, spec, engine)
    end_shadow(console, gateway, "voles")
    end_shadow(console, gateway, "voles")
    assert "voles has no shadow." in console.export_text()
    assert {one.version.version for one in gateway.engines("voles") if one.state is EngineState.READY} == {"1", "2"}


@pytest.mark.slow
def test_a_version_that_does_not_start_is_no_shadow(shop: Shop, gateway: GatewayClient, fakes: FakeCommand) -> None:
    shop.promote("wolves", "one")
    rollout(shop.rollout("wolves"), wait_seconds=0.0)
    shop.promote("wolves", "two")
    fakes.behave("wolves@2", Behaviour(start_exit=3))
    with pytest.raises(ServiceError, match="The engine of wolves@2 is failed"):
        begin_shadow(
            Console(quiet=True), gateway, shop.execution, "wolves", "2", None, ShadowSpec(),
            EngineSpec(start_seconds=8.0),
        )  # fmt: skip
    traffic = gateway.traffic("wolves")
    assert traffic is not None
    assert traffic.shadow is None
    with pytest.raises(ServiceError, match="The gateway has no key for the vendor"):
        begin_shadow(
            Console(quiet=True), gateway, shop.execution, "wolves", None,
            Vendor(url="https://vendor.example/v1", model="m"), ShadowSpec(), EngineSpec(),
        )  # fmt: skip
