"""What a person sees while a run goes on: one line a step, with a bar and an estimate on the long ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tasks.contracts.progress import Progress as StepProgress


class TerminalDisplay:
    """Shows steps on a console; a `Display` of `tasks.runtime`. On a pipe it prints one line a finished step."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._running: dict[str, TaskID] = {}
        self.reused: list[str] = []
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<14}"),
            BarColumn(bar_width=28),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=console,
            transient=True,
        )

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def start(self, step: str) -> None:
        """A step begins; its bar has no length yet."""
        if step not in self._running:
            self._running[step] = self._bars.add_task(step, total=None, note="")

    def update(self, step: str, progress: StepProgress) -> None:
        """A step has come this far."""
        self.start(step)
        counted = f"{progress.done:,.0f} of {progress.total:,.0f} {progress.unit}"
        note = f"{counted}, {progress.note}" if progress.note else counted
        self._bars.update(self._running[step], completed=progress.done, total=progress.total or None, note=note)

    def finish(self, step: str, summary: str, *, reused: bool) -> None:
        """A step is done: its bar goes, one line stays."""
        if reused:
            self.reused.append(step)
        seconds = ""
        task = self._running.pop(step, None)
        if task is not None:
            elapsed = self._bars.tasks[self._bars.task_ids.index(task)].elapsed
            self._bars.remove_task(task)
            if elapsed is not None and elapsed >= 1.0 and not reused:
                seconds = f"{elapsed:,.0f} s"
        mark = "[cyan]reused[/]" if reused else "[green]done[/]  "
        self._console.print(
            f"  {mark} [dim]{seconds:>6}[/] [bold]{step:<14}[/] {escape(summary)}", highlight=False, soft_wrap=True
        )


@contextmanager
def showing(console: Console) -> Iterator[TerminalDisplay]:
    """A display on which all steps of the block show, whichever room they are in."""
    from tasks.runtime import display  # brings Prefect, which a display by itself does without

    with TerminalDisplay(console) as shown:
        token = display.set(shown)
        try:
            yield shown
        finally:
            display.reset(token)
