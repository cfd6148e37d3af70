"""What an example has to pass: its form, its own teacher's second thoughts, its ground, and being new."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from referencing import Registry

from tasks.contracts.rows import canonical_json
from tasks.contracts.spec import TaskKind, TaskSpec
from tasks.data.facts import schema_check
from tasks.data.similar import (
    NGRAM_WORDS,
    Banding,
    Clusters,
    Shingles,
    WordHasher,
    identity_of,
    join_near_duplicates,
    long_runs,
    most_similar,
    normalise,
    sketch_texts,
)
from tasks.data.synthesis.prompts import answer_schema, example_schema, no_teacher

VOTES = 3
AGREE = 2
# Word F1, as in SQuAD (arXiv:1606.05250, 6.1), from which two free answers count as the same. Measured by nobody here:
# a half lets through answers that share little but small words.
SAME_ANSWER = 0.6

_FENCE = re.compile(r"^```[a-z]*\s*\n(.*?)\n?```\s*$", re.DOTALL)
_THOUGHTS = re.compile(r"^\s*<think>.*?</think>", re.DOTALL)
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_BATCH = 2_000  # old texts that are compared at a time
_SHORT = 200  # characters of a value in a reason


class Example(NamedTuple):
    """What a teacher wrote: an input, its answer as a row's target, and for chat from a document the quote."""

    text: str
    target: str
    quote: str | None = None


class Refusal(NamedTuple):
    """Why an example is left out.

    Attributes:
        reason: a code to count by.
        detail: what is wrong with this one, for whoever reads the quarantine.
        hint: what the teacher is told; it holds nothing of any other row.
    """

    reason: str
    detail: str
    hint: str


class Parsed(NamedTuple):
    """An example, or why there is none; `lenient` if the answer had to be searched for it."""

    example: Example | Refusal
    lenient: bool


# -- schema -------------------------------------------------------------------------------------------------------


class Reader:
    """Reads what a teacher wrote, for one task."""

    def __init__(self, task: TaskSpec, *, from_document: bool, longest: int) -> None:
        """Prepare.

        Args:
            task: the narrow task.
            from_document: whether examples are taken from documents.
            longest: of an input, in characters.

        Raises:
            SpecError: the task's JSON Schema cannot be used.
        """
        self._task = task
        self._longest = longest
        self._problem = schema_check(task)
        self._example = _validator(example_schema(task, from_document=from_document))
        self._answer = _validator(answer_schema(task))

    def example(self, content: str, finish: str, label: str | None) -> Parsed:
        """The example in an answer; `label` is the target of a classify example."""
        value, lenient = find_object(content)
        if value is None:
            cut = "it was cut off at `teacher.max_tokens`" if finish == "length" else "it holds no JSON object"
            return Parsed(_schema(cut), lenient)
        worst = best_match(self._example.iter_errors(value))
        if worst is not None:
            return Parsed(_schema(f"{worst.message[:_SHORT]} (at {worst.json_path})"), lenient)
        if _SURROGATE.search(json.dumps(value, ensure_ascii=False)):
            return Parsed(_schema("half a surrogate pair, which UTF-8 cannot write"), lenient)
        text = str(value["text"])
        if not text.strip():
            return Parsed(_schema("its text is white space"), lenient)
        if len(text) > self._longest:
            return Parsed(_schema(f"its text has {len(text):,} characters, more than {self._longest:,}"), lenient)
        match self._task.kind:
            case TaskKind.CLASSIFY:
                return Parsed(Example(text, label or ""), lenient)
            case TaskKind.CHAT:
                if not value["answer"].strip():
                    return Parsed(_schema("its answer is white space"), lenient)
                return Parsed(Example(text, value["answer"], value.get("quote")), lenient)
            case TaskKind.EXTRACT:
                try:
                    target = canonical_json(value["answer"])
                except ValueError:
                    return Parsed(_schema("its answer holds NaN or Infinity, which JSON does not have"), lenient)
                problem = self._problem(target)
                return Parsed(_schema(problem) if problem is not None else Example(text, target), lenient)
            case TaskKind.CALL:
                raise no_teacher()

    def answer(self, content: str) -> str | None:
        """The answer to an example, written as a target; None if it is none."""
        value, _ = find_object(content)
        if self._task.kind is TaskKind.EXTRACT:
            if value is None or not self._answer.is_valid(value):
                return None
            try:
                return canonical_json(value)
            except ValueError:
                return None
        if value is not None:
            return str(value["answer"]) if self._answer.is_valid(value) else None
        bare = _THOUGHTS.sub("", content).strip()
        if self._task.kind is TaskKind.CLASSIFY:
            return bare if bare in self._task.labels else None
        return bare or None


