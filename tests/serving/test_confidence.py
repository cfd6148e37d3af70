"""Confidence, its calibration and the threshold: against values worked out by hand, and simulated promises."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom

from tasks.contracts.confidence import Calibration, ConfidenceSpec, Reliability, ReviewThreshold, Scaling
from tasks.contracts.errors import EvaluationError
from tasks.evaluation.engines.choices import Choices
from tasks.logprobs import TokenLogprob, closed_answer_probability, read_logprobs
from tasks.serving.confidence import (
    calibrate_answers,
    calibrate_labels,
    calibrated,
    calibrated_labels,
    choose_threshold,
    needs_review,
    reliability,
)

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
SPEC = ConfidenceSpec()


# -- the probability of an answer -------------------------------------------------------------------------------------


def token(text: str, probability: float) -> TokenLogprob:
    return TokenLogprob(text.encode(), math.log(probability))


END = "<|im_end|>"


@pytest.mark.parametrize(
    ("tokens", "answer", "choices", "expected"),
    [
        # "ca" leaves only card: how it is spelt out does not count, nor does the end
        ([token("ca", 0.8), token("r", 0.5), token("d", 1.0), token(END, 0.9)], "card", ("card", "loan"), 0.8),
        ([token("car", 0.8), token("d", 0.5)], "card", ("card", "cart"), 0.4),
        # an answer that another begins with is settled by the end token
        ([token("card", 0.6), token(END, 0.5)], "card", ("card", "card fraud"), 0.3),
        ([token("card", 0.6), token(" fraud", 0.5), token(END, 1.0)], "card fraud", ("card", "card fraud"), 0.3),
        # the first token settles a single choice, as in the embedded engine
        ([token("c", 0.7), token("ard", 0.5)], "card", ("card",), 0.7),
        ([token("é", 0.25), token("t", 0.5)], "ét", ("ét", "hiver"), 0.25),
        # rounding must not make it more than certain
        ([TokenLogprob(b"card", 1e-9)], "card", ("card", "loan"), 1.0),
        ([TokenLogprob(b"card", -9999.0)], "card", ("card", "loan"), 0.0),
    ],
)
def test_a_closed_answer_is_as_probable_as_its_tokens_up_to_where_it_is_settled(
    tokens: list[TokenLogprob], answer: str, choices: tuple[str, ...], expected: float
) -> None:
    assert closed_answer_probability(tokens, answer, choices, "request 7") == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("tokens", "answer", "reason"),
    [
        ([token("car", 0.9)], "car", "none of the choices"),
        ([], "card", "do not spell the answer"),
        ([token("lo", 0.9), token("an", 0.9)], "card", "do not spell the answer"),
        ([token("card", 0.9)], "card", "do not spell the answer"),  # the end token that settles it is missing
    ],
)
def test_tokens_that_do_not_settle_the_answer_are_refused(tokens: list[TokenLogprob], answer: str, reason: str) -> None:
    with pytest.raises(EvaluationError, match=reason) as refused:
        closed_answer_probability(tokens, answer, ("card", "card fraud", "loan"), "request 7")
    assert refused.value.where == "request 7"


def test_it_is_the_probability_that_the_embedded_engine_gives() -> None:
    # The engine's own rule for what may come next, a made-up model of random logits, and an answer that goes on to the
    # end as vLLM draws it.
    labels = ("card", "card fraud", "care", "loan", "loans")
    texts = sorted({label[i:j].encode() for label in labels for i in range(len(label)) for j in range(i + 1, i + 4)})
    vocabulary = {text: [number] for number, text in enumerate(texts)}
    end = len(texts)
    choices = Choices(labels, vocabulary, [end])
    seen: set[str] = set()
    for seed in range(40):
        logits = np.random.default_rng(seed).normal(size=end + 1) * 3
        drawn: list[TokenLogprob] = []
        text, engine, settled = b"", 0.0, False
        while not drawn or drawn[-1].text != END.encode():
            allowed = choices.allowed(text)
            best = max(allowed, key=lambda number: logits[number])
            logprob = float(logits[best] - np.log(np.exp(logits[allowed]).sum()))
            if not settled:
                engine += logprob
            drawn.append(TokenLogprob(END.encode() if best == end else texts[best], logprob))
            if best != end:
                text = choices.after(text, best)
            settled = settled or best == end or choices.settled(text) is not None
        seen.add(text.decode())
        assert closed_answer_probability(drawn, text.decode(), labels, "x") == pytest.approx(math.exp(engine))
    assert len(seen) >= 3


def test_logprobs_are_read_from_a_chat_completion() -> None:
    content = [{"token": "ca", "bytes": [99, 97], "logprob": -0.5, "top_logprobs": []}]
    assert read_logprobs(content, "request 7") == [TokenLogprob(b"ca", -0.5)]
    for broken in ({"bytes": None, "logprob": -0.5}, {"bytes": [99]}, {"bytes": [99], "logprob": math.nan}):
        with pytest.raises(EvaluationError, match="for token 2 of its answer"):
            read_logprobs([*content, broken], "request 7")


def test_a_gateway_pays_for_no_numpy() -> None:
    code = "import sys, tasks.serving.confidence; print(sorted({'numpy', 'scipy', 'sklearn'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- temperature ------------------------------------------------------------------------------------------------------


def draw(
    n: int, temperature: float, seed: int, labels: int = 8, spread: float = 2.5
) -> tuple[Floats, NDArray[np.int64]]:
    """Log-probabilities of a model whose logits are `temperature` times too far apart, and the right labels."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(n, labels)) * spread
    truth = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    target = (truth.cumsum(axis=1) > generator.random((n, 1))).argmax(axis=1)
    sure = logits * temperature
    return sure - np.log(np.exp(sure).sum(axis=1, keepdims=True)), target


