"""A rollout in words: its page, its last message, and a line for a terminal."""

from __future__ import annotations

from tasks.contracts.serving import CheckResult, Intent, ItemParity, Phase, RolloutResult, Traffic

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
    if begun is not None:
        lines.append(f"under way: {begun.kind} to {begun.to.label}, {begun.phase.value}, by {begun.holder}")
    for one in ended:
        why = f": {' '.join(one.problems)}" if one.problems else f" ({one.why})"
        lines.append(f"{one.at:%Y-%m-%d %H:%M} UTC  {one.kind} to {one.to.label} {one.phase.value}, {one.by}{why}")
    return lines


def _check_table(check: CheckResult) -> list[str]:
    what = "Answered as evaluated" if check.compared else "Well-formed answers (there are none to compare with)"
    limit = f"at most {check.max_latency_ms:,.0f} ms" if check.max_latency_ms is not None else "no limit"
    return [
        "| Check | Found | Needed |",
        "|---|--:|--:|",
        f"| {what} | {check.same:,} of {check.asked:,} ({check.agreement:.1%}) | {check.needed:.1%} |",
        f"| Latency, median | {check.latency_p50_ms:,.0f} ms | |",
        f"| Latency, 95th percentile | {check.latency_p95_ms:,.0f} ms | {limit} |",
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
