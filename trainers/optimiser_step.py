"""The optimiser step that a job takes when its global batch is complete, whatever its gradient was made of."""

from __future__ import annotations

from math import isfinite
from typing import Protocol

from polygraft.trainers.failure import Failed
from polygraft.trainers.optim import grad_norm
from polygraft.trainers.running import Outcome, RunningJob, Stepped


class Update(Protocol):
    """Move the master weights by the collected gradient, whose norm this is; `taken` counts the optimiser's steps since
    its moments were 0."""

    def __call__(self, *, rate: float, norm: float, taken: int) -> None: ...


def optimiser_step(running: RunningJob, update: Update) -> Outcome:
    """Let the job's method have the collected gradient, `update` its weights and go on to the next global batch; a step
    whose loss or gradient is not finite is skipped."""
    job, step, hooks, slab = running.job, running.step, running.hooks, running.slab
    hooks.before_step()
    phase = hooks.phase(step, job.steps_total)
    rate, norm = job.learning_rate(step, phase), grad_norm(slab)
    if step == phase.start:
        slab.forget()
    usable = isfinite(norm) and isfinite(running.loss)
    if usable:
        update(rate=rate, norm=norm, taken=phase.index(step))
        hooks.after_step(step, job.steps_total)
    slab.clear()
    done = Stepped(job.id, step + 1, running.loss, norm, rate, running.tokens, not usable)
    running.advance(skipped=not usable)
    if running.hopeless:
        return Failed(
            job.id,
            "non_finite_loss",
            f"loss or gradient was not finite in {running.skipped} steps in a row; lower learning_rate",
        )
    return done
