"""search, searches: find good grafts for some data; the service goes on with a search when the terminal is gone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import JsonValue
from rich.markup import escape

from polygraft.cluster import searches as remote
from polygraft.cluster.client import Client
from polygraft.cluster.searches import RemoteSearch
from polygraft.launch.commands.common import Json, flags
from polygraft.launch.output import Failure, JsonOut, Status, ago, errors, print_json, print_table, screen

if TYPE_CHECKING:  # imported when the command runs: Optuna takes seconds
    from polygraft.tuning.study import Trial


@dataclass(frozen=True, slots=True)
class Files:
    """Where a person wants to have what came of a search."""

    chart: Path | None = None
    report: Path | None = None
    table: Path | None = None
    study: Path | None = None

    @property
    def all(self) -> list[Path]:
        return [path for path in (self.chart, self.report, self.table, self.study) if path is not None]

    def write(self, search: RemoteSearch, trials: list[Trial]) -> None:
        """The chart and the page need a trial that has ended."""
        if not self.all:
            return
        from polygraft.grafts.sites import ModelShape
        from polygraft.tuning.desk import read_member
        from polygraft.tuning.front import draw
        from polygraft.tuning.report.page import page
        from polygraft.tuning.report.summary import Report, as_csv

        told = Report(
            name=search.name,
            id=search.id,
            status=search.status,
            objectives=search.objectives,
            trials=tuple(trials),
            front=search.front,
            finals=tuple(read_member(member.model_dump()) for member in search.finals),
            chosen=search.chosen,
            note=search.note,
            job=search.job,
        )
        if self.chart is not None:
            front = [trials[number] for number in search.front]
            draw(trials, self.chart, front=front, title=f"{search.name}: {len(trials)} trials")
        if self.report is not None:
            self.report.write_text(page(told, ModelShape(**search.shape)))  # type: ignore[arg-type]
        if self.table is not None:
            self.table.write_text(as_csv(told))
        if self.study is not None:
            from polygraft.tuning.desk import axes
            from polygraft.tuning.report.optuna_study import export

            export(told, axes(search.parameters), self.study)


def register(app: typer.Typer) -> None:
    app.command()(search)
    app.command()(searches)


def search(
    context: typer.Context,
    file: Annotated[
        Path, typer.Argument(help="YAML with name, training_file, validation_file, space, ...; or examples as JSONL.")
    ],
    budget: Annotated[
        str | None, typer.Option(help="With JSONL: 20m, 2h or 40 trials; space, sampler and fidelity follow from it.")
    ] = None,
    start: Annotated[
        str | None, typer.Option("--from", help="First try what was best in this search, or in all of yours: auto.")
    ] = None,
    chart: Annotated[Path | None, typer.Option(help="Draw the front to this PNG.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write a page with pictures to this HTML file.")] = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Do not wait for the search's end.")] = False,
    as_json: Json = False,
) -> None:
    """Search for grafts of low loss and few parameters; its trials are jobs, as many as fit in one pack."""
    from polygraft.launch.searching import followed

    with flags(context).client() as client:
        body = _asked(client, file, budget) | ({"warm_start": start} if start else {})
        begun = remote.create(client, body, idempotency_key=token_hex(16))
        errors.print(f"{begun.id}; polygraft searches {begun.id} shows it", highlight=False)
        if detach:
            if as_json:
                print_json({"id": begun.id})
            return
        _tell(client, followed(client, begun), Files(chart, report), as_json=as_json)


def searches(
    context: typer.Context,
    search: Annotated[str | None, typer.Argument(help="One search; all when not given.", show_default=False)] = None,
    cancel: Annotated[bool, typer.Option("--cancel", help="End it, and the jobs of its trials.")] = False,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until it is over.")] = False,
    chart: Annotated[Path | None, typer.Option(help="Draw the front to this PNG.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write a page with pictures to this HTML file.")] = None,
    table: Annotated[Path | None, typer.Option("--csv", help="Write all trials to this CSV file.")] = None,
    study: Annotated[
        Path | None, typer.Option("--optuna", help="Write it as a study of Optuna to this SQLite file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List searches; of one its front, or its end."""
    from polygraft.launch.searching import followed

    with flags(context).client() as client:
        if search is None:
            _list(list(remote.listed(client)), as_json=as_json)
        elif cancel:
            found = remote.cancel(client, search)
            screen.print(f"{found.id} is {found.status}", highlight=False)
        else:
            found = remote.show(client, search)
            _tell(
                client,
                followed(client, found) if follow else found,
                Files(chart, report, table, study),
                as_json=as_json,
            )


def _asked(client: Client, file: Path, budget: str | None) -> dict[str, JsonValue]:
    from polygraft.launch.commands.search_file import read_search_file, within

    if not file.is_file():
        raise Failure(f"{file} does not exist", Status.USAGE)
    if file.suffix != ".jsonl":
        if budget is not None:
            raise Failure("--budget: it decides what a YAML file says; give examples as JSONL", Status.USAGE)
        return read_search_file(file).body(client)
    if budget is None:
        raise Failure("--budget: give one, such as 20m, for a search of nothing but examples", Status.USAGE)
    body, plan = within(file, budget, client)
    for line in plan.why:
        errors.print(f"  {line}", highlight=False)
    return body


def _tell(client: Client, search: RemoteSearch, files: Files, *, as_json: bool) -> None:
    """The front of a search, and why it ended if it did so early."""
    from polygraft.launch.front import Point, print_chosen, print_front
    from polygraft.launch.searching import trials_of

    trials = trials_of(client, search)
    front = [trials[number] for number in search.front]
    if search.note:
        errors.print(escape(search.note), highlight=False)
    if search.final and not front:
        raise Failure(f"{search.id} is {search.status} and no trial is on its front; polygraft jobs says more")
    files.write(search, trials)
    points = [Point.of(trial) for trial in front]
    if as_json:
        facts: dict[str, JsonOut] = {"id": search.id, "trials": len(trials), "chosen": search.chosen}
        facts["front"] = [point.to_json() for point in points]
        facts["finals"] = [member.model_dump(mode="json") for member in search.finals]
        print_json(facts)
        return
    print_front(points)
    print_chosen(search)
    for path in files.all:
        screen.print(f"Written: {path}", highlight=False)


def _list(found: list[RemoteSearch], *, as_json: bool) -> None:
    if as_json:
        print_json([one.model_dump(mode="json") for one in found])
        return
    print_table(
        ("search", "name", "status", "#trials", "#front", "begun"),
        (
            (
                one.id,
                escape(one.name),
                one.status,
                f"{sum(one.trials.values()) - one.trials.get('running', 0)} of {one.trials_total}",
                f"{len(one.front)}",
                ago(one.created_at),
            )
            for one in found
        ),
        empty="no search was begun",
    )
