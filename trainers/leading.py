"""A pack over several devices: rank 0 leads, and the others hold the same jobs and follow it step by step.

Every rank has all jobs' state and takes every optimiser step, from the same gradients in the same order: nothing but
these travels, and all ranks hold the same bits. Only rank 0 reads commands, files and checkpoints, and writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from polygraft.grafts.runtime.process import allocation_failed
from polygraft.grafts.runtime.slab import Slab
from polygraft.trainers.failure import shared
from polygraft.trainers.job import TrainJob
from polygraft.trainers.ranks import Ranks
from polygraft.trainers.runner import PackRunner, PackStep
from polygraft.trainers.running import RunningJob


@dataclass(frozen=True, slots=True)
class Join:
    """A job with its state at a step boundary: its slab's tensors by name, and how far it is."""

    job: TrainJob
    slab: Mapping[str, Tensor]
    frozen: Mapping[str, Tensor]
    step: int
    tokens: int
    skipped: int
    chain: str
    served_rows: int

    @staticmethod
    def of(running: RunningJob) -> Join:
        slab = running.slab
        return Join(
            running.job,
            {name: getattr(slab, name).cpu() for name in ("master", "exp_avg", "exp_avg_sq")},
            {name: value.cpu() for name, value in slab.frozen.items()},
            running.step,
            running.tokens,
            running.skipped,
            running.chain,
            running.served_rows,
        )

    def running(self, runner: PackRunner) -> RunningJob:
        slab = Slab(self.job.graft, self.slab["master"].dtype, runner.backbone.device)
        for name, value in self.slab.items():
            getattr(slab, name).copy_(value)
        for name, value in self.frozen.items():
            slab.frozen[name].copy_(value)
        return RunningJob(
            self.job,
            slab,
            step=self.step,
            tokens=self.tokens,
            skipped=self.skipped,
            chain=self.chain,
            served_rows=self.served_rows,
        )


@dataclass(frozen=True, slots=True)
class Leave:
    job: str


@dataclass(frozen=True, slots=True)
class Step:
    max_rows: int


@dataclass(frozen=True, slots=True)
class Beat:
    """Say that you are alive."""


@dataclass(frozen=True, slots=True)
class Close:
    """The pack is over."""


Order = Join | Leave | Step | Beat | Close


class LeadingRunner(PackRunner):
    """Rank 0's: what it does to the pack, the others do, too."""

    def restore(self, running: RunningJob) -> RunningJob:
        """Raises MemoryError or RuntimeError, too, for what only another rank could not do; the job is out then."""
        joined = super().restore(running)
        self.ranks.tell(Join.of(joined))
        refused = next((said for said in self.ranks.share(_NOTHING) if said.text), None)
        if refused is not None:
            self.remove(running.job.id)
            raise MemoryError(refused.text) if refused.memory else RuntimeError(refused.text)
        return joined

    def remove(self, job: str) -> RunningJob:
        self.ranks.tell(Leave(job))
        return super().remove(job)

    def step(self) -> PackStep:
        self.ranks.tell(Step(self.max_rows))
        return super().step()


@dataclass(frozen=True, slots=True)
class _Refused:
    text: str = ""
    memory: bool = False


_NOTHING = _Refused()


def follow(runner: PackRunner, heartbeat: Callable[[], None]) -> None:
    """Do as rank 0 says until it closes the pack."""
    ranks: Ranks = runner.ranks
    while True:
        order = ranks.tell(_nothing())
        match order:
            case Join():
                ranks.share(_joined(runner, order))
            case Leave(job=job):
                if job in runner.jobs:
                    runner.remove(job)
            case Step(max_rows=max_rows):
                runner.max_rows = max_rows
                runner.step()
            case Beat():
                heartbeat()
            case Close():
                return


def _joined(runner: PackRunner, order: Join) -> _Refused:
    try:
        runner.restore(order.running(runner))
    except Exception as error:
        if shared(error):
            raise
        return _Refused(f"{type(error).__name__}: {error}", allocation_failed(error))
    return _NOTHING


def _nothing() -> Order | None:
    return None
