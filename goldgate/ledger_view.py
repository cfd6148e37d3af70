"""How the ledger reads in a terminal: each golden set's looks, what is left of its budget, and what people decided."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tasks.contracts.errors import LedgerError
from tasks.contracts.numbers import percent
from tasks.contracts.references import Outcome
from tasks.contracts.spec import LookPolicy
from tasks.gate.ledger import Decision, DecisionKind, Ledger, LookRecord, Page

_COLOURS = {"promote": "green", "reject": "red", "inconclusive": "yellow"}
_NOT_PROMOTED = "not promoted"
_NONE_RECORDED = "none recorded"
_WIDEST = 1000  # characters: more than a table ever needs

_PLOT_ROWS = 6
_PLOT_COLUMNS = 52  # and 8 for the scale: 60 in all
_BLOCKS = " ▁▂▃▄▅▆▇█"
_EIGHTHS = len(_BLOCKS) - 1
_SHORTEST_DIGEST = 4  # a shorter beginning of a digest fits too many


def print_ledger(console: Console, ledger: Ledger, wanted: str | None = None, *, as_json: bool = False) -> None:
    """Every page with its looks and its budget, then every decision of a person.

    On a page with a ladder, what did not promote is just that, here as everywhere: the ladder's levels hold only if
    nothing more is let out (see `tasks.gate.looks.ladder_level`).

    Args:
        console: where to.
        ledger: what to show.
        wanted: a task, or the beginning of a golden set's digest; None is everything.
        as_json: one JSON object instead.

    Raises:
        LedgerError: the ledger cannot be read, or holds nothing of what is wanted.
    """
    every = [(page, ledger.looks(page.page)) for page in ledger.pages()]
    shown = [(page, looks) for page, looks in every if not wanted or _is_about(page, looks, wanted)]
    on_pages = {page.page for page, _ in shown}
    decisions = [
        decision
        for decision in ledger.decisions()
        if not wanted or decision.name == wanted or decision.page in on_pages or _begins(decision.page, wanted)
    ]
    if wanted and not shown and not decisions:
        names = sorted({page.name for page, _ in every} | {decision.name for decision in ledger.decisions()})
        raise LedgerError(
            f"The ledger holds nothing about {wanted}.",
            where=ledger.where,
            fix=f"name a task ({', '.join(names) or 'there is none yet'}), or the beginning of a golden set's digest",
        )
    withheld = {page.page for page, _ in every if page.looks is LookPolicy.LADDER}
    if as_json:
        console.out(json.dumps(_record(ledger, shown, decisions, withheld), indent=2), highlight=False)
        return
    say = partial(console.print, highlight=False, soft_wrap=True)
    say(f"Ledger  {escape(ledger.where)}")
    if not shown:
        say("No looks yet.")
    for page, looks in shown:
        _print_page(console, page, looks)
    say("\n[bold]Decisions of people[/]" if decisions else "\nNo decisions of people.")
    for decision in decisions:
        _print_decision(console, decision, withheld)


def plot_budget(left: Sequence[float]) -> list[str]:
    """Lines of text that plot what was left of a budget: before the first look, and after each.

    Args:
        left: shares of the budget, each in [0, 1].

    Returns:
        At most 60 characters a line. More looks than fit are thinned out; the first and last always show.
    """
    last = len(left) - 1
    if len(left) > _PLOT_COLUMNS:
        step = last / (_PLOT_COLUMNS - 1)
        left = [left[round(column * step)] for column in range(_PLOT_COLUMNS)]
    wide = max(1, min(4, _PLOT_COLUMNS // len(left)))
    gap = 1 if wide > 1 else 0
    # Whatever is left shows as something, so that 1 % does not look like nothing.
    heights = [max(1, round(share * _PLOT_ROWS * _EIGHTHS)) if share > 0 else 0 for share in left]
    labels = {_PLOT_ROWS - 1: "100 %", _PLOT_ROWS // 2 - 1: " 50 %"}
    lines = []
    for row in reversed(range(_PLOT_ROWS)):
        cells = [_BLOCKS[min(_EIGHTHS, max(0, height - row * _EIGHTHS))] for height in heights]
        bars = "".join(cell * (wide - gap) + " " * gap for cell in cells)
        lines.append(f"{labels.get(row, ''):>5} │{bars}".rstrip())
    width = len(left) * wide - gap
    lines.append(f"{'0 %':>5} └{'─' * width}")
    lines.append(f"       0{last!s:>{max(1, width - 1)}} looks" if last else "       0 looks")
    return lines


def _print_page(console: Console, page: Page, looks: Sequence[LookRecord]) -> None:
    say = partial(console.print, highlight=False, soft_wrap=True)
    say(f"\n[bold]{escape(page.name)}[/]  golden set {page.page}")
    say(
        f"  opened {page.opened_at:%Y-%m-%d} by {_plain(page.opened_by)}: alpha {page.alpha:g}, {_shared(page)}; "
        f"{_counted(page.taken, 'look')}, {page.promotions} promoted"
    )
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading, justify in (("look", "right"), ("time (UTC)", "left"), ("asked by", "left"), ("candidate", "left"),
                             ("baseline", "left"), ("verdict", "left"), ("level", "right"), ("left", "right"),
                             ("", "left")):  # fmt: skip
        table.add_column(heading, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for look in looks:
        verdict = _verdict(page.looks is LookPolicy.LADDER, look.outcome)
        table.add_row(
            str(look.number), f"{look.at:%Y-%m-%d %H:%M}", _plain(look.asked_by), _short(look.candidate),
            _short(look.baseline), f"[{_COLOURS.get(verdict, 'default')}]{verdict}[/]", f"{look.level:.2g}",
            "—" if page.looks is LookPolicy.OFF else percent(_left(page, look.spent)), _notes(page, look),
        )  # fmt: skip
    # As wide as it needs to be: rich takes a pipe for 80 characters wide, and would cut the cells to fit.
    table.width = console.measure(table, options=console.options.update(width=_WIDEST)).maximum
    console.print(table, crop=False, highlight=False)
    if page.looks is LookPolicy.OFF:
        say(
            f"  The budget is not shared (looks: off): all looks together promote falsely with a chance of up to "
            f"{percent(min(1.0, page.spent))}."
        )
        return
    say("\n  Budget left after each look")
    for line in plot_budget([1.0, *(_left(page, look.spent) for look in looks)]):
        say(f"  {line}")
    if page.why_spent is not None:
        say(f"  [bold red]Spent[/]: {escape(page.why_spent)}. Freeze fresh rows into a new folder: a new page starts.")


def _print_decision(console: Console, decision: Decision, withheld: set[str]) -> None:
    said = ""
    if decision.outcome is not None:
        said = f", verdict {_verdict(decision.page in withheld, decision.outcome)}"
    page = "" if decision.page is None else f", golden set {_short(decision.page)}"
    kind = decision.kind.value.replace("_", " ")
    colour = "bold yellow" if decision.kind is DecisionKind.FORCED_PROMOTION else "bold"
    console.print(
        f"  {decision.at:%Y-%m-%d %H:%M}  [{colour}]{kind}[/]  {escape(decision.name)}, model {_short(decision.model)}"
        f"{said}{page}\n      {_plain(decision.by) or 'nobody named'}: {_plain(decision.reason) or 'no reason given'}",
        highlight=False,
        soft_wrap=True,
    )


def _record(
    ledger: Ledger,
    shown: Sequence[tuple[Page, Sequence[LookRecord]]],
    decisions: Sequence[Decision],
    withheld: set[str],
) -> dict[str, Any]:
    def hide(record: dict[str, Any], page: str | None) -> dict[str, Any]:
        if page in withheld and record["outcome"] is not None:
            return record | {"outcome": _verdict(True, Outcome(record["outcome"]))}
        return record

    pages = []
    for page, looks in shown:
        records = [hide(look.model_dump(mode="json"), page.page) for look in looks]
        for record in records:
            record["left"] = page.alpha - record["spent"]
            if page.page in withheld:  # one answer a look is what the ladder lets out
                record["repeats"] = [repeat | {"outcome": None} for repeat in record["repeats"]]
        pages.append(page.model_dump(mode="json") | {"left": page.alpha - page.spent, "history": records})
    return {
        "ledger": ledger.where,
        "pages": pages,
        "decisions": [hide(decision.model_dump(mode="json"), decision.page) for decision in decisions],
    }


def _is_about(page: Page, looks: Sequence[LookRecord], wanted: str) -> bool:
    return wanted in {page.name, *(look.name for look in looks)} or _begins(page.page, wanted)


def _begins(page: str | None, wanted: str) -> bool:
    return page is not None and len(wanted) >= _SHORTEST_DIGEST and page.startswith(wanted)


def _shared(page: Page) -> str:
    match page.looks:
        case LookPolicy.BONFERRONI:
            return f"bonferroni over {_counted(page.declared_looks or 0, 'look')}"
        case LookPolicy.LADDER:
            return f"ladder in steps of {page.ladder_step:g}"
        case _:
            return page.looks.value


def _left(page: Page, spent: float) -> float:
    return max(0.0, 1.0 - spent / page.alpha)


def _verdict(withheld: bool, outcome: Outcome | None) -> str:
    if outcome is None:
        return _NONE_RECORDED
    return _NOT_PROMOTED if withheld and outcome is not Outcome.PROMOTE else outcome.value


def _notes(page: Page, look: LookRecord) -> str:
    """What is unusual about a look."""
    notes = ["clock went back"] if look.clock_went_back else []
    if look.judged_answers not in (None, look.answers):
        notes.append("answered again before the verdict")
    if look.repeats:
        note = f"asked again {len(look.repeats)}x"
        if page.looks is not LookPolicy.LADDER:  # one answer a look is what the ladder lets out
            others = sorted({repeat.outcome.value for repeat in look.repeats if repeat.outcome is not look.outcome})
            note += f", came out {' and '.join(others) or 'the same'}"
        if any(repeat.answers != look.judged_answers for repeat in look.repeats):
            note += ", by other answers"
        notes.append(note)
    return "; ".join(notes)


def _short(digest: str) -> str:
    return escape(digest[:8])


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _plain(words: str) -> str:
    """A person's words on one line, as nothing but text: neither markup nor commands to the terminal."""
    return escape("".join(letter if letter.isprintable() else " " for letter in words).strip())
