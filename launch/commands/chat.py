"""chat: talk to the backbone or a graft."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.markup import escape

from polygraft.cluster.client import ApiFailure, Client
from polygraft.launch.commands.common import Json, flags
from polygraft.launch.output import Failure, Status, print_error, print_json, screen

Message = dict[str, str]


def register(app: typer.Typer) -> None:
    app.command()(chat)


def chat(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="The backbone, a graft's name, or NAME@VERSION.", show_default="the backbone")
    ] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Ask this once instead of talking.")] = None,
    system: Annotated[str | None, typer.Option(help="System message before the conversation.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 for the likeliest answer.")] = 0.5,
    as_json: Json = False,
) -> None:
    """Talk to a model; an empty line or Ctrl-D ends it."""
    if as_json and message is None:
        raise Failure("--json needs --message", Status.USAGE)
    with flags(context).client() as client:
        chosen = model or next(one.id for one in client.models() if one.parent is None)
        history = [{"role": "system", "content": system}] if system else []
        if message is not None:
            answer = _answer(client, chosen, _said(history, message), max_tokens, temperature, quiet=as_json)
            if as_json:
                print_json({"model": chosen, "message": answer})
            return
        screen.print(f"[dim]Talking to[/] {escape(chosen)}[dim]; an empty line ends it.[/]", highlight=False)
        while text := _ask():
            history = _said(history, text)
            try:
                history = [
                    *history,
                    {"role": "assistant", "content": _answer(client, chosen, history, max_tokens, temperature)},
                ]
            except ApiFailure as error:
                if error.status == 404:
                    raise
                print_error(str(error))
                history = history[:-1]


def _answer(
    client: Client, model: str, history: list[Message], max_tokens: int, temperature: float, *, quiet: bool = False
) -> str:
    """The answer's text; printed as it comes, unless `quiet`."""
    pieces = []
    for piece in client.chat(model, history, max_tokens=max_tokens, temperature=temperature):
        pieces.append(piece)
        if not quiet:
            sys.stdout.write(piece)
            sys.stdout.flush()
    if not quiet:
        sys.stdout.write("\n")
    return "".join(pieces)


def _ask() -> str:
    try:
        return screen.input("[bold]> [/]").strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def _said(history: list[Message], text: str) -> list[Message]:
    return [*history, {"role": "user", "content": text}]
