"""drain: empty a node of a cluster before it goes."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from polygraft.cluster.service import find_service
from polygraft.launch.commands.common import Flags, Json, flags
from polygraft.launch.local_ray import access
from polygraft.launch.output import Failure, Status, print_json, screen


def register(app: typer.Typer) -> None:
    app.command()(drain)


def drain(
    context: typer.Context,
    node: Annotated[
        str | None, typer.Argument(help="Ray's id of the node, with which its devices' names begin; else this one.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="How long until the node is gone.", min=1)] = 60.0,
    address: Annotated[str | None, typer.Option(envvar="RAY_ADDRESS", help="Where the cluster's Ray is.")] = None,
    as_json: Json = False,
) -> None:
    """Move what a node holds elsewhere: streams go on, jobs after their last step. Returns when it holds nothing."""
    told = flags(context)
    found = _address(told) if address is None else address
    from polygraft.launch.draining import NoSuchNode, NotDrained, empty, tell

    try:
        node = tell(found, node, seconds)
    except NoSuchNode as error:
        raise Failure(f"{error}", Status.NOT_FOUND) from None
    except NotDrained as error:
        raise Failure(f"{error}") from None
    with closing(told.store()) as store:
        if not empty(store, node, seconds):
            raise Failure(f"node {node} holds packs or replicas yet, after {seconds:g} s; polygraft top shows them")
    if as_json:
        print_json({"drained": node})
    else:
        screen.print(f"Node {node} holds nothing any more.", highlight=False, soft_wrap=True)


def _address(told: Flags) -> str:
    """Of the local service's Ray, which lets in whoever has its token."""
    service = find_service(told.settings().service_path)
    os.environ.update(access(Path(service.ray_token)))
    return service.ray_address
