"""Review in Label Studio, by its REST API: each item is a task of a project, the model's answer a prediction of it.

The key is the environment's GOLDGATE_LABEL_STUDIO_KEY: a personal access token, or a legacy token.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Self
from urllib.parse import urlsplit
from xml.sax.saxutils import quoteattr

import httpx

from tasks.contracts.errors import ServiceError
from tasks.contracts.review import LABEL_STUDIO_KEY, Review, Reviewed, ReviewItem, ReviewSpec
from tasks.contracts.spec import TaskKind

_ANSWER, _GOLDEN, _SHOWN, _ABOUT = "answer", "golden", "conversation", "about"  # names of the form's parts
_WISH = "Candidate for the next golden set: never trained on"
_PREDICTED_BY = "goldgate"  # the page fills in what one model version of the project says; ours are told by `version`
_ITEM, _WHOLE = "goldgate_item", "goldgate"  # of a task's data: the id, and the item as JSON
_SECONDS = 60.0
_EXPORT_SECONDS = 600.0
_TASKS = 100  # sent at once
_PROJECTS = 100
_TRIES, _WAIT_SECONDS = 3, 1.0  # it answers 500 while its SQLite is busy
_EXCERPT = 300


class LabelStudioQueue:
    """The project of one task."""

    def __init__(self, http: httpx.Client, spec: ReviewSpec, url: str, key: str) -> None:
        self._http, self._spec, self._url, self._key = http, spec, url, key
        self._access = ""  # of a personal access token
        self._project = 0

    @classmethod
    def open(cls, spec: ReviewSpec) -> Self:
        """Make the project where it is missing, and its form what it is to be.

        Raises:
            ServiceError: no key is set, Label Studio does not answer, or it refuses.
        """
        url = str(spec.url).rstrip("/")
        if "@" in urlsplit(url).netloc:
            raise ServiceError(
                "Label Studio's address holds a user or password; addresses are shown in the clear.",
                where="url",
                fix=f"take it out and set {LABEL_STUDIO_KEY}",
            )
        key = os.environ.get(LABEL_STUDIO_KEY, "").strip()
        if not key:
            raise ServiceError(
                "No key of Label Studio is set.",
                where=LABEL_STUDIO_KEY,
                fix="make an access token on its page (Account & Settings) and set the environment's "
                f"{LABEL_STUDIO_KEY} (in Prefect: from a Secret block on the worker)",
            )
        loopback = urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")
        queue = cls(httpx.Client(base_url=url, timeout=_SECONDS, trust_env=not loopback), spec, url, key)
        queue._project = queue._ensure_project()
        return queue

    @property
    def page(self) -> str:
        """Where people review."""
        return f"{self._url}/projects/{self._project}/data"

    def send(self, items: Sequence[ReviewItem]) -> int:
        """See `ReviewQueue.send`."""
        there = {str(task["data"].get(_ITEM)) for task in self._tasks()} if items else set()
        new = {item.id: item for item in items if item.id not in there}
        tasks = [self._task(item) for item in new.values()]
        for start in range(0, len(tasks), _TASKS):
            self._ask("POST", f"/api/projects/{self._project}/import", tasks[start : start + _TASKS])
        return len(tasks)

    def answers(self) -> list[Review]:
        """See `ReviewQueue.answers`. An item is finished once so many people have answered or skipped it."""
        users = self._users()
        reviews: dict[str, Review] = {}
        for task in self._tasks():
            whole = task["data"].get(_WHOLE)
            if whole is None or not self._finished(task):  # somebody else's task, or one that waits
                continue
            item = ReviewItem.model_validate_json(whole)
            said = tuple(_said(item, one, users) for one in task["annotations"] if not one["was_cancelled"])
            before = reviews.get(item.id)  # two runs that sent at the same time
            reviews[item.id] = Review(item=item, said=(before.said if before is not None else ()) + said)
        return list(reviews.values())

    def waiting(self) -> int:
        """See `ReviewQueue.waiting`."""
        return sum(_WHOLE in task["data"] and not self._finished(task) for task in self._tasks())

    def _finished(self, task: Mapping[str, Any]) -> bool:
        return len({one["completed_by"] for one in task["annotations"]}) >= self._spec.annotators

    # -- the project --------------------------------------------------------------------------------------------

    def _ensure_project(self) -> int:
        title, form = f"{self._spec.name} reviews", label_config(self._spec)
        wanted = {
            "label_config": form,
            "maximum_annotations": self._spec.annotators,
            "show_collab_predictions": True,
            "model_version": _PREDICTED_BY,
        }
        for project in self._projects():
            if project["title"] == title:
                changed = {name: value for name, value in wanted.items() if project.get(name) != value}
                if changed:
                    self._ask("PATCH", f"/api/projects/{project['id']}", changed)
                return int(project["id"])
        shown = {"title": title, "expert_instruction": self._spec.task.instruction}
        return int(self._ask("POST", "/api/projects", shown | wanted)["id"])

    def _projects(self) -> Iterator[Mapping[str, Any]]:
        page = 1
        while True:
            found = self._ask("GET", f"/api/projects?page={page}&page_size={_PROJECTS}")
            yield from found["results"]
            if not found.get("next"):
                return
            page += 1

    def _tasks(self) -> list[Mapping[str, Any]]:
        """All tasks with their annotations."""
        path = f"/api/projects/{self._project}/export?exportType=JSON&download_all_tasks=true"
        found: list[Mapping[str, Any]] = self._ask("GET", path, seconds=_EXPORT_SECONDS)
        return found

    def _users(self) -> dict[int, str]:
        found = self._ask("GET", "/api/users")
        users = found["results"] if isinstance(found, dict) else found
        return {int(user["id"]): str(user.get("email") or user["id"]) for user in users}

    def _task(self, item: ReviewItem) -> dict[str, Any]:
        data = {
            _ITEM: item.id, _WHOLE: item.model_dump_json(), "reason": item.reason.value, "version": item.version,
            _ABOUT: _about(item),
            _SHOWN: [{"role": one.get("role", ""), "text": _words(one)} for one in item.messages],
        }  # fmt: skip
        if self._spec.task.kind is TaskKind.CLASSIFY:
            # An answer that is no label cannot be filled in; the form is then left open.
            value = {"choices": [item.answer.strip()]} if item.answer.strip() in self._spec.task.labels else None
            result = {"type": "choices", "value": value}
        else:
            result = {"type": "textarea", "value": {"text": [item.answer]}}
        if result["value"] is None:
            return {"data": data}
        result |= {"from_name": _ANSWER, "to_name": _SHOWN}
        prediction: dict[str, Any] = {"model_version": _PREDICTED_BY, "result": [result]}
        if item.confidence is not None:
            prediction["score"] = item.confidence
        return {"data": data, "predictions": [prediction]}

    # -- requests -----------------------------------------------------------------------------------------------

    def _ask(self, method: str, path: str, body: Any = None, *, seconds: float = _SECONDS) -> Any:
        """The answer's JSON; asked again where it is safe and may help."""
        where = f"{method} {self._url}{path.split('?')[0]}"
        renewed = False
        for attempt in range(1, _TRIES + 1):
            try:
                answer = self._http.request(
                    method, path, json=body, timeout=seconds, headers={"Authorization": self._authorization()}
                )
            except httpx.HTTPError as error:
                raise self._no_answer(str(error) or type(error).__name__, where) from error
            if answer.is_success:
                return self._read(answer, where)
            if answer.status_code == httpx.codes.UNAUTHORIZED and self._access and not renewed:
                self._access, renewed = "", True  # it is good for minutes only
            elif not (answer.is_server_error and method == "GET" and attempt < _TRIES):
                raise self._refused(answer, where)
            else:
                time.sleep(_WAIT_SECONDS)
        raise self._refused(answer, where)

    def _authorization(self) -> str:
        """A personal access token (three parts with dots) is exchanged for one of minutes; a legacy token is sent."""
        if self._key.count(".") != 2:
            return f"Token {self._key}"
        if not self._access:
            where = f"POST {self._url}/api/token/refresh"
            try:
                answer = self._http.post("/api/token/refresh", json={"refresh": self._key})
            except httpx.HTTPError as error:
                raise self._no_answer(str(error) or type(error).__name__, where) from error
            if not answer.is_success:
                raise self._refused(answer, where)
            self._access = str(self._read(answer, where)["access"])
        return f"Bearer {self._access}"

    def _read(self, answer: httpx.Response, where: str) -> Any:
        try:
            return answer.json()
        except ValueError as error:
            raise self._no_answer(f"this is no JSON: {self._hidden(answer.text)}", where) from error

    def _no_answer(self, why: str, where: str) -> ServiceError:
        return ServiceError(f"Label Studio does not answer: {why}", where=where, fix="start it, or correct `url`")

    def _refused(self, answer: httpx.Response, where: str) -> ServiceError:
        fix = "see its log; Goldgate speaks the API of Label Studio 1.23"
        if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            fix = f"set {LABEL_STUDIO_KEY} to an access token of a user who may change the project; legacy tokens must "
            fix += "be allowed in its organization's settings"
        said = self._hidden(answer.text)
        return ServiceError(f"Label Studio refuses (HTTP {answer.status_code}): {said}", where=where, fix=fix)

    def _hidden(self, text: str) -> str:
        for secret in (self._key, self._access):
            text = text.replace(secret, "***") if secret else text
        return " ".join(text.split())[:_EXCERPT]


