"""How large a backbone's packs and replicas are: derived when it is added, from the smallest device that there is;
a setting that is given goes before."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from pydantic import BaseModel

from polygraft.cluster.model import Backbone, Device
from polygraft.cluster.policy.capacity import (
    DoesNotFit,
    ModelSize,
    Portion,
    longest_context,
    pack_capacity,
    serve_capacity,
)
from polygraft.cluster.policy.devices import share_bytes
from polygraft.cluster.settings import Settings
from polygraft.cluster.size import Size
from polygraft.grafts.sites import ModelShape
from polygraft.kernels.common.processor import multiplies_bf16

_SERVE = ("kv_bytes", "graft_bytes", "max_streams", "max_rows", "max_context")
_PACK = ("memory_bytes", "max_rows", "micro_rows", "max_jobs")


def sizes(settings: Settings, backbone: Backbone, devices: Collection[Device]) -> tuple[Size, ...]:
    """Those of a backbone, by its config.json. Without a device nothing is known: (). Raises DoesNotFit, whose message
    has the bytes."""
    if not devices:
        return ()
    least = min(devices, key=lambda device: (device.bytes, device.speed, device.id))
    by_itself = backbone.dtype == "auto" and (least.kind == "cuda" or multiplies_bf16())
    model = ModelSize(
        shape=ModelShape.from_config(json.loads((Path(backbone.folder) / "config.json").read_text())),
        itemsize=2 if backbone.dtype == "bf16" or by_itself else 4,
        quantised=backbone.quantise is not None,
    )
    served, packed = _held("serve", settings.serve.bytes, least), _held("pack", settings.pack.bytes, least)
    try:
        serve, pack = asdict(serve_capacity(model, served)), asdict(pack_capacity(model, packed))
    except DoesNotFit as error:
        raise DoesNotFit(f"{error}; device {least.id} has {least.bytes:,}") from None
    given = settings.serve.kv_bytes if "kv_bytes" in settings.serve.model_fields_set else None
    if given is not None:
        serve["max_context"] = longest_context(model, given)
    return (
        *_sized("serve", settings.serve, {"bytes": served.bytes, **{name: serve[name] for name in _SERVE}}),
        *_sized("pack", settings.pack, {"bytes": packed.bytes, **{name: pack[name] for name in _PACK}}),
    )


def fitted(settings: Settings, backbone: Backbone) -> Settings:
    """The settings for this backbone: what was not given is as its sizes say."""
    serve, pack = (_missing(backbone.sizes, name, getattr(settings, name)) for name in ("serve", "pack"))
    if "max_rows" in pack:
        pack["max_rows"] = max(pack["max_rows"], settings.pack.micro_rows, pack.get("micro_rows", 0))
    return settings.model_copy(
        update={
            "serve": settings.serve.model_copy(update=serve),
            "pack": settings.pack.model_copy(update=pack),
        }
    )


def _held(group: str, asked: int | None, device: Device) -> Portion:
    """What one pack or replica has of the device: half, unless a setting says how much. Raises DoesNotFit."""
    if (asked or 0) > device.bytes:
        raise DoesNotFit(f"{group}.bytes: {asked:,} are asked for, and device {device.id} has {device.bytes:,}")
    return Portion(kind=device.kind, bytes=asked or share_bytes(device), speed=device.speed)


def _sized(group: str, given: BaseModel, derived: Mapping[str, int]) -> Sequence[Size]:
    return [
        Size(f"{group}.{name}", value, getattr(given, name) if name in given.model_fields_set else value)
        for name, value in derived.items()
    ]


def _missing(sizes: Collection[Size], group: str, given: BaseModel) -> dict[str, int]:
    """Of the group's sizes, those that were not given."""
    own = {size.name.partition(".")[2]: size.derived for size in sizes if size.name.partition(".")[0] == group}
    return {name: value for name, value in own.items() if name not in given.model_fields_set}
