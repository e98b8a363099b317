"""The pack: the jobs that share one backbone's forward and backward. Knows no Ray and no store; one call is one
packed step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256

from torch import Tensor

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.init import initialise
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.process import allocation_failed, give_back
from polygraft.grafts.runtime.slab import Slab
from polygraft.grafts.runtime.stacks import Resident, Stacks
from polygraft.grafts.sources import Source
from polygraft.grafts.spec import SpecError
from polygraft.trainers import forward
from polygraft.trainers.forward import MicroBatch
from polygraft.trainers.hooks import Hooks
from polygraft.trainers.job import Sample, TrainJob
from polygraft.trainers.mezo import Perturbation
from polygraft.trainers.optim import adamw, grad_norm, sgd

PATIENCE = 5  # non-finite steps in a row that end a job; all of a shorter one


@dataclass(slots=True)
class RunningJob:
    """A job in the pack and how far it is; everything but `slab` is rebuilt from (job, step) after a restart.

    `micro` counts the micro-batches of global batch `step` that are already collected, with the `loss` so far, and for
    a job without a backward the `difference` of the losses on both sides of its tensors; `chain` is the digest of all
    sample numbers that went into completed steps, the identity of the work done.
    """

    job: TrainJob
    slab: Slab
    step: int = 0
    micro: int = 0
    loss: float = 0.0
    difference: float = 0.0
    tokens: int = 0
    skipped: int = 0
    chain: str = ""
    loss_before: float | None = None
    served_rows: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def finished(self) -> bool:
        return self.step >= self.job.steps_total


@dataclass(frozen=True, slots=True)
class Stepped:
    """A job completed optimiser step `step`: its loss over the global batch, gradient norm and learning rate."""

    job: str
    step: int
    loss: float
    norm: float
    learning_rate: float
    tokens: int
    skipped: bool


@dataclass(frozen=True, slots=True)
class Failed:
    """A job that cannot go on, by its own fault; the others do."""

    job: str
    code: str
    message: str


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
    together. Jobs that are trained by forward passes alone ride together in a forward that keeps nothing for a
    backward."""

    def __init__(self, backbone: Backbone, *, max_rows: int = 768, clock: Callable[[], float] = time.monotonic) -> None:
        if not backbone.shape.causal:
            raise SpecError(f"backbone: {backbone.shape.sees}; a job learns to say the next token")
        self.backbone, self.max_rows, self._clock = backbone, max_rows, clock
        self.jobs: dict[str, RunningJob] = {}
        self._hooks: dict[str, Hooks] = {}
        self._probes: dict[str, Perturbation] = {}
        self.steps = 0
        self._stacks: Stacks = backbone.stacks(())
        self._perturbed: Stacks = self._stacks

    def admit(self, job: TrainJob, sources: Mapping[str, Source] | None = None) -> RunningJob:
        """Join as a new job at step 0, with starting values drawn from the job's seed, or made of the grafts that its
        spec names."""
        start = initialise(
            job.graft,
            self.backbone,
            seed=job.recipe.seed,
            samples=[sample.ids for sample in job.train],
            weights=[sample.weights for sample in job.train],
            sources=sources,
        )
        slab = Slab(job.graft, next(iter(start.values())).dtype, self.backbone.device)
        slab.fill(start)
        return self.restore(RunningJob(job, slab))

    def restore(self, active: RunningJob) -> RunningJob:
        """Join with the state of a checkpoint (or a fresh one). Raises ValueError for a job that is here already, or of
        another backbone's shape."""
        if active.job.graft.shape != self.backbone.shape:
            raise ValueError(f"job {active.job.id} is for {active.job.graft.shape}, not {self.backbone.shape}")
        if active.job.id in self.jobs:
            raise ValueError(f"job {active.job.id} is already in the pack")
        self.jobs[active.job.id] = active
        hooks = self._hooks[active.job.id] = Hooks(active.job.graft, active.slab)
        if hooks.eps is not None:
            self._probes[active.job.id] = probe = Perturbation(active.slab, hooks.eps)
            probe.move(_key(active.job, active.step))
        self._restack()
        return active

    def remove(self, job: str) -> RunningJob:
        """Leave the pack; the slab stays with the returned job."""
        active = self.jobs.pop(job)
        self._hooks.pop(job, None)  # none where memory was short while it joined
        self._probes.pop(job, None)
        self._restack()
        return active

    def evaluate(self, job: str, samples: Iterable[Sample]) -> float:
        """Mean loss of a weighted token under the job's graft over `samples`."""
        active = self.jobs[job]
        return mean_loss(self.backbone, active.job.graft, active.slab.tensors, samples, self.max_rows)

    def step(self) -> PackStep:
        """One packed forward and backward over a micro-batch of as many jobs as fit, then the optimiser steps that
        are due."""
        begin = self._clock()
        riders = self._riders()
        shares = {active.job.id: self._share(active) for active in riders}
        apart = ({job: share for job, share in shares.items() if (job in self._probes) == p} for p in (False, True))
        outcomes = tuple(outcome for together in apart for outcome in self._run(together))
        stepped = tuple(outcome for outcome in outcomes if isinstance(outcome, Stepped))
        failed = tuple(outcome for outcome in outcomes if isinstance(outcome, Failed))
        self.steps += 1
        rows = sum(self._rows(self.jobs[job], share) for job, share in shares.items())
        return PackStep(self.steps, rows, tuple(shares), stepped, failed, self._clock() - begin)

    def _riders(self) -> list[RunningJob]:
        """Unfinished jobs, least served first, while their next micro-batch fits; the first always rides."""
        room = self.max_rows
        riders: list[RunningJob] = []
        waiting = [active for active in self.jobs.values() if not active.finished]
        for active in sorted(waiting, key=lambda a: (a.served_rows, a.job.id)):
            rows = self._rows(active, self._share(active))
            if not riders or rows <= room:
                riders.append(active)
                room -= rows
        order = {job: index for index, job in enumerate(self.jobs)}
        return sorted(riders, key=lambda a: order[a.job.id])

    def _share(self, active: RunningJob) -> MicroBatch:
        job = active.job
        numbers = job.micro_batches(active.step)[active.micro]
        return MicroBatch(
            graft=self._peers(job.id).index(job.id),
            prefix_length=job.graft.prefix_length,
            samples=tuple(job.train[i] for i in numbers),
            numbers=numbers,
            normaliser=job.batch_weight(active.step),
            key=_key(job, active.step) if job.graft.draws else None,
            virtual_length=job.graft.virtual_length,
        )

    def _rows(self, active: RunningJob, share: MicroBatch) -> int:
        """Rows of a forward that a share takes."""
        return share.rows * (2 if active.job.id in self._probes else 1)

    def _peers(self, job: str) -> list[str]:
        """The jobs that are trained as this one is, in the order of their residents."""
        return [name for name in self.jobs if (name in self._probes) == (job in self._probes)]

    def _run(self, shares: Mapping[str, MicroBatch]) -> Iterator[Stepped | Failed]:
        """What a forward over `shares`, all with a backward or all without, led to. A job's gradient is collected and
        used before the next job's is.

        After an allocation failure whole micro-batches leave the forward, down to the job that fails alone.
        """
        if not shares:
            return
        pairs: list[tuple[float, float]] = []
        losses: list[float] = []
        try:
            if shares.keys() <= self._probes.keys():
                pairs = forward.probe(self.backbone, self._perturbed, tuple(shares.values()))
            else:
                losses = forward.train(self.backbone, self._stacks, tuple(shares.values()))
        except (MemoryError, RuntimeError) as error:
            if not allocation_failed(error):
                raise
            names = list(shares)
            if len(names) == 1:
                message = f"one micro-batch of {shares[names[0]].rows} rows does not fit"
                yield Failed(names[0], "out_of_memory", message)
                return
            for half in (names[: len(names) // 2], names[len(names) // 2 :]):
                yield from self._run({name: shares[name] for name in half})
            return
        for (job, share), (above, below) in zip(shares.items(), pairs):
            self.jobs[job].difference += above - below
            if (outcome := self._collected(self.jobs[job], share, (above + below) / 2)) is not None:
                yield outcome
        if pairs:
            return
        gradients = self._stacks.gradients()
        for (job, share), loss in zip(shares.items(), losses, strict=True):
            active = self.jobs[job]
            active.slab.collect(self._stacks.gradient(share.graft, gradients[share.graft]))
            if (outcome := self._collected(active, share, loss)) is not None:
                yield outcome

    def _collected(self, active: RunningJob, share: MicroBatch, loss: float) -> Stepped | Failed | None:
        """Account for a collected micro-batch; take the optimiser step when the global batch is complete."""
        active.loss += loss
        active.micro += 1
        active.served_rows += self._rows(active, share)
        active.tokens += share.tokens
        if active.micro < len(active.job.micro_batches(active.step)):
            return None
        step, job, hooks = active.step, active.job, self._hooks[active.job.id]
        probe = self._probes.get(job.id)
        if probe is not None:
            probe.collect(_key(job, step), active.difference)
        hooks.before_step()
        phase = hooks.phase(step, job.steps_total)
        rate, norm = job.learning_rate(step, phase), grad_norm(active.slab)
        if step == phase.start:
            active.slab.forget()
        usable = math.isfinite(norm) and math.isfinite(active.loss)
        if usable:
            if probe is not None:
                sgd(active.slab, job.recipe, learning_rate=rate, rates=hooks.rates)
            else:
                taken = phase.index(step)
                adamw(active.slab, job.recipe, step=taken, learning_rate=rate, norm=norm, rates=hooks.rates)
            hooks.after_step(step, job.steps_total)
        active.skipped = 0 if usable else active.skipped + 1
        active.slab.clear()
        done = Stepped(job.id, step + 1, active.loss, norm, rate, active.tokens, not usable)
        active.chain = sha256(f"{active.chain}/{job.batch(step)}".encode()).hexdigest()[:16]
        active.step, active.micro, active.loss, active.difference = step + 1, 0, 0.0, 0.0
        if probe is not None:
            probe.move(_key(job, active.step))
            self._perturbed.refresh(2 * share.graft)
            self._perturbed.refresh(2 * share.graft + 1)
        else:
            self._stacks.refresh(share.graft)
        if active.skipped >= min(PATIENCE, job.steps_total):
            return Failed(
                job.id,
                "non_finite_loss",
                f"loss or gradient was not finite in {active.skipped} steps in a row; lower learning_rate",
            )
        return done

    def _residents(self, active: RunningJob) -> list[Resident]:
        """The job's graft as its rows meet it: once, or at both points around its tensors."""
        job, probe = active.job, self._probes.get(active.job.id)
        points = (active.slab.tensors,) if probe is None else probe.tensors
        return [Resident(job.id, job.graft, point, lambda: _key(job, active.step)) for point in points]

    def _restack(self) -> None:
        self._stacks = self._perturbed = self.backbone.stacks(())  # the old ones go before the new ones come
        whole = {name: self._residents(active) for name, active in self.jobs.items()}
        apart = ([r for name, own in whole.items() if (name in self._probes) == p for r in own] for p in (False, True))
        self._stacks, self._perturbed = (self.backbone.stacks(residents, trainable=True) for residents in apart)
        give_back()


def mean_loss(
    backbone: Backbone, graft: BoundGraft, values: Mapping[str, Tensor], samples: Iterable[Sample], max_rows: int = 768
) -> float:
    """Mean loss of a weighted token under a graft over `samples`, at most `max_rows` rows at a time."""
    stacks = backbone.stacks((Resident("evaluated", graft, values),))
    total = weight = 0.0
    for piece in _pieces(samples, max_rows, graft.virtual_length):
        numbers = tuple(range(len(piece)))
        share = MicroBatch(0, graft.prefix_length, piece, numbers, 1.0, virtual_length=graft.virtual_length)
        total += forward.evaluate(backbone, stacks, (share,))[0]
        weight += sum(sample.weight for sample in piece)
    return total / weight


def _key(job: TrainJob, step: int) -> int:
    """32-bit signed hash of (job seed, step)."""
    return int.from_bytes(sha256(f"{job.recipe.seed}/{step}".encode()).digest()[:4], "big", signed=True)


def _pieces(samples: Iterable[Sample], limit: int, virtual: int) -> Iterable[tuple[Sample, ...]]:
    piece: list[Sample] = []
    for sample in samples:
        if piece and sum(s.rows + virtual for s in piece) + sample.rows + virtual > limit:
            yield tuple(piece)
            piece = []
        piece.append(sample)
    if piece:
        yield tuple(piece)