def answers(n: int, temperature: float, seed: int, labels: int = 8, spread: float = 2.5) -> tuple[Floats, Flags]:
    table, target = draw(n, temperature, seed, labels, spread)
    return np.exp(table.max(axis=1)), table.argmax(axis=1) == target


def of(temperature: float, offset: float = 0.0, scaling: Scaling = Scaling.ANSWER) -> Calibration:
    empty = Reliability(
        rows=1, accuracy=1, confidence=1, ece=0, ece_by_chance=0, ece_p_value=1, brier=0, log_loss=0, bins=()
    )
    return Calibration(
        scaling=scaling,
        temperature=temperature,
        temperature_low=temperature,
        temperature_high=temperature,
        offset=offset,
        before=empty,
        after=empty,
    )


@pytest.mark.parametrize(
    ("confidence", "temperature", "offset", "expected"),
    [
        (0.8, 1.0, 0.0, 0.8),
        (0.8, 2.0, 0.0, 2 / 3),  # odds 4 become odds 2
        (0.5, 3.0, 0.0, 0.5),
        (0.5, 1.0, math.log(3), 0.75),
        (1.0, 1.0, 0.0, 1 / (1 + math.exp(-16))),  # a rounded 1 stays short of certainty
        (0.0, 4.0, 0.0, 1 / (1 + math.exp(4))),
    ],
)
def test_scaling_an_answer(confidence: float, temperature: float, offset: float, expected: float) -> None:
    assert calibrated(confidence, of(temperature, offset)) == pytest.approx(expected, rel=1e-9)


def test_scaling_all_labels() -> None:
    squared = calibrated_labels([math.log(p) for p in (0.64, 0.32, 0.04)], of(0.5, scaling=Scaling.LABELS))
    assert squared == pytest.approx([0.64**2 / 0.5136, 0.32**2 / 0.5136, 0.04**2 / 0.5136], rel=1e-9)
    assert calibrated_labels([0.0, -math.inf], of(1.0, scaling=Scaling.LABELS)) == pytest.approx([1.0, 0.0], abs=1e-9)


def test_an_answer_alone_is_not_scaled_by_the_temperature_of_all_labels() -> None:
    with pytest.raises(EvaluationError, match="learnt on the probabilities of all labels"):
        calibrated(0.8, of(2.0, scaling=Scaling.LABELS))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
@pytest.mark.parametrize("scaling", list(Scaling))
def test_a_known_temperature_is_found_again(temperature: float, scaling: Scaling) -> None:
    table, target = draw(3_000, temperature, seed=3)
    if scaling is Scaling.LABELS:
        found = calibrate_labels(table.tolist(), target.tolist(), SPEC)
    else:
        right = table.argmax(axis=1) == target
        found = calibrate_answers(np.exp(table.max(axis=1)).tolist(), right.tolist(), SPEC)
    assert found.temperature == pytest.approx(temperature, rel=0.1)
    assert found.temperature_low < found.temperature < found.temperature_high
    assert found.after.ece_p_value > 0.01
    if temperature == 2.5:
        assert found.before.confidence > found.before.accuracy + 0.1
        assert found.before.ece > 5 * found.before.ece_by_chance
        assert found.before.ece_p_value < 0.002
        assert abs(found.after.confidence - found.after.accuracy) < 0.01
        assert found.after.log_loss < found.before.log_loss
        assert found.after.brier < found.before.brier


