"""Find secrets and personal data in a text, say what was found without showing it, and mask it.

What a thing looks like is known by libraries: patterns and checksums are those of presidio's recognisers (no language
model), telephone numbers those of phonenumbers, tokens those of detect-secrets. What is here decides where they are
asked at all (a million rows would take them hours), and which of their hits mean nothing without a word beside them.
Nothing asks the network: domain endings come from the list that tldextract ships.

Not looked for, since too much that is harmless looks the same: names, postal addresses, dates of birth, strings that
are merely random (digests, UUIDs), account numbers other than IBANs.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple

Group = Literal["secret", "personal"]


class Found(NamedTuple):
    """Something private in a text: what it is, and the characters `text[start:end]` that hold it."""

    kind: str
    group: Group
    start: int
    end: int


Scanner = Callable[[str], list[Found]]


class _Kind(NamedTuple):
    group: Group
    one: str
    several: str


# In the order in which a kind is preferred where hits overlap: what is most specific and does most harm comes first.
_KINDS: dict[str, _Kind] = {
    "PRIVATE_KEY": _Kind("secret", "private key", "private keys"),
    "AWS_KEY": _Kind("secret", "AWS key", "AWS keys"),
    "GITHUB_TOKEN": _Kind("secret", "GitHub token", "GitHub tokens"),
    "GITLAB_TOKEN": _Kind("secret", "GitLab token", "GitLab tokens"),
    "SLACK_TOKEN": _Kind("secret", "Slack token", "Slack tokens"),
    "STRIPE_KEY": _Kind("secret", "Stripe key", "Stripe keys"),
    "OPENAI_KEY": _Kind("secret", "OpenAI key", "OpenAI keys"),
    "ANTHROPIC_KEY": _Kind("secret", "Anthropic key", "Anthropic keys"),
    "GOOGLE_KEY": _Kind("secret", "Google API key", "Google API keys"),
    "HUGGINGFACE_TOKEN": _Kind("secret", "Hugging Face token", "Hugging Face tokens"),
    "AZURE_KEY": _Kind("secret", "Azure storage key", "Azure storage keys"),
    "SENDGRID_KEY": _Kind("secret", "SendGrid key", "SendGrid keys"),
    "TWILIO_KEY": _Kind("secret", "Twilio key", "Twilio keys"),
    "MAILCHIMP_KEY": _Kind("secret", "Mailchimp key", "Mailchimp keys"),
    "TELEGRAM_TOKEN": _Kind("secret", "Telegram token", "Telegram tokens"),
    "DISCORD_TOKEN": _Kind("secret", "Discord token", "Discord tokens"),
    "PYPI_TOKEN": _Kind("secret", "PyPI token", "PyPI tokens"),
    "NPM_TOKEN": _Kind("secret", "npm token", "npm tokens"),
    "JWT": _Kind("secret", "JSON web token", "JSON web tokens"),
    "PASSWORD": _Kind("secret", "password", "passwords"),
    "SECRET": _Kind("secret", "named key or token", "named keys or tokens"),
    "EMAIL": _Kind("personal", "e-mail address", "e-mail addresses"),
    "CARD": _Kind("personal", "payment card number", "payment card numbers"),
    "IBAN": _Kind("personal", "IBAN", "IBANs"),
    "SSN": _Kind("personal", "US social security number", "US social security numbers"),
    "IP_ADDRESS": _Kind("personal", "IP address", "IP addresses"),
    "PHONE": _Kind("personal", "telephone number", "telephone numbers"),
    "CRYPTO_ADDRESS": _Kind("personal", "bitcoin address", "bitcoin addresses"),
}
_RANK = {kind: rank for rank, kind in enumerate(_KINDS)}


def build_scanner(*, secrets: bool, personal: bool) -> Scanner:
    """A function from a text to what is private in it: sorted by place, without overlaps.

    Hits that overlap become one that covers them all, of the kind that does most harm, so that masking leaves no part.
    """
    look = ([_secrets] if secrets else []) + ([_personal_data] if personal else [])

    def scan(text: str) -> list[Found]:
        hits = [hit for looking in look for hit in looking(text)]
        return _merged(hits) if hits else []

    return scan


def mask(text: str, found: Sequence[Found]) -> str:
    """The text with each finding replaced by its kind in brackets, such as `[EMAIL]`."""
    pieces, end = [], 0
    for hit in found:
        pieces += [text[end : hit.start], f"[{hit.kind}]"]
        end = hit.end
    return "".join([*pieces, text[end:]])


def mask_text(text: str, scan: Scanner) -> str:
    """The text masked until the scanner finds nothing: with one value gone, what stood beside it may come to light."""
    while found := scan(text):
        text = mask(text, found)
    return text


def describe(found: Sequence[Found]) -> str:
    """What was found and where (1-based characters), never any of it: "2 e-mail addresses at characters 5 and 40"."""
    places: dict[str, list[str]] = {}
    for hit in found:
        places.setdefault(hit.kind, []).append(f"{hit.start + 1:,}")
    said = []
    for kind, at in places.items():
        words = _KINDS[kind]
        if len(at) == 1:
            said.append(f"1 {words.one} at character {at[0]}")
        elif len(at) <= _PLACES_SAID:
            said.append(f"{len(at)} {words.several} at characters {', '.join(at[:-1])} and {at[-1]}")
        else:
            said.append(f"{len(at):,} {words.several} at characters {', '.join(at[:_PLACES_SAID])}, …")
    return "; ".join(said)


_PLACES_SAID = 5


def _merged(hits: list[Found]) -> list[Found]:
    merged: list[Found] = []
    for hit in sorted(hits, key=lambda hit: (hit.start, hit.end, _RANK[hit.kind])):
        if merged and hit.start < merged[-1].end:
            last = merged[-1]
            worst = min(last, hit, key=lambda one: _RANK[one.kind])
            merged[-1] = worst._replace(start=last.start, end=max(last.end, hit.end))
        else:
            merged.append(hit)
    return merged


def _found(kind: str, start: int, end: int) -> Found:
    return Found(kind, _KINDS[kind].group, start, end)


# -- JSON ---------------------------------------------------------------------------------------------------------

_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|-?\d[\d.eE+-]*|[{}\[\],:]|true|false|null')
# A surrogate pair is one character of the string that it stands for.
_JSON_CHARACTER = re.compile(r"\\u[dD][89abAB]..\\u[dD][c-fC-F]..|\\u.{4}|\\.|.", re.DOTALL)


def scan_json(target: str, scan: Scanner) -> list[Found]:
    """What is private in an answer that is JSON, with places in the text of the JSON itself.

    Each value is looked at as what it stands for (escapes undone), behind its key: `"phone": "2125551234"` is a
    telephone number, the digits alone are not. Keys are looked at too. `target` has to be valid JSON.
    """
    return [hit for _, hits in _scanned_values(target, scan) for hit in hits]


def mask_json(target: str, scan: Scanner) -> str:
    """The JSON with what is private inside its string values masked; all else, and so its validity, stays as it was.

    Keys and numbers cannot be masked within a schema: `scan_json` still finds what they hold.
    """
    while found := [hit for maskable, hits in _scanned_values(target, scan) if maskable for hit in hits]:
        target = mask(target, found)
    return target


def _scanned_values(target: str, scan: Scanner) -> Iterator[tuple[bool, list[Found]]]:
    """For each key, string and number: whether it may be masked, and what is private in it."""
    pieces = list(_JSON_TOKEN.finditer(target))
    key = ""
    for piece, after in zip(pieces, [*pieces[1:], None], strict=True):
        written, start = piece.group(), piece.start()
        is_string = written[0] == '"'
        if not is_string and written[0] not in "-0123456789":
            key = "" if written in "{}" else key
            continue
        value = json.loads(written) if is_string else written
        places = _character_places(written, start) if is_string else range(start, piece.end() + 1)
        is_key = after is not None and after.group() == ":"
        before = f"{key}: " if key and not is_key else ""
        hits = [
            hit._replace(start=places[max(0, hit.start - len(before))], end=places[hit.end - len(before)])
            for hit in scan(before + value)
            if hit.end > len(before)
        ]
        yield is_string and not is_key, hits
        if is_key:
            key = value


def _character_places(written: str, start: int) -> list[int]:
    """Where each character of a JSON string that is written at `start` lies, and where the last one ends."""
    places = [start + 1]
    for match in _JSON_CHARACTER.finditer(written, 1, len(written) - 1):
        places.append(start + match.end())
    return places


# -- secrets ------------------------------------------------------------------------------------------------------

_SHORTEST_TOKEN = 20  # characters, of an AWS key id; all others are longer
_TOKEN = re.compile(rf"[!-~]{{{_SHORTEST_TOKEN},}}")
_KEY_BLOCK = re.compile(
    r"-{2,5} ?BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)? ?-{2,5}"
    r"(?:(?:[^-]|-(?!--)){40,8000}+-{2,5} ?END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)? ?-{2,5}"
    r"|(?:(?:\\n|\s)*(?:[A-Za-z-]{4,20}: [^\n]{1,80}\n|[A-Za-z0-9+/=]{16,}))+)"  # one that was cut off
    r"|PuTTY-User-Key-File-\d:[\s\S]{40,8000}?Private-MAC: ?[0-9a-f]{32,}"
)
_SHORTEST_BARE = 6  # characters of a password that no quotes mark
_ASSIGNMENT_MARKS = ("pass", "pwd", "secret", "token", "key", "contrase")
# Words beside those of detect-secrets' keyword plugin.
_MORE_NAMES = ("passphrase", "passcode", "api-key", "access_?key", "auth_?token", "access_?token", "bearer_?token")
_PASSWORD_NAME = re.compile(r"(?i)pass|pwd|contrase")
_PLACEHOLDER = re.compile(
    r"(?i)[x*.•_#-]+$|.*x{4}|.*\*{3}|[\[<]|\{[{%\w]|\$[{(]|\$[A-Z_]+$|%\w+%?$|your|example|placeholder|redacted"
    r"|(?:changeme|none|null|nil|true|false|undefined|required|optional|string|text|value|\w+(?:\.\w+)*\(.*)$"
    r"|[a-z_.>-]*(?:pass|pwd|secret|token|key)[a-z_.>-]*$|(?:self|os|process|config|settings|env)\.|https?:"
)


def _secrets(text: str) -> Iterator[Found]:
    if max(map(len, text.split()), default=0) >= _SHORTEST_TOKEN:
        yield from _tokens(text)
    lower = text.lower()
    if any(mark in lower for mark in _ASSIGNMENT_MARKS):
        yield from _assigned(text)
    if "PRIVATE KEY" in text or "PuTTY-User-Key" in text:
        for match in _KEY_BLOCK.finditer(text):
            yield _found("PRIVATE_KEY", *match.span())
    if "://" in text and "@" in text:
        yield from _basic_auth(text)


class _TokenPattern(NamedTuple):
    kind: str
    pattern: re.Pattern[str]
    value: int  # the group that is the secret, 0 for all


@cache
def _token_patterns() -> tuple[_TokenPattern, ...]:
    from detect_secrets.plugins.aws import AWSKeyDetector
    from detect_secrets.plugins.azure_storage_key import AzureStorageKeyDetector
    from detect_secrets.plugins.discord import DiscordBotTokenDetector
    from detect_secrets.plugins.github_token import GitHubTokenDetector
    from detect_secrets.plugins.gitlab_token import GitLabTokenDetector
    from detect_secrets.plugins.jwt import JwtTokenDetector
    from detect_secrets.plugins.mailchimp import MailchimpDetector
    from detect_secrets.plugins.npm import NpmDetector
    from detect_secrets.plugins.pypi_token import PypiTokenDetector
    from detect_secrets.plugins.sendgrid import SendGridDetector
    from detect_secrets.plugins.slack import SlackDetector
    from detect_secrets.plugins.stripe import StripeDetector
    from detect_secrets.plugins.telegram_token import TelegramBotTokenDetector
    from detect_secrets.plugins.twilio import TwilioKeyDetector

    plugins: dict[str, Any] = {
        "GITHUB_TOKEN": GitHubTokenDetector,
        "GITLAB_TOKEN": GitLabTokenDetector,
        "SLACK_TOKEN": SlackDetector,
        "STRIPE_KEY": StripeDetector,
        "AZURE_KEY": AzureStorageKeyDetector,
        "SENDGRID_KEY": SendGridDetector,
        "TWILIO_KEY": TwilioKeyDetector,
        "MAILCHIMP_KEY": MailchimpDetector,
        "TELEGRAM_TOKEN": TelegramBotTokenDetector,
        "DISCORD_TOKEN": DiscordBotTokenDetector,
        "PYPI_TOKEN": PypiTokenDetector,
        "JWT": JwtTokenDetector,
    }
    # Formats that detect-secrets does not know (1.5.0), from the makers' own documentation.
    more = {
        "GITHUB_TOKEN": r"github_pat_[A-Za-z0-9_]{60,}",
        "SLACK_TOKEN": r"xapp-\d-[A-Za-z0-9-]{20,}",
        "OPENAI_KEY": r"sk-[A-Za-z0-9_-]{16,200}?T3BlbkFJ[A-Za-z0-9_-]{16,}",
        "ANTHROPIC_KEY": r"sk-ant-[A-Za-z0-9]{2,10}-[A-Za-z0-9_-]{40,}",
        "GOOGLE_KEY": r"AIza[A-Za-z0-9_-]{35}",
        "HUGGINGFACE_TOKEN": r"hf_[A-Za-z0-9]{30,}",
        "NPM_TOKEN": r"npm_[A-Za-z0-9]{36}",
    }
    return (
        _TokenPattern("AWS_KEY", re.compile(AWSKeyDetector.denylist[0].pattern + r"(?![A-Za-z0-9])"), 0),
        _TokenPattern("NPM_TOKEN", NpmDetector.denylist[0], 1),
        *(_TokenPattern(kind, pattern, 0) for kind, plugin in plugins.items() for pattern in plugin.denylist),
        *(_TokenPattern(kind, re.compile(pattern), 0) for kind, pattern in more.items()),
    )


# A pattern may end before its token does: newer keys are longer, and the signature of a JSON web token is optional.
_REST = re.compile(r"[A-Za-z0-9_-]*")
_REST_OF_JWT = re.compile(r"(?:[A-Za-z0-9_=-]|\.(?=[A-Za-z0-9_-]))*")


def _tokens(text: str) -> Iterator[Found]:
    for piece in _TOKEN.finditer(text):
        for kind, pattern, value in _token_patterns():
            if kind == "NPM_TOKEN" and "npm_" not in piece.group() and "_authToken" not in piece.group():
                continue  # its pattern takes time that is quadratic in the length of a path
            for match in pattern.finditer(piece.group()):
                start, end = match.span(value)
                before = piece.group()[start - 1 : start]
                if value == 0 and (before.isalnum() or before == "_"):
                    continue  # the middle of something longer
                if kind == "JWT" and not _is_jwt(match.group()):
                    continue
                rest = (_REST_OF_JWT if kind == "JWT" else _REST).match(piece.group(), end)
                yield _found(kind, piece.start() + start, piece.start() + (rest.end() if rest else end))


def _is_jwt(token: str) -> bool:
    from detect_secrets.plugins.jwt import JwtTokenDetector

    return JwtTokenDetector.is_formally_valid(token)


@cache
def _assignment() -> re.Pattern[str]:
    from detect_secrets.plugins.keyword import DENYLIST

    return re.compile(
        rf"(?i)(?P<name>{'|'.join((*DENYLIST, *_MORE_NAMES))})"
        r"(?:_?(?:key|access|token|id)\w{0,20}|[_\d]\w{0,30}|s)?(?P<closed>[\"'`]\]?)?"
        r"(?:(?P<tight>=)|\s{0,3}(?P<sign>:=|=>|={1,3}|:)\s{0,3}|\s{1,3}(?P<word>is|was)(?:\s{0,2}:)?\s{1,3})"
        r"(?:(?P<quote>[\"'`])(?P<quoted>[^\s\"'`]{4,200})(?P=quote)|(?P<bare>[^\s\"'`,;<>]{6,200}))"
    )


@cache
def _aws_secret() -> re.Pattern[str]:
    from detect_secrets.plugins.aws import AWSKeyDetector

    return AWSKeyDetector.denylist[1]


def _assigned(text: str) -> Iterator[Found]:
    if "aws" in text.lower():
        for match in _aws_secret().finditer(text):
            yield _found("AWS_KEY", *match.span(1))
    for match in _assignment().finditer(text):
        group = "bare" if match["quoted"] is None else "quoted"
        value = match[group] if group == "quoted" else match[group].rstrip(".,;:!?)")
        is_password = _PASSWORD_NAME.search(match["name"]) is not None
        as_code = match["tight"] is not None or "=" in (match["sign"] or "") or match["closed"] is not None
        if _looks_secret(value, is_password, quoted=group == "quoted", as_code=as_code, tight=bool(match["tight"])):
            yield _found("PASSWORD" if is_password else "SECRET", match.start(group), match.start(group) + len(value))


def _looks_secret(value: str, is_password: bool, *, quoted: bool, as_code: bool, tight: bool) -> bool:
    """Whether an assigned value is one: words of prose, placeholders and names of variables are not."""
    if _PLACEHOLDER.match(value):
        return False
    digits = sum(character.isdigit() for character in value)
    letters = sum(character.isalpha() for character in value)
    if quoted:
        return as_code or digits > 0
    if digits == len(value):
        return is_password and digits >= _SHORTEST_BARE
    # Without a digit it is a word of the sentence, unless it is written as in a file of settings: password=hunter.
    return len(value) >= _SHORTEST_BARE and (
        (digits > 0 and letters > 0) or (tight and is_password and "." not in value)
    )


# The pattern of detect-secrets leaves out marks such as ! that RFC 3986, 3.2.1, allows in a password.
_BASIC_AUTH = re.compile(r"://[^\s:/?#\[\]@]{1,200}:([^\s/?#\[\]@]{1,200})@")


def _basic_auth(text: str) -> Iterator[Found]:
    for match in _BASIC_AUTH.finditer(text):
        if not _PLACEHOLDER.match(match[1]):
            yield _found("PASSWORD", *match.span(1))


# -- personal data ------------------------------------------------------------------------------------------------

# Nine digits are the shortest number that is looked for; what stands between them separates groups of one number.
_DIGITS = re.compile(r"\d(?:[ \u00a0.()/\-\u2010-\u2013]{0,3}\d){8,}")
_DIGIT = re.compile(r"\d")
_IP_V4 = re.compile(r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d")
_IP_V6 = re.compile(r"(?:[0-9A-Fa-f]{1,4}:){4}|[0-9A-Fa-f]{1,4}::")
_IBAN_START = re.compile(r"\b[A-Z]{2}\d\d[ -]?[A-Z0-9]{4}[ -]?[A-Z0-9]{4}")
_CRYPTO_START = re.compile(r"\b(?:bc1|[13])[a-zA-HJ-NP-Z0-9]{25}")
_BEFORE, _AFTER = 64, 48  # characters around a candidate that its recogniser is shown
_EMAIL_REACH = 320  # characters on either side of the @; RFC 5321, 4.5.3.1, allows 64 and 255

# Visa, Mastercard, Discover, JCB, UnionPay, American Express, Diners Club: presidio's own pattern takes any thirteen
# digits that start with 1, 3, 4, 5 or 6, and not the Mastercards that start with 2.
_CARD = (
    r"(?:(?:4\d{3}|5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720|6011|64[4-9]\d|65\d\d|62\d\d|35(?:2[89]|[3-8]\d))"
    r"([ -]?)\d{4}\1\d{4}\1\d{4}(?:\1\d{3})?|3[47]\d\d([ -]?)\d{6}\2\d{5}|3(?:0[0-5]|[68]\d)\d([ -]?)\d{6}\3\d{4})"
)
_WRITTEN_SSN = re.compile(r"\d{3}-\d\d-\d{4}")
_SSN_WORDS = re.compile(r"(?i)(?<!\[)\b(?:ssns?|itins?|social\s+security|soc\.?\s+sec|taxpayer\s+id)")
_PHONE_WORDS = re.compile(
    r"(?i)(?<!\[)\b(?:(?:(?:tele|cell)?phone|call|cell|mobile|fax|text|dial|contact|reach)(?:s|e?d|ing)?|tel|mobil|handy|"
    r"whatsapp|telefon\w*|rufnummer|t[ée]l[ée]phone|tel[ée]fono)(?!\w)"
)
# Dates, IP addresses and amounts with their thousands apart, which some country's telephone numbers are like.
_NO_PHONE = re.compile(r".*\d{4}-\d\d-\d\d|\d{1,3}(?:\.\d{1,3}){3}$|\d{1,3}(?:[ \u00a0.]\d{3})+(?<=000)$")
_ZIP = re.compile(r"\d{5}-\d{4}")
_OTHER_NUMBER = re.compile(
    r"(?i)(?:account|acct|a/c|order|case|claim|ref|reference|invoice|ticket|confirmation|policy|loan|tracking|check|"
    r"cheque|transaction|member|customer|serial|part|model|file|id|created|updated|modified|timestamp|time|date)\.?\s*(?:#|no\.?|num|number|id|code)?\s*(?:is|was)?"
    r"[\s:#\"'=]*$"
)
# As numbers of North America are written; the matcher has held it to the plan of numbers already.
_GROUPED_PHONE = re.compile(
    r"(?:1[ .-]?)?(?:\(\d{3}\)\W{0,2}\d{3}\W{1,3}|\d{3}(?:\.\d{3}\.|[^\w.]{1,3}\d{3}[^\w.]{1,3}))\d{4}(?!\d)"
)
_VERSION_WORDS = re.compile(
    r"(?i)(?:\bv|\bver|version|release|build|firmware|driver|section|sec|§|clause|chapter|paragraph|article|"
    r"\b[a-z]\w*/|[<>=!~]=|[<>~^])\.?\s*$"
)
# Asked for numbers without a country code that stand beside a word for telephone; presidio's choice, and neighbours.
_PHONE_REGIONS = ("US", "GB", "DE", "FR", "ES", "IT", "IN", "BR", "AU", "IL")
_WORD_REACH = 40  # characters before a number in which a word explains it


def _personal_data(text: str) -> Iterator[Found]:
    if "@" in text:
        yield from _emails(text)
    if _DIGIT.search(text) is None:
        return
    for run in _DIGITS.finditer(text):
        yield from _numbers(text, *run.span())
    for match in _IP_V4.finditer(text):
        yield from _ip_addresses(text, *match.span())
    if "::" in text or text.count(":") >= 4:
        for match in _IP_V6.finditer(text):
            yield from _ip_addresses(text, *match.span())
    for match in _IBAN_START.finditer(text):
        yield from _recognised("IBAN", text, *match.span())
    for match in _CRYPTO_START.finditer(text):
        yield from _recognised("CRYPTO_ADDRESS", text, *match.span())


@cache
def _recogniser(kind: str) -> Any:
    """Presidio's recogniser of a kind. Importing it takes seconds (it brings spaCy), so only once something asks."""
    from presidio_analyzer import Pattern, PatternRecognizer
    from presidio_analyzer.predefined_recognizers import (
        CreditCardRecognizer,
        CryptoRecognizer,
        EmailRecognizer,
        IbanRecognizer,
        IpRecognizer,
        UsSsnRecognizer,
    )

    match kind:
        case "EMAIL":
            # Its own check of the domain would fetch the list of endings from the network.
            return PatternRecognizer(supported_entity="EMAIL_ADDRESS", patterns=EmailRecognizer.PATTERNS)
        case "CARD":
            return CreditCardRecognizer(patterns=[Pattern("card by issuer", _CARD, 0.3)])
        case "IBAN":
            return IbanRecognizer()
        case "SSN":
            return UsSsnRecognizer()
        case "IP_ADDRESS":
            return IpRecognizer()
        case _:
            return CryptoRecognizer()


