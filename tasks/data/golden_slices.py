"""Slices of a golden set that show how a model does where inputs are unlike most others.

Beside the items that are drawn as the data come (slice `typical`), a golden set can have

- slices that are *drawn* from the same source: `newest` (the newest tenth), `rare_class` (classes with less than half
  of an even share), `long` and `short` (the longest and the shortest tenth, in characters). A row that fits several
  goes to the first of these. At most half of the rows that fit are taken, since what is frozen is lost to training.
  Training still sees the other half: `newest` shows how a model does on today's inputs, not on ones of a time that it
  has never seen.
- slices that are *made* from typical items, with the same answer: `typed_noise`, `paraphrase` and `adversarial` (see
  `tasks.data.perturb`).

**Groups.** A changed item says little that its original has not said already: a model that knows one mostly knows the
other. The gate must not count them as two draws, and it counts by `group`. So both get the same group: the original's,
or, where it has none, one that is made of its id. For the verdict on all items the gate then resamples whole families,
instead of using the exact tests for items that stand alone. No slice by itself loses by that, `typical` included: no
two of its items share a made group. Originals of which nothing is made keep `None`.

**What the verdict is about.** The gate decides on all items, and so with slices on a mixture that is harder than the
data as they come. The comparison is paired and fair all the same; how much of the mixture is typical stands in the
plan, and the slice `typical` has a row of its own in every report and can be guarded like any other.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tasks.contracts.errors import DataError, SpecError
from tasks.contracts.rows import Row
from tasks.contracts.spec import GoldenSlice, RetrainSpec, TaskKind
from tasks.data.draw import content_hash, draw, make_units, quotas
from tasks.data.facts import RowChecks
from tasks.data.perturb import Donor, mislead, type_badly
from tasks.data.private import mask_text
from tasks.data.similar import normalise
from tasks.data.table import NO_TIME, NOTHING, RowReader, RowTable

TYPICAL = "typical"
MIN_SLICE_ITEMS = 10  # below, a slice says nothing; it is refused
MADE = {
    GoldenSlice.TYPED_NOISE: "noise",
    GoldenSlice.PARAPHRASE: "paraphrase",
    GoldenSlice.ADVERSARIAL: "adversarial",
}
"""What stands behind `~` in the id of an item that is made."""
_TAIL = 0.1
_DONORS_TRIED = 200
_WORD = re.compile(r"[^\W\d_]+")


class Part(NamedTuple):
    """How many items a part of a golden set has.

    Attributes:
        name: of the slice; None for all items.
        available: how many could be had: half of the rows that fit for a slice that is drawn, the typical items that
            can be changed for one that is made, all rows that differ for the rest.
        wanted: how many were asked for; None where nobody asked (a slice that the data name).
        items: how many there are.
        groups: how many groups they form.
        effective: how many items that stand alone they are worth at least: n² over the sum of the squared group sizes
            (Kish 1965, Survey Sampling, 8.2, where the items of a group all say the same).
    """

    name: str | None
    available: int
    wanted: int | None
    items: int
    groups: int
    effective: int


class Pool(NamedTuple):
    """Where items come from: a table of rows, its reader, and the positions of rows that differ, ascending."""

    table: RowTable
    reader: RowReader
    kept: NDArray[np.int64]


class Slice(NamedTuple):
    """The items of a slice, how many there could have been, and how many were asked for."""

    name: GoldenSlice
    available: int
    wanted: int
    rows: list[Row]


class WithSlices(NamedTuple):
    """Typical items, named and with their groups, the slices beside them, and what there is to say about them."""

    typical: list[Row]
    slices: list[Slice]
    notes: list[str]


def check_slices(spec: RetrainSpec) -> None:
    """Refuse, before anything is read, slices that this task and these data cannot have.

    Raises:
        SpecError: says which slice, and what it needs.
    """
    asked, data, where = spec.golden.slices, spec.data, "golden.slices"
    if asked and data.slice_field is not None:
        raise SpecError(
            "The data name slices, and `golden.slices` asks for others; an item is in one slice.",
            where=f"data.slice_field, {where}",
            fix="take one of the two out; both can be had as two golden sets, one of them in `suites`",
        )
    if GoldenSlice.NEWEST in asked and data.time_field is None:
        raise SpecError(
            "The slice newest needs the time of each row.", where=where, fix="name its column in `data.time_field`"
        )
    if GoldenSlice.RARE_CLASS in asked and spec.task.kind is not TaskKind.CLASSIFY and data.label_field is None:
        raise SpecError(
            "The slice rare_class needs classes.", where=where, fix="name their column in `data.label_field`"
        )
    if GoldenSlice.ADVERSARIAL in asked and spec.task.kind is not TaskKind.CLASSIFY:
        raise SpecError(
            "The slice adversarial is for classify tasks: its templates name other classes, and what they add could "
            f"change the answer of a task of kind {spec.task.kind.value}.",
            where=where,
            fix="take it out; typed_noise and paraphrase are for every kind",
        )
    if GoldenSlice.ADVERSARIAL in asked and data.languages and "en" not in data.languages:
        raise SpecError(
            "The templates of the slice adversarial are English, and the data are not.",
            where=f"{where}, data.languages",
            fix="take it out; typed_noise and paraphrase are for every language",
        )


def add_slices(pool: Pool, typical: Sequence[int], spec: RetrainSpec, wanted: Mapping[GoldenSlice, int]) -> WithSlices:
    """Draw and make the slices of a golden set, in the order in which `GoldenSlice` names them.

    Args:
        pool: where items come from.
        typical: positions of the items that are drawn as the data come.
        spec: the slices asked for, the task, and how the data are read.
        wanted: how many items each slice should have; it gets fewer where there are fewer.

    Raises:
        DataError: the file of paraphrases cannot be used.
    """
    table = pool.table
    free = np.zeros(len(table), dtype=np.bool_)
    free[pool.kept] = True
    free[list(typical)] = False
    slices = []
    for name in GoldenSlice:
        if name in wanted and name not in MADE:
            fits = _fitting(pool, name)
            at = np.flatnonzero(fits & free)
            available = len(at) // 2
            salted = partial(_salted_position, table, name)
            taken = draw_positions(table, at, salted, min(wanted[name], available), 1)
            free[taken] = False
            rows = [replace(pool.reader.row(position), slice=name.value) for position in taken]
            slices.append(Slice(name, available, wanted[name], rows))
    originals = [pool.reader.row(position) for position in typical]
    said = _read_paraphrases_of(originals, spec)
    strata = [table.stratum_names[table.strata[position]] for position in typical]
    for name in GoldenSlice:
        if name in wanted and name in MADE:
            change = _changer(name, spec, pool, free, said)
            could = [index for index, row in enumerate(originals) if change(row, dry=True) is not None]
            some = _draw_local(could, [originals[i] for i in could], [strata[i] for i in could], name, wanted[name])
            made = [(row, change(row, dry=False)) for row in (originals[index] for index in some)]
            rows = [_made_from(row, changed, name) for row, changed in made if changed is not None]
            slices.append(Slice(name, len(could), wanted[name], rows))
    families = {row.id.rpartition("~")[0] for one in slices if one.name in MADE for row in one.rows}
    named = [
        replace(row, slice=TYPICAL, group=family_of(row) if row.id in families else row.group) for row in originals
    ]
    unused = len(said) - len(said.keys() & {row.id for row in originals})
    notes = [f"{unused:,} of {len(said):,} paraphrases are not used: they are of no typical item"] if unused else []
    return WithSlices(named, slices, notes)


def typical_of(items: Sequence[Row]) -> list[Row]:
    """The items of a golden set that stand for the data as they come: all of them where no slices were added."""
    names = {item.slice for item in items}
    if TYPICAL not in names or not names <= {TYPICAL, *(name.value for name in GoldenSlice)}:
        return list(items)
    return [item for item in items if item.slice == TYPICAL]


def family_of(row: Row) -> str:
    """The group that an item shares with what is made of it. No group of the data is likely to be called so."""
    return f"item {row.id}" if row.group is None else row.group


def changed_by_rule(row: Row) -> bool:
    """Whether an item is another one with typing errors, or one that leads astray."""
    return row.slice in (GoldenSlice.TYPED_NOISE.value, GoldenSlice.ADVERSARIAL.value) and "~" in row.id


def origin_problem(row: Row, items: Mapping[str, Row]) -> str | None:
    """What is wrong between an item that was made and its original; None if nothing is, or it was not made.

    Args:
        row: the item.
        items: all items by their ids.
    """
    if row.slice not in {name.value for name in MADE}:
        return None
    origin = items.get(row.id.rpartition("~")[0])
    if origin is None:
        return "is made from an item that is not in the set"
    if origin.target != row.target:
        return f"is made from {origin.id}, which has another answer"
    if row.group is None or origin.group != row.group:
        return f"is made from {origin.id}, and is not in its group"
    return None


def part_of(name: str | None, rows: Sequence[Row], available: int, wanted: int | None) -> Part:
    """A part of a golden set, counted."""
    families = Counter((row.group, 0) if row.group is not None else (None, index) for index, row in enumerate(rows))
    sizes = np.array([*families.values()], dtype=np.int64)
    effective = int(len(rows) ** 2 // (sizes**2).sum()) if len(rows) else 0
    return Part(name, available, wanted, len(rows), len(sizes), effective)


# -- drawn --------------------------------------------------------------------------------------------------------


def _fitting(pool: Pool, name: GoldenSlice) -> NDArray[np.bool_]:
    """Which rows fit a slice that is drawn; what counts as long, new or rare goes by all rows that differ."""
    table, kept = pool.table, pool.kept
    fits = np.zeros(len(table), dtype=np.bool_)
    match name:
        case GoldenSlice.NEWEST:
            timed = kept[table.times[kept] != NO_TIME]
            fits[timed[_upper_tail(table.times[timed])]] = True
        case GoldenSlice.LONG | GoldenSlice.SHORT:
            lengths = np.fromiter((len(text) for text in pool.reader.texts(kept)), dtype=np.int64, count=len(kept))
            fits[kept[_upper_tail(lengths if name is GoldenSlice.LONG else -lengths)]] = True
        case GoldenSlice.RARE_CLASS:
            counts = np.bincount(table.strata[kept], minlength=len(table.stratum_names))
            even = len(kept) / np.count_nonzero(counts)
            fits[kept[counts[table.strata[kept]] < even / 2]] = True
    return fits


def _upper_tail(values: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which values are in the upper tenth, ties with its least one included; none where that would be all."""
    if not len(values):
        return np.zeros(0, dtype=np.bool_)
    ordered = np.sort(values)
    least = ordered[min(len(ordered) - 1, int((1 - _TAIL) * len(ordered)))]
    return values >= least if least > ordered[0] else np.zeros(len(values), dtype=np.bool_)


