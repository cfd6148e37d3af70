"""Adapters in engines that carry them: loaded, asked by name, loaded again, unloaded; a fake server in vLLM's place."""

from __future__ import annotations

import json
import os
import shutil
import signal
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tasks.contracts.errors import ModelError, RegistryError
from tasks.contracts.serving import EngineSpec, EngineState, EngineStatus, VersionRef
from tasks.contracts.spec import ExecutionSpec
from tasks.registry import versions
from tasks.serving.adapters import base_version
from tasks.serving.files import ADAPTER_DIGEST, RUN_FINGERPRINT, AdapterFiles, local_adapter
from tasks.serving.host import EngineHost
from tasks.serving.vllm import VllmCommand
from tasks.serving.weights import adapter_faults
from tasks.store import Store, digest_folder
from tasks.tracking import MERGED_DIGEST, connect
from tests.serving.fake_engine import Behaviour, FakeCommand
from tests.serving.test_host import QUICK, engines_of, status_of, version, wait_for, wait_for_state
from tests.serving.test_vllm_engine import environment
from tests.serving.test_weights import RANK, A, B, halves, write

SPEC = EngineSpec(start_seconds=120.0, adapters=True)
SEVEN, EIGHT = version("7"), version("8")
CARRIER = base_version("").label


def base_of(execution: ExecutionSpec, model: Path, note: str = "") -> str:
    """Digest of a base model in the store."""

    def make(folder: Path) -> dict[str, Any]:
        shutil.copytree(model, folder / "model")
        if note:
            (folder / "note").write_text(note)
        return {}

    made = Store(execution.store).produce("base_model", 1, {"note": note}, {"source": "5" * 64}, make)
    return made.manifest.digest


@pytest.fixture(scope="module")
def execution(tmp_path_factory: pytest.TempPathFactory) -> ExecutionSpec:
    """One SQLite database for the module, since making its tables takes seconds."""
    return ExecutionSpec(store=str(tmp_path_factory.mktemp("adapters") / "store"))


@pytest.fixture
def fakes(tmp_path: Path) -> FakeCommand:
    return FakeCommand(tmp_path / "fakes")


Hosts = Callable[..., EngineHost]


@pytest.fixture
def hosts(tmp_path: Path, fakes: FakeCommand, execution: ExecutionSpec) -> Iterator[Hosts]:
    """Makes hosts on one folder, which take every version's adapter as one of the first base, or as `bases` says."""
    model = tmp_path / "base"
    model.mkdir()
    (model / "config.json").write_text("{}")
    made: list[EngineHost] = []

    def make(bases: dict[str, str] | None = None) -> EngineHost:
        def prepare(of: VersionRef) -> AdapterFiles:
            digest = base_of(execution, model, (bases or {}).get(of.version, "first"))
            return AdapterFiles(tmp_path / f"adapter-{of.version}", of.version * 64, model, digest, model)

        made.append(
            EngineHost(tmp_path / "serving", execution, fakes, prepare=not_merged, prepare_adapter=prepare, pace=QUICK)
        )
        return made[-1]

    yield make
    for host in made:
        host.close()
    for process in engines_of(fakes):
        with suppress(ProcessLookupError):  # it has just ended
            os.killpg(process.pid, signal.SIGKILL)


def not_merged(version: VersionRef, spec: EngineSpec) -> Path:
    raise AssertionError("the merged model is not needed")


def ready(host: EngineHost, *refs: VersionRef) -> list[EngineStatus]:
    for ref in refs:
        host.start(ref, SPEC)
    found = [wait_for_state(host, ref.engine, EngineState.READY, EngineState.FAILED) for ref in refs]
    assert [status.state for status in found] == [EngineState.READY] * len(refs), [status.why for status in found]
    return found


def ask(host: EngineHost, ref: VersionRef) -> Any:
    endpoint = host.endpoint(ref.engine)
    assert endpoint is not None
    body = {"model": endpoint.model, "messages": [{"role": "user", "content": "hi"}]}
    headers = {"Authorization": f"Bearer {endpoint.key}"}
    url = f"{endpoint.url}/chat/completions"
    return httpx.post(url, json=body, headers=headers, trust_env=False, timeout=60.0).json()


