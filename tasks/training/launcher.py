"""The command that starts a training: on one device, on several, or on several hosts. Light: imports no torch.

What it reads from the environment:

- `GOLDGATE_PROCESSES`: processes on this host; one for each CUDA device, or one on a CPU, where it is not set.
- `GOLDGATE_ACCELERATE_CONFIG`: what `accelerate launch` starts several processes with; a relative path is one in the
  project. `deployments/accelerate/ddp.yaml` where it is not set.
- `GOLDGATE_NODES`: hosts that train together, each with as many processes; 1 where it is not set.
- `GOLDGATE_NODE`: which of them this is, from 0; 0 where it is not set.
- `GOLDGATE_RENDEZVOUS`: `host:port` of host 0, where all can reach it; needed with more than one host.

**Several hosts.** Host 0 is the one whose worker has the training's Prefect run, with `GOLDGATE_NODES` and
`GOLDGATE_RENDEZVOUS` set there. It writes the spec file and waits; the run's log says where. On every other host, with
the same version of Goldgate, a person starts

    GOLDGATE_NODES=2 GOLDGATE_NODE=1 GOLDGATE_RENDEZVOUS=host-a:29500 python -m tasks.training.launcher SPEC.json

in either order. A shared store is the simplest. Without one, SPEC.json, the base model and the training and dev rows
are copied there; paths in a copied SPEC.json are that host's own. Training starts only if all hosts read the same bytes
by the same versions of the libraries. Host 0 alone writes results, the MLflow run and checkpoints; when a training goes
on, the checkpoint is sent to hosts that do not see it. FSDP wants one `scratch` folder that all hosts share.

A host has to know itself by an address that the others reach; where its name stands for another (127.0.1.1 in
/etc/hosts, a second network), `GLOO_SOCKET_IFNAME` and `NCCL_SOCKET_IFNAME` name the network interface.

The rendezvous is torchrun's static one, in which each host says its number. `c10d` would number hosts by sorting their
names, so the host that waits for the result might not be the one that writes it.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import yaml

from tasks.contracts.errors import TrainingError
from tasks.training.job import TrainJob
from tasks.training.tether import TETHERED

PROCESSES = "GOLDGATE_PROCESSES"
CONFIG = "GOLDGATE_ACCELERATE_CONFIG"
NODES = "GOLDGATE_NODES"
NODE = "GOLDGATE_NODE"
RENDEZVOUS = "GOLDGATE_RENDEZVOUS"
SPEC = "spec.json"

_PROJECT = Path(__file__).resolve().parents[2]
_DDP = _PROJECT / "deployments" / "accelerate" / "ddp.yaml"
_DRIVER = Path("/proc/driver/nvidia/gpus")
_TAIL_LINES = 12
_CLOSING_SECONDS = 20.0  # torchrun gives the others 30 s to end before it kills them
_TOLD_TO_STOP = (-signal.SIGTERM, 128 + signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGINT)
_WARNING = re.compile(r"\[[WI]\d{4} ")
_BLOCK = re.compile(r"time\s*: (\S+)\s+host\s*: (\S+)\s+rank\s*: (\d+) .*\s+exitcode\s*: (-?\d+)")


class Devices(NamedTuple):
    """How many processes train together, and where.

    Attributes:
        processes: on each host, one for each of its devices.
        cuda: whether the devices are CUDA devices.
        nodes: hosts.
        node: which of them this one is, from 0.
        rendezvous: `(host, port)` of host 0; None with one host.
    """

    processes: int
    cuda: bool
    nodes: int = 1
    node: int = 0
    rendezvous: tuple[str, int] | None = None


class Failure(NamedTuple):
    """How one of several processes ended, as the launcher of its host says.

    Attributes:
        time: when the launcher saw it.
        host: where it ran.
        rank: its number among all processes.
        code: exit code; the negative number of the signal that ended it.
    """

    time: datetime
    host: str
    rank: int
    code: int


def command(job: TrainJob, parent_pid: int, environment: Mapping[str, str]) -> list[str]:
    """The command line that runs a job whose spec file is `job.scratch / "spec.json"`.

    One process is plain Python; several are started by `accelerate launch` with a configuration file, which makes it
    DDP or FSDP. All of them end with the process `parent_pid`.

    Args:
        job: what is to be trained.
        parent_pid: the process that starts this command.
        environment: what to read the variables of the table above from, and CUDA_VISIBLE_DEVICES.

    Raises:
        TrainingError: a variable makes no sense, there are fewer devices than processes, or the configuration file is
            missing, or asks for FSDP on a CPU.
    """
    return _command(job.scratch / SPEC, parent_pid, environment)


def _command(spec: Path, parent_pid: int, environment: Mapping[str, str]) -> list[str]:
    devices = find_devices(environment)
    python = [sys.executable, "-m", "tasks.training.tether", str(parent_pid)]
    worker = ["-m", "tasks.training.worker", str(spec)]
    if devices.processes * devices.nodes == 1:
        return [*python, *worker]
    return [*python, "-m", "accelerate.commands.launch", *_options(devices, environment), *worker]


def find_devices(environment: Mapping[str, str]) -> Devices:
    """What an environment says about devices and hosts, without importing torch.

    Raises:
        TrainingError: a variable makes no sense, or there are fewer devices than processes.
    """
    cuda = _cuda_devices(environment)
    processes = _number(environment, PROCESSES, max(1, cuda), least=1)
    if cuda and processes > cuda:
        raise TrainingError(
            f"{processes} processes cannot train on {cuda} CUDA devices: each needs one of its own.",
            where=PROCESSES,
            fix=f"set {PROCESSES} to {cuda} or less, or leave it out",
        )
    nodes = _number(environment, NODES, 1, least=1)
    node = _number(environment, NODE, 0, least=0)
    if node >= nodes:
        raise TrainingError(
            f"This is host {node} of {nodes}, and hosts are counted from 0.",
            where=NODE,
            fix=f"set {NODES} to the number of hosts, and {NODE} to 0, 1, … on each",
        )
    return Devices(processes, cuda > 0, nodes, node, _rendezvous(environment) if nodes > 1 else None)


def lost_process(log: Path) -> TrainingError | None:
    """Why several processes ended, where one of them was killed: read from the launcher's log.

    When one process vanishes, the launcher ends the others and itself with exit code 1, so that code does not tell; and
    the others may be told to stop before they notice, and say no more than that.

    Returns:
        The error; None when the log tells of no process that was killed first.
    """
    failures = sorted(_failures(log), key=lambda one: one.time)
    killed = (one for one in failures if one.code == -signal.SIGKILL)
    # Processes that do not end when they are told to are killed too, half a minute later: those are no cause.
    cause = next((one for one in killed if (one.time - failures[0].time).total_seconds() < _CLOSING_SECONDS), None)
    if cause is None:
        return None
    return TrainingError(
        f"Training process {cause.rank} on {cause.host} was killed (SIGKILL), most likely because the machine ran out "
        "of memory; the others were ended.",
        where=str(log),
        fix="free memory there, or lower `train.batch_size`; the next run goes on from the last checkpoint",
    )


def failed_process(log: Path) -> TrainingError | None:
    """Which of several processes failed first, and its last words: read from the launcher's log.

    Of interest where no process said why: the others are told to stop then, and say just that.

    Returns:
        The error; None when the log tells of no process that failed of its own accord.
    """
    failures = [one for one in _failures(log) if one.code not in _TOLD_TO_STOP]
    if not failures:
        return None
    first = min(failures, key=lambda one: one.time)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line.removeprefix(f"[rank{first.rank}]:") for line in lines if line.startswith(f"[rank{first.rank}]:")]
    own = [line.rstrip() for line in said if not _WARNING.match(line)]  # torch's own warnings are tagged like errors
    words = "".join(f"\n    {line}" for line in own[-_TAIL_LINES:])
    return TrainingError(
        f"Training process {first.rank} on {first.host} ended with exit code {first.code}, and the others were ended."
        + (f" Its last words:{words}" if words else ""),
        where=str(log),
        fix="read the log; the next run goes on from the last checkpoint",
    )


def _failures(log: Path) -> list[Failure]:
    """What torchrun's report says, in the log of a launcher: a block of lines for each process that failed.

    The report ends with what torchrun takes for the cause, which comes first here.
    """
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return [
        Failure(datetime.strptime(time, "%Y-%m-%d_%H:%M:%S"), host, int(rank), int(code))
        for time, host, rank, code in reversed(_BLOCK.findall(text))
    ]


def _options(devices: Devices, environment: Mapping[str, str]) -> list[str]:
    options = [
        "--config_file", str(_config(devices, environment)),
        "--num_processes", str(devices.processes * devices.nodes),
        "--num_machines", str(devices.nodes),
        "--machine_rank", str(devices.node),
        "--dynamo_backend", "no",
    ]  # fmt: skip
    if not devices.cuda and "OMP_NUM_THREADS" not in environment:  # accelerate would give each process one core
        options += ["--num_cpu_threads_per_process", str(max(1, (os.cpu_count() or 1) // devices.processes))]
    if devices.rendezvous is not None:
        host, port = devices.rendezvous
        options += ["--main_process_ip", host, "--main_process_port", str(port), "--rdzv_backend", "static"]
    return options


def _config(devices: Devices, environment: Mapping[str, str]) -> Path:
    """An absolute path, since a Prefect run starts in a folder of its own."""
    chosen = environment.get(CONFIG, "")
    path = _PROJECT / Path(chosen).expanduser() if chosen else _DDP
    if not path.is_file():
        raise TrainingError(
            "The configuration for several devices is missing: there is no such file.",
            where=str(path),
            fix=f"set {CONFIG} to a file that `accelerate launch --config_file` takes, such as "
            "deployments/accelerate/fsdp.yaml",
        )
    if not devices.cuda and yaml.safe_load(path.read_text(encoding="utf-8")).get("distributed_type") == "FSDP":
        raise TrainingError(
            "FSDP is for CUDA devices: on a CPU, accelerate takes DDP in its place without a word.",
            where=str(path),
            fix=f"leave {CONFIG} out, or train where there are CUDA devices",
        )
    return path


def _rendezvous(environment: Mapping[str, str]) -> tuple[str, int]:
    text = environment.get(RENDEZVOUS, "")
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise TrainingError(
            f"Several hosts need a place to meet, and {text!r} is none.",
            where=RENDEZVOUS,
            fix="set it to host:port of host 0 on each of them, such as host-a:29500",
        )
    return host.strip("[]"), int(port)


def _number(environment: Mapping[str, str], name: str, default: int, *, least: int) -> int:
    text = environment.get(name, "").strip() or str(default)
    if not text.isdecimal() or int(text) < least:
        raise TrainingError(
            f"{text!r} is no number of {least} or more.",
            where=name,
            fix=f"set {name} to such a number, or leave it out",
        )
    return int(text)


def _cuda_devices(environment: Mapping[str, str]) -> int:
    """How many CUDA devices training may use, found without importing torch."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    return len(list(_DRIVER.iterdir())) if _DRIVER.is_dir() else 0


def worker_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What the training processes are given: the launcher's own environment, watched and offline."""
    return {
        # How long a thread that has no work spins before it sleeps; libgomp's default is 300,000 turns. On two cores
        # of which something else takes one, training makes 83 tokens/s with the default, 120 with this, 204 with 300
        # turns; on two idle cores 410, 387, and less than 310.
        "GOMP_SPINCOUNT": "3000",
        **environment,
        TETHERED: "1",
        "HF_HUB_OFFLINE": "1",  # everything is in the job's folders; nothing may be fetched behind its back
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }


def main(spec: Path) -> int:
    """Take part in the training of a spec file, as host `GOLDGATE_NODE`; the launcher's exit code."""
    try:
        arguments = _command(spec.absolute(), os.getpid(), os.environ)
    except TrainingError as error:
        print(error, file=sys.stderr)
        return 2
    return subprocess.run(arguments, env=worker_environment(os.environ), check=False).returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
