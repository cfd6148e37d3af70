"""The probability of a closed answer from the log-probabilities of its tokens, as an engine's server gives them.

Evaluation and serving read them alike, so that a confidence means the same in both. Plain arithmetic: a gateway does it
for every request.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from tasks.contracts.errors import EvaluationError


class TokenLogprob(NamedTuple):
    """One token of an answer: the bytes that it writes, and its log-probability among the tokens that were allowed."""

    text: bytes
    logprob: float


def read_logprobs(content: Sequence[dict[str, Any]], where: str) -> list[TokenLogprob]:
    """The tokens of an answer, from `choices[0].logprobs.content` of a chat completion.

    Raises:
        EvaluationError: an entry has no bytes or no log-probability.
    """
    tokens: list[TokenLogprob] = []
    for place, entry in enumerate(content):
        written, logprob = entry.get("bytes"), entry.get("logprob")
        if not isinstance(written, list) or not isinstance(logprob, int | float) or math.isnan(logprob):
            raise EvaluationError(
                f"The engine said no bytes or no log-probability for token {place + 1} of its answer.",
                where=where,
                fix="serve with vLLM, and ask with `logprobs: true`",
            )
        tokens.append(TokenLogprob(bytes(written), float(logprob)))
    return tokens


def closed_answer_probability(tokens: Sequence[TokenLogprob], answer: str, choices: Sequence[str], where: str) -> float:
    """The probability of an answer from a list, from its tokens: exp(sum of log-probabilities), as evaluation has it.

    The sum ends with the token that leaves only one choice. What follows only spells that choice out, and counting it
    would make an answer less sure for being spelt by one row of tokens when others spell it too. Where the answer is
    the beginning of another choice, it is settled by the end token, whose log-probability then belongs to it.

    It holds for log-probabilities among the tokens that were allowed (vLLM: `--logprobs-mode processed_logprobs`), at
    temperature 0, without penalties.

    Args:
        tokens: as they were drawn, the end token included if the engine gives it.
        answer: the whole answer.
        choices: all answers that were allowed.
        where: the request, for an error.

    Raises:
        EvaluationError: the answer is no choice, or the tokens do not spell it.
    """
    if answer not in choices:
        raise EvaluationError(
            "The answer is none of the choices, so it has no probability among them.",
            where=where,
            fix="ask for the choices by structured output; a cut answer needs more `max_tokens`",
        )
    whole, rivals = answer.encode(), [choice.encode() for choice in dict.fromkeys(choices) if choice != answer]
    written, total = b"", 0.0
    for token in tokens:
        total += token.logprob
        ended = written == whole  # this one is the end token
        written += b"" if ended else token.text
        if not whole.startswith(written):
            break
        if ended or not any(rival.startswith(written) for rival in rivals):
            return math.exp(min(total, 0.0))
    raise EvaluationError(
        "The tokens that came with log-probabilities do not spell the answer far enough to tell it from the others.",
        where=where,
        fix="ask for log-probabilities of all tokens; an answer that another one begins with needs the end token's too",
    )
