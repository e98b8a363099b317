"""Supernets, of which every step trains a subnet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from polygraft.grafts.elastic import cut
from polygraft.grafts.runtime.stacks import Resident, Stacks
from polygraft.trainers.contribution import Contribution
from polygraft.trainers.lanes.gradient import GradientLane
from polygraft.trainers.lanes.protocol import Collect
from polygraft.trainers.micro_batch import MicroBatch
from polygraft.trainers.packed_forward import forward_backward
from polygraft.trainers.running import Outcome, RunningJob


class ElasticLane(GradientLane):
    """A `Lane` whose jobs' residents are the subnets of the steps ahead: other grafts at each, over rows of the slab.
    What the subnet leaves out has the gradient 0."""

    def residents(self, job: str) -> list[Resident]:
        running = self.jobs[job]
        graft, whole = running.met, running.slab.tensors
        rows = {t.name: t.shape[0] for t in graft.tensors}
        names = cut(graft, running.job.graft)
        tensors = {name: whole[of][: rows[name]] for name, of in names.items()}
        return [Resident(job, graft, tensors, lambda: running.key)]

    def forward(self, stacks: Stacks, micro_batches: Mapping[str, MicroBatch]) -> Sequence[Collect]:
        losses = forward_backward(self._backbone, stacks, [*micro_batches.values()])
        gradients = stacks.gradients()

        def collect(job: str, graft: int, loss: float) -> Contribution:
            running, subnet = self.jobs[job], stacks.residents[graft].graft
            whole = torch.zeros_like(running.slab.master)
            into, names = running.slab.all_of(whole), cut(subnet, running.job.graft)
            parts = stacks.gradient(graft, gradients[graft])
            for tensor, part in zip(subnet.trained, parts, strict=True):
                if part is not None:
                    into[names[tensor.name]][: tensor.shape[0]].copy_(part.view(tensor.shape))
            return Contribution(loss, gradient=whole)

        parts = zip(micro_batches.items(), losses, strict=True)
        return [partial(collect, job, micro_batch.graft, loss) for (job, micro_batch), loss in parts]

    def step(self, running: RunningJob, micro_batch: MicroBatch) -> Outcome:
        done = self._stepped(running)
        own = [resident for job in self.jobs for resident in self.residents(job)]
        self.stacks = self._backbone.stacks(own, trainable=True)
        return done
