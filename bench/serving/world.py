"""What is measured: a registry with two versions of a real model, a gateway that serves one of them, and vLLM itself.

The versions are SmolLM2-135M-Instruct and the same with its last norm scaled by 1.01: as fast as each other, and told
apart by their digests. They are registered as baselines, on a person's word, since what is measured is serving; how a
verdict lets a version in is measured elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import psutil

from goldgate.config import load_spec
from tasks.contracts.serving import EngineSpec, EngineState, EngineStatus, GatewaySpec, VersionRef
from tasks.contracts.spec import ExecutionSpec, RetrainSpec
from tasks.serving.client import GatewayClient, gateway_of
from tasks.serving.host import end_engines

ROOT = Path(__file__).parents[2]
NAME = "complaints"
ENGINE = EngineSpec(max_model_len=1024, dtype="bfloat16", eager=False, start_seconds=900.0)
_START_SECONDS = 60.0


class Direct(NamedTuple):
    """An engine without the gateway: its address, which ends in /v1, and its key."""

    url: str
    key: str


class World(NamedTuple):
    """All that is running."""

    spec: RetrainSpec
    gateway: GatewayClient
    url: str
    process: psutil.Process
    versions: tuple[VersionRef, VersionRef]

    @property
    def api(self) -> str:
        """The gateway's address for clients."""
        return f"{self.url}/v1"

    def direct(self, version: VersionRef) -> Direct:
        """Address and key of an engine, read from the gateway's folder as nobody but a benchmark should."""
        folder = Path(self.spec.execution.store) / "serving" / "engines"
        record = json.loads((folder / f"{version.engine}.json").read_text(encoding="utf-8"))
        return Direct(
            f"http://127.0.0.1:{record['port']}/v1", (folder / f"{version.engine}.key").read_text(encoding="utf-8")
        )


def example_spec(work: Path) -> RetrainSpec:
    """The example `complaints`, with a store of its own."""
    spec = load_spec(ROOT / "examples" / NAME / f"{NAME}.yaml", [f"execution.store={work / 'store'}"])
    return spec.model_copy(update={"execution": ExecutionSpec(store=str(work / "store"))})


def two_versions(spec: RetrainSpec, work: Path) -> tuple[VersionRef, VersionRef]:
    """Versions 1 and 2 in the registry; made once."""
    import torch
    from safetensors.torch import load_file, save_file

    from tasks.contracts.progress import ignore_progress
    from tasks.contracts.prompt import tuned_prompt
    from tasks.contracts.references import SystemUnderTest
    from tasks.contracts.spec import Override
    from tasks.registry.baseline import set_baseline
    from tasks.registry.serving_aliases import resolve_version
    from tasks.store import digest_folder
    from tasks.training.base_model import convert, resolve

    first, second = work / "first", work / "second"
    if not first.exists():
        part = work / "first.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        convert(resolve(spec.base_model), part, ignore_progress)
        (part / "model").rename(first)
    if not second.exists():
        part = work / "second.part"
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(first, part)
        for shard in part.glob("*.safetensors"):
            tensors = load_file(shard)
            if "model.norm.weight" in tensors:
                tensors["model.norm.weight"] = (tensors["model.norm.weight"].float() * 1.01).to(torch.bfloat16)
            save_file(tensors, shard, metadata={"format": "pt"})
        part.rename(second)
    made = []
    for number, folder in enumerate((first, second), start=1):
        reason = f"version {number} of the serving benchmark"
        system = SystemUnderTest(
            uri=str(folder), digest=digest_folder(folder), prompt=tuned_prompt(spec.task), role="other",
            label=f"v{number}",
        )  # fmt: skip
        set_baseline(spec.evaluation(), system, Override(by="bench", reason=reason))
        made.append(resolve_version(spec.name, str(number), spec.execution))
    return made[0], made[1]


@contextmanager
def running(work: Path) -> Iterator[World]:
    """A gateway on a free port; it and all engines are ended at the end."""
    work.mkdir(parents=True, exist_ok=True)
    spec = example_spec(work)
    versions = two_versions(spec, work)
    config = work / "gateway.json"
    config.write_text(
        GatewaySpec(port=0, execution=spec.execution).model_dump_json(
            exclude_none=True, exclude={"execution": {"ledger"}}
        ),
        encoding="utf-8",
    )
    serving = Path(spec.execution.store) / "serving"
    if serving.exists():  # an engine of an earlier run would be started again, with the settings of then
        end_engines(serving)
        shutil.rmtree(serving)
    address = serving / "gateway.json"
    with (work / "gateway.log").open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "goldgate", "serve", str(config)],
            cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not address.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the gateway did not start; see {work / 'gateway.log'}")
            time.sleep(0.1)
        with gateway_of(spec.execution) as client:
            url = json.loads(address.read_text(encoding="utf-8"))["url"]
            try:
                yield World(spec, client, url, psutil.Process(process.pid), versions)
            finally:
                end_all(client, versions)
    finally:
        process.terminate()
        process.wait(60)


def end_all(client: GatewayClient, versions: tuple[VersionRef, VersionRef]) -> None:
    """End the engines, whatever traffic says: the folder is the benchmark's own."""
    for version in versions:
        status = client.engine(version.engine)
        if status is not None:
            for process in psutil.process_iter(["cmdline"]):
                if version.label in (process.info["cmdline"] or []):
                    for one in [*process.children(recursive=True), process]:
                        with suppress(psutil.NoSuchProcess):
                            one.kill()


def start(client: GatewayClient, version: VersionRef, spec: EngineSpec = ENGINE) -> tuple[EngineStatus, float]:
    """Start an engine and wait for its first answer; its status and the seconds that it took."""
    began = time.perf_counter()
    status = client.start_engine(version, spec)
    while status.state is EngineState.STARTING:
        time.sleep(0.2)
        found = client.engine(version.engine)
        if found is None:
            raise SystemExit(f"{version.engine} is gone")
        status = found
    if status.state is not EngineState.READY:
        raise SystemExit(f"{version.engine} is {status.state}: {status.why}")
    return status, time.perf_counter() - began


def questions(spec: RetrainSpec, count: int = 400) -> list[str]:
    """Texts of the example's golden set, in an order by hash."""
    lines = (Path(spec.golden.path) / "items.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["messages"][-1]["content"] for line in lines]
    return sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())[:count]