@cache
def _domain_endings() -> Any:
    import tldextract

    return tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None)


def _recognised(kind: str, text: str, start: int, end: int, before: int = _BEFORE, after: int = _AFTER) -> list[Found]:
    """What the recogniser of a kind finds that overlaps `text[start:end]`; it is shown no more than the surroundings.

    Short surroundings keep the time linear in the length of a text, whatever the pattern.
    """
    offset = max(0, start - before)
    results = _recogniser(kind).analyze(text[offset : end + after], entities=[])
    places = sorted({(offset + result.start, offset + result.end) for result in results})
    return [_found(kind, *place) for place in places if place[0] < end and place[1] > start]


def _emails(text: str) -> Iterator[Found]:
    at = text.find("@")
    while at >= 0:
        if 0 < at < len(text) - 1 and not text[at - 1].isspace() and not text[at + 1].isspace():
            for hit in _recognised("EMAIL", text, at, at + 1, _EMAIL_REACH, _EMAIL_REACH):
                if _domain_endings()(text[at + 1 : hit.end]).fqdn:
                    yield hit
        at = text.find("@", at + 1)


def _numbers(text: str, start: int, end: int) -> Iterator[Found]:
    """Cards, social security numbers and telephone numbers in a run of digits."""
    for hit in _recognised("CARD", text, start, end):
        if _stands_alone(text, hit):
            yield hit
    for hit in _recognised("SSN", text, start, end):
        sure = _WRITTEN_SSN.fullmatch(text, hit.start, hit.end) or _SSN_WORDS.search(text, *_reach(hit))
        if sure and _stands_alone(text, hit) and not _ZIP.fullmatch(text, hit.start, hit.end):
            yield hit
    yield from _phones(text, start, end)


