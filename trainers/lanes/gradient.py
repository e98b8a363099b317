"""Jobs that are trained by a backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.stacks import Resident, Stacks
from polygraft.trainers.contribution import Contribution
from polygraft.trainers.lanes.protocol import Collect
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

    def residents(self, job: str) -> list[Resident]:
        running = self.jobs[job]
        return [running.resident(running.slab.tensors)]

    def forward(self, stacks: Stacks, micro_batches: Mapping[str, MicroBatch]) -> Sequence[Collect]:
        losses = forward_backward(self._backbone, stacks, [*micro_batches.values()])
        gradients = stacks.gradients()

        def collect(job: str, micro_batch: MicroBatch, loss: float) -> Contribution:
            graft, head = micro_batch.graft, micro_batch.head
            parts = [*stacks.gradient(graft, gradients[graft]), *(head.gradients if head else ())]
            return Contribution(loss, gradient=self.jobs[job].slab.joined(parts))

        parts = zip(micro_batches.items(), losses, strict=True)
        return [partial(collect, job, micro_batch, loss) for (job, micro_batch), loss in parts]

    def step(self, running: RunningJob, micro_batch: MicroBatch) -> Outcome:
        done = self._stepped(running)
        self.stacks.refresh(micro_batch.graft)
        return done

    def _stepped(self, running: RunningJob) -> Outcome:
        return optimiser_step(running, partial(_update, running))


def _update(running: RunningJob, *, rate: float, norm: float, taken: int) -> None:
    adamw(running.slab, running.job.config, step=taken, learning_rate=rate, norm=norm, rates=running.hooks.rates)
