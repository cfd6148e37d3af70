"""From what people said to training rows, candidates for the golden set, and a record of every review.

All three files are made anew from all reviews that are known, so they do not depend on how many runs it took; a review
that the queue has forgotten is known from the record.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from tasks.contracts.errors import StoreError
from tasks.contracts.review import (
    REVIEWS_FILE,
    Review,
    Reviewed,
    ReviewItem,
    ReviewOutcome,
    ReviewRecord,
    ReviewResult,
    ReviewSpec,
)
from tasks.contracts.spec import DataSpec, TaskKind, TaskSpec
from tasks.serving.durable import write_durably
from tasks.serving.review.answers import Answer, read_said

_INSTRUCTS = ("system", "developer")
_USED = (ReviewOutcome.ROW, ReviewOutcome.GOLDEN)


class Written(NamedTuple):
    """The files of reviews, and what is new in them.

    Attributes:
        records: of all reviews, in the order of their requests.
        new: rows and candidates that were not there before.
    """

    records: tuple[ReviewRecord, ...]
    new: int

    def count(self, outcome: ReviewOutcome) -> int:
        """How many have become this."""
        return sum(record.outcome is outcome for record in self.records)

    @property
    def agreement(self) -> float | None:
        """Share of the answers that people left as the model gave them, of those on which people agree."""
        judged = [record.correct for record in self.records if record.correct is not None]
        return sum(judged) / len(judged) if judged else None

    def result(self, *, sent: int, waiting: int, page: str, trouble: str) -> ReviewResult:
        """What a run has done that wrote these."""
        return ReviewResult(
            sent=sent, waiting=waiting, rows=self.count(ReviewOutcome.ROW), candidates=self.count(ReviewOutcome.GOLDEN),
            disputed=self.count(ReviewOutcome.DISPUTED), declined=self.count(ReviewOutcome.DECLINED),
            unusable=self.count(ReviewOutcome.UNUSABLE), agreement=self.agreement, new=self.new, page=page,
            trouble=trouble,
        )  # fmt: skip


def write_reviews(reviews: Iterable[Review], spec: ReviewSpec) -> Written:
    """Write rows, candidates and the record of all reviews; each file is the old one or all of the new one.

    Args:
        reviews: all that the queue has; they win over what was known of the same items.
        spec: files, columns, and how many have to agree.

    Raises:
        StoreError: a file cannot be read or written.
    """
    paths = [Path(spec.rows), Path(spec.golden_candidates), Path(spec.rows).with_name(REVIEWS_FILE)]
    before = read_records(paths[2])
    known = {record.item: record.review for record in before}
    known |= {review.item.id: review for review in reviews}
    records = judge_reviews(known.values(), spec)
    used = {record.item for record in before if record.outcome in _USED}
    rows = (row_of(record, spec) for record in records if record.outcome is ReviewOutcome.ROW)
    candidates = (row_of(record, spec) for record in records if record.outcome is ReviewOutcome.GOLDEN)
    # Rows go first: what has become a candidate must be gone from training before it is one.
    _write(paths[0], (json.dumps(row, ensure_ascii=False) for row in rows))
    _write(paths[1], (json.dumps(row, ensure_ascii=False) for row in candidates))
    _write(paths[2], (record.model_dump_json() for record in records))
    return Written(records, sum(record.outcome in _USED and record.item not in used for record in records))


def read_records(path: Path) -> tuple[ReviewRecord, ...]:
    """The record of reviews (`reviews.jsonl`); empty where there is none yet.

    Raises:
        StoreError: it cannot be read, or a line of it is none of a record.
    """
    fix = "mend the file, or move it away: reviews that the queue still has are written anew"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return ()
    except (OSError, ValueError) as error:
        raise StoreError(f"The record of reviews cannot be read: {error}", where=str(path), fix=fix) from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(ReviewRecord.model_validate_json(line))
        except ValidationError as error:
            raise StoreError(
                f"A line is no record of a review: {error.error_count()} fields do not fit.",
                where=f"{path}:{number}",
                fix=fix,
            ) from error
    return tuple(records)


def judge_reviews(reviews: Iterable[Review], spec: ReviewSpec) -> tuple[ReviewRecord, ...]:
    """What becomes of each review, in the order of their requests.

    An answer is right if the share `min_agreement` of those who answered says so. Anybody's wish to have an item in the
    golden set keeps it, and every item that asks the same, out of the rows.
    """
    found = sorted((judge_review(review, spec) for review in reviews), key=lambda one: (one.at, one.item))
    asked = {_asks(record.review.item) for record in found if any(said.golden for said in record.review.said)}
    records = []
    for record in found:
        if record.outcome is ReviewOutcome.ROW and _asks(record.review.item) in asked:
            why = "a candidate for the golden set asks the same"
            record = record.model_copy(update={"outcome": ReviewOutcome.GOLDEN_TEXT, "why": why})
        records.append(record)
    return tuple(records)


def judge_review(review: Review, spec: ReviewSpec) -> ReviewRecord:
    """What becomes of one review by itself."""
    item, task = review.item, spec.task
    said = _last_words(review.said)
    votes = Counter(read_said(one.answer, task) for one in said if one.answer is not None)
    voters = votes.total()
    first, count = max(votes.items(), key=lambda vote: (vote[1], vote[0].text)) if votes else (None, 0)
    agreed = first is not None and count / voters >= spec.min_agreement
    right = first if agreed else None
    outcome, why = _outcome(item, said, votes, right, task)
    usable = right is not None and right.problem is None
    return ReviewRecord(
        item=item.id, name=item.name, version=item.version, at=item.at,
        reviewed_at=max((one.at for one in said), default=None), reason=item.reason, answer=item.answer,
        right=right.text if right is not None and usable else None,
        correct=read_said(item.answer, task).text == right.text if right is not None and usable else None,
        agreement=count / voters if voters else None,
        annotators=tuple(one.annotator for one in said if one.answer is not None),
        outcome=outcome, why=why, review=review,
    )  # fmt: skip


def row_of(record: ReviewRecord, spec: ReviewSpec) -> dict[str, Any]:
    """A training row in the columns of the task's data, without the instruction, which every row is asked with.

    The input is the text of the one user turn; of a longer conversation, all of its turns.
    """
    data, item = spec.data, record.review.item
    turns = _turns(item)
    target = str(record.right)
    row: dict[str, Any] = {}
    if data.id_field is not None:
        row[data.id_field] = f"review-{item.id}"
    if data.messages_field is not None:
        row[data.messages_field] = [*turns, {"role": "assistant", "content": target}]
    else:
        alone = len(turns) == 1 and turns[0]["role"] == "user"
        row[str(data.text_field)] = turns[0]["content"] if alone else turns
        row[str(data.target_field)] = json.loads(target) if spec.task.kind is TaskKind.EXTRACT else target
    agreeing = [one.annotator for one in _last_words(record.review.said) if _says(one, target, spec.task)]
    row |= _also(data, source=f"review:{','.join(sorted(agreeing))}", time=item.at.isoformat())
    return row


def _also(data: DataSpec, *, source: str, time: str) -> dict[str, str]:
    columns = {data.source_field: source, data.time_field: time}
    return {column: value for column, value in columns.items() if column is not None}


def _says(said: Reviewed, target: str, task: TaskSpec) -> bool:
    return said.answer is not None and read_said(said.answer, task).text == target


def _last_words(said: Sequence[Reviewed]) -> list[Reviewed]:
    """What each one said last, by annotator."""
    last: dict[str, Reviewed] = {}
    for one in sorted(said, key=lambda word: word.at):
        last[one.annotator] = one
    return [last[name] for name in sorted(last)]


def _outcome(
    item: ReviewItem, said: Sequence[Reviewed], votes: Mapping[Answer, int], right: Answer | None, task: TaskSpec
) -> tuple[ReviewOutcome, str]:
    if not votes:
        return ReviewOutcome.DECLINED, "nobody gave an answer"
    if right is None:
        listed = ", ".join(f"{count} × {answer.text[:80]}" for answer, count in sorted(votes.items()))
        return ReviewOutcome.DISPUTED, listed
    problem = right.problem or _no_row(item)
    if problem is not None:
        return ReviewOutcome.UNUSABLE, problem
    return (ReviewOutcome.GOLDEN if any(one.golden for one in said) else ReviewOutcome.ROW), ""


def _no_row(item: ReviewItem) -> str | None:
    """Why no row can be made of a request; None where one can."""
    turns = _turns(item)
    if not turns or turns[-1]["role"] != "user":
        return "the request does not end with a user's turn"
    if not all(isinstance(turn["content"], str) for turn in turns):
        return "the request holds more than text"
    return None


def _turns(item: ReviewItem) -> list[dict[str, Any]]:
    """The request's turns as rows have them: role and text, parts of text joined."""
    turns = []
    for message in item.messages:
        role = "system" if message.get("role") in _INSTRUCTS else message.get("role")
        more = {name: message[name] for name in ("tool_calls", "tool_call_id", "name") if message.get(name)}
        content = message.get("content")
        turns.append({"role": role, "content": "" if content is None and more else _text(content), **more})
    return turns


def _text(content: Any) -> Any:
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        return "\n".join(str(part.get("text", "")) for part in content)
    return content


def _asks(item: ReviewItem) -> str:
    """What an item asks, so that the same question is the same text."""
    return " ".join(json.dumps(_turns(item), ensure_ascii=False, sort_keys=True, default=str).casefold().split())


def _write(path: Path, lines: Iterable[str]) -> None:
    """Replace a file, unless it is what it is to be already: an untouched file keeps its time of change."""
    text = "".join(f"{line}\n" for line in lines)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_bytes() != text.encode():
            write_durably(path, text)
    except OSError as error:
        raise StoreError(
            f"What people said cannot be written: {error.strerror or error}",
            where=str(path),
            fix="free space or allow writing there; nothing is lost, the queue has it",
        ) from error
