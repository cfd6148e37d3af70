"""A rollout in words: its page, its last message, and a line for a terminal."""

from __future__ import annotations

from tasks.contracts.observe import CanaryEvidence
from tasks.contracts.serving import CheckResult, Intent, ItemParity, Phase, RolloutResult, Shadow, Traffic, TrialResult
from tasks.serving.checks import sureness_rows

_STATES = {Phase.DONE: "Rolled out", Phase.REFUSED: "Refused", Phase.UNDONE: "Undone"}
_SHOWN = 10  # differences on a page; the record of the change has more


def state_name(result: RolloutResult) -> str:
    """How the run ended, in a word or two."""
    return _STATES[result.phase]


def headline(result: RolloutResult) -> str:
    """What came of it, in a sentence."""
    label, was = result.version.label, result.was.label if result.was is not None else None
    stays = f"{was} goes on answering" if was else "nothing answers, as before"
    match result.phase:
        case Phase.DONE if was == label:
            return f"{label} answers, as it did before."
        case Phase.DONE:
            kept = f"; {was} is kept warm to go back to" if was else ""
            took = f", {result.switch_seconds:.1f} s after the decision" if result.switch_seconds is not None else ""
            return f"{label} answers{took}{kept}."
        case Phase.REFUSED:
            return f"{label} was refused, and {stays}: {' '.join(result.problems)}"
        case _:
            return f"{label} was taken back, and {stays}: {' '.join(result.problems)}"


def rollout_markdown(result: RolloutResult) -> str:
    """The page of a rollout."""
    lines = [f"# {state_name(result)}", "", f"**{_plain(headline(result))}**", ""]
    if not result.version.certified:
        lines += ["> **No certificate.** A person set this version as baseline; nothing was compared.", ""]
    if result.check is None:
        lines.append("Its engine was not asked anything.")
    else:
        lines += [*_check_table(result.check), *_differences(result.check)]
    if result.trial is not None:
        lines += ["", *_trial_lines(result.version.label, result.trial)]
    lines += ["", f"Version {result.version.version} of {result.name}, sha256 `{result.version.digest}`."]
    return "\n".join(lines) + "\n"


def change_lines(traffic: Traffic | None, begun: Intent | None, ended: tuple[Intent, ...]) -> list[str]:
    """Where a name stands, for a terminal: traffic, the change under way, and the last ones that ended."""
    lines = []
    if traffic is None:
        lines.append("nothing is in service under this name")
    else:
        kept = f", {traffic.previous.label} is kept warm" if traffic.previous is not None else ""
        lines.append(
            f"{traffic.live.label} answers{kept} (revision {traffic.revision}, {traffic.at:%Y-%m-%d %H:%M} UTC)"
        )
        if traffic.canary is not None:
            trial = traffic.canary
            taken = f", taken back: {' '.join(trial.finding.reasons)}" if trial.finding is not None else ""
            lines.append(
                f"{trial.version.label} is on trial for {trial.spec.share:.2%} of the keys, "
                f"{trial.state.canary_requests:,} requests so far{taken}"
            )
        if traffic.shadow is not None:
            lines.append(shadow_line(traffic.shadow))
    if begun is not None:
        lines.append(f"under way: {begun.kind} to {begun.to.label}, {begun.phase.value}, by {begun.holder}")
    for one in ended:
        why = f": {' '.join(one.problems)}" if one.problems else f" ({one.why})"
        lines.append(f"{one.at:%Y-%m-%d %H:%M} UTC  {one.kind} to {one.to.label} {one.phase.value}, {one.by}{why}")
    return lines


def shadow_line(shadow: Shadow) -> str:
    """What answers unseen, for a terminal."""
    what = shadow.version.label if shadow.version is not None else "nothing"
    if shadow.vendor is not None:
        what = f"{shadow.vendor.model} at {shadow.vendor.url}"
    return (
        f"{what} answers {shadow.spec.share:.1%} of the requests unseen, since {shadow.since:%Y-%m-%d %H:%M} UTC "
        f"(comparison {shadow.id})"
    )


def trial_line(label: str, trial: TrialResult) -> str:
    """What a canary has come to, in a line."""
    state = trial.state
    seen = f"{state.canary_requests:,} requests on trial, beside {state.live_requests:,} of the live version"
    if trial.finding.abort:
        return f"{label} was taken back after {seen}: {' '.join(trial.finding.reasons)}".rstrip(".")
    return f"{label} had {seen}, in {trial.hours:.1f} h"


_QUALITIES = {
    "errors": "Failed requests",
    "slow": "Answers slower than {slow:,.0f} ms",
    "unsure": "Answers below their threshold of confidence",
}


def _trial_lines(label: str, trial: TrialResult) -> list[str]:
    slow = trial.state.slow_above_ms
    return [
        "## Canary",
        "",
        f"{_plain(trial_line(label, trial))}. {trial.spec.share:.2%} of the keys were its.",
        "",
        "| Keys that it happened to | Canary | Live | Expected | Times as often | Allowed | e-value | Takes it back |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
        *(_evidence_row(one, slow) for one in trial.finding.qualities),
    ]


def _evidence_row(one: CanaryEvidence, slow: float) -> str:
    high = f"{one.ratio_high:.2f}" if one.ratio_high is not None else "any"
    best = f"{one.ratio:.2f} ({one.ratio_low:.2f} to {high})" if one.ratio is not None else "unknown"
    what = _QUALITIES[one.quality].format(slow=slow)
    return (
        f"| {what} | {one.canary:,} | {one.live:,} | {one.expected:.1f} | {best} | {one.allowed:g} | "
        f"{one.evidence:.3g} | {one.needed:g} |"
    )


def _check_table(check: CheckResult) -> list[str]:
    what = "Answered as evaluated" if check.compared else "Well-formed answers (there are none to compare with)"
    limit = f"at most {check.max_latency_ms:,.0f} ms" if check.max_latency_ms is not None else "no limit"
    return [
        "| Check | Found | Needed |",
        "|---|--:|--:|",
        f"| {what} | {check.same:,} of {check.asked:,} ({check.agreement:.1%}) | {check.needed:.1%} |",
        f"| Latency, median | {check.latency_p50_ms:,.0f} ms | |",
        f"| Latency, 95th percentile | {check.latency_p95_ms:,.0f} ms | {limit} |",
        *sureness_rows(check),
    ]


def _differences(check: CheckResult) -> list[str]:
    differing = check.asked - check.same
    if not differing:
        return []
    lines = ["", "| Item | Evaluated | Served |", "|---|---|---|", *map(_row, check.differences[:_SHOWN])]
    left = differing - min(_SHOWN, len(check.differences))
    return [*lines, "", f"{left:,} more differ."] if left else lines


def _row(item: ItemParity) -> str:
    return f"| {_plain(item.id)} | {_plain(item.evaluated)} | {_plain(item.served)} |"


def _plain(text: str) -> str:
    """Text that Markdown takes none of as its own."""
    one_line = " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
    return "".join(f"\\{sign}" if sign in "\\`*_[]<>|#~" else sign for sign in one_line)
