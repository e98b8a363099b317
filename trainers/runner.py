"""The pack: the jobs that share one backbone's forward and backward. Knows no Ray and no store; one call is one
packed step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from polygraft.grafts.init import initialise
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.process import give_back
from polygraft.grafts.runtime.slab import Slab
from polygraft.grafts.sources import Source
from polygraft.grafts.spec import SpecError
from polygraft.trainers.allocation import allocation_failed
from polygraft.trainers.evaluate import mean_loss
from polygraft.trainers.job import Sample, TrainJob
from polygraft.trainers.lanes.gradient import GradientLane
from polygraft.trainers.lanes.perturbation import PerturbationLane
from polygraft.trainers.lanes.protocol import Lane
from polygraft.trainers.micro_batch import MicroBatch
from polygraft.trainers.running import Failed, Outcome, RunningJob, Stepped


@dataclass(frozen=True, slots=True)
class PackStep:
    """What one packed step did."""

    number: int
    rows: int
    jobs: tuple[str, ...]
    stepped: tuple[Stepped, ...]
    failed: tuple[Failed, ...]
    seconds: float


class PackRunner:
    """Jobs join and leave between steps. A job's arithmetic depends on the job alone; the pack chooses only who rides
    together. Those that are trained in one way are a lane and share its forward."""

    def __init__(self, backbone: Backbone, *, max_rows: int = 768, clock: Callable[[], float] = time.monotonic) -> None:
        if not backbone.shape.causal:
            raise SpecError(f"backbone: {backbone.shape.sees}; a job learns to say the next token")
        self.backbone, self.max_rows, self._clock = backbone, max_rows, clock
        self.jobs: dict[str, RunningJob] = {}
        self.steps = 0
        self._gradient, self._perturbation = GradientLane(backbone), PerturbationLane(backbone)
        self._lanes: tuple[Lane, ...] = (self._gradient, self._perturbation)

    def admit(self, job: TrainJob, sources: Mapping[str, Source] | None = None) -> RunningJob:
        """Join as a new job at step 0, with starting values drawn from the job's seed, or made of the grafts that its
        spec names."""
        start = initialise(
            job.graft,
            self.backbone,
            seed=job.config.seed,
            samples=[sample.ids for sample in job.train],
            weights=[sample.weights for sample in job.train],
            sources=sources,
        )
        slab = Slab(job.graft, next(iter(start.values())).dtype, self.backbone.device)
        slab.fill(start)
        return self.restore(RunningJob(job, slab))

    def restore(self, running: RunningJob) -> RunningJob:
        """Join with the state of a checkpoint (or a fresh one). Raises ValueError for a job that is here already, or of
        another backbone's shape."""
        job = running.job
        if job.graft.shape != self.backbone.shape:
            raise ValueError(f"job {job.id} is for {job.graft.shape}, not {self.backbone.shape}")
        if job.id in self.jobs:
            raise ValueError(f"job {job.id} is already in the pack")
        self.jobs[job.id] = running
        lane: Lane = self._gradient if running.hooks.eps is None else self._perturbation
        lane.join(running)
        self._restack()
        return running

    def remove(self, job: str) -> RunningJob:
        """Leave the pack; the slab stays with the returned job."""
        running = self.jobs.pop(job)
        for lane in self._lanes:
            lane.leave(job)
        self._restack()
        return running

    def evaluate(self, job: str, samples: Iterable[Sample]) -> float:
        """Mean loss of a weighted token under the job's graft over `samples`."""
        running = self.jobs[job]
        return mean_loss(self.backbone, running.job.graft, running.slab.tensors, samples, self.max_rows)

    def step(self) -> PackStep:
        """One packed forward and backward over a micro-batch of as many jobs as fit, then the optimiser steps that
        are due."""
        begin = self._clock()
        riders = self._riders()
        outcomes: list[Outcome] = []
        for lane in self._lanes:
            outcomes += self._run(lane, {job: own for job, own in riders.items() if job in lane.jobs})
        self.steps += 1
        return PackStep(
            number=self.steps,
            rows=sum(lane.copies * riders[job].rows for lane in self._lanes for job in riders if job in lane.jobs),
            jobs=tuple(riders),
            stepped=tuple(outcome for outcome in outcomes if isinstance(outcome, Stepped)),
            failed=tuple(outcome for outcome in outcomes if isinstance(outcome, Failed)),
            seconds=self._clock() - begin,
        )

    def _riders(self) -> dict[str, MicroBatch]:
        """The next micro-batches of unfinished jobs, least served first, while they fit; the first always rides. In the
        order in which the jobs joined."""
        waiting = [
            (running, lane.copies, running.micro_batch(place * lane.copies))
            for lane in self._lanes
            for place, running in enumerate(lane.jobs.values())
            if not running.finished
        ]
        room = self.max_rows
        chosen: dict[str, MicroBatch] = {}
        for running, copies, micro_batch in sorted(waiting, key=lambda w: (w[0].served_rows, w[0].job.id)):
            rows = copies * micro_batch.rows
            if not chosen or rows <= room:
                chosen[running.job.id] = micro_batch
                room -= rows
        return {job: chosen[job] for job in self.jobs if job in chosen}

    def _run(self, lane: Lane, micro_batches: Mapping[str, MicroBatch]) -> Iterator[Outcome]:
        """What a forward of a lane led to. After an allocation failure whole micro-batches leave the forward, down to
        the job that fails alone."""
        if not micro_batches:
            return
        try:
            losses = lane.run(micro_batches)
        except (MemoryError, RuntimeError) as error:
            if not allocation_failed(error):
                raise
            names = list(micro_batches)
            if len(names) == 1:
                rows = micro_batches[names[0]].rows
                yield Failed(names[0], "out_of_memory", f"one micro-batch of {rows} rows does not fit")
                return
            for half in (names[: len(names) // 2], names[len(names) // 2 :]):
                yield from self._run(lane, {name: micro_batches[name] for name in half})
            return
        for (job, micro_batch), loss in zip(micro_batches.items(), losses, strict=True):
            running = self.jobs[job]
            if running.collect(micro_batch, loss, rows=lane.copies * micro_batch.rows):
                yield lane.step(running, micro_batch)

    def _restack(self) -> None:
        for lane in self._lanes:
            lane.stacks = self.backbone.stacks(())  # the old ones go before the new ones come
        for lane in self._lanes:
            lane.stacks = self.backbone.stacks(lane.residents(), trainable=True)
        give_back()
