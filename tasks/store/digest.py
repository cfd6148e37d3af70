"""The two hashes: the fingerprint of a recipe, and the digest of bytes. Both are sha256 in lower-case hex."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import BaseModel


def canonical(value: Any) -> str:
    """One text for one value: JSON with sorted keys and no white space.

    Raises:
        TypeError: for a value whose text could differ between processes or machines (sets, paths, objects, NaN):
            a recipe that holds one has no stable fingerprint.
    """

    def plain(node: Any, where: str) -> Any:
        if isinstance(node, BaseModel):
            return plain(node.model_dump(mode="json"), where)
        if isinstance(node, Enum):
            return plain(node.value, where)
        if node is None or isinstance(node, str | bool | int):
            return node
        if isinstance(node, float):
            if not math.isfinite(node):
                raise TypeError(f"{where}: {node} has no canonical text")
            return node
        if isinstance(node, Mapping):
            if not all(isinstance(key, str) for key in node):
                raise TypeError(f"{where}: a mapping's keys must be strings")
            return {key: plain(item, f"{where}.{key}") for key, item in node.items()}
        if isinstance(node, list | tuple):
            return [plain(item, f"{where}[{index}]") for index, item in enumerate(node)]
        raise TypeError(f"{where}: a {type(node).__name__} has no canonical text")

    return json.dumps(plain(value, "value"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest_bytes(data: bytes) -> str:
    """sha256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    """sha256 of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_files(files: Mapping[str, str]) -> str:
    """sha256 over the names and digests of files, whatever their order."""
    return digest_bytes(canonical(dict(files)).encode())


def digest_folder(folder: Path) -> str:
    """sha256 over the relative names and bytes of all files below a folder."""
    return digest_files(
        {path.relative_to(folder).as_posix(): digest_file(path) for path in folder.rglob("*") if path.is_file()}
    )


def fingerprint(step: str, version: int, config: Any, inputs: Mapping[str, str]) -> str:
    """sha256 of a recipe: which step, which version of its code, its configuration and its inputs' digests.

    The device, addresses and the root of the store are no part of a recipe: leave them out of `config`.
    """
    return digest_bytes(
        canonical({"step": step, "version": version, "config": config, "inputs": dict(inputs)}).encode()
    )
