"""Which entries or rows of W a sparse slot trains: chosen at random, by magnitude, or by what the bare backbone's loss
on the job's first samples says of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polygraft.grafts.methods.declare import Start

if TYPE_CHECKING:
    from torch import Tensor

    from polygraft.grafts.init import Making
    from polygraft.grafts.sizes import TensorSpec


def places(flat: Tensor, width: int) -> Tensor:
    """(row, column) of entries given by their places in the flat matrix, in its order: [n, 2]."""
    import torch

    ordered = flat.sort().values
    return torch.stack([ordered // width, ordered % width], dim=1)


def best(scores: Tensor, count: int) -> Tensor:
    """(row, column) of the `count` highest of `scores` [out, in]."""
    return places(scores.flatten().topk(count).indices, scores.shape[1])


def _random(tensor: TensorSpec, making: Making) -> Tensor:
    import torch

    assert tensor.site is not None
    d_in, d_out = making.backbone.shape.dims(tensor.site.name)
    order = torch.randperm(d_in * d_out, generator=making.generator(tensor.name))
    return places(order[: tensor.shape[0]], d_in)


def _largest(tensor: TensorSpec, making: Making) -> Tensor:
    assert tensor.site is not None
    return best(making.weight(tensor.site).abs(), tensor.shape[0])


def _smallest(tensor: TensorSpec, making: Making) -> Tensor:
    assert tensor.site is not None
    return best(-making.weight(tensor.site).abs(), tensor.shape[0])


def _fisher(tensor: TensorSpec, making: Making) -> Tensor:
    """The largest diagonal entries of the empirical Fisher information."""
    assert tensor.site is not None
    return best(making.fisher[tensor.site], tensor.shape[0])


def _moved_rows(tensor: TensorSpec, making: Making) -> Tensor:
    """The rows that a first gradient step moves most in the L1 norm."""
    assert tensor.site is not None
    moved = making.gradients[tensor.site].abs().sum(1)
    return moved.topk(tensor.shape[0]).indices.sort().values.unsqueeze(1)


STARTS = (
    Start("random_entries", _random),
    Start("largest_entries", _largest),
    Start("smallest_entries", _smallest),
    Start("fisher_entries", _fisher),
    Start("moved_rows", _moved_rows),
)
