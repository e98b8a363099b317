"""Faults of one job of a pack, each at another place of its step: what its rows, tensors or files meet there raises."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats import native
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.route import Rows
from polygraft.grafts.runtime.rows import RowBuilder
from polygraft.grafts.runtime.slab import Slab
from polygraft.grafts.runtime.stacks import Stacks
from polygraft.trainers import checkpoint, packed_forward
from polygraft.trainers import runner as runner_module
from polygraft.trainers import worker as worker_module
from polygraft.trainers.hooks import Hooks
from polygraft.trainers.lanes import gradient, perturbation
from polygraft.trainers.running import RunningJob

BAD = ("bitfit", "bitfit + mezo(0.05)")  # the job, in either lane
_EVALUATED = 1  # its held-out loss is asked for before its first step
SAID = "what only this job does"
Patch = pytest.MonkeyPatch
Fault = Callable[[Patch, int, int], None]


class OwnFault(Exception):
    """Of no kind that anything else raises."""

    def __init__(self) -> None:
        super().__init__(SAID)


def in_its_micro_batch(patch: Patch, token: int, after: int) -> None:
    _raise(patch, RunningJob, "micro_batch", lambda running, *_: _is(running.job.graft), after)


def in_its_rows(patch: Patch, token: int, after: int) -> None:
    _raise(patch, RowBuilder, "add", lambda _, tokens, **__: token in tokens, _EVALUATED + after)


def in_the_forward(patch: Patch, token: int, after: int) -> None:
    _raise(patch, Backbone, "forward", lambda _, rows, *__: token in rows.ids.tolist(), _EVALUATED + after)


def in_the_loss(patch: Patch, token: int, after: int) -> None:
    for name, before in (("losses_and_gradient", 0), ("token_losses", 0)):
        _raise(patch, packed_forward, name, lambda _, __, targets, *___: token in targets.tolist(), before + after)


def in_the_backward(patch: Patch, token: int, after: int) -> None:
    real, calls = Backbone.forward, count()

    def raising(_: Tensor) -> None:
        raise OwnFault

    def forward(backbone: Backbone, rows: Rows, *given: Any) -> Tensor:
        hidden = real(backbone, rows, *given)
        if hidden.requires_grad and token in rows.ids.tolist() and next(calls) >= after:
            hidden.register_hook(raising)
        return hidden

    patch.setattr(Backbone, "forward", forward)


def in_its_gradient(patch: Patch, token: int, after: int) -> None:
    _raise(patch, Stacks, "gradient", lambda stacks, graft, _: _is(stacks.residents[graft].graft), after)


def in_its_penalty(patch: Patch, token: int, after: int) -> None:
    _raise(patch, Hooks, "before_step", lambda hooks: _holds(hooks._slab), after)


def in_the_middle_of_its_optimiser(patch: Patch, token: int, after: int) -> None:
    """Which leaves its tensors spoilt."""
    for lane, name in ((gradient, "adamw"), (perturbation, "sgd")):
        real, calls = getattr(lane, name), count()

        def update(slab: Slab, *given: Any, real: Any = real, calls: Any = calls, **more: Any) -> None:
            real(slab, *given, **more)
            if _holds(slab) and next(calls) >= after:
                slab.master.fill_(torch.nan)
                raise OwnFault

        patch.setattr(lane, name, update)


def from_then_on_in_its_operands(patch: Patch, token: int, after: int) -> None:
    """After a step, and whenever a job joins or leaves."""
    joined = 2  # it has two residents in one of the lanes
    _raise(
        patch, Stacks, "refresh", lambda stacks, graft: _is(stacks.residents[graft].graft), joined + _EVALUATED + after
    )


def in_its_checkpoint(patch: Patch, token: int, after: int) -> None:
    patch.setattr(worker_module, "CHECKPOINT_S", 0.0)
    _raise(patch, checkpoint, "save", lambda _, running, *__, **___: _is(running.job.graft), after)


def in_its_evaluation(patch: Patch, token: int, after: int) -> None:
    _raise(patch, runner_module, "judge", lambda _, graft, *__: _is(graft), _EVALUATED)


def in_its_publication(patch: Patch, token: int, after: int) -> None:
    _raise(patch, native, "save", lambda _, graft, *__, **___: _is(graft), 0)


FAULTS: Mapping[str, Fault] = {
    fault.__name__: fault
    for fault in (
        in_its_micro_batch,
        in_its_rows,
        in_the_forward,
        in_the_loss,
        in_the_backward,
        in_its_gradient,
        in_its_penalty,
        in_the_middle_of_its_optimiser,
        from_then_on_in_its_operands,
        in_its_checkpoint,
        in_its_evaluation,
        in_its_publication,
    )
}


def spoil_weights(patch: Patch, after: int) -> None:
    """The job's optimiser leaves NaN after so many steps."""
    for lane, name in ((gradient, "adamw"), (perturbation, "sgd")):
        real, calls = getattr(lane, name), count()

        def update(slab: Slab, *given: Any, real: Any = real, calls: Any = calls, **more: Any) -> None:
            real(slab, *given, **more)
            if _holds(slab) and next(calls) >= after:
                slab.master.fill_(torch.nan)

        patch.setattr(lane, name, update)


def _raise(patch: Patch, owner: object, name: str, its: Callable[..., bool], after: int) -> None:
    """What is called `name` raises where it is the job's, from its call number `after` on."""
    real, calls = getattr(owner, name), count()

    def raising(*given: Any, **more: Any) -> Any:
        if its(*given, **more) and next(calls) >= after:
            raise OwnFault
        return real(*given, **more)

    patch.setattr(owner, name, raising)


def _is(graft: BoundGraft) -> bool:
    return graft.spec.method in BAD


def _holds(slab: Slab) -> bool:
    """Whether it is the job's: of all in the pack only this one trains biases alone."""
    return all(tensor.part == "b" for tensor in slab.trained)
