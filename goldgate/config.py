"""From a YAML file to a specification: the same record that the Prefect form and the API fill."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tasks.contracts.errors import SpecError
from tasks.contracts.parse import as_mapping, parse, read_mapping
from tasks.contracts.spec import DataSpec, RetrainSpec

# The command line parses what it is given beside a file, too.
__all__ = [
    "beside", "load_spec", "over", "parse", "place_data", "place_training", "read_with_task", "read_with_training",
    "set_key",
]  # fmt: skip

_TRAINING, _TRAINING_FROM, _TASK_FROM = "training", "training_from", "task_from"


def load_spec(path: Path, overrides: Sequence[str] = ()) -> RetrainSpec:
    """Read a configuration. Paths of data, golden set and base model are relative to the file's folder.

    Args:
        path: the YAML file.
        overrides: `key.path=value` each, the value in YAML; they win over the file.

    Raises:
        SpecError: unreadable, no YAML, an unknown key, or a value out of bounds; names the file and the field.
    """
    record = read_mapping(path)
    for override in overrides:
        set_key(record, override)
    return place_training(parse(RetrainSpec, record, where=str(path)), path)


def read_with_training(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a configuration that is about a training, with all of that training under `training`.

    `training_from` names the training's own configuration, and `training` says what is to be otherwise, group by group;
    without `training_from`, `training` is the whole of one. A relative path is relative to the folder of the file that
    says it: those under `training` are still to be placed (`place_training`), those of the named file are.

    Args:
        path: the YAML file.
        overrides: `key.path=value` each, as if the file said so.

    Raises:
        SpecError: a file is unreadable, names no training, or names one that does not fit.
    """
    record = read_mapping(path)
    for override in overrides:
        set_key(record, override)
    named = record.pop(_TRAINING_FROM, None)
    if named is None and _TRAINING not in record:
        raise SpecError(
            "It does not name the training that it is about.",
            where=f"{path}, {_TRAINING_FROM}",
            fix="write the path of a training's configuration; what is to differ from it stands under `training`",
        )
    if named is not None:
        if not isinstance(named, str):
            raise SpecError(
                "It must name a file.",
                where=f"{path}, {_TRAINING_FROM}",
                fix="write the path of a training's configuration",
            )
        changes = as_mapping(record.get(_TRAINING, {}), where=f"{path}, {_TRAINING}")
        below = load_spec(Path(beside(path.absolute().parent, named)))
        record[_TRAINING] = over(below.model_dump(mode="json"), changes)
    return record


def read_with_task(path: Path, overrides: Sequence[str], shared: Collection[str]) -> dict[str, Any]:
    """Read a configuration that takes from a training's, named as `task_from`, what it does not say itself.

    Args:
        path: the YAML file.
        overrides: `key.path=value` each, as if the file said so.
        shared: what is taken. Its paths are placed; those of this file are not yet.

    Raises:
        SpecError: a file is unreadable, or names one that is no training's.
    """
    record = read_mapping(path)
    for override in overrides:
        set_key(record, override)
    named = record.pop(_TASK_FROM, None)
    if named is None:
        return record
    if not isinstance(named, str):
        raise SpecError(
            "It must name a file.", where=f"{path}, {_TASK_FROM}", fix="write the path of a training's configuration"
        )
    training = load_spec(Path(beside(path.absolute().parent, named)))
    return over(training.model_dump(mode="json", include={*shared}), record)


def place_training(spec: RetrainSpec, path: Path) -> RetrainSpec:
    """The same training, its relative paths made absolute: they are relative to the folder of the file `path`."""
    folder = path.absolute().parent
    return spec.model_copy(
        update={
            "data": place_data(spec.data, folder),
            "golden": spec.golden.model_copy(
                update={
                    "path": beside(folder, spec.golden.path),
                    "paraphrases": spec.golden.paraphrases and beside(folder, spec.golden.paraphrases),
                }
            ),
            "curate": spec.curate.model_copy(
                update={"semantic_model": spec.curate.semantic_model and beside(folder, spec.curate.semantic_model)}
            ),
            "suites": tuple(suite.model_copy(update={"path": beside(folder, suite.path)}) for suite in spec.suites),
            "base_model": _model_beside(folder, spec.base_model),
        }
    )


def place_data(data: DataSpec, folder: Path) -> DataSpec:
    """The same data, its relative paths made absolute as seen from a folder."""
    also = tuple(beside(folder, one) for one in data.also)
    return data.model_copy(update={"source": beside(folder, data.source), "also": also})


def set_key(record: dict[str, Any], override: str) -> None:
    """Put what `key.path=value` says into a configuration that is still plain data; the value is YAML.

    Raises:
        SpecError: it does not read so, or a part of the path has no fields.
    """
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


def over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """One record over another, group by group."""
    merged = dict(below)
    for name, value in above.items():
        under = merged.get(name)
        both = isinstance(under, dict) and isinstance(value, dict)
        merged[name] = over(under, value) if both and isinstance(under, dict) else value
    return merged


def beside(folder: Path, path: str) -> str:
    """A path as seen from a folder, absolute; a URI as it is."""
    return path if "://" in path else str((folder / Path(path).expanduser()).resolve())


def _model_beside(folder: Path, uri: str) -> str:
    if uri.startswith("gguf:") and not uri.startswith("gguf:pkg:"):
        return f"gguf:{beside(folder, uri.removeprefix('gguf:'))}"
    if ":" in uri:
        return uri
    return beside(folder, uri)
