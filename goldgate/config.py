"""From a YAML file to a `RetrainSpec`: the same record that the Prefect form and the API fill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from tasks.contracts.errors import SpecError
from tasks.contracts.spec import RetrainSpec

Model = TypeVar("Model", bound=BaseModel)


def load_spec(path: Path, overrides: Sequence[str] = ()) -> RetrainSpec:
    """Read a configuration. Paths of data, golden set and base model are relative to the file's folder.

    Args:
        path: the YAML file.
        overrides: `key.path=value` each, the value in YAML; they win over the file.

    Raises:
        SpecError: unreadable, no YAML, an unknown key, or a value out of bounds; names the file and the field.
    """
    record = read_yaml(path)
    for override in overrides:
        _override(record, override)
    spec = parse(RetrainSpec, record, where=str(path))
    folder = path.absolute().parent
    return spec.model_copy(
        update={
            "data": spec.data.model_copy(update={"source": _beside(folder, spec.data.source)}),
            "golden": spec.golden.model_copy(update={"path": _beside(folder, spec.golden.path)}),
            "base_model": _model_beside(folder, spec.base_model),
        }
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        SpecError: it is missing, unreadable, or holds something else.
    """
    try:
        record = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SpecError("The configuration file does not exist.", where=str(path), fix="check the path") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"The configuration cannot be read: {error}", where=str(path), fix="check the file") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f":{mark.line + 1}:{mark.column + 1}" if mark is not None else ""
        raise SpecError(
            f"The configuration is not YAML: {error.problem}", where=f"{path}{line}", fix="mend that line"
        ) from error
    except yaml.YAMLError as error:
        raise SpecError(f"The configuration is not YAML: {error}", where=str(path), fix="mend the file") from error
    if not isinstance(record, dict):
        raise SpecError(
            "The configuration must be a mapping of names to values.", where=str(path), fix="see examples/ for one"
        )
    return record


def parse(model: type[Model], record: Mapping[str, Any], *, where: str) -> Model:
    """Validate a record; every field that does not fit is named in one error."""
    try:
        return model.model_validate(record)
    except ValidationError as error:
        found = []
        for problem in error.errors(include_url=False):
            field = ".".join(str(part) for part in problem["loc"]) or "(the whole)"
            message = problem["msg"].removeprefix("Value error, ")
            if problem["type"] == "extra_forbidden":
                message = "there is no such field"
            elif problem["type"] != "missing" and not isinstance(problem["input"], dict):
                message += f" (it is {problem['input']!r})"
            found.append(f"{field}: {message}")
        raise SpecError(
            "The configuration does not fit:\n" + "\n".join(f"  - {line}" for line in found),
            where=where,
            fix="change the fields named above; examples/ shows working ones",
        ) from error


def _override(record: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise SpecError("An override must read key.path=value.", where=f"--set {override}", fix="add the value")
    *parents, last = name.split(".")
    node: Any = record
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise SpecError(
                f"{parent} has no fields of its own.", where=f"--set {override}", fix="check the key's path"
            )
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SpecError("The value is not YAML.", where=f"--set {override}", fix="quote it") from error


def _beside(folder: Path, path: str) -> str:
    return path if "://" in path else str((folder / Path(path).expanduser()).resolve())


def _model_beside(folder: Path, uri: str) -> str:
    if uri.startswith("gguf:") and not uri.startswith("gguf:pkg:"):
        return f"gguf:{_beside(folder, uri.removeprefix('gguf:'))}"
    if ":" in uri:
        return uri
    return _beside(folder, uri)
