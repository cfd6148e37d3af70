"""Asking a model through a vLLM that is started for it, from vLLM's own environment, and ended with it.

Nothing here imports vLLM: its pins do not fit beside those of Goldgate.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import httpx

from tasks.contracts.errors import EvaluationError
from tasks.contracts.progress import Progress, ProgressListener
from tasks.contracts.prompt import Decoding, Prompt
from tasks.contracts.rows import Row
from tasks.contracts.tool_template import check_tools_rendered
from tasks.evaluation.engines.dtype import Dtype, default_dtype
from tasks.evaluation.engines.engine import Answer
from tasks.evaluation.engines.openai_http import OpenAIEngine
from tasks.vllm import vllm_environment as find_environment
from tasks.vllm import vllm_variables, vllm_version

_USUAL_START = 30.0  # seconds, eager, on two cores
_LONGEST_START = 600.0
_LONGEST_STOP = 40.0  # above the 20 s that --shutdown-timeout gives requests under way
_CONTEXT = 8192  # tokens; a long context's KV cache would not fit into the 1 GiB that is reserved on CPU
_TAIL = 30  # lines of the log that an error shows
# PR_SET_PDEATHSIG: when this process dies, however it dies, the server ends too. Set by the child itself before it
# becomes vLLM, since code between fork and exec is not safe in a process with threads.
_DIES_WITH_PARENT = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGTERM); "
    "os.getppid() == int(sys.argv[1]) or sys.exit('parent is gone'); os.execv(sys.argv[2], sys.argv[2:])"
)


def vllm_environment() -> Path:
    """See `tasks.vllm.vllm_environment`.

    Raises:
        EvaluationError: it is not there or half made.
    """
    return find_environment(EvaluationError, "set `evaluate.engine` to embedded")


def vllm_identity(environment: Path, dtype: Dtype | None = None) -> str:
    """What evaluations by this vLLM share; read from its packages, without starting it."""
    return f"vllm/{vllm_version(environment)}/{dtype or default_dtype()}"


class VllmEngine:
    """A vLLM server on a free loopback port, started by the first `answer` and ended by `close`."""

    def __init__(self, folder: Path, *, batch_size: int, dtype: Dtype | None = None) -> None:
        """Prepare to serve the merged model in `folder`.

        Raises:
            EvaluationError: vLLM's environment is not there.
        """
        self._environment = vllm_environment()
        self._folder = folder
        self._batch_size = batch_size
        self._dtype: Dtype = dtype or default_dtype()
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._client: OpenAIEngine | None = None

    @property
    def identity(self) -> str:
        """See `Engine.identity`."""
        return vllm_identity(self._environment, self._dtype)

    def answer(
        self, prompt: Prompt, rows: Sequence[Row], decoding: Decoding, listener: ProgressListener
    ) -> list[Answer]:
        """See `Engine.answer`.

        Raises:
            ModelError: there are tools to call, and the chat template cannot render them.
        """
        if prompt.tools:
            self._check_tools()
        if self._client is None:
            self._client = self._start(listener)
        return self._client.answer(prompt, rows, decoding, listener)

    def close(self) -> None:
        """End the server: gently, then with all its processes."""
        if self._client is not None:
            self._client.close()
            self._client = None
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(_LONGEST_STOP)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
            self._process = None
        if self._log is not None:
            self._log.close()
            self._log = None

    def _check_tools(self) -> None:
        from transformers import AutoTokenizer

        # A server with a template that knows no tools would leave them out without a word.
        check_tools_rendered(AutoTokenizer.from_pretrained(self._folder, local_files_only=True), str(self._folder))

    # -- starting -----------------------------------------------------------------------------------------------

    def _start(self, listener: ProgressListener) -> OpenAIEngine:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # No server but this one knows the name: not even that of another evaluation, which may get the port first.
        model = f"goldgate-{uuid.uuid4().hex}"
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the server runs; `close` closes it
        self._process = subprocess.Popen(
            [sys.executable, "-c", _DIES_WITH_PARENT, str(os.getpid()), *self._command(port, model)],
            env=vllm_variables(self._environment),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its helpers can be ended together
        )
        url = f"http://127.0.0.1:{port}/v1"
        try:
            _wait_until_it_answers(self._process, url, model, listener)
        except _FailedStartError as error:
            failure = self._failure(str(error), self._log)
            self.close()
            raise failure from error
        except BaseException:
            self.close()
            raise
        return OpenAIEngine(
            url, model, batch_size=self._batch_size, identity=self.identity, reads_calls=True, says_confidence=True
        )

    def _command(self, port: int, model: str) -> list[str]:
        config = json.loads((self._folder / "config.json").read_text(encoding="utf-8"))
        context = min(_CONTEXT, config.get("max_position_embeddings", _CONTEXT))
        return [
            str(self._environment / "bin" / "vllm"), "serve", str(self._folder),
            "--host", "127.0.0.1", "--port", str(port),
            "--served-model-name", model,
            "--dtype", self._dtype,
            "--max-model-len", str(context),
            "--generation-config", "vllm",  # no sampling defaults from the model's files: decoding is greedy everywhere
            "--enforce-eager",  # compiling costs a minute at each start, and an evaluation takes less
            "--logprobs-mode", "processed_logprobs",  # of what was drawn, after the constraint to choices
            "--shutdown-timeout", "20",  # without it, ending waits minutes for requests under way
        ]  # fmt: skip

    def _failure(self, what: str, log: IO[bytes]) -> EvaluationError:
        # pread, since the server writes at the file's one position
        text = os.pread(log.fileno(), os.fstat(log.fileno()).st_size, 0).decode(errors="replace")
        return EvaluationError(
            "\n".join([what, "The end of its log:", *(f"    {line}" for line in text.splitlines()[-_TAIL:])]),
            where=str(self._folder),
            fix="see the log; `make vllm-env` makes its environment anew, `evaluate.engine: embedded` does without",
        )


class _FailedStartError(Exception):
    """Why the server does not run."""


def _wait_until_it_answers(process: subprocess.Popen[bytes], url: str, model: str, listener: ProgressListener) -> None:
    """Until a known prompt is answered; the server says that it is healthy before that."""
    question = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    started = time.monotonic()
    with httpx.Client(trust_env=False, timeout=60.0) as client:
        while (elapsed := time.monotonic() - started) < _LONGEST_START:
            listener(Progress(min(elapsed, _USUAL_START), _USUAL_START, "seconds", "starting vLLM"))
            if process.poll() is not None:
                raise _FailedStartError(f"vLLM ended while it started (exit status {process.returncode}).")
            try:
                answer = client.post(f"{url}/chat/completions", json=question)
            except httpx.TransportError:  # not listening yet
                time.sleep(0.5)
                continue
            if answer.is_success:
                return
            raise _FailedStartError(f"vLLM started but does not answer (HTTP {answer.status_code}).")
    raise _FailedStartError(f"vLLM did not start within {_LONGEST_START:.0f} s.")
