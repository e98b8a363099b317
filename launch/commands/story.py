"""story: why something happened to a job, a pack, a graft or a device."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from polygraft.cluster.story import story as tell
from polygraft.launch.commands.common import Json, flags
from polygraft.launch.output import Failure, Status, print_json, screen


def register(app: typer.Typer) -> None:
    app.command()(story)


def story(
    context: typer.Context,
    subject: Annotated[
        str, typer.Argument(metavar="ID", help="A job, pack, replica or device, or a graft's name@version.")
    ],
    as_json: Json = False,
) -> None:
    """Tell what happened to something, when, and why, from the event log."""
    store = flags(context).store()
    lines = tell(store, subject)
    store.close()
    if not lines:
        raise Failure(f"the log says nothing of {subject!r}; polygraft jobs lists the jobs", Status.NOT_FOUND)
    if as_json:
        print_json(lines)
    else:
        for line in lines:
            screen.print(escape(line), highlight=False, soft_wrap=True)
