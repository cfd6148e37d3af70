"""Guards on a training: what it will be shown, its gradients, and whether it changed anything."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tasks.contracts.errors import TrainingError
from tasks.contracts.guards import Finding
from tasks.contracts.rows import Message, Row
from tasks.contracts.spec import Guard, TaskKind, TaskSpec
from tasks.training.examples import Example
from tasks.training.guards import (
    GradientLog,
    GradientWatch,
    check_changed,
    check_training,
    dev_loss_parted,
    fingerprint_weights,
    gradient_logs,
    losses_at_looks,
)

REASON = "a toy, nobody is served by it"
TASK = TaskSpec(kind=TaskKind.CLASSIFY, instruction="Which?", labels=("yes", "no", "maybe"))


def shown(targets: Sequence[str], answer_tokens: int = 2) -> tuple[list[Example], list[Row]]:
    rows = [Row(f"r{n}", n, (Message("user", "?"),), target) for n, target in enumerate(targets, start=1)]
    return [Example([1, 2, 3, 4], answer_tokens)] * len(rows), rows


ALL = ("yes", "no", "maybe", "no")


@pytest.mark.parametrize(
    ("targets", "answer_tokens", "order", "dev_rows", "guard", "found"),
    [
        (ALL, 2, (0, 1, 2, 3), 20, None, ""),
        (ALL, 2, (2, 1, 0), 20, None, ""),
        (
            ALL,
            2,
            (0, 1),
            20,
            Guard.UNSEEN_ANSWER,
            "training takes 2 rows, and none of them has the label 'maybe'",
        ),
        (
            ("yes", "yes"),
            2,
            (0, 1),
            20,
            Guard.UNSEEN_ANSWER,
            "training takes 2 rows, and none of them has the label 'no', 'maybe'",
        ),
        (
            ALL,
            0,
            (0, 1, 2, 3),
            20,
            Guard.UNSEEN_ANSWER,
            "4 of 4 training rows have no token of their answer in the loss, the first is r1 (line 1 of the source)",
        ),
        (
            ALL,
            2,
            (0, 1, 2, 3),
            19,
            Guard.DEV_ROWS,
            "the dev loss rests on 19 rows, fewer than 20, and early stopping and the choice of the best checkpoint "
            "go by it",
        ),
        (
            ALL,
            2,
            (0, 1, 2, 3),
            1,
            Guard.DEV_ROWS,
            "the dev loss rests on 1 row, fewer than 20, and early stopping and the choice of the best checkpoint "
            "go by it",
        ),
    ],
)
def test_what_a_training_will_be_shown(
    targets: Sequence[str], answer_tokens: int, order: Sequence[int], dev_rows: int, guard: Guard | None, found: str
) -> None:
    examples, rows = shown(targets, answer_tokens)
    if guard is None:
        assert check_training(examples, rows, order, dev_rows, TASK, {}) == []
        return
    others = {other: REASON for other in Guard if other is not guard}
    with pytest.raises(TrainingError) as caught:
        check_training(examples, rows, order, dev_rows, TASK, others)
    assert caught.value.what == f"This run would likely disappoint: {found}."
    assert caught.value.where == f"guard {guard.value}"
    assert caught.value.fix.endswith(f"or give a reason in `curate.accept_risks.{guard.value}`")
    (accepted,) = check_training(examples, rows, order, dev_rows, TASK, {guard: REASON})
    assert (accepted.guard, accepted.found) == (guard, found)


def test_a_task_without_labels_has_no_unseen_label() -> None:
    task = TaskSpec(kind=TaskKind.CHAT, instruction="Answer.")
    examples, rows = shown(["anything", "else"])
    assert check_training(examples, rows, [0], 20, task, {}) == []


# -- gradients ----------------------------------------------------------------------------------------------------


def logs(norms: Sequence[float], losses: Sequence[float]) -> list[GradientLog]:
    return [GradientLog(10 * n, *both) for n, both in enumerate(zip(norms, losses, strict=True), start=1)]


def falling(count: int, start: float, end: float) -> list[float]:
    return [start + (end - start) * n / (count - 1) for n in range(count)]


_draw = random.Random(4)
CALM = [1.0 + 0.3 * _draw.random() for _ in range(12)]
QUIET = [0.8 + 0.2 * _draw.random() for _ in range(12)]


@pytest.mark.parametrize(
    ("norms", "losses", "fires_at"),
    [
        pytest.param([*CALM, 40, 60, 90, 200], [*QUIET, 3, 5, 7, 9], 15, id="explodes: at the third log above"),
        pytest.param([*CALM, 40, 60, 1, 90, 80], [*QUIET, 3, 5, 1, 6, 7], None, id="comes down in between"),
        pytest.param([*CALM, 400, 1, 1, 1], [*QUIET, 9, 1, 1, 1], None, id="one odd batch"),
        pytest.param([*CALM, 40, 60, 90], QUIET + [0.9] * 3, None, id="large gradients, and the loss does not rise"),
        pytest.param([*CALM, 9, 9, 9, 9], [*QUIET, 3, 5, 7, 9], None, id="the loss rises, gradients hardly do"),
        pytest.param(
            [80, 55, 30, 60, 12, 20, 6, 9, 3, 2, 1.5, 1.2], falling(12, 6.0, 1.0), None, id="a normal noisy start"
        ),
        pytest.param(
            [0.2, 0.3, 0.2, 0.4, 0.3, 5, 8, 9, 7, 9], falling(10, 5.0, 3.0), None, id="warm-up: norms rise, loss falls"
        ),
        pytest.param([1, 1, 1, 1, 40, 50, 60], [1, 1, 1, 1, 5, 6, 7], None, id="too few logs before to compare with"),
        pytest.param([1, 1, 1, 1, 1, 40, 50, 60], [1, 1, 1, 1, 1, 5, 6, 7], 8, id="just enough of them"),
        pytest.param(
            [0.01] * 10 + [0.5] * 4, [0.01] * 10 + [0.4] * 4, None, id="above the median, and below what is clipped"
        ),
    ],
)
def test_exploding_gradients(norms: Sequence[float], losses: Sequence[float], fires_at: int | None) -> None:
    """`fires_at` counts logs from 1."""
    every = logs(norms, losses)
    strict = GradientWatch(2e-4, 1.0, {})
    lenient = GradientWatch(2e-4, 1.0, {Guard.GRADIENTS: REASON})
    told = [number for number, log in enumerate(every, start=1) if lenient.look(log)]
    assert told == ([] if fires_at is None else [fires_at])  # once, not at every log from then on
    for number, log in enumerate(every, start=1):
        if number == fires_at:
            with pytest.raises(TrainingError, match="gradients explode") as caught:
                strict.look(log)
            assert caught.value.where == "guard gradients"
            assert caught.value.fix.endswith("or give a reason in `curate.accept_risks.gradients`")
            return
        assert strict.look(log) is None


def test_the_words_on_exploding_gradients() -> None:
    watch = GradientWatch(2e-4, 1.0, {Guard.GRADIENTS: REASON})
    (finding,) = [found for log in logs([1] * 8 + [30, 40, 50], [2] * 8 + [4, 5, 6]) if (found := watch.look(log))]
    assert finding.found == (
        "gradients explode: at step 110 their norm is 50, for 3 logs on end more than 20 times its median (1), and the "
        "loss has risen to 6 from 2"
    )


@pytest.mark.parametrize("stopped_after", range(15))
def test_a_resumed_training_is_watched_as_if_it_had_never_stopped(stopped_after: int) -> None:
    every = logs([*CALM, 40, 60, 90], [*QUIET, 3, 5, 7])
    history: list[dict[str, Any]] = []
    for log in every[:stopped_after]:
        history += [{"step": log.step, "grad_norm": log.norm, "loss": log.loss, "epoch": 0.1}]
        history += [{"step": log.step, "eval_loss": 1.0}]
    watch = GradientWatch(2e-4, 1.0, {Guard.GRADIENTS: REASON})
    watch.restore([*history, {"step": 150, "train_runtime": 3.0, "train_loss": 1.0}])
    assert [bool(watch.look(log)) for log in every[stopped_after:]] == [False] * (14 - stopped_after) + [True]


@pytest.mark.parametrize(
    ("norm", "loss", "what"),
    [
        (float("nan"), 1.0, "Training diverged: the gradient norm at step 7 is nan."),
        (float("inf"), 1.0, "Training diverged: the gradient norm at step 7 is inf."),
        (1.0, float("nan"), "Training diverged: the training loss at step 7 is nan."),
        (1.0, float("-inf"), "Training diverged: the training loss at step 7 is -inf."),
    ],
)
def test_what_is_not_finite_stops_at_once_whatever_is_accepted(norm: float, loss: float, what: str) -> None:
    watch = GradientWatch(3e-4, 1.0, dict.fromkeys(Guard, REASON))
    with pytest.raises(TrainingError) as caught:
        watch.look(GradientLog(7, norm, loss))
    assert caught.value.what == what
    assert caught.value.where == "train.learning_rate = 0.0003"


def test_logs_are_those_of_training_steps() -> None:
    history = [
        {"step": 5, "loss": 2.0, "grad_norm": 0.5, "learning_rate": 1e-4},
        {"step": 5, "eval_loss": 1.8},
        {"step": 6, "train_runtime": 1.0, "train_loss": 1.9},
    ]
    assert gradient_logs(history) == [GradientLog(5, 0.5, 2.0)]


# -- dev loss -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "dev_losses", "words"),
    [
        ([], [], None),
        ([2.0], [1.0], None),
        ([2.0, 1.0, 0.5], [1.5, 1.2, 1.1], None),
        ([2.0, 1.0, 0.5], [1.5, 1.2, 1.22], None),  # within the noise of a look
        ([2.0, 1.0, 1.4], [1.5, 1.2, 1.4], None),  # both rise: a matter of the learning rate
        (
            [2.0, 1.0, 0.5],
            [1.5, 1.2, 1.4],
            "dev loss parted from training loss after look 2 of 3: dev rose from 1.200 to 1.400 while training fell "
            "from 1.000 to 0.500, so rows were being learned by heart; what was best on dev is kept",
        ),
        (
            [1.0, 0.5, 0.25],
            [1.0, 1.3, 1.2],
            "dev loss parted from training loss after look 1 of 3: dev rose from 1.000 to 1.200 while training fell "
            "from 1.000 to 0.250, so rows were being learned by heart; what was best on dev is kept",
        ),
    ],
)
def test_dev_loss_that_parts(losses: list[float], dev_losses: list[float], words: str | None) -> None:
    assert dev_loss_parted(losses, dev_losses) == words


def test_each_look_needs_its_training_loss() -> None:
    with pytest.raises(ValueError, match="2 training losses and 1 dev losses"):
        dev_loss_parted([1.0, 2.0], [1.0])


def test_losses_at_looks() -> None:
    history = [
        {"step": 1, "eval_loss": 9.0},  # before any training log
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 1.0},
        {"step": 2, "eval_loss": 1.5},
        {"step": 3, "eval_loss": 1.4},
        {"step": 4, "loss": 0.5},
        {"step": 4, "eval_loss": 1.3},
    ]
    assert losses_at_looks(history) == ([2.0, 2.0, 0.5], [1.5, 1.4, 1.3])


# -- unchanged ----------------------------------------------------------------------------------------------------


def full_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2).to(torch.bfloat16))


class Adapted(torch.nn.Module):
    """A frozen layer with an adapter, named as peft names them."""

    def __init__(self) -> None:
        super().__init__()
        self.base = torch.nn.Linear(4, 4).requires_grad_(False)
        self.lora_A = torch.nn.Linear(4, 2, bias=False)
        self.lora_B = torch.nn.Linear(2, 4, bias=False)
        torch.nn.init.zeros_(self.lora_B.weight)


def test_a_full_fine_tune_that_changed_nothing() -> None:
    model = full_model()
    before = fingerprint_weights(model)
    with pytest.raises(TrainingError) as caught:
        check_changed(before, model, {})
    found = "training changed nothing: the 4 trained weight matrices are as they were at the start"
    assert caught.value.what == f"The model is the base model: {found}."
    assert caught.value.fix.endswith("or give a reason in `curate.accept_risks.unchanged`")
    accepted = check_changed(before, model, {Guard.UNCHANGED: REASON})
    assert accepted == [Finding(Guard.UNCHANGED, found, "raise `train.epochs` or `train.learning_rate`")]


@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.weight", "1.bias"])
def test_one_bit_of_any_weight_is_a_change(name: str) -> None:
    model = full_model()
    before = fingerprint_weights(model)
    weight = dict(model.named_parameters())[name]
    with torch.no_grad():
        bits = weight.view(torch.int32 if weight.dtype == torch.float32 else torch.int16)
        bits.flatten()[-1] ^= 1
    assert {one for one, number in fingerprint_weights(model).items() if number != before[one]} == {name}
    assert check_changed(before, model, {}) == []


def test_an_adapter_has_to_leave_zero() -> None:
    model = Adapted()
    before = fingerprint_weights(model)
    assert set(before) == {"lora_A.weight", "lora_B.weight"}
    with torch.no_grad():
        model.lora_A.weight.add_(1.0)  # B A is still zero
    with pytest.raises(TrainingError, match="every B of the adapter is zero"):
        check_changed(before, model, {})
    with torch.no_grad():
        model.lora_B.weight[0, 0] = 1e-30
    assert check_changed(before, model, {}) == []


def test_a_model_without_trainable_weights_is_refused_whatever_is_accepted() -> None:
    with pytest.raises(TrainingError, match="the model has no trainable weight"):
        check_changed({}, full_model().requires_grad_(False), dict.fromkeys(Guard, REASON))
