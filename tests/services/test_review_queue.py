"""From a request that the model was not sure of to a training row, through real MLflow and a real Label Studio.

What a person does on a page is done here by the requests that the page makes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import httpx
import psutil
import pytest

from flows.review import review
from tasks.contracts.errors import ServiceError
from tasks.contracts.review import LABEL_STUDIO_KEY, ReviewItem, ReviewResult, ReviewSpec
from tasks.contracts.rows import read_rows
from tasks.contracts.serving import EngineSpec, EngineState, Trust
from tasks.contracts.spec import CurateSpec, DataSpec, ExecutionSpec, RetrainSpec
from tasks.data.steps import curate_dataset, ingest_dataset, open_golden_set, validate_dataset
from tasks.gate import selftest
from tasks.registry.serving_aliases import resolve_version
from tasks.serving.client import GatewayClient, gateway_of
from tasks.serving.review.queue import open_queue
from tasks.store import Store
from tests.data.toy_data import read_lines, sentence, write_lines
from tests.prefect_server import prefect_server
from tests.serving.fake_engine import Behaviour, FakeCommand
from tests.serving.gateway_process import running_gateway
from tests.serving.promoted import ANSWERS, Shop
from tests.serving.test_review_spool import item

pytestmark = [pytest.mark.services, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
LABEL_STUDIO = ROOT / ".label-studio-env" / "bin" / "label-studio"
CHROMIUM = shutil.which("chromium")
USER, PASSWORD = "ann@example.com", "only-for-this-test"
TOKEN = "0123456789abcdef0123456789abcdef01234567"
_UP_SECONDS = 180.0
ASKED = "a creature that nobody has seen before"


class People(Protocol):
    """Who review on a page."""

    queue: dict[str, Any]

    def read(self, spec: ReviewSpec, item_id: str) -> dict[str, Any]:
        """What the page shows of an item: question, filled in."""

    def answer(self, spec: ReviewSpec, item_id: str, answer: str, *, golden: bool = False) -> None:
        """Choose, and save."""


# -- MLflow -----------------------------------------------------------------------------------------------------------


class OnMlflow:
    """The requests of the review page of MLflow 3.17."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, trust_env=False, timeout=60.0)
        self.queue: dict[str, Any] = {"queue": "mlflow"}

    def ask(self, method: str, path: str, **options: Any) -> Any:
        """An answer's JSON."""
        return self.http.request(method, f"/ajax-api/3.0/mlflow/{path}", **options).raise_for_status().json()

    def experiment(self, spec: ReviewSpec) -> str:
        """Where the reviews of a task are."""
        path = "/ajax-api/2.0/mlflow/experiments/get-by-name"
        found = self.http.get(path, params={"experiment_name": f"{spec.name} reviews"}).raise_for_status().json()
        return str(found["experiment"]["experiment_id"])

    def queues(self, spec: ReviewSpec) -> dict[str, Any]:
        """Queues by their names."""
        listed = self.ask("GET", "review-queues/list", params={"experiment_id": self.experiment(spec)})
        return {one["name"]: one for one in listed.get("queues") or listed.get("review_queues") or []}

    def items(self, queue: str) -> dict[str, Any]:
        """What is in a queue, by the ids of items."""
        listed = self.ask("GET", "review-queues/items/list", params={"queue_id": queue, "max_results": 100})
        found = {}
        for one in listed.get("items", []):
            info = self.ask("GET", f"traces/{one['item_id']}")["trace"]["trace_info"]
            found[info["tags"]["goldgate.review.item"]] = one | {"info": info}
        return found

    def read(self, spec: ReviewSpec, item_id: str) -> dict[str, Any]:
        """As the page does: what this person has said before is filled in."""
        found = self.items(self.queues(spec)[spec.name]["queue_id"])[item_id]
        mine = [
            one for one in found["info"]["assessments"]
            if one["source"] == {"source_type": "HUMAN", "source_id": "default"} and one.get("valid", True)
        ]  # fmt: skip
        return {"input": found["info"]["request_preview"], "filled_in": mine[-1]["feedback"]["value"]}

    def answer(
        self, spec: ReviewSpec, item_id: str, answer: str, *, golden: bool = False, by: str = "default",
        queue: str | None = None,
    ) -> None:  # fmt: skip
        """Write an assessment for each question in this person's name, then set the status."""
        queue_id = self.queues(spec)[queue or spec.name]["queue_id"]
        found = self.items(queue_id)[item_id]
        trace = found["item_id"]
        before = {
            one["assessment_name"]: one["assessment_id"]
            for one in found["info"].get("assessments", [])
            if one["source"]["source_id"] == by
        }
        for name, value in (("answer", answer), ("candidate for the golden set", golden)):
            record = {
                "assessment_name": name, "trace_id": trace, "source": {"source_type": "HUMAN", "source_id": by},
                "feedback": {"value": value}, **({"overrides": before[name]} if name in before else {}),
            }  # fmt: skip
            self.ask("POST", f"traces/{trace}/assessments", json={"assessment": record})
        done = {"queue_id": queue_id, "item_id": trace, "status": "COMPLETE", "completed_by": by}
        self.ask("POST", "review-queues/items/set-status", json=done)


