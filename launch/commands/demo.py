"""demo: train, search and serve on this machine, and show what came of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from polygraft.cluster.service import Service
from polygraft.launch.commands.common import Json, flags
from polygraft.launch.output import Failure, print_error, print_json, print_table, screen

if TYPE_CHECKING:
    from polygraft.launch.demo.report import Report
    from polygraft.launch.demo.train import Trained


def register(app: typer.Typer) -> None:
    app.command()(demo)


def demo(
    context: typer.Context,
    report: Annotated[
        Path | None, typer.Option(help="Write the report there as JSON, and the chart of the search next to it.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Use the home folder and leave the service up.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Then train every job again alone, by PEFT or the method's equation.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train eight grafts in one pack, search over twelve more, serve them mixed."""
    from polygraft.launch.demo.run import demo as run
    from polygraft.launch.demo.run import demo_home
    from polygraft.launch.demo.summary import print_summary

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
    broken = found.broken() + (_verify(found, service) if verify else [])
    if broken:
        for sentence in broken:
            print_error(sentence)
        raise Failure("the demo ran, but did not show what it promises")


def _verify(found: Report, service: Service) -> list[str]:
    """Print packed against alone; a sentence for every job that differs by more than the tolerance."""
    from polygraft.launch.demo.verify import TOLERANCE, verify
    from polygraft.launch.progress import counted

    jobs = [(one.tenant.plan, one.tenant.share, one.job.loss_after or 0.0) for one in found.training.trained]
    with counted() as progress:
        verified = verify(Path(service.backbone_folder), jobs, on_step=progress)
    print_table(
        ("method", "#packed", "#alone", "#difference"),
        ((escape(one.label), f"{one.packed:.4f}", f"{one.alone:.4f}", f"{one.difference:.2%}") for one in verified),
        empty="",
    )
    return [
        f"{one.label}: held-out loss {one.packed:.4f} packed, {one.alone:.4f} alone; more than {TOLERANCE:.0%} apart"
        for one in verified
        if not one.holds
    ]


def _invite(service: Service, example: Trained) -> None:
    """Grafts belong to the tenant that trained them, so two of the commands carry its key."""
    key, name, model = example.tenant.key, example.tenant.share.name, example.job.fine_tuned_model
    question = example.tenant.share.held_out[0].question
    screen.print(f"\nThe service stays up at [bold]{service.url}/v1[/] until polygraft down. Try:", highlight=False)
    for command in (
        f"polygraft --key {key} jobs",
        f'polygraft --key {key} chat {name} -m "{question}"',
        f"polygraft story {model}",
    ):
        screen.print(f"  {command}", highlight=False, soft_wrap=True, markup=False)
