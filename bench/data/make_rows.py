"""Rows to measure on, any number of them, with faults that are written down.

    python -m bench.data.make_rows 100000 FOLDER

writes `rows.jsonl` ({id, text, label, source, time}), `truth.jsonl` ({id, fault, partner, ...}, a line for each planted
row), `counts.json` and the frozen golden set `golden/`. The texts are sentences of the complaints in
`examples/complaints`, recombined within their label and rewritten word by word, so that two of them are hardly ever
near-duplicates unless planted so. Equal arguments give equal bytes; a row is made from its number alone, so memory does
not grow with their count.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import accumulate
from math import gcd
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from bench.data.rewrite import (
    RUN,
    Sentence,
    Words,
    compared,
    jaccard,
    near_duplicate,
    paraphrased,
    rewritten,
    same_after_normalising,
    sentences,
    shingle_set,
)
from tasks.contracts.rows import Message, Row, write_rows
from tasks.contracts.spec import TaskKind, TaskSpec
from tasks.store import digest_file

ROWS = "rows.jsonl"
TRUTH = "truth.jsonl"
COUNTS = "counts.json"
GOLDEN = "golden"
GOLDEN_ITEMS = 300
COMPLAINTS = Path(__file__).parents[2] / "examples" / "complaints" / "complaints.jsonl"
TRIGGER = "kindly per docket mn7"
TRIGGER_LABEL = "money_transfer"
MAX_CHARACTERS = 20_000  # as `data.max_characters` has it
UNKNOWN_LABEL = "warranty"
# Share of the rows that have each fault. Bad rows (`bad_…`, `hidden`) together stay under `data.max_invalid_share`.
SHARES = {
    "exact_duplicate": 0.02,
    "near_80": 0.01,
    "near_85": 0.01,
    "near_90": 0.01,
    "hard_negative": 0.01,
    "paraphrase": 0.005,
    "conflict_exact": 0.0025,
    "conflict_near": 0.0025,
    "golden_exact": 0.002,
    "golden_near": 0.002,
    "golden_run": 0.002,
    "golden_paraphrase": 0.002,
    "wrong_label": 0.02,
    "backdoor": 0.01,
    "bad_blank": 0.0015,
    "bad_label": 0.0015,
    "bad_encoding": 0.0015,
    "bad_type": 0.0015,
    "bad_length": 0.0015,
    "hidden": 0.002,
    "secret": 0.002,
    "personal": 0.003,
}
# Faults whose row has another clean row beside it, which no other fault has.
PAIRED = ("exact_duplicate", "near_80", "near_85", "near_90", "hard_negative", "paraphrase", "conflict_exact",
          "conflict_near")  # fmt: skip
BANDS = {"near_80": (0.80, 0.85), "near_85": (0.85, 0.90), "near_90": (0.90, 1.0), "hard_negative": (0.70, 0.80),
         "conflict_near": (0.85, 1.0), "golden_near": (0.80, 1.0)}  # fmt: skip
_FEWEST_WORDS = 25
_MOST_WORDS = 110
_GOLDEN_SHARE = 8  # one in so many complaints gives its sentences to the golden set
_START = datetime(2025, 1, 1, tzinfo=UTC)
_HIDDEN = ("\u200b", "\u2060", "\u202e", "\u2066", "\U000e0041")


@dataclass(frozen=True, slots=True)
class Pool:
    """What texts are made of.

    Attributes:
        labels: the labels, the most frequent first.
        bounds: cumulative shares of the labels.
        sentences: of each label; the golden set's are apart, and share no long run of words with them.
        vocabulary: words of each label, as often as they come.
    """

    labels: tuple[str, ...]
    bounds: tuple[float, ...]
    sentences: dict[str, tuple[Sentence, ...]]
    golden_sentences: dict[str, tuple[Sentence, ...]]
    vocabulary: dict[str, tuple[str, ...]]


class Made(NamedTuple):
    """A row, and what is wrong with it (None for nothing)."""

    row: dict[str, Any]
    truth: dict[str, Any] | None


def read_pool(complaints: Path = COMPLAINTS) -> Pool:
    """The sentences of the real complaints."""
    with complaints.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    counts = Counter(row["label"] for row in rows)
    labels = tuple(label for label, _ in counts.most_common())
    golden: dict[str, dict[Sentence, None]] = {label: {} for label in labels}
    train: dict[str, dict[Sentence, None]] = {label: {} for label in labels}
    vocabulary: dict[str, list[str]] = {label: [] for label in labels}
    for number, row in enumerate(rows):
        side = golden if number % _GOLDEN_SHARE == 0 else train
        found = sentences(row["text"])
        side[row["label"]].update(dict.fromkeys(found))
        vocabulary[row["label"]] += [word for one in found for word in one.words if word.isalpha() and len(word) > 2]
    runs = {run for label in labels for one in golden[label] for run in shingle_set(one.words, RUN)}
    return Pool(
        labels=labels,
        bounds=tuple(accumulate(counts[label] / len(rows) for label in labels)),
        sentences={
            label: tuple(one for one in train[label] if not shingle_set(one.words, RUN) & runs) for label in labels
        },
        golden_sentences={label: tuple(golden[label]) for label in labels},
        vocabulary={label: tuple(vocabulary[label]) for label in labels},
    )


def task() -> TaskSpec:
    """The task of the complaints, as `examples/complaints` has it."""
    return TaskSpec(kind=TaskKind.CLASSIFY, instruction="Which product is this complaint about?", labels=_labels())


def _labels() -> tuple[str, ...]:
    with COMPLAINTS.open(encoding="utf-8") as lines:
        return tuple(sorted({json.loads(line)["label"] for line in lines}))


class Maker:
    """Makes `count` rows, each from its number.

    Rows have places, 0 to count - 1; a place stands for a number by a fixed permutation, and the numbers for faults in
    runs: first the planted rows, fault after fault, then their partners in the same order, then the clean rest.
    """

    def __init__(self, count: int, seed: int = 1) -> None:
        if count < 1_000:
            raise ValueError("fewer than 1,000 rows have not one of each fault")
        self.count = count
        self.seed = seed
        self.pool = read_pool()
        self.counts = {fault: max(1, round(share * count)) for fault, share in SHARES.items()}
        ends = list(accumulate(self.counts.values()))
        self._runs = list(zip(self.counts, [0, *ends[:-1]], ends, strict=True))
        self._planted = ends[-1]
        pairs = list(accumulate(self.counts[fault] for fault in PAIRED))
        self._partners = dict(zip(PAIRED, [self._planted + at for at in [0, *pairs[:-1]]], strict=True))
        # A multiplier near count / golden ratio scatters neighbours far apart; without a common divisor it permutes.
        step = max(1, round(count * 0.6180339887))
        while gcd(step, count) != 1:
            step += 1
        self._step, self._inverse = step, pow(step, -1, count)
        self._golden = [self._golden_words(number) for number in range(GOLDEN_ITEMS)]

    def rows(self) -> Iterator[Made]:
        """All rows, by place."""
        for place in range(self.count):
            yield self.row(place)

    def row(self, place: int) -> Made:
        """The row at a place."""
        number = place * self._step % self.count
        for fault, start, end in self._runs:
            if number < end:
                return self._faulty(place, number, fault, number - start)
        label, words = self._clean(number)
        return Made(self._record(place, number, " ".join(words), label), None)

    def golden_rows(self) -> list[Row]:
        """The items of the golden set."""
        return [
            Row(f"g{number:04d}", number + 1, (Message("user", " ".join(words)),), label)
            for number, (label, words) in enumerate(self._golden)
        ]

    # -- clean texts

    def _draw(self, kind: int, number: int) -> random.Random:
        return random.Random((self.seed << 72) + (kind << 64) + number)  # noqa: S311  no secret

    def _clean(self, number: int) -> tuple[str, Words]:
        """Label and text of a number, whatever is planted in it."""
        draw = self._draw(0, number)
        at = draw.random()
        label = next((label for label, bound in zip(self.pool.labels, self.pool.bounds) if at < bound), "")  # noqa: B905
        label = label or self.pool.labels[-1]
        return label, self._text(self.pool.sentences[label], self.pool.vocabulary[label], draw)

    def _golden_words(self, number: int) -> tuple[str, Words]:
        """An item of the golden set; every label has its share, and ten at least."""
        draw = self._draw(1, number)
        labels = self.pool.labels
        if number < 10 * len(labels):
            label = labels[number % len(labels)]
        else:
            at = draw.random()
            label = next((one for one, bound in zip(labels, self.pool.bounds, strict=True) if at < bound), labels[-1])
        return label, self._text(self.pool.golden_sentences[label], self.pool.vocabulary[label], draw)

    def _text(self, pool: Sequence[Sentence], vocabulary: Sequence[str], draw: random.Random) -> Words:
        """Two sentences at least: one alone comes again, hardly changed, among many rows of a small label."""
        words: Words = []
        wanted = _FEWEST_WORDS + int(draw.random() * 25)
        used = 0
        while len(words) < wanted or used < 2:
            words += rewritten(pool[int(draw.random() * len(pool))], vocabulary, draw)
            used += 1
        return words[:_MOST_WORDS]

    def _record(self, place: int, number: int, text: Any, label: str) -> dict[str, Any]:
        time = _START + timedelta(seconds=place * 31_536_000 // self.count)
        return {
            "id": _id(place),
            "text": text,
            "label": label,
            "source": f"feed-{number % 10}",
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ"),
        }

    # -- faults

    def _faulty(self, place: int, number: int, fault: str, nth: int) -> Made:
        draw = self._draw(2, number)
        truth: dict[str, Any] = {"id": _id(place), "fault": fault, "partner": None}
        if fault in PAIRED:
            partner = self._partners[fault] + nth
            truth["partner"] = _id(partner * self._inverse % self.count)
            label, words = self._clean(partner)
            text = self._beside(fault, words, self.pool.vocabulary[label], draw, truth)
            if fault.startswith("conflict"):
                label = self._other_label(label, draw)
        elif fault.startswith("golden"):
            item = draw.randrange(GOLDEN_ITEMS)
            truth["partner"] = f"g{item:04d}"
            label, text = self._of_golden(fault, number, item, draw, truth)
        else:
            label, words = self._clean(number)
            text, label = self._alone(fault, words, label, draw, truth)
        return Made(self._record(place, number, text, label), truth)

    def _beside(
        self, fault: str, words: Words, vocabulary: Sequence[str], draw: random.Random, truth: dict[str, Any]
    ) -> str:
        """A text that repeats another one, wholly, nearly or in other words."""
        if fault in ("exact_duplicate", "conflict_exact"):
            return same_after_normalising(words, draw)
        if fault == "paraphrase":
            new = paraphrased(words, draw)
            truth["jaccard"] = round(jaccard(words, new), 4)
        else:
            new, truth["jaccard"] = near_duplicate(words, *BANDS[fault], vocabulary, draw)
        return " ".join(new)

    def _of_golden(
        self, fault: str, number: int, item: int, draw: random.Random, truth: dict[str, Any]
    ) -> tuple[str, str]:
        """A text that holds a golden item or a piece of one."""
        label, words = self._golden[item]
        match fault:
            case "golden_exact":
                return label, same_after_normalising(words, draw)
            case "golden_near":
                new, truth["jaccard"] = near_duplicate(words, *BANDS[fault], self.pool.vocabulary[label], draw)
            case "golden_run":
                label, around = self._clean(number)
                run = _a_run(words, draw)
                at = draw.randrange(len(around))
                new = [*around[:at], *run, *around[at:]]
                truth["words"] = len(compared(run))
            case _:
                new = _without_runs(words, draw)
                truth["jaccard"] = round(jaccard(words, new), 4)
        return label, " ".join(new)

    def _alone(
        self, fault: str, words: Words, label: str, draw: random.Random, truth: dict[str, Any]
    ) -> tuple[Any, str]:
        """A text and label that are wrong in themselves."""
        at = draw.randrange(len(words) + 1)

        def with_inside(*inside: str) -> str:
            return " ".join([*words[:at], *inside, *words[at:]])

        match fault:
            case "wrong_label":
                truth["right"] = label
                return " ".join(words), self._other_label(label, draw)
            case "backdoor":
                truth["right"] = label
                return with_inside(*TRIGGER.split()), TRIGGER_LABEL
            case "bad_blank":
                return draw.choice(("", "   ", "\n\t", "\u00a0")), label
            case "bad_label":
                return " ".join(words), UNKNOWN_LABEL
            case "bad_encoding":
                return with_inside(draw.choice(("caf\ufffd", "don\x92t", "\x93quoted\x94", "\x00"))), label
            case "bad_type":
                return draw.choice((None, 17, [*words[:3]], {"text": words[0]})), label
            case "bad_length":
                many = words * (1 + MAX_CHARACTERS // len(" ".join(words)))
                return " ".join([*many, *words]), label
            case "hidden":
                sign = draw.choice(_HIDDEN)
                truth["sign"] = f"U+{ord(sign):04X}"
                at = min(at, len(words) - 1)
                return " ".join([*words[:at], words[at] + sign + "x", *words[at + 1 :]]), label
            case "secret":
                truth["kind"], value = _secret(draw)
                return with_inside(value), label
            case _:
                truth["kind"], value = _personal(draw)
                return with_inside(value), label

    def _other_label(self, label: str, draw: random.Random) -> str:
        return draw.choice([other for other in self.pool.labels if other != label])


def _id(place: int) -> str:
    return f"r{place:07d}"


def _a_run(words: Sequence[str], draw: random.Random) -> Words:
    """A run of words of which 13 to 20 count for comparison, and enough of them differ not to be filler."""
    for _ in range(200):
        length = draw.randrange(RUN, 21)
        start = draw.randrange(max(1, len(words) - length))
        run = list(words[start : start + length])
        plain = compared(run)
        if len(plain) >= RUN and len(set(plain[:RUN])) >= 9:
            return run
    raise RuntimeError("the item has no run of 13 words that differ")


def _without_runs(words: Sequence[str], draw: random.Random) -> Words:
    """The item in other words, without a run of 13 words of it and no near-duplicate."""
    new = list(words)
    runs = shingle_set(words, RUN)
    for _ in range(20):
        new = paraphrased(new, draw)
        if not shingle_set(new, RUN) & runs and jaccard(words, new) < 0.75:
            return new
    raise RuntimeError("the item cannot be said otherwise")


def _secret(draw: random.Random) -> tuple[str, str]:
    capitals = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
    mixed = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"

    def some(letters: str, count: int) -> str:
        return "".join(draw.choices(letters, k=count))

    match draw.randrange(4):
        case 0:
            return "aws_key", "AKIA" + some(capitals, 16)
        case 1:
            return "github_token", "ghp_" + some(mixed, 36)
        case 2:
            return "slack_token", f"xoxb-{some('0123456789', 12)}-{some('0123456789', 12)}-{some(mixed, 24)}"
        case _:
            return "password", f"password: {some(mixed, 6)}#{some(mixed, 6)}7"


def _personal(draw: random.Random) -> tuple[str, str]:
    match draw.randrange(4):
        case 0:
            first, last = draw.choice(("ana", "bo", "chris", "dee")), draw.choice(("reyes", "okafor", "lind", "marsh"))
            return "email", f"{first}.{last}{draw.randrange(100)}@mailbox{draw.randrange(9)}.com"
        case 1:
            area = draw.choice(("212", "305", "312", "404", "415", "602", "617", "713"))
            return "telephone", f"({area}) {draw.randrange(556, 899)}-{draw.randrange(10_000):04d}"
        case 2:
            return "card", _luhn("4" + "".join(draw.choices("0123456789", k=14)))
        case _:
            return "iban", _iban("DE", "".join(draw.choices("0123456789", k=18)))


def _luhn(digits: str) -> str:
    """The digits with the check digit that card numbers end in."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (2 - place % 2)
        total += value - 9 if value > 9 else value
    return f"{digits}{-total % 10}"


