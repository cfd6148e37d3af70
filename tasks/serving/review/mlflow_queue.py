"""Review in MLflow: each item is a trace in a review queue of its server, each answer an assessment of it.

The page writes what a person chooses as an assessment in that person's name and sets the item's status. It shows a
person what they have said before; so the model's answer is put there first, marked as filled in, and such a mark is
never taken for an answer. Whoever changes nothing and saves has confirmed it.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Any, NamedTuple, Self

from tasks.contracts.errors import ServiceError
from tasks.contracts.review import Review, Reviewed, ReviewItem, ReviewSpec
from tasks.contracts.spec import TaskKind
from tasks.tracking import connect, tracking_uri, without_password
from tasks.tracking.runs import ensure_experiment

ANSWER = "answer"  # names of the questions, and so of the assessments
GOLDEN = "candidate for the golden set"
ITEM_TAG = "goldgate.review.item"
FILLED_IN = "goldgate.review.filled_in"  # in the metadata of an assessment

_ITEM = "goldgate.review"  # attribute of the span: the whole item
_NOBODY = "default"  # who opens the page of a server without accounts
_MOST_CHOICES, _LONGEST_CHOICE = 10, 64  # of a question with choices; more of them are asked as a text
_LONGEST_INSTRUCTION = 1000
_PAGE = 500
_TRACES = 50  # read at once
_PREVIEW = 1000


class _Queue(NamedTuple):
    """One queue there, and whose it is; nobody's where all share it."""

    id: str
    name: str
    user: str | None


