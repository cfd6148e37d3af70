"""vLLM: what is said when it is missing or dies, and, where its environment is, that it answers as the embedded one."""

from __future__ import annotations

import math
import os
import stat
import sys
import time
from pathlib import Path

import psutil
import pytest

from tasks.contracts.errors import EvaluationError
from tasks.contracts.progress import Progress, ignore_progress
from tasks.contracts.prompt import Decoding, Prompt, Shot
from tasks.contracts.rows import Message, Row
from tasks.evaluation.engines.embedded import EmbeddedEngine
from tasks.evaluation.engines.vllm import VllmEngine, vllm_environment, vllm_identity
from tests.processes import lives

LABELS = ("card", "credit_reporting", "debt_collection", "debt", "loan")
PROMPT = Prompt(system="Answer with one label.", shots=(Shot(user="They call me.", assistant="debt"),))
TEXTS = ("They reported a debt.", "The bank closed my account and charged a fee on my card.", "Fee.", "loan " * 20)
ROWS = [Row(f"r{n}", n, (Message("user", text),), "card") for n, text in enumerate(TEXTS)]

# A server in the place of vLLM: as the command line names it, it answers on its port, or dies.
SERVER = """#!{python}
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
print("loading", sys.argv[2])
MODEL = sys.argv[sys.argv.index("--served-model-name") + 1]
{before}
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply({{"data": [{{"id": MODEL}}]}})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if asked["model"] != MODEL: return self.send_error(404)
        choice = {{"message": {{"content": "card"}}}}
        if asked.get("logprobs"):
            choice["logprobs"] = {{"content": [{{"token": "card", "bytes": list(b"card"), "logprob": -0.5}}]}}
        self.reply({{"choices": [choice]}})
    def reply(self, record):
        self.send_response({status})
        self.end_headers()
        self.wfile.write(json.dumps(record).encode())
    def log_message(self, *_): pass
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


def environment(folder: Path, *, before: str = "", status: int = 200) -> Path:
    """A folder that looks like vLLM's environment, with a server in vLLM's place."""
    program = folder / "bin" / "vllm"
    program.parent.mkdir(parents=True)
    program.write_text(SERVER.format(python=sys.executable, before=before, status=status))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    info = folder / "lib" / "python3.11" / "site-packages" / "vllm-9.8.7+cpu.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 9.8.7+cpu\n")
    (folder / "goldgate-vllm.txt").write_text("device cpu\n")
    return folder


def test_a_missing_environment_names_the_command_that_makes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOLDGATE_VLLM_ENV", str(tmp_path / "nowhere"))
    with pytest.raises(EvaluationError, match="environment is not there") as caught:
        vllm_environment()
    assert "make vllm-env" in caught.value.fix
    assert caught.value.where == str(tmp_path / "nowhere")


def test_a_half_made_environment_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (environment(tmp_path / "env") / "goldgate-vllm.txt").unlink()
    monkeypatch.setenv("GOLDGATE_VLLM_ENV", str(tmp_path / "env"))
    with pytest.raises(EvaluationError, match="interrupted"):
        vllm_environment()


def test_identity_names_version_and_number_format_alone(tmp_path: Path) -> None:
    assert vllm_identity(environment(tmp_path), "float32") == "vllm/9.8.7/float32"


def test_it_is_started_asked_and_ended(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOLDGATE_VLLM_ENV", str(environment(tmp_path / "env")))
    engine = VllmEngine(tiny_model, batch_size=2)
    heard: list[Progress] = []
    answers = engine.answer(PROMPT, ROWS, Decoding(max_new_tokens=4, choices=LABELS), heard.append)
    assert [answer.prediction for answer in answers] == ["card"] * len(ROWS)
    assert [answer.confidence for answer in answers] == [pytest.approx(math.exp(-0.5))] * len(ROWS)
    assert heard[0].note == "starting vLLM"
    (server,) = [child for child in psutil.Process().children() if "serve" in child.cmdline()]
    assert server.cmdline()[3:] == [
        str(tiny_model), "--host", "127.0.0.1", "--port", server.cmdline()[7],
        "--served-model-name", server.cmdline()[9],
        "--dtype", engine.identity.rsplit("/", 1)[1], "--max-model-len", "512", "--generation-config", "vllm",
        "--enforce-eager", "--logprobs-mode", "processed_logprobs", "--shutdown-timeout", "20",
    ]  # fmt: skip
    engine.close()
    engine.close()
    assert not server.is_running()


def test_a_server_of_another_evaluation_is_not_taken_for_its_own(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the other gets the port after this one has looked for a free one."""
    slow = environment(tmp_path / "env", before="import time; time.sleep(2)")  # so that it is asked before it fails
    monkeypatch.setenv("GOLDGATE_VLLM_ENV", str(slow))
    other, engine = VllmEngine(tiny_model, batch_size=1), VllmEngine(tiny_model, batch_size=1)
    try:
        other.answer(PROMPT, ROWS[:1], Decoding(max_new_tokens=4), ignore_progress)
        (server,) = [child for child in psutil.Process().children() if "serve" in child.cmdline()]
        taken = int(server.cmdline()[7])
        monkeypatch.setattr("socket.socket.getsockname", lambda _: ("127.0.0.1", taken))
        with pytest.raises(EvaluationError, match=r"ended while it started|does not answer \(HTTP 404\)"):
            engine.answer(PROMPT, ROWS[:1], Decoding(max_new_tokens=4), ignore_progress)
        assert server.is_running()
    finally:
        engine.close()
        other.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"before": "sys.exit('no such architecture')"}, r"ended while it started \(exit status 1\)"),
        ({"status": 500}, r"does not answer \(HTTP 500\)"),
    ],
)
def test_a_failed_start_shows_the_end_of_the_log(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], message: str
) -> None:
    monkeypatch.setenv("GOLDGATE_VLLM_ENV", str(environment(tmp_path / "env", **settings)))
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    with pytest.raises(EvaluationError, match=message) as caught:
        VllmEngine(tiny_model, batch_size=1).answer(PROMPT, ROWS, Decoding(max_new_tokens=4), ignore_progress)
    if "before" in settings:
        assert "no such architecture" in caught.value.what
    assert not [child for child in psutil.Process().children() if "serve" in child.cmdline()]


