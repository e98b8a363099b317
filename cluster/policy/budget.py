"""What one pack can still take, while a round fills it; made anew for every round and thrown away."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from polygraft.cluster.model import Backbone, Job, Limits
from polygraft.cluster.states import Reason
from polygraft.grafts.cost import StepCost

STATE_BYTES = 16  # a trainable parameter: fp32 master weight, gradient, two moments
FROZEN_BYTES = 4  # an element that is not trained
_LONGEST = 1 << 20  # tokens of an example where the positions have no end
# The limits that follow from a backbone's sizes, by the name of the size.
_SIZED: Mapping[str, str] = {
    "pack.max_jobs": "max_jobs",
    "pack.memory_bytes": "pack_bytes",
    "pack.max_rows": "max_rows",
}


def limits_of(limits: Limits, backbone: Backbone | None) -> Limits:
    """Those of the backbone's packs: as its sizes say where nothing was given."""
    sizes = backbone.sizes if backbone else ()
    sized = {limit: one.derived for one in sizes if (limit := _SIZED.get(one.name)) and limit not in limits.given}
    return replace(limits, **sized) if sized else limits  # type: ignore[arg-type]  # numbers all


class Budget:
    """Jobs and bytes left in a pack that has so many `jobs`, whose state takes so many `bytes`. The pack pays a full
    forward's activations once, each job its own state."""

    def __init__(self, limits: Limits, *, jobs: int = 0, bytes: int = 0) -> None:
        self._limited = limits.pack_bytes > 0
        self.jobs = limits.max_jobs - jobs
        self.bytes = (job_bytes(limits) or 0) - bytes

    def refusal(self, job: Job) -> Reason | None:
        """Why the job does not fit; None if it does."""
        if self.jobs < 1:
            return Reason.PACK_FULL
        return None if self.holds(job, self.jobs, self.bytes) else Reason.PACK_MEMORY

    def holds(self, job: Job, jobs: int, bytes: int) -> bool:
        """Whether the job would fit, were so many jobs and bytes left."""
        return jobs > 0 and (not self._limited or bytes >= bytes_of(job))

    def take(self, job: Job) -> None:
        """Count the job, whether or not it fits."""
        self.jobs -= 1
        self.bytes -= bytes_of(job)


def job_bytes(limits: Limits) -> int | None:
    """What an empty pack has for its jobs' state; None: as much as it takes."""
    return limits.pack_bytes - limits.max_rows * limits.row_bytes if limits.pack_bytes else None


@dataclass(frozen=True, slots=True)
class ExampleRoom:
    """What a pack of `most` bytes that holds one job alone has for a forward and backward over one of its examples."""

    cost: StepCost
    most: int

    @property
    def state(self) -> int:
        return state_bytes(self.cost.graft.parameters, self.cost.graft.frozen)

    @property
    def bytes(self) -> int:
        return max(0, self.most - self.state)

    @property
    def longest(self) -> int:
        """Tokens of the longest example that fits, below 2 where none does. The last one is only predicted and has no
        row."""
        return 1 + self.cost.longest(self.bytes, self.cost.graft.shape.positions or _LONGEST)

    def refusal(self, tokens: int) -> str | None:
        """Why an example of so many tokens does not fit, with the numbers; None where it does."""
        needs = self.cost.bytes([tokens - 1])
        if needs <= self.bytes:
            return None
        return (
            f"has {tokens} tokens, of which a step takes about {needs:,} bytes, {self.cost.row_bytes:,} a token and "
            f"more for attention; a pack has {self.bytes:,} for it: {self.most:,} less {self.state:,} of the job's own "
            "state; shorten it (max_length) or take a smaller peft"
        )


def state_bytes(trained: int, frozen: int) -> int:
    """Memory of a graft in training that has so many elements of each kind."""
    return STATE_BYTES * trained + FROZEN_BYTES * frozen


def bytes_of(job: Job) -> int:
    """Of the job's state; 0 while its size is not known."""
    return state_bytes(job.parameters or 0, job.frozen)
