"""How vLLM is started to serve one merged model, and how an adapter is loaded into one that runs.

Nothing here imports vLLM: it has an environment of its own.
"""

from __future__ import annotations

import json
from pathlib import Path

import httpx

from tasks.contracts.errors import ModelError, ServiceError, SpecError
from tasks.contracts.serving import EngineSpec, VersionRef
from tasks.vllm import vllm_device, vllm_environment, vllm_variables

MAX_LORA_RANK = 64  # of an adapter; vLLM keeps room for it in each layer
_UNLOAD_SECONDS = 10.0
_OWNED = (
    "--host", "--port", "--served-model-name", "--api-key", "--uds", "--root-path", "--ssl-keyfile", "--middleware",
    "--trust-remote-code", "--enable-lora", "--lora-modules", "--allowed-local-media-path", "--generation-config",
    "--logprobs-mode", "--shutdown-timeout", "--dtype", "--max-model-len", "--enforce-eager", "--model", "--tokenizer",
    "--load-format", "--config", "--enable-log-requests",
)  # fmt: skip


class VllmCommand:
    """Starts vLLM from its own environment. See `EngineCommand`."""

    def __init__(self, environment: Path | None = None, *, kv_gib: int = 1) -> None:
        """Find vLLM.

        Args:
            environment: its environment; None finds it, see `tasks.vllm.vllm_environment`.
            kv_gib: memory of each engine for its KV cache on a CPU. During a rollout three may run.

        Raises:
            ServiceError: it is not there, or half made.
        """
        self._environment = environment or vllm_environment()
        self._device = vllm_device(self._environment)
        self._kv_gib = kv_gib

    def command(self, model: Path, label: str, port: int, spec: EngineSpec) -> list[str]:
        """See `EngineCommand.command`; the key is in the environment, where other users cannot read it.

        Raises:
            SpecError: a further argument is one that is set here.
            ServiceError: adapters are asked for, and vLLM is its CPU build.
            ModelError: the model has no config.json that can be read.
        """
        for argument in spec.arguments:
            name = argument.partition("=")[0].replace("_", "-")
            if any(name.startswith("--") and len(name) > 2 and owned.startswith(name) for owned in _OWNED):
                raise SpecError(
                    f"The argument {argument!r} is not free: Goldgate sets it, or keeps vLLM behind its gateway by it.",
                    where="engine.arguments",
                    fix="leave it out; number format, context and compiling have settings of their own in `engine`",
                )
        try:
            config = json.loads((model / "config.json").read_text(encoding="utf-8"))
            longest = int(config.get("max_position_embeddings", spec.max_model_len))
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise ModelError(
                f"The model's config.json cannot be read: {error}",
                where=str(model),
                fix="register the model anew",
            ) from error
        return [
            str(self._environment / "bin" / "vllm"), "serve", str(model),
            "--host", "127.0.0.1", "--port", str(port),
            "--served-model-name", label,
            "--dtype", self._dtype(spec),
            "--max-model-len", str(min(spec.max_model_len, longest)),
            "--generation-config", "vllm",  # no sampling defaults from the model's files
            "--logprobs-mode", "processed_logprobs",  # of what was drawn, after the constraint to choices
            "--shutdown-timeout", "20",  # without it, ending waits minutes for requests under way
            "--disable-uvicorn-access-log",  # the gateway counts requests, and the log would grow with each
            *(["--enforce-eager"] if spec.eager else []),
            *(self._with_adapters() if spec.adapters else []),
            *spec.arguments,
        ]  # fmt: skip

    def environment(self, key: str) -> dict[str, str]:
        """See `EngineCommand.environment`."""
        runtime_lora = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"} if self._device == "cuda" else {}
        return vllm_variables(self._environment, self._kv_gib) | runtime_lora | {"VLLM_API_KEY": key}

    def _dtype(self, spec: EngineSpec) -> str:
        if spec.dtype != "auto":
            return spec.dtype
        return "bfloat16" if self._device == "cuda" else "float32"  # in which a CPU answers as it was evaluated

    def check_adapters(self) -> None:
        """See `EngineCommand.check_adapters`.

        Raises:
            ServiceError: this vLLM is its CPU build.
        """
        if self._device != "cuda":
            raise ServiceError(
                "Adapters are not loaded into vLLM's CPU build: there, requests to the base model get an adapter's "
                "weights, and an adapter with NaN weights spoils the answers of all.",
                where="engine.adapters",
                fix="set `engine.adapters` to false; the merged model is served",
            )

    def _with_adapters(self) -> list[str]:
        self.check_adapters()
        return ["--enable-lora", "--max-lora-rank", str(MAX_LORA_RANK), "--max-cpu-loras", "8"]


def adapter_name(version: VersionRef) -> str:
    """The name that a version's adapter has in an engine; other bytes never get the same one."""
    return f"{version.label}-{version.digest[:8]}"


def load_adapter(client: httpx.Client, url: str, key: str, version: VersionRef, folder: Path) -> str:
    """Load an adapter under a name of its own into a vLLM that was started with `adapters`; returns the name.

    vLLM checks neither base nor numbers: see `weights.check_adapter`, before. The name is never used twice, and an
    adapter never loaded over another (`load_inplace` mixes both within one answer).

    Args:
        client: for loopback.
        url: of the engine, ending in `/v1`.
        key: its key.
        version: whose adapter it is.
        folder: unchangeable; one that goes away ends the engine at its next load.

    Raises:
        ServiceError: vLLM refuses it or does not answer.
    """
    name = adapter_name(version)
    try:
        reply = client.post(
            f"{url}/load_lora_adapter",
            json={"lora_name": name, "lora_path": str(folder)},
            headers={"Authorization": f"Bearer {key}"},
            timeout=120.0,
        )
        refused = None if reply.is_success or "already been loaded" in reply.text else reply.text[:300]
    except httpx.TransportError as error:
        refused = repr(error)
    if refused is not None:
        raise ServiceError(
            f"vLLM did not load the adapter of {version.label}: {refused}",
            where=url,
            fix="serve the merged model (`engine.adapters: false`), or see the engine's log",
        )
    return name


def unload_adapter(client: httpx.Client, url: str, key: str, name: str) -> bool:
    """Take an adapter out of a vLLM; whether it is gone. One that is not there, or whose engine is not, is gone.

    Requests under way with it are answered to their end.

    Args:
        client: for loopback.
        url: of the engine, ending in `/v1`.
        key: its key.
        name: see `adapter_name`.
    """
    try:
        reply = client.post(
            f"{url}/unload_lora_adapter",
            json={"lora_name": name},
            headers={"Authorization": f"Bearer {key}"},
            timeout=_UNLOAD_SECONDS,
        )
    except httpx.ConnectError:
        return True
    except httpx.TransportError:
        return False
    return reply.is_success or reply.status_code == httpx.codes.NOT_FOUND
