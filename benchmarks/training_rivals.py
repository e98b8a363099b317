"""What a user would pick in place of a pack: PEFT's ways to train several jobs. Apart from our own arm, which is not to
carry PEFT."""

from __future__ import annotations

from itertools import cycle

import torch
from assignment import Task
from child import Round, timed
from material import TRAIN_TOKENS, Material
from peft_models import adapt, load, name
from safetensors.torch import load_file
from torch import Tensor
from training_jobs import adamw, loss_of

_WARM_STEPS = 3


class _Peft:
    """The bare backbone as transformers loads it."""

    def __init__(self, given: Task) -> None:
        self._task, self._material = given, Material.read(given.folder)

    def load(self) -> str:
        self._base = load(self._material, self._task.variant)
        return self._task.variant


class InTurn(_Peft):
    """PEFT, one job after the other: one adapter and one optimiser, started afresh for every job."""

    def warm(self) -> None:
        self._model = adapt(self._base, self._material, self._task.jobs[:1], trainable=True)
        self._trained = {key: value for key, value in self._model.named_parameters() if value.requires_grad}
        self._optimiser = adamw(self._trained.values())
        self._job(self._task.jobs[0], _WARM_STEPS)

    def round(self) -> Round:
        return timed(lambda: sum(self._job(job, self._task.size) for job in self._task.jobs))

    def _job(self, job: int, steps: int) -> int:
        self._restart(job)
        samples = cycle(self._material.samples[job])
        for _ in range(steps):
            torch.autograd.backward(loss_of(self._model, next(samples)))
            self._optimiser.step()
            self._optimiser.zero_grad()
        return steps * TRAIN_TOKENS

    @torch.no_grad()
    def _restart(self, job: int) -> None:
        """The job's starting values and an optimiser without a past, in the memory that is there."""
        start = load_file(self._material.graft_folder(job) / "adapter_model.safetensors")
        own = f".{name(self._task.jobs[0])}."
        for key, value in self._trained.items():
            value.copy_(start[key.replace(own, ".")])
        for state in self._optimiser.state.values():
            for part in state.values():
                if isinstance(part, Tensor):
                    part.zero_()


class Switching(_Peft):
    """PEFT, one backbone with every job's adapter, switching between them step by step."""

    def warm(self) -> None:
        jobs = self._task.jobs
        self._model = adapt(self._base, self._material, jobs, trainable=True)
        self._optimisers = {}
        for job in jobs:
            self._model.set_adapter(name(job))
            self._optimisers[job] = adamw(self._model.parameters())
        self._samples = {job: cycle(self._material.samples[job]) for job in jobs}
        self._steps(1)

    def round(self) -> Round:
        return timed(lambda: self._steps(self._task.size))

    def _steps(self, count: int) -> int:
        for _ in range(count):
            for job, optimiser in self._optimisers.items():
                self._model.set_adapter(name(job))
                torch.autograd.backward(loss_of(self._model, next(self._samples[job])))
                optimiser.step()
                optimiser.zero_grad()
        return count * len(self._optimisers) * TRAIN_TOKENS
