"""grafts and methods: what has been trained, and what can be."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from polygraft.cluster.launch.cache import backbone_cache
from polygraft.cluster.launch.commands.common import Json, flags
from polygraft.cluster.launch.output import Failure, JsonOut, Status, ago, print_json, print_table
from polygraft.grafts.catalogue import LLAMA_7B, Entry, entry
from polygraft.grafts.methods.declare import Method
from polygraft.grafts.methods.registry import methods as table
from polygraft.grafts.sites import ModelShape

grafts = typer.Typer(no_args_is_help=True, help="The grafts that may be asked.")


def register(app: typer.Typer) -> None:
    app.add_typer(grafts, name="grafts")
    app.command()(methods)


@grafts.command("list")
def list_grafts(context: typer.Context, as_json: Json = False) -> None:
    """List the grafts by the names they are served under."""
    with flags(context).client() as client:
        found = [model for model in client.models() if model.parent is not None]
    if as_json:
        print_json(iter(found))
        return
    print_table(
        ("model", "backbone", "#age"),
        ((escape(model.id), model.root, ago(model.created)) for model in found),
        empty="no grafts yet; train one with: polygraft submit FILE",
    )


@grafts.command("export")
def export_graft(
    graft: Annotated[Path, typer.Argument(help="The folder of a graft: graft.json and graft.safetensors.")],
    target: Annotated[Path, typer.Argument(help="The folder to write.")],
    backbone: Annotated[str, typer.Option(help="What it grew on: a name, folder or hub id.")] = "smollm2",
    rank: Annotated[int | None, typer.Option(help="Write a LoRA of this rank, as PEFT reads it.")] = None,
    energy: Annotated[float | None, typer.Option(help="Write the LoRA that keeps this share of every dW.")] = None,
) -> None:
    """Write the whole model with the graft folded in, or with --rank or --energy a LoRA in its place."""
    import torch

    from polygraft.grafts.formats import merged, native, peft
    from polygraft.grafts.formats.check import FormatError
    from polygraft.grafts.formats.to_lora import to_lora
    from polygraft.grafts.runtime.backbone import Backbone
    from polygraft.grafts.runtime.pretrained import BackboneError, materialise
    from polygraft.grafts.spec import SpecError

    try:
        grown = Backbone.load(materialise(backbone, backbone_cache()), torch.float32)
        stored = native.load(graft, shape=grown.shape, backbone=grown.fingerprint)
        if rank is None and energy is None:
            merged.export(target, stored.spec, stored.tensors, backbone=grown.folder)
            return
        found = to_lora(stored.spec, grown.shape, stored.tensors, grown.weight, rank=rank, energy=energy)
        target.mkdir(parents=True, exist_ok=True)
        peft.export(target, found.spec, found.tensors, shape=grown.shape, base=backbone)
    except (FormatError, SpecError, BackboneError) as error:
        raise Failure(str(error), Status.USAGE) from None
    typer.echo(f"{found.spec.method}: lost {found.loss:.2%} of the norm of dW")


def methods(
    name: Annotated[str | None, typer.Argument(help="One method; all when not given.", show_default=False)] = None,
    config: Annotated[Path | None, typer.Option(help="A backbone's config.json to count parameters on.")] = None,
    as_json: Json = False,
) -> None:
    """List the methods a graft can be made of, with their arguments and what follows from their slots.

    Parameters are those of the defaults on Llama 7B, or on the backbone of --config.
    """
    known = [method for method in table().values() if name in (None, method.name, *method.aliases)]
    if not known:
        raise typer.BadParameter(f"{name!r}; choices: {', '.join(table())}")
    try:
        shape = LLAMA_7B if config is None else ModelShape.from_config(json.loads(config.read_text()))
    except (OSError, ValueError) as error:
        raise Failure(f"--config {config}: {error}", Status.USAGE) from None
    if as_json:
        print_json([_json(method, entry(method, shape)) for method in known])
        return
    print_table(
        ("method", "family", "#parameters", "merges", "#learning rate", "paper"),
        (
            (
                escape(_usage(method)),
                line.family,
                f"{line.parameters:,}",
                "yes" if line.mergeable else "",
                f"{method.learning_rate:g}",
                escape(method.paper),
            )
            for method, line in ((method, entry(method, shape)) for method in known)
        ),
        empty="",
    )


def _usage(method: Method) -> str:
    """As it is written in --peft, with the defaults."""
    arguments = (
        name if argument.default is argument.empty else f"{name}={argument.default}"
        for name, argument in method.arguments.items()
    )
    return f"{method.name}({', '.join(arguments)})" if method.arguments else method.name


def _json(method: Method, line: Entry) -> dict[str, JsonOut]:
    arguments = {
        name: {
            "type": getattr(argument.annotation, "__name__", str(argument.annotation)),
            "default": None if argument.default is argument.empty else argument.default,
        }
        for name, argument in method.arguments.items()
    }
    return {
        **{key: list(value) if isinstance(value, tuple) else value for key, value in asdict(line).items()},
        "arguments": arguments,
        "learning_rate": method.learning_rate,
    }