def find_object(content: str) -> tuple[dict[str, Any] | None, bool]:
    """The JSON object of an answer, and whether it had to be searched for: in a fence, behind thoughts, among words."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        bare = _THOUGHTS.sub("", content).strip()
        fenced = _FENCE.match(bare)
        bare = fenced.group(1) if fenced is not None else bare
        start = bare.find("{")
        if start < 0:
            return None, True
        try:
            value, _ = json.JSONDecoder().raw_decode(bare, start)
        except (ValueError, RecursionError):
            return None, True
        return (value if isinstance(value, dict) else None), True
    return (value if isinstance(value, dict) else None), False


def _validator(schema: Mapping[str, Any]) -> Draft202012Validator:
    # An empty registry of its own, so that a `$ref` to an address is never fetched.
    return Draft202012Validator(schema, registry=Registry())


def _schema(problem: str) -> Refusal:
    return Refusal("schema", problem, f"it does not have the form that was asked for ({problem})")


# -- self-consistency ---------------------------------------------------------------------------------------------


def same_answer(one: str, other: str, task: TaskSpec) -> bool:
    """Whether two answers are the same: equal, or for chat of a word F1 of at least `SAME_ANSWER`."""
    if task.kind is not TaskKind.CHAT:
        return one == other
    return word_f1(one, other) >= SAME_ANSWER


def word_f1(one: str, other: str) -> float:
    """Harmonic mean of the shares of words that two texts have in common, in [0, 1] (SQuAD, arXiv:1606.05250, 6.1)."""
    left, right = (Counter(re.findall(r"\w+", normalise(text))) for text in (one, other))
    if not left or not right:
        return float(normalise(one) == normalise(other))
    return 2 * (left & right).total() / (left.total() + right.total())


def agreeing(votes: Sequence[str | None], target: str, task: TaskSpec) -> int:
    """How many votes agree with the target and with each other: the most of them that do."""
    found = [vote for vote in votes if vote is not None and same_answer(vote, target, task)]
    return max((sum(same_answer(one, other, task) for other in found) for one in found), default=0)


def consistency(votes: Sequence[str | None], target: str, task: TaskSpec) -> Refusal | None:
    """Why the teacher does not stand by its own answer; None if `AGREE` of its votes do."""
    if agreeing(votes, target, task) >= AGREE:
        return None
    said = ", ".join("no valid answer" if vote is None else repr(vote[:_SHORT]) for vote in votes)
    return Refusal(
        "inconsistent",
        f"asked again, the teacher answers {said}; the answer should be {target[:_SHORT]!r}",
        f"asked for the answer to it again, you gave {said} in place of {target[:_SHORT]!r}, so it is not clear",
    )


# -- duplicates ---------------------------------------------------------------------------------------------------


class Candidate(NamedTuple):
    """An example that is to be new.

    Attributes:
        name: what it is called where another one repeats it.
        text: all that a model is shown.
        key: the part of it that is new; the question alone, where a document stands before it. It is what is compared
            where texts are nearly, but not wholly the same.
        scope: keys are compared with those of the same scope: two documents can be asked the same question.
    """

    name: str
    text: str
    key: str
    scope: str = ""


Texts = Callable[[], Iterable[tuple[str, str]]]  # names and texts; read more than once, and none is kept


def find_repeats(
    new: Sequence[Candidate], earlier: Sequence[Candidate], golden: Texts, rows: Texts, threshold: float
) -> list[Refusal | None]:
    """Why each example is a repetition: of the golden set, of a real row, of one that was kept earlier, or of one
    before it; None if of none.

    Args:
        new: the examples.
        earlier: those that were kept before.
        golden: the golden set.
        rows: the real rows.
        threshold: Jaccard similarity of word 3-shingles, in (0, 1].
    """
    found = find_golden([one.text for one in new], golden, threshold)
    left = [place for place, refusal in enumerate(found) if refusal is None]

    def refuse(reason: str, detail: str, matches: Sequence[int | None], names: Sequence[str]) -> None:
        nonlocal left
        for place, position in zip(left, matches, strict=True):
            if position is not None:
                found[place] = Refusal(reason, f"{detail} {names[position]}", _SEEN)
        left = [place for place in left if found[place] is None]

    real = _Named(rows)
    same = equals_of([new[place].text for place in left], real.texts())
    refuse("exact_duplicate", "same text as row", same, real.names)
    near = near_duplicates_of([new[place].key for place in left], real.texts(), threshold)
    refuse("near_duplicate", "nearly the same text as row", near, real.names)

    before = len(earlier)
    others = [*earlier, *(new[place] for place in left)]
    same = first_equals([one.text for one in others])[before:]
    refuse("exact_duplicate", "same text as", same, [one.name for one in others])
    others = [*earlier, *(new[place] for place in left)]
    near = repeats_among([one.key for one in others], [one.scope for one in others], threshold)[before:]
    refuse("near_duplicate", "nearly the same text as", near, [one.name for one in others])
    return found


def find_golden(texts: Sequence[str], golden: Texts, threshold: float) -> list[Refusal | None]:
    """Which texts overlap the golden set, the strongest way first: same normalised text, nearly the same, or a run of
    `NGRAM_WORDS` words in common.
    """
    items = _Named(golden)
    ways = (
        ("golden_same_text", "same text as", equals_of(texts, items.texts())),
        ("golden_near_duplicate", "nearly the same text as", near_duplicates_of(texts, items.texts(), threshold)),
        ("golden_ngram", f"a run of {NGRAM_WORDS} words in common with", common_runs(texts, items.texts())),
    )
    found: list[Refusal | None] = [None] * len(texts)
    for reason, detail, matches in ways:
        for place, position in enumerate(matches):
            if position is not None and found[place] is None:
                found[place] = Refusal(reason, f"{detail} golden item {items.names[position]}", _SEEN)
    return found


# All that a teacher is told: which text it was could be a golden item's.
_SEEN = "there is one like it already, so say something else"


class _Named:
    """Texts that are read, and the name of each by its position."""

    def __init__(self, read: Texts) -> None:
        self._read = read
        self.names: list[str] = []

    def texts(self) -> Iterator[str]:
        self.names = []
        for name, text in self._read():
            self.names.append(name)
            yield text


def equals_of(texts_new: Sequence[str], texts_old: Iterable[str]) -> list[int | None]:
    """For each new text the position of the first old one with the same normalised text, or None."""
    wanted: dict[bytes, list[int]] = {}
    for place, text in enumerate(texts_new):
        wanted.setdefault(identity_of(normalise(text)), []).append(place)
    found: list[int | None] = [None] * len(texts_new)
    if not texts_new:
        return found
    for position, text in enumerate(texts_old):
        for place in wanted.pop(identity_of(normalise(text)), ()):
            found[place] = position
    return found


def first_equals(texts: Sequence[str]) -> list[int | None]:
    """For each text the first one before it with the same normalised text, or None."""
    first: dict[bytes, int] = {}
    places = [first.setdefault(identity_of(normalise(text)), place) for place, text in enumerate(texts)]
    return [None if other == place else other for place, other in enumerate(places)]


def near_duplicates_of(texts_new: Sequence[str], texts_old: Iterable[str], threshold: float) -> list[int | None]:
    """For each new text the position of an old one that it nearly repeats, or None.

    The old texts are looked up batch by batch, so memory grows with the new ones alone. Of several it is the most
    similar one of the first batch that has any.
    """
    banding = Banding.for_threshold(threshold)
    new = sketch_texts(texts_new, banding)
    shingles = Shingles.of(new)
    found: list[int | None] = [None] * len(texts_new)
    if not texts_new:
        return found
    rest, start = iter(texts_old), 0
    while batch := list(islice(rest, _BATCH)):
        old = sketch_texts(batch, banding)
        for place, match in most_similar(new, shingles, old, Shingles.of(old), banding).items():
            if found[place] is None:
                found[place] = start + match.position
        start += len(batch)
    return found


def repeats_among(texts: Sequence[str], scopes: Sequence[str], threshold: float) -> list[int | None]:
    """For each text the first one of its scope before it that it nearly repeats, whatever connects them, or None."""
    banding = Banding.for_threshold(threshold)
    members: dict[str, list[int]] = {}
    for place, scope in enumerate(scopes):
        members.setdefault(scope, []).append(place)
    found: list[int | None] = [None] * len(texts)
    for places in members.values():
        sketched = sketch_texts((texts[place] for place in places), banding)
        clusters = Clusters(len(places))
        join_near_duplicates(sketched, Shingles.of(sketched), banding, clusters)
        for at, place in enumerate(places):
            if clusters.root(at) != at:
                found[place] = places[clusters.root(at)]
    return found


def common_runs(texts_new: Sequence[str], texts_old: Iterable[str]) -> list[int | None]:
    """For each new text the position of the first old one that shares a run of `NGRAM_WORDS` words, or None."""
    hasher = WordHasher()
    wanted: dict[int, list[int]] = {}
    for place, text in enumerate(texts_new):
        for run in _runs(text, hasher):
            wanted.setdefault(run, []).append(place)
    found: list[int | None] = [None] * len(texts_new)
    for position, text in enumerate(texts_old):
        for run in _runs(text, hasher):
            for place in wanted.pop(run, ()):
                if found[place] is None:
                    found[place] = position
    return found


def _runs(text: str, hasher: WordHasher) -> list[int]:
    runs: list[int] = long_runs(np.array(hasher.hashes(normalise(text)), dtype=np.uint64)).tolist()
    return runs
