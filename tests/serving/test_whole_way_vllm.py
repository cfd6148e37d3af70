"""The whole way with a real vLLM: promoted, told by an event, rolled out under load, asked, and rolled back.

Real are the model (SmolLM2-135M), its answers on the golden set, verdict, certificate, registry, the servers of MLflow
and Prefect, the worker, `goldgate serve` and vLLM. Made up is only what the golden items' right answers are, so that a
verdict lets both versions in.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from typing import Any, NamedTuple

import aiohttp
import httpx
import psutil
import pytest
import yaml
from prefect.settings import PREFECT_API_URL, temporary_settings
from rich.console import Console

from goldgate import services
from tasks.contracts.progress import ignore_progress
from tasks.contracts.prompt import Decoding, Prompt
from tasks.contracts.references import GoldenSetRef, ItemOutcome, RegisteredModelRef, Release, ReleaseKind
from tasks.contracts.rows import Message, Row, write_rows
from tasks.contracts.serving import EngineSpec, GatewaySpec
from tasks.contracts.spec import (
    DataSpec,
    EvaluateSpec,
    ExecutionSpec,
    GoldenSpec,
    LookPolicy,
    Policy,
    RetrainSpec,
    RolloutSettings,
    TaskSpec,
)
from tasks.gate import selftest
from tasks.gate.certificate import certify
from tasks.gate.keep import Evaluated, Trained, keep_verdict
from tasks.gate.keys import open_signing_key
from tasks.gate.ledger import Ledger, ledger_url
from tasks.registry.register import register
from tasks.registry.serving_aliases import read_aliases
from tasks.serving.client import GatewayClient, gateway_of
from tasks.serving.steps import announce_promotion
from tasks.store import Store, digest_file
from tasks.tracking import MERGED_DIGEST, connect
from tests.gate.certified import splits_for
from tests.gate.made_up import CONDITIONS, LABELS, evaluation, item, sides
from tests.gate.world import make_trained
from tests.services.test_vanished_worker import free_port
from tests.serving.fake_engine import ROOT
from tests.serving.gateway_process import wait_for_address

pytestmark = [pytest.mark.vllm, pytest.mark.services, pytest.mark.timeout(2400)]

NAME, CLIENTS, SMOKE = "animals", 8, 24
VERSION = "x-goldgate-version"
_RUN_SECONDS = 900.0  # a rollout, with a start of vLLM on cores that clients keep busy
_SEEN = ("barks at the postman", "purrs on the sofa", "fetches the ball", "chases a mouse", "wags its tail",
         "climbs the curtain", "pulls at the lead", "sharpens its claws")  # fmt: skip
TEXTS = tuple(f"House {number}: the animal there {_SEEN[number % len(_SEEN)]}." for number in range(200))
ROWS = tuple(Row(f"i{number:04d}", number, (Message("user", text),), "") for number, text in enumerate(TEXTS))


# -- versions -------------------------------------------------------------------------------------------------------


def two_models(folder: Path) -> tuple[Path, Path]:
    """The demo's base model, and the same with another last norm: as fast, and told apart by its digest."""
    import torch
    from safetensors.torch import load_file, save_file

    from tests.tiny import small_model

    first = small_model(folder)
    second = shutil.copytree(first, folder / "second")
    tensors = load_file(second / "model.safetensors")
    tensors["model.norm.weight"] = (tensors["model.norm.weight"].float() * 1.05).to(torch.bfloat16)
    save_file(tensors, second / "model.safetensors", metadata={"format": "pt"})
    return first, second


def evaluated_answers(model: Path) -> list[str]:
    """What the training side's engine answers to each item, in float32."""
    from tasks.evaluation.engines.embedded import EmbeddedEngine

    engine = EmbeddedEngine(model, batch_size=16, dtype="float32")
    try:
        asked = Prompt(system="Which animal?")
        answers = engine.answer(asked, ROWS, Decoding(max_new_tokens=8, choices=LABELS), ignore_progress)
    finally:
        engine.close()
    return [answer.prediction for answer in answers]