def label_config(spec: ReviewSpec) -> str:
    """The form of a project: the conversation, the answer, and whether it is one for the golden set."""
    if spec.task.kind is TaskKind.CLASSIFY:
        choices = "".join(f"<Choice value={quoteattr(label)}/>" for label in spec.task.labels)
        answer = (
            f'<Choices name="{_ANSWER}" toName="{_SHOWN}" choice="single-radio" required="true">{choices}</Choices>'
        )
    else:
        more = 'required="true" editable="true" maxSubmissions="1" rows="6"'
        answer = f'<TextArea name="{_ANSWER}" toName="{_SHOWN}" {more}/>'
    return (
        f"<View><Header value={quoteattr(spec.task.instruction)}/>"
        f'<Paragraphs name="{_SHOWN}" value="${_SHOWN}" layout="dialogue" nameKey="role" textKey="text"/>'
        f'<Header value="The right answer"/><Text name="{_ABOUT}" value="${_ABOUT}"/>{answer}'
        f'<Choices name="{_GOLDEN}" toName="{_SHOWN}" choice="multiple"><Choice value={quoteattr(_WISH)}/></Choices>'
        "</View>"
    )


def _said(item: ReviewItem, annotation: Mapping[str, Any], users: Mapping[int, str]) -> Reviewed:
    """What an annotation says; an id whose user is gone stays a number."""
    answer, golden = None, False
    for result in annotation["result"]:
        value = result.get("value", {})
        if result.get("from_name") == _ANSWER:
            found = value.get("choices") or value.get("text") or []
            answer = found if isinstance(found, str) else next(iter(found), None)
        elif result.get("from_name") == _GOLDEN:
            golden = bool(value.get("choices"))
    who = annotation["completed_by"]
    number = int(who["id"] if isinstance(who, Mapping) else who)
    at = datetime.fromisoformat(str(annotation["updated_at"]))
    return Reviewed(item=item.id, annotator=users.get(number, f"user {number}"), answer=answer, golden=golden, at=at)


def _about(item: ReviewItem) -> str:
    """Why an item waits, as its form says it."""
    sure = "" if item.confidence is None else f", {100 * item.confidence:.0f} % sure"
    other = "" if item.other is None else f"; another model says: {item.other}"
    return f"{item.version} says what is filled in ({item.reason.value}{sure}){other}"


def _words(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
