"""How far a merged model is from the model as it was trained."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from tasks.contracts.errors import TrainingError
from tasks.training.examples import Example

_BYTES = 128 * 2**20  # of log-probabilities that are held of the trained model, since both are not in memory at once
_FEWEST = 64  # positions that are looked at however many words a model knows
_TOKENS = 4096  # that a model is asked with; on a CPU more would cost as much as a part of the training
_FEWEST_ROWS = 8  # however long they are


class Skew(NamedTuple):
    """What merging, and rounding to bfloat16, did to the answers' probabilities.

    Attributes:
        kl: mean Kullback-Leibler divergence KL(trained || merged) in nats for each answer token.
        same_top: share of answer positions at which both find the same token most likely.
        onto: what the adapter was merged onto: "nf4" (the dequantised NF4 base), "base" (the base as it is), or
            "nothing" (all weights were trained; what is left is rounding).
    """

    kl: float
    same_top: float
    onto: str


class Sample(NamedTuple):
    """A dev row, and where in it to look.

    Attributes:
        input_ids: its tokens up to the last position that is looked at.
        positions: indices into them; the model's output there predicts an answer token.
    """

    input_ids: list[int]
    positions: list[int]


def draw_samples(dev: Sequence[Example], at_most: int, vocabulary: int) -> list[Sample]:
    """Rows spread evenly over dev, and answer positions spread evenly over those rows.

    Args:
        dev: dev rows; nothing is drawn by lot.
        at_most: rows; fewer of long ones (about 4,096 tokens in all, but 8 rows).
        vocabulary: tokens of the model, which decides how many positions can be held (128 MiB in float32).

    Raises:
        TrainingError: there are no dev rows.
    """
    if not dev:
        raise TrainingError(
            "There are no dev rows to compare the merged model on.",
            where="curate.dev_share",
            fix="raise it, or add data",
        )
    tokens = sum(len(row.input_ids) for row in dev)
    rows = [dev[at] for at in _spread(len(dev), min(at_most, max(_FEWEST_ROWS, _TOKENS * len(dev) // tokens)))]
    all_places = [
        (number, position)
        for number, row in enumerate(rows)
        for position in range(len(row.input_ids) - row.answer_tokens - 1, len(row.input_ids) - 1)
    ]
    places = [all_places[at] for at in _spread(len(all_places), max(_FEWEST, _BYTES // (4 * vocabulary)))]
    samples = []
    for number, row in enumerate(rows):
        positions = [position for where, position in places if where == number]
        if positions:
            samples.append(Sample(row.input_ids[: positions[-1] + 1], positions))
    return samples


@torch.inference_mode()
def answer_log_probs(model: Any, samples: Sequence[Sample], device: str) -> Iterator[torch.Tensor]:
    """For each sample, log-probabilities at its positions: float32 of shape [positions, vocabulary]."""
    model.eval()
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    can_skip = "logits_to_keep" in inspect.signature(base.forward).parameters
    for sample in samples:
        ids = torch.tensor([sample.input_ids], device=device)
        positions = torch.tensor(sample.positions, device=device)
        if can_skip:
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=positions).logits[0]
        else:
            logits = model(input_ids=ids, use_cache=False).logits[0, positions]
        yield logits.float().log_softmax(-1)


def measure_skew(
    trained: Sequence[torch.Tensor], merged: Any, samples: Sequence[Sample], device: str, onto: str
) -> Skew:
    """Compare a merged model with what `answer_log_probs` gave of the trained one.

    KL(p || q) = sum_v p_v (ln p_v - ln q_v) over the vocabulary, averaged over positions.

    Raises:
        TrainingError: the divergence is not a number.
    """
    nats, same, count = 0.0, 0, 0
    for log_p, log_q in zip(trained, answer_log_probs(merged, samples, device), strict=True):
        p = log_p.exp()
        terms = torch.where(p > 0, p * (log_p - log_q), 0.0)  # a token that one model rules out is -infinity in it
        nats += terms.sum().item()
        same += int((log_p.argmax(-1) == log_q.argmax(-1)).sum().item())
        count += len(log_p)
    kl = nats / count
    if kl != kl:
        raise TrainingError(
            "The merged model, or the trained one, gives no probabilities (NaN) on dev rows.",
            where=f"merged onto {onto}",
            fix="lower `train.learning_rate`, or set `train.speed.compute` to float32",
        )
    return Skew(max(0.0, kl), same / count, onto)  # rounding can put a divergence of zero below zero


def _spread(count: int, at_most: int) -> list[int]:
    """So many indices below `count`, evenly spread; all of them when they are few enough."""
    taken = min(count, at_most)
    return [at * count // taken for at in range(taken)]
