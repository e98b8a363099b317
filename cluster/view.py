"""What runs where, and why what waits waits: as `/v1/cluster` says it and `polygraft top` shows it."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

from polygraft.cluster.model import Backbone, Device, Job, Pack, Snapshot


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class HeldBytes(_Part):
    holder: str
    bytes: int


class DeviceView(_Part):
    """`speed` are the floating-point operations a second of a large product, 0 while it is not measured."""

    id: str
    node: str
    kind: str
    index: int
    cores: int
    bytes: int
    free_bytes: int
    speed: float
    holders: tuple[HeldBytes, ...]


class SizeView(_Part):
    """A size by the name of its setting: what follows from the devices, and what is used."""

    name: str
    derived: int
    used: int


class BackboneView(_Part):
    id: str
    loaded: bool
    sizes: tuple[SizeView, ...]


class PackView(_Part):
    id: str
    backbone: str
    state: str
    devices: tuple[str, ...]
    bytes: int
    jobs: tuple[str, ...]


class LoadView(_Part):
    """What a replica said last. Of the requests that wait, `deferred` do so for their graft, the others for a place in
    the batch; `grafts` are those in its memory."""

    running: int
    waiting: int
    deferred: int
    blocks: int
    free_blocks: int
    grafts: tuple[str, ...]


class ReplicaView(_Part):
    """`load` is null for one that this ingress is not connected to."""

    id: str
    backbone: str
    devices: tuple[str, ...]
    bytes: int
    load: LoadView | None


class WaitView(_Part):
    """A job in no pack; `reason` is null until the controller has looked at it."""

    job: str
    tenant: str
    backbone: str
    reason: str | None
    since: float


class ClusterView(_Part):
    object: str = "cluster"
    at: float
    devices: tuple[DeviceView, ...]
    backbones: tuple[BackboneView, ...]
    packs: tuple[PackView, ...]
    replicas: tuple[ReplicaView, ...]
    waiting: tuple[WaitView, ...]


def view(snapshot: Snapshot, loads: Mapping[str, LoadView], *, at: float) -> ClusterView:
    """Of what is not over, each kind by id; jobs that wait by age. `loads` are those of the replicas by id."""
    jobs = sorted(snapshot.jobs.values(), key=lambda job: (job.created_at, job.id))
    packs = [pack for _, pack in sorted(snapshot.packs.items()) if not pack.final]
    replicas = [
        ReplicaView(id=id_, backbone=one.backbone, devices=one.devices, bytes=one.bytes, load=loads.get(id_))
        for id_, one in sorted(snapshot.replicas.items())
    ]
    return ClusterView(
        at=at,
        devices=tuple(_device(snapshot, device) for _, device in sorted(snapshot.devices.items())),
        backbones=tuple(_backbone(backbone) for _, backbone in sorted(snapshot.backbones.items())),
        packs=tuple(_pack(pack, jobs) for pack in packs),
        replicas=tuple(replicas),
        waiting=tuple(
            WaitView(job=job.id, tenant=job.tenant, backbone=job.spec.backbone, reason=job.reason, since=job.created_at)
            for job in jobs
            if job.waiting
        ),
    )


def _device(snapshot: Snapshot, device: Device) -> DeviceView:
    holders = [
        *((pack.id, pack.bytes) for pack in snapshot.packs.values() if not pack.final and device.id in pack.devices),
        *((one.id, one.bytes) for one in snapshot.replicas.values() if device.id in one.devices),
    ]
    return DeviceView(
        id=device.id,
        node=device.node,
        kind=device.kind,
        index=device.index,
        cores=device.cores,
        bytes=device.bytes,
        free_bytes=snapshot.free_bytes(device.id),
        speed=device.speed,
        holders=tuple(HeldBytes(holder=holder, bytes=bytes_) for holder, bytes_ in sorted(holders)),
    )


def _backbone(backbone: Backbone) -> BackboneView:
    sizes = (SizeView(name=one.name, derived=one.derived, used=one.used) for one in backbone.sizes)
    return BackboneView(id=backbone.name, loaded=backbone.loaded, sizes=tuple(sizes))


def _pack(pack: Pack, jobs: list[Job]) -> PackView:
    return PackView(
        id=pack.id,
        backbone=pack.backbone,
        state=pack.state,
        devices=pack.devices,
        bytes=pack.bytes,
        jobs=tuple(job.id for job in jobs if job.active and job.pack == pack.id),
    )
