"""Memory of devices, leased in bytes: no process computes on a device before the store says how much of it is its own.

Ray's shares only find a node. What counts is the device's record, which says who holds how much: it changes by
compare-and-swap, in one commit with the record and the event of the pack or replica that takes or gives back, so that
the bytes given out are those of the unfinished packs and the open replicas, and never more than there are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace

from polygraft.cluster.advance import TRIES, advance_pack
from polygraft.cluster.events import (
    PackClosed,
    PackFailed,
    PackOpening,
    PackPlaced,
    ReplicaClosed,
    ReplicaOpened,
)
from polygraft.cluster.model import Device, DeviceId, Holding, Occupancy, Pack, PackId, Replica, ReplicaId
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Append, Conflict, Fence, Store, Versioned, Write

_CHANGES = 64  # that an ingress finds when it comes


class LeaseRefused(Exception):
    """The device has not the bytes, or is not this process's to use: its constructor ends, and Ray tries again."""


def open_pack(store: Store, event: PackOpening, *, fence: Fence | None = None) -> Pack:
    """The pack's record, with its bytes of its devices taken for it. Raises LeaseRefused and what `advance_pack`
    raises."""
    return advance_pack(
        store, event, fence=fence, with_writes=lambda: _taking(store, event.pack, event.bytes, event.devices)
    )


def end_pack(store: Store, event: PackClosed | PackFailed, *, fence: Fence | None = None) -> Pack:
    """The pack's record when it is over, with all that it held given back. Raises what `advance_pack` raises."""

    def held() -> list[Write]:
        found = store.get(keys.pack(event.pack))
        return _giving(store, event.pack, found.value.devices) if found else []

    return advance_pack(store, event, fence=fence, with_writes=held)


def lease_for_pack(  # noqa: PLR0913
    store: Store, pack: PackId, *, rank: int = 0, node: str, index: int | None, at: float, fence: Fence | None = None
) -> Device:
    """The device of the pack's process of this rank, on the node where it runs; the controller took it when it opened
    the pack. `index` is that of the GPU that Ray assigned, None on a CPU: where it is another one's, the pack moves
    its lease there. Raises LeaseRefused, and what `advance_pack` raises."""
    record = _pack(store, pack)
    meant = record.devices[rank]
    found = store.get(keys.device(meant))
    if found and found.value.device.node == node and index in (None, found.value.device.index):
        if not found.value.held_by(pack):
            raise LeaseRefused(f"{pack} holds nothing of {meant}")
        return found.value.device
    if index is None:
        raise LeaseRefused(f"{pack} is meant for {meant}, and its process {rank} runs on node {node}")
    device = _assigned(store, node, index).value.device
    other = {meant: device.id, device.id: meant}  # another process of the pack may have been meant for it
    placed = PackPlaced(pack=pack, devices=tuple(other.get(one, one) for one in record.devices), at=at)
    advance_pack(store, placed, fence=fence, with_writes=lambda: _moving(store, record, meant, device.id))
    return device


def open_replica(  # noqa: PLR0913
    store: Store,
    replica: ReplicaId,
    *,
    backbone: str,
    bytes_of: Callable[[Device], int],
    actor: str,
    node: str,
    index: int | None,
    at: float,
    fence: Fence | None = None,
) -> tuple[Replica, Device]:
    """Lease a device of the node for the replica, as many bytes as `bytes_of` says of it, and say that it is open: the
    GPU that Ray assigned (`index`), on a CPU that with most bytes free. One that was open under this id, before its
    process started again, gives back what it held. Raises LeaseRefused, and what `bytes_of` raises."""
    for _ in range(TRIES):
        before = store.get(keys.replica(replica))
        free_again = _giving(store, replica, before.value.devices) if before else []
        here = [_as_written(one, free_again) for one in store.scan(keys.devices_of(node))]
        chosen = _chosen(here, node, index)
        device = chosen.value.device
        bytes_ = bytes_of(device)
        record = Replica(id=replica, backbone=backbone, devices=(device.id,), bytes=bytes_, actor=actor, opened_at=at)
        writes = [
            Write(keys.replica(replica), record, before.version if before else 0),
            *(write for write in free_again if write.key != chosen.key),
            _taken(chosen, replica, bytes_),
        ]
        try:
            store.commit(writes, [ReplicaOpened(record=record, at=at)], appends=[_change(record)], fence=fence)
        except Conflict:
            continue
        return record, device
    raise LeaseRefused(f"{replica}: the devices' records change faster than they can be written")


