"""What this machine has for devices, and into how many it is split."""

from __future__ import annotations

import os
from dataclasses import dataclass

from polygraft.cluster.settings import Settings
from polygraft.launch.ram import ram

PROCESSES_BYTES = 1 << 30  # Ray, the controller and the ingress, which are on no device
SEARCH_BYTES = 1 << 30  # a search's driver and the actors of its trials
SEARCHES_A_CORE = 4  # a driver computes while it asks for a trial, and waits else


@dataclass(frozen=True, slots=True)
class Machine:
    """`bytes` are what processes on its devices may take together, where these are shares of its memory."""

    cores: int
    bytes: int
    gpus: int

    @staticmethod
    def here(settings: Settings) -> Machine:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        gpus = 0 if settings.device == "cpu" else _gpus()
        return Machine(cores, max(0, ram() - PROCESSES_BYTES), gpus)

    def devices(self, asked: int | None) -> int:
        """How many devices it is: one a GPU, else what was asked for, else one."""
        return self.gpus or asked or 1

    @property
    def searches(self) -> int:
        """How many may run at once, with at most half of the memory."""
        return max(1, min(SEARCHES_A_CORE * self.cores, self.bytes // (2 * SEARCH_BYTES)))

    def refusal(self, asked: int, least: int) -> str | None:
        """Why it cannot be `asked` devices, each of which needs `least` bytes."""
        if self.gpus:
            same = f"this machine has {self.gpus} GPUs, each of which is a device"
            return None if asked == self.gpus else f"devices: {asked} are asked for, and {same}; leave it out"
        if asked > self.cores:
            return (
                f"devices: {asked} are asked for, and this machine has {self.cores} cores, of which a device needs "
                f"one; ask for at most {self.cores}"
            )
        if self.bytes // asked < least:
            most = min(self.cores, self.bytes // least)
            advice = f"ask for at most {most}" if most else "choose a smaller backbone"
            return (
                f"devices: of {asked}, each would have {self.bytes / asked / 2**30:.1f} GiB, and the backbone in a "
                f"pack and in a replica takes {least / 2**30:.1f}; {advice}"
            )
        return None


def _gpus() -> int:
    """As Ray counts them, since it is Ray that hands them out: without those that CUDA_VISIBLE_DEVICES hides."""
    from ray._private.accelerators import get_accelerator_manager_for_resource

    manager = get_accelerator_manager_for_resource("GPU")
    assert manager is not None, "Ray knows GPUs"
    there = manager.get_current_node_num_accelerators()
    visible = manager.get_current_process_visible_accelerator_ids()
    return there if visible is None else min(there, len(visible))