def said_to(fakes: FakeCommand) -> list[str]:
    """What was loaded and unloaded."""
    path = fakes.folder / f"{CARRIER}.adapters"
    return path.read_text().splitlines() if path.exists() else []


def test_versions_of_one_base_share_an_engine_that_goes_with_the_last(hosts: Hosts, fakes: FakeCommand) -> None:
    host = hosts()
    ready(host, SEVEN, EIGHT)
    (process,) = engines_of(fakes)
    assert [(one.name, one.version.label) for one in host.statuses()] == [
        (SEVEN.engine, "complaints@7"),
        (EIGHT.engine, "complaints@8"),
    ]  # no name leads to the engine that carries them
    endpoint = host.endpoint(SEVEN.engine)
    assert endpoint is not None
    assert (endpoint.label, endpoint.model) == ("complaints@7", "complaints@7-00000000")
    assert ask(host, SEVEN)["choices"][0]["message"]["content"] == "complaints@7-00000000: hi"
    assert ask(host, EIGHT)["model"] == "complaints@8-00000000"
    asked = {body["model"] for body in fakes.requests(CARRIER)}
    assert asked == {CARRIER, "complaints@7-00000000", "complaints@8-00000000"}  # each is probed by its own name

    host.stop(SEVEN.engine, 0.0, lambda: 0)
    wait_for_state(host, SEVEN.engine, EngineState.STOPPED)
    assert host.endpoint(SEVEN.engine) is None
    assert engines_of(fakes) == [process]
    assert ask(host, EIGHT)["model"] == "complaints@8-00000000"
    assert said_to(fakes)[-1] == "unload complaints@7-00000000"

    host.stop(EIGHT.engine, 0.0, lambda: 0)
    wait_for_state(host, EIGHT.engine, EngineState.STOPPED)
    wait_for(lambda: engines_of(fakes) == [], "the end of the engine that carried them")
    loads = [line for line in said_to(fakes) if line.startswith("load ")]
    assert sorted(loads) == ["load complaints@7-00000000", "load complaints@8-00000000"]


def test_one_that_comes_as_the_last_goes_is_carried_too(hosts: Hosts, fakes: FakeCommand) -> None:
    host = hosts()
    ready(host, SEVEN)
    host.stop(SEVEN.engine, 0.0, lambda: 0)
    wait_for(lambda: said_to(fakes)[-1].startswith("unload"), "its end")  # the engine that carried it may be ending
    (status,) = ready(host, EIGHT)
    assert status.why is None
    assert ask(host, EIGHT)["model"] == "complaints@8-00000000"


def test_another_base_has_an_engine_of_its_own(hosts: Hosts, fakes: FakeCommand) -> None:
    host = hosts({"7": "one", "8": "two"})
    ready(host, SEVEN, EIGHT)
    assert len(engines_of(fakes)) == 2


def test_adapters_are_loaded_again_where_their_engine_was_lost(hosts: Hosts, fakes: FakeCommand) -> None:
    host = hosts()
    ready(host, SEVEN, EIGHT)
    before = said_to(fakes)
    (process,) = engines_of(fakes)
    process.kill()

    def is_avoided() -> bool:
        host.suspect(SEVEN.engine)
        return host.endpoint(SEVEN.engine) is None

    wait_for(is_avoided, "the gateway to ask nobody there")
    wait_for(lambda: len(said_to(fakes)) == len(before) + 2, "both to be loaded again")
    for ref in (SEVEN, EIGHT):
        wait_for(lambda ref=ref: host.endpoint(ref.engine) is not None, "it to answer")  # type: ignore[misc]
        assert "the engine that carries it was lost" in str(status_of(host, ref.engine).why)
        assert ask(host, ref)["model"] == f"{ref.label}-00000000"
    assert len(engines_of(fakes)) == 1


