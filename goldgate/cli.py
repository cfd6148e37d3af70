"""`goldgate`: the command line. Each command reads a configuration, calls a flow or a room, prints what came out."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from goldgate.config import load_spec, parse
from tasks.contracts.errors import GoldgateError, ServiceError, SpecError, StoreError
from tasks.contracts.spec import EvaluationSpec, ExecutionSpec, PromptKind

EXIT_ERROR = 1
EXIT_NOT_PROMOTED = 3
EXIT_NOT_COMPARABLE = 3
EXIT_INTERRUPTED = 130
INTERRUPTED = "[bold]Interrupted.[/] Finished steps are kept; the same command goes on from them."
_GRACE_SECONDS = 12.0  # the training process gets ten to close its run in MLflow

app = typer.Typer(
    help="Fine-tune a small language model, and let it into production only if it is shown to be better.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
golden_app = typer.Typer(help="Golden sets.", no_args_is_help=True)
app.add_typer(golden_app, name="golden")

console = Console()
errors = Console(stderr=True)

Config = Annotated[Path, typer.Argument(help="The configuration, a YAML file (see examples/).", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="key.path=value: wins over the file. May be given many times.")
]
StoreOption = Annotated[str | None, typer.Option("--store", help="Where artefacts are kept.", envvar="GOLDGATE_STORE")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def run(
    config: Config,
    overrides: Overrides = None,
    require_promote: Annotated[
        bool, typer.Option("--require-promote", help="Exit 3 unless the verdict is PROMOTE.")
    ] = False,
) -> None:
    """Train a candidate, compare it on the golden set, and register it only if it is shown to be better."""
    spec = load_spec(config, overrides or [])
    _prepare_flow(spec.execution)
    from flows.retrain import retrain
    from goldgate.summary import print_result
    from goldgate.terminal import TerminalDisplay
    from tasks.contracts.references import Outcome, RunResult
    from tasks.runtime import display

    console.print(f"[bold]{spec.name}[/]: {spec.task.instruction}", highlight=False)
    with _ending_soon(), TerminalDisplay(console) as shown:
        token = display.set(shown)
        try:
            state = retrain(spec, return_state=True)
            result = state.result()
        finally:
            display.reset(token)
    if not isinstance(result, RunResult):
        raise TypeError(f"the flow handed back a {type(result).__name__}, not a RunResult")
    print_result(console, spec, result, reused=shown.reused)
    if require_promote and result.verdict.outcome is not Outcome.PROMOTE:
        raise typer.Exit(EXIT_NOT_PROMOTED)


@golden_app.command("freeze")
def golden_freeze(config: Config, overrides: Overrides = None) -> None:
    """Draw the golden set from the data, once; training never sees it."""
    spec = load_spec(config, overrides or [])
    from goldgate.terminal import TerminalDisplay
    from tasks.data.golden import freeze

    with TerminalDisplay(console) as shown:
        golden = freeze(spec, lambda progress: shown.update("freeze", progress))
    console.print(f"Froze {golden.items} items in {golden.path}\nsha256 {golden.digest}", highlight=False)


@app.command()
def evaluate(
    model: Annotated[
        str, typer.Argument(help="A folder, models:/<name>@<alias>, or openai:<model> with --engine URL.")
    ],
    golden: Annotated[Path, typer.Argument(help="Folder of a frozen golden set.")],
    engine: Annotated[str, typer.Option(help="embedded, vllm, or the base URL of an OpenAI-compatible server.")] = (
        "embedded"
    ),
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 32,
    prompt: Annotated[
        PromptKind, typer.Option(help="tuned: the bare instruction. base: with the answers spelled out.")
    ] = PromptKind.TUNED,
    store: StoreOption = None,
) -> None:
    """Score any model on a golden set; no verdict. The folder with its outcomes is printed last."""
    from tasks.data.golden import read_task

    name, task = read_task(golden)
    spec = parse(
        EvaluationSpec,
        {
            "name": name,
            "task": task,
            "golden": {"path": str(golden.absolute())},
            "evaluate": {"engine": engine, "max_new_tokens": max_new_tokens},
            "execution": _execution(store),
        },
        where="goldgate evaluate",
    )
    _prepare_flow(spec.execution)
    from flows.evaluate import evaluate as flow
    from goldgate.summary import print_evaluation
    from goldgate.terminal import TerminalDisplay
    from tasks.runtime import display, open_store

    with _ending_soon(), TerminalDisplay(console) as shown:
        token = display.set(shown)
        try:
            result = flow(spec, _local_model(model), prompt)
        finally:
            display.reset(token)
    print_evaluation(console, result, open_store(spec.execution))


@app.command()
def gate(
    baseline: Annotated[Path, typer.Argument(help="What runs today: an evaluation folder, JSONL, CSV or Parquet.")],
    candidate: Annotated[Path, typer.Argument(help="What wants its place, on the same items.")],
    policy: Annotated[Path, typer.Option("--policy", help="YAML: a policy, or a configuration that holds one.")],
    as_json: Json = False,
) -> None:
    """Give a verdict on two result files. Exits 0 to promote, 1 to reject, 2 if inconclusive, 3 on bad input."""
    from goldgate.summary import print_verdict
    from tasks.contracts.references import Outcome
    from tasks.gate.files import judge_files, read_policy

    try:
        verdict = judge_files(baseline, candidate, read_policy(policy))
    except GoldgateError as error:
        _refuse(error)
        raise typer.Exit(EXIT_NOT_COMPARABLE) from error
    if as_json:
        print(verdict.model_dump_json(indent=2))
    else:
        print_verdict(console, verdict)
    raise typer.Exit({Outcome.PROMOTE: 0, Outcome.REJECT: 1, Outcome.INCONCLUSIVE: 2}[verdict.outcome])


@app.command()
def status(store: StoreOption = None, as_json: Json = False) -> None:
    """What runs, and which model is champion."""
    from goldgate.summary import print_status

    execution = _execution(store)
    _prepare(execution)
    print_status(console, execution, as_json=as_json)


@app.command()
def up(store: StoreOption = None) -> None:
    """Start Prefect, MLflow and the workers on this machine's loopback, and deploy every flow."""
    from goldgate import services

    services.up(Path(_local_store(store)), console)