def test_it_ends_with_the_process_that_started_it(tmp_path: Path, tiny_model: Path) -> None:
    code = (
        "import os, sys, signal; from pathlib import Path; from tests.evaluation.test_vllm import *\n"
        f"engine = VllmEngine(Path({str(tiny_model)!r}), batch_size=1)\n"
        "engine.answer(PROMPT, ROWS[:1], Decoding(max_new_tokens=4), ignore_progress)\n"
        "print(engine._process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    import subprocess

    variables = os.environ | {"GOLDGATE_VLLM_ENV": str(environment(tmp_path / "env"))}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False)
    assert done.stdout.strip().isdigit(), done.stderr
    while lives(int(done.stdout)):
        time.sleep(0.05)  # pytest's time limit ends this if it lives on


@pytest.fixture
def servable_model(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model with heads of 32: vLLM on CPU has no attention for heads of 16."""
    import shutil

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(tiny_model, num_attention_heads=2, num_key_value_heads=1, head_dim=32)
    torch.manual_seed(7)
    folder = shutil.copytree(tiny_model, tmp_path / "servable")
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_it_answers_as_the_embedded_engine(servable_model: Path) -> None:
    """In float32 both engines give the same answers and see the same tokens."""
    server, inside = (
        VllmEngine(servable_model, batch_size=4, dtype="float32"),
        EmbeddedEngine(servable_model, batch_size=4, dtype="float32"),
    )
    try:
        for decoding in (Decoding(max_new_tokens=16, choices=LABELS), Decoding(max_new_tokens=6)):
            theirs = server.answer(PROMPT, ROWS, decoding, ignore_progress)
            ours = inside.answer(PROMPT, ROWS, decoding, ignore_progress)
            assert [answer.prediction for answer in theirs] == [answer.prediction for answer in ours]
            assert [answer.prompt_tokens for answer in theirs] == [answer.prompt_tokens for answer in ours]
            assert not decoding.choices or {answer.prediction for answer in theirs} <= set(LABELS)
            for their, our in zip(theirs, ours, strict=True):  # a confidence means the same in both
                assert their.confidence == (pytest.approx(our.confidence, abs=1e-3) if decoding.choices else None)
    finally:
        server.close()
