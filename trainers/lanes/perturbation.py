"""Jobs that are trained by forward passes alone (MeZO)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.stacks import Resident, Stacks
from polygraft.trainers.contribution import Contribution
from polygraft.trainers.lanes.protocol import Collect
from polygraft.trainers.mezo import Perturbation
from polygraft.trainers.micro_batch import MicroBatch
from polygraft.trainers.optim import sgd
from polygraft.trainers.optimiser_step import optimiser_step
from polygraft.trainers.packed_forward import forward_losses
from polygraft.trainers.running import Outcome, RunningJob


class PerturbationLane:
    """A `Lane` whose jobs have two residents each, theta + eps z and theta - eps z, and are moved along z by plain
    SGD. There is no backward, and nothing is kept for one."""

    copies = 2

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self.jobs: dict[str, RunningJob] = {}
        self.stacks = backbone.stacks(())
        self._perturbations: dict[str, Perturbation] = {}

    def join(self, running: RunningJob) -> None:
        assert running.hooks.eps is not None, "a job that has a backward"
        self.jobs[running.job.id] = running
        self._perturbations[running.job.id] = perturbation = Perturbation(running.slab, running.hooks.eps)
        perturbation.move(running.key)

    def leave(self, job: str) -> None:
        self.jobs.pop(job, None)
        self._perturbations.pop(job, None)

    def residents(self, job: str) -> list[Resident]:
        return [self.jobs[job].resident(point) for point in self._perturbations[job].tensors]

    def forward(self, stacks: Stacks, micro_batches: Mapping[str, MicroBatch]) -> Sequence[Collect]:
        twice = [replace(one, graft=one.graft + copy) for one in micro_batches.values() for copy in range(self.copies)]
        losses = forward_losses(self._backbone, stacks, twice)

        def collect(normaliser: float, one: float, other: float) -> Contribution:
            above, below = one / normaliser, other / normaliser
            return Contribution((above + below) / 2, difference=above - below)

        parts = zip(micro_batches.values(), losses[::2], losses[1::2], strict=True)
        return [partial(collect, own.normaliser, one, other) for own, one, other in parts]

    def step(self, running: RunningJob, micro_batch: MicroBatch) -> Outcome:
        perturbation = self._perturbations[running.job.id]
        perturbation.collect(running.key, running.difference)
        done = optimiser_step(running, partial(_update, running))
        perturbation.move(running.key)
        for copy in range(self.copies):
            self.stacks.refresh(micro_batch.graft + copy)
        return done


def _update(running: RunningJob, *, rate: float, norm: float, taken: int) -> None:
    sgd(running.slab, running.job.config, learning_rate=rate, rates=running.hooks.rates)
