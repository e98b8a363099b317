"""The activations of a branch and their derivatives."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from polygraft.kernels.common.pointwise import gelu, silu

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda h: h,
    "relu": F.relu,
    "gelu": gelu,
    "silu": silu,
    "tanh": torch.tanh,
}


def forward(act: str, hidden: Tensor) -> Tensor:
    """act(hidden), number by number."""
    return ACTIVATIONS[act](hidden)


def backward(act: str, grad_NMR: Tensor, hidden_NMR: Tensor) -> Tensor:
    """grad * act'(hidden), `hidden` being the activation's input; member by member, since torch computes a tensor's
    last elements by other functions, so that a segment's bits would depend on where the batched product ends."""
    if act in ("identity", "relu") or len(hidden_NMR) == 1:
        return _backward(act, grad_NMR, hidden_NMR)
    return torch.stack([_backward(act, grad, hidden) for grad, hidden in zip(grad_NMR, hidden_NMR, strict=True)])


def _backward(act: str, grad: Tensor, hidden: Tensor) -> Tensor:
    match act:
        case "identity":
            return grad
        case "relu":
            return torch.where(hidden > 0, grad, 0)
        case "gelu":
            return torch.ops.aten.gelu_backward(grad, hidden)  # type: ignore[no-any-return]
        case "silu":
            return torch.ops.aten.silu_backward(grad, hidden)  # type: ignore[no-any-return]
        case "tanh":
            return grad * (1 - torch.tanh(hidden).square())
        case _:
            raise KeyError(act)
