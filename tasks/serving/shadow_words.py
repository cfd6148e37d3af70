"""A comparison with a shadow in words: its page, and lines for a terminal."""

from __future__ import annotations

from tasks.contracts.observe import PairedCost, ShadowReport, ShadowResult

_SIGNS = str.maketrans({sign: f"\\{sign}" for sign in "\\`*_[]<>|#~"})


def shadow_lines(result: ShadowResult) -> list[str]:
    """What is known so far, for a terminal; the first line is what it comes to."""
    report = result.report
    lines = [report.why, *(f"{what}: {said}" for what, said in _facts(result))]
    lines += [f"Without an answer, since {why}: {count:,}" for why, count in _errors(result)]
    return lines + _notes(result)


def shadow_markdown(result: ShadowResult) -> str:
    """The page of a report."""
    lines = [
        f"# {_plain(result.shadow)} beside {_plain(result.live)}",
        "",
        f"**{result.report.why}**",
        "",
        "| | |",
        "|---|---|",
        *(f"| {what} | {said} |" for what, said in _facts(result)),
    ]
    errors = _errors(result)
    if errors:
        lines += ["", "| Why the shadow gave no answer | Times |", "|---|--:|"]
        lines += [f"| {_plain(why)} | {count:,} |" for why, count in errors]
    for note in _notes(result):
        lines += ["", note]
    return "\n".join([*lines, "", f"Comparison `{result.id}` of {_plain(result.name)}."]) + "\n"


def _facts(result: ShadowResult) -> list[tuple[str, str]]:
    report = result.report
    facts = [
        ("Requests", f"{report.pairs:,}"),
        ("Without an answer of the shadow", f"{report.failed:,} ({_shares(report.failed_low, report.failed_high)})"),
        ("Answered alike", _agreement(report)),
        ("Reviewed disagreements", f"{_reviewed(report):,} of {report.pairs - report.failed - report.agreed:,}"),
        ("Of these the shadow alone is right", _wins(report)),
        ("Accuracy, shadow minus live", _difference(report, result.margin)),
        ("When it can be decided", _when(report)),
        ("Milliseconds, shadow minus live", _cost(report.latency, "ms")),
    ]
    if report.cost is not None:
        facts.append(("Cost of a request, shadow minus live", _cost(report.cost, "")))
    if result.shadow_cost is not None:
        facts.append(("Cost of the shadow's answers in all", f"{result.shadow_cost:,.4f}"))
    return facts


def _agreement(report: ShadowReport) -> str:
    if report.agreement is None:
        return "nothing was answered by both"
    return f"{report.agreement:.1%} ({_shares(report.agreement_low, report.agreement_high)})"


def _wins(report: ShadowReport) -> str:
    if report.win_share is None:
        return "unknown: nobody has reviewed one in which only one of the two is right"
    return (
        f"{report.wins:,}, the live version alone in {report.losses:,}, both or neither in {report.ties:,}: "
        f"{report.win_share:.1%} ({_shares(report.win_share_low, report.win_share_high)}), p = {report.p_value:.3g}"
    )


def _difference(report: ShadowReport, margin: float) -> str:
    bounds = f"between {100 * report.difference_low:+.1f} and {100 * report.difference_high:+.1f} points"
    best = f"{100 * report.difference:+.1f} points, " if report.difference is not None else ""
    return f"{best}{bounds} at every look ({100 * margin:g} points matter)"


def _when(report: ShadowReport) -> str:
    if report.pairs_more is None or report.reviews_more is None:
        return "now" if report.decision.value != "open" else "nothing tells yet"
    needed = f"after {report.pairs_more:,} more requests and {report.reviews_more:,} more reviews"
    if report.days is None or report.days_low is None or report.days_high is None:
        return f"{needed}; there is no rate yet to say when"
    return f"{needed}: {report.days:.1f} days at the present rate ({report.days_low:.1f} to {report.days_high:.1f})"


def _cost(cost: PairedCost | None, unit: str) -> str:
    if cost is None:
        return "not known of both"
    digits = ",.1f" if unit else ",.6f"
    space = f" {unit}" if unit else ""
    return (
        f"{cost.difference:+{digits}}{space} ({cost.low:+{digits}} to {cost.high:+{digits}}); "
        f"95th percentile {cost.shadow_p95:{digits}} against {cost.live_p95:{digits}}{space}"
    )


def _errors(result: ShadowResult) -> list[tuple[str, int]]:
    return sorted(result.errors.items(), key=lambda one: (-one[1], one[0]))[:10]


def _notes(result: ShadowResult) -> list[str]:
    notes = []
    if result.other_live:
        notes.append(f"{result.other_live:,} requests that an earlier version answered are left out.")
    if not _reviewed(result.report) and result.report.agreed < result.report.pairs - result.report.failed:
        notes.append("Nobody has reviewed a disagreement, so nothing is known of who is right.")
    return notes


def _reviewed(report: ShadowReport) -> int:
    return report.wins + report.losses + report.ties


def _shares(low: float, high: float) -> str:
    return f"{low:.1%} to {high:.1%}"


def _plain(text: str) -> str:
    """Text that Markdown takes none of as its own."""
    return " ".join(text.split()).translate(_SIGNS)
