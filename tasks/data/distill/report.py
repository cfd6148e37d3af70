"""What became of the answers, what that cost, and what it did on dev, for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from tasks.contracts.distill import DistillEffect, DistillResult, DistillSpec
from tasks.contracts.numbers import metric_name, percent, place, points
from tasks.contracts.references import MetricComparison
from tasks.data.distill.filters import FILTERS, TOO_MANY_TOKENS
from tasks.data.synthesis.purse import Spent

# Why an answer stays as it is, in the order in which that is found.
STEPS = ("withheld", "budget", "no_answer", *FILTERS, TOO_MANY_TOKENS, "unchanged")


class Settled(Protocol):
    """A row's answer after the filters."""

    @property
    def original(self) -> str:
        """The answer before."""

    @property
    def rewritten(self) -> str | None:
        """The teacher's."""

    @property
    def reason(self) -> str:
        """One of `STEPS`, or "rewritten"."""

    @property
    def refused(self) -> bool:
        """Whether what the teacher brought may not be used."""


def build_report(spec: DistillSpec, found: Sequence[Settled], stopped: str | None, spent: Spent) -> dict[str, Any]:
    """The content of the splits' `report.json`; nothing in it depends on interruptions.

    Raises:
        AssertionError: the counts do not add up, which is a defect of this program.
    """
    reasons = Counter(one.reason for one in found)
    left = len(found)
    funnel: list[dict[str, Any]] = [{"step": "training rows", "removed": 0, "left": left}]
    for step in STEPS:
        left -= reasons[step]
        funnel.append({"step": step, "removed": reasons[step], "left": left})
    changed = [one for one in found if one.reason == "rewritten"]
    if left != len(changed):
        raise AssertionError("the funnel does not add up")
    refused = sum(one.refused for one in found)
    return {
        "name": spec.training.name,
        "teacher": {"url": spec.teacher.url, "model": spec.teacher.model},
        "samples": spec.samples,
        "relabel": spec.relabel,
        "rows": len(found),
        "rewritten": len(changed),
        "unchanged": reasons["unchanged"],
        "refused": refused,
        "left_out": 0 if spec.keep_original_when_refused else refused,
        "funnel": funnel,
        "characters": {
            "original": _mean([len(one.original) for one in changed]),
            "rewritten": _mean([len(one.rewritten or "") for one in changed]),
        },
        "stopped": stopped,
        "costs": spent.model_dump(),
        "money_per_row": None if spent.money is None or not changed else round(spent.money / len(changed), 6),
    }


def _mean(lengths: Sequence[int]) -> float | None:
    return round(sum(lengths) / len(lengths), 2) if lengths else None


def funnel_words(report: Mapping[str, Any]) -> str:
    """What became of the answers, in one line."""
    told = [f"{step['removed']:,} {step['step']}" for step in report["funnel"] if step["removed"]]
    return f"{report['rewritten']:,} of {report['rows']:,} answers rewritten" + (
        f" ({', '.join(told)})" if told else ""
    )


def effect_sentence(effect: DistillEffect, deciding: MetricComparison) -> str:
    """What the rewritten answers did on dev."""
    between = (
        f"{points(deciding.difference)} points ({100 * deciding.confidence:.0f} % interval "
        f"{points(deciding.low)} to {points(deciding.high)}) on {deciding.n:,} dev rows"
    )
    name = metric_name(deciding.metric)
    match effect:
        case DistillEffect.GAIN:
            return f"Gain: {name} is shown to be better with the rewritten answers, {between}."
        case DistillEffect.LOSS:
            return f"Loss: {name} is shown to be worse with the rewritten answers, {between}."
        case DistillEffect.NONE_SHOWN:
            return f"None shown: {name} differs by {between}, which may be chance."


def better_sentence(result: DistillResult) -> str:
    """Which side is better on dev, and what to do with it."""
    match result.effect:
        case DistillEffect.GAIN:
            return "Better on dev: the rewritten answers. The gate has the last word; to send them there:"
        case DistillEffect.LOSS:
            return (
                "Better on dev: the original answers; keep them. To let the gate judge the rewritten ones all the same:"
            )
        case DistillEffect.NONE_SHOWN:
            return (
                "Neither is shown to be better on dev; keep the original answers, which cost nothing. To let the gate "
                "judge the rewritten ones all the same:"
            )


def command(result: DistillResult, config: str = "CONFIG.yaml") -> str:
    """The command that trains on the rewritten rows and puts the model before the gate."""
    return f"goldgate run {config} " + " ".join(f"--set {setting}" for setting in result.settings)


def report_markdown(result: DistillResult, answers: Mapping[str, Any], costs: str) -> str:
    """The report as it is kept; it names no path.

    Args:
        result: both trainings and the differences.
        answers: the report of the rewritten splits.
        costs: what the teacher cost, in words.
    """
    lines = [
        f"# Answers rewritten by {_code(answers['teacher']['model'])}: {result.effect.value.replace('_', ' ')}",
        "",
        effect_sentence(result.effect, result.comparisons[0]),
        "",
        "| on the same dev rows | original | rewritten | difference (95 % interval) |",
        "|---|---:|---:|---:|",
    ]
    for one in result.comparisons:
        where = place(one.slice, one.suite)
        name = metric_name(one.metric) + (f", {where}" if where else "")
        lines.append(
            f"| {_cell(name)} | {percent(one.baseline)} | {percent(one.candidate)} | {points(one.difference)} "
            f"({points(one.low)} to {points(one.high)}) |"
        )
    before, after = result.original.dev_loss, result.rewritten.dev_loss
    lines += [
        f"| Dev loss, nats per answer token | {before:.4f} | {after:.4f} | {_signed(after - before)} |",
        "",
        f"{funnel_words(answers)}. Each stands beside its original in `originals.jsonl`.",
        "",
        "| answers | left as they are | still in |",
        "|---|---:|---:|",
    ]
    lines += [
        f"| {step['step'].replace('_', ' ')} | {step['removed']:,} | {step['left']:,} |"
        for step in answers["funnel"]
        if step["removed"] or step["step"] == "training rows"
    ]
    if answers["left_out"]:
        lines += ["", f"{answers['left_out']:,} rows whose rewriting was refused are left out of training."]
    if answers["stopped"] is not None:
        lines += ["", f"**Stopped early**: {answers['stopped']}, and one more request could have exceeded it."]
    lines += ["", f"**Costs**: {costs}."]
    return "\n".join(lines) + "\n"


def way_to_the_gate(result: DistillResult) -> str:
    """What to do next, for the page of a run; it names a path, so no artefact holds it."""
    return "\n".join(("", better_sentence(result), "", "```", command(result), "```")) + "\n"


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")


def _code(text: str) -> str:
    return f"`{text.replace('`', '')}`"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
