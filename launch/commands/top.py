"""top: what runs where, and why what waits waits."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from polygraft.cluster.view import ClusterView, DeviceView, ReplicaView
from polygraft.launch.commands.common import Json, flags
from polygraft.launch.output import ago, print_json, screen

_EVERY_S = 1.0
_NODE = 6  # digits of a node's name that tell it from others


def register(app: typer.Typer) -> None:
    app.command()(top)


def top(context: typer.Context, as_json: Json = False) -> None:
    """Show devices, packs, replicas, queues and the reason of every wait, live on a terminal, else once."""
    with flags(context).client() as client:
        if as_json:
            print_json(client.cluster())
        elif not sys.stdout.isatty():
            screen.print(shown(client.cluster()))
        else:
            with Live(console=screen, screen=True, auto_refresh=False) as live:
                while True:  # until Ctrl-C
                    live.update(shown(client.cluster()), refresh=True)
                    time.sleep(_EVERY_S)


def shown(cluster: ClusterView) -> RenderableType:
    """Everything on one screen."""
    names = {device.id: _name(device) for device in cluster.devices}
    return Group(
        _devices(cluster, names),
        _packs(cluster, names),
        _replicas(cluster.replicas, names),
        _grafts(cluster.replicas),
        _waits(cluster),
        _sizes(cluster),
    )


def _devices(cluster: ClusterView, names: Mapping[str, str]) -> RenderableType:
    columns = ("device", "#cores", "#GiB", "#free", "#GFLOP/s", "held by")
    rows = (
        (
            names[one.id],
            one.cores,
            _gib(one.bytes),
            _gib(one.free_bytes),
            f"{one.speed / 1e9:,.0f}" if one.speed else "",
            ", ".join(f"{held.holder} {_gib(held.bytes)}" for held in one.holders),
        )
        for one in cluster.devices
    )
    return _table("devices", columns, rows)


def _packs(cluster: ClusterView, names: Mapping[str, str]) -> RenderableType:
    columns = ("pack", "backbone", "state", "devices", "#GiB", "#jobs")
    rows = (
        (one.id, one.backbone, one.state, _places(one.devices, names), _gib(one.bytes), len(one.jobs))
        for one in cluster.packs
    )
    return _table("packs", columns, rows)


def _replicas(replicas: Iterable[ReplicaView], names: Mapping[str, str]) -> RenderableType:
    columns = ("replica", "backbone", "devices", "#GiB", "#streams", "#waiting", "#for a graft", "#cache")
    rows = (
        (
            one.id,
            one.backbone,
            _places(one.devices, names),
            _gib(one.bytes),
            *(
                (load.running, load.waiting, load.deferred, f"{1 - load.free_blocks / max(1, load.blocks):.0%}")
                if (load := one.load) is not None
                else ("not connected", "", "", "")
            ),
        )
        for one in replicas
    )
    return _table("replicas", columns, rows)


def _grafts(replicas: Iterable[ReplicaView]) -> RenderableType:
    where: dict[str, list[str]] = {}
    for replica in replicas:
        for graft in replica.load.grafts if replica.load else ():
            where.setdefault(graft, []).append(replica.id)
    return _table("grafts in memory", ("graft", "at"), ((graft, ", ".join(at)) for graft, at in sorted(where.items())))


def _waits(cluster: ClusterView) -> RenderableType:
    columns = ("job", "tenant", "backbone", "since", "waits for")
    rows = (
        (one.job, one.tenant, one.backbone, ago(one.since), (one.reason or "the controller").replace("_", " "))
        for one in cluster.waiting
    )
    return _table("waiting jobs", columns, rows)


def _sizes(cluster: ClusterView) -> RenderableType:
    columns = ("backbone", "loaded", "size", "#used", "#derived")
    rows = (
        (backbone.id, "yes" if backbone.loaded else "no", size.name, f"{size.used:,}", f"{size.derived:,}")
        for backbone in cluster.backbones
        for size in backbone.sizes
    )
    return _table("sizes", columns, rows)


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
    for column in columns:
        table.add_column(column.removeprefix("#"), justify="right" if column.startswith("#") else "left")
    for row in rows:
        table.add_row(*("" if cell is None else str(cell) for cell in row))
    return table if table.row_count else Text(f"no {title}", style="dim")


def _name(device: DeviceView) -> str:
    return f"{device.node[:_NODE]}/{device.kind}{device.index}"


def _places(devices: Iterable[str], names: Mapping[str, str]) -> str:
    return ", ".join(names.get(device, device) for device in devices)


def _gib(bytes_: int) -> str:
    return f"{bytes_ / 2**30:.1f}"
