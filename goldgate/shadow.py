"""`goldgate shadow`: another version, or a vendor, answers a share of the requests unseen; and what that shows."""

from __future__ import annotations

import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated
from uuid import uuid4

import typer
from rich.console import Console
from rich.markup import escape

from goldgate.config import load_spec, parse
from goldgate.rollout import user_here
from tasks.contracts.errors import GoldgateError, ServiceError, SpecError
from tasks.contracts.observe import ShadowReportSpec, ShadowResult, ShadowSpec
from tasks.contracts.serving import EngineState, Shadow, Traffic, Vendor, VersionRef
from tasks.contracts.spec import EngineSpec, ExecutionSpec
from tasks.serving.client import ConflictError, GatewayClient, gateway_of
from tasks.serving.shadow_words import shadow_lines
from tasks.serving.words import shadow_line

_WHERE = "goldgate shadow"
_POLL_SECONDS = 0.5
_FETCH_SECONDS = 1800.0  # for the files of a version, which are fetched before its engine starts
_DRAIN_SECONDS = 5.0
_ENDED = (EngineState.FAILED, EngineState.STOPPED)


def shadow(
    name: Annotated[str, typer.Argument(help="What requests call the model.", show_default=False)],
    version: Annotated[str | None, typer.Option("--version", help="The version that answers unseen.")] = None,
    vendor: Annotated[
        str | None, typer.Option("--vendor", help="Address of another's OpenAI-compatible service, up to /v1.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="The vendor's model.")] = None,
    input_price: Annotated[
        float | None, typer.Option("--input-price", help="The vendor's price of a million tokens of prompt.")
    ] = None,
    output_price: Annotated[
        float | None, typer.Option("--output-price", help="The vendor's price of a million tokens of answer.")
    ] = None,
    share: Annotated[float, typer.Option("--share", help="Share of the requests.")] = 0.1,
    margin: Annotated[float, typer.Option("--margin", help="Difference in accuracy that matters.")] = 0.02,
    config: Annotated[
        Path | None, typer.Option("--config", help="The task's configuration: how its engine is run (rollout.engine).")
    ] = None,
    end: Annotated[bool, typer.Option("--end", help="End it.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Which one there is.")] = False,
    report: Annotated[bool, typer.Option("--report", help="What it shows so far.")] = False,
    reviews: Annotated[
        Path | None, typer.Option("--reviews", help="With --report: the reviews.jsonl of `goldgate review`.")
    ] = None,
    comparison: Annotated[
        str | None, typer.Option("--comparison", help="With --report: id of an earlier comparison; else the newest.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --report: print JSON.")] = False,
    store: Annotated[
        str | None, typer.Option("--store", help="Where artefacts are kept.", envvar="GOLDGATE_STORE")
    ] = None,
) -> None:
    """Have a share of the requests answered by another version or a vendor as well, unseen by callers.

    A vendor gets those requests as they are, with the instruction; its key is GOLDGATE_VENDOR_KEY in the environment of
    `goldgate serve`. Answers are compared and kept, masked; disagreements wait for a person (`goldgate review`).
    """
    from goldgate.cli import _ending_soon, _execution, _prepare, _prepare_flow, console

    if sum((version is not None, vendor is not None, end, show, report)) != 1 or (vendor is None) != (model is None):
        raise SpecError(
            "Say what to do: --version N, --vendor URL with --model M, --end, --show, or --report.",
            where=_WHERE,
            fix="give one of them",
        )
    execution = _execution(store)
    if report:
        given = str(reviews.absolute()) if reviews is not None else None
        spec = parse(
            ShadowReportSpec,
            {"name": name, "shadow": comparison, "reviews": given, "execution": execution.model_dump(mode="json")},
            where=_WHERE,
        )
        _prepare_flow(execution)
        from flows.shadow_report import shadow_report as flow
        from goldgate.terminal import showing

        with _ending_soon(), showing(console if not as_json else Console(quiet=True)):
            result = flow(spec)
        _print_report(console, result, as_json=as_json)
        return
    _prepare(execution)
    with gateway_of(execution) as gateway:
        if show:
            show_shadow(console, gateway, name)
        elif end:
            end_shadow(console, gateway, name)
        else:
            spec_of_it = parse(ShadowSpec, {"share": share, "margin": margin}, where=_WHERE)
            other = _vendor(vendor, model, input_price, output_price)
            engine = _engine(config)
            begin_shadow(console, gateway, execution, name, version, other, spec_of_it, engine)


def begin_shadow(
    console: Console,
    gateway: GatewayClient,
    execution: ExecutionSpec,
    name: str,
    number: str | None,
    vendor: Vendor | None,
    spec: ShadowSpec,
    engine: EngineSpec,
) -> Shadow:
    """Begin a comparison, and have the engine of its version run.

    Args:
        console: is told what happens.
        gateway: where requests are answered.
        execution: where the registry is.
        name: what requests call the model.
        number: of the version; None where it is a vendor.
        vendor: another's service; None where it is a version.
        spec: the share, and what difference matters.
        engine: how the version's engine is run, unless it runs already.

    Raises:
        SpecError: nothing answers under this name, or the gateway must not ask this vendor.
        ConflictError: there is a shadow already, or this version is what answers.
        ServiceError: its engine cannot be started; nothing is compared then.
    """
    from tasks.registry.serving_aliases import resolve_version

    traffic = _traffic(gateway, name)
    version = resolve_version(name, number, execution) if number is not None else None
    now = datetime.now(UTC)
    begun = Shadow(
        id=f"{now:%Y%m%d-%H%M%S}-{uuid4().hex[:6]}", version=version, vendor=vendor, spec=spec, since=now
    )  # fmt: skip
    # First it is in traffic, so that a rollout leaves its engine alone; until that is ready, its requests are left out.
    gateway.begin_shadow(name, begun, from_revision=traffic.revision, by=user_here())
    if version is not None:
        try:
            _have_engine(console, gateway, version, engine)
        except BaseException:
            with suppress(GoldgateError):
                gateway.end_shadow(name, by=user_here())
                _end_engine(gateway, version)
            raise
    console.print(f"{name}: {escape(shadow_line(begun))}.", highlight=False, soft_wrap=True)
    return begun


def end_shadow(console: Console, gateway: GatewayClient, name: str) -> None:
    """End a comparison, and the engine of its version if nothing else needs it. What was compared stays.

    Raises:
        SpecError: nothing answers under this name.
    """
    ended = _traffic(gateway, name).shadow
    if ended is None:
        console.print(f"{name} has no shadow.", highlight=False)
        return
    gateway.end_shadow(name, by=user_here())
    if ended.version is not None:
        _end_engine(gateway, ended.version)
    console.print(
        f"{name}: the shadow has ended. `goldgate shadow {name} --report` says what it has shown.", highlight=False
    )


def show_shadow(console: Console, gateway: GatewayClient, name: str) -> None:
    """Print which shadow there is.

    Raises:
        SpecError: nothing answers under this name.
    """
    there = _traffic(gateway, name).shadow
    said = shadow_line(there) if there is not None else "no shadow"
    if there is not None and there.version is not None:
        status = gateway.engine(there.version.engine)
        said += f"; its engine is {status.state.value if status is not None else 'not there'}"
    console.print(f"{name}: {escape(said)}", highlight=False, soft_wrap=True)


def _have_engine(console: Console, gateway: GatewayClient, version: VersionRef, spec: EngineSpec) -> None:
    status = gateway.engine(version.engine)
    if status is None or status.state in (*_ENDED, EngineState.DRAINING):
        status = gateway.start_engine(version, spec)
        console.print(f"The engine of {version.label} starts.", highlight=False)
    until = time.monotonic() + spec.start_seconds + _FETCH_SECONDS
    while status.state is EngineState.STARTING and time.monotonic() < until:
        time.sleep(_POLL_SECONDS)
        status = gateway.engine(version.engine) or status
    if status.state is not EngineState.READY:
        raise ServiceError(
            f"The engine of {version.label} is {status.state.value}: {status.why or 'it never answered'}",
            where=version.engine,
            fix="see its log in the gateway's folder; nothing is compared now",
        )


def _end_engine(gateway: GatewayClient, version: VersionRef) -> None:
    """End an engine that nothing needs any more; a rollout that is checking it does."""
    under_way = gateway.open_intent(version.name)
    if under_way is not None and under_way.to.engine == version.engine:
        return
    with suppress(ConflictError):  # it is live, or kept warm
        gateway.end_engine(version.engine, _DRAIN_SECONDS)


def _traffic(gateway: GatewayClient, name: str) -> Traffic:
    found = gateway.traffic(name)
    if found is None:
        raise SpecError(
            f"Nothing is in service as {name}, so there is nothing to compare with.",
            where=gateway.url,
            fix="roll a version out first (`goldgate rollout`)",
        )
    return found


def _vendor(url: str | None, model: str | None, input_price: float | None, output_price: float | None) -> Vendor | None:
    if url is None or model is None:
        return None
    given = {"url": url, "model": model, "input_price": input_price, "output_price": output_price}
    return parse(Vendor, given, where=_WHERE)


def _engine(config: Path | None) -> EngineSpec:
    rollout = load_spec(config, []).rollout if config is not None else None
    return rollout.engine if rollout is not None else EngineSpec()


def _print_report(console: Console, result: ShadowResult, *, as_json: bool) -> None:
    if as_json:
        print(result.model_dump_json(indent=2))
        return
    console.print(f"[bold]{escape(result.shadow)} beside {escape(result.live)}[/]", highlight=False)
    for line in shadow_lines(result):
        console.print(f"  {escape(line)}", highlight=False, soft_wrap=True)
