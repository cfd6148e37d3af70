"""The data report: what became of every row from the source to train and dev, why, and what the rows are like.

Texts in it are cut, and what is private in them is masked whatever the policy of the data says: a report goes to more
people than data do. `tasks.data.report_page` writes it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from tasks.contracts.errors import DataError
from tasks.contracts.references import CONTAMINATION_FILE, ContaminationReport
from tasks.contracts.rows import Row
from tasks.contracts.spec import PoisonPolicy, PrivatePolicy, RetrainSpec, SuspectPolicy
from tasks.data.changes import Changes
from tasks.data.rejected import Example, Rejected, Veil, read_rejected

_QUARANTINE, _NOTES = "quarantine.jsonl", "notes.jsonl"  # of a validation and of a curation
_EXAMPLES = 3  # rows that are shown of each reason
_CLUSTERS = 5  # clusters that are shown with a text
_SUSPECTS = 20
_KIND = re.compile(r"([\d,]+) ([^;]+?) at characters? ")


class Step(NamedTuple):
    """A step of the way: rows that it took away, and rows that were left then."""

    code: str
    removed: int
    left: int


class Reason(NamedTuple):
    """Why rows were rejected, or what was found in rows that go on, with the first of them."""

    code: str
    rows: int
    examples: tuple[Example, ...]


class ClassRow(NamedTuple):
    """Rows of a class at each stage; None for a stage that nothing is known of."""

    name: str
    valid: int | None
    kept: int | None
    train: int | None
    dev: int | None
    golden: int | None


class Spread(NamedTuple):
    """Lengths: the spread, and how many rows have up to so many units (more than the bar before)."""

    split: str
    unit: str
    min: float
    median: float
    p95: float
    max: float
    histogram: tuple[tuple[int, int], ...]


class Cluster(NamedTuple):
    """Rows of the same or nearly the same text: how many, the id of one, and its text where it is at hand."""

    rows: int
    first: str
    text: str


class Suspect(NamedTuple):
    """A row whose label is probably wrong, with the probability of either label."""

    line: int
    id: str
    given: str
    suggested: str
    p_given: float
    p_suggested: float
    text: str


class Trigger(NamedTuple):
    """A phrase that brings one label more often than chance does."""

    phrase: str
    label: str
    rows: int
    of_label: int
    expected: float
    p_value: float


class Named(NamedTuple):
    """A number with its name, and what is said of it."""

    name: str
    rows: int
    says: str = ""


class BalanceRow(NamedTuple):
    """What balancing made of a class: rows before, rows in the file, and how much one counts."""

    name: str
    rows: int
    rows_after: int
    weight: float


@dataclass(frozen=True)
class About:
    """What a report is about.

    Attributes:
        name: of the task.
        source: where the rows are from.
        kind: classify, extract or chat.
        read: rows of the source.
        max_invalid_share: share of quarantined rows above which a run stops.
        max_label_drift: distance of the label mix from the golden set's above which it does.
        not_looked_for: what was left out, a sentence each.
        refusal: why a stage refused; None for none.
        folders: what a folder holds to where it is.
    """

    name: str
    source: str
    kind: str
    read: int
    max_invalid_share: float
    max_label_drift: float
    not_looked_for: tuple[str, ...] = ()
    refusal: str | None = None
    folders: Mapping[str, str] | None = None


@dataclass(frozen=True)
class DataReport:
    """All that the page shows. Where a stage refused, what comes after it is empty.

    Attributes:
        about: what it is about.
        valid: rows that met every expectation.
        quarantined: rows that did not.
        steps: the way of the rows: what was read, the quarantine, then each reason of the curation.
        train: rows to train on, each once; `train_lines` as they stand in the file.
        dev: rows for early stopping and the choice of a prompt.
        rejected: reasons of the validation; a row can have several.
        removed: reasons of the curation; a row has one.
        told: what was found in rows that go on.
        private: rows by the kind of secret or personal data in them, where that was told of, or a reason to leave.
        masked: rows in which something was masked.
        classes: rows of each class by stage; of a task without classes empty.
        golden_items: items of the golden set; None without one.
        golden_found: rows of the splits, as they were written, in which one was found after all.
        drift: distance of the label mix from the golden set's; None without one.
        lengths: spreads.
        alike_in_meaning: pairs of texts that say the same in other words; None where that was not looked for.
        meaning_threshold: the cosine similarity from which they do.
        clusters: how many clusters of alike texts there are, their rows, how many of which size, and the largest.
        suspects: policy, number and note of what was found, and the first of them.
        triggers: policy of the poisoning, phrases, and sources that are unlike the others.
        balance: how it was balanced, and what that did.
        sources: rows that were kept by where they came from.
        synthetic: training rows that a model wrote; None where it is not known.
        risks: guards that object, what they found, and the reason to go on all the same.
        changes: against earlier data; None where there are none.
        since: when those were made.
    """

    about: About
    valid: int
    quarantined: int
    steps: tuple[Step, ...]
    train: int | None = None
    train_lines: int | None = None
    dev: int | None = None
    rejected: tuple[Reason, ...] = ()
    removed: tuple[Reason, ...] = ()
    told: tuple[Reason, ...] = ()
    private: tuple[Named, ...] = ()
    masked: int = 0
    classes: tuple[ClassRow, ...] = ()
    golden_items: int | None = None
    golden_found: int | None = None
    drift: float | None = None
    lengths: tuple[Spread, ...] = ()
    alike_in_meaning: int | None = None
    meaning_threshold: float | None = None
    clusters: int = 0
    clustered_rows: int = 0
    cluster_sizes: tuple[tuple[int, int], ...] = ()
    largest: tuple[Cluster, ...] = ()
    suspects: tuple[Suspect, ...] = ()
    suspects_found: int | None = None
    suspects_policy: str | None = None
    suspects_note: str | None = None
    triggers: tuple[Trigger, ...] = ()
    poisoning_policy: str | None = None
    odd_sources: tuple[Named, ...] = ()
    balance: str | None = None
    balanced: tuple[BalanceRow, ...] = ()
    sources: tuple[Named, ...] = ()
    synthetic: int | None = None
    risks: tuple[tuple[str, str, str], ...] = ()
    changes: Changes | None = None
    since: str | None = None

    def funnel(self) -> str:
        """The way of the rows in a line: "2,148 read → 500 train, 56 dev"."""
        if self.train is not None:
            return f"{self.about.read:,} read → {self.train:,} train, {self.dev:,} dev"
        return f"{self.about.read:,} read → {self.valid:,} valid, {self.quarantined:,} quarantined"

    def sum_of_rows(self) -> str:
        """The conservation of rows: "2,148 read = 1,592 rejected + 500 train + 56 dev"."""
        if self.train is None or self.dev is None:
            return f"{self.about.read:,} read = {self.quarantined:,} quarantined + {self.valid:,} valid"
        gone = self.about.read - self.train - self.dev
        return f"{self.about.read:,} read = {gone:,} rejected + {self.train:,} train + {self.dev:,} dev"

    def record(self) -> dict[str, Any]:
        """The report as plain JSON."""
        new = self.changes.sentence() if self.changes is not None else None
        return {"funnel": self.funnel(), "since_last": new, **_plain(asdict(self))}


def about_data(
    spec: RetrainSpec,
    read: int,
    *,
    tokens: bool,
    golden: bool,
    refusal: str | None = None,
    folders: Mapping[str, str] | None = None,
) -> About:
    """What a report on the data of a run is about, and what was not looked for.

    Args:
        spec: of the run.
        read: rows of the source.
        tokens: whether a base model said how long rows are.
        golden: whether there was a golden set to look for.
        refusal: why a stage refused.
        folders: what a folder holds to where it is.
    """
    off = [
        (not golden, "No golden set: whether rows overlap with it was not looked for."),
        (not tokens, "No base model: the length of rows in tokens was not checked."),
        (spec.data.secrets is PrivatePolicy.OFF, "Keys, tokens and passwords: not looked for (`data.secrets` is off)."),
        (spec.data.personal_data is PrivatePolicy.OFF, "Personal data: not looked for (`data.personal_data` is off)."),
        (spec.curate.suspects is SuspectPolicy.OFF, "Wrong labels: not looked for (`curate.suspects` is off)."),
        (spec.curate.poisoning is PoisonPolicy.OFF, "Planted rows: not looked for (`curate.poisoning` is off)."),
    ]
    return About(
        name=spec.name,
        source=spec.data.source,
        kind=spec.task.kind.value,
        read=read,
        max_invalid_share=spec.data.max_invalid_share,
        max_label_drift=spec.curate.max_label_drift,
        not_looked_for=tuple(said for is_off, said in off if is_off),
        refusal=refusal,
        folders=folders,
    )


# -- gathering ----------------------------------------------------------------------------------------------------


def gather(
    about: About,
    validation: Path,
    curation: Path | None,
    *,
    masked: int = 0,
    changes: Changes | None = None,
    since: str | None = None,
) -> DataReport:
    """Read what a report shows out of the folders of a validation and of a curation.

    Args:
        about: what it is about.
        validation: the folder of a validation; of one that refused, the folder that kept its quarantine.
        curation: the folder of a curation; None where there is none.
        masked: rows in which the validation masked something.
        changes: against earlier data.
        since: when those were made.

    Raises:
        DataError: the counts do not add up: rows in are not rows out and rows rejected.
    """
    veil = Veil()
    kinds: Counter[str] = Counter()

    def count_kinds(entry: Mapping[str, Any]) -> None:
        found = {
            _one(count, words)
            for code, text in zip(entry["checks"], entry["reasons"], strict=True)
            if code in ("secret", "personal_data")
            for count, words in _KIND.findall(text)
        }
        kinds.update(found)

    rejected = read_rejected(validation / _QUARANTINE, veil, _EXAMPLES, count_kinds)
    notes = validation / _NOTES
    told = read_rejected(notes, veil, _EXAMPLES, count_kinds) if notes.is_file() else Rejected(0, {}, {})
    valid = about.read - rejected.rows
    if valid < 0:
        raise _not_adding_up([f"{rejected.rows:,} rows are quarantined, and {about.read:,} were read"], validation)
    steps = [Step("read", 0, about.read), Step("quarantined", rejected.rows, valid)]
    report = DataReport(
        about=replace(
            about, source=veil.cover(about.source), refusal=about.refusal and _cover_lines(veil, about.refusal)
        ),
        valid=valid,
        quarantined=rejected.rows,
        steps=tuple(steps),
        rejected=_reasons(rejected),
        told=_reasons(told),
        private=tuple(Named(name, rows) for name, rows in kinds.most_common()),
        masked=masked,
        changes=changes,
        since=since,
    )
    return report if curation is None else _with_curation(report, curation, veil)


def _with_curation(report: DataReport, folder: Path, veil: Veil) -> DataReport:
    curated = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    wanted = {str(one["first"]) for one in curated["clusters"]["largest"][:_CLUSTERS]}
    texts: dict[str, str] = {}

    def find_text(entry: Mapping[str, Any]) -> None:
        if entry["id"] in wanted and entry["id"] not in texts and isinstance(entry["record"], dict):
            texts[entry["id"]] = veil.cover(Row.from_json(orjson.dumps(entry["record"])).text)

    removed = read_rejected(folder / _QUARANTINE, veil, _EXAMPLES, find_text)
    lines = {}
    for split in ("train", "dev"):
        found, lines[split] = _texts_of(folder / f"{split}.jsonl", wanted - texts.keys(), veil)
        texts |= found
    every_step = [Step(step["step"], step["removed"], step["left"]) for step in curated["funnel"][1:]]
    not_asked = _not_asked(curated)
    steps = [step for step in every_step if step.removed or not step.code.startswith(not_asked)]
    train, dev = curated["train"]["distinct_rows"], curated["dev"]["rows"]
    _check_sums(report, every_step, removed, curated, lines, folder)
    suspects, poisoning = curated.get("suspects") or {}, curated.get("poisoning") or {}
    golden, semantic = curated.get("golden"), curated.get("semantic") or {}
    synthetic = curated.get("synthetic")
    return replace(
        report,
        steps=(*report.steps, *steps),
        train=train,
        train_lines=curated["train"]["rows"],
        dev=dev,
        removed=_reasons(removed),
        classes=_classes(curated, veil),
        golden_items=golden["items"] if golden else None,
        golden_found=_found_again(folder) if golden else None,
        drift=curated["label_drift"] if golden else None,
        lengths=_lengths(curated.get("lengths") or {}),
        alike_in_meaning=semantic.get("pairs"),
        meaning_threshold=semantic.get("threshold"),
        clusters=curated["clusters"]["count"],
        clustered_rows=curated["clusters"]["rows"],
        cluster_sizes=tuple((int(size), count) for size, count in curated["clusters"]["sizes"].items()),
        largest=tuple(
            Cluster(one["rows"], veil.cover(str(one["first"]), 60), texts.get(str(one["first"]), ""))
            for one in curated["clusters"]["largest"][:_CLUSTERS]
        ),
        suspects=tuple(
            Suspect(
                one["line"], veil.cover(str(one["id"]), 60), veil.cover(one["given"], 60),
                veil.cover(one["suggested"], 60), one["p_given"], one["p_suggested"], veil.cover(one["text"]),
            )
            for one in suspects.get("top", [])[:_SUSPECTS]
        ),
        suspects_found=suspects.get("count"),
        suspects_policy=suspects.get("policy"),
        suspects_note=suspects.get("note"),
        triggers=tuple(
            Trigger(
                veil.cover(one["phrase"]), veil.cover(one["label"], 60), one["rows"], one["of_label"], one["expected"],
                one["p_value"],
            )
            for one in poisoning.get("triggers", [])
        ),
        poisoning_policy=poisoning.get("policy"),
        odd_sources=_named((one["source"], one["rows"], one["what"]) for one in poisoning.get("sources", [])),
        balance=curated["balance"]["by"],
        balanced=tuple(
            BalanceRow(veil.cover(name, 60), int(one["rows"]), int(one["rows_after"]), one["weight"])
            for name, one in curated["balance"]["classes"].items()
        ),
        sources=_named((veil.cover(name, 60), rows, "") for name, rows in (curated.get("sources") or {}).items()),
        synthetic=synthetic["rows"] if synthetic else None,
        risks=tuple((guard, one["found"], one["reason"]) for guard, one in curated["accepted_risks"].items()),
    )  # fmt: skip


def _not_asked(curated: Mapping[str, Any]) -> tuple[str, ...]:
    """How the codes of those reasons begin for which no row could leave."""
    no_model = curated.get("semantic") is None
    drops = (curated.get("suspects") or {}).get("policy") in (SuspectPolicy.DROP, SuspectPolicy.REVIEW)
    parts = (curated.get("poisoning") or {}).get("policy") in (PoisonPolicy.QUARANTINE, PoisonPolicy.STOP)
    asked = {
        "golden_": bool(curated.get("golden")),
        "golden_semantic": not no_model,
        "semantic_": not no_model,
        "suspect_": drops,
        "planted": parts,
        "over_": False,
    }
    return tuple(start for start, is_asked in asked.items() if not is_asked)


def _check_sums(
    report: DataReport,
    steps: Sequence[Step],
    removed: Rejected,
    curated: Mapping[str, Any],
    lines: Mapping[str, int],
    folder: Path,
) -> None:
    """Rows in are rows out and rows rejected, at every step and by every count of them; `lines` are those of files."""
    left = report.valid
    wrong = []
    taken_over = curated["funnel"][0]["left"]
    if taken_over != left:
        wrong.append(f"the curation took over {taken_over:,} rows, and {left:,} were valid")
        left = taken_over
    for step in steps:
        left -= step.removed
        if step.left != left:
            wrong.append(f"after {step.code} {step.left:,} rows are left, not {left:,}")
            left = step.left
    out = curated["train"]["distinct_rows"] + curated["dev"]["rows"]
    if out != left:
        wrong.append(f"train and dev have {out:,} rows, and {left:,} were left")
    for split, count in lines.items():
        if count != curated[split]["rows"]:
            wrong.append(f"{split}.jsonl has {count:,} lines, not {curated[split]['rows']:,}")
    counted = {step.code: step.removed for step in steps if step.removed}
    if counted != removed.reasons:
        wrong.append(f"the funnel removed {counted}, the quarantine holds {removed.reasons}")
    expected = {"valid": report.valid, "train": curated["train"]["distinct_rows"], "dev": curated["dev"]["rows"]}
    for stage, rows in expected.items():
        classes = (curated.get("classes") or {}).get(stage)
        if classes is not None and sum(classes.values()) != rows:
            wrong.append(f"the classes of {stage} have {sum(classes.values()):,} rows, and there are {rows:,}")
    if wrong:
        raise _not_adding_up(wrong, folder)


def _not_adding_up(wrong: Sequence[str], folder: Path) -> DataError:
    return DataError(
        f"The counts of the data do not add up: {'; '.join(wrong)}.",
        where=str(folder),
        fix="report it together with this message; these rows are not to be trusted until it is understood",
    )


def _found_again(folder: Path) -> int | None:
    """Rows that the last look through the splits found; None where no such look was taken."""
    path = folder / CONTAMINATION_FILE
    if not path.is_file():
        return None
    return sum(ContaminationReport.model_validate_json(path.read_text(encoding="utf-8")).found.values())


def _reasons(rejected: Rejected) -> tuple[Reason, ...]:
    return tuple(Reason(code, rows, tuple(rejected.examples[code])) for code, rows in rejected.reasons.items())


def _named(rows: Iterable[tuple[str, int, str]]) -> tuple[Named, ...]:
    return tuple(Named(*row) for row in rows)


def _one(count: str, words: str) -> str:
    """What was found once, as a name: "2 e-mail addresses" is an "e-mail address"."""
    return words if count == "1" else re.sub(r"(?<=address)es\b|(?<=[A-Za-rt-z])s\b", "", words)


def _cover_lines(veil: Veil, text: str) -> str:
    return "\n".join(veil.cover(line, 1_000) for line in text.splitlines())


def _texts_of(path: Path, wanted: set[str], veil: Veil) -> tuple[dict[str, str], int]:
    """Texts of the rows with these ids, of a file in which every line begins with the id; and how many lines it has."""
    starts = tuple(b'{"id":' + orjson.dumps(row_id) + b"," for row_id in sorted(wanted))
    found: dict[str, str] = {}
    count = 0
    with path.open("rb") as lines:
        for line in lines:
            count += 1
            if line.startswith(starts):
                row = Row.from_json(line)
                found[row.id] = veil.cover(row.text)
    return found, count


def _classes(curated: Mapping[str, Any], veil: Veil) -> tuple[ClassRow, ...]:
    known = dict(curated.get("classes") or {})
    known.setdefault("train", curated["train"]["strata"])
    known.setdefault("dev", curated["dev"]["strata"])
    if not curated.get("golden"):
        known.pop("golden", None)
    names = {name for counts in known.values() for name in counts}
    if names <= {""}:  # a task without classes
        return ()
    counted = {
        name: [known[stage].get(name, 0) if stage in known else None for stage in ClassRow._fields[1:]]
        for name in names
    }
    ordered = sorted(names, key=lambda name: (-(counted[name][0] or counted[name][2] or 0), name))
    return tuple(ClassRow(veil.cover(name, 60) or "(none)", *counted[name]) for name in ordered)


def _lengths(lengths: Mapping[str, Any]) -> tuple[Spread, ...]:
    return tuple(
        Spread(
            split, unit, one["min"], one["median"], one["p95"], one["max"],
            tuple((int(upto), int(count)) for upto, count in one["histogram"]),
        )
        for split, units in lengths.items()
        for unit, one in units.items()
        if one
    )  # fmt: skip


def _plain(value: Any) -> Any:
    """Named tuples as objects, since JSON would make lists of them."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value
