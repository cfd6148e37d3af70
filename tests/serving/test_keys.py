"""Keys: hashes on disk, whose key it is, changes seen while running, and the key of /admin."""

from __future__ import annotations

import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from tasks.contracts.errors import SpecError, StoreError
from tasks.serving import keys as keys_module
from tasks.serving.keys import ClientKey, Keys, add_key, admin_key, list_keys, remove_key, same_key


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def test_the_file_has_a_hash_and_is_its_owners_alone(path: Path) -> None:
    key = add_key(path, "shop", per_minute=60)
    (kept,) = list_keys(path)
    assert (kept.name, kept.per_minute) == ("shop", 60)
    assert key.split("-", 2)[2] not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_key_is_found_and_nothing_like_it_is(path: Path) -> None:
    key, other = add_key(path, "shop"), add_key(path, "bank")
    keys = Keys(path)
    assert [keys.find(one).name for one in (key, other)] == ["shop", "bank"]  # type: ignore[union-attr]
    wrong = (key[:-1] + ("A" if key[-1] != "A" else "B"), key[:16] + other[16:], key + "x", "", "gg-", key.upper(), "é")
    assert [keys.find(one) for one in wrong] == [None] * len(wrong)


def test_changes_of_the_file_are_seen_within_a_second(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    key = add_key(path, "shop")
    keys = Keys(path, lambda: now[0])
    new = add_key(path, "bank")
    assert keys.find(new) is None
    now[0] += 1.0
    assert keys.find(new) is not None
    remove_key(path, "shop")
    now[0] += 1.0
    assert keys.find(key) is None
    path.write_text("{")  # somebody is editing it
    now[0] += 1.0
    assert keys.find(new) is not None
    assert "the keys that were read before stay valid" in caplog.text
    path.unlink()
    now[0] += 1.0
    assert keys.find(new) is None
    assert "the file of keys has gone, so no key is valid" in caplog.text


def test_names_are_taken_once_and_removed_by_name(path: Path) -> None:
    with pytest.raises(StoreError, match="no file of keys"):
        Keys(path)
    add_key(path, "shop")
    with pytest.raises(SpecError, match="a key of 'shop' already"):
        add_key(path, "shop")
    with pytest.raises(SpecError, match="no key of 'bank'") as refused:
        remove_key(path, "bank")
    assert refused.value.fix == "it has keys of shop"
    with pytest.raises(SpecError, match="No client is called 'admin'"):
        add_key(path, "admin")
    with pytest.raises(SpecError, match="cannot be made"):
        add_key(path, "a\nb")
    with pytest.raises(SpecError, match="cannot be made"):
        add_key(path, "bank", per_minute=0)


def test_who_changes_the_file_is_alone_until_it_is_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_key(path, "shop")
    removing = threading.Thread(target=remove_key, args=(path, "shop"))
    write = keys_module._write

    def meanwhile(*given: Any) -> None:
        monkeypatch.setattr(keys_module, "_write", write)
        removing.start()
        removing.join(0.5)  # it has to wait; without a lock it would be done by now
        write(*given)

    monkeypatch.setattr(keys_module, "_write", meanwhile)
    add_key(path, "bank")
    removing.join()
    assert [key.name for key in list_keys(path)] == ["bank"]  # what was revoked does not come back
    with pytest.raises(StoreError, match="no file of keys"):
        remove_key(path.with_name("other.json"), "shop")
    assert {one.name for one in path.parent.iterdir()} == {"keys.json", "keys.json.lock"}


def test_a_key_that_is_removed_while_a_gateway_starts_is_seen(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, key, read = [0.0], add_key(path, "shop"), list_keys

    def meanwhile(where: Path) -> tuple[ClientKey, ...]:
        found = read(where)
        monkeypatch.setattr(keys_module, "list_keys", read)
        remove_key(path, "shop")
        return found

    monkeypatch.setattr(keys_module, "list_keys", meanwhile)
    keys = Keys(path, lambda: now[0])
    now[0] += 1.0
    assert keys.find(key) is None


def test_the_admin_key_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    key = admin_key(tmp_path, {})
    path = tmp_path / "admin.key"
    assert len(key) == 43
    assert admin_key(tmp_path, {}) == key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert admin_key(tmp_path, {"GOLDGATE_ADMIN_KEY": "named"}) == "named"
    path.chmod(0o640)
    with pytest.raises(StoreError, match="can be read by others"):
        admin_key(tmp_path, {})
    path.chmod(0o600)
    path.write_text("\n")
    with pytest.raises(StoreError, match="is empty"):
        admin_key(tmp_path, {})


def test_a_gateway_killed_while_it_makes_the_admin_key_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "admin.key"

    def killed(_: int) -> None:
        assert not path.exists()  # half of it, or nothing, would be refused at the next start
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            admin_key(tmp_path, {})
    assert not path.exists()
    assert len(admin_key(tmp_path, {})) == 43


def test_an_admin_key_that_another_has_just_made_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "admin.key"

    def first(_: int) -> None:
        if not path.exists():
            path.write_text("of the other\n")
            path.chmod(0o600)

    monkeypatch.setattr("os.fsync", first)
    assert admin_key(tmp_path, {}) == "of the other"
    assert list(tmp_path.iterdir()) == [path]


def test_keys_are_compared_whole() -> None:
    assert same_key("abc", "abc")
    assert not same_key("ab", "abc")
    assert not same_key("é", "abc")
