"""A look at live requests in words: its page, its state, and lines for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from tasks.contracts.monitor import MonitorResult, WindowFacts
from tasks.contracts.observe import DriftTest

HEAD = ("Compared", "Requests then", "now", "Effect", "Limit", "p-value", "Level", "Drifted")
STARTED, TOO_SOON, DRIFTED = "Drifted, retrain started", "Drifted, too soon", "Drifted"
NO_DRIFT, NOT_ENOUGH = "No drift", "Not enough to compare"


def state_name(result: MonitorResult) -> str:
    """How the look ended, in a word or two."""
    if result.report is None:
        return NOT_ENOUGH
    if not result.report.drifted:
        return NO_DRIFT
    if result.started:
        return STARTED
    return TOO_SOON if result.permit is not None and result.permit.next_at is not None else DRIFTED


def headline(result: MonitorResult) -> str:
    """What came of it, in a sentence or two."""
    if result.report is None:
        return f"{result.name}: {result.why_not}"
    if not result.report.drifted:
        made = len(result.report.tests)
        return f"{result.name}: no drift in {made} {'test' if made == 1 else 'tests'}."
    said = f"{result.name}: {result.report.reason}."
    if result.started:
        return f"{said} A retrain was started."
    if result.permit is None:
        return f"{said} Nothing was started, since this look only reports."
    return f"{said} No retrain was started. {result.permit.why}"


def table_rows(tests: Sequence[DriftTest]) -> list[tuple[str, ...]]:
    """The cells below `HEAD`, a row for each test."""
    return [
        (
            one.what,
            f"{one.reference_rows:,}",
            f"{one.current_rows:,}",
            f"{one.effect:.3g}",
            f"{one.limit:g}",
            f"{one.p_value:.2g}",
            f"{one.level:.2g}",
            "yes" if one.drifted else "no",
        )
        for one in tests
    ]


def window_lines(result: MonitorResult) -> list[str]:
    """Which requests were compared; empty where none were."""
    return [
        f"{what}: {_span(facts)}, {_requests(facts)}; answered by {_versions(facts)}"
        for what, facts in (("Reference", result.reference), ("Now", result.current))
        if facts is not None
    ]


def detail_lines(result: MonitorResult) -> list[str]:
    """What has changed by each test, and what was not tested and why."""
    if result.report is None:
        return []
    return [
        *(f"{one.what} ({one.method}): {one.words}" for one in result.report.tests),
        *(f"{what} not tested: {why}" for what, why in result.report.left_out.items()),
    ]


def monitor_markdown(result: MonitorResult, link: str | None) -> str:
    """The page of a look.

    Args:
        result: what it has found.
        link: path of the deployment's page whose runs drift starts; None where that is not known.
    """
    lines = [f"# {state_name(result)}", "", f"**{_plain(headline(result))}**", ""]
    if result.report is not None:
        rule = "|---|--:|--:|--:|--:|--:|--:|---|"
        lines += [_row(HEAD), rule, *map(_row, table_rows(result.report.tests)), ""]
        lines += ["A test has drifted if its effect is above its limit *and* its p-value below its level.", ""]
        lines += [f"- {_plain(line)}" for line in (*detail_lines(result), *window_lines(result))]
    if result.started:
        if link is not None:
            lines += ["", f"[Runs of retrain/{result.name}]({link})"]
        else:
            lines += ["", f"> Prefect has no deployment `retrain/{result.name}`; who listens is not known."]
        lines += ["", "It trains on the data of its configuration: only rows that are new there can make it better."]
    return "\n".join(lines).rstrip() + "\n"


def _span(facts: WindowFacts) -> str:
    return f"{facts.start:%Y-%m-%d %H:%M} to {facts.end:%Y-%m-%d %H:%M} UTC"


def _requests(facts: WindowFacts) -> str:
    drawn = f" ({facts.rows:,} compared)" if facts.rows != facts.requests else ""
    return f"{facts.requests:,} requests{drawn}"


def _versions(facts: WindowFacts) -> str:
    return ", ".join(f"{label} ({times:,})" for label, times in facts.versions.items()) or "nobody"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_plain(cell) for cell in cells) + " |"


def _plain(text: str) -> str:
    """Text that Markdown takes none of as its own: words of requests are among it."""
    one_line = " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
    return "".join(f"\\{sign}" if sign in "\\`*_[]<>|#~" else sign for sign in one_line)
