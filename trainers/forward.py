"""One packed forward: the rows of several jobs' samples in one batch, and the losses and gradients that come back per
job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from polygraft.grafts.runtime.attention import WholeSequences
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.embedding import virtual_ids
from polygraft.grafts.runtime.route import Input, Rows, Span
from polygraft.grafts.runtime.stacks import Stacks
from polygraft.kernels.common.dropout import combine
from polygraft.trainers.job import Sample
from polygraft.trainers.loss import losses_and_gradient, token_losses


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One job's part of a forward: samples (with their numbers, for dropout) through resident `graft`.

    `normaliser` is the loss weight of the job's whole global batch; `key` hashes (job seed, step), None where
    nothing is drawn. Every sequence begins with `virtual_length` virtual tokens.
    """

    graft: int
    prefix_length: int
    samples: tuple[Sample, ...]
    numbers: tuple[int, ...]
    normaliser: float
    key: int | None = None
    virtual_length: int = 0

    @property
    def rows(self) -> int:
        return self.tokens + self.virtual_length * len(self.samples)

    @property
    def tokens(self) -> int:
        """The samples' own: virtual ones are nobody's text."""
        return sum(sample.rows for sample in self.samples)


@dataclass(frozen=True, slots=True)
class _Packed:
    """`counted` [n] are the rows that something is learned from, with their `targets` [n] on the backbone's device and
    their `weights` [n] on the CPU; `bounds` are each share's part of these."""

    rows: Rows
    attention: WholeSequences
    counted: Tensor
    targets: Tensor
    weights: Tensor
    bounds: tuple[tuple[int, int], ...]


def train(backbone: Backbone, stacks: Stacks, shares: Sequence[MicroBatch]) -> list[float]:
    """Forward and backward of all shares; gradients stay in the stacks. Returns each share's loss, already normalised.

    A share's loss and gradient are functions of the share alone (docs/architecture.md, row invariance).
    """
    packed = _pack(backbone, shares)
    for leaf in stacks.leaves():
        leaf.grad = None
    hidden = backbone.forward(packed.rows, stacks, packed.attention)
    factors = packed.weights.clone()
    for share, (start, stop) in zip(shares, packed.bounds):
        factors[start:stop] /= share.normaliser
    losses, gradient = losses_and_gradient(
        backbone, hidden.detach()[packed.counted], packed.targets, factors.to(hidden.device)
    )
    into = torch.zeros_like(hidden)
    into[packed.counted] = gradient
    if hidden.requires_grad:
        torch.autograd.backward(hidden, into)
    return _sums(losses, factors, packed.bounds)


def probe(backbone: Backbone, stacks: Stacks, shares: Sequence[MicroBatch]) -> list[tuple[float, float]]:
    """Each share's normalised loss at the two points around its job's tensors, residents 2 graft and 2 graft + 1 of
    `stacks`, in one forward. There is no backward, and nothing is kept for one."""
    twice = [replace(share, graft=2 * share.graft + side) for share in shares for side in (0, 1)]
    losses = evaluate(backbone, stacks, twice)
    return [(a / share.normaliser, b / share.normaliser) for share, a, b in zip(shares, losses[::2], losses[1::2])]


@torch.inference_mode()
def evaluate(backbone: Backbone, stacks: Stacks, shares: Sequence[MicroBatch]) -> list[float]:
    """Summed weighted loss of each share, not normalised, and without dropout where its key is None."""
    packed = _pack(backbone, shares)
    hidden = backbone.forward(packed.rows, stacks, packed.attention)
    losses = token_losses(backbone, hidden[packed.counted], packed.targets)
    return _sums(losses.to(packed.weights.dtype), packed.weights, packed.bounds)


def _sums(losses: Tensor, factors: Tensor, bounds: Sequence[tuple[int, int]]) -> list[float]:
    """Each share's weighted loss; here the host waits for the device."""
    found = losses.cpu()
    return [float((found[start:stop] * factors[start:stop]).sum()) for start, stop in bounds]


def _pack(backbone: Backbone, shares: Sequence[MicroBatch]) -> _Packed:
    ids: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    positions: list[Tensor] = []
    sequences: list[tuple[int, int]] = []
    spans: list[Span] = []
    keys: list[Tensor] = []
    inputs: list[Input] = []
    bounds: list[tuple[int, int]] = []
    counted: list[int] = []
    for share in shares:
        start, learned = len(ids), len(counted)
        virtual = virtual_ids(share.virtual_length)
        for sample, number in zip(share.samples, share.numbers):
            count = len(virtual) + sample.rows
            sequences.append((len(ids), count))
            positions.append(torch.arange(count) + share.prefix_length)
            keys.append(_dropout_keys(share.key, number, count))
            first = len(ids) + len(virtual)
            inputs.append(Input(first, first + sample.prompt))
            ids += [*virtual, *sample.ids[:-1]]
            told = [place for place, weight in enumerate(sample.weights[1:]) if weight]  # no guess of a virtual token
            counted += [first + place for place in told]
            targets += [sample.ids[1 + place] for place in told]
            weights += [sample.weights[1 + place] for place in told]
        spans.append(Span(start, len(ids), share.graft))
        bounds.append((learned, len(counted)))
    dropped = any(share.key is not None for share in shares)
    rows = Rows(
        torch.tensor(ids),
        torch.cat(positions),
        tuple(spans),
        torch.cat(keys) if dropped else None,
        inputs=tuple(inputs),
    )
    wide = torch.promote_types(backbone.dtype, torch.float32)
    attention = WholeSequences(tuple(sequences), backbone.shape)
    places, labels = (torch.tensor(x, dtype=torch.long).to(backbone.device) for x in (counted, targets))
    return _Packed(rows, attention, places, labels, torch.tensor(weights, dtype=wide), tuple(bounds))


def _dropout_keys(key: int | None, number: int, rows: int) -> Tensor:
    tokens = torch.arange(rows, dtype=torch.int32)
    if key is None:
        return torch.zeros_like(tokens)
    sample = combine(torch.tensor(key, dtype=torch.int32), number)
    return combine(sample.expand(rows), tokens)