@pytest.fixture(scope="module")
def on_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnMlflow]:
    folder = tmp_path_factory.mktemp("mlflow")
    port = free_port()
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "artifacts"),
    ]  # fmt: skip
    with server(command, folder, f"http://127.0.0.1:{port}/health", {}):
        yield OnMlflow(f"http://127.0.0.1:{port}")


# -- Label Studio -----------------------------------------------------------------------------------------------------


class OnLabelStudio:
    """The requests of Label Studio's labelling page."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(
            base_url=url, trust_env=False, timeout=60.0, headers={"Authorization": f"Token {TOKEN}"}
        )
        self.queue: dict[str, Any] = {"queue": "label_studio", "url": url}

    def ask(self, method: str, path: str, **options: Any) -> Any:
        """An answer's JSON."""
        return self.http.request(method, path, **options).raise_for_status().json()

    def task(self, spec: ReviewSpec, item_id: str) -> dict[str, Any]:
        """The task of an item."""
        (project,) = (
            one for one in self.ask("GET", "/api/projects")["results"] if one["title"] == f"{spec.name} reviews"
        )
        tasks = self.ask("GET", "/api/tasks", params={"project": project["id"], "fields": "all", "page_size": 100})
        (found,) = (one for one in tasks["tasks"] if one["data"]["goldgate_item"] == item_id)
        return dict(found)

    def read(self, spec: ReviewSpec, item_id: str) -> dict[str, Any]:
        """As the page does: the prediction is filled in."""
        task = self.task(spec, item_id)
        value = task["predictions"][0]["result"][0]["value"]
        return {
            "input": task["data"]["conversation"][-1]["text"],
            "filled_in": (value.get("choices") or value["text"])[0],
        }

    def answer(self, spec: ReviewSpec, item_id: str, answer: str, *, golden: bool = False) -> None:
        """Submit an annotation."""
        kind, value = ("choices", {"choices": [answer]}) if spec.task.labels else ("textarea", {"text": [answer]})
        part = {"to_name": "conversation"}
        results = [{**part, "from_name": "answer", "type": kind, "value": value}]
        if golden:
            wish = {"choices": ["Candidate for the next golden set: never trained on"]}
            results.append({**part, "from_name": "golden", "type": "choices", "value": wish})
        self.ask("POST", f"/api/tasks/{self.task(spec, item_id)['id']}/annotations/", json={"result": results})


@pytest.fixture(scope="module")
def on_label_studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnLabelStudio]:
    if not LABEL_STUDIO.exists():
        pytest.skip(
            "Label Studio has an environment of its own, which is not made here: docker/label-studio/make_env.sh"
        )
    folder = tmp_path_factory.mktemp("label-studio")
    port = free_port()
    environment = {
        "LABEL_STUDIO_BASE_DATA_DIR": str(folder), "LABEL_STUDIO_USERNAME": USER,
        "LABEL_STUDIO_PASSWORD": PASSWORD, "LABEL_STUDIO_USER_TOKEN": TOKEN,
        "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true", "COLLECT_ANALYTICS": "False", "LATEST_VERSION_CHECK": "False",
    }  # fmt: skip
    command = [str(LABEL_STUDIO), "start", "--no-browser", "--internal-host", "127.0.0.1", "--port", str(port)]
    with server(command, folder, f"http://127.0.0.1:{port}/health", environment):
        yield OnLabelStudio(f"http://127.0.0.1:{port}")


# -- servers ----------------------------------------------------------------------------------------------------------


