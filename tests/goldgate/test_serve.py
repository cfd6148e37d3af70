"""`goldgate serve` and `goldgate keys`: settings from file and command line, who is let in, and what is masked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from goldgate import serve as commands
from tasks.contracts.errors import SpecError
from tasks.serving.keys import Keys, list_keys

app = typer.Typer()
app.command("serve")(commands.serve)
app.add_typer(commands.keys_app, name="keys")


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("GOLDGATE_STORE", str(tmp_path / "store"))
    return tmp_path / "store"


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, arguments)


# -- keys -----------------------------------------------------------------------------------------------------------


def test_a_key_is_printed_once_and_alone_and_works(store: Path) -> None:
    made = call("keys", "add", "shop", "--per-minute", "60")
    assert made.exit_code == 0
    key = made.stdout.strip()
    path = store / "serving" / "keys.json"
    assert Keys(path).find(key).name == "shop"  # type: ignore[union-attr]
    assert key not in made.stderr
    assert str(path) in made.stderr.replace("\n", "")
    listed = call("keys", "list").stdout
    assert "shop" in listed
    assert "60" in listed
    assert key.split("-")[2] not in listed
    assert call("keys", "remove", "shop").exit_code == 0
    assert list_keys(path) == ()


def test_keys_may_lie_in_another_file(tmp_path: Path) -> None:
    path = tmp_path / "clients.json"
    key = call("keys", "add", "shop", "--file", str(path)).stdout.strip()
    assert Keys(path).find(key) is not None


# -- settings -------------------------------------------------------------------------------------------------------


def test_file_overrides_and_store_make_the_settings(tmp_path: Path) -> None:
    config = tmp_path / "gateway.yaml"
    config.write_text("host: 0.0.0.0\nkeys_file: keys.json\nport: 9000\nlimits: {max_waiting: 5}\n")
    spec = commands.gateway_spec(config, ["port=0", "log.share=0.5"], str(tmp_path / "other"))
    assert (spec.host, spec.port, spec.limits.max_waiting, spec.log.share) == ("0.0.0.0", 0, 5, 0.5)
    assert spec.keys_file == str(tmp_path / "keys.json")
    assert spec.execution.store == str(tmp_path / "other")
    assert commands.gateway_spec(None, [], None).host == "127.0.0.1"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.com"])
def test_it_refuses_to_listen_wider_than_loopback_without_keys(host: str, store: Path) -> None:
    refused = call("serve", "--set", f"host='{host}'")
    assert isinstance(refused.exception, SpecError)
    assert f"listening on {host} lets others in, so it needs `keys_file`" in refused.exception.what
    assert not store.exists()  # nothing was begun


def test_a_setting_that_there_is_not_is_named(tmp_path: Path) -> None:
    config = tmp_path / "gateway.yaml"
    config.write_text("prot: 9000\n")
    refused = call("serve", str(config))
    assert isinstance(refused.exception, SpecError)
    assert "prot: there is no such field; did you mean port?" in refused.exception.what


def test_the_command_runs_the_gateway_with_vllm_and_masking(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: dict[str, Any] = {}

    def run_gateway(spec: Any, command: Any, *, mask: Any, announce: Any) -> None:
        announce("http://127.0.0.1:1")
        ran.update(spec=spec, command=command, mask=mask)

    monkeypatch.setattr("tasks.serving.gateway.server.run_gateway", run_gateway)
    monkeypatch.setattr("tasks.serving.vllm.VllmCommand", lambda: "vllm")
    done = call("serve", "--set", "port=0")
    assert done.exit_code == 0, done.exception
    assert "Listening on http://127.0.0.1:1/v1" in done.stdout
    assert (ran["spec"].port, ran["command"], callable(ran["mask"])) == (0, "vllm", True)
    call("serve", "--set", "log.mask=false", "--set", "review.mask=false")
    assert ran["mask"] is None


@pytest.mark.slow  # loads every recogniser
def test_masking_is_the_data_rooms() -> None:
    mask = commands.masking()
    assert mask("") == ""
    assert mask("mail ann@corp.com, my password is hunter22, card 4111 1111 1111 1111") == (
        "mail [EMAIL], my password is [PASSWORD], card [CARD]"
    )
