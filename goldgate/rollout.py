"""`goldgate rollout` and `goldgate rollback`: what is in service, changed by hand."""

from __future__ import annotations

import getpass
import os
import socket
import time
from pathlib import Path
from typing import Annotated
from uuid import uuid4

import typer
from rich.console import Console
from rich.markup import escape

from goldgate.config import load_spec
from tasks.contracts.errors import GoldgateError, SpecError
from tasks.contracts.serving import ROLLED_BACK_EVENT, Intent, Phase, RolloutResult, RolloutSpec
from tasks.contracts.spec import ExecutionSpec
from tasks.serving.client import GatewayClient, find_gateway, gateway_of
from tasks.serving.transaction import Ended, Means, Registry, bring_to_end, finish_left
from tasks.serving.words import change_lines, headline

EXIT_NOT_ROLLED_OUT = 3
_DRAIN_SECONDS = 30.0  # of an engine that a killed rollout left over
_SHOWN = 5  # changes that have ended


def rollout(
    config: Annotated[
        Path | None, typer.Argument(help="The configuration of the task, a YAML file.", show_default=False)
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key.path=value: wins over the file. May be given many times.")
    ] = None,
    version: Annotated[
        str | None, typer.Option("--version", help="The version; else the one that waits as `promoted`.")
    ] = None,
    wait: Annotated[float, typer.Option("--wait", help="Seconds to wait for another change to end.")] = 60.0,
    recover: Annotated[
        str | None, typer.Option("--recover", help="Finish or undo the change of this NAME that was killed.")
    ] = None,
    show: Annotated[str | None, typer.Option("--show", help="Where this NAME stands: traffic and changes.")] = None,
    store: Annotated[
        str | None, typer.Option("--store", help="Where artefacts are kept (with --recover and --show).")
    ] = None,
) -> None:
    """Bring a registered version into service: checked beside the one that answers, then traffic and alias together.

    Exits 0 if it answers now, 3 if it was refused or taken back. The gateway must run (`goldgate serve`).
    """
    # The command line registers this command, so it is there before it is called.
    from goldgate.cli import _ending_soon, _execution, _prepare, _prepare_flow, console

    if sum(given is not None for given in (config, recover, show)) != 1:
        raise SpecError(
            "Say what to do: a configuration to roll out, --recover NAME, or --show NAME.",
            where="goldgate rollout",
            fix="give one of the three",
        )
    if config is None:
        execution = _execution(store)
        _prepare(execution)
        if show is not None:
            show_name(console, execution, show)
        else:
            _say_ended(console, recover_name(console, execution, recover or "", wait))
        return
    spec = load_spec(config, overrides or [])
    _prepare_flow(spec.execution)
    from flows.rollout import rollout as flow
    from goldgate.terminal import showing

    with _ending_soon(), showing(console):
        state = flow(RolloutSpec.of(spec, version), wait_seconds=wait, return_state=True)
        result = state.result()
    if not isinstance(result, RolloutResult):
        raise TypeError(f"the flow handed back a {type(result).__name__}, not a RolloutResult")
    console.print(escape(headline(result)), highlight=False, soft_wrap=True)
    if result.phase is not Phase.DONE:
        raise typer.Exit(EXIT_NOT_ROLLED_OUT)


def rollback(
    name: Annotated[str, typer.Argument(help="The registered model.", show_default=False)],
    reason: Annotated[str, typer.Option("--reason", help="Why; kept with the version.", show_default=False)],
    by: Annotated[str | None, typer.Option("--by", help="Who decides this; else the user of this machine.")] = None,
    store: Annotated[
        str | None, typer.Option("--store", help="Where artefacts are kept.", envvar="GOLDGATE_STORE")
    ] = None,
) -> None:
    """Bring the previous version back: at the gateway at once, where one serves it, and in the registry."""
    from goldgate.cli import _execution, _prepare, console

    execution = _execution(store)
    _prepare(execution)
    gateway = find_gateway(execution)
    if gateway is not None and gateway.traffic(name) is not None:
        roll_back_at(console, gateway, execution, name, reason, by or user_here())
        return
    from tasks.registry.register import rollback as roll_back

    registered = roll_back(name, execution, reason)
    console.print(f"{name}: version {registered.version} is champion again.", highlight=False)


