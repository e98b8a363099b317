"""Which pack a backbone's jobs go to, where a new one may start, and which packs are no longer needed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from polygraft.cluster.model import Device, DeviceId, Job, JobId, Pack, PackId, Snapshot
from polygraft.cluster.states import PackState, Reason

BACKOFF_S = 1.0  # before a new pack after a failed one; doubles with every failure in a row
BACKOFF_MAX_S = 300.0


def usable_pack(packs: Iterable[Pack], backbone: str) -> Pack | None:
    """The backbone's open pack, else its opening one; the smallest id among several."""
    usable = [one for one in packs if one.backbone == backbone and one.state in (PackState.OPEN, PackState.OPENING)]
    return min(usable, key=lambda pack: (pack.state is not PackState.OPEN, pack.id), default=None)


def pack_bytes(device: Device) -> int:
    """What a pack takes of a device: half, since the other half is a replica's."""
    return device.bytes // 2


def free_device(snapshot: Snapshot, taken: Collection[DeviceId]) -> Device | None:
    """A device without a pack and none of the `taken`, which has what a pack takes: most of it first, then by id."""
    held = {device for pack in snapshot.packs.values() if not pack.final for device in pack.devices}
    free = {one: snapshot.free_bytes(one.id) for one in snapshot.devices.values() if one.id not in held | {*taken}}
    fitting = (one for one, bytes_ in free.items() if bytes_ >= pack_bytes(one) > 0)
    return min(fitting, key=lambda one: (-free[one], one.id), default=None)


def backing_off(snapshot: Snapshot, backbone: str) -> bool:
    """Whether the backbone's last packs failed so lately that a new one has to wait."""
    past = sorted(
        (pack for pack in snapshot.packs.values() if pack.backbone == backbone and pack.final),
        key=lambda pack: (pack.opened_at, pack.id),
        reverse=True,
    )
    failures = 0
    while failures < len(past) and past[failures].state is PackState.FAILED:
        failures += 1
    if failures == 0:
        return False
    wait_s = min(BACKOFF_MAX_S, BACKOFF_S * 2.0 ** (failures - 1))
    return snapshot.now < (past[0].closed_at or 0.0) + wait_s


def why_no_pack(packs: Iterable[Pack], backbone: str) -> Reason:
    """Why the backbone's jobs wait when no device is free."""
    closing = any(pack.backbone == backbone and pack.state is PackState.CLOSING for pack in packs)
    return Reason.PACK_CLOSING if closing else Reason.NO_DEVICE


def is_idle(pack: Pack, jobs: Mapping[JobId, Job], *, now: float, idle_s: float) -> bool:
    """Whether an open pack has had no job for `idle_s` seconds."""
    own = [job for job in jobs.values() if job.pack == pack.id]
    if pack.state is not PackState.OPEN or any(not job.final for job in own):
        return False
    return now - max([pack.opened_at, *(job.finished_at or 0.0 for job in own)]) >= idle_s


def new_pack_id(snapshot: Snapshot, index: int) -> PackId:
    """Id of the round's `index`-th new pack: unique, since each opening moves on the version it is made of."""
    milliseconds, _, sequence = snapshot.version.partition("-")
    return PackId(f"pack-{int(milliseconds):x}{int(sequence) + index:04x}")
