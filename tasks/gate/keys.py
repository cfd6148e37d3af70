"""The keys that certificates are signed and checked with: one local PEM file, made at first use unless one is named.

The private key is read, used and forgotten; what leaves this module is its id and its public half.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from securesystemslib.signer import CryptoSigner, SSlibKey

from tasks.contracts.errors import CertificateError
from tasks.store import Store

SIGNING_KEY = "GOLDGATE_SIGNING_KEY"
PUBLIC_KEY = "GOLDGATE_PUBLIC_KEY"
_KINDS = "Ed25519 or ECDSA P-256"
_MAKE_ONE = "make one with `openssl genpkey -algorithm ed25519 -out gate.pem`"


@dataclass(frozen=True)
class SigningKey:
    """What signs. Its text shows the key's id and nothing of the key."""

    _signer: CryptoSigner = field(repr=False)
    key_id: str

    @property
    def signer(self) -> CryptoSigner:
        """The signer of securesystemslib."""
        return self._signer

    @property
    def public(self) -> SSlibKey:
        """The public half."""
        return self._signer.public_key


class TrustedKey(NamedTuple):
    """A public key, and the file that it was read from."""

    key: SSlibKey
    source: str


def open_signing_key(store: Store) -> SigningKey:
    """The key that GOLDGATE_SIGNING_KEY names, else the store's own (`keys/gate.pem`), which is made at first use.

    Raises:
        CertificateError: the file is missing, is no key of a kind that is used here, or cannot be made; the store is
            remote and no key is named.
    """
    path = _named(SIGNING_KEY)
    if path is None:
        path = _own_key(store)
        if path is None:
            raise CertificateError(
                "The store is remote and no signing key is named; a private key is not put where others read.",
                where=store.root,
                fix=f"{_MAKE_ONE} and set {SIGNING_KEY} to its path on every machine that runs the gate",
            )
        if not path.exists():
            _make(path)
    signer = _read_private(path)
    beside = _beside(path)
    if beside.exists() and _read_public(beside) != signer.public_key:
        raise CertificateError(
            "The public key beside the signing key belongs to another key.",
            where=str(beside),
            fix="find out who put it there; to keep the signing key, delete the public one, it is then written anew",
        )
    if _named(SIGNING_KEY) is None and not beside.exists():
        # A store that can only be read still signs, and the public key follows from the other.
        with suppress(OSError), _locked(beside.parent):  # two who write at once would take each other's unfinished file
            if not beside.exists():
                _write(beside, _public_pem(path), 0o644)
    return SigningKey(signer, signer.public_key.keyid)


def open_trusted_key(store: Store, given: Path | None = None) -> TrustedKey:
    """The public key to check with: the given file, else GOLDGATE_PUBLIC_KEY, else the one beside the signing key.

    Raises:
        CertificateError: there is none, or the file is no public key.
    """
    path = given or _named(PUBLIC_KEY)
    if path is not None:
        return TrustedKey(_read_public(path), str(path))
    private = _named(SIGNING_KEY) or _own_key(store)
    if private is not None and (beside := _beside(private)).exists():
        return TrustedKey(_read_public(beside), str(beside))
    if private is not None and private.exists():
        return TrustedKey(_read_private(private).public_key, f"the public half of {private}")
    raise CertificateError(
        "No public key is known, so no signature can be checked.",
        where=str(private) if private is not None else store.root,
        fix=f"give --public-key FILE or set {PUBLIC_KEY}: the `gate.pub.pem` of whoever signed",
    )


def _named(variable: str) -> Path | None:
    value = os.environ.get(variable)
    return Path(value).expanduser().absolute() if value else None


def _own_key(store: Store) -> Path | None:
    return Path(store.root, "keys", "gate.pem") if store.local else None


def _beside(private: Path) -> Path:
    return private.with_suffix(".pub.pem")


def _make(path: Path) -> None:
    """Make the store's key; of several processes at once the first makes it and the others find it."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(path.parent):
            if not path.exists():
                (path.parent / ".gitignore").write_text("*\n", encoding="ascii")  # a store can lie in a checkout
                _write(path, CryptoSigner.generate_ed25519().private_bytes, 0o600)
    except OSError as error:
        raise CertificateError(
            f"The signing key of this store cannot be made: {error.strerror or error}",
            where=str(path),
            fix=f"allow writing there, or {_MAKE_ONE} and set {SIGNING_KEY} to its path",
        ) from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time writes keys here."""
    with (folder / "gate.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write(path: Path, data: bytes, mode: int) -> None:
    """Write a file whole or not at all; it never has another mode, not even for a moment."""
    part = path.with_name(f"{path.name}.part")
    part.unlink(missing_ok=True)  # what a killed process left
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    part.replace(path)


def _read_private(path: Path) -> CryptoSigner:
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise CertificateError(
            f"The signing key cannot be read: {error.strerror or error}",
            where=str(path),
            fix=f"correct {SIGNING_KEY}, or {_MAKE_ONE}",
        ) from error
    except TypeError as error:  # how the library says that it wants a passphrase
        raise CertificateError(
            "The signing key is kept under a passphrase, and nobody is there to type it.",
            where=str(path),
            fix=f"write it without one (`openssl pkey -in … -out …`) into a file of mode 0600, and name that in "
            f"{SIGNING_KEY}",
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise CertificateError(
            "The signing key is no private key in PEM.", where=str(path), fix=f"correct {SIGNING_KEY}, or {_MAKE_ONE}"
        ) from error
    if not isinstance(key, Ed25519PrivateKey) and not (
        isinstance(key, EllipticCurvePrivateKey) and isinstance(key.curve, SECP256R1)
    ):
        raise CertificateError(
            f"The signing key is of a kind that is not used here; it must be {_KINDS}.", where=str(path), fix=_MAKE_ONE
        )
    return CryptoSigner(key)


def _read_public(path: Path) -> SSlibKey:
    try:
        key = load_pem_public_key(path.read_bytes())
    except OSError as error:
        raise CertificateError(
            f"The public key cannot be read: {error.strerror or error}",
            where=str(path),
            fix=f"correct --public-key or {PUBLIC_KEY}",
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise CertificateError(
            "This is no public key in PEM.",
            where=str(path),
            fix="give the public half (`openssl pkey -in gate.pem -pubout`), never the signing key itself",
        ) from error
    if not isinstance(key, Ed25519PublicKey) and not (
        isinstance(key, EllipticCurvePublicKey) and isinstance(key.curve, SECP256R1)
    ):
        raise CertificateError(
            f"The public key is of a kind that is not used here; it must be {_KINDS}.",
            where=str(path),
            fix="give the public key of whoever signed",
        )
    return SSlibKey.from_crypto(key)


def _public_pem(private: Path) -> bytes:
    key = load_pem_private_key(private.read_bytes(), password=None)
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
