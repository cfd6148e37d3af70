"""Reviews in words: the headline of a run, and its page."""

from __future__ import annotations

from pathlib import Path

from tasks.contracts.numbers import percent
from tasks.contracts.review import REVIEWS_FILE, ReviewOutcome, ReviewRecord, ReviewResult, ReviewSpec
from tasks.serving.review.rows import read_records

NO_GATEWAY = "Gateway not reached"

_LISTED = 20
_NO_ROWS = (ReviewOutcome.DISPUTED, ReviewOutcome.UNUSABLE)


def review_state_name(result: ReviewResult) -> str:
    """The name of a run's final state."""
    return NO_GATEWAY if result.trouble else "Reviewed"


def review_headline(result: ReviewResult, name: str) -> str:
    """What a run has done, in one sentence."""
    agreed = f", people left {percent(result.agreement)} as the model had them" if result.agreement is not None else ""
    said = (
        f"{name}: {result.sent:,} answers sent to people, {result.waiting:,} wait; {result.rows:,} training rows and "
        f"{result.candidates:,} candidates for the golden set ({result.new:,} new){agreed}."
    )
    return f"{said} The gateway could not be reached, so nothing was fetched." if result.trouble else said


def review_lines(result: ReviewResult, spec: ReviewSpec) -> list[str]:
    """What a run has done and where it lies, a line each."""
    lines = [
        review_headline(result, spec.name),
        f"People review at {result.page}",
        f"Rows: {spec.rows}",
        f"Candidates: {spec.golden_candidates}",
        f"Record: {record_path(spec)}",
    ]
    missing = [
        f"{count:,} {what}"
        for count, what in (
            (result.disputed, "disputed"), (result.unusable, "unusable"), (result.declined, "without an answer"),
        )
        if count
    ]  # fmt: skip
    return lines + ([f"No rows: {', '.join(missing)}"] if missing else [])


def review_markdown(result: ReviewResult, spec: ReviewSpec) -> str:
    """A run as the page of its artifact; the texts of requests are not on it, they can be private."""
    agreement = "–" if result.agreement is None else percent(result.agreement)
    lines = [
        f"# {spec.name}: review",
        review_headline(result, spec.name),
        "",
        f"[Where people review]({result.page})",
        "",
        "| | |",
        "|---|---:|",
        f"| Sent now | {result.sent:,} |",
        f"| Waiting for people | {result.waiting:,} |",
        f"| Training rows | {result.rows:,} |",
        f"| Candidates for the golden set | {result.candidates:,} |",
        f"| New of both | {result.new:,} |",
        f"| Left as the model had them | {agreement} |",
        f"| Disputed | {result.disputed:,} |",
        f"| Unusable | {result.unusable:,} |",
        f"| Without an answer | {result.declined:,} |",
    ]
    if result.trouble:
        lines += ["", "**Nothing was fetched from the gateway:**", ""]
        lines += [f"    {line}" for line in result.trouble.splitlines()]
    listed = [record for record in read_records(record_path(spec)) if record.outcome in _NO_ROWS]
    if listed:
        lines += ["", "## No rows", "", "| request | version | why | people |", "|---|---|---|---|"]
        lines += [_row(record) for record in listed[:_LISTED]]
        if len(listed) > _LISTED:
            lines.append(f"\n{len(listed) - _LISTED:,} more are in {record_path(spec)}.")
    return "\n".join(lines) + "\n"


def record_path(spec: ReviewSpec) -> Path:
    """Where the record of reviews lies."""
    return Path(spec.rows).with_name(REVIEWS_FILE)


def _row(record: ReviewRecord) -> str:
    cells = (record.item, record.version, f"{record.outcome.value}: {record.why}", ", ".join(record.annotators))
    return f"| {' | '.join(_cell(cell) for cell in cells)} |"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
