"""Where a pack may start: the devices that are free, and sets of them that belong together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from polygraft.cluster.model import Backbone, Device, DeviceId, Pack, Snapshot
from polygraft.cluster.policy.standing import Kind

SHARE = 0.5  # of a device, for a pack or for a replica, unless a setting says how many bytes

Use = Literal["pack", "serve"]


@dataclass(frozen=True, slots=True)
class DeviceSet:
    """Devices for one pack, and what it takes of each."""

    devices: tuple[DeviceId, ...]
    bytes: int


class FreeDevices:
    """Devices without a pack that have what a pack of a backbone takes, as a round gives them out."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._left: Mapping[DeviceId, int] | None = None
        self._found: dict[str, list[Device]] = {}
        self._taken: set[DeviceId] = set()
        self._kept = False

    def count(self, kind: Kind) -> int:
        """How many there are for such a pack."""
        return len(self._free(kind.backbone))

    def keep(self) -> None:
        """Give out no more in this round: what is free is not enough for who comes first."""
        self._kept = True

    def take(self, kind: Kind) -> DeviceSet | None:
        """As many devices of one make as the kind wants: those with most memory left first, then by id, and if it can
        be on one node. None if there are not so many."""
        chosen = self._alike(kind)
        if chosen is None:
            return None
        self._taken |= {device.id for device in chosen}
        self._found = {
            name: [device for device in free if device.id not in self._taken] for name, free in self._found.items()
        }
        backbone = self._snapshot.backbones.get(kind.backbone)
        return DeviceSet(
            tuple(device.id for device in chosen), min(taken_bytes("pack", backbone, device) for device in chosen)
        )

    def has(self, kind: Kind) -> bool:
        """Whether `take` would find them."""
        return self._alike(kind) is not None

    def _free(self, backbone: str) -> list[Device]:
        """Looked for when somebody first asks: most rounds nobody does."""
        if self._kept:
            return []
        if backbone not in self._found:
            if self._left is None:
                self._left = _left(self._snapshot)
            record = self._snapshot.backbones.get(backbone)
            left = {id_: bytes_ for id_, bytes_ in self._left.items() if id_ not in self._taken}
            free = (self._snapshot.devices[id_] for id_ in left)
            fits = [device for device in free if left[device.id] >= taken_bytes("pack", record, device)]
            self._found[backbone] = sorted(fits, key=lambda one: (-left[one.id], one.id))
        return self._found[backbone]

    def _alike(self, kind: Kind) -> list[Device] | None:
        free, count = self._free(kind.backbone), kind.devices
        if len(free) < count:
            return None
        if count == 1:
            return free[:1]
        makes: dict[tuple[str, int], list[Device]] = defaultdict(list)
        for device in free:
            makes[device.kind, device.cores].append(device)
        for _, alike in sorted(makes.items(), reverse=True):  # cuda before cpu, many cores before few
            nodes: dict[str, list[Device]] = defaultdict(list)
            for device in alike:
                nodes[device.node].append(device)
            whole = next((here for _, here in sorted(nodes.items()) if len(here) >= count), alike)
            if len(whole) >= count:
                return whole[:count]
        return None


def _left(snapshot: Snapshot) -> Mapping[DeviceId, int]:
    """What replicas leave of the devices without a pack, but for those of nodes that drain."""
    held = {device for pack in snapshot.packs.values() if not pack.final for device in pack.devices}
    left = {
        id_: device.bytes
        for id_, device in snapshot.devices.items()
        if id_ not in held and device.node not in snapshot.draining
    }
    for replica in snapshot.replicas.values():
        for device in left.keys() & set(replica.devices):
            left[device] -= replica.bytes
    return left


def is_leaving(pack: Pack, snapshot: Snapshot) -> bool:
    """Whether the node of one of its devices drains."""
    here = (snapshot.devices.get(device) for device in pack.devices)
    return any(device is not None and device.node in snapshot.draining for device in here)


def share_bytes(device: Device) -> int:
    """What a pack or a replica takes of a device by itself."""
    return int(device.bytes * SHARE)


def taken_bytes(use: Use, backbone: Backbone | None, device: Device) -> int:
    """What a pack or a replica of the backbone takes of a device: what its sizes were made for, on a smaller device
    that came later, too, which may be too small for it. Without sizes half of the device."""
    sized = sized_bytes(use, backbone)
    return share_bytes(device) if sized is None else sized


def sized_bytes(use: Use, backbone: Backbone | None) -> int | None:
    """What the sizes of a backbone's packs or replicas were made for; None where it has none."""
    sizes = backbone.sizes if backbone else ()
    return next((one.used for one in sizes if one.name == f"{use}.bytes"), None)