def draw_positions(
    table: RowTable, at: NDArray[np.int64], hash_of: Callable[[int], str], count: int, minimum: int
) -> list[int]:
    """So many of some positions of the table, by stratum in proportion, rows of one group together.

    It takes what `draw` takes of `make_units`, and looks at units one by one, in their order, only until it has enough:
    of a million rows a few hundred are drawn.

    Args:
        table: the rows.
        at: positions to draw from.
        hash_of: the hash, in hex, that a row of a position is drawn by.
        count: how many are wanted.
        minimum: of each stratum at least so many (see `quotas`).
    """
    if not len(at):
        return []
    names = table.stratum_names
    counts = np.bincount(table.strata[at], minlength=len(names))
    wanted = quotas({name: int(number) for name, number in zip(names, counts, strict=True) if number}, count, minimum)
    groups = table.groups[at].astype(np.int64)
    alone = groups == NOTHING
    groups[alone] = groups.max(initial=0) + 1 + np.arange(np.count_nonzero(alone))
    members = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[members], prepend=-1))
    ends = np.append(starts[1:], len(members))
    orders = np.array(
        [
            sha256("".join(sorted(hash_of(int(at[index])) for index in members[start:end])).encode()).digest()
            for start, end in zip(starts, ends, strict=True)
        ],
        dtype="V32",
    )
    taken: list[int] = []
    room = Counter(wanted)
    for unit in np.argsort(orders.view(">u8").reshape(-1, 4)[:, 0], kind="stable"):
        rows = at[members[starts[unit] : ends[unit]]].tolist()
        of_unit = Counter(names[table.strata[row]] for row in rows)
        if all(room[name] >= number for name, number in of_unit.items()):
            room.subtract(of_unit)
            taken += sorted(rows, key=hash_of)
            if not room.total():
                break
    return taken