def close_replica(store: Store, replica: ReplicaId, *, at: float, fence: Fence | None = None) -> None:
    """Say that the replica is closed, and give back what it holds; nothing for one that is not open. Raises Conflict
    after TRIES."""
    for attempt in range(TRIES):
        found = store.get(keys.replica(replica))
        if found is None:
            return
        writes = [Write(found.key, None, found.version), *_giving(store, replica, found.value.devices)]
        try:
            store.commit(writes, [ReplicaClosed(replica=replica, at=at)], appends=[_change(found.value)], fence=fence)
            return
        except Conflict:
            if attempt == TRIES - 1:
                raise


def _change(replica: Replica) -> Append:
    """What ingresses wait for."""
    return Append(keys.replica_changes(replica.backbone), {"replica": replica.id}, maxlen=_CHANGES)


def _chosen(here: Collection[Versioned[Occupancy]], node: str, index: int | None) -> Versioned[Occupancy]:
    """Of a node's devices."""
    possible = [one for one in here if index is None or one.value.device.index == index]
    if not possible:
        which = "no device" if index is None else f"no device {index}"
        raise LeaseRefused(f"{which} of node {node} is known yet")
    return min(possible, key=lambda one: (-one.value.free, one.value.device.id))


def _pack(store: Store, pack: PackId) -> Pack:
    found = store.get(keys.pack(pack))
    if found is None or found.value.final:
        raise LeaseRefused(f"{pack} is over; its process has no device any more")
    return found.value


def _found(store: Store, device: DeviceId) -> Versioned[Occupancy]:
    found = store.get(keys.device(device))
    if found is None:
        raise LeaseRefused(f"{device} is not there")
    return found


def _assigned(store: Store, node: str, index: int) -> Versioned[Occupancy]:
    found = [one for one in store.scan(keys.devices_of(node)) if one.value.device.index == index]
    if not found:
        raise LeaseRefused(f"no device {index} of node {node} is known yet")
    return found[0]


def _moving(store: Store, pack: Pack, meant: DeviceId, assigned: DeviceId) -> list[Write]:
    if assigned in pack.devices:
        return []
    return [*_giving(store, pack.id, (meant,)), *_taking(store, pack.id, pack.bytes, (assigned,))]


def _taking(store: Store, holder: str, bytes_: int, devices: Iterable[DeviceId]) -> list[Write]:
    """What writes down that `holder` has `bytes_` of each of the devices. Raises LeaseRefused."""
    return [_taken(_found(store, device), holder, bytes_) for device in devices]


def _giving(store: Store, holder: str, devices: Iterable[DeviceId]) -> list[Write]:
    """What writes down that `holder` has nothing of the devices any more; those that are gone need no word."""
    found = (store.get(keys.device(device)) for device in devices)
    return [
        Write(one.key, _without(one.value, holder), one.version) for one in found if one and one.value.held_by(holder)
    ]


def _taken(found: Versioned[Occupancy], holder: str, bytes_: int) -> Write:
    rest = _without(found.value, holder)
    if rest.free < bytes_:
        raise LeaseRefused(f"{rest.device.id} has {rest.free:,} bytes free of the {bytes_:,} that {holder} asks for")
    return Write(found.key, replace(rest, holders=(*rest.holders, Holding(holder, bytes_))), found.version)


def _without(occupancy: Occupancy, holder: str) -> Occupancy:
    return replace(occupancy, holders=tuple(one for one in occupancy.holders if one.holder != holder))


def _as_written(found: Versioned[Occupancy], writes: Iterable[Write]) -> Versioned[Occupancy]:
    """The record as the writes leave it."""
    for write in writes:
        if write.key == found.key and isinstance(write.value, Occupancy):
            return replace(found, value=write.value)
    return found