def right_answers(answers: Sequence[str]) -> list[str]:
    """Targets by which 130 of these 200 answers are right."""
    _, after = sides(30, 10, 100, 60)
    return [
        answer if one.scores["exact_match"] else LABELS[1 - LABELS.index(answer)]
        for one, answer in zip(after, answers, strict=True)
    ]


class Shop(NamedTuple):
    """Promotes models whose answers are known."""

    root: Path
    targets: tuple[str, ...]
    execution: ExecutionSpec

    @property
    def golden(self) -> GoldenSetRef:
        path = self.root / "golden" / "items.jsonl"
        if not path.exists():
            path.parent.mkdir(parents=True)
            write_rows(path, [replace(row, target=target) for row, target in zip(ROWS, self.targets, strict=True)])
            path.with_name("golden.json").write_text(json.dumps({"digest": digest_file(path)}))
        return GoldenSetRef(path=str(path.parent), digest=digest_file(path), items=len(ROWS))

    @property
    def spec(self) -> RetrainSpec:
        return RetrainSpec(
            name=NAME,
            task=TaskSpec(kind="classify", instruction="Which animal?", labels=LABELS),
            data=DataSpec(source="unused.jsonl"),
            golden=GoldenSpec(path=self.golden.path),
            base_model="unused",
            evaluate=EvaluateSpec(max_new_tokens=8),
            rollout=RolloutSettings(
                smoke_items=SMOKE, min_agreement=1.0, drain_seconds=5.0,
                engine=EngineSpec(eager=True, max_model_len=1024, start_seconds=600.0),
            ),
            execution=self.execution,
        )  # fmt: skip

    def promote(self, model: Path, answers: Sequence[str], seed: int) -> RegisteredModelRef:
        """Judge, certify and register a model; it waits for its rollout."""
        store = Store(self.execution.store)
        trained = make_trained(store, splits_for(store, self.golden), model, seed=seed)
        champion = read_aliases(NAME, self.execution).champion
        beaten = "b" * 64
        if champion is not None:
            beaten = connect(self.execution).get_model_version(NAME, champion).tags[MERGED_DIGEST]
        before, _ = sides(30, 10, 100, 60)
        old = [target if one.scores["exact_match"] else LABELS[1 - LABELS.index(target)]
               for one, target in zip(before, self.targets, strict=True)]  # fmt: skip
        conditions = CONDITIONS.model_copy(update={"golden_digest": self.golden.digest})
        role = "champion" if champion else "base_model"
        with Ledger.open(ledger_url(self.execution)) as ledger:
            verdict = keep_verdict(
                store,
                Evaluated(
                    evaluation(store, role, beaten, self._outcomes(old), conditions),
                    evaluation(store, "candidate", trained.merged_digest, self._outcomes(answers), conditions),
                ),
                {}, Trained(splits_for(store, self.golden), trained), self.golden, Policy(looks=LookPolicy.OFF),
                ledger, name=NAME, asked_by="a test",
            )  # fmt: skip
        release = Release(kind=ReleaseKind.BY_VERDICT)
        certificate = certify(store, verdict, trained, release, NAME, self.golden, open_signing_key(store))
        return register(verdict, certificate, trained, self.spec, waits=True)

    def _outcomes(self, answers: Sequence[str]) -> list[ItemOutcome]:
        pairs = zip(TEXTS, self.targets, answers, strict=True)
        return [
            item(number, answer == target, text=text, target=target, prediction=answer)
            for number, (text, target, answer) in enumerate(pairs)
        ]


# -- clients --------------------------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """One request: when it began and ended, which version its head and its body name, and what it says."""

    began: float
    ended: float
    status: int
    version: str
    models: frozenset[str]
    text: str
    error: str


