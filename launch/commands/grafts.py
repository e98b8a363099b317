"""grafts and methods: what has been trained, and what can be."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from polygraft.cluster.model import Graft, GraftId, TenantId
from polygraft.cluster.policy.budget import state_bytes
from polygraft.cluster.publish import BadName, adopt
from polygraft.cluster.settings import Settings
from polygraft.cluster.store.base import Store
from polygraft.grafts.catalogue import LLAMA_7B, Entry, entry
from polygraft.grafts.methods.declare import Method
from polygraft.grafts.methods.description import describe
from polygraft.grafts.methods.refused import NAMED_TWICE
from polygraft.grafts.methods.registry import find, layouts
from polygraft.grafts.methods.registry import methods as table
from polygraft.grafts.s4 import s4
from polygraft.grafts.sites import ModelShape
from polygraft.grafts.spec import SpecError
from polygraft.launch.cache import backbone_cache
from polygraft.launch.commands.common import Json, flags
from polygraft.launch.output import Failure, JsonOut, Status, ago, print_json, print_table

if TYPE_CHECKING:
    from torch import Tensor

    from polygraft.grafts.bound import BoundGraft
    from polygraft.grafts.runtime.backbone import Backbone

grafts = typer.Typer(no_args_is_help=True, help="The grafts that may be asked.")


class Form(StrEnum):
    """What a graft can be written as."""

    MERGED = "merged"
    PEFT = "peft"
    GGUF = "gguf"
    NATIVE = "native"


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
    graft: Annotated[Path, typer.Argument(help="The folder of a graft: ours, PEFT's or AdapterHub's.")],
    target: Annotated[Path, typer.Argument(help="The folder to write, or with --format gguf the file.")],
    backbone: Annotated[str, typer.Option(help="What it grew on: a name, folder or hub id.")] = "smollm2",
    format: Annotated[
        Form | None, typer.Option(help="What to write: merged, or peft with --rank or --energy, where not given.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Write a LoRA of this rank in its place.")] = None,
    energy: Annotated[float | None, typer.Option(help="Write the LoRA that keeps this share of every dW.")] = None,
) -> None:
    """Write the whole model with the graft folded in (merged), or the graft as PEFT's folder (peft), llama.cpp's file
    (gguf) or ours (native, in a folder named by its id); with --rank or --energy a LoRA in its place."""
    from polygraft.grafts.formats import gguf_lora, merged, native, peft
    from polygraft.grafts.formats.backbone_files import BackboneFiles
    from polygraft.grafts.formats.check import FormatError
    from polygraft.grafts.formats.read import read
    from polygraft.grafts.formats.to_lora import to_lora
    from polygraft.kernels.common.atomic import whole_folder

    form = format or (Form.MERGED if rank is None and energy is None else Form.PEFT)
    with usage_errors():
        loaded = load_backbone(backbone)
        bound, values = read(graft, loaded)
        if rank is not None or energy is not None:
            found = to_lora(bound, values, loaded.weight, rank=rank, energy=energy)
            bound, values = found.graft, found.tensors
            typer.echo(f"{bound.spec.method}: lost {found.loss:.2%} of the norm of dW")
        match form:
            case Form.MERGED:
                merged.export(target, bound, values, backbone=loaded.folder)
            case Form.PEFT:
                if target.exists():
                    raise FormatError(f"{target}: exists already; name a folder that does not")
                stock = BackboneFiles(loaded.folder)
                with whole_folder(target) as draft:
                    peft.export(draft, bound, values, base=backbone, stock=stock)
            case Form.GGUF:
                gguf_lora.export(target, bound, values)
            case Form.NATIVE:
                stock = BackboneFiles(loaded.folder)
                typer.echo(native.save(target, bound, values, backbone=loaded.fingerprint, stock=stock))


@grafts.command("import")
def import_graft(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="A graft made elsewhere: PEFT's folder, AdapterHub's or ours.")],
    name: Annotated[str, typer.Argument(help="The name to serve it under.")],
    backbone: Annotated[str | None, typer.Option(help="The service's backbone, where settings do not say.")] = None,
    tenant: Annotated[str, typer.Option(help="Whose graft it is.")] = "local",
    promote: Annotated[bool, typer.Option(help="Let the name mean this version, if it has others.")] = False,
) -> None:
    """Give the local service a graft made elsewhere, for its backbone."""
    from polygraft.grafts.formats.read import read

    store, settings = flags(context).store(), flags(context).settings()
    with usage_errors():
        if name == settings.backbone:
            raise BadName(f"name: {name!r} is that of the backbone; choose another")
        loaded = load_backbone(backbone or settings.backbone, settings.quantise)
        graft = adopted(store, settings, TenantId(tenant), name, *read(folder, loaded), loaded, promote)
    store.close()
    typer.echo(graft.model)


def adopted(
    store: Store,
    settings: Settings,
    tenant: TenantId,
    name: str,
    graft: BoundGraft,
    values: Mapping[str, Tensor],
    loaded: Backbone,
    promote: bool,
) -> Graft:
    """The graft, saved and published under the name."""
    from polygraft.grafts.formats import native
    from polygraft.grafts.formats.backbone_files import BackboneFiles

    root = settings.data / "grafts"
    identity = native.save(root, graft, values, backbone=loaded.fingerprint, stock=BackboneFiles(loaded.folder))
    return adopt(
        store,
        tenant,
        name,
        graft=GraftId(identity),
        method=graft.spec.method,
        backbone_fingerprint=loaded.fingerprint,
        parameters=graft.parameters,
        context_length=graft.context_length,
        bytes=native.size(root / identity),
        at=time.time(),
        promote=promote,
    )


def load_backbone(backbone: str, quantise: str | None = None) -> Backbone:
    import torch

    from polygraft.grafts.runtime.backbone import Backbone
    from polygraft.grafts.runtime.pretrained import materialise

    return Backbone.load(materialise(backbone, backbone_cache()), torch.float32, quantise=quantise)


@contextmanager
def usage_errors() -> Iterator[None]:
    """What is wrong with a folder or a name, as the command's answer."""
    from polygraft.grafts.formats.check import FormatError
    from polygraft.grafts.runtime.checked import BackboneError

    try:
        yield
    except (FormatError, SpecError, BackboneError, BadName) as error:
        raise Failure(str(error), Status.USAGE) from None


