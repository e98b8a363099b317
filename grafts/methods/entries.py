"""Which entries of W a sparse slot trains: chosen at random or by magnitude. Beside it, what every choice shares."""

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


STARTS = (Start("random_entries", _random), Start("largest_entries", _largest), Start("smallest_entries", _smallest))