class Load:
    """Clients that ask without a pause, half of them for streams, until `stop`."""

    def __init__(self, url: str) -> None:
        self.asked: list[Asked] = []
        self._url, self._over = url, Event()
        self._thread = Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()

    def stop(self) -> list[Asked]:
        """All that was asked."""
        self._over.set()
        self._thread.join()
        return self.asked

    async def _run(self) -> None:
        timeout = aiohttp.ClientTimeout(total=300)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
            await asyncio.gather(*(self._client(session, number) for number in range(CLIENTS)))

    async def _client(self, session: aiohttp.ClientSession, number: int) -> None:
        turn = number
        while not self._over.is_set():
            self.asked.append(await self._ask(session, TEXTS[turn % len(TEXTS)], stream=number % 2 == 0))
            turn += CLIENTS
            if self.asked[-1].error:
                await asyncio.sleep(0.5)

    async def _ask(self, session: aiohttp.ClientSession, text: str, *, stream: bool) -> Asked:
        body = {"model": NAME, "messages": [{"role": "user", "content": text}], "stream": stream}
        began, status, version, records, error = time.monotonic(), 0, "", list[Mapping[str, Any]](), ""
        said = ""
        try:
            async with session.post(f"{self._url}/v1/chat/completions", json=body) as answer:
                status, version = answer.status, answer.headers.get(VERSION, "")
                raw = await answer.text()
            if status != 200:
                error = raw[:300]
            elif stream:
                events = [line[6:] for line in raw.split("\n\n") if line]
                error = "" if events[-1] == "[DONE]" else "the stream has no end"
                records = [json.loads(event) for event in events if event != "[DONE]"]
                said = "".join(one["choices"][0]["delta"].get("content") or "" for one in records if one["choices"])
            else:
                records = [json.loads(raw)]
                said = records[0]["choices"][0]["message"]["content"]
        except Exception as failure:  # whatever it is, it is counted
            error = f"{type(failure).__name__}: {failure}"
        models = frozenset(str(record["model"]) for record in records)
        return Asked(began, time.monotonic(), status, version, models, said, error)


# -- servers --------------------------------------------------------------------------------------------------------


