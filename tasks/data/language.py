"""Tell the language of a text (py3langid: naive Bayes over byte n-grams, its model is in the package)."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

from tasks.contracts.errors import SpecError


class Language(NamedTuple):
    """A language, ISO 639-1, and how sure that is: the probability that it is this one, 0 to 1."""

    code: str
    confidence: float


# Letters in UTF-8 bytes (so that 14 Chinese signs weigh as much as 42 Latin letters) from which a language is told.
# Measured on the first words of 6,143 English complaints: of 20 bytes 2.6 % are taken for another language, of 30
# 0.5 %, of 40 0.1 %, of 80 none.
MIN_BYTES = 40
# From this confidence on, a language that is not allowed is one: true of 2 of the 6,059 complaints that have 40 bytes,
# when no more than these are shown, and of none as a whole.
_SURE = 0.5
_LONGEST = 150  # characters that are looked at: more cost time and change nothing
# Languages so close that a short text is either: one of them is never held against the other.
_KIN = (frozenset({"bs", "hr", "sr"}), frozenset({"da", "nn", "no"}), frozenset({"id", "ms"}))
# What is in no language: addresses, and words with digits or with the XX that stands for what was redacted.
_NO_WORD = re.compile(r"[@\d_]|://|www\.|XX")
_NO_LETTERS = re.compile(r"[^\w\s'’-]+")


def detect_language(text: str, languages: tuple[str, ...] = ()) -> Language | None:
    """The language of a text; None when it is too short to tell (see `MIN_BYTES`).

    `languages` are codes to tell apart besides the languages that have a code of two letters (ISO 639-1).

    Raises:
        SpecError: a language is not known.
    """
    words = _words(text)
    if words is None:
        return None
    code, confidence = _identifier(tuple(sorted(set(languages)))).classify(words)
    return Language(code, float(confidence))


def language_problem(text: str, allowed: tuple[str, ...]) -> str | None:
    """What is wrong with the language of a text; None when it is allowed, or cannot be told for sure.

    Raises:
        SpecError: a language is not known.
    """
    found = detect_language(text, allowed)
    if found is None or found.confidence < _SURE or found.code in allowed:
        return None
    if any(found.code in kin and not kin.isdisjoint(allowed) for kin in _KIN):
        return None
    return f"language is {found.code} ({found.confidence:.0%} sure), allowed: {', '.join(allowed)}"


def check_languages(languages: Iterable[str]) -> None:
    """Refuse languages that cannot be told.

    Raises:
        SpecError: a language is not known.
    """
    known = set(_all_languages().labels)
    unknown = sorted(set(languages) - known)
    if unknown:
        raise SpecError(
            f"{', '.join(map(repr, unknown))}: no language that can be told.",
            where="data.languages",
            fix=f"use codes of ISO 639-1: {', '.join(sorted(code for code in known if len(code) == 2))}",
        )


def _words(text: str) -> str | None:
    """The words of a text that a language can be told by; None when there are too few."""
    kept = " ".join([word for word in text[: 10 * _LONGEST].split() if _NO_WORD.search(word) is None])
    words = " ".join(_NO_LETTERS.sub(" ", kept[:_LONGEST]).split())
    if len("".join(filter(str.isalpha, words)).encode("utf-8", "surrogatepass")) < MIN_BYTES:
        return None
    # Of all-capitals the model knows little.
    capitals = sum(map(str.isupper, words))
    return words.lower() if capitals > len(words) / 3 else words


@cache
def _all_languages() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # type: ignore[import-untyped]

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


@cache
def _identifier(languages: tuple[str, ...]) -> Any:
    """An identifier for the languages of ISO 639-1 and some more.

    Creoles, dialects and dead languages are left out unless asked for: English is taken for Nigerian Pidgin otherwise.
    """
    check_languages(languages)
    every = _all_languages()
    identifier = copy.copy(every)  # the tables are shared, so this costs little
    identifier.set_languages(sorted({code for code in every.labels if len(code) == 2} | set(languages)))
    return identifier