def test_of_two_labels_the_answer_alone_says_all() -> None:
    table, target = draw(1_500, 2.0, seed=5, labels=2)
    right = table.argmax(axis=1) == target
    by_labels = calibrate_labels(table.tolist(), target.tolist(), SPEC)
    by_answer = calibrate_answers(np.exp(table.max(axis=1)).tolist(), right.tolist(), SPEC)
    assert by_answer.temperature == pytest.approx(by_labels.temperature, rel=0.08)
    assert abs(by_answer.offset) < 0.25
    assert by_labels.offset == 0.0


def test_the_interval_of_the_temperature_holds_it_in_19_of_20_dev_sets() -> None:
    held = 0
    for seed in range(120):
        table, target = draw(200, 1.7, seed=seed)
        found = calibrate_labels(table.tolist(), target.tolist(), SPEC)
        held += found.temperature_low <= 1.7 <= found.temperature_high
    assert binom.ppf(0.001, 120, 0.95) <= held <= binom.ppf(0.999, 120, 0.95)


def test_scaled_confidences_keep_their_order() -> None:
    scaled = [calibrated(p, of(2.3, -0.4)) for p in (0.0, 0.1, 0.5, 0.9, 0.999999, 1.0)]
    assert scaled == sorted(scaled)
    assert len(set(scaled)) == 6


def made(n: int, wrong: int) -> tuple[list[float], list[bool]]:
    confidences = np.random.default_rng(0).beta(5, 2, n).tolist()
    return confidences, [row >= wrong for row in range(n)]


@pytest.mark.parametrize(
    ("confidences", "right", "reason", "fix"),
    [
        (*made(99, 20), "99 dev rows are too few .*at least 100", "dev_share"),
        (*made(200, 0), "Of 200 answers on dev 0 are wrong", "without a calibration"),
        (*made(200, 1), "Of 200 answers on dev 1 is wrong", "without a calibration"),
        (*made(200, 196), "Of 200 answers on dev 4 are right", "better model"),
        ([0.5] * 200, [True] * 199, "200 confidences for 199 answers", "one confidence an answer"),
        ([1.2] * 200, [True] * 200, "1.2 is no probability", "from 0 to 1"),
        ([math.nan] * 200, [True] * 200, "nan is no probability", "from 0 to 1"),
        ([0.9] * 100 + [0.4] * 100, [True] * 100 + [False] * 100, "part right from wrong so well", "mistakes"),
        ([0.4] * 100 + [0.9] * 100, [True] * 100 + [False] * 100, "do not tell right answers from", "its own answer"),
    ],
)
def test_what_says_nothing_about_confidence_is_refused(
    confidences: list[float], right: list[bool], reason: str, fix: str
) -> None:
    with pytest.raises(EvaluationError, match=reason) as refused:
        calibrate_answers(confidences, right, SPEC)
    assert fix in refused.value.fix


@pytest.mark.parametrize(
    ("table", "targets"),
    [([[-0.1]] * 200, [0] * 200), ([[-0.1, -2.0]] * 200, [0] * 199), ([[math.nan, -2.0]] * 200, [0] * 200)],
)
def test_a_table_of_labels_that_does_not_fit_is_refused(table: list[list[float]], targets: list[int]) -> None:
    with pytest.raises(EvaluationError, match="have shape"):
        calibrate_labels(table, targets, SPEC)


# -- the diagram ------------------------------------------------------------------------------------------------------


def test_the_diagram_by_hand() -> None:
    sure = np.array([0.6] * 25 + [0.9] * 25)
    right = np.array([True] * 10 + [False] * 15 + [True] * 24 + [False])
    found = reliability(sure, right)
    assert [(b.low, b.high, b.rows, b.right, b.accuracy) for b in found.bins] == [
        (0.6, 0.6, 25, 10, 0.4),
        (0.9, 0.9, 25, 24, 0.96),
    ]
    assert found.ece == pytest.approx(0.5 * 0.2 + 0.5 * 0.06)
    assert found.brier == pytest.approx((10 * 0.16 + 15 * 0.36 + 24 * 0.01 + 0.81) / 50)
    assert found.log_loss == pytest.approx(
        -(10 * math.log(0.6) + 15 * math.log(0.4) + 24 * math.log(0.9) + math.log(0.1)) / 50
    )
    assert (found.accuracy, found.confidence) == (0.68, pytest.approx(0.75))
    # 10 of 25 by Wilson: 0.234 to 0.593 (Brown, Cai & DasGupta, Statistical Science 16 (2001) 101-133 give the form)
    assert (round(found.bins[0].accuracy_low, 3), round(found.bins[0].accuracy_high, 3)) == (0.234, 0.593)


