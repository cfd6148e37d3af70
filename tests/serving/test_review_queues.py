"""The two queues without their servers: what is asked of whom, what an answer is, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import httpx
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from tasks.contracts.errors import ServiceError
from tasks.contracts.review import LABEL_STUDIO_KEY, ReviewSpec, SpoolSpec
from tasks.contracts.spec import ExecutionSpec, TaskSpec
from tasks.serving.gateway.reviews import open_spool
from tasks.serving.review import label_studio, mlflow_queue
from tasks.serving.review.label_studio import LabelStudioQueue, label_config
from tasks.serving.review.mlflow_queue import ANSWER, FILLED_IN, GOLDEN, MlflowQueue
from tests.serving.test_review_rows import CHAT, spec
from tests.serving.test_review_spool import item, until

_CLIENT = httpx.Client
KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(label_studio, "_WAIT_SECONDS", 0.0)
    monkeypatch.setenv(LABEL_STUDIO_KEY, KEY)


# -- MLflow -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("uri", [None, "sqlite:////nowhere/mlflow.db"])
def test_a_database_without_a_page_is_refused(tmp_path: Path, uri: str | None) -> None:
    execution = ExecutionSpec(store=str(tmp_path), tracking_uri=uri)
    with pytest.raises(ServiceError, match="page of an MLflow server") as error:
        MlflowQueue.open(spec(tmp_path, execution=execution))
    assert "goldgate up" in error.value.fix


def test_a_server_that_does_not_answer_is_said(tmp_path: Path) -> None:
    execution = ExecutionSpec(store=str(tmp_path), tracking_uri="http://127.0.0.1:9")
    with pytest.raises(ServiceError, match="MLflow server does not answer"):
        MlflowQueue.open(spec(tmp_path, execution=execution))


def test_each_item_goes_to_as_many_people_as_asked_and_the_work_is_shared(tmp_path: Path) -> None:
    users = ("ada", "grace", "edsger", "alan")
    queues = [mlflow_queue._Queue(name, name, name) for name in users]
    queue = MlflowQueue(None, spec(tmp_path, annotators=3, users=users), "1", "http://page", queues)
    asked = [[one.id for one in queues if queue._goes_to(item(number), one)] for number in range(400)]
    assert {len(people) for people in asked} == {3}
    shares = Counter(name for people in asked for name in people)
    assert min(shares.values()) > 250  # of 300


LATE = {"valid": True, "metadata": None}


def word(name: str, value: Any, who: str, at: int, **changes: Any) -> Any:
    fields = {"name": name, "value": value, "source": SimpleNamespace(source_type="HUMAN", source_id=who),
              "last_update_time_ms": at, **LATE, **changes}  # fmt: skip
    return SimpleNamespace(**fields)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], []),
        ([word(ANSWER, "loan", "ada", 1)], [("ada", "loan", False)]),
        ([word(ANSWER, "loan", "ada", 1, metadata={FILLED_IN: "true"})], []),
        ([word(ANSWER, "loan", "ada", 1, valid=False)], []),
        ([word(ANSWER, "loan", "judge", 1, source=SimpleNamespace(source_type="LLM_JUDGE", source_id="judge"))], []),
        ([word(ANSWER, "loan", "ada", 2), word(ANSWER, "card", "ada", 1)], [("ada", "loan", False)]),
        ([word(ANSWER, "loan", "ada", 1), word(GOLDEN, True, "ada", 2)], [("ada", "loan", True)]),
        ([word(GOLDEN, True, "ada", 1), word(GOLDEN, False, "ada", 2), word(ANSWER, "loan", "ada", 2)],
         [("ada", "loan", False)]),
        ([word(GOLDEN, True, "ada", 1)], [("ada", None, True)]),
        ([word(ANSWER, {"price": 3}, "ada", 1)], [("ada", '{"price": 3}', False)]),
        ([word("quality", "good", "ada", 1)], []),
        ([word(ANSWER, "loan", "grace", 1), word(ANSWER, "card", "ada", 1)],
         [("ada", "card", False), ("grace", "loan", False)]),
    ],
)  # fmt: skip
def test_what_people_said_of_a_trace(words: list[Any], said: list[tuple[str, str | None, bool]]) -> None:
    span = SimpleNamespace(get_attribute=lambda name: item(1).model_dump(mode="json"))
    trace = SimpleNamespace(data=SimpleNamespace(spans=[span]), info=SimpleNamespace(assessments=words))
    found = mlflow_queue._review(trace)
    assert found is not None
    assert found.item == item(1)
    assert [(one.annotator, one.answer, one.golden) for one in found.said] == said


def test_a_trace_of_somebody_else_is_no_review() -> None:
    span = SimpleNamespace(get_attribute=lambda name: None)
    trace = SimpleNamespace(data=SimpleNamespace(spans=[span]), info=SimpleNamespace(assessments=[]))
    assert mlflow_queue._review(trace) is None


def test_many_or_long_labels_are_asked_as_a_text(tmp_path: Path) -> None:
    def kind(*labels: str) -> str:
        task = TaskSpec(kind="classify", instruction="Which?", labels=labels)
        questions = {name: asked for name, asked, _ in mlflow_queue._questions(spec(tmp_path, task=task))}
        assert sorted(questions) == sorted((ANSWER, GOLDEN))
        return type(questions[ANSWER]).__name__

    assert kind("card", "loan") == "InputCategorical"
    assert kind(*(f"label {number}" for number in range(11))) == "InputText"
    assert kind("card", "x" * 65) == "InputText"
    (asked,) = (one for name, _, one in mlflow_queue._questions(spec(tmp_path, task=CHAT)) if name == ANSWER)
    assert asked == "What is the right answer? The model's own is filled in. The task: Answer."


# -- Label Studio -----------------------------------------------------------------------------------------------------

Handler = Callable[[httpx.Request], httpx.Response]


def studio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handler: Handler, **changes: Any) -> LabelStudioQueue:
    """A queue whose Label Studio is a function."""
    monkeypatch.setattr(
        label_studio.httpx, "Client", lambda **options: _CLIENT(**options, transport=httpx.MockTransport(handler))
    )
    return LabelStudioQueue.open(studio_spec(tmp_path, **changes))


def studio_spec(tmp_path: Path, **changes: Any) -> ReviewSpec:
    return spec(tmp_path, queue="label_studio", url="http://studio.test/", **changes)


def project_of(asked: ReviewSpec) -> dict[str, Any]:
    """What Label Studio says of a project that is as it is to be."""
    return {"id": 3, "title": f"{asked.name} reviews", "label_config": label_config(asked),
            "maximum_annotations": asked.annotators, "show_collab_predictions": True,
            "model_version": "goldgate"}  # fmt: skip


def answering(asked: ReviewSpec, tasks: list[Any], calls: list[Any] | None = None) -> Handler:
    """A Label Studio with these tasks."""

    def answer(request: httpx.Request) -> httpx.Response:
        if calls is not None and request.method != "GET":
            calls.append((request.method, request.url.path, json.loads(request.content)))
        if request.url.path.endswith("/export"):
            return httpx.Response(200, json=tasks)
        if request.url.path == "/api/users":
            return httpx.Response(200, json=[{"id": 1, "email": "ann@example.com"}, {"id": 2, "email": ""}])
        if request.url.path == "/api/projects" and request.method == "GET":
            return httpx.Response(200, json={"results": [project_of(asked)], "next": None})
        return httpx.Response(201, json={"task_ids": []})

    return answer


def annotated(number: int, *said: tuple[int, str | None], golden: bool = False) -> dict[str, Any]:
    """A task; a person who says None has skipped it."""
    one = item(number)
    wish = [{"from_name": "golden", "value": {"choices": ["yes"]}}] if golden else []
    return {
        "data": {"goldgate_item": one.id, "goldgate": one.model_dump_json()},
        "annotations": [
            {"completed_by": who, "was_cancelled": answer is None, "updated_at": "2026-05-01T13:00:00.5Z",
             "result": [{"from_name": "answer", "value": {"choices": [answer]}}, *wish] if answer else []}
            for who, answer in said
        ],
    }  # fmt: skip


def test_finished_tasks_come_back_and_others_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = studio_spec(tmp_path, annotators=2)
    tasks = [
        annotated(1, (1, "loan"), (2, "card")), annotated(2, (1, "loan")), annotated(3, (1, "loan"), (1, "card")),
        annotated(4, (1, None), (9, "card"), golden=True), annotated(5), {"data": {"text": "ours"}, "annotations": []},
    ]  # fmt: skip
    queue = studio(tmp_path, monkeypatch, answering(asked, tasks), annotators=2)
    found = {one.item.id: one for one in queue.answers()}
    assert sorted(found) == ["request-1", "request-4"]
    assert [(one.annotator, one.answer) for one in found["request-1"].said] == [
        ("ann@example.com", "loan"), ("2", "card"),
    ]  # fmt: skip
    (only,) = found["request-4"].said
    assert (only.annotator, only.answer, only.golden) == ("user 9", "card", True)
    assert only.at == datetime(2026, 5, 1, 13, 0, 0, 500_000, UTC)
    assert queue.waiting() == 3
    assert queue.page == "http://studio.test/projects/3/data"


def test_what_is_there_is_not_sent_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    queue = studio(tmp_path, monkeypatch, answering(studio_spec(tmp_path), [annotated(1)], calls))
    assert queue.send([item(1), item(2, answer="nonsense"), item(3), item(3)]) == 2
    ((method, path, sent),) = calls  # the project is as it is to be, so it was not touched
    assert (method, path) == ("POST", "/api/projects/3/import")
    assert [one["data"]["goldgate_item"] for one in sent] == ["request-2", "request-3"]
    assert "predictions" not in sent[0]  # no choice of the form
    assert sent[1]["predictions"][0]["result"][0]["value"] == {"choices": ["card"]}
    assert queue.send([]) == 0


def test_a_project_is_made_or_changed_to_what_it_is_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, str, Any]] = []
    there: list[Any] = [{"id": 2, "title": "another"}]

    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json={"results": there, "next": None})
        calls.append((request.method, request.url.path, json.loads(request.content)))
        return httpx.Response(200, json={"id": 3})

    assert studio(tmp_path, monkeypatch, answer).page.endswith("/projects/3/data")
    assert calls[0][:2] == ("POST", "/api/projects")
    assert calls[0][2]["title"] == "complaints reviews"
    there.append(project_of(studio_spec(tmp_path)) | {"maximum_annotations": 1})
    studio(tmp_path, monkeypatch, answer, annotators=3)
    assert calls[1] == ("PATCH", "/api/projects/3", {"maximum_annotations": 3})


def test_the_form_has_every_label_whatever_its_letters(tmp_path: Path) -> None:
    labels = ('a "quoted" one', "<b>", "R&D", "it's")
    task = TaskSpec(kind="classify", instruction='Which "team" <now>?', labels=labels)
    form = ElementTree.fromstring(label_config(spec(tmp_path, task=task)))
    (answer,) = (one for one in form.iter("Choices") if one.get("name") == "answer")
    assert tuple(one.get("value") for one in answer) == labels
    assert form.find("Header").get("value") == 'Which "team" <now>?'  # type: ignore[union-attr]
    assert ElementTree.fromstring(label_config(spec(tmp_path, task=CHAT))).find("TextArea") is not None


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (401, {"detail": f"Invalid token {KEY}"}, "HTTP 401"),
        (403, {"detail": "no"}, "HTTP 403"),
        (500, {"detail": "database is locked"}, "HTTP 500"),
    ],
)
def test_a_refusal_is_said_without_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, body: Any, says: str
) -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.headers["authorization"])
        return httpx.Response(status, json=body)

    with pytest.raises(ServiceError, match=says) as error:
        studio(tmp_path, monkeypatch, answer)
    assert KEY not in str(error.value)
    assert asked == [f"Token {KEY}"] * (3 if status == 500 else 1)


def test_a_personal_access_token_is_exchanged_and_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = "head.body.signature"
    monkeypatch.setenv(LABEL_STUDIO_KEY, token)
    asked = studio_spec(tmp_path)
    exchanged: list[Any] = []

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/api/token/refresh":
            exchanged.append(json.loads(request.content))
            return httpx.Response(200, json={"access": f"access-{len(exchanged)}"})
        if request.headers["authorization"] != "Bearer access-2":
            return httpx.Response(401, json={"detail": "expired"})
        return answering(asked, [annotated(1)])(request)

    assert studio(tmp_path, monkeypatch, answer).waiting() == 1
    assert exchanged == [{"refresh": token}] * 2


def test_one_that_does_not_answer_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("connection refused")

    with pytest.raises(ServiceError, match="does not answer: connection refused") as error:
        studio(tmp_path, monkeypatch, refuses)
    assert error.value.where == "GET http://studio.test/api/projects"
    with pytest.raises(ServiceError, match="this is no JSON: <html>"):
        studio(tmp_path, monkeypatch, lambda request: httpx.Response(200, text="<html>a page</html>"))


def test_without_a_key_nothing_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LABEL_STUDIO_KEY)
    with pytest.raises(ServiceError, match="No key of Label Studio"):
        LabelStudioQueue.open(studio_spec(tmp_path))
    with pytest.raises(ServiceError, match="shown in the clear"):
        LabelStudioQueue.open(spec(tmp_path, queue="label_studio", url="http://ann:secret@studio.test"))


# -- what the gateway counts ------------------------------------------------------------------------------------------


def test_the_gateway_counts_what_waits_and_what_was_dropped(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    assert open_spool(None, tmp_path, mask=None, registry=registry) is None
    spool = open_spool(SpoolSpec(mask=False, most=1), tmp_path, mask=None, registry=registry)
    assert spool is not None
    spool.put(item(1))
    spool.put(item(2))
    until(lambda: b'goldgate_review_dropped_total{reason="full"} 1.0' in generate_latest(registry))
    assert b'goldgate_review_waiting{name="complaints"} 1.0' in generate_latest(registry)
    spool.take("complaints", ["request-1"])
    assert b'goldgate_review_waiting{name="complaints"} 0.0' in generate_latest(registry)
    spool.close()