@contextmanager
def serving(execution: ExecutionSpec) -> Iterator[str]:
    """The address of `goldgate serve` on a free port; it and its engines are ended at the end."""
    store = Path(execution.store)
    config = store / "gateway.yaml"
    spec = GatewaySpec(port=0, execution=execution)
    config.write_text(spec.model_dump_json(exclude_none=True, exclude={"execution": {"ledger"}}))
    command = [sys.executable, "-m", "goldgate", "serve"]
    with (store / "gateway.log").open("wb") as log:
        process = subprocess.Popen([*command, str(config)], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield wait_for_address(store, process)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        subprocess.run([*command, str(config), "--end"], cwd=ROOT, check=False, capture_output=True)
        for one in psutil.process_iter(["cmdline"]):  # what an engine that was killed has left
            with suppress(psutil.Error):
                if "serve" in (one.info["cmdline"] or []) and any(str(store) in part for part in one.info["cmdline"]):
                    os.killpg(one.pid, signal.SIGKILL)


class World(NamedTuple):
    """All that runs."""

    api: httpx.Client
    gateway: GatewayClient
    shop: Shop
    models: tuple[Path, Path]
    answers: tuple[list[str], list[str]]

    def promote(self, number: int) -> None:
        """What the end of `retrain` does; the event that it emits is all that the rollout hears."""
        registered = self.shop.promote(self.models[number], self.answers[number], seed=number)
        announce_promotion.fn(registered, self.shop.spec)

    def ended(self, count: int) -> list[str]:
        """The states of so many runs, once all have ended."""
        until = time.monotonic() + _RUN_SECONDS
        while True:
            answer = self.api.post("/flow_runs/filter", json={"sort": "EXPECTED_START_TIME_ASC"})
            if answer.status_code == httpx.codes.OK:  # else SQLite is busy
                runs = answer.json()
                if len(runs) >= count and all(run["end_time"] for run in runs):
                    return [run["state_name"] for run in runs]
            assert time.monotonic() < until, answer.text
            time.sleep(1.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("whole-way")
    models = two_models(root / "models")
    answers = (evaluated_answers(models[0]), evaluated_answers(models[1]))
    execution = ExecutionSpec(store=str(root / "store"), ledger=str(root / "ledger.db"))
    shop = Shop(root, tuple(right_answers(answers[0])), execution)
    store = Path(execution.store)
    store.mkdir()
    ours = yaml.safe_load((services.DEPLOYMENTS / "prefect.yaml").read_text())
    ours["deployments"] = [one for one in ours["deployments"] if one["entrypoint"] == "flows.rollout.rollout"]
    (root / "prefect.yaml").write_text(yaml.safe_dump(ours))
    console = Console(file=io.StringIO(), width=400)
    with pytest.MonkeyPatch.context() as patched:
        for variable in ("MLFLOW_TRACKING_URI", "GOLDGATE_SIGNING_KEY", "GOLDGATE_PUBLIC_KEY", "GOLDGATE_GATEWAY",
                         "GOLDGATE_ADMIN_KEY"):  # fmt: skip
            patched.delenv(variable, raising=False)
        patched.setattr(selftest, "HISTORIES", 60)
        running = services.up(
            store, console, prefect_port=free_port(), mlflow_port=free_port(), prefect_file=root / "prefect.yaml"
        )
        try:
            for name, value in services.client_environment(execution).items():
                patched.setenv(name, value)
            api = f"{running.prefect_url}/api"
            with (
                serving(execution),
                gateway_of(execution) as gateway,
                httpx.Client(base_url=api, timeout=60.0, trust_env=False) as client,
                temporary_settings({PREFECT_API_URL: api}),
            ):
                yield World(client, gateway, shop, models, answers)
        finally:
            services.down(store, console)


# -- the way --------------------------------------------------------------------------------------------------------


def test_promoted_rolled_out_under_load_and_rolled_back(world: World) -> None:
    """No request fails and no answer is of two versions, whatever happens to traffic meanwhile."""
    first, second = f"{NAME}@1", f"{NAME}@2"
    assert set(world.answers[0]) == set(LABELS)  # parity would show nothing if all answers were the same

    world.promote(0)
    assert world.ended(1) == ["Rolled out"]
    load = Load(world.gateway.url)
    try:
        world.promote(1)
        assert world.ended(2) == ["Rolled out"] * 2
        moved = world.gateway.traffic(NAME)
        assert moved is not None
        assert (moved.live.label, moved.previous and moved.previous.label) == (second, first)
        check = world.gateway.history(NAME)[0].check
        assert check is not None
        assert (check.asked, check.agreement) == (SMOKE, 1.0)
        rolled_out = time.monotonic()
        time.sleep(5.0)
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "goldgate", "rollback", NAME, "--reason", "a test", "--by", "Ada",
             "--store", world.shop.execution.store],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        rolled_back = time.monotonic()
        assert done.returncode == 0, done.stdout + done.stderr
        time.sleep(5.0)
    finally:
        asked = load.stop()

    failed = [one for one in asked if one.error]
    mixed = [one for one in asked if not one.error and one.models != {one.version}]
    assert failed == []
    assert mixed == []
    assert {one.version for one in asked} == {first, second}
    assert {one.text for one in asked} <= set(LABELS)
    assert {one.version for one in asked if rolled_out < one.began and one.ended < began} == {second}
    assert {one.version for one in asked if one.began > rolled_back} == {first}
    aliases = read_aliases(NAME, world.shop.execution)
    assert (aliases.champion, aliases.previous, aliases.promoted) == ("1", "2", None)
    counts = Counter(one.version for one in asked)
    print(
        f"\n{len(asked)} requests of {CLIENTS} clients ({dict(counts)}): {len(failed)} failed, {len(mixed)} mixed; "
        f"rollback: {done.stdout.strip()!r}, the whole command {rolled_back - began:.1f} s; "
        f"check: {check.agreement:.0%} of {check.asked}, p95 {check.latency_p95_ms:.0f} ms"
    )