@contextmanager
def server(command: Sequence[str], folder: Path, health: str, environment: dict[str, str]) -> Iterator[None]:
    """A server while it is needed; it and its children are ended at the end."""
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=os.environ | environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        until = time.monotonic() + _UP_SECONDS
        while not _is_up(health):
            assert process.poll() is None, (folder / "server.log").read_text()
            assert time.monotonic() < until, (folder / "server.log").read_text()
            time.sleep(0.5)
        yield
    finally:
        with suppress(psutil.NoSuchProcess):
            whole = psutil.Process(process.pid)
            family = [*whole.children(recursive=True), whole]
            for one in family:
                with suppress(psutil.NoSuchProcess):
                    one.send_signal(signal.SIGTERM)
            _, left = psutil.wait_procs(family, timeout=10)
            for one in left:
                one.kill()
        process.wait(timeout=10)


def _is_up(health: str) -> bool:
    try:
        return httpx.get(health, timeout=5.0, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module", autouse=True)
def _prefect() -> Iterator[None]:
    with prefect_server() as patched:
        patched.setenv(LABEL_STUDIO_KEY, TOKEN)
        patched.setattr(selftest, "HISTORIES", 60)
        yield


# -- the whole way ----------------------------------------------------------------------------------------------------


class World(NamedTuple):
    """A gateway with a fake engine that is not sure of one text, and who promoted it."""

    shop: Shop
    gateway: GatewayClient
    fakes: FakeCommand

    def ask(self, text: str, request: str) -> str:
        """What a client does."""
        body = {"model": "animals", "messages": [{"role": "user", "content": text}]}
        answer = httpx.post(
            f"{self.gateway.url}/v1/chat/completions", json=body, headers={"x-request-id": request}, timeout=30.0
        )  # fmt: skip
        return str(answer.raise_for_status().json()["choices"][0]["message"]["content"])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[World]:
    shop = Shop(tmp_path_factory.mktemp("review"), tiny_model)
    shop.promote("animals", "one")
    trust = Trust(temperature=1.0, offset=0.0, at=0.9, target_accuracy=0.9, reviewed=0.1, why="made up")
    version = resolve_version("animals", "1", shop.execution).model_copy(update={"trust": trust})
    behaviour = Behaviour(answers=ANSWERS | {ASKED: "cat"}, logprob=-0.001, confidences={ASKED: -0.9})
    fakes = FakeCommand(shop.root / "fakes", behaviour)
    with running_gateway(Path(shop.execution.store), fakes), gateway_of(shop.execution) as gateway:
        gateway.start_engine(version, EngineSpec())
        wait_for(lambda: getattr(gateway.engine(version.engine), "state", None) is EngineState.READY)
        gateway.move_traffic("animals", version, None, from_revision=0, by="test", why="test")
        yield World(shop, gateway, fakes)


@pytest.mark.parametrize("where", ["on_mlflow", "on_label_studio"])
def test_a_flagged_answer_becomes_a_training_row(
    where: str, world: World, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    people: People = request.getfixturevalue(where)
    labels = world.shop.spec("animals").task.labels
    spec = spec_of(world, tmp_path, people)
    flagged, wished = f"{where}-flagged", f"{where}-wished"
    assert world.ask(ASKED, flagged) == "cat"
    assert world.ask(ASKED, wished) == "cat"
    world.ask(next(iter(ANSWERS)), f"{where}-sure")
    wait_for(lambda: len(world.gateway.reviews("animals", 10)) == 2)

    first = run(spec)
    assert (first.sent, first.waiting, first.rows, first.trouble) == (2, 2, 0, "")
    assert world.gateway.reviews("animals", 10) == []
    assert people.read(spec, flagged) == {"input": ASKED, "filled_in": "cat"}
    again = run(spec)  # what is filled in is nobody's answer
    assert (again.sent, again.waiting, again.rows) == (0, 2, 0)

    right = next(label for label in labels if label != "cat")
    people.answer(spec, flagged, right)
    done = run(spec)
    assert (done.waiting, done.rows, done.candidates, done.new, done.agreement) == (1, 1, 0, 1, 0.0)
    (row,) = read_lines(Path(spec.rows))
    assert row == {"id": f"review-{flagged}", "text": ASKED, "label": right}
    assert httpx.get(done.page.split("#")[0], timeout=30.0, follow_redirects=True).is_success

    rows = trained_on(world, spec, tmp_path)
    assert [(one.target, one.messages[0].content) for one in rows if one.id == f"review-{flagged}"] == [(right, ASKED)]

    # The other one, with the same text, is wanted for the golden set: the row leaves training.
    people.answer(spec, wished, right, golden=True)
    last = run(spec)
    assert (last.waiting, last.rows, last.candidates) == (0, 0, 1)
    assert [one["id"] for one in read_lines(Path(spec.golden_candidates))] == [f"review-{wished}"]
    assert not [one for one in trained_on(world, spec, tmp_path) if one.id.startswith("review-")]


@pytest.fixture
def page() -> Iterator[Any]:
    """A page of a browser."""
    if CHROMIUM is None:
        reason = "chromium is not installed (apt-get install chromium)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # In a container, Chromium's sandbox needs privileges that it does not get; the one site it opens is ours.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 1500, "height": 1000})
        opened.set_default_timeout(60_000)
        yield opened
        browser.close()


@pytest.mark.browser
def test_mlflows_page_has_the_answer_filled_in_and_saving_confirms_it(
    page: Any, on_mlflow: OnMlflow, world: World, tmp_path: Path
) -> None:
    spec = spec_of(world, tmp_path, on_mlflow).model_copy(update={"name": "page"})
    queue = open_queue(spec)
    assert queue.send([item(1, name="page", answer="dog", choices=())]) == 1
    page.goto(queue.page)
    page.get_by_text("page", exact=True).last.click()
    page.get_by_text("text 1", exact=True).first.click()
    page.get_by_text("The model's own is filled in").wait_for()
    twice = page.get_by_text("dog", exact=True)  # what it said, and in the form, which is filled in a little later
    twice.nth(1).wait_for()
    assert twice.count() == 2
    page.get_by_role("button", name="Submit").click()
    wait_for(lambda: queue.waiting() == 0)
    (found,) = queue.answers()
    assert [(one.annotator, one.answer, one.golden) for one in found.said] == [("default", "dog", False)]


@pytest.mark.browser
def test_label_studios_page_has_the_answer_filled_in_and_submitting_confirms_it(
    page: Any, on_label_studio: OnLabelStudio, world: World, tmp_path: Path
) -> None:
    spec = spec_of(world, tmp_path, on_label_studio).model_copy(update={"name": "page"})
    queue = open_queue(spec)
    assert queue.send([item(1, name="page", answer="dog", choices=())]) == 1
    page.goto(str(on_label_studio.http.base_url.join("/user/login/")))
    page.fill("input[name=email]", USER)
    page.fill("input[name=password]", PASSWORD)
    page.keyboard.press("Enter")
    page.wait_for_url(lambda url: "/user/login" not in url)
    page.goto(f"{queue.page}?labeling=1")
    page.get_by_text("complaints@1 says what is filled in (flagged)").wait_for()
    page.get_by_role("button", name="Submit").first.click()
    wait_for(lambda: queue.waiting() == 0)
    (found,) = queue.answers()
    assert [(one.annotator, one.answer, one.golden) for one in found.said] == [(USER, "dog", False)]


def test_two_people_look_at_each_answer_in_mlflow(on_mlflow: OnMlflow, world: World, tmp_path: Path) -> None:
    users = ("ada", "grace", "edsger")
    spec = spec_of(world, tmp_path, on_mlflow).model_copy(update={"name": "pairs", "annotators": 2, "users": users})
    queue = open_queue(spec)
    items = [item(number, name="pairs", answer="cat") for number in range(12)]
    assert queue.send(items) == 12
    assert open_queue(spec).send([*items, item(12, name="pairs", answer="cat")]) == 1  # another run, sent again
    queues = on_mlflow.queues(spec)
    assert sorted(queues) == ["pairs: ada", "pairs: edsger", "pairs: grace"]
    held = {name: on_mlflow.items(queues[f"pairs: {name}"]["queue_id"]) for name in users}
    asked = [sum(one.id in held[name] for name in users) for one in items]
    assert asked == [2] * 12
    assert min(len(found) for found in held.values()) >= 4  # the work is shared
    one = items[0]
    first, second = (name for name in users if one.id in held[name])
    on_mlflow.answer(spec, one.id, "dog", by=first, queue=f"pairs: {first}")
    assert (queue.answers(), queue.waiting()) == ([], 13)  # the other has not looked yet
    on_mlflow.answer(spec, one.id, "cat", by=second, queue=f"pairs: {second}")
    (found,) = queue.answers()
    assert found.item == one
    assert {said.annotator: said.answer for said in found.said} == {first: "dog", second: "cat"}
    assert queue.waiting() == 12


def test_open_answers_are_texts(on_label_studio: OnLabelStudio, world: World, tmp_path: Path) -> None:
    task = world.shop.spec("animals").task.model_copy(update={"kind": "chat", "labels": ()})
    spec = spec_of(world, tmp_path, on_label_studio).model_copy(update={"name": "open", "task": task})
    queue = open_queue(spec)
    one: ReviewItem = item(1, name="open", answer="A <b>bold</b> & long answer", choices=())
    assert queue.send([one, one]) == 1
    assert on_label_studio.read(spec, one.id)["filled_in"] == one.answer
    on_label_studio.answer(spec, one.id, "A better one")
    (found,) = queue.answers()
    assert [(said.annotator, said.answer, said.golden) for said in found.said] == [(USER, "A better one", False)]


def test_a_wrong_key_is_said_and_not_shown(
    on_label_studio: OnLabelStudio, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = "f" * 40
    monkeypatch.setenv(LABEL_STUDIO_KEY, wrong)
    with pytest.raises(ServiceError, match="HTTP 401") as error:
        open_queue(spec_of(world, tmp_path, on_label_studio))
    assert wrong not in str(error.value)
    assert LABEL_STUDIO_KEY in error.value.fix


def test_a_personal_access_token_is_exchanged(
    on_label_studio: OnLabelStudio, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = on_label_studio.ask("POST", "/api/token/")
    monkeypatch.setenv(LABEL_STUDIO_KEY, made["token"])
    spec = spec_of(world, tmp_path, on_label_studio).model_copy(update={"name": "token"})
    assert open_queue(spec).send([item(1, name="token")]) == 1


# -- what the tests share ---------------------------------------------------------------------------------------------


def spec_of(world: World, tmp_path: Path, people: People) -> ReviewSpec:
    ours = world.shop.spec("animals")
    server_of = {"tracking_uri": str(people.http.base_url)} if isinstance(people, OnMlflow) else {}
    return ReviewSpec(
        name="animals", rows=str(tmp_path / "reviews" / "rows.jsonl"),
        golden_candidates=str(tmp_path / "reviews" / "golden.jsonl"), data=DataSpec(source="unused.jsonl"),
        task=ours.task, execution=ExecutionSpec(store=ours.execution.store, **server_of), **people.queue,
    )  # fmt: skip


def run(spec: ReviewSpec) -> ReviewResult:
    state = review(spec, return_state=True)
    assert state.name == "Reviewed", state.message
    result: ReviewResult = state.result()
    return result


def trained_on(world: World, spec: ReviewSpec, tmp_path: Path) -> list[Any]:
    """Rows of both splits of a training that has the reviews beside its own data."""
    draw = random.Random(4)
    labels = spec.task.labels
    source = write_lines(
        tmp_path / "rows.jsonl",
        [{"id": f"own-{n}", "text": sentence(draw), "label": labels[n % len(labels)]} for n in range(120)],
    )
    training: RetrainSpec = world.shop.spec("animals").model_copy(
        update={
            "data": DataSpec(source=str(source), also=(spec.rows,)),
            "curate": CurateSpec(
                dev_share=0.2, max_label_drift=1.0,
                accept_risks={"few_rows": "a test of few rows", "dev_rows": "a test of few rows",
                              "learning_rate": "a test of few rows"},
            ),
        }
    )  # fmt: skip
    frozen = world.shop.golden  # the shop's manifest is a short one
    manifest = {"name": "animals", "task": spec.task.model_dump(mode="json"), "digest": frozen.digest}
    Path(frozen.path, "golden.json").write_text(json.dumps(manifest | {"items": frozen.items}))
    golden = open_golden_set.fn(training.evaluation())
    valid = validate_dataset.fn(ingest_dataset.fn(training), None, training)
    splits = curate_dataset.fn(valid, golden, training)
    store = Store(training.execution.store)
    files = store.files(store.open(splits.uri))
    return [row for name in ("train.jsonl", "dev.jsonl") for row in read_rows(files / name)]


def wait_for(done: Callable[[], bool], seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < until, f"not within {seconds:.0f} s"
        time.sleep(0.1)
