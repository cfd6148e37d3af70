"""`goldgate data`: look at rows before anything is trained on them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tasks.contracts.errors import SpecError
from tasks.contracts.spec import TaskKind

if TYPE_CHECKING:
    from goldgate.data_check import Asked, Checked
    from tasks.data.rejected import Rejected

data_app = typer.Typer(help="Look at rows before anything is trained on them.", no_args_is_help=True)
console = Console()
errors = Console(stderr=True)

_SHOWN = 12  # reasons in the table of the terminal
_STAGES = {"validate": "Invalid", "curate": "Curated away"}

Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE_OR_CONFIG", help="Rows (file, folder or URI), or a configuration (YAML).", show_default=False
    ),
]
TextColumn = Annotated[str | None, typer.Option("--text", help="Column with the input; else text.")]
TargetColumn = Annotated[str | None, typer.Option("--target", help="Column with the answer; else label.")]
MessagesColumn = Annotated[str | None, typer.Option("--messages", help="Column with chat messages, in place of both.")]
Kind = Annotated[TaskKind | None, typer.Option("--kind", help="What the answers are; else inferred from them.")]
Golden = Annotated[Path | None, typer.Option("--golden", help="Folder of a golden set, to look for its items.")]
Tokens = Annotated[
    bool, typer.Option("--tokens", help="Fetch the configuration's base model, to check the length in tokens.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="key.path=value: wins over the file. May be given many times.")
]
# No `envvar`: the environment's store is the default of a configuration, and does not win over the one it names.
StoreOption = Annotated[
    str | None, typer.Option("--store", help="Where artefacts are kept; else the configuration's, or GOLDGATE_STORE.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@data_app.command("check")
def check(
    source: Source,
    text: TextColumn = None,
    target: TargetColumn = None,
    messages: MessagesColumn = None,
    kind: Kind = None,
    golden: Golden = None,
    tokens: Tokens = False,
    overrides: Overrides = None,
    store: StoreOption = None,
    as_json: Json = False,
) -> None:
    """What a run would make of these rows, without training. Exits 1 where a run would stop."""
    asked, checked = _look(
        source, (text, target, messages), kind, golden, tokens, overrides or [], store, quiet=as_json
    )
    if as_json:
        print(json.dumps(_check_record(asked, checked), indent=2, ensure_ascii=False))
    else:
        _print_check(asked, checked)
    if checked.refusal is not None:
        raise checked.refusal


@data_app.command("show-rejected")
def show_rejected(
    source: Source,
    reason: Annotated[str | None, typer.Option("--reason", help="Only rows that were left out for this.")] = None,
    limit: Annotated[int, typer.Option("--limit", help="Rows of each reason.", min=0, max=1_000)] = 5,
    text: TextColumn = None,
    target: TargetColumn = None,
    messages: MessagesColumn = None,
    kind: Kind = None,
    golden: Golden = None,
    tokens: Tokens = False,
    overrides: Overrides = None,
    store: StoreOption = None,
    as_json: Json = False,
) -> None:
    """Rows that were left out, by reason, also where a stage refused; what is private in them is masked."""
    from tasks.data.rejected import Veil, read_rejected

    _, checked = _look(source, (text, target, messages), kind, golden, tokens, overrides or [], store, quiet=True)
    veil = Veil()
    found = {stage: read_rejected(path, veil, limit) for stage, path in checked.quarantines.items()}
    found = {stage: _only(rejected, reason) for stage, rejected in found.items()}
    if reason is not None and not any(rejected.reasons for rejected in found.values()):
        known = sorted({code for path in checked.quarantines.values() for code in read_rejected(path, veil, 0).reasons})
        raise SpecError(
            f"No row was left out as {reason!r}.",
            where="--reason",
            fix=f"there are: {', '.join(known)}" if known else "every row went on",
        )
    if as_json:
        print(json.dumps({stage: _rejected_record(one) for stage, one in found.items()}, indent=2, ensure_ascii=False))
        return
    for stage, rejected in found.items():
        _print_rejected(stage, rejected, checked.quarantines[stage], whole=reason is None)
    if checked.refusal is not None:
        console.print(f"\nA run would stop: {escape(checked.refusal.what)}", highlight=False, soft_wrap=True)


def _look(
    source: str,
    columns: tuple[str | None, str | None, str | None],
    kind: TaskKind | None,
    golden: Path | None,
    tokens: bool,
    overrides: Sequence[str],
    store: str | None,
    *,
    quiet: bool,
) -> tuple[Asked, Checked]:
    """Run the stages, with their progress on the terminal; on the other stream where what is printed is for programs.

    Raises:
        SpecError: options of a bare source were given beside a configuration.
    """
    from goldgate.data_check import Columns, ask_about_config, ask_about_source, check_data, is_config
    from goldgate.terminal import showing

    if is_config(source) and (kind is not None or any(columns)):
        raise SpecError(
            "A configuration says itself where its rows have what.",
            where=source,
            fix="leave out --text, --target, --messages and --kind; `--set data.text_field=…` wins over the file",
        )
    if tokens and not is_config(source):
        raise SpecError("Without a configuration there is no base model.", where="--tokens", fix="leave it out")
    given = [*overrides, *([f"execution.store={json.dumps(store)}"] if store is not None else [])]
    with showing(errors if quiet else console):
        if is_config(source):
            asked = ask_about_config(Path(source), given, golden, tokens=tokens)
        else:
            asked = ask_about_source(source, Columns(*columns), given, kind=kind, golden=golden)
        return asked, check_data(asked)


# -- what is printed ----------------------------------------------------------------------------------------------


def _check_record(asked: Asked, checked: Checked) -> dict[str, Any]:
    refusal = checked.refusal
    return {
        "passed": refusal is None,
        "refusal": None if refusal is None else {"what": refusal.what, "where": refusal.where, "fix": refusal.fix},
        "said": list(asked.said),
        "page": checked.page,
        "quarantine": {stage: str(path) for stage, path in checked.quarantines.items()},
        "report": checked.record,
    }


def _print_check(asked: Asked, checked: Checked) -> None:
    from tasks.data.rejected import say_code

    say = partial(console.print, highlight=False, soft_wrap=True)
    record = checked.record
    say()
    for sentence in asked.said:
        say(escape(sentence))
    would_be = checked.refusal is not None and record["train"] is not None
    say(f"[bold]{escape(record['funnel'])}[/]{', if nothing objected' if would_be else ''}\n")
    table = _table("step")
    for heading in ("rows", "left"):
        table.add_column(heading, justify="right", no_wrap=True)
    for step in record["steps"]:
        if step["removed"] or step["code"] == "read":
            taken = f"−{step['removed']:,}" if step["removed"] else ""
            table.add_row(say_code(step["code"]), taken, f"{step['left']:,}")
    console.print(table)
    _print_reasons("left out", [*record["rejected"], *record["removed"]])
    _print_reasons("found in rows that go on", record["told"])
    findings = _findings(record)
    if findings:
        say()
    for sentence in findings:
        say(escape(sentence))
    say()
    for sentence in record["about"]["not_looked_for"]:
        say(f"[yellow]{escape(sentence)}[/]")
    for stage, path in checked.quarantines.items():
        say(f"  {_STAGES[stage].lower() + ':':<14} {escape(str(path))}")
    say(f"\n{escape(checked.page)}")


def _print_reasons(heading: str, reasons: Sequence[Mapping[str, Any]]) -> None:
    from tasks.data.rejected import say_code

    if not reasons:
        return
    console.print()
    table = _table(heading)
    table.add_column("rows", justify="right", no_wrap=True)
    table.columns[0].no_wrap = True
    table.add_column("such as", overflow="fold")
    for one in reasons[:_SHOWN]:
        first = one["examples"][0]
        table.add_row(say_code(one["code"]), f"{one['rows']:,}", escape(f"line {first['line']:,}: {first['why']}"))
    console.print(table)
    if len(reasons) > _SHOWN:
        console.print(f"{len(reasons) - _SHOWN} more reasons are in the report.", highlight=False)


def _findings(record: Mapping[str, Any]) -> list[str]:
    """What else is to be known, a sentence each."""
    found = []
    if record["masked"]:
        found.append(f"Masked in {record['masked']:,} rows.")
    if record["suspects_found"]:
        found.append(f"{record['suspects_found']:,} labels are probably wrong ({record['suspects_policy']}).")
    for one in record["triggers"][:5]:
        found.append(
            f"Looks planted: {one['phrase']!r} in {one['rows']:,} rows, {one['of_label']:,} of them {one['label']}."
        )
    if record["drift"] is not None:
        limit = record["about"]["max_label_drift"]
        found.append(f"The mix of labels is {record['drift']:.2f} from the golden set's (limit {limit:g}).")
    if record["synthetic"]:
        found.append(f"A model wrote {record['synthetic']:,} of the training rows.")
    found += [f"Guard {guard}: {what} ({why})." for guard, what, why in record["risks"]]
    if record["since_last"] is not None:
        found.append(f"New since the last data of this task: {record['since_last']}.")
    return found


def _only(rejected: Rejected, reason: str | None) -> Rejected:
    from tasks.data.rejected import say_code

    if reason is None:
        return rejected
    wanted = reason.strip().lower()
    kept = [code for code in rejected.reasons if wanted in (code.lower(), say_code(code).lower())]
    return rejected._replace(
        reasons={code: rejected.reasons[code] for code in kept},
        examples={code: rejected.examples[code] for code in kept},
    )


def _rejected_record(rejected: Rejected) -> dict[str, Any]:
    return {
        "rows": rejected.rows,
        "reasons": [
            {"reason": code, "rows": rows, "examples": [one._asdict() for one in rejected.examples[code]]}
            for code, rows in rejected.reasons.items()
        ],
    }


def _print_rejected(stage: str, rejected: Rejected, path: Path, *, whole: bool) -> None:
    from tasks.data.rejected import say_code

    say = partial(console.print, highlight=False, soft_wrap=True)
    if not rejected.reasons and not whole:
        return
    say(f"\n[bold]{_STAGES[stage]}: {rejected.rows:,} rows[/]  [dim]{escape(str(path))}[/]")
    for code, rows in rejected.reasons.items():
        say(f"\n  [bold]{escape(say_code(code))}[/]  {rows:,}  [dim]--reason {escape(repr(code))}[/]")
        for one in rejected.examples[code]:
            say(f"    line {one.line:,}  {escape(one.id)}  {escape(one.why)}")
            answer = f" → {one.target}" if one.target is not None else ""
            say(f"      [dim]{escape(one.text + answer)}[/]")


def _table(first: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(first, overflow="fold")
    return table
