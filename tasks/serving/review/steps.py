"""Review's Prefect tasks: from the gateway to people, and from what they say to rows."""

from __future__ import annotations

from typing import NamedTuple

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed

from tasks.contracts.errors import ServiceError
from tasks.contracts.review import Review, ReviewItem, ReviewResult, ReviewSpec
from tasks.runtime import say_done
from tasks.serving.client import gateway_of
from tasks.serving.review.queue import open_queue
from tasks.serving.review.rows import write_reviews
from tasks.serving.review.words import review_headline, review_markdown, review_state_name


class Fetched(NamedTuple):
    """What the gateway had for people.

    Attributes:
        items: oldest first; they stay at the gateway until it is told that they have been sent.
        trouble: why nothing could be fetched; empty where it could.
    """

    items: tuple[ReviewItem, ...]
    trouble: str = ""


@task(name="fetch from gateway", persist_result=False, cache_policy=NO_CACHE)
def fetch_items(spec: ReviewSpec) -> Fetched:
    """Fetch what waits at the gateway. One that does not answer does not keep people's answers from coming back."""
    try:
        with gateway_of(spec.execution) as gateway:
            items = gateway.reviews(spec.name, spec.batch)
    except ServiceError as error:
        say_done("fetch from gateway", f"nothing is fetched: {error.what}", reused=False)
        return Fetched((), str(error))
    say_done("fetch from gateway", f"{len(items):,} answers wait", reused=False)
    return Fetched(tuple(items))


@task(name="send", persist_result=False, cache_policy=NO_CACHE)
def send_items(fetched: Fetched, spec: ReviewSpec) -> int:
    """Put them into the queue, then have the gateway forget them: killed in between, they are sent twice and are there
    once.

    Raises:
        ServiceError: the queue cannot be used. Everything stays at the gateway.
    """
    if not fetched.items:
        return 0
    new = open_queue(spec).send(fetched.items)
    with gateway_of(spec.execution) as gateway:
        gateway.forget_reviews(spec.name, [item.id for item in fetched.items])
    say_done("send", f"{new:,} new in {spec.queue.value}, {len(fetched.items) - new:,} were there", reused=False)
    return new


class Collected(NamedTuple):
    """What the queue has.

    Attributes:
        reviews: all that people have finished.
        waiting: items that they have not.
        page: where they review.
    """

    reviews: tuple[Review, ...]
    waiting: int
    page: str


@task(name="collect", persist_result=False, cache_policy=NO_CACHE)
def collect_answers(spec: ReviewSpec) -> Collected:
    """Read back what people have said so far.

    Raises:
        ServiceError: the queue cannot be used.
    """
    queue = open_queue(spec)
    collected = Collected(tuple(queue.answers()), queue.waiting(), queue.page)
    say_done("collect", f"{len(collected.reviews):,} reviewed, {collected.waiting:,} wait", reused=False)
    return collected


@task(name="write rows", persist_result=False, cache_policy=NO_CACHE)
def write_rows_of(collected: Collected, sent: int, fetched: Fetched, spec: ReviewSpec) -> ReviewResult:
    """Write rows, candidates for the golden set and the record of reviews."""
    written = write_reviews(collected.reviews, spec)
    result = written.result(
        sent=sent, waiting=collected.waiting, page=collected.page, trouble=fetched.trouble
    )  # fmt: skip
    say_done("write rows", f"{result.rows:,} rows, {result.candidates:,} candidates, {result.new:,} new", reused=False)
    return result


@task(name="publish review", persist_result=False, cache_policy=NO_CACHE)
def publish_review(result: ReviewResult, spec: ReviewSpec) -> None:
    """Show on the run's page what was sent, what waits and where, and what people disagree about."""
    key = f"{spec.name.replace('_', '-')}-review"
    create_markdown_artifact(review_markdown(result, spec), key=key, description=review_headline(result, spec.name))
    say_done("review", review_headline(result, spec.name), reused=False)


def review_state(result: ReviewResult, spec: ReviewSpec) -> State[ReviewResult]:
    """The run's final state: completed, named for whether the gateway was there."""
    return Completed(name=review_state_name(result), message=review_headline(result, spec.name), data=result)
