"""From a YAML file to a `RetrainSpec`: the same record that the Prefect form and the API fill."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tasks.contracts.errors import SpecError
from tasks.contracts.parse import parse, read_mapping
from tasks.contracts.spec import RetrainSpec

__all__ = ["load_spec", "parse"]  # the command line parses what it is given beside a file, too


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
    spec = parse(RetrainSpec, record, where=str(path))
    folder = path.absolute().parent
    return spec.model_copy(
        update={
            "data": spec.data.model_copy(update={"source": _beside(folder, spec.data.source)}),
            "golden": spec.golden.model_copy(
                update={
                    "path": _beside(folder, spec.golden.path),
                    "paraphrases": spec.golden.paraphrases and _beside(folder, spec.golden.paraphrases),
                }
            ),
            "curate": spec.curate.model_copy(
                update={"semantic_model": spec.curate.semantic_model and _beside(folder, spec.curate.semantic_model)}
            ),
            "suites": tuple(suite.model_copy(update={"path": _beside(folder, suite.path)}) for suite in spec.suites),
            "base_model": _model_beside(folder, spec.base_model),
        }
    )


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


def _beside(folder: Path, path: str) -> str:
    return path if "://" in path else str((folder / Path(path).expanduser()).resolve())


def _model_beside(folder: Path, uri: str) -> str:
    if uri.startswith("gguf:") and not uri.startswith("gguf:pkg:"):
        return f"gguf:{_beside(folder, uri.removeprefix('gguf:'))}"
    if ":" in uri:
        return uri
    return _beside(folder, uri)
