"""Calls of tools: the one way in which they are written, how they are read, and whether they fit the tools.

An answer that calls tools is kept as the canonical JSON of a list of `{"arguments", "name"}`, in the order of its text,
so that the same calls are the same text whatever wrote them. An answer in words is kept as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import sha256
from typing import Any, NamedTuple, NoReturn

from tasks.contracts.rows import Call, canonical_json

Tools = tuple[dict[str, Any], ...]

NO_CALL = "(words)"  # the name of the class of answers that call no tool
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")  # the OpenAI protocol's rule
# Keys that come first where tools are written, as models have seen them; the others follow in alphabetical order.
_FIRST = ("name", "type", "description", "parameters", "properties", "required")

_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}

# -- how models write calls ---------------------------------------------------------------------------------------

_TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)  # Hermes, Qwen
_MARKS = re.compile(r"\[TOOL_CALLS\]|<\|python_tag\|>")  # Mistral, Llama
_FENCED = re.compile(r"```\w*\s*(.*?)```", re.DOTALL)
_JSON = re.compile(r"\s*(?:\{|\[\s*\{)")  # no sentence begins like this
_NAMED = re.compile(r"([A-Za-z0-9_-]{1,64})(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(?=\{)")  # Mistral, later versions
_BETWEEN = re.compile(r"[\s;,]*")


class Reading(NamedTuple):
    """What a text says as the answer to a task with tools.

    Attributes:
        calls: the calls in it, in canonical order; none for words.
        words: the text itself where it calls nothing.
        problem: why it is neither; None where it can be read.
    """

    calls: tuple[Call, ...]
    words: str
    problem: str | None = None

    @property
    def answer(self) -> str:
        """The answer as it is kept: canonical calls, or the text."""
        return write_calls(self.calls) if self.calls else self.words


def read_answer(text: str) -> Reading:
    """Find the calls in what a model wrote.

    Read are JSON between `<tool_call>` tags (Hermes, Qwen), behind `[TOOL_CALLS]` (Mistral: a list, or the name before
    the arguments) or `<|python_tag|>` (Llama), in a fence that has a name in it, and alone; one call, a list, or
    several after each other; with the arguments under `arguments` or `parameters`, as an object or as JSON in a text.
    Words beside tags or fences do not count. Text that begins like JSON and is no call is no answer in words either.
    """
    text = text.strip()
    pieces = _pieces(text)
    if pieces is None:
        return Reading((), text)
    try:
        calls = sorted(call for piece in pieces for call in _calls_in(piece))
    except RecursionError:
        return Reading((), text, "it is nested too deep")
    except ValueError as error:  # half a surrogate pair is one too
        return Reading((), text, str(error))
    return Reading(tuple(calls), text, None if calls else "it has the mark of a call, and no call")


def _pieces(text: str) -> list[str] | None:
    """The parts of a text that have to be calls; None where it is words."""
    tagged = _TAGGED.findall(text)
    if tagged:
        return tagged
    if _MARKS.search(text):
        return _MARKS.split(text)[1:]
    fenced = [piece for piece in _FENCED.findall(text) if _JSON.match(piece) and '"name"' in piece]
    if fenced:
        return fenced
    return [text] if _JSON.match(text) else None


def _calls_in(piece: str) -> list[Call]:
    decoder = json.JSONDecoder(parse_constant=_refuse_constant)
    calls: list[Call] = []
    at = _end_of_gap(piece, 0)
    while at < len(piece):
        named = _NAMED.match(piece, at)
        if named:
            arguments, at = decoder.raw_decode(piece, named.end())
            calls.append(make_call(named[1], arguments))
        else:
            value, at = decoder.raw_decode(piece, at)
            calls += read_tool_calls(value if isinstance(value, list) else [value])
        at = _end_of_gap(piece, at)
    return calls


def _end_of_gap(piece: str, at: int) -> int:
    found = _BETWEEN.match(piece, at)
    return found.end() if found else at


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


# -- calls and their canonical form -------------------------------------------------------------------------------


def read_tool_calls(calls: Iterable[Any]) -> list[Call]:
    """Calls in the OpenAI protocol's shape, or as bare `{"name", "arguments"}`; ids are left out.

    Raises:
        ValueError: one has no name, or arguments that are no JSON object.
    """
    found = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError("a call has no name of a function")
        arguments = function.get("arguments", function.get("parameters"))
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments, parse_constant=_refuse_constant)
            except ValueError as error:
                raise ValueError(f"the arguments of {function['name']} are not valid JSON: {error}") from error
        found.append(make_call(function["name"], {} if arguments is None else arguments))
    return found


def make_call(name: str, arguments: Any) -> Call:
    """A call in canonical form.

    Raises:
        ValueError: the arguments are no object, or hold what JSON in UTF-8 cannot: NaN, half a surrogate pair.
    """
    if not isinstance(arguments, Mapping):
        raise ValueError(f"the arguments of {name} are no object")
    text = canonical_json(dict(arguments))
    f"{name}{text}".encode()  # refuses half a surrogate pair here, where it can be said of what
    return Call(name, text)


def write_calls(calls: Iterable[Call]) -> str:
    """The canonical text of calls: a JSON list of `{"arguments", "name"}`, whatever their order."""
    return canonical_json([{"name": name, "arguments": json.loads(arguments)} for name, arguments in sorted(calls)])


def calls_of(target: str) -> tuple[Call, ...]:
    """The calls of an answer that `write_calls` wrote; none for an answer in words."""
    if not target.startswith("[{"):
        return ()
    reading = read_answer(target)
    return reading.calls if write_calls(reading.calls) == target else ()


def name_tools(target: str) -> str:
    """Which tools an answer calls, as the name of a class: `refund`, `find + refund`, or `(words)`."""
    return " + ".join(dict.fromkeys(call.name for call in calls_of(target))) or NO_CALL


# -- tools --------------------------------------------------------------------------------------------------------


def read_tools(tools: Sequence[Mapping[str, Any]]) -> Tools:
    """Definitions of functions as the OpenAI protocol has them, bare or within `{"type": "function", "function": …}`.

    They come back bare, their keys in one order, so that equal definitions are shown to a model in the same way, and
    with description and parameters, which some chat templates rely on; a tool without parameters takes no arguments.

    Raises:
        ValueError: a definition has no valid name, a name is there twice, or parameters are no JSON Schema of an
            object.
    """
    found: dict[str, dict[str, Any]] = {}
    for number, given in enumerate(tools, start=1):
        tool = given["function"] if given.get("type") == "function" and "function" in given else given
        name = tool.get("name") if isinstance(tool, Mapping) else None
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(
                f"tool {number} has the name {name!r}; a name has 1 to 64 letters, digits, underscores or hyphens"
            )
        if name in found:
            raise ValueError(f"two tools have the name {name}")
        if not isinstance(tool.get("description", ""), str):
            raise ValueError(f"the description of the tool {name} is no text")
        _check_parameters(name, tool.get("parameters", _NO_PARAMETERS))
        found[name] = _ordered({"description": "", "parameters": _NO_PARAMETERS} | dict(tool))
    return tuple(found.values())


def _check_parameters(name: str, parameters: Any) -> None:
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError

    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise ValueError(f"the parameters of the tool {name} are no JSON Schema of an object")
    try:
        Draft202012Validator.check_schema(parameters)
    except SchemaError as error:
        raise ValueError(
            f"the parameters of the tool {name} are no JSON Schema: {error.message} (at {error.json_path})"
        ) from error


def _ordered(node: Any) -> Any:
    if isinstance(node, Mapping):
        names = sorted(node, key=lambda name: (_FIRST.index(name) if name in _FIRST else len(_FIRST), name))
        return {name: _ordered(node[name]) for name in names}
    return [_ordered(item) for item in node] if isinstance(node, list | tuple) else node


def wrap_tools(tools: Tools) -> list[dict[str, Any]]:
    """The definitions as chat templates and the OpenAI protocol take them."""
    return [{"type": "function", "function": tool} for tool in tools]


def digest_tools(tools: Tools) -> str | None:
    """sha256 of the definitions; None where there are none."""
    return sha256(canonical_json(list(tools)).encode()).hexdigest() if tools else None


def calls_check(tools: Tools) -> Callable[[Iterable[Call]], str | None]:
    """A function from calls to what is wrong with them by the tools there are, as `read_tools` gives them.

    None where each fits.
    """
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match
    from referencing import Registry

    # An empty registry of its own, so that a `$ref` to an address is never fetched.
    validators = {tool["name"]: Draft202012Validator(tool["parameters"], registry=Registry()) for tool in tools}

    def problem(calls: Iterable[Call]) -> str | None:
        for call in calls:
            validator = validators.get(call.name)
            if validator is None:
                return f"there is no tool {call.name!r}"
            worst = best_match(validator.iter_errors(json.loads(call.arguments)))
            if worst is not None:
                return f"the arguments of {call.name} do not fit: {worst.message} (at {worst.json_path})"
        return None

    return problem
