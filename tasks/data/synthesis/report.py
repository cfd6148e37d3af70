"""How many examples each filter let through, what that cost, and how it reads on the page of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from tasks.contracts.numbers import percent
from tasks.contracts.synthesis import Fill, SynthesizeSpec
from tasks.data.synthesis.filters import Refusal
from tasks.data.synthesis.purse import Spent

# The filters, in the order in which examples pass them; "answer" is whether the teacher gave any.
STEPS = ("answer", "schema", "self_consistency", "grounding", "duplicates")


class Judged(Protocol):
    """An example after the filters: which one refused it ("" for none), and why."""

    @property
    def step(self) -> str:
        """The filter that refused it."""

    @property
    def refusal(self) -> Refusal | None:
        """Why."""

    @property
    def refined(self) -> bool:
        """Whether it is a second try."""

    @property
    def fill(self) -> int | None:
        """Position of its fill; None for one from a document."""


def funnel_of(drafts: Sequence[Judged], skipped: str | None) -> list[dict[str, Any]]:
    """For each filter: how many came in and went out, the survival rate, and the refused by reason.

    Raises:
        AssertionError: the counts do not add up, which is a defect of this program.
    """
    funnel = []
    left = len(drafts)
    for step in STEPS:
        reasons = Counter(draft.refusal.reason for draft in drafts if draft.step == step and draft.refusal is not None)
        out = left - reasons.total()
        entry: dict[str, Any] = {
            "step": step,
            "in": left,
            "out": out,
            "survival": round(out / left, 4) if left else None,
            "rejected": dict(sorted(reasons.items())),
        }
        if step == "grounding" and skipped is not None:
            entry["skipped"] = skipped
        funnel.append(entry)
        left = out
    if left != sum(not draft.step for draft in drafts):
        raise AssertionError("the funnel does not add up")
    return funnel


def build_report(
    spec: SynthesizeSpec,
    drafts: Sequence[Judged],
    fills: Sequence[Fill],
    stopped: str | None,
    spent: Spent,
    lenient: int,
    skipped: str | None,
) -> dict[str, Any]:
    """The content of `report.json`; nothing in it depends on interruptions."""
    kept = [draft for draft in drafts if not draft.step]
    again = [draft for draft in drafts if draft.refined]
    of_documents = [draft for draft in drafts if draft.fill is None]
    report: dict[str, Any] = {
        "name": spec.name,
        "teacher": {"url": spec.teacher.url, "model": spec.teacher.model},
        "asked": len(drafts),
        "kept": len(kept),
        "quarantined": len(drafts) - len(kept),
        "survival": round(len(kept) / len(drafts), 4) if drafts else None,
        "funnel": funnel_of(drafts, skipped),
        "refinement": {"asked": len(again), "kept": sum(not draft.step for draft in again)},
        "read_leniently": lenient,
        "stopped": stopped,
        "costs": spent.model_dump(),
        "money_per_row": None if spent.money is None or not kept else round(spent.money / len(kept), 6),
        "fills": [
            fill.model_dump(exclude_none=True, exclude={"rows"})
            | {
                "wanted": fill.rows,
                "asked": sum(draft.fill == number for draft in drafts),
                "kept": sum(draft.fill == number for draft in kept),
            }
            for number, fill in enumerate(fills)
        ],
    }
    if spec.documents is not None:
        report["documents"] = {
            "asked": len(of_documents),
            "kept": sum(not draft.step for draft in of_documents),
        }
    return report


def report_markdown(report: Mapping[str, Any], path: str) -> str:
    """A report for the page of a run."""
    lines = [
        f"# {report['kept']:,} rows written by {_code(report['teacher']['model'])}",
        "",
        f"Of {report['asked']:,} examples asked for. Kept in {_code(path)}; what was refused, with the reason, lies in "
        f"{_code('quarantine.jsonl')} beside it.",
        "",
    ]
    if report["stopped"] is not None:
        lines += [f"**Stopped early**: {report['stopped']}, and one more request could have exceeded it.", ""]
    lines += ["| filter | in | out | survival | refused |", "|---|---:|---:|---:|---|"]
    for entry in report["funnel"]:
        refused = ", ".join(f"{count:,} {reason}" for reason, count in entry["rejected"].items()) or "none"
        if "skipped" in entry:
            refused = f"skipped: {entry['skipped']}"
        survival = "" if entry["survival"] is None else percent(entry["survival"])
        name = entry["step"].replace("_", "-")
        lines.append(f"| {name} | {entry['in']:,} | {entry['out']:,} | {survival} | {refused} |")
    refinement = report["refinement"]
    lines += [
        "",
        f"Told why and asked again: {refinement['asked']:,}, of which {refinement['kept']:,} were kept.",
        "",
        f"**Costs**: {cost_words(report)}.",
    ]
    if report["fills"]:
        lines += ["", "| class | slice | looks like | wanted | asked | kept |", "|---|---|---|---:|---:|---:|"]
        for fill in report["fills"]:
            names = " | ".join(_cell(fill.get(name, "")) for name in ("label", "slice", "looks_like"))
            lines.append(f"| {names} | {fill['wanted']:,} | {fill['asked']:,} | {fill['kept']:,} |")
    return "\n".join(lines) + "\n"


def cost_words(report: Mapping[str, Any]) -> str:
    """What it cost, in one line."""
    costs = report["costs"]
    words = (
        f"{costs['requests']:,} requests, {costs['prompt_tokens']:,} prompt and {costs['completion_tokens']:,} "
        "completion tokens"
    )
    if costs["money"] is not None:
        words += f", {costs['money']:.4f} {costs['currency']}"
        if report["money_per_row"] is not None:
            words += f" ({report['money_per_row']:.4f} a row kept)"
    if costs["lost_requests"]:
        words += f"; {costs['lost_requests']:,} of the requests brought nothing and are counted at their most"
    return words


def _code(text: str) -> str:
    return f"`{text.replace('`', '')}`"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
