"""The tables of README.md, from results.json."""

from __future__ import annotations

from typing import Any

from bench.gate.tables import table

NOT_YET = "Not measured yet."


def all_tables(results: dict[str, Any]) -> dict[str, str]:
    """Every table by name; one that was not measured says so."""
    made = {"overhead": _overhead, "swap": _swap, "starts": _starts, "soak": _soak, "harness": _harness}
    tables = {name: make(results[name]) if name in results else NOT_YET for name, make in made.items()}
    about = results.get("machine")
    tables["machine"] = ", ".join(f"{name} {value}" for name, value in about.items()) + "." if about else NOT_YET
    return tables


def _overhead(rows: list[dict[str, Any]]) -> str:
    alone = {row["clients"]: row for row in rows if row["way"] == "vLLM alone"}
    lines = []
    for row in rows:
        against = alone[row["clients"]]
        lines.append([
            str(row["clients"]), row["way"], f"{row['requests']:,}", f"{row['failed']:.0f}",
            f"{row['per_second']:.1f}", f"{row['per_second'] / against['per_second']:.3f}",
            f"{row['p50_ms']:,.1f}", f"{row['p50_ms'] - against['p50_ms']:+,.1f}",
            f"{row['p99_ms']:,.1f}", f"{row['p99_ms'] - against['p99_ms']:+,.1f}",
        ])  # fmt: skip
    return table(
        ["clients", "way", "requests", "failed", "requests/s", "× vLLM alone", "p50, ms", "added", "p99, ms", "added"],
        lines,
    )


def _swap(found: dict[str, Any]) -> str:
    lines = [
        [what, f"{found[what]['call_seconds']:.3f}", f"{found[what]['last_old_answer_seconds']:.2f}",
         str(found[what]["old_version_chosen_afterwards"])]
        for what in ("swap", "rollback")
    ]  # fmt: skip
    versions = ", ".join(f"{count:,} by {version}" for version, count in found["by_version"].items())
    said = (
        f"{found['requests']:,} requests of {found['clients']} clients, {versions}: {found['failed']} failed, "
        f"{found['mixed']} with more than one version in the answer."
    )
    head = [
        "change", "seconds until new requests go to the other version", "until the last old answer has ended",
        "requests that went to the old version afterwards",
    ]  # fmt: skip
    return f"{said}\n\n{table(head, lines)}"


def _starts(rows: list[dict[str, Any]]) -> str:
    return table(
        ["start", "seconds to the first answer", "memory, MB"],
        [[row["start"], f"{row['seconds']:,.2f}", f"{row['memory_mb']:,.0f}" if "memory_mb" in row else ""]
         for row in rows],
    )  # fmt: skip


def _harness(found: dict[str, Any]) -> str:
    ours = found["rows"][0]
    lines = [
        [row["way"], f"{row['per_second']:.1f}", f"{row['per_second'] / ours['per_second']:.3f}",
         f"{row['per_second_whole']:.1f}", f"{row['score']:.3f}"]
        for row in found["rows"]
    ]  # fmt: skip
    itself = found["agreement_with_itself"]
    again = "" if itself is None else f"; Goldgate's own first and last turn agree on {itself:.1%}"
    said = (
        f"{found['items']:,} items, {found['clients']} requests at a time, lm-evaluation-harness {found['version']}: "
        f"both give the same answer to {found['agreement']:.1%} of the items{again}."
    )
    head = ["evaluation", "items/s, requests alone", "× Goldgate", "items/s, rows to score", "exact match"]
    return f"{said}\n\n{table(head, lines)}"


def _soak(found: dict[str, Any]) -> str:
    early, late = found["gateway_mb"]
    engine_early, engine_late = found["engine_mb"]
    return table(
        ["seconds", "clients", "requests", "failed", "requests/s", "p50, ms", "p99, ms",
         "gateway, MB, first and second half", "vLLM, MB, first and second half"],
        [[f"{found['seconds']:,.0f}", str(found["clients"]), f"{found['requests']:,}", f"{found['failed']:.0f}",
          f"{found['per_second']:.1f}", f"{found['p50_ms']:,.1f}", f"{found['p99_ms']:,.1f}",
          f"{early:,.1f}, {late:,.1f}", f"{engine_early:,.0f}, {engine_late:,.0f}"]],
    )  # fmt: skip
