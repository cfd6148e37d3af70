"""The rollout flow against a real gateway, a real registry and fake engines: rolled out, refused, undone, and so on."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect.client.orchestration import get_client
from rich.console import Console
from securesystemslib.signer import CryptoSigner

from flows.rollout import rollout
from goldgate.rollout import roll_back_at, show_name
from tasks.contracts.errors import CertificateError, GoldenSetError, RegistryError, ServiceError
from tasks.contracts.serving import (
    EngineSpec,
    EngineState,
    Intent,
    Phase,
    RolloutResult,
    RolloutSpec,
    VersionRef,
)
from tasks.contracts.spec import CanarySpec, RolloutSettings
from tasks.gate import selftest
from tasks.gate.keys import SigningKey
from tasks.registry.serving_aliases import resolve_version
from tasks.registry.steps import register_champion
from tasks.registry.versions import status
from tasks.serving import steps
from tasks.serving.client import ConflictError, GatewayClient, find_gateway, gateway_of
from tasks.store import digest_file
from tasks.tracking import connect, registered_files
from tests.gate.made_up import LABELS
from tests.prefect_server import prefect_server
from tests.serving import promoted
from tests.serving.fake_engine import Behaviour, FakeCommand
from tests.serving.gateway_process import running_gateway
from tests.serving.promoted import ANSWERS, OTHERWISE, Shop
from tests.trusts import learnt_trust

pytestmark = pytest.mark.timeout(300)  # whoever comes first starts the servers


@pytest.fixture(scope="module", autouse=True)
def _server() -> Iterator[None]:
    with prefect_server() as patched:
        patched.setattr(selftest, "HISTORIES", 60)
        patched.setattr(selftest, "HISTORIES_DEAR", 10)
        yield


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


def run(spec: RolloutSpec) -> tuple[str, RolloutResult]:
    state = rollout(spec, wait_seconds=0.0, return_state=True)
    result = state.result()
    assert isinstance(result, RolloutResult)
    return str(state.name), result


def ask(gateway: GatewayClient, model: str, text: str) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": text}]}
    return httpx.post(f"{gateway.url}/v1/chat/completions", json=body, timeout=30.0)


def page(key: str) -> str:
    with get_client(sync_client=True) as client:
        answer = client.request("GET", f"/artifacts/{key}/latest")
    return str(answer.json()["data"])


def running(gateway: GatewayClient, name: str) -> set[str]:
    states = (EngineState.STARTING, EngineState.READY)
    return {engine.version.version for engine in gateway.engines(name) if engine.state in states}


def live(gateway: GatewayClient, name: str) -> tuple[str, str | None]:
    traffic = gateway.traffic(name)
    assert traffic is not None
    return traffic.live.version, traffic.previous.version if traffic.previous is not None else None


def test_promoted_versions_go_live_one_after_the_other(shop: Shop, gateway: GatewayClient) -> None:
    shop.promote("animals", "one")
    assert shop.aliases("animals") == {"promoted": "1"}
    name, first = run(shop.rollout("animals"))
    assert (name, first.phase, first.was, first.problems) == ("Rolled out", Phase.DONE, None, ())
    assert shop.aliases("animals") == {"champion": "1"}
    assert live(gateway, "animals") == ("1", None)
    assert first.check is not None
    assert (first.check.asked, first.check.same, first.check.compared) == (6, 6, True)
    assert first.switch_seconds is not None

    shop.promote("animals", "two")
    assert shop.aliases("animals") == {"champion": "1", "promoted": "2"}
    assert status("animals", shop.execution).promoted is not None
    name, second = run(shop.rollout("animals"))
    assert (name, second.was and second.was.label) == ("Rolled out", "animals@1")
    assert shop.aliases("animals") == {"champion": "2", "previous": "1"}
    assert live(gateway, "animals") == ("2", "1")
    answer = ask(gateway, "animals", "animal 5")
    assert answer.headers["x-goldgate-version"] == "animals@2"
    assert answer.json()["choices"][0]["message"]["content"] == ANSWERS["animal 5"]

    shop.promote("animals", "three")
    run(shop.rollout("animals"))
    assert live(gateway, "animals") == ("3", "2")
    assert running(gateway, "animals") == {"2", "3"}
    text = page("animals-rollout")
    assert "# Rolled out" in text
    assert "| Answered as evaluated | 6 of 6 (100.0%) | 95.0% |" in text
    with pytest.raises(RegistryError, match="No version of 'animals' waits for its rollout"):
        rollout(shop.rollout("animals"))


@pytest.mark.slow
def test_one_that_answers_otherwise_is_refused(shop: Shop, gateway: GatewayClient, fakes: FakeCommand) -> None:
    shop.promote("birds", "one")
    run(shop.rollout("birds"))
    shop.promote("birds", "two")
    fakes.behave("birds@2", Behaviour(answers=ANSWERS | dict(list(OTHERWISE.items())[::2])))
    name, refused = run(shop.rollout("birds", smoke_items=40))
    assert (name, refused.phase) == ("Refused", Phase.REFUSED)
    assert refused.check is not None
    assert refused.problems == refused.check.problems
    assert f"{refused.check.same} of 40 items were answered as they were when it was evaluated" in refused.problems[0]
    assert all(one.evaluated == ANSWERS[f"animal {int(one.id[1:])}"] for one in refused.check.differences)
    assert all(one.served == OTHERWISE[f"animal {int(one.id[1:])}"] for one in refused.check.differences)
    assert shop.aliases("birds") == {"champion": "1"}
    assert live(gateway, "birds") == ("1", None)
    assert running(gateway, "birds") == {"1"}
    mark = json.loads(shop.tags("birds", "2")["goldgate.rollout_refused"])
    assert tuple(mark["reasons"]) == refused.problems
    assert "| Item | Evaluated | Served |" in page("birds-rollout")
    with pytest.raises(RegistryError, match="This model is version 2, and its rollout was refused: "):
        shop.promote("birds", "two")  # the same run, a week later
    fakes.behave("birds@2", Behaviour(answers=ANSWERS))
    assert run(shop.rollout("birds", version="2"))[0] == "Rolled out"  # a person wants it all the same
    assert "goldgate.rollout_refused" not in shop.tags("birds", "2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "behaviour", "problem"),
    [
        ("cats", Behaviour(start_exit=3), "Its engine is failed: "),
        ("dogs", Behaviour(answers=ANSWERS, poisoned="empty"), "Its engine is failed: "),  # its /health is 200
        ("eels", Behaviour(answers=ANSWERS, delay=0.3), "The 95th percentile of the latency is "),
    ],
)
def test_an_engine_that_is_no_good_is_refused(
    shop: Shop, gateway: GatewayClient, fakes: FakeCommand, name: str, behaviour: Behaviour, problem: str
) -> None:
    shop.promote(name, "one")
    fakes.behave(f"{name}@1", behaviour)
    spec = shop.rollout(name, max_latency_ms=250.0, engine=EngineSpec(start_seconds=60.0))
    state, refused = run(spec)
    assert (state, refused.problems[0][: len(problem)]) == ("Refused", problem)
    assert shop.aliases(name) == {}
    assert gateway.traffic(name) is None
    assert running(gateway, name) == set()


def test_a_certificate_of_another_key_is_refused(shop: Shop, gateway: GatewayClient) -> None:
    signer = CryptoSigner.generate_ed25519()
    shop.promote("foxes", "one", key=SigningKey(signer, signer.public_key.keyid))
    with pytest.raises(CertificateError, match=r"is signed by the key \w{64}, and the trusted key is"):
        rollout(shop.rollout("foxes"))
    assert shop.aliases("foxes") == {"promoted": "1"}
    assert gateway.engines("foxes") == ()
    assert gateway.history("foxes") == ()


def test_a_changed_trust_is_refused_though_its_tag_was_changed_with_it(shop: Shop, gateway: GatewayClient) -> None:
    shop.promote("gnus", "one", learnt=learnt_trust(LABELS))
    path = registered_files("models:/gnus/1", shop.execution).artifacts["trust"]
    path.write_text(learnt_trust(LABELS, at=0.0).model_dump_json())  # nothing would be reviewed any more
    connect(shop.execution).set_model_version_tag("gnus", "1", "goldgate.trust_digest", digest_file(path))
    with pytest.raises(CertificateError, match="how far its answers are trusted is not what was signed"):
        rollout(shop.rollout("gnus"))
    assert (shop.aliases("gnus"), gateway.history("gnus")) == ({"promoted": "1"}, ())


@pytest.mark.slow
def test_a_version_judged_against_another_champion_is_refused(shop: Shop, gateway: GatewayClient) -> None:
    shop.promote("goats", "one", waits=False)
    shop.promote("goats", "two")
    shop.set_baseline("goats", "three")
    with pytest.raises(RegistryError, match="Version 2 was judged against another champion; version 3 is champion now"):
        rollout(shop.rollout("goats"))
    name, by_name = run(shop.rollout("goats", version="2"))  # on a person's own word
    assert (name, by_name.version.certified) == ("Rolled out", True)
    assert shop.aliases("goats") == {"champion": "2", "previous": "3"}


@pytest.mark.slow
def test_a_baseline_goes_live_by_its_number_and_says_what_it_is(shop: Shop, gateway: GatewayClient) -> None:
    shop.set_baseline("hares", "old")
    name, result = run(shop.rollout("hares", version="1"))
    assert (name, result.version.certified) == ("Rolled out", False)
    assert result.check is not None
    assert (result.check.compared, result.check.same) == (False, 6)
    assert "**No certificate.** A person set this version as baseline" in page("hares-rollout")


@pytest.mark.slow
def test_a_version_whose_certificate_was_taken_away_is_refused(shop: Shop, gateway: GatewayClient) -> None:
    shop.promote("ibex", "one")
    files = registered_files("models:/ibex/1", shop.execution)
    text = (files.root / "MLmodel").read_text()
    (files.root / "MLmodel").write_text(text.replace("certificate:", "certificates:"))
    with pytest.raises(RegistryError, match="has no certificate"):
        rollout(shop.rollout("ibex"))
    with pytest.raises(RegistryError, match="has no certificate"):
        rollout(shop.rollout("ibex", version="1"))
    release = {"kind": "first_baseline", "by": "Eve", "reason": "because", "at": None}
    connect(shop.execution).set_model_version_tag("ibex", "1", "goldgate.release", json.dumps(release))
    with pytest.raises(CertificateError, match="nobody has set a baseline with its digest"):
        rollout(shop.rollout("ibex", version="1"))


def test_another_golden_set_is_refused(shop: Shop, gateway: GatewayClient, tmp_path: Path) -> None:
    shop.promote("jays", "one")
    other = tmp_path / "golden"
    other.mkdir()
    lines = Path(shop.golden.path, "items.jsonl").read_text().splitlines()
    (other / "items.jsonl").write_text("\n".join(lines[1:]) + "\n")
    spec = shop.rollout("jays")
    with pytest.raises(GoldenSetError, match="the certificate is about"):
        rollout(spec.model_copy(update={"golden": spec.golden.model_copy(update={"path": str(other)})}))
    assert gateway.history("jays") == ()


def test_a_rollback_swaps_traffic_and_alias_while_requests_go_on(shop: Shop, gateway: GatewayClient) -> None:
    for note in ("one", "two"):
        shop.promote("kites", note)
        run(shop.rollout("kites"))
    failed: list[str] = []
    answered: list[str] = []
    over, back = threading.Event(), threading.Event()
    after: list[str] = []  # answers to what was asked when the rollback had ended

    def client() -> None:
        while not over.is_set():
            later = back.is_set()
            answer = ask(gateway, "kites", "animal 3")
            said = answer.headers.get("x-goldgate-version", "")
            if not answer.is_success or answer.json()["model"] != said:
                failed.append(answer.text)
            answered.append(said)
            if later:
                after.append(said)

    clients = [threading.Thread(target=client) for _ in range(4)]
    for one in clients:
        one.start()
    while len(answered) < 20:
        time.sleep(0.02)
    console = Console(record=True, width=200)
    began = time.monotonic()
    ended = roll_back_at(console, gateway, shop.execution, "kites", "wrong on refunds", "Ada")
    seconds = time.monotonic() - began
    back.set()
    while len(after) < 20:
        time.sleep(0.02)
    over.set()
    for one in clients:
        one.join()
    print(f"rolled back in {seconds:.2f} s, {len(answered)} requests")
    assert failed == []
    assert answered[0] == "kites@2"
    assert set(after) == {"kites@1"}
    assert (ended.intent.phase, ended.intent.why) == (Phase.DONE, "wrong on refunds")
    assert shop.aliases("kites") == {"champion": "1", "previous": "2"}
    assert json.loads(shop.tags("kites", "2")["goldgate.rolled_back"])["reason"] == "wrong on refunds"
    assert "kites@1 answers again" in console.export_text(clear=False)
    show_name(console, shop.execution, "kites")
    assert "rollback to kites@1 done, Ada (wrong on refunds)" in console.export_text()

    roll_back_at(console, gateway, shop.execution, "kites", "it was the data", "Ada")  # and back again
    assert shop.aliases("kites") == {"champion": "2", "previous": "1"}
    assert "goldgate.rolled_back" not in shop.tags("kites", "2")


@pytest.mark.slow
def test_a_first_version_cannot_be_rolled_back(shop: Shop, gateway: GatewayClient) -> None:
    shop.promote("larks", "one")
    run(shop.rollout("larks"))
    with pytest.raises(ConflictError, match="has no previous version"):
        roll_back_at(Console(quiet=True), gateway, shop.execution, "larks", "no", "Ada")
    assert gateway.open_intent("larks") is None


@pytest.mark.slow
def test_a_rollback_takes_back_a_rollout_that_is_checking(
    shop: Shop, gateway: GatewayClient, fakes: FakeCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    for note in ("one", "two"):
        shop.promote("moles", note)
        run(shop.rollout("moles"))
    shop.promote("moles", "three")
    checked = steps.judge_replies

    def slowly(*given: object) -> object:
        roll_back_at(Console(quiet=True), gateway, shop.execution, "moles", "stop", "Ada")
        return checked(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(steps, "judge_replies", slowly)
    name, result = run(shop.rollout("moles"))
    assert (name, result.phase) == ("Undone", Phase.UNDONE)
    assert result.problems == ("taken back by a rollback of Ada: stop",)
    assert live(gateway, "moles") == ("1", "2")
    assert running(gateway, "moles") == {"1", "2"}
    assert shop.aliases("moles") == {"champion": "1", "previous": "2", "promoted": "3"}


# -- tried out first --------------------------------------------------------------------------------------------------

CANARY = CanarySpec(share=0.5, slow_ms=30_000.0, min_requests=5, min_hours=0.0, max_hours=0.1)


@contextmanager
def asking(gateway: GatewayClient, name: str, while_tried: Callable[[], object] = lambda: None) -> Iterator[list[str]]:
    """Requests of ever new users, and who answered; once a version is on trial, `while_tried` is called first."""
    over, answered = threading.Event(), list[str]()

    def client() -> None:
        told = False
        while not over.wait(0.01):
            traffic = gateway.traffic(name)
            if traffic is not None and traffic.canary is not None and not told:
                told = True
                while_tried()
            body = {"model": name, "messages": [{"role": "user", "content": "animal 3"}], "user": f"u{len(answered)}"}
            answer = httpx.post(f"{gateway.url}/v1/chat/completions", json=body, timeout=30.0)
            answered.append(answer.headers.get("x-goldgate-version", "") if answer.is_success else "failed")

    thread = threading.Thread(target=client)
    thread.start()
    try:
        yield answered
    finally:
        over.set()
        thread.join()


def test_a_version_that_is_no_worse_on_trial_goes_live(shop: Shop, gateway: GatewayClient) -> None:
    shop.promote("swans", "one")
    assert run(shop.rollout("swans", canary=CANARY))[0] == "Rolled out"  # beside nothing there is nothing to try
    shop.promote("swans", "two")
    with asking(gateway, "swans") as answered:
        # Users are drawn by chance: of so many requests some are the live version's.
        name, result = run(shop.rollout("swans", canary=CANARY.model_copy(update={"min_requests": 20})))
        more = len(answered) + 3
        while len(answered) < more:
            time.sleep(0.01)
    assert (name, result.problems) == ("Rolled out", ())
    assert result.trial is not None
    state = result.trial.state
    assert state.canary_requests >= 20
    assert state.live_requests > 0
    assert (state.canary_failed, state.live_failed, result.trial.finding.abort) == (0, 0, False)
    assert "failed" not in answered
    assert answered[-1] == "swans@2"
    traffic = gateway.traffic("swans")
    assert traffic is not None
    assert (traffic.live.version, traffic.canary) == ("2", None)
    assert shop.aliases("swans") == {"champion": "2", "previous": "1"}
    text = page("swans-rollout")
    assert "## Canary" in text
    assert "50.00% of the keys were its." in text


@pytest.mark.slow
def test_a_version_that_fails_on_trial_is_refused_with_the_evidence(
    shop: Shop, gateway: GatewayClient, fakes: FakeCommand
) -> None:
    shop.promote("terns", "one")
    run(shop.rollout("terns"))
    shop.promote("terns", "two")
    spec = shop.rollout("terns", canary=CANARY.model_copy(update={"min_requests": 10_000}))
    with asking(gateway, "terns", lambda: fakes.behave("terns@2", Behaviour(status=500))) as answered:
        name, result = run(spec)
    assert (name, result.phase) == ("Refused", Phase.REFUSED)
    assert result.trial is not None
    assert result.problems == result.trial.finding.reasons
    assert result.problems[0].startswith("With the canary requests fail at least ")
    # Few callers notice, or none: the host looks at an engine that fails, and by itself now and then, and the live
    # version stands in. That counts as failed.
    assert answered.count("failed") <= 25
    state = result.trial.state
    assert 5 <= state.canary_failed <= state.canary_requests <= 25
    # One may have been asked for between the look that found no trial yet and the engine's turn for the worse.
    assert state.canary_requests - state.canary_failed <= 1
    assert answered[-1] == "terns@1"
    assert live(gateway, "terns") == ("1", None)
    assert gateway.canary("terns").canary is None
    assert running(gateway, "terns") == {"1"}
    assert shop.aliases("terns") == {"champion": "1"}
    assert tuple(json.loads(shop.tags("terns", "2")["goldgate.rollout_refused"])["reasons"]) == result.problems
    assert "| Failed requests |" in page("terns-rollout")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "slow_ms", "says"),
    [
        ("wrens", 500.0, "wrens@2 has answered 0 requests on trial in 0.0 h, 5 are needed to judge it."),
        ("yaks", None, "yaks@2 could not be tried out: yaks@1 has answered 0 requests in 0.0 h, and 100 are needed"),
    ],
)
def test_a_version_that_nobody_asks_is_refused_for_want_of_requests(
    shop: Shop, gateway: GatewayClient, name: str, slow_ms: float | None, says: str
) -> None:
    shop.promote(name, "one")
    run(shop.rollout(name))
    shop.promote(name, "two")
    canary = CANARY.model_copy(update={"slow_ms": slow_ms, "max_hours": 2.0 / 3600})
    state, refused = run(shop.rollout(name, canary=canary))
    assert (state, refused.problems[0][: len(says)]) == ("Refused", says)
    assert live(gateway, name) == ("1", None)
    assert running(gateway, name) == {"1"}


@pytest.mark.slow
def test_a_rollback_ends_a_trial(shop: Shop, gateway: GatewayClient) -> None:
    for note in ("one", "two"):
        shop.promote("zebus", note)
        run(shop.rollout("zebus"))
    shop.promote("zebus", "three")

    def back() -> None:
        roll_back_at(Console(quiet=True), gateway, shop.execution, "zebus", "stop", "Ada")

    with asking(gateway, "zebus", back):
        name, result = run(shop.rollout("zebus", canary=CANARY.model_copy(update={"min_requests": 10_000})))
    assert (name, result.problems) == ("Undone", ("taken back by a rollback of Ada: stop",))
    assert live(gateway, "zebus") == ("1", "2")
    assert gateway.canary("zebus").canary is None
    assert running(gateway, "zebus") == {"1", "2"}


def test_a_second_rollout_is_refused_while_one_is_under_way(shop: Shop, gateway: GatewayClient) -> None:
    shop.promote("newts", "one")
    version = resolve_version("newts", None, shop.execution)
    gateway.begin(_intent(version, "somebody else"))
    with pytest.raises(ServiceError, match=r"A rollout to newts@1 is under way \(checking\), by somebody else"):
        rollout(shop.rollout("newts"), wait_seconds=0.0)
    gateway.write(_intent(version, "somebody else").model_copy(update={"phase": Phase.UNDONE}))
    assert run(shop.rollout("newts"))[0] == "Rolled out"


def test_what_was_read_before_another_rollout_ended_is_not_acted_on(
    shop: Shop, gateway: GatewayClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.promote("okapis", "one")
    drawn = steps.draw_smoke_items

    def meanwhile(*given: Any) -> Any:
        with monkeypatch.context() as patched:
            patched.setattr(steps, "draw_smoke_items", drawn)
            assert run(shop.rollout("okapis"))[0] == "Rolled out"
        return drawn(*given)

    monkeypatch.setattr(steps, "draw_smoke_items", meanwhile)
    with pytest.raises(ConflictError, match="ended since this one was prepared: a rollout to okapis@1"):
        rollout(shop.rollout("okapis"))
    assert [one.phase for one in gateway.history("okapis")] == [Phase.DONE]
    assert live(gateway, "okapis") == ("1", None)


@pytest.mark.slow
def test_what_a_killed_one_left_is_brought_to_its_end_first(shop: Shop, gateway: GatewayClient) -> None:
    shop.promote("otters", "one")
    version = resolve_version("otters", None, shop.execution)
    with GatewayClient(gateway.url, gateway._key, lease_seconds=0.5) as killed:
        left = killed.begin(_intent(version, "a killed process"))
        killed.start_engine(version, EngineSpec())
        while (engine := killed.engine(version.engine)) is None or engine.state is EngineState.STARTING:
            time.sleep(0.1)
        left = killed.write(left.model_copy(update={"phase": Phase.SWITCHING}))
    state = rollout(shop.rollout("otters"), wait_seconds=10.0, return_state=True)
    assert state.name == "Rolled out"  # the one that was left; nothing else waits
    assert shop.aliases("otters") == {"champion": "1"}
    assert [(one.id, one.phase) for one in gateway.history("otters")] == [(left.id, Phase.DONE)]


def test_a_promotion_with_a_rollout_waits_and_is_announced(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(steps, "emit_event", lambda **event: told.append(event))
    asked = RolloutSettings(smoke_items=3, max_latency_ms=900.0, engine=EngineSpec(eager=True))
    for name, settings, alias in (("quails", asked, "promoted"), ("rooks", None, "champion")):
        spec = shop.spec(name).model_copy(update={"rollout": settings})
        with monkeypatch.context() as patched:
            patched.setattr(
                promoted,
                "register",
                lambda v, c, t, _, waits, trust, spec=spec: register_champion.fn(v, c, t, spec, trust),
            )
            registered = shop.promote(name, "one")
        assert registered.alias == alias
        steps.announce_promotion.fn(registered, spec)
    steps.announce_promotion.fn(None, spec)
    (event,) = told
    assert event["event"] == "goldgate.model.promoted"
    assert event["resource"]["prefect.resource.id"] == "goldgate.model.quails"
    spec = RolloutSpec.model_validate(event["payload"]["spec"])
    assert (spec.name, spec.version, spec.golden.path, spec.settings) == ("quails", None, shop.golden.path, asked)
    assert spec.execution == shop.execution


def test_without_a_gateway_nothing_is_touched(shop: Shop, tmp_path: Path) -> None:
    spec = shop.rollout("pikes")
    elsewhere = spec.execution.model_copy(update={"store": str(tmp_path / "store")})
    assert find_gateway(elsewhere) is None
    with pytest.raises(ServiceError, match="No gateway is known"):
        rollout(spec.model_copy(update={"execution": elsewhere}))


def _intent(version: VersionRef, holder: str) -> Intent:
    from datetime import UTC, datetime

    from tasks.contracts.serving import Aliases

    return Intent(
        id=f"by-{holder.replace(' ', '-')}", name=version.name, kind="rollout", to=version, phase=Phase.CHECKING,
        by="a test", why="-", at=datetime(2026, 11, 1, tzinfo=UTC), holder=holder,
        aliases=Aliases(promoted=version.version),
    )  # fmt: skip
