"""A number's sigmoid, silu, gelu or tanh is the same wherever it lies, and what torch says it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from polygraft.kernels.branch.activation import ACTIVATIONS
from polygraft.kernels.common.pointwise import gelu, sigmoid, silu

PAIRS = {"sigmoid": (sigmoid, torch.sigmoid), "silu": (silu, F.silu), "gelu": (gelu, F.gelu)}
FUNCTIONS = {"sigmoid": sigmoid, **ACTIVATIONS}


def every_bf16() -> Tensor:
    found = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16)
    return found[torch.isfinite(found)]


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_numbers_bits_do_not_depend_on_where_it_lies(
    dtype: torch.dtype, function: Callable[[Tensor], Tensor]
) -> None:
    chance = torch.Generator().manual_seed(0)
    numbers = every_bf16() if dtype == torch.bfloat16 else 4 * torch.randn(1 << 16, generator=chance)
    whole = function(numbers)
    for length in (7, 33, 1000):  # of a tensor by itself, all of which the last elements are where it is short
        parts = torch.cat([function(part) for part in numbers.split(length)])
        assert torch.equal(parts.view(torch.int16), whole.view(torch.int16)), length


@pytest.mark.parametrize(("ours", "theirs"), PAIRS.values(), ids=PAIRS.keys())
def test_it_is_torchs_function_to_the_last_bits(
    ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor]
) -> None:
    numbers = torch.cat([torch.linspace(-30, 30, 6001), torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4])])
    torch.testing.assert_close(ours(numbers), theirs(numbers.double()).float(), rtol=2e-6, atol=3e-7)