# -- made ---------------------------------------------------------------------------------------------------------


def _draw_local(
    could: Sequence[int], rows: Sequence[Row], strata: Sequence[str], name: GoldenSlice, count: int
) -> list[int]:
    """So many of some typical items, by stratum in proportion."""
    hashes = [_salted(name, content_hash(row)) for row in rows]
    units = make_units([[index] for index in range(len(rows))], hashes, strata)
    taken, _ = draw(units, quotas(Counter(strata), count, 1))
    return [could[index] for unit in taken for index in unit.members]


def _salted_position(table: RowTable, name: GoldenSlice, position: int) -> str:
    return _salted(name, table.content_hash(position))


def _salted(name: GoldenSlice, digest: str) -> str:
    """Each slice draws for itself, and is changed for itself."""
    return sha256(f"{name.value} {digest}".encode()).hexdigest()


class Paraphrase(NamedTuple):
    """An input said in other words, and whether a model said it."""

    text: str
    synthetic: bool = False


class _Change(Protocol):
    """Changes an item's text; None where it cannot be. A `dry` call only asks, and uses nothing up."""

    def __call__(self, row: Row, *, dry: bool) -> Paraphrase | None: ...


def _changer(
    name: GoldenSlice, spec: RetrainSpec, pool: Pool, free: NDArray[np.bool_], said: Mapping[str, Paraphrase]
) -> _Change:
    def fits(row: Row, text: str) -> bool:
        """Nothing that the data could not have had."""
        length = sum(len(message.text) for message in row.messages) - len(last_user_turn(row)) + len(text)
        return length <= spec.data.max_characters

    def mistype(row: Row, *, dry: bool) -> Paraphrase | None:
        in_text = spec.task.kind in (TaskKind.EXTRACT, TaskKind.CALL)  # the answer repeats words of the input
        protected = _words_in(row.target) if in_text else frozenset()
        text = type_badly(last_user_turn(row), _salted(name, content_hash(row)), protected)
        return Paraphrase(text) if text is not None and fits(row, text) else None

    def say(row: Row, *, dry: bool) -> Paraphrase | None:
        return said.get(row.id)

    donors = _Donors(pool, free)
    quoted: set[int] = set()

    def lead_astray(row: Row, *, dry: bool) -> Paraphrase | None:
        def left() -> Iterator[tuple[int, Donor]]:
            return iter(()) if dry else islice((one for one in donors if one[0] not in quoted), _DONORS_TRIED)

        key = _salted(name, content_hash(row))
        found = mislead(last_user_turn(row), row.target, spec.task.labels, key, left)
        if found is None or not fits(row, found.text):
            return None
        if found.donor is not None:
            quoted.add(found.donor)
        return Paraphrase(found.text)

    match name:
        case GoldenSlice.TYPED_NOISE:
            return mistype
        case GoldenSlice.PARAPHRASE:
            return say
        case _:
            return lead_astray


