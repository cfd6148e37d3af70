"""`goldgate`: the command line. Each command reads a configuration, calls a flow or a room, prints what came out."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from goldgate.config import load_spec, parse
from goldgate.data_commands import data_app
from goldgate.distill import distill
from goldgate.monitor import monitor
from goldgate.prefer import prefer
from goldgate.review import review
from goldgate.rollout import rollback, rollout
from goldgate.serve import keys_app, serve
from goldgate.shadow import shadow
from goldgate.sweep import sweep
from goldgate.synthesize import synthesize
from tasks.contracts.errors import GoldgateError, ServiceError, SpecError, StoreError
from tasks.contracts.spec import EvaluationSpec, ExecutionSpec, PromptKind

EXIT_ERROR = 1
EXIT_NOT_PROMOTED = 3
EXIT_NOT_COMPARABLE = 3
EXIT_INTERRUPTED = 130
INTERRUPTED = "[bold]Interrupted.[/] Finished steps are kept; the same command goes on from them."
_GRACE_SECONDS = 12.0  # for a step to tidy up; preference tuning gets ten to close its run in MLflow
_TIDY_SECONDS = 3.0  # the same, when a training has just ended in order
_LOOK_SECONDS = 0.1

app = typer.Typer(
    help="Fine-tune a small language model, and let it into production only if it is shown to be better.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")
golden_app = typer.Typer(help="Golden sets.", no_args_is_help=True)
app.add_typer(golden_app, name="golden")
ledger_app = typer.Typer(help="Who has looked at which golden set, and what is left of it.", no_args_is_help=True)
app.add_typer(ledger_app, name="ledger")


class _JudgeByDefault(TyperGroup):
    """`goldgate gate BASELINE CANDIDATE` is `goldgate gate judge BASELINE CANDIDATE`.

    A call that cannot be read exits as bad input does: typer's own code for it, 2, is a verdict here.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # typer has its own copy of click's Context
        """Put the default command first, unless another is named or help is asked for."""
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["judge", *args]
        with _not_readable():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Call the command."""
        with _not_readable():
            return super().invoke(ctx)


@contextmanager
def _not_readable() -> Iterator[None]:
    try:
        yield
    except typer.TyperException as error:
        error.exit_code = EXIT_NOT_COMPARABLE
        raise


gate_app = typer.Typer(
    cls=_JudgeByDefault,
    help="goldgate gate BASELINE CANDIDATE --policy FILE: a verdict on two files of outcomes. Exits 0 to promote, "
    "1 to reject, 2 if inconclusive, 3 on bad input. `goldgate gate judge --help` lists its options.",
    no_args_is_help=True,
)
app.add_typer(gate_app, name="gate")
override_app = typer.Typer(
    help="What a person decides without a verdict, or against one; kept and shown under their name.",
    no_args_is_help=True,
)
app.add_typer(override_app, name="override")
app.add_typer(keys_app, name="keys")

console = Console()
errors = Console(stderr=True)

Config = Annotated[Path, typer.Argument(help="The configuration, a YAML file (see examples/).", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="key.path=value: wins over the file. May be given many times.")
]
StoreOption = Annotated[str | None, typer.Option("--store", help="Where artefacts are kept.", envvar="GOLDGATE_STORE")]
Baseline = Annotated[
    Path,
    typer.Argument(
        help="What runs today: an evaluation folder, JSONL, CSV, Parquet, or a harness's log.", show_default=False
    ),
]
PolicyFile = Annotated[
    Path, typer.Option("--policy", help="YAML: a policy, or a configuration that holds one.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
By = Annotated[str, typer.Option("--by", help="Who decides this.", show_default=False)]
Reason = Annotated[str, typer.Option("--reason", help="Why, in a sentence for whoever asks later.", show_default=False)]


@app.command()
def run(
    config: Config,
    overrides: Overrides = None,
    require_promote: Annotated[
        bool, typer.Option("--require-promote", help="Exit 3 unless the candidate is promoted.")
    ] = False,
) -> None:
    """Train a candidate, compare it on the golden set, and register it only if it is shown to be better."""
    spec = load_spec(config, overrides or [])
    _prepare_flow(spec.execution)
    from flows.retrain import retrain
    from goldgate.summary import print_result
    from goldgate.terminal import showing
    from tasks.contracts.references import RunResult

    console.print(f"[bold]{spec.name}[/]: {spec.task.instruction}", highlight=False)
    with _ending_soon(), showing(console) as shown:
        state = retrain(spec, return_state=True)
        result = state.result()
    if not isinstance(result, RunResult):
        raise TypeError(f"the flow handed back a {type(result).__name__}, not a RunResult")
    print_result(console, spec, result, reused=shown.reused)
    if require_promote and not result.release.promoted:
        raise typer.Exit(EXIT_NOT_PROMOTED)


@golden_app.command("freeze")
def golden_freeze(config: Config, overrides: Overrides = None) -> None:
    """Draw the golden set from the data, once; training never sees it."""
    spec = load_spec(config, overrides or [])
    from goldgate.golden_plan import planner_of, print_plan
    from goldgate.terminal import TerminalDisplay
    from tasks.data.golden import freeze

    with TerminalDisplay(console) as shown:
        golden = freeze(
            spec,
            lambda progress: shown.update("freeze", progress),
            planner_of(spec),
            lambda draft: print_plan(console, draft, spec),
        )
    console.print(f"\nFroze {golden.items} items in {golden.path}\nsha256 {golden.digest}", highlight=False)


@golden_app.command("plan")
def golden_plan(
    config: Config,
    overrides: Overrides = None,
    to_paraphrase: Annotated[
        Path | None,
        typer.Option("--to-paraphrase", help="File to write the items to that somebody is to say in other words."),
    ] = None,
    as_json: Json = False,
) -> None:
    """What `golden freeze` would draw, and which differences that could show; freezes nothing."""
    spec = load_spec(config, overrides or [])
    from goldgate.golden_plan import plan_record, planner_of, print_plan, write_to_paraphrase
    from goldgate.terminal import TerminalDisplay
    from tasks.data.golden import draft_golden

    with TerminalDisplay(errors if as_json else console) as shown:
        draft = draft_golden(spec, lambda progress: shown.update("plan", progress), planner_of(spec))
    if to_paraphrase is not None:
        write_to_paraphrase(to_paraphrase, draft)
    if as_json:
        print(json.dumps(plan_record(draft, spec), indent=2))
    else:
        print_plan(console, draft, spec)


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
    again: Annotated[
        int, typer.Option(help="Number of a repetition, to see how much answers differ from run to run.", min=0)
    ] = 0,
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
    from goldgate.terminal import showing
    from tasks.runtime import open_store

    with _ending_soon(), showing(console):
        result = flow(spec, _local_model(model), prompt, again)
    print_evaluation(console, result, open_store(spec.execution))


app.command()(synthesize)
app.command()(distill)
app.command()(prefer)
app.command()(sweep)
app.command()(serve)
app.command()(rollout)
app.command()(rollback)
app.command()(shadow)
app.command()(monitor)
app.command()(review)


@gate_app.command("judge", hidden=True)
def gate_judge(
    baseline: Baseline,
    candidate: Annotated[Path, typer.Argument(help="What wants its place, on the same items.", show_default=False)],
    policy: PolicyFile,
    suites: Annotated[
        list[str] | None,
        typer.Option("--suite", help="name=BASELINE,CANDIDATE: outcomes of a suite that guards ask about."),
    ] = None,
    ledger: Annotated[
        str | None,
        typer.Option(
            "--ledger", envvar="GOLDGATE_LEDGER", help="File or database that counts the looks; none counts none."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Give a verdict on two files of outcomes."""
    from goldgate.standalone import judge, print_json, suite_files
    from goldgate.summary import print_verdict
    from tasks.gate.judge_files import outcome_code

    with _not_comparable():
        verdict = judge(baseline, candidate, policy, suite_files(suites or []), ledger)
    if as_json:
        print_json(verdict)
    else:
        print_verdict(console, verdict)
    raise typer.Exit(outcome_code(verdict.outcome))


