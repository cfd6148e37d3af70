"""Keys: those of clients, kept in a file as salted hashes, and the one of the gateway's `/admin`.

A key is 256 random bits, so nobody can try them all, and a hash that is slow on purpose, as passwords need, would
protect nothing more; it would only cost each request its time. The salt keeps equal keys from looking equal.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from pydantic import Field, ValidationError

from tasks.contracts.errors import SpecError, StoreError
from tasks.contracts.serving import ADMIN_KEY
from tasks.contracts.spec import Frozen
from tasks.serving.durable import write_durably

ADMIN_KEY_FILE = "admin.key"

_BYTES = 32
_ID_BYTES = 6
_KEY = re.compile(r"gg-([0-9a-f]{12})-([A-Za-z0-9_-]{43})")
_LOOK_SECONDS = 1.0  # so often it is seen whether the file has changed
_log = logging.getLogger(__name__)


class ClientKey(Frozen):
    """A key as the file has it; the key itself is nowhere.

    Attributes:
        id: its part that is no secret, by which it is found.
        name: whose it is.
        salt: hexadecimal.
        sha256: of salt and key.
        per_minute: requests in a minute; None is the gateway's own limit.
        made: when.
    """

    id: str = Field(pattern=r"^[0-9a-f]{12}$")
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._@-]{0,63}$")
    salt: str = Field(pattern=r"^[0-9a-f]{32}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    per_minute: int | None = Field(default=None, ge=1)
    made: datetime


ADMIN = "admin"  # in the place of a client's name: the gateway's own key, with which a rollout asks its questions


class _KeysFile(Frozen):
    keys: tuple[ClientKey, ...] = ()


def add_key(path: Path, name: str, per_minute: int | None = None) -> str:
    """Make a key, write its hash to the file, and hand it back; it cannot be shown again.

    Raises:
        SpecError: there is a key of this name, or the name cannot be one.
        StoreError: the file cannot be read or written.
    """
    salt, public, secret = os.urandom(16), os.urandom(_ID_BYTES).hex(), secrets.token_urlsafe(_BYTES)
    key = f"gg-{public}-{secret}"
    try:
        made = ClientKey(
            id=public, name=name, salt=salt.hex(), sha256=_hashed(salt, key), per_minute=per_minute,
            made=datetime.now(UTC),
        )  # fmt: skip
    except ValidationError as error:
        raise SpecError(
            f"This key cannot be made: {error.errors()[0]['msg']}",
            where=f"name {name!r}, per_minute {per_minute}",
            fix="a name of letters, digits, spaces and ._@-, 64 at most; a rate of one a minute or more",
        ) from error
    if name == ADMIN:
        raise SpecError(
            f"No client is called {ADMIN!r}: what asks under this name is taken for a check, and not for a request.",
            where=f"name {name!r}",
            fix="give the key another name",
        )
    with _alone(path):
        keys = list_keys(path) if path.exists() else ()
        if any(known.name == name for known in keys):
            raise SpecError(
                f"There is a key of {name!r} already.",
                where=str(path),
                fix="remove it first, or give this one another name",
            )
        _write(path, (*keys, made))
    return key


def remove_key(path: Path, name: str) -> None:
    """Make a key invalid; a gateway that runs sees it within a second.

    Raises:
        SpecError: there is no key of this name.
        StoreError: the file cannot be read or written.
    """
    list_keys(path)  # refuses where there is none, before a lock is left there
    with _alone(path):
        keys = list_keys(path)
        left = tuple(key for key in keys if key.name != name)
        if len(left) == len(keys):
            raise SpecError(
                f"There is no key of {name!r}.",
                where=str(path),
                fix=f"it has keys of {', '.join(key.name for key in keys) or 'nobody'}",
            )
        _write(path, left)


def list_keys(path: Path) -> tuple[ClientKey, ...]:
    """What the file has; no keys can be made of it.

    Raises:
        StoreError: it is not there, or cannot be read.
    """
    try:
        return _KeysFile.model_validate_json(path.read_bytes()).keys
    except FileNotFoundError as error:
        raise StoreError(
            "There is no file of keys.", where=str(path), fix="make one with `goldgate keys add`"
        ) from error
    except OSError as error:
        raise StoreError(
            f"The file of keys cannot be read: {error.strerror}", where=str(path), fix="check its permissions"
        ) from error
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise StoreError(
            f"The file of keys does not read as one: {'.'.join(map(str, problem['loc']))}: {problem['msg']}",
            where=str(path),
            fix="restore it from a backup, or make a new one with `goldgate keys add`",
        ) from error


class Keys:
    """The keys of a gateway that runs: read again when their file changes.

    A file that has gone lets nobody in. One that does not read any more leaves the last one that did in force, since
    the change may be half-way; both are logged.

    Args:
        path: the file.
        clock: seconds that only ever grow.

    Raises:
        StoreError: it is not there, or cannot be read.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock = path, clock
        self._seen = self._mark()  # before it is read: a change in between is one that is seen
        self._by_id = {key.id: key for key in list_keys(path)}
        self._looked = clock()

    def find(self, key: str) -> ClientKey | None:
        """Whose key this is; None for one that is not valid. Takes the same time whatever is wrong with its secret."""
        self._look()
        match = _KEY.fullmatch(key)
        known = self._by_id.get(match[1]) if match is not None else None
        if known is None:
            return None
        return known if hmac.compare_digest(_hashed(bytes.fromhex(known.salt), key), known.sha256) else None

    def _look(self) -> None:
        now = self._clock()
        if now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        mark = self._mark()
        if mark == self._seen:
            return
        self._seen = mark
        if mark is None:
            _log.error("the file of keys has gone, so no key is valid: %s", self._path)
            self._by_id = {}
            return
        try:
            self._by_id = {key.id: key for key in list_keys(self._path)}
            _log.info("read %d keys again", len(self._by_id))
        except StoreError as error:
            _log.error("the keys that were read before stay valid: %s", error)

    def _mark(self) -> tuple[int, int, int] | None:
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return None
        except OSError:
            return (0, 0, 0)
        return (found.st_mtime_ns, found.st_size, found.st_ino)