def test_equal_confidences_stay_in_one_bin_and_all_rows_are_in_one() -> None:
    sure = np.array([0.99] * 300 + list(np.linspace(0.3, 0.9, 100)))
    found = reliability(sure, np.ones(400, dtype=np.bool_))
    assert sum(b.rows for b in found.bins) == 400
    assert [b.rows for b in found.bins if b.high == 0.99] == [300]
    assert all(before.high < after.low for before, after in zip(found.bins, found.bins[1:], strict=False))


def test_perfect_confidences_have_the_ece_that_chance_gives() -> None:
    generator = np.random.default_rng(1)
    found = []
    for _ in range(60):
        sure = generator.beta(4, 1, 300)
        found.append(reliability(sure, generator.random(300) < sure))
    assert np.mean([one.ece for one in found]) == pytest.approx(np.mean([one.ece_by_chance for one in found]), rel=0.1)
    assert min(one.ece_by_chance for one in found) > 0.02  # what the ECE of a perfect model is with 300 rows
    low = sum(one.ece_p_value <= 0.1 for one in found)
    assert low <= binom.ppf(0.999, 60, 0.1)


# -- the threshold ----------------------------------------------------------------------------------------------------


def accuracy_above(threshold: float, confidences: Floats, right: Flags) -> float:
    return float(right[confidences >= threshold].mean())


def surely(n: int, shares: Sequence[tuple[float, float, float]], seed: int) -> tuple[Floats, Flags]:
    """Confidences from bands (low, high, accuracy), as many from each."""
    generator = np.random.default_rng(seed)
    bands = np.array(shares)[generator.integers(0, len(shares), n)]
    return generator.uniform(bands[:, 0], bands[:, 1]), generator.random(n) < bands[:, 2]


WORLDS = {
    "well calibrated": lambda: answers(100_000, 1.0, seed=11, spread=4.0),
    "far too sure": lambda: answers(100_000, 3.0, seed=12, spread=4.0),
    "as good as the target everywhere": lambda: surely(100_000, [(0.3, 0.999999, 0.899)], seed=13),
    "wrong where it is surest": lambda: surely(100_000, [(0.3, 0.6, 0.7), (0.6, 0.97, 0.97), (0.97, 1, 0.6)], seed=14),
}


@pytest.mark.parametrize("world", list(WORLDS))
def test_the_target_is_missed_in_at_most_alpha_of_500_dev_sets(world: str) -> None:
    confidences, right = WORLDS[world]()
    spec = ConfidenceSpec(target_accuracy=0.9, alpha=0.1)
    generator = np.random.default_rng(2)
    missed = chosen = 0
    for _ in range(500):
        rows = generator.integers(0, len(confidences), 300)
        threshold = choose_threshold(confidences[rows].tolist(), right[rows].tolist(), spec)
        if threshold.at is not None:
            chosen += 1
            missed += accuracy_above(threshold.at, confidences, right) < 0.9
    assert missed <= binom.ppf(0.99, 500, 0.1)
    if world in ("well calibrated", "far too sure"):
        assert chosen > 400  # it is not safe by never choosing


def test_the_naive_choice_would_miss_it_far_more_often() -> None:
    # Why there is a procedure at all: the lowest threshold whose accuracy on dev reaches the target.
    confidences, right = WORLDS["well calibrated"]()
    generator = np.random.default_rng(2)
    missed = 0
    for _ in range(200):
        rows = generator.integers(0, len(confidences), 300)
        order = rows[np.argsort(-confidences[rows])]
        reaches = np.flatnonzero(np.cumsum(right[order]) / np.arange(1, 301) >= 0.9)
        missed += accuracy_above(confidences[order[reaches[-1]]], confidences, right) < 0.9
    assert missed > 80


def test_a_model_that_is_good_enough_needs_no_review() -> None:
    confidences, _ = answers(400, 1.0, seed=1)
    threshold = choose_threshold(confidences.tolist(), [True] * 400, SPEC)
    assert (threshold.at, threshold.coverage, threshold.more_rows) == (0.0, 1.0, None)
    assert threshold.reviews_per_thousand[0] == 0
    assert threshold.reviews_per_thousand[2] == pytest.approx(1000 * (1 - 0.025 ** (1 / 400)))
    assert not needs_review(0.0, threshold)


