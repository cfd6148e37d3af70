"""One batch is learned by heart before the long run, which then goes as if nothing had been."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from tasks.contracts.errors import TrainingError
from tasks.contracts.spec import Guard
from tasks.training.selfcheck import SelfCheck, check_it_can_learn, steps_for

REASON = "a toy, nobody is served by it"
Batch = Mapping[str, torch.Tensor]


def one_batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(10, 400, (2, 12), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[:, :-3] = -100
    return {"input_ids": ids, "labels": labels}


def nll(model: Any, batch: Batch) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1].float()
    wanted = batch["labels"][:, 1:]
    return functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-100, reduction="sum") / 6


@pytest.fixture
def make_model(tiny_model: Path) -> Callable[..., Any]:
    """A tiny model, with an adapter that has dropout or to be trained as a whole; always with the same weights."""

    def make(*, adapter: bool = True) -> Any:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        if adapter:
            config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.2, target_modules="all-linear")
            model = get_peft_model(model, config)
        return model.train()

    return make


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def _steps(model: Any, optimizer: torch.optim.Optimizer, losses: list[float]) -> list[float]:
    for _ in range(5):
        optimizer.zero_grad()
        loss = nll(model, one_batch()) * (1 + random.random() + np.random.rand())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("adapter", [True, False])
def test_a_model_that_can_learn_passes(adapter: bool, make_model: Callable[..., Any]) -> None:
    check = check_it_can_learn(make_model(adapter=adapter), [one_batch()], nll, 2e-4, {})
    assert check.finding is None
    assert check.skipped is None
    assert check.first_loss == pytest.approx(math.log(512), abs=0.3)  # random weights over 512 tokens
    assert check.last_loss < 0.95 * check.first_loss
    assert (check.steps, check.rate) == (10, 2e-3 if adapter else 1e-3)
    assert check.seconds > 0
    assert check.sentence().startswith(f"self-check: loss of one batch {check.first_loss:.3f} -> ")


@pytest.mark.parametrize("adapter", [True, False])
def test_training_goes_as_if_it_had_not_been_checked(adapter: bool, make_model: Callable[..., Any]) -> None:
    def run(*, checked: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
        model = make_model(adapter=adapter)
        torch.manual_seed(11)
        random.seed(12)
        np.random.seed(13)
        if checked:
            check = check_it_can_learn(model, [one_batch()], nll, 1e-3, {})
            assert check.last_loss < check.first_loss  # it did move
        optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-3)
        losses = _steps(model, optimizer, [])
        return losses, weights_of(model)

    plain_losses, plain = run(checked=False)
    losses, weights = run(checked=True)
    assert losses == plain_losses
    assert plain.keys() == weights.keys()
    assert all(torch.equal(plain[name], weights[name]) for name in plain)


@pytest.mark.parametrize("training", [True, False])
def test_everything_is_put_back(training: bool, make_model: Callable[..., Any]) -> None:
    model = make_model().train(training)
    model.register_buffer("seen", torch.tensor(3.0))
    before = weights_of(model)
    tensors = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    some = next(weight for weight in model.parameters() if weight.requires_grad)
    some.grad = torch.ones_like(some)
    states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()

    def loss_of(model: Any, batch: Batch) -> torch.Tensor:
        model.seen.add_(1.0)
        random.random()
        np.random.rand()
        return nll(model, batch)

    check_it_can_learn(model, [one_batch()], loss_of, 1e-3, {})
    after = weights_of(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {name: weight.data_ptr() for name, weight in model.named_parameters()} == tensors  # the very same ones
    assert model.seen.item() == 3.0
    assert torch.equal(some.grad, torch.ones_like(some))
    assert sum(weight.grad is not None for weight in model.parameters()) == 1
    assert all(module.training is training for module in model.modules())
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert np.random.get_state()[1].tolist() == states[2]


def test_everything_is_put_back_when_the_loss_fails(make_model: Callable[..., Any]) -> None:
    model = make_model()
    before, state = weights_of(model), torch.get_rng_state()
    calls: list[int] = []

    def loss_of(model: Any, batch: Batch) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            assert not all(torch.equal(before[name], now) for name, now in weights_of(model).items())
            raise MemoryError("no more")
        return nll(model, batch)

    with pytest.raises(MemoryError, match="no more"):
        check_it_can_learn(model, [one_batch()], loss_of, 1e-3, {})
    after = weights_of(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(torch.get_rng_state(), state)


def masked(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return batch | {"labels": torch.full_like(batch["labels"], -100)}


def freeze_all(model: Any) -> None:
    model.requires_grad_(False)


def train_what_is_not_used(model: Any) -> None:
    model.requires_grad_(False)
    model.spare = torch.nn.Linear(2, 2)


def keep(model: Any) -> None:
    pass


@pytest.mark.parametrize(
    ("spoil", "batch", "loss_of", "rate", "found"),
    [
        pytest.param(
            keep, masked(one_batch()), nll, 1e-3, "its loss is 0, so no token of an answer is in it", id="all masked"
        ),
        pytest.param(freeze_all, one_batch(), nll, 1e-3, "no weight of the model is trainable", id="all frozen"),
        pytest.param(
            train_what_is_not_used,
            one_batch(),
            nll,
            1e-3,
            "none of the 2 trainable weight matrices has a gradient",
            id="not connected",
        ),
        pytest.param(
            keep, one_batch(), nll, 0.0, "in 10 steps at a learning rate of 0 its loss went from", id="no rate"
        ),
        pytest.param(
            keep,
            one_batch(),
            nll,
            1e-8,
            "in 10 steps at a learning rate of 1e-07 its loss went from",
            id="a rate that moves nothing",
        ),
        pytest.param(
            keep,
            one_batch(),
            lambda model, batch: nll(model, batch).detach(),
            1e-3,
            "none of the 28 trainable weight matrices has a gradient",
            id="detached loss",
        ),
        pytest.param(
            keep,
            one_batch(),
            lambda model, batch: -nll(model, batch),
            1e-3,
            "a negative log-likelihood is never below 0",
            id="wrong sign",
        ),
        pytest.param(
            keep,
            one_batch(),
            lambda model, batch: nll(model, batch) * 0.0 + 2.0,
            1e-3,
            "none of the 28 trainable weight matrices has a gradient",
            id="constant",
        ),
        pytest.param(
            keep,
            one_batch(),
            lambda model, batch: nll(model, batch) * 1e-3 + 2.0,
            1e-3,
            "in 10 steps at a learning rate of 0.002 its loss went from 2.006",
            id="mostly constant",
        ),
        pytest.param(
            keep, one_batch(), lambda model, batch: nll(model, batch) * math.nan, 1e-3, "its loss is nan", id="NaN"
        ),
    ],
)
def test_what_cannot_learn_is_found(
    spoil: Callable[[Any], None],
    batch: Batch,
    loss_of: Callable[[Any, Any], torch.Tensor],
    rate: float,
    found: str,
    make_model: Callable[..., Any],
) -> None:
    model = make_model()
    spoil(model)
    with pytest.raises(TrainingError) as caught:
        check_it_can_learn(model, [batch], loss_of, rate, {})
    assert caught.value.what.startswith("One batch cannot be learned: ")
    assert found in caught.value.what
    assert caught.value.where == "guard self_check"
    assert caught.value.fix.endswith("or give a reason in `curate.accept_risks.self_check`")
    check = check_it_can_learn(model, [batch], loss_of, rate, {Guard.SELF_CHECK: REASON})
    assert check.finding is not None
    assert check.finding.guard is Guard.SELF_CHECK
    assert check.sentence().startswith("self-check, overridden: ")


def test_a_batch_that_is_known_already_is_no_objection(make_model: Callable[..., Any]) -> None:
    check = check_it_can_learn(make_model(), [one_batch()], lambda model, batch: nll(model, batch) * 1e-4, 1e-3, {})
    assert (check.finding, check.steps) == (None, 0)


def test_it_ends_as_soon_as_half_is_gone() -> None:
    line = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        line.weight.fill_(0.0018)
    check = check_it_can_learn(line, [{}], lambda model, _: model.weight.abs().sum() * 100, 1.0, {})
    # 0.18, and a step of Adam at 0.001 takes off 0.1.
    assert (check.steps, check.rate) == (1, 1e-3)
    assert (check.first_loss, check.last_loss) == (pytest.approx(0.18), pytest.approx(0.08))


def test_several_batches_make_one_step() -> None:
    line = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        line.weight.fill_(1.0)
    seen: list[int] = []

    def loss_of(model: Any, batch: Mapping[str, int]) -> torch.Tensor:
        seen.append(batch["number"])
        return model.weight.square().sum()

    check = check_it_can_learn(line, [{"number": 1}, {"number": 2}], loss_of, 1e-3, {Guard.SELF_CHECK: REASON}, steps=3)
    assert seen == [1, 2] * 4
    assert check.first_loss == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("total", "steps"), [(1, 0), (59, 0), (60, 3), (61, 3), (100, 5), (199, 9), (200, 10), (100_000, 10)]
)
def test_steps_go_by_the_length_of_the_run(total: int, steps: int) -> None:
    assert steps_for(total) == steps


def test_a_short_run_is_not_checked_and_says_so() -> None:
    def never(model: Any, batch: Any) -> torch.Tensor:
        raise AssertionError("not asked for")

    check = check_it_can_learn(torch.nn.Linear(1, 1), [{}], never, 1e-3, {}, steps=0)
    assert check.skipped == "the run has fewer than 60 steps"
    assert check.sentence() == "self-check skipped: the run has fewer than 60 steps"
    assert check == SelfCheck(check.first_loss, check.last_loss, 0, 0.0, 0.0, skipped=check.skipped)
