"""How large a golden set and its slices have to be, and what they can show: the gate's planning over the draft of one.

Nothing has been evaluated yet, so a share of items on which the two models will differ is assumed
(`golden.discordance`), items are taken to be right or wrong, and items of one group to say all the same.
"""

from __future__ import annotations

import json
from functools import cache, partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from scipy.stats import binom

from tasks.contracts.errors import StoreError
from tasks.contracts.numbers import level as level_words
from tasks.contracts.numbers import percent, points
from tasks.contracts.spec import EVERY_SLICE, Objective, RetrainSpec
from tasks.data.golden import Draft, Planner
from tasks.data.golden_slices import MADE, MIN_SLICE_ITEMS, TYPICAL, Part, last_user_turn, typical_of
from tasks.gate.effects import PairedShares
from tasks.gate.looks import look_level
from tasks.gate.statistics import items_needed, smallest_effect
from tasks.statistics import POWER

_FEW = 600  # beyond, the formula is within two points of the test's power, and the test takes its time
_NEGLIGIBLE = 1e-6


def planner_of(spec: RetrainSpec) -> Planner:
    """What the gate needs and shows at the first look of a golden set."""
    return Planner(partial(_items_needed, spec), partial(_smallest_effect, spec))


def first_level(spec: RetrainSpec) -> float:
    """One-sided error level that the first look may spend."""
    return look_level(spec.policy, number=1, promotions=0)


def margin_of(spec: RetrainSpec, name: str) -> float:
    """The loss on a slice that its items must be able to rule out: the smallest margin that a guard gives it, else
    `golden.slice_loss`.
    """
    margins = [
        guard.margin
        for guard in spec.policy.guards
        if guard.slice in (EVERY_SLICE, name) and guard.suite is None and guard.margin is not None
    ]
    return min(margins, default=spec.golden.slice_loss)


def _items_needed(spec: RetrainSpec, name: str) -> int:
    """Items that show with 80 % power that a candidate which is no worse is not worse by the margin."""
    return enough_items(margin_of(spec, name), spec.golden.discordance, first_level(spec))


