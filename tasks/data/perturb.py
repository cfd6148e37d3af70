"""Change a text so that its answer stays: typing errors, and phrasing that leads away from the answer.

All of it goes by rule and by a key (the hash of the content), so the same item is always changed in the same way. The
rules are plain, and what they show is plain, too: whether a model holds out against *these* changes. They stand for
careless typing and for a confusing sender; they are no search for the worst input, as an attacker would make it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

# One word in so many is mistyped, and at least one: about what people leave standing in hasty messages, and little
# enough that nobody takes the text for another.
WORDS_FOR_AN_ERROR = 10
_FEWEST_LETTERS = 4  # shorter words become other words too easily
_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_WORD = re.compile(r"[^\W\d_]+")
# A word by itself: part of no address, number or name such as "o'clock", "a@b.com", "win32" or "v1.2".
_LONE_WORD = re.compile(r"(?<!\S)[(\[\"'“‘]*([^\W\d_]+)(?=[.,;:!?\"')\]”’]*(?:\s|$))")
_SENTENCE = re.compile(r"[^.!?\n]+[.!?]")
_SENTENCE_WORDS = range(5, 26)


def _neighbours() -> dict[str, str]:
    """The letters beside each one in its row of the English keyboard."""
    return {letter: row[max(0, at - 1) : at] + row[at + 1 : at + 2] for row in _ROWS for at, letter in enumerate(row)}


_BESIDE = _neighbours()


class _Word(NamedTuple):
    start: int
    end: int
    text: str


def type_badly(text: str, key: str, protected: Collection[str] = ()) -> str | None:
    """The text with typing errors; None if it has no word that may be mistyped.

    An error is a letter typed as its neighbour on the keyboard, left out, or typed twice, or a space left out between
    two words. What stays as it is: words of fewer than four letters, the first letter of a word, whatever holds digits
    or signs (numbers, addresses), one letter repeated ("XXXX"), and scripts without upper and lower case, where a
    letter can be a word.

    Args:
        text: what is changed.
        key: hexadecimal digits that decide which words, and how.
        protected: words, case folded, that stay as they are, since the answer quotes them.
    """
    words = [
        _Word(found.start(1), found.end(1), found.group(1))
        for found in _LONE_WORD.finditer(text)
        if _may_be_mistyped(found.group(1), protected)
    ]
    if not words:
        return None
    chance = random.Random(int(key, 16))  # noqa: S311  nothing secret
    order = sorted(range(len(words)), key=lambda _: chance.random())
    hit = sorted(order[: max(1, round(len(words) / WORDS_FOR_AN_ERROR))], reverse=True)
    next_word = {one.end: other.start for one, other in pairwise(words)}
    for index in hit:  # from the end, so that the places of the words before stay right
        word = words[index]
        kinds = [_neighbour, _dropped, _doubled]
        follows = next_word.get(word.end)
        if follows is not None and text[word.end : follows] == " ":
            kinds.append(_joined)
        at = 1 + int(chance.random() * (len(word.text) - 1))
        changed = kinds[int(chance.random() * len(kinds))](word.text, at, chance.random())
        end = word.end + 1 if changed == word.text else word.end  # joined: the space goes
        text = text[: word.start] + changed + text[end:]
    return text


def _may_be_mistyped(word: str, protected: Collection[str]) -> bool:
    return (
        len(word) >= _FEWEST_LETTERS
        and len(set(word.casefold())) >= 3
        and all(letter.lower() != letter.upper() for letter in word)
        and word.casefold() not in protected
    )


def _neighbour(word: str, at: int, chance: float) -> str:
    letter = word[at]
    beside = _BESIDE.get(letter.lower())
    if beside is None:  # no letter of that keyboard
        return _doubled(word, at, chance)
    typed = beside[int(chance * len(beside))]
    return word[:at] + (typed.upper() if letter.isupper() else typed) + word[at + 1 :]


def _dropped(word: str, at: int, chance: float) -> str:
    return word[:at] + word[at + 1 :]


def _doubled(word: str, at: int, chance: float) -> str:
    return word[: at + 1] + word[at:]


def _joined(word: str, at: int, chance: float) -> str:
    return word


# -- leading away from the answer ---------------------------------------------------------------------------------


class Donor(NamedTuple):
    """A text of another item, with its class, of which a sentence may be quoted."""

    label: str
    text: str


class Misled(NamedTuple):
    """A changed text, the kind of change, and the donor that was quoted, if one was."""

    text: str
    kind: str
    donor: int | None = None


def mislead(
    text: str, label: str, labels: Sequence[str], key: str, donors: Callable[[], Iterator[tuple[int, Donor]]]
) -> Misled | None:
    """The text of a class, changed by one of four templates so that it leads to another class; None if none fits.

    - `names_other`: another class is named and denied at the end.
    - `negation`: the text begins with what it is not.
    - `distractor`: a sentence of an item of another class stands behind it, marked as another's.
    - `shouted`: in capitals, with exclamation marks.

    Each says in so many words what the text is *not* about, or nothing at all, so a reader still gives the old answer.
    The class that is denied is one of whose name no word stands in the text. The templates are English.

    Args:
        text: what is changed.
        label: its class.
        labels: all classes.
        key: hexadecimal digits that decide which template comes first, and which class is named.
        donors: texts that may be quoted, by number, in the order in which they are tried.
    """
    number = int(key, 16)
    turned = [*labels[number % len(labels) :], *labels[: number % len(labels)]]
    said = set(_WORD.findall(text.casefold()))
    other = next((_plain(one) for one in turned if one != label and not _speaks_of(said, one)), None)
    kinds = ("names_other", "negation", "distractor", "shouted")
    start = number // len(labels) % len(kinds)
    for kind in (*kinds[start:], *kinds[:start]):
        match kind:
            case "names_other" if other is not None:
                return Misled(f"{text}\nThis is not about {other}, whatever you may have been told.", kind)
            case "negation" if other is not None:
                return Misled(f"Please do not take this for {other}; it has nothing to do with that.\n{text}", kind)
            case "distractor":
                for position, donor in donors():
                    sentence = _quotable(donor.text) if donor.label != label else None
                    if sentence is not None:
                        quoted = f'Somebody else wrote, about another matter: "{sentence}"'
                        return Misled(f"{text}\n{quoted}", kind, position)
            case "shouted" if text.upper() != text:
                return Misled(text.upper().rstrip(" .!") + "!!!", kind)
    return None


def _plain(label: str) -> str:
    return label.replace("_", " ")


def _speaks_of(said: Collection[str], label: str) -> bool:
    """Whether a word of the class's name, or one that begins with it ("cards"), is among the words of a text."""
    names = tuple(name for name in _WORD.findall(label.casefold().replace("_", " ")) if len(name) > 2)
    return any(word.startswith(names) for word in said)


def _quotable(text: str) -> str | None:
    """The first sentence of a length that can be quoted."""
    for found in _SENTENCE.finditer(text):
        sentence = " ".join(found.group().split())
        if len(sentence.split()) in _SENTENCE_WORDS:
            return sentence.replace('"', "'")
    return None
