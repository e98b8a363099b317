"""grafts soup: one graft made of several that were trained before."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from polygraft.launch.commands.common import flags
from polygraft.launch.commands.grafts import OnBackbone, Promote, folder_of, grafts, load_backbone, made, usage_errors


def register() -> None:
    grafts.command("soup")(soup_of)


def soup_of(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="The name to serve the new graft under.")],
    members: Annotated[list[str], typer.Argument(help="The grafts, name or name@version, all of one spec.")],
    examples: Annotated[
        Path | None, typer.Option(help="A few chat examples as JSONL, on which each member's weight is found.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens kept of an example; all that there is room for when not given.", min=2)
    ] = None,
    steps: Annotated[int, typer.Option(help="At most so many losses to find weights by.", min=1)] = 40,
    backbone: OnBackbone = None,
    promote: Promote = False,
) -> None:
    """Give the service the mean of grafts (AdapterSoup), or with --examples their weighted sum (LoRAHub)."""
    from polygraft.grafts.compose import lorahub, soup
    from polygraft.grafts.formats import native
    from polygraft.grafts.formats.description import grown_on
    from polygraft.grafts.spec import SpecError
    from polygraft.launch.examples import encoded
    from polygraft.trainers.evaluate import mean_loss
    from polygraft.trainers.job import Sample

    with usage_errors(), ExitStack() as opened:
        folders = [opened.enter_context(folder_of(flags(context), member)) for member in members]
        shape, fingerprint = grown_on(folders[0])
        stored = [native.load(folder, shape=shape, backbone=fingerprint) for folder in folders]
        bound, values = stored[0].graft, [one.tensors for one in stored]
        if any((one.graft.spec.slots, one.graft.spec.head) != (bound.spec.slots, bound.spec.head) for one in stored):
            raise SpecError(f"members: {', '.join(one.graft.spec.method for one in stored)} are not of one spec")
        if examples is not None and bound.head:
            raise SpecError("--examples: chats say nothing of classifiers, of which there is the mean alone")
        if examples is None:
            mean = soup(bound.tensors, values)
        else:
            loaded = load_backbone(flags(context), backbone, fingerprint)
            if loaded.fingerprint != fingerprint:
                raise SpecError(f"members: {members[0]!r} has grown on another backbone than {loaded.folder}")
            limit = loaded.shape.length_limit(max_length, bound.context_length)
            few = [Sample(one.ids, one.weights) for one in encoded(examples, loaded.folder, limit)]
            hub = lorahub(bound.tensors, values, lambda mixed: mean_loss(loaded, bound, mixed, few), steps=steps)
            typer.echo(f"weights {_shown(hub.weights)}, loss {hub.loss:.4f}", err=True)
            mean = dict(hub.tensors)
        client = opened.enter_context(flags(context).client())
        typer.echo(made(client, name, bound, mean, fingerprint, promote=promote).id)


def _shown(weights: Sequence[float]) -> str:
    return ", ".join(f"{weight:.3f}" for weight in weights)
