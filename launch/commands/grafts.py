"""grafts: the grafts that a service has, and those made elsewhere, written and read through it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from polygraft.cluster.answers import RemoteGraft
from polygraft.cluster.client import ApiFailure, Client
from polygraft.grafts.spec import SpecError
from polygraft.launch import archive
from polygraft.launch.cache import backbone_cache
from polygraft.launch.commands.common import Flags, Json, flags
from polygraft.launch.output import Failure, Status, ago, print_error, print_json, print_table

if TYPE_CHECKING:
    from torch import Tensor

    from polygraft.grafts.bound import BoundGraft
    from polygraft.grafts.runtime.backbone import Backbone

grafts = typer.Typer(no_args_is_help=True, help="The grafts that may be asked.")
Name = Annotated[str, typer.Argument(help="The name to serve it under.")]
Promote = Annotated[bool, typer.Option(help="Let the name mean this version, if it has others.")]
OnBackbone = Annotated[
    str | None, typer.Option(help="One of the service's, a folder or a hub id; the graft's own where not given.")
]


class Form(StrEnum):
    """What a graft can be written as."""

    MERGED = "merged"
    PEFT = "peft"
    GGUF = "gguf"
    NATIVE = "native"


def register(app: typer.Typer) -> None:
    app.add_typer(grafts, name="grafts")


@grafts.command("list")
def list_grafts(context: typer.Context, as_json: Json = False) -> None:
    """List the grafts, and the version that each name means."""
    with flags(context).client() as client:
        found = list(client.grafts())
    if as_json:
        print_json(iter(found))
        return
    print_table(
        ("model", "named", "method", "backbone", "#parameters", "#age"),
        (
            (
                escape(one.id),
                one.name if one.current else "",
                escape(one.method),
                one.backbone or "another",
                f"{one.parameters:,}",
                ago(one.created_at),
            )
            for one in found
        ),
        empty="no grafts yet; train one with: polygraft submit FILE",
    )


@grafts.command("import")
def import_graft(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="A graft made elsewhere: PEFT's folder, AdapterHub's or ours.")],
    name: Annotated[str | None, typer.Argument(help="The name to serve it under.", show_default=False)] = None,
    each: Annotated[bool, typer.Option(help="Import each folder in FOLDER, under its own name.")] = False,
    backbone: Annotated[
        str | None, typer.Option(help="The one that it is for; the service's own where not given.")
    ] = None,
    promote: Promote = False,
    as_json: Json = False,
) -> None:
    """Give the service a graft made elsewhere, for one of its backbones."""
    if each == (name is not None):
        raise Failure("give a NAME, or --each for a folder of folders", Status.USAGE)
    if not folder.is_dir():
        raise Failure(f"{folder} is no folder", Status.USAGE)
    found = [(folder, name or "")] if name else [(one, one.name) for one in sorted(folder.iterdir()) if one.is_dir()]
    taken, refused = list[RemoteGraft](), 0
    with usage_errors(), flags(context).client() as client:
        its_backbone = None if backbone is None else _named(client, backbone)
        for one, its_name in found:
            try:
                taken.append(sent(client, one, its_name, promote=promote, backbone=its_backbone))
                if not as_json:
                    typer.echo(taken[-1].id)
            except ApiFailure as error:
                if not each:
                    raise
                print_error(f"{its_name}: {error}")
                refused += 1
    if as_json:
        print_json(iter(taken) if each else taken[0])
    if refused:
        raise Failure(f"{refused} of {len(found)} folders were not imported")


@grafts.command("export")
def export_graft(
    context: typer.Context,
    graft: Annotated[str, typer.Argument(help="A graft of the service, name or name@version, or a graft's folder.")],
    target: Annotated[Path, typer.Argument(help="The folder to write, or with --format gguf the file.")],
    backbone: OnBackbone = None,
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
    with usage_errors(), folder_of(flags(context), graft) as source:
        loaded = load_backbone(flags(context), backbone, grown_on(source))
        backbone_files = BackboneFiles(loaded.folder)
        bound, values = read(source, backbone_files, loaded.fingerprint)
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
                with whole_folder(target) as draft:
                    peft.export(
                        draft,
                        bound,
                        values,
                        base=backbone or flags(context).settings().backbone,
                        backbone_files=backbone_files,
                    )
            case Form.GGUF:
                gguf_lora.export(target, bound, values)
            case Form.NATIVE:
                typer.echo(
                    native.save(target, bound, values, backbone=loaded.fingerprint, backbone_files=backbone_files)
                )


@grafts.command("promote")
def promote_graft(
    context: typer.Context,
    graft: Annotated[str, typer.Argument(help="The version, name@version.")],
    as_json: Json = False,
) -> None:
    """Let a name mean this version of it from now on."""
    with flags(context).client() as client:
        _print(client.promote_graft(graft), as_json)


@grafts.command("rollback")
def roll_back(
    context: typer.Context, name: Annotated[str, typer.Argument(help="The name.")], as_json: Json = False
) -> None:
    """Let a name mean the version before the one that it means."""
    with flags(context).client() as client:
        _print(client.roll_back_graft(name), as_json)


@grafts.command("delete")
def delete_graft(
    context: typer.Context,
    graft: Annotated[str, typer.Argument(help="The version, name@version.")],
    as_json: Json = False,
) -> None:
    """Delete a version; refused while something needs it."""
    with flags(context).client() as client:
        client.delete_graft(graft)
    if as_json:
        print_json({"deleted": graft})


def _print(graft: RemoteGraft, as_json: bool) -> None:
    if as_json:
        print_json(graft)
    else:
        typer.echo(graft.id)


def sent(client: Client, folder: Path, name: str, *, promote: bool, backbone: str | None) -> RemoteGraft:
    """The graft of the folder, as a version of the name at the service, on one of its backbones or its own."""
    with TemporaryDirectory() as scratch:
        packed = Path(scratch) / "graft.tar"
        archive.pack(folder, packed)
        return client.import_graft(packed, name, promote=promote, backbone=backbone)


def made(
    client: Client, name: str, graft: BoundGraft, values: Mapping[str, Tensor], fingerprint: str, *, promote: bool
) -> RemoteGraft:
    """A graft that was made here, as a version of the name at the service."""
    from polygraft.grafts.formats import native

    its_backbone = next((one.id for one in client.backbones() if one.fingerprint == fingerprint), None)
    with TemporaryDirectory() as scratch:
        identity = native.save(Path(scratch), graft, values, backbone=fingerprint)
        return sent(client, Path(scratch) / identity, name, promote=promote, backbone=its_backbone)


@contextmanager
def folder_of(found: Flags, graft: str) -> Iterator[Path]:
    """The folder, or that of the service's graft while the block runs."""
    if Path(graft).is_dir():
        yield Path(graft)
        return
    with TemporaryDirectory() as scratch, found.client() as client:
        packed, folder = Path(scratch) / "graft.tar", Path(scratch) / graft
        client.export_graft(graft, packed)
        archive.unpack(packed, folder)
        yield folder


