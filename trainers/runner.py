"""The pack: the jobs that share one backbone's forward and backward. Knows no Ray and no store; one call is one
packed step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from polygraft.grafts.init import initialise
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.process import give_back
from polygraft.grafts.runtime.slab import Slab
from polygraft.grafts.runtime.stacks import Stacks
from polygraft.grafts.sources import Source
from polygraft.grafts.spec import SpecError
from polygraft.trainers.contribution import Contribution, Part, Rider, everyones, failed_anywhere
from polygraft.trainers.evaluate import Judgement, judge
from polygraft.trainers.failure import Failed, failure, shared
from polygraft.trainers.job import Sample, TrainJob
from polygraft.trainers.lanes.elastic import ElasticLane
from polygraft.trainers.lanes.gradient import GradientLane
from polygraft.trainers.lanes.perturbation import PerturbationLane
from polygraft.trainers.lanes.protocol import Collect, Lane
from polygraft.trainers.memory import Memory
from polygraft.trainers.micro_batch import MicroBatch
from polygraft.trainers.packed_forward import bare_forward
from polygraft.trainers.ranks import Alone, Ranks
from polygraft.trainers.running import Outcome, RunningJob, Stepped
from polygraft.trainers.untrained import Untrained, adds_nothing


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
    together. Those that are trained in one way are a lane and share its forward.

    `underway` is told before each forward whose rows are in it, and at which step each job is.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        max_rows: int = 768,
        max_bytes: int | None = None,
        ranks: Ranks | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """A forward has at most `max_rows` rows, and takes at most `max_bytes` together with the jobs' state, on each
        of the `ranks`."""
        if not backbone.shape.causal and backbone.shape.head_kind is None:
            raise SpecError(f"backbone: {backbone.shape.sees}; a job learns to say the next token, or a text's label")
        self.backbone, self.max_rows, self._clock = backbone, max_rows, clock
        self.memory = Memory(max_bytes, backbone.dtype.itemsize, backbone.score_block)
        self.underway: Callable[[Mapping[str, int]], None] = lambda _: None
        self.ranks: Ranks = ranks or Alone()
        self.jobs: dict[str, RunningJob] = {}
        self.steps = 0
        self._elsewhere: Mapping[str, int] = {}
        self._untrained = Untrained()
        self._fallen: dict[str, Exception] = {}
        self._stale = False  # whether jobs came or went since the stacks were made
        self._new: list[str] = []  # those that came
        self._gradient, self._perturbation = GradientLane(backbone), PerturbationLane(backbone)
        self._elastic = ElasticLane(backbone)
        self._lanes: tuple[Lane, ...] = (self._gradient, self._perturbation, self._elastic)

    def admit(self, job: TrainJob, sources: Mapping[str, Source] | None = None) -> RunningJob:
        """Join as a new job at step 0, with starting values drawn from the job's seed, or made of the grafts that its
        spec names."""
        headed = bool(job.graft.head)  # what reads the gradient of a loss at the start reads that of the texts then
        start = initialise(
            job.graft,
            self.backbone,
            seed=job.config.seed,
            samples=[sample.ids[:-1] if headed else sample.ids for sample in job.train],
            weights=[] if headed else [sample.weights for sample in job.train],
            sources=sources,
        )
        slab = Slab(job.graft, next(iter(start.values())).dtype, self.backbone.device)
        slab.fill(start)
        return self.restore(RunningJob(job, slab))

    def restore(self, running: RunningJob) -> RunningJob:
        """Join with the state of a checkpoint (or a fresh one). Raises ValueError for a job that is here already, of
        another backbone's shape or with a token that the backbone does not have; whatever is raised, the job is out."""
        job = running.job
        if job.graft.shape != self.backbone.shape:
            raise ValueError(f"job {job.id} is for {job.graft.shape}, not {self.backbone.shape}")
        if job.id in self.jobs:
            raise ValueError(f"job {job.id} is already in the pack")
        job.check_tokens()
        if not job.graft.head and not self.backbone.shape.causal:
            raise SpecError(f"backbone: {self.backbone.shape.sees}; a job there classifies texts")
        if job.graft.head and running.hooks.eps is not None:
            raise SpecError(f"{job.graft.spec.method}: a job without a backward trains no classifier")
        lane: Lane = self._gradient if running.hooks.eps is None else self._perturbation
        lane = self._elastic if running.hooks.resized else lane
        try:
            lane.join(running)
            self.memory.join(job)
            self.jobs[job.id] = running
            self._stacked(lane, (job.id,))  # what its own tensors raise they raise now
            self._unstack()
            self._new.append(job.id)
            if self.ranks.size > 1:  # all have to know whom one of them cannot stack before they step
                self._restack()
        except Exception:
            self._leave(job.id)
            raise
        if (error := self._fallen.pop(job.id, None)) is not None:
            self._leave(job.id)
            raise error
        return running

    def remove(self, job: str) -> RunningJob:
        """Leave the pack; the slab stays with the returned job."""
        running = self.jobs[job]
        self._leave(job)
        return running

    def evaluate(self, job: str, samples: Iterable[Sample]) -> float:
        """Mean loss of a weighted token under the job's graft over `samples`."""
        return self._judged(job, tuple(samples)).loss

    def held_out(self, job: str) -> Judgement | None:
        """What the job's validation file says of its graft; None where it has none."""
        samples = self.jobs[job].job.held_out
        return self._judged(job, samples) if samples else None

    def untrained(self, job: str) -> Judgement | None:
        """The same as it joins: computed once for all jobs of a validation file whose grafts add nothing yet."""
        running = self.jobs[job]
        if running.step or not running.job.held_out or not adds_nothing(running.job.graft, running.slab.tensors):
            return self.held_out(job)
        samples = running.job.held_out
        return self._untrained.judged(samples, self.max_rows, lambda: self._judged(job, samples))

    def tested(self, job: str) -> Judgement | None:
        """The same of its test file."""
        samples = self.jobs[job].job.test
        return self._judged(job, samples) if samples else None

    def step(self) -> PackStep:
        """One packed forward and backward on each rank over micro-batches of as many jobs as fit, then the optimiser
        steps that are due. What raises is pinned on its job, which fails; the others' bits are those of a step without
        it."""
        begin = self._clock()
        if self._stale:
            self.underway({job: running.step for job, running in self.jobs.items()})
            self._restack()
        outcomes: list[Outcome] = [
            failure(job, f"{self.jobs[job].at}, its tensors", error) for job, error in self._fallen.items()
        ]
        self._fallen.clear()
        riders, unreadable = self._riders()
        outcomes += unreadable
        for lane in self._lanes:
            outcomes += self._run(lane, [rider for rider in riders if rider.job in lane.jobs])
        copies = {job: lane.copies for lane in self._lanes for job in lane.jobs}
        failed = [outcome for outcome in outcomes if isinstance(outcome, Failed)]
        self.steps += 1
        return PackStep(
            number=self.steps,
            rows=sum(copies[rider.job] * rider.micro_batch.rows for rider in riders),
            jobs=tuple(dict.fromkeys(rider.job for rider in riders)),
            stepped=tuple(outcome for outcome in outcomes if isinstance(outcome, Stepped)),
            failed=tuple(failed_anywhere(self.ranks, failed)),
            seconds=self._clock() - begin,
        )

    def _judged(self, job: str, samples: Sequence[Sample]) -> Judgement:
        running = self.jobs[job]
        return judge(self.backbone, running.job.graft, running.slab.tensors, samples, self.max_rows)

    def _riders(self) -> tuple[list[Rider], list[Failed]]:
        """The next micro-batches of unfinished jobs, least served first, while they fit, of each job one on a rank; the
        first always rides. In the order in which the jobs joined; and the jobs that have none to give."""
        waiting: list[tuple[RunningJob, int, list[MicroBatch]]] = []
        failed: list[Failed] = []
        for lane in self._lanes:
            for place, running in enumerate(lane.jobs.values()):
                if running.finished:
                    continue
                try:
                    near = range(min(self.ranks.size, running.micro_batches_left))
                    next_ones = [running.micro_batch(place * lane.copies, one) for one in near]
                    waiting.append((running, lane.copies, next_ones))
                except Exception as error:
                    failed.append(failure(running.job.id, f"{running.at}, its next micro-batch", error))
        rooms = [self.memory.room(self.max_rows) for _ in range(self.ranks.size)]
        chosen: dict[str, list[Rider]] = {}
        for running, copies, next_ones in sorted(waiting, key=lambda w: (w[0].served_rows, w[0].job.id)):
            job = running.job.id
            ranks = list(range(self.ranks.size))
            for ahead, micro_batch in enumerate(next_ones):
                needed = copies * micro_batch.rows, copies * self.memory.bytes(job, micro_batch)
                order = sorted(ranks, key=lambda rank: (rooms[rank].taken, rank))
                found = next((rank for rank in order if rooms[rank].takes(*needed)), None)
                if found is None:
                    break
                ranks.remove(found)
                chosen.setdefault(job, []).append(Rider(job, ahead, found, micro_batch))
        return [rider for job in self.jobs for rider in chosen.get(job, ())], failed

    def _run(self, lane: Lane, riders: Sequence[Rider]) -> Iterator[Outcome]:
        """What a forward of a lane led to, on all ranks: those of a job add what its micro-batches gave in their
        order. One that has lost a micro-batch never completes its global batch."""
        mine = {rider.job: rider.micro_batch for rider in riders if rider.rank == self.ranks.rank}
        self._elsewhere = {rider.job: self.jobs[rider.job].step for rider in riders if rider.rank != self.ranks.rank}
        parts = self._parts(lane, mine)
        if self.ranks.size > 1:
            like = {job: running.slab.master for job, running in lane.jobs.items()}
            everybodys = everyones(self.ranks, riders, dict(parts), like)
        else:
            by_job = {rider.job: rider for rider in riders}
            everybodys = ((by_job[job], part) for job, part in parts)
        for rider, part in everybodys:
            outcome = part if isinstance(part, Failed) else self._collected(lane, rider, part)
            if outcome is not None:
                yield outcome

    def _parts(self, lane: Lane, micro_batches: Mapping[str, MicroBatch]) -> Iterator[tuple[str, Part]]:
        """What each micro-batch gives, one after the other, so that no gradient but the newest is kept. After an
        error, for lack of memory or another, whole micro-batches leave the forward, down to the job that fails
        alone."""
        if not micro_batches:
            return
        collects = self._forward(lane, micro_batches)
        if isinstance(collects, Failed):
            yield collects.job, collects
        elif collects is None:
            names = list(micro_batches)
            for half in (names[: len(names) // 2], names[len(names) // 2 :]):
                yield from self._parts(lane, {name: micro_batches[name] for name in half})
        else:
            for job, collect in zip(micro_batches, collects, strict=True):
                try:
                    part: Part = collect()
                except Exception as error:
                    part = failure(job, f"{self.jobs[job].at}, gradient and optimiser", error)
                yield job, part

    def _forward(self, lane: Lane, micro_batches: Mapping[str, MicroBatch]) -> Sequence[Collect] | Failed | None:
        """None where it raised with several jobs in it. One that raises with a single job is tried again beside no
        other's tensors. Raises what the bare backbone raises, too."""
        self.underway({**self._elsewhere, **{job: self.jobs[job].step for job in micro_batches}})
        try:
            return lane.forward(lane.stacks, micro_batches)
        except Exception as error:  # it holds what the forward made: nothing is tried again before it is gone
            if shared(error):
                raise
        give_back()  # what this one took, to allocators beside ours, too: oneDNN maps memory for its kernels by itself
        if len(micro_batches) > 1:
            return None
        ((job, micro_batch),) = micro_batches.items()
        try:
            own = self.backbone.stacks(lane.residents(job), trainable=True)
            return lane.forward(own, {job: replace(micro_batch, graft=0)})
        except Exception as error:
            failed = failure(job, f"{self.jobs[job].at}, forward and backward of {micro_batch.rows} rows", error)
        give_back()
        bare_forward(self.backbone)
        return failed

    def _collected(self, lane: Lane, rider: Rider, part: Contribution) -> Outcome | None:
        """What a job's part of a forward led to, which is nobody else's."""
        running, micro_batch = self.jobs[rider.job], rider.micro_batch
        try:
            if running.collect(micro_batch, part, rows=lane.copies * micro_batch.rows):
                return lane.step(running, micro_batch)
        except Exception as error:
            return failure(running.job.id, f"{running.at}, gradient and optimiser", error)
        return None

    def _leave(self, job: str) -> None:
        self.jobs.pop(job, None)
        self.memory.leave(job)
        self._fallen.pop(job, None)
        for lane in self._lanes:
            lane.leave(job)
        self._unstack()
        if not self.jobs:
            give_back()

    def _unstack(self) -> None:
        """The stacks go, and are made again at the next step: who comes or goes between two of them is stacked once."""
        self._stale = True
        for lane in self._lanes:
            lane.stacks = self.backbone.stacks(())

    def _restack(self) -> None:
        """Stacks of all residents, but for jobs whose own tensors cannot be stacked, or of those that are new the last
        ones where all together cannot: they fall out of their lanes."""
        for lane in self._lanes:
            while True:
                try:
                    lane.stacks = self._stacked(lane, lane.jobs)
                    break
                except Exception as error:
                    if shared(error) or not self._let_fall(lane, error):
                        raise
        self._stale = False
        self._new.clear()
        give_back()

    def _let_fall(self, lane: Lane, error: Exception) -> bool:
        """Whether there are jobs that what all of them raised is due to."""
        fallen: dict[str, Exception] = {}
        for job in lane.jobs:
            try:
                self._stacked(lane, (job,))
            except Exception as own:
                if shared(own):
                    raise
                fallen[job] = own.with_traceback(None)
        if not fallen and (new := [job for job in self._new if job in lane.jobs]):
            fallen[new[-1]] = error.with_traceback(None)
        for job in fallen:
            lane.leave(job)
        self._fallen |= fallen
        return bool(fallen)

    def _stacked(self, lane: Lane, jobs: Iterable[str]) -> Stacks:
        return self.backbone.stacks([one for job in jobs for one in lane.residents(job)], trainable=True)