def test_the_threshold_by_hand() -> None:
    # 300 sure and right, 100 unsure of which half are right: the surest 300 pass, the next threshold down does not.
    threshold = choose_threshold([0.97] * 300 + [0.4] * 100, [True] * 350 + [False] * 50, SPEC)
    assert threshold.at is not None
    assert 0.4 < threshold.at <= 0.97
    assert threshold.coverage == 0.75
    assert threshold.accuracy == 1.0
    expected, low, high = threshold.reviews_per_thousand
    assert expected == 250
    assert (round(low), round(high)) == (208, 295)  # Clopper-Pearson of 100 of 400
    assert "300 are at or above" in threshold.why
    assert "Of 1,000 requests about 250 (208 to 295) go to review." in threshold.why
    # the lower bound is that of all right in 300 at the level it was tested at
    point = next(point for point in threshold.curve if point.at == threshold.at)
    assert threshold.accuracy_low == pytest.approx(point.level ** (1 / 300))
    assert point.level <= SPEC.alpha + 1e-12
    assert [p.shown for p in threshold.curve if p.rows == 400] == [False] * sum(p.rows == 400 for p in threshold.curve)


def test_the_curve_has_all_thresholds_from_the_strictest_to_none() -> None:
    confidences, right = answers(500, 1.0, seed=4)
    curve = choose_threshold(confidences.tolist(), right.tolist(), SPEC).curve
    assert [point.at for point in curve] == sorted((point.at for point in curve), reverse=True)
    assert (curve[-1].at, curve[-1].rows, curve[-1].right) == (0.0, 500, int(right.sum()))
    assert all(point.rows == int((confidences >= point.at).sum()) for point in curve)
    assert all(point.shown == (point.rows > 0 and point.level > 0 and point.accuracy_low >= 0.95) for point in curve)


def test_too_few_rows_are_told_how_many_more_would_do() -> None:
    # 60 of 60 right cannot show 0.95 at a third of 0.05: that takes 80.
    threshold = choose_threshold([0.9] * 60, [True] * 60, SPEC)
    assert threshold.at is None
    assert math.ceil(math.log(0.05 / 3) / math.log(0.95)) == 80
    assert threshold.more_rows is not None
    assert 20 <= threshold.more_rows <= 60
    assert "cannot be shown with these 60 dev rows" in threshold.why
    assert f"about {threshold.more_rows} more" in threshold.why
    assert (threshold.coverage, threshold.reviews_per_thousand) == (0.0, (1000.0, 1000.0, 1000.0))
    assert needs_review(1.0, threshold)
    again = 60 + threshold.more_rows
    assert choose_threshold([0.9] * again, [True] * again, SPEC).at is not None


def test_as_many_rows_more_show_it_most_of_the_time() -> None:
    # planned on the true accuracy of 0.96 above every threshold, for a target of 0.9
    shown = 0
    few = choose_threshold([0.9] * 50, [True] * 48 + [False] * 2, ConfidenceSpec(target_accuracy=0.9))
    assert few.at is None
    assert few.more_rows is not None
    n = 50 + few.more_rows
    for found in np.random.default_rng(0).binomial(n, 0.96, 200):
        right = [True] * int(found) + [False] * int(n - found)
        shown += choose_threshold([0.9] * n, right, ConfidenceSpec(target_accuracy=0.9)).at is not None
    assert 0.7 < shown / 200 < 0.95


def test_where_rows_would_not_help_it_is_said() -> None:
    threshold = choose_threshold([0.9] * 200, [True] * 150 + [False] * 50, SPEC)
    assert (threshold.at, threshold.more_rows) == (None, None)
    assert "above no threshold with 20 dev rows or more is it that high (the best is 150 of 200 right" in threshold.why
    assert "more rows would hardly" in threshold.why


@pytest.mark.parametrize(
    ("confidences", "right", "reason"),
    [
        ([], [], "0 confidences for 0 answers"),
        ([0.5], [True, False], "1 confidences for 2 answers"),
        ([-0.1], [True], "-0.1 is no probability"),
    ],
)
def test_no_threshold_is_chosen_from_nothing(confidences: list[float], right: list[bool], reason: str) -> None:
    with pytest.raises(EvaluationError, match=reason):
        choose_threshold(confidences, right, SPEC)


def test_who_goes_to_review_is_the_same_after_the_threshold_was_written_down() -> None:
    threshold = choose_threshold([0.97] * 300 + [0.4] * 100, [True] * 350 + [False] * 50, SPEC)
    again = ReviewThreshold.model_validate_json(threshold.model_dump_json())
    assert again == threshold
    assert again.at is not None
    assert [needs_review(value, again) for value in (again.at, math.nextafter(again.at, 0), 1.0, 0.0, None)] == [
        False,
        True,
        False,
        True,
        True,
    ]
    with pytest.raises(EvaluationError, match="no probability"):
        needs_review(math.nan, again)