@gate_app.command("selftest")
def gate_selftest(
    baseline: Baseline,
    again: Annotated[
        Path | None,
        typer.Argument(help="A second evaluation of the same model, for the engine's own noise.", show_default=False),
    ] = None,
    *,
    policy: PolicyFile,
    histories: Annotated[int | None, typer.Option(help="Made-up histories to judge; more take longer.", min=50)] = None,
    looks: Annotated[int, typer.Option(help="Candidates in each history.", min=1, max=99)] = 10,
    as_json: Json = False,
) -> None:
    """Judge a baseline against no-better versions of itself. Exits 0 if the policy may be armed, else 1."""
    from goldgate.standalone import print_self_test, selftest

    with _not_comparable():
        result, armed = selftest(baseline, again, policy, histories, looks)
    print_self_test(console, result, armed=armed, as_json=as_json)
    if not armed:
        raise typer.Exit(EXIT_ERROR)


@ledger_app.command("show")
def ledger_show(
    wanted: Annotated[
        str | None, typer.Argument(help="A task's name, or the start of a golden set's sha256.", show_default=False)
    ] = None,
    ledger: Annotated[
        str | None, typer.Option("--ledger", envvar="GOLDGATE_LEDGER", help="File or database; else that of the store.")
    ] = None,
    store: StoreOption = None,
    as_json: Json = False,
) -> None:
    """The looks at each golden set, what they spent of its error budget, and what people decided."""
    from goldgate.ledger_view import print_ledger
    from tasks.gate.ledger import Ledger, ledger_url

    with Ledger.open(ledger or ledger_url(_execution(store)), create=False) as opened:
        print_ledger(console, opened, wanted, as_json=as_json)


