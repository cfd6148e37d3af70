"""Whether what an answer says stands in the text that it was taken from."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from tasks.data.similar import normalise

_NUMBER = re.compile(r"\d(?:[\d.,'’٫٬_ ]*\d)?")
_PARTED = re.compile(r"\d[\d.,'’]*[.,] \d{1,2}$")  # `36. 24`, as printed prices come out of a page
_SPACED = re.compile(r"\d{1,3}(?: \d{3})+(?:[.,٫]\d+)?$")
_SCALES = {
    "k": 1e3, "thousand": 1e3, "m": 1e6, "mn": 1e6, "mio": 1e6, "million": 1e6, "b": 1e9, "bn": 1e9, "billion": 1e9,
    "%": 1e-2, "percent": 1e-2, "per cent": 1e-2,
}  # fmt: skip
_AFTER = re.compile(r"\s?(per cent|percent|thousand|million|billion|mio|mn|bn|[kmb%])(?!\w)")
_DATE = re.compile(r"(\d{4})-(\d{2})-(\d{2})$")
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_CLOSE = 1e-9  # relative; a number that was written out in full has lost this much at most


def ungrounded(target: str, text: str, schema: Mapping[str, Any]) -> str | None:
    """The first value of an answer in JSON that does not stand in the text, in words; None if all do.

    Compared after normalisation of case and white space; numbers by value, however they are written (`1.234,50`,
    `1'234.50`, `1 234.5`, `1.2345k`); dates in ISO 8601 by year, month and day. Values that the schema chooses from a
    list (`enum`, `const`), true, false and null are not taken from the text, and are not looked for.
    """
    there = normalise(text)
    numbers = sorted(set(numbers_in(there)))
    for path, value, node in _leaves(json.loads(target), schema, schema, "$"):
        if isinstance(value, str) and not _is_chosen(value, node, schema):
            if not _stands(value, there, numbers):
                return f"{path} is {value!r}, which does not stand in the text"
        elif (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and not _is_chosen(value, node, schema)
            and not _is_among(abs(value), numbers)
        ):
            return f"{path} is {value:g}, a number that the text does not have"
    return None


def unsupported(answer: str, quote: str, document: str) -> str | None:
    """Why an answer in words does not rest on a document, in words; None if it does.

    The quote must stand in the document, and every number of the answer too.
    """
    if not is_passage(quote, document):
        return "its quote does not stand in the document"
    number = new_number(answer, document)
    return None if number is None else f"it says {number}, a number that the document does not have"


def new_number(answer: str, text: str) -> str | None:
    """The first number of an answer in words that a text does not have, as it is written; None if it has all."""
    numbers = sorted(set(numbers_in(normalise(text))))
    for token in _NUMBER.findall(normalise(answer)):
        for part in token.split(" "):
            readings = list(_readings(part))
            if readings and not any(_is_among(reading, numbers) for reading in readings):
                return str(part)
    return None


def is_passage(passage: str, document: str) -> bool:
    """Whether a passage stands in a document word for word, however either is punctuated."""
    words = _words(passage)
    return bool(words.strip()) and words in _words(document)


def numbers_in(text: str) -> Iterator[float]:
    """Every number that a normalised text can be read to hold, without its sign; one token can have several readings.

    `1,234` is 1234 and 1.234; `12 500` is 12, 500 and 12500; `2.5 million` is 2.5 and 2500000; `25 %` is 25 and 0.25.
    """
    for found in _NUMBER.finditer(text):
        token = found.group()
        words = token.split(" ")
        readings = [value for word in words for value in _readings(word)]
        for start in range(len(words)):
            for end in range(start + 2, len(words) + 1):
                spaced = " ".join(words[start:end])
                if _SPACED.match(spaced):
                    readings += _readings(spaced.replace(" ", ""))
        if _PARTED.match(token):
            readings += _readings(token.replace(" ", ""))
        if text[found.start() - 1 : found.start()] == ".":  # `.75`
            readings += _floats(f"0.{words[0]}")
        yield from readings
        after = _AFTER.match(text, found.end())
        if after is not None:
            yield from (value * _SCALES[after.group(1)] for value in readings)


def _readings(token: str) -> Iterator[float]:
    """`1.234,5` has one reading; a single mark before three digits can part thousands or decimals."""
    plain = re.sub(r"['’_ ]", "", token).replace("٫", ",").replace("٬", ".")
    marks = [mark for mark in plain if mark in ".,"]
    if not marks:
        yield from _floats(plain)
        return
    last = max(plain.rfind("."), plain.rfind(","))
    whole, decimals = re.sub("[.,]", "", plain[:last]), plain[last + 1 :]
    once = marks.count(plain[last]) == 1
    if once:
        yield from _floats(f"{whole}.{decimals}")
    if len(decimals) == 3 and (len(set(marks)) == 1 or not once):
        yield from _floats(f"{whole}{decimals}")
    elif not once:  # 1.2.3: a version, a date; each part stands for itself
        for part in re.split("[.,]", plain):
            yield from _floats(part)


def _floats(text: str) -> Iterator[float]:
    try:
        value = float(text)
    except ValueError:
        return
    if math.isfinite(value):
        yield value


def _is_among(value: float, numbers: list[float]) -> bool:
    return any(math.isclose(value, number, rel_tol=_CLOSE, abs_tol=1e-12) for number in numbers)


def _stands(value: str, there: str, numbers: list[float]) -> bool:
    wanted = normalise(value)
    if not wanted:
        return True
    at = there.find(wanted)
    while at >= 0:
        end = at + len(wanted)
        if not (_one_word(there[at - 1 : at], wanted[0]) or _one_word(wanted[-1], there[end : end + 1])):
            return True
        at = there.find(wanted, at + 1)
    date = _DATE.match(wanted)
    if date is not None:
        year, month, day = (int(part) for part in date.groups())
        named = 1 <= month <= 12 and re.search(rf"\b{_MONTHS[month - 1]}", there) is not None
        short = year % 100
        return day in numbers and (named or month in numbers) and (year in numbers or short in numbers)
    whole = list(_NUMBER.finditer(wanted))
    return len(whole) == 1 and whole[0].group() == wanted and any(_is_among(n, numbers) for n in _readings(wanted))


def _one_word(left: str, right: str) -> bool:
    """Whether no word ends between two characters. Scripts without upper case are written without blanks: there, one
    may end anywhere.
    """
    if not left or not right:
        return False
    return (left.isdigit() and right.isdigit()) or (_is_cased(left) and _is_cased(right))


def _is_cased(character: str) -> bool:
    return character.isalpha() and character.upper() != character.lower()


def _words(text: str) -> str:
    """The words between blanks, also at both ends."""
    words = re.findall(r"\w+", normalise(text))
    return f" {' '.join(words)} "


# -- schema -------------------------------------------------------------------------------------------------------


def _leaves(
    value: Any, node: Mapping[str, Any], root: Mapping[str, Any], path: str
) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """The values of an answer that hold no others, each with the part of the schema that is about it."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _leaves(part, _below(node, root, "properties", name), root, f"{path}.{name}")
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from _leaves(part, _below(node, root, "items", ""), root, f"{path}[{number}]")
    else:
        yield path, value, node


def _branches(node: Mapping[str, Any], root: Mapping[str, Any], depth: int = 8) -> Iterator[Mapping[str, Any]]:
    """A part of the schema, and what it refers to or is put together from."""
    yield node
    if depth == 0:
        return
    reference = node.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/"):
        target: Any = root
        for name in reference[2:].split("/"):
            target = target.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(target, Mapping) else None
        if isinstance(target, Mapping):
            yield from _branches(target, root, depth - 1)
    for word in ("anyOf", "oneOf", "allOf"):
        for part in node.get(word, ()):
            if isinstance(part, Mapping):
                yield from _branches(part, root, depth - 1)


def _below(node: Mapping[str, Any], root: Mapping[str, Any], word: str, name: str) -> Mapping[str, Any]:
    for branch in _branches(node, root):
        found = branch.get(word)
        if word == "properties" and isinstance(found, Mapping):
            found = found.get(name)
        if isinstance(found, Mapping):
            return found
    return {}


def _is_chosen(value: Any, node: Mapping[str, Any], root: Mapping[str, Any]) -> bool:
    """Whether the schema itself names the value."""
    return any(
        value in branch.get("enum", ()) or ("const" in branch and branch["const"] == value)
        for branch in _branches(node, root)
    )
