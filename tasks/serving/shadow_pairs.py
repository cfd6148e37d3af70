"""Requests that the live version and a shadow have both answered: whether they agree, and how they are kept.

What is compared is what a caller would make of an answer: one of the choices, a document, calls, or words. How it is
spelled - the order of keys, blanks, the ids of calls - is no difference.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from pydantic import ValidationError

from tasks.contracts.calls import read_answer as read_calls
from tasks.contracts.errors import SpecError, StoreError
from tasks.contracts.observe import Preferred
from tasks.contracts.serving import Shadow, Vendor
from tasks.contracts.spec import Frozen
from tasks.serving.request_log import Mask, read_log
from tasks.serving.shadow import ShadowPair

if TYPE_CHECKING:
    import pyarrow as pa

RECORD_FILE = "shadow.json"

_LONGEST = 200_000  # characters of one answer that are kept
# What OpenAI-compatible services know; they refuse fields that only vLLM has.
_COMMON_FIELDS = (
    "messages", "temperature", "max_tokens", "max_completion_tokens", "top_p", "stop", "seed", "tools", "tool_choice",
    "parallel_tool_calls", "response_format", "presence_penalty", "frequency_penalty",
)  # fmt: skip
_COLUMNS = (
    "at", "id", "key", "name", "live", "shadow", "agrees", "live_answer", "shadow_answer", "live_ms", "shadow_ms",
    "live_cost", "shadow_cost", "prompt_tokens", "completion_tokens", "error",
)  # fmt: skip


class ShadowRecord(Frozen):
    """What lies beside the pairs of a comparison.

    Attributes:
        name: what requests call the model.
        shadow: what is compared, and what is to be found.
        closed: whether answers are one of a few choices.
        tools: whether they may be calls.
    """

    name: str
    shadow: Shadow
    closed: bool
    tools: bool


class Pair(NamedTuple):
    """One request and both answers.

    Attributes:
        at: when it came, seconds since the epoch.
        id: its `x-request-id`.
        key: hash of its user's or session's name; requests of one key are alike.
        name: what it called the model.
        live: label of the version whose answer the caller got.
        shadow: label of the other version, or the vendor's model.
        agrees: whether the answers are the same; None where the shadow gave none.
        live_answer: text; tool calls as JSON.
        shadow_answer: likewise; empty for none.
        live_ms: milliseconds of the engine.
        shadow_ms: likewise; None without an answer.
        live_cost: money; None where it is not known.
        shadow_cost: likewise.
        prompt_tokens: of the shadow, where it says so.
        completion_tokens: likewise.
        error: why the shadow gave no answer; empty where it did.
    """

    at: float
    id: str
    key: str
    name: str
    live: str
    shadow: str
    agrees: bool | None
    live_answer: str
    shadow_answer: str = ""
    live_ms: float | None = None
    shadow_ms: float | None = None
    live_cost: float | None = None
    shadow_cost: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    error: str = ""


# -- whether they agree -----------------------------------------------------------------------------------------------


def agree(one: str, other: str, *, closed: bool, tools: bool) -> bool:
    """Whether two answers say the same.

    Args:
        one: an answer.
        other: another one.
        closed: whether it is one of a few choices; then nothing but blanks around it is overlooked.
        tools: whether it may be calls.
    """
    if closed:
        return one.strip() == other.strip()
    if tools:
        first, second = read_calls(one), read_calls(other)
        if first.calls or second.calls:
            return first.calls == second.calls
    documents = _document(one), _document(other)
    if documents[0] is not None and documents[1] is not None:
        return documents[0] == documents[1]
    return one.split() == other.split()


def _document(text: str) -> str | None:
    """A JSON object or list in one spelling; None for anything else."""
    try:
        value = json.loads(text, parse_constant=_no_json, parse_float=_number)
    except (ValueError, RecursionError):
        return None
    return json.dumps(value, sort_keys=True) if isinstance(value, dict | list) else None


def _no_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _number(text: str) -> float | int:
    """1.0 is 1."""
    value = float(text)
    return int(value) if value.is_integer() else value


def preferred(right: str, live: str, shadow: str, *, closed: bool, tools: bool) -> Preferred:
    """What a person's answer says of the two."""
    is_live = agree(right, live, closed=closed, tools=tools)
    is_shadow = agree(right, shadow, closed=closed, tools=tools)
    if is_live and is_shadow:
        return Preferred.BOTH
    return Preferred.LIVE if is_live else Preferred.SHADOW if is_shadow else Preferred.NEITHER


def vendor_body(body: Mapping[str, Any], vendor: Vendor) -> dict[str, Any]:
    """A request as another's service takes it: greedy, whole, and without the fields that only vLLM has.

    Args:
        body: the request with what it left open filled in, so that the instruction is in its messages.
        vendor: who is asked.
    """
    common = {name: body[name] for name in _COMMON_FIELDS if name in body}
    return {**common, "model": vendor.model, "temperature": 0, "stream": False}