def _reach(hit: Found) -> tuple[int, int]:
    """Where a word stands that explains a number."""
    return max(0, hit.start - _WORD_REACH), hit.start


def _phones(text: str, start: int, end: int) -> list[Found]:
    import phonenumbers

    words = _PHONE_WORDS.search(text, max(0, start - _WORD_REACH), start) is not None
    offset = max(0, start - 8)
    window = text[offset : end + 16]
    hits = []
    for region in _PHONE_REGIONS if words else _PHONE_REGIONS[:1]:
        for match in phonenumbers.PhoneNumberMatcher(window, region, leniency=phonenumbers.Leniency.VALID):
            hit = _found("PHONE", offset + match.start, offset + match.end)
            if not (hit.start < end and hit.end > start and _stands_alone(text, hit)):
                continue
            if _NO_PHONE.match(match.raw_string) or _ZIP.fullmatch(match.raw_string):
                continue
            explained = words and _OTHER_NUMBER.search(text, *_reach(hit)) is None
            if match.raw_string.startswith("+") or _GROUPED_PHONE.match(match.raw_string) or explained:
                hits.append(hit)
    return hits


def _stands_alone(text: str, hit: Found) -> bool:
    """Whether a number is whole: no letter, digit or decimal part goes on before or after it."""
    before, after = text[max(0, hit.start - 2) : hit.start], text[hit.end : hit.end + 2]
    return not (re.search(r"[\w$€£¥]\Z|\d[-./,:]\Z", before) or re.match(r"\w|[-./,:]\d", after))


def _ip_addresses(text: str, start: int, end: int) -> Iterator[Found]:
    for hit in _recognised("IP_ADDRESS", text, start, end):
        value = text[hit.start : hit.end].partition("/")[0].partition("%")[0]
        if not _stands_alone_address(text, hit) or _VERSION_WORDS.search(text, max(0, hit.start - 16), hit.start):
            continue
        # 1.2.3.4 numbers a paragraph, and abc::def is a name in C++.
        if len(value) > len("1.2.3.4") and ipaddress.ip_address(value).is_global and re.search(r"\d", value):
            yield hit


def _stands_alone_address(text: str, hit: Found) -> bool:
    before, after = text[max(0, hit.start - 2) : hit.start], text[hit.end : hit.end + 2]
    return not (re.search(r"\w\Z|\d[-.,]\Z", before) or re.match(r"\w|[-.,]\d", after))
