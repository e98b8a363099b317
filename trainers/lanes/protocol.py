"""What a pack asks of jobs that are trained in one way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from polygraft.grafts.runtime.stacks import Resident, Stacks
from polygraft.trainers.micro_batch import MicroBatch
from polygraft.trainers.running import Outcome, RunningJob


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

    def residents(self) -> list[Resident]:
        """The jobs' grafts as their rows meet them."""
        ...

    def run(self, micro_batches: Mapping[str, MicroBatch]) -> Iterator[float]:
        """One forward over micro-batches by job: their normalised losses, in order. By the time one is handed out, what
        its job's step needs of the forward is collected, and nothing yet of the jobs after it.

        Raises what the forward raises at once, before anything is collected.
        """
        ...

    def step(self, running: RunningJob, micro_batch: MicroBatch) -> Outcome:
        """The optimiser step of a job whose global batch is complete with this micro-batch, and its residents after
        it."""
        ...
