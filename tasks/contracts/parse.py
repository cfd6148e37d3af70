"""From what a person wrote to a record: what does not fit is said in the same words wherever it was written."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from tasks.contracts.errors import SpecError

Model = TypeVar("Model", bound=BaseModel)

_LONGEST_VALUE = 80  # characters of a wrong value that a message repeats


def read_mapping(path: Path, *, subject: str = "configuration", may_be_empty: bool = False) -> dict[str, Any]:
    """A YAML (or JSON) file that holds a mapping; an empty file is an empty mapping if it may be.

    Raises:
        SpecError: it is missing, unreadable, no YAML, or holds something else; names the file and the line.
    """
    try:
        record = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SpecError(f"The {subject} file does not exist.", where=str(path), fix="check the path") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"The {subject} cannot be read: {error}", where=str(path), fix="check the file") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f":{mark.line + 1}:{mark.column + 1}" if mark is not None else ""
        raise SpecError(
            f"The {subject} is not YAML: {error.problem}", where=f"{path}{line}", fix="mend that line"
        ) from error
    except yaml.YAMLError as error:
        raise SpecError(f"The {subject} is not YAML: {error}", where=str(path), fix="mend the file") from error
    if record is None and may_be_empty:
        return {}
    return as_mapping(record, where=str(path), subject=subject)


def as_mapping(value: Any, *, where: str, subject: str = "configuration") -> dict[str, Any]:
    """The value, if it is a mapping.

    Raises:
        SpecError: it is something else; says what.
    """
    if not isinstance(value, dict):
        kinds = {list: "a list", str: "a text", type(None): "nothing"}
        raise SpecError(
            f"The {subject} must be a mapping of names to values, and this is "
            f"{kinds.get(type(value), f'a {type(value).__name__}')}.",
            where=where,
            fix="write lines of `name: value`; see examples/ for one",
        )
    return value


def parse(model: type[Model], record: Mapping[str, Any], *, where: str, subject: str = "configuration") -> Model:
    """Validate a record.

    Raises:
        SpecError: names every field that does not fit in one error; for an unknown one the nearest that there is.
    """
    try:
        return model.model_validate(record)
    except ValidationError as error:
        lines = "\n".join(f"  - {line}" for line in problems(model, error))
        raise SpecError(
            f"The {subject} does not fit:\n{lines}",
            where=where,
            fix="change the fields named above; examples/ shows working ones",
        ) from error


def no_such_field(name: str, known: Iterable[str]) -> str:
    """What to say of a field that is not known: the nearest known one, or all of them."""
    fields = list(known)
    near = difflib.get_close_matches(name.lower(), fields, n=1)
    if near:
        return f"there is no such field; did you mean {near[0]}?"
    return "there is no such field" + (f"; there are {', '.join(fields)}" if fields else "")


def problems(model: type[BaseModel], error: ValidationError) -> list[str]:
    """What pydantic found wrong with a record, one line a field: `name: what is wrong (it is …)`."""
    found = []
    for problem in error.errors(include_url=False):
        *parents, last = problem["loc"] or ("(the whole)",)
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = no_such_field(str(last), _fields_at(model, parents))
        elif problem["type"] != "missing" and not isinstance(problem["input"], dict | BaseModel):
            message += f" (it is {_shortened(problem['input'])})"
        found.append(f"{'.'.join(str(part) for part in (*parents, last))}: {message}")
    return found


def _fields_at(model: type[BaseModel], location: Iterable[int | str]) -> list[str]:
    """The fields of the model that an error's location (names, positions in a list) leads to; none where none is."""
    at: type[BaseModel] | None = model
    for part in location:
        if isinstance(part, int):  # into the list that the field before it holds: still the same model
            continue
        field = at.model_fields.get(part) if at is not None else None
        at = _model_in(field.annotation) if field is not None else None
    return list(at.model_fields) if at is not None else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part)) is not None), None)


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else reprlib.repr(value)