class MlflowQueue:
    """The review queue of one task: one queue that all share, or one for each person where several must look."""

    def __init__(self, store: Any, spec: ReviewSpec, experiment: str, page: str, queues: Sequence[_Queue]) -> None:
        self._store, self._spec, self._experiment = store, spec, experiment
        self._page, self._queues = page, tuple(queues)

    @classmethod
    def open(cls, spec: ReviewSpec) -> Self:
        """Make experiment, questions and queues where they are missing.

        Raises:
            ServiceError: the run has no MLflow server (a database has no page), it does not answer, or it refuses.
        """
        uri = tracking_uri(spec.execution)
        if not uri.startswith(("http://", "https://")):
            raise ServiceError(
                "People review on the page of an MLflow server, and this run has a database without one.",
                where=without_password(uri),
                fix="start servers (`goldgate up`), or set `execution.tracking_uri` to an MLflow server's address",
            )
        client = connect(spec.execution)
        from mlflow.tracing.client import TracingClient

        with _spoken_to(uri):
            experiment = ensure_experiment(client, spec.execution, f"{spec.name} reviews")
            store = TracingClient(uri).store
            questions = [_question(store, experiment, *asked) for asked in _questions(spec)]
            users: Sequence[str | None] = spec.users if spec.annotators > 1 else (None,)
            queues = [_queue(store, experiment, spec, user, questions) for user in users]
        page = f"{without_password(uri)}/#/experiments/{experiment}/review-queue"
        return cls(store, spec, experiment, page, queues)

    @property
    def page(self) -> str:
        """Where people review."""
        return self._page

    def send(self, items: Sequence[ReviewItem]) -> int:
        """See `ReviewQueue.send`. Where several must look, each item goes to as many people, in turn."""
        new = 0
        with _spoken_to(self._page):
            for batch in _batches(items, _TRACES):
                there = {info.trace_id for info in self._infos([_trace_id(item) for item in batch]) if _whole(info)}
                for item in batch:
                    if _trace_id(item) not in there:
                        self._trace(item)
                        new += 1
                for queue in self._queues:
                    asked = [_trace_id(item) for item in batch if self._goes_to(item, queue)]
                    if asked:
                        self._store.add_items_to_review_queue(queue.id, item_ids=asked)
        return new

    def answers(self) -> list[Review]:
        """See `ReviewQueue.answers`."""
        with _spoken_to(self._page):
            finished = [trace for trace, pending in self._pending().items() if not pending]
            reviews = []
            for batch in _batches(finished, _TRACES):
                reviews += [found for found in map(_review, self._store.batch_get_traces(list(batch))) if found]
        return reviews

    def waiting(self) -> int:
        """See `ReviewQueue.waiting`."""
        with _spoken_to(self._page):
            return sum(map(bool, self._pending().values()))

    def _goes_to(self, item: ReviewItem, queue: _Queue) -> bool:
        if queue.user is None:
            return True
        users = self._spec.users
        first = int(hashlib.sha256(item.id.encode()).hexdigest(), 16) % len(users)
        return (users.index(queue.user) - first) % len(users) < self._spec.annotators

    def _reviewers(self, item: ReviewItem) -> list[str]:
        named = [queue.user for queue in self._queues if queue.user is not None and self._goes_to(item, queue)]
        return named or list(self._spec.users) or [_NOBODY]

    def _pending(self) -> dict[str, int]:
        """In how many queues each trace waits."""
        counts: dict[str, int] = {}
        for queue in self._queues:
            for item in _pages(partial(self._items, queue.id)):
                counts[item.item_id] = counts.get(item.item_id, 0) + (item.status == "pending")
        return counts

    def _items(self, queue: str, token: str | None) -> Any:
        return self._store.list_review_queue_items(queue, max_results=_PAGE, page_token=token)

    def _infos(self, traces: Sequence[str]) -> list[Any]:
        found: list[Any] = self._store.batch_get_trace_infos(list(traces))
        return found

    def _trace(self, item: ReviewItem) -> None:
        """Write a trace; its tag comes last, so one that was half written is written again."""
        from mlflow.entities import AssessmentSource, Feedback, Span, TraceInfo, TraceLocation, TraceState

        digest = _digest(item)
        trace, at = _trace_id(item), int(item.at.timestamp() * 1000)
        inputs = {"messages": list(item.messages)}
        outputs = {"choices": [{"message": {"role": "assistant", "content": item.answer}}]}
        attributes = {
            "mlflow.traceRequestId": trace, "mlflow.spanType": "CHAT_MODEL", "mlflow.spanInputs": inputs,
            "mlflow.spanOutputs": outputs, _ITEM: item.model_dump(mode="json"),
        }  # fmt: skip
        if item.other is not None:
            attributes["another answer"] = item.other
        span = Span.from_dict(
            {
                "trace_id": _base64(digest[:32]),
                "span_id": _base64(digest[32:48]),
                "parent_span_id": None,
                "name": item.version,
                "start_time_unix_nano": at * 1_000_000,
                "end_time_unix_nano": at * 1_000_000,
                "status": {"code": "OK"},
                "attributes": {name: json.dumps(value, ensure_ascii=False) for name, value in attributes.items()},
                "events": [],
            }
        )
        tags = {
            "mlflow.traceName": item.version, ITEM_TAG: item.id, "goldgate.review.reason": item.reason.value,
            "goldgate.review.version": item.version,
        }  # fmt: skip
        if item.confidence is not None:
            tags["goldgate.review.confidence"] = f"{item.confidence:.4f}"
        filled_in = [
            Feedback(
                name=ANSWER, value=item.answer, source=AssessmentSource("HUMAN", reviewer), trace_id=trace,
                metadata={FILLED_IN: "true"}, rationale=f"Filled in with the answer of {item.version}; nobody's yet.",
            )
            for reviewer in self._reviewers(item)
        ]  # fmt: skip
        self._store.log_spans(self._experiment, [span])
        self._store.start_trace(
            TraceInfo(
                trace_id=trace, trace_location=TraceLocation.from_experiment_id(self._experiment), request_time=at,
                execution_duration=0, state=TraceState.OK, client_request_id=item.id, tags=tags,
                request_preview=_shown(item)[:_PREVIEW], response_preview=item.answer[:_PREVIEW],
                trace_metadata={"mlflow.traceInputs": json.dumps(inputs, ensure_ascii=False),
                                "mlflow.traceOutputs": json.dumps(item.answer, ensure_ascii=False)},
                assessments=filled_in,
            )
        )  # fmt: skip


# -- what is asked ------------------------------------------------------------------------------------------------


def _questions(spec: ReviewSpec) -> Iterator[tuple[str, Any, str]]:
    """Name, kind of input and instruction of each question; the page shows the one that was made last first."""
    from mlflow.genai.label_schemas import InputCategorical, InputPassFail, InputText

    yield (
        GOLDEN,
        InputPassFail(positive_label="Yes", negative_label="No"),
        "Should this be an item of the next golden set? It is never trained on then.",
    )
    labels = spec.task.labels
    asked = f"What is the right answer? The model's own is filled in. The task: {spec.task.instruction}"
    if 0 < len(labels) <= _MOST_CHOICES and all(len(label) <= _LONGEST_CHOICE for label in labels):
        yield ANSWER, InputCategorical(options=list(labels)), asked[:_LONGEST_INSTRUCTION]
    else:
        form = {
            TaskKind.CLASSIFY: f" One of: {', '.join(labels)}.", TaskKind.EXTRACT: " As JSON.",
            TaskKind.CALL: ' Calls of tools as a JSON list of {"name", "arguments"}, or words.', TaskKind.CHAT: "",
        }[spec.task.kind]  # fmt: skip
        yield ANSWER, InputText(), (asked + form)[:_LONGEST_INSTRUCTION]


