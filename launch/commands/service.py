"""up and down: start the service on this machine, and stop it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from polygraft.cluster.service import Service, ServiceNotRunning, find_service
from polygraft.launch.commands.common import Json, flags
from polygraft.launch.output import Failure, errors, print_json, screen
from polygraft.launch.progress import stages
from polygraft.launch.run_folder import RunFolder
from polygraft.launch.start import AlreadyRunning, start
from polygraft.launch.stop import stop


def register(app: typer.Typer) -> None:
    app.command()(up)
    app.command()(down)


def up(
    context: typer.Context,
    data: Annotated[Path | None, typer.Option(help="Folder of files, checkpoints and grafts.")] = None,
    backbone: Annotated[
        str | None, typer.Option(help="smollm2, or the folder or hub id of a causal language model.")
    ] = None,
    store_url: Annotated[
        str | None, typer.Option(help="redis://... of a running Redis or Valkey, instead of an own one.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 for a free one.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    devices: Annotated[
        int | None, typer.Option(help="Split this machine's cores and memory; one a GPU where there are GPUs.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, bf16 or fp32.")] = None,
    quantise: Annotated[
        str | None, typer.Option(help="nf4: the backbone in 4 bits (QLoRA); loftq-RANK-ITERATIONS: by LoftQ.")
    ] = None,
    cut_store: Annotated[
        bool, typer.Option(help="Go on without what cannot be read at the end of the store's damaged file.")
    ] = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for it.", min=1)] = 300.0,
    as_json: Json = False,
) -> None:
    """Start the service on this machine; it stays up until polygraft down."""
    settings = flags(context).settings(
        data=data,
        backbone=backbone,
        store_url=store_url,
        host=host,
        port=port,
        device=device,
        devices=devices,
        dtype=dtype,
        quantise=quantise,
    )
    try:
        with stages() as shown:
            service = start(settings, on_stage=shown.enter, timeout_s=timeout, cut_store=cut_store)
    except AlreadyRunning:
        try:
            service = find_service(settings.service_path)
        except ServiceNotRunning:
            raise Failure("the service is coming up, but does not answer yet; polygraft doctor says more") from None
        if not as_json:
            screen.print("Polygraft is already running; polygraft down stops it.")
    for note in RunFolder(settings.home).notes:
        errors.print(f"[yellow]note:[/] {escape(note)}", highlight=False, soft_wrap=True)
    if as_json:
        print_json(_public(service))
    else:
        screen.print(
            f"Polygraft is up at [bold]{service.url}/v1[/], its key is in {settings.api_key_path}",
            highlight=False,
            soft_wrap=True,
        )


def down(context: typer.Context, as_json: Json = False) -> None:
    """Stop the service; jobs, grafts and files stay, and unfinished jobs go on at the next up."""
    settings = flags(context).settings()
    with stages() as shown:
        shown.enter("stopping")
        stopped = stop(settings)
    if as_json:
        print_json({"stopped": stopped})
    else:
        screen.print("Polygraft is stopped." if stopped else "Polygraft is not running.")


def _public(service: Service) -> dict[str, str | int]:
    """Without the store's password."""
    return {"url": service.url, "ray_address": service.ray_address, "pid": service.pid}
