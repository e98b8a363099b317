"""The activations of a branch and their derivatives."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda h: h,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


def backward(act: str, grad: Tensor, hidden: Tensor) -> Tensor:
    """grad * act'(hidden), `hidden` being the activation's input."""
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
