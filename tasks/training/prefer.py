"""Preference pairs from what a tuned model gets wrong on dev, and the files of the process that learns from them."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from tasks.contracts.calls import read_answer
from tasks.contracts.errors import TrainingError
from tasks.contracts.prefer import PreferRequest
from tasks.contracts.references import ItemOutcome
from tasks.contracts.rows import Row, canonical_json
from tasks.contracts.spec import Frozen, TaskKind, TaskSpec

PAIRS = "pairs.jsonl"


class Pair(NamedTuple):
    """A dev row with what the model said in place of its target.

    Attributes:
        row: the row; its target is the chosen answer.
        rejected: the model's own answer.
        cut: whether the rejected answer was stopped at the longest length allowed, so the model never ended it.
    """

    row: Row
    rejected: str
    cut: bool


class PreferJob(Frozen):
    """The spec file of a preference-tuning process: everything it needs, as local paths.

    Attributes:
        request: what is to be tuned.
        fingerprint: of the tuning; the key of its MLflow run.
        model_folder: the base model (safetensors, tokenizer, chat template).
        adapter_folder: the adapter that the first training made.
        pairs_file: the pairs (`read_pairs`).
        held_out_file: dev rows that the pairs were not mined from; the dev loss is taken on them, before and after.
        scratch: folder for progress, log and result.
        out: folder for what is made: `adapter/`, `merged/`, `curves.jsonl`, `summary.json`.
    """

    request: PreferRequest
    fingerprint: str
    model_folder: Path
    adapter_folder: Path
    pairs_file: Path
    held_out_file: Path
    scratch: Path
    out: Path


class PreferOutcome(Frozen):
    """What a preference-tuning process says of its work; units as in `TrainedModelRef`.

    Attributes:
        dev_loss_before: of the model it started from, on held-out dev rows; `dev_loss` is of the result, on the same.
        preferred_before: share of the pairs whose chosen answer was likelier than the rejected one, before.
        preferred: the same after.
        margin_before: mean over the pairs of log p(chosen) - log p(rejected), whole answers, in nats, before.
        margin: the same after.
    """

    pairs: int
    steps: int
    dev_loss_before: float
    dev_loss: float
    preferred_before: float
    preferred: float
    margin_before: float
    margin: float
    seconds: float
    tokens: int
    tokens_per_second: float
    peak_memory_bytes: int
    resumed_from_step: int = 0
    trainable_parameters: int
    device: str
    compute_dtype: str
    merged_onto: str
    mlflow_run_id: str
    mlflow_url: str | None

    def sentence(self) -> str:
        """The result in one line."""
        return (
            f"{self.pairs:,} pairs, {self.steps} steps, right answer likelier in {100 * self.preferred_before:.0f} % "
            f"of them before and {100 * self.preferred:.0f} % after, dev loss (held out) {self.dev_loss_before:.4f} "
            f"before and {self.dev_loss:.4f} after, {self.seconds:,.0f} s ({self.device}, {self.compute_dtype})"
        )


def mine(rows: Sequence[Row], outcomes: Sequence[ItemOutcome], task: TaskSpec, max_new_tokens: int) -> list[Pair]:
    """A pair for each wrong answer that differs from the right one in more than how it is written.

    Args:
        rows: the dev rows that were asked.
        outcomes: what the model said, one for each row.
        task: how answers are read.
        max_new_tokens: longest answer that was allowed.

    Raises:
        TrainingError: answers and rows are not about the same items.
    """
    answers = {outcome.id: outcome for outcome in outcomes}
    if answers.keys() != {row.id for row in rows} or len(outcomes) != len(rows):
        raise TrainingError(
            f"The answers ({len(outcomes)}) are not those to these dev rows ({len(rows)}).",
            where="mine pairs",
            fix="delete the folder `ask_dev` of the store and run again",
        )
    pairs = []
    for row in rows:
        outcome = answers[row.id]
        if is_wrong(outcome) and not says_the_same(task, row.target, outcome.prediction):
            cut = not task.labels and outcome.output_tokens >= max_new_tokens
            pairs.append(Pair(row, outcome.prediction.strip(), cut))
    return pairs


def is_wrong(outcome: ItemOutcome) -> bool:
    """Whether the answer is not the target."""
    return outcome.scores["exact_match"] < 1.0


def says_the_same(task: TaskSpec, target: str, answer: str) -> bool:
    """Whether two answers differ at most in Unicode form, white space, or (JSON) order and number form.

    Such a pair would teach the model to avoid what it should say.
    """
    return _normal(task, target) == _normal(task, answer)


def too_few_words(pairs: int, wrong: int, asked: int, min_pairs: int) -> str | None:
    """Why preference tuning stops; None where there are pairs enough."""
    if pairs >= min_pairs:
        return None
    usable = "" if pairs == wrong else f", {pairs} of them usable"
    return f"nothing to learn from: {wrong} wrong of {asked}{usable}, and `preference.min_pairs` asks for {min_pairs}"


def write_pairs(path: Path, pairs: Iterable[Pair]) -> None:
    """Write pairs as JSON Lines."""
    with path.open("w", encoding="utf-8", newline="\n") as out:
        for pair in pairs:
            record = {"row": json.loads(pair.row.to_json()), "rejected": pair.rejected, "cut": pair.cut}
            out.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_pairs(path: Path) -> Iterator[Pair]:
    """The pairs of a file that `write_pairs` wrote, in order."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            yield Pair(Row.from_json(json.dumps(record["row"])), record["rejected"], record["cut"])


def _normal(task: TaskSpec, text: str) -> Any:
    if task.kind is TaskKind.EXTRACT:
        try:
            return canonical_json(json.loads(text, parse_constant=_refuse_constant))
        except (ValueError, RecursionError):  # no JSON: compared as text
            pass
    if task.kind is TaskKind.CALL:
        reading = read_answer(text)
        if reading.problem is None:  # which words are said instead of a call is not judged
            return reading.calls or bool(reading.words)
    return " ".join(unicodedata.normalize("NFKC", text).split())


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
