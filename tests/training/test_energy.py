"""Energy by counters: their sum, their turns, and the reason where there are none."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.training.energy import Counter, EnergyMeter, Meters, cpu_meters, find_meters, nvml_meters


def standing(*values: float | Exception) -> Callable[[], float]:
    """A counter that stands at each of these in turn, and then at the last."""
    left: Iterator[float | Exception] = iter(values)
    last = values[-1]

    def read() -> float:
        value = next(left, last)
        if isinstance(value, Exception):
            raise value
        return value

    return read


@pytest.mark.parametrize(
    ("counters", "joules", "missing"),
    [
        ([Counter(standing(100, 160))], 60.0, None),
        ([Counter(standing(100, 160)), Counter(standing(5, 15))], 70.0, None),
        ([Counter(standing(900, 950, 20, 60), wraps_at=1_000)], 160.0, None),
        ([Counter(standing(100, 90))], None, "a counter that only rises has fallen"),
        ([Counter(standing(OSError("gone")))], None, "a counter cannot be read: gone"),
        ([Counter(standing(100, OSError("gone")))], None, "a counter cannot be read any more: gone"),
    ],
)
def test_energy_is_what_counters_rose_by(counters: list[Counter], joules: float | None, missing: str | None) -> None:
    with EnergyMeter(Meters(tuple(counters), source="two toys"), sample_seconds=1_000) as meter:
        meter.sample()
        meter.sample()
    energy = meter.energy()
    assert (energy.joules, energy.missing) == (joules, missing)
    assert energy.source == (None if joules is None else "two toys")
    assert energy.seconds >= 0


def test_nothing_is_added_after_the_end() -> None:
    with EnergyMeter(Meters((Counter(standing(1, 2, 50)),), source="a toy")) as meter:
        pass
    assert [meter.energy().joules, meter.energy().joules] == [1.0, 1.0]


def test_turns_of_a_counter_are_watched_by_a_thread() -> None:
    """A counter that turns once for each look: looked at twice only, three of its turns would be missed."""
    stood = [0.0]
    looks = []

    def read() -> float:
        looks.append(stood[0])
        stood[0] = (stood[0] + 7) % 10
        return looks[-1]

    with EnergyMeter(Meters((Counter(read, wraps_at=10),), source="a toy"), sample_seconds=0.001) as meter:
        while len(looks) < 6:
            pass
    assert meter.energy().joules == 7.0 * (len(looks) - 1)


def test_without_a_meter_the_reason_is_kept() -> None:
    with EnergyMeter(Meters((), missing="no counter here")) as meter:
        meter.sample()
    assert (meter.energy().joules, meter.energy().missing) == (None, "no counter here")


def zone(folder: Path, name: str, says: str, energy: int, most: int = 262_143_328_850) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "name").write_text(says + "\n")
    (folder / name / "energy_uj").write_text(f"{energy}\n")
    (folder / name / "max_energy_range_uj").write_text(f"{most}\n")


def test_packages_are_counted_and_nothing_twice(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 1_500_000)
    zone(tmp_path, "intel-rapl:0:0", "dram", 9_000_000)
    zone(tmp_path, "intel-rapl:1", "package-1", 2_000_000, 65_000_000)
    zone(tmp_path, "intel-rapl:2", "psys", 9_000_000)
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 9_000_000)
    meters = cpu_meters(tmp_path)
    assert [counter.read() for counter in meters.counters] == [1.5, 2.0]
    assert [counter.wraps_at for counter in meters.counters] == [262_143.32885, 65.0]
    assert meters.source == "RAPL, 2 CPU package(s), other work on them included"


def test_no_rapl(tmp_path: Path) -> None:
    assert find_meters("cpu", tmp_path).missing == (
        "the system shows no RAPL counter of its CPU (a virtual machine shows none)"
    )


def test_rapl_for_root_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 1)

    def refuse(self: Path, *_: Any, **__: Any) -> str:
        if self.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return "package-0"

    monkeypatch.setattr(Path, "read_text", refuse)
    monkeypatch.setattr("tasks.training.energy._text", lambda path: "7" if "range" in path.name else refuse(path))
    assert cpu_meters(tmp_path).missing == "intel-rapl:0/energy_uj may be read by root alone"


class Nvml:
    """NVML as far as it is called: answers by its C interface's types."""

    def __init__(self, **statuses: int) -> None:
        self.statuses = statuses
        self.asked: list[bytes | None] = []
        self.millijoules = 0

    def nvmlInit_v2(self) -> int:
        return self.statuses.get("init", 0)

    def nvmlDeviceGetHandleByUUID(self, uuid: ctypes.c_char_p, handle: Any) -> int:
        self.asked.append(uuid.value)
        handle._obj.value = 77
        return self.statuses.get("handle", 0)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: ctypes.c_void_p, value: Any) -> int:
        assert handle.value == 77
        self.millijoules += 2_500
        value._obj.value = self.millijoules
        return self.statuses.get("energy", 0)


def test_the_energy_of_a_gpu() -> None:
    nvml: Any = Nvml()
    meters = nvml_meters(nvml, "GPU-12ab")
    assert nvml.asked == [b"GPU-12ab"]
    assert meters.missing is None
    with EnergyMeter(meters) as meter:
        pass
    assert meter.energy().joules == 2.5
    assert meter.energy().source == "NVML, the whole GPU, other work on it included"


@pytest.mark.parametrize(
    ("failing", "missing"),
    [
        ({"init": 9}, "nvmlInit_v2 answers with error 9"),
        ({"handle": 6}, "nvmlDeviceGetHandleByUUID answers with error 6"),
        ({"energy": 3}, "nvmlDeviceGetTotalEnergyConsumption answers with error 3"),
    ],
)
def test_a_gpu_that_does_not_count(failing: dict[str, int], missing: str) -> None:
    nvml: Any = Nvml(**failing)
    assert nvml_meters(nvml, "GPU-12ab") == Meters((), missing=missing)


def test_an_old_driver() -> None:
    old: Any = object()
    assert nvml_meters(old, "GPU-12ab").missing == "the driver has no nvmlInit_v2"