def test_the_next_host_finds_them_loaded(hosts: Hosts, fakes: FakeCommand) -> None:
    first = hosts()
    ready(first, SEVEN)
    before, endpoint, process = said_to(fakes), first.endpoint(SEVEN.engine), engines_of(fakes)
    first.close()
    assert engines_of(fakes) == process
    second = hosts()
    assert second.endpoint(SEVEN.engine) == endpoint  # at once
    assert ask(second, SEVEN)["model"] == "complaints@7-00000000"
    assert said_to(fakes) == before
    second.stop(SEVEN.engine, 0.0, lambda: 0)
    wait_for(lambda: engines_of(fakes) == [], "the end of the engine that carried it")


def test_an_engine_that_carries_nothing_is_ended_by_the_next_host(
    hosts: Hosts, fakes: FakeCommand, tmp_path: Path
) -> None:
    first = hosts()
    ready(first, SEVEN)
    first.close()
    (tmp_path / "serving" / "engines" / f"{SEVEN.engine}.json").unlink()
    assert hosts().statuses() == []
    wait_for(lambda: engines_of(fakes) == [], "the end of the engine that carried it")


def test_a_poisoned_adapter_is_unloaded_and_the_others_go_on(hosts: Hosts, fakes: FakeCommand) -> None:
    host = hosts()
    ready(host, SEVEN)
    fakes.behave("complaints@8-00000000", Behaviour(poisoned="nan"))
    host.start(EIGHT, SPEC)
    status = wait_for_state(host, EIGHT.engine, EngineState.FAILED)
    assert "It started, but it replies HTTP 500" in str(status.why)
    assert said_to(fakes)[-1] == "unload complaints@8-00000000"
    assert status_of(host, SEVEN.engine).state is EngineState.READY
    assert ask(host, SEVEN)["model"] == "complaints@7-00000000"


def test_an_engine_that_cannot_carry_says_why(hosts: Hosts, fakes: FakeCommand) -> None:
    fakes.behave(CARRIER, Behaviour(start_exit=3))
    host = hosts()
    host.start(SEVEN, SPEC)
    why = str(wait_for_state(host, SEVEN.engine, EngineState.FAILED).why)
    assert "The engine that is to carry the adapter of complaints@7 failed: It ended while it started" in why
    assert "no such architecture" in why


def test_two_tasks_cannot_ask_for_two_settings_of_one_engine(hosts: Hosts) -> None:
    host = hosts()
    ready(host, SEVEN)
    host.start(EIGHT, SPEC.model_copy(update={"max_model_len": 512}))
    why = str(wait_for_state(host, EIGHT.engine, EngineState.FAILED).why)
    assert "The engine of base@0 runs with other settings than these." in why
    assert status_of(host, SEVEN.engine).state is EngineState.READY


def test_a_cpu_takes_no_adapters(tmp_path: Path, execution: ExecutionSpec) -> None:
    """Refused before a file is fetched or anything is started."""

    def prepare(of: VersionRef) -> AdapterFiles:
        raise AssertionError("nothing is to be fetched")

    command = VllmCommand(environment(tmp_path / "env", "cpu"))
    host = EngineHost(tmp_path / "serving", execution, command, prepare_adapter=prepare, pace=QUICK)
    try:
        host.start(SEVEN, SPEC)
        why = str(wait_for_state(host, SEVEN.engine, EngineState.FAILED).why)
    finally:
        host.close()
    assert "Adapters are not loaded into vLLM's CPU build" in why
    assert "set `engine.adapters` to false" in why


# -- files ----------------------------------------------------------------------------------------------------------


def test_the_tags_are_those_of_the_registry() -> None:
    assert (ADAPTER_DIGEST, RUN_FINGERPRINT) == (versions.ADAPTER_DIGEST, versions.RUN_FINGERPRINT)