@app.command()
def approve(
    folder: Annotated[str, typer.Argument(metavar="RUN_FOLDER", help="Folder of the run that waits.")],
    by: By,
    comment: Annotated[str, typer.Option("--comment", help="Why; it goes into the certificate.", show_default=False)],
    decline: Annotated[bool, typer.Option("--decline", help="Say no.")] = False,
) -> None:
    """Answer a run whose policy asks a person: the candidate is promoted, or declined for good."""
    from goldgate.overrides import answer, check_asks, check_same_candidate, open_run_folder

    finished = open_run_folder(folder)
    check_asks(finished)
    check_same_candidate(finished)
    _prepare_flow(finished.spec.execution)
    from goldgate.summary import print_result
    from goldgate.terminal import showing

    with _ending_soon(), showing(console) as shown:
        result = answer(finished, approve=not decline, by=by, comment=comment)
    print_result(console, finished.spec, result, reused=shown.reused)


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
def verify(
    model: Annotated[
        str,
        typer.Argument(
            help="models:/<name>@<alias>, models:/<name>/<version>, or the folder of a certificate.", show_default=False
        ),
    ],
    public_key: Annotated[
        Path | None,
        typer.Option(
            help="PEM file of the key to trust; else GOLDGATE_PUBLIC_KEY, else the one beside the signing key."
        ),
    ] = None,
    golden: Annotated[
        Path | None, typer.Option(help="Folder of the golden set; else where it was when the certificate was made.")
    ] = None,
    store: StoreOption = None,
    as_json: Json = False,
) -> None:
    """Check a model against its certificate: signature, files, outcomes, and the verdict, which is computed again.

    Exits 0 if all holds; 1 if anything does not, or if there is no verdict to check (a baseline that a person set).
    """
    execution = _execution(store)
    _prepare(execution)
    from goldgate.verify import print_verification
    from goldgate.verify import verify as check

    found = check(model, execution, public_key=public_key, golden=golden)
    if as_json:
        print(found.model_dump_json(indent=2))
    else:
        print_verification(console, found)
    if not found.holds:
        raise typer.Exit(EXIT_ERROR)


