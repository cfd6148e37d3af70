"""The keys that certificates are signed and checked with."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from tasks.contracts.errors import CertificateError
from tasks.gate.keys import open_signing_key, open_trusted_key
from tasks.store import Store


@pytest.fixture(autouse=True)
def _no_keys_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOLDGATE_SIGNING_KEY", raising=False)
    monkeypatch.delenv("GOLDGATE_PUBLIC_KEY", raising=False)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def pem(path: Path, key: object, passphrase: bytes | None = None) -> Path:
    how = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, how))  # type: ignore[attr-defined]
    return path


def public_pem(path: Path, key: object) -> Path:
    path.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))  # type: ignore[attr-defined]
    return path


def test_a_key_is_made_once_and_nobody_else_can_read_it(store: Store) -> None:
    first, second = open_signing_key(store), open_signing_key(store)
    folder = Path(store.root, "keys")
    assert first.key_id == second.key_id
    assert sorted(path.name for path in folder.iterdir()) == [".gitignore", "gate.lock", "gate.pem", "gate.pub.pem"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "gate.pem").stat().st_mode) == 0o600
    assert open_trusted_key(store).key == first.public
    assert open_trusted_key(store).source == str(folder / "gate.pub.pem")


def test_a_key_shows_nothing_of_itself(store: Store) -> None:
    key = open_signing_key(store)
    secret = Path(store.root, "keys", "gate.pem").read_text().splitlines()[1]
    assert secret not in f"{key!r} {key}"
    assert repr(key) == f"SigningKey(key_id='{key.key_id}')"


def test_many_processes_at_once_have_one_key(store: Store) -> None:
    code = (
        "import sys; from tasks.store import Store; from tasks.gate.keys import open_signing_key;"
        "print(open_signing_key(Store(sys.argv[1])).key_id)"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code, store.root], stdout=subprocess.PIPE, text=True) for _ in range(6)
    ]
    ids = {process.communicate(timeout=120)[0].strip() for process in started}
    assert ids == {open_signing_key(store).key_id}
    assert not list(Path(store.root, "keys").glob("*.part"))


def test_a_process_that_was_killed_while_making_a_key_leaves_no_trap(store: Store) -> None:
    part = Path(store.root, "keys", "gate.pem.part")
    part.parent.mkdir(parents=True)
    part.write_text("half a k")
    part.chmod(0o644)
    open_signing_key(store)
    assert not part.exists()
    assert stat.S_IMODE((part.parent / "gate.pem").stat().st_mode) == 0o600


def test_a_lost_public_key_comes_back(store: Store) -> None:
    key = open_signing_key(store)
    beside = Path(store.root, "keys", "gate.pub.pem")
    beside.unlink()
    assert open_trusted_key(store).key == key.public  # from the private one
    open_signing_key(store)
    assert open_trusted_key(store).source == str(beside)


def test_processes_that_write_the_public_key_at_once_keep_it_whole(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = Path(store.root, "keys", "gate.pub.pem")
    open_signing_key(store)
    beside.unlink()
    first_wrote, second_opened, first_done = (threading.Event() for _ in range(3))
    real_open, real_fsync = os.open, os.fsync

    def fsync(file: int) -> None:
        if threading.current_thread().name == "first":
            first_wrote.set()
            second_opened.wait(1.0)  # which does not come while the first is at work
        real_fsync(file)

    def open_file(path: Any, *args: Any, **kwargs: Any) -> int:
        file = real_open(path, *args, **kwargs)
        if threading.current_thread().name == "second" and str(path).endswith("gate.pub.pem.part"):
            second_opened.set()
            first_done.wait(60.0)
        return file

    def first() -> None:
        try:
            open_signing_key(store)
        finally:
            found.append(beside.read_bytes())
            first_done.set()

    def second() -> None:
        first_wrote.wait(60.0)
        open_signing_key(store)

    found: list[bytes] = []
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        patched.setattr(os, "open", open_file)
        threads = [threading.Thread(target=first, name="first"), threading.Thread(target=second, name="second")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [beside.read_bytes()], "whole as soon as the first has written it"
    assert open_trusted_key(store).key == open_signing_key(store).public
    assert not list(beside.parent.glob("*.part"))


def test_a_store_that_can_only_be_read_still_signs(store: Store) -> None:
    key = open_signing_key(store)
    folder = Path(store.root, "keys")
    (folder / "gate.pub.pem").unlink()
    (folder / "gate.lock").unlink()
    (folder / "gate.lock").mkdir()  # nobody can open this for writing, not even root
    assert open_signing_key(store).key_id == key.key_id
    assert open_trusted_key(store).key == key.public
    assert not (folder / "gate.pub.pem").exists()


@pytest.mark.parametrize("key", [Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256R1())])
def test_a_named_key_is_used_and_nothing_is_written(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: object
) -> None:
    home = tmp_path / "elsewhere"
    home.mkdir()
    monkeypatch.setenv("GOLDGATE_SIGNING_KEY", str(pem(home / "release.pem", key)))
    signing = open_signing_key(store)
    assert open_trusted_key(store).key == signing.public
    assert [path.name for path in home.iterdir()] == ["release.pem"]
    assert not Path(store.root).exists()
    beside = public_pem(home / "release.pub.pem", key)
    assert open_trusted_key(store).source == str(beside)


def test_who_checks_says_whom_to_trust(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_signing_key(store)
    named, given = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    monkeypatch.setenv("GOLDGATE_PUBLIC_KEY", str(public_pem(tmp_path / "named.pem", named)))
    path = public_pem(tmp_path / "given.pem", given)
    assert open_trusted_key(store).source == str(tmp_path / "named.pem")
    assert open_trusted_key(store, path).source == str(path)


def test_no_key_to_check_with_is_said_and_none_is_made(store: Store) -> None:
    with pytest.raises(CertificateError, match="No public key is known"):
        open_trusted_key(store)
    assert not Path(store.root).exists()


def test_a_remote_store_needs_a_named_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = Store("memory://bucket/store")
    with pytest.raises(CertificateError, match="store is remote") as refused:
        open_signing_key(remote)
    assert "GOLDGATE_SIGNING_KEY" in refused.value.fix
    with pytest.raises(CertificateError, match="No public key is known"):
        open_trusted_key(remote)
    monkeypatch.setenv("GOLDGATE_SIGNING_KEY", str(pem(tmp_path / "k.pem", Ed25519PrivateKey.generate())))
    assert open_signing_key(remote).public == open_trusted_key(remote).key


def test_what_is_no_usable_key_is_named(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ed = Ed25519PrivateKey.generate()
    (tmp_path / "text.pem").write_text("not a key")
    cases = {
        tmp_path / "missing.pem": "cannot be read",
        tmp_path / "text.pem": "no private key in PEM",
        public_pem(tmp_path / "public.pem", ed): "no private key in PEM",
        pem(tmp_path / "locked.pem", ed, b"passphrase"): "under a passphrase",
        pem(tmp_path / "rsa.pem", rsa.generate_private_key(65537, 2048)): "must be Ed25519 or ECDSA P-256",
        pem(tmp_path / "p384.pem", ec.generate_private_key(ec.SECP384R1())): "must be Ed25519 or ECDSA P-256",
    }
    for path, said in cases.items():
        monkeypatch.setenv("GOLDGATE_SIGNING_KEY", str(path))
        with pytest.raises(CertificateError, match=said) as refused:
            open_signing_key(store)
        assert refused.value.where == str(path)
    private = pem(tmp_path / "private.pem", ed)
    for path, said in {private: "no public key in PEM", tmp_path / "none.pem": "public key cannot be read"}.items():
        with pytest.raises(CertificateError, match=said):
            open_trusted_key(store, path)


def test_a_public_key_of_somebody_else_beside_the_signing_key_is_refused(store: Store) -> None:
    open_signing_key(store)
    public_pem(Path(store.root, "keys", "gate.pub.pem"), Ed25519PrivateKey.generate())
    with pytest.raises(CertificateError, match="belongs to another key"):
        open_signing_key(store)


def test_a_store_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CertificateError, match="cannot be made: Not a directory"):
        open_signing_key(Store(str(tmp_path / "file")))
