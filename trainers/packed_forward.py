"""One packed forward: the rows of several jobs' samples in one batch, and the losses and gradients that come back per
job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from polygraft.grafts.runtime.attention import WholeSequences
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.route import Input, Rows
from polygraft.grafts.runtime.rows import RowBuilder
from polygraft.grafts.runtime.shared_rows import SharedRows, shared
from polygraft.grafts.runtime.stacks import Stacks
from polygraft.trainers.loss import judged_tokens, losses_and_gradient, token_losses
from polygraft.trainers.micro_batch import MicroBatch
from polygraft.trainers.scores import Answer


@dataclass(frozen=True, slots=True)
class _Packed:
    """`states`: hidden states are read as they are, not by the backbone's own head. `counted` [n] are the rows that
    something is learned from, with their `targets` [n] on the backbone's device and their `weights` [n] on the CPU;
    `bounds` are each micro-batch's part of these."""

    rows: Rows
    attention: WholeSequences | SharedRows
    states: bool
    counted: Tensor
    targets: Tensor
    weights: Tensor
    bounds: tuple[tuple[int, int], ...]


def forward_backward(backbone: Backbone, stacks: Stacks, micro_batches: Sequence[MicroBatch]) -> list[float]:
    """Forward and backward of all micro-batches; gradients stay in the stacks. Returns their losses, normalised.

    A micro-batch's loss and gradient are functions of it alone (docs/architecture.md, row invariance).
    """
    packed = _packed(backbone, micro_batches)
    for leaf in stacks.leaves():
        leaf.grad = None
    hidden = _hidden(backbone, stacks, packed)
    factors = packed.weights.clone()
    for micro_batch, (start, stop) in zip(micro_batches, packed.bounds, strict=True):
        factors[start:stop] /= micro_batch.normaliser
    read = hidden.detach()[packed.counted]
    losses, gradient = _learned(backbone, packed, micro_batches, read, factors.to(hidden.device))
    into = torch.zeros_like(hidden)
    into[packed.counted] = gradient
    if hidden.requires_grad:
        torch.autograd.backward(hidden, into)
    return _sums(losses, factors, packed.bounds)


@torch.inference_mode()
def forward_losses(backbone: Backbone, stacks: Stacks, micro_batches: Sequence[MicroBatch]) -> list[float]:
    """Summed weighted loss of each micro-batch, not normalised, and without dropout where its key is None. There is no
    backward, and nothing is kept for one."""
    packed = _packed(backbone, micro_batches)
    hidden = backbone.forward(packed.rows, stacks, packed.attention)
    losses = token_losses(backbone, hidden[packed.counted], packed.targets)
    return _sums(losses.to(packed.weights.dtype), packed.weights, packed.bounds)


@torch.inference_mode()
def forward_answers(
    backbone: Backbone, stacks: Stacks, micro_batches: Sequence[MicroBatch]
) -> tuple[list[float], list[Answer]]:
    """The summed weighted losses of one graft's micro-batches as `forward_losses` has them, and what each of their
    samples came to, which is a function of the sample alone. With a head there is one."""
    packed = _judged(backbone, stacks, micro_batches)
    read = _hidden(backbone, stacks, packed)[packed.counted]
    head = micro_batches[0].head
    judged = judged_tokens(backbone, read, packed.targets) if head is None else head.judged(read, packed.targets)
    losses, likeliest = judged
    losses = losses.to(packed.weights.dtype)
    totals = _sums(losses, packed.weights, packed.bounds)
    learned = (sample.learned for micro_batch in micro_batches for sample in micro_batch.samples)
    bounds = list(pairwise(accumulate(learned, initial=0)))
    targets, guesses = packed.targets.cpu().tolist(), likeliest.cpu().tolist()
    sums = zip(bounds, _sums(losses, packed.weights, bounds), strict=True)
    return totals, [
        Answer(loss, tuple(targets[start:stop]), tuple(guesses[start:stop])) for (start, stop), loss in sums
    ]


@torch.inference_mode()
def forward_logits(backbone: Backbone, stacks: Stacks, micro_batch: MicroBatch) -> Tensor:
    """The labels' logits, [samples, labels], of a micro-batch with a head."""
    assert micro_batch.head is not None, "a micro-batch of texts to classify"
    packed = _judged(backbone, stacks, [micro_batch])
    hidden = _hidden(backbone, stacks, packed)
    return micro_batch.head.logits(hidden[packed.counted])


