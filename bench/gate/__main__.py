"""Run it all: `make bench-gate`, or `python -m bench.gate [calibrate] [power] [speed] [--scale 0.05]`."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy is imported, here and in what is started from here

HERE = Path(__file__).parent
PARTS = ("calibrate", "power", "speed")


def main() -> None:
    """Measure, write results.json, fill in the tables of README.md."""
    from bench.gate.environment import peers_python
    from bench.gate.tables import all_tables, fill

    parser = argparse.ArgumentParser(prog="python -m bench.gate", description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all if none is named")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the data sets; below 1 nothing is written")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    asked = parser.parse_args()
    parts = asked.parts or list(PARTS)
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    peers_python()
    results: dict[str, Any] = {}
    kept = HERE / "results.json"
    if kept.exists():
        results = json.loads(kept.read_text(encoding="utf-8"))
    seconds = results.get("seconds", {})
    for part in parts:
        start = time.perf_counter()
        results[part] = measure(part, asked.scale, asked.workers)
        seconds[part] = round(time.perf_counter() - start)
        print(f"{part}: {seconds[part]} s", file=sys.stderr)
        results |= {"machine": machine(), "seconds": seconds}
        if asked.scale >= 1:
            kept.write_text(written(results), encoding="utf-8")
    tables = all_tables(results)
    if asked.scale >= 1:
        fill(HERE / "README.md", tables)
        return
    for name, table in tables.items():
        print(f"\n## {name}\n\n{table}")


def measure(part: str, scale: float, workers: int) -> Any:
    """One part of the results."""
    if part == "calibrate":
        from bench.gate.calibrate import calibrate

        return calibrate(scale, workers)
    if part == "power":
        from bench.gate import power

        return {
            "scenarios": power.power(scale, workers),
            "ten_looks": power.ten_looks(scale, workers),
            "macro_f1": power.macro_f1_power(scale),
            "same_verdicts_with_10000_resamples": power.resamples_matter(scale, workers),
            "times": power.times(scale),
        }
    from bench.gate.speed import speed

    return speed()


def machine() -> dict[str, str]:
    """What it ran on, as far as a reader needs to know."""
    import numpy

    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    return {"processor": model, "python": platform.python_version(), "numpy": numpy.__version__}


def written(results: dict[str, Any]) -> str:
    """JSON with one row a line."""

    def rounded(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.5g}")
        if isinstance(value, dict):
            return {key: rounded(one) for key, one in value.items()}
        return [rounded(one) for one in value] if isinstance(value, list | tuple) else value

    text = json.dumps(rounded(results), ensure_ascii=False)
    return text.replace("}, {", "},\n{").replace(": [{", ": [\n{") + "\n"


if __name__ == "__main__":
    main()