@cache
def enough_items(margin: float, discordance: float, level: float) -> int:
    """Items on which the gate's test rules out a loss of `margin` with 80 % power, if there is no difference.

    `items_needed` is for large samples. On few items the exact test falls short of it (70 % on 65), so up to `_FEW` the
    number is raised until the power of the test itself is enough.
    """
    items = items_needed(0.0, discordance, -margin, level)
    while items <= _FEW and power(items, -margin, discordance, level) < POWER:
        items += max(1, items // 40)
    return items


def power(items: int, limit: float, discordance: float, level: float) -> float:
    """How often the gate shows that a difference of zero lies above `limit`, which is negative: exactly.

    Summed over the number of discordant items, which is binomial, as are the wins among them; for each number the least
    wins that the test accepts are looked for near those of the number before.
    """
    least, total = 0, 0.0
    for discordant in range(items + 1):
        weight = float(binom.pmf(discordant, items, discordance))
        if weight < _NEGLIGIBLE:
            continue

        def shown(wins: int, of: int = discordant) -> bool:
            return PairedShares(wins, of - wins, items).p_above(limit, level) < level

        least = min(least, discordant)
        while least > 0 and shown(least - 1):
            least -= 1
        while least <= discordant and not shown(least):
            least += 1
        total += weight * float(binom.sf(least - 1, discordant, 0.5))
    return total


def _smallest_effect(spec: RetrainSpec, part: Part) -> float | None:
    """Smallest true difference that a part shows: of all items to lie beyond the policy's limit, of a slice to be one
    at all.
    """
    limit = 0.0
    if part.name is None:
        superior = spec.policy.objective is Objective.SUPERIOR
        limit = spec.policy.min_improvement if superior else -spec.policy.margin
    if part.effective < MIN_SLICE_ITEMS:  # so few that the formula promises what the exact test cannot keep
        return None
    return smallest_effect(part.effective, spec.golden.discordance, limit, first_level(spec))


def plan_record(draft: Draft, spec: RetrainSpec) -> dict[str, Any]:
    """The plan for programs."""
    return {
        "level": first_level(spec),
        "discordance": spec.golden.discordance,
        "parts": [part._asdict() | {"smallest_effect": _smallest_effect(spec, part)} for part in draft.parts],
        "left_for_training": draft.left,
        "synthetic_left_out": draft.synthetic,
        "notes": list(draft.notes),
    }


def print_plan(console: Console, draft: Draft, spec: RetrainSpec) -> None:
    """The table of a draft, what it assumes, and what is missing in it."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("part")
    for title in ("available", "wanted", "items", "groups", "shows a difference of"):
        table.add_column(title, justify="right")
    for part in draft.parts:
        effect = _smallest_effect(spec, part)
        table.add_row(
            "all items" if part.name is None else f"  {part.name}",
            f"{part.available:,}",
            f"{part.wanted:,}" if part.wanted is not None else "",
            f"{part.items:,}",
            f"{part.groups:,}",
            "none" if effect is None else f"{points(effect).lstrip('+')} points",
        )
    console.print(table, highlight=False)
    say = partial(console.print, highlight=False, soft_wrap=True)
    spends, assumed = level_words(first_level(spec)), percent(spec.golden.discordance)
    say(
        f"\nWith about 80 % power at the first look's level, {spends}, if the two models differ on {assumed} of the "
        "items (golden.discordance), each right or wrong. Items of a group count as one."
    )
    for line in (*_missing(draft, spec), *_mixture(draft), *draft.notes):
        say(f"{line}.")
    left = f"At most {draft.left:,} rows are left for training"
    say(f"{left}; {draft.synthetic:,} that a model wrote were not looked at." if draft.synthetic else f"{left}.")


def _missing(draft: Draft, spec: RetrainSpec) -> list[str]:
    """The slices that have fewer items than the gate needs."""
    found = []
    asked = {name.value for name in spec.golden.slices}
    for part in draft.parts:
        if part.name is None or part.name not in asked:
            continue
        if part.items < MIN_SLICE_ITEMS:
            found.append(
                f"The slice {part.name} has {part.items:,} items; below {MIN_SLICE_ITEMS} it is refused: add data that "
                "fit it, or take it out of `golden.slices`"
            )
        elif part.wanted is not None and part.items < part.wanted:
            found.append(
                f"The slice {part.name} has {part.items:,} of {part.wanted:,} items: a loss of "
                f"{points(margin_of(spec, part.name)).lstrip('+')} points will often be neither shown nor ruled out"
            )
    return found


def _mixture(draft: Draft) -> list[str]:
    """Which share of the verdict is about the data as they come."""
    everything, *slices = draft.parts
    typical = next((part for part in slices if part.name == TYPICAL), None)
    if typical is None or all(part.wanted is None for part in slices):
        return []
    share = percent(typical.items / everything.items)
    return [f"{share} of the items stand for the data as they come (slice {TYPICAL}); the verdict is about all of them"]


def write_to_paraphrase(path: Path, draft: Draft) -> int:
    """Write the typical items as {id, text}, for people or a teacher to say in other words; return how many.

    Raises:
        StoreError: the file cannot be written, or is there already.
    """
    made = {name.value for name in MADE}
    items = [item for item in typical_of(draft.items) if item.slice not in made]
    try:
        with path.open("x", encoding="utf-8", newline="\n") as out:
            for item in items:
                out.write(json.dumps({"id": item.id, "text": last_user_turn(item)}, ensure_ascii=False) + "\n")
    except OSError as error:
        raise StoreError(
            f"The items cannot be written: {error.strerror or error}.",
            where=str(path),
            fix="name a new file in a folder that can be written",
        ) from error
    return len(items)
