"""A graft whose logits become another model's: BitDelta's second stage, which trains its scales alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import torch
from torch import Tensor
from torch.nn import functional as F

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.calibrate import backward, hidden_states
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.stacks import Resident, Stacks
from polygraft.grafts.spec import SpecError

STEPS, BATCH, LEARNING_RATE = 200, 4, 1e-4  # section 4.1: 800 samples, four at a time, by Adam


@dataclass(frozen=True, slots=True)
class Distilled:
    """The graft's tensors, and the loss of the first and of the last batch."""

    tensors: Mapping[str, Tensor]
    first: float
    last: float


def distil(  # noqa: PLR0913
    graft: BoundGraft,
    values: Mapping[str, Tensor],
    backbone: Backbone,
    teacher: Backbone,
    samples: Sequence[Sequence[int]],
    *,
    steps: int = STEPS,
    batch: int = BATCH,
    learning_rate: float = LEARNING_RATE,
    told: Callable[[int], None] = lambda done: None,
) -> Distilled:
    """Train the graft's trained tensors so that its logits become the teacher's: Adam on the mean of |Z_teacher(x) -
    Z(x)|^2 over the logits and tokens of each sample x, and over the samples of a batch (Liu et al. 2024, arXiv
    2402.10193, section 3.1, scale distillation).

    `samples` are token ids, gone through in their order and again; nothing is learned of them but what the teacher
    says of their tokens. `told` hears how many steps are done.
    """
    own = {name: value.clone() for name, value in values.items()}
    stacks = backbone.stacks((Resident("distilled", graft, own),), trainable=True)
    trained = [own[tensor.name] for tensor in graft.trained]
    optimiser = torch.optim.Adam(trained, lr=learning_rate)
    losses: list[float] = []
    for step, chosen in enumerate(islice(_batches(samples, batch), steps)):
        for leaf in stacks.leaves():
            leaf.grad = None
        losses.append(sum(_approach(backbone, stacks, teacher, ids, 1 / len(chosen)) for ids in chosen))
        found = stacks.gradient(0, stacks.gradients()[0])
        for tensor, gradient in zip(trained, found, strict=True):
            tensor.grad = None if gradient is None else gradient.view(tensor.shape)
        optimiser.step()
        stacks.refresh(0)
        told(step + 1)
    return Distilled(own, losses[0], losses[-1])


def _batches(samples: Sequence[Sequence[int]], batch: int) -> Iterator[Sequence[Sequence[int]]]:
    """Batch after batch without end."""
    if not samples:
        raise SpecError("examples: there is none to distil on")
    return cycle([samples[first : first + batch] for first in range(0, len(samples), batch)])


def _approach(backbone: Backbone, stacks: Stacks, teacher: Backbone, ids: Sequence[int], share: float) -> float:
    """One sample's share of the batch's loss; its gradient is added to that of the stacks."""
    with torch.no_grad():
        wanted = teacher.logits(hidden_states(teacher, ids, trainable=False))
    with torch.enable_grad():
        hidden = hidden_states(backbone, ids, trainable=True, stacks=stacks)
        return float(backward(backbone, hidden, lambda logits: share * F.mse_loss(logits, wanted.to(logits))))
