"""What the controller needs of the world: processes that hold packs, and the devices they run on."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from polygraft.cluster.model import Backbone, Device, JobId, Pack, PackId, Replica, ReplicaId
from polygraft.cluster.size import Size

DEVICE = "device"  # Ray's custom resource; a node declares one for every device it has


class PackDied(Exception):
    """A pack's worker ended too often; `suspects` are the jobs that it may have ended of."""

    def __init__(self, why: str, suspects: Collection[JobId]) -> None:
        super().__init__(why, suspects)  # both, or it does not travel between processes
        self.why, self.suspects = why, frozenset(suspects)

    def __str__(self) -> str:
        return self.why


@dataclass(frozen=True, slots=True)
class PackEnd:
    """A pack's process is over; `error` says how it failed, None that it ended as it should; `suspects` are the jobs
    that it may have failed of."""

    pack: PackId
    error: str | None
    suspects: Collection[JobId] = ()


class Effects(Protocol):
    """Carries out what needs a process. Nothing here waits for a pack: `ended` is asked again and again."""

    def open_pack(self, pack: Pack) -> None:
        """Start the pack's process; its worker says PackOpened, a failure is told by `ended`."""
        ...

    def close_pack(self, pack: PackId) -> None:
        """Free what the pack's process holds, by force if it still runs; nothing for an unknown pack."""
        ...

    def alive(self) -> Collection[PackId]:
        """Packs whose process was started here and not closed."""
        ...

    def ended(self) -> Sequence[PackEnd]:
        """Packs whose process is over and that are not closed yet."""
        ...

    def serve(self, backbones: Collection[Backbone]) -> None:
        """Have these held by replicas, and no others; asked again and again, and never waits for a replica."""
        ...

    def devices(self) -> Collection[Device]:
        """The devices there are now."""
        ...

    def sizes(self, backbone: Backbone, devices: Collection[Device]) -> tuple[Size, ...]:
        """Of the backbone's packs and replicas on these devices; () where nobody says. Raises ValueError that says why
        it fits none."""
        ...

    def draining(self) -> Collection[str]:
        """The nodes that are to go."""
        ...

    def gone(self, replicas: Collection[Replica]) -> Collection[ReplicaId]:
        """Those of the open replicas whose process is not there any more."""
        ...
