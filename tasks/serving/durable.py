"""Files that are whole after any kill or power cut."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def write_durably(path: Path, text: str, *, mode: int = 0o644, replace: bool = True) -> None:
    """Write a file so that a reader sees the old one or all of the new one, also after a power cut.

    Args:
        path: the file; its folder is there.
        text: all of it.
        mode: permissions that it has from the first byte on.
        replace: whether a file that is there is written anew.

    Raises:
        FileExistsError: it is there, and `replace` is false.
        OSError: it cannot be written.
    """
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        if replace:
            part.replace(path)
        else:
            os.link(part, path)
            part.unlink()
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk: without it a rename could be lost."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
