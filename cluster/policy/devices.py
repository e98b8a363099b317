"""Where a pack may start: the devices that are free, and sets of them that belong together."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from polygraft.cluster.model import Device, DeviceId, Pack, Snapshot

SHARE = 0.5  # of a device, for a pack or for a replica


@dataclass(frozen=True, slots=True)
class DeviceSet:
    """Devices for one pack, and what it takes of each."""

    devices: tuple[DeviceId, ...]
    bytes: int


class FreeDevices:
    """Devices without a pack that have what a pack takes, as a round gives them out."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._found: list[Device] | None = None

    @property
    def count(self) -> int:
        return len(self._free)

    def keep(self) -> None:
        """Give out no more in this round: what is free is not enough for who comes first."""
        self._found = []

    def take(self, count: int) -> DeviceSet | None:
        """`count` devices of one make: those with most memory left first, then by id, and if it can be on one node.
        None if there are not so many."""
        chosen = self._alike(count)
        if chosen is None:
            return None
        taken = {device.id for device in chosen}
        self._found = [device for device in self._free if device.id not in taken]
        return DeviceSet(tuple(device.id for device in chosen), min(map(share_bytes, chosen)))

    def has(self, count: int) -> bool:
        """Whether `take` would find so many."""
        return self._alike(count) is not None

    @property
    def _free(self) -> list[Device]:
        """Looked for when somebody first asks: most rounds nobody does."""
        if self._found is None:
            self._found = _free_devices(self._snapshot)
        return self._found

    def _alike(self, count: int) -> list[Device] | None:
        if len(self._free) < count:
            return None
        if count == 1:
            return self._free[:1]
        makes: dict[tuple[str, int], list[Device]] = defaultdict(list)
        for device in self._free:
            makes[device.kind, device.cores].append(device)
        for _, alike in sorted(makes.items(), reverse=True):  # cuda before cpu, many cores before few
            nodes: dict[str, list[Device]] = defaultdict(list)
            for device in alike:
                nodes[device.node].append(device)
            whole = next((here for _, here in sorted(nodes.items()) if len(here) >= count), alike)
            if len(whole) >= count:
                return whole[:count]
        return None


def _free_devices(snapshot: Snapshot) -> list[Device]:
    packs = [pack for pack in snapshot.packs.values() if not pack.final]
    held = {device for pack in packs for device in pack.devices}
    left = {
        id_: device.bytes
        for id_, device in snapshot.devices.items()
        if id_ not in held and device.node not in snapshot.draining
    }
    for replica in snapshot.replicas.values():
        for device in left.keys() & set(replica.devices):
            left[device] -= replica.bytes
    free = (snapshot.devices[id_] for id_, bytes_ in left.items() if bytes_ >= share_bytes(snapshot.devices[id_]))
    return sorted(free, key=lambda one: (-left[one.id], one.id))


def is_leaving(pack: Pack, snapshot: Snapshot) -> bool:
    """Whether the node of one of its devices drains."""
    here = (snapshot.devices.get(device) for device in pack.devices)
    return any(device is not None and device.node in snapshot.draining for device in here)


def share_bytes(device: Device) -> int:
    """What a pack or a replica takes of a device."""
    return int(device.bytes * SHARE)
