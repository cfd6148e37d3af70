"""`goldgate review`: have people look at what the gateway has put aside, and make rows of what they say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from goldgate.config import beside, parse, place_data, read_with_task
from tasks.contracts.review import ReviewResult, ReviewSpec

EXIT_NO_GATEWAY = 3
_SHARED = ("name", "task", "data", "execution")  # what a training's configuration and this one have alike


def review(
    config: Annotated[Path, typer.Argument(help="The configuration, a YAML file (see examples/).", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key.path=value: wins over the file. May be given many times.")
    ] = None,
) -> None:
    """Send answers that wait at the gateway to the review queue, and write rows of what people have said so far.

    Exits 0, or 3 if the gateway could not be reached; what people said is written all the same. Label Studio's key is
    taken from GOLDGATE_LABEL_STUDIO_KEY.
    """
    # The command line registers this command, so it is there before it is called.
    from goldgate.cli import _ending_soon, _prepare_flow, console

    spec = load_review(config, overrides or [])
    _prepare_flow(spec.execution)
    from flows.review import review as flow
    from goldgate.terminal import showing
    from tasks.serving.review.words import review_lines

    with _ending_soon(), showing(console):
        result = flow(spec, return_state=True).result()
    if not isinstance(result, ReviewResult):
        raise TypeError(f"the flow handed back a {type(result).__name__}, not a ReviewResult")
    for line in review_lines(result, spec):
        console.print(escape(line), highlight=False, soft_wrap=True)
    if result.trouble:
        console.print(escape(result.trouble), highlight=False, soft_wrap=True)
        raise typer.Exit(EXIT_NO_GATEWAY)


def load_review(path: Path, overrides: Sequence[str] = ()) -> ReviewSpec:
    """Read a configuration. Paths of rows, candidates and data are relative to the file's folder.

    `task_from` names the configuration of a training, from which name, task, data and execution are taken where this
    one does not say otherwise.

    Raises:
        SpecError: unreadable, no YAML, an unknown key, or a value out of bounds; names the file and the field.
    """
    record = read_with_task(path, overrides, _SHARED)
    folder = path.absolute().parent
    spec = parse(ReviewSpec, record, where=str(path))
    return spec.model_copy(
        update={
            "rows": beside(folder, spec.rows),
            "golden_candidates": beside(folder, spec.golden_candidates),
            "data": place_data(spec.data, folder),
        }
    )


def load_preset(config: str) -> dict[str, Any]:
    """A build step for `deployments/prefect.yaml`: a configuration as parameters of the deployment, paths absolute.

    Raises:
        SpecError: as `load_review`.
    """
    return {"spec": load_review(Path(config)).model_dump(mode="json")}
