"""The fastest frozen linear for some weights on this machine."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from polygraft.grafts.runtime.linears.compiled import CompiledLinear
from polygraft.grafts.runtime.linears.gpu import GpuLinear
from polygraft.grafts.runtime.linears.plain import PlainLinear
from polygraft.grafts.runtime.linears.protocol import FrozenLinear
from polygraft.kernels.dense.op import supports

BLOCK = 256  # rows of one product in training; with AMX, 128 cost 6% of a packed step of 512 rows
HEAD_BLOCK = 128  # the same for the LM head, whose products are the largest tensors of a step


def frozen_linear(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None], *, prepack: bool, block: int | None
) -> FrozenLinear:
    """`prepack` and `block` mean what they do for `PlainLinear`."""
    if weights[0].is_cuda:
        return GpuLinear(weights, biases)
    if all(map(supports, weights)):
        return CompiledLinear(weights, biases, prepack=prepack)
    return PlainLinear(weights, biases, prepack=prepack, block=block)
