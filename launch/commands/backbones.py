"""backbones: the frozen models that jobs and chats may name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from polygraft.launch.commands.common import Json, flags
from polygraft.launch.output import ago, print_json, print_table

backbones = typer.Typer(no_args_is_help=True, help="The frozen models that jobs and chats may name.")
Name = Annotated[str, typer.Argument(help="What jobs and chats call it.")]


def register(app: typer.Typer) -> None:
    app.add_typer(backbones, name="backbones")


@backbones.command("add")
def add_backbone(
    context: typer.Context,
    name: Name,
    path: Annotated[
        str,
        typer.Argument(help="smollm2, or the folder or hub id of a causal model or an encoder."),
    ],
    dtype: Annotated[str, typer.Option(help="auto, bf16 or fp32.")] = "auto",
    quantise: Annotated[str | None, typer.Option(help="nf4: in 4 bits; loftq-RANK-ITERATIONS: by LoftQ.")] = None,
    as_json: Json = False,
) -> None:
    """Add a model to the service; it is loaded when it is first asked."""
    local = Path(path).expanduser()
    with flags(context).client() as client:
        found = client.add_backbone(
            name, str(local.absolute()) if local.is_dir() else path, dtype=dtype, quantise=quantise
        )
    if as_json:
        print_json(found)
    else:
        typer.echo(f"{found.id} is there; polygraft submit FILE --model {found.id} trains on it")


@backbones.command("list")
def list_backbones(context: typer.Context, as_json: Json = False) -> None:
    """List the models, the service's own first."""
    with flags(context).client() as client:
        found = client.backbones()
    if as_json:
        print_json(iter(found))
        return
    print_table(
        ("backbone", "state", "dtype", "quantised", "#context", "fingerprint", "path", "#age"),
        (
            (
                f"{escape(one.id)}{' (own)' if one.default else ''}",
                one.state,
                one.dtype,
                one.quantise or "",
                one.context_length or "",
                one.fingerprint[:12],
                escape(one.path or ""),
                ago(one.added_at),
            )
            for one in found
        ),
        empty="no backbones",
    )


@backbones.command("remove")
def remove_backbone(context: typer.Context, name: Name, as_json: Json = False) -> None:
    """Remove a model from the service; refused while something needs it. Its files and the grafts on it stay."""
    with flags(context).client() as client:
        client.remove_backbone(name)
    if as_json:
        print_json({"removed": name})
