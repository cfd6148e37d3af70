"""Texts that are changed while their answer stays: what may change, what may not, and always in the same way."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.data.perturb import Donor, mislead, type_badly
from tasks.data.similar import normalise

COMPLAINTS = Path(__file__).parents[2] / "examples" / "complaints" / "complaints.jsonl"
LABELS = ("card", "debt_collection", "mortgage", "student_loan")
# Measured on the 2,148 complaints: 6.1 % of the words are changed (two at a time where two are joined).
CHANGED_WORDS = (0.04, 0.08)


def key_of(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def no_donors() -> Iterator[tuple[int, Donor]]:
    return iter(())


# -- typing errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a to be or not",  # too short, each of them
        "XXXX XXXX xxxx",  # redacted
        "12345 1,000.00 $29.99 v1.2.3 win32 AB12CD34",
        "jane.doe@example.com https://example.com/account o'clock",
        "我的信用卡被盗刷了 مرحبا بالعالم",  # no upper and lower case
    ],
)
def test_what_is_no_word_is_not_mistyped(text: str) -> None:
    assert type_badly(text, key_of(text)) is None


@pytest.mark.parametrize("number", range(40))
def test_one_error_in_a_short_text_is_one_of_four_kinds(number: int) -> None:
    text = "My Visa number 4111 was charged again"
    changed = type_badly(text, key_of(str(number)))
    assert changed is not None
    before, after = text.split(" "), changed.split(" ")
    if len(after) < len(before):  # a space left out, between two words that may both be mistyped
        assert changed in {"My Visanumber 4111 was charged again", "My Visa number 4111 was chargedagain"}
        return
    ((old, new),) = [(one, other) for one, other in zip(before, after, strict=True) if one != other]
    assert old in {"Visa", "number", "charged", "again"}
    assert new[0] == old[0]
    assert len(new) - len(old) in (-1, 0, 1)


def test_all_four_kinds_come_about() -> None:
    text = "charged twice"
    kinds = set()
    for number in range(200):
        changed = type_badly(text, key_of(str(number))) or ""
        kinds.add("joined" if " " not in changed else len(changed) - len(text))
    assert kinds == {"joined", -1, 0, 1}


def test_a_neighbour_is_beside_its_letter_on_the_keyboard() -> None:
    replaced = {
        type_badly("abqzp", key_of(str(number))) for number in range(400)
    }  # five letters, the first of which stays
    found = {text for text in replaced if text is not None and len(text) == 5}
    assert found == {"avqzp", "anqzp", "abwzp", "abqxp", "abqzo"}


def test_words_that_the_answer_quotes_stay() -> None:
    assert type_badly("Kronor Kronor", key_of("x"), protected={"kronor"}) is None
    for number in range(50):
        changed = type_badly("price in Kronor please", key_of(str(number)), protected={"kronor"})
        assert changed is not None
        assert "Kronor" in changed


def test_the_case_and_all_the_rest_of_the_text_stay() -> None:
    text = 'He said: "CANCEL it",\n\nthen  left (quickly).'
    for number in range(50):
        changed = type_badly(text, key_of(str(number)))
        assert changed is not None
        assert [sign for sign in changed if not sign.isalpha() and sign != " "] == [
            sign for sign in text if not sign.isalpha() and sign != " "
        ]
        assert changed.split('"')[1].split()[0].isupper()


@settings(deadline=None)
@given(st.text(max_size=200), st.integers(0, 2**256 - 1))
def test_any_text_is_changed_for_good_or_not_at_all(text: str, key: int) -> None:
    changed = type_badly(text, f"{key:064x}")
    assert changed == type_badly(text, f"{key:064x}")
    if changed is not None:
        assert normalise(changed) != normalise(text)


def test_every_complaint_can_be_mistyped_and_is_still_the_same_text() -> None:
    shares = []
    for line in COMPLAINTS.read_text(encoding="utf-8").splitlines():
        text = json.loads(line)["text"]
        changed = type_badly(text, key_of(text))
        assert changed is not None, text
        assert normalise(changed) != normalise(text)
        before = Counter(text.split())
        shares.append((before - Counter(changed.split())).total() / before.total())
    assert CHANGED_WORDS[0] < sum(shares) / len(shares) < CHANGED_WORDS[1]


# -- leading astray -----------------------------------------------------------------------------------------------

DONORS = [
    Donor("card", "Nobody can quote me. I am of the same class as the text itself, so no."),
    Donor("mortgage", "Short. My escrow account was never paid by the new servicer. There is more."),
    Donor("student_loan", 'They said "wait" and my forbearance ended without a single letter.'),
]


def kinds_of(text: str, label: str = "card") -> dict[str, str]:
    """What each kind makes of a text, over many keys."""
    found = {}
    for number in range(64):
        changed = mislead(text, label, LABELS, f"{number:x}", lambda: iter(enumerate(DONORS)))
        assert changed is not None
        found[changed.kind] = changed.text
    return found


def test_the_four_templates() -> None:
    text = "They charged my Visa twice."
    found = kinds_of(text)
    assert set(found) == {"names_other", "negation", "distractor", "shouted"}
    others = {"debt collection", "mortgage", "student loan"}
    assert found["names_other"] in {
        f"{text}\nThis is not about {one}, whatever you may have been told." for one in others
    }
    assert found["negation"] in {
        f"Please do not take this for {one}; it has nothing to do with that.\n{text}" for one in others
    }
    sentence = "My escrow account was never paid by the new servicer."  # the first donor is of the same class
    assert found["distractor"] == f'{text}\nSomebody else wrote, about another matter: "{sentence}"'
    assert found["shouted"] == "THEY CHARGED MY VISA TWICE!!!"
    assert all(normalise(one) != normalise(text) for one in found.values())  # or it would be the same item again


def test_a_class_that_the_text_speaks_of_is_not_denied() -> None:
    found = kinds_of("A debt on my student account was charged.")
    assert "mortgage" in found["names_other"]
    assert "mortgage" in found["negation"]
    spoken_of = "Mortgages, debts and students."
    assert set(kinds_of(spoken_of)) == {"distractor", "shouted"}


def test_quotes_inside_a_quotation_are_turned() -> None:
    changed = [mislead("TEXT", "card", LABELS, f"{n:x}", lambda: iter([(7, DONORS[2])])) for n in range(64)]
    (said,) = {one.text for one in changed if one is not None and one.kind == "distractor"}
    assert said.endswith("\"They said 'wait' and my forbearance ended without a single letter.\"")
    assert {one.donor for one in changed if one is not None} == {None, 7}


def test_a_text_that_no_template_fits_is_left_alone() -> None:
    assert mislead("MORTGAGES, DEBTS, STUDENTS", "card", LABELS, "0", no_donors) is None


def test_the_same_key_leads_astray_in_the_same_way() -> None:
    rows = [json.loads(line) for line in islice(COMPLAINTS.open(encoding="utf-8"), 200)]
    labels = sorted({row["label"] for row in rows})
    for row in rows:
        one, other = (mislead(row["text"], row["label"], labels, key_of(row["text"]), no_donors) for _ in range(2))
        assert one is not None
        assert one == other