@app.command()
def down(store: StoreOption = None) -> None:
    """Stop what `up` started, and nothing else."""
    from goldgate import services

    services.down(Path(_local_store(store)), console)


@app.command()
def rollback(
    name: Annotated[str, typer.Argument(help="The registered model.", show_default=False)],
    reason: Annotated[str, typer.Option("--reason", help="Why; kept with the version.", show_default=False)],
    store: StoreOption = None,
) -> None:
    """Make the previous version champion again."""
    execution = _execution(store)
    _prepare(execution)
    from tasks.registry.register import rollback as roll_back

    registered = roll_back(name, execution, reason)
    console.print(f"{name}: version {registered.version} is champion again.", highlight=False)


def main() -> None:
    """Run a command; every refusal is a message and an exit code, never a traceback."""
    with _refusals():
        app(standalone_mode=True)


@contextmanager
def _ending_soon() -> Iterator[None]:
    """Let Ctrl-C end a run within seconds.

    The interrupt unwinds the step at work, which ends the training process and tidies up. Then Prefect would try for
    minutes to tell its temporary server, which has got the same Ctrl-C and is gone.
    """

    def interrupted(*_: object) -> None:
        def leave() -> None:
            errors.print(INTERRUPTED, highlight=False)
            os._exit(EXIT_INTERRUPTED)

        errors.print("Interrupting …")
        last_word = threading.Timer(_GRACE_SECONDS, leave)
        last_word.daemon = True
        last_word.start()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except GoldgateError as error:
        _refuse(error)
        sys.exit(EXIT_ERROR)
    except SystemExit as ended:
        if ended.code == EXIT_INTERRUPTED:  # this is how typer ends a Ctrl-C
            errors.print(INTERRUPTED, highlight=False)
        raise


def _refuse(error: GoldgateError) -> None:
    errors.print(f"[bold red]Stopped.[/] {escape(str(error))}", highlight=False, soft_wrap=True)


def _execution(store: str | None) -> ExecutionSpec:
    return ExecutionSpec() if store is None else ExecutionSpec(store=store)


def _local_model(model: str) -> str:
    """A relative folder as absolute path; any other URI as it is."""
    return str(Path(model).absolute()) if Path(model).is_dir() else model


def _local_store(store: str | None) -> str:
    root = _execution(store).store
    if "://" in root:
        raise SpecError(
            "`up` and `down` need a store in a folder of this machine.", where=root, fix="give --store a folder"
        )
    return root


def _prepare(execution: ExecutionSpec) -> None:
    """Point Prefect and MLflow at the servers that `up` started, else at files in the store, before either loads."""
    from goldgate import services

    for name, value in services.client_environment(execution).items():
        os.environ.setdefault(name, value)


def _prepare_flow(execution: ExecutionSpec) -> None:
    """As `_prepare`, and make sure that Prefect can work: its server answers, or its files can be kept.

    Raises:
        ServiceError: the Prefect server that the environment names does not answer.
        StoreError: the store cannot be written.
    """
    _prepare(execution)
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")  # what matters is on the display, and errors are ours
    os.environ.setdefault("PREFECT_LOGGING_INTERNAL_LEVEL", "CRITICAL")
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")  # a cold start on a busy machine
    api = os.environ.get("PREFECT_API_URL")
    if api is not None:
        _check_prefect(api)
        return
    home = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser()
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home):
            pass
    except OSError as error:
        raise StoreError(
            f"The store cannot be written: {error.strerror or error}",
            where=str(home),
            fix="free space, allow writing, or set `execution.store` to another place",
        ) from error


def _check_prefect(api: str) -> None:
    import httpx

    try:
        httpx.get(f"{api.rstrip('/')}/health", timeout=10.0).raise_for_status()
    except httpx.HTTPError as error:
        raise ServiceError(
            f"The Prefect server does not answer: {error}",
            where=f"PREFECT_API_URL={api}",
            fix="start it (`goldgate up`), correct the address, or unset PREFECT_API_URL to run without a server",
        ) from error