@pytest.fixture
def trained(
    execution: ExecutionSpec, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., VersionRef]:
    """Registers a version with an adapter that the store knows the training of."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def make(*, base: str | None = None, onto: str = "base", without: str = "") -> VersionRef:
        name = f"c-{uuid.uuid4().hex}"
        digest = base or base_of(execution, tiny_model)

        def train(folder: Path) -> dict[str, Any]:
            (folder / "adapter").mkdir()
            config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": ["q_proj"]}
            (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
            write(folder / "adapter" / "adapter_model.safetensors", {A: halves(RANK, 64), B: halves(64, RANK)})
            facts = {"base": {"source": "base", "digest": digest}, "skews": [{"kl": 0.1, "onto": onto}]}
            (folder / "training.json").write_text(json.dumps(facts))
            return {}

        store = Store(execution.store)
        made = store.produce("train", 1, {"onto": onto, "name": name}, {"base": digest}, train)
        root = tmp_path / "registered"
        shutil.copytree(tiny_model, root / "model")
        shutil.copytree(store.files(made) / "adapter", root / "adapter")
        artifacts = {name: {"path": name, "uri": "x"} for name in ("model", "adapter") if name != without}
        (root / "MLmodel").write_text(yaml.safe_dump({"flavors": {"python_function": {"artifacts": artifacts}}}))
        tags = {
            MERGED_DIGEST: digest_folder(root / "model"),
            ADAPTER_DIGEST: digest_folder(root / "adapter"),
            RUN_FINGERPRINT: "0" * 64 if without == "training" else made.manifest.fingerprint,
        }
        client = connect(execution)
        client.create_registered_model(name)
        number = str(client.create_model_version(name, source=root.as_uri(), tags=tags).version)
        return version(number, name).model_copy(
            update={"digest": tags[MERGED_DIGEST], "uri": f"models:/{name}/{number}"}
        )

    return make


def test_adapter_and_base_are_copied_and_fit(
    trained: Callable[..., VersionRef], execution: ExecutionSpec, tiny_model: Path, tmp_path: Path
) -> None:
    models = tmp_path / "models"
    files = local_adapter(models, trained(), execution)
    assert files.folder == models / digest_folder(files.folder)
    assert files.base == models / files.base_digest / "model"
    assert digest_folder(files.base) == digest_folder(tiny_model)
    assert {path.stat().st_mode & 0o222 for path in models.rglob("*")} == {0}
    assert adapter_faults(files.folder, files.base, files.base_digest, files.training, max_rank=RANK) == []
    assert adapter_faults(files.folder, files.base, files.base_digest, files.training, max_rank=RANK - 1) == [
        ("adapter_config.json", "its rank is 4; engines take at most 3")
    ]


def test_what_was_merged_onto_other_weights_is_refused(
    trained: Callable[..., VersionRef], execution: ExecutionSpec, tmp_path: Path
) -> None:
    files = local_adapter(tmp_path / "models", trained(onto="nf4"), execution)
    assert adapter_faults(files.folder, files.base, files.base_digest, files.training) == [
        ("training.json", "the evaluated model is the adapter on `nf4`, not on its base")
    ]


@pytest.mark.parametrize(
    ("changes", "error", "what"),
    [
        ({"without": "adapter"}, RegistryError, "was registered without an adapter"),
        ({"without": "training"}, ModelError, "The store has no training of c-"),
        ({"base": "ab" * 32}, ModelError, "The store has no base model with the digest abab"),
    ],
)
def test_what_cannot_be_checked_is_not_loaded(
    trained: Callable[..., VersionRef],
    execution: ExecutionSpec,
    tmp_path: Path,
    changes: dict[str, str],
    error: type[Exception],
    what: str,
) -> None:
    with pytest.raises(error, match=what) as caught:
        local_adapter(tmp_path / "models", trained(**changes), execution)
    assert "engine.adapters: false" in str(caught.value)


def test_an_adapter_that_was_changed_in_the_registry_is_refused(
    trained: Callable[..., VersionRef], execution: ExecutionSpec, tmp_path: Path
) -> None:
    ref = trained()
    (tmp_path / "registered" / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(RegistryError, match=r"are not those that were registered: c-.*@1 is to have sha256"):
        local_adapter(tmp_path / "models", ref, execution)