class _Donors:
    """Rows outside of the golden set, read when they are first asked for and then kept.

    A sentence of one golden item in another would tie the two together; so it is taken from outside, each donor once.
    Where it is long enough to count as a leak, curate finds the donor and keeps it out of training.
    """

    def __init__(self, pool: Pool, free: NDArray[np.bool_]) -> None:
        self._pool = pool
        self._left = iter(np.flatnonzero(free).tolist())  # in the order of the content's hashes
        self._read: list[tuple[int, Donor]] = []

    def __iter__(self) -> Iterator[tuple[int, Donor]]:
        yield from self._read
        for position in self._left:
            table = self._pool.table
            text = self._pool.reader.row(position).text
            self._read.append((position, Donor(table.stratum_names[table.strata[position]], text)))
            yield self._read[-1]


def _made_from(row: Row, changed: Paraphrase, name: GoldenSlice) -> Row:
    turn = _last_user(row)
    messages = list(row.messages)
    messages[turn] = messages[turn]._replace(content=changed.text)
    return replace(
        row,
        id=f"{row.id}~{MADE[name]}",
        messages=tuple(messages),
        group=family_of(row),
        slice=name.value,
        synthetic=changed.synthetic,
    )


def _last_user(row: Row) -> int:
    """The turn that is changed: the last one of the user."""
    turns = [index for index, message in enumerate(row.messages) if message.role == "user"]
    return turns[-1] if turns else len(row.messages) - 1


