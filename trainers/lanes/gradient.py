"""Jobs that are trained by a backward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.stacks import Resident
from polygraft.trainers.micro_batch import MicroBatch
from polygraft.trainers.optim import adamw
from polygraft.trainers.optimiser_step import optimiser_step
from polygraft.trainers.packed_forward import forward_backward
from polygraft.trainers.running import Outcome, RunningJob


class GradientLane:
    """A `Lane` whose jobs have one resident each and are moved by AdamW."""

    copies = 1

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self.jobs: dict[str, RunningJob] = {}
        self.stacks = backbone.stacks(())

    def join(self, running: RunningJob) -> None:
        self.jobs[running.job.id] = running

    def leave(self, job: str) -> None:
        self.jobs.pop(job, None)

    def residents(self) -> list[Resident]:
        return [running.resident(running.slab.tensors) for running in self.jobs.values()]

    def run(self, micro_batches: Mapping[str, MicroBatch]) -> Iterator[float]:
        return self._collected(micro_batches, forward_backward(self._backbone, self.stacks, [*micro_batches.values()]))

    def _collected(self, micro_batches: Mapping[str, MicroBatch], losses: list[float]) -> Iterator[float]:
        """A job's gradient lies in its slab only until its step, so that it is there before the next job's."""
        gradients = self.stacks.gradients()
        for (job, micro_batch), loss in zip(micro_batches.items(), losses, strict=True):
            graft = micro_batch.graft
            self.jobs[job].slab.collect(self.stacks.gradient(graft, gradients[graft]))
            yield loss

    def step(self, running: RunningJob, micro_batch: MicroBatch) -> Outcome:
        done = optimiser_step(running, partial(_update, running))
        self.stacks.refresh(micro_batch.graft)
        return done


def _update(running: RunningJob, *, rate: float, norm: float, taken: int) -> None:
    adamw(running.slab, running.job.config, step=taken, learning_rate=rate, norm=norm, rates=running.hooks.rates)
