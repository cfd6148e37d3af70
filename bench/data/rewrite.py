"""New texts from real ones, and what their similarity truly is; written apart from the code that is measured."""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple

Words = list[str]
SHINGLE = 3
RUN = 13

_EDGES = ".,;:!?\"'()[]{}<>*“”‘’…"
_DROPPED, _SWAPPED, _ADDED = 0.045, 0.045, 0.045  # shares of the words of a sentence, each time that it is used
_FILLERS = (
    "again", "actually", "clearly", "still", "really", "recently", "simply", "repeatedly", "also", "even", "certainly",
    "apparently", "honestly", "however", "already", "now", "then", "again", "basically", "obviously", "suddenly",
)  # fmt: skip
_COMPANIES = (
    "Alder Bank", "Birch Financial", "Cedar Recovery", "Northgate Credit", "Harbor Federal", "Pinecrest Lending",
    "Summit Collections", "Lakeside Savings", "Juniper Capital", "Meridian Card Services", "Redwood Auto Finance",
    "Granite Mutual", "Willow Student Loans", "Falcon Transfer", "Prairie Mortgage", "Copperfield Bank", "Stonebridge",
    "Bluewater Credit Union", "Elm Street Bank", "Ironwood Associates", "Maple Trust", "Seaview Funding", "Orchard Pay",
)  # fmt: skip
_PEOPLE = ("Mr. Adams", "Ms. Baker", "Mrs. Cole", "Dana", "Evan", "Ms. Flores", "Grant", "Hana", "Ivan", "Ms. Jones")
_MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
           "November", "December")  # fmt: skip
# Either way round; words of the complaints.
_SYNONYMS: tuple[tuple[str, ...], ...] = (
    ("removed", "deleted", "erased"), ("remove", "delete", "erase"), ("received", "got"), ("told", "informed"),
    ("asked", "requested"), ("fraudulent", "fake", "bogus"), ("inaccurate", "incorrect", "wrong"), ("sent", "mailed"),
    ("called", "phoned", "telephoned"), ("calls", "phones"), ("calling", "phoning"), ("never", "not once"),
    ("company", "firm", "business"), ("debt", "balance"), ("owe", "am liable for"), ("please", "kindly"),
    ("help", "assist"), ("fix", "correct", "repair"), ("several", "multiple", "numerous", "many"), ("noticed", "saw"),
    ("account", "acct"), ("accounts", "accts"), ("information", "info", "data"), ("letter", "notice"),
    ("money", "funds"), ("proof", "evidence"), ("immediately", "at once", "right away"), ("refused", "declined"),
    ("because", "since"), ("dispute", "challenge"), ("disputed", "challenged"), ("closed", "shut"),
    ("opened", "started"), ("stop", "cease"), ("showing", "appearing"), ("shows", "displays"),
    ("reporting", "listing"), ("reported", "listed"), ("file", "record"), ("tried", "attempted"),
    ("trying", "attempting"), ("contacted", "reached"), ("unauthorized", "unapproved"), ("payment", "instalment"),
    ("payments", "instalments"), ("charged", "billed"), ("fee", "charge"), ("fees", "charges"), ("years", "yrs"),
    ("months", "mos"), ("paid", "settled"), ("need", "require"), ("want", "wish"), ("victim", "target"),
    ("stated", "said"), ("provide", "supply"), ("provided", "supplied"), ("verify", "confirm"),
    ("verified", "confirmed"), ("permission", "consent"), ("unknown", "unfamiliar"), ("response", "reply", "answer"),
    ("respond", "reply"), ("documents", "papers"), ("issue", "problem"), ("mistake", "error"), ("errors", "mistakes"),
    ("found", "discovered"), ("continue", "go on"), ("harassing", "bothering"), ("and", "plus"), ("but", "yet"),
    ("do not", "don't"),
)  # fmt: skip


def _alternatives() -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for group in _SYNONYMS:
        for word in group:
            if " " not in word:
                found[word] = tuple(other for other in group if other != word)
    return found


ALTERNATIVES = _alternatives()


class Sentence(NamedTuple):
    """A sentence of a real complaint, as words."""

    words: tuple[str, ...]


def sentences(text: str) -> list[Sentence]:
    """The sentences of a text that have at least four words."""
    parts = (part.split() for part in re.split(r"(?<=[.!?])\s+|\n+", text))
    return [Sentence(tuple(part)) for part in parts if len(part) >= 4]


def compared(words: Iterable[str]) -> Words:
    """Words as they count for similarity: NFKC, case folded, without punctuation at their ends."""
    folded = unicodedata.normalize("NFKC", " ".join(words)).casefold().split()
    return [word for word in (raw.strip(_EDGES) for raw in folded) if word]


