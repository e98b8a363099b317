"""Where a pack may start: the devices that are free, and sets of them that belong together."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from polygraft.cluster.model import Device, DeviceId, Snapshot


@dataclass(frozen=True, slots=True)
class DeviceSet:
    """Devices for one pack, and what it takes of each."""

    devices: tuple[DeviceId, ...]
    bytes: int


class FreeDevices:
    """Devices without a pack that have what a pack takes, as a round gives them out."""

    def __init__(self, snapshot: Snapshot) -> None:
        left = {device: one.bytes for device, one in snapshot.devices.items()}
        packs = [pack for pack in snapshot.packs.values() if not pack.final]
        held = {device for pack in packs for device in pack.devices}
        holders = [(pack.devices, pack.bytes) for pack in packs]
        holders += [(replica.devices, replica.bytes) for replica in snapshot.replicas.values()]
        for devices, bytes_ in holders:
            for device in devices:
                if device in left:
                    left[device] -= bytes_
        free = (one for one in snapshot.devices.values() if one.id not in held and left[one.id] >= pack_bytes(one))
        self._free = sorted(free, key=lambda one: (-left[one.id], one.id))

    @property
    def count(self) -> int:
        return len(self._free)

    def keep(self) -> None:
        """Give out no more in this round: what is free is not enough for who comes first."""
        self._free = []

    def take(self, count: int) -> DeviceSet | None:
        """`count` devices of one make: those with most memory left first, then by id, and if it can be on one node.
        None if there are not so many."""
        chosen = self._alike(count)
        if chosen is None:
            return None
        taken = {device.id for device in chosen}
        self._free = [device for device in self._free if device.id not in taken]
        return DeviceSet(tuple(device.id for device in chosen), min(map(pack_bytes, chosen)))

    def has(self, count: int) -> bool:
        """Whether `take` would find so many."""
        return self._alike(count) is not None

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


def pack_bytes(device: Device) -> int:
    """What a pack takes of a device: half, since the other half is a replica's."""
    return device.bytes // 2
