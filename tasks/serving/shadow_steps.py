"""The Prefect tasks of a shadow report."""

from __future__ import annotations

from pathlib import Path

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from tasks.contracts.errors import SpecError
from tasks.contracts.observe import ShadowReportSpec, ShadowResult
from tasks.runtime import open_store, say_done
from tasks.serving.review.rows import read_records
from tasks.serving.shadow import shadow_report
from tasks.serving.shadow_pairs import Comparison, find_record, read_comparison
from tasks.serving.shadow_words import shadow_markdown


@task(name="read reviews", persist_result=False, cache_policy=NO_CACHE)
def read_reviews(spec: ShadowReportSpec) -> dict[str, str]:
    """What people said is right, by the id of the request; none where no reviews are named.

    Raises:
        SpecError: the file that is named is not there.
        StoreError: it cannot be read.
    """
    if spec.reviews is None:
        return {}
    path = Path(spec.reviews)
    if not path.is_file():
        raise SpecError(
            "There are no reviews there.", where=str(path), fix="name the reviews.jsonl that `goldgate review` writes"
        )
    records = [one for one in read_records(path) if one.name == spec.name]
    right = {one.item: one.right for one in records if one.right is not None}
    say_done("read reviews", f"{len(right):,} answers on which people agree", reused=False)
    return right


@task(name="read pairs", persist_result=False, cache_policy=NO_CACHE)
def read_pairs(right: dict[str, str], spec: ShadowReportSpec) -> Comparison:
    """The requests that both have answered, with what people said of them."""
    home, record = find_record(_folder(spec), spec.name, spec.shadow)
    comparison = read_comparison(home, record, right)
    reviewed = sum(one.review is not None for one in comparison.pairs)
    said = f"{len(comparison.pairs):,} beside {comparison.live}, {reviewed:,} disagreements reviewed"
    say_done("read pairs", said, reused=False)
    return comparison


@task(name="compare", persist_result=False, cache_policy=NO_CACHE)
def compare_pairs(comparison: Comparison) -> ShadowResult:
    """What they say of the difference, and when it will be decided."""
    shadow = comparison.record.shadow
    report = shadow_report(comparison.pairs, shadow.spec)
    say_done("compare", report.why, reused=False)
    return ShadowResult(
        name=comparison.record.name, id=shadow.id, live=comparison.live, shadow=comparison.shadow, report=report,
        margin=shadow.spec.margin, other_live=comparison.other_live, shadow_cost=comparison.shadow_cost,
        errors=comparison.errors,
    )  # fmt: skip


@task(name="publish report", persist_result=False, cache_policy=NO_CACHE)
def publish_shadow(result: ShadowResult) -> None:
    """Show it on the page of the run."""
    key = f"{result.name.replace('_', '-')}-shadow"
    create_markdown_artifact(shadow_markdown(result), key=key, description=result.report.why)


def _folder(spec: ShadowReportSpec) -> Path:
    if spec.folder is not None:
        return Path(spec.folder)
    store = open_store(spec.execution)
    if not store.local:
        raise SpecError(
            "The store is remote, and a gateway keeps its comparisons on its own machine.",
            where=store.root,
            fix="run this where the gateway runs, and set `folder` to serving/shadow in its store",
        )
    return Path(store.root) / "serving" / "shadow"
