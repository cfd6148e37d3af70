"""Have a teacher write examples, and keep those that pass every filter.

    wishes ─► asked ─► schema ─► self-consistency ─► grounding ─► duplicates ─► synthetic.jsonl
                          └───────────┴──────┬───────────┴────────────┘
                                             └─► told why, asked once more ─► the same filters ─► or quarantine.jsonl

Memory grows with what is asked for, which is paid for, and not with the real rows, which are streamed.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from tasks.contracts.progress import Progress, ProgressListener, ignore_progress
from tasks.contracts.rows import Message, Row
from tasks.contracts.spec import TaskKind
from tasks.contracts.synthesis import (
    MANNERS,
    PROVENANCE_COLUMN,
    SOURCE_COLUMN,
    SYNTHETIC_COLUMN,
    Fill,
    SynthesizeSpec,
)
from tasks.data.synthesis.asker import Asker, Failed, Traffic, Unasked
from tasks.data.synthesis.documents import read_documents
from tasks.data.synthesis.filters import (
    AGREE,
    VOTES,
    Candidate,
    Example,
    Reader,
    Refusal,
    agreeing,
    consistency,
    find_repeats,
)
from tasks.data.synthesis.grounding import is_passage, ungrounded, unsupported
from tasks.data.synthesis.journal import Journal, Reply
from tasks.data.synthesis.prompts import (
    Wish,
    answer_schema,
    ask_again,
    ask_for_answer,
    ask_for_example,
    example_schema,
)
from tasks.data.synthesis.purse import Purse
from tasks.data.synthesis.report import build_report
from tasks.data.synthesis.shots import Pool, build_pool, plan_fills, wishes
from tasks.data.synthesis.teacher import Ask, Clock, Teacher
from tasks.store import canonical, digest_bytes

SYNTHETIC = "synthetic.jsonl"
QUARANTINE = "quarantine.jsonl"
REPORT = "report.json"

# Examples that are written before the first of them is checked. Asking goes wave by wave, so that a budget that ends
# in the middle leaves finished examples, and not unchecked ones alone. No knob: where a budget ends depends on it.
_WAVE = 64


class Synthesized(NamedTuple):
    """What came of it: rows kept, examples asked for, why asking ended early, and what this process asked."""

    rows: int
    asked: int
    stopped: str | None
    traffic: Traffic


@dataclass(slots=True)
class Draft:
    """An example on its way through the filters.

    Attributes:
        wish: what was asked for.
        fill: position of its fill; None for one from a document.
        round: from 1.
        ask: the question that it answers.
        refined: whether it is the second try at one that was refused.
        written: what the teacher wrote; None before, and if nothing came.
        example: what was read from it.
        step: the filter that refused it; "" while none has.
        refusal: why.
    """

    wish: Wish
    fill: int | None
    round: int
    ask: Ask
    refined: bool = False
    written: str | None = None
    example: Example | None = None
    step: str = ""
    refusal: Refusal | None = None

    def refuse(self, step: str, refusal: Refusal | None) -> None:
        """Take it out, if there is a reason to."""
        if refusal is not None:
            self.step, self.refusal = step, refusal


def write_examples(
    spec: SynthesizeSpec,
    rows: Callable[[], Iterator[Row]],
    golden: Callable[[], Iterator[Row]],
    folder: Path,
    scratch: Path,
    key: str | None = None,
    withheld: Container[str] = frozenset(),
    listener: ProgressListener = ignore_progress,
    clock: Clock | None = None,
) -> Synthesized:
    """Write `synthetic.jsonl`, `quarantine.jsonl` and `report.json`.

    The same specification, rows and answers give the same bytes, however often it was interrupted.

    Args:
        spec: what is wanted.
        rows: the real rows; called several times.
        golden: the golden set; called several times.
        folder: where to write.
        scratch: where the journal of paid answers lies, which outlives this process.
        key: the server's; kept nowhere.
        withheld: ids of real rows that no teacher is shown.
        listener: hears how many rows are there.
        clock: how waiting is done.

    Raises:
        ServiceError: the teacher fails; what was paid is kept in the journal.
        DataError: there are no documents, or no real rows to write like.
        SpecError: the task's JSON Schema or the address cannot be used.
        StoreError: the journal cannot be written, or another run writes it.
    """
    pool = build_pool(rows(), golden, spec, withheld)
    fills = plan_fills(pool, spec)
    with Journal(scratch, _run_of(spec)) as journal:
        purse = Purse(spec.budget, spec.price)
        writer = _Writer(spec, pool, fills, rows, golden, listener)

        async def work() -> Asker:
            async with Teacher(spec.teacher, key) as teacher:
                asker = Asker(teacher, journal, purse, spec.teacher, clock)
                await writer.run(asker, purse)
                writer.digests = [teacher.prepare(draft.ask).digest[:16] for draft in writer.drafts]
            return asker

        asker = asyncio.run(work())
    kept = [place for place, draft in enumerate(writer.drafts) if not draft.step]
    with (folder / SYNTHETIC).open("w", encoding="utf-8", newline="\n") as out:
        for place in kept:
            out.write(json.dumps(writer.record(place), ensure_ascii=False) + "\n")
    with (folder / QUARANTINE).open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as out:
        for place, draft in enumerate(writer.drafts):
            if draft.step:
                out.write(json.dumps(writer.refused(place), ensure_ascii=False) + "\n")
    report = build_report(spec, writer.drafts, fills, asker.stopped, purse.account(), writer.lenient, writer.skipped)
    (folder / REPORT).write_text(json.dumps(report, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return Synthesized(len(kept), len(writer.drafts), asker.stopped, asker.traffic)


def _run_of(spec: SynthesizeSpec) -> str:
    """What has to be the same for one run to go on from another, and to be charged for its losses."""
    said = spec.model_dump(mode="json", exclude={"execution": True, "budget": True, "price": True, "teacher": MANNERS})
    return digest_bytes(canonical(said).encode())


class _Writer:
    """The rounds of one specification."""

    def __init__(
        self,
        spec: SynthesizeSpec,
        pool: Pool,
        fills: Sequence[Fill],
        rows: Callable[[], Iterator[Row]],
        golden: Callable[[], Iterator[Row]],
        listener: ProgressListener,
    ) -> None:
        self._spec = spec
        self._task = spec.task
        self._pool = pool
        self._fills = fills
        self._rows = rows
        self._golden = golden
        self._listener = listener
        longest = spec.data.max_characters
        self._readers = {
            grounded: Reader(spec.task, from_document=grounded, longest=longest)
            for grounded in ([False, True] if spec.documents is not None else [False])
        }
        self._answer_schema = answer_schema(spec.task)
        self.drafts: list[Draft] = []
        self.digests: list[str] = []
        self.lenient = 0
        self.skipped = self._why_grounding_is_skipped()

    async def run(self, asker: Asker, purse: Purse) -> None:
        """Ask in rounds until nothing is missing, the rounds are over, or the budget is spent."""
        # Fills of the same kind go on from each other: the same number would be the same request.
        asked: Counter[tuple[str | None, ...]] = Counter()
        for number in range(1, self._spec.rounds + 1):
            wanted: list[Iterable[Draft]] = []
            for fill, missing in enumerate(self._missing()):
                one = self._fills[fill]
                like = (one.label, one.slice, one.looks_like)
                more = wishes(one, self._pool, self._task.kind, already=asked[like], count=missing)
                wanted.append(self._drafts(more, fill, number))
                asked[like] += missing
            if number == 1:
                wanted.append(self._drafts(self._document_wishes(), None, number))
            fresh = await self._pass(chain.from_iterable(wanted), asker, purse)
            if self._spec.refine and asker.stopped is None:
                again = [self._again(draft) for draft in fresh if draft.step and draft.written is not None]
                await self._pass(again, asker, purse)
            if asker.stopped is not None or not any(self._missing()):
                return

    def record(self, place: int) -> dict[str, Any]:
        """A kept example in the columns of the real data."""
        draft, data = self.drafts[place], self._spec.data
        assert draft.example is not None  # noqa: S101  it passed every filter
        text, target = self._input(draft), draft.example.target
        content = json.dumps([text, target], ensure_ascii=False)
        source = f"synthetic:{self._spec.teacher.model}"
        record: dict[str, Any] = {}
        if data.id_field is not None:
            record[data.id_field] = f"syn-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
        if data.messages_field is not None:
            turns = (Message("user", text), Message("assistant", target))
            record[data.messages_field] = [turn.as_chat() for turn in turns]
        else:
            record[str(data.text_field)] = text
            record[str(data.target_field)] = json.loads(target) if self._task.kind is TaskKind.EXTRACT else target
        document = draft.wish.document
        more = {
            data.label_field: draft.wish.label,
            data.slice_field: draft.wish.slice,
            data.group_field: None if document is None else document.id,
            data.source_field: source,
        }
        record |= {column: value for column, value in more.items() if column is not None and value is not None}
        record |= {SYNTHETIC_COLUMN: True, SOURCE_COLUMN: source, PROVENANCE_COLUMN: self._provenance(place)}
        return record

    def refused(self, place: int) -> dict[str, Any]:
        """A refused example, with the step that refused it and why."""
        draft = self.drafts[place]
        assert draft.refusal is not None  # noqa: S101
        return {
            "step": draft.step,
            "reason": draft.refusal.reason,
            "detail": draft.refusal.detail,
            "text": None if draft.example is None else draft.example.text,
            "target": None if draft.example is None else draft.example.target,
            "written": draft.written if draft.example is None else None,
            PROVENANCE_COLUMN: self._provenance(place),
        }

    # -- what is wanted ---------------------------------------------------------------------------------------

    def _missing(self) -> list[int]:
        """How many rows each fill still lacks."""
        kept = [0] * len(self._fills)
        for draft in self.drafts:
            if draft.fill is not None and not draft.step:
                kept[draft.fill] += 1
        return [max(0, fill.rows - count) for fill, count in zip(self._fills, kept, strict=True)]

    def _document_wishes(self) -> Iterator[Wish]:
        documents = self._spec.documents
        if documents is not None:
            for document in read_documents(documents):
                for number in range(1, documents.per_document + 1):
                    yield Wish(document=document, number=number)

    def _drafts(self, wanted: Iterable[Wish], fill: int | None, number: int) -> Iterator[Draft]:
        for wish in wanted:
            yield Draft(wish, fill, number, self._ask(ask_for_example(self._task, wish), wish))

    def _again(self, draft: Draft) -> Draft:
        assert draft.written is not None  # noqa: S101
        assert draft.refusal is not None  # noqa: S101
        messages = ask_again(draft.ask.messages, draft.written, draft.refusal.hint)
        return Draft(draft.wish, draft.fill, draft.round, self._ask(messages, draft.wish), refined=True)

    def _ask(self, messages: tuple[Message, ...], wish: Wish) -> Ask:
        schema = example_schema(self._task, from_document=wish.document is not None)
        return Ask(messages, schema, self._spec.teacher.temperature)

    # -- filters ----------------------------------------------------------------------------------------------

    async def _pass(self, wanted: Iterable[Draft], asker: Asker, purse: Purse) -> list[Draft]:
        """Have drafts written and put them through every filter; return those that were asked for."""
        rest = iter(wanted)
        fresh: list[Draft] = []
        while asker.stopped is None and (wave := self._wave(rest, asker, purse)):
            answers = await asker.answers([draft.ask for draft in wave])
            asked = []
            for draft, answer in zip(wave, answers, strict=True):
                if isinstance(answer, Unasked):
                    continue
                asked.append(draft)
                self._read(draft, answer)
            await self._check(asked, asker)
            fresh += asked
            self._say(fresh, purse)
        for draft in fresh:
            if not draft.step:
                draft.refuse("grounding", self._ground(draft))
        before = len(self.drafts)
        self.drafts += fresh
        there = [(place, draft) for place, draft in enumerate(self.drafts) if not draft.step]
        repeats = find_repeats(
            [self._candidate(place, draft) for place, draft in there if place >= before],
            [self._candidate(place, draft) for place, draft in there if place < before],
            lambda: _named(self._golden()),
            lambda: _named(self._rows()),
            self._spec.near_duplicate,
        )
        for (_, draft), repeat in zip((one for one in there if one[0] >= before), repeats, strict=True):
            draft.refuse("duplicates", repeat)
        self._say([], purse)
        return fresh

    def _wave(self, rest: Iterator[Draft], asker: Asker, purse: Purse) -> list[Draft]:
        """The next drafts: as many as the budget is sure to finish, but one at least and `_WAVE` at most."""
        first = next(rest, None)
        if first is None:
            return []
        sure = purse.room(asker.most(first.ask).times(1 + VOTES), _WAVE)
        return [first, *islice(rest, max(0, sure - 1))]

    def _read(self, draft: Draft, answer: Reply | Failed) -> None:
        if isinstance(answer, Failed):
            draft.refuse("answer", Refusal("no_answer", answer.reason, ""))
            return
        draft.written = answer.content
        reader = self._readers[draft.wish.document is not None]
        parsed = reader.example(answer.content, answer.finish, draft.wish.label)
        self.lenient += parsed.lenient and isinstance(parsed.example, Example)
        if isinstance(parsed.example, Refusal):
            draft.refuse("schema", parsed.example)
        else:
            draft.example = parsed.example

    async def _check(self, drafts: Sequence[Draft], asker: Asker) -> None:
        """Ask the teacher for the answers to its own inputs; the last vote only where it can still decide."""
        left = [draft for draft in drafts if not draft.step]
        votes: list[list[str | None]] = [[] for _ in left]
        open_ = list(range(len(left)))
        for first, last in ((0, AGREE), (AGREE, VOTES)):
            places = [(place, draw) for place in open_ for draw in range(first, last)]
            answers = await asker.answers([self._vote(left[place], draw) for place, draw in places])
            for (place, _), answer in zip(places, answers, strict=True):
                if isinstance(answer, Unasked):
                    refusal = Refusal("budget", f"not checked, since {answer.reason}", "")
                    left[place].refuse("self_consistency", refusal)
                else:
                    reader = self._readers[left[place].wish.document is not None]
                    votes[place].append(reader.answer(answer.content) if isinstance(answer, Reply) else None)
            agreed = {place: self._agreeing(left[place], votes[place]) for place in open_ if not left[place].step}
            open_ = [place for place, count in agreed.items() if count < AGREE <= count + VOTES - last]
        for draft, given in zip(left, votes, strict=True):
            if not draft.step and draft.example is not None:
                draft.refuse("self_consistency", consistency(given, draft.example.target, self._task))

    def _vote(self, draft: Draft, draw: int) -> Ask:
        assert draft.example is not None  # noqa: S101
        document = draft.wish.document
        # A passage that was copied is the whole input; a question needs the document that it is about.
        shown = document.text if document is not None and self._task.kind is TaskKind.CHAT else None
        messages = ask_for_answer(self._task, draft.example.text, shown)
        return Ask(messages, self._answer_schema, self._spec.teacher.check_temperature, draw)

    def _agreeing(self, draft: Draft, votes: Sequence[str | None]) -> int:
        assert draft.example is not None  # noqa: S101
        return agreeing(votes, draft.example.target, self._task)

    def _ground(self, draft: Draft) -> Refusal | None:
        """Why the answer is not taken from where it should be; None if it is, or where there is nothing to see."""
        example, document = draft.example, draft.wish.document
        if example is None or self._task.kind is TaskKind.CLASSIFY:
            return None
        if self._task.kind is TaskKind.CHAT:
            if document is None:
                return None
            problem = unsupported(example.target, example.quote or "", document.text)
            return None if problem is None else Refusal("not_in_document", problem, f"of your example, {problem}")
        if document is not None and not is_passage(example.text, document.text):
            problem = "its text is no passage of the document"
            return Refusal("not_in_document", problem, problem)
        problem = ungrounded(example.target, example.text, self._task.json_schema or {})
        return None if problem is None else Refusal("not_in_text", problem, f"of your answer, {problem}")

    def _why_grounding_is_skipped(self) -> str | None:
        if self._task.kind is TaskKind.CLASSIFY:
            return "the answer to a classify example is a label, which stands in no text"
        if self._task.kind is TaskKind.CHAT and self._fills:
            return "examples that are written like real ones (fill) have no document" + (
                "; those from documents were looked at" if self._spec.documents is not None else ""
            )
        return None

    # -- rows -------------------------------------------------------------------------------------------------

    def _input(self, draft: Draft) -> str:
        """What a model is shown."""
        assert draft.example is not None  # noqa: S101
        document, documents = draft.wish.document, self._spec.documents
        if document is None or documents is None or self._task.kind is not TaskKind.CHAT or not documents.in_input:
            return draft.example.text
        return f"{document.text}\n\n{draft.example.text}"

    def _candidate(self, place: int, draft: Draft) -> Candidate:
        assert draft.example is not None  # noqa: S101
        text, key, document = self._input(draft), draft.example.text, draft.wish.document
        scope = "" if text == key or document is None else f"{document.id} {document.part}"
        return Candidate(f"example {place + 1}", text, key, scope)

    def _provenance(self, place: int) -> dict[str, Any]:
        draft = self.drafts[place]
        wish, document = draft.wish, draft.wish.document
        said = {
            "request": self.digests[place],
            "round": draft.round,
            "refined": draft.refined or None,
            "label": wish.label,
            "slice": wish.slice,
            "looks_like": wish.looks_like,
            "shots": [row.id for row in (*wish.shots, *wish.decoys)] or None,
            "document": None if document is None else document.id,
            "part": None if document is None else document.part,
            "quote": None if draft.example is None else draft.example.quote,
        }
        return {name: value for name, value in said.items() if value is not None}

    def _say(self, fresh: Sequence[Draft], purse: Purse) -> None:
        drafts = [*self.drafts, *fresh]
        there = sum(not draft.step for draft in drafts)
        wanted = sum(fill.rows for fill in self._fills)
        spent = purse.account()
        cost = f"{spent.prompt_tokens + spent.completion_tokens:,} tokens"
        if spent.money is not None:
            cost += f", {spent.money:.2f} {spent.currency}"
        self._listener(Progress(there, max(there, wanted), "rows", f"{len(drafts):,} asked, {cost}"))


def _named(rows: Iterable[Row]) -> Iterator[tuple[str, str]]:
    return ((row.id, row.text) for row in rows)
