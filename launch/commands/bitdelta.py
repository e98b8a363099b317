"""grafts bitdelta: a fine-tuned model as a graft of one bit an element."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polygraft.launch.cache import backbone_cache
from polygraft.launch.commands.common import flags
from polygraft.launch.commands.grafts import OnBackbone, Promote, grafts, load_backbone, made, usage_errors
from polygraft.launch.progress import counted

_SHOWN = 5


def register() -> None:
    grafts.command("bitdelta")(bitdelta)


def bitdelta(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="The fine-tuned model: a folder or a hub id.")],
    name: Annotated[str, typer.Argument(help="The name to serve the graft under.")],
    examples: Annotated[
        Path | None, typer.Option(help="Chat examples as JSONL, on which the scales are trained to give its logits.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of that training.", min=1)] = 200,
    max_length: Annotated[int, typer.Option(help="Tokens kept of an example.", min=2)] = 128,
    at: Annotated[str, typer.Option(help="The projections whose difference is kept.")] = "linear",
    backbone: OnBackbone = None,
    promote: Promote = False,
) -> None:
    """Give the service a fine-tuned model of its backbone, as one bit an element of the difference (BitDelta)."""
    import torch

    from polygraft.grafts.distil import distil
    from polygraft.grafts.formats.backbone_files import BackboneFiles
    from polygraft.grafts.formats.bitdelta import bitdelta_of, left_out
    from polygraft.grafts.runtime.backbone import Backbone
    from polygraft.grafts.runtime.pretrained import materialise
    from polygraft.grafts.spec import SpecError
    from polygraft.launch.examples import encoded

    with usage_errors(), flags(context).client() as client:
        loaded = load_backbone(flags(context), backbone)
        folder = materialise(model, backbone_cache())
        base, tuned = BackboneFiles(loaded.folder), BackboneFiles(folder)
        if tuned.shape != base.shape:
            raise SpecError(f"model: {model!r} is {tuned.shape}, and the backbone {base.shape}")
        graft, values = bitdelta_of(base.shape, base.weight, tuned.weight, at)
        if rest := left_out(graft, base, tuned):
            more = f" and {len(rest) - _SHOWN} others" if len(rest) > _SHOWN else ""
            typer.echo(f"not in the graft, though it was tuned: {', '.join(rest[:_SHOWN])}{more}", err=True)
        if examples is not None:
            samples = [one.ids for one in encoded(examples, loaded.folder, max_length)]
            with counted() as report:
                found = distil(
                    graft,
                    values,
                    loaded,
                    Backbone.load(folder, torch.float32),
                    samples,
                    steps=steps,
                    told=lambda done: report("distilling", done, steps),
                )
            typer.echo(f"logits' squared distance {found.first:.4g} -> {found.last:.4g}", err=True)
            values = dict(found.tensors)
        typer.echo(made(client, name, graft, values, loaded.fingerprint, promote=promote).id)
