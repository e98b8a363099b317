"""What one pack can still take, while a round fills it; made anew for every round and thrown away."""

from __future__ import annotations

from collections.abc import Iterable

from polygraft.cluster.model import Job, Limits
from polygraft.cluster.states import Reason

STATE_BYTES = 16  # a trainable parameter: fp32 master weight, gradient, two moments
FROZEN_BYTES = 4  # an element that is not trained


class Budget:
    """Jobs and bytes left in a pack. The pack pays a full forward's activations once, each job its own state."""

    def __init__(self, limits: Limits, present: Iterable[Job] = ()) -> None:
        self._limited = limits.pack_bytes > 0
        self.jobs = limits.max_jobs
        self.bytes = limits.pack_bytes - limits.max_rows * limits.row_bytes
        for job in present:
            self.take(job)

    def refusal(self, job: Job) -> Reason | None:
        """Why the job does not fit; None if it does."""
        if self.jobs < 1:
            return Reason.PACK_FULL
        if self._limited and self.bytes < state_bytes(job):
            return Reason.PACK_MEMORY
        return None

    def take(self, job: Job) -> None:
        """Count the job, whether or not it fits."""
        self.jobs -= 1
        self.bytes -= state_bytes(job)


def state_bytes(job: Job) -> int:
    """Memory of the job's graft in training; 0 while its size is not known."""
    return STATE_BYTES * (job.parameters or 0) + FROZEN_BYTES * job.frozen
