"""vLLM's own environment: where it is, what it was made for, and the variables that its server runs with.

Evaluation and serving start the same vLLM. Nothing imports it: its pins do not fit beside those of Goldgate.
"""

from __future__ import annotations

import os
from importlib.metadata import distributions
from pathlib import Path

from tasks.contracts.errors import GoldgateError, ServiceError

ENVIRONMENT = "GOLDGATE_VLLM_ENV"
_MADE = "goldgate-vllm.txt"  # docker/vllm/make_env.sh writes it last


def vllm_environment(error: type[GoldgateError] = ServiceError, otherwise: str | None = None) -> Path:
    """Find vLLM's environment: the folder named by GOLDGATE_VLLM_ENV, else `.vllm-env` in the root of the project.

    Args:
        error: kind of the refusal.
        otherwise: how the caller can do without vLLM, if it can.

    Raises:
        GoldgateError: of the kind `error`: it is not there or half made.
    """
    named = os.environ.get(ENVIRONMENT)
    folder = Path(named) if named else Path(__file__).parents[1] / ".vllm-env"
    if not (folder / _MADE).is_file() or not (folder / "bin" / "vllm").is_file():
        ways = ["make it with `make vllm-env`", f"name another one in the environment's {ENVIRONMENT}"]
        ways += [] if otherwise is None else [otherwise]
        raise error(
            "vLLM's environment is not there, or its making was interrupted.",
            where=str(folder),
            fix=f"{', '.join(ways[:-1])}, or {ways[-1]}",
        )
    return folder


def vllm_device(environment: Path) -> str:
    """The device that an environment was made for: "cpu" or "cuda".

    Raises:
        ServiceError: the environment does not say so.
    """
    made = environment / _MADE
    for line in made.read_text(encoding="utf-8").splitlines():
        word, _, device = line.partition(" ")
        if word == "device" and device in ("cpu", "cuda"):
            return device
    raise ServiceError(
        "vLLM's environment does not say which device it was made for.",
        where=str(made),
        fix="make it anew with `make vllm-env`",
    )


def vllm_variables(environment: Path, kv_gib: int = 1) -> dict[str, str]:
    """The environment variables of a server: offline, silent, on the cores that this process may use.

    Args:
        environment: see `vllm_environment`.
        kv_gib: memory for the KV cache on a CPU; on CUDA vLLM takes a share of the device's memory instead.
    """
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0)))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "PYTHON", "OMP_"))}
    return kept | {
        "VIRTUAL_ENV": str(environment),
        "PATH": f"{environment / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "VLLM_CPU_KVCACHE_SPACE": str(kv_gib),
        "VLLM_CPU_OMP_THREADS_BIND": cores,  # else it uses one core
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
    }


def vllm_version(environment: Path) -> str:
    """Version of the vLLM in an environment, read from its packages without starting it."""
    packages = [str(folder) for folder in environment.glob("lib/python*/site-packages")]
    found = {entry.name: entry.version for entry in distributions(name="vllm", path=packages)}
    return found["vllm"].split("+")[0]
