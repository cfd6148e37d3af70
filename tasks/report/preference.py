"""What the preference stage did, in words, as a table, and on the run's page."""

from __future__ import annotations

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from tasks.contracts.dev import DevResult
from tasks.contracts.numbers import metric_name, percent, points
from tasks.contracts.prefer import DevEffect, PairsRef, PreferResult
from tasks.contracts.references import MetricComparison, TrainedModelRef
from tasks.contracts.spec import RetrainSpec
from tasks.runtime import say_done

_WORDS = {DevEffect.GAIN: "a gain", DevEffect.LOSS: "a loss", DevEffect.NONE_SHOWN: "no difference shown"}


def effect_of(row: MetricComparison) -> DevEffect:
    """Gain or loss where the whole interval of the difference lies on one side of zero."""
    if row.low > 0:
        return DevEffect.GAIN
    return DevEffect.LOSS if row.high < 0 else DevEffect.NONE_SHOWN


def effect_sentence(row: MetricComparison) -> str:
    """What one metric says, with its interval."""
    return (
        f"{metric_name(row.metric)} on {row.n:,} held-out dev rows: {percent(row.baseline)} before, "
        f"{percent(row.candidate)} after: {points(row.difference)} points "
        f"({100 * row.confidence:.0f} % interval {points(row.low)} to {points(row.high)}): {_WORDS[effect_of(row)]}."
    )


def conclude(
    spec: RetrainSpec,
    trained: TrainedModelRef,
    tuned: TrainedModelRef | None,
    pairs: PairsRef,
    before: DevResult,
    after: DevResult | None,
    comparisons: tuple[MetricComparison, ...],
) -> PreferResult:
    """Put together what came of the stage; without `tuned`, why it stopped."""
    effect, sentence = DevEffect.NOT_TUNED, f"Not tuned: {pairs.too_few}."
    if comparisons:
        effect, sentence = effect_of(comparisons[0]), effect_sentence(comparisons[0])
    return PreferResult(
        name=spec.name,
        trained=trained,
        tuned=tuned,
        pairs=pairs,
        before=before,
        after=after,
        comparisons=comparisons,
        effect=effect,
        sentence=sentence,
    )


def preference_table(result: PreferResult) -> list[tuple[str, str, str, str, str]]:
    """A row for each metric of all rows: its name, before, after, difference in points, and the interval of that."""
    return [
        (
            metric_name(row.metric),
            percent(row.baseline),
            percent(row.candidate),
            points(row.difference),
            f"{points(row.low)} to {points(row.high)}",
        )
        for row in result.comparisons
        if row.slice is None
    ]


def preference_markdown(result: PreferResult) -> str:
    """The stage for the page of a run."""
    pairs = result.pairs
    lines = [
        f"# {result.name}: preference tuning",
        "",
        f"**{result.sentence}**",
        "",
        f"{pairs.pairs:,} pairs from {pairs.wrong:,} wrong answers to {pairs.asked:,} dev rows. The effect is measured "
        "on the other dev rows; the golden set was not asked.",
    ]
    if result.tuned is not None:
        lines += ["", "| metric | before | after | difference | 95 % interval |", "|---|---:|---:|---:|---|"]
        lines += [f"| {' | '.join(row)} |" for row in preference_table(result)]
        lines += [
            "",
            f"Model before: `{result.trained.merged_digest}`  ",
            f"Model after: `{result.tuned.merged_digest}` (`{result.tuned.uri}`)",
        ]
    return "\n".join(lines) + "\n"


@task(name="publish preference", persist_result=False, cache_policy=NO_CACHE)
def publish_preference(result: PreferResult) -> None:
    """Show what the stage did on the page of the run."""
    create_markdown_artifact(
        preference_markdown(result), key=f"{result.name.replace('_', '-')}-preference", description=result.sentence
    )
    say_done("preference", result.sentence, reused=False)
