"""Find what a reader of the data does not see or would not expect: hidden characters, control tokens of chat
templates, and instructions to a model inside answers.
"""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

# -- hidden characters --------------------------------------------------------------------------------------------

# Characters that show nothing by themselves: format characters (category Cf) but for the visible Arabic, Syriac and
# Kaithi signs among them, fillers, and variation selectors.
_HIDDEN = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f"
    "\ufeff\uffa0\ufff9-\ufffb\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
_DIRECTION_MARKS = "\u200e\u200f\u061c"
_RIGHT_TO_LEFT = re.compile("[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc\U00010800-\U00010fff\U0001e800-\U0001efff]")
# Scripts that join letters: Arabic, Syriac, N'Ko and their like; the Brahmic ones from Devanagari to Sinhala; Tibetan,
# Myanmar, Khmer, Mongolian.
_JOINING = re.compile("[\u0600-\u08ff\u0900-\u0dff\u0f00-\u109f\u1780-\u18af\ua840-\uaaff\ufb50-\ufdff\ufe70-\ufefc]")
# Scripts written without spaces, in which a zero-width one says where a line may break.
_UNSPACED = re.compile("[\u0e00-\u0eff\u0f00-\u109f\u1780-\u17ff\u1950-\u19df\u3040-\u30ff\u4e00-\u9fff]")
_MONGOLIAN = re.compile("[\u1800-\u18af]")
_JAMO = re.compile("[\u1100-\u11ff\ua960-\ua97f\ud7b0-\ud7ff]")
_IDEOGRAPH = re.compile("[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
# A sign that has a picture, and what it was changed by (variant, skin).
_PICTURES = "\u00a9\u00ae\u203c\u2049\u2100-\u2bff\u3030\u303d\u3297\u3299\U0001f000-\U0001faff"
_EMOJI = re.compile(f"[{_PICTURES}]")
_EMOJI_BEFORE = re.compile(f"[{_PICTURES}][\ufe0f\U0001f3fb-\U0001f3ff]{{0,2}}\\Z")
# The flags of England, Scotland and Wales are the only ones that Unicode recommends to write with tags (UTS 51, C.1).
_TAGGED_FLAG = re.compile(
    "\U0001f3f4\U000e0067\U000e0062(?:\U000e0065\U000e006e\U000e0067|\U000e0073\U000e0063\U000e0074"
    "|\U000e0077\U000e006c\U000e0073)\U000e007f"
)
# Names that explain more than Unicode's own.
_NAMES = (
    (0x202A, 0x202E, "direction override"),
    (0x2066, 0x2069, "direction override"),
    (0xE0000, 0xE007F, "tag character"),
    (0xE0100, 0xE01EF, "variation selector"),
)


def hidden_character(text: str) -> str | None:
    """The first hidden character in a text that has no business there; None if there is none.

    Such characters carry instructions to a model, or the trigger of a back door, past everyone who reads the data
    (Boucher et al., "Bad Characters", 2022). They are let be where writing needs them: joiners within emoji and within
    the scripts that join letters, direction marks in texts written right to left, soft hyphens within a word, breaks
    in scripts without spaces, one variation selector behind a sign that has variants, the flags of England, Scotland
    and Wales, and a byte order mark at the start.
    """
    if text.isascii():
        return None
    flags = [match.span() for match in _TAGGED_FLAG.finditer(text)] if "\U0001f3f4" in text else []
    right_to_left: bool | None = None
    for match in _HIDDEN.finditer(text):
        place, character = match.start(), match.group()
        if character in _DIRECTION_MARKS:
            if right_to_left is None:
                right_to_left = _RIGHT_TO_LEFT.search(text.replace("\u061c", "")) is not None
            if right_to_left:
                continue
        elif any(start < place < end for start, end in flags) or _is_needed(text, place, character):
            continue
        return f"{_name(character)} (U+{ord(character):04X}) at character {place + 1}"
    return None


def _is_needed(text: str, place: int, character: str) -> bool:
    """Whether writing needs a hidden character where it stands."""
    before, after = text[max(0, place - 1) : place], text[place + 1 : place + 2]
    match character:
        case "\u200c":
            return _joins(before) and (_joins(after) or not after.isalnum())
        case "\u200d":
            emoji = _EMOJI_BEFORE.search(text, max(0, place - 3), place) and _EMOJI.match(after)
            return emoji is not None or (_joins(before) and (_joins(after) or not after.isalnum()))
        case "\u200b":
            return _matches(_UNSPACED, before) and _matches(_UNSPACED, after)
        case "\u00ad":
            return before.isalpha() and after.isalpha()
        case "\ufeff":
            return place == 0
        case "\u115f" | "\u1160":
            return _matches(_JAMO, before) or _matches(_JAMO, after)
        case "\u180b" | "\u180c" | "\u180d" | "\u180e" | "\u180f":
            return _matches(_MONGOLIAN, before) and before not in "\u180b\u180c\u180d\u180e\u180f"
        case "\ufe0e" | "\ufe0f":  # text or picture; behind a digit it makes a keycap
            return before in "0123456789#*" or _matches(_EMOJI, before)
        case _ if "\ufe00" <= character <= "\ufe0d":
            category = unicodedata.category(before) if before else ""
            return category == "Sm" or _matches(_IDEOGRAPH, before) or _matches(_JOINING, before)
        case _ if "\U000e0100" <= character <= "\U000e01ef":
            return _matches(_IDEOGRAPH, before)
    return False


def _joins(character: str) -> bool:
    return _matches(_JOINING, character)


def _matches(pattern: re.Pattern[str], character: str) -> bool:
    return pattern.match(character) is not None


def _name(character: str) -> str:
    for first, last, name in _NAMES:
        if first <= ord(character) <= last:
            return name
    return unicodedata.name(character, "a format character").lower()


# -- control tokens and injections --------------------------------------------------------------------------------

_QUOTED = 40  # characters of what was found that are shown

_TOKEN_MARKS = ("<|", "<｜", "inst]", "sys>>", "_turn>", "<bos>", "<eos>", "<s>", "</s>", "_tools]", "tool_", "system_")
# ChatML, Llama 2 to 4, Mistral, Gemma, Phi, DeepSeek, Zephyr, and the start and end of a text in sentencepiece.
_TEMPLATE_TOKEN = re.compile(
    r"<\|/?[a-z][a-z0-9_]{1,40}\|>|<｜[^｜<>]{1,40}｜>|\[/?INST\]|<</?SYS>>|</?s>|<(?:start|end)_of_turn>|<(?:bos|eos)>"
    r"|\[/?(?:AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|SYSTEM_PROMPT)\]",
    re.IGNORECASE,
)


def template_tokens(text: str) -> str | None:
    """The first control token of a chat template in a text; None if there is none.

    A tokenizer reads one as what ends a turn and starts another, so that part of the input would speak as the system.
    """
    lower = text.lower()
    if not any(mark in lower for mark in _TOKEN_MARKS):
        return None
    found = _TEMPLATE_TOKEN.search(text)
    return None if found is None else _said("chat template token", found)


_WHOSE = r"(?:(?:all|any|every|each|the|your|my|our|these|those|of|and|other)\s+){0,4}"
_GIVEN = (
    r"(?:(?:previous(?:ly)?|prior|above|earlier|preceding|foregoing|initial|original|system|existing|given|safety)"
    r"\s+){1,3}"
)
_INSTRUCTIONS = (
    r"(?:instruction|prompt|direction|directive|rule|guideline|message|command|order|context|constraint|training"
    r"|filter)s?"
)
_SOMEONE = r"(?:[\w-]+\s+){0,3}(?:ai|assistant|bot|chatbot|model|agent|hacker|persona|llm|gpt|dan|administrator)\b"


def _any_case(*written: str) -> re.Pattern[str]:
    return re.compile("|".join(written), re.IGNORECASE | re.MULTILINE)


class _Injection(NamedTuple):
    kind: str
    marks: tuple[str, ...]  # one of these is in each, in lower case
    pattern: re.Pattern[str]


_INJECTIONS = (
    _Injection(
        "order to ignore instructions",
        ("ignore", "disregard", "forget", "override", "bypass", "follow"),
        _any_case(
            r"\b(?:ignore|disregard|forget|override|bypass|(?:do not|don't|stop)\s+follow(?:ing)?)\s+(?:about\s+)?"
            rf"{_WHOSE}{_GIVEN}{_INSTRUCTIONS}\b",
            rf"\b(?:ignore|disregard|forget)\s+{_WHOSE}{_INSTRUCTIONS}\s+"
            r"(?:above|before|so far|you (?:were|have been|got)|that (?:came|were))\b",
            r"\b(?:ignore|disregard|forget)\s+(?:everything|all|anything)\s+"
            r"(?:above|before this|you (?:were|have been) told|you (?:know|learned)|i (?:said|told you))\b",
        ),
    ),
    _Injection(
        "order to be someone else",
        ("you are now", "from now on", "pretend", "act as", "do anything now", "developer mode", "jailbr", "roleplay"),
        _any_case(
            rf"\byou are now\s+(?:(?:an?|the|my|our)\s+{_SOMEONE}|dan\b|in\s+(?:[\w-]+\s+){{0,2}}mode\b"
            r"|free\s+(?:of|from)\b|unrestricted|unfiltered|jailbroken|no longer (?:bound|restricted|limited))",
            r"\bfrom now on,?\s+you\s+(?:are|will|must|shall|should)\s+"
            r"(?:act|be an?|answer|respond|reply|only|always|never|ignore|obey|behave)\b",
            r"\b(?:pretend (?:to be|(?:that )?you(?: are|'re))|act as|roleplay as)\s+"
            rf"(?:if you (?:are|were)\s+)?(?:an?\s+|the\s+)?{_SOMEONE}",
            r"\bdo anything now\b|\bdeveloper mode (?:enabled|on|activated)\b|\bjailbr(?:eak|oken) (?:mode|prompt)",
        ),
    ),
    _Injection(
        "question for the system prompt",
        ("prompt", "instructions", "message"),
        _any_case(
            r"\b(?:reveal|print|show|repeat|output|leak|display|expose|tell\s+me)\s+(?:(?:me|us|the user)\s+)?"
            rf"{_WHOSE}(?:(?:full|entire|exact|secret)\s+)?(?:system|hidden|initial|original|developer)\s+"
            r"(?:prompt|instructions?|message)\b",
        ),
    ),
    _Injection(
        "marker of a role",
        ("##", "human:", "assistant:", "begin system", "[system", "<system", "<assistant", "<user", "system>"),
        _any_case(
            r"^[ \t]*#{2,4}[ \t]*(?:instruction|response|system|assistant|user|human|input)s?[ \t]*(?::|$)",
            r"\n[ \t]*\n[ \t]*(?:Human|Assistant):[ \t]",
            r"\[system\](?:\(#\w+\))?:?",
            r"</?(?:system|assistant|user)(?:_prompt)?>",
            r"^-{2,}[ \t]*begin system\b",
        ),
    ),
    _Injection(
        "picture loaded from the web",
        ("](", "<img"),
        _any_case(
            r"!\[[^\]\n]{0,300}\]\(\s*<?(?:https?:)?//",
            r"<img\b[^>]{0,300}\bsrc\s*=\s*[\"']?(?:https?:)?//",
        ),
    ),
    _Injection(
        "active HTML",
        (
            "<script",
            "javascript:",
            "<iframe",
            "<object",
            "<embed",
            "onerror",
            "onload",
            "onclick",
            "onmouseover",
            "data:",
        ),
        _any_case(
            r"<script\b",
            r"\bjavascript:[\w(/]",
            r"<(?:iframe|object|embed)\b[^>]{0,300}(?:src|data)\s*=",
            r"<\w+\b[^>]{0,300}\bon(?:error|load|click|mouseover)\s*=",
            r"\bdata:text/html\b",
        ),
    ),
)


def injection(target: str) -> str | None:
    """What in an answer is addressed to a model or a browser instead of a reader; None if nothing is.

    Looked for are orders to ignore instructions or to be someone else, questions for the system prompt, markers of
    roles, control tokens of chat templates, pictures by whose address data leave (`![](https://…)`), and scripts. A
    model that learned to write one attacks whatever reads its answers. The pattern is English; of what is found at
    most 40 characters are shown.
    """
    lower = target.lower()
    for kind, marks, pattern in _INJECTIONS:
        if any(mark in lower for mark in marks):
            found = pattern.search(target)
            if found is not None:
                return _said(kind, found)
    return template_tokens(target)


def _said(kind: str, found: re.Match[str]) -> str:
    shown = found.group().strip()
    shown = shown if len(shown) <= _QUOTED else shown[: _QUOTED - 1] + "…"
    return f"{kind} at character {found.start() + 1}: {shown!r}"
