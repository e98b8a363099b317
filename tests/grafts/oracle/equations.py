"""Hooks that several families of rows share."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from polygraft.launch.demo.oracle.naive import Hook, Parts, after


def dense(change: Callable[[Tensor, Parts], Tensor]) -> Hook:
    """y + x dW^T with dW = change(W, parts)."""

    def hook(module: nn.Module, parts: Parts) -> None:
        W = module.get_parameter("weight")
        after(lambda x, y, p: y + x @ change(W, p).T)(module, parts)

    return hook