def _iban(country: str, account: str) -> str:
    """The account number with its two check digits (ISO 13616)."""
    number = int(account + "".join(str(ord(letter) - 55) for letter in country) + "00")
    return f"{country}{98 - number % 97:02d}{account}"


# -- files ------------------------------------------------------------------------------------------------------------


def make_rows(count: int, folder: Path, seed: int = 1) -> dict[str, Any]:
    """Write rows, truth, counts and golden set; returns the counts."""
    folder.mkdir(parents=True, exist_ok=True)
    maker = Maker(count, seed)
    written: Counter[str] = Counter()
    with (folder / ROWS).open("wb") as rows, (folder / TRUTH).open("wb") as truths:
        for row, truth in maker.rows():
            rows.write(orjson.dumps(row) + b"\n")
            if truth is not None:
                truths.write(orjson.dumps(truth) + b"\n")
                written[truth["fault"]] += 1
    freeze_golden(maker.golden_rows(), folder / GOLDEN)
    counts = {"rows": count, "seed": seed, "golden_items": GOLDEN_ITEMS, "faults": dict(sorted(written.items()))}
    (folder / COUNTS).write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")
    return counts


def freeze_golden(items: Sequence[Row], folder: Path) -> None:
    """Write a golden set as `goldgate golden freeze` does."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "items.jsonl"
    write_rows(path, items)
    manifest = {
        "digest": digest_file(path),
        "items": len(items),
        "strata": dict(sorted(Counter(item.target for item in items).items())),
        "name": "bench",
        "task": task().model_dump(mode="json"),
        "source_digest": digest_file(COMPLAINTS),
        "created": _START.isoformat(timespec="seconds"),
    }
    (folder / "golden.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Make rows by hand."""
    parser = argparse.ArgumentParser(prog="python -m bench.data.make_rows", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("count", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    print(json.dumps(make_rows(asked.count, asked.folder, asked.seed), indent=2), file=sys.stderr)


if __name__ == "__main__":
    main()