def _question(store: Any, experiment: str, name: str, kind: Any, instruction: str) -> str:
    """The id of a question, made or changed to what it is to be."""
    fields = {"input": kind, "instruction": instruction}

    def make() -> Any:
        return store.create_label_schema(experiment, name=name, type="feedback", enable_comment=False, **fields)

    schema = _made_once(make, lambda: store.get_label_schema_by_name(experiment, name))
    if (schema.input, schema.instruction) != (kind, instruction):
        store.update_label_schema(schema.schema_id, **fields)
    return str(schema.schema_id)


def _queue(store: Any, experiment: str, spec: ReviewSpec, user: str | None, questions: Sequence[str]) -> _Queue:
    """A queue, made where it is missing, with the people that the spec names."""
    name = spec.name if user is None else f"{spec.name}: {user}"
    users = list(spec.users) or [_NOBODY] if user is None else [user]

    def make() -> Any:
        return store.create_review_queue(
            experiment, name=name, queue_type="custom", created_by=None, users=users, schema_ids=list(questions)
        )

    queue = _made_once(make, lambda: store.get_review_queue_by_name(experiment, name=name))
    if sorted(queue.users) != sorted(one.strip().lower() for one in users):
        store.update_review_queue(queue.queue_id, users=users)
    return _Queue(str(queue.queue_id), name, user)


def _made_once(make: Callable[[], Any], find: Callable[[], Any]) -> Any:
    """What is there, or is made now; another run may make it at the same time."""
    from mlflow.exceptions import MlflowException

    try:
        return find()
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    try:
        return make()
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return find()


# -- what was said ------------------------------------------------------------------------------------------------


def _review(trace: Any) -> Review | None:
    """What people said of a trace; None for one that somebody else has put into the queue."""
    spans = [span for span in trace.data.spans if span.get_attribute(_ITEM) is not None]
    if not spans:
        return None
    item = ReviewItem.model_validate(spans[0].get_attribute(_ITEM))
    answers: dict[str, Any] = {}  # by person, the last of each
    wishes: dict[str, Any] = {}
    for word in sorted(trace.info.assessments, key=lambda one: one.last_update_time_ms):
        if word.source.source_type != "HUMAN" or word.valid is False or FILLED_IN in (word.metadata or {}):
            continue
        if word.name == ANSWER and word.value is not None:
            answers[word.source.source_id] = word
        elif word.name == GOLDEN:
            wishes[word.source.source_id] = word
    return Review(
        item=item,
        said=tuple(_said(item, who, answers.get(who), wishes.get(who)) for who in sorted({*answers, *wishes})),
    )


def _said(item: ReviewItem, who: str, answer: Any, wish: Any) -> Reviewed:
    """What one person said, of the two questions or of one."""
    text = None
    if answer is not None:
        text = answer.value if isinstance(answer.value, str) else json.dumps(answer.value, ensure_ascii=False)
    at_ms = max(word.last_update_time_ms for word in (answer, wish) if word is not None)
    return Reviewed(
        item=item.id, annotator=who, answer=text, golden=wish is not None and wish.value is True,
        at=datetime.fromtimestamp(at_ms / 1000, UTC),
    )  # fmt: skip


def _whole(info: Any) -> bool:
    return ITEM_TAG in (info.tags or {})


# -- inside -------------------------------------------------------------------------------------------------------


@contextmanager
def _spoken_to(where: str) -> Iterator[None]:
    """MLflow's errors in our words."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, NotImplementedError) as error:
        said = " ".join(str(error).split())
        raise ServiceError(
            f"MLflow's review queue cannot be used: {said[:300]}",
            where=without_password(where),
            fix="see MLflow's log; review queues need a server of 3.14 or newer, as `goldgate up` has",
        ) from error


def _pages(ask: Callable[[str | None], Any]) -> Iterator[Any]:
    token = None
    while True:
        found = ask(token)
        yield from found
        token = found.token
        if not token:
            return


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _digest(item: ReviewItem) -> str:
    return hashlib.sha256(f"{item.name}/{item.id}".encode()).hexdigest()


def _trace_id(item: ReviewItem) -> str:
    return f"tr-{_digest(item)[:32]}"


def _base64(digits: str) -> str:
    return base64.b64encode(bytes.fromhex(digits)).decode()


def _shown(item: ReviewItem) -> str:
    content = item.messages[-1].get("content") if item.messages else ""
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