def last_user_turn(row: Row) -> str:
    """The text that is changed to make another item of this one."""
    return row.messages[_last_user(row)].content


def _words_in(target: str) -> frozenset[str]:
    """The words of an answer, case folded: where they stand in the input, they are what is to be found."""
    return frozenset(_WORD.findall(target.casefold()))


def read_paraphrases(path: Path) -> dict[str, Paraphrase]:
    """Paraphrases by the id of the item that they are of: lines of {id, text}, with `"synthetic": true` for a model's.

    Raises:
        DataError: the file cannot be read, or a line is no such record or repeats an id; names the line.
    """
    found: dict[str, Paraphrase] = {}
    number = 1
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                key, paraphrase = _paraphrase(json.loads(line))
                if key in found:
                    raise ValueError(f"it is the second one of the item {key!r}")
                found[key] = paraphrase
                number += 1
    except OSError as error:
        raise DataError(
            f"The paraphrases cannot be read: {error.strerror or error}.", where=str(path), fix="check the path"
        ) from error
    except ValueError as error:  # no UTF-8 and no JSON, too
        raise DataError(
            f"A line is no paraphrase: {error}.",
            where=f"{path}:{number}",
            fix='write one line of JSON an item: {"id": "…", "text": "…"}',
        ) from error
    return found


def _paraphrase(record: Any) -> tuple[str, Paraphrase]:
    if not isinstance(record, dict):
        raise ValueError("it is no JSON object")
    key, text, synthetic = record.get("id"), record.get("text"), record.get("synthetic", False)
    if not isinstance(key, str) or not isinstance(text, str) or not text.strip():
        raise ValueError("`id` and `text` have to be texts that are not blank")
    if not isinstance(synthetic, bool):
        raise ValueError("`synthetic` has to be true or false")
    return key, Paraphrase(text, synthetic)


def _read_paraphrases_of(items: Sequence[Row], spec: RetrainSpec) -> dict[str, Paraphrase]:
    """The paraphrases, if any are asked for; each of one of the items says it in other words, and not at length.

    Raises:
        DataError: the file cannot be used, or one is a copy or too long; names the item.
    """
    if spec.golden.paraphrases is None or GoldenSlice.PARAPHRASE not in spec.golden.slices:
        return {}
    said = read_paraphrases(Path(spec.golden.paraphrases))
    scan = RowChecks(spec.task, spec.data).masked
    if scan is not None:  # as the rows of the data were
        said = {key: one._replace(text=mask_text(one.text, scan)) for key, one in said.items()}
    for row in items:
        found = said.get(row.id)
        if found is None:
            continue
        where = f"{spec.golden.paraphrases}, id {row.id}"
        if normalise(found.text) == normalise(last_user_turn(row)):
            raise DataError(
                "A paraphrase is a copy of its original.", where=where, fix="say it in other words, or delete the line"
            )
        if len(found.text) > spec.data.max_characters:
            raise DataError(
                f"A paraphrase has {len(found.text):,} characters, the limit is {spec.data.max_characters:,}.",
                where=where,
                fix="shorten it, or raise `data.max_characters`",
            )
    return said
