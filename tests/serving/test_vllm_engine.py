"""vLLM as an engine: its command line, and, where its environment is, a real one under the host."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import psutil
import pytest
import yaml

from tasks.contracts.errors import EvaluationError, ModelError, ServiceError, SpecError
from tasks.contracts.prompt import Decoding, Prompt
from tasks.contracts.serving import EngineSpec, EngineState, EngineStatus, VersionRef
from tasks.contracts.spec import ExecutionSpec
from tasks.serving.adapters import base_version
from tasks.serving.host import EngineHost, Pace
from tasks.serving.probe import Looked, look
from tasks.serving.vllm import VllmCommand, adapter_name, load_adapter, unload_adapter
from tasks.store import digest_folder
from tasks.tracking import MERGED_DIGEST, connect
from tasks.vllm import vllm_device, vllm_environment, vllm_variables
from tests.services.test_vanished_worker import free_port


def environment(folder: Path, device: str = "cpu") -> Path:
    """A folder that looks like vLLM's environment."""
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "vllm").write_text("")
    (folder / "goldgate-vllm.txt").write_text(f"device {device}\nrecipe abc\n")
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"max_position_embeddings": 2048}')
    return tmp_path / "model"


def value(command: list[str], option: str) -> str:
    return command[command.index(option) + 1]


def test_the_command_line(tmp_path: Path, model: Path) -> None:
    made = environment(tmp_path / "env")
    assert VllmCommand(made).command(model, "complaints@7", 4711, EngineSpec(arguments=("--max-num-seqs", "8"))) == [
        str(made / "bin" / "vllm"), "serve", str(model), "--host", "127.0.0.1", "--port", "4711",
        "--served-model-name", "complaints@7", "--dtype", "float32", "--max-model-len", "2048",
        "--generation-config", "vllm", "--logprobs-mode", "processed_logprobs", "--shutdown-timeout", "20",
        "--disable-uvicorn-access-log", "--max-num-seqs", "8",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("device", "spec", "option", "expected"),
    [
        ("cuda", EngineSpec(), "--dtype", "bfloat16"),
        ("cpu", EngineSpec(dtype="bfloat16"), "--dtype", "bfloat16"),
        ("cuda", EngineSpec(dtype="float32"), "--dtype", "float32"),
        ("cpu", EngineSpec(max_model_len=512), "--max-model-len", "512"),
        ("cuda", EngineSpec(adapters=True), "--max-lora-rank", "64"),
    ],
)
def test_settings_become_arguments(
    tmp_path: Path, model: Path, device: str, spec: EngineSpec, option: str, expected: str
) -> None:
    command = VllmCommand(environment(tmp_path / "env", device)).command(model, "c@1", 1, spec)
    assert value(command, option) == expected


def test_eager_is_chosen(tmp_path: Path, model: Path) -> None:
    command = VllmCommand(environment(tmp_path / "env"))
    assert "--enforce-eager" in command.command(model, "c@1", 1, EngineSpec(eager=True))
    assert "--enforce-eager" not in command.command(model, "c@1", 1, EngineSpec())


def test_adapters_are_refused_on_a_cpu(tmp_path: Path, model: Path) -> None:
    with pytest.raises(ServiceError, match="CPU build: there, requests to the base model get") as caught:
        VllmCommand(environment(tmp_path / "env")).command(model, "c@1", 1, EngineSpec(adapters=True))
    assert "merged model" in caught.value.fix


@pytest.mark.parametrize(
    "argument",
    ["--host", "--host=0.0.0.0", "--hos", "--api-key", "--api_key=x", "--trust-remote-code", "--enable-lora"],
)
def test_arguments_that_would_open_it_are_refused(tmp_path: Path, model: Path, argument: str) -> None:
    with pytest.raises(SpecError, match="is not free"):
        VllmCommand(environment(tmp_path / "env")).command(model, "c@1", 1, EngineSpec(arguments=(argument,)))


@pytest.mark.parametrize("config", ["{", "[]", '{"max_position_embeddings": null}'])
def test_a_config_that_cannot_be_read(tmp_path: Path, model: Path, config: str) -> None:
    (model / "config.json").write_text(config)
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        VllmCommand(environment(tmp_path / "env")).command(model, "c@1", 1, EngineSpec())


