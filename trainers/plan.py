"""What the processes of a pack are told."""

from __future__ import annotations

from dataclasses import dataclass

from polygraft.cluster.model import DeviceKind
from polygraft.grafts.runtime.pretrained import Quantise


@dataclass(frozen=True, slots=True, kw_only=True)
class PackPlan:
    """What a pack's processes are told; plain values, since Train carries them to its workers. `nodes` are those of its
    devices, all of which are of one `kind` and have as many `cores`."""

    pack: str
    nodes: tuple[str, ...]
    kind: DeviceKind
    cores: int
    backbone_folder: str
    store_url: str
    data: str
    device: str = "auto"
    dtype: str = "auto"
    quantise: Quantise | None = None
    max_rows: int = 768
    micro_rows: int = 128
    max_bytes: int = 0  # of the jobs' state and one forward; 0 = as much as they take
    step_floor_s: float = 0.0
    placed_s: float = 30.0  # for Ray to find room for the processes, where the store says that there is
    silent_s: float = 30.0  # after which a worker that Train asks in vain is dead
