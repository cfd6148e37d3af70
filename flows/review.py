"""From answers that the gateway has put aside to people, and from what they say to training rows."""

from __future__ import annotations

from prefect import flow
from prefect.client.schemas.objects import State

from tasks.contracts.review import ReviewResult, ReviewSpec
from tasks.serving.review.steps import (
    collect_answers,
    fetch_items,
    publish_review,
    review_state,
    send_items,
    write_rows_of,
)


@flow(name="review", flow_run_name="review {spec.name}", persist_result=False)
def review(spec: ReviewSpec) -> State[ReviewResult]:
    """Send what waits to the queue, and make rows of all that people have said so far.

    Ends Completed as Reviewed, or as Gateway not reached where only people's answers could come back; Failed where the
    queue cannot be used, and then everything stays at the gateway.
    """
    fetched = fetch_items(spec)
    sent = send_items(fetched, spec)
    collected = collect_answers(spec)
    result = write_rows_of(collected, sent, fetched, spec)
    publish_review(result, spec)
    return review_state(result, spec)