def methods(
    name: Annotated[str | None, typer.Argument(help="One method; all when not given.", show_default=False)] = None,
    config: Annotated[Path | None, typer.Option(help="A backbone's config.json to count parameters on.")] = None,
    budget: Annotated[
        int | None, typer.Option("--s4", help="Print S4's union with at most so many trainable parameters, for --peft.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the methods a graft can be made of, with their arguments and what follows from their slots; of one method
    say what it does, how it differs from its paper and when to choose it.

    Parameters, and the memory that a job of them takes in training beside the backbone and its activations, are those
    of the defaults on Llama 7B, or on the backbone of --config.
    """
    try:
        known = [*table().values()] if name is None else [find(name)]
    except SpecError as error:
        raise typer.BadParameter(str(error).removeprefix("peft: ")) from None
    try:
        shape = LLAMA_7B if config is None else ModelShape.from_config(json.loads(config.read_text()))
    except (OSError, ValueError) as error:
        raise Failure(f"--config {config}: {error}", Status.USAGE) from None
    if budget is not None:
        try:
            typer.echo(s4(shape, budget))
        except SpecError as error:
            raise Failure(f"--s4: {error}", Status.USAGE) from None
        return
    if as_json:
        print_json([_json(method, entry(method, shape)) for method in known])
        return
    print_table(
        ("method", "kind", "#parameters", "#training", "merges", "#learning rate", "paper"),
        (
            (
                escape(_usage(method)),
                line.kind,
                f"{line.parameters:,}",
                f"{state_bytes(line.parameters, line.frozen) / 1e6:,.1f} MB",
                "yes" if line.mergeable else "",
                f"{method.learning_rate:g}",
                escape(method.paper),
            )
            for method, line in ((method, entry(method, shape)) for method in known)
        ),
        empty="",
    )
    if name is not None:
        _tell(known[0])


def _tell(method: Method) -> None:
    """The method's words, and what else its name may mean."""
    words = describe(method)
    twice = f"Here {method.name} is {NAMED_TWICE[method.name]}." if method.name in NAMED_TWICE else ""
    for text in (words.summary, words.arguments, twice):
        if text:
            typer.echo(f"\n{text}")
    typer.echo(f"\nDeviations from the paper: {words.deviations}")
    typer.echo(f"\nChoose it when: {words.choose}")


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
        "training_bytes": state_bytes(line.parameters, line.frozen),
        "arguments": arguments,
        "peft": list(dict.fromkeys(layout.kind for layout in layouts() if layout.method == method.name)),
        "learning_rate": method.learning_rate,
    }
