"""What a pack asks of jobs that are trained in one way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from polygraft.grafts.runtime.stacks import Resident, Stacks
from polygraft.trainers.contribution import Contribution
from polygraft.trainers.micro_batch import MicroBatch
from polygraft.trainers.running import Outcome, RunningJob

Collect = Callable[[], Contribution]


class Lane(Protocol):
    """Jobs that ride in one forward, in the order in which they joined. The pack makes `stacks` of their residents
    whenever a job joins or leaves.

    A job has `copies` residents, one after the other, and each row of its micro-batches passes every one of them; a
    micro-batch names the first.
    """

    copies: int
    jobs: dict[str, RunningJob]
    stacks: Stacks

    def join(self, running: RunningJob) -> None: ...

    def leave(self, job: str) -> None:
        """Forget the job, if it is here: memory may have been short while it joined."""
        ...

    def residents(self, job: str) -> list[Resident]:
        """The job's graft as its rows meet it."""
        ...

    def forward(self, stacks: Stacks, micro_batches: Mapping[str, MicroBatch]) -> Sequence[Collect]:
        """One forward over micro-batches by job, whose residents are in `stacks`. What it gives collects for a job, in
        their order, what its step needs of the forward.

        Nothing is collected before, so what raises here can be tried again with others or alone.
        """
        ...

    def step(self, running: RunningJob, micro_batch: MicroBatch) -> Outcome:
        """The optimiser step of a job whose global batch is complete with this micro-batch, and its residents after
        it."""
        ...
