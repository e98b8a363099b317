"""doctor: whether this machine has what the service needs."""

from __future__ import annotations

from dataclasses import asdict

import typer
from rich.markup import escape

from polygraft.launch.checks import examine
from polygraft.launch.commands.common import Json, flags
from polygraft.launch.output import Status, print_json, print_table
from polygraft.launch.progress import stages

_SIGNS = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "bad": "[bold red]bad[/]"}


def register(app: typer.Typer) -> None:
    app.command()(doctor)


def doctor(context: typer.Context, as_json: Json = False) -> None:
    """Check this machine and the running service."""
    settings = flags(context).settings()
    with stages() as shown:
        shown.enter("looking")
        findings = list(examine(settings))
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        rows = ((one.check, _SIGNS[one.verdict], escape(one.found), escape(one.advice)) for one in findings)
        print_table(("check", "", "found", "what to do"), rows, empty="")
    if any(finding.verdict == "bad" for finding in findings):
        raise typer.Exit(int(Status.FAILED))
