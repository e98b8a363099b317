"""Values of the control plane with everything a test does not care about filled in."""

from __future__ import annotations

from typing import Any

from polygraft.cluster.model import (
    Backbone,
    Device,
    DeviceId,
    EventId,
    FileId,
    Job,
    JobId,
    JobSpec,
    Limits,
    Pack,
    PackId,
    Replica,
    ReplicaId,
    Snapshot,
    TenantId,
)
from polygraft.cluster.states import JobState, PackState

DEVICE_BYTES = 1000


def make_job(
    name: str = "a", *, tenant: str = "t", backbone: str = "b", spec: JobSpec | None = None, **fields: Any
) -> Job:
    """A waiting job with the id ftjob-<name>."""
    wanted = spec or JobSpec(backbone=backbone, training_file=FileId("file-1"))
    fields = {"created_at": 1.0, "parameters": 1000, **fields}
    return Job(id=JobId(f"ftjob-{name}"), tenant=TenantId(tenant), spec=wanted, **fields)


def running(name: str, pack: str = "p", **fields: Any) -> Job:
    fields = {"started_at": 2.0, "steps_total": 10, **fields}
    return make_job(name, state=JobState.RUNNING, pack=PackId(f"pack-{pack}"), **fields)


def make_pack(name: str = "p", *, backbone: str = "b", state: PackState = PackState.OPEN, **fields: Any) -> Pack:
    fields = {"devices": (DeviceId("d"),), "bytes": DEVICE_BYTES // 2, "epoch": 1, "opened_at": 1.0, **fields}
    return Pack(id=PackId(f"pack-{name}"), backbone=backbone, state=state, **fields)


def make_backbone(name: str = "b", **fields: Any) -> Backbone:
    """One that nobody has asked yet."""
    fields = {"folder": f"/models/{name}", "fingerprint": f"of-{name}", "added_at": 1.0, "asked_at": 0.0, **fields}
    return Backbone(name=name, **{"dtype": "auto", "quantise": None, "context_length": None, **fields})


def make_device(name: str = "d", *, bytes_: int = DEVICE_BYTES, **fields: Any) -> Device:
    fields = {"node": "n", "kind": "cpu", "index": 0, "cores": 2, "speed": 1e11, **fields}
    return Device(id=DeviceId(name), bytes=bytes_, **fields)


def make_replica(name: str = "r", **fields: Any) -> Replica:
    fields = {"devices": (DeviceId("d"),), "bytes": DEVICE_BYTES // 4, "actor": "", "opened_at": 1.0, **fields}
    return Replica(id=ReplicaId(name), backbone="b", **fields)


def make_snapshot(  # noqa: PLR0913
    *,
    jobs: tuple[Job, ...] = (),
    packs: tuple[Pack, ...] = (),
    backbones: tuple[Backbone, ...] | None = None,
    replicas: tuple[Replica, ...] = (),
    devices: int = 1,
    limits: Limits | None = None,
    now: float = 10.0,
) -> Snapshot:
    """At version 16-2; devices are called d, d1, d2, ... Where none are given, there are the backbones of all jobs."""
    if backbones is None:
        backbones = tuple(make_backbone(name) for name in sorted({job.spec.backbone for job in jobs}))
    names = [f"d{index or ''}" for index in range(devices)]
    over = sorted((job for job in jobs if job.final), key=lambda job: (job.finished_at or 0.0, job.id))
    return Snapshot(
        version=EventId("16-2"),
        now=now,
        limits=limits or Limits(),
        jobs={job.id: job for job in jobs},
        over=tuple(job.id for job in over),
        packs={pack.id: pack for pack in packs},
        backbones={backbone.name: backbone for backbone in backbones},
        replicas={replica.id: replica for replica in replicas},
        devices={DeviceId(name): make_device(name) for name in names},
    )