def vendor_cost(vendor: Vendor, prompt_tokens: int | None, completion_tokens: int | None) -> float | None:
    """What an answer costs; None where its prices or its tokens are not known."""
    if None in (vendor.input_price, vendor.output_price, prompt_tokens, completion_tokens):
        return None
    return ((prompt_tokens or 0) * (vendor.input_price or 0.0)
            + (completion_tokens or 0) * (vendor.output_price or 0.0)) / 1_000_000  # fmt: skip


# -- how they are kept ------------------------------------------------------------------------------------------------


def pair_row(pair: Pair, mask: Mask | None) -> dict[str, Any]:
    """A pair as it is kept, its answers masked."""

    def masked(text: str) -> str:
        return mask(text[:_LONGEST]) if mask is not None else text[:_LONGEST]

    return {
        **pair._asdict(),
        "at": datetime.fromtimestamp(pair.at, UTC),
        "live_answer": masked(pair.live_answer),
        "shadow_answer": masked(pair.shadow_answer),
    }


def pair_schema() -> pa.Schema:
    """The columns of the Parquet files."""
    import pyarrow as pa

    kinds = {
        "at": pa.timestamp("us", tz="UTC"), "agrees": pa.bool_(), "prompt_tokens": pa.int32(),
        "completion_tokens": pa.int32(),
        **dict.fromkeys(("live_ms", "shadow_ms", "live_cost", "shadow_cost"), pa.float64()),
    }  # fmt: skip
    return pa.schema([(name, kinds.get(name, pa.string())) for name in _COLUMNS])


class Comparison(NamedTuple):
    """The pairs of a shadow, as the report takes them.

    Attributes:
        record: whose they are.
        live: label of the live version that they compare with: the last one.
        shadow: label of the other version, or the vendor's model.
        pairs: with what people said of them.
        other_live: pairs that compare with an earlier live version, and are left out.
        shadow_cost: sum of what the shadow's answers cost; None where nothing is known.
        errors: why the shadow gave no answer, with how often.
    """

    record: ShadowRecord
    live: str
    shadow: str
    pairs: tuple[ShadowPair, ...]
    other_live: int
    shadow_cost: float | None
    errors: dict[str, int]


def find_record(folder: Path, name: str, shadow: str | None) -> tuple[Path, ShadowRecord]:
    """The comparison of this id, or the newest one of a name.

    Args:
        folder: `shadow` in the gateway's folder.
        name: what requests call the model.
        shadow: its id; None for the newest.

    Raises:
        SpecError: there is none.
        StoreError: a record cannot be read.
    """
    found = []
    for path in sorted(folder.glob(f"{shadow or '*'}/{RECORD_FILE}")):
        try:
            record = ShadowRecord.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, ValidationError) as error:
            raise StoreError(
                f"The record of a shadow cannot be read: {error}",
                where=str(path),
                fix="restore it, or delete its folder",
            ) from error
        if record.name == name:
            found.append((record.shadow.since, path.parent, record))
    if not found:
        raise SpecError(
            f"{name} has had no shadow{f' {shadow}' if shadow else ''} here.",
            where=str(folder),
            fix="begin one (`goldgate shadow NAME --version N`), or run this where the gateway's folder is",
        )
    _, home, record = max(found, key=lambda one: one[0])
    return home, record


def read_comparison(home: Path, record: ShadowRecord, reviews: Mapping[str, str]) -> Comparison:
    """The pairs of a comparison, with what people said.

    Args:
        home: its folder.
        record: what lies in it.
        reviews: the right answer by the id of a request.

    Raises:
        SpecError: there are no pairs yet.
    """
    rows = sorted(read_log(home, schema=pair_schema), key=lambda row: row["at"])
    if not rows:
        raise SpecError(
            "No request has been answered by the shadow yet, so there is nothing to compare.",
            where=str(home),
            fix="wait: pairs are written once a minute; goldgate_shadow_dropped in the gateway's /metrics counts those "
            "that were left out",
        )
    live = str(rows[-1]["live"])
    ours = [row for row in rows if row["live"] == live]
    costs = [row["shadow_cost"] for row in ours if row["shadow_cost"] is not None]
    errors: dict[str, int] = {}
    for row in ours:
        if row["error"]:
            errors[row["error"]] = errors.get(row["error"], 0) + 1
    return Comparison(
        record, live, str(rows[-1]["shadow"]), tuple(_pairs(ours, reviews, closed=record.closed, tools=record.tools)),
        len(rows) - len(ours), sum(costs) if costs else None, errors,
    )  # fmt: skip


def _pairs(
    rows: Iterable[Mapping[str, Any]], reviews: Mapping[str, str], *, closed: bool, tools: bool
) -> Iterator[ShadowPair]:
    for row in rows:
        right = reviews.get(row["id"]) if row["agrees"] is False else None
        said = None
        if right is not None:
            said = preferred(right, row["live_answer"], row["shadow_answer"], closed=closed, tools=tools)
        yield ShadowPair(
            key=row["key"], at=row["at"], agrees=row["agrees"], live_ms=row["live_ms"], shadow_ms=row["shadow_ms"],
            live_cost=row["live_cost"], shadow_cost=row["shadow_cost"], review=said,
        )  # fmt: skip
