"""Values of the control plane with everything a test does not care about filled in."""

from __future__ import annotations

from typing import Any

from polygraft.cluster.model import (
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
    Snapshot,
    TenantId,
)
from polygraft.cluster.states import JobState, PackState


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
    fields = {"device": DeviceId("d"), "epoch": 1, "opened_at": 1.0, **fields}
    return Pack(id=PackId(f"pack-{name}"), backbone=backbone, state=state, **fields)


def make_snapshot(
    *,
    jobs: tuple[Job, ...] = (),
    packs: tuple[Pack, ...] = (),
    devices: int = 1,
    limits: Limits | None = None,
    now: float = 10.0,
) -> Snapshot:
    """At version 16-2; devices are called d, d1, d2, ..."""
    names = [DeviceId(f"d{index or ''}") for index in range(devices)]
    return Snapshot(
        version=EventId("16-2"),
        now=now,
        limits=limits or Limits(),
        jobs={job.id: job for job in jobs},
        packs={pack.id: pack for pack in packs},
        devices={name: Device(id=name) for name in names},
    )
