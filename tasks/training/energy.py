"""Energy that a training took, from the counters of GPU (NVML) or CPU (RAPL); where there are none, why not."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from tasks.contracts.spec import Frozen

_POWERCAP = Path("/sys/class/powercap")
_SAMPLE_SECONDS = 30.0  # a package's counter runs over in about ten minutes at its fullest


class Energy(Frozen):
    """What a training took.

    Attributes:
        joules: None where nothing counts it.
        source: what was counted, in words; None likewise.
        missing: why there is no number; None where there is one.
        seconds: wall time that it was counted over: of the process, not of a training that others began.
    """

    joules: float | None
    source: str | None
    missing: str | None
    seconds: float


class Counter(NamedTuple):
    """A counter of joules that only rises.

    Attributes:
        read: what it stands at, in joules; raises OSError where it cannot be read any more.
        wraps_at: where it starts again at 0; None if never.
    """

    read: Callable[[], float]
    wraps_at: float | None = None


class Meters(NamedTuple):
    """Counters whose sum is the energy of a device; none, with the reason, where there are none."""

    counters: tuple[Counter, ...]
    source: str | None = None
    missing: str | None = None


def find_meters(device: str, powercap: Path = _POWERCAP) -> Meters:
    """The counters of the device that this process trains on: one GPU, or all CPU packages of the machine."""
    return _gpu_meters() if device != "cpu" else cpu_meters(powercap)


def cpu_meters(powercap: Path) -> Meters:
    """RAPL's package counters (Intel, and AMD by the same driver).

    Parts of a package (core, uncore, dram) are in its own counter or not the CPU's, and `psys` counts the packages
    again; neither is added.
    """
    counters = []
    for zone in sorted(powercap.glob("intel-rapl:*")):
        try:
            if ":" in zone.name.removeprefix("intel-rapl:") or not _text(zone / "name").startswith("package"):
                continue
            counter = Counter(_microjoules(zone / "energy_uj"), int(_text(zone / "max_energy_range_uj")) / 1e6)
            counter.read()
        except PermissionError:
            return Meters((), missing=f"{zone.name}/energy_uj may be read by root alone")
        except (OSError, ValueError):
            continue
        counters.append(counter)
    if not counters:
        return Meters((), missing="the system shows no RAPL counter of its CPU (a virtual machine shows none)")
    return Meters(tuple(counters), source=f"RAPL, {len(counters)} CPU package(s), other work on them included")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip()


def _microjoules(path: Path) -> Callable[[], float]:
    return lambda: int(_text(path)) / 1e6


def _gpu_meters() -> Meters:
    import torch

    uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None)
    try:
        return nvml_meters(ctypes.CDLL("libnvidia-ml.so.1"), f"GPU-{uuid}")
    except OSError as error:
        return Meters((), missing=f"NVML cannot be loaded ({error})")


def nvml_meters(nvml: ctypes.CDLL, uuid: str) -> Meters:
    """NVML's count of all energy of one GPU since its driver was loaded, in millijoules (Volta and later).

    Args:
        nvml: the library.
        uuid: of the GPU, as the driver writes it ("GPU-…"), which holds whatever CUDA_VISIBLE_DEVICES is.
    """
    handle, value = ctypes.c_void_p(), ctypes.c_ulonglong()
    calls: Sequence[tuple[str, Callable[[], int]]] = (
        ("nvmlInit_v2", lambda: nvml.nvmlInit_v2()),
        (
            "nvmlDeviceGetHandleByUUID",
            lambda: nvml.nvmlDeviceGetHandleByUUID(ctypes.c_char_p(uuid.encode()), ctypes.byref(handle)),
        ),
        (
            "nvmlDeviceGetTotalEnergyConsumption",
            lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(value)),
        ),
    )
    for name, call in calls:
        try:
            status = call()
        except AttributeError:  # an old driver
            return Meters((), missing=f"the driver has no {name}")
        if status != 0:
            return Meters((), missing=f"{name} answers with error {status}")
    ask = calls[-1][1]

    def read() -> float:
        if (status := ask()) != 0:
            raise OSError(f"nvmlDeviceGetTotalEnergyConsumption answers with error {status}")
        return value.value / 1e3

    return Meters((Counter(read),), source="NVML, the whole GPU, other work on it included")


class EnergyMeter:
    """Counts the energy between entering and leaving, or until it is asked.

        with EnergyMeter(find_meters(device)) as meter:
            ...
        meter.energy()

    A thread of its own looks at counters that run over, so that no turn of theirs is missed. A counter that fails on
    the way ends the count: the energy is then missing, with the reason.
    """

    def __init__(self, meters: Meters, sample_seconds: float = _SAMPLE_SECONDS) -> None:
        self._meters = meters
        self._sample_seconds = sample_seconds
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._missing = meters.missing
        self._joules = 0.0
        self._last: list[float] = []
        self._started = 0.0
        self._seconds: float | None = None

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        try:
            self._last = [counter.read() for counter in self._meters.counters]
        except (OSError, ValueError) as error:
            self._missing = f"a counter cannot be read: {error}"
        if self._missing is None and any(counter.wraps_at is not None for counter in self._meters.counters):
            self._thread = threading.Thread(target=self._keep_sampling, name="energy", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        self.sample()
        self._seconds = time.monotonic() - self._started

    def sample(self) -> None:
        """Add what was used since the last look."""
        with self._lock:
            if self._missing is not None or self._seconds is not None:
                return
            try:
                now = [counter.read() for counter in self._meters.counters]
            except (OSError, ValueError) as error:
                self._missing = f"a counter cannot be read any more: {error}"
                return
            for counter, before, after in zip(self._meters.counters, self._last, now, strict=True):
                used = after - before
                if used < 0:
                    if counter.wraps_at is None:
                        self._missing = "a counter that only rises has fallen"
                        return
                    used += counter.wraps_at
                self._joules += used
            self._last = now

    def energy(self) -> Energy:
        """What was used up to now, or up to leaving."""
        self.sample()
        seconds = time.monotonic() - self._started if self._seconds is None else self._seconds
        if self._missing is not None:
            return Energy(joules=None, source=None, missing=self._missing, seconds=round(seconds, 1))
        return Energy(
            joules=round(self._joules, 1), source=self._meters.source, missing=None, seconds=round(seconds, 1)
        )

    def _keep_sampling(self) -> None:
        while not self._ended.wait(self._sample_seconds):
            self.sample()