@torch.inference_mode()
def bare_forward(backbone: Backbone) -> None:
    """One row through the backbone and its head, without any job's graft: raises where the fault is no job's."""
    builder = RowBuilder()
    builder.add((0,))
    backbone.logits(backbone.forward(builder.rows(), backbone.stacks(()), builder.attention(backbone.shape)))


def _hidden(backbone: Backbone, stacks: Stacks, packed: _Packed) -> Tensor:
    forward = backbone.states if packed.states else backbone.forward
    return forward(packed.rows, stacks, packed.attention)


def _learned(
    backbone: Backbone, packed: _Packed, micro_batches: Sequence[MicroBatch], read_ND: Tensor, factors_N: Tensor
) -> tuple[Tensor, Tensor]:
    """`losses_and_gradient` of the counted rows: tokens through the backbone's head, labels through their job's."""
    targets = packed.targets
    headed = [(one.head, slice(*own)) for one, own in zip(micro_batches, packed.bounds, strict=True) if one.head]
    if not headed:
        return losses_and_gradient(backbone, read_ND, targets, factors_N)
    losses, gradient = torch.empty_like(factors_N), torch.empty_like(read_ND)
    for head, own in headed:
        losses[own], gradient[own] = head.losses_and_gradient(read_ND[own], targets[own], factors_N[own])
    texts = [range(*own) for one, own in zip(micro_batches, packed.bounds, strict=True) if one.head is None]
    if texts:
        at = torch.tensor([place for own in texts for place in own], device=read_ND.device)
        losses[at], gradient[at] = losses_and_gradient(backbone, read_ND[at], targets[at], factors_N[at])
    return losses, gradient


def _sums(losses: Tensor, factors: Tensor, bounds: Sequence[tuple[int, int]]) -> list[float]:
    """Each micro-batch's weighted loss; here the host waits for the device."""
    found = losses.cpu()
    return [float((found[start:stop] * factors[start:stop]).sum()) for start, stop in bounds]


def _judged(backbone: Backbone, stacks: Stacks, micro_batches: Sequence[MicroBatch]) -> _Packed:
    """One graft's micro-batches without dropout, whose samples share the rows that they begin with where it allows."""
    packed = _packed(backbone, micro_batches)
    if stacks.residents[micro_batches[0].graft].graft.reads_ahead:
        return packed
    assert isinstance(packed.attention, WholeSequences)
    rows, attention, row = shared(packed.rows, packed.attention)
    if len(rows) == len(packed.rows):  # nothing to share
        return packed
    return replace(packed, rows=rows, attention=attention, counted=row.to(backbone.device)[packed.counted])


def _packed(backbone: Backbone, micro_batches: Sequence[MicroBatch]) -> _Packed:
    builder = RowBuilder()
    counted: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    bounds: list[tuple[int, int]] = []
    for micro_batch in micro_batches:
        learned = len(counted)
        for sample, number in zip(micro_batch.samples, micro_batch.numbers, strict=True):
            own = builder.add(
                sample.ids[:-1],
                graft=micro_batch.graft,
                position=micro_batch.prefix_length,
                virtual=micro_batch.virtual_length,
                prompt=Input(0, sample.prompt),
                draw=None if micro_batch.key is None else (micro_batch.key, number),
            )
            told = [place for place, weight in enumerate(sample.weights[1:]) if weight]  # no guess of a virtual token
            counted += [own[place] for place in told]
            targets += [sample.ids[1 + place] if sample.label is None else sample.label for place in told]
            weights += [sample.weights[1 + place] for place in told]
        bounds.append((learned, len(counted)))
    wide = torch.promote_types(backbone.dtype, torch.float32)
    places, labels = (torch.tensor(x, dtype=torch.long).to(backbone.device) for x in (counted, targets))
    return _Packed(
        builder.rows(),
        builder.attention(backbone.shape),
        any(micro_batch.head is not None for micro_batch in micro_batches),
        places,
        labels,
        torch.tensor(weights, dtype=wide),
        tuple(bounds),
    )