def shingle_set(words: Iterable[str], size: int = SHINGLE) -> set[tuple[str, ...]]:
    """The set of word n-grams."""
    plain = compared(words)
    return {tuple(plain[at : at + size]) for at in range(len(plain) - size + 1)}


def jaccard(one: Iterable[str], other: Iterable[str]) -> float:
    """Jaccard similarity of the sets of word 3-shingles."""
    left, right = shingle_set(one), shingle_set(other)
    return len(left & right) / max(1, len(left | right))


def rewritten(sentence: Sentence, vocabulary: Sequence[str], draw: random.Random) -> Words:
    """The sentence with words dropped, swapped, added, exchanged for synonyms; redactions become names and numbers."""
    out: Words = []
    chance = draw.random
    for word in sentence.words:
        if "XX" in word:
            out.append(_unredacted(word, draw))
            continue
        at = chance()
        if at < _DROPPED:
            continue
        if at < _DROPPED + _SWAPPED:
            out.append(vocabulary[int(chance() * len(vocabulary))])
            continue
        if at < _DROPPED + _SWAPPED + _ADDED:
            out.append(_FILLERS[int(chance() * len(_FILLERS))])
        others = ALTERNATIVES.get(word)
        if others is not None and at > 0.6:
            word = others[int(chance() * len(others))]
        elif word.startswith("{$"):
            word = _amount(draw)
        out.append(word)
    return out


def paraphrased(words: Sequence[str], draw: random.Random) -> Words:
    """The same said otherwise: every synonym that there is, sentences in another order, a filler here and there."""
    parts: list[Words] = [[]]
    for word in words:
        parts[-1].append(word)
        if word[-1] in ".!?" and len(parts[-1]) >= 4:
            parts.append([])
    parts = [part for part in parts if part]
    if len(parts) > 1:
        turn = draw.randrange(1, len(parts))
        parts = parts[turn:] + parts[:turn]
    out: Words = []
    since = 0  # words since the last change
    for word in (word for part in parts for word in part):
        core = word.rstrip(".,;:!?")
        others = ALTERNATIVES.get(core.lower())
        if others is not None:
            new = others[draw.randrange(len(others))]
            out.append((new.capitalize() if core[:1].isupper() else new) + word[len(core) :])
            since = 0
            continue
        if since >= 6:
            out.append(_FILLERS[draw.randrange(len(_FILLERS))])
            since = 0
        out.append(word)
        since += 1
    return out


def near_duplicate(
    words: Sequence[str], low: float, high: float, vocabulary: Sequence[str], draw: random.Random
) -> tuple[Words, float]:
    """An edited copy whose Jaccard similarity lies in [low, high), and what it is.

    A word changed in the middle costs three shingles of either side, a word added at the end adds one.
    """
    for _ in range(200):
        new = list(words)
        for _ in range(draw.randrange(5)):
            if draw.random() < 0.5:
                new[draw.randrange(len(new))] = vocabulary[draw.randrange(len(vocabulary))]
            else:
                new.insert(draw.randrange(len(new) + 1), _FILLERS[draw.randrange(len(_FILLERS))])
        found = jaccard(words, new)
        for _ in range(40):
            if found < high:
                break
            new.append(vocabulary[draw.randrange(len(vocabulary))])
            found = jaccard(words, new)
        if low <= found < high:
            return new, found
    raise RuntimeError(f"no copy of {len(words)} words with a similarity in [{low}, {high}) was found")


def same_after_normalising(words: Sequence[str], draw: random.Random) -> str:
    """The text in another dress: case, white space, characters that NFKC makes the same."""
    text = " ".join(words)
    match draw.randrange(4):
        case 0:
            return text.upper() if text.upper().casefold() == text.casefold() else text + " "
        case 1:
            return "  ".join(words) + "\n"
        case 2:
            return text.replace(" ", "\u00a0", 5)
        case _:
            wide = {ord(letter): chr(ord(letter) + 0xFEE0) for letter in "abcdefghijklmnopqrstuvwxyz"}
            first, *rest = words
            return " ".join([first.translate(wide), *rest])


def _unredacted(word: str, draw: random.Random) -> str:
    if "/" in word:
        return f"{_MONTHS[draw.randrange(12)]} {draw.randrange(1, 29)}, {draw.randrange(2012, 2026)}"
    at = draw.random()
    if at < 0.2:
        return word
    if at < 0.3:
        return _PEOPLE[draw.randrange(len(_PEOPLE))]
    if at < 0.4:
        return f"no. {draw.randrange(100, 9_999)}"
    return _COMPANIES[draw.randrange(len(_COMPANIES))]


def _amount(draw: random.Random) -> str:
    return f"${draw.randrange(5, 9_000)}.{draw.choice(('00', '50', '99', '25'))}"
