"""grafts soup: one graft made of several that were trained before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from polygraft.cluster.model import Graft, TenantId
from polygraft.cluster.publish import UnknownModel, resolve
from polygraft.cluster.store.base import Store
from polygraft.launch.commands.common import flags
from polygraft.launch.commands.grafts import adopted, grafts, load_backbone, usage_errors
from polygraft.launch.output import Failure, Status


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
    backbone: Annotated[str | None, typer.Option(help="The service's backbone, where settings do not say.")] = None,
    tenant: Annotated[str, typer.Option(help="Whose grafts they are.")] = "local",
    promote: Annotated[bool, typer.Option(help="Let the name mean this version, if it has others.")] = False,
) -> None:
    """Give the local service the mean of grafts (AdapterSoup), or with --examples their weighted sum (LoRAHub)."""
    from polygraft.grafts.compose import lorahub, soup
    from polygraft.grafts.formats import native
    from polygraft.grafts.spec import SpecError
    from polygraft.launch.examples import encoded
    from polygraft.trainers.evaluate import mean_loss
    from polygraft.trainers.job import Sample

    store, settings = flags(context).store(), flags(context).settings()
    with usage_errors():
        records = [_member(store, TenantId(tenant), member, settings.backbone) for member in members]
        loaded = load_backbone(backbone or settings.backbone, settings.quantise)
        stored = [
            native.load(settings.data / "grafts" / record.id, shape=loaded.shape, backbone=loaded.fingerprint)
            for record in records
        ]
        bound, values = stored[0].graft, [one.tensors for one in stored]
        if any(one.graft.spec.slots != bound.spec.slots for one in stored):
            raise SpecError(f"members: {', '.join(one.graft.spec.method for one in stored)} are not of one spec")
        if examples is None:
            made = soup(bound.tensors, values)
        else:
            limit = loaded.shape.length_limit(max_length, bound.context_length)
            few = [Sample(one.ids, one.weights) for one in encoded(examples, loaded.folder, limit)]
            hub = lorahub(bound.tensors, values, lambda made: mean_loss(loaded, bound, made, few), steps=steps)
            typer.echo(f"weights {_shown(hub.weights)}, loss {hub.loss:.4f}", err=True)
            made = dict(hub.tensors)
        graft = adopted(store, settings, TenantId(tenant), name, bound, made, loaded, promote)
    store.close()
    typer.echo(graft.model)


def _member(store: Store, tenant: TenantId, model: str, backbone: str) -> Graft:
    try:
        found = resolve(store, tenant, model, backbone)
    except UnknownModel as error:
        raise Failure(str(error), Status.USAGE) from None
    if found is None:
        raise Failure(f"members: {model!r} is the backbone", Status.USAGE)
    return found


def _shown(weights: Sequence[float]) -> str:
    return ", ".join(f"{weight:.3f}" for weight in weights)
