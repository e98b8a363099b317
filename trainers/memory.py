"""What a pack's jobs may take of memory, by estimate: whether a job can ever fit, in which pieces, and who fits into
one forward."""

from __future__ import annotations

from dataclasses import replace

from polygraft.cluster.policy.budget import ExampleRoom, state_bytes
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.cost import StepCost
from polygraft.trainers.job import TrainJob
from polygraft.trainers.micro_batch import MicroBatch


class TooLarge(ValueError):
    """An example of the job that no pack could compute; the message has the numbers."""


class Room:
    """What one forward can still take; made anew for every step. The first to ask always fits."""

    def __init__(self, rows: int, bytes: int | None) -> None:
        self._rows, self._bytes, self._empty = rows, bytes, True
        self.taken = 0  # rows

    def takes(self, rows: int, bytes: int) -> bool:
        """Whether so much fits; from then on it is taken."""
        fits = self._empty or (rows <= self._rows and (self._bytes is None or bytes <= self._bytes))
        if fits:
            self._empty, self._rows, self.taken = False, self._rows - rows, self.taken + rows
            self._bytes = None if self._bytes is None else self._bytes - bytes
        return fits


class Memory:
    """`most` bytes for all jobs' state and one forward over a backbone whose numbers have `itemsize` bytes, and whose
    attention has the scores of `block` queries at a time; None: as much as it takes, and all of them."""

    def __init__(self, most: int | None, itemsize: int, block: int | None = None) -> None:
        self._most, self._itemsize, self._block = most, itemsize, block
        self._costs: dict[str, StepCost] = {}

    def longest(self, graft: BoundGraft) -> int | None:
        """Tokens of the longest example of a job that fits beside its own state; None: as many as it takes."""
        return None if self._most is None else self._room_for(graft, self._most).longest

    def fitted(self, job: TrainJob) -> TrainJob:
        """The job with micro-batches that fit beside its own state, in as few pieces as the memory and its own
        `micro_rows` allow: a function of the job and of `most`, whoever shares the pack. Raises TooLarge."""
        if self._most is None:
            return job
        room = self._room_for(job.graft, self._most)
        for name, samples in job.files.items():
            rows = ((max(one.rows for one in sample.each), -number) for number, sample in enumerate(samples, 1))
            longest, number = max(rows, default=(0, 0))
            if samples and (why := room.refusal(longest + 1)) is not None:
                raise TooLarge(f"{name}: example {-number} {why}")
        longest_rows = max(sample.rows for sample in job.train)
        micro_rows = room.cost.rows_within(room.bytes, job.config.micro_rows, longest_rows)
        return replace(job, config=replace(job.config, micro_rows=micro_rows))

    def join(self, job: TrainJob) -> None:
        self._costs[job.id] = self._cost(job.graft)

    def leave(self, job: str) -> None:
        self._costs.pop(job, None)

    def room(self, rows: int) -> Room:
        """Of a forward of at most so many rows beside the state of all that joined."""
        if self._most is None:
            return Room(rows, None)
        return Room(rows, self._most - sum(_state(cost.graft) for cost in self._costs.values()))

    def bytes(self, job: str, micro_batch: MicroBatch) -> int:
        """What the job's micro-batch takes in a forward."""
        return 0 if self._most is None else self._costs[job].bytes([sample.rows for sample in micro_batch.samples])

    def _cost(self, graft: BoundGraft) -> StepCost:
        return StepCost(graft, self._itemsize, self._block)

    def _room_for(self, graft: BoundGraft, most: int) -> ExampleRoom:
        return ExampleRoom(self._cost(graft), most)


def _state(graft: BoundGraft) -> int:
    return state_bytes(graft.parameters, graft.frozen)
