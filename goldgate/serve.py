"""`goldgate serve`: the gateway and its engines on this machine; `goldgate keys`: who may ask it."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from goldgate.config import set_key
from tasks.contracts.parse import parse, read_mapping
from tasks.contracts.serving import GatewaySpec
from tasks.contracts.spec import ExecutionSpec

KEYS_FILE = "keys.json"
# Loads every recogniser.
_ONE_OF_EACH = "password = hunter22, 212-555-0187, ann@example.com, DE89370400440532013000, eyJhbGciOiJIUzI1NiJ9.e30.x"

console = Console()
errors = Console(stderr=True)
keys_app = typer.Typer(help="Keys of the clients of a gateway.", no_args_is_help=True)

_Config = Annotated[
    Path | None, typer.Argument(help="A YAML file with the gateway's settings; none takes the defaults.")
]
_Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="key.path=value: wins over the file. May be given many times.")
]
_Store = Annotated[
    str | None, typer.Option("--store", help="Where models and records are kept; else the file's, or GOLDGATE_STORE.")
]
_KeysStore = Annotated[str | None, typer.Option("--store", help="The gateway's store.", envvar="GOLDGATE_STORE")]
_File = Annotated[Path | None, typer.Option("--file", help=f"File of the keys; else serving/{KEYS_FILE} in the store.")]
_Name = Annotated[str, typer.Argument(help="Whose key it is.", show_default=False)]


def serve(
    config: _Config = None,
    overrides: _Overrides = None,
    store: _Store = None,
    end: Annotated[
        bool, typer.Option("--end", help="End the engines that go on after a gateway; the next one starts them again.")
    ] = False,
) -> None:
    """Answer requests with the versions that were rolled out, until Ctrl-C; engines go on for the next gateway.

    Listens on loopback. To let others in, make keys (`goldgate keys add`) and set `host` and `keys_file`.
    """
    spec = gateway_spec(config, overrides or [], store)
    if end:
        from tasks.serving.gateway.server import serving_folder
        from tasks.serving.host import end_engines

        ended = end_engines(serving_folder(spec.execution))
        console.print(f"Ended: {', '.join(ended)}." if ended else "No engine runs from here.", highlight=False)
        return
    _log_to_stderr()
    from goldgate import services

    for name, value in services.client_environment(spec.execution).items():
        os.environ.setdefault(name, value)
    from tasks.serving.gateway.server import run_gateway
    from tasks.serving.vllm import VllmCommand

    def announce(url: str) -> None:
        console.print(f"Listening on {url}/v1", highlight=False)

    run_gateway(spec, VllmCommand(), mask=masking() if _masks(spec) else None, announce=announce)
    console.print("The gateway has ended. Its engines go on; `goldgate serve --end` ends them.", highlight=False)


def _masks(spec: GatewaySpec) -> bool:
    """Whether anything that is kept is to be masked."""
    return spec.log.mask or (spec.review is not None and spec.review.mask)  # what a shadow says is masked as the log is


def gateway_spec(config: Path | None, overrides: list[str], store: str | None) -> GatewaySpec:
    """What the command line says of a gateway. A relative path of keys is relative to the file that names it.

    Raises:
        SpecError: as `goldgate.config.load_spec`.
    """
    record: dict[str, Any] = read_mapping(config, may_be_empty=True) if config is not None else {}
    if config is not None and isinstance(record.get("keys_file"), str):
        record["keys_file"] = str(config.absolute().parent / Path(record["keys_file"]).expanduser())
    for override in overrides:
        set_key(record, override)
    if store is not None:
        set_key(record, f"execution.store={json.dumps(store)}")
    return parse(GatewaySpec, record, where=str(config) if config is not None else "goldgate serve")


def masking() -> Callable[[str], str]:
    """Takes personal data and secrets out of a text, as the data room finds them.

    What it needs takes seconds to load, so that is left to the first call, which the log's thread makes.
    """

    @cache
    def scanner() -> Callable[[str], Any]:
        from tasks.data.private import build_scanner

        scan = build_scanner(secrets=True, personal=True)
        scan(_ONE_OF_EACH)
        return scan

    def mask(text: str) -> str:
        from tasks.data.private import mask_text

        return mask_text(text, scanner())

    return mask


@keys_app.command("add")
def keys_add(
    name: _Name,
    per_minute: Annotated[
        int | None, typer.Option("--per-minute", help="Requests in a minute; else the gateway's limit.", min=1)
    ] = None,
    file: _File = None,
    store: _KeysStore = None,
) -> None:
    """Make a key and print it, this once: only its hash is kept. A gateway that runs knows it within a second."""
    from tasks.serving.keys import add_key

    path = _keys_path(file, store)
    key = add_key(path, name, per_minute)
    errors.print(f"Added to {escape(str(path))}. The key cannot be shown again:", highlight=False, soft_wrap=True)
    print(key)


@keys_app.command("list")
def keys_list(file: _File = None, store: _KeysStore = None) -> None:
    """Whose keys there are."""
    from tasks.serving.keys import list_keys

    table = Table("name", "id", "requests a minute", "made")
    for key in list_keys(_keys_path(file, store)):
        rate = f"{key.per_minute:,}" if key.per_minute is not None else "the gateway's"
        table.add_row(key.name, key.id, rate, f"{key.made:%Y-%m-%d %H:%M} UTC")
    console.print(table)


@keys_app.command("remove")
def keys_remove(name: _Name, file: _File = None, store: _KeysStore = None) -> None:
    """Make a key invalid, within a second also for a gateway that runs."""
    from tasks.serving.keys import remove_key

    remove_key(_keys_path(file, store), name)
    console.print(f"The key of {escape(name)} is not valid any more.", highlight=False)


def _keys_path(file: Path | None, store: str | None) -> Path:
    if file is not None:
        return file.absolute()
    from tasks.serving.gateway.server import serving_folder

    execution = ExecutionSpec() if store is None else ExecutionSpec(store=store)
    return serving_folder(execution) / KEYS_FILE


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    for name in ("goldgate", "tasks"):
        logging.getLogger(name).setLevel(logging.INFO)