def load_backbone(found: Flags, backbone: str | None, fingerprint: str | None = None) -> Backbone:
    """The one that is named, at the service or as a folder or hub id; for None the service's of that fingerprint, else
    its own, else that of the settings."""
    import torch

    from polygraft.grafts.runtime.backbone import Backbone
    from polygraft.grafts.runtime.pretrained import materialise

    name, quantise = found.backbone(backbone, fingerprint)
    return Backbone.load(materialise(name, backbone_cache()), torch.float32, quantise=quantise)


def grown_on(folder: Path) -> str | None:
    """The fingerprint of the backbone that a graft in our own format says it has grown on."""
    from polygraft.grafts.formats.check import FormatError
    from polygraft.grafts.formats.description import grown_on

    try:
        return grown_on(folder)[1]
    except FormatError:
        return None


@contextmanager
def usage_errors() -> Iterator[None]:
    """What is wrong with a folder or a name, as the command's answer."""
    from polygraft.grafts.formats.check import FormatError
    from polygraft.grafts.runtime.checked import BackboneError

    try:
        yield
    except (FormatError, SpecError, BackboneError) as error:
        raise Failure(str(error), Status.USAGE) from None


def _named(client: Client, backbone: str) -> str:
    """The name of the service's backbone that is meant by its name or folder. Raises Failure."""
    folder, found = str(Path(backbone).expanduser().absolute()), client.backbones()
    for one in found:
        if backbone == one.id or folder == one.path:
            return one.id
    raise Failure(f"--backbone {backbone}: the service has {', '.join(one.id for one in found)}", Status.USAGE)