def test_its_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_PLUGINS", "PYTHONPATH", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "x")
    made = environment(tmp_path / "env")
    variables = VllmCommand(made, kv_gib=2).environment("the key")
    assert variables["VLLM_API_KEY"] == "the key"
    assert variables["VLLM_CPU_KVCACHE_SPACE"] == "2"
    assert variables["VLLM_CPU_OMP_THREADS_BIND"] == ",".join(map(str, sorted(os.sched_getaffinity(0))))
    assert variables["HF_HUB_OFFLINE"] == variables["VLLM_NO_USAGE_STATS"] == "1"
    assert variables["PATH"].split(os.pathsep)[0] == str(made / "bin")
    assert variables.keys().isdisjoint({"VLLM_PLUGINS", "PYTHONPATH", "OMP_NUM_THREADS"})
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in variables
    cuda = VllmCommand(environment(tmp_path / "cuda", "cuda")).environment("k")
    assert cuda["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert vllm_variables(made)["VLLM_CPU_KVCACHE_SPACE"] == "1"


def test_an_environment_that_is_not_there_or_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOLDGATE_VLLM_ENV", str(tmp_path / "nowhere"))
    with pytest.raises(ServiceError, match="is not there") as caught:
        VllmCommand()
    assert caught.value.fix == (
        "make it with `make vllm-env`, or name another one in the environment's GOLDGATE_VLLM_ENV"
    )
    with pytest.raises(EvaluationError) as other:
        vllm_environment(EvaluationError, "do without")
    assert other.value.fix.endswith(", or do without")
    with pytest.raises(ServiceError, match="does not say which device"):
        vllm_device(environment(tmp_path / "env", "tpu"))


# -- adapters: against a server that replies as vLLM's route does ----------------------------------------------------


@contextmanager
def lora_route(status: int, text: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append({"path": self.path, "key": self.headers["Authorization"], **body})
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def some_version(digest: str = "ab" * 32) -> VersionRef:
    decoding = Decoding(max_new_tokens=8, choices=("card", "debt", "loan"))
    prompt = Prompt(system="Answer with one label.")
    return VersionRef(name="c", version="7", digest=digest, uri="models:/c/7", prompt=prompt, decoding=decoding)


def test_an_adapter_gets_a_name_of_its_own(tmp_path: Path) -> None:
    assert adapter_name(some_version()) == "c@7-abababab"
    assert adapter_name(some_version("cd" * 32)) != adapter_name(some_version())
    with lora_route(200, "Success") as (url, asked), httpx.Client(trust_env=False) as client:
        assert load_adapter(client, url, "k", some_version(), tmp_path) == "c@7-abababab"
    assert asked == [
        {
            "path": "/v1/load_lora_adapter",
            "key": "Bearer k",
            "lora_name": "c@7-abababab",
            "lora_path": str(tmp_path),
        }
    ]  # nothing that loads over another one


def test_an_adapter_that_is_there_is_left_and_a_refused_one_is_an_error(tmp_path: Path) -> None:
    with httpx.Client(trust_env=False) as client:
        with lora_route(400, "The lora adapter 'c@7-abababab' has already been loaded.") as (url, _):
            assert load_adapter(client, url, "k", some_version(), tmp_path) == "c@7-abababab"
        with lora_route(400, "rank 128 is above 64") as (url, _), pytest.raises(ServiceError, match="rank 128"):
            load_adapter(client, url, "k", some_version(), tmp_path)
        with pytest.raises(ServiceError, match="did not load the adapter of c@7: ConnectError"):
            load_adapter(client, url, "k", some_version(), tmp_path)


@pytest.mark.parametrize(
    ("status", "gone"), [(200, True), (404, True), (400, False), (500, False)], ids=["gone", "never there", "no", "ill"]
)
def test_an_adapter_is_taken_out(status: int, gone: bool) -> None:
    with lora_route(status, "said") as (url, asked), httpx.Client(trust_env=False) as client:
        assert unload_adapter(client, url, "k", "c@7-abababab") is gone
    assert asked == [{"path": "/v1/unload_lora_adapter", "key": "Bearer k", "lora_name": "c@7-abababab"}]


def test_an_adapter_of_an_engine_that_has_ended_is_gone() -> None:
    with lora_route(200, "") as (url, _):
        pass
    with httpx.Client(trust_env=False) as client:
        assert unload_adapter(client, url, "k", "c@7-abababab")


def test_an_engine_on_cuda_takes_adapters(tmp_path: Path) -> None:
    VllmCommand(environment(tmp_path / "cuda", "cuda")).check_adapters()
    with pytest.raises(ServiceError, match="CPU build"):
        VllmCommand(environment(tmp_path / "cpu", "cpu")).check_adapters()


# -- the real one ----------------------------------------------------------------------------------------------------

EAGER = EngineSpec(eager=True, start_seconds=300.0)


def register(execution: ExecutionSpec, model: Path, root: Path) -> VersionRef:
    shutil.copytree(model, root / "artifacts" / "model")
    artifacts = {"model": {"path": "artifacts/model", "uri": "x"}}
    (root / "MLmodel").write_text(yaml.safe_dump({"flavors": {"python_function": {"artifacts": artifacts}}}))
    client = connect(execution)
    client.create_registered_model("c")
    digest = digest_folder(root / "artifacts" / "model")
    made = client.create_model_version("c", source=root.as_uri(), tags={MERGED_DIGEST: digest})
    return some_version(digest).model_copy(update={"version": str(made.version), "uri": f"models:/c/{made.version}"})


def processes(folder: Path) -> list[psutil.Process]:
    """The servers that serve a model of this folder; what they start has no command line that tells."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if "serve" in command and any(part.startswith(str(folder)) for part in command):
            found.append(process)
    return found


def wait_for(host: EngineHost, engine: str, *states: EngineState) -> EngineStatus:
    deadline = time.monotonic() + 300
    while (status := host.status(engine)) is None or status.state not in states:
        assert time.monotonic() < deadline, status
        time.sleep(0.1)
    return status


def wait_until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ask(host: EngineHost, engine: str, **more: Any) -> httpx.Response:
    endpoint = host.endpoint(engine)
    assert endpoint is not None
    body = {"model": endpoint.label, "messages": [{"role": "user", "content": "They charged my card."}], **more}
    return httpx.post(
        f"{endpoint.url}/chat/completions",
        json={"temperature": 0, **body},
        headers={"Authorization": f"Bearer {endpoint.key}"},
        trust_env=False,
        timeout=120.0,
    )


@pytest.fixture(scope="module")
def real_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny import small_model

    return small_model(tmp_path_factory.mktemp("real"))


@pytest.mark.vllm
@pytest.mark.timeout(1200)
def test_a_registered_model_is_served_and_killed(
    real_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    execution = ExecutionSpec(store=str(tmp_path / "store"))
    version = register(execution, real_model, tmp_path / "registered")
    engine, pace = version.engine, Pace(look=0.2, back_off=(0.5,))
    host = EngineHost(tmp_path / "serving", execution, VllmCommand(), pace=pace)
    try:
        # Killed while it loads: failed, with the reason, and nothing of it is left.
        host.start(version, EAGER)
        wait_until(lambda: processes(tmp_path))
        (server,) = processes(tmp_path)
        wait_until(lambda: len(server.children(recursive=True)) >= 2)
        started = [server, *server.children(recursive=True)]
        server.kill()
        status = wait_for(host, engine, EngineState.FAILED, EngineState.READY)
        assert status.state is EngineState.FAILED
        assert "It ended while it started (signal SIGKILL)." in str(status.why)
        _, alive = psutil.wait_procs(started, timeout=10)
        assert alive == []

        # Started again, it answers.
        host.start(version, EAGER)
        status = wait_for(host, engine, EngineState.FAILED, EngineState.READY)
        assert status.state is EngineState.READY, status.why
        assert status.memory_bytes > 1e9
        (server,) = processes(tmp_path)
        assert value(server.cmdline(), "--served-model-name") == "c@1"
        assert str(tmp_path / "serving" / "models" / version.digest) in server.cmdline()
        reply = ask(host, engine, structured_outputs={"choice": ["card", "loan"]}, logprobs=True).json()
        assert reply["model"] == "c@1"
        assert reply["choices"][0]["message"]["content"] in ("card", "loan")
        endpoint = host.endpoint(engine)
        assert endpoint is not None
        assert httpx.get(f"{endpoint.url}/models", trust_env=False).status_code == 401

        # Killed while it serves, by its inner process: started anew, and it says so.
        inner = [one for one in server.children(recursive=True) if "EngineCore" in " ".join(one.cmdline())]
        inner[0].send_signal(signal.SIGKILL)
        host.suspect(engine)
        wait_until(lambda: processes(tmp_path) not in ([], [server]))
        status = wait_for(host, engine, EngineState.FAILED, EngineState.READY)
        assert status.state is EngineState.READY, status.why
        assert "Start 1 of 1 after a failure." in str(status.why)
        assert ask(host, engine).is_success

        # Another host adopts it; ended, it lets the request under way finish.
        host.close()
        host = EngineHost(tmp_path / "serving", execution, VllmCommand(), pace=pace)
        replies: list[httpx.Response] = []
        asking = Thread(target=lambda: replies.append(ask(host, engine, max_tokens=100, min_tokens=100)))
        asking.start()
        time.sleep(1.0)
        host.stop(engine, 60.0, lambda: int(asking.is_alive()))
        wait_for(host, engine, EngineState.STOPPED)
        asking.join()
        assert [reply.json()["usage"]["completion_tokens"] for reply in replies] == [100]
        assert processes(tmp_path) == []
    finally:
        host.close()
        for process in processes(tmp_path):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_weights_that_are_no_numbers_are_found_out_by_asking(real_model: Path, tmp_path: Path) -> None:
    """vLLM loads them, says that it is healthy, and answers; the check of weights is left out here."""
    folder = shutil.copytree(real_model, tmp_path / "poisoned")
    data = bytearray((folder / "model.safetensors").read_bytes())
    length = int.from_bytes(data[:8], "little")
    begin = json.loads(data[8 : 8 + length])["model.layers.5.mlp.down_proj.weight"]["data_offsets"][0]
    data[8 + length + begin : 8 + length + begin + 2] = (0x7FC0).to_bytes(2, "little")
    (folder / "model.safetensors").write_bytes(data)
    host = EngineHost(
        tmp_path / "serving", ExecutionSpec(), VllmCommand(), prepare=lambda *_: folder, pace=Pace(retry=0.1)
    )
    try:
        version = some_version()
        host.start(version, EAGER)
        status = wait_for(host, version.engine, EngineState.FAILED, EngineState.READY)
        assert status.state is EngineState.FAILED
        assert "It started, but it replies HTTP 400" in str(status.why)
        assert "Out of range float values" in str(status.why)
        assert processes(tmp_path) == []
    finally:
        host.close()
        for process in processes(tmp_path):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_its_routes_for_adapters_reply_as_is_relied_on(real_model: Path, tmp_path: Path) -> None:
    """Loaded once under a name, refused again, asked for, taken out. What it answers with one is not looked at: a CPU
    build gives wrong answers, so it is started here by hand with what Goldgate refuses there.
    """
    from tests.serving.test_weights import halves, write

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"],
              "base_model_name_or_path": "base", "bias": "none"}  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    layers = [f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_" for layer in range(30)]
    write(
        adapter / "adapter_model.safetensors",
        {f"{layer}A.weight": halves(4, 576, value=0.01) for layer in layers}
        | {f"{layer}B.weight": halves(576, 4, value=0.0) for layer in layers},
    )
    command, port = VllmCommand(), free_port()
    started = [
        *command.command(real_model, "base@0", port, EAGER.model_copy(update={"max_model_len": 512})),
        "--enable-lora", "--max-lora-rank", "64", "--max-cpu-loras", "8",
    ]  # fmt: skip
    environment = command.environment("the key") | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(started, env=environment, stdout=log, stderr=log, start_new_session=True)
    url, version = f"http://127.0.0.1:{port}/v1", some_version()
    name = adapter_name(version)
    try:
        with httpx.Client(trust_env=False) as client:
            carrier = base_version("ab" * 32)
            wait_until(
                lambda: (
                    process.poll() is not None or look(client, url, "the key", carrier, 60.0).looked is Looked.ANSWERED
                ),
                seconds=400.0,
            )
            assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
            with pytest.raises(ServiceError, match="did not load the adapter"):
                load_adapter(client, url, "the key", version, tmp_path / "nowhere")
            for _ in range(2):  # there already, the second time
                assert load_adapter(client, url, "the key", version, adapter) == name
            assert look(client, url, "the key", version, 120.0, name).looked is Looked.ANSWERED
            assert unload_adapter(client, url, "the key", name)
            gone = look(client, url, "the key", version, 60.0, name)
            assert (gone.looked, "HTTP 404" in gone.why) == (Looked.WRONG, True)
            assert unload_adapter(client, url, "the key", name)
            assert look(client, url, "the key", carrier, 60.0).looked is Looked.ANSWERED
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
