"""A job in a pack: how far it is, and what a step led to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256

from torch import Tensor

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.elastic import subnet
from polygraft.grafts.runtime.slab import Slab
from polygraft.grafts.runtime.stacks import Resident
from polygraft.trainers.contribution import Contribution
from polygraft.trainers.evaluate import Judgement
from polygraft.trainers.failure import Failed
from polygraft.trainers.head import ClassHead
from polygraft.trainers.hooks import Hooks
from polygraft.trainers.job import TrainJob
from polygraft.trainers.micro_batch import MicroBatch

CARRIED = ("step", "tokens", "skipped", "chain", "served_rows")  # beside the slab, all of its future
FORKED = (
    "learning_rate",
    "schedule",
    "warmup_ratio",
    "weight_decay",
    "max_grad_norm",
    "betas",
    "eps",
    "until",
    "micro_rows",
)
PATIENCE = 5  # non-finite steps in a row that end a job; all of a shorter one


@dataclass(slots=True)
class RunningJob:
    """A job in the pack and how far it is; everything but `slab` is rebuilt from (job, step) after a restart.

    `micro` counts the micro-batches of global batch `step` that are already collected, with the `loss` so far, and for
    a job without a backward the `difference` of the losses on both sides of its tensors; `chain` is the digest of all
    sample numbers that went into completed steps, the identity of the work done; `before` is what the validation file
    said of the graft at its start; `device_class` is of the device that computed the steps, where a checkpoint says so.
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
    before: Judgement | None = None
    device_class: str | None = None
    served_rows: int = 0
    hooks: Hooks = field(init=False)

    def __post_init__(self) -> None:
        self.hooks = Hooks(self.job.graft, self.slab)

    @property
    def finished(self) -> bool:
        return self.step >= self.job.last_step

    @property
    def at(self) -> str:
        """The step ahead, in words."""
        return f"step {min(self.step + 1, self.job.last_step)} of {self.job.last_step}"

    @property
    def key(self) -> int:
        """What the random numbers of the step ahead hang on."""
        return self.job.key(self.step)

    @property
    def met(self) -> BoundGraft:
        """The graft as the rows of the step ahead meet it: of a supernet the subnet that is drawn for it."""
        return subnet(self.job.graft, self.key) if self.hooks.resized else self.job.graft

    def resident(self, tensors: Mapping[str, Tensor]) -> Resident:
        """The job's graft at `tensors`."""
        return Resident(self.job.id, self.job.graft, tensors, lambda: self.key)

    @property
    def micro_batches_left(self) -> int:
        """Of the global batch, without those that are collected."""
        return len(self.job.micro_batches(self.step)) - self.micro

    def micro_batch(self, graft: int, ahead: int = 0) -> MicroBatch:
        """The next one, or one that is so many `ahead` of it in the same global batch, through resident `graft`."""
        job, met = self.job, self.met
        numbers = job.micro_batches(self.step)[self.micro + ahead]
        return MicroBatch(
            graft=graft,
            prefix_length=met.prefix_length,
            samples=tuple(job.train[i] for i in numbers),
            numbers=numbers,
            normaliser=job.batch_weight(self.step),
            key=self.key if met.draws else None,
            virtual_length=met.virtual_length,
            head=ClassHead(job.graft.head, self.slab.tensors) if job.graft.head else None,
        )

    def collect(self, micro_batch: MicroBatch, part: Contribution, *, rows: int) -> bool:
        """Take in what a micro-batch gave, which took so many `rows` of a forward; whether the global batch is
        complete."""
        self.loss += part.loss
        self.difference += part.difference
        if part.gradient is not None:
            self.slab.collect(part.gradient)
        self.micro += 1
        self.served_rows += rows
        self.tokens += micro_batch.tokens
        return self.micro == len(self.job.micro_batches(self.step))

    def advance(self, *, skipped: bool) -> None:
        """To the next global batch."""
        self.skipped = self.skipped + 1 if skipped else 0
        self.chain = sha256(f"{self.chain}/{self.job.batch(self.step)}".encode()).hexdigest()[:16]
        self.step, self.micro, self.loss, self.difference = self.step + 1, 0, 0.0, 0.0

    @property
    def hopeless(self) -> bool:
        """Whether too many steps in a row were skipped."""
        return self.skipped >= min(PATIENCE, self.job.last_step)

    def forked(self, job: TrainJob) -> RunningJob:
        """Another job that goes on from here, between two steps: with a copy of the slab's row (weights, moments, what
        is not trained), of the counters, and so of the place in the data. Of how it learns it may differ in FORKED;
        with the same values it computes this one's bits. Raises ValueError where it differs in anything else."""
        assert not self.micro, "a job is forked between two of its steps"
        same = {name: getattr(self.job.config, name) for name in FORKED}
        for what, mine, its in (
            ("graft", self.job.graft, job.graft),
            ("training data", self.job.train, job.train),
            ("batches", self.job.config, replace(job.config, **same)),
        ):
            if mine != its:
                raise ValueError(f"job {job.id} has another {what} than {self.job.id}, which it goes on from")
        slab = Slab(job.graft, self.slab.master.dtype, self.slab.master.device)
        slab.copy(self.slab)
        kept = {name: getattr(self, name) for name in CARRIED}
        return RunningJob(job, slab, before=self.before, device_class=self.device_class, **kept)


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


Outcome = Stepped | Failed