@override_app.command("baseline")
def override_baseline(
    config: Config,
    model: Annotated[
        str,
        typer.Argument(help="A folder, hf:<repo>, gguf:<file>, or models:/<name>@<alias>.", show_default=False),
    ],
    by: By,
    reason: Reason,
    prompt: Annotated[
        PromptKind | None,
        typer.Option(
            help="tuned: the bare instruction. base: with the answers spelled out. Else a registered model is asked as "
            "it is registered, hf: and gguf: as base, a folder as tuned."
        ),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Make a model champion without a verdict: the first baseline, or a new one in place of today's champion."""
    spec = load_spec(config, overrides or [])
    _prepare(spec.execution)
    from goldgate.overrides import override_of, set_baseline
    from goldgate.terminal import showing

    override = override_of(by, reason)
    with showing(console):
        result = set_baseline(spec, model, override, prompt)
    registered = result.registered
    console.print(
        f"{registered.name}: version {registered.version} is champion, {result.release.sentence()}",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    if registered.previous_version is not None:
        console.print(f"Version {registered.previous_version} is kept as `previous`.", highlight=False)


@override_app.command("promote")
def override_promote(
    folder: Annotated[
        str, typer.Argument(metavar="RUN_FOLDER", help="Folder of the finished run.", show_default=False)
    ],
    by: By,
    reason: Reason,
) -> None:
    """Promote the candidate of a finished run against its verdict."""
    from goldgate.overrides import check_same_candidate, force_promotion, open_run_folder, override_of

    override = override_of(by, reason)
    finished = open_run_folder(folder)
    check_same_candidate(finished)
    _prepare_flow(finished.spec.execution)
    from goldgate.summary import print_result
    from goldgate.terminal import showing

    console.print(
        f"[bold]{finished.spec.name}[/]: promoting {escape(finished.label)} against its verdict, which was "
        f"{finished.verdict.upper()}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    with _ending_soon(), showing(console) as shown:
        result = force_promotion(finished, override)
    print_result(console, finished.spec, result, reused=shown.reused)


def main() -> None:
    """Run a command; every refusal is a message and an exit code, never a traceback."""
    with _refusals():
        app(standalone_mode=True)


@contextmanager
def _ending_soon() -> Iterator[None]:
    """Let Ctrl-C end a run within seconds, or as soon as a training has kept its step; a second one leaves at once.

    The interrupt unwinds the step at work, which tidies up. Then Prefect would try for minutes to tell its temporary
    server, which has got the same Ctrl-C and is gone.
    """
    from tasks.training.launch import GRACE_SECONDS, end_trainings, trainings_at_work

    heard = threading.Event()

    def leave() -> None:
        console.show_cursor(True)  # a bar may have hidden it
        errors.print(INTERRUPTED, highlight=False)
        os._exit(EXIT_INTERRUPTED)  # a training that is still there ends with this process

    def leave_in_time(trains: bool) -> None:
        latest = time.monotonic() + GRACE_SECONDS
        while trainings_at_work() and time.monotonic() < latest:
            time.sleep(_LOOK_SECONDS)
        time.sleep(_TIDY_SECONDS if trains else _GRACE_SECONDS)
        leave()

    def interrupted(*_: object) -> None:
        if heard.is_set():
            leave()
        heard.set()
        trains = end_trainings() > 0
        if trains:
            errors.print(f"Interrupting: saving a checkpoint … (at most {GRACE_SECONDS:.0f} s)", highlight=False)
            errors.print("Ctrl-C again leaves at once.")
        else:
            errors.print("Interrupting …")
        threading.Thread(target=leave_in_time, args=(trains,), daemon=True).start()
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


@contextmanager
def _not_comparable() -> Iterator[None]:
    """Refusals of the gate have an exit code of their own: 1 and 2 are verdicts."""
    try:
        yield
    except GoldgateError as error:
        _refuse(error)
        raise typer.Exit(EXIT_NOT_COMPARABLE) from error


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
