"""The progress bars of the commands; on a pipe they print nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from polygraft.launch.output import errors


def job_progress() -> Progress:
    """Bars of steps; each task has a `note`, shown at its end."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[note]}"),
        console=errors,
        refresh_per_second=2,  # a service on the same machine needs its cores
    )


class Stages:
    """One spinning line that names what is being waited for."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("starting", total=None)
        self._stage = ""

    def enter(self, stage: str) -> None:
        if stage != self._stage:
            self._stage = stage
            self._progress.update(self._task, description=stage)
            if not self._progress.console.is_terminal:
                self._progress.console.print(stage, highlight=False)


@contextmanager
def stages() -> Iterator[Stages]:
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=errors, transient=True
    ) as progress:
        yield Stages(progress)


@contextmanager
def counted() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for every name that is reported, as (name, done, total)."""
    tasks: dict[str, TaskID] = {}
    with job_progress() as progress:

        def report(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=total, note="")
            progress.update(tasks[name], completed=done)

        yield report