def admin_key(folder: Path, environment: Mapping[str, str] = os.environ) -> str:
    """The key of `/admin`: the environment's GOLDGATE_ADMIN_KEY, else that in the folder, made at the first start.

    Raises:
        StoreError: the file can be read by others, is empty, or cannot be made.
    """
    named = environment.get(ADMIN_KEY)
    if named:
        return named
    path = folder / ADMIN_KEY_FILE
    try:
        if not path.exists():
            # Whole or not at all: an empty file, left by a kill, would be refused at every later start.
            write_durably(path, secrets.token_urlsafe(_BYTES) + "\n", mode=0o600, replace=False)
    except FileExistsError:  # another was first
        pass
    except OSError as error:
        raise StoreError(
            f"The key of the gateway's /admin cannot be made: {error.strerror}",
            where=str(path),
            fix="allow writing there",
        ) from error
    return _read_admin_key(path)


def _read_admin_key(path: Path) -> str:
    try:
        mode, key = path.stat().st_mode, path.read_text().strip()
    except OSError as error:
        raise StoreError(
            f"The key of the gateway's /admin cannot be read: {error.strerror}", where=str(path), fix="check the file"
        ) from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise StoreError(
            "The key of the gateway's /admin can be read by others.",
            where=f"{path} (mode {stat.S_IMODE(mode):o})",
            fix=f"chmod 600 {path}, or delete it for a new key",
        )
    if not key:
        raise StoreError("The key of the gateway's /admin is empty.", where=str(path), fix="delete it for a new key")
    return key


def same_key(given: str, key: str) -> bool:
    """Whether they are equal, in a time that does not tell where they differ."""
    return hmac.compare_digest(given.encode(), key.encode())


def _hashed(salt: bytes, key: str) -> str:
    return hashlib.sha256(salt + key.encode()).hexdigest()


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Be the only one who changes the file of keys, from reading it to writing it: else a key that another has removed
    meanwhile would be valid again.

    The lock is a file beside it, since the file itself is replaced.

    Raises:
        StoreError: the lock cannot be made.
    """
    lock = path.with_name(f"{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise StoreError(
            f"The file of keys cannot be changed: {error.strerror}", where=str(lock), fix="free space, or allow writing"
        ) from error
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def _write(path: Path, keys: tuple[ClientKey, ...]) -> None:
    try:
        write_durably(path, _KeysFile(keys=keys).model_dump_json(indent=2), mode=0o600)
    except OSError as error:
        raise StoreError(
            f"The file of keys cannot be written: {error.strerror}", where=str(path), fix="free space, or allow writing"
        ) from error