def roll_back_at(
    console: Console, gateway: GatewayClient, execution: ExecutionSpec, name: str, reason: str, by: str
) -> Ended:
    """Send requests back to the version before, then move the aliases after them.

    Raises:
        ConflictError: there is no version before, its engine is not ready, or a rollout is just moving traffic.
        GoldgateError: traffic has moved, but the registry could not follow; the change stays open.
    """
    began = time.monotonic()
    done = gateway.roll_back(name, by=by, why=reason, holder=_holder())
    seconds = time.monotonic() - began
    console.print(f"{name}: {done.traffic.live.label} answers again, after {seconds:.2f} s.", highlight=False)
    try:
        with gateway.holding(done.intent) as lease:
            ended = bring_to_end(_means(gateway, execution, console), done.intent, lease)
    except GoldgateError as error:
        raise type(error)(
            f"Requests are answered by {done.traffic.live.label} again, but the alias has not followed: {error.what}",
            where=error.where,
            fix=f"when this is put right, `goldgate rollout --recover {name}`; the next rollout does the same",
        ) from error
    _tell(name, ended.intent)
    console.print(f"{name}: version {ended.intent.to.version} is champion again.", highlight=False)
    return ended


def recover_name(console: Console, execution: ExecutionSpec, name: str, wait: float) -> Ended | None:
    """Finish or undo the change that somebody left open; None where there is none.

    Raises:
        ServiceError: its holder is still at work, or gateway or registry do not answer.
    """
    with gateway_of(execution) as gateway:
        return finish_left(_means(gateway, execution, console), name, _holder(), wait_seconds=wait)


def show_name(console: Console, execution: ExecutionSpec, name: str) -> None:
    """Print where a name stands.

    Raises:
        ServiceError: the gateway does not answer.
    """
    with gateway_of(execution) as gateway:
        lines = change_lines(gateway.traffic(name), gateway.open_intent(name), gateway.history(name)[:_SHOWN])
    console.print(f"[bold]{escape(name)}[/]: {escape(lines[0])}", highlight=False, soft_wrap=True)
    for line in lines[1:]:
        console.print(f"  {escape(line)}", highlight=False, soft_wrap=True)


def _means(gateway: GatewayClient, execution: ExecutionSpec, console: Console) -> Means:
    from tasks.registry.serving_aliases import move_champion, read_aliases, refuse_version, restore_aliases

    registry = Registry(
        lambda name: read_aliases(name, execution),
        lambda intent: move_champion(intent, execution),
        lambda intent: restore_aliases(intent, execution),
        lambda intent: refuse_version(intent, execution),
    )
    return Means(gateway, registry, _DRAIN_SECONDS, lambda text: console.print(f"  {escape(text)}", highlight=False))


def _say_ended(console: Console, ended: Ended | None) -> None:
    if ended is None:
        console.print("No change was left open.", highlight=False)
        return
    intent = ended.intent
    why = f": {' '.join(intent.problems)}" if intent.problems else "."
    console.print(f"The {intent.kind} to {intent.to.label} is {intent.phase.value}{escape(why)}", highlight=False)


def _tell(name: str, intent: Intent) -> None:
    """Emit the event, where a Prefect server runs; without one nobody listens."""
    if "PREFECT_API_URL" not in os.environ:
        return
    from prefect.events import emit_event

    emit_event(
        event=ROLLED_BACK_EVENT,
        resource={"prefect.resource.id": f"goldgate.model.{name}", "prefect.resource.name": name},
        payload={"version": intent.to.version, "digest": intent.to.digest, "by": intent.by, "why": intent.why},
    )


def _holder() -> str:
    return f"command {uuid4().hex[:8]} on {socket.gethostname()}, process {os.getpid()}"


def user_here() -> str:
    """Who runs this command, for the records."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"
