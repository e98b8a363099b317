"""demo: train, search and serve on this machine, and show what came of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polygraft.cluster.launch.commands.common import Json, flags
from polygraft.cluster.launch.output import Failure, print_error, print_json, screen
from polygraft.cluster.service import Service

if TYPE_CHECKING:
    from polygraft.cluster.launch.demo.train import Trained


def register(app: typer.Typer) -> None:
    app.command()(demo)


def demo(
    context: typer.Context,
    report: Annotated[Path | None, typer.Option(help="Write the report there as JSON, the chart of the search beside it.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Use the home folder and leave the service up.")] = False,
    as_json: Json = False,
) -> None:
    """Train eight grafts in one pack, search over twelve more, serve them mixed."""
    from polygraft.cluster.launch.demo.run import demo as run
    from polygraft.cluster.launch.demo.run import demo_home
    from polygraft.cluster.launch.demo.summary import print_summary

    written = report or Path("reports/demo.json")
    with demo_home(keep, flags(context).home) as settings:
        found, service = run(settings, chart=written.with_suffix(".png"), keep=keep)
    written.parent.mkdir(parents=True, exist_ok=True)
    written.write_text(json.dumps(found.to_json(), indent=2) + "\n")
    if as_json:
        print_json(found.to_json())
    else:
        print_summary(found)
        screen.print(f"Report: {written}", highlight=False)
        if keep:
            _invite(service, found.training.trained[1])
    if broken := found.broken():
        for sentence in broken:
            print_error(sentence)
        raise Failure("the demo ran, but did not show what it promises")


def _invite(service: Service, example: Trained) -> None:
    """Grafts belong to the tenant that trained them, so two of the commands carry its key."""
    key, name, model = example.tenant.key, example.tenant.share.name, example.job.fine_tuned_model
    question = example.tenant.share.held_out[0].question
    screen.print(f"\nThe service stays up at [bold]{service.url}/v1[/] until polygraft down. Try:", highlight=False)
    for command in (f"polygraft --key {key} jobs", f'polygraft --key {key} chat {name} -m "{question}"', f"polygraft story {model}"):
        screen.print(f"  {command}", highlight=False, soft_wrap=True, markup=False)
