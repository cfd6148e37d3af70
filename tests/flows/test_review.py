"""The review flow over a gateway and a queue in this process: what is sent, what comes back, and who may be down."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from typer.testing import CliRunner

from flows.review import review
from goldgate.cli import app
from goldgate.review import load_review
from tasks.contracts.errors import ServiceError, SpecError
from tasks.contracts.review import Review, Reviewed, ReviewItem, ReviewResult, ReviewSpec
from tasks.serving.review import steps
from tests.data.toy_data import read_lines
from tests.prefect_server import prefect_server
from tests.serving.test_review_rows import spec as make_spec
from tests.serving.test_review_spool import NOON, item

pytestmark = pytest.mark.timeout(180)  # whoever comes first starts the server
EXAMPLE = Path(__file__).parents[2] / "examples" / "complaints" / "review.yaml"


@pytest.fixture(scope="module", autouse=True)
def _server() -> Iterator[None]:
    with prefect_server():
        yield


class Gateway:
    """In the place of `GatewayClient`; can be down."""

    refused = ServiceError("The gateway does not answer: connection refused", where="http://gateway", fix="start it")

    def __init__(self) -> None:
        self.items: list[ReviewItem] = []
        self.down = self.down_after_sending = False

    def __enter__(self) -> Gateway:
        return self

    def __exit__(self, *_: object) -> None: ...

    def reviews(self, name: str, limit: int) -> list[ReviewItem]:
        if self.down:
            raise ServiceError(
                "The gateway does not answer: connection refused", where="http://gateway", fix="start it"
            )
        return [one for one in self.items if one.name == name][:limit]

    def forget_reviews(self, name: str, ids: Sequence[str]) -> None:
        if self.down_after_sending:
            raise ServiceError(
                "The gateway does not answer: connection refused", where="http://gateway", fix="start it"
            )
        self.items = [one for one in self.items if one.id not in ids]


class Queue:
    """In the place of MLflow; can be down."""

    page = "http://queue/page"

    def __init__(self) -> None:
        self.held: dict[str, ReviewItem] = {}
        self.said: dict[str, list[Reviewed]] = {}
        self.down = False

    def send(self, items: Sequence[ReviewItem]) -> int:
        new = [one for one in items if one.id not in self.held]
        self.held |= {one.id: one for one in new}
        return len(new)

    def answers(self) -> list[Review]:
        return [Review(item=self.held[one], said=tuple(said)) for one, said in self.said.items()]

    def waiting(self) -> int:
        return len(self.held.keys() - self.said.keys())

    def answer(self, item_id: str, answer: str, **more: Any) -> None:
        self.said.setdefault(item_id, []).append(
            Reviewed(item=item_id, annotator=more.pop("by", "ada"), answer=answer, at=NOON, **more)
        )


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Gateway:
    made = Gateway()
    monkeypatch.setattr(steps, "gateway_of", lambda execution: made)
    return made


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Queue:
    made = Queue()

    def open_queue(spec: ReviewSpec) -> Queue:
        if made.down:
            raise ServiceError("The MLflow server does not answer: refused", where="http://queue", fix="start it")
        return made

    monkeypatch.setattr(steps, "open_queue", open_queue)
    return made


def run(spec: ReviewSpec) -> tuple[str, ReviewResult]:
    state = review(spec, return_state=True)
    result: ReviewResult = state.result()
    return str(state.name), result


def page(key: str) -> str:
    """What the last artifact of this key shows."""
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])))
    return str(max(found, key=lambda one: str(one.created)).data)


def test_items_go_to_people_and_come_back_as_rows(tmp_path: Path, gateway: Gateway, queue: Queue) -> None:
    spec = make_spec(tmp_path)
    gateway.items = [item(1), item(2), item(3), item(9, name="tickets")]
    name, result = run(spec)
    assert (name, result.sent, result.waiting, result.rows) == ("Reviewed", 3, 3, 0)
    assert gateway.items == [item(9, name="tickets")]
    queue.answer("request-1", "card")
    queue.answer("request-2", "loan", golden=True)
    queue.answer("request-3", "card")
    queue.answer("request-3", "loan", by="grace")
    name, result = run(spec)
    assert (result.sent, result.waiting, result.rows, result.candidates, result.disputed, result.new) == (
        0, 0, 1, 1, 1, 2,
    )  # fmt: skip
    assert [row["id"] for row in read_lines(Path(spec.rows))] == ["review-request-1"]
    assert result.agreement == 0.5
    shown = page("complaints-review")
    assert "[Where people review](http://queue/page)" in shown
    assert "| request-3 | complaints@1 | disputed: 1 × card, 1 × loan | ada, grace |" in shown
    assert "text 3" not in shown  # what people ask is not on the page


def test_a_batch_is_no_more_than_asked(tmp_path: Path, gateway: Gateway, queue: Queue) -> None:
    gateway.items = [item(number) for number in range(5)]
    _, result = run(make_spec(tmp_path, batch=2))
    assert (result.sent, len(gateway.items)) == (2, 3)


def test_with_the_queue_down_everything_stays_at_the_gateway(tmp_path: Path, gateway: Gateway, queue: Queue) -> None:
    gateway.items = [item(1)]
    queue.down = True
    with pytest.raises(ServiceError, match="MLflow server does not answer"):
        run(make_spec(tmp_path))
    assert gateway.items == [item(1)]
    assert not Path(make_spec(tmp_path).rows).exists()
    queue.down = False
    assert run(make_spec(tmp_path))[1].sent == 1


def test_with_the_gateway_down_answers_still_come_back(tmp_path: Path, gateway: Gateway, queue: Queue) -> None:
    spec = make_spec(tmp_path)
    gateway.items = [item(1)]
    run(spec)
    queue.answer("request-1", "loan")
    gateway.down = True
    name, result = run(spec)
    assert (name, result.rows, result.sent) == ("Gateway not reached", 1, 0)
    assert "connection refused" in result.trouble
    assert "**Nothing was fetched from the gateway:**" in page("complaints-review")


def test_a_run_that_is_killed_between_sending_and_forgetting_sends_again_and_once(
    tmp_path: Path, gateway: Gateway, queue: Queue
) -> None:
    gateway.items = [item(1)]
    gateway.down_after_sending = True
    with pytest.raises(ServiceError):
        run(make_spec(tmp_path))
    gateway.down_after_sending = False
    _, result = run(make_spec(tmp_path))
    assert (result.sent, result.waiting, gateway.items) == (0, 1, [])


# -- the command line -------------------------------------------------------------------------------------------------


def test_the_example_takes_task_and_data_from_the_training() -> None:
    spec = load_review(EXAMPLE, ["data.also=[reviews/rows.jsonl]"])
    assert (spec.name, len(spec.task.labels), spec.queue.value) == ("complaints", 8, "mlflow")
    assert spec.rows == str(EXAMPLE.parent / "reviews" / "rows.jsonl")
    assert spec.golden_candidates == str(EXAMPLE.parent / "reviews" / "golden_candidates.jsonl")
    assert spec.data.source == str(EXAMPLE.parent / "complaints.jsonl")
    assert spec.data.also == (spec.rows,)


def test_a_configuration_that_does_not_fit_names_its_field(tmp_path: Path) -> None:
    (tmp_path / "review.yaml").write_text("task_from: 3\n")
    with pytest.raises(SpecError, match="must name a file"):
        load_review(tmp_path / "review.yaml")
    with pytest.raises(SpecError, match="annotators"):
        load_review(EXAMPLE, ["annotators=two"])


def test_the_command_says_what_came_of_it(
    tmp_path: Path, gateway: Gateway, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway.items = [item(1)]
    settings = [f"rows={tmp_path}/rows.jsonl", f"golden_candidates={tmp_path}/golden.jsonl"]
    settings.append(f"execution.store={tmp_path}/store")
    command = ["review", str(EXAMPLE), *(word for one in settings for word in ("--set", one))]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0
    assert "complaints: 1 answers sent to people, 1 wait; 0 training rows" in done.output
    assert "People review at http://queue/page" in done.output
    gateway.down = True
    down = CliRunner().invoke(app, command, catch_exceptions=False)
    assert down.exit_code == 3
    assert "so nothing was fetched" in down.output
